"""What a data set of codes says about itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


MANIFEST_NAME = "liquid_codes.json"


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
    manifest = json.loads(file.read_text(encoding="utf-8"))
    if manifest["num_records"] is None:
        raise ValueError(f"{path} is not finished: run the same `transformers-liquid tokenize` again.")
    return manifest


def check_datasets_installed() -> None:
    """Raises an `ImportError` that says what to install, unless `datasets` is there."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError('Data sets need another library: pip install "transformers-liquid[train]".') from error
