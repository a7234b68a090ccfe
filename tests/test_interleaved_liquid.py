"""Text and pictures by turns: every sequence is recomputed here by hand, alone, without cache, padding or phases."""

from __future__ import annotations

import gc
import threading

import PIL.Image
import pytest
import torch
from tiny import BOI_ID as BOI
from tiny import BOS_ID as BOS
from tiny import CODEBOOK_SIZE as CODES
from tiny import EOI_ID as EOI
from tiny import EOS_ID as EOS
from tiny import IMAGE_ID as PLACEHOLDER
from tiny import IMAGE_TOKEN_OFFSET as OFFSET
from tiny import UNCOND_ID as UNCONDITIONAL
from tiny import tiny_model, tiny_processor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from transformers_liquid.generation.image_generation import pad_left
from transformers_liquid.generation.sampling import gumbel_noise, picture_seed
from transformers_liquid.pipelines.conversation import LiquidConversation
from transformers_liquid.pipelines.text_to_image import LiquidImageGenerationPipeline


NUM_CODES = 4
PICTURE = [BOI, OFFSET + 3, OFFSET + 1, OFFSET + 2, OFFSET + 5, EOI]
PROMPTS = [[BOS, 21, 22], [BOS, *PICTURE, 23, 24, 25, 26], [BOS, 27]]
LIMIT = 128


class OftenAnImage(LogitsProcessor):
    """By the last id alone, so that padding changes nothing: a picture after every third, an end after some."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        last = input_ids[:, -1]
        scores[:, BOI] += 1000 * (last % 3 == 0)
        scores[:, EOS] += 1000 * (last % 37 == 0) - 100
        return scores


class Recorder:
    def __init__(self):
        self.events, self.is_over = [], False

    def put_event(self, event):
        self.events.append(event)

    def end(self):
        self.is_over = True


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.config.image_size = 4  # 2 x 2 codes
    return model


def run(model, prompts, seeds, **kwargs):
    ids, mask = pad_left(prompts, model.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"max_new_tokens": 14, "max_images": 3, "do_sample": False, "logits_processor": [OftenAnImage()]}
    settings |= {"image_generation_config": {"temperature": 0.9, "top_k": None, "top_p": None}, "guidance_scale": 1.0}
    settings |= {"generator": generators, "generation_mode": "interleaved", "attention_mask": mask} | kwargs
    return model.generate(ids, **settings)


@torch.no_grad()
def oracle(model, prompt, seed, sides, budget=14, images=3, limit=LIMIT, processor=None):
    """Ids and end of one sequence. `sides`: from the ids so far to `(weight, ids)` pairs, whose scores are added up."""
    processor = processor or OftenAnImage()
    ids, count, first_noise = list(prompt), 0, {}
    while True:
        scores = processor(torch.tensor([ids]), model(torch.tensor([ids])).logits[:, -1].float())[0]
        boi = scores[BOI].clone()
        scores[OFFSET : OFFSET + CODES] = -torch.inf
        scores[[BOI, EOI, UNCONDITIONAL, PLACEHOLDER]] = -torch.inf
        if images and len(ids) + NUM_CODES + 2 <= limit:
            scores[BOI] = boi
        ids.append(int(scores.argmax()))
        if ids[-1] == EOS:
            return ids, "eos"
        if ids[-1] != BOI:
            budget -= 1
        else:
            generator = torch.Generator().manual_seed(picture_seed(seed, count))
            first_noise[count] = gumbel_noise([generator], NUM_CODES, 1, CODES, model.device)[:, 0]
            before, drawn = list(ids), []
            for noise in first_noise[count]:
                total = sum(
                    weight * model(torch.tensor([[*context, *drawn]])).logits[0, -1, OFFSET : OFFSET + CODES].double()
                    for weight, context in sides(before)
                )
                drawn.append(OFFSET + int((total / 0.9 + noise).argmax()))
            ids += [*drawn, EOI]
            count, images = count + 1, images - 1
        if budget == 0:
            return ids, "length"


def without_text(ids):
    return [BOS, *(token for token in ids if token in (BOI, EOI) or token >= OFFSET)]


BARE = [BOS, UNCONDITIONAL, BOI]
LONG = [BOS, *range(30, 45), BOI]
SIDES = {
    "alone": ({}, lambda ids: [(1, ids)]),
    "guided": ({"guidance_scale": 3.0}, lambda ids: [(3, ids), (-2, BARE)]),
    "away from the pictures": (
        {"guidance_scale": 3.0, "guidance_context": "images"},
        lambda ids: [(3, ids), (-2, without_text(ids) if EOI in ids else BARE)],
    ),
    "three sides": (
        {"guidance_scale": 3.0, "image_guidance_scale": 1.5},
        lambda ids: [(3, ids), (1.5 - 3, without_text(ids) if EOI in ids else BARE), (1 - 1.5, BARE)],
    ),
    "away from what is longer": (
        {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([LONG])},
        lambda ids: [(3, ids), (-2, LONG)],
    ),
}


@pytest.mark.parametrize("speculative", [None, True])
@pytest.mark.parametrize("way", SIDES)
def test_a_sequence_of_a_batch_is_what_a_plain_loop_writes_and_draws_alone(model, way, speculative):
    settings, sides = SIDES[way]
    output = run(model, PROMPTS, seeds=[5, 6, 7], speculative=speculative, **settings)
    assert output.sequences.shape[0] == 3
    kinds = set()
    for index, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6, 7], strict=True)):
        ids, reason = oracle(model, prompt, seed, sides)
        found = output.sequences[index].tolist()
        assert found[-len(ids) :] == ids and not any(found[: -len(ids)])
        assert output.end_reasons[index] == reason
        alone = run(model, [prompt], seeds=[seed], speculative=speculative, **settings)
        assert alone.sequences[0].tolist() == ids
        kinds |= {part.ndim for part in output.parts[index]}
    assert kinds == {1, 3}  # both were made


class CountsWhatIsRead:
    """While open, how many positions of each sequence every forward reads."""

    def __init__(self, model):
        self.model, self.read = model, []

    def __enter__(self):
        embed = self.model.get_input_embeddings()
        self.handle = embed.register_forward_pre_hook(lambda module, args: self.read.append(args[0].shape[1]))
        return self.read

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.parametrize("speculative", [None, 2])
@pytest.mark.parametrize("way", ["alone", "guided", "away from what is longer"])
def test_phases_go_on_from_what_was_read_where_all_sequences_grow_alike(model, way, speculative):
    settings, sides = SIDES[way]
    processor = _After(EOI, BOI)  # pictures, and one word between them
    settings = settings | {"logits_processor": [processor], "speculative": speculative, "max_images": 4}
    with CountsWhatIsRead(model) as read:
        output = run(model, PROMPTS, seeds=[5, 6, 7], max_new_tokens=5, **settings)
    for found, prompt, seed in zip(output.sequences.tolist(), PROMPTS, [5, 6, 7], strict=True):
        ids, _ = oracle(model, prompt, seed, sides, budget=5, images=4, processor=processor)
        assert found[-len(ids) :] == ids and ids.count(BOI) >= 4
    assert read.pop(0) == max(map(len, PROMPTS))
    # Of a context the last two tokens; with guidance, as many as the other side has.
    most = {"alone": 2, "guided": len(BARE), "away from what is longer": len(LONG)}[way]
    if way == "away from what is longer":  # the first picture moves the contexts, which are read anew once
        assert sum(length > most for length in read) <= 1
    else:
        assert max(read) == most


@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "dynamic"}, {"use_cache": False}, {"image_generation_config": {"use_cache": False}}],
)
def test_a_choice_of_a_cache_stands_and_changes_nothing(model, settings):
    settings = settings | {"do_sample": False, "image_generation_config": settings.get("image_generation_config", {})}
    given = {"temperature": 0.9, "top_k": None, "top_p": None}
    settings["image_generation_config"] = given | settings["image_generation_config"]
    with CountsWhatIsRead(model) as read:
        output = run(model, PROMPTS[1:2], seeds=[6], **settings)
    assert torch.equal(output.sequences, run(model, PROMPTS[1:2], seeds=[6]).sequences)
    assert max(read) > len(PROMPTS[1]) + NUM_CODES


def test_in_half_precision_contexts_are_read_anew_so_that_pictures_can_be_drawn_again(model):
    half = tiny_model().to(torch.bfloat16)
    half.config.image_size = 4
    with CountsWhatIsRead(half) as read:
        output = run(half, PROMPTS[1:2], seeds=[6], logits_processor=[_After(EOI, BOI)], max_images=2)
    assert sum(length > len(PROMPTS[1]) for length in read) == 2 * len(output.seeds[0])


def test_a_running_cache_is_for_one_sequence(model):
    cache = DynamicCache(config=model.config.text_config)
    model(torch.tensor(PROMPTS[1][:-1])[None], past_key_values=cache)
    with CountsWhatIsRead(model) as read:
        output = run(model, PROMPTS[1:2], seeds=[6], past_key_values=cache)
    assert read[0] == 1
    assert torch.equal(output.sequences, run(model, PROMPTS[1:2], seeds=[6]).sequences)
    with pytest.raises(ValueError, match="past_key_values cannot be about 3 sequences"):
        run(model, PROMPTS, seeds=[5, 6, 7], past_key_values=DynamicCache())


def test_parts_are_what_stands_in_the_sequence_and_a_picture_can_be_drawn_again_alone(model):
    output = run(model, PROMPTS, seeds=[5, 6, 7], guidance_scale=3.0)
    for index, prompt in enumerate(PROMPTS):
        ids = output.sequences[index].tolist()
        ids = ids[ids.index(BOS) :]
        assert ids[: len(prompt)] == prompt
        rest, number = ids[len(prompt) :], 0
        for part in output.parts[index]:
            if part.ndim == 1:
                assert rest[: len(part)] == part.tolist()
                rest = rest[len(part) :]
                continue
            assert rest[0] == BOI and rest[NUM_CODES + 1] == EOI
            codes = torch.tensor(rest[1 : NUM_CODES + 1])
            torch.testing.assert_close(part, model.decode_image_tokens(codes)[0])
            context = torch.tensor([ids[: len(ids) - len(rest) + 1]])
            generator = torch.Generator().manual_seed(output.seeds[index][number])
            settings = {"temperature": 0.9, "top_k": None, "top_p": None, "guidance_scale": 3.0}
            again = model.generate(context, generation_mode="image", generator=generator, **settings)
            assert torch.equal(again[0], codes)
            rest, number = rest[NUM_CODES + 2 :], number + 1
        assert rest in ([], [EOS])
    assert max(map(len, output.seeds)) > 1


def test_events_tell_everything_in_order(model):
    recorder = Recorder()
    output = run(model, PROMPTS, seeds=[5, 6, 7], streamer=recorder)
    assert recorder.is_over
    for index, parts in enumerate(output.parts):
        events = [event for event in recorder.events if event.sequence == index]
        told, codes = [], []
        for event in events[:-1]:
            if event.type == "text":
                if not told or isinstance(told[-1], torch.Tensor):
                    told.append([])
                told[-1] += event.ids
            elif event.type == "image_start":
                assert event.index == sum(isinstance(one, torch.Tensor) for one in told)
                codes = []
            elif event.type == "image_partial":
                codes += event.codes.tolist()
            else:
                assert len(codes) == NUM_CODES
                told.append(event.pixel_values)
        assert len(told) == len(parts)
        for one, part in zip(told, parts, strict=True):
            assert torch.equal(torch.as_tensor(one), part)
        assert events[-1].type == "end" and events[-1].reason == output.end_reasons[index]


def test_a_picture_without_room_is_refused_and_the_end_says_so(model):
    prompt = [BOS, *[20] * (LIMIT - 6), 21]  # after 21 a picture would come: room for 4, and it needs 6
    output = run(model, [prompt], seeds=[1], max_new_tokens=2)
    assert output.end_reasons == ["no_room"]
    assert [part.ndim for part in output.parts[0]] == [1]
    assert run(model, [prompt], seeds=[1]).end_reasons == ["context"]
    fits = [BOS, *[20] * (LIMIT - 9), 21]
    output = run(model, [fits], seeds=[1], max_new_tokens=1)
    assert [part.ndim for part in output.parts[0]] == [3, 1]


def test_after_the_last_picture_the_text_goes_on_alone(model):
    output = run(model, [[BOS, 21]], seeds=[1], max_images=1)
    assert [part.ndim for part in output.parts[0]] == [3, 1]
    assert len(output.parts[0][1]) == 14 and output.end_reasons == ["length"]


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopping_criterion_ends_the_call_within_a_step_also_while_it_draws(model, at):
    class Stop(StoppingCriteria):
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return torch.full((len(input_ids),), self.calls >= at)

    stop = Stop()
    output = run(model, [[BOS, 20]], seeds=[1], stopping_criteria=[stop], logits_processor=[_After(20, BOI)])
    assert stop.calls == at
    assert output.end_reasons == ["stopped"]
    assert not any(part.ndim == 3 for part in output.parts[0])
    assert run(model, [[BOS, 20]], seeds=[1], max_time=0.0).end_reasons == ["stopped"]


class _After(LogitsProcessor):
    """After any id but `last`, this token."""

    def __init__(self, last, token):
        self.last, self.token = last, token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[input_ids[:, -1] != self.last, self.token] += 1000
        return scores


def test_settings_of_the_text_and_of_the_pictures_are_apart(model):
    settings = {"generator": None, "max_new_tokens": 4, "max_images": 2}
    torch.manual_seed(0)
    with_penalty = run(model, [[BOS, 21]], seeds=[1], **settings | {"repetition_penalty": 5.0, "guidance_scale": 2.0})
    # All pictures are drawn greedily, the text is sampled.
    settings |= {"do_sample": True, "temperature": 5.0, "image_generation_config": {"do_sample": False}}
    first = run(model, [[BOS, 21]], seeds=[1], **settings)
    second = run(model, [[BOS, 21]], seeds=[1], **settings)
    assert torch.equal(first.parts[0][0], second.parts[0][0])  # the picture comes first
    assert first.sequences.tolist() != second.sequences.tolist()
    assert with_penalty.parts[0][0].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_images": 0}, "max_images must be a whole number of at least 1"),
        ({"max_images": -1}, "max_images must be a whole number of at least 1"),
        ({"max_images": 1.5}, "max_images must be a whole number"),
        ({"max_images": True}, "max_images must be a whole number of at least 1, got True"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number of at least 1, got True"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1, got 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1, got 0"),
        ({"output_scores": True}, "an output of its own: got greedy_search output_scores"),
        ({"image_generation_config": {"output_logits": True}}, "only settings of a picture"),
        ({"image_generation_config": {"do_sample": True, "temperature": 0.0}}, "strictly positive float"),
        ({"streamer": object()}, "has put_event"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate cannot be about 2 sequences"),
        ({"inputs_embeds": torch.zeros(2, 10, 32)}, "inputs_embeds cannot be about 2 sequences"),
        ({"position_ids": torch.zeros(2, 10)}, "position_ids cannot be about 2 sequences"),
        ({"max_images": 22}, "fit into the model's 128 positions, got 22"),
        ({"height": 5}, "positive multiples of 2 pixels"),
        ({"num_beams": 2}, "greedily or by sampling"),
        ({"prompt_lookup_num_tokens": 2}, "greedily or by sampling"),
        ({"return_dict_in_generate": True}, "an output of its own"),
        ({"generator": [torch.Generator()]}, "one for each of the 2 pictures, got 1"),
        ({"guidance_context": "text"}, "'none' or 'images', got 'text'"),
        ({"image_guidance_scale": -1.0}, "at least 0, got -1.0"),
        ({"image_guidance_scale": 1.0, "guidance_context": "images"}, "leave out guidance_context"),
        ({"image_generation_config": {"num_beams": 3}}, "has no meaning for images"),
        ({"suppress_image_tokens": False}, "leave out suppress_image_tokens"),
        ({"image_generation_config": {"tempurature": 9}}, "holds tempurature: only settings of a picture"),
        ({"image_generation_config": {"num_return_sequences": 2}}, "only settings of a picture"),
        ({"image_generation_config": 3}, "must be a dictionary of settings, got 3"),
        ({"max_length": 40}, "pass max_new_tokens"),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
        ({"negative_prompt_ids": torch.tensor([[BOS, 30, BOI]] * 3), "guidance_scale": 2.0}, "one sequence or 2"),
        ({"negative_prompt_ids": torch.tensor([[BOS, 30, BOI]])}, "guidance_scale is 1"),
        ({"negative_prompt_ids": torch.tensor([[BOS, 30]]), "guidance_scale": 2.0}, "must end with"),
        ({"negative_prompt_attention_mask": torch.ones(1, 3), "guidance_scale": 2.0}, "needs negative_prompt_ids"),
        ({"negative_prompt_attention_mask": torch.ones(1, 3)}, "needs negative_prompt_ids"),
        ({"negative_prompt_ids": torch.tensor([[BOS, UNCONDITIONAL, BOI]] * 3)}, "one sequence or 2"),
        (
            {"negative_prompt_ids": torch.tensor([[BOS, *[30] * 124, BOI]]), "guidance_scale": 2.0},
            "126 tokens and the picture 4 codes, together more than the model's 128 positions",
        ),
        (
            {"negative_prompt_ids": torch.tensor([[30, BOI]]), "guidance_scale": 2.0, "guidance_context": "images"},
            "both say what guidance leads away from",
        ),
        ({"attention_mask": torch.ones(2, 3)}, "attention mask of input_ids"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(model, settings, message):
    def fail(*args, **kwargs):
        raise AssertionError("work was begun")

    handle = model.model.text_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match=message):
            run(model, PROMPTS[:2], seeds=[1, 2], **settings)
    finally:
        handle.remove()


def test_a_prompt_that_fills_the_context_and_guidance_about_pictures_that_are_not_there_are_refused(model):
    with pytest.raises(ValueError, match="The prompt has 128 tokens, the model 128 positions"):
        run(model, [[BOS] * LIMIT], seeds=[1])
    for settings in ({"image_guidance_scale": 2.0}, {"guidance_context": "images"}):
        with pytest.raises(ValueError, match="are about pictures in the context, and the prompts have none"):
            model.generate(torch.tensor([[BOS, 21, BOI]]), generation_mode="image", guidance_scale=2.0, **settings)


def test_a_generation_config_of_the_text_is_completed_by_the_models_and_says_nothing_about_pictures(model):
    class End(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, EOS] += 1000
            return scores

    config = GenerationConfig(max_new_tokens=6, repetition_penalty=1.3)
    output = run(model, [[BOS, 20]], seeds=[1], generation_config=config, max_new_tokens=None, logits_processor=[End()])
    assert output.end_reasons == ["eos"] and output.parts == [[]]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=14, eos_token_id=EOS)
    drawn = run(model, [[BOS, 21]], seeds=[1], do_sample=None, generation_config=greedy)
    assert torch.equal(drawn.sequences, run(model, [[BOS, 21]], seeds=[1]).sequences)


def test_a_call_without_faults_warns_of_nothing(model, caplog):
    with caplog.at_level("WARNING"):
        run(model, PROMPTS, (0, 1, 2))
    assert caplog.text == ""


def test_stop_strings_end_a_text(model):
    tokenizer = tiny_processor().tokenizer
    settings = {"logits_processor": [_After(-1, tokenizer.convert_tokens_to_ids("c"))], "tokenizer": tokenizer}
    output = run(model, [[BOS, 20]], seeds=[1], stop_strings=["c"], **settings)
    assert output.end_reasons == ["stopped"] and len(output.parts[0][0]) == 1
    assert run(model, [[BOS, 20]], seeds=[1], stop_strings=["d"], **settings).end_reasons == ["length"]


def test_pictures_without_pictures_before_them_are_the_same_beside_others(model):
    settings = {"image_guidance_scale": 1.5, "guidance_min_p": 0.5, "max_new_tokens": 1, "max_images": 1}
    prompts = [[BOS, 21], [BOS, *PICTURE, 24]]
    both = run(model, prompts, seeds=[1, 2], **settings)
    alone = run(model, prompts[:1], seeds=[1], **settings)
    assert torch.equal(both.sequences[0][-len(alone.sequences[0]) :], alone.sequences[0])


def test_scores_of_a_text_that_are_nan_raise():
    broken = tiny_model()
    with torch.no_grad():
        broken.model.text_model.model.norm.weight.fill_(torch.nan)
    for mode in ("text", "interleaved"):
        with pytest.raises(ValueError, match="The scores of sequence 0 at position 2 are NaN"):
            broken.generate(torch.tensor([[BOS, 20]]), generation_mode=mode, do_sample=False, max_new_tokens=2)


def test_a_prompt_that_begins_a_picture_is_not_continued_with_text(model):
    with pytest.raises(ValueError, match="must not end with the begin-of-image token"):
        run(model, [[BOS, 21, BOI]], seeds=[1])


# Prompts and results


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def picture(colour="red", size=(8, 8)):
    return PIL.Image.new("RGB", size, colour)


def test_a_drawing_with_pictures_in_its_context_is_drawn_behind_their_codes(processor):
    whole = tiny_model()
    inputs = processor(text=["<image> in blue", "dog"], images=[picture()], generation_mode="image")
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    row = inputs["input_ids"][0].tolist()
    assert row.count(PLACEHOLDER) == 16 and row[-1] == BOI and row[1] == BOI
    codes = whole.encode_images(inputs["pixel_values"])[0].tolist()
    by_hand = [BOS, BOI, *codes, EOI, *processor.image_prompt_ids(" in blue")[1:]]
    settings = {"generation_mode": "image", "guidance_scale": 2.0}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    drawn = whole.generate(**inputs, generator=generators, **settings)
    alone = whole.generate(torch.tensor([by_hand]), generator=torch.Generator().manual_seed(1), **settings)
    assert torch.equal(drawn[0], alone[0])


def test_marks_of_a_negative_prompt_stand_for_the_pictures_of_the_prompt(processor):
    whole = tiny_model()
    inputs = processor(
        text="<image> in blue", images=picture(), negative_prompt="<image> in red", generation_mode="image"
    )
    assert inputs["negative_prompt_ids"][0].tolist().count(PLACEHOLDER) == 16
    codes = whole.encode_images(inputs["pixel_values"])[0].tolist()
    side = [BOS, BOI, *codes, EOI, *processor.image_prompt_ids(" in red")[1:]]
    settings = {"generation_mode": "image", "guidance_scale": 2.0, "do_sample": False}
    ids = whole.model.fill_image_placeholders(inputs["input_ids"], inputs["pixel_values"])
    by_hand = whole.generate(ids, negative_prompt_ids=torch.tensor([side]), **settings)
    assert torch.equal(whole.generate(**inputs, **settings), by_hand)
    with pytest.raises(ValueError, match="2 <image> marks for 1 images"):
        processor(text="<image>!", images=picture(), negative_prompt="<image><image>", generation_mode="image")


def test_messages_and_texts_with_pictures_become_prompts_of_interleaved_mode(processor):
    text = processor(text=["<image> is", "dog"], images=[picture()], generation_mode="interleaved")
    row = text["input_ids"][0].tolist()
    # As the tokenizer does it: this one adds no bos.
    assert row == [BOI, *[PLACEHOLDER] * 16, EOI, *processor.encode(" is")]
    assert text["attention_mask"][1].sum() == len(processor.encode("dog"))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a story"}]}]
    chat = processor(messages, images=[picture()], generation_mode="interleaved")
    as_text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(text=as_text, images=[picture()])["input_ids"]
    assert torch.equal(chat["input_ids"], expected)
    both = processor([messages, messages], images=[picture(), picture("blue")], generation_mode="interleaved")
    assert torch.equal(both["input_ids"], expected.expand(2, -1))
    assert both["negative_prompt_ids"].tolist() == [processor.unconditional_ids()] * 2


def test_what_was_written_and_drawn_comes_back_as_parts_in_order(processor):
    whole = tiny_model()
    inputs = processor(text="dog", generation_mode="interleaved")
    output = whole.generate(
        **inputs, generation_mode="interleaved", max_images=1, max_new_tokens=5, logits_processor=[OftenAnImage()]
    )
    (parts,) = processor.post_process_multimodal_output(output, generation_mode="interleaved")
    assert [part["type"] for part in parts] == ["text" if part.ndim == 1 else "image" for part in output.parts[0]]
    for part, raw in zip(parts, output.parts[0], strict=True):
        if part["type"] == "text":
            assert part["text"] == processor.decode(raw, skip_special_tokens=True)
        else:
            assert part["image"].size == (8, 8)
    with pytest.raises(ValueError, match="in interleaved mode has parts, got tensor"):
        processor.post_process_multimodal_output(output.sequences, generation_mode="interleaved")


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> dog", None, "1 <image> marks for 0 images"),
        ("dog", [picture()], "0 <image> marks for 1 images"),
        ("a <boi> dog", None, "contains '<boi>'"),
        ("<image> <eoi>", [picture()], "contains '<eoi>'"),
        ("", None, "text 0 is empty"),
    ],
)
def test_marks_without_pictures_and_pieces_of_images_are_refused(processor, mode, text, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images, generation_mode=mode)


def test_the_pipeline_draws_with_pictures_in_the_context(processor):
    pipe = LiquidImageGenerationPipeline(model=tiny_model(), processor=processor)
    settings = {"guidance_scale": 2.0, "progress_bar": False}
    (one,) = pipe("in blue", image=picture(), seed=4, **settings)
    inputs = processor(text="<image> in blue", images=picture(), generation_mode="image")
    generator = torch.Generator().manual_seed(4)
    ids = pipe.model.generate(**inputs, generation_mode="image", generator=generator, guidance_scale=2.0)
    (expected,) = processor.post_process_multimodal_output(pipe.model.decode_image_tokens(ids), generation_mode="image")
    assert one == expected
    both = pipe(["in blue", "<image> and <image>"], image=[picture(), [picture(), picture("blue")]], seed=4, **settings)
    assert both[0] == expected
    assert pipe("in blue", image=picture(), seed=4, guidance_context="images", **settings) != [expected]
    with pytest.raises(ValueError, match="Got 1 images for 2 prompts"):
        pipe(["a", "b"], image=[picture()], **settings)
    with pytest.raises(ValueError, match="1 <image> marks for 2 images"):
        pipe("<image> a", image=[[picture(), picture()]], **settings)
    with pytest.raises(TypeError, match="bytes or a Pillow picture, got None"):
        pipe("a", image=[[picture(), None]], **settings)
    assert pipe("a", image=[[]], seed=4, **settings) == pipe("a", seed=4, **settings)
    with pytest.raises(ValueError, match="both say what guidance leads away from"):
        pipe("a", image=picture(), negative_prompt="b", guidance_context="images", **settings)


def test_what_will_be_seen_is_said_first_and_drawn_with_these_words(processor):
    model = tiny_model()
    pipe = LiquidImageGenerationPipeline(model=model, processor=processor, progress_bar=False)
    model.generation_config.max_new_tokens = 2
    prompts, images = ["in blue", "a <image>"], [picture(), picture("blue")]
    own, said = [[one] for one in images], []
    for text, shown in zip(["<image> in blue", prompts[1]], own, strict=True):  # one by one, as any question
        messages = [{"role": "user", "content": f"{text} The caption of this image is:"}]
        inputs = processor(text=[messages], images=[shown], generation_mode="interleaved", return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        ids = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said.append(f"{messages[0]['content']} {processor.decode(ids, skip_special_tokens=True).strip()}")
    assert all(not text.endswith(":") for text in said)
    expected = pipe(said, image=own, seed=4)
    assert pipe(prompts, image=images, seed=4, caption_first=True) == expected
    assert pipe(prompts, image=images, seed=4, caption_first=True, batch_size=1) == expected
    assert pipe(prompts, image=images, seed=4) != expected
    model.generation_config.image_generation_config = {"caption_first": True}
    output = pipe(prompts, image=images, seed=4, return_dict=True)
    assert output.images == expected and output.settings[0]["caption_first"]
    both = pipe(["in blue", "a dog"], image=[[images[0]], []], seed=4)
    assert both == [expected[0], *pipe("a dog", seed=5, caption_first=False)]  # without pictures nothing is said
    with pytest.raises(ValueError, match="caption_first must be True or False, got 'yes'"):
        pipe(prompts, image=images, caption_first="yes")
    for mode in ("image", "interleaved"):
        with pytest.raises(ValueError, match="caption_first is for the pipeline"):
            model.generate(**processor(text="a", generation_mode=mode), generation_mode=mode, caption_first=True)


def test_pictures_of_the_context_have_the_size_of_the_picture_to_draw(processor):
    inputs = processor(text="<image> dog", images=picture(size=(20, 10)), height=4, width=8, generation_mode="image")
    assert inputs["pixel_values"].shape == (1, 3, 4, 8)
    assert (inputs["height"], inputs["width"]) == (4, 8)


# Conversation


@pytest.fixture(scope="module")
def converse(processor):
    return LiquidConversation(tiny_model(), processor)


SETTINGS = {"max_new_tokens": 12, "max_images": 2, "logits_processor": [OftenAnImage()], "do_sample": False, "seed": 3}


def test_a_reply_is_what_is_generated_and_can_be_a_message_of_the_next_turn(converse, processor):
    settings = SETTINGS | {"logits_processor": [_After(23, BOI), OftenAnImage()], "max_images": 1}
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "dog"}]}]
    reply = converse(messages, **settings)
    inputs = processor(messages, images=[picture()], generation_mode="interleaved")
    generator = torch.Generator().manual_seed(settings.pop("seed"))
    output = converse.model.generate(**inputs, generation_mode="interleaved", generator=generator, **settings)
    (expected,) = processor.post_process_multimodal_output(output, generation_mode="interleaved")
    assert reply == [part for part in expected if part.get("text") != ""]
    assert {part["type"] for part in reply} == {"text", "image"}
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "and now?"}]
    pictures = sum(part["type"] == "image" for part in reply)
    again = processor(messages, images=[picture()] * (1 + pictures), generation_mode="interleaved")
    assert len(again["pixel_values"]) == 1 + pictures
    assert converse(messages, **settings | {"max_new_tokens": 2})


def test_a_reply_is_streamed_with_previews_and_its_end(converse):
    events = list(converse.stream("dog", every=4, **SETTINGS))
    whole = converse("dog", **SETTINGS)
    assert "".join(event["text"] for event in events if event["type"] == "text") == "".join(
        part["text"] for part in whole if part["type"] == "text"
    )
    images = [event for event in events if event["type"] == "image"]
    assert [event["image"] for event in images] == [part["image"] for part in whole if part["type"] == "image"]
    assert [event["seed"] for event in images] == [picture_seed(3, index) for index in range(len(images))]
    previews = [event["num_codes"] for event in events if event["type"] == "image_partial"]
    assert previews == [4, 8, 12, 16] * len(images)
    assert events[-1]["type"] == "end" and events[-1]["reason"] in ("length", "eos")


@pytest.mark.parametrize("drop", ["closed", "forgotten"])
def test_a_stream_that_nobody_reads_stops_the_model(converse, drop):
    threads = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            threads.append(threading.current_thread())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    stream = converse.stream("dog", **SETTINGS | {"max_new_tokens": 100, "stopping_criteria": [Watch()]})
    if drop == "closed":
        stream.close()
    del stream
    gc.collect()
    assert not threads[0].is_alive() and len(threads) < 100


def test_messages_are_checked_once_and_bring_their_pictures(converse, processor, monkeypatch):
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "dog"}]
    messages, checked = [{"role": "user", "content": content}], []
    inputs = processor(messages, generation_mode="interleaved")
    given = processor(messages, images=[picture()], generation_mode="interleaved")
    assert all(torch.equal(inputs[name], given[name]) for name in given) and inputs.keys() == given.keys()
    check = type(processor).check_messages
    monkeypatch.setattr(type(processor), "check_messages", lambda self, one: checked.append(one) or check(self, one))
    converse(messages, **SETTINGS | {"max_new_tokens": 1})
    assert checked == [messages]
    with pytest.raises(ValueError, match="An image is given as 'image', 'url', 'path' or 'base64'"):
        processor([{"role": "user", "content": [{"type": "image"}]}], generation_mode="interleaved")


def test_closing_a_stream_stops_the_model(converse):
    calls = []

    class Count(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append(threading.current_thread())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    stream = converse.stream("dog", **SETTINGS | {"max_new_tokens": 100, "stopping_criteria": [Count()]})
    next(stream)
    stream.close()
    number = len(calls)
    assert not calls[0].is_alive() and number < 100
    assert len(calls) == number


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "hi</s>bye"}], "</s>"),
        ([{"role": "user\nassistant", "content": "hi"}], "must have a 'role'"),
        ([{"role": 5, "content": "hi"}], "must have a 'role'"),
        ([{"role": None, "content": "hi"}], "must have a 'role'"),
        ([{"role": "user", "content": None}], "must be a string or a list of parts"),
        ([{"role": "user", "content": [{"text": "hi"}]}], "must be of type text or image"),
        ([{"role": "user", "content": [{"type": "image"}]}], "given as 'image', 'url', 'path' or 'base64'"),
        (["hi"], "must have a 'role'"),
        ([{"content": "hi"}], "must have a 'role'"),
        ([], "at least one message, got none"),
        (None, "must be a string or a list of strings, got None"),
        ({"role": "user", "content": "hi"}, "must be a string or a list of strings, got {'role'"),
        ("hi</s>bye", "</s>"),
    ],
)
def test_bad_messages_are_refused(converse, messages, message):
    with pytest.raises(ValueError, match=message):
        converse(messages, max_new_tokens=2)


def test_one_reply_has_one_seed(converse):
    with pytest.raises(ValueError, match="leave out num_return_sequences"):
        converse("dog", num_return_sequences=2)
    with pytest.raises(ValueError, match="give seed or generator"):
        converse("dog", seed=1, generator=torch.Generator())
    for name in ("streamer", "generation_mode"):
        with pytest.raises(ValueError, match=f"gives one reply as events: leave out {name}"):
            converse("dog", **{name: "text"})


def test_what_cannot_be_met_is_raised_to_the_reader_at_once(converse):
    with pytest.raises(ValueError, match="max_images must be"):
        converse.stream("dog", **SETTINGS | {"max_images": 0})
    for every in (0, True):
        with pytest.raises(ValueError, match="every must be a whole number"):
            converse.stream("dog", every=every)
