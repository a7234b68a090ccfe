"""How fast are pictures drawn? `generate(generation_mode="image")` beside what one could do instead.

```bash
python benchmarks/decode.py --codes 64 --rounds 5 --output decode.json
```

A llama of SmolLM2-135M's shape with 8192 image codes and random weights draws pictures with guidance, reference
settings, in five ways that take turns, so that a busy machine slows all of them alike:

- `body`: forwards of the transformer body alone, for the same rows and cache: no head, no sampling. The floor.
- `image`: this package.
- `image x 8`: this package, eight prompts at once.
- `reference`: what the reference's loop does: guidance in one batch, the whole head, mask and filters over the whole
  vocabulary.
- `stock`: transformers' `generate(guidance_scale=...)`, with the restriction to image ids as a logits processor.

Times are of whole calls, prompts included, divided by the codes. Ratios are medians over the rounds, with the smallest
and the largest in brackets. With CUDA a Gemma-7B-shaped model in bf16 is measured as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, GemmaConfig, LlamaConfig, LogitsProcessorList, PreTrainedConfig

from transformers_liquid.configuration_liquid import LiquidConfig
from transformers_liquid.generation_liquid import DEFAULT_IMAGE_GENERATION_CONFIG, ImageTokenLogitsProcessor
from transformers_liquid.modeling_liquid import LiquidForCausalLM


CODEBOOK_SIZE = 8192
BOS, BOI, UNCONDITIONAL = 1, 7, 9
PROMPT_LENGTH = 16
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152 + CODEBOOK_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "gemma-7b": lambda: GemmaConfig(vocab_size=256000 + CODEBOOK_SIZE),  # the other defaults are Gemma-7B's
}
# ratio: (numerator, denominator, goal) of milliseconds per code and picture; the goals hold for smollm2-135m on a CPU.
RATIOS = {
    "image / body": ("image", "body", "<= 1.10"),
    "reference / image": ("reference", "image", ">= 1.20"),
    "stock / image": ("stock", "image", ">= 2.00"),
    "image / (image x 8), per picture": ("image", "image x 8", ">= 3.00"),
}


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [(args.shape, args.device, args.dtype)]
    if torch.cuda.is_available() and args.shape != "gemma-7b":
        cases.append(("gemma-7b", "cuda", "bfloat16"))
    results = [benchmark(*case, args.codes, args.rounds) for case in cases]
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


def benchmark(shape: str, device: str, dtype: str, codes: int, rounds: int) -> dict:
    """Runs every way of drawing `rounds` times in turn, prints the table and returns it."""
    print(f"{shape}, {dtype}, {device}, {torch.get_num_threads()} threads, {codes} codes, {rounds} rounds")
    model = random_model(shape, device, dtype)
    milliseconds = {name: [] for name in WAYS}
    for way, batch_size in WAYS.values():
        way(model, prompts(batch_size, device), 2)
    for _ in range(rounds):
        for name, (way, batch_size) in WAYS.items():
            input_ids = prompts(batch_size, device)
            start = time.perf_counter()
            way(model, input_ids, codes)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            milliseconds[name].append(1000 * (time.perf_counter() - start) / codes / batch_size)

    for name, values in milliseconds.items():
        print(f"  {name:34} {statistics.median(values):9.2f} ms per code and picture")
    ratios = {}
    for name, (numerator, denominator, goal) in RATIOS.items():
        values = [a / b for a, b in zip(milliseconds[numerator], milliseconds[denominator], strict=True)]
        ratios[name] = {"median": statistics.median(values), "min": min(values), "max": max(values), "goal": goal}
        print(f"  {name:34} {ratios[name]['median']:9.2f} [{min(values):.2f} - {max(values):.2f}]  goal {goal}")
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "codes": codes,
        "rounds": rounds,
        "milliseconds_per_code": milliseconds,
        "ratios": ratios,
    }


def random_model(shape: str, device: str, dtype: str) -> LiquidForCausalLM:
    """The shape's model with random weights; its codec is a stub of one pixel per code."""
    vq_config = {
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [4],
        "norm_num_groups": 4,
        "num_vq_embeddings": CODEBOOK_SIZE,
        "sample_size": 8,
    }
    config = LiquidConfig(
        text_config=SHAPES[shape](), vq_config=vq_config, boi_token_id=BOI, uncond_token_id=UNCONDITIONAL
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LiquidForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()


def prompts(batch_size: int, device: str) -> torch.LongTensor:
    ids = torch.randint(100, 1000, (batch_size, PROMPT_LENGTH), device=device)
    ids[:, 0], ids[:, -1] = BOS, BOI
    return ids


def draw(model: LiquidForCausalLM, input_ids: torch.LongTensor, codes: int) -> None:
    ids = model.generate(input_ids, generation_mode="image", height=1, width=codes)
    assert ids.shape == (len(input_ids), codes)


@torch.no_grad()
def draw_with_body_alone(model: LiquidForCausalLM, input_ids: torch.LongTensor, codes: int) -> None:
    body = model.model.text_model.base_model
    ids, mask = with_unconditional_rows(input_ids)
    cache = DynamicCache(config=body.config)
    for _ in range(codes):
        body(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        ids, mask = ids[:, -1:], append(mask, 1)


@torch.no_grad()
def draw_as_reference(model: LiquidForCausalLM, input_ids: torch.LongTensor, codes: int) -> None:
    text_model, settings = model.model.text_model, DEFAULT_IMAGE_GENERATION_CONFIG
    ids, mask = with_unconditional_rows(input_ids)
    cache = DynamicCache(config=text_model.config)
    drawn = []
    for _ in range(codes):
        logits = text_model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        conditional, unconditional = logits.float().chunk(2)
        scores = unconditional + settings["guidance_scale"] * (conditional - unconditional)
        scores[:, : model.config.image_token_offset] = -torch.inf
        scores = scores / settings["temperature"]
        scores[scores < scores.topk(settings["top_k"]).values[:, -1:]] = -torch.inf
        sorted_scores, order = scores.sort(descending=True)
        probabilities = sorted_scores.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= settings["top_p"]
        scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        new_ids = scores.softmax(-1).multinomial(1)
        drawn.append(new_ids)
        ids, mask = new_ids.repeat(2, 1), append(mask, 1)
    assert torch.cat(drawn, dim=1).shape == (len(input_ids), codes)


def draw_with_stock_generate(model: LiquidForCausalLM, input_ids: torch.LongTensor, codes: int) -> None:
    ids = model.model.text_model.generate(
        input_ids,
        negative_prompt_ids=torch.tensor([[BOS, UNCONDITIONAL, BOI]], device=input_ids.device),
        logits_processor=LogitsProcessorList([ImageTokenLogitsProcessor(model.config)]),
        max_new_tokens=codes,
        min_new_tokens=codes,
        **DEFAULT_IMAGE_GENERATION_CONFIG,
    )
    assert ids.shape == (len(input_ids), PROMPT_LENGTH + codes)


def with_unconditional_rows(input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The rows that `generate(generation_mode="image")` runs: left-padded ids and their mask."""
    unconditional = torch.zeros_like(input_ids)
    unconditional[:, -3:] = torch.tensor([BOS, UNCONDITIONAL, BOI], device=input_ids.device)
    return torch.cat([input_ids, unconditional]), torch.cat([torch.ones_like(input_ids), (unconditional > 0).long()])


def append(mask: torch.LongTensor, value: int) -> torch.LongTensor:
    return torch.nn.functional.pad(mask, (0, 1), value=value)


# name: (function, number of prompts)
WAYS = {
    "body": (draw_with_body_alone, 1),
    "image": (draw, 1),
    "image x 8": (draw, 8),
    "reference": (draw_as_reference, 1),
    "stock": (draw_with_stock_generate, 1),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=64, help="codes per picture (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of every way (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    main(parser.parse_args())
