"""Records: the kinds that there are and their fields; and what a data set of codes says about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..utils.files import read_json


# What a record of each kind must have. One that names no kind is of the first kind whose fields it has.
REQUIRED_FIELDS = {
    "conversation": ("messages",),
    "text_to_image": ("text", "codes"),
    "caption": ("text", "codes"),
    "interleaved": ("text", "images"),
    "text": ("text",),
}
# Those that one picture and its text make.
IMAGE_KINDS = ("text_to_image", "caption")
# All that is ever read of a record, but for its `index`.
RECORD_FIELDS = ("kind", "text", "codes", "grid", "images", "messages")

MANIFEST_NAME = "liquid_codes.json"


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


def read_manifest(path: str | os.PathLike) -> dict[str, Any] | None:
    """Says how a data set of [`tokenize_dataset`] was made.

    Args:
        path (`str` or `os.PathLike`): A folder or a name on the Hub, or whatever else `datasets.load_dataset` takes.

    Returns:
        `dict` or `None`: `codec` (its [`codec_identity`]), `codebook_size`, `downsample_factor`, `dtype`, `grids`,
        `framing`, `kind`, `records_per_shard`, `source` (the arguments of `load_dataset`, the columns), `num_records`,
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


def check_datasets_installed() -> None:
    """Raises an `ImportError` that says what to install, unless `datasets` is there."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError('Data sets need another library: pip install "transformers-liquid[train]".') from error
