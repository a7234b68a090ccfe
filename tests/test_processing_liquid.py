"""The prompts are the reference's, token for token, and nothing that is no image passes for one."""

import threading

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from transformers_liquid import LiquidConfig, LiquidDataCollator, LiquidImageProcessor, LiquidProcessor
from transformers_liquid.models.liquid.prompts import TEXT_TO_IMAGE_INSTRUCTIONS


SENTENCES = [
    "a red apple on a dog face",
    "Generate an image based on this description.",
    "The caption of this image is:",
]
BASE_TOKENS = ["<pad>", "<bos>", "<eos>"]
IMAGE_TOKENS = ["<boi>", "<eoi>", "<unconditional>", "<image>"]
OFFSET = 600  # beyond the tokenizer, as where a base pads its embeddings
CODEBOOK_SIZE = 32
GEMMA_QUESTION = "<start_of_turn>user\n{image}\n{question}<end_of_turn>\n<start_of_turn>model\n"


def build_tokenizer(extra_tokens=IMAGE_TOKENS, adds_bos=False, **kwargs):
    tokens = [*BASE_TOKENS, *extra_tokens]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 4, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokens.index("<bos>"))]
        )
    kwargs = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)


def build_processor(tokenizer=None, size=8, **kwargs):
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    image_processor = LiquidImageProcessor(size=size, downsample_factor=4)
    return LiquidProcessor(image_processor, tokenizer, image_token_offset=OFFSET, codebook_size=CODEBOOK_SIZE, **kwargs)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def gemma():
    return build_processor(build_tokenizer([*IMAGE_TOKENS, "<start_of_turn>", "<end_of_turn>"], adds_bos=True))


@pytest.fixture(scope="module")
def reserved():
    """A base that lends its reserved tokens."""
    names = {
        "image_token": "<unused3>",
        "boi_token": "<unused0>",
        "eoi_token": "<unused1>",
        "uncond_token": "<unused2>",
    }
    return build_processor(build_tokenizer(list(names.values())), **names)


def whole(processor, text):
    """Ids of a whole string, special tokens included: how the reference tokenizes its prompts."""
    return processor.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def picture(color="red", size=(20, 10)):
    return PIL.Image.new("RGB", size, color)


# Prompts of an image


def test_image_prompt_is_bos_prompt_instruction_boi(processor):
    expected = whole(processor, "<bos>red apple Generate an image based on this description.<boi>")
    assert processor.image_prompt_ids("red apple") == expected
    assert processor(text="red apple", generation_mode="image")["input_ids"].tolist() == [expected]


def test_unconditional_prompt_is_three_tokens(processor):
    vocabulary = processor.tokenizer.get_vocab()
    expected = [vocabulary[token] for token in ("<bos>", "<unconditional>", "<boi>")]
    assert processor.unconditional_ids() == expected
    inputs = processor(text=["red apple", "dog"], generation_mode="image")
    assert inputs["negative_prompt_ids"].tolist() == [expected] * 2
    assert inputs["negative_prompt_attention_mask"].tolist() == [[1, 1, 1]] * 2


def test_other_sizes_are_said_in_both_prompts_and_carried_as_ints(processor):
    inputs = processor(text="red apple", generation_mode="image", height=8, width=12)
    sentence = "Image Size: Width is 12 Height is 8."
    instruction = " Generate an image based on this description."
    assert inputs["input_ids"].tolist() == [whole(processor, f"<bos>red apple{sentence}{instruction}<boi>")]
    assert inputs["negative_prompt_ids"].tolist() == [whole(processor, f"<bos>{sentence} <unconditional><boi>")]
    assert (inputs["height"], inputs["width"]) == (8, 12)
    assert type(inputs["height"]) is int


def test_the_default_size_is_not_said(processor):
    inputs = processor(text="red apple", generation_mode="image", height=8, width=8)
    assert inputs["input_ids"].tolist() == [processor.image_prompt_ids("red apple")]
    assert set(inputs) == {"input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask"}


def test_one_given_side_leaves_the_other_at_its_default(processor):
    inputs = processor(text="red apple", generation_mode="image", width=16)
    assert (inputs["height"], inputs["width"]) == (8, 16)


def test_image_prompts_are_padded_on_the_left_whatever_the_tokenizer_prefers():
    processor = build_processor(build_tokenizer(padding_side="right"))
    inputs = processor(text=["red apple", "a red apple on a dog face"], generation_mode="image")
    rows = [processor.image_prompt_ids("red apple"), processor.image_prompt_ids("a red apple on a dog face")]
    pads = len(rows[1]) - len(rows[0])
    assert pads > 0
    assert inputs["input_ids"].tolist() == [[0] * pads + rows[0], rows[1]]
    assert inputs["attention_mask"].tolist() == [[0] * pads + [1] * len(rows[0]), [1] * len(rows[1])]
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64


def test_a_negative_prompt_replaces_the_unconditional_text(processor):
    inputs = processor(text=["red apple", "dog"], negative_prompt="a face", generation_mode="image")
    assert inputs["negative_prompt_ids"].tolist() == [processor.image_prompt_ids("a face")] * 2


def test_negative_prompts_are_padded_apart_from_prompts(processor):
    inputs = processor(text=["red apple", "dog"], negative_prompt=["a dog face", "red"], generation_mode="image")
    long, short = processor.image_prompt_ids("a dog face"), processor.image_prompt_ids("red")
    pads = len(long) - len(short)
    assert inputs["negative_prompt_ids"].tolist() == [long, [0] * pads + short]
    assert inputs["negative_prompt_attention_mask"].tolist() == [[1] * len(long), [0] * pads + [1] * len(short)]


def test_a_tokenizer_without_bos_and_pad_makes_prompts_too():
    processor = build_processor(build_tokenizer(bos_token=None, pad_token=None))
    inputs = processor(text=["red apple", "dog"], generation_mode="image")
    assert inputs["input_ids"][0].tolist() == whole(
        processor, "red apple Generate an image based on this description.<boi>"
    )
    assert inputs["attention_mask"][1].tolist().count(0) == len(processor.encode("red apple")) - len(
        processor.encode("dog")
    )


def test_there_are_ten_instructions_and_the_first_is_used_at_inference():
    assert len(set(TEXT_TO_IMAGE_INSTRUCTIONS)) == 10
    assert TEXT_TO_IMAGE_INSTRUCTIONS[0] == " Generate an image based on this description."


def test_a_description_that_is_too_long_loses_its_end_and_keeps_the_instruction(processor):
    text = "a red apple on a dog face"
    ending = whole(processor, " Generate an image based on this description.<boi>")
    ids = processor.image_prompt_ids(text, max_length=1 + 2 + len(ending))
    assert ids == [*processor.bos_ids, *whole(processor, text)[:2], *ending]
    with pytest.raises(ValueError, match="no room for text before ' Generate an image"):
        processor.image_prompt_ids(text, max_length=1 + len(ending))


def test_reserved_tokens_of_the_base_play_the_parts(reserved):
    assert reserved.image_prompt_ids("dog") == whole(
        reserved, "<bos>dog Generate an image based on this description.<unused0>"
    )
    assert reserved.unconditional_ids() == whole(reserved, "<bos><unused2><unused0>")
    inputs = reserved(text="<image>dog", images=picture())
    assert inputs["input_ids"].tolist() == [whole(reserved, "<unused0>" + "<unused3>" * 4 + "<unused1>dog")]


# Prompts about an image


def test_caption_prompt_is_bos_image_instruction(processor):
    expected = "<bos><boi>{}<eoi>The caption of this image is:"
    assert processor.caption_ids() == whole(processor, expected.format("<image>" * 4))
    ids = processor.caption_ids([[3, 0], [31, 7]])
    placeholder = processor.image_token_id
    codes = iter([OFFSET + 3, OFFSET, OFFSET + 31, OFFSET + 7])
    assert ids == [next(codes) if index == placeholder else index for index in processor.caption_ids()]


def test_question_of_a_gemma_base_is_the_references_conversation(gemma):
    text = "<bos>" + GEMMA_QUESTION.format(image="<boi>" + "<image>" * 6 + "<eoi>", question="What is this?")
    expected = whole(gemma, text)
    assert gemma.question_ids("What is this?", height=8, width=12) == expected
    codes = [1, 2, 3, 4, 5, 6]
    start = expected.index(gemma.image_token_id)
    with_codes = expected[:start] + [OFFSET + code for code in codes] + expected[start + 6 :]
    assert gemma.question_ids("What is this?", codes=codes) == with_codes
    with pytest.raises(ValueError, match="question 0 is empty"):
        gemma.question_ids(" ")


def test_question_without_bos_token_is_tokenized_as_in_a_call():
    processor = build_processor(build_tokenizer(bos_token=None))
    ids = processor.question_ids("What?")
    assert ids == whole(processor, "user: <boi>" + "<image>" * 4 + "<eoi>\nWhat?\nassistant: ")


def test_interleaved_text_has_its_images_at_their_marks(reserved):
    ids = reserved.interleaved_ids("a <image> on<image>", [[[3, 0, 7]], [31]])
    spans = ["<unused0>" + "<unused3>" * number + "<unused1>" for number in (3, 1)]
    codes = iter([OFFSET + 3, OFFSET, OFFSET + 7, OFFSET + 31])
    expected = whole(reserved, f"<bos>a {spans[0]} on{spans[1]}")
    assert ids == [next(codes) if index == reserved.image_token_id else index for index in expected]
    with pytest.raises(ValueError, match="has 1 <image> marks for 2 images"):
        reserved.interleaved_ids("a <image>", [[1], [2]])
    with pytest.raises(ValueError, match="contains '<unused0>'"):
        reserved.interleaved_ids("<unused0> <image>", [[1]])


def test_the_first_piece_of_a_conversation_is_the_prompt_at_inference(gemma):
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a dog face"}]
    pieces = gemma.conversation_ids(messages, [[1, 2, 3, 4]])
    assert pieces == [
        (gemma.question_ids("What is this?", codes=[1, 2, 3, 4]), False),
        (whole(gemma, "a dog face<end_of_turn>\n<eos>"), True),
    ]


@pytest.mark.parametrize("bos_token", ["<bos>", None])
def test_a_conversations_first_piece_is_the_prompt_whether_or_not_there_is_a_bos(bos_token):
    processor = build_processor(build_tokenizer(bos_token=bos_token))
    messages = [{"role": "user", "content": "<image>\na dog"}, {"role": "assistant", "content": "a face"}]
    pieces = processor.conversation_ids(messages, [[1, 2, 3, 4]])
    assert pieces[0] == (processor.question_ids("a dog", codes=[1, 2, 3, 4]), False)
    assert pieces[1] == (whole(processor, "a face\n<eos>"), True)


def test_a_tokenizer_adds_its_bos_where_the_template_writes_none():
    tokenizer = build_tokenizer(adds_bos=True, chat_template=CHATML)
    processor = build_processor(tokenizer)
    messages = [{"role": "system", "content": "dog"}, {"role": "user", "content": "a"}]
    messages += [{"role": "assistant", "content": "face"}, {"role": "user", "content": "red"}]
    messages += [{"role": "assistant", "content": "apple"}]
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    asked = turn("system", "dog") + turn("user", "a") + "<|im_start|>assistant\n"
    asked_again = turn("user", "red") + "<|im_start|>assistant\n"
    assert processor.conversation_ids(messages, []) == [
        (whole(processor, "<bos>" + asked), False),
        (whole(processor, "face<|im_end|>\n"), True),
        (whole(processor, asked_again), False),
        (whole(processor, "apple<|im_end|>\n"), True),
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = (
        "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}"
        "{% else %}...{% endif %}{% endfor %}"
    )
    processor = build_processor(build_tokenizer(chat_template=template))
    messages = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "a face"}]
    assert len(processor.conversation_ids(messages, [])) == 2
    with pytest.raises(ValueError, match="writes what comes before message 3 in another way once it follows"):
        processor.conversation_ids(messages * 2, [])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"must end with one of the assistant, got the roles \[\]"),
        ([{"role": "user", "content": "Hi"}], r"got the roles \['user'\]"),
        ([{"role": "assistant", "content": "Hi"}], r"must begin with a turn of another .* \['assistant'\]"),
        ([None], "must be a string or a list of parts, got None"),
        (["<eoi>"], "contains '<eoi>'"),
        ([[{"type": "text", "text": "<image>"}]], "contains '<image>'"),
        (["<image>"], "has 1 <image> marks for 0 images"),
    ],
)
def test_bad_conversations_are_refused(processor, messages, message):
    if messages and not isinstance(messages[0], dict):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": messages[0]}]
    with pytest.raises(ValueError, match=message):
        processor.conversation_ids(messages, [])


def test_marks_become_as_many_placeholders_as_the_image_has_codes(processor):
    inputs = processor(text="<image>What is this?", images=picture(), height=4, width=12)
    assert inputs["input_ids"].tolist() == [whole(processor, "<boi><image><image><image><eoi>What is this?")]
    assert inputs["pixel_values"].shape == (1, 3, 4, 12)


def test_several_images_per_prompt_keep_reading_order_and_rows_are_padded_on_the_left():
    processor = build_processor(build_tokenizer(padding_side="right"))
    colors = ["red", "lime", "blue"]
    inputs = processor(
        text=["<image>dog", "a <image> and a <image>"], images=[picture(color, (8, 8)) for color in colors]
    )
    image = "<boi>" + "<image>" * 4 + "<eoi>"
    short, long = whole(processor, f"{image}dog"), whole(processor, f"a {image} and a {image}")
    pads = len(long) - len(short)
    assert inputs["input_ids"].tolist() == [[0] * pads + short, long]
    assert inputs["attention_mask"].tolist() == [[0] * pads + [1] * len(short), [1] * len(long)]
    assert inputs["pixel_values"].shape == (3, 3, 8, 8)
    brightest_channel = inputs["pixel_values"].mean(dim=(2, 3)).argmax(dim=1)
    assert brightest_channel.tolist() == [0, 1, 2]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_images_are_padded_to_the_frame_unless_asked_otherwise(processor):
    padded = processor(text="<image>", images=picture("white", (8, 4)))["pixel_values"]
    cropped = processor(text="<image>", images=picture("white", (8, 4)), framing="crop")["pixel_values"]
    assert cropped.min() == 1.0
    assert padded[0, :, 0, 0].tolist() == pytest.approx([value / 127.5 - 1 for value in (122, 116, 104)])


def test_plain_text_is_tokenized_as_the_tokenizer_does(processor, gemma):
    assert processor(text="red apple")["input_ids"].tolist() == [whole(processor, "red apple")]
    assert gemma(text="red apple")["input_ids"].tolist() == [whole(gemma, "<bos>red apple")]


def test_images_alone_give_pixel_values(processor):
    assert set(processor(images=picture())) == {"pixel_values"}


def test_lists_are_returned_without_return_tensors(processor):
    inputs = processor(text="red apple", generation_mode="image", return_tensors=None)
    assert inputs["input_ids"] == [processor.image_prompt_ids("red apple")]


# Chats


def test_a_chat_with_image_parts_equals_the_question_prompt(gemma):
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is this?"}]
    inputs = gemma.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert inputs["input_ids"].tolist() == [gemma.question_ids("What is this?")]
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)


def test_chat_of_a_gemma_base_closes_the_models_turn_with_eos(gemma):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rendered = gemma.apply_chat_template(messages)
    turns = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
    assert rendered == f"<bos>{turns}<eos>"
    with pytest.raises(Exception, match="Roles are user and assistant, got system"):
        gemma.apply_chat_template([{"role": "system", "content": "Hi"}])


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}\n"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_a_text_only_template_of_the_base_takes_image_parts_and_is_else_unchanged():
    tokenizer = build_tokenizer(chat_template=CHATML)
    plain = [{"role": "system", "content": "Hi"}, {"role": "user", "content": " Who? "}]
    expected = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    processor = build_processor(tokenizer)
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == expected

    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "a dog?"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert rendered == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nIs <image>\n<image>\na dog?<|im_end|>\n"
    )


def test_an_unknown_part_of_a_message_is_refused(processor):
    with pytest.raises(Exception, match="parts of type image and text, got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_batched_chats_keep_each_conversations_images(processor):
    def chat(number):
        content = [{"type": "image", "image": picture()}] * number + [{"type": "text", "text": "Well?"}]
        return [{"role": "user", "content": content}]

    inputs = processor.apply_chat_template([chat(1), chat(2)], tokenize=True, return_dict=True)
    placeholders = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
    assert placeholders.tolist() == [4, 8]
    assert inputs["pixel_values"].shape[0] == 3


# Outputs


def test_decoding_leaves_out_image_ids(processor):
    text = whole(processor, "red apple")
    row = [*text, processor.boi_token_id, OFFSET, OFFSET + CODEBOOK_SIZE - 1, processor.eoi_token_id, *text]
    assert processor.decode(row) == "red apple<boi><eoi>red apple"
    for rows in ([row, row], torch.tensor([row, row]), np.array([row, row]), [torch.tensor(row)] * 2):
        assert processor.batch_decode(rows, skip_special_tokens=True) == ["red applered apple"] * 2
        assert processor.post_process_image_text_to_text(rows) == ["red applered apple"] * 2
        assert processor.post_process_multimodal_output(rows) == ["red applered apple"] * 2


def test_reserved_tokens_are_skipped_though_the_tokenizer_calls_them_ordinary():
    tokenizer = build_tokenizer([])
    names = ["<unused0>", "<unused1>", "<unused2>", "<unused3>"]
    tokenizer.add_tokens(names)
    roles = ("image_token", "boi_token", "eoi_token", "uncond_token")
    processor = build_processor(tokenizer, **dict(zip(roles, names, strict=True)))
    ids = [*processor.caption_ids(), *processor.unconditional_ids()]
    assert processor.decode(ids, skip_special_tokens=True) == "The caption of this image is:"


def test_pictures_come_from_pixel_values(processor):
    pixel_values = torch.stack([torch.full((3, 8, 12), value) for value in (-1.0, 1.0)])
    images = processor.post_process_multimodal_output(pixel_values, generation_mode="image")
    assert [image.size for image in images] == [(12, 8)] * 2
    assert [image.getpixel((0, 0)) for image in images] == [(0, 0, 0), (255, 255, 255)]
    tensor = processor.post_process_multimodal_output(pixel_values, generation_mode="image", output_type="pt")
    assert torch.equal(tensor, (pixel_values + 1) / 2)
    with pytest.raises(ValueError, match=r"pass model\.decode_image_tokens"):
        processor.post_process_multimodal_output(torch.tensor([[OFFSET]]), generation_mode="image")
    with pytest.raises(ValueError, match="must be 'text', 'image' or 'interleaved', got 'audio'"):
        processor.post_process_multimodal_output(pixel_values, generation_mode="audio")


# Bad input


@pytest.mark.parametrize("mode", ["text", "image"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text 0 is empty"),
        (["dog", " \n"], "text 1 is empty"),
        ([], "must be a string or a list of strings, got \\[\\]"),
        (7, "must be a string or a list of strings, got 7"),
        (["dog", None], "must be a string or a list of strings"),
        ("a <boi> dog", "contains '<boi>', which is reserved for images"),
        ("a dog<eoi>", "contains '<eoi>'"),
        ("<unconditional>", "contains '<unconditional>'"),
    ],
)
def test_bad_texts_are_refused(processor, mode, text, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, generation_mode=mode)


@pytest.mark.parametrize("mode", ["text", "image"])
def test_placeholders_in_a_text_are_refused(reserved, mode):
    with pytest.raises(ValueError, match="contains '<unused3>'"):
        reserved(text="a <unused3> dog", generation_mode=mode)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image> dog"}, "has 1 <image> marks for 0 images"),
        ({"text": "<bos>dog"}, "begins with '<bos>'"),
        ({"text": "dog", "images": [PIL.Image.new("RGB", (8, 8))]}, "has 0 <image> marks for 1 images"),
        ({"text": "dog", "negative_prompt": " "}, "negative_prompt 0 is empty"),
        ({"text": "dog", "negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"text": "dog", "height": 10}, "multiples of 4 pixels .* height=10, width=8"),
        ({"text": "dog", "height": 0}, "height=0, width=8"),
        ({"text": "dog", "width": -4}, "height=8, width=-4"),
        ({"text": None}, "must be a string or a list of strings, got None"),
    ],
)
def test_bad_image_requests_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(generation_mode="image", **arguments)


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("<image> dog", 0, "has 1 <image> marks for 0 images"),
        ("dog", 1, "has 0 <image> marks for 1 images"),
        (["<image> dog", "<image>"], 3, "has 2 <image> marks for 3 images"),
    ],
)
def test_marks_and_images_must_match(processor, text, number, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[picture()] * number or None)


TEXTS = ["red", "dog face"]
COLUMNS = {
    "tuple": tuple(TEXTS),
    "array": np.array(TEXTS),
    "objects": np.array(TEXTS, dtype=object),
    "column": datasets.Dataset.from_dict({"text": TEXTS})["text"],
    "numpy-column": datasets.Dataset.from_dict({"text": TEXTS}).with_format("numpy")["text"],
}


@pytest.mark.parametrize("texts", COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_texts_is_a_list_of_them(processor, texts):
    for mode in ("text", "image"):
        expected = processor(text=TEXTS, generation_mode=mode)
        for name, value in processor(text=texts, generation_mode=mode).items():
            assert torch.equal(value, expected[name])
    assert torch.equal(
        processor(text=np.array("red"), generation_mode="image")["input_ids"],
        processor(text="red", generation_mode="image")["input_ids"],
    )


def test_a_column_of_pictures_is_a_list_of_them(processor):
    images = datasets.Dataset.from_dict(
        {"image": [picture(), picture()]}, features=datasets.Features({"image": datasets.Image()})
    )["image"]
    expected = processor(text=["<image> a", "<image> b"], images=[picture(), picture()])
    for given in (images, [[images[0]], [images[1]]], np.fromiter(images, dtype=object)):
        inputs = processor(text=["<image> a", "<image> b"], images=given)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("images", [[], [[], []], ()])
def test_lists_without_pictures_are_no_pictures(processor, images):
    assert processor(text=TEXTS, images=images).keys() == processor(text=TEXTS).keys()


@pytest.mark.parametrize("size", [np.int64(4), np.uint8(4), torch.tensor(4)])
def test_sizes_are_integers_of_any_library(processor, size):
    expected = processor(text="a dog", generation_mode="image", height=4)
    inputs = processor(text="a dog", generation_mode="image", height=size)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert {type(inputs[name]) for name in ("height", "width")} == {int}
    shown = processor(text="<image>", images=picture(), height=size)
    assert torch.equal(shown["pixel_values"], processor(text="<image>", images=picture(), height=4)["pixel_values"])


@pytest.mark.parametrize("text", ["red \ud83d apple", "\udcff", "a\udc00"])
def test_half_a_character_is_refused_wherever_a_text_goes(processor, text):
    calls = [
        lambda: processor(text=text, generation_mode="image"),
        lambda: processor(text="dog", negative_prompt=text, generation_mode="image"),
        lambda: processor(text=["dog", text]),
        lambda: processor.question_ids(text),
        lambda: processor.image_prompt_ids(text),
        lambda: processor.interleaved_ids(text, []),
        lambda: processor.conversation_ids(
            [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}], []
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="has half a character at position"):
            call()


def test_nested_images_must_match_row_by_row(processor):
    with pytest.raises(ValueError, match="Text 0 has 1 <image> marks for 2 images"):
        processor(text=["<image> a", "<image><image> b"], images=[[picture()] * 2, [picture()]])


def test_other_modes_and_a_negative_prompt_for_text_are_refused(processor):
    with pytest.raises(ValueError, match="must be 'text', 'image' or 'interleaved', got 'audio'"):
        processor(text="dog", generation_mode="audio")
    with pytest.raises(ValueError, match="text is generated without guidance"):
        processor(text="dog", negative_prompt="cat")
    with pytest.raises(ValueError, match="at least one input"):
        processor()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, 1, 32], "Code 32 at position 2 is outside of the codebook 0 ... 31"),
        (torch.tensor([[0, -1]]), "Code -1 at position 1"),
        (np.array([0.5]), "must be integers"),
        (np.zeros((1, 1, 1), dtype=int), r"got shape \(1, 1, 1\)"),
        ([], r"got shape \(0,\)"),
    ],
)
def test_codes_outside_the_codebook_are_refused(processor, codes, message):
    with pytest.raises(ValueError, match=message):
        processor.codes_to_ids(codes)


def test_a_tokenizer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must be four tokens of the tokenizer, .*'<boi>': "):
        build_processor(build_tokenizer(["<image>", "<eoi>", "<unconditional>"]))
    with pytest.raises(ValueError, match="must be four tokens of the tokenizer"):
        build_processor(boi_token="<image>")
    image_processor, tokenizer = LiquidImageProcessor(size=8, downsample_factor=4), build_tokenizer()
    with pytest.raises(ValueError, match=r"has id 300, one of the image ids 300 \.\.\. 331"):
        LiquidProcessor(image_processor, tokenizer, image_token_offset=300, codebook_size=32)


def test_check_fits_names_every_difference(processor):
    layout = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("image", "boi", "eoi", "uncond")}
    vq_config = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [32] * 3,
        "num_vq_embeddings": CODEBOOK_SIZE,
    }
    base = {"text_config": LlamaConfig(vocab_size=OFFSET + CODEBOOK_SIZE), "vq_config": vq_config, "image_size": 8}
    processor.check_fits(LiquidConfig(**base, **layout))
    other = LiquidConfig(**{**base, **layout, "image_size": 16, "eoi_token_id": 99})
    with pytest.raises(ValueError, match="eoi_token_id is 4 in the processor, 99 in the model; image_size is 8 in"):
        processor.check_fits(other)


# Saving


@pytest.mark.parametrize("name", ["processor", "gemma", "reserved"])
def test_every_argument_survives_saving(name, request, tmp_path):
    processor = request.getfixturevalue(name)
    processor.save_pretrained(tmp_path)
    loaded = LiquidProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.image_prompt_ids("a dog") == processor.image_prompt_ids("a dog")
    assert loaded.question_ids("What?", height=4) == processor.question_ids("What?", height=4)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert LiquidProcessor.from_pretrained(again).chat_template == processor.chat_template


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_a_batch_of_pictures_is_one_of_an_array(processor, images, mode):
    text = ["<image> in blue", "<image> in red"]
    given = processor(text=text, images=images, generation_mode=mode)
    expected = processor(text=text, images=list(images), generation_mode=mode)
    assert torch.equal(given["input_ids"], expected["input_ids"])
    assert torch.equal(given["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("mode", ["image", "interleaved", "text"])
@pytest.mark.parametrize("images", [[], [[]], np.zeros((0, 8, 8, 3), np.uint8)])
def test_lists_without_pictures_are_none(processor, images, mode):
    inputs = processor(text="dog", images=images, generation_mode=mode)
    assert inputs["input_ids"].tolist() == processor(text="dog", generation_mode=mode)["input_ids"].tolist()
    assert "pixel_values" not in inputs


@pytest.mark.parametrize("kind", [np.array, pd.Series, tuple])
@pytest.mark.parametrize("negatives", [["a", "b"], ["a", None], [None, ""]])
def test_negative_prompts_are_any_column(processor, kind, negatives):
    expected = processor(text=["dog"] * 2, negative_prompt=[one or "" for one in negatives], generation_mode="image")
    given = processor(text=["dog"] * 2, negative_prompt=kind(negatives), generation_mode="image")
    assert given["negative_prompt_ids"].tolist() == expected["negative_prompt_ids"].tolist()


def test_an_empty_negative_prompt_is_none(processor):
    expected = processor(text=["dog"] * 2, generation_mode="image")["negative_prompt_ids"]
    given = processor(text=["dog"] * 2, negative_prompt="", generation_mode="image")["negative_prompt_ids"]
    assert torch.equal(given, expected)
    mixed = processor.image_prompts(["dog"] * 2, ["", "red"])[1]
    assert mixed == [processor.unconditional_ids(), processor.image_prompt_ids("red")]


@pytest.mark.parametrize(
    "arguments",
    [
        {"truncation": True},
        {"max_length": 5},
        {"padding": "max_length"},
        {"padding_side": "right"},
        {"add_special_tokens": False},
        {"framing": "crop"},
        {"text_kwargs": {"truncation": True}},
        {"common_kwargs": {"truncation": True}},
        {"images_kwargs": {"framing": "crop"}},
        {"return_offsets_mapping": True},
    ],
)
def test_arguments_without_a_meaning_for_image_prompts_are_refused(processor, arguments):
    with pytest.raises(ValueError, match="has no meaning for generation_mode='image'"):
        processor(text="dog", generation_mode="image", **arguments)
    assert processor(text="dog", generation_mode="image", padding=True, truncation=None)["input_ids"].shape[0] == 1


# What a tokenizer makes of a text


def everything_made_of(processor, text):
    """All that makes ids of a text, as functions that are called without arguments."""
    codes = np.zeros((2, 2), dtype=int)
    collator = LiquidDataCollator(processor)
    part = [{"type": "image"}, {"type": "text", "text": text}]
    answer = {"role": "assistant", "content": "a face"}
    return {
        "a prompt": lambda: processor(text=text, generation_mode="image"),
        "a negative prompt": lambda: processor(text="dog", negative_prompt=text, generation_mode="image"),
        "a question": lambda: processor.question_ids(text, codes),
        "a caption": lambda: collator.encode({"kind": "caption", "codes": codes, "text": text}),
        "a text": lambda: collator.encode({"kind": "text", "text": text}),
        "an interleaved text": lambda: processor.interleaved_ids(f"{text} <image>", [codes]),
        "a message": lambda: processor.conversation_ids([{"role": "user", "content": text}, answer], []),
        "a part of a message": lambda: processor.conversation_ids([{"role": "user", "content": part}, answer], [codes]),
        "an answer": lambda: processor.conversation_ids(
            [{"role": "user", "content": "dog"}, {"role": "assistant", "content": text}], []
        ),
    }


EVERYTHING = pytest.mark.parametrize("what", list(everything_made_of(build_processor(), "dog")))


@EVERYTHING
@pytest.mark.parametrize("text", ["a dog<eos> face", "a <bos>face", "a face<eos>"])
def test_bos_and_eos_within_a_text_are_refused(processor, what, text):
    everything_made_of(processor, "dog")[what]()
    with pytest.raises(ValueError, match=r"which is no text|<eos>|<bos>"):
        everything_made_of(processor, text)[what]()


@EVERYTHING
@pytest.mark.parametrize("text", ["a <BOI> dog", "a <Eoi> dog", "a <UNCONDITIONAL> dog", "a dog<EOS>"])
def test_specials_that_a_normalizer_makes_are_refused(what, text):
    tokenizer = build_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    added = [AddedToken(token, special=True, normalized=True) for token in [*IMAGE_TOKENS, "<eos>"]]
    tokenizer.add_tokens(added, special_tokens=True)
    processor = build_processor(tokenizer)
    with pytest.raises(ValueError, match="which is no text but stands around texts and images"):
        everything_made_of(processor, text)[what]()
    if "EOS" not in text:
        with pytest.raises(ValueError, match="which is no text"):
            processor(text=text)


def test_a_token_that_was_given_the_id_of_a_code_is_refused_at_every_door(tmp_path):
    processor = build_processor()
    for number in range(OFFSET - len(processor.tokenizer)):
        processor.tokenizer.add_tokens(f"<padded{number}>")
    assert processor(text="dog <padded0>", generation_mode="image")["input_ids"].shape[0] == 1
    config = LiquidConfig(
        text_config=LlamaConfig(vocab_size=OFFSET + CODEBOOK_SIZE),
        vq_config={"num_vq_embeddings": CODEBOOK_SIZE, "block_out_channels": [8] * 3, "sample_size": 8},
        image_token_offset=OFFSET,
        **{f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("boi", "eoi", "uncond", "image")},
    )
    processor.check_fits(config)
    processor.tokenizer.add_tokens("<style>")
    doors = everything_made_of(processor, "dog <style>") | {
        "a text to write on": lambda: processor(text="dog <style>"),
        "a batch": lambda: processor(text=["dog", "dog <style>"]),
        "a save": lambda: processor.save_pretrained(tmp_path),
        "a model": lambda: processor.check_fits(config),
    }
    for what, door in doors.items():
        with pytest.raises(ValueError, match=f"'<style>' has id {OFFSET}, one of the image ids .*expand_vocabulary"):
            door()
            pytest.fail(what)
    assert not any(tmp_path.iterdir())


# Threads


def test_threads_share_a_processor(processor):
    texts = {
        "several": ["a dog", "a red apple on a dog face"],
        "one": "a red apple",
        "cut": "a red apple on a dog face",
    }
    settings = {"cut": {"truncation": True, "max_length": 3}}
    calls = {name: lambda name=name: processor(text=texts[name], **settings.get(name, {})) for name in texts}
    calls["picture"] = lambda: processor(text="a dog", generation_mode="image")
    expected = {name: call()["input_ids"].tolist() for name, call in calls.items()}
    wrong = []

    def serve(name):
        for _ in range(150):
            try:
                if calls[name]()["input_ids"].tolist() != expected[name]:
                    wrong.append(name)
            except Exception as error:
                wrong.append(f"{name}: {error}")

    threads = [threading.Thread(target=serve, args=(name,)) for name in calls for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
