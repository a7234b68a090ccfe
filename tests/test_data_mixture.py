"""Records come from files of many forms, are mixed by weights, and come again in order after an interruption."""

import json
import os
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image
from tiny import VOCAB_SIZE, tiny_base, tiny_codec, tiny_model, tiny_pictures, tiny_processor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from transformers_liquid import LiquidDataCollator
from transformers_liquid.codecs.vq_model import codec_identity
from transformers_liquid.data.mixture import drop_too_long, load_records, mix_records
from transformers_liquid.data.tokenize import tokenize_dataset
from transformers_liquid.models.liquid.image_processing_liquid import LiquidImageProcessor


CODES = list(range(16))
IMAGE = {"codes": [5, 6], "grid": [1, 2]}
MESSAGES = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "A dog."}]
RECORDS = {
    "text": {"text": "a dog"},
    "text_to_image": {"text": "sun", "codes": CODES, "grid": [4, 4]},
    "interleaved": {"text": "see <image> here", "images": [IMAGE]},
    "conversation": {"messages": MESSAGES, "images": [IMAGE]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def sources(write):
    """A source of each kind, of different lengths; each record has a text or a code of its own."""
    texts = [{"text": f"text {number}"} for number in range(7)]
    drawings = [{"text": f"drawing {number}", "codes": CODES, "grid": [4, 4]} for number in range(5)]
    images = [{"text": f"<image>{number}", "images": [IMAGE]} for number in range(3)]
    return [write("texts.jsonl", texts), write("drawings.jsonl", drawings), write("images.jsonl", images)]


def present(record):
    return {name: value for name, value in record.items() if value is not None}


def collator(**kwargs):
    return LiquidDataCollator(tiny_processor(), **kwargs)


def take(mixture, number):
    return [record for record, _ in zip(mixture, range(number), strict=False)]


def text_records(number, name="text"):
    return datasets.Dataset.from_list([{"kind": "text", "text": f"{name} {row}"} for row in range(number)])


# Loading


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", RECORDS)
def test_the_kind_follows_from_the_columns_of_a_file(write, kind, streaming):
    path = write("records.jsonl", [{**RECORDS[kind], "id": 7, "url": "https://example.com/a.html", "score": 0.5}] * 2)
    records = list(load_records(path, streaming=streaming))
    assert records == [{"kind": kind, **RECORDS[kind]}] * 2
    assert collator().encode(records[0]) == collator().encode({"kind": kind, **RECORDS[kind]})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_kinds_decides(write, streaming):
    caption = {**RECORDS["text_to_image"], "kind": "caption"}
    text = {"kind": "text", "text": "a dog"}
    records = list(load_records(write("records.jsonl", [caption, text]), streaming=streaming))
    assert [present(record) for record in records] == [caption, text]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_saved_data_sets_are_read(tmp_path, streaming):
    dataset = datasets.Dataset.from_list([RECORDS["text_to_image"]] * 3)
    dataset.to_parquet(str(tmp_path / "records.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(validation=dataset).save_to_disk(str(tmp_path / "splits"))
    expected = [{"kind": "text_to_image", **RECORDS["text_to_image"]}] * 3
    assert list(load_records(tmp_path / "records.parquet", streaming=streaming)) == expected
    assert list(load_records(tmp_path / "saved", streaming=streaming)) == expected
    assert list(load_records(str(tmp_path / "splits"), split="validation", streaming=streaming)) == expected


@pytest.fixture
def codes_folder(tmp_path):
    """What `tokenize_dataset` writes of three pictures, and the model that it was made with."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    lines = []
    for number, picture in enumerate(LiquidImageProcessor(size=8, downsample_factor=2).postprocess(tiny_pictures(3))):
        picture.save(tmp_path / "pictures" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    tokenize_dataset(tmp_path / "model", tmp_path / "codes", str(tmp_path / "pictures"), num_workers=1)
    return model, tmp_path / "codes"


def test_codes_are_taken_from_the_models_own_codec_alone(codes_folder):
    model, folder = codes_folder
    expected = model.model.vq_model.encode_codes(torch.round((tiny_pictures(3) + 1) * 127.5) / 127.5 - 1).flatten(1)
    for streaming in (False, True):
        dataset = load_records(folder, streaming=streaming, codec_identity=codec_identity(model.model.vq_model))
        records = list(dataset)
        assert [record["text"] for record in records] == [f"picture {number}" for number in range(3)]
        assert [record["codes"] for record in records] == expected.tolist()
        assert all(record["grid"] == [4, 4] and record["kind"] == "text_to_image" for record in records)
        with pytest.raises(ValueError, match="made with another codec than the model's"):
            load_records(folder, streaming=streaming, codec_identity=codec_identity(tiny_codec(seed=1)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("part", ["data", "data/train-00000.parquet"])
def test_parts_of_a_data_set_of_codes_are_refused(codes_folder, part, streaming):
    folder = codes_folder[1]
    with pytest.raises(ValueError, match=f"is a part of a data set of codes: give the whole, '{folder}'"):
        load_records(folder / part, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_another_data_set_are_refused(codes_folder, streaming):
    rows = datasets.Dataset.from_list([RECORDS["text_to_image"]] * 3)
    rows.to_parquet(codes_folder[1] / "data" / "train-00000.parquet")
    with pytest.raises(ValueError, match=r"train-00000\.parquet is missing, damaged, or none of those"):
        load_records(codes_folder[1], streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"caption": "a dog", "picture": 3}\n', "its columns are caption, picture, but it needs messages"),
        ("a.jsonl", '{"codes": [1, 2]}\n', "its columns are codes"),
        ("a.jsonl", "", "cannot be read|is empty"),
        ("a.jsonl", "{not json", "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.txt", "a dog", r"files of records end in \.json, \.jsonl, \.parquet"),
    ],
)
def test_what_holds_no_records_is_refused(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / name, streaming=streaming)


def test_missing_and_empty_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_records(tmp_path / "nowhere")
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match=r"cannot be read: .* no data"):
        load_records(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty.parquet' cannot be read: split 'train' is empty"):
        load_records(tmp_path / "empty.parquet", streaming=True)


def test_data_sets_are_known_by_their_content_not_by_their_names(tmp_path):
    """`datasets` knows a folder by its name and its card alone."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/*.jsonl\n---\n"
    for text in ("red", "blue", "gold"):
        for folder in (tmp_path / text / "codes", tmp_path / "again" / "codes"):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(card)
            before = (folder / "data" / "a.jsonl").stat() if (folder / "data" / "a.jsonl").exists() else None
            (folder / "data" / "a.jsonl").write_text(json.dumps({"text": text}))
            if before is not None:  # as `cp -p` and archives do it
                os.utime(folder / "data" / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
            for streaming in (False, True):
                for path in (folder, folder / "data" / "a.jsonl"):
                    records = load_records(path, streaming=streaming)
                    assert [record["text"] for record in records] == [text]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{oops", "Missing a name for object member"),
        ('{"text": "a"}\n{oops', "Missing a name for object member. in row 1"),
        ('{"text": "a \\ud83d"}', "surrogate pair"),
        ("null\n", "begins with `null`, which is no record"),
        (' \n null,{"text": "a"}', "begins with `null`, which is no record"),
    ],
)
def test_why_a_file_cannot_be_read_is_said_and_which_one(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl' cannot be read: .*{reason}"):
        load_records(tmp_path / "a.jsonl")


def test_a_byte_order_mark_is_no_part_of_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert list(load_records(tmp_path / "a.jsonl")) == [{"text": "a", "kind": "text"}]


def test_a_record_that_cannot_be_used_is_named_by_its_number(write):
    path = write("a.jsonl", [RECORDS["text_to_image"], {**RECORDS["text_to_image"], "text": "an <image> tag"}])
    with pytest.raises(ValueError, match=r"Record 1 of the data set cannot be used: .*reserved for images"):
        drop_too_long(load_records(path), collator(max_length=80))


# Leaving out


def test_records_that_cannot_fit_are_left_out_and_counted(write, caplog):
    long = {"text": "sun", "codes": [1] * 80, "grid": [8, 10]}
    path = write("records.jsonl", [RECORDS["text_to_image"], long, RECORDS["text_to_image"], long])
    expected = [{"kind": "text_to_image", **RECORDS["text_to_image"]}] * 2
    kept = drop_too_long(load_records(path), collator(max_length=80))
    assert list(kept) == expected
    assert "2 of 4 records do not fit into 80 tokens" in caplog.text
    caplog.clear()
    stream = drop_too_long(load_records(path, streaming=True), collator(max_length=80))
    assert list(stream) == expected
    assert "1 records so far" in caplog.text and "2 records so far" in caplog.text
    assert len(drop_too_long(load_records(path), collator(max_length=20))) == 0


def test_another_length_is_not_answered_from_the_cache(write):
    path = write("records.jsonl", [RECORDS["text_to_image"]] * 2)
    assert len(drop_too_long(load_records(path), collator(max_length=80))) == 2
    assert len(drop_too_long(load_records(path), collator(max_length=20))) == 0


# Mixing


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_keeps_each_records_own_columns(sources, streaming):
    loaded = [load_records(path, streaming=streaming) for path in sources]
    originals = [{"kind": record["kind"], **record} for source in loaded for record in source]
    seen = take(mix_records(loaded, buffer_size=4), 60)
    assert [record["index"] for record in seen] == list(range(len(seen)))
    seen = [{name: value for name, value in present(record).items() if name != "index"} for record in seen]
    assert all(record in originals for record in seen)
    assert all(record in seen for record in originals)
    for record in seen:
        collator().encode(record)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weights", [[70, 20, 10], [0.7, 0.2, 0.1]])
def test_records_are_drawn_by_weight(weights, streaming):
    parts = [text_records(number, name) for number, name in ((1500, "a"), (40, "b"), (3, "c"))]
    parts = [part.to_iterable_dataset() if streaming else part for part in parts]
    counts = Counter(record["text"][0] for record in take(mix_records(parts, weights, buffer_size=10), 2000))
    for name, rate in zip("abc", (0.7, 0.2, 0.1), strict=True):
        assert counts[name] / 2000 == pytest.approx(rate, abs=0.035)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_all_sources_are_drawn_alike_and_of_weight_zero_none(streaming):
    parts = [text_records(number, name) for number, name in ((900, "a"), (10, "b"), (10, "c"))]
    parts = [part.to_iterable_dataset() if streaming else part for part in parts]
    counts = Counter(record["text"][0] for record in take(mix_records(parts, buffer_size=10), 1500))
    assert all(count / 1500 == pytest.approx(1 / 3, abs=0.05) for count in counts.values())
    counts = Counter(record["text"][0] for record in take(mix_records(parts, [1, 0, 1], buffer_size=10), 100))
    assert set(counts) == {"a", "c"}


def test_a_mixture_ends_when_each_source_was_seen_whole():
    texts = [record["text"] for record in mix_records([text_records(50, "a"), text_records(10, "b")], [3, 1])]
    assert {f"a {row}" for row in range(50)} | {f"b {row}" for row in range(10)} == set(texts)
    assert Counter(texts)[texts[-1]] == 1
    alone = [record["text"] for record in mix_records([text_records(50)])]
    assert sorted(alone) == sorted(text_records(50)["text"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_seed_gives_one_shuffled_order(streaming):
    def order(seed):
        parts = [text_records(30, "a"), text_records(30, "b")]
        parts = [part.to_iterable_dataset() if streaming else part for part in parts]
        mixture = mix_records(parts, seed=seed)
        first = [record["text"] for record in take(mixture, 60)]
        assert [record["text"] for record in take(mixture, 60)] == first
        return first

    assert order(0) == order(0)
    assert order(0) != order(1)
    of_one = [text for text in order(0) if text.startswith("a")]
    assert of_one != sorted(of_one, key=lambda text: int(text[2:]))


def test_a_stream_goes_on_in_another_order_when_its_sources_end():
    texts = [
        record["text"] for record in take(mix_records([text_records(20).to_iterable_dataset()], buffer_size=5), 60)
    ]
    passes = [texts[:20], texts[20:40], texts[40:]]
    assert passes[0] != passes[1] != passes[2]
    assert min(Counter(texts).values()) >= 2


def test_a_mixture_has_the_places_of_a_list():
    mixture = mix_records([text_records(4)])
    assert mixture[-1] == mixture[3] and mixture[3]["index"] == 3
    with pytest.raises(IndexError):
        mixture[4]
    rows = [record for batch in DataLoader(mixture, 2, collate_fn=list, num_workers=1) for record in batch]
    assert rows == list(mixture)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"one for each of the 2 data sets, .* got \[1.0\]"),
        ([1, -1], r"must not be negative, and one must be positive, got \[1.0, -1.0\]"),
        ([0, 0], "must not be negative, and one must be positive"),
        ([float("nan"), 1], "must not be negative"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        mix_records([text_records(2), text_records(2)], weights)


def test_bad_mixtures_are_refused(write):
    with pytest.raises(ValueError, match="at least one"):
        mix_records([])
    with pytest.raises(ValueError, match=r"or of streams .* got lengths \[2, None\]"):
        mix_records([text_records(2), text_records(2).to_iterable_dataset()])
    with pytest.raises(ValueError, match=r"data sets that have records, .* got lengths \[2, 0\]"):
        mix_records([text_records(2), text_records(0)])
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}]
    sources = [write(f"{row}.jsonl", [{"messages": messages}]) for row, messages in enumerate((MESSAGES, parts))]
    with pytest.raises(ValueError, match="messages"):
        mix_records([load_records(source, streaming=True) for source in sources])


# Training


class RecordingTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, *args):
        self.seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args)


class Epochs(TrainerCallback):
    """Tells the collator, and breaks off after a step."""

    def __init__(self, collator, last_step):
        self.collator, self.last_step = collator, last_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last_step:
            raise KeyboardInterrupt


def train(mixture, folder, last_step=None, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=11,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=4,
        remove_unused_columns=False,
        use_cpu=True,
        accelerator_config={"dispatch_batches": False},
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    draws = collator(unconditional_probability=0.5, caption_probability=0.3)
    callbacks = [Epochs(draws, last_step)]
    torch.manual_seed(0)
    trainer = RecordingTrainer(tiny_base(), arguments, data_collator=draws, train_dataset=mixture, callbacks=callbacks)
    try:
        trainer.train(**kwargs)
    except KeyboardInterrupt:
        assert last_step is not None
    return trainer


@pytest.mark.parametrize("last_step", [5, 9])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_was_broken_off_sees_the_same_batches_and_ends_at_the_same_weights(
    sources, tmp_path, streaming, last_step
):
    def mixture():
        return mix_records([load_records(path, streaming=streaming) for path in sources], [2, 2, 1], buffer_size=4)

    if not streaming:
        # The first checkpoint is within the first epoch, the second one within the second.
        assert 4 < len(mixture()) / 4 < 8
    whole = train(mixture(), tmp_path / "whole")
    train(mixture(), tmp_path / "parts", last_step=last_step)
    rest = train(mixture(), tmp_path / "parts", resume_from_checkpoint=True)
    assert len(whole.seen) == 11 * 2
    assert rest.seen == whole.seen[last_step // 4 * 4 * 2 :]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, rest.model.state_dict()[name]), name
    assert not torch.equal(whole.model.get_input_embeddings().weight, tiny_base().get_input_embeddings().weight)
    assert whole.model.get_input_embeddings().num_embeddings == VOCAB_SIZE


PICTURES = {
    "a column of pictures": lambda folder: datasets.Dataset.from_dict(
        {"text": ["a dog"], "picture": [Image.new("RGB", (8, 8))]}
    ).to_parquet(folder / "data.parquet"),
    "bytes without a type": lambda folder: datasets.Dataset.from_dict(
        {"text": ["a dog"], "picture": [{"bytes": b"...", "path": None}]}
    ).to_parquet(folder / "data.parquet"),
    "several in each": lambda folder: datasets.Dataset.from_dict(
        {"text": ["a dog"], "pictures": [["a.png", "b.png"]]}
    ).to_json(folder / "data.jsonl"),
    "names of files": lambda folder: (folder / "data.jsonl").write_text('{"file_name": "a.JPG", "text": "a dog"}\n'),
    "addresses": lambda folder: (folder / "data.jsonl").write_text('{"url": "https://a.b/c.webp", "text": "a dog"}\n'),
    "bytes alone": lambda folder: datasets.Dataset.from_dict({"text": ["a dog"], "other": [b"..."]}).to_parquet(
        folder / "data.parquet"
    ),
    "dicts with a path": lambda folder: (folder / "data.jsonl").write_text('{"text": "a", "other": {"path": "b"}}\n'),
    **{
        f"a column {name}": lambda folder, name=name: (folder / "data.jsonl").write_text(
            json.dumps({"text": "a dog", name: "17"}) + "\n"
        )
        for name in ("image", "image_id", "img", "file_name", "pixel_values", "vq_codes", "image_path")
    },
    "texts beside pictures": lambda folder: (folder / "a.txt").write_text("a dog\n"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", PICTURES.values(), ids=PICTURES)
def test_captions_of_pictures_are_not_taken_for_texts(tmp_path, write, streaming):
    if write is PICTURES["texts beside pictures"]:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        (tmp_path / "b.txt").write_text("a cat\n")
    write(tmp_path)
    with pytest.raises(ValueError, match=r"holds pictures, and no codes of them.*: make these with `.* tokenize`"):
        load_records(tmp_path, streaming=streaming)


def test_texts_that_speak_of_pictures_stay_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "photo.png", "source": "wikipedia"}\n')
    assert load_records(tmp_path / "a.jsonl")[0] == {"text": "photo.png", "kind": "text"}
    (tmp_path / "b.jsonl").write_text('{"text": "a dog", "kind": "text", "file_name": "a.png"}\n')
    assert load_records(tmp_path / "b.jsonl")[0] == {"text": "a dog", "kind": "text"}
