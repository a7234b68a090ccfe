"""The embedded voken-emoji, as it ships, with liquid-emoji's drawings as oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import pipeline

from transformers_liquid import VOKEN_EMOJI, CodecVAE, InterleavedVokenPipeline
from transformers_liquid.models.voken.prompts import STORY_PROMPTS


SETTINGS = {"guidance_scale": 2.0, "num_inference_steps": 15, "seed": 0}
TONES = ["", *(f": {tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))]


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(VOKEN_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def emoji():
    liquid = pipeline("text-to-image")
    names = [f"{who}{role}{tone}" for who in ("woman", "man") for role in ("", " pilot") for tone in TONES]
    return dict(zip(names, liquid(names, seed=0), strict=True))


def turn(*parts):
    """What a user says and shows."""
    kinds = ["text" if isinstance(one, str) else "image" for one in parts]
    return [{"role": "user", "content": [{"type": kind, kind: one} for kind, one in zip(kinds, parts, strict=True)]}]


def nearest(picture, emoji):
    """What it shows: the pilot whose picture is nearest by squared error over pixels."""
    pixels = np.asarray(picture, dtype=float)
    pilots = {name: one for name, one in emoji.items() if "pilot" in name}
    return min(pilots, key=lambda name: ((np.asarray(pilots[name], dtype=float) - pixels) ** 2).sum())


def test_it_is_small_and_stored_in_halves_that_compute_in_fp32(pipe):
    files = [*Path(VOKEN_EMOJI).rglob("*.safetensors")]
    assert len(files) == 3 and sum(file.stat().st_size for file in files) <= 16e6
    for file in files:
        with safe_open(file, "pt") as stored:
            assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}  # noqa: SIM118
    assert isinstance(pipe, InterleavedVokenPipeline) and isinstance(pipe.vae, CodecVAE)
    for part in (pipe.model, pipe.unet, pipe.vae, pipe.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}


def test_a_scene_shows_the_person_of_the_picture_before(pipe, emoji):
    people = [f"{who}{tone}" for who in ("woman", "man") for tone in TONES]
    asked = STORY_PROMPTS["image"].format(text="kim as pilot.")
    turns = [turn("this is kim.", emoji[one], asked) for one in people]
    drawn = [picture for (picture,) in pipe(turns, **SETTINGS).segments]
    right = [nearest(one, emoji) == who.replace("man", "man pilot", 1) for one, who in zip(drawn, people, strict=True)]
    assert sum(right) >= 11


def test_a_story_is_told_and_drawn_scene_by_scene(pipe, emoji):
    scenes = pipe.story(["this is kim.", emoji["woman: dark skin tone"]], scenes=2, **SETTINGS).segments
    for text, picture in scenes:
        assert text.startswith("kim as ") and picture.size == (64, 64)
    assert scenes[0][0] != scenes[1][0]


def test_what_a_picture_shows_is_told(pipe, emoji):
    shown = emoji["man: light skin tone"], emoji["man pilot: light skin tone"]
    told = pipe(turn("this is kim.", shown[0], STORY_PROMPTS["text"], shown[1]), max_new_tokens=16).segments[0]
    assert [one.replace(" ", "") for one in told] == ["kimaspilot."]
