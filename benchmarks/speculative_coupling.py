"""How many codes does a forward of speculative Jacobi decoding give, depending on how its draws are coupled?

```bash
python benchmarks/speculative_coupling.py --output benchmarks/results/speculative_coupling.json
```

A step of speculative Jacobi decoding draws a window of codes again, now that more of the codes before them are known. A
code whose draw comes out as in the step before is kept for nothing, so the draws of the two steps should agree as often
as their two distributions q (then) and p (now) allow. Three ways to draw from p are compared:

- `maximal`: keep the old code x with probability min(1, p(x) / q(x)), else draw from max(p - q, 0).
- `gumbel`: the argmax of scores plus noise, where each position keeps its Gumbel noise (what this package does).
- `inverse cdf`: the code at which the sum of the probabilities passes a uniform number that each position keeps.

All three draw exactly from the model's distribution; the last two also give the same picture as a plain loop with that
noise. Where a window reaches beyond the last one, nothing was drawn yet: there the first guesses are uniformly random
codes, or the last code again (as in this package).

What is counted are forwards, the prompt's included: codes per forward, with the standard error over the pictures. They
do not depend on the machine. The model is liquid-emoji, 64 codes a picture, one picture at a time, the same prompts and
seeds for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine, write
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from transformers_liquid import EMOJI_CHECKPOINT, GuidanceLogitsProcessor, LiquidForCausalLM, LiquidProcessor


# Names of things of every group of the checkpoint's data.
PROMPTS = (
    *("red apple", "dog face", "grinning face", "rocket", "snowman", "pizza", "guitar", "blue heart"),
    *("japan flag", "woman firefighter: dark skin tone", "mouse", "hamburger", "clock face three oclock", "books"),
    *("bicycle", "octopus", "crown", "umbrella", "light bulb", "birthday cake", "fire engine", "tulip", "penguin"),
    *("keycap: 5", "closed lock with key", "leo", "ghost", "violin", "cactus", "soccer ball", "waving hand sign"),
    "thinking face",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "the checkpoint's own": {},
    "guidance 7, temperature 0.99, top_p 0.96": {"guidance_scale": 7.0, "temperature": 0.99, "top_p": 0.96},
    "no guidance, temperature 1": {"guidance_scale": 1.0, "temperature": 1.0, "top_p": 1.0},
}
# (how draws are coupled, first guesses)
WAYS = (("maximal", "random"), ("gumbel", "random"), ("inverse cdf", "random"), ("gumbel", "last code"))


def main(args: argparse.Namespace) -> None:
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).eval()
    processor = LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)
    SETTINGS["the checkpoint's own"] = model.generation_config.image_generation_config
    prompts = PROMPTS[: args.prompts]
    num_codes = model.config.image_layout.num_codes()
    print(f"{len(prompts)} pictures of {num_codes} codes")
    print("| settings | coupling | first guesses |" + "".join(f" window {window} |" for window in args.windows))
    print("|---|---|---|" + "---|" * len(args.windows))
    rows = []
    for name, settings in SETTINGS.items():
        distribution = image_distribution(model, settings)
        for coupling, guess in WAYS:
            steps = {
                window: [
                    len(draw(model, processor, prompt, distribution, coupling, window, guess, seed))
                    for seed, prompt in enumerate(prompts)
                ]
                for window in args.windows
            }
            rows.append({"settings": name, "coupling": coupling, "first_guesses": guess, "steps": steps})
            cells = [codes_per_step(num_codes, counts) for counts in steps.values()]
            print(f"| {name} | {coupling} | {guess} |" + "".join(f" {cell} |" for cell in cells), flush=True)
    result = {"model": "liquid-emoji", "codes": num_codes, "prompts": prompts, "settings": SETTINGS, "rows": rows}
    write(args.output, machine() | result)


def codes_per_step(num_codes: int, steps: list[int]) -> str:
    """Codes per forward of all pictures and, from the spread of their forwards, its standard error."""
    mean = statistics.mean(steps)
    error = statistics.stdev(steps) / math.sqrt(len(steps)) / mean if len(steps) > 1 else math.nan
    return f"{num_codes / mean:.2f} ± {num_codes / mean * error:.2f}"


def image_distribution(model: LiquidForCausalLM, settings: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from logits of a conditional and an unconditional row, `(2, W, K)`, to probabilities `(W, K)`."""
    guidance = GuidanceLogitsProcessor(settings["guidance_scale"], settings.get("guidance_min_p"))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if settings["top_p"] < 1:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    return lambda logits: warpers(None, guidance.guide(logits.flatten(0, 1))).softmax(-1)


@torch.no_grad()
def draw(
    model: LiquidForCausalLM,
    processor: LiquidProcessor,
    prompt: str,
    distribution: Callable[[torch.Tensor], torch.Tensor],
    coupling: str,
    window: int,
    guess: str,
    seed: int,
) -> list[int]:
    """Draws one picture; how many codes became final with each forward."""
    num_codes, codebook_size = model.config.image_layout.num_codes(), model.config.codebook_size
    generator = torch.Generator().manual_seed(seed)
    redraw = REDRAW[coupling](num_codes, codebook_size, generator)
    inputs = processor(text=[prompt], generation_mode="image", return_tensors="pt")
    ids, unconditional = inputs["input_ids"], inputs["negative_prompt_ids"]
    view, cache = model.image_head_view(), DynamicCache(config=model.config.text_config)

    # 1. The prompt, the unconditional prompt padded to its length; the first code
    padded = torch.nn.functional.pad(unconditional, (ids.shape[1] - unconditional.shape[1], 0))
    mask = torch.cat([torch.ones_like(ids), (padded > 0).long()])
    outputs = view(input_ids=torch.cat([ids, padded]), attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    none, no_q = torch.empty(0, dtype=torch.long), torch.empty(0, codebook_size)
    codes = redraw(0, distribution(outputs.logits), none, no_q).tolist()
    drafts, q, accepted = none, no_q, [1]

    while len(codes) < num_codes:
        # 2. The last known code and the drafts: those of the last step, and first guesses behind them
        width = min(window, num_codes - len(codes))
        missing = max(width - 1 - len(drafts), 0)
        if guess == "random":
            guesses = torch.randint(codebook_size, (missing,), generator=generator)
            guesses_q = torch.full((missing, codebook_size), 1 / codebook_size)
        else:
            guesses = torch.tensor([*codes, *drafts.tolist()])[-1:].expand(missing)
            guesses_q = torch.nn.functional.one_hot(guesses, codebook_size).float()
        drafts, q = torch.cat([drafts, guesses])[: width - 1], torch.cat([q, guesses_q])[: width - 1]
        fed = torch.cat([torch.tensor(codes[-1:]), drafts]) + model.config.image_token_offset
        mask = torch.nn.functional.pad(mask, (0, len(ids[0]) + len(codes) - 1 + width - mask.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        outputs = view(input_ids=fed.repeat(2, 1), attention_mask=mask, position_ids=positions, past_key_values=cache)

        # 3. Codes up to and including the first one that differs from its draft are final
        p = distribution(outputs.logits)
        drawn = redraw(len(codes), p, drafts, q)
        number = 1 + int((drawn[:-1] == drafts).long().cumprod(0).sum())
        codes += drawn[:number].tolist()
        accepted.append(number)
        drafts, q = drawn[number:], p[number:]
        if number < width:
            cache.crop(number - width)
            mask = mask[:, : number - width]
    return accepted


# Each makes a function (position of the first code, p (W, K), drafts (W - 1,), their q (W - 1, K)) -> codes (W,).
Redraw = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def maximal(num_codes: int, codebook_size: int, generator: torch.Generator) -> Redraw:
    def redraw(position: int, p: torch.Tensor, drafts: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(drafts))
        kept = torch.rand(len(drafts), generator=generator) * q[index, drafts] < p[index, drafts]
        residual = (p[:-1] - q).clamp(min=0)
        # Where p equals q nothing is left over, and the draft is kept but for rounding.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p[:-1])
        fresh = torch.cat([residual, p[-1:]]).multinomial(1, generator=generator)[:, 0]
        return torch.cat([torch.where(kept, drafts, fresh[:-1]), fresh[-1:]])

    return redraw


def gumbel(num_codes: int, codebook_size: int, generator: torch.Generator) -> Redraw:
    # The smallest of exponentials divided by p is the largest of log p plus Gumbel noise.
    exponential = torch.empty(num_codes, codebook_size).exponential_(generator=generator)
    return lambda position, p, drafts, q: (exponential[position : position + len(p)] / p).argmin(-1)


def inverse_cdf(num_codes: int, codebook_size: int, generator: torch.Generator) -> Redraw:
    uniform = torch.rand(num_codes, 1, generator=generator, dtype=torch.float64)

    def redraw(position: int, p: torch.Tensor, drafts: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        sums = p.double().cumsum(-1)
        return torch.searchsorted(sums, uniform[position : position + len(p)] * sums[:, -1:], right=True)[:, 0]

    return redraw


REDRAW = {"maximal": maximal, "gumbel": gumbel, "inverse cdf": inverse_cdf}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many (default: %(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="codes per forward")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    main(parser.parse_args())
