"""Pictures as pairs of requests to an engine: with a plain loop in place of one, and with stock vLLM where it is there."""

import random

import pytest
import torch
from tiny import CODEBOOK_SIZE, EOI_ID, IMAGE_TOKEN_OFFSET, VOCAB_SIZE, tiny_model, tiny_processor
from transformers import GenerationConfig

from transformers_liquid import EMOJI_CHECKPOINT, LiquidImageGenerationPipeline
from transformers_liquid.serving.pair_requests import PairDrawer, PairedPicture, picture_requests


SETTINGS = {"guidance_scale": 3.0, "guidance_min_p": 0.1, "temperature": 0.7, "top_p": 0.9, "top_k": 12}
CODES = 16


@pytest.fixture(scope="module")
def pipe():
    return LiquidImageGenerationPipeline(model=tiny_model().eval(), processor=tiny_processor())


LAYOUT = {"image_token_offset": IMAGE_TOKEN_OFFSET, "codebook_size": CODEBOOK_SIZE, "eoi_token_id": EOI_ID}


@torch.no_grad()
def draw(pipe, requests, steps=CODES, begin=lambda index: 0):
    """What an engine does with requests, each of which begins at a step: forwards, the drawer, and the best id."""
    drawer, ids = PairDrawer(LAYOUT), [list(request["prompt_token_ids"]) for request in requests]
    pictures = [
        PairedPicture(request["sampling_params"]["extra_args"], request["prompt_token_ids"]) for request in requests
    ]
    prompts = [len(one) for one in ids]
    for step in range(steps):
        running = [index for index in range(len(ids)) if begin(index) <= step < begin(index) + CODES]
        logits = torch.stack([pipe.model(input_ids=torch.tensor([ids[index]])).logits[0, -1] for index in running])
        drawer(logits, {row: (pictures[index], len(ids[index]) - prompts[index]) for row, index in enumerate(running)})
        for index, token in zip(running, logits.argmax(-1).tolist(), strict=True):
            ids[index].append(token)
    return [one[length:] for one, length in zip(ids, prompts, strict=True)]


def codes_of(pipe, prompt, seed, **settings):
    inputs = pipe.processor(text=prompt, generation_mode="image", return_tensors="pt")
    generator = [torch.Generator().manual_seed(seed)]
    return pipe.model.generate(**inputs, generation_mode="image", generator=generator, **settings)[0].tolist()


def test_requests_in_any_order_and_at_any_step_draw_what_the_pipeline_draws(pipe):
    wanted = [("red apple", 3, SETTINGS), ("dog face", 4, SETTINGS), ("cat", 5, {"guidance_scale": 1.0, "top_k": None})]
    wanted.append(
        ("sun", 6, {"do_sample": False, "guidance_scale": 2.0, "temperature": None, "top_k": None, "top_p": None})
    )
    requests = [(number, one) for number, (prompt, seed, settings) in enumerate(wanted)
                for one in picture_requests(pipe.processor, prompt, seed, generation_config=pipe.model.generation_config, **settings)]  # fmt: skip
    random.Random(0).shuffle(requests)
    numbers = [number for number, _ in requests]
    drawn = draw(pipe, [one for _, one in requests], CODES + 9, lambda index: 3 * numbers[index])
    for ids, number in zip(drawn, numbers, strict=True):
        prompt, seed, settings = wanted[number]
        assert ids == codes_of(pipe, prompt, seed, **settings)


def test_the_checkpoints_settings_count_unless_others_are_given(pipe):
    config = GenerationConfig.from_pretrained(EMOJI_CHECKPOINT)
    first, second = picture_requests(pipe.processor, "cat", 1, generation_config=config, temperature=0.5)
    arguments, stored = first["sampling_params"]["extra_args"], config.image_generation_config
    assert arguments["liquid_guidance_scale"] == stored["guidance_scale"] and arguments["liquid_temperature"] == 0.5
    assert second["sampling_params"] == first["sampling_params"]
    assert second["prompt_token_ids"] == arguments["liquid_unconditional"] != first["prompt_token_ids"]
    assert first["sampling_params"]["max_tokens"] == CODES


def test_a_half_alone_or_behind_gets_the_end_of_a_picture_so_that_it_fails(pipe):
    first, second = picture_requests(pipe.processor, "cat", 1, **SETTINGS)
    (alone,) = draw(pipe, [first], 1)
    assert alone == [EOI_ID]
    behind = draw(pipe, [first, second], 2, lambda index: index)
    assert behind == [[EOI_ID] * 2, [EOI_ID]]


def test_other_rows_stay_as_they_are(pipe):
    pair = picture_requests(pipe.processor, "cat", 1, **SETTINGS)
    logits = torch.randn(4, VOCAB_SIZE)
    before = logits.clone()
    pictures = [PairedPicture(one["sampling_params"]["extra_args"], one["prompt_token_ids"]) for one in pair]
    PairDrawer(LAYOUT)(logits, {3: (pictures[0], 0), 1: (pictures[1], 0)})
    assert torch.equal(logits[[0, 2]], before[[0, 2]]) and torch.equal(logits[1], logits[3])
    assert logits[1].isfinite().sum() == 1 and logits[1].argmax() >= IMAGE_TOKEN_OFFSET


def test_a_code_that_cannot_be_drawn_ends_the_picture(pipe):
    (request,) = picture_requests(pipe.processor, "cat", 1, guidance_scale=1.0)
    logits = torch.full((1, VOCAB_SIZE), torch.nan)
    PairDrawer(LAYOUT)(logits, {0: (PairedPicture(request["sampling_params"]["extra_args"], []), 0)})
    assert logits[0].argmax() == EOI_ID


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"liquid_seed": "7"}, "liquid_seed must be a whole number, got '7'"),
        ({"liquid_guidance_scale": 1.0}, "liquid_seed must be"),
        ({"liquid_seed": 7, "liquid_top_p": 2.0}, "top_p must be"),
        ({"liquid_seed": 7, "liquid_colour": "red"}, "liquid_colour is no setting"),
        ({"liquid_seed": 7, "liquid_guidance_scale": 3.0}, "a picture is two requests"),
        ({"liquid_seed": 7, "liquid_speculative": 12}, "speculative cannot be set"),
        ({"liquid_seed": 7, "liquid_max_new_tokens": 3, "liquid_num_beams": 2}, "num_beams"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_the_door(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairedPicture.check(arguments)
    assert PairedPicture.check({"other": 1}) is PairedPicture.check(None) is None
