"""What the package leans on in transformers beyond its documented interface: when a version renames it, this says what."""

import inspect
import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders import vae
from packaging.requirements import Requirement
from tiny import tiny_model
from transformers import (
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    modeling_utils,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.utils import PushToHubMixin

from transformers_liquid.utils.versions import CACHE_NAME, CACHE_NAMES


# Where the package leans on it: an object, and attributes or arguments of it.
INTERNALS = {
    "generation/image_generation.py: a decoding loop of one's own": (GenerationMixin.generate, ["custom_generate"]),
    "generation/sampling.py: a step": (
        GenerationMixin,
        ["_update_model_kwargs_for_generation", "_valid_auto_compile_criteria"],
    ),
    "models/liquid/modeling_liquid.py: the cache's name": (GenerationMixin, ["_prepare_cache_for_generation"]),
    "generation/interleaved.py: settings of a call": (
        GenerationMixin,
        ["_prepare_generation_config", "_get_logits_processor"],
    ),
    "models/liquid/modeling_liquid.py: flags": (
        PreTrainedModel,
        [
            "_keep_in_fp32_modules",
            "_keep_in_fp32_modules_strict",
            "_skip_keys_device_placement",
            "_can_compile_fullgraph",
        ],
    ),
    "generation/speculative.py: taking codes back": (
        DynamicCache,
        ["activate_past_recording", "crop", "reorder_cache"],
    ),
    "generation/sampling.py: static caches": (StaticCache, ["is_compileable", "get_seq_length"]),
    "models/liquid/processing_liquid.py: a call of text mode": (
        ProcessorMixin,
        ["get_text_with_replacements", "validate_inputs", "_process_images"],
    ),
    "models/liquid/unitok_reference.py: weights in either format": (modeling_utils, ["load_state_dict"]),
    "codecs/unitok.py: what codecs of diffusers share": (vae, ["AutoencoderMixin"]),
    "models/liquid/model_card.py: cards that are pushed": (PushToHubMixin, ["_upload_modified_files"]),
    "models/voken/reference.py: what stands for a picture": (
        PreTrainedTokenizerBase,
        ["_set_model_specific_special_tokens"],
    ),
    "models/voken/modeling_voken.py: arguments of a drawing": (GenerationMixin, ["_validate_model_kwargs"]),
    "training/voken_trainer.py: what a step accumulates": (Trainer, ["get_batch_samples"]),
    "models/voken/modeling_voken.py: one device for the mapper": (PreTrainedModel, ["_no_split_modules"]),
    "pipelines/interleaved_voken.py: a pipeline of diffusers' kind": (
        DiffusionPipeline,
        ["_optional_components", "_upload_folder", "model_cpu_offload_seq"],
    ),
    "training/trainer.py: labels of a step": (Trainer, ["_get_num_items_in_batch"]),
    "training/trainer.py: what is missing in a checkpoint": (Trainer, ["_issue_warnings_after_load"]),
}


@pytest.mark.parametrize("place", INTERNALS)
def test_the_internals_that_the_package_leans_on_are_there(place):
    thing, names = INTERNALS[place]
    parameters = inspect.signature(thing).parameters if inspect.isfunction(thing) else {}
    assert not [name for name in names if not hasattr(thing, name) and name not in parameters]


@pytest.mark.parametrize("name", CACHE_NAMES[:2])
def test_a_cache_is_taken_under_its_old_and_its_new_name(name):
    model, ids = tiny_model(), torch.tensor([[1, 40, 41, 42]])
    for part in (model, model.model):
        whole = part(ids, use_cache=True)
        begun = part(ids[:, :3], use_cache=True)
        assert isinstance(begun[CACHE_NAME], DynamicCache)
        continued = part(ids[:, 3:], **{name: begun[CACHE_NAME]})
        torch.testing.assert_close(continued[0][:, -1], whole[0][:, -1])
    assert CACHE_NAME in inspect.signature(LlamaForCausalLM.forward).parameters


def test_the_versions_in_use_are_among_those_that_are_admitted():
    for requirement in map(Requirement, requires("transformers-liquid")):
        if requirement.marker is None:
            assert version(requirement.name) in requirement.specifier, f"{requirement} but {version(requirement.name)}"
    # The readers of README and card are told the same.
    lowest = next(r for r in map(Requirement, requires("transformers-liquid")) if r.name == "transformers").specifier
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for stated in re.findall(r"transformers (5\.\d+)", text):
        assert lowest.contains(f"{stated}.0") or transformers.__version__.startswith(stated)
