"""How much memory do loading, expanding and converting take? Peaks beside the size of the weights.

```bash
python benchmarks/memory.py --dtype bfloat16 --output benchmarks/results/memory.json
```

Language models of published shapes with Chameleon's codec and random weights, about 1 GB in bfloat16, are written in
every layout to a temporary folder. Then each operation runs in a process of its own:

- `load`, `load_reference`: `from_pretrained` of this package's layout and of the reference's.
- `save`, `to_base`, `to_taming`: `load`, and then what `transformers-liquid convert` writes.
- `from_reference`: `load_reference`, and then `save_pretrained`.
- `expand`: the bare language model and the codec are loaded, expanded and saved.

In the end every weight is read once, as a forward would: until then, weights that transformers maps from a file take no
memory. Expanding has to hold the old embeddings beside the new ones: 13 % of SmolLM2-360M, 27 % of Qwen2.5-0.5B.

Two peaks are printed, both above what the process held after its imports, and both divided by the bytes of the weights
that the operation ends with:

- `peak`: of the resident set (VmHWM of /proc/self/status, reset by /proc/self/clear_refs). It counts everything,
  weight files that are mapped into memory too, and is what a container's limit or `top` goes by. Goal: <= 1.2.
- `private`: of anonymous memory alone (RssAnon, looked at every 2 ms), without mapped files, whose pages the kernel can
  drop and read again. A second copy of the weights always shows here.

Linux only. The files are read once before, so that none of this waits for a disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from harness import machine, write
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from transformers_liquid import CHAMELEON_VQ_CONFIG, LiquidForCausalLM, LiquidVQModel, expand_vocabulary
from transformers_liquid.codecs.taming import save_taming_codec
from transformers_liquid.conversion.export import export_base_model
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor


GOAL = 1.2
SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2-360m": LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": LlamaConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


def main(args: argparse.Namespace) -> None:
    if args.operation is not None:
        print(json.dumps(measure(args.operation, args.folder)))
        return
    results = {shape: measure_all(shape, args) for shape in args.shapes}
    write(args.output, {"machine": machine(), "dtype": args.dtype, "results": results})


def measure_all(shape: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prints the table of one shape."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(Path(folder), SHAPES[shape], getattr(torch, args.dtype))
        print(f"\n{shape:<16} {'weights':>10} {'peak':>6} {'private':>8}   goal: peak <= {GOAL}")
        for operation in args.operations:
            command = [sys.executable, __file__, "--operation", operation, "--folder", folder]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            row |= {name: row[f"{name}_bytes"] / row["weight_bytes"] for name in ("peak", "private")}
            rows[operation] = row
            verdict = "met" if row["peak"] <= GOAL else "MISSED"
            weights = f"{row['weight_bytes'] / 1e6:.0f} MB"
            print(f"{operation:<16} {weights:>10} {row['peak']:>6.2f} {row['private']:>8.2f}   {verdict}", flush=True)
    return rows


def make_checkpoints(folder: Path, text_config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Writes `base/` and `codec/` (what is expanded), `liquid/` and `reference/` (the expanded model in both layouts)."""
    base = AutoModelForCausalLM.from_config(text_config, dtype=dtype)
    names = ["<s>", "</s>", "<unk>", "<image>", "<boi>", "<eoi>", "<unconditional>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    vocabulary |= {f"t{index}": index for index in range(len(names), text_config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.add_tokens(names, special_tokens=True)
    codec = LiquidVQModel(**CHAMELEON_VQ_CONFIG)
    for part, name in ((base, "base"), (tokenizer, "base"), (codec, "codec")):
        part.save_pretrained(folder / name)
    model, processor = expand_vocabulary(base, tokenizer, codec)
    model.save_pretrained(folder / "liquid")
    processor.save_pretrained(folder / "liquid")
    export_base_model(model, processor, folder / "reference")


def load(folder: Path) -> LiquidForCausalLM:
    return LiquidForCausalLM.from_pretrained(folder / "liquid")


def load_reference(folder: Path) -> LiquidForCausalLM:
    return LiquidForCausalLM.from_pretrained(folder / "reference")


def save(folder: Path) -> LiquidForCausalLM:
    model = load(folder)
    model.save_pretrained(folder / "out")
    return model


def to_base(folder: Path) -> LiquidForCausalLM:
    model = load(folder)
    export_base_model(model, LiquidProcessor.from_pretrained(folder / "liquid"), folder / "out")
    return model


def to_taming(folder: Path) -> LiquidForCausalLM:
    model = load(folder)
    save_taming_codec(model.model.vq_model, folder / "out")
    return model


def from_reference(folder: Path) -> LiquidForCausalLM:
    model = load_reference(folder)
    model.save_pretrained(folder / "out")
    return model


def expand(folder: Path) -> LiquidForCausalLM:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model, processor = expand_vocabulary(base, tokenizer, LiquidVQModel.from_pretrained(folder / "codec"))
    model.save_pretrained(folder / "out")
    processor.save_pretrained(folder / "out")
    return model


OPERATIONS = {
    function.__name__: function for function in (load, load_reference, save, to_base, to_taming, from_reference, expand)
}


def measure(operation: str, folder: Path) -> dict[str, int]:
    """Runs one operation in this process: its peaks above what is held now, and the bytes of the model it ends with."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
    # Modules that are imported on first use count as imports.
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    with tempfile.TemporaryDirectory() as tiny_folder:
        AutoModelForCausalLM.from_config(tiny).save_pretrained(tiny_folder)
        AutoModelForCausalLM.from_pretrained(tiny_folder)
    before, peak_anonymous, done = read_status(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak_anonymous
        while not done.is_set():
            peak_anonymous = max(peak_anonymous, read_status()["RssAnon"])
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    Path("/proc/self/clear_refs").write_text("5")
    watcher.start()
    try:
        model = OPERATIONS[operation](folder)
        for parameter in model.parameters():
            parameter.amax()
    finally:
        done.set()
        watcher.join()
    return {
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "peak_bytes": read_status()["VmHWM"] - before["VmRSS"],
        "private_bytes": peak_anonymous - before["RssAnon"],
    }


def read_status() -> dict[str, int]:
    """The entries of /proc/self/status that are in kB, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {name.rstrip(":"): int(rest[0]) * 1024 for name, *rest in lines if rest[1:] == ["kB"]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--output", type=Path, help="a .json for the numbers")
    parser.add_argument("--operation", choices=OPERATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
