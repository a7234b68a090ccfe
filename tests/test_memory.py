"""Loading, expanding and converting never hold two copies of the weights: `benchmarks/memory.py`, made small."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"
# A small vocabulary: expanding has to hold the old embeddings beside the new ones.
TEXT_CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    tie_word_embeddings=True,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux"),
]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoints(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    benchmark.make_checkpoints(folder, TEXT_CONFIG, torch.float32)
    return folder


@pytest.mark.parametrize("operation", ["from_reference", "to_base", "to_taming", "expand"])
def test_the_weights_are_held_once(operation, benchmark, checkpoints):
    command = [sys.executable, str(SCRIPT), "--operation", operation, "--folder", str(checkpoints)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert result["weight_bytes"] > 300e6
    assert 0.9 < result["peak_bytes"] / result["weight_bytes"] <= benchmark.GOAL
