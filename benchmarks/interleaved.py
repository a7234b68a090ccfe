"""What does it cost to draw within a text, instead of drawing alone?

```bash
python benchmarks/interleaved.py --output benchmarks/results/interleaved.json
```

- *interleaved ÷ image*: `generate(generation_mode="interleaved")` of B prompts that begin a picture at once and end after
  it, against the same pictures by `generation_mode="image"`, in turns, with a ratio in each round.
- *reading again*: a text of three pictures by turns. Every phase, of text or of a picture, reads its context anew: the share
  of its time that goes into that, as measured by forwards over contexts of these lengths.

Random weights begin no picture where they should: a logits processor says where.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, Subject, draw_plain
from harness import as_text, machine, ratio, take_turns, timed, write
from transformers import LogitsProcessor


class Pictures(LogitsProcessor):
    """So many pictures one after the other, then the end."""

    def __init__(self, subject: Subject, number: int) -> None:
        self.boi, self.eos, self.number = subject.model.config.boi_token_id, 2, number

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        is_open = (input_ids == self.boi).sum(1) < self.number
        scores[is_open, self.boi], scores[~is_open, self.eos] = 1e4, 1e4
        return scores


def by_turns(subject: Subject, prompts: dict[str, torch.Tensor], seed: int, number: int = 1) -> Any:
    """The pictures of `draw_plain` within texts: the prompts are without the token that begins a picture."""
    factor = subject.model.config.downsample_factor
    return subject.model.generate(
        prompts["input_ids"][:, :-1],
        attention_mask=prompts["attention_mask"][:, :-1],
        generation_mode="interleaved",
        height=factor,
        width=factor * subject.codes,
        generator=[torch.Generator().manual_seed(1000 * seed + row) for row in range(len(prompts["input_ids"]))],
        logits_processor=[Pictures(subject, number)],
        eos_token_id=2,
        max_images=number,
        max_new_tokens=8,
        do_sample=False,
        disable_compile=True,
    )


@torch.inference_mode()
def reading(subject: Subject, length: int, number: int) -> float:
    """Seconds for the contexts of all phases: before and after each picture is begun, and for the text at the end."""
    after = [length + index * (subject.codes + 2) for index in range(number + 1)]
    lengths = [*after, *(one + 1 for one in after[:-1])]
    ids = torch.randint(100, 1000, (1, max(lengths)))
    return timed(lambda: [subject.model(ids[:, :one], logits_to_keep=1) for one in lengths])


def against_image(subject: Subject, batch: int, rounds: int) -> dict[str, float]:
    """Interleaved by image mode, after one round that is not counted."""
    prompts, seeds = subject.prompts(batch, 0), iter(range(2 * rounds + 2))
    ways = {
        way: lambda run=run: timed(lambda: run(subject, prompts, next(seeds)))
        for way, run in {"interleaved": by_turns, "image": draw_plain}.items()
    }
    times = take_turns(ways, rounds + 1)
    return ratio(times["interleaved"][1:], times["image"][1:])


def reading_again(subject: Subject, rounds: int) -> dict[str, Any]:
    """The share of a text with three pictures that goes into reading its contexts."""
    prompts, shares = subject.prompts(1, 0), []
    for _ in range(rounds):
        whole = timed(lambda: by_turns(subject, prompts, 0, 3))
        shares.append(reading(subject, prompts["input_ids"].shape[1] - 1, 3) / whole)
    return {"shares": shares, "seconds": whole}


def main(args: argparse.Namespace) -> None:
    result: dict[str, Any] = machine() | {"interleaved / image": {}, "reading again": {}}
    for name in args.shapes:
        subject = Subject(name, "cpu", "float32", 64)
        for batch in args.batches:
            found = result["interleaved / image"][f"{name}, {batch}"] = against_image(subject, batch, args.rounds)
            print(f"{name}, {batch} pictures: interleaved / image {as_text(found)}", flush=True)
            write(args.output, result)
    for codes in args.codes:
        found = reading_again(Subject("smollm2-135m", "cpu", "float32", codes), args.reading_rounds)
        result["reading again"][str(codes)] = found
        shares = ", ".join(f"{share:.1%}" for share in found["shares"])
        print(f"3 pictures of {codes} codes in {found['seconds']:.0f} s: {shares} is reading again", flush=True)
        write(args.output, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["liquid-emoji", "smollm2-135m"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--codes", nargs="+", type=int, default=[64, 1024], help="of a picture, for reading again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reading_rounds", type=int, default=1)
    parser.add_argument("--output", type=Path)
    main(parser.parse_args())
