"""Speed on a GPU against the floor: drawing with Gemma-7B's shape and with trained weights, training, the loss.

    benchmarks/cuda/run.sh speed            # or one part: python benchmarks/cuda/speed.py gemma-1 --output folder

Each part is a process of its own and writes PART.json into the folder:
- `gemma-1`, `gemma-16`: Gemma-7B's shape with 8,192 codes, random bf16 weights, 1 and 16 pictures with guidance.
  `compiled` draws whole pictures of 1,024 codes, and so does `whole`, which reads the whole static cache at each step; the
  others draw the first 128. All are given in ms per code and in multiples of the memory floor: the bytes of the weights that a step reads, divided by the
  bandwidth of summing up 1 GiB. (Keys and values, which the floor leaves out, are given beside it.)
- `emoji`: liquid-emoji, trained, one picture: plain, compiled, speculative, both.
- `training`: tokens per second of forward and backward passes of SmolLM2-135M's shape, packed and padded, and extra
  memory and time of the loss over 264,192 ids, chunked and plain.

`--codes` and `--rounds` shrink it for a trial; on a CPU nothing but `--shape smollm2-135m` makes sense.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig


sys.path.append(str(Path(__file__).parents[1]))
import decode
import harness
import training

from transformers_liquid import LiquidConfig, LiquidDataCollator, LiquidForCausalLM
from transformers_liquid.generation import sampling
from transformers_liquid.ops.packed_attention import use_packed_attention


def main(args: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        measure = {"emoji": trained_drawing, "training": training_speed}.get(part, drawing)
        # After each measurement: what is stopped half-way has its numbers too.
        for result in measure(args, part):
            result = harness.machine(args.device) | {"seconds_so_far": time.perf_counter() - started} | result
            (args.output / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")


def drawing(args: argparse.Namespace, part: str) -> Iterator[dict[str, Any]]:
    batch = int(part.removeprefix("gemma-"))
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    subject = decode.Subject(args.shape, args.device, dtype, args.codes)
    bandwidth = max(decode.read_bandwidth(subject.device) for _ in range(3))
    floor = subject.bytes_per_step / bandwidth
    text = subject.model.config.get_text_config()
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * subject.model.dtype.itemsize
    result: dict[str, Any] = {
        "shape": args.shape,
        "batch": batch,
        "codes": args.codes,
        "bytes_per_step": subject.bytes_per_step,
        "bytes_per_second": bandwidth,
        "floor_ms": 1000 * floor,
        "key_value_gb_at_the_end": 2 * batch * (args.codes + decode.PROMPT_LENGTH) * per_token / 1e9,
        "ways": {},
    }
    if batch == 1:
        subject.janus = decode.make_janus(subject)
    compiled = functools.partial(draw_by_the_clock, result)
    ways: dict[str, tuple[Callable[..., Any], int]] = {"compiled": (compiled, args.codes)}
    for name in ("plain", "reference", *(["body", "janus"] if batch == 1 else [])):
        ways[name] = (decode.WAYS[name], min(128, args.codes) if name != "janus" else args.codes)
    if batch > 1:
        ways.pop("plain")
    ways["whole"] = (draw_whole_cache, args.codes)
    for name in [one for one in ways if one in args.ways]:
        way, subject.codes = ways[name]
        if name == "janus":  # its loop draws as many codes as its configuration says
            subject.janus.model.vision_model.config.num_image_tokens = subject.codes = min(128, args.codes)
        try:
            taken = [timed(subject, way, batch, 0)]
            result["ways"][name] = {"first_call_seconds": taken[0]}
            yield result
            taken += [timed(subject, way, batch, round_) for round_ in range(1, args.rounds + 1)]
        except Exception as error:  # one way that fails leaves the others
            result["ways"][name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(name, result["ways"][name], flush=True)
            yield result
            continue
        per_code = [1000 * one / subject.codes for one in taken]
        result["ways"][name] = {
            "codes": subject.codes,
            "first_call_seconds": taken[0],
            "ms_per_code": per_code[1:],
            "per_floor": statistics.median(per_code[1:]) / (1000 * floor),
            "pictures_per_minute": 60 * batch / (statistics.median(taken[1:]) / subject.codes * args.codes),
        }
        if args.device == "cuda":
            result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(name, result["ways"][name], flush=True)
        yield result


def draw_by_the_clock(result: dict[str, Any], subject: decode.Subject, prompts: dict[str, Any], seed: int) -> None:
    """As decode.draw_compiled, and notes the median ms of a step for each 128 steps, so that a first call says it too."""
    clock = Clock(subject.device.type)
    on_cpu = {} if subject.device.type == "cuda" else {"cache_implementation": "static", "disable_compile": True}
    decode.draw(subject, prompts, seed, streamer=clock, **on_cpu)
    harness.synchronize(subject.device)
    steps = clock.steps()
    result["ms_of_steps"] = [statistics.median(steps[start : start + 128]) for start in range(0, len(steps), 128)]
    result["reads_parts_of_the_cache"] = sampling.CACHE_PIECE is not None and not sampling._NOT_GROWING
    if sampling._NOT_COMPILABLE:
        raise RuntimeError("The step did not compile; the warning above says why.")


class Clock:
    """A streamer that notes when codes come, on the accelerator's own clock, for which nothing waits."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def put(self, ids: torch.Tensor) -> None:
        """The prompts."""

    def put_codes(self, codes: torch.Tensor) -> None:
        if self.device == "cuda":
            self.times.append(torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        pairs = list(zip(self.times, self.times[1:], strict=False))
        return [one.elapsed_time(two) if self.device == "cuda" else 1000 * (two - one) for one, two in pairs]


def draw_whole_cache(subject: decode.Subject, prompts: dict[str, Any], seed: int) -> Any:
    piece, sampling.CACHE_PIECE = sampling.CACHE_PIECE, None
    try:
        return decode.draw_compiled(subject, prompts, seed)
    finally:
        sampling.CACHE_PIECE = piece


def timed(subject: decode.Subject, way: Callable[..., Any], batch: int, round_: int) -> float:
    prompts = subject.prompts(batch, round_)
    harness.synchronize(subject.device)
    start = time.perf_counter()
    way(subject, prompts, round_)
    harness.synchronize(subject.device)
    return time.perf_counter() - start


def trained_drawing(args: argparse.Namespace, part: str) -> Iterator[dict[str, Any]]:
    """One picture after another, by each way: seconds, and codes per forward of the speculative ones."""
    result: dict[str, Any] = {"ways": {}}
    for dtype in ("float32", "bfloat16"):
        subject = decode.Subject("liquid-emoji", args.device, dtype, 64)
        ways = {
            "plain": {"disable_compile": True},
            "compiled": {},
            "speculative": {"speculative": True, "disable_compile": True},
            "speculative, compiled": {"speculative": True},
            "speculative 32, compiled": {"speculative": 32},
        }
        drawn = {}
        for name, options in ways.items():
            for round_ in range(2):
                decode.draw(subject, subject.prompts(1, round_), round_, **options)
            taken = [timed(subject, lambda *a, o=options: decode.draw(*a, **o), 1, one) for one in range(args.pictures)]
            drawn[name] = [decode.draw(subject, subject.prompts(1, one), one, **options) for one in range(8)]
            entry = {
                "seconds": statistics.median(taken),
                "same_as_plain": statistics.mean(
                    float(torch.equal(a, b)) for a, b in zip(drawn[name], drawn["plain"], strict=True)
                ),
            }
            if "speculative" in options:
                more = {"return_dict_in_generate": True, **options}
                steps = [decode.draw(subject, subject.prompts(1, one), one, **more).codes_per_step for one in range(8)]
                entry["codes_per_forward"] = statistics.mean(steps)
            result["ways"][f"{dtype}, {name}"] = entry
            print(dtype, name, entry, flush=True)
            yield result


def training_speed(args: argparse.Namespace, part: str) -> Iterator[dict[str, Any]]:
    import numpy as np

    processor = training.benchmark_processor(text_rows=1600)
    generator = np.random.default_rng(0)
    records = training.mixture(args.records * 4, processor, generator)
    batches = [records[start : start + args.records] for start in range(0, len(records), args.records)]
    pack = LiquidDataCollator(processor, max_length=training.MAX_LENGTH, packing=True)
    pad = LiquidDataCollator(processor, max_length=training.MAX_LENGTH)
    result: dict[str, Any] = {"records": args.records, "tokens_per_second": {}}
    if args.device == "cuda":
        result["loss"] = loss_speed(args)
        yield result
    for name, attention, collator, options in (
        ("padded, sdpa", "sdpa", pad, {}),
        ("padded, all logits (reference)", "sdpa", pad, {"skip_logits": False}),
        ("packed, packed_sdpa", "packed_sdpa", pack, {}),
        ("packed, sdpa with a mask", "sdpa", pack, {}),
        ("packed, flex_attention", "flex_attention", pack, {}),
    ):
        try:
            model = training.benchmark_model(processor, args.layers).to(args.device)
            if attention == "packed_sdpa":
                use_packed_attention(model)
            else:
                model.set_attn_implementation(attention)
            rates = []
            for batch in batches:
                useful = int(pad(batch)["attention_mask"].sum())
                tensors = {key: value.to(args.device) for key, value in collator(batch).items()}
                harness.synchronize(torch.device(args.device))
                start = time.perf_counter()
                with torch.autocast(args.device, dtype=torch.bfloat16):
                    model(**tensors, **options).loss.backward()
                model.zero_grad()
                harness.synchronize(torch.device(args.device))
                rates.append(useful / (time.perf_counter() - start))
            result["tokens_per_second"][name] = rates[1:]
        except Exception as error:
            result["tokens_per_second"][name] = f"{type(error).__name__}: {error}"[:500]
        print(name, result["tokens_per_second"][name], flush=True)
        yield result
        model = None
        gc.collect()


def loss_speed(args: argparse.Namespace, hidden: int = 3072, positions: int = 8192) -> dict[str, Any]:
    """Extra memory and time of the loss alone, Gemma-7B's hidden size, chunked and plain."""
    text_config = LlamaConfig(
        vocab_size=264192,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    config = LiquidConfig(text_config=text_config, vq_config=training.NO_CODEC)
    with torch.device(args.device):
        model = LiquidForCausalLM._from_config(config, dtype=torch.bfloat16).train()
    result: dict[str, Any] = {"positions": positions, "hidden_size": hidden}
    for name, skip_logits in (("chunked", True), ("plain", False)):
        for round_ in range(3):
            inputs = torch.randn(1, positions, hidden, device=args.device, dtype=torch.bfloat16, requires_grad=True)
            labels = torch.randint(264192, (1, positions), device=args.device)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            model(inputs_embeds=inputs, labels=labels, skip_logits=skip_logits).loss.backward()
            torch.cuda.synchronize()
            taken = time.perf_counter() - start
            extra = (torch.cuda.max_memory_allocated() - before) / 2**30
            if round_:
                result[name] = {"seconds": taken, "extra_gib": extra}
            model.zero_grad(set_to_none=True)
    return result


PARTS = ("gemma-1", "gemma-16", "emoji", "training")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cuda"))
    parser.add_argument("--shape", default="gemma-7b", choices=decode.SHAPES)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["compiled", "plain", "reference", "body", "janus", "whole"])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    main(parser.parse_args())
