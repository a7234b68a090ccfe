"""What does it cost to draw within a text, instead of drawing alone?

```bash
OMP_NUM_THREADS=1 python benchmarks/interleaved.py --output benchmarks/results/interleaved.json
```

- *interleaved ÷ image*: `generate(generation_mode="interleaved")` of B prompts that begin a picture at once and end after
  it, against the same pictures by `generation_mode="image"` and decoded, in turns, with a ratio in each round.
- *reading again*: a text of three pictures by turns. The share of its time that goes into forwards over more than one
  position, but for the prompt's first: where each phase goes on from what was read before (*kept*), and where it reads its
  context anew, as on a GPU or in half precision (*anew*); and the time of the former ÷ that of the latter.

Times are CPU seconds of the process, since other work on the machine lengthens them less: run it with one thread.

Random weights begin no picture where they should: a logits processor says where.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, Subject, draw_plain
from harness import as_text, machine, ratio, take_turns, write
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


def by_turns(subject: Subject, prompts: dict[str, torch.Tensor], seed: int, number: int = 1, **options: Any) -> Any:
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
        **options,
    )


def alone(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    """The same pictures, drawn by image mode and decoded."""
    factor = subject.model.config.downsample_factor
    return subject.model.decode_image_tokens(draw_plain(subject, prompts, seed), factor, factor * subject.codes)


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


class Reading:
    """Seconds of all forwards over more than one position but the first, while it is open."""

    def __init__(self, subject: Subject) -> None:
        self.body, self.times = subject.body, []

    def __enter__(self) -> Reading:
        def begin(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.is_reading, self.start = kwargs["input_ids"].shape[1] > 1, time.process_time()

        def end(*args: Any) -> None:
            if self.is_reading:
                self.times.append(time.process_time() - self.start)

        self.handles = (
            self.body.register_forward_pre_hook(begin, with_kwargs=True),
            self.body.register_forward_hook(end),
        )
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def seconds(self) -> float:
        return sum(self.times[1:])


def against_image(subject: Subject, batch: int, rounds: int) -> dict[str, float]:
    """Interleaved by image mode, after one round that is not counted."""
    prompts, seeds = subject.prompts(batch, 0), iter(range(2 * rounds + 2))
    ways = {
        way: lambda run=run: timed(lambda: run(subject, prompts, next(seeds)))
        for way, run in {"interleaved": by_turns, "image": alone}.items()
    }
    times = take_turns(ways, rounds + 1)
    return ratio(times["interleaved"][1:], times["image"][1:])


def reading_again(subject: Subject, rounds: int) -> dict[str, Any]:
    """Of a text with three pictures: the share of reading its contexts, kept and anew, and what keeping them saves."""
    prompts, shares = subject.prompts(1, 0), {"kept": [], "anew": []}

    def share_of(form: str, **options: Any) -> float:
        with Reading(subject) as reading:
            whole = timed(lambda: by_turns(subject, prompts, 0, 3, **options))
        shares[form].append(reading.seconds / whole)
        return whole

    # A choice of a cache is the caller's: none is kept.
    ways = {"kept": lambda: share_of("kept"), "anew": lambda: share_of("anew", cache_implementation="dynamic")}
    times = take_turns(ways, rounds)
    return {"shares": shares, "seconds": times, "kept / anew": ratio(times["kept"], times["anew"])}


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
        shares = (f"{form} {' '.join(f'{one:.1%}' for one in found['shares'][form])}" for form in ("kept", "anew"))
        print(
            f"3 pictures of {codes} codes: reading again {', '.join(shares)}; kept / anew {as_text(found['kept / anew'])}"
        )
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
