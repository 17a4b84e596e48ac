"""One trained adapter, one prompt, 64 greedy tokens: each export in its engine beside the original.

    python benchmarks/export/engines.py MODEL_FOLDER --work WORK            # what this venv can run
    python benchmarks/export/engines.py --work WORK --table TABLE.md        # rows of all venvs

The first run quantizes MODEL_FOLDER in each format, trains the start adapter for a few steps on
eight short chats, exports, and keeps what loftq's own packed model answers (needs loftq's `dev`
extra). Then, and in every other environment given the same WORK, each row whose packages are there
is read by its engine; the others say what they lack. A row that is in WORK/rows is kept. The first
difference ends "same tokens"; logits are compared on the reference's tokens, so that all 64 steps
count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

STEPS, TRAIN_STEPS, LEARNING_RATE, SEED = 64, 30, 5e-4, 0
PROMPT = "Tell me about the moon and the sea."
CHATS = {
    "What is a river?": "A river is water that walks to the sea, arr!",
    "Why is the sky blue?": "The sky is blue for it mirrors the sea, arr!",
    "Name a fruit.": "An orange be a fruit, arr! Good against scurvy.",
    "What do bees make?": "Bees make honey, sweet as rum, arr!",
    "How many legs has a spider?": "Eight legs has a spider, arr! Two more than a beetle.",
    "What is snow?": "Snow be rain that froze on its voyage, arr!",
    "Who writes books?": "Scribes write books, arr! Pirates burn them.",
    "What is bread made of?": "Bread be made of flour, water and yeast, arr!",
}
Answer = tuple[list[int], np.ndarray]
"""Tokens chosen greedily, and logits (64, vocabulary) on the reference's tokens."""


@dataclass(frozen=True)
class Row:
    """One engine reading one export."""

    label: str
    format: str
    target: str
    packages: tuple[str, ...]
    read: Callable[[Path, Path, dict[str, Any]], Answer]
    """(WORK/packed folder, export folder, reference) -> what the engine answers."""


def chat(model: Any, reference: dict[str, Any]) -> Answer:
    """Ask a model of transformers."""
    import torch

    prompt, wanted = reference["prompt"], reference["tokens"]
    model.eval()
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        ids = torch.tensor([prompt + wanted]) if wanted else found
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return found[0, len(prompt) :].tolist(), logits.float().numpy()


def packed(name: str, work: Path) -> Any:
    """loftq's packed model with the trained adapter, float32."""
    import torch

    import loftq

    folder = work / "packed" / name
    return loftq.load(folder, adapter=work / "trained" / name, dtype=torch.float32)


def own(folder: Path, _: Path, reference: dict[str, Any]) -> Answer:
    """The packed model again: what a second run of the same thing differs by."""
    return chat(packed(folder.name, folder.parents[1]), reference)


def rounded(folder: Path, _: Path, reference: dict[str, Any]) -> Answer:
    """The same, each layer's input rounded as llama.cpp does: 8 bits, a scale per 32 values."""
    import torch

    from loftq.nn import packed_layers

    def round_input(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        blocks = inputs[0].unflatten(-1, (-1, 32))
        d = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(d > 0, (blocks / d).round(), 0)
        return ((codes * d.half().float()).flatten(-2),)

    model = packed(folder.name, folder.parents[1])
    for layer in packed_layers(model).values():
        layer.register_forward_pre_hook(round_input)
    return chat(model, reference)


def in_dtype(name: str, *, inputs: bool) -> Callable[[Path, Path, dict[str, Any]], Answer]:
    """The packed model with its weights, and its layers' inputs, rounded to a 16-bit dtype."""

    def read(folder: Path, _: Path, reference: dict[str, Any]) -> Answer:
        import torch
        from peft import PeftModel

        from loftq.api import load_base
        from loftq.nn import packed_layers

        dtype, work = getattr(torch, name), folder.parents[1]
        base = load_base(folder, dtype=torch.float32)
        paths = list(packed_layers(base))
        base = base.dequantize()
        for path in paths:
            layer = base.get_submodule(path)
            layer.weight.data = layer.weight.data.to(dtype).float()
            if inputs:
                layer.register_forward_pre_hook(lambda _, x: (x[0].to(dtype).float(),))
        return chat(PeftModel.from_pretrained(base, work / "trained" / folder.name), reference)

    return read


def in_transformers(
    prepare: Callable[[Any], Any] = lambda base: base, **options: Any
) -> Callable[[Path, Path, dict[str, Any]], Answer]:
    """A reader through from_pretrained and PEFT, in float32.

    Args:
        prepare: what to do with the base before the adapter goes on.
        **options: of from_pretrained.
    """

    def read(_: Path, export: Path, reference: dict[str, Any]) -> Answer:
        import torch
        import transformers as hf
        from peft import PeftModel

        given = {key: make() if callable(make) else make for key, make in options.items()}
        base = hf.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, **given)
        prepare(base)
        return chat(PeftModel.from_pretrained(base, export / "adapter"), reference)

    return read


def without_bfloat16(base: Any) -> None:
    """Keep bitsandbytes from its CPU kernel, which multiplies in bfloat16."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def one_pass(base: Any) -> None:
    """compressed-tensors unpacks its layers in it."""
    base(**base.dummy_inputs)


def plain_kernel() -> Any:
    """GPTQModel's kernel in PyTorch instead of the one for 4 bits, which multiplies in bfloat16."""
    import transformers as hf

    return hf.GPTQConfig(bits=4, backend="gptq_torch")


def in_llama_cpp(model: str) -> Callable[[Path, Path, dict[str, Any]], Answer]:
    """A reader through llama-cpp-python, with a float32 cache."""

    def read(_: Path, export: Path, reference: dict[str, Any]) -> Answer:
        from llama_cpp import Llama

        engine = Llama(
            str(export / model), lora_path=str(export / "adapter.gguf"), n_ctx=256, n_threads=1,
            logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False, seed=SEED,
        )  # fmt: skip
        prompt = reference["prompt"]
        ids = engine.tokenize(reference["text"].encode(), add_bos=False, special=True)
        assert ids == prompt, "llama.cpp splits the prompt into other tokens"

        def ask(forced: list[int] | None) -> Answer:
            engine.reset()
            engine.eval(prompt)
            tokens, logits = [], []
            for step in range(STEPS):
                logits.append(np.array(engine.scores[engine.n_tokens - 1], dtype=np.float32))
                tokens.append(int(logits[-1].argmax()))
                engine.eval([tokens[-1] if forced is None else forced[step]])
            return tokens, np.stack(logits)

        return ask(None)[0], ask(reference["tokens"])[1]

    return read


BNB, CT, LLAMA = "bitsandbytes", "compressed-tensors", "llama-cpp-python"
GPTQ = ("gptqmodel", "optimum", "peft")
ROWS = (
    Row("packed, twice", "nf4-g64-dq", "", ("loftq",), own),
    Row("bitsandbytes", "nf4-g64-dq", "bnb", (BNB, "peft"), in_transformers()),
    Row("packed, weights and inputs in bfloat16", "nf4-g64-dq", "", ("loftq",),
        in_dtype("bfloat16", inputs=True)),
    Row("bitsandbytes, bfloat16 kernel off", "nf4-g64-dq", "bnb", (BNB, "peft"),
        in_transformers(without_bfloat16)),
    Row("GPTQ", "sint4-g64-f16", "gptq", GPTQ, in_transformers(device_map="cpu")),
    Row("packed, weights and inputs in bfloat16", "sint4-g64-f16", "", ("loftq",),
        in_dtype("bfloat16", inputs=True)),
    Row("GPTQ, plain kernel", "sint4-g64-f16", "gptq", GPTQ,
        in_transformers(device_map="cpu", quantization_config=plain_kernel)),
    Row("packed, weights in float16", "sint4-g64-f16", "", ("loftq",),
        in_dtype("float16", inputs=False)),
    Row("compressed-tensors", "sint4-g64-f16", CT, (CT, "peft"), in_transformers(one_pass)),
    *(
        row
        for name in ("sint4-g32-f16", "iq4nl-g32-f16", "sint8-g32-f16")
        for row in (
            Row("llama.cpp", name, "gguf", (LLAMA,), in_llama_cpp("model.gguf")),
            Row("llama.cpp, weights as float32", name, "gguf", (LLAMA,),
                in_llama_cpp("model-f32.gguf")),
            Row("packed, inputs in 8 bits", name, "", ("loftq",), rounded),
        )
    ),
    Row("dense", "nf2-g64-dq", "dense", ("transformers", "loftq"),
        lambda _, export, reference: chat(_dense(export), reference)),
)  # fmt: skip
"""The rows of the table."""


def _dense(export: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(export, dtype="float32")


def prepare(model: Path, work: Path, name: str) -> None:
    """Quantize in one format, train the adapter, and keep the packed model's answer."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    import exported
    import loftq

    folder, trained = work / "packed" / name, work / "trained" / name
    if not (folder / "loftq.json").is_file():
        loftq.quantize(model, folder, format=name, seed=SEED, device="cpu")
    if not trained.is_dir():
        _train(folder, trained)
    if not (work / "reference" / f"{name}.npz").is_file():
        _reference(work, name)
    for target in sorted({row.target for row in ROWS if row.format == name and row.target}):
        export = work / "exports" / f"{name}-{target}"
        if not export.is_dir():
            loftq.export(folder, to=target, output=export, adapter=trained)
        if target == "gguf" and not (export / "model-f32.gguf").is_file():
            exported.as_float32(export / "model.gguf", export / "model-f32.gguf")


def _train(folder: Path, trained: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    import loftq
    from loftq.integrations.peft import backbone_of, write_lineage

    torch.manual_seed(SEED)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), loftq.load(folder, trainable=True)
    model.train()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenize=False
        )
        for q, a in CHATS.items()
    ]
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=LEARNING_RATE)
    for step in range(TRAIN_STEPS):
        pair = [texts[(2 * step + k) % len(texts)] for k in (0, 1)]
        batch = tokenizer(pair, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(trained)
    write_lineage(trained, backbone_of(model.get_base_model()))


def _reference(work: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "packed" / name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    tokens, logits = chat(packed(name, work), {"prompt": prompt, "tokens": []})
    (work / "reference").mkdir(exist_ok=True)
    np.savez(work / "reference" / f"{name}.npz", logits=logits)
    about = {"text": text, "prompt": prompt, "tokens": tokens, "answer": tokenizer.decode(tokens)}
    (work / "reference" / f"{name}.json").write_text(json.dumps(about))


def compare(row: Row, work: Path) -> dict[str, Any]:
    """One row: the engine's answer against the packed model's."""
    reference = json.loads((work / "reference" / f"{row.format}.json").read_text())
    logits = np.load(work / "reference" / f"{row.format}.npz")["logits"]
    start = time.perf_counter()
    export = work / "exports" / f"{row.format}-{row.target}"
    tokens, found = row.read(work / "packed" / row.format, export, reference)
    difference = (found - logits).astype(np.float64)
    wanted = reference["tokens"]
    same = next((k for k in range(STEPS) if tokens[k] != wanted[k]), STEPS)
    top = np.sort(logits, 1)
    return {
        "row": row.label,
        "format": row.format,
        "export": row.target,
        "same_tokens": same,
        "margin": None if same == STEPS else float(top[same, -1] - top[same, -2]),
        "max": float(np.abs(difference).max()),
        "rms": float(np.sqrt((difference**2).mean())),
        "logit_std": float(logits.std()),
        "seconds": time.perf_counter() - start,
        "versions": {name: metadata.version(name) for name in (*row.packages, *_also())},
        "date": time.strftime("%Y-%m-%d"),
    }


def _also() -> list[str]:
    known = {found.metadata["Name"] for found in metadata.distributions()}
    return [name for name in ("torch", "transformers") if name in known]


def _missing(row: Row) -> list[str]:
    known = {str(d.metadata["Name"]).lower().replace("_", "-") for d in metadata.distributions()}
    return [name for name in row.packages if name not in known]


def table(work: Path) -> str:
    """All rows measured so far, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted((work / "rows").glob("*.json"))]
    lines = [
        "| engine | format | export | same tokens of 64 | margin there | max logit difference | "
        "rms | logits' std | versions |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for r in found:
        margin = "-" if r["margin"] is None else f"{r['margin']:.2g}"
        versions = ", ".join(f"{k} {v}" for k, v in dict(sorted(r["versions"].items())).items())
        lines.append(
            f"| {r['row']} | {r['format']} | {r['export'] or '-'} | {r['same_tokens']} | {margin} "
            f"| {r['max']:.2g} | {r['rms']:.2g} | {r['logit_std']:.2f} | {versions} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="needed by the first run only")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", metavar="PACKAGE", help="only rows that need this package")
    parser.add_argument("--table", type=Path, help="write the rows of WORK here")
    args = parser.parse_args()
    (args.work / "rows").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(ROWS if args.table is None else ()):
        place = args.work / "rows" / f"{number:02d}.json"
        if place.is_file() or (args.only is not None and args.only not in row.packages):
            continue
        if args.model is not None:
            prepare(args.model, args.work, row.format)
        missing = _missing(row)
        if missing:
            print(f"{row.label} ({row.format}): skipped, not installed: {', '.join(missing)}")
            continue
        found = compare(row, args.work)
        place.write_text(json.dumps(found, indent=2))
        print(json.dumps(found), flush=True)
    text = table(args.work)
    print(text) if args.table is None else args.table.write_text(text)


if __name__ == "__main__":
    main()
