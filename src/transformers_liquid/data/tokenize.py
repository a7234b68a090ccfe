"""Pictures with texts to a data set of codes: the codec runs once, training reads its codes as often as it likes.

`tokenize_dataset` is the whole of it, step by step: plan, read, encode, write.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..codecs.vq_model import LiquidVQModel, codec_identity
from ..models.liquid.configuration_liquid import LiquidConfig
from ..models.liquid.image_processing_liquid import LiquidImageProcessor, load_image
from ..models.liquid.reference import ReferenceCheckpoint
from ..utils.files import differences, read_json, whole, write_json, write_text
from ..utils.processes import launched_processes
from .records import IMAGE_KINDS, MANIFEST_NAME, check_datasets_installed


SKIPPED_NAME = "skipped.jsonl"

# Where pictures and texts are looked for, in this order.
IMAGE_COLUMNS = ("image", "image_path")
TEXT_COLUMNS = ("text", "caption", "txt")

# A finished shard lists what it left out in its file's own metadata, so that one rename finishes both.
SKIPPED_KEY = b"liquid_skipped"


def tokenize_dataset(
    model: str | os.PathLike,
    output: str | os.PathLike,
    dataset: str,
    *,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | None = None,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    text_column: str | None = None,
    grids: Sequence[tuple[int, int]] | None = None,
    framing: str = "crop",
    kind: str = "text_to_image",
    batch_size: int = 16,
    num_workers: int = 8,
    records_per_shard: int = 1000,
) -> dict[str, Any]:
    r"""Writes the codes of pictures as a `datasets` repository: records for [`LiquidDataCollator`].

    `data/train-*.parquet` has the fields `kind`, `text`, `codes` (raw codes row by row, int16 or int32), `grid`
    (`[height, width]`), `width` and `height` (pixels, as encoded). `liquid_codes.json` says with which codec and
    settings they were made, `skipped.jsonl` which records were left out and why: pictures that [`load_image`] refuses,
    missing files, empty texts.

    Under `accelerate launch`, process k of n does the shards k, k + n, ...; the result does not depend on n. After an
    interruption, the same call does what is missing.

    Args:
        model (`str` or `os.PathLike`): A Liquid repository in either layout. Only its codec is loaded, in fp32.
        output (`str` or `os.PathLike`): A new folder, or that of an interrupted call.
        dataset (`str`): What `datasets.load_dataset` takes: a builder (`"imagefolder"`, `"json"`, `"parquet"`,
            `"webdataset"`), a folder, or a name on the Hub.
        dataset_config_name, data_dir, data_files, split, streaming: As `name` and so on in `load_dataset`.
        image_column (`str`, *optional*): Holds pictures, their bytes, or paths; these are relative to `data_dir`, else
            to the folder of `data_files`, else to the folder `dataset`. Defaults to `image` or `image_path`, else to a
            column of type `datasets.Image`.
        text_column (`str`, *optional*): Holds the texts; `json.caption` is the field `caption` of a column `json`.
            Defaults to `text`, `caption` or `txt`.
        grids (list of `(height, width)` in codes, *optional*): A picture takes the one whose proportions are closest to its
            own. Defaults to the model's square.
        framing (`str`, defaults to `"crop"`): `"crop"` or `"pad"`, as in [`LiquidImageProcessor`].
        kind (`str`, defaults to `"text_to_image"`): Of the records: that, or `"caption"`.
        batch_size (`int`, defaults to 16): Pictures encoded together.
        num_workers (`int`, defaults to 8): Workers of each process, at most one a core, that read and frame pictures
            ahead of the codec.
        records_per_shard (`int`, defaults to 1000): Records of the source per file, the most that a process does twice.

    Returns:
        `dict`: The manifest, as [`read_manifest`] reads it.

    Raises:
        ValueError: If an argument is wrong, the source cannot be read, is empty or lacks a column, every record had to
            be skipped, or `output` holds something else, such as codes made with other settings.
        ImportError: If `datasets` is not installed.
    """
    # 1. Plan: all that is wrong is found out before anything is written
    check_datasets_installed()
    data_files = [data_files] if isinstance(data_files, str) else data_files and list(data_files)
    source = {"path": dataset, "name": dataset_config_name, "data_dir": data_dir, "data_files": data_files}
    source |= {"split": split, "streaming": streaming}
    config, codec = load_codec_alone(model)
    settings = {
        "codec": codec_identity(codec),
        "codebook_size": config.codebook_size,
        "downsample_factor": config.downsample_factor,
        "dtype": "int16" if config.codebook_size <= np.iinfo(np.int16).max else "int32",
        "grids": [list(grid) for grid in ([config.image_layout.grid()] if grids is None else grids)],
        "framing": framing,
        "kind": kind,
        "records_per_shard": records_per_shard,
    }
    check_settings(settings, batch_size=batch_size, num_workers=num_workers, records_per_shard=records_per_shard)
    image_processor = LiquidImageProcessor(config.image_size, config.downsample_factor, framing)
    folder = image_folder(source)
    records, columns = open_source(source, image_column, text_column)
    settings["source"] = {**source, **columns, "num_records": None if streaming else len(records)}
    output, processes = Path(output), launched_processes()
    begin(output, settings, processes)

    # 2. Read the share of this process, but for the shards that are there, in workers that are ahead of the codec
    done = {path.name for path in output.glob("data/*.parquet")}

    def is_left(number: int) -> bool:
        shard = number // records_per_shard
        return shard % processes.num_processes == processes.process_index and shard_name(shard) not in done

    reader = PictureReader(**columns, folder=folder, grids=settings["grids"], kind=kind, frame=image_processor)
    pictures = read_pictures(records, reader, is_left, num_workers, processes)
    codec = codec.to(processes.device)
    for shard, of_shard in itertools.groupby(pictures, lambda picture: picture.number // records_per_shard):
        # 3. Encode, and 4. write a shard
        encoded, skipped = encode_pictures(of_shard, codec, batch_size, settings["dtype"])
        write_shard(output / "data" / shard_name(shard), encoded, skipped, settings["dtype"])
    return finish(output, settings, processes)


# Plan


def load_codec_alone(model: str | os.PathLike) -> tuple[LiquidConfig, LiquidVQModel]:
    """Configuration and codec of a repository, without the files that hold the language model alone."""
    if (reference := ReferenceCheckpoint.find(model)) is not None:
        return reference.config, reference.codec
    config = LiquidConfig.from_pretrained(model)
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        weight_map = read_json(index)["weight_map"]
        files = {file for name, file in weight_map.items() if "vq_model." in name}
    weights = {}
    for file in files:
        with safe_open(cached_file(model, file), framework="pt") as stored:
            names = [name for name in stored.keys() if "vq_model." in name]  # noqa: SIM118 (it is no mapping)
            weights |= {name.partition("vq_model.")[2]: stored.get_tensor(name) for name in names}
    codec = LiquidVQModel(**config.vq_config)
    try:
        codec.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{model} holds no codec that fits its configuration: {error}") from error
    return config, codec.eval()


def open_source(
    source: Mapping[str, Any], image_column: str | None, text_column: str | None
) -> tuple[Any, dict[str, str]]:
    """The records with their pictures as files or bytes, and `image_column` and `text_column` of them."""
    import datasets

    try:
        records = datasets.load_dataset(**source)
        columns = (records.features or {}).items()
        typed = [name for name, feature in columns if isinstance(feature, datasets.Image)]
        for name in typed:
            records = records.cast_column(name, datasets.Image(decode=False))
        first = next(iter(records))
    except Exception as error:  # readers raise anything; StopIteration says nothing
        reason = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        raise ValueError(f"The data set {source['path']!r} cannot be read: {reason}") from error

    cells = _cells(first)

    def choose(what: str, given: str | None, usual: Sequence[str], types: tuple[type, ...]) -> str:
        for column in [given] if given else usual:
            if column in cells and isinstance(cells[column], (*types, type(None))):
                return column
        columns = ", ".join(f"{name} ({type(value).__name__})" for name, value in first.items())
        advice = "" if what == "image" else " A folder of pictures has texts if metadata.jsonl has file_name and text."
        raise ValueError(
            f"The data set has no column {given or ' or '.join(usual)} of {what}s, only {columns}: name the one that "
            f"holds them with {what}_column.{advice}"
        )

    columns = {"image_column": choose("image", image_column, (*IMAGE_COLUMNS, *typed), (str, bytes, Mapping))}
    return records, columns | {"text_column": choose("text", text_column, TEXT_COLUMNS, (str,))}


def check_settings(settings: Mapping[str, Any], **counts: int) -> None:
    grids, kind = settings["grids"], settings["kind"]
    wrong = [f"{name} must be at least 1, got {count}." for name, count in counts.items() if count < 1]
    if kind not in IMAGE_KINDS:
        wrong.append(f"kind must be one of {', '.join(IMAGE_KINDS)}, got {kind!r}.")
    # Of two grids with the same proportions, no picture could choose one.
    proportions = {height / width for height, width in grids if height > 0 and width > 0}
    if not grids or len(proportions) < len(grids):
        wrong.append(f"grids must be (height, width) in codes, all positive, of different proportions, got {grids}.")
    if wrong:
        raise ValueError(" ".join(wrong))


def image_folder(source: Mapping[str, Any]) -> Path:
    """What paths of pictures are relative to."""
    if source["data_dir"] is not None:
        return Path(source["data_dir"])
    folders = {Path(file).parent for file in source["data_files"] or ()}
    if len(folders) > 1:
        raise ValueError("`data_files` lie in several folders: give `data_dir`, and what they are relative to it.")
    return next(iter(folders), Path(source["path"]) if Path(source["path"]).is_dir() else Path())


def begin(output: Path, settings: dict[str, Any], processes: PartialState) -> None:
    """Writes the settings down, or compares them with those that an earlier call wrote down."""
    file = output / MANIFEST_NAME
    has_begun = file.is_file()
    if has_begun:
        before = read_json(file)
        before, now = ({**one, **one["source"], "source": None} for one in (before, settings))
        if different := differences({name: before.get(name) for name in now}, now):
            raise ValueError(
                f"{output} was begun with other settings: {different}. Give the same ones to go on, or a new folder."
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and holds something else ({MANIFEST_NAME} is missing): choose a new folder.")
    processes.wait_for_everyone()
    (output / "data").mkdir(parents=True, exist_ok=True)
    if not has_begun and processes.is_main_process:
        write_json(file, settings | {"num_records": None})


# Read


@dataclass
class Picture:
    """A picture on its way to the codec, and what will be its record; without pixels: which one is left out, and why."""

    number: int
    record: dict[str, Any]
    pixels: np.ndarray | None = None


@dataclass
class PictureReader(torch.utils.data.Dataset):
    """Reads and frames the pictures of numbered records; what a data loader asks its workers for."""

    image_column: str
    text_column: str
    folder: Path
    grids: list[list[int]]
    kind: str
    frame: LiquidImageProcessor

    def __getitem__(self, numbered: tuple[int, Mapping[str, Any]]) -> Picture:
        number, source = numbered
        cells = _cells(source)
        image, text = cells.get(self.image_column), cells.get(self.text_column)
        path = image.get("path") if isinstance(image, Mapping) else image
        skipped = {"record": number, "path": path if isinstance(path, str) else None}
        if not isinstance(text, str) or not text.strip():
            return Picture(number, skipped | {"reason": "Its text is empty."})
        try:
            if isinstance(image, Mapping):
                image = image["path"] if image["bytes"] is None else image["bytes"]
            if isinstance(image, str) and "://" in image:  # as streams name files on the Hub, in archives or on the web
                with fsspec.open(image) as file:
                    image = file.read()
            image = load_image(self.folder / image if isinstance(image, str) else image)
            # The grid whose proportions differ from the picture's by the smallest factor; the first of equals.
            sides = [(image.width * grid_height, image.height * grid_width) for grid_height, grid_width in self.grids]
            factors = [max(pair) / min(pair) for pair in sides]
            grid = self.grids[factors.index(min(factors))]
            height, width = (side * self.frame.downsample_factor for side in grid)
            # No tensor, which would take a file handle and shared memory on its way out of the worker.
            framed = self.frame(image, height=height, width=width, return_tensors="np")
        except Exception as error:  # decoders and file systems raise anything
            return Picture(number, skipped | {"reason": str(error)})
        record = {"kind": self.kind, "text": text, "grid": grid, "width": width, "height": height}
        return Picture(number, record, framed["pixel_values"][0])


def read_pictures(
    records: Any, reader: PictureReader, is_left: Callable[[int], bool], num_workers: int, processes: PartialState
) -> Iterator[Picture]:
    """The pictures that are left in the order of the source, read ahead of who asks for them."""
    total, numbered = None, number_stream(records, is_left)
    if hasattr(records, "__len__"):
        numbers = [number for number in range(len(records)) if is_left(number)]
        total, numbered = len(numbers), zip(numbers, records.select(numbers), strict=True)
    num_workers = min(num_workers, os.cpu_count() or 1)
    loader = DataLoader(reader, sampler=numbered, batch_size=None, num_workers=num_workers, prefetch_factor=4)
    of_all = "" if processes.num_processes == 1 else f" (process 0 of {processes.num_processes})"
    disable = None if processes.is_main_process else True
    yield from tqdm(iter(loader), f"tokenizing{of_all}", total, unit=" images", disable=disable)


def number_stream(records: Iterable, is_left: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
    """The records that are left with their numbers."""
    number = -1
    try:
        for number, record in enumerate(records):
            if is_left(number):
                yield number, record
    except Exception as error:  # readers raise anything
        raise ValueError(
            f"The data set cannot be read after record {number} ({error}). Finished shards are kept: run the same again."
        ) from error


# Encode


def encode_pictures(
    pictures: Iterable[Picture], codec: LiquidVQModel, batch_size: int, dtype: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of one shard in the order of the source, and what was left out of it."""
    records, skipped, waiting = [], [], defaultdict(list)  # by sizes, until they make a batch

    def encode(batch: list[Picture]) -> None:
        pixel_values = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
        codes = codec.encode_codes(pixel_values.to(codec.device)).flatten(1)
        for picture, flat in zip(batch, codes, strict=True):
            picture.record["codes"] = flat  # an accelerator may still be at work on it, so that it is fetched later

    for picture in pictures:
        if picture.pixels is None:
            skipped.append(picture.record)
            continue
        records.append(picture.record)
        waiting[picture.pixels.shape].append(picture)
        if len(waiting[picture.pixels.shape]) == batch_size:
            encode(waiting.pop(picture.pixels.shape))
    for batch in waiting.values():
        encode(batch)
    for record in records:
        record["codes"] = record["codes"].numpy(force=True).astype(dtype)
    return records, skipped


# Write


def shard_name(shard: int) -> str:
    return f"train-{shard:05d}.parquet"


def write_shard(path: Path, records: list[dict[str, Any]], skipped: list[dict[str, Any]], dtype: str) -> None:
    import pyarrow.parquet
    from datasets import Features, List, Value

    features = {"kind": Value("string"), "text": Value("string"), "codes": List(Value(dtype))}
    features |= {"grid": List(Value("int32")), "width": Value("int32"), "height": Value("int32")}
    schema = Features(features).arrow_schema
    schema = schema.with_metadata(schema.metadata | {SKIPPED_KEY: json.dumps(skipped)})
    with whole(path) as unfinished, pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        if records:  # a row group without rows is one that `datasets` cannot read
            writer.write_table(pyarrow.Table.from_pylist(records, schema))


def finish(output: Path, settings: dict[str, Any], processes: PartialState) -> dict[str, Any]:
    """Sums up what all processes wrote: the manifest, the list of what was left out, the card."""
    import pyarrow.parquet

    processes.wait_for_everyone()
    shards = [pyarrow.parquet.read_metadata(path) for path in sorted(output.glob("data/*.parquet"))]
    skipped = [entry for shard in shards for entry in json.loads(shard.metadata[SKIPPED_KEY])]
    manifest = settings | {
        "num_records": sum(shard.num_rows for shard in shards),
        "num_skipped": len(skipped),
        "version": version("transformers-liquid"),
    }
    if not manifest["num_records"]:
        raise ValueError(
            f"All {len(skipped)} records had to be skipped, the first because of: {skipped[0]['reason']} Delete "
            f"{output} before you try again."
        )
    if processes.is_main_process:
        write_text(output / SKIPPED_NAME, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
        if not (output / "README.md").exists():
            template = Path(__file__).with_name("dataset_card_template.md").read_text(encoding="utf-8")
            grids = ", ".join(f"{height} × {width}" for height, width in manifest["grids"])
            write_text(
                output / "README.md", template.format(**manifest | {"name": output.resolve().name, "grids": grids})
            )
        write_json(output / MANIFEST_NAME, manifest)
    processes.wait_for_everyone()
    return manifest


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record has in each `column`, and in each `column.field`."""
    nested = {name: value for name, value in record.items() if isinstance(value, Mapping)}
    return {**record, **{f"{name}.{field}": cell for name, fields in nested.items() for field, cell in fields.items()}}
