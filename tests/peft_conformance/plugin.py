"""pytest plugin: PEFT's own tests get packed models instead of those they name.

A hub id becomes a tiny random model, quantized to a folder by loftq and loaded by transformers; the
small modules that PEFT's test files define themselves are packed in memory. A test passes only if
it put an adapter on a packed layer.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import loftq
from loftq.formats import parse_format
from loftq.integrations.builders import BUILDERS
from loftq.nn import PackedLayer, pack_layer
from loftq.nn.replace import builder_of
from loftq.rounding.rtn import round_to_nearest
from zoo import BLOCKS, HEADS, ODD, VOCAB, WIDTH, ZOO

MODULE_FORMAT = "nf4-g16"
HUB_FORMATS = ("nf4-g32", "int8-g32", "nf4-g64")
"""Taken in turn by the models: the layer's arithmetic differs, PEFT must not notice."""


def _gptj() -> hf.PreTrainedConfig:
    return hf.GPTJConfig(
        vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS,
        rotary_dim=4, n_inner=ODD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _deberta() -> hf.PreTrainedConfig:
    return hf.DebertaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=ODD, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, max_position_embeddings=64, pad_token_id=0,
        relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
    )  # fmt: skip


def _deep_opt() -> hf.PreTrainedConfig:
    config = ZOO["opt"].config()
    config.num_hidden_layers = 12  # tests of this model name blocks up to its last
    return config


FAMILIES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "debertav2": ZOO["deberta-v2"].config,
    "deberta": _deberta,
    "roberta": ZOO["roberta"].config,
    "bert": ZOO["bert"].config,
    "opt-125m": _deep_opt,
    "opt": ZOO["opt"].config,
    "gptj": _gptj,
    "gpt2": ZOO["gpt2"].config,
    "llama": ZOO["llama"].config,
    "qwen2": ZOO["qwen2"].config,
    "mistral": ZOO["mistral"].config,
    "gemma3": ZOO["gemma3"].config,
    "t5": ZOO["t5"].config,
    "bart": ZOO["bart"].config,
}
"""Part of a hub id, the first match counts -> a tiny configuration of that architecture."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which tests to keep: the list, or (to renew it) all that concern LoRA."""
    parser.addoption("--loftq-ids", help="file of test ids, one a line")


def pytest_configure(config: pytest.Config) -> None:
    """Stand in for what PEFT's test files import but LoRA tests do not need, and for the hub."""
    torch.set_num_threads(1)
    for name, member in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if importlib.util.find_spec(name) is None:
            stand_in = ModuleType(name)
            stand_in.__spec__ = importlib.util.spec_from_loader(name, loader=None)
            setattr(stand_in, member, type(member, (), {}))
            sys.modules[name] = stand_in
    config.stash[_HUB] = hub = Hub()
    hub.install()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the quantized models."""
    if hub := config.stash.get(_HUB, None):
        shutil.rmtree(hub.folder, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the listed tests, and pack the modules that their files define."""
    if path := config.getoption("--loftq-ids"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        listed = {line for line in lines if line and not line.startswith("#")}
        if missing := listed - {item.nodeid for item in items}:
            raise pytest.UsageError(
                f"{len(missing)} listed tests do not exist: {sorted(missing)[:3]}"
            )
        kept = [item for item in items if item.nodeid in listed]
    else:
        kept = [item for item in items if _concerns_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for module in {item.module for item in kept}:  # type: ignore[attr-defined]
        _pack_classes(module)
    # PEFT's helper asks the hub once for each id, to be sure that it is cached.
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _Everything()  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that passed without an adapter on a packed layer: it says nothing about us."""
    attached: list[str] = []
    original = LoraLayer.__init__

    @functools.wraps(original)
    def spy(self: LoraLayer, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, base_layer, *args, **kwargs)
        if isinstance(self.get_base_layer(), PackedLayer):
            attached.append(type(self).__name__)

    LoraLayer.__init__ = spy
    try:
        yield
    finally:
        LoraLayer.__init__ = original
    if not attached:
        pytest.fail("NOT PACKED: no adapter was attached to a packed layer", pytrace=False)


def pytest_report_header() -> str:
    """Versions that decide the results."""
    return f"loftq {loftq.__version__}, peft {peft.__version__}, transformers {hf.__version__}"


class Hub:
    """The models that PEFT's tests ask for by hub id."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loftq-peft-"))
        self._made: dict[str, Path] = {}

    def install(self) -> None:
        """Let every auto class load the stand-in of a hub id."""
        for auto in _subclasses(_BaseAutoModelClass):
            self._redirect(auto)
        hf.AutoTokenizer.from_pretrained = _tokenizer  # type: ignore[method-assign]

    def _redirect(self, auto: Any) -> None:
        original = auto.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> nn.Module:
            if not Path(name).is_dir():
                name = self.model(cls, str(name), kwargs)
            return original(cls, name, *args, **kwargs)

        auto.from_pretrained = classmethod(from_pretrained)

    def model(self, auto: Any, name: str, kwargs: dict[str, Any]) -> Path:
        """Folder of the quantized stand-in; options that change the config are taken over."""
        options = {k: kwargs.pop(k) for k in ("num_labels", "tie_word_embeddings") if k in kwargs}
        key = f"{auto.__name__}-{name.replace('/', '-')}-{options}"
        if key not in self._made:
            self._made[key] = self._quantize(
                auto, name, options, self.folder / str(len(self._made))
            )
        return self._made[key]

    def _quantize(self, auto: Any, name: str, options: dict[str, Any], folder: Path) -> Path:
        lowered = name.rsplit("/", 1)[-1].lower()
        family = next((part for part in FAMILIES if part in lowered), None)
        if family is None:
            raise OSError(f"{name}: the conformance plugin has no stand-in for this model")
        config = FAMILIES[family]()
        for option, value in options.items():
            setattr(config, option, value)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            auto.from_config(config).float().save_pretrained(folder / "dense")
            number = list(FAMILIES).index(family)
            loftq.quantize(
                folder / "dense", folder / "packed", device="cpu", method="qlora", rank=2,
                format=HUB_FORMATS[number % len(HUB_FORMATS)], allow_uncovered=True,
            )  # fmt: skip
        return folder / "packed"


def _tokenizer(*_: Any, **__: Any) -> Callable[..., hf.BatchEncoding]:
    """A tokenizer that knows one sentence."""

    def tokenize(*_: Any, **__: Any) -> hf.BatchEncoding:
        return hf.BatchEncoding(ZOO["bert-masked"].inputs())

    return tokenize


class _Everything(dict):
    """PEFT's record of hub accesses, in which every model was seen before."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


_HUB = pytest.StashKey[Hub]()


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _concerns_lora(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("config_cls", peft.LoraConfig) is peft.LoraConfig


def _pack_classes(module: ModuleType) -> None:
    for kind in list(vars(module).values()):
        own = isinstance(kind, type) and issubclass(kind, nn.Module)
        if own and kind.__module__ == module.__name__:
            _pack_instances(kind)


def _pack_instances(kind: type[nn.Module]) -> None:
    original = kind.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is kind:
            pack_(self)

    kind.__init__ = init  # type: ignore[method-assign]


def pack_(model: nn.Module) -> None:
    """Pack every layer that has a packed form."""
    spec = parse_format(MODULE_FORMAT)
    attention = [p for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for path, module in list(model.named_modules()):
        inside = any(path.startswith(f"{parent}.") for parent in attention)
        if path and not inside and builder_of(module, BUILDERS) is not None:
            weight = module.weight.detach().float()
            if isinstance(module, hf.pytorch_utils.Conv1D):
                weight = weight.T.contiguous()
            rounded, _ = round_to_nearest(weight[None], spec, fit="absmax")
            pack_layer(model, path, rounded.pack(0), builders=BUILDERS)
