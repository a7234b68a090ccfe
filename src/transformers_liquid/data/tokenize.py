"""Pictures with texts to a data set of codes: the codec runs once, training reads its codes as often as it likes."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..codecs.vq_model import LiquidVQModel, codec_identity
from ..models.liquid.configuration_liquid import LiquidConfig
from ..models.liquid.image_processing_liquid import FRAMINGS, LiquidImageProcessor, load_image
from ..models.liquid.reference import ReferenceCheckpoint
from ..utils.files import differences, whole, write_json, write_text
from ..utils.processes import launched_processes
from .manifest import MANIFEST_NAME, check_datasets_installed


SKIPPED_NAME = "skipped.jsonl"
IMAGE_KINDS = ("text_to_image", "caption")

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

    `data/train-*.parquet` has the columns `kind`, `text`, `codes` (raw codes row by row, int16 or int32), `grid`
    (`[rows, columns]`), `width` and `height` (pixels, as encoded). `liquid_codes.json` says with which codec and
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
        grids (list of `(rows, columns)`, *optional*): A picture takes the one whose proportions are closest to its
            own. Defaults to the model's square.
        framing (`str`, defaults to `"crop"`): `"crop"` or `"pad"`, as in [`LiquidImageProcessor`].
        kind (`str`, defaults to `"text_to_image"`): Of the records: that, or `"caption"`.
        batch_size (`int`, defaults to 16): Pictures encoded together.
        num_workers (`int`, defaults to 8): Threads of each process that read and frame pictures ahead of the codec.
        records_per_shard (`int`, defaults to 1000): Records of the source per file, the most that a process does twice.

    Returns:
        `dict`: The manifest, as [`read_manifest`] reads it.

    Raises:
        ValueError: If an argument is wrong, the source cannot be read, is empty or lacks a column, every record had to
            be skipped, or `output` holds something else, such as codes made with other settings.
        ImportError: If `datasets` is not installed.
    """
    # 1. What can be checked at once
    check_datasets_installed()
    output = Path(output)
    begun = _begun(output)
    counts = {"batch_size": batch_size, "num_workers": num_workers, "records_per_shard": records_per_shard}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value, known in (("framing", framing, FRAMINGS), ("kind", kind, IMAGE_KINDS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    data_files = [data_files] if isinstance(data_files, str) else data_files and list(data_files)
    folder = _image_folder(dataset, data_dir, data_files)

    # 2. The codec and the source
    config, codec = _load_codec(model)
    grids = [config.grid()] if grids is None else [(rows, columns) for rows, columns in grids]
    _check_grids(grids)
    source = {"path": dataset, "name": dataset_config_name, "data_dir": data_dir, "data_files": data_files}
    source |= {"split": split, "streaming": streaming}
    records, image_column, text_column = _load_source(source, image_column, text_column)

    # 3. The same settings as before, or nothing is written
    source |= {"image_column": image_column, "text_column": text_column}
    source |= {"num_records": None if streaming else len(records)}
    settings = {
        "codec": codec_identity(codec),
        "codebook_size": config.codebook_size,
        "downsample_factor": config.downsample_factor,
        "dtype": "int16" if config.codebook_size <= np.iinfo(np.int16).max else "int32",
        "grids": [list(grid) for grid in grids],
        "framing": framing,
        "kind": kind,
        "records_per_shard": records_per_shard,
        "source": source,
    }
    if begun is not None:
        _check_same(output, begun, settings)
    state = launched_processes()
    state.wait_for_everyone()
    (output / "data").mkdir(parents=True, exist_ok=True)
    if begun is None and state.is_main_process:
        write_json(output / MANIFEST_NAME, settings | {"num_records": None})

    # 4. Shard by shard, pictures read ahead of the codec
    codec = codec.to(state.device)
    prepare = partial(
        _prepare,
        image_column=image_column,
        text_column=text_column,
        folder=folder,
        grids=grids,
        image_processor=LiquidImageProcessor(config.image_size, config.downsample_factor, framing),
    )
    done = {path.name for path in (output / "data").glob("*.parquet")}

    def is_left(number: int) -> bool:
        shard = number // records_per_shard
        return shard % state.num_processes == state.process_index and _shard_name(shard) not in done

    numbers = None if streaming else [number for number in range(len(records)) if is_left(number)]
    left = _numbered(records, numbers, is_left)
    with tqdm(
        desc="tokenizing" if state.num_processes == 1 else f"tokenizing (process 0 of {state.num_processes})",
        total=None if streaming else len(numbers),
        unit=" images",
        disable=None if state.is_main_process else True,
    ) as progress_bar:
        pictures = _map_ahead(prepare, left, num_workers, ahead=2 * batch_size)
        for shard, of_shard in itertools.groupby(pictures, lambda picture: picture.number // records_per_shard):
            rows, skipped = _encode(of_shard, codec, batch_size, progress_bar)
            _write_shard(output / "data" / _shard_name(shard), rows, skipped, kind, settings["dtype"])

    # 5. The whole of it
    state.wait_for_everyone()
    num_rows, skipped = _read_shards(output)
    if not num_rows:
        raise ValueError(
            f"All {len(skipped)} records had to be skipped, the first because of: {skipped[0]['reason']} Delete "
            f"{output} before you try again."
        )
    manifest = settings | {
        "num_records": num_rows,
        "num_skipped": len(skipped),
        "version": version("transformers-liquid"),
    }
    if state.is_main_process:
        write_text(output / SKIPPED_NAME, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
        if not (output / "README.md").exists():
            write_text(output / "README.md", _card(output.resolve().name, manifest))
        write_json(output / MANIFEST_NAME, manifest)
    state.wait_for_everyone()
    return manifest


# Before the work


def _begun(output: Path) -> dict[str, Any] | None:
    """The manifest of an earlier call."""
    file = output / MANIFEST_NAME
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and holds something else ({MANIFEST_NAME} is missing): choose a new folder.")
    return None


def _image_folder(dataset: str, data_dir: str | None, data_files: list[str] | None) -> Path:
    """What paths of pictures are relative to."""
    if data_dir is not None:
        return Path(data_dir)
    folders = {Path(file).parent for file in data_files or ()}
    if len(folders) > 1:
        raise ValueError("`data_files` lie in several folders: give `data_dir`, and what they are relative to it.")
    return next(iter(folders), Path(dataset) if Path(dataset).is_dir() else Path())


def _load_codec(model: str | os.PathLike) -> tuple[LiquidConfig, LiquidVQModel]:
    """Configuration and codec of a repository, without the files that hold the language model alone."""
    if (reference := ReferenceCheckpoint.find(model)) is not None:
        return reference.config, reference.codec
    config = LiquidConfig.from_pretrained(model)
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
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


def _check_grids(grids: Sequence[tuple[int, int]]) -> None:
    if not grids or any(side < 1 for grid in grids for side in grid):
        raise ValueError(f"`grids` must be (rows, columns) of codes, at least one and all positive, got {grids}.")
    if len({columns / rows for rows, columns in grids}) < len(grids):
        raise ValueError(f"Two of the grids {grids} have the same proportions: no picture could choose between them.")


def _load_source(source: dict[str, Any], image_column: str | None, text_column: str | None) -> tuple[Any, str, str]:
    """The records, their pictures as files or bytes, and the names of the columns of pictures and texts."""
    import datasets

    try:
        records = datasets.load_dataset(**source)
        columns = (records.features or {}).items()
        typed = [name for name, feature in columns if isinstance(feature, datasets.Image)]
        for name in typed:
            records = records.cast_column(name, datasets.Image(decode=False))
        first = next(iter(records), None)
    except Exception as error:  # readers raise anything
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"The data set {source['path']!r} cannot be read: {reason}") from error
    if first is None:
        raise ValueError(f"The data set {source['path']!r} is empty.")
    image_column = _column(first, "image", image_column, (*IMAGE_COLUMNS, *typed))
    text_column = _column(first, "text", text_column, TEXT_COLUMNS)
    image, text = _cell(first, image_column), _cell(first, text_column)
    is_picture = isinstance(image, (str, bytes)) or (isinstance(image, Mapping) and {"bytes", "path"} <= set(image))
    for name, value, is_right, expected in (
        (image_column, image, is_picture, "pictures, their bytes or their paths (image_column)"),
        (text_column, text, isinstance(text, str), "texts (text_column)"),
    ):
        if value is not None and not is_right:
            raise ValueError(f"The column {name!r} holds {type(value).__name__}: expected {expected}.")
    return records, image_column, text_column


def _column(first: Mapping[str, Any], what: str, given: str | None, usual: Sequence[str]) -> str:
    column, _, field = (given or "").partition(".")
    if given in first or (isinstance(first.get(column), Mapping) and field in first[column]):
        return given
    if given is None and (found := [name for name in usual if name in first]):
        return found[0]
    advice = " A folder of pictures has texts if its metadata.jsonl gives file_name and text." if what == "text" else ""
    raise ValueError(
        f"The data set has no column {given or ' or '.join(usual)}, only {', '.join(first)}: name the one that holds the "
        f"{what}s with {what}_column.{advice}"
    )


def _cell(record: Mapping[str, Any], column: str) -> Any:
    if column in record:
        return record[column]
    column, _, field = column.partition(".")
    fields = record.get(column)
    return fields.get(field) if isinstance(fields, Mapping) else None


def _check_same(output: Path, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    then, now = ({**manifest, **manifest["source"]} for manifest in (begun, settings))
    if different := differences({name: then.get(name) for name in now if name != "source"}, {**now, "source": None}):
        raise ValueError(
            f"{output} was begun with other settings: {different}. Give the same ones to go on, or a new folder."
        )


# The work


@dataclass
class _Picture:
    """A record on its way to the codec, or the reason why it is skipped."""

    number: int
    path: str | None
    text: str | None = None
    grid: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    reason: str | None = None


def _numbered(records: Any, numbers: list[int] | None, is_left: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
    """The records that are left, with their numbers; `numbers` is `None` for a stream, which is passed over."""
    if numbers is not None:
        yield from zip(numbers, records.select(numbers), strict=True)
        return
    number = -1
    try:
        for number, record in enumerate(records):
            if is_left(number):
                yield number, record
    except Exception as error:  # readers raise anything
        raise ValueError(
            f"The data set cannot be read after record {number} ({error}). Finished shards are kept: run the same again."
        ) from error


def _map_ahead(function: Callable, items: Iterable, num_workers: int, ahead: int) -> Iterator[Any]:
    """`map` in threads, in order, so many items ahead of who reads it. (Pillow and numpy let go of the GIL.)"""
    running = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _prepare(
    numbered: tuple[int, Mapping[str, Any]],
    image_column: str,
    text_column: str,
    folder: Path,
    grids: Sequence[tuple[int, int]],
    image_processor: LiquidImageProcessor,
) -> _Picture:
    """Reads and frames the picture of a record."""
    number, record = numbered
    image, text = _cell(record, image_column), _cell(record, text_column)
    path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    picture = _Picture(number, path, text)
    try:
        if not isinstance(text, str) or not text.strip():
            raise ValueError("Its text is empty.")
        image = load_image(_file_or_bytes(image, folder))
        picture.grid = min(grids, key=lambda grid: _misfit(image.width, image.height, grid))  # the first of equals
        height, width = (side * image_processor.downsample_factor for side in picture.grid)
        [picture.pixels] = image_processor(image, height=height, width=width, return_tensors="np")["pixel_values"]
    except Exception as error:  # decoders and file systems raise anything
        picture.reason = str(error)
    return picture


def _misfit(width: int, height: int, grid: tuple[int, int]) -> float:
    """By which factor, at least 1, the proportions differ."""
    rows, columns = grid
    return max(width * rows, height * columns) / min(width * rows, height * columns)


def _file_or_bytes(image: Any, folder: Path) -> bytes | Path:
    """What [`load_image`] takes, from a cell of the image column."""
    if isinstance(image, Mapping):
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if image is None:
        raise ValueError("It has no picture.")
    if isinstance(image, bytes):
        return image
    if "://" in image:  # as streams name files on the Hub, in archives or on the web
        import fsspec

        with fsspec.open(image) as file:
            return file.read()
    return folder / image


def _encode(
    pictures: Iterable[_Picture], codec: LiquidVQModel, batch_size: int, progress_bar: tqdm
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one shard in the order of the source, and the records that were skipped."""
    rows, skipped = [], []
    waiting = defaultdict(list)  # rows and pixels of each grid that make no batch yet
    running = deque()  # rows and codes of batches that an accelerator may still be at work on

    def encode(batch: list[tuple[dict[str, Any], np.ndarray]]) -> None:
        pixel_values = torch.from_numpy(np.stack([pixels for _, pixels in batch]))
        if codec.device.type == "cuda":
            pixel_values = pixel_values.pin_memory()
        codes = codec.encode_codes(pixel_values.to(codec.device, non_blocking=True))
        running.append(([row for row, _ in batch], codes.flatten(1)))

    def collect() -> None:
        rows_of_batch, codes = running.popleft()
        for row, flat in zip(rows_of_batch, codes.cpu().numpy(), strict=True):
            row["codes"] = flat
        progress_bar.update(len(rows_of_batch))

    for picture in pictures:
        if picture.reason is not None:
            skipped.append({"record": picture.number, "path": picture.path, "reason": picture.reason})
            progress_bar.update()
            continue
        height, width = picture.pixels.shape[-2:]
        rows.append({"text": picture.text, "grid": picture.grid, "width": width, "height": height})
        waiting[picture.grid].append((rows[-1], picture.pixels))
        if len(waiting[picture.grid]) == batch_size:
            encode(waiting.pop(picture.grid))
            # One batch behind: the accelerator has its next one before it is asked for a result.
            if len(running) > 1:
                collect()
    for batch in waiting.values():
        encode(batch)
    while running:
        collect()
    return rows, skipped


# Files


def _shard_name(shard: int) -> str:
    return f"train-{shard:05d}.parquet"


def _write_shard(path: Path, rows: list[dict[str, Any]], skipped: list[dict[str, Any]], kind: str, dtype: str) -> None:
    import pyarrow.parquet
    from datasets import Features, List, Value

    integers = {
        "codes": List(Value(dtype)),
        "grid": List(Value("int32")),
        "width": Value("int32"),
        "height": Value("int32"),
    }
    schema = Features({"kind": Value("string"), "text": Value("string")} | integers).arrow_schema
    rows = [row | {"kind": kind, "codes": row["codes"].astype(dtype)} for row in rows]
    table = pyarrow.Table.from_pylist(rows, schema.with_metadata(schema.metadata | {SKIPPED_KEY: json.dumps(skipped)}))
    with whole(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished)


def _read_shards(output: Path) -> tuple[int, list[dict[str, Any]]]:
    """The number of rows of all shards, and all that was skipped."""
    import pyarrow.parquet

    shards = [pyarrow.parquet.read_metadata(path) for path in sorted((output / "data").glob("*.parquet"))]
    skipped = [entry for shard in shards for entry in json.loads(shard.metadata[SKIPPED_KEY])]
    return sum(shard.num_rows for shard in shards), skipped


def _card(name: str, manifest: dict[str, Any]) -> str:
    grids = ", ".join(f"{rows} × {columns}" for rows, columns in manifest["grids"])
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# {name}

Pictures as codes of an image codec, with their texts: `{manifest["kind"]}` records to train a
[Liquid](https://arxiv.org/abs/2412.04332) model of that codec with `transformers-liquid`.

- Records: {manifest["num_records"]:,}; left out: {manifest["num_skipped"]:,} (`{SKIPPED_NAME}` says which and why)
- Grids (rows × columns of codes): {grids}
- Pixels per code: {manifest["downsample_factor"]} × {manifest["downsample_factor"]}; framing: {manifest["framing"]}
- Codebook: {manifest["codebook_size"]:,} codes, stored raw and row by row as {manifest["dtype"]}
- Codec (sha256 of its configuration and weights): `{manifest["codec"]}`

`{MANIFEST_NAME}` has all settings.
"""
