"""What does it cost that pictures join and leave at any step, and what do previews cost?

```bash
OMP_NUM_THREADS=1 python benchmarks/serving.py --output benchmarks/results/serving.json
```

- *engine ÷ pipe*: pictures of B clients, each of which asks for its next picture when it has the last, in an engine of B
  slots, against the same pictures by `pipe` with `batch_size=B`: time of the pipe ÷ time of the engine, in turns, with a ratio in
  each round.
- *previews*: the same with `partial_images=3`: time with previews ÷ time without, less 1. The codec decodes in a thread of its
  own, so the time of the thread that draws is there too: what the previews cost where the other thread has a core to itself.
- *late*: steps of the others between a request and its first code.

Times are CPU seconds of the process, since other work on the machine lengthens them less: run it with one thread. The embedded
checkpoint, and random weights in the shape of SmolLM2-135M with its codec and vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import as_text, machine, ratio, take_turns, write
from transformers import pipeline

import transformers_liquid
from transformers_liquid import LiquidImageGenerationPipeline
from transformers_liquid.serving.engine import PictureEngine


SHAPE_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
PROMPTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "car", "cat", "dog face")]


def pipe_of(name: str) -> LiquidImageGenerationPipeline:
    pipe = pipeline("text-to-image", model=transformers_liquid.EMOJI_CHECKPOINT, device="cpu")
    if name == "135M":
        config = copy.deepcopy(pipe.model.config)
        for key, value in SHAPE_135M.items():
            setattr(config.text_config, key, value)
        torch.manual_seed(0)
        model = transformers_liquid.LiquidForCausalLM(config).eval()
        model.generation_config = pipe.model.generation_config
        pipe = LiquidImageGenerationPipeline(model=model, processor=pipe.processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def steps_until_late(engine: PictureEngine) -> int:
    """How many steps the others made between a late request and its first code."""
    others = [engine.submit(PROMPTS[0], seed=seed) for seed in range(engine.slots - 1)]
    while len(engine.running) < len(others):
        time.sleep(0.001)
    before = engine.num_steps
    late = engine.submit(PROMPTS[1])
    while engine.running[-1].request is not late:
        time.sleep(0.0005)
    steps = engine.num_steps - before
    for request in [*others, late]:
        request.cancel()
    while engine.running or engine.waiting:
        time.sleep(0.001)
    return steps


def measure(name: str, clients: int, each: int, rounds: int) -> dict[str, Any]:
    pipe = pipe_of(name)
    engine = PictureEngine(pipe, slots=clients)
    asked = [(PROMPTS[index % len(PROMPTS)], index) for index in range(clients * each)]

    def by_pipe() -> None:
        prompts, seeds = zip(*asked, strict=True)
        pipe(list(prompts), seed=list(seeds), batch_size=clients, speculative=False)

    def by_engine(**options: Any) -> None:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda one: engine(one[0], seed=one[1], **options), asked))

    clock, drawing = time.pthread_getcpuclockid(engine._threads[0].ident), {}

    def timed_in_all(way: str, run: Callable[[], Any]) -> float:
        start, seconds = time.clock_gettime(clock), timed(run)
        drawing.setdefault(way, []).append(time.clock_gettime(clock) - start)
        return seconds

    ways = {"pipe": by_pipe, "engine": by_engine, "previews": lambda: by_engine(partial_images=3)}
    ways = {way: (lambda way=way, run=run: timed_in_all(way, run)) for way, run in ways.items()}
    take_turns(ways, 1)  # warm
    drawing.clear()
    measured = take_turns(ways, rounds)
    late = [steps_until_late(engine) for _ in range(5)]
    engine.close()
    previews, of_drawing = (ratio(seconds["previews"], seconds["engine"]) for seconds in (measured, drawing))
    return {
        "model": name,
        "clients": clients,
        "pictures": len(asked),
        "pictures_a_minute": 60 * len(asked) / min(measured["engine"]),
        "engine_to_pipe": ratio(measured["pipe"], measured["engine"]),
        "previews": {key: value - 1 for key, value in previews.items()},
        "previews_drawing": {key: value - 1 for key, value in of_drawing.items()},
        "late_steps": max(late),
        "seconds": measured,
        "seconds_drawing": {way: drawing[way] for way in ("engine", "previews")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["liquid-emoji", "135M"])
    parser.add_argument("--clients", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--each", type=int, default=3, help="Pictures of a client.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = []
    print(
        "| model | clients | pictures a minute | engine ÷ pipe | previews | in the thread that draws | late by steps |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in args.models:
        for clients in args.clients:
            one = measure(name, clients, args.each, args.rounds)
            results.append(one)
            print(
                f"| {name} | {clients} | {one['pictures_a_minute']:.0f} | {as_text(one['engine_to_pipe'])} | "
                f"{as_text(one['previews'])} | {as_text(one['previews_drawing'])} | {one['late_steps']} |",
                flush=True,
            )
            write(args.output, {**machine(), "results": results})


if __name__ == "__main__":
    main()
