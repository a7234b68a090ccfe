"""What this package does is what the reference does: github.com/FoundationVision/Liquid, branch main.

Each expectation is a fact recorded from the file named beside it. Nothing of the reference runs here.
"""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from test_convert_checkpoint import GEMMA_TOKENS, write_gemma_tokenizer
from tiny import IMAGE_TOKEN_OFFSET, tiny_model, tiny_processor
from transformers import AutoTokenizer, GemmaConfig

from transformers_liquid import (
    DEFAULT_IMAGE_GENERATION_CONFIG,
    LiquidConfig,
    LiquidDataCollator,
    LiquidImageProcessor,
    LiquidProcessor,
)


OFFSET = 256000
BOS, EOS, BOI, EOI, UNCOND = 2, 1, 7, 8, 9
# evaluation/inference_t2i.py, evaluation/app.py: after the prompt of every picture.
INSTRUCTION = " Generate an image based on this description."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Gemma's kind, which begins texts with bos: the reference relies on it everywhere."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_gemma_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    return AutoTokenizer.from_pretrained(directory, padding_side="left")


@pytest.fixture(scope="module")
def processor(tokenizer):
    return LiquidProcessor(LiquidImageProcessor(), tokenizer, image_token="<unused3>")


# The vocabulary


def test_layout_of_the_published_checkpoint():
    """256,000 text ids: the literal in `top_k_top_p_filtering` of evaluation/T2I_Eval/genaibench_generation.py.
    8,192 codes: --num_add_token of liquid/expand_vocabulary.py, which appends them behind all rows.
    <unused0>, <unused1>, <unused2> of Gemma become boi, eoi, unconditional: TRAIN.md; ids 7, 8:
    evaluation/VQA_Eval/model_vqa_loader.py. 1,024 codes, 32 x 32: evaluation/inference_t2i.py and
    data_process/vqgan/image_tokenizer.py.
    """
    config = LiquidConfig(text_config=GemmaConfig(vocab_size=OFFSET + 8192))
    assert config.image_token_range == range(OFFSET, OFFSET + 8192)
    assert (config.boi_token_id, config.eoi_token_id, config.uncond_token_id) == (BOI, EOI, UNCOND)
    assert config.grid() == (32, 32)
    assert config.image_layout.num_codes() == 1024
    assert config.image_size == 512


# Prompts: the reference tokenizes whole strings, and its tokenizer adds bos


def test_prompts_of_a_picture(tokenizer, processor):
    """evaluation/inference_t2i.py and evaluation/app.py: the two strings below, conditional rows first, padded on the
    left together. Padding together is the model's job here; each row on its own is the same.
    """
    inputs = processor(text=["a cat", "two red cats"], generation_mode="image")
    conditional = [f"{prompt}{INSTRUCTION}<boi>" for prompt in ("a cat", "two red cats")]
    expected = tokenizer(conditional, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected.input_ids)
    assert torch.equal(inputs["attention_mask"], expected.attention_mask)
    assert inputs["negative_prompt_ids"].tolist() == tokenizer(["<unconditional><boi>"] * 2).input_ids
    assert inputs["negative_prompt_ids"][0].tolist() == [BOS, UNCOND, BOI]


def test_prompts_of_a_sized_picture(tokenizer, processor):
    """liquid/train/train.py, DataCollatorForSupervisedDataset: the sentence stands right behind the text, before the
    instruction; without text a space and `<unconditional>` follow it. Width comes first.
    """
    sentence = "Image Size: Width is 768 Height is 512."
    inputs = processor(text="a cat", generation_mode="image", height=512, width=768)
    assert inputs["input_ids"][0].tolist() == tokenizer(f"a cat{sentence}{INSTRUCTION}<boi>").input_ids
    expected = tokenizer(f"{sentence} <unconditional><boi>").input_ids
    assert inputs["negative_prompt_ids"][0].tolist() == expected


def test_prompt_of_a_question(tokenizer, processor):
    """evaluation/inference_i2t.py, evaluation/VQA_Eval/conversation.py (`conv_gemma`): boi, codes, eoi, a line break,
    the question, in one turn of the user. The template has no bos, but `tokenizer_image_token` keeps the tokenizer's.
    """
    codes = list(range(1024))
    before, after = "<start_of_turn>user\n<boi>", "<eoi>\nwhat is this.<end_of_turn>\n<start_of_turn>model\n"
    expected = tokenizer(before).input_ids + [OFFSET + code for code in codes] + tokenizer(after).input_ids[1:]
    assert expected[0] == BOS
    assert processor.question_ids("what is this.", codes=codes) == expected


def test_conversation_of_several_turns(tokenizer, processor):
    """evaluation/VQA_Eval/conversation.py: role `model` for answers, and `<eos>` after each turn of it."""
    turns = [("user", "a cat"), ("assistant", "yes."), ("user", "why")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = (
        "<start_of_turn>user\na cat<end_of_turn>\n<start_of_turn>model\nyes.<end_of_turn>\n<eos>"
        "<start_of_turn>user\nwhy<end_of_turn>\n<start_of_turn>model\n"
    )
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == tokenizer(text).input_ids


# Training records: liquid/train/train.py, DataCollatorForSupervisedDataset


def test_labels_of_a_picture(tokenizer, processor):
    """The codes go before the last two ids of `text<boi><eoi><eos>`; everything up to boi is not predicted."""
    collator = LiquidDataCollator(processor, unconditional_probability=0.0, caption_probability=0.0)
    codes = list(range(1024))
    ids, labels = collator.encode({"kind": "text_to_image", "text": "a cat", "codes": codes})
    target = [*(OFFSET + code for code in codes), EOI, EOS]
    assert ids[-1026:] == target
    assert ids[0] == BOS and ids[-1027] == BOI
    assert labels == [-100] * (len(ids) - 1026) + target


def test_unconditional_pictures_replace_text_and_instruction(processor):
    """`<unconditional><boi><eoi><eos>`, in one of ten samples: np.random.rand() > 0.9."""
    assert LiquidDataCollator(processor).unconditional_probability == 0.1
    collator = LiquidDataCollator(processor, unconditional_probability=1.0, caption_probability=0.0)
    ids, _ = collator.encode({"kind": "text_to_image", "text": "a cat", "codes": list(range(1024))})
    assert ids[:3] == [BOS, UNCOND, BOI] and len(ids) == 3 + 1024 + 2


def test_captions_are_predicted_behind_their_picture(tokenizer, processor):
    """bos boi | codes | eoi and the instruction | caption and eos: only the last part is predicted."""
    collator = LiquidDataCollator(processor, caption_probability=1.0)
    codes = list(range(1024))
    ids, labels = collator.encode({"kind": "text_to_image", "text": "a cat", "codes": codes})
    instruction = tokenizer("<boi><eoi>The caption of this image is:").input_ids
    caption = tokenizer("a cat<eos>").input_ids[1:]
    assert ids == instruction[:2] + [OFFSET + code for code in codes] + instruction[2:] + caption
    assert labels == [-100] * (len(ids) - len(caption)) + caption


# Drawing


def test_default_settings():
    """Defaults of evaluation/inference_t2i.py, and of both scripts in evaluation/T2I_Eval."""
    expected = {"guidance_scale": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96, "do_sample": True}
    assert expected == DEFAULT_IMAGE_GENERATION_CONFIG


def reference_probabilities(conditional, unconditional, scale, temperature, top_k, top_p, offset):
    """The order of `main` in evaluation/inference_t2i.py and of `sample` and `top_k_top_p_filtering` in
    evaluation/T2I_Eval/genaibench_generation.py, over the whole vocabulary: guidance from the unconditional logits
    towards the conditional ones, temperature, no text, top-k, then the smallest set of the rest whose probability
    exceeds top-p.
    """
    logits = unconditional + (conditional - unconditional) * scale
    logits = logits / temperature
    logits[:offset] = -np.inf
    best = np.argsort(-logits)[:top_k]
    probabilities = np.exp(logits[best] - logits[best[0]])
    probabilities /= probabilities.sum()
    kept = best[: int((np.cumsum(probabilities) <= top_p).sum()) + 1]
    result = np.zeros_like(logits)
    result[kept] = np.exp(logits[kept] - logits[kept[0]])
    return result / result.sum()


@pytest.mark.parametrize(
    ("scale", "temperature", "top_k", "top_p"), [(7.0, 0.99, 12, 0.96), (1.7, 0.5, 9, 0.8), (3.0, 2.0, 16, 0.5)]
)
@torch.no_grad()
def test_codes_are_drawn_from_the_distribution_of_the_reference(scale, temperature, top_k, top_p):
    model, processor = tiny_model("gemma"), tiny_processor()
    inputs = processor(text=["a cat", "two dogs"], generation_mode="image")
    settings = {"guidance_scale": scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    output = model.generate(
        **inputs, generation_mode="image", **settings, output_scores=True, return_dict_in_generate=True
    )
    sizes = set()
    for row, prompt in enumerate(["a cat", "two dogs"]):
        for step in range(3):
            drawn = output.sequences[row, :step].tolist()
            prompts = (processor.image_prompt_ids(prompt), processor.unconditional_ids())
            logits = [model(torch.tensor([ids + drawn])).logits[0, -1].double().numpy() for ids in prompts]
            expected = reference_probabilities(*logits, scale, temperature, top_k, top_p, IMAGE_TOKEN_OFFSET)
            ours = output.scores[step][row].softmax(-1).double().numpy()
            assert ours == pytest.approx(expected[IMAGE_TOKEN_OFFSET:], abs=1e-4)
            assert ((ours > 0) == (expected[IMAGE_TOKEN_OFFSET:] > 0)).all()
            sizes.add(int((ours > 0).sum()))
    # The filters did something, and not always the same.
    assert max(sizes) < 16


def test_every_picture_has_as_many_codes_as_its_grid_and_no_eos():
    """evaluation/inference_t2i.py: `range(1024)` steps, text ids masked: an eos can neither come nor stop it."""
    model, processor = tiny_model("gemma"), tiny_processor()
    model.generation_config.eos_token_id = list(model.config.image_token_range)
    ids = model.generate(**processor(text=["a cat"], generation_mode="image"), generation_mode="image")
    assert ids.shape == (1, 16)
    assert ids.min() >= IMAGE_TOKEN_OFFSET


# Pictures


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BOX)


def as_pixel_values(image):
    """data_process/vqgan/image_tokenizer.py: x / 255 * 2 - 1."""
    return torch.from_numpy(np.asarray(image) / 255.0 * 2 - 1).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("size", [(60, 41), (41, 60), (50, 50)])
def test_pictures_of_questions_are_padded_to_a_square(size):
    """`expand2square` in evaluation/inference_i2t.py: on (122, 116, 104), centred with the odd pixel behind; then
    Lanczos to 512 x 512.
    """
    image, side = noise(*size), max(size)
    square = PIL.Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = as_pixel_values(square.resize((512, 512), PIL.Image.Resampling.LANCZOS))
    assert torch.equal(LiquidImageProcessor()(image, framing="pad")["pixel_values"], expected)


@pytest.mark.parametrize("size", [(1000, 700), (700, 1000), (640, 640)])
def test_pictures_to_learn_from_are_cropped_to_the_centre(size):
    """`center_crop_image` in data_process/convert_imagepair_cc512.py: Lanczos until the shorter side is 512, then the
    centre. (It truncates the longer side where `_vqgan_input_from` in data_process/vqgan/image_tokenizer.py and this
    package round; in the sizes here both agree.)
    """
    image, scale = noise(*size), 512 / min(size)
    resized = image.resize(tuple(round(side * scale) for side in size), PIL.Image.Resampling.LANCZOS)
    left, top = (resized.width - 512) // 2, (resized.height - 512) // 2
    expected = as_pixel_values(resized.crop((left, top, left + 512, top + 512)))
    assert torch.equal(LiquidImageProcessor()(image, framing="crop")["pixel_values"], expected)


def test_transparency_becomes_white():
    """`_whiten_transparency` in data_process/vqgan/image_tokenizer.py."""
    image = PIL.Image.new("RGBA", (512, 512), (200, 40, 0, 0))
    image.paste((200, 40, 0, 255), (0, 0, 512, 256))
    pixel_values = LiquidImageProcessor()(image)["pixel_values"]
    expected = PIL.Image.new("RGB", (512, 512), "white")
    expected.paste((200, 40, 0), (0, 0, 512, 256))
    assert torch.equal(pixel_values, as_pixel_values(expected))


def test_drawn_pictures_are_those_of_the_reference_to_one_level():
    """`_pil_from_chw_tensor` in data_process/vqgan/image_tokenizer.py: clamp, (x + 1) / 2 * 255. It truncates to 8
    bits where diffusers, and so this package, rounds.
    """
    pixel_values = torch.linspace(-1.2, 1.2, 3 * 32 * 32).view(1, 3, 32, 32)
    ours = np.asarray(LiquidImageProcessor().postprocess(pixel_values)[0]).astype(int)
    reference = ((pixel_values.clamp(-1, 1) + 1) / 2 * 255)[0].permute(1, 2, 0).numpy().astype(int)
    assert set(np.unique(ours - reference)) <= {0, 1}


def test_tiny_gemma_tokenizer_has_the_ids_of_gemma():
    """The ids above hold in the tokenizer that these tests use."""
    names = {"<eos>": EOS, "<bos>": BOS, "<boi>": BOI, "<eoi>": EOI, "<unconditional>": UNCOND}
    assert {name: GEMMA_TOKENS.index(name) for name in names} == names
