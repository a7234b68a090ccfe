"""How much slower is drawing with an adapter than with what it was merged into?

```bash
python benchmarks/adapters.py --output benchmarks/results/adapters.json
```

liquid-emoji with `liquid_lora_config` (all linear layers and the rows of the codes), of random values, draws the same
picture in three ways that take turns:

- `merged`: the model of `merge_and_unload()`;
- `adapter`: the adapter as it is loaded, as the package draws with it;
- `beside`: the adapter's own layers in every step, as PEFT runs them.

Times are of whole calls, merging included. Ratios to `merged` are medians over the rounds, with the smallest and the
largest in brackets.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from unittest import mock

import torch
from harness import as_text, machine, ratio, take_turns, timed, write
from peft import get_peft_model

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidProcessor, liquid_lora_config
from transformers_liquid.models.liquid import modeling_liquid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMOJI_CHECKPOINT)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    model = LiquidForCausalLM.from_pretrained(args.model)
    inputs = LiquidProcessor.from_pretrained(args.model)(
        text=["red apple"], generation_mode="image", return_tensors="pt"
    )
    adapted = get_peft_model(model, liquid_lora_config(model, r=args.r)).eval()
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.01)
    models = {"merged": copy.deepcopy(adapted).merge_and_unload(), "adapter": model}
    drawn = {}

    def draw(name: str) -> None:
        seeded = {"generator": [torch.Generator().manual_seed(0)], "generation_mode": "image"}
        drawn[name] = models.get(name, model).generate(**inputs, **seeded)

    def beside() -> None:
        with mock.patch.object(modeling_liquid, "merged_view", lambda module: module):
            draw("beside")

    ways = {name: lambda name=name: timed(lambda: draw(name)) for name in models} | {"beside": lambda: timed(beside)}
    take_turns(ways, 1)  # warm up
    seconds = take_turns(ways, args.rounds)
    result = machine() | {
        "r": args.r,
        "rounds": args.rounds,
        "pictures are equal": torch.equal(*map(drawn.get, models)),
    }
    result["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    result["ratios"] = {name: ratio(seconds[name], seconds["merged"]) for name in ("adapter", "beside")}
    for name, values in result["ratios"].items():
        print(f"{name}: {as_text(values)} times as long as merged ({result['seconds']['merged']:.2f} s)")
    print(f"the same picture, merged or not: {result['pictures are equal']}")
    write(args.output, result)


if __name__ == "__main__":
    main()
