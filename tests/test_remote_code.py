"""`trust_remote_code=True` loads what was saved in a process that has not imported the package."""

import json
import os
import subprocess
import sys

import pytest
from tiny import tiny_model, tiny_processor
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from transformers_liquid import LiquidConfig, LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor


BEGINNING = """
import sys
import transformers
from transformers import pipelines
assert "transformers_liquid" not in sys.modules
path, trust = sys.argv[1], {"trust_remote_code": True}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "liquid"
    tiny_model().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


def run(code, checkpoint, tmp_path, **variables):
    """What a process prints last, or fails with."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")} | variables
    command = [sys.executable, "-c", BEGINNING + code, str(checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(type(transformers.AutoConfig.from_pretrained(path, **trust)).__name__)", "LiquidConfig"),
        ("print(type(transformers.AutoModel.from_pretrained(path, **trust)).__name__)", "LiquidModel"),
        ("print(type(transformers.AutoProcessor.from_pretrained(path, **trust)).__name__)", "LiquidProcessor"),
        (
            "from transformers.pipelines import any_to_any; any_to_any.requires_backends = lambda *_: None  # torchvision, which is never used here\n"
            "print(type(transformers.pipeline('any-to-any', model=path, **trust).model).__name__)",
            "LiquidForCausalLM",
        ),
    ],
    ids=["config", "model", "processor", "any-to-any"],
)
def test_the_auto_classes_load_it(code, expected, checkpoint, tmp_path):
    assert run(code, checkpoint, tmp_path) == expected


def test_the_pipeline_draws_what_it_draws_here(checkpoint, tmp_path):
    code = "print(transformers.pipeline('text-to-image', model=path, **trust)('a dog', seed=0)[0].tobytes().hex())"
    pipe = LiquidImageGenerationPipeline(LiquidForCausalLM.from_pretrained(checkpoint), tiny_processor())
    assert run(code, checkpoint, tmp_path) == pipe("a dog", seed=0)[0].tobytes().hex()


@pytest.mark.slow
def test_what_was_loaded_so_is_saved_as_a_repository_that_loads_so_again(checkpoint, tmp_path):
    again = tmp_path / "again"
    code = (
        f"model = transformers.AutoModelForCausalLM.from_pretrained(path, **trust); model.save_pretrained({str(again)!r})\n"
        f"transformers.AutoProcessor.from_pretrained(path, **trust).save_pretrained({str(again)!r}); print(type(model))"
    )
    assert "transformers_liquid.models" in run(code, checkpoint, tmp_path)
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    assert run(code.replace(str(again), str(tmp_path / "third")), again, tmp_path).endswith("LiquidForCausalLM'>")


@pytest.mark.slow
def test_without_the_package_or_without_trust_it_says_what_to_do(checkpoint, tmp_path):
    code = "sys.modules['transformers_liquid'] = None\ntransformers.AutoConfig.from_pretrained(path, **trust)"
    assert "`pip install transformers-liquid`" in run(code, checkpoint, tmp_path)
    code = "transformers.AutoModelForCausalLM.from_pretrained(path)"
    assert "`trust_remote_code=True`" in run(code, checkpoint, tmp_path)


def test_here_the_classes_that_are_here_load_it_whatever_is_trusted(checkpoint):
    module = (checkpoint / "modeling_liquid_remote.py").read_text()
    assert "from transformers_liquid import" in module
    for auto_class, own in (
        (AutoConfig, LiquidConfig),
        (AutoModelForCausalLM, LiquidForCausalLM),
        (AutoProcessor, LiquidProcessor),
    ):
        for trust in (None, True):
            assert type(auto_class.from_pretrained(checkpoint, trust_remote_code=trust)) is own
        own.register_for_auto_class()
        assert own._auto_class is None
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"]["AutoModel"].endswith(".LiquidModel")
