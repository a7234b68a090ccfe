"""Batches of pairs, stories and dialogues: ids and labels by hand, pictures that are read and pictures that are drawn."""

import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer
from tiny_vokens import VOKENS, tiny_image_pipeline, tiny_voken_model
from transformers import CLIPImageProcessorPil, LlavaProcessor

from transformers_liquid import VokenDataCollator, VokenImageDecoder, VokenProcessor, story_samples
from transformers_liquid.data.voken_collator import cache_latents
from transformers_liquid.models.voken.prompts import CAPTION_PROMPT, STORY_PROMPTS


READ = [3] * 4  # what a picture of 16 x 16 becomes in a prompt
EOS = 2
NONE = -100


def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"[IMG{index}]" for index in range(8)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    """Of a llava without a chat template: turns are put one after the other."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return VokenProcessor(LlavaProcessor(images, tokenizer(), **settings), VOKENS)


@pytest.fixture(scope="module")
def decoder():
    return VokenImageDecoder(tiny_image_pipeline("sd-v"))


def ids(text):
    return tokenizer()(text, add_special_tokens=False).input_ids


def picture(color, size=(16, 16)):
    return Image.new("RGB", size, color)


def pixels(*color):
    return torch.tensor(color).view(3, 1, 1).expand(3, 16, 16) / 127.5 - 1


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
STORY = {"kind": "story", "texts": ["a cat.", "a dog."], "images": [picture(RED), picture(GREEN)]}


def of_one(collator, record):
    batch = collator([record])
    assert batch["attention_mask"].all()
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), batch


def test_a_picture_is_drawn_for_its_text(processor, decoder):
    record = {"kind": "text_to_image", "text": "red", "image": picture(RED)}
    sequence, labels, batch = of_one(VokenDataCollator(processor, decoder, captions=True), record)
    assert sequence == [*ids("red"), *VOKENS, EOS]
    assert labels == [NONE, NONE, NONE, *VOKENS, EOS]
    assert torch.equal(batch["target_pixel_values"], pixels(*RED)[None]) and batch["captions"] == ["red"]
    assert "pixel_values" not in batch


def test_a_picture_is_read_for_its_caption(processor, decoder):
    record = {"kind": "caption", "text": "red", "image": picture(RED)}
    sequence, labels, batch = of_one(VokenDataCollator(processor, decoder, captions=True), record)
    asked = [*READ, *ids(CAPTION_PROMPT)]
    assert sequence == [*asked, *ids("red"), EOS]
    assert labels == [NONE] * len(asked) + [*ids("red"), EOS]
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "pixel_values"}


def test_a_text_is_learned_alone(processor):
    sequence, labels, _ = of_one(VokenDataCollator(processor), {"kind": "text", "text": "red"})
    assert sequence == [*ids("\n"), *ids("red"), EOS] and labels == [NONE, *ids("red"), EOS]


def test_every_scene_of_a_story_is_drawn_told_and_both(processor, decoder):
    batch = VokenDataCollator(processor, decoder, captions=True)([STORY])
    before = [*ids("a cat."), *READ]
    first, second = (STORY_PROMPTS["image"].format(text=text) for text in STORY["texts"])
    expected = [
        (ids(first), [*VOKENS]),
        ([*before, *ids(second)], [*VOKENS]),
        ([*before, *ids("Tell me the next scene with image.")], [*ids("a dog."), *VOKENS]),
        ([*before, *ids("Tell me the next scene description by this image: "), *READ], ids("a dog.")),
    ]
    assert len(batch["input_ids"]) == 4
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True)
    for (sequence, labels, mask), (asked, answer) in zip(rows, expected, strict=True):
        length = sum(mask)
        assert mask[:length] == [1] * length and sequence[length:] == [0] * (len(mask) - length)
        assert sequence[:length] == [*asked, *answer, EOS]
        assert labels[:length] == [NONE] * len(asked) + [*answer, EOS] and {*labels[length:]} <= {NONE}
    # Pictures that are read, and pictures that are drawn, both in reading order
    drawn = [pixels(*RED), pixels(*GREEN), pixels(*GREEN)]
    assert torch.equal(batch["target_pixel_values"], torch.stack(drawn))
    assert batch["captions"] == ["a cat.", "a dog.", "a dog."]
    read = batch["pixel_values"].mean((2, 3)).argmax(1).tolist()
    assert read == [0, 0, 0, 1]


@pytest.mark.parametrize("tasks, number", [(("image",), 2), (("text",), 1), (("multimodal", "text"), 2)])
def test_tasks_can_be_chosen_and_samples_be_records_of_their_own(tasks, number, processor):
    samples = story_samples(STORY, tasks)
    assert len(samples) == number
    together = VokenDataCollator(processor, story_tasks=tasks)([STORY])
    apart = VokenDataCollator(processor)(samples)
    assert together.keys() == apart.keys()
    assert all(torch.equal(one, apart[name]) for name, one in together.items())


def test_of_a_conversation_earlier_pictures_are_read_and_those_of_the_last_turn_drawn(processor, decoder):
    picture_part = {"type": "image"}
    text = lambda text: {"type": "text", "text": text}  # noqa: E731
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [text("yes"), picture_part]},
        {"role": "user", "content": [picture_part, text("and?")]},
        {"role": "assistant", "content": [picture_part, text("so"), picture_part]},
    ]
    images = [picture(color) for color in (RED, GREEN, BLUE, RED)]
    record = {"kind": "conversation", "messages": messages, "images": images, "captions": ["blue", "red"]}
    sequence, labels, batch = of_one(VokenDataCollator(processor, decoder, captions=True), record)
    asked = [*ids("hiyes"), *READ, *READ, *ids("and?")]
    answer = [*VOKENS, *ids("so"), *VOKENS, EOS]
    assert sequence == asked + answer and labels == [NONE] * len(asked) + answer
    assert torch.equal(batch["target_pixel_values"], torch.stack([pixels(*BLUE), pixels(*RED)]))
    assert batch["captions"] == ["blue", "red"] and len(batch["pixel_values"]) == 2


def test_a_turn_ends_as_the_chat_template_ends_it(processor):
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content[0].text }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    chat = VokenProcessor(processor.base, VOKENS, chat_template=template)
    record = {"kind": "text_to_image", "text": "red", "image": picture(RED)}
    sequence, labels, _ = of_one(VokenDataCollator(chat), record)
    assert sequence == [*ids("u:red;a:"), *VOKENS, *ids(";")] and labels[8:] == [*VOKENS, *ids(";")]


def test_templates_of_text_models_get_plain_texts():
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content | trim }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    plain = VokenProcessor(tokenizer(), VOKENS, chat_template=template)
    record = {"kind": "text_to_image", "text": "red", "image": picture(RED)}
    sequence, labels, _ = of_one(VokenDataCollator(plain), record)
    assert sequence == [*ids("u:red;a:"), *VOKENS, *ids(";")] and labels[8:] == [*VOKENS, *ids(";")]
    sequence, labels, _ = of_one(VokenDataCollator(plain), {"kind": "text", "text": "red"})
    assert sequence == ids("u:;a:red;") and labels == [NONE] * 5 + ids("red;")
    with pytest.raises(ValueError, match="a base that reads pictures"):
        VokenDataCollator(plain)([record | {"kind": "caption"}])


def test_what_is_collated_trains_a_model_that_reads_pictures(processor, decoder):
    model = tiny_voken_model("llava", "sd-v")
    records = [STORY, {"kind": "text", "text": "only text"}, {"kind": "caption", "text": "red", "image": picture(RED)}]
    out = model(**VokenDataCollator(processor, decoder, captions=True)(records))
    assert out.condition.shape[0] == 3 and out.caption_loss > 0
    out.loss.backward()
    assert all(one.grad is not None for one in model.feature_mapper.parameters())


# Pictures


def test_all_of_a_picture_is_drawn_on_white_and_mirrored_as_it_is_read(processor, decoder):
    wide = picture(RED, (16, 8))
    wide.paste(BLUE, (8, 0, 16, 8))
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    record = {"kind": "text_to_image", "text": "red", "image": wide}
    (drawn,) = VokenDataCollator(processor, decoder)([record])["target_pixel_values"]
    assert (drawn[:, :4] == 1).all() and (drawn[:, 12:] == 1).all()
    torch.testing.assert_close(drawn[:, 4:12, :8], pixels(*RED)[:, :8, :8])
    (white,) = VokenDataCollator(processor, decoder)([record | {"image": clear}])["target_pixel_values"]
    assert (white == 1).all()
    story = STORY | {"images": [wide, wide]}
    plain, mirrored = (VokenDataCollator(processor, decoder, flip_probability=p)([story]) for p in (0.0, 1.0))
    for name in ("target_pixel_values", "pixel_values"):
        torch.testing.assert_close(mirrored[name], plain[name].flip(-1))


def test_mirroring_depends_on_seed_epoch_and_index_and_on_nothing_else(processor, decoder):
    wide = picture(RED)
    wide.paste(BLUE, (8, 0, 16, 16))
    records = [{"kind": "text_to_image", "text": "red", "image": wide, "index": index} for index in range(20)]

    def mirrored(records, epoch=0, **options):
        collator = VokenDataCollator(processor, decoder, flip_probability=0.5, **options)
        collator.set_epoch(epoch)
        return [bool(one[2, 0, 0] == 1) for one in collator(records)["target_pixel_values"]]

    first = mirrored(records)
    assert 4 < sum(first) < 16 and mirrored(records[::-1]) == first[::-1] and mirrored(records[7:8]) == first[7:8]
    assert mirrored(records, epoch=1) != first != mirrored(records, seed=1)


def test_cached_latents_are_those_of_the_pictures(processor, decoder, tmp_path):
    for name, color in (("red.png", RED), ("green.png", GREEN)):
        picture(color).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("red.png", "green.png")]
    torch.manual_seed(0)
    latents = cache_latents([*paths, paths[0]], decoder)
    torch.manual_seed(0)
    expected = decoder.encode(torch.stack([pixels(*RED), pixels(*GREEN)]))
    assert [*latents] == paths and torch.equal(torch.stack([*latents.values()]), expected)
    story = STORY | {"images": paths}
    batch = VokenDataCollator(processor, decoder, latents=latents)([story])
    assert torch.equal(batch["target_latents"], expected[[0, 1, 1]]) and "target_pixel_values" not in batch
    with pytest.raises(ValueError, match=r"Cached latents of .* have the shape None, expected \(4, 8, 8\)"):
        VokenDataCollator(processor, decoder, latents=latents)([STORY])
    with pytest.raises(ValueError, match=r"have the shape torch.Size\(\[4, 4, 4\]\), expected \(4, 8, 8\)"):
        VokenDataCollator(processor, decoder, latents={paths[0]: torch.zeros(4, 4, 4)})([story])


# Bad input


@pytest.mark.parametrize(
    "record, message",
    [
        ({"kind": "drawing"}, "'kind' must be one of text_to_image, caption, text, conversation, story, got 'drawing'"),
        ({"kind": "text_to_image", "text": "red"}, "needs 'image'"),
        ({"kind": "text_to_image", "text": " ", "image": picture(RED)}, "a 'text' that is a string and not empty"),
        (
            {"kind": "text_to_image", "text": "a [IMG0]", "image": picture(RED)},
            r"A text has \[IMG0\], which only the model",
        ),
        (
            {"kind": "caption", "text": "a [IMG3]", "image": picture(RED)},
            r"A text to learn has \[IMG3\], which stands for",
        ),
        (
            {"kind": "caption", "text": "a <image>", "image": picture(RED)},
            "A text to learn has <image>, which stands for",
        ),
        ({"kind": "text_to_image", "text": "red", "image": 3}, "A picture is a path or a PIL image, got int"),
        (STORY | {"images": STORY["images"][:1]}, "a picture for each text, got 2 texts and 1 images"),
        (
            {"kind": "story", "texts": ["a"], "images": [picture(RED)]},
            "A story of 1 scenes has nothing to learn for text",
        ),
        (
            {"kind": "conversation", "messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "1 places for pictures, but there are 0 images",
        ),
        (
            {"kind": "conversation", "messages": [{"role": "assistant", "content": "a"}], "images": [picture(RED)]},
            "0 places for pictures, but there are 1 images",
        ),
        ({"kind": "conversation", "messages": [{"role": "user", "content": "a"}]}, "the assistant's, got .*'user'"),
        (
            {"kind": "conversation", "messages": [{"role": "assistant"}]},
            "The content of a message must be a string or a list of parts, got None",
        ),
        ({"kind": "conversation", "messages": "a"}, "A message must have a 'role'"),
        ({"kind": "conversation", "messages": [1]}, "A message must have a 'role'"),
        (STORY | {"texts": ["a", " "]}, "The texts of a story are strings and not empty, got ' '"),
        (
            {"kind": "conversation", "messages": [{"role": "assistant", "content": [{"type": "video"}]}]},
            "A part of a message must be of type text or image, got {'type': 'video'}",
        ),
        ({"kind": "text_to_image", "text": "a", "image": picture(RED), "captions": "b"}, "needed is a text each"),
        ({"kind": "text_to_image", "text": "a", "image": picture(RED), "captions": ["b", "c"]}, "with 2 captions"),
        ({"kind": "story", "texts": "ab", "images": [picture(RED)] * 2}, "A story has lists"),
    ],
)
def test_records_that_are_not_as_they_should_be_are_refused(record, message, processor, decoder):
    with pytest.raises(ValueError, match=message):
        VokenDataCollator(processor, decoder, story_tasks=("text",))([record])


def test_captions_that_are_missing_are_refused_where_they_are_needed(processor):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "image", "image": picture(RED)}]},
    ]
    record = {"kind": "conversation", "messages": messages}
    assert "captions" not in VokenDataCollator(processor)([record])
    with pytest.raises(ValueError, match="draws 1 pictures, with 0 captions"):
        VokenDataCollator(processor, captions=True)([record])


def test_a_run_is_never_cut(processor):
    record = {"kind": "text_to_image", "text": "red", "image": picture(RED)}
    assert VokenDataCollator(processor, max_length=12)([record])["input_ids"].shape == (1, 12)
    with pytest.raises(ValueError, match="12 tokens, more than max_length=11, and a run of vokens cannot be cut"):
        VokenDataCollator(processor, max_length=11)([record])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"story_tasks": ()}, "story_tasks must be some of"),
        ({"story_tasks": ("image", "sound")}, "story_tasks must be some of image, multimodal, text"),
        ({"flip_probability": 1.5}, "flip_probability must be from 0 to 1"),
        ({"latents": {}, "flip_probability": 0.5}, "Cached latents are of one size and not mirrored"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, message, processor, decoder):
    with pytest.raises(ValueError, match=message):
        VokenDataCollator(processor, decoder, **options)
