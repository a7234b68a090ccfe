"""When does `FewRowsLinear`'s transposed product beat `nn.Linear` on a CPU?

```bash
python benchmarks/few_rows.py --output benchmarks/results/few_rows.json
```

For the linear layers of the shapes of `decode.py` (q, k, v, o, gate, up, down, and the head's image rows) and a few rows
of input, in fp32: microseconds of `F.linear(x, weight)`, divided by those of `(weight @ x.T).T`. Above 1 the transposed
product is faster. The two take turns, over as many copies of the weight as exceed a CPU's caches, as in a model whose
layers follow one another; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from decode import CODEBOOK_SIZE, SHAPES
from harness import machine, take_turns, timed, write
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_liquid import EMOJI_CHECKPOINT


BYTES_OF_COPIES = 2**27


def main(args: argparse.Namespace) -> None:
    result = machine() | {"layers": []}
    print(f"{result['machine']}, torch {result['torch']}: time of F.linear ÷ time of the transposed product")
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} threads\n")
        print("| model | out × in |" + "".join(f" {count} rows |" for count in args.rows))
        print("|---|---|" + "---|" * len(args.rows))
        for model, out_features, in_features in layers(args.shapes):
            measured = {count: measure(out_features, in_features, count, args.rounds) for count in args.rows}
            result["layers"].append(
                {
                    "threads": threads,
                    "model": model,
                    "out_features": out_features,
                    "in_features": in_features,
                    "microseconds": measured,
                }
            )
            cells = [f"{one['linear'] / one['transposed']:.2f}" for one in measured.values()]
            print(f"| {model} | {out_features} × {in_features} | " + " | ".join(cells) + " |", flush=True)
    write(args.output, result)


def layers(names: list[str]) -> list[tuple[str, int, int]]:
    """(model, out features, in features) of every kind of linear layer that a step runs."""
    found: dict[tuple[str, int, int], None] = {}
    for name in names:
        make_config = SHAPES[name].text_config
        if make_config is None:
            liquid_config = AutoConfig.from_pretrained(EMOJI_CHECKPOINT)
            config, codebook_size = liquid_config.text_config, liquid_config.codebook_size
        else:
            config, codebook_size = make_config(), CODEBOOK_SIZE
        with torch.device("meta"):
            body = AutoModelForCausalLM.from_config(config).base_model
        for module in body.modules():
            if isinstance(module, nn.Linear):
                found[name, module.out_features, module.in_features] = None
        found[name, codebook_size, config.hidden_size] = None
    return list(found)


def measure(out_features: int, in_features: int, rows: int, rounds: int) -> dict[str, float]:
    """Microseconds of one product."""
    weight = torch.randn(out_features, in_features)
    weights = [weight.clone() for _ in range(-(-BYTES_OF_COPIES // weight.nbytes))]
    x = torch.randn(rows, in_features)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "linear": lambda weight: nn.functional.linear(x, weight),
        # As in FewRowsLinear.
        "transposed": lambda weight: (weight @ x.T).T.contiguous(),
    }
    run = {name: lambda way=way: timed(lambda: [way(copy) for copy in weights]) for name, way in ways.items()}
    seconds = take_turns(run, rounds + 1)
    return {name: 1e6 * statistics.median(values[1:]) / len(weights) for name, values in seconds.items()}


if __name__ == "__main__":
    shapes = [name for name in SHAPES if name != "gemma-7b"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=shapes)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    main(parser.parse_args())
