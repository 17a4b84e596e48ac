"""An ensemble inside one model against its members one by one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
import tiny_chat
from loftq.api import load_base
from loftq.chat import open_session
from loftq.integrations.causal import open_causal
from loftq.integrations.decode import GraphDecoder
from loftq.integrations.gauge import rotated_start
from loftq.integrations.generate import Sampling, answer
from loftq.integrations.llama_like import NotReadable, read_model
from loftq.integrations.members import MembersError, load_members_, member_folders

MEMBERS = 3


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one backbone whose adapters were moved apart, as training would."""
    folder = tmp_path_factory.mktemp("members")
    model = tiny_chat.write_model(folder / "model")
    loftq.quantize(model, folder / "out", bits=2, rank=4, alpha=8, device="cpu")
    for seed in range(MEMBERS):
        run = rotated_start(folder / "out", folder / "members" / str(seed), seed=seed)
        file = run / "adapter/adapter_model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        moved = {
            name: value + 30 * value.std() * torch.randn(value.shape, generator=generator)
            for name, value in load_file(file).items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    names = [f"members/{seed}" for seed in range(MEMBERS)]
    (folder / "ensemble.json").write_text(json.dumps({"members": names}))
    return folder


def mean_log_probabilities(ensemble: Path, ids: torch.Tensor) -> torch.Tensor:
    """Member after member, (rows, tokens, vocabulary)."""
    found = []
    for run in member_folders(ensemble) or ():
        opened = open_causal(run, device="cpu")
        with torch.no_grad():
            found.append(opened.model(ids).logits.float().softmax(-1))
    assert (found[0].log() - found[1].log()).abs().max() > 0.1, "members are to differ"
    return torch.stack(found).mean(0).log()


def test_logits_are_the_logarithm_of_the_mean_probability(ensemble: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    opened = open_causal(ensemble, device="cpu")
    with torch.no_grad():
        together = opened.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(4)[None]
        ).logits
    assert torch.allclose(together, mean_log_probabilities(ensemble, ids), atol=1e-4)


def test_generation_takes_the_likeliest_token_of_the_mean(ensemble: Path) -> None:
    opened = open_causal(ensemble, device="cpu")
    prompt, wanted = [5, 6, 7], [5, 6, 7]
    for _ in range(6):
        likeliest = mean_log_probabilities(ensemble, torch.tensor([wanted]))[0, -1].argmax()
        wanted.append(int(likeliest))
    stepwise = GraphDecoder(opened.model, max_length=16)
    found = stepwise.generate(torch.tensor([prompt]), max_new_tokens=6)
    assert found[0].tolist() == wanted
    said = answer(opened.model, opened.tokenizer, prompt, Sampling(max_new_tokens=6))
    text = opened.tokenizer.decode(wanted[3 : 3 + said.tokens], skip_special_tokens=True)
    assert said.text == text


def test_the_one_call_decoder_leaves_members_to_transformers(ensemble: Path) -> None:
    """Whichever it meets first, the hooks that average or the layers of all members."""
    opened = open_causal(ensemble, device="cpu")
    with pytest.raises(NotReadable, match="LlamaForCausalLM has hooks, which would not run"):
        read_model(opened.model, 16)
    opened.model._forward_hooks.clear()
    opened.model._forward_pre_hooks.clear()
    with pytest.raises(NotReadable, match="q_proj is a MemberLinear"):
        read_model(opened.model, 16)
    said = open_session(ensemble, device="cpu").reply("a word").answer
    assert said.tokens > 0


def test_what_cannot_be_computed_together_is_refused(ensemble: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an ensemble brings its adapters"):
        open_causal(ensemble, adapter="none", device="cpu")
    first, other = ensemble / "members/0/adapter", tmp_path / "other"
    shutil.copytree(first, other)
    file = other / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "q_proj" not in n}, file)
    model = load_base(ensemble / "out")
    with pytest.raises(MembersError, match="other layers or another rank"):
        load_members_(model, [first, other])
    (tmp_path / "ensemble.json").write_text("{}")
    with pytest.raises(MembersError, match="cannot be read"):
        member_folders(tmp_path)
    assert member_folders(other) is None
