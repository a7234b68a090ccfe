"""The processes of `accelerate launch`."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def launched_processes() -> PartialState:
    """The processes of `accelerate launch`, each with a device of its own; or this one alone."""
    # Several processes on CPUs are known as such only with `cpu=True`.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A process that is done may wait long for the others.
    return PartialState(cpu=on_cpu, timeout=timedelta(days=365))
