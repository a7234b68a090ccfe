"""Batches carry labels exactly where the reference takes loss."""

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from transformers_liquid import LiquidDataCollator, LiquidImageProcessor, LiquidProcessor
from transformers_liquid.models.liquid.prompts import TEXT_TO_IMAGE_INSTRUCTIONS


TOKENS = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<unconditional>", "<image>"]
PAD, BOS, EOS, BOI, EOI, UNCOND, _ = range(len(TOKENS))
OFFSET = 320
CODES = [5, 0, 31, 7]
IMAGE = [OFFSET + code for code in CODES]
DRAW = {"kind": "text_to_image", "text": "red apple", "codes": CODES}
CAPTION = {"kind": "caption", "text": "red apple", "codes": CODES}
TEXT = {"kind": "text", "text": "a dog face"}
INTERLEAVED = {
    "kind": "interleaved",
    "text": "a dog<image> on <image>a face",
    "images": [{"codes": CODES}, {"codes": [1, 2, 3], "grid": [1, 3]}],
}
CONVERSATION = {
    "kind": "conversation",
    "messages": [
        {"role": "user", "content": "<image>red"},
        {"role": "assistant", "content": "apple"},
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": "face<image>"},
    ],
    "images": [{"codes": CODES}, {"codes": [1, 2, 3], "grid": [1, 3]}],
}
RECORDS = [DRAW, CAPTION, TEXT, INTERLEAVED, CONVERSATION]


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


def test_interleaved_records_learn_all_text_and_all_images(processor):
    batch = collate(processor, INTERLEAVED)
    target = [*words(processor, "a dog"), BOI, *IMAGE, EOI, *words(processor, " on ")]
    target += [BOI, OFFSET + 1, OFFSET + 2, OFFSET + 3, EOI, *words(processor, "a face"), EOS]
    assert batch["input_ids"].tolist() == [[BOS, *target]]
    assert batch["labels"].tolist() == [[-100, *target]]


def test_interleaved_records_learn_nothing_of_the_parts_that_are_given(processor):
    record = {"kind": "interleaved", "text": "a<image>b<image>", "images": [[1] * 4, [2] * 4]}
    ids, _ = LiquidDataCollator(processor).encode(record)
    ends = {0: 1, 1: ids.index(processor.boi_token_id), 2: ids.index(processor.eoi_token_id) + 1}
    ends[3] = ids.index(processor.boi_token_id, ends[2])
    for given, end in ends.items():
        found, labels = LiquidDataCollator(processor).encode(record | {"given": given})
        assert found == ids
        assert labels == [-100] * end + ids[end:]
    for given in (4, -1, "all"):
        with pytest.raises(ValueError, match=f"given={given!r} of 4 parts leave nothing to learn"):
            LiquidDataCollator(processor).encode(record | {"given": given})


def test_edits_learn_the_new_picture_alone_and_lose_text_and_pictures_at_their_rates(processor):
    source, codes = [3] * 4, [0, 1, 2, 5]
    record = {"kind": "edit", "text": "<image> in blue", "images": [source], "codes": codes}
    target = [*processor.codes_to_ids(codes), processor.eoi_token_id, processor.tokenizer.eos_token_id]
    picture = [processor.boi_token_id, *processor.codes_to_ids(source), processor.eoi_token_id]
    forms = {
        "text": [processor.tokenizer.bos_token_id, *picture, processor.boi_token_id],
        "both": processor.unconditional_ids(),
    }
    collator = LiquidDataCollator(processor, edit_dropout=0.2)
    counts = dict.fromkeys(("text", "both", "images", "none"), 0)
    for index in range(400):
        ids, labels = collator.encode(record | {"index": index})
        prompt = ids[: -len(target)]
        assert ids == prompt + target and labels == [-100] * len(prompt) + target
        form = next((name for name, form in forms.items() if form == prompt), None)
        if form is None:
            form = "none" if prompt[1 : len(picture) + 1] == picture else "images"
            with_text = [processor.tokenizer.bos_token_id, *(picture if form == "none" else [])]
            wordings = [
                processor.image_prompt_ids(" in blue" if form == "none" else "in blue", instruction=one)[1:]
                for one in TEXT_TO_IMAGE_INSTRUCTIONS
            ]
            assert prompt in [with_text + wording for wording in wordings]
        counts[form] += 1
    assert all(50 < counts[form] < 110 for form in ("text", "images", "both")), counts
    with pytest.raises(ValueError, match="at least one of 'images'"):
        collator.encode(record | {"images": [], "text": "in blue"})
    for missing in ("codes", "images", "text"):
        with pytest.raises(ValueError, match=f"needs .*{missing}"):
            collator.encode({name: value for name, value in record.items() if name != missing})
    with pytest.raises(ValueError, match=r"edit_dropout must be between 0 and a third, got 0\.5"):
        LiquidDataCollator(processor, edit_dropout=0.5)


def test_conversations_learn_the_assistants_turns_alone_images_included(processor):
    batch = collate(processor, CONVERSATION)
    pieces = [
        ([BOS, *words(processor, "user: "), BOI, *IMAGE, EOI, *words(processor, "red\nassistant: ")], False),
        ([*words(processor, "apple\n"), EOS], True),
        (words(processor, "user: a dog\nassistant: "), False),
        ([*words(processor, "face"), BOI, OFFSET + 1, OFFSET + 2, OFFSET + 3, EOI, *words(processor, "\n"), EOS], True),
    ]
    assert batch["input_ids"].tolist() == [[index for ids, _ in pieces for index in ids]]
    assert batch["labels"].tolist() == [[index if learned else -100 for ids, learned in pieces for index in ids]]


def test_images_are_given_as_codes_of_a_grid_as_rows_or_as_bare_codes(processor):
    expected = collate(processor, INTERLEAVED)["input_ids"]
    for images in (
        [[CODES[:2], CODES[2:]], [[1, 2, 3]]],
        [CODES, {"codes": [[1, 2, 3]], "grid": None}],
        [{"codes": np.array(CODES), "grid": [2, 2]}, {"codes": torch.tensor([1, 2, 3]), "grid": (1, 3)}],
    ):
        assert torch.equal(collate(processor, {**INTERLEAVED, "images": images})["input_ids"], expected)


def test_content_parts_are_the_marks_of_strings(processor):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": parts, "name": None}, *CONVERSATION["messages"][1:]]
    marked = [{"role": "user", "content": "<image>\nred"}, *CONVERSATION["messages"][1:]]
    batch = collate(processor, {**CONVERSATION, "messages": messages})
    assert torch.equal(batch["labels"], collate(processor, {**CONVERSATION, "messages": marked})["labels"])


def test_rows_of_arrow_tables_are_records(processor):
    columns = sorted({name for record in RECORDS for name in record})
    rows = datasets.Dataset.from_dict({name: [record.get(name) for record in RECORDS] for name in columns})
    assert rows[2]["codes"] is None and rows[2]["images"] is None
    assert rows[3]["images"][0]["grid"] is None
    expected, batch = collate(processor, *RECORDS), collate(processor, *rows)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_the_first_token_of_a_row_has_no_label_even_without_a_bos_token():
    processor = build_processor(bos_token=None)
    ids = [*words(processor, "a dog face"), EOS]
    batch = collate(processor, TEXT)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [[-100, *ids[1:]]]


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


def test_flat_codes_of_a_grid_are_those_in_rows(processor):
    for record, probability in ((DRAW, 0.0), (DRAW, 1.0), (CAPTION, 0.0)):
        codes = [1, 2, 3, 4, 5, 6]
        flat = {**record, "codes": codes, "grid": [2, 3]}
        expected = {**record, "codes": [codes[:3], codes[3:]]}
        batch = collate(processor, flat, unconditional_probability=probability)
        assert torch.equal(
            batch["input_ids"], collate(processor, expected, unconditional_probability=probability)["input_ids"]
        )


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        torch.tensor,
        lambda codes: np.array(codes, dtype=np.uint16),
        lambda codes: torch.tensor(codes).view(2, 2),
        lambda codes: [float(code) for code in codes],
        lambda codes: torch.tensor(codes, dtype=torch.float64),
        lambda codes: np.fromiter([np.array(codes[:2]), np.array(codes[2:])], dtype=object),
    ],
)
def test_codes_may_be_lists_arrays_and_tensors(processor, convert):
    batch = collate(processor, {**CAPTION, "codes": convert(CODES)})
    assert torch.equal(batch["input_ids"], collate(processor, CAPTION)["input_ids"])


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize("record", [DRAW, CAPTION, TEXT, INTERLEAVED, CONVERSATION], ids=lambda record: record["kind"])
def test_records_are_the_same_in_every_format_of_a_data_set(processor, record, form):
    features = None
    if "codes" in record:
        record = {**record, "codes": np.reshape(record["codes"], (2, 2)).tolist()}
        text = datasets.Value("string")
        features = {"kind": text, "text": text, "codes": datasets.Array2D((2, 2), "int32")}
        features = datasets.Features({**features, "grid": datasets.List(datasets.Value("int64"))})
        record.setdefault("grid", [2, 2])
    [row] = datasets.Dataset.from_list([record], features=features).with_format(form)
    assert LiquidDataCollator(processor).encode(row) == LiquidDataCollator(processor).encode(record)


@pytest.mark.parametrize("grid", [(2, 2), [2.0, 2.0], np.array([2, 2]), torch.tensor([2, 2])])
def test_grids_may_be_lists_arrays_and_tensors(processor, grid):
    batch = collate(processor, {**CAPTION, "grid": grid})
    assert torch.equal(batch["input_ids"], collate(processor, CAPTION)["input_ids"])


# Batches


def test_packed_records_follow_each_other_in_one_row_with_positions_of_their_own(processor):
    text, labels = LiquidDataCollator(processor).encode(TEXT)
    caption = LiquidDataCollator(processor).encode(CAPTION)
    batch = collate(processor, TEXT, CAPTION, packing=True)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].tolist() == [text + caption[0]]
    assert batch["labels"].tolist() == [labels + caption[1]]
    assert batch["position_ids"].tolist() == [[*range(len(text)), *range(len(caption[0]))]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("bos_token", ["<bos>", None])
def test_packed_and_padded_batches_have_the_same_labels(bos_token):
    processor = build_processor(bos_token=bos_token)
    padded, packed = collate(processor, *RECORDS), collate(processor, *RECORDS, packing=True)
    assert padded["labels"][padded["attention_mask"] == 1].tolist() == packed["labels"][0].tolist()
    assert (packed["labels"][packed["position_ids"] == 0] == -100).all()


@pytest.mark.parametrize("packing", [False, True])
def test_indices_are_returned_on_request(processor, packing):
    records = [{**TEXT, "index": 7}, {**DRAW, "index": 3}]
    batch = collate(processor, *records, packing=packing, return_indices=True)
    assert batch["record_indices"].tolist() == [7, 3] and batch["record_indices"].dtype == torch.int64
    assert "record_indices" not in collate(processor, *records, packing=packing)
    assert collate(processor, TEXT, return_indices=True)["record_indices"].tolist() == [-1]


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


def test_draws_depend_on_seed_epoch_and_index_whatever_the_workers(processor):
    records = [{**DRAW, "index": index} for index in range(24)]

    def epochs(batch_size, **kwargs):
        collator = LiquidDataCollator(processor, 0.4, 0.2, seed=3)
        loader = DataLoader(records, batch_size, collate_fn=collator, **kwargs)
        rows = []
        for epoch in range(3):
            collator.set_epoch(epoch)
            rows.append([ids[ids != PAD].tolist() for batch in loader for ids in batch["input_ids"]])
        return rows

    expected = epochs(24)
    assert expected[0] != expected[1] != expected[2]
    assert epochs(4) == expected
    # These workers live on from epoch to epoch, each with its own copy of the collator.
    assert epochs(6, num_workers=2, persistent_workers=True) == expected


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


def test_interleaved_records_are_cut_behind_their_last_image_only(processor):
    ids, labels = LiquidDataCollator(processor).encode(INTERLEAVED)
    end = len(ids) - ids[::-1].index(EOI)
    for length in (end, end + 1):
        batch = collate(processor, INTERLEAVED, max_length=length)
        assert batch["input_ids"].tolist() == [ids[:length]] and batch["labels"].tolist() == [labels[:length]]
    with pytest.raises(ValueError, match=f"max_length={end - 1} has no room"):
        collate(processor, INTERLEAVED, max_length=end - 1)


def test_conversations_are_cut_in_their_last_answer_behind_its_images_only(processor):
    ids, labels = LiquidDataCollator(processor).encode(CONVERSATION)
    end = len(ids) - ids[::-1].index(EOI)
    assert collate(processor, CONVERSATION, max_length=end)["labels"].tolist() == [labels[:end]]
    with pytest.raises(ValueError, match=f"max_length={end - 1} has no room"):
        collate(processor, CONVERSATION, max_length=end - 1)

    messages = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "a red face on a dog"}]
    plain = {"kind": "conversation", "messages": messages}
    ids, labels = LiquidDataCollator(processor).encode(plain)
    start = labels.index(next(label for label in labels if label != -100))
    assert collate(processor, plain, max_length=start + 1)["labels"].tolist() == [[-100] * start + [ids[start]]]
    with pytest.raises(ValueError, match=f"max_length={start} has no room"):
        collate(processor, plain, max_length=start)


@pytest.mark.parametrize("record", [DRAW, CAPTION])
def test_an_image_that_cannot_fit_is_refused(processor, record):
    with pytest.raises(ValueError, match=r"max_length=8 has no room .*an image is never cut"):
        collate(processor, record, max_length=8)


@pytest.mark.parametrize("caption_probability", [0.0, 0.5])
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["kind"])
def test_a_record_fits_if_it_does_whatever_is_drawn(processor, record, caption_probability):
    def encodes(collator, index):
        try:
            collator.encode({**record, "index": index})
        except ValueError:
            return False
        return True

    lengths = range(1, len(LiquidDataCollator(processor).encode({**record, "kind": record["kind"]})[0]) + 20)
    answers = []
    for length in lengths:
        collator = LiquidDataCollator(processor, 0.3, caption_probability, max_length=length)
        answers.append(collator.fits(record))
        assert answers[-1] == all(encodes(collator, index) for index in range(60))
    assert answers == sorted(answers) and answers[-1] and not answers[0]


def test_fits_refuses_what_is_no_record(processor):
    with pytest.raises(ValueError, match="outside of the codebook"):
        LiquidDataCollator(processor, max_length=5).fits({**CAPTION, "codes": [1, 2, 3, 32]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "picture"},
            "'kind' must be one of conversation, edit, text_to_image, caption, interleaved, text, got 'picture'",
        ),
        ({"text": " "}, "needs a 'text' that is a string and not empty, got ' '"),
        ({"text": None}, "needs a 'text' that is a string and not empty, got None"),
        ({"text": "a <boi> b"}, "contains '<boi>'"),
        ({"codes": None}, "needs 'codes'"),
        ({"codes": [1, 2, 3]}, r"shape \(3,\) are no image of 2 x 2 codes"),
        (
            {"codes": "[1, 2]"},
            "are no image of 2 x 2 codes.* Make codes of pictures with `transformers-liquid tokenize`",
        ),
        ({"codes": [1, 2, 3, 32]}, "Code 32 at position 3 is outside of the codebook 0 ... 31"),
        ({"codes": [1, -2, 3, 3]}, "Code -2 at position 1"),
    ],
)
@pytest.mark.parametrize("record", [DRAW, CAPTION])
def test_bad_records_are_refused(processor, record, change, message):
    with pytest.raises(ValueError, match=message):
        collate(processor, {**record, **change})


@pytest.mark.parametrize(("text", "number"), [("<image>", 1), (" <image> <image>", 2)])
def test_edits_without_words_become_unconditional_without_their_pictures(processor, text, number):
    record = {"kind": "edit", "text": text, "images": [CODES] * number, "codes": CODES}
    collator = LiquidDataCollator(processor, edit_dropout=1 / 3)
    prompts = [collator.encode({**record, "index": index})[0][: -len(CODES) - 2] for index in range(40)]
    assert {len(prompt) for prompt in prompts} == {3, 2 + number * (len(CODES) + 2)}
    assert processor.unconditional_ids() in prompts


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_a_batch_axis_is_no_row_unless_the_grid_says_so(processor, convert):
    codes = convert([CODES])
    with pytest.raises(ValueError, match=r"shape \(1, 4\) are as many as .* 2 x 2 codes: leave out the batch axis"):
        collate(processor, {**DRAW, "codes": codes})
    for record in ({**DRAW, "codes": codes, "grid": [1, 4]}, {**DRAW, "codes": convert([[1, 2, 3]])}):
        collate(processor, record)


@pytest.mark.parametrize("record", [DRAW, CAPTION, {**INTERLEAVED, "text": "<image>"}])
@pytest.mark.parametrize(
    ("codes", "grid", "message"),
    [
        ([1, 2, 3, 4, 5], [2, 3], r"shape \(5,\) are no image of 2 x 3 codes"),
        ([[1, 2, 3], [4, 5, 6]], [3, 2], r"shape \(2, 3\) are no image of 3 x 2 codes"),
        ([1, 2, 3, 4], [-2, -2], "no image of -2 x -2 codes"),
        ([1, 2, 3, 4], [4], "no image of 4 codes"),
        ([1, 2, 3, 4], 4, "no image of 4 codes"),
        ([1, 2, 3, 4], [2.5, 2], "no image of 2.5 x 2.0 codes"),
        ([1, 2, 3, 4], "2x2", "no image of 2x2 codes"),
        ([True] * 4, [2, 2], "codes must be integers"),
        ([float("nan")] * 4, [2, 2], "codes must be integers"),
        ([0.5] * 4, [2, 2], "codes must be integers"),
        (None, [2, 2], "needs 'codes', got None among"),
    ],
)
def test_codes_that_do_not_fill_their_grid_are_refused(processor, record, codes, grid, message):
    image = {"codes": codes, "grid": grid}
    with pytest.raises(ValueError, match=message):
        collate(processor, {**record, **image, "images": [image]})


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        (INTERLEAVED, {"images": None}, "needs 'images', got None among"),
        (INTERLEAVED, {"images": [CODES]}, "has 2 <image> marks for 1 images"),
        (INTERLEAVED, {"images": ["a.png", "b.png"]}, "are no image of 2 x 2 codes"),
        (INTERLEAVED, {"text": "a dog"}, "has 0 <image> marks for 2 images"),
        (INTERLEAVED, {"text": "<image><image><boi>"}, "contains '<boi>'"),
        (CONVERSATION, {"images": None}, "has 2 <image> marks for 0 images"),
        (CONVERSATION, {"messages": None}, "needs 'messages', got None among"),
        (CONVERSATION, {"messages": CONVERSATION["messages"][:3]}, "must end with one of the assistant"),
        (CONVERSATION, {"messages": []}, r"must end with one of the assistant, got the roles \[\]"),
    ],
)
def test_bad_interleaved_records_and_conversations_are_refused(processor, record, change, message):
    with pytest.raises(ValueError, match=message):
        collate(processor, {**record, **change})


def test_a_record_without_any_label_is_refused():
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    processor = build_processor(chat_template=template)
    messages = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": ""}]
    with pytest.raises(ValueError, match="No id of the record has a label"):
        collate(processor, {"kind": "conversation", "messages": messages})


def test_image_tokens_in_a_text_record_are_refused(processor):
    with pytest.raises(ValueError, match="contains '<eoi>'"):
        collate(processor, {"kind": "text", "text": "a <eoi>"})


def test_bad_arguments_are_refused(processor):
    with pytest.raises(ValueError, match=r"caption_probability must be between 0 and 1, got 1\.5"):
        LiquidDataCollator(processor, caption_probability=1.5)
    with pytest.raises(ValueError, match="leave out pad_to_multiple_of"):
        LiquidDataCollator(processor, packing=True, pad_to_multiple_of=8)
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
