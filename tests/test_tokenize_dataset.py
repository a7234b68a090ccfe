"""Data sets of pictures to data sets of codes: what is written, from which sources, and after which accidents."""

import base64
import errno
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from tiny import CODEBOOK_SIZE, tiny_codec, tiny_model, tiny_processor

from transformers_liquid import (
    LiquidDataCollator,
    LiquidForCausalLM,
    LiquidImageProcessor,
    export_base_model,
    load_taming_codec,
    save_taming_codec,
)
from transformers_liquid.codecs.vq_model import codec_identity
from transformers_liquid.data import tokenize
from transformers_liquid.data.mixture import load_records
from transformers_liquid.data.records import read_manifest
from transformers_liquid.data.tokenize import tokenize_dataset
from transformers_liquid.models.liquid.image_processing_liquid import load_image, open_image
from transformers_liquid.models.liquid.prompts import TEXT_TO_IMAGE_INSTRUCTIONS
from transformers_liquid.utils.files import alone_in
from transformers_liquid_cli import main


NUM_PICTURES = 11
FEATURES = datasets.Features(
    {
        "kind": datasets.Value("string"),
        "text": datasets.Value("string"),
        "codes": datasets.List(datasets.Value("int16")),
        "grid": datasets.List(datasets.Value("int32")),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of many sizes, each with a text; the sixth is broken, the ninth has no text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(NUM_PICTURES):
        picture(10 + index, 13, seed=index).save(folder / f"{index:02d}.png")
    (folder / "05.png").write_bytes(b"no picture")
    texts = [" " if index == 8 else f"text {index}" for index in range(NUM_PICTURES)]
    names = [f"{index:02d}.png" for index in range(NUM_PICTURES)]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def write_json(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return {"dataset": "json", "data_files": str(path)}


def rows_of(output):
    return list(datasets.load_dataset(str(output), split="train"))


@functools.lru_cache
def load_model(checkpoint):
    return LiquidForCausalLM.from_pretrained(checkpoint)


def codes_by_hand(checkpoint, image, height=8, width=8, framing="crop"):
    """With the whole model, one picture at a time."""
    model = load_model(checkpoint)
    processor = LiquidImageProcessor(size=8, downsample_factor=2)
    pixel_values = processor(image, height=height, width=width, framing=framing)["pixel_values"]
    return model.model.vq_model.encode_codes(pixel_values).flatten().tolist()


def files_of(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


# What is written


def test_codes_are_those_of_the_codec_and_broken_records_are_left_out_and_listed(checkpoint, photos, tmp_path):
    output = tmp_path / "codes"
    manifest = tokenize_dataset(
        checkpoint, output, "imagefolder", data_dir=str(photos), batch_size=3, records_per_shard=4
    )

    kept = [index for index in range(NUM_PICTURES) if index not in (5, 8)]
    rows = rows_of(output)
    assert [row["text"] for row in rows] == [f"text {index}" for index in kept]
    for index, row in zip(kept, rows, strict=True):
        assert row["codes"] == codes_by_hand(checkpoint, photos / f"{index:02d}.png")
        assert (row["kind"], row["grid"], row["width"], row["height"]) == ("text_to_image", [4, 4], 8, 8)
    assert len({tuple(row["codes"]) for row in rows}) == len(kept)

    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in skipped] == [5, 8]
    assert skipped[0]["path"] == str(photos / "05.png") and "corrupt" in skipped[0]["reason"]
    assert skipped[1]["reason"] == "Its text is empty."

    assert manifest == read_manifest(output) == json.loads((output / "liquid_codes.json").read_text())
    expected = {
        "codec": codec_identity(load_model(checkpoint).model.vq_model),
        "codebook_size": CODEBOOK_SIZE,
        "downsample_factor": 2,
        "dtype": "int16",
        "grids": [[4, 4]],
        "framing": "crop",
        "kind": "text_to_image",
        "records_per_shard": 4,
        "num_records": 9,
        "num_skipped": 2,
    }
    assert {name: manifest[name] for name in expected} == expected
    assert sorted(path.name for path in (output / "data").iterdir()) == [f"train-0000{n}.parquet" for n in range(3)]


def test_the_result_is_a_repository_of_datasets_with_explicit_features(checkpoint, photos, tmp_path):
    tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos), records_per_shard=4)
    loaded = datasets.load_dataset(str(tmp_path / "codes"))
    streamed = datasets.load_dataset(str(tmp_path / "codes"), streaming=True)
    assert list(loaded) == list(streamed) == ["train"]
    assert loaded["train"].features == streamed["train"].features == FEATURES
    assert list(loaded["train"]) == list(streamed["train"])
    batch = LiquidDataCollator(tiny_processor(), unconditional_probability=0.0)(list(loaded["train"]))
    assert batch["labels"].shape[0] == 9


def test_a_large_codebook_is_stored_in_int32(tmp_path):
    model = tiny_model(vocab_size=263 + 40_000)
    model.config.vq_config["num_vq_embeddings"] = 40_000
    model.model.vq_model = tiny_codec(num_vq_embeddings=40_000)
    model.save_pretrained(tmp_path / "model")
    write_json(tmp_path / "list.jsonl", [{"image_path": "a.png", "text": "a"}])
    picture(9, 9).save(tmp_path / "a.png")
    manifest = tokenize_dataset(tmp_path / "model", tmp_path / "codes", "json", data_files=str(tmp_path / "list.jsonl"))
    [row] = rows_of(tmp_path / "codes")
    assert manifest["dtype"] == "int32" and max(row["codes"]) > 2**15
    assert row["codes"] == codes_by_hand(tmp_path / "model", tmp_path / "a.png")


def test_pictures_go_to_the_grid_of_the_closest_proportions(checkpoint, tmp_path):
    # Between 1:1 and 2:1 the border is at the square root of 2, by factors; halfway, at 1.5, by differences.
    sizes = {(100, 100): (4, 4), (141, 100): (4, 4), (145, 100): (2, 4), (300, 90): (2, 4)}
    sizes |= {(height, width): grid[::-1] for (width, height), grid in sizes.items()}
    records = []
    for index, (width, height) in enumerate(sizes):
        picture(width, height, seed=index).save(tmp_path / f"{index}.png")
        records.append({"image": f"{index}.png", "text": f"{width} x {height}"})
    source = write_json(tmp_path / "list.jsonl", records)
    grids = [(4, 4), (2, 4), (4, 2)]
    tokenize_dataset(checkpoint, tmp_path / "codes", **source, grids=grids, batch_size=2, kind="caption")

    rows = rows_of(tmp_path / "codes")
    assert [row["text"] for row in rows] == [record["text"] for record in records]
    for index, (row, grid) in enumerate(zip(rows, sizes.values(), strict=True)):
        height, width = 2 * grid[0], 2 * grid[1]
        assert (tuple(row["grid"]), row["height"], row["width"]) == (grid, height, width)
        assert row["codes"] == codes_by_hand(checkpoint, tmp_path / f"{index}.png", height, width)
        assert row["kind"] == "caption"


def test_of_grids_that_fit_equally_the_first_is_taken(checkpoint, tmp_path):
    picture(90, 90).save(tmp_path / "a.png")
    source = write_json(tmp_path / "list.jsonl", [{"image": "a.png", "text": "a"}])
    for name, grids in {"wide": [(3, 5), (5, 3)], "tall": [(5, 3), (3, 5)]}.items():
        tokenize_dataset(checkpoint, tmp_path / name, **source, grids=grids)
        assert rows_of(tmp_path / name)[0]["grid"] == list(grids[0])


def test_pictures_are_read_as_everywhere_else_in_the_package(checkpoint, tmp_path):
    upright = picture(20, 10)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    transparent = picture(10, 10)
    transparent.putalpha(PIL.Image.new("L", (10, 10), 100))
    transparent.save(tmp_path / "transparent.png")
    picture(10, 10).save(tmp_path / "animated.gif", save_all=True, append_images=[picture(10, 10, seed=1)])
    names = ["turned.png", "transparent.png", "animated.gif", "missing.png"]
    source = write_json(tmp_path / "list.jsonl", [{"image_path": name, "caption": name} for name in names])
    tokenize_dataset(checkpoint, tmp_path / "codes", **source, framing="pad")

    rows = rows_of(tmp_path / "codes")
    assert [row["text"] for row in rows] == names[:2]
    assert rows[0]["codes"] == codes_by_hand(checkpoint, upright, framing="pad")
    on_white = load_image(tmp_path / "transparent.png")
    assert rows[1]["codes"] == codes_by_hand(checkpoint, on_white, framing="pad")
    skipped = [json.loads(line) for line in (tmp_path / "codes" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in skipped] == names[2:]
    assert "2 frames" in skipped[0]["reason"] and "No such file" in skipped[1]["reason"]


def test_the_progress_bar_counts_images_per_second(checkpoint, photos, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos))
    assert "11/11" in (shown := capfd.readouterr().err) and "images/s" in shown


# Sources


def as_json(photos, tmp_path):
    lines = map(json.loads, (photos / "metadata.jsonl").read_text().splitlines())
    return write_json(photos / "l.jsonl", [{"image_path": line["file_name"], "text": line["text"]} for line in lines])


def as_json_elsewhere(photos, tmp_path):
    """Paths are relative to `data_dir`, and so is the list."""
    lines = map(json.loads, (photos / "metadata.jsonl").read_text().splitlines())
    records = [{"picture": f"photos/{line['file_name']}", "prompt": line["text"]} for line in lines]
    (tmp_path / "lists").mkdir()
    write_json(tmp_path / "lists" / "l.jsonl", records)
    columns = {"image_column": "picture", "text_column": "prompt"}
    return {"dataset": "json", "data_dir": str(tmp_path), "data_files": ["lists/l.jsonl"], **columns}


def as_parquet(photos, tmp_path):
    lines = list(map(json.loads, (photos / "metadata.jsonl").read_text().splitlines()))
    images = [{"bytes": (photos / line["file_name"]).read_bytes(), "path": line["file_name"]} for line in lines]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {"image": images, "caption": [line["text"] for line in lines]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "photos.parquet")
    return {"dataset": "parquet", "data_files": str(tmp_path / "photos.parquet")}


def as_plain_parquet(photos, tmp_path):
    source = as_parquet(photos, tmp_path)
    table = pyarrow.parquet.read_table(source["data_files"])
    pyarrow.parquet.write_table(table, source["data_files"], compression="none")
    return source


def as_webdataset(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for line in map(json.loads, (photos / "metadata.jsonl").read_text().splitlines()):
            members = {
                line["file_name"]: (photos / line["file_name"]).read_bytes(),
                line["file_name"].replace("png", "json"): json.dumps({"caption": line["text"]}).encode(),
            }
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {"dataset": "webdataset", "data_files": str(tmp_path / "photos.tar"), "text_column": "json.caption"}


def as_folder(photos, tmp_path):
    return {"dataset": str(photos)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", [as_json, as_json_elsewhere, as_parquet, as_webdataset, as_folder])
def test_every_source_gives_the_same_rows_streamed_or_not(source, streaming, checkpoint, photos, tmp_path):
    settings = {"batch_size": 3, "records_per_shard": 4, "grids": [(4, 4), (3, 4), (4, 2)]}
    expected = tmp_path / "expected"
    tokenize_dataset(checkpoint, expected, "imagefolder", data_dir=str(photos), **settings)
    source = source(photos, tmp_path)
    manifest = tokenize_dataset(checkpoint, tmp_path / "codes", **source, streaming=streaming, **settings)
    assert rows_of(tmp_path / "codes") == rows_of(expected)
    assert manifest["num_skipped"] == 2
    shards = [len(datasets.Dataset.from_parquet(str(path))) for path in sorted(tmp_path.glob("codes/data/*"))]
    assert shards == [4, 3, 2]


# Edits


@pytest.fixture
def edits(tmp_path):
    """Pairs of pictures with what changes one into the other; of the third and the fourth one picture is missing."""
    folder = tmp_path / "edits"
    folder.mkdir()
    records = []
    for index in range(6):
        names = [f"{index}-before.png", f"{index}-after.png"]
        for seed, name in enumerate(names):
            picture(10 + index, 13, seed=10 * index + seed).save(folder / name)
        records.append({"input_image": names[0], "edit_prompt": f"in blue {index}", "edited_image": names[1]})
    records[2]["input_image"] = records[3]["edited_image"] = None
    (folder / "4-before.png").unlink()
    write_json(folder / "l.jsonl", records)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_edits_are_tokenized_to_what_the_collator_learns(streaming, checkpoint, edits, tmp_path):
    source = {"dataset": "json", "data_files": str(edits / "l.jsonl"), "streaming": streaming}
    settings = {"batch_size": 3, "records_per_shard": 4, "grids": [(4, 4), (4, 2)], "kind": "edit", "framing": "pad"}
    manifest = tokenize_dataset(checkpoint, tmp_path / "codes", **source, **settings)
    assert manifest["source"]["source_columns"] == ["input_image"] and manifest["num_skipped"] == 3
    reasons = {entry["record"]: entry["reason"] for entry in skipped_of(tmp_path / "codes")}
    assert reasons[2] == "It has no picture in 'input_image'." and reasons[3] == "It has no picture in 'edited_image'."
    assert "4-before.png" in reasons[4] and len(reasons) == 3

    records, processor = load_records(tmp_path / "codes"), tiny_processor()
    assert [record["text"] for record in records] == [f"<image> in blue {index}" for index in (0, 1, 5)]
    collator = LiquidDataCollator(processor, edit_dropout=0)
    for index, record in zip((0, 1, 5), records, strict=True):
        size = {"height": 8, "width": 2 * record["grid"][1], "framing": "pad"}
        before, after = (
            codes_by_hand(checkpoint, edits / f"{index}-{name}.png", **size) for name in ("before", "after")
        )
        assert record["kind"] == "edit" and record["codes"] == after
        assert record["images"] == [{"codes": before, "grid": record["grid"]}]
        batch = collator([record])
        images = [processor.codes_to_ids(before)]
        drawn = [*processor.codes_to_ids(after), processor.eoi_token_id, processor.tokenizer.eos_token_id]
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        prompts = [
            processor.image_prompts(record["text"], None, 8, size["width"], images=images, instruction=instruction)[0][
                0
            ]
            for instruction in TEXT_TO_IMAGE_INSTRUCTIONS
        ]
        assert ids in [[*prompt, *drawn] for prompt in prompts]
        assert labels == [-100] * (len(ids) - len(drawn)) + drawn


def test_several_sources_stand_where_the_marks_of_an_edit_say(checkpoint, edits, tmp_path):
    records = [
        {"one": "0-before.png", "two": "0-after.png", "made": "1-after.png", "how": how}
        for how in ("<image> beside <image>", "both", "<image> alone", "a <boi>", " <image> <image> ")
    ]
    source = write_json(edits / "m.jsonl", records) | {"image_column": "made", "text_column": "how"}
    settings = {"kind": "edit", "source_columns": ["one", "two"]}
    for batch_size in (1, 5):
        output = tmp_path / f"codes-{batch_size}"
        tokenize_dataset(checkpoint, output, **source, **settings, batch_size=batch_size)
        assert [row["text"] for row in rows_of(output)] == ["<image> beside <image>", "<image> <image> both"]
        sources = [codes_by_hand(checkpoint, edits / f"0-{name}.png") for name in ("before", "after")]
        for row in rows_of(output):
            assert [image["codes"] for image in row["images"]] == sources
            assert row["codes"] == codes_by_hand(checkpoint, edits / "1-after.png")
        reasons = [entry["reason"] for entry in skipped_of(output)]
        assert reasons[0] == "Its text has 1 <image> marks for 2 source pictures."
        assert "'<boi>', which is reserved" in reasons[1] and reasons[2] == "Its text is empty."


def test_edits_in_columns_of_pictures_are_read_by_the_command(checkpoint, edits, tmp_path, capsys):
    columns = {"source_img": ["1-before.png"], "target_img": ["1-after.png"], "instruction": ["in blue"]}
    images = {
        name: [{"bytes": (edits / file).read_bytes(), "path": None} for file in files] if "img" in name else files
        for name, files in columns.items()
    }
    features = {name: datasets.Image() if "img" in name else datasets.Value("string") for name in columns}
    datasets.Dataset.from_dict(images, features=datasets.Features(features)).to_parquet(tmp_path / "edits.parquet")
    options = ["--dataset", "parquet", "--data-files", str(tmp_path / "edits.parquet"), "--kind", "edit"]
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "codes")]
    assert main(["tokenize", *options, "--source-columns", "source_img", *arguments]) == 0, capsys.readouterr().err
    (row,) = rows_of(tmp_path / "codes")
    assert row["images"][0]["codes"] == codes_by_hand(checkpoint, edits / "1-before.png")
    assert row["codes"] == codes_by_hand(checkpoint, edits / "1-after.png")


def test_an_edit_whose_source_was_corrected_is_made_anew(checkpoint, edits, tmp_path):
    source = {"dataset": "json", "data_files": str(edits / "l.jsonl"), "kind": "edit"} | IN_THIS_PROCESS
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("codes/data/*")}
    picture(15, 13, seed=99).save(edits / "5-before.png")  # what lacks a picture, before it, is no reason to miss that
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    anew = [path.name for path in tmp_path.glob("codes/data/*") if path.stat().st_mtime_ns != times[path.name]]
    assert anew == ["train-00002.parquet"]
    assert rows_of(tmp_path / "codes")[-1]["images"][0]["codes"] == codes_by_hand(checkpoint, edits / "5-before.png")


# Models


def test_only_the_codec_is_read_of_either_layout(photos, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "liquid", max_shard_size="20KB")
    index = json.loads((tmp_path / "liquid" / "model.safetensors.index.json").read_text())
    files_of_codec = {file for name, file in index["weight_map"].items() if "vq_model" in name}
    without_codec = set(index["weight_map"].values()) - files_of_codec
    assert without_codec
    for file in without_codec:
        (tmp_path / "liquid" / file).unlink()
    export_base_model(model, tiny_processor(), tmp_path / "reference")
    (tmp_path / "reference" / "model.safetensors").unlink()

    source = {"dataset": "imagefolder", "data_dir": str(photos)}
    for layout in ("liquid", "reference"):
        manifest = tokenize_dataset(tmp_path / layout, tmp_path / f"codes-{layout}", **source)
        assert manifest["codec"] == codec_identity(model.model.vq_model)
    assert rows_of(tmp_path / "codes-liquid") == rows_of(tmp_path / "codes-reference")


def test_a_repository_without_a_codec_raises(photos, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "vq_model" not in name}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no codec that fits"):
        tokenize_dataset(tmp_path / "model", tmp_path / "codes", "imagefolder", data_dir=str(photos))


def test_a_codec_keeps_its_identity_through_the_format_of_taming(tmp_path):
    codec = tiny_codec(norm_num_groups=32, block_out_channels=[32, 32])
    save_taming_codec(codec, tmp_path)
    assert codec_identity(load_taming_codec(tmp_path)) == codec_identity(codec)


def test_the_identity_of_a_codec_is_that_of_its_weights_and_configuration(checkpoint):
    codec = tiny_codec()
    identity = codec_identity(codec)
    assert len(identity) == 64
    for dtype in (torch.float32, torch.bfloat16):  # of the language model; the codec stays in fp32
        loaded = LiquidForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        assert codec_identity(loaded.model.vq_model) == identity
    assert codec_identity(tiny_codec(seed=1)) != identity
    assert codec_identity(tiny_codec(act_fn="relu")) != identity
    assert codec_identity(tiny_codec(sample_size=16)) == identity
    assert codec_identity(tiny_codec(block_out_channels=(8, 8))) == identity
    with torch.no_grad():
        codec.quantize.embedding.weight[3, 2] += 1e-3
    assert codec_identity(codec) != identity


def test_manifests_are_read_from_the_hub_and_there_is_none_elsewhere(checkpoint, photos, tmp_path, monkeypatch):
    manifest = tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos))
    # A copy in the cache, as a download leaves it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "datasets--someone--codes", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "codes", repository / "snapshots" / commit)
    assert read_manifest("someone/codes") == manifest
    assert read_manifest("someone/texts") is None
    assert read_manifest(photos) is None
    assert read_manifest("json") is None
    assert read_manifest(photos / "metadata.jsonl") is None


# Accidents


def run_command(output, source, checkpoint, tmp_path, launcher=("-m",), options=()):
    """`transformers-liquid tokenize` in a process of its own."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in source.items()]
    settings = ["--batch-size=3", "--records-per-shard=2", "--grids=4x4", "--grids=4x2"]
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.Popen(
        [
            *(sys.executable, *launcher, "transformers_liquid", "tokenize", *arguments),
            *(f"--model={checkpoint}", f"--output={output}", *settings, *options),
        ],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# A regular file that cannot be read: what a broken disk says.
BAD_FILE = "/proc/self/mem"

IN_THIS_PROCESS = {"batch_size": 3, "records_per_shard": 2, "grids": [(4, 4), (4, 2)]}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_the_result_is_identical(checkpoint, photos, tmp_path):
    source = as_json(photos, tmp_path)
    # In place of the eighth picture a file that gives an error of input and output: whoever reads it tries for seconds.
    (photos / "07.png").rename(tmp_path / "kept.png")
    (photos / "07.png").symlink_to(BAD_FILE)
    output = tmp_path / "codes"
    process = run_command(output, source, checkpoint, tmp_path, options=["--allow-outside"])
    deadline = time.monotonic() + 120
    while len(list(output.glob("data/*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in output.glob("data/*.parquet")}
    assert sorted(path.name for path in finished) == [f"train-0000{n}.parquet" for n in range(3)]
    with pytest.raises(ValueError, match="is not finished"):
        read_manifest(output)
    # What a kill in the middle of a write leaves behind.
    (output / "data" / ".train-00003.parquet.unfinished").write_bytes(b"half")

    (photos / "07.png").unlink()
    (tmp_path / "kept.png").rename(photos / "07.png")
    tokenize_dataset(checkpoint, output, **source, **IN_THIS_PROCESS)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    tokenize_dataset(checkpoint, tmp_path / "whole", **source, **IN_THIS_PROCESS)
    whole, gone_on = files_of(tmp_path / "whole"), files_of(output)
    assert whole.pop("README.md") != gone_on.pop("README.md")  # their titles
    assert gone_on == whole


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint, photos, tmp_path):
    source = {"dataset": "imagefolder", "data_dir": str(photos)}
    tokenize_dataset(checkpoint, tmp_path / "one" / "codes", **source, **IN_THIS_PROCESS)
    # What `accelerate launch` starts several processes with; for CPUs alone it would ask for MPI.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    process = run_command(tmp_path / "two" / "codes", source, checkpoint, tmp_path, launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("9 pictures as codes, 2 skipped") == 1
    assert files_of(tmp_path / "two" / "codes") == files_of(tmp_path / "one" / "codes")


def test_streams_go_on_where_they_stopped(checkpoint, photos, tmp_path):
    source = as_parquet(photos, tmp_path)
    settings = IN_THIS_PROCESS | {"streaming": True}
    tokenize_dataset(checkpoint, tmp_path / "codes", **source, **settings)
    whole = files_of(tmp_path / "codes")
    for shard in (1, 4):
        (tmp_path / "codes" / "data" / f"train-0000{shard}.parquet").unlink()
    tokenize_dataset(checkpoint, tmp_path / "codes", **source, **settings)
    assert files_of(tmp_path / "codes") == whole


def test_other_settings_are_refused_and_nothing_is_changed(checkpoint, photos, tmp_path):
    source = as_json(photos, tmp_path)
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    before = files_of(tmp_path / "codes")
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    for settings, message in [
        ({"grids": [(4, 2)]}, r"grids was \[\[4, 4\]\] and is now \[\[4, 2\]\]"),
        ({"framing": "pad"}, "framing was 'crop' and is now 'pad'"),
        ({"model": tmp_path / "other"}, "codec was '.{64}' and is now '.{64}'"),
        ({"streaming": True}, "streaming was False and is now True"),
        ({"records_per_shard": 5, "kind": "caption"}, "kind was .*; records_per_shard was 1000 and is now 5"),
        ({"text_column": "image_path"}, "text_column was 'text' and is now 'image_path'"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenize_dataset(**{"model": checkpoint, "output": tmp_path / "codes", **source, **settings})
    with open(photos / "l.jsonl", "a") as file:
        file.write("\n" + json.dumps({"image_path": "00.png", "text": "one more"}))
    with pytest.raises(ValueError, match="num_records was 11 and is now 12"):
        tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert files_of(tmp_path / "codes") == before


def skipped_of(output):
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


def codes_of(output):
    return {row["text"]: row["codes"] for row in rows_of(output)}


def correct_picture(folder, tmp_path):
    picture(10, 13, seed=99).save(folder / "00.png")


def mend_picture(folder, tmp_path):
    picture(10, 13, seed=99).save(folder / "05.png")


def correct_text(folder, tmp_path):
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace("text 3", "another text"))


def correct_rows(folder, tmp_path):
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "photos.parquet"), split="train")
    table.map(lambda row: {"caption": row["caption"].upper()}).to_parquet(tmp_path / "photos.parquet")


def damage(path):
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "change", "shards"),
    [
        (as_folder, correct_picture, [0]),
        (as_folder, mend_picture, [2]),
        (as_folder, correct_text, [1]),
        (as_json, correct_picture, [0]),
        (as_json, correct_text, [1]),
        (as_parquet, correct_rows, range(6)),
        (as_folder, lambda folder, tmp_path: None, []),
    ],
)
def test_what_was_corrected_is_made_anew_and_nothing_else(
    source, change, shards, streaming, checkpoint, photos, tmp_path
):
    source = source(photos, tmp_path) | {"streaming": streaming} | IN_THIS_PROCESS
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("codes/data/*")}
    change(photos, tmp_path)
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    anew = [path.name for path in tmp_path.glob("codes/data/*") if path.stat().st_mtime_ns != times[path.name]]
    assert sorted(anew) == [f"train-{shard:05d}.parquet" for shard in shards]
    tokenize_dataset(checkpoint, tmp_path / "expected", **source)
    assert codes_of(tmp_path / "codes") == codes_of(tmp_path / "expected")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("source", "name", "number"),
    [(as_json, "photos/l.jsonl", 1), (as_plain_parquet, "photos.parquet", 6), (as_folder, "photos/metadata.jsonl", 1)],
)
def test_what_changed_without_a_trace_in_size_and_time_is_read_anew(
    source, name, number, streaming, checkpoint, photos, tmp_path
):
    source = source(photos, tmp_path) | {"streaming": streaming} | IN_THIS_PROCESS
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("codes/data/*")}
    content = (tmp_path / name).read_bytes()
    assert b"text 3" in content
    state = (tmp_path / name).stat()
    (tmp_path / name).write_bytes(content.replace(b"text 3", b"last 3"))
    os.utime(tmp_path / name, ns=(state.st_atime_ns, state.st_mtime_ns))
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert sum(path.stat().st_mtime_ns != time for path, time in times.items()) == number
    tokenize_dataset(checkpoint, tmp_path / "fresh", **source)
    for output in ("codes", "fresh"):
        assert "last 3" in codes_of(tmp_path / output) and "text 3" not in codes_of(tmp_path / output)


@pytest.mark.parametrize("source", [as_json, as_folder])
def test_a_picture_of_the_same_size_and_time_is_encoded_anew(source, checkpoint, photos, tmp_path):
    source = source(photos, tmp_path) | IN_THIS_PROCESS
    for name, seed in (("00.bmp", 0), ("other.bmp", 99)):
        picture(10, 13, seed=seed).save(tmp_path / name)
    state = (photos / "00.png").stat()

    def put(name):
        shutil.copy(tmp_path / name, photos / "00.png")
        os.utime(photos / "00.png", ns=(state.st_atime_ns, state.st_mtime_ns))

    put("00.bmp")
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    put("other.bmp")
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert codes_of(tmp_path / "codes")["text 0"] == codes_by_hand(checkpoint, picture(10, 13, seed=99))


@pytest.mark.parametrize(
    "harm",
    [
        damage,
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, 300),
        lambda path: shutil.copy(path.with_name("train-00000.parquet"), path),
        lambda path: path.unlink(),
    ],
)
def test_a_shard_that_is_not_whole_is_refused_and_made_anew(harm, checkpoint, photos, tmp_path):
    source = as_json(photos, tmp_path) | IN_THIS_PROCESS
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    whole = files_of(tmp_path / "codes")
    harm(tmp_path / "codes" / "data" / "train-00001.parquet")
    with pytest.raises(ValueError, match=r"train-00001\.parquet is missing, damaged, or none of those"):
        load_records(tmp_path / "codes")
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert files_of(tmp_path / "codes") == whole
    assert len(load_records(tmp_path / "codes")) == 9


def test_shards_of_something_else_are_refused_and_named(checkpoint, photos, tmp_path):
    source = as_json(photos, tmp_path) | IN_THIS_PROCESS
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    for name in ("train-00006.parquet", "other.parquet"):
        other = tmp_path / "codes" / "data" / name
        shutil.copy(other.with_name("train-00000.parquet"), other)
        for streaming in (False, True):
            with pytest.raises(ValueError, match=f"{name} is missing, damaged, or none"):
                load_records(tmp_path / "codes", streaming=streaming)
        with pytest.raises(ValueError, match=f"holds other shards than those of this data set.*{name}.*delete them"):
            tokenize_dataset(checkpoint, tmp_path / "codes", **source)
        other.unlink()
        tokenize_dataset(checkpoint, tmp_path / "codes", **source)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_run_and_is_named(checkpoint, photos, tmp_path, monkeypatch):
    source = as_json(photos, tmp_path) | IN_THIS_PROCESS
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: '.*codes/liquid_codes\.json'"):
        tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert tokenize_dataset(checkpoint, tmp_path / "codes", **source)["num_records"] == 9


def stay_in(folder, is_in, may_go):
    with alone_in(folder):
        is_in.set()
        may_go.wait(30)


def test_two_runs_do_not_share_a_folder(checkpoint, photos, tmp_path):
    source = as_json(photos, tmp_path)
    (tmp_path / "codes").mkdir()
    context = multiprocessing.get_context("fork")
    is_in, may_go = context.Event(), context.Event()
    process = context.Process(target=stay_in, args=(tmp_path / "codes", is_in, may_go))
    process.start()
    is_in.wait(30)
    with pytest.raises(ValueError, match=r"Another process is writing to .*codes"):
        tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    may_go.set()
    process.join()
    assert tokenize_dataset(checkpoint, tmp_path / "codes", **source)["num_records"] == 9
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == [
        "README.md",
        "data",
        "liquid_codes.json",
        "skipped.jsonl",
    ]


# What fails for a moment


def vanish(folder):
    shutil.rmtree(folder / "more")


def empty(folder):
    for path in (folder / "more").iterdir():
        path.unlink()


def link(target):
    def change(folder):
        (folder / "more" / "01.png").unlink()
        (folder / "more" / "01.png").symlink_to(target)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (vanish, "No such file or directory"),
        (empty, "No such file or directory"),
        (link(BAD_FILE), "Input/output error"),
    ],
)
def test_a_disk_or_a_network_that_fails_stops_the_run_and_nothing_is_left_out_for_ever(
    change, reason, checkpoint, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokenize, "RETRY_SECONDS", (0, 0))
    shutil.copytree(photos, photos / "more")
    (photos / "more" / "metadata.jsonl").unlink()
    shutil.copytree(photos / "more", tmp_path / "kept")
    names = ["00.png", "01.png", "02.png", "more/01.png", "more/00.png"]
    source = write_json(photos / "l.jsonl", [{"image": name, "text": name} for name in names]) | IN_THIS_PROCESS
    begin = tokenize.begin
    monkeypatch.setattr(tokenize, "begin", lambda *settings: (begin(*settings), change(photos)))
    with pytest.raises(OSError, match=rf"Record 3 cannot be read now \(.*{reason}.*Finished shards are kept"):
        tokenize_dataset(checkpoint, tmp_path / "codes", **source, allow_outside=True)
    assert [path.name for path in tmp_path.glob("codes/data/*")] == ["train-00000.parquet"]
    monkeypatch.setattr(tokenize, "begin", begin)
    shutil.rmtree(photos / "more", ignore_errors=True)
    if reason.startswith("No such file"):  # it was gone before the run as well
        tokenize_dataset(checkpoint, tmp_path / "codes", **source)
        assert [entry["record"] for entry in skipped_of(tmp_path / "codes")] == [3, 4]
    shutil.copytree(tmp_path / "kept", photos / "more")
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert [row["text"] for row in rows_of(tmp_path / "codes")] == names


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), ConnectionError("x"), TimeoutError(), MemoryError(), KeyError("x")]
)
def test_a_failure_that_passes_is_tried_again(error, checkpoint, photos, tmp_path, monkeypatch):
    failed = tmp_path / "failed"

    def fail_once(image):
        if not failed.exists():
            failed.touch()
            raise error
        return open_image(image)

    monkeypatch.setattr(tokenize, "RETRY_SECONDS", (0,))
    monkeypatch.setattr(tokenize, "open_image", fail_once)
    tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos))
    assert failed.exists() and len(rows_of(tmp_path / "codes")) == 9


def test_skipping_more_than_half_of_a_shard_warns_and_says_how_to_try_again(checkpoint, photos, tmp_path, caplog):
    source = {"dataset": "imagefolder", "data_dir": str(photos), "records_per_shard": 3}
    for name in ("06.png", "07.png"):
        (photos / name).write_bytes(b"no picture")
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert "More than half was skipped of train-00002.parquet" in caplog.text and "delete these files" in caplog.text
    caplog.clear()
    for name in ("06.png", "07.png"):
        picture(10, 13).save(photos / name)
    (tmp_path / "codes" / "data" / "train-00002.parquet").unlink()
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert not caplog.text and len(skipped_of(tmp_path / "codes")) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_no_record_names_are_listed(streaming, checkpoint, photos, tmp_path):
    lines = (photos / "metadata.jsonl").read_text().splitlines()
    (photos / "metadata.jsonl").write_text("\n".join(lines[:-2]))
    manifest = tokenize_dataset(
        checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos), streaming=streaming
    )
    reason = "No record names it."
    assert skipped_of(tmp_path / "codes")[2:] == [
        {"record": None, "path": str(photos / name), "reason": reason} for name in ("09.png", "10.png")
    ]
    assert manifest["num_skipped"] == 4


# What a record may read


def test_records_read_below_their_folder_unless_they_are_allowed_more(checkpoint, photos, tmp_path):
    private = tmp_path / "private.png"
    picture(9, 9).save(private)
    (photos / "link.png").symlink_to(private)
    (photos / "inside.png").symlink_to(photos / "00.png")
    os.mkfifo(photos / "pipe.png")
    (photos / "device.png").symlink_to("/dev/zero")
    (photos / "folder.png").mkdir()
    (photos / "loop.png").symlink_to("loop.png")
    zipfile = shutil.make_archive(str(tmp_path / "private"), "zip", tmp_path, "private.png")
    outside = ["../private.png", str(private), "link.png", "./../photos/../private.png"]
    urls = [f"file://{private}", f"local://{private}", f"filecache::file://{private}", f"zip://private.png::{zipfile}"]
    urls += ["ftp://127.0.0.1:9/x.png", "memory://x.png", "file://00.png", "HTTP://127.0.0.1/x.png"]
    never = ["pipe.png", "device.png", "folder.png", "loop.png", "00.png/x.png", "no/x.png", "a" * 300, "a\0b", ""]
    good = ["00.png", "../photos/01.png", str(photos / "02.png"), "inside.png"]
    names = [*outside, *urls, *never, *good]
    source = write_json(photos / "l.jsonl", [{"image_path": name, "text": f"{name!r}"} for name in names])
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    assert [row["text"] for row in rows_of(tmp_path / "codes")] == [repr(name) for name in good]
    reasons = {names[entry["record"]]: entry["reason"] for entry in skipped_of(tmp_path / "codes")}
    assert all("lies outside of" in reasons[name] and "allow_outside" in reasons[name] for name in [*outside, *urls])
    assert all("no regular file" in reasons[name] for name in ("pipe.png", "folder.png", ""))

    names = [*outside, urls[0], urls[3]]
    source = write_json(photos / "l.jsonl", [{"image_path": name, "text": name} for name in names])
    tokenize_dataset(checkpoint, tmp_path / "allowed", **source, allow_outside=True)
    assert [row["text"] for row in rows_of(tmp_path / "allowed")] == names


def test_large_pictures_are_decoded_one_at_a_time(checkpoint, photos, tmp_path, monkeypatch):
    running = multiprocessing.get_context("fork").Value("i", 0)

    def load(image):
        with running.get_lock():
            running.value += 1
        time.sleep(0.02)
        others = running.value - 1
        with running.get_lock():
            running.value -= 1
        if others:
            raise ValueError(f"{others} more")
        return load_image(image)

    monkeypatch.setattr(tokenize, "load_image", load)
    monkeypatch.setattr(tokenize, "LARGE_PIXELS", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos), num_workers=4)
    assert len(skipped_of(tmp_path / "codes")) == 2


def test_pictures_in_base64_are_records_too(checkpoint, photos, tmp_path):
    data = base64.b64encode((photos / "00.png").read_bytes()).decode()
    names = ["00.png", data, f"data:image/png;base64,{data}"]
    source = write_json(photos / "l.jsonl", [{"image": name, "text": str(row)} for row, name in enumerate(names)])
    tokenize_dataset(checkpoint, tmp_path / "codes", **source)
    codes = codes_of(tmp_path / "codes")
    assert codes["0"] == codes["1"] == codes["2"]


# Bad input


@pytest.mark.parametrize("token", ["<image>", "<boi>", "<eoi>", "<unconditional>"])
def test_texts_that_training_would_refuse_are_left_out(token, checkpoint, photos, tmp_path):
    lines = (photos / "metadata.jsonl").read_text().replace("text 3", f"a page with an {token} tag")
    (photos / "metadata.jsonl").write_text(lines)
    tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos))
    assert skipped_of(tmp_path / "codes")[0]["reason"] == f"Its text contains {token!r}, which is reserved for images."
    for record in load_records(tmp_path / "codes"):
        LiquidDataCollator(tiny_processor()).encode(record)


def test_a_codec_that_is_not_finite_raises_naming_the_record(photos, tmp_path):
    model = tiny_model()
    model.model.vq_model.quantize.embedding.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no codes for record 0 \(.*00\.png\)"):
        tokenize_dataset(tmp_path / "model", tmp_path / "codes", "imagefolder", data_dir=str(photos))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text_column": "words"},
            r"no column words of texts, only image \(dict\), text \(str\): name the one that holds them with text_col",
        ),
        ({"image_column": "photo"}, "no column photo of images, only image"),
        ({"text_column": "text.en"}, "no column text.en of texts, only image"),
        ({"image_column": "text", "text_column": "image"}, r"no column image of texts, only image \(dict\)"),
        ({"split": "validation"}, "cannot be read: Unknown split"),
        ({"data_dir": "nowhere"}, "cannot be read: .*nowhere"),
        ({"grids": []}, "grids must be"),
        ({"grids": [(4, 0)]}, "all positive"),
        ({"grids": [(4.5, 4)]}, "grids must be"),
        ({"grids": [(4, 4), (2, 2)]}, "different proportions"),
        ({"framing": "stretch"}, r"framing must be one of \('crop', 'pad'\), got 'stretch'"),
        ({"kind": "text"}, "kind must be one of text_to_image, caption, edit, got 'text'"),
        ({"kind": "edit"}, "no column edited_image or target_img of images, only image"),
        ({"kind": "edit", "image_column": "image"}, "no column edit_prompt or instruction of texts"),
        (
            {"kind": "edit", "image_column": "image", "text_column": "text"},
            "no column input_image or original_image or source_img of sources, .* with source_columns",
        ),
        (
            {"kind": "edit", "image_column": "image", "text_column": "text", "source_columns": "image"},
            "image is named as the source and as the result of an edit",
        ),
        ({"source_columns": ["image"]}, "source_columns are of edits, but the kind is 'text_to_image'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"data_dir": None, "data_files": ["a/x.png", "b/y.png"]}, "several folders"),
    ],
)
def test_bad_arguments_raise_and_nothing_is_written(settings, message, checkpoint, photos, tmp_path):
    arguments = {"dataset": "imagefolder", "data_dir": str(photos), **settings}
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(checkpoint, tmp_path / "codes", **arguments)
    assert not (tmp_path / "codes").exists()


def test_pictures_without_texts_raise_and_the_message_says_how_to_give_them(checkpoint, photos, tmp_path):
    (photos / "metadata.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"no column text or caption or txt of texts, only image \(dict\): .* metadata\.jsonl"
    ):
        tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder", data_dir=str(photos))


@pytest.mark.parametrize(
    ("dataset", "name", "streaming", "message"),
    [
        ("json", "broken.jsonl", False, "cannot be read: .*quotation mark"),
        ("json", "broken.jsonl", True, "cannot be read: .*quotation mark"),
        ("parquet", "empty.parquet", False, "cannot be read: .*no data"),
        ("parquet", "empty.parquet", True, "is empty"),
        ("json", "null.jsonl", False, "null.jsonl begins with `null`"),
        ("json", "missing.jsonl", False, "cannot be read: Unable to find .*missing.jsonl"),
    ],
)
def test_unreadable_and_empty_sources_raise(dataset, name, streaming, message, checkpoint, tmp_path):
    (tmp_path / "null.jsonl").write_text("null")
    (tmp_path / "broken.jsonl").write_text('{"image_path": "a.png", "te')
    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(tmp_path / "empty.parquet")
    arguments = {"dataset": dataset, "data_files": str(tmp_path / name), "streaming": streaming}
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(checkpoint, tmp_path / "codes", **arguments)
    assert not (tmp_path / "codes").exists()


def test_a_stream_that_breaks_off_raises_and_finished_shards_are_kept(checkpoint, photos, tmp_path):
    as_json(photos, tmp_path)
    (photos / "m.jsonl").write_text('{"image_path": "a.png", "te')
    files = [str(photos / "l.jsonl"), str(photos / "m.jsonl")]
    with pytest.raises(ValueError, match=r"cannot be read after record 10 .*Finished shards are kept"):
        # What a worker has read ahead of the codec is lost, here four records.
        settings = IN_THIS_PROCESS | {"streaming": True, "num_workers": 1}
        tokenize_dataset(checkpoint, tmp_path / "codes", "json", data_files=files, **settings)
    assert (tmp_path / "codes" / "data" / "train-00001.parquet").exists()


def test_a_shard_of_which_nothing_is_left_does_no_harm(checkpoint, photos, tmp_path):
    for name in ("02.png", "03.png"):
        (photos / name).write_bytes(b"no picture")
    source = {"dataset": "imagefolder", "data_dir": str(photos)}
    tokenize_dataset(checkpoint, tmp_path / "codes", **source, **IN_THIS_PROCESS)
    assert [row["text"] for row in rows_of(tmp_path / "codes")] == [f"text {n}" for n in (0, 1, 4, 6, 7, 9, 10)]
    assert len(list(tmp_path.glob("codes/data/*"))) == 6


def test_records_that_are_all_broken_raise(checkpoint, tmp_path):
    source = write_json(tmp_path / "l.jsonl", [{"image_path": f"{n}.png", "text": "a"} for n in range(3)])
    with pytest.raises(ValueError, match=r"All 3 records had to be skipped, .*No such file.*Delete"):
        tokenize_dataset(checkpoint, tmp_path / "codes", **source)


def test_a_folder_of_something_else_is_left_alone(checkpoint, photos):
    before = files_of(photos)
    with pytest.raises(ValueError, match="holds something else"):
        tokenize_dataset(checkpoint, photos, "imagefolder", data_dir=str(photos))
    assert files_of(photos) == before


def test_without_datasets_the_message_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"A data set needs datasets, .*`pip install datasets`"):
        tokenize_dataset(checkpoint, tmp_path / "codes", "imagefolder")


def test_the_command_says_in_one_line_what_is_wrong(checkpoint, photos, tmp_path, capsys):
    arguments = ["--dataset", "imagefolder", "--data-dir", str(photos), "--output", str(tmp_path / "codes")]
    for wrong, message in [
        (["--text-column=words"], "no column words"),
        (["--grids=4x4", "--grids=4"], "HEIGHTxWIDTH"),
    ]:
        assert main(["tokenize", *arguments, "--model", str(checkpoint), *wrong]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("transformers-liquid: error: ") and message in error
