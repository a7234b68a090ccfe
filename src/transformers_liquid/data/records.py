"""Records: the kinds that there are and their fields; and what a data set of codes says about itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..models.liquid.vocabulary import IMAGE_TOKENS
from ..utils.files import read_json, whole
from ..utils.optional import require


# What a record of each kind must have. One that names no kind is of the first kind whose fields it has.
REQUIRED_FIELDS = {
    "conversation": ("messages",),
    "edit": ("text", "codes", "images"),
    "text_to_image": ("text", "codes"),
    "caption": ("text", "codes"),
    "interleaved": ("text", "images"),
    "text": ("text",),
}
# Those that pictures and their text make.
IMAGE_KINDS = ("text_to_image", "caption", "edit")
# All that is ever read of a record, but for its `index`.
RECORD_FIELDS = ("kind", "text", "codes", "grid", "images", "messages", "given")

# What `datasets` reads files with, by how their names end.
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tar": "webdataset"}

MANIFEST_NAME = "liquid_codes.json"

# A finished shard lists what it left out in its file's own metadata, so that one rename finishes both.
SKIPPED_KEY = b"liquid_skipped"
# Likewise a digest of what it was made of.
SOURCE_KEY = b"liquid_source"


class NoCodesError(ValueError):
    """Pictures where their codes are needed."""


def required_field(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record, or of an image in one; one that Arrow filled with `None` is not there.

    Raises:
        ValueError: If the field is not there, or is a text without anything in it.
    """
    value = record.get(name)
    if value is None or (name == "text" and not (isinstance(value, str) and value.strip())):
        there = sorted(field for field in record if record[field] is not None)
        what = "a 'text' that is a string and not empty" if name == "text" else repr(name)
        raise ValueError(f"A record of its kind needs {what}, got {value!r} among {there}.")
    return value


def cells_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record has in each `column`, and in each `column.field`."""
    nested = {name: value for name, value in record.items() if isinstance(value, Mapping)}
    return {**record, **{f"{name}.{field}": cell for name, fields in nested.items() for field, cell in fields.items()}}


def check_text(text: Any) -> None:
    """Raises a `ValueError` if training could not read the text of a picture."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("Its text is empty.")
    if token := next((token for token in IMAGE_TOKENS.values() if token in text), None):
        raise ValueError(f"Its text contains {token!r}, which is reserved for images.")


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


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """Says how a data set of [`tokenize_dataset`] was made.

    Args:
        path (`str` or `os.PathLike`): A folder or a name on the Hub, or whatever else `datasets.load_dataset` takes.

    Returns:
        `dict` or `None`: `codec` (its [`codec_identity`]), `codebook_size`, `downsample_factor`, `dtype`, `grids`,
        `framing`, `kind`, `records_per_shard`, `num_codebooks` (with several codes a position), `source` (the arguments of `load_dataset`, the columns), `num_records`,
        `num_skipped` and `version` (of this package). `None` if it is no data set of codes (or, offline, if no copy of
        the manifest is in the cache).

    Raises:
        ValueError: If the data set is not finished.
        OSError: If there is no such data set.
    """
    file = Path(path, MANIFEST_NAME)
    if not Path(path).exists() and str(path).count("/") == 1:  # a name on the Hub, not a builder such as "json"
        try:
            file = Path(hf_hub_download(str(path), MANIFEST_NAME, repo_type="dataset"))
        except EntryNotFoundError:
            return None
    if not file.is_file():
        return None
    manifest = read_json(file)
    if manifest["num_records"] is None:
        raise ValueError(f"{path} is not finished: run the same `transformers-liquid tokenize` again.")
    return manifest


def shard_name(shard: int) -> str:
    return f"train-{shard:05d}.parquet"


def write_shard(
    path: Path, records: list[dict[str, Any]], skipped: list[dict[str, Any]], settings: Mapping[str, Any], state: str
) -> None:
    import pyarrow.parquet
    from datasets import Features, List, Value

    codes = List(Value(settings["dtype"]))
    image = {"codes": List(codes) if "num_codebooks" in settings else codes, "grid": List(Value("int32"))}
    features = {"kind": Value("string"), "text": Value("string"), **image, "width": Value("int32")}
    features |= {"height": Value("int32")} | ({"images": List(image)} if settings["kind"] == "edit" else {})
    schema = Features(features).arrow_schema
    schema = schema.with_metadata(schema.metadata | {SKIPPED_KEY: json.dumps(skipped), SOURCE_KEY: state})
    with (
        whole(path) as unfinished,
        pyarrow.parquet.ParquetWriter(unfinished, schema, write_page_checksum=True) as writer,
    ):
        if records:  # a row group without rows is one that `datasets` cannot read
            writer.write_table(pyarrow.Table.from_pylist(records, schema))


def read_shard(path: Path) -> tuple[int, list[dict[str, Any]], str | None]:
    """The number of records of a shard that is whole, what was left out of it, and the state of its source."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        metadata = file.metadata.metadata
        state = metadata.get(SOURCE_KEY)
        return file.read().num_rows, json.loads(metadata[SKIPPED_KEY]), state and state.decode()


def check_shards(path: str | os.PathLike, manifest: Mapping[str, Any] | None) -> None:
    """Raises a `ValueError` unless a folder holds the shards that its manifest lists, unchanged; or for a part of one."""
    for place in (Path(os.path.abspath(path)), Path(path).resolve()) if manifest is None else ():
        for folder in place.parents:
            if place.is_relative_to(folder / "data") and (folder / MANIFEST_NAME).is_file():
                raise ValueError(f"it is a part of a data set of codes: give the whole, {str(folder)!r}.")
    listed, folder = (manifest or {}).get("shards"), Path(path, "data")
    if listed is None or not folder.is_dir():
        return
    files = {file.name: file for file in folder.glob("*.parquet")}
    wrong = files.keys() ^ listed.keys()
    wrong |= {name for name in files.keys() & listed.keys() if file_digest(files[name]) != listed[name]}
    if wrong:
        raise ValueError(
            f"{', '.join(sorted(wrong))} is missing, damaged, or none of those that {MANIFEST_NAME} lists: run the same "
            "`transformers-liquid tokenize` again."
        )


def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_of(path: str | os.PathLike) -> str | None:
    """A digest of what a local data set holds: of its manifest, which lists its shards, or of its one file."""
    file = next((file for file in (Path(path, MANIFEST_NAME), Path(path)) if file.is_file()), None)
    return None if file is None else file_digest(file)


def check_json(file: str | os.PathLike) -> None:
    """Raises a `ValueError` for JSON that would end the process: pyarrow dies of a `null` in front."""
    if Path(file).is_file() and Path(file).suffix in (".json", ".jsonl"):
        with open(file, "rb") as opened:
            if opened.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"null"):
                raise ValueError(f"{file} begins with `null`, which is no record.")


def root_cause(error: BaseException) -> BaseException:
    """What a reader of `datasets` failed of, beneath "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def state_of(file: str | os.PathLike) -> tuple[int, int, int]:
    """Changes with a file: its times of writing can be put back, but for the last."""
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def cache_of(*paths: str | os.PathLike) -> str | None:
    """Where `datasets` is to keep what it reads of files and folders: it knows them by their names, we by their states."""
    import datasets

    places = [Path(path).resolve() for path in paths if Path(path).exists()]
    if not places:
        return None
    files = [file for place in places for file in [place, *sorted(place.rglob("*"))] if file.is_file()]
    states = [(str(file), *state_of(file)) for file in files]
    return str(Path(datasets.config.HF_DATASETS_CACHE, hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]))


def check_datasets_installed() -> None:
    """Raises an `ImportError` that says what to install, unless `datasets` is there."""
    require("datasets", "A data set")
