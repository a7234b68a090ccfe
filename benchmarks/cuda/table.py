"""What `run.sh` wrote, as tables: python benchmarks/cuda/table.py benchmarks/results/cuda"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


folder = Path(sys.argv[1])
if (path := folder / "correct.jsonl").exists():
    print("\n| test | measured |\n|---|---|")
    for line in path.read_text().splitlines():
        fact = json.loads(line)
        print(f"| {fact.pop('test')} | {', '.join(f'{name} {value}' for name, value in fact.items())} |")
for part in ("gemma-1", "gemma-16", "emoji"):
    if (path := folder / f"{part}.json").exists():
        result = json.loads(path.read_text())
        floor = f", memory floor {result['floor_ms']:.2f} ms a code" if "floor_ms" in result else ""
        print(f"\n{part}: {result['machine']}{floor}\n\n| way | measured |\n|---|---|")
        for name, way in result["ways"].items():
            print(f"| {name} | {', '.join(f'{key} {value}' for key, value in way.items())} |")
if (path := folder / "training.json").exists():
    result = json.loads(path.read_text())
    print(f"\ntraining: {result['machine']}\n\n| way | tokens per second |\n|---|---|")
    for name, rates in result["tokens_per_second"].items():
        print(f"| {name} | {rates if isinstance(rates, str) else round(statistics.median(rates))} |")
    print(json.dumps(result.get("loss")))
if (path := folder / "flagship.json").exists():
    result = json.loads(path.read_text())
    for when in ("before", "after"):
        print(when, {name: value for name, value in result[when].items() if name != "answers"})
    print(json.dumps(result.get("drawing")), result.get("exact_name"))
