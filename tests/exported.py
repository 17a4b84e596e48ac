"""What the tests of exports start from: a tiny Llama that every engine could hold, and its RUN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import loftq

TEXT = [
    "A river carries water and mud to the sea, 12 km a day.",
    "The sea gives back rain: don't ask, it's 4 parts salt!",
    "Ask the river, ask the sea.\nAsk nobody  else.",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RANK = 4
START = "init_adapter"


def tokenizer() -> Any:
    """Byte-level BPE with SmolLM2's rules, its special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **names)


def sentencepiece() -> Any:
    """BPE with a byte for each unknown character, as Llama 2 has it in tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    learned.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    made = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = learned.normalizer
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def write_model(folder: Path, kind: type = hf.LlamaConfig, **changes: Any) -> Path:
    """A random two-layer decoder of whole groups of 64, float32, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "initializer_range": 0.2,
    }  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(kind(**{**sizes, **changes})).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pack(model: Path, folder: Path, **options: Any) -> Path:
    """Quantize with the cheapest fit and one alternation: more would not make a better test."""
    loftq.quantize(
        model, folder, device="cpu", **{"rank": RANK, "scale_fit": "absmax", "iters": 1, **options}
    )
    return folder


def train(out: Path, folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """An adapter as training leaves it: the start adapter moved at random.

    Args:
        out: output of `quantize`.
        folder: adapter folder to make.
        seed: of the movement.
        **config: changes to adapter_config.json.
    """
    shutil.copytree(out / START, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in sorted(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] += 0.3 * tensors[name].std() * noise
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    change_config(folder, **config)
    return folder


def change_config(folder: Path, **config: Any) -> None:
    """Change keys of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def prompt() -> torch.Tensor:
    """Token ids (2, 24) for models of 320 tokens."""
    return torch.randint(5, 290, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """What a model answers to the prompt, float32."""
    with torch.no_grad():
        return model.eval()(input_ids=prompt() if ids is None else ids).logits.float()


def rounded(out: Path, adapter: Path, dtype: torch.dtype) -> Any:
    """The packed model, in float32, with its packed weights rounded to `dtype` as they unpack."""
    from peft import PeftModel

    from loftq.api import load_base
    from loftq.nn import packed_layers

    base = load_base(out, dtype=torch.float32)
    modules = list(packed_layers(base))
    base = base.dequantize()
    for path in modules:
        weight = base.get_submodule(path).weight
        weight.data = weight.data.to(dtype).float()
    return PeftModel.from_pretrained(base, adapter)


def as_float32(source: Path, output: Path) -> None:
    """A GGUF file with its packed weights as gguf dequantizes them.

    llama.cpp rounds no activations then, so that what is left tells names, row order, rope and
    adapter apart from that.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(output, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
