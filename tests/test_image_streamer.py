"""Partly drawn pictures: what is drawn, what is grey, and who gets them when."""

import asyncio
import contextlib
import json
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import IMAGE_TOKEN_OFFSET, tiny_model, tiny_processor
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidImageGenerationPipeline
from transformers_liquid.pipelines.streamers import ImageIteratorStreamer, ImageStreamer, partial_pictures


GREY = 128


class Keeper(ImageStreamer):
    """Keeps everything it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def on_finalized_images(self, images, num_codes, stream_end=False):
        self.calls.append(([np.asarray(image) for image in images], num_codes, stream_end))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs():
    return tiny_processor()(text=["red apple", "dog"], generation_mode="image", return_tensors="pt")


def finished(model, ids, height=None, width=None):
    """The oracle: pixels of whole pictures, uint8 (B, H, W, 3)."""
    pixel_values = model.decode_image_tokens(ids, height=height, width=width)
    return ((pixel_values + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def random_ids(rows=2, number=16, seed=0):
    return torch.randint(16, (rows, number), generator=torch.Generator().manual_seed(seed)) + IMAGE_TOKEN_OFFSET


def same(images, arrays):
    return len(images) == len(arrays) and all(np.array_equal(*pair) for pair in zip(images, arrays, strict=True))


# partial_pictures


@pytest.mark.parametrize("size", [(None, None), (4, 12)])
def test_all_codes_give_the_finished_pictures(model, size):
    height, width = size
    ids = random_ids(number=16 if height is None else 12)
    assert same(partial_pictures(model, ids, height, width), finished(model, ids, height, width))


@pytest.mark.parametrize("number", [1, 3, 4, 6, 8, 15])
def test_what_is_not_drawn_is_grey_and_nothing_else_is(model, number):
    images = [np.asarray(image) for image in partial_pictures(model, random_ids()[:, :number])]
    for image in images:
        cells = image.reshape(4, 2, 4, 2, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
        assert [bool((cell == GREY).all()) for cell in cells] == [False] * number + [True] * (16 - number)


@pytest.mark.parametrize(
    "number, sources",
    [
        (1, [0] * 16),
        (2, [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]),
        (6, [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7]),
    ],
)
def test_each_column_goes_on_with_its_last_code(model, number, sources):
    ids = random_ids()
    whole = finished(model, ids[:, sources])
    for image, expected in zip(partial_pictures(model, ids[:, :number]), whole, strict=True):
        drawn = (np.arange(16) < number).reshape(4, 4).repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(np.asarray(image)[drawn], expected[drawn])


def test_the_drawn_part_of_a_preview_is_close_to_the_finished_picture():
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT)
    stored = json.loads((Path(__file__).parent / "emoji_codes.json").read_text(encoding="utf-8"))
    ids = model.config.image_layout.codes_to_ids(
        torch.tensor([*stored["seen"].values(), *stored["unseen_composition"].values()])
    )
    whole = finished(model, ids).astype(float)
    for number, limit in ((16, 10), (32, 8), (48, 7)):
        previews = np.stack([np.asarray(image) for image in partial_pictures(model, ids[:, :number])])
        error = np.abs(previews - whole)[:, : number // 8 * 8].mean()  # of 255; measured 8.5, 6.6, 5.4
        assert 0 < error < limit, (number, error)


@pytest.mark.parametrize("shape", [(2, 0), (2, 17), (16,)])
def test_ids_that_are_no_part_of_a_picture_are_refused(model, shape):
    ids = torch.full(shape, IMAGE_TOKEN_OFFSET)
    with pytest.raises(ValueError, match=r"4 x 4 codes needs image ids of shape \(batch, 1 ... 16\), got"):
        partial_pictures(model, ids)


def test_a_preview_in_the_callback_of_the_pipeline(model):
    pipe = LiquidImageGenerationPipeline(model=model, processor=tiny_processor())
    seen = []

    def on_step_end(pipe, step, timestep, callback_kwargs):
        seen.append(partial_pictures(pipe.model, callback_kwargs["image_tokens"])[0])

    [image] = pipe("red apple", seed=0, progress_bar=False, callback_on_step_end=on_step_end)
    assert len(seen) == 16 and same(seen[-1:], [np.asarray(image)])


# Streamers


@pytest.mark.parametrize("speculative", [None, 8])
@pytest.mark.parametrize("every, expected", [(None, [4, 8, 12, 16]), (5, [5, 10, 15, 16]), (16, [16]), (99, [16])])
def test_pictures_come_every_k_codes_and_once_at_the_end(model, inputs, every, expected, speculative):
    streamer = Keeper(model, every)
    ids = model.generate(**inputs, generation_mode="image", do_sample=False, streamer=streamer, speculative=speculative)
    assert [number for _, number, _ in streamer.calls] == expected
    assert [end for *_, end in streamer.calls] == [False] * (len(expected) - 1) + [True]
    for images, number, _ in streamer.calls:
        assert same(images, [np.asarray(image) for image in partial_pictures(model, ids[:, :number])])
    assert same(streamer.calls[-1][0], finished(model, ids))


def test_a_streamer_changes_no_picture(model, inputs):
    def draw(**kwargs):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return model.generate(**inputs, generation_mode="image", generator=generators, **kwargs)

    assert torch.equal(draw(streamer=Keeper(model, 1)), draw())


def test_the_pipeline_takes_a_streamer_for_pictures_of_any_size(model):
    pipe = LiquidImageGenerationPipeline(model=model, processor=tiny_processor())
    streamer = Keeper(model, height=4, width=12)
    images = pipe(["a", "b"], num_images_per_prompt=2, seed=0, height=4, width=12, streamer=streamer)
    assert [number for _, number, _ in streamer.calls] == [6, 12]
    assert same(streamer.calls[-1][0], [np.asarray(image) for image in images])


def test_another_thread_reads_the_pictures_as_they_come(model, inputs):
    streamer = ImageIteratorStreamer(model, every=6, timeout=60)
    drawn = []

    def draw():
        drawn.append(model.generate(**inputs, generation_mode="image", do_sample=False, streamer=streamer))

    thread = threading.Thread(target=draw)
    thread.start()
    read = list(streamer)
    thread.join()
    assert [number for _, number in read] == [6, 12, 16]
    assert same(read[-1][0], finished(model, drawn[0]))


def test_the_reader_of_a_failed_generate_does_not_wait_forever(model, inputs):
    streamer = ImageIteratorStreamer(model, every=3)

    def fail(ids, scores, **kwargs):
        if ids.shape[1] - inputs["input_ids"].shape[1] == 5:
            raise RuntimeError("no memory")
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(RuntimeError, match="no memory"):
        model.generate(**inputs, generation_mode="image", streamer=streamer, stopping_criteria=[fail])
    assert next(streamer)[1] == 3
    with pytest.raises(RuntimeError, match="no memory"):
        next(streamer)
    streamer.timeout = 0.01
    with pytest.raises(queue.Empty):
        next(streamer)


def in_a_thread(function, *args, **kwargs):
    """Errors of a thread are printed by Python alone."""

    def work():
        with contextlib.suppress(ValueError, RuntimeError):
            function(*args, **kwargs)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_what_the_pipeline_fails_with_reaches_the_reader_before_drawing_and_within(model):
    pipe = LiquidImageGenerationPipeline(model=model, processor=tiny_processor())
    streamer = ImageIteratorStreamer(model)
    in_a_thread(pipe, "red apple", streamer=streamer, height=3)
    with pytest.raises(ValueError, match="height"):
        list(streamer)

    def fail(*args):
        raise RuntimeError("in the middle")

    in_a_thread(pipe, "red apple", streamer=streamer, callback_on_step_end=fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        list(streamer)


@pytest.mark.parametrize("mode", ["text", "image"])
def test_what_fails_reaches_the_reader_of_transformers_streamers_for_texts(model, mode):
    processor = tiny_processor()
    inputs = processor(text=["a dog"], generation_mode=mode, return_tensors="pt")

    def fail(ids, scores, **kwargs):
        if ids.shape[1] - inputs["input_ids"].shape[1] == 3:
            raise RuntimeError("in the middle")
        return torch.zeros(len(ids), dtype=torch.bool)

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    arguments = {"generation_mode": mode, "stopping_criteria": [fail], "max_new_tokens": 9}
    arguments = {name: value for name, value in arguments.items() if (mode, name) != ("image", "max_new_tokens")}
    in_a_thread(model.generate, **inputs, streamer=streamer, **arguments)
    with pytest.raises(RuntimeError, match="in the middle"):
        list(streamer)

    async def read():
        streamer = AsyncTextIteratorStreamer(processor.tokenizer)
        thread = in_a_thread(model.generate, **inputs, streamer=streamer, generation_mode="nothing")
        try:
            return [text async for text in streamer]
        finally:
            thread.join()

    with pytest.raises(ValueError, match="nothing"):
        asyncio.run(read())


def test_pictures_that_end_early_are_handed_out_as_far_as_they_are(model, inputs):
    streamer = Keeper(model, every=99)
    length = inputs["input_ids"].shape[1]
    stop = [lambda ids, scores, **kwargs: torch.full((len(ids),), ids.shape[1] == length + 6)]
    ids = model.generate(**inputs, generation_mode="image", streamer=streamer, stopping_criteria=stop)
    [(images, number, end)] = streamer.calls
    assert number == ids.shape[1] == 6 and end
    assert same(images, [np.asarray(image) for image in partial_pictures(model, ids)])


@pytest.mark.parametrize("streamer_class", [Keeper, ImageIteratorStreamer])
def test_a_streamer_follows_one_drawing_after_another_and_after_one_that_failed(model, inputs, streamer_class):
    streamer = streamer_class(model, every=99)

    def fail(ids, scores, **kwargs):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        model.generate(**inputs, generation_mode="image", streamer=streamer, stopping_criteria=[fail])
    for _ in range(2):
        ids = model.generate(**inputs, generation_mode="image", streamer=streamer)
        calls = [streamer.calls.pop()] if streamer_class is Keeper else list(streamer)
        assert len(calls) == 1
        assert same(calls[0][0], [np.asarray(image) for image in partial_pictures(model, ids)])


def test_more_codes_than_the_picture_has_are_refused(model, inputs):
    with pytest.raises(ValueError, match=r"A picture of 2 x 2 codes needs image ids of shape .*, got \(2, 6\)"):
        model.generate(**inputs, generation_mode="image", streamer=Keeper(model, height=4, width=4))


@pytest.mark.parametrize("every", [0, -3, 2.5, "8"])
def test_every_must_be_a_number_of_codes(model, every):
    with pytest.raises(ValueError, match="every must be a whole number of codes, at least 1"):
        ImageStreamer(model, every)


def test_a_size_that_the_codec_cannot_draw_is_refused(model):
    with pytest.raises(ValueError, match="positive multiples of 2 pixels"):
        ImageStreamer(model, height=7)
