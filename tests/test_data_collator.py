"""Batches carry labels exactly where the reference takes loss."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from transformers_liquid import LiquidDataCollator, LiquidImageProcessor, LiquidProcessor
from transformers_liquid.processing_liquid import TEXT_TO_IMAGE_INSTRUCTIONS


TOKENS = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<unconditional>", "<image>"]
PAD, BOS, EOS, BOI, EOI, UNCOND, _ = range(len(TOKENS))
OFFSET = 320
CODES = [5, 0, 31, 7]
IMAGE = [OFFSET + code for code in CODES]
DRAW = {"kind": "text_to_image", "text": "red apple", "codes": CODES}
CAPTION = {"kind": "caption", "text": "red apple", "codes": CODES}
TEXT = {"kind": "text", "text": "a dog face"}


def build_processor(**kwargs):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=TOKENS, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["a red apple on a dog face"] * 4, trainer)
    kwargs = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)
    image_processor = LiquidImageProcessor(size=8, downsample_factor=4)
    return LiquidProcessor(image_processor, tokenizer, image_token_offset=OFFSET, codebook_size=32)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def words(processor, text):
    return processor.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def collate(processor, *records, unconditional_probability=0.0, **kwargs):
    collator = LiquidDataCollator(processor, unconditional_probability=unconditional_probability, **kwargs)
    return collator(records)


def prompt_of(batch, row=0):
    """Ids before the labels begin."""
    return batch["input_ids"][row][: (batch["labels"][row] != -100).int().argmax()].tolist()


# Labels


def test_drawing_learns_codes_eoi_and_eos_only(processor):
    batch = collate(processor, DRAW, unconditional_probability=1.0)
    assert batch["input_ids"].tolist() == [[BOS, UNCOND, BOI, *IMAGE, EOI, EOS]]
    assert batch["labels"].tolist() == [[-100, -100, -100, *IMAGE, EOI, EOS]]
    assert batch["attention_mask"].tolist() == [[1] * 9]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_drawing_prompts_are_the_processors_with_one_of_ten_instructions(processor):
    batch = collate(processor, *[DRAW] * 200)
    prompts = {tuple(prompt_of(batch, row)) for row in range(200)}
    assert prompts == {
        (BOS, *words(processor, "red apple" + instruction), BOI) for instruction in TEXT_TO_IMAGE_INSTRUCTIONS
    }
    kept = [row[row != -100].tolist() for row in batch["labels"]]
    assert kept == [[*IMAGE, EOI, EOS]] * 200


def test_captions_learn_caption_and_eos_only(processor):
    batch = collate(processor, CAPTION)
    prompt = [BOS, BOI, *IMAGE, EOI, *words(processor, "The caption of this image is:")]
    target = [*words(processor, "red apple"), EOS]
    assert batch["input_ids"].tolist() == [prompt + target]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + target]


def test_text_learns_all_of_itself(processor):
    batch = collate(processor, TEXT)
    target = [*words(processor, "a dog face"), EOS]
    assert batch["input_ids"].tolist() == [[BOS, *target]]
    assert batch["labels"].tolist() == [[-100, *target]]


def test_without_a_bos_token_text_learns_from_its_first_token():
    processor = build_processor(bos_token=None)
    batch = collate(processor, TEXT)
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[*words(processor, "a dog face"), EOS]]


def test_pads_are_ignored_by_position_even_where_pad_is_eos():
    processor = build_processor(pad_token="<eos>")
    batch = collate(processor, TEXT, CAPTION, pad_to_multiple_of=8)
    length = batch["input_ids"].shape[1]
    text, caption = (
        len(words(processor, "a dog face")) + 2,
        len(processor.caption_ids()) + len(words(processor, "red apple")) + 1,
    )
    assert length % 8 == 0 and length - caption < 8
    assert batch["input_ids"][0, text - 1 :].tolist() == [EOS] * (length - text + 1)
    assert batch["labels"][0, text - 1 :].tolist() == [EOS] + [-100] * (length - text)
    assert batch["attention_mask"].sum(dim=1).tolist() == [text, caption]
    assert batch["attention_mask"][0, :text].all()


def test_the_size_of_a_2d_image_is_said_if_it_is_not_the_default(processor):
    wide = {**DRAW, "codes": [[1, 2, 3]]}
    sentence = "Image Size: Width is 12 Height is 4."
    batch = collate(processor, wide, unconditional_probability=1.0)
    assert prompt_of(batch) == [BOS, *words(processor, sentence + " <unconditional>"), BOI]
    instructions = [BOS, *words(processor, "red apple" + sentence + TEXT_TO_IMAGE_INSTRUCTIONS[0]), BOI]
    assert instructions in [prompt_of(collate(processor, wide, seed=seed)) for seed in range(60)]
    square = collate(processor, {**DRAW, "codes": [CODES[:2], CODES[2:]]}, unconditional_probability=1.0)
    assert square["input_ids"].tolist() == [[BOS, UNCOND, BOI, *IMAGE, EOI, EOS]]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        torch.tensor,
        lambda codes: np.array(codes, dtype=np.uint16),
        lambda codes: torch.tensor(codes).view(2, 2),
    ],
)
def test_codes_may_be_lists_arrays_and_tensors(processor, convert):
    batch = collate(processor, {**CAPTION, "codes": convert(CODES)})
    assert torch.equal(batch["input_ids"], collate(processor, CAPTION)["input_ids"])


# Draws


def test_rates_are_kept(processor):
    number = 2000
    batch = collate(processor, *[DRAW] * number, unconditional_probability=0.1, caption_probability=0.2)
    first = batch["input_ids"][:, 1]
    captions, unconditional = (first == BOI).float().mean(), (first == UNCOND).float().mean()
    assert captions == pytest.approx(0.2, abs=0.03)
    assert unconditional == pytest.approx(0.8 * 0.1, abs=0.02)


def test_caption_probability_turns_drawings_into_captions_and_leaves_text_alone(processor):
    reversed_batch = collate(processor, DRAW, TEXT, caption_probability=1.0)
    batch = collate(processor, CAPTION, TEXT)
    assert all(torch.equal(reversed_batch[name], batch[name]) for name in batch)


def test_draws_go_on_and_are_repeated_by_the_same_seed(processor):
    collators = [LiquidDataCollator(processor, seed=seed) for seed in (1, 1, 2)]
    same, again, other = ([collator([DRAW] * 8)["input_ids"].tolist() for _ in range(3)] for collator in collators)
    assert same == again
    assert same != other
    assert same[0] != same[1]


def test_an_index_fixes_the_draws_of_a_record_whatever_its_batch(processor):
    records = [{**DRAW, "index": index} for index in range(20)]
    rows = [LiquidDataCollator(processor).encode(record) for record in records]
    collator = LiquidDataCollator(processor)
    assert [collator.encode(record) for record in reversed(records)] == rows[::-1]
    collator.set_epoch(1)
    assert [collator.encode(record) for record in records] != rows


def test_workers_draw_differently_and_repeatably(processor):
    collator = LiquidDataCollator(processor, unconditional_probability=0.5)

    def batches():
        torch.manual_seed(0)
        return [
            batch["input_ids"].tolist() for batch in DataLoader([DRAW] * 32, 16, collate_fn=collator, num_workers=2)
        ]

    first, second = batches()
    assert first != second
    assert batches() == [first, second]


# Limits


def test_long_captions_and_texts_lose_their_end_and_eos(processor):
    prompt = processor.caption_ids(CODES)
    batch = collate(processor, {**CAPTION, "text": "a dog face on a red apple"}, max_length=len(prompt) + 2)
    assert batch["input_ids"].tolist() == [prompt + words(processor, "a dog face on a red apple")[:2]]
    assert collate(processor, TEXT, max_length=2)["labels"].tolist() == [[-100, words(processor, "a dog face")[0]]]


def test_long_prompts_lose_their_end_but_no_instruction_and_no_code(processor):
    text = "a red apple " * 50
    batch = collate(processor, {**DRAW, "text": text}, max_length=100)
    assert batch["input_ids"].shape == (1, 100)
    assert batch["labels"][0, -6:].tolist() == [*IMAGE, EOI, EOS]
    prompt = processor.decode(prompt_of(batch))
    assert prompt.startswith("<bos>a red apple a red apple")
    assert prompt.endswith(tuple(instruction + "<boi>" for instruction in TEXT_TO_IMAGE_INSTRUCTIONS))


@pytest.mark.parametrize("record", [DRAW, CAPTION])
def test_an_image_that_cannot_fit_is_refused(processor, record):
    with pytest.raises(ValueError, match=r"max_length=8 has no room .* an image is never cut"):
        collate(processor, record, max_length=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "picture"}, "'kind' must be one of text_to_image, caption, text, got 'picture'"),
        ({"text": " "}, "'text' must be a string that is not empty"),
        ({"text": None}, "'text' must be a string that is not empty, got None"),
        ({"text": "a <boi> b"}, "contains '<boi>'"),
        ({"codes": None}, "needs 'codes'"),
        ({"codes": [1, 2, 3]}, r"shape \(3,\) are no image of the default size, 2 x 2 codes"),
        ({"codes": [1, 2, 3, 32]}, "Code 32 at position 3 is outside of the codebook 0 ... 31"),
        ({"codes": [1, -2, 3, 3]}, "Code -2 at position 1"),
    ],
)
@pytest.mark.parametrize("record", [DRAW, CAPTION])
def test_bad_records_are_refused(processor, record, change, message):
    with pytest.raises(ValueError, match=message):
        collate(processor, {**record, **change})


def test_image_tokens_in_a_text_record_are_refused(processor):
    with pytest.raises(ValueError, match="contains '<eoi>'"):
        collate(processor, {"kind": "text", "text": "a <eoi>"})


def test_bad_arguments_are_refused(processor):
    with pytest.raises(ValueError, match=r"caption_probability must be between 0 and 1, got 1\.5"):
        LiquidDataCollator(processor, caption_probability=1.5)
    with pytest.raises(ValueError, match="no eos token"):
        LiquidDataCollator(build_processor(eos_token=None))


def test_trainer_learns_an_image_through_the_collator(processor, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=OFFSET + 32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    records = [{**DRAW, "name": "another column"}] * 8
    model = LlamaForCausalLM(config)
    collator = LiquidDataCollator(processor, unconditional_probability=0.5)
    Trainer(model, arguments, data_collator=collator, train_dataset=records).train()
    ids = torch.tensor([[BOS, UNCOND, BOI]])
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    assert generated[0, 3:].tolist() == [*IMAGE, EOI, EOS]
