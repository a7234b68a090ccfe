"""What suits a number of records, and what a run will take: options for who has none, an estimate before the work."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback


try:
    import resource
except ImportError:  # on Windows
    resource = None

if TYPE_CHECKING:
    from datasets import Dataset


# Peak learning rates. Those of adapters are higher, since they begin from nothing.
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4, "rows": 5e-3}

# A few records are seen often, many of them thrice.
MIN_STEPS, MIN_EPOCHS = 500, 3

# Of all records that one process reads at once.
MAX_TOKENS = 4096


def preset_options(
    given: dict[str, Any], num_records: int = 1, num_codes: int = 0, captions: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The options of a preset.

    Args:
        given (`dict`): Of the command line or `None`: `preset`, `total_batch_size` and `per_device_train_batch_size`.
        num_records (`int`, defaults to 1): Of all data sets.
        num_codes (`int`, defaults to 0): Of a picture.
        captions (tuple of `str`): Of which previews are drawn.

    Returns:
        `dict` of options by their names; empty without a preset.
    """
    if given["preset"] not in LEARNING_RATES:  # the parser says what there is
        return {}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    at_once, total = given["per_device_train_batch_size"], given["total_batch_size"]
    few = 2 ** math.floor(math.log2(min(8, num_records)))
    wanted = total or min(128, max(few, 2 ** round(math.log2(num_records / 16))))
    if at_once is None:
        fitting = [size for size in (8, 4, 2) if size * num_codes <= MAX_TOKENS and not wanted % (size * processes)]
        at_once = fitting[0] if fitting else 1
    if total is None:
        total = math.ceil(wanted / (at_once * processes)) * at_once * processes
    return {
        "trainable": given["preset"],
        "learning_rate": LEARNING_RATES[given["preset"]],
        "total_batch_size": total,
        "per_device_train_batch_size": at_once,
        "num_train_epochs": max(MIN_EPOCHS, math.ceil(MIN_STEPS * total / num_records)),
        "warmup_steps": 0.05,  # of all steps, as what follows
        "logging_steps": 0.01,
        "save_steps": 0.2,
        "save_total_limit": 2,
        "preview_steps": 0.2,
        "include_num_input_tokens_seen": True,
    } | ({"preview_prompts": list(captions)} if captions and processes == 1 else {})


def look_at(records: Sequence[Dataset]) -> dict[str, Any]:
    """What [`preset_options`] goes by, of data sets of records."""
    number, drawn = sum(map(len, records)), []
    for of_kind in records:
        some = [of_kind[index * len(of_kind) // 4] for index in range(4)]
        drawn += [record for record in some if record["kind"] == "text_to_image"]
    # Short ones, that are no options where they stand on a command line.
    captions = [text for record in drawn if len(text := record["text"]) <= 200 and not text.startswith("-")]
    num_codes = max((math.prod(record.get("grid") or np.shape(record["codes"])) for record in drawn), default=0)
    return {"num_records": number, "num_codes": num_codes, "captions": tuple(dict.fromkeys(captions))[:4]}


class EstimateCallback(TrainerCallback):
    """Says what a run is before its first step, and what it takes after its third: two are timed after one to warm up.

    Args:
        is_dry_run (`bool`): Whether the run ends there.
    """

    def __init__(self, is_dry_run: bool):
        self.is_dry_run = is_dry_run

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.times: list[float] = []
        self.tokens = state.num_input_tokens_seen
        left = state.max_steps - state.global_step
        if state.is_world_process_zero:
            print(f"{left:,} optimizer steps of {args.total_batch_size:,} records.", flush=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if len(self.times) == 3:
            return
        on_accelerator = torch.accelerator.is_available() and args.device.type != "cpu"
        if on_accelerator:
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter() - self.begin)
        left = state.max_steps - state.global_step
        if len(self.times) < 3 and left:
            return
        timed = self.times[1:] or self.times
        seconds, number = sum(timed) / len(timed), left + len(self.times)
        tokens = (state.num_input_tokens_seen - self.tokens) / len(self.times)
        memory = "unknown"
        if on_accelerator:
            memory = f"{torch.accelerator.max_memory_allocated() / 2**30:.1f} GiB of {args.device}"
        elif resource is not None:  # bytes on a Mac, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            memory = f"{peak / 2**30:.1f} GiB"
        if state.is_world_process_zero:
            print(
                f"A step takes {seconds:.2f} s and {tokens:,.0f} tokens: {number:,} of them about {_duration(number * seconds)} "
                f"and {number * tokens:,.0f} tokens, without saving and previews. Memory: {memory}.",
                flush=True,
            )
        if self.is_dry_run:
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False


def _duration(seconds: float) -> str:
    unit, name = next((one for one in ((3600, "h"), (60, "min")) if seconds >= one[0]), (1, "s"))
    return f"{seconds / unit:.1f} {name}"
