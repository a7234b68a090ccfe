"""The pipelines: ours for text-to-image, and the stock ones that take our checkpoints."""

import importlib.util
import threading

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import (
    BOI_ID,
    CODEBOOK_SIZE,
    EOS_ID,
    IMAGE_TOKEN_OFFSET,
    tiny_base,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import AutoProcessor, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pipelines import PIPELINE_REGISTRY, AnyToAnyPipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

from transformers_liquid import (
    EMOJI_CHECKPOINT,
    LiquidForCausalLM,
    LiquidImageGenerationPipeline,
    LiquidModel,
    LiquidProcessor,
    liquid_lora_config,
    liquid_rows_config,
)
from transformers_liquid.pipelines.text_to_image import _Watcher


IMAGE_IDS = range(IMAGE_TOKEN_OFFSET, IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE)


@pytest.fixture(autouse=True)
def bars():
    """Other tests may have switched them off."""
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.generation_config.image_generation_config = {"guidance_scale": 1.5, "do_sample": True}
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    pipe = pipeline("text-to-image", model=checkpoint, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(left, right):
    left, right = ([np.asarray(image) for image in images] for images in (left, right))
    return len(left) == len(right) and all(np.array_equal(*pair) for pair in zip(left, right, strict=True))


# Loading


def test_the_task_loads_model_and_processor_from_a_path(pipe):
    assert type(pipe) is LiquidImageGenerationPipeline
    assert type(pipe.model) is LiquidForCausalLM and type(pipe.processor) is LiquidProcessor
    assert pipe.tokenizer is pipe.processor.tokenizer


def test_without_a_model_the_embedded_checkpoint_is_meant():
    _, task, _ = PIPELINE_REGISTRY.check_task("text-to-image")
    assert task["default"]["model"] == (EMOJI_CHECKPOINT, None)


def test_a_tokenizer_is_enough_for_models_whose_repository_has_no_processor(pipe):
    bare = LiquidImageGenerationPipeline(model=pipe.model, tokenizer=tiny_tokenizer(), device="cpu")
    assert bare.processor.to_dict() == pipe.processor.to_dict()
    assert same(bare("apple", seed=0, progress_bar=False), pipe("apple", seed=0))


def test_a_saved_pipeline_loads_again_without_remote_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("text-to-image", model=str(tmp_path), device="cpu")
    assert same(again("apple", seed=3, progress_bar=False), pipe("apple", seed=3))
    # It is for those who have not imported the package; the pipeline itself is noted nowhere as custom code.
    assert [path.name for path in tmp_path.glob("*.py")] == ["modeling_liquid_remote.py"]
    assert not any("custom_pipelines" in path.read_text(encoding="utf-8") for path in tmp_path.glob("*.json"))


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="needs a LiquidForCausalLM, got LlamaForCausalLM"):
        LiquidImageGenerationPipeline(model=tiny_base(), tokenizer=tiny_tokenizer())


def test_a_model_without_its_head_is_refused(pipe):
    with pytest.raises(ValueError, match="needs a LiquidForCausalLM, got LiquidModel"):
        LiquidImageGenerationPipeline(model=LiquidModel(pipe.model.config), processor=pipe.processor)


def test_a_missing_processor_is_named(pipe):
    with pytest.raises(ValueError, match=r"needs a LiquidProcessor .* got None"):
        LiquidImageGenerationPipeline(model=pipe.model)


def test_a_processor_that_does_not_fit_is_refused(pipe):
    other = tiny_processor(image_token_offset=IMAGE_TOKEN_OFFSET + 1)
    with pytest.raises(ValueError, match=r"does not fit the model: image_token_offset is 264 .* 263 in the model"):
        LiquidImageGenerationPipeline(model=pipe.model, processor=other)


def test_a_tokenizer_that_does_not_fit_is_refused(pipe):
    text_only = tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"])
    with pytest.raises(ValueError, match="tokenizer does not fit the model: image_token_id is 3, in the tokenizer '!'"):
        LiquidImageGenerationPipeline(model=pipe.model, tokenizer=text_only)


# Pictures


def test_one_prompt_gives_a_list_of_pil_pictures(pipe):
    images = pipe("red apple", num_images_per_prompt=4, seed=0)
    assert [type(image) for image in images] == [PIL.Image.Image] * 4
    assert {image.size for image in images} == {(8, 8)}
    assert not same(images[:1], images[1:2])


def test_a_small_model_warns_of_prompts_without_any_word_that_it_knows(checkpoint, tmp_path, caplog):
    processor = LiquidProcessor.from_pretrained(checkpoint)
    processor.known_words = ["apple", "dog"]
    processor.save_pretrained(tmp_path)
    pipe = pipeline(
        "text-to-image", checkpoint, processor=LiquidProcessor.from_pretrained(tmp_path), progress_bar=False
    )
    with caplog.at_level("WARNING"):
        pipe.preprocess(["Red APPLE!", "the dog", "<image>"], image=[PIL.Image.new("RGB", (8, 8))] * 3)
        assert caplog.text == ""
        pipe.preprocess(["an apple", "pineapple pie"])
    assert "no word of the prompt 'pineapple pie'" in caplog.text and "'an apple'" not in caplog.text


def test_pictures_come_in_the_order_of_the_prompts(pipe):
    images = pipe(["red apple", "dog"], num_images_per_prompt=2, seed=5)
    alone = [pipe(prompt, seed=5 + index)[0] for index, prompt in enumerate(["red apple", "red apple", "dog", "dog"])]
    assert same(images, alone)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_picture_is_the_same_in_any_batch(pipe, batch_size):
    prompts = ["a", "red apple", "a much longer prompt"]
    assert same(pipe(prompts, seed=1, batch_size=batch_size), pipe(prompts, seed=1))


def test_seeds_can_be_listed(pipe):
    assert same(pipe(["a", "b"], seed=[4, 9]), [pipe("a", seed=4)[0], pipe("b", seed=9)[0]])


@pytest.mark.parametrize("seed", [np.int64(4), np.array([4]), torch.tensor(4), 4.0])
def test_a_seed_is_a_number_as_the_ecosystem_has_them(pipe, seed):
    assert same(pipe("a", seed=seed), pipe("a", seed=4))


@pytest.mark.parametrize("seed", ["4", 4.5, [1, "x"]])
def test_a_seed_that_is_no_whole_number_is_refused(pipe, seed):
    with pytest.raises(ValueError, match="seed must be a whole number, or one each, got"):
        pipe(["a", "b"] if isinstance(seed, list) else "a", seed=seed)


def test_a_seed_is_the_same_as_a_generator_of_it_per_picture(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    assert same(pipe(["a", "b"], generator=tuple(generators), batch_size=1), pipe(["a", "b"], seed=4))


def test_one_generator_serves_all_batches_in_turn(pipe):
    def draw():
        return pipe(["a", "a"], generator=torch.Generator().manual_seed(0), batch_size=1)

    images = draw()
    assert same(images, draw()) and not same(images[:1], images[1:])


def test_without_a_seed_torch_decides(pipe):
    torch.manual_seed(0)
    images = pipe("a")
    torch.manual_seed(0)
    assert same(images, pipe("a"))


def test_the_settings_are_those_of_the_generation_config(pipe):
    assert same(pipe("apple", seed=2), pipe("apple", seed=2, guidance_scale=1.5))
    assert not same(pipe("apple", seed=2), pipe("apple", seed=2, guidance_scale=4.0))


def test_the_pictures_are_what_generate_and_decode_give(pipe):
    inputs = pipe.processor(text=["apple"], generation_mode="image", return_tensors="pt")
    ids = pipe.model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=2.0)
    expected = (pipe.model.decode_image_tokens(ids) + 1) / 2
    assert torch.equal(pipe("apple", do_sample=False, guidance_scale=2.0, output_type="pt"), expected)


def test_settings_given_to_the_factory_are_defaults_for_all_calls(pipe, checkpoint):
    own = pipeline("text-to-image", model=checkpoint, device="cpu", do_sample=False, batch_size=3, progress_bar=False)
    assert own._batch_size == 3
    assert same(own("apple"), pipe("apple", do_sample=False))
    assert same(own("apple", do_sample=True, seed=1), pipe("apple", seed=1))


def test_a_negative_prompt_replaces_no_text(pipe):
    plain = pipe(["a", "b"], seed=0, guidance_scale=6.0)
    negative = pipe(["a", "b"], seed=0, guidance_scale=6.0, negative_prompt="something else")
    assert not same(plain, negative)
    assert same(
        pipe(["a", "b"], seed=0, guidance_scale=6.0, negative_prompt=["x", "y"]),
        [
            pipe("a", seed=0, guidance_scale=6.0, negative_prompt="x")[0],
            pipe("b", seed=1, guidance_scale=6.0, negative_prompt="y")[0],
        ],
    )


def test_sizes_other_than_the_default_can_be_drawn(pipe):
    assert [image.size for image in pipe(["a", "b"], height=4, width=12, seed=0)] == [(12, 4)] * 2


def test_output_types_hold_the_same_picture(pipe):
    tensor, array = (pipe(["a", "b", "c"], seed=0, output_type=kind, batch_size=2) for kind in ("pt", "np"))
    assert tensor.shape == (3, 3, 8, 8) and tensor.dtype == torch.float32
    assert tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    images = pipe(["a", "b", "c"], seed=0)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), (array * 255).round())


# Many pictures


UNEVEN = ["a", "a much longer prompt", "b", "another long prompt!", "c", "red apple"]


def test_prompts_of_the_same_length_are_drawn_side_by_side_without_pads(pipe):
    batches = pipe.preprocess(UNEVEN, batch_size=2, seed=0)
    assert [batch["indices"] for batch in batches] == [[1, 3], [5, 0], [2, 4]]
    assert [int((batch["attention_mask"] == 0).sum()) for batch in batches] == [0, len("red apple") - 1, 0]


@pytest.mark.parametrize("negative_prompt", [None, "blue", [*"xyzuv", "a very long negative prompt"]])
def test_the_grouped_inputs_are_those_of_each_prompt_alone(pipe, negative_prompt):
    batches = pipe.preprocess(UNEVEN, negative_prompt, num_images_per_prompt=2, batch_size=5, seed=7)
    assert sorted(index for batch in batches for index in batch["indices"]) == list(range(12))
    for batch in batches:
        for row, index in enumerate(batch["indices"]):
            negative = negative_prompt[index // 2] if isinstance(negative_prompt, list) else negative_prompt
            alone = pipe.processor(
                text=UNEVEN[index // 2], negative_prompt=negative, generation_mode="image", return_tensors="pt"
            )
            for ids, mask in (
                ("input_ids", "attention_mask"),
                ("negative_prompt_ids", "negative_prompt_attention_mask"),
            ):
                kept = batch[mask][row].bool()
                assert batch[ids][row][kept].tolist() == alone[ids][0].tolist()
                assert kept.tolist() == sorted(kept.tolist())
            assert batch["generator"][row].initial_seed() == 7 + index


def test_grouping_changes_no_picture_and_no_order(pipe):
    alone = [pipe(prompt, seed=3 + index)[0] for index, prompt in enumerate(UNEVEN)]
    assert same(pipe(UNEVEN, seed=3, batch_size=2), alone)


def test_one_generator_for_all_pictures_keeps_their_order(pipe):
    batches = pipe.preprocess(UNEVEN, batch_size=4, generator=torch.Generator())
    assert [batch["indices"] for batch in batches] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_the_stream_is_the_call_in_another_order(pipe, output_type):
    streamed = dict(pipe.stream(UNEVEN, seed=1, batch_size=4, output_type=output_type))
    assert list(streamed) == [1, 3, 5, 0, 2, 4]
    called = pipe(UNEVEN, seed=1, batch_size=4, output_type=output_type)
    assert same([streamed[index] for index in range(6)], called)


def test_a_batch_is_handed_out_before_the_next_one_is_drawn(pipe):
    steps = []
    stream = pipe.stream(["a", "b", "c"], seed=0, batch_size=2, callback_on_step_end=lambda *args: steps.append(args))
    assert not steps
    next(stream), next(stream)
    assert len(steps) == 16
    next(stream)
    assert len(steps) == 32 and next(stream, None) is None


def test_the_stream_checks_all_prompts_when_it_is_asked_for(pipe):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pipe.stream(["a", ""])


def test_a_streamer_for_several_batches_is_refused(pipe):
    with pytest.raises(ValueError, match="A streamer follows one batch, but these are 2: pass a batch_size"):
        pipe.stream(["a", "b"], batch_size=1, streamer=object())


# Progress


def test_the_callback_sees_every_code_of_every_batch(pipe):
    calls = []

    def on_step_end(pipe_, step, timestep, callback_kwargs):
        calls.append((pipe_, step, timestep, callback_kwargs["image_tokens"].clone()))

    pipe(["a", "a longer prompt", "b"], seed=0, batch_size=2, callback_on_step_end=on_step_end)
    assert all(call[0] is pipe for call in calls)
    assert [call[1] for call in calls] == [*range(16), *range(16)]
    assert [call[2] for call in calls] == [*reversed(range(16))] * 2
    assert [tuple(call[3].shape) for call in calls] == [(rows, n + 1) for rows in (2, 1) for n in range(16)]
    assert all(token in IMAGE_IDS for call in calls for token in call[3].flatten().tolist())


def test_steps_that_finish_several_codes_count_them_all(pipe):
    calls, bar = [], logging.tqdm(total=2 * 16, disable=False)
    watcher = _Watcher(pipe, bar, 16, lambda _, *args: calls.append(args))
    watcher.put(torch.tensor([[0, 1, 30, BOI_ID], [1, 30, 31, BOI_ID]]))
    codes = torch.arange(32).view(2, 16) % CODEBOOK_SIZE
    for before, number in ((0, 3), (3, 4), (4, 9), (9, 16)):
        watcher.put_codes(codes[:, before:number])
        assert bar.n == 2 * number
    assert [call[:2] for call in calls] == [(2, 13), (3, 12), (8, 7), (15, 0)]
    assert all(torch.equal(call[2]["image_tokens"], codes[:, : call[0] + 1] + IMAGE_TOKEN_OFFSET) for call in calls)
    bar.close()


def test_the_callback_sees_what_each_speculative_step_added(pipe):
    calls = []

    def on_step_end(pipe_, step, timestep, callback_kwargs):
        calls.append((step, timestep, callback_kwargs["image_tokens"].clone()))

    pipe(["a", "b"], seed=0, do_sample=False, speculative=8, callback_on_step_end=on_step_end)
    steps = [step for step, *_ in calls]
    assert len(steps) < 16 and steps == sorted(set(steps)) and steps[-1] == 15
    assert [timestep for _, timestep, _ in calls] == [15 - step for step in steps]
    assert all(torch.equal(ids, calls[-1][2][:, : step + 1]) for step, _, ids in calls)


def test_an_exception_of_the_callback_ends_the_call(pipe):
    def stop(pipe_, step, timestep, callback_kwargs):
        if step == 3:
            raise InterruptedError(step)

    with pytest.raises(InterruptedError, match="3"):
        pipe("a", callback_on_step_end=stop)


def test_a_bar_counts_codes_and_can_be_switched_off(checkpoint, capsys):
    pipe = pipeline("text-to-image", model=checkpoint, device="cpu")
    capsys.readouterr()
    pipe(["a", "b", "c"], seed=0, batch_size=2)
    shown = capsys.readouterr().err
    assert "48/48" in shown and "code/s" in shown
    pipe("a", seed=0, progress_bar=False)
    pipe.set_progress_bar_config(disable=True)
    pipe("a", seed=0)
    pipe.set_progress_bar_config()
    logging.disable_progress_bar()
    pipe("a", seed=0)
    assert capsys.readouterr().err == ""


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": ["a", "  "]}, "prompt 1 is empty"),
        ({"prompt": []}, "prompt must be a string or a list of strings, got \\[\\]"),
        ({"prompt": None}, "prompt must be a string or a list of strings, got None"),
        ({"prompt": ["a", 3]}, "prompt must be a string or a list of strings"),
        ({"prompt": "a<image>"}, "reserved for images"),
        ({"prompt": "a", "negative_prompt": " "}, "negative_prompt 0 is empty"),
        ({"prompt": "a", "negative_prompt": ["x", "y"]}, "2 negative prompts for 1 prompts"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be .* at least 1, got 0"),
        ({"prompt": "a", "batch_size": 0}, "batch_size must be .* at least 1, got 0"),
        ({"prompt": "a", "height": 7}, "positive multiples of 2 pixels .* height=7, width=8"),
        ({"prompt": "a", "width": 0}, "positive multiples of 2 pixels .* height=8, width=0"),
        ({"prompt": "a", "height": 800}, "together more than the model's 128 positions"),
        ({"prompt": ["a", "word " * 30], "batch_size": 1}, "more than the model's 128 positions. Shorten the prompt"),
        ({"prompt": "a", "guidance_scale": 0.5}, "guidance_scale must be a finite number >= 1 .* got 0.5"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a finite number >= 1 .* got nan"),
        ({"prompt": "a", "guidance_min_p": 2.0}, r"guidance_min_p must be in \(0, 1\], got 2.0"),
        ({"prompt": "a", "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type must be .* got 'jpg'"),
        ({"prompt": "a", "seed": 0, "generator": torch.Generator()}, "seed or generator, not both"),
        ({"prompt": ["a", "b"], "seed": [1]}, "Got 1 seeds for 2 pictures"),
        ({"prompt": ["a", "b"], "generator": [torch.Generator()]}, "Got 1 generators for 2 pictures"),
        ({"prompt": "a", "num_return_sequences": 2}, "use num_images_per_prompt"),
        ({"prompt": "a", "return_dict_in_generate": True}, "call model.generate"),
        ({"prompt": "a", "num_beams": 3}, "num_beams=3 has no meaning for images"),
        ({"prompt": "a", "guidence_scale": 3}, "guidence_scale"),
        ({"prompt": "a", "negative_prompt": "b", "guidance_scale": 1}, "A negative prompt acts through guidance"),
        ({"prompt": ["a", "b"], "negative_prompt": ["", "b"], "guidance_scale": 1}, "acts through guidance"),
        ({"prompt": "a", "max_time": 0.1}, "draws whole pictures: for max_time and stopping_criteria"),
        ({"prompt": "a", "stopping_criteria": [lambda ids, scores: True]}, "for max_time and stopping_criteria"),
        ({"prompt": "a", "generator": 3}, "generator must be a torch.Generator"),
        ({"prompt": "a", "num_inference_steps": 50}, "num_inference_steps"),
        ({"prompt": "a", "eta": 0.5}, "eta"),
    ],
)
def test_bad_input_is_named_before_anything_is_drawn(pipe, arguments, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        pipe(**arguments, callback_on_step_end=lambda *args: steps.append(args))
    assert not steps


# The stock pipelines


def test_text_generation_takes_the_checkpoint(checkpoint):
    pipe = pipeline("text-generation", model=checkpoint, device="cpu")
    assert type(pipe.model) is LiquidForCausalLM
    text = pipe("red apple", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    inputs = pipe.tokenizer("red apple", return_tensors="pt")
    ids = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert text == pipe.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert not any(token in IMAGE_IDS for token in ids[0].tolist())


def test_image_text_to_text_answers_about_a_picture(checkpoint):
    pipe = pipeline("image-text-to-text", model=checkpoint, device="cpu")
    picture = PIL.Image.new("RGB", (20, 10), "red")
    [answer] = pipe(picture, text="<image>What is this?", max_new_tokens=8, do_sample=False, return_full_text=False)
    inputs = pipe.processor(text="<image>What is this?", images=picture, return_tensors="pt")
    ids = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    whole, prompt = (pipe.processor.decode(row, skip_special_tokens=True) for row in (ids[0], inputs["input_ids"][0]))
    assert answer["generated_text"] == whole.removeprefix(prompt)


def test_image_text_to_text_takes_conversations(checkpoint):
    pipe = pipeline("image-text-to-text", model=checkpoint, device="cpu")
    content = [{"type": "image", "image": PIL.Image.new("RGB", (8, 8))}, {"type": "text", "text": "What is this?"}]
    [answer] = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4, do_sample=False)
    assert [message["role"] for message in answer["generated_text"]] == ["user", "assistant"]


@pytest.fixture
def any_to_any(checkpoint, monkeypatch):
    """The stock pipeline, which refuses to start without torchvision although it never uses it here."""
    if importlib.util.find_spec("torchvision") is None:
        monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args: None)
    return pipeline("any-to-any", model=checkpoint, device="cpu")


def test_any_to_any_draws_through_the_three_hooks(any_to_any, pipe):
    assert type(any_to_any) is AnyToAnyPipeline and type(any_to_any.model) is LiquidForCausalLM
    prompt = pipe.processor.decode(pipe.processor.image_prompt_ids("apple"))
    [drawn] = any_to_any(
        prompt.removeprefix("<s>").removesuffix("<boi>"),
        generation_mode="image",
        processor_kwargs={"generation_mode": "image"},
        generate_kwargs={"do_sample": False},
    )
    assert drawn["generated_image"].size == (8, 8)


def test_any_to_any_answers_about_a_picture(any_to_any):
    picture = PIL.Image.new("RGB", (8, 8), "red")
    [answer] = any_to_any("<image>What is this?", images=picture, max_new_tokens=8, return_full_text=False)
    assert isinstance(answer["generated_text"], str)


@pytest.mark.parametrize("task", ["text-generation", "image-text-to-text"])
def test_stock_pipelines_do_not_call_the_model_unsupported(checkpoint, task, caplog):
    logging.set_verbosity_warning()
    pipeline(task, model=checkpoint, device="cpu")
    assert "not supported" not in caplog.text


def test_the_processor_is_found_by_its_auto_class(checkpoint):
    assert type(AutoProcessor.from_pretrained(checkpoint)) is LiquidProcessor


# What a caller says


def test_a_negative_prompt_acts_through_guidance_of_pictures_too(pipe):
    picture = PIL.Image.new("RGB", (8, 8), "red")
    settings = {"image": picture, "seed": 0, "guidance_scale": 1, "image_guidance_scale": 2.0}
    assert len(pipe("a", negative_prompt=np.array(["b"]), **settings)) == 1


def test_an_empty_negative_prompt_is_none(pipe):
    plain = pipe(["a", "b"], seed=0, guidance_scale=6.0)
    assert same(pipe(["a", "b"], seed=0, guidance_scale=6.0, negative_prompt=""), plain)
    one = pipe(["a", "b"], seed=0, guidance_scale=6.0, negative_prompt=["", "x"])
    assert same(one[:1], plain[:1]) and not same(one[1:], plain[1:])
    assert same(pipe("a", seed=0, guidance_scale=1, negative_prompt=""), pipe("a", seed=0, guidance_scale=1))


@pytest.mark.parametrize("stored", [{"guidance_min_p": 0.99}, {"top_k": 1}])
def test_a_stored_filter_can_be_turned_off(stored):
    ((name, _),) = stored.items()
    pipe = LiquidImageGenerationPipeline(tiny_model(), tiny_processor())
    pipe.model.generation_config.image_generation_config = {"guidance_scale": 2.0, "top_k": None, "top_p": None}
    free = pipe("a", seed=0, output_type="pt", progress_bar=False)
    pipe.model.generation_config.image_generation_config |= stored
    assert not torch.equal(pipe("a", seed=0, output_type="pt", progress_bar=False), free)
    assert torch.equal(pipe("a", seed=0, output_type="pt", progress_bar=False, **{name: None}), free)


def test_a_stored_limit_of_time_is_refused():
    pipe = LiquidImageGenerationPipeline(tiny_model(), tiny_processor())
    pipe.model.generation_config.image_generation_config = {"max_time": 5.0}
    with pytest.raises(ValueError, match="draws whole pictures"):
        pipe("a", seed=0, progress_bar=False)


def test_numbers_of_numpy_are_numbers(pipe):
    given = pipe("a", seed=np.int64(3), num_images_per_prompt=np.int32(2), batch_size=np.int64(2))
    assert same(given, pipe("a", seed=3, num_images_per_prompt=2))
    assert same(pipe(["a", "b"], seed=np.array([5, 6])), pipe(["a", "b"], seed=[5, 6]))


def test_threads_share_a_pipeline(pipe):
    prompts = {seed: ["a", "a red apple", "something longer"][: 1 + seed % 3] for seed in range(6)}
    expected = {seed: pipe(prompts[seed], seed=seed) for seed in prompts}
    drawn = {}
    threads = [
        threading.Thread(target=lambda seed=seed: drawn.update({seed: pipe(prompts[seed], seed=seed)}))
        for seed in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(drawn[seed], expected[seed]) for seed in prompts)


# Adapters, places


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """Makes a folder with an adapter of a model, by default of the checkpoint, with weights as after training."""
    from peft import get_peft_model

    def save(name="adapter", model=None, config=liquid_lora_config, seed=0):
        model = LiquidForCausalLM.from_pretrained(checkpoint) if model is None else model
        adapted = get_peft_model(model, config(model))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def own_pipe(checkpoint):
    return LiquidImageGenerationPipeline(
        model=LiquidForCausalLM.from_pretrained(checkpoint), processor=LiquidProcessor.from_pretrained(checkpoint)
    )


@pytest.mark.parametrize("config", [liquid_lora_config, liquid_rows_config])
def test_adapters_are_put_on_taken_off_and_fused(own_pipe, adapter, config, tmp_path):
    pipe, bare = own_pipe, own_pipe("red apple", seed=0)
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    path = adapter(config=config)
    pipe.load_lora_weights(path)
    drawn = pipe("red apple", seed=0)
    assert not same(drawn, bare)
    assert same(drawn, pipeline("text-to-image", model=path, device="cpu")("red apple", seed=0))
    pipe.unload_lora_weights()
    assert same(pipe("red apple", seed=0), bare)
    after = pipe.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # as in diffusers' recipes; nothing is left to unload
    assert list(pipe.model.state_dict()) == list(before)
    assert same(pipe("red apple", seed=0), drawn)
    pipe.save_pretrained(tmp_path / "fused")
    assert same(pipeline("text-to-image", model=str(tmp_path / "fused"), device="cpu")("red apple", seed=0), drawn)
    with pytest.raises(ValueError, match="nothing to fuse"):
        pipe.fuse_lora()


def test_an_adapter_that_the_repository_names_is_fused_too(adapter):
    pipe = pipeline("text-to-image", model=adapter(), device="cpu")
    drawn = pipe("red apple", seed=0)
    pipe.fuse_lora()
    assert not any("lora" in name for name, _ in pipe.model.named_modules())
    assert same(pipe("red apple", seed=0), drawn)


def test_of_several_adapters_the_active_ones_draw(own_pipe, adapter):
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)  # transformers 5.24 asks for one that is not out yet
    drawn = []
    for name, seed in (("one", 1), ("two", 2)):
        own_pipe.load_lora_weights(adapter(name, seed=seed), adapter_name=name)
        own_pipe.model.set_adapter(name)
        drawn.append(own_pipe("red apple", seed=0))
    assert not same(*drawn)
    own_pipe.model.set_adapter("one")
    assert same(own_pipe("red apple", seed=0), drawn[0])


@pytest.mark.parametrize("wrong", ["gpt2", "missing", "nothing"])
def test_a_model_stays_as_it_was_where_an_adapter_does_not_fit(own_pipe, adapter, wrong, tmp_path):
    path = adapter(model=tiny_model("gpt2") if wrong == "gpt2" else None)
    if wrong == "missing":
        weights = load_file(f"{path}/adapter_model.safetensors")
        weights.pop(next(iter(weights)))
        save_file(weights, f"{path}/adapter_model.safetensors")
    path = str(tmp_path / "nowhere") if wrong == "nothing" else path
    names, drawn = list(own_pipe.model.state_dict()), own_pipe("red apple", seed=0)
    with pytest.raises((ValueError, OSError), match=r"The adapter .* does not fit|nowhere"):
        own_pipe.load_lora_weights(path)
    assert list(own_pipe.model.state_dict()) == names
    assert same(own_pipe("red apple", seed=0), drawn)
    own_pipe.load_lora_weights(adapter("right"))


def test_to_moves_the_model_and_returns_the_pipeline(own_pipe):
    assert own_pipe.to(torch.bfloat16) is own_pipe
    assert own_pipe.dtype == torch.bfloat16 and own_pipe.model.model.vq_model.dtype == torch.float32
    assert own_pipe.to("cpu", torch.float32).model.dtype == torch.float32
    own_pipe.to("meta")
    assert own_pipe.device == torch.device("meta")


# What comes one after another, records, and how pictures were drawn


class Texts(torch.utils.data.Dataset):
    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"caption": self.texts[index]}


def test_prompts_that_come_one_after_another_are_drawn_by_batches(pipe):
    prompts, read = ["red apple", "dog", "a cat", "b", "c"], []

    def generate():
        for prompt in prompts:
            read.append(prompt)
            yield prompt

    expected = pipe(prompts, seed=3)
    pictures = pipe(generate(), seed=3, batch_size=2)
    assert not read
    first = next(pictures)
    assert len(read) == 2
    assert same([first, *pictures], expected)
    assert same(list(pipe(KeyDataset(Texts(prompts), "caption"), seed=3)), expected)
    assert same(pipe(Dataset.from_dict({"text": prompts})["text"], seed=3), expected)
    assert same(list(pipe(map(str, prompts), seed=3, num_images_per_prompt=1, output_type="pil")), expected)
    twice = pipe(prompts, seed=3, num_images_per_prompt=2)
    assert same(list(pipe(iter(prompts), seed=3, num_images_per_prompt=2, batch_size=2)), twice)
    with pytest.raises(ValueError, match="take one negative_prompt for all"):
        pipe(generate(), negative_prompt=["a", "b"])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        next(pipe(iter([""])))


def test_records_are_the_arguments_of_each_picture(pipe):
    records = [
        {"prompt": "red apple", "seed": 5, "negative_prompt": "dog"},
        {"prompt": "dog", "seed": 2, "negative_prompt": ""},
    ]
    expected = pipe(["red apple", "dog"], seed=[5, 2], negative_prompt=["dog", ""])
    assert same(pipe(records), expected)
    assert same(pipe(Dataset.from_list(records)), expected)
    assert same(list(pipe(iter(records), batch_size=1)), expected)
    assert same([image for _, image in sorted(pipe.stream(records))], expected)
    with pytest.raises(ValueError, match="same fields"):
        pipe([{"prompt": "a"}, {"prompt": "a", "seed": 1}])
    with pytest.raises(TypeError, match="seed"):
        pipe(records, seed=1)


@pytest.mark.parametrize(
    "settings", [{}, {"seed": 7, "top_k": None, "guidance_min_p": 0.1}, {"do_sample": False, "height": 4, "width": 12}]
)
def test_what_was_drawn_can_be_drawn_again_from_what_is_told(pipe, settings):
    output = pipe(["red apple", "dog"], num_images_per_prompt=2, return_dict=True, negative_prompt="cat", **settings)
    assert isinstance(output, diffusers.ImagePipelineOutput)
    assert len(output.images) == len(output.seeds) == len(output.settings) == 4
    assert [one["prompt"] for one in output["settings"]] == ["red apple"] * 2 + ["dog"] * 2
    assert output.seeds == [output.seeds[0] + index for index in range(4)]
    if "seed" in settings:
        assert output.seeds[0] == 7
    for image, one in zip(output.images, output.settings, strict=True):
        assert same(pipe(**one), [image])
    one_by_one = list(pipe(iter(["red apple", "dog"]), return_dict=True, seed=output.seeds[0], batch_size=1))
    assert [one.seeds for one in one_by_one] == [[output.seeds[0]], [output.seeds[1]]]


def test_arrays_are_told_about_too_and_seeds_of_generators_are_unknown(pipe):
    output = pipe(["a", "b"], return_dict=True, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert output.images.shape == (2, 3, 8, 8) and output.seeds == [None, None]
