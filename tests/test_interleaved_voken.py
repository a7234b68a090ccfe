"""Writing and drawing by turns with vokens: whole runs, the same reply whatever is beside it, one repository for all doors."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import SPECIAL_TOKENS, tiny_base, tiny_tokenizer
from tiny_vokens import (
    CAUSAL_BASES,
    FAMILIES,
    VISION_BASES,
    VOKENS,
    picture_inputs,
    tiny_base_processor,
    tiny_image_pipeline,
    tiny_voken_base,
    tiny_voken_model,
    tiny_voken_pipeline,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    pipeline,
)

from transformers_liquid import (
    InterleavedVokenPipeline,
    VokenForConditionalGeneration,
    VokenImageDecoder,
    VokenProcessor,
    add_vokens,
)
from transformers_liquid.models.voken.generation_voken import VokenRunLogitsProcessor, finished, segments


RED, BLUE = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
FAST = {"num_inference_steps": 2, "max_new_tokens": 24}


def like(one, other, atol=0.0):
    """Whether replies have the same texts, and pictures as near as that (in 0 ... 255)."""
    assert [type(part) for part in one] == [type(part) for part in other]
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, str):
            assert mine == theirs
        else:
            assert np.abs(np.asarray(mine, float) - np.asarray(theirs, float)).max() <= atol


def runs_of(ids):
    """Positions of first vokens, after a check that every one is followed by the others, and none stands elsewhere."""
    at = [index for index, one in enumerate(ids) if one == VOKENS[0]]
    within = [index + offset for index in at for offset in range(8)]
    whole = [index for index in within if index < len(ids)]
    assert [ids[index] for index in whole] == (VOKENS * len(at))[: len(whole)]
    assert [index for index, one in enumerate(ids) if one in VOKENS] == whole
    return at


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.9, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "penalized": {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "min_new_tokens": 25},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", [*CAUSAL_BASES, *VISION_BASES])
def test_every_first_voken_is_followed_by_the_others_and_they_come_nowhere_else(model_type, way):
    model = tiny_voken_model(model_type)
    head = model.get_output_embeddings()
    head.weight.data[VOKENS[0]] = head.weight.data[VOKENS[3]] = head.weight.data.mean(0) * 3  # so that some come
    pictures, tensors = ([], {}) if model_type in CAUSAL_BASES else picture_inputs(model_type, 2)
    ids = torch.tensor([[0, 0, 1, *pictures, 40], [1, *pictures, 41, 42, 43]])
    mask = (ids != 0).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=30, num_images=1, **tensors, **WAYS[way])
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for row in out[:, ids.shape[1] :].tolist():
        assert runs_of(row)


@pytest.mark.parametrize("model_type", [*CAUSAL_BASES, *VISION_BASES])
def test_states_of_one_forward_are_those_of_decoding_step_by_step(model_type):
    """What the head read while a batch with left pads was decoded with a cache."""
    model, seen = tiny_voken_model(model_type), []
    pictures, tensors = ([], {}) if model_type in CAUSAL_BASES else picture_inputs(model_type, 2)
    ids = torch.tensor([[0, 0, 1, *pictures, 40], [1, *pictures, 41, 42, 43]])
    mask = (ids != 0).long()
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1:]))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_images=1, **tensors)
    hook.remove()
    assert out[:, ids.shape[1] :].tolist() == [VOKENS] * 2
    condition, rows = model.conditions(out, ids.shape[1], attention_mask=mask, **tensors)
    assert rows.tolist() == [0, 1]
    expected = model.feature_mapper(torch.cat(seen, 1)).embeds
    torch.testing.assert_close(condition.embeds, expected, atol=1e-5, rtol=0)


def test_a_picture_is_put_in_place_of_the_end_and_where_there_is_just_room():
    scores = torch.zeros(4, 280)
    scores[:, 2] = 5.0
    processor = VokenRunLogitsProcessor(VOKENS, num_images=2, eos_token_ids=[2], prompt_length=1, max_new_tokens=20)
    begun = torch.tensor([[1, 40, 41, 42], [1, 40, 41, VOKENS[0]], [1, VOKENS[0], VOKENS[0], 40], [1, 40, 41, 43]])
    best = processor(begun, scores).argmax(1).tolist()
    assert best == [VOKENS[0], VOKENS[1], 2, VOKENS[0]]
    late = torch.tensor([[1, 40, 41, 42, 43]])  # 16 tokens left: two runs
    allowed = processor(late, torch.zeros(1, 280)).isfinite()[0].nonzero().flatten().tolist()
    assert allowed == [VOKENS[0]]
    assert processor(late[:, :4], torch.zeros(1, 280)).isfinite().sum() == 280 - 7 - 1


def test_a_cut_off_run_is_completed_and_a_reply_is_cut_into_texts_and_pictures():
    assert finished([40, *VOKENS[:3]], VOKENS, [2]) == [40, *VOKENS]
    assert finished([40, 2, 0, 0], VOKENS, [2, 0]) == [40] and finished([], VOKENS, [2]) == []
    assert [*segments([40, *VOKENS, *VOKENS, 41, 42], VOKENS)] == [[40], None, None, [41, 42]]


@pytest.mark.parametrize("model_type", ["llama", "llava", "blip-2"])
def test_a_reply_is_the_same_alone_and_in_a_batch_with_a_seed_for_each_picture(model_type):
    pipe = tiny_voken_pipeline(model_type)
    prompts = ["a cat", "a much longer prompt than that"]
    images = None if model_type == "llama" else [[RED], [BLUE]]
    settings = {"num_images": 2, "output_type": "np", **FAST}
    both = pipe(prompts, images, seed=5, **settings)
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, images and images[index], seed=5 + index, **settings)
        like(alone.segments[0], both.segments[index], 1e-4)
    chunks = pipe(prompts, images, seed=5, batch_size=1, **settings)
    for one, other in zip(chunks.segments, both.segments, strict=True):
        like(one, other, 1e-4)
    pictures = [part for part in both.segments[0] if not isinstance(part, str)]
    assert len(pictures) >= 2 and np.abs(pictures[0] - pictures[1]).max() > 0.01


def test_pictures_come_from_the_states_by_diffusers_and_from_their_seeds():
    """Against a plain loop: greedy text, states of a plain forward, the mapper, diffusers' own pipeline."""
    pipe = tiny_voken_pipeline("llava")
    out = pipe("a cat", [RED], num_images=2, seed=7, output_type="np", guidance_scale=3.0, **FAST)
    inputs = pipe.processor(text="<image>a cat", images=RED)
    ids = pipe.model.generate(**inputs, max_new_tokens=24, num_images=2)
    (reply,) = ids[:, inputs["input_ids"].shape[1] :].tolist()
    assert out.messages[0]["role"] == "assistant"
    with torch.no_grad():
        plain = pipe.model.text_model(
            input_ids=torch.tensor([[*inputs["input_ids"][0].tolist(), *finished(reply, VOKENS, [2])]]),
            pixel_values=inputs["pixel_values"],
            output_hidden_states=True,
        ).hidden_states[-1][0]
        begin = inputs["input_ids"].shape[1] - 1
        drawn = [part for part in out.segments[0] if not isinstance(part, str)]
        for k, (at, picture) in enumerate(zip(runs_of(reply), drawn, strict=True)):
            embeds = pipe.model.feature_mapper(plain[None, begin + at : begin + at + 8]).embeds
            expected = tiny_image_pipeline("sd")(
                prompt_embeds=embeds,
                negative_prompt_embeds=pipe.model.feature_mapper(torch.zeros(1, 8, 32)).embeds,
                generator=torch.Generator().manual_seed((7 + k * 0x9E3779B9) % 2**32),
                guidance_scale=3.0,
                num_inference_steps=2,
                output_type="np",
            ).images[0]
            np.testing.assert_allclose(picture, expected, atol=1e-5)


class Recording(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, *args, **kwargs):
        Recording.seen.append((model_output, timestep, sample))
        return super().step(model_output, timestep, sample, *args, **kwargs)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guidance_leads_away_from_the_unconditional_condition(scale):
    """The scheduler is given u + s (c - u); without guidance the mapper of zeros has no influence."""
    pipe = tiny_voken_pipeline()
    pipe.scheduler = Recording.from_config(pipe.scheduler.config)
    Recording.seen = []
    pipe("a cat", num_images=1, seed=1, guidance_scale=scale, max_new_tokens=8, num_inference_steps=2)
    inputs = pipe.processor(text="a cat")
    ids = torch.tensor([[*inputs["input_ids"][0].tolist(), *VOKENS]])
    condition, _ = pipe.model.conditions(ids)
    for output, timestep, sample in Recording.seen:
        with torch.no_grad():
            c = pipe.unet(sample, timestep, condition.embeds).sample
            u = pipe.unet(sample, timestep, pipe.model.unconditional().embeds).sample
        torch.testing.assert_close(output, u + scale * (c - u) if scale > 1 else c, atol=1e-4, rtol=1e-4)
    assert len(Recording.seen) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repository_gives_the_same_weights_and_pictures_whatever_the_family(family, tmp_path):
    pipe = tiny_voken_pipeline(family=family)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is InterleavedVokenPipeline
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = part.state_dict(), again.components[name].state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    again.set_progress_bar_config(disable=True)
    settings = {"num_images": 1, "seed": 3, "output_type": "np", "num_inference_steps": 2, "max_new_tokens": 10}
    like(pipe("a cat", **settings).segments[0], again("a cat", **settings).segments[0], 1e-5)


def test_all_doors_of_transformers_open_the_repository_of_a_pipeline(tmp_path):
    pipe = tiny_voken_pipeline("llava")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (tmp_path / "model/config.json").read_text()
    )
    assert AutoConfig.from_pretrained(tmp_path).model_type == "voken"
    for door in (AutoModel, AutoModelForMultimodalLM, AutoModelForImageTextToText, VokenForConditionalGeneration):
        model = door.from_pretrained(tmp_path)
        assert all(map(torch.equal, model.state_dict().values(), pipe.model.state_dict().values()))
    for door in (AutoProcessor, VokenProcessor):
        processor = door.from_pretrained(tmp_path)
        assert type(processor.base) is type(pipe.processor.base) and processor.voken_token_ids == VOKENS
    inputs = processor(text="<image>a cat", images=RED)
    settings = {"generation_mode": "image", "num_inference_steps": 2, "generator": torch.Generator().manual_seed(1)}
    drawn = model.generate(**inputs, **settings)  # by the diffusion model of the repository
    settings["generator"] = torch.Generator().manual_seed(1)
    assert drawn.shape == (1, 3, 16, 16) and drawn.min() >= 0 and drawn.max() <= 1
    torch.testing.assert_close(drawn, pipe.model.generate(**inputs, **settings), atol=1e-5, rtol=0)
    (picture,) = processor.post_process_multimodal_output(drawn, generation_mode="image")
    assert picture.size == (16, 16)
    ids = model.generate(**inputs, max_new_tokens=10, num_images=1)
    assert "[IMG" not in processor.post_process_multimodal_output(ids)[0]


def test_half_precision_is_for_all_but_the_mapper(tmp_path):
    tiny_voken_pipeline().save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert pipe.model.text_model.dtype == pipe.unet.dtype == torch.bfloat16
    assert {one.dtype for one in pipe.model.feature_mapper.parameters()} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    assert any(not isinstance(part, str) for part in pipe("a cat", num_images=1, **FAST).segments[0])
    ids = torch.tensor([[1, 40, *VOKENS]])
    pipe.model(ids, labels=ids, target_pixel_values=torch.zeros(1, 3, 16, 16), captions=["a"]).loss.backward()
    assert pipe.model.feature_mapper.query.grad.isfinite().all()


def test_a_repository_of_the_hub_is_opened_by_its_name(tmp_path):
    """From the cache, where it lies as if it had been downloaded."""
    snapshot = tmp_path / "models--me--vokens" / "snapshots" / ("0" * 40)
    tiny_voken_pipeline("llava").save_pretrained(snapshot)
    (tmp_path / "models--me--vokens" / "refs").mkdir()
    (tmp_path / "models--me--vokens" / "refs" / "main").write_text("0" * 40)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert type(DiffusionPipeline.from_pretrained("me/vokens", **where)) is InterleavedVokenPipeline
    assert AutoModelForMultimodalLM.from_pretrained("me/vokens", **where).config.image_decoder == "me/vokens"
    assert AutoProcessor.from_pretrained("me/vokens", **where).voken_token_ids == VOKENS


def test_what_draws_is_of_the_revision_that_was_asked_for(tmp_path):
    pipe, repository = tiny_voken_pipeline(), tmp_path / "models--me--vokens"
    (repository / "refs").mkdir(parents=True)
    weights = []
    for number, branch in enumerate(("main", "old")):
        pipe.unet.conv_in.bias.data.fill_(number)
        weights.append(pipe.unet.conv_in.bias.clone())
        pipe.save_pretrained(repository / "snapshots" / (str(number) * 40))
        (repository / "refs" / branch).write_text(str(number) * 40)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    for revision, expected in zip((None, "old"), weights, strict=True):
        model = AutoModelForMultimodalLM.from_pretrained("me/vokens", revision=revision, **where)
        assert torch.equal(model.image_decoder.denoiser.conv_in.bias, expected)
        model.save_pretrained(tmp_path / "alone")  # which names what draws, and of which revision
        again = VokenForConditionalGeneration.from_pretrained(tmp_path / "alone", **where)
        assert torch.equal(again.image_decoder.denoiser.conv_in.bias, expected)
    # Of another repository, the model's revision is none.
    (repository / "snapshots" / ("2" * 40)).mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "alone" / name).rename(repository / "snapshots" / ("2" * 40) / name)
    (repository / "refs" / "model").write_text("2" * 40)
    model = VokenForConditionalGeneration.from_pretrained("me/vokens", revision="model", **where)
    assert torch.equal(model.image_decoder.denoiser.conv_in.bias, weights[1])


def test_the_folder_of_the_bases_processor_may_have_its_former_name(tmp_path):
    tiny_voken_pipeline("llava").save_pretrained(tmp_path)
    (tmp_path / "processor" / "base.processor").rename(tmp_path / "processor" / "base")
    assert VokenProcessor.from_pretrained(tmp_path).image_token == "<image>"


def test_a_variant_is_loaded_whole_by_all_doors(tmp_path):
    pipe = tiny_voken_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    for door in (DiffusionPipeline, InterleavedVokenPipeline):
        again = door.from_pretrained(tmp_path, variant="fp16")
        assert all(map(torch.equal, again.model.state_dict().values(), pipe.model.state_dict().values()))
        with pytest.raises(ValueError, match="variant=bf16"):
            door.from_pretrained(tmp_path, variant="bf16")
        with pytest.raises(OSError, match="no file named"):
            door.from_pretrained(tmp_path)
    model = VokenForConditionalGeneration.from_pretrained(tmp_path, variant="fp16")
    theirs = model.image_decoder.denoiser.state_dict()
    assert all(torch.equal(one, theirs[name]) for name, one in pipe.unet.state_dict().items())


def test_the_pipeline_any_to_any_writes_and_draws(tmp_path, monkeypatch):
    import transformers.pipelines.any_to_any as any_to_any

    monkeypatch.setattr(any_to_any, "requires_backends", lambda *_: None)  # torchvision, which is not used
    tiny_voken_pipeline("llava").save_pretrained(tmp_path)
    pipe = pipeline("any-to-any", model=str(tmp_path))
    messages = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "a cat"}]}]
    settings = {"generation_mode": "image", "generate_kwargs": {"num_inference_steps": 2}}
    assert pipe(text=messages, **settings)[0]["generated_image"].size == (16, 16)
    assert pipe(text=messages, max_new_tokens=4)[0]["generated_text"][-1]["role"] == "assistant"


def test_a_saved_repository_has_a_card_which_is_also_pushed(tmp_path, monkeypatch):
    pipe = tiny_voken_pipeline()
    pipe.save_pretrained(tmp_path / "my-vokens")
    card = (tmp_path / "my-vokens" / "README.md").read_text()
    assert "library_name: transformers_liquid" in card and "`llama`" in card and "6 vectors of 8" in card
    (tmp_path / "my-vokens" / "README.md").write_text("by hand")
    pipe.save_pretrained(tmp_path / "my-vokens")
    assert (tmp_path / "my-vokens" / "README.md").read_text() == "by hand"

    from diffusers.utils import hub_utils

    pushed = {}

    def upload_folder(folder_path, **kwargs):
        pushed.update({name: (tmp_path / folder_path / name).read_text() for name in ("README.md", "config.json")})

    monkeypatch.setattr(hub_utils, "create_repo", lambda name, **_: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    monkeypatch.setattr(
        hub_utils, "load_or_create_model_card", lambda *_, **__: hub_utils.ModelCard("This model card has been automatically generated.")
    )  # fmt: skip
    pipe.push_to_hub("me/their-vokens")
    assert "their-vokens" in pushed["README.md"] and "voken" in pushed["config.json"]


def test_a_stream_tells_text_as_it_comes_and_ends_with_what_the_call_returns():
    pipe = tiny_voken_pipeline()
    settings = {"num_images": 1, "seed": 0, **FAST}
    events = list(pipe.stream("a cat", **settings))
    whole = pipe("a cat", **settings)
    like(events[-1]["output"].segments[0], whole.segments[0])
    told = "".join(event["text"] for event in events if event["type"] == "text")
    assert told == "".join(part for part in whole.segments[0] if isinstance(part, str))
    kinds = [event["type"] for event in events]
    number = sum(not isinstance(part, str) for part in whole.segments[0])
    assert kinds.count("image_start") == kinds.count("image") == number and kinds[-1] == "end"
    with pytest.raises(ValueError, match="multiples of 2"):
        next(pipe.stream("a cat", height=17))


def test_a_stream_that_is_closed_stops_writing():
    pipe, steps = tiny_voken_pipeline(), []
    pipe.model.get_output_embeddings().register_forward_pre_hook(lambda *_: steps.append(1))
    stream = pipe.stream("a cat", max_new_tokens=100, num_inference_steps=1)
    next(stream)
    stream.close()
    assert len(steps) < 90


def test_every_scene_of_a_story_is_context_of_the_next():
    pipe = tiny_voken_pipeline("llava")
    settings = {"num_images": 1, **FAST}
    story = pipe.story(["a cat met a dog.", RED], scenes=2, seed=3, **settings)
    assert len(story.segments) == len(story.messages) == 2

    def turn(*parts):
        kinds = [("text", part) if isinstance(part, str) else ("image", part) for part in parts]
        return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in kinds]}]

    ask = "Tell me the next scene with image."
    first = pipe(turn("a cat met a dog.", RED, ask), seed=3, **settings).segments[0]
    like(story.segments[0], first)
    drawn = sum(not isinstance(part, str) for part in first)
    second = pipe(
        turn("a cat met a dog.", RED, *first, ask), seed=(3 + drawn * 0x9E3779B9) % 2**32, **settings
    ).segments[0]
    like(story.segments[1], second)
    other = pipe.story(["a cat met a dog.", BLUE], scenes=1, seed=3, **settings).segments[0]
    assert [str(part) for part in other] != [str(part) for part in first]


def test_a_drawn_picture_of_an_earlier_turn_is_read():
    pipe = tiny_voken_pipeline("llava")
    conversation = [{"role": "user", "content": "a cat"}]
    reply = pipe(conversation, num_images=1, seed=0, **FAST).messages[0]
    again = pipe([*conversation, reply, {"role": "user", "content": "and then?"}], num_images=1, seed=0, **FAST)
    assert any(not isinstance(part, str) for part in again.segments[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", [*CAUSAL_BASES, *VISION_BASES])
def test_text_logits_stay_those_of_the_base(model_type, tied):
    base = tiny_voken_base(model_type, vocab_size=VOKENS[0], tied=tied)
    pictures, tensors = ([], {}) if model_type in CAUSAL_BASES else picture_inputs(model_type)
    ids = torch.tensor([[1, *pictures, 40, 41, 42]])
    with torch.no_grad():
        before = base(input_ids=ids, **tensors).logits
        rows = [one.weight.clone() for one in (base.get_input_embeddings(), base.get_output_embeddings())]
        pipe = add_vokens(base, tiny_base_processor(model_type), tiny_image_pipeline(), condition_length=6)
        after = pipe.model(ids, **tensors).logits
    torch.testing.assert_close(after[..., : VOKENS[0]], before, atol=1e-5, rtol=0)
    assert pipe.model.config.voken_token_ids == VOKENS
    for old, new in zip(rows, (base.get_input_embeddings(), base.get_output_embeddings()), strict=True):
        assert torch.equal(new.weight[: VOKENS[0]], old)
        torch.testing.assert_close(new.weight[VOKENS[0] :], old.mean(0).expand(8, -1), atol=1e-6, rtol=0)


def test_vokens_prefer_reserved_tokens_then_padded_rows_then_new_ones():
    tokenizer = tiny_tokenizer([*SPECIAL_TOKENS, "<unused0>", "<unused1>"])
    base = tiny_base(vocab_size=len(tokenizer) + 3)  # three padded rows
    before = base.get_input_embeddings().weight.clone()
    pipe = add_vokens(base, tokenizer, tiny_image_pipeline(), condition_length=6)
    length = 265
    assert pipe.model.config.voken_token_ids == [7, 8, *range(length, length + 6)]
    assert tokenizer.convert_ids_to_tokens([7, length]) == ["<unused0>", "[IMG2]"]
    assert torch.equal(base.get_input_embeddings().weight[: len(before)], before)


def test_sizes_come_from_the_pipeline():
    for family, expected in {
        "sd": (6, 8, None),
        "sdxl": (6, 16, 12),
        "sd3": (3, 24, 12),
        "sana": (300, 8, None),
    }.items():
        base = tiny_voken_base(vocab_size=VOKENS[0])
        config = add_vokens(base, tiny_tokenizer(), tiny_image_pipeline(family), mapper_num_layers=1).model.config
        assert (config.condition_length, config.condition_dim, config.pooled_condition_dim) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a [IMG0] b",), r"has \[IMG0\], which only the model writes"),
        (("a cat", [RED]), "a base that reads pictures"),
        (("a cat", None, {"num_images": 4}), "takes 32 of max_new_tokens=24"),
        (("a cat", None, {"num_images": 0}), "num_images=0 must be at least 1"),
        (("a cat", None, {"height": 15}), "multiples of 2"),
        (("a cat", None, {"output_type": "jpg"}), "'pil', 'np' or 'pt'"),
        (("a cat", None, {"batch_size": 0}), "batch_size must be at least 1"),
        (("a cat", None, {"num_return_sequences": 2}), "one reply"),
        (("a cat", None, {"steps": 2}), "steps"),
        (("a cat", None, {"num_inference_steps": 0}), "num_inference_steps must be at least 1"),
        (("a cat", None, {"height": 0}), "multiples of 2, got pictures of 0"),
        (("a cat", None, {"width": -16}), "multiples of 2, got pictures of 16 x -16"),
        (("",), "A prompt is empty"),
        (([[]],), "A prompt is empty"),
        ((7,), "A prompt is a text"),
        (([],), "A prompt is a text"),
        ((["a", "b"], [RED]), "a list of pictures for each of the 2 prompts"),
        (([{"content": "a"}],), "A message must have a 'role', such as user, and a 'content'"),
        ((["a", None],), "A message must have a 'role'"),
        (
            ([{"role": "user", "content": None}],),
            "The content of a message must be a string or a list of parts, got None",
        ),
        (
            ([{"role": "user", "content": [{"text": "a"}]}],),
            "A part of a message must be of type text or image, got {'text': 'a'}",
        ),
        (([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],), "must be of type text or image"),
        (([{"role": "user", "content": [{"type": "image"}]}],), "An image is given as 'image', 'url', 'path'"),
        (("a cat", None, {"guidance_scale": float("nan")}), "guidance_scale must be a number, got nan"),
        (([{"role": "user", "content": "a"}], [RED]), "belong in their content"),
    ],
)
def test_input_that_cannot_be_met_is_refused_before_any_work(arguments, message):
    pipe = tiny_voken_pipeline()
    pipe.model.get_input_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("there was work"))
    prompt, images, settings = (*arguments, None, None, {})[:3] if len(arguments) < 3 else arguments
    with pytest.raises(ValueError, match=message):
        pipe(prompt, images, **{**FAST, **(settings or {})})


def test_pictures_and_their_places_are_as_many():
    processor = tiny_voken_pipeline("llava").processor
    with pytest.raises(ValueError, match=r"Got \[1\] pictures for texts with \[2\] places"):
        processor(text="<image> and <image>", images=RED)
    with pytest.raises(ValueError, match=r"Got \[2, 0\] pictures for texts with \[1, 1\] places"):
        processor(text=["<image>a", "<image>b"], images=[[RED, BLUE], []])
    with pytest.raises(ValueError, match="has no tokens for all vokens"):
        VokenProcessor(tiny_tokenizer(), [1, 9999])


@pytest.mark.parametrize("setting", [{"seed": 1.5}, {"batch_size": 1.5}, {"num_images": 1.5}, {"guidance_scale": "7"}])
def test_settings_of_another_type_are_refused_before_any_work(setting):
    pipe = tiny_voken_pipeline()
    pipe.model.get_input_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("there was work"))
    with pytest.raises(TypeError):
        pipe("a cat", **{**FAST, **setting})


def test_prompts_are_texts():
    for text in (None, [], 7, [None]):
        with pytest.raises(ValueError, match="Prompts are a text or a list of texts, got"):
            tiny_voken_pipeline().processor(text=text)


def test_parts_that_are_not_of_one_pipeline_are_refused(tmp_path):
    pipe = tiny_voken_pipeline()
    for name in ("vae", "scheduler"):
        with pytest.raises(ValueError, match=f"A pipeline that draws has a {name}, which these parts lack"):
            InterleavedVokenPipeline(**{**pipe.components, name: None})
    with pytest.raises(ValueError, match="Model and processor are not of one pipeline"):
        processor = VokenProcessor(pipe.processor.base, VOKENS[::-1])
        InterleavedVokenPipeline(**{**pipe.components, "processor": processor})
    pipe.register_modules(unet=None)
    with pytest.raises(ValueError, match="a unet or a transformer, these parts have 0"):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_a_stream_tells_one_reply_and_a_story_is_a_list():
    pipe = tiny_voken_pipeline()
    with pytest.raises(ValueError, match="stream a single prompt"):
        pipe.stream(["a", "b"])
    for parts, scenes in (("a cat", 1), (["a cat"], 0)):
        with pytest.raises(ValueError, match="A story is a list of texts and pictures, with a scene or more"):
            pipe.story(parts, scenes=scenes)


def test_a_picture_may_be_given_by_its_path(tmp_path):
    RED.save(tmp_path / "red.png")
    pipe = tiny_voken_pipeline("llava")
    drawn = [
        pipe("a", images=[one], num_images=1, seed=0, **FAST).segments[0] for one in (RED, str(tmp_path / "red.png"))
    ]
    assert [*map(str_or_pixels, drawn[0])] == [*map(str_or_pixels, drawn[1])]


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_drawn_pictures_are_read_the_same_whatever_they_are_given_as(output_type):
    pipe = tiny_voken_pipeline("llava")
    read = []
    for kind in ("pil", output_type):
        turn = pipe("a", num_images=1, seed=0, output_type=kind, **FAST).messages[0]
        read.append(pipe.processor.apply_chat_template([turn], tokenize=True, return_dict=True)["pixel_values"])
    assert torch.equal(*read)


def str_or_pixels(piece):
    return piece if isinstance(piece, str) else piece.tobytes()


@pytest.mark.parametrize("way", ["arguments", "generation_config"])
def test_a_reply_ends_where_the_call_says_and_never_before_its_pictures(way):
    pipe = tiny_voken_pipeline()
    words = [*range(3, VOKENS[0])]
    # Everything that can be written ends a text.
    settings = {"eos_token_id": words, "pad_token_id": 0, "return_dict_in_generate": True}
    if way == "generation_config":
        settings = {"generation_config": GenerationConfig(**settings)}
    reply = pipe(["a", "a cat"], num_images=1, **{**FAST, **settings}).segments
    assert [[*map(type, one)] for one in reply] == [[type(RED)]] * 2


def test_what_fills_a_batch_may_be_a_word_of_a_text():
    assert finished([40, 0, 41, *VOKENS, 42, 0, 0], VOKENS, [2], 0) == [40, 0, 41, *VOKENS, 42]


def test_a_story_needs_a_base_that_reads_pictures():
    with pytest.raises(ValueError, match="reads no pictures"):
        tiny_voken_pipeline().story(["a cat"], scenes=2)


def test_repositories_that_are_not_whole_are_refused(tmp_path):
    pipe = tiny_voken_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "unet": [None, None]}))
    with pytest.raises(ValueError, match="a unet or a transformer, these parts have 0"):
        DiffusionPipeline.from_pretrained(tmp_path)

    from safetensors.torch import load_file, save_file

    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    for change, message in (({}, "missing"), ({"extra": torch.zeros(1)}, "extra")):
        some = {name: one for name, one in weights.items() if change or "query" not in name}
        save_file(some | change, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            VokenForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_diffusion_model_that_lacks_weights_is_refused(part, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_voken_pipeline().save_pretrained(tmp_path)
    path = tmp_path / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name, _ = weights.popitem()
    save_file(weights, path)
    for door in (DiffusionPipeline, VokenImageDecoder):
        with pytest.raises(ValueError, match=f"lacks 1 weights: {name}"):
            door.from_pretrained(tmp_path)


def test_a_model_with_an_adapter_is_not_saved_without_it(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_voken_pipeline()
    adapter = peft.LoraConfig(target_modules=r"text_model\..*q_proj")
    pipe.register_modules(model=peft.get_peft_model(pipe.model, adapter))
    with pytest.raises(ValueError, match="merge"):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": tiny_voken_model()}, "without vokens, got VokenForConditionalGeneration"),
        ({"base_model": torch.nn.Linear(1, 1)}, "got Linear"),
        ({"base_model": tiny_base(vocab_size=100)}, "does not fit the base model"),
        (
            {"image_pipeline": diffusers.DDPMPipeline(diffusers.UNet2DModel(), diffusers.DDPMScheduler())},
            "UNet2DModel is no",
        ),
        ({"num_vokens": 0}, "num_vokens must be at least 1"),
        ({"token_format": "[IMG]"}, "token_format make a name of each"),
        ({"mapper_num_heads": 3}, "must divide mapper_hidden_size"),
        ({"condition_length": 0}, "condition_length must be at least 1"),
        ({"mapper_width": 8}, "mapper_width cannot be chosen here"),
        ({"voken_token_ids": [1, 2]}, "voken_token_ids cannot be chosen here"),
    ],
)
def test_what_cannot_get_vokens_is_refused_unchanged(change, message):
    arguments = {"base_model": tiny_base(), "processor": tiny_tokenizer(), "image_pipeline": tiny_image_pipeline()}
    before = len(arguments["processor"]), len(arguments["base_model"].get_input_embeddings().weight)
    with pytest.raises(ValueError, match=message):
        add_vokens(**{**arguments, **change})
    assert (len(arguments["processor"]), len(arguments["base_model"].get_input_embeddings().weight)) == before


def test_the_image_decoder_is_no_part_of_the_model():
    model = tiny_voken_model(family="sd")
    assert not [name for name, _ in model.named_parameters() if not name.startswith(("text_model.", "feature_mapper."))]
    assert isinstance(model.image_decoder, VokenImageDecoder)
