"""How the suite runs: offline, one thread a process, a process for each core, every test from the same seed."""

from __future__ import annotations

import os

import pytest


# Before torch is imported, here and in what tests start. Threads of torch fight each other over tiny models: with one
# each, two processes are five times as fast as one process with two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MOST_PROCESSES = 8


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config):
    """Folders are tested by as many processes as there are cores, files in this one; `-n` says otherwise."""
    is_whole = all((config.invocation_params.dir / argument).is_dir() for argument in config.args)
    is_plain = not (config.getoption("usepdb") or config.getoption("collectonly") or hasattr(config, "workerinput"))
    if is_whole and is_plain and config.getoption("numprocesses", 0) is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        config.option.numprocesses = min(cores, MOST_PROCESSES)
        config.option.dist = "worksteal"
    return (yield)


@pytest.fixture(autouse=True)
def same_start_for_every_test():
    """What a test draws does not depend on those before it, nor does what the libraries say."""
    import diffusers
    import transformers

    transformers.set_seed(0)
    verbosities = [(library, library.utils.logging.get_verbosity()) for library in (transformers, diffusers)]
    yield
    for library, verbosity in verbosities:
        library.utils.logging.set_verbosity(verbosity)
        library.utils.logging.enable_progress_bar()
