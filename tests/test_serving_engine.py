"""The picture engine: the pictures of the pipeline, whoever is drawn beside them and whenever they come."""

import random
import threading
import time

import pytest
import torch
from tiny import BASES, tiny_model, tiny_processor

from transformers_liquid import LiquidImageGenerationPipeline, partial_pictures
from transformers_liquid.serving.engine import EngineFullError, PictureEngine


def tiny_pipe(model_type="llama"):
    model = tiny_model(model_type)
    if model_type == "llama":
        model.config.text_config.max_position_embeddings = 512
    return LiquidImageGenerationPipeline(model, tiny_processor())


@pytest.fixture
def engine():
    engine = PictureEngine(tiny_pipe(), slots=4)
    yield engine
    engine.close()


def drawn_by(pipe, prompt, **settings):
    return [image.tobytes() for image in pipe(prompt, progress_bar=False, **settings)]


# Everything in which requests can differ: lengths, sizes, sides of guidance, filters, pictures in the context.
REQUESTS = [
    {"prompt": "a"},
    {"prompt": "a much longer prompt", "guidance_scale": 1},
    {"prompt": "b", "guidance_scale": 3.0, "guidance_min_p": 0.1, "num_images_per_prompt": 2},
    {"prompt": "c", "height": 4, "width": 12, "temperature": 0.5},
    {"prompt": "d", "height": 12, "top_k": 3, "negative_prompt": "grey"},
    {"prompt": "e", "do_sample": False},
    {"prompt": "f", "top_p": 0.5, "top_k": None},
    {"prompt": "g", "with_image": True, "image_guidance_scale": 1.5},
    {"prompt": "h", "with_image": True, "guidance_context": "images"},
]


def requests(picture):
    for index, one in enumerate(REQUESTS):
        yield (
            {name: value for name, value in one.items() if name != "with_image"}
            | {"seed": index}
            | ({"image": picture} if "with_image" in one else {})
        )


@pytest.fixture(scope="module")
def picture():
    return tiny_pipe()("x", seed=9, progress_bar=False)[0]


def ask_while_drawing(engine, asked, seed=0):
    """Asks for one after the other, each at a step of chance in the midst of those before; their requests."""
    chance, left, requests = random.Random(seed), list(enumerate(asked)), {}
    chance.shuffle(left)
    is_over, step = threading.Event(), engine._step

    def ask():
        index, one = left.pop()
        requests[index] = engine.submit(**one)
        if not left:
            is_over.set()

    def step_and_ask():
        step()
        while left and (chance.random() < 0.2 or len(engine.running) == 1):
            ask()

    engine._step = step_and_ask
    ask()
    assert is_over.wait(60)
    engine._step = step
    return [requests[index] for index in range(len(asked))]


def images_of(request):
    images = {event.index: event.image.tobytes() for event in request}
    return [images[index] for index in sorted(images)]


# Positions of three kinds, and sliding windows beside full attention.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text"])
def test_pictures_are_those_of_the_pipeline_whenever_they_join(model_type, picture):
    pipe, asked = tiny_pipe(model_type), list(requests(picture))
    engine = PictureEngine(pipe, slots=3)
    for one, request in zip(asked, ask_while_drawing(engine, asked), strict=True):
        assert images_of(request) == drawn_by(pipe, **one), one
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [one for one in BASES if one != "mamba"])
def test_every_base_joins(model_type, picture):
    test_pictures_are_those_of_the_pipeline_whenever_they_join(model_type, picture)


@pytest.mark.slow
def test_a_compiled_step_draws_the_same_and_is_compiled_once(picture):
    pipe, asked = tiny_pipe(), list(requests(picture))
    expected = [drawn_by(pipe, **one) for one in asked]
    engine = PictureEngine(pipe, slots=3, compile=True)
    images_of(engine.submit("a"))
    assert engine.forward is not engine.view
    with torch.compiler.set_stance("fail_on_recompile"):
        for one, request in zip(expected, ask_while_drawing(engine, asked), strict=True):
            assert images_of(request) == one
    engine.close()


def test_a_base_with_sliding_windows_is_not_compiled():
    with pytest.raises(ValueError, match="sliding windows"):
        PictureEngine(tiny_pipe("gemma3_text"), compile=True)


def test_those_who_come_together_are_read_in_one_forward_and_equal_prompts_once(engine):
    read, together, sizes = engine._read, [], []
    engine._read = lambda pictures: together.append(len(pictures)) or read(pictures)
    prefill = engine.view._prefill
    engine.view._prefill = lambda ids, *others: sizes.append(len(ids)) or prefill(ids, *others)
    asked = [{"prompt": "a"}, {"prompt": "a longer prompt"}, {"prompt": "a"}, {"prompt": "b", "guidance_scale": 1}]
    with engine._changed:
        requests = [engine.submit(**one, seed=seed) for seed, one in enumerate(asked)]
    for seed, (one, request) in enumerate(zip(asked, requests, strict=True)):
        assert images_of(request) == drawn_by(engine.pipe, **one, seed=seed)
    assert together == [3, 1] and sizes == [3, 1]  # two prompts and the unconditional one


def test_a_late_request_begins_with_the_next_step_and_ends_before_those_it_does_not_wait_for(engine):
    first = engine.submit("a", height=16, width=16, tell=(told := []).append)
    while engine.num_steps < 5:
        time.sleep(0.001)
    left, leave = {}, engine._leave
    engine._leave = lambda pictures: left.update((one.request, engine.num_steps) for one in pictures) or leave(pictures)
    before, late = engine.num_steps, engine.submit("b", height=2, width=4)
    images_of(late)
    assert left[late] - before <= 4 and not told and first not in left


def test_previews_grow_to_the_picture(engine):
    *partial, last = engine.submit("a", seed=1, partial_images=3)
    assert [event.type for event in partial] == ["partial"] * 3 and last.type == "image"
    assert [event.num_codes for event in [*partial, last]] == [4, 8, 12, 16]
    seen = {}

    def watch(pipe, step, timestep, values):
        images = partial_pictures(pipe.model, values["image_tokens"], dtype=engine.preview_dtype)
        seen[step + 1] = images[0].tobytes()

    engine.pipe("a", seed=1, progress_bar=False, callback_on_step_end=watch)
    assert [event.image.tobytes() for event in partial] == [seen[number] for number in (4, 8, 12)]


def test_who_is_cancelled_frees_the_slot_and_the_others_are_drawn_on(engine):
    told = []
    cancelled = [engine.submit("a", height=16, width=16, tell=told.append) for _ in range(4)]
    waiting = engine.submit("b", seed=2)
    while engine.num_steps < 3:
        time.sleep(0.001)
    for request in cancelled:
        request.cancel()
    assert images_of(waiting) == drawn_by(engine.pipe, "b", seed=2)
    assert not told and not engine.running and engine.cache.lengths == []
    gone = engine.submit("a", height=16, width=16)
    gone.cancel()
    assert list(gone) == []


@pytest.mark.parametrize("where", ["reading", "step"])
def test_what_fails_is_told_to_whom_it_concerns_and_the_engine_goes_on(engine, where, monkeypatch):
    def fail(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine, {"reading": "_read", "step": "_step"}[where], fail)
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                images_of(engine.submit("a", num_images_per_prompt=2))
    assert images_of(engine.submit("b", seed=5)) == drawn_by(engine.pipe, "b", seed=5)


def test_nan_ends_the_request_that_has_it_alone(engine):
    with torch.no_grad():
        engine.pipe.model.get_input_embeddings().weight[7 + ord("z") - 33] = torch.nan  # of "z", in the byte tokenizer
    broken, sane = engine.submit("z"), engine.submit("b", seed=5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        images_of(broken)
    assert len(images_of(sane)) == 1


def test_a_full_queue_says_when_to_come_again():
    engine = PictureEngine(tiny_pipe(), slots=1, max_waiting=2)
    step, goes_on = engine._step, threading.Event()
    engine._step = lambda: goes_on.wait(60) and step()
    running = engine.submit("a")
    while not engine.running:
        time.sleep(0.001)
    waiting = engine.submit("b", num_images_per_prompt=2)
    with pytest.raises(EngineFullError, match="2 pictures are waiting already: try again in"):
        engine.submit("c")
    goes_on.set()
    assert len(images_of(running)) == 1 and len(images_of(waiting)) == 2
    engine.close()


def test_closing_draws_what_was_asked_for_and_takes_no_more():
    engine = PictureEngine(tiny_pipe(), slots=1)
    asked = [engine.submit("a", seed=seed) for seed in range(3)]
    engine.close()
    assert not engine.is_alive
    assert [images_of(one) for one in asked] == [drawn_by(engine.pipe, "a", seed=seed) for seed in range(3)]
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit("a")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": ["a", "b"]}, "prompt must be a string"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a", "height": 7}, "multiple"),
        ({"prompt": "a", "guidance_scale": 0}, "guidance_scale must be"),
        ({"prompt": "a", "partial_images": -1}, "partial_images must be"),
        ({"prompt": "a", "use_cache": False}, "takes no use_cache"),
        ({"prompt": "a", "streamer": object()}, "takes no streamer"),
        ({"prompt": "a", "output_type": "np"}, "takes no output_type"),
        ({"prompt": "a", "guidance_scale": 1, "negative_prompt": "b"}, "acts through guidance"),
        ({"prompt": "a" * 500}, "positions"),
    ],
)
def test_what_cannot_be_met_is_said_at_once(engine, given, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(**given)
    assert engine.num_codes == 0


def test_bases_whose_state_cannot_be_moved_are_refused():
    with pytest.raises(ValueError, match="cannot be moved"):
        PictureEngine(tiny_pipe("mamba"))


def test_the_cache_is_as_long_as_its_longest_sequence_and_empty_after_all(engine):
    long = engine.submit("a" * 60, height=2, width=4)
    short = engine.submit("b", height=12, width=12)
    widths = []
    step = engine._step

    def watch():
        step()
        widths.append((engine.cache.cache.layers[0].keys.shape[2], max(engine.cache.lengths)))

    engine._step = watch
    images_of(long), images_of(short)
    assert all(stored == longest for stored, longest in widths)
    assert engine.cache.cache is None
