"""What the benchmarks share: the machine, clocks, ways that take turns, ratios within a round, results as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def cpu_name() -> str:
    """Linux's name of the processor, elsewhere Python's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]} ({torch.backends.cpu.get_cpu_capability()})"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a result depends on beside the code."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call on a CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures every way once a round, so that a busy machine slows all of them alike."""
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            measured[name].append(way())
    return measured


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Of two ways, round by round: the median, the smallest and the largest."""
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def as_text(values: dict[str, float] | None) -> str:
    """A ratio as it stands in the tables."""
    return "" if values is None else f"{values['median']:.2f} [{values['min']:.2f} – {values['max']:.2f}]"


def write(path: Path | None, result: dict[str, Any]) -> None:
    """The results as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
