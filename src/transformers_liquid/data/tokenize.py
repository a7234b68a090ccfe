"""Pictures with texts to a data set of codes: the codec runs once, training reads its codes as often as it likes.

`tokenize_dataset` is the whole of it, step by step: plan, read, encode, write.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HUB_CACHE
from torch.multiprocessing import Lock
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..codecs.loading import load_codec
from ..codecs.vq_model import CodeMixin, codec_identity
from ..models.liquid.configuration_liquid import LiquidConfig
from ..models.liquid.image_processing_liquid import BASE64, WEB, LiquidImageProcessor, load_image, open_image
from ..models.liquid.prompts import with_marks
from ..models.liquid.reference import ReferenceCheckpoint
from ..models.liquid.vocabulary import IMAGE_MARK, as_integers
from ..utils.files import LOCK_NAME, UNFINISHED, alone_in, differences, read_json, write_json, write_text
from ..utils.processes import launched_processes
from .records import (
    IMAGE_KINDS,
    MANIFEST_NAME,
    cache_of,
    cells_of,
    check_datasets_installed,
    check_text,
    file_digest,
    number_stream,
    read_shard,
    shard_name,
    write_shard,
)
from .source import has_own_captions, image_folder, is_photo_folder, open_source, read_photos, source_of, survey


SKIPPED_NAME = "skipped.jsonl"

# Pictures of more pixels than a camera's 24 millions are decoded one at a time, whatever the number of readers.
LARGE_PIXELS = 25_000_000

# Between tries to read from a disk or a network that fails.
RETRY_SECONDS = (0.5, 2, 8)

# The URLs of `fsspec` that a record may name: on the Hub, or in archives there, on the web or in the folder.
URLS = (*WEB, "hf://", "zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://")

logger = logging.get_logger(__name__)


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
    source_columns: str | Sequence[str] | None = None,
    grids: Sequence[tuple[int, int]] | Literal["common"] | None = None,
    framing: str = "crop",
    kind: str = "text_to_image",
    batch_size: int = 16,
    num_workers: int = 8,
    records_per_shard: int = 1000,
    allow_outside: bool = False,
) -> dict[str, Any]:
    r"""Writes the codes of pictures as a `datasets` repository: records for [`LiquidDataCollator`].

    `data/train-*.parquet` has the fields `kind`, `text`, `codes` (raw codes row by row, int16 or int32), `grid`
    (`[height, width]`), `width` and `height` (pixels, as encoded). `liquid_codes.json` says with which codec and
    settings they were made, `skipped.jsonl` which records were left out and why: pictures that [`load_image`] refuses,
    missing files, texts that are empty or contain a token of images, pictures of a folder that its metadata do not name.

    With `kind="edit"` a record is a picture and what it is made of: its `images` are the source pictures, each with
    `codes` and `grid`, framed as the picture itself; its `text` has an `<image>` mark for each of them, which the text
    says itself or gets in front.

    Under `accelerate launch`, process k of n does the shards k, k + n, ...; the result does not depend on n. After an
    interruption, the same call does what is missing: shards that are not there, are damaged, or were made of files that
    have changed since. To have what was skipped tried again, delete its shard before.

    Args:
        model (`str` or `os.PathLike`): A Liquid repository in either layout. Only its codec is loaded, in fp32.
        output (`str` or `os.PathLike`): A new folder, or that of an interrupted call.
        dataset (`str`): What `datasets.load_dataset` takes: a builder (`"imagefolder"`, `"json"`, `"parquet"`,
            `"webdataset"`), a folder, or a name on the Hub. Or a file (`.csv`, `.json`, `.jsonl`, `.parquet`, `.tar`), or a
            folder of pictures as [`read_photos`] reads it, none of which may lack its caption.
        dataset_config_name, data_dir, data_files, split, streaming: As `name` and so on in `load_dataset`.
        image_column (`str`, *optional*): Holds pictures, their bytes, or paths; these are relative to `data_dir`, else
            to the folder of `data_files`, else to the folder `dataset`. Defaults to `image` or `image_path`, else to a
            column of type `datasets.Image`.
        text_column (`str`, *optional*): Holds the texts; `json.caption` is the field `caption` of a column `json`.
            Defaults to `text`, `caption` or `txt`; of edits to `edit_prompt` or `instruction`.
        source_columns (`str` or list of `str`, *optional*): Of edits: hold the pictures that are edited, in the order of
            their marks. Defaults to one, `input_image`, `original_image` or `source_img`; `image_column` then to
            `edited_image` or `target_img`.
        grids (list of `(height, width)` in codes, *optional*): A picture takes the one whose proportions are closest to its
            own. `"common"` are those of photos, [`~ImageLayout.common_grids`]. Defaults to the model's square.
        framing (`str`, defaults to `"crop"`): `"crop"` or `"pad"`, as in [`LiquidImageProcessor`].
        kind (`str`, defaults to `"text_to_image"`): Of the records: that, `"caption"` or `"edit"`.
        batch_size (`int`, defaults to 16): Pictures encoded together.
        num_workers (`int`, defaults to 8): Workers of each process, at most one a core, that read and frame pictures
            ahead of the codec.
        records_per_shard (`int`, defaults to 1000): Records of the source per file, the most that a process does twice.
        allow_outside (`bool`, defaults to `False`): Read what records name outside of the folder of the data set, too:
            by absolute paths, by links, by URLs of file systems. The web and the Hub are read in any case.

    Returns:
        `dict`: The manifest, as [`read_manifest`] reads it.

    Raises:
        ValueError: If an argument is wrong, the source cannot be read, is empty or lacks a column, every record had to
            be skipped, `output` holds something else, such as codes made with other settings, or another process is
            writing to it.
        OSError: If a disk or the network fails, again and again. Finished shards are kept.
        ImportError: If `datasets` is not installed.
    """
    # 1. Plan: all that is wrong is found out before anything is written
    check_datasets_installed()
    source = source_of(dataset, dataset_config_name, data_dir, data_files, split=split, streaming=streaming)
    config, codec = load_codec_alone(model)
    if grids is None or grids == "common":
        grids = [config.image_layout.grid()] if grids is None else config.image_layout.common_grids()
    settings = {
        **codec_settings(config, codec),
        "grids": [as_integers(grid).tolist() for grid in grids],
        "framing": framing,
        "kind": kind,
        "records_per_shard": records_per_shard,
    }
    check_settings(settings, batch_size=batch_size, num_workers=num_workers, records_per_shard=records_per_shard)
    image_processor = LiquidImageProcessor(config.image_size, config.downsample_factor, framing)
    folder = image_folder(source)
    records, columns, builder = open_source(source, kind, image_column, text_column, source_columns)
    settings["source"] = {**source, **columns, "num_records": None if streaming else len(records)}
    states, unnamed, absent = survey(records, builder, settings, folder)
    output, processes = Path(output), launched_processes()
    check_folder(output)
    with alone_in(output) if processes.is_main_process else nullcontext():
        begin(output, settings, processes)

        # 2. Read the share of this process, but for the shards that are there, in workers that are ahead of the codec
        @functools.cache
        def is_left(shard: int) -> bool:
            is_ours = shard % processes.num_processes == processes.process_index
            return is_ours and not is_done(output / "data" / shard_name(shard), states[shard])

        where = {"folder": folder, "absent": absent, "allow_outside": allow_outside}
        reader = PictureReader(**columns, **where, grids=settings["grids"], kind=kind, frame=image_processor)
        pictures = read_pictures(
            records, reader, lambda number: is_left(number // records_per_shard), num_workers, processes
        )
        codec = codec.to(processes.device)
        for shard, of_shard in itertools.groupby(pictures, lambda picture: picture.number // records_per_shard):
            # 3. Encode, and 4. write a shard
            encoded, skipped = encode_pictures(of_shard, codec, batch_size, settings["dtype"])
            write_shard(output / "data" / shard_name(shard), encoded, skipped, settings, states[shard])
        return finish(output, settings, unnamed, processes)


def tokenize_in_cache(model: str | os.PathLike, dataset: str, grids: Literal["common"] | None = None) -> Path:
    """[`tokenize_dataset`] to a folder in the cache of `datasets`, which it tells of, unless the codes are there already.

    Args:
        model (`str` or `os.PathLike`): As there.
        dataset (`str`): As there. Whatever its files, their states and the codec decide where its codes are.
        grids (`str`, *optional*): As there.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: As there; also of pictures in a folder with metadata, if any lacks its caption or cannot be read.
        OSError, ImportError: As there.
    """
    check_datasets_installed()
    import datasets

    if Path(dataset).exists():
        dataset = os.path.abspath(dataset)
    if is_photo_folder(dataset) and not has_own_captions(dataset):
        read_photos(dataset)  # `datasets` would leave out what these refuse
    made_of = [dataset, cache_of(dataset), codec_identity(load_codec_alone(model)[1]), grids]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    output = Path(datasets.config.HF_DATASETS_CACHE, "liquid_codes", name)
    is_main = launched_processes().is_main_process
    if is_main:
        print(f"{dataset} holds pictures: they become codes in {output}, once.", flush=True)
    manifest = tokenize_dataset(model, output, dataset, grids=grids)
    if is_main and manifest["num_skipped"]:
        print(f"{manifest['num_skipped']:,} pictures were left out: see {output / SKIPPED_NAME}.", flush=True)
    return output


# Plan


def load_codec_alone(model: str | os.PathLike) -> tuple[LiquidConfig, CodeMixin]:
    """Configuration and codec of a repository, without the files that hold the language model alone."""
    if (reference := ReferenceCheckpoint.find(model)) is not None:
        return reference.config, reference.codec
    return LiquidConfig.from_pretrained(model), load_codec(model)


def codec_settings(config: LiquidConfig, codec: CodeMixin) -> dict[str, Any]:
    """What the manifest says of the codec, and how codes are stored."""
    several = {"num_codebooks": config.num_codebooks} if config.num_codebooks > 1 else {}
    return several | {
        "codec": codec_identity(codec),
        "codebook_size": config.codebook_size,
        "downsample_factor": config.downsample_factor,
        "dtype": "int16" if config.codebook_size <= np.iinfo(np.int16).max else "int32",
    }


def check_settings(settings: Mapping[str, Any], **counts: int) -> None:
    grids, kind = settings["grids"], settings["kind"]
    wrong = [f"{name} must be at least 1, got {count}." for name, count in counts.items() if count < 1]
    if kind not in IMAGE_KINDS:
        wrong.append(f"kind must be one of {', '.join(IMAGE_KINDS)}, got {kind!r}.")
    # Of two grids with the same proportions, no picture could choose one.
    proportions = {grid[0] / grid[1] for grid in grids if all(isinstance(side, int) and side > 0 for side in grid)}
    if not grids or len(proportions) < len(grids):
        wrong.append(f"grids must be (height, width) in codes, all positive, of different proportions, got {grids}.")
    if wrong:
        raise ValueError(" ".join(wrong))


def check_folder(output: Path) -> None:
    """Raises unless a folder is new, or was begun by an earlier call."""
    files = (path for path in output.rglob("*") if path.is_file())
    is_ours = (output / MANIFEST_NAME).is_file() or all(path.name.endswith((LOCK_NAME, UNFINISHED)) for path in files)
    if output.exists() and not (output.is_dir() and is_ours):
        raise ValueError(f"{output} exists and holds something else ({MANIFEST_NAME} is missing): choose a new folder.")
    (output / "data").mkdir(parents=True, exist_ok=True)


def begin(output: Path, settings: dict[str, Any], processes: PartialState) -> None:
    """Writes the settings down, or compares them with those that an earlier call wrote down."""
    file = output / MANIFEST_NAME
    if file.is_file():
        before, now = ({**one, **one["source"], "source": None} for one in (read_json(file), settings))
        if different := differences({name: before.get(name) for name in now}, now):
            raise ValueError(
                f"{output} was begun with other settings: {different}. Give the same ones to go on, or a new folder."
            )
    processes.wait_for_everyone()
    if processes.is_main_process:
        for left in output.rglob(f".*{UNFINISHED}"):  # by a process that was killed
            left.unlink()
        write_json(file, settings | {"num_records": None})
    processes.wait_for_everyone()


def is_done(path: Path, state: str) -> bool:
    """Whether a shard is there, whole, and made of sources in this state; says why, if it is not."""
    try:
        if not path.exists() or read_shard(path)[2] in (None, state):
            return path.exists()
        reason = "its pictures or texts have changed"
    except Exception as error:  # readers raise anything
        reason = f"it is damaged ({error})"
    logger.warning(f"{path} is made anew: {reason}.")
    return False


# Read


@dataclass
class Picture:
    """A picture on its way to the codec, and what will be its record; without pixels: why it is left out.

    `pixels` are of the picture, and behind it of those that it is made of, `(N, 3, H, W)`.
    """

    number: int
    path: str | None
    record: dict[str, Any] | None = None
    pixels: np.ndarray | None = None
    reason: str = ""
    is_passing: bool = False  # the picture may be fine, but a disk or the network failed


@dataclass
class PictureReader(torch.utils.data.Dataset):
    """Reads and frames the pictures of numbered records; what a data loader asks its workers for."""

    image_column: str
    text_column: str
    folder: Path
    absent: set[int]
    allow_outside: bool
    grids: list[list[int]]
    kind: str
    frame: LiquidImageProcessor
    source_columns: Sequence[str] = ()
    large: Any = field(default_factory=Lock)

    def __getitem__(self, numbered: tuple[int, Mapping[str, Any]]) -> Picture:
        number, source = numbered
        cells = cells_of(source)
        image = cells.get(self.image_column)
        path = image.get("path") if isinstance(image, Mapping) else image
        path = path[:200] if isinstance(path, str) else None
        for wait in (*RETRY_SECONDS, None):
            try:
                return Picture(number, path, *self.read(cells))
            except Exception as error:  # decoders and file systems raise anything
                # What was there a while ago is gone with its disk.
                is_passing = not (isinstance(error, (ValueError, TypeError)) or number in self.absent)
                if wait is None or not is_passing:
                    return Picture(number, path, reason=str(error) or type(error).__name__, is_passing=is_passing)
                time.sleep(wait)

    def read(self, cells: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """The record of a picture but for its codes, and the pixels of all its pictures.

        Raises:
            ValueError, TypeError: If the text or a picture cannot be used.
            OSError: If a picture cannot be fetched.
        """
        text, number = cells.get(self.text_column), len(self.source_columns)
        check_text(text.replace(IMAGE_MARK, " ") if number and isinstance(text, str) else text)
        text = with_marks(text, number)
        if text.count(IMAGE_MARK) != number:
            raise ValueError(f"Its text has {text.count(IMAGE_MARK)} {IMAGE_MARK} marks for {number} source pictures.")
        grid, pixels = None, []
        for column in (self.image_column, *self.source_columns):
            image = cells.get(column)
            if isinstance(image, Mapping):
                image = image.get("path") if image.get("bytes") is None else image["bytes"]
            if image is None:
                raise ValueError(f"It has no picture in {column!r}.")
            image = open_image(self.locate(image) if isinstance(image, str) else image)
            short, long = sorted(image.size)
            # Framing blows up what is not square.
            area = max(
                short * long, long**2 if self.frame.framing == "pad" else self.frame.size**2 * long / max(short, 1)
            )
            with self.large if area > LARGE_PIXELS else nullcontext():
                image = load_image(image)
                if grid is None:
                    # The one whose proportions differ from the picture's by the smallest factor; the first of equals.
                    sides = [
                        (image.width * grid_height, image.height * grid_width) for grid_height, grid_width in self.grids
                    ]
                    factors = [max(pair) / min(pair) for pair in sides]
                    grid = self.grids[factors.index(min(factors))]
                    height, width = (side * self.frame.downsample_factor for side in grid)
                # No tensor, which would take a file handle and shared memory on its way out of the worker.
                framed = self.frame(image, height=height, width=width, return_tensors="np")
            pixels.append(framed["pixel_values"][0])
        record = {"kind": self.kind, "text": text, "grid": grid, "width": width, "height": height}
        return record, np.stack(pixels)

    def locate(self, image: str) -> str | Path | bytes:
        """What `open_image` is to open; a `ValueError` if it is not for a record to read.

        Streams name files on the Hub and in archives by the URLs of `fsspec`, `zip://a.png::hf://datasets/...`.
        """
        from datasets import config

        if image.startswith((*WEB, *BASE64)):
            return image
        is_url = "://" in image
        # The folder, links resolved, and the caches of what comes from the Hub or out of archives.
        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        roots = [os.path.realpath(root) for root in (self.folder, *caches)]
        for link in image.split("::") if is_url else [image]:
            place = Path(os.path.realpath(self.folder / link))
            is_inside = "://" not in link and any(place.is_relative_to(root) for root in roots)
            if not (is_inside or link.startswith(URLS) or self.allow_outside):
                raise ValueError(f"{link} lies outside of {self.folder}: it is read only if allow_outside is given.")
        if not is_url:
            return self.folder / image
        with fsspec.open(image) as file:
            return file.read()


def read_pictures(
    records: Any, reader: PictureReader, is_left: Callable[[int], bool], num_workers: int, processes: PartialState
) -> Iterator[Picture]:
    """The pictures that are left in the order of the source, read ahead of who asks for them."""
    total, numbered = None, number_stream(records, is_left)
    if hasattr(records, "__len__"):
        numbers = [number for number in range(len(records)) if is_left(number)]
        total, numbered = len(numbers), zip(numbers, records.select(numbers), strict=True)
        if total < len(records) and processes.num_processes == 1:
            state = "Going on" if total else "Already finished"
            logger.info(f"{state}: {len(records) - total} of {len(records)} records are done.")
    num_workers = min(num_workers, os.cpu_count() or 1)
    loader = DataLoader(reader, sampler=numbered, batch_size=None, num_workers=num_workers, prefetch_factor=4)
    of_all = "" if processes.num_processes == 1 else f" (process 0 of {processes.num_processes})"
    disable = None if processes.is_main_process else True
    for picture in tqdm(iter(loader), f"tokenizing{of_all}", total, unit=" images", disable=disable):
        if picture.is_passing:
            reason = f"Record {picture.number} cannot be read now ({picture.reason})."
            raise OSError(
                f"{reason} Finished shards are kept: run the same again when the disk or the network is back."
            )
        yield picture


# Encode


def encode_pictures(
    pictures: Iterable[Picture], codec: CodeMixin, batch_size: int, dtype: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of one shard in the order of the source, and what was left out of it."""
    kept, skipped, waiting = [], [], defaultdict(list)  # by sizes, until they make a batch

    def encode(batch: list[Picture]) -> None:
        pixel_values = torch.from_numpy(np.concatenate([picture.pixels for picture in batch]))
        codes = codec.encode_unchecked(pixel_values.to(codec.device)).flatten(-2)
        for picture, flat in zip(batch, codes.split(len(batch[0].pixels)), strict=True):
            picture.record["codes"] = flat  # an accelerator may still be at work on it, so that it is fetched later

    for picture in pictures:
        if picture.pixels is None:
            skipped.append({"record": picture.number, "path": picture.path, "reason": picture.reason})
            continue
        kept.append(picture)
        waiting[picture.pixels.shape].append(picture)
        if len(waiting[picture.pixels.shape]) == max(1, batch_size // len(picture.pixels)):
            encode(waiting.pop(picture.pixels.shape))
    for batch in waiting.values():
        encode(batch)
    for picture in kept:
        codes = picture.record["codes"].numpy(force=True).astype(dtype)
        if codes.min() < 0:
            raise ValueError(
                f"The codec has no codes for record {picture.number} ({picture.path}): its latents are not finite, since "
                "its weights are damaged."
            )
        codes = codes if codes.ndim == 2 else [[*one] for one in codes]  # Arrow has no arrays of several dimensions
        picture.record |= {"codes": codes[0]}
        picture.record["images"] = [{"codes": one, "grid": picture.record["grid"]} for one in codes[1:]]
    return [picture.record for picture in kept], skipped


# Write


def finish(output: Path, settings: dict[str, Any], unnamed: list[str], processes: PartialState) -> dict[str, Any]:
    """Sums up what all processes wrote: the manifest, the list of what was left out, the card."""
    processes.wait_for_everyone()
    files = sorted(output.glob("data/*.parquet"))
    shards = {path.name: read_shard(path) for path in files}
    check_complete(output, shards, settings)
    skipped = [entry for _, entries, _ in shards.values() for entry in entries]
    skipped += [{"record": None, "path": path, "reason": "No record names it."} for path in unnamed]
    manifest = settings | {
        "num_records": sum(number for number, _, _ in shards.values()),
        "num_skipped": len(skipped),
        "shards": {path.name: file_digest(path) for path in files},
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
            card = template.format(**manifest | {"name": output.resolve().name, "grids": grids})
            write_text(output / "README.md", card)
        write_json(output / MANIFEST_NAME, manifest)
    processes.wait_for_everyone()
    return manifest


def check_complete(output: Path, shards: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises if shards are missing or belong to something else; warns of those that are not worth much."""
    total = sum(number + len(skipped) for number, skipped, _ in shards.values())
    names = [shard_name(shard) for shard in range(math.ceil(total / settings["records_per_shard"]))]
    if list(shards) != names or settings["source"]["num_records"] not in (None, total):
        raise ValueError(
            f"{output / 'data'} holds other shards than those of this data set, {', '.join(shards)} with {total} records: "
            "delete them, and run the same again."
        )
    if poor := [name for name, (number, skipped, _) in shards.items() if len(skipped) > number]:
        logger.warning(
            f"More than half was skipped of {', '.join(poor)}, such as {shards[poor[0]][1][0]}. To have all of it tried "
            f"again, delete these files in {output / 'data'} and run the same again."
        )
