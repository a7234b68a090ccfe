"""Trains the models of the scaling study: a ladder of sizes on texts, pictures and both, and the runs of synergy.

    pip install --no-deps resvg-py
    python examples/scaling_study/run.py --data_dir emoji-data --output scaling

Each cell, one model, appends a line to OUTPUT/results.jsonl when it is done. Stopped and started again, the script goes
on with the first cell that is not done; started twice, both share the work. The learning rate falls to zero. Experiments:
- `ladder`: for each size a model is trained on texts alone (`start`); from it, with new rows for the codes, begin `text`,
  `image` and `mixed`. A step of `mixed` has the same texts as one of `text` and the same pictures as one of `image`;
- `synergy`: from the same start; `base` has texts, pictures to draw and pictures to describe; `generation`,
  `understanding` and `text` half as many records again: the same new pictures to draw or to describe, or new texts;
- `rates`: half as many pictures from new weights, at several learning rates.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from scaling_data import Data, load_data
from train_lm import build_model
from transformers import get_linear_schedule_with_warmup, set_seed

from transformers_liquid.data.collator import LiquidDataCollator
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.utils.files import whole


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"XXS": (32, 2), "XS": (48, 2), "S": (80, 3), "M": (128, 4), "L": (192, 5)}  # width, layers
HEAD_WIDTH, BATCH, WARMUP_STEPS = 16, 8, 20
RATE = 0.3  # over the width
BASE = [("text", 2, 1), ("text_to_image", 0, 1), ("caption", 1, 1)]
# Streams, of each of which a step has a batch: kinds of records, the first one and how many, in halves of --sequences.
ARMS = {
    ("rates", "image"): [[("text_to_image", 0, 1)]],
    ("ladder", "start"): [[("text", 0, 2)]],
    ("ladder", "text"): [[("text", 2, 2)]],
    ("ladder", "image"): [[("text_to_image", 0, 2)]],
    ("ladder", "mixed"): [[("text", 2, 2)], [("text_to_image", 0, 2)]],
    ("synergy", "base"): [BASE],
    ("synergy", "text"): [[*BASE, ("text", 3, 1)]],
    ("synergy", "generation"): [[*BASE, ("text_to_image", 2, 1)]],
    ("synergy", "understanding"): [[*BASE, ("caption", 2, 1)]],
}
SIZES_OF = {"ladder": SIZES, "synergy": ("S", "M"), "rates": ()}


class Cell(NamedTuple):
    """One model; `factor` multiplies its learning rate."""

    experiment: str
    size: str
    arm: str
    seed: int
    factor: float = 1.0

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def start(self) -> Cell | None:
        """The cell whose weights it begins with."""
        is_first = self.experiment == "rates" or self.arm == "start"
        return None if is_first else Cell("ladder", self.size, "start", self.seed)


def main(args: argparse.Namespace) -> None:
    weights, results = Path(args.output) / "cells", Path(args.output) / "results.jsonl"
    weights.mkdir(parents=True, exist_ok=True)
    with FileLock(weights / "data.lock"):
        data = load_data(args.data_dir)
    if (most := min(len(data.pictures) * 2 // 3, len(data.texts) // 2)) < args.sequences:
        raise ValueError(f"--sequences can be at most {most}: no record is seen twice; got {args.sequences}.")
    while waiting := [cell for cell in plan(args.sizes, args.seeds) if cell not in done(results, args.sequences)]:
        for cell in waiting:
            with suppress(Timeout), FileLock(weights / f"{cell}.lock", timeout=0):  # freed by the system if this dies
                finished = done(results, args.sequences)
                if cell not in finished and cell.start in {None, *finished}:
                    result = train(cell, data, args.sequences, weights)
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    print(cell, f"{result['seconds']:.0f} s", result["losses"], flush=True)
                    break
        else:
            time.sleep(5)  # another process trains all that is left, or what it begins with


def plan(sizes: list[str], seeds: int) -> list[Cell]:
    """All cells, in the order of their worth: what the findings are about, seed by seed."""
    cells = [
        Cell(experiment, size, arm, seed)
        for seed, (experiment, arm), size in product(range(seeds), ARMS, sizes)
        if size in SIZES_OF[experiment]
    ]
    return cells + [Cell("rates", size, "image", 0, factor) for size in sizes[::3] for factor in (0.5, 1.0, 2.0)]


def done(results: Path, sequences: int) -> set[Cell]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    finished = [json.loads(line) for line in lines]
    if others := {result["sequences"] for result in finished} - {sequences}:
        raise ValueError(f"{results} has runs of --sequences {others}, not {sequences}: give another --output.")
    return {Cell(**result["cell"]) for result in finished}


def steps_of(cell: Cell, data: Data, sequences: int) -> list[list[dict[str, Any]]]:
    """The records of each step; texts and pictures come in one order in all cells of a seed."""
    part, steps = sequences // 2, []
    for stream in ARMS[cell.experiment, cell.arm]:
        records = []
        for kind, begin, number in stream:
            source = data.texts if kind == "text" else data.pictures
            order = np.random.default_rng(cell.seed).permutation(len(source))[begin * part : (begin + number) * part]
            records += [{"kind": kind, "index": int(index), **source[index]} for index in order]
        records = [records[index] for index in np.random.default_rng(cell.seed).permutation(len(records))]
        steps.append([records[begin : begin + BATCH] for begin in range(0, len(records), BATCH)])
    return [list(chain(*parts)) for parts in zip(*steps, strict=True)]


def train(cell: Cell, data: Data, sequences: int, folder: Path) -> dict[str, Any]:
    """Trains a cell's model; says what it measured."""
    began = time.perf_counter(), time.process_time()
    set_seed(cell.seed)
    width, layers = SIZES[cell.size]
    model = build_model(data.processor, data.codec, width * 9 // 4, width, layers, width // HEAD_WIDTH).to(DEVICE)
    text_model = model.model.text_model
    if cell.start:
        rows, codes = text_model.get_input_embeddings().weight.data, model.config.image_layout.image_slice
        new = rows[codes] / rows[codes].std()
        text_model.load_state_dict(torch.load(folder / f"{cell.start}.pt", weights_only=True))
        rows[codes] = rows[: codes.start].mean(0) + rows[: codes.start].std(0) * new  # as large as those of words
    rate = RATE / width * cell.factor
    optimizer = torch.optim.AdamW(text_model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    collator = LiquidDataCollator(data.processor, unconditional_probability=0.0, seed=cell.seed)
    steps, tokens = steps_of(cell, data, sequences), 0
    scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, len(steps))
    for records in steps:
        batch = {name: values.to(DEVICE) for name, values in collator(records).items()}
        tokens += int(batch["attention_mask"].sum())
        model(**batch, skip_logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(text_model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if cell.arm == "start":
        with whole(folder / f"{cell}.pt") as path:
            torch.save(text_model.state_dict(), path)
    body = [weight.numel() for name, weight in text_model.named_parameters() if "embed" not in name]
    return {
        "cell": cell._asdict(),
        "learning_rate": rate,
        "sequences": sequences,
        "parameters": sum(body),
        "steps": len(steps),
        "tokens": tokens,
        "losses": measure(model, data),
        "seconds": time.perf_counter() - began[0],
        "cpu_seconds": time.process_time() - began[1],
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
    }


@torch.no_grad()
def measure(model: LiquidForCausalLM, data: Data) -> dict[str, float]:
    """Losses on held-out records in nats: of a code, of a token of a text; and of a token of a name after its picture
    and after that of another name (`misread`)."""
    model.eval()
    pictures, texts = data.heldout_pictures, data.heldout_texts
    others = [one | {"codes": other["codes"]} for one, other in zip(pictures, pictures[1:] + pictures[:1], strict=True)]
    measured = {"image": ("text_to_image", pictures), "text": ("text", texts)}
    measured |= {"caption": ("caption", pictures), "misread": ("caption", others)}
    collator, losses = LiquidDataCollator(data.processor, unconditional_probability=0.0), {}
    for name, (kind, chosen) in measured.items():
        loss, labels, records = 0.0, 0, [{**one, "kind": kind, "index": index} for index, one in enumerate(chosen)]
        for begin in range(0, len(records), BATCH):
            batch = {key: values.to(DEVICE) for key, values in collator(records[begin : begin + BATCH]).items()}
            number = int((batch["labels"] >= 0).sum())
            loss, labels = loss + float(model(**batch).loss) * number, labels + number
        losses[name] = loss / labels
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output", default="scaling")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=2000, help="of a kind, in each cell of the ladder")
    main(parser.parse_args())
