"""Data sets of records: loading them, leaving out what is too long, mixing them by weights."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL.Image import Image
from transformers.utils import logging

from .collator import LiquidDataCollator
from .records import (
    FILE_FORMATS,
    RECORD_FIELDS,
    REQUIRED_FIELDS,
    NoCodesError,
    cache_of,
    check_json,
    check_shards,
    read_manifest,
    root_cause,
)
from .source import is_photo_folder, pictures_of


if TYPE_CHECKING:
    import datasets


# Columns of pictures, of their codes, or of where they are.
PICTURE_COLUMNS = re.compile(r"(image|img|pixel).*|.*codes|file_name", re.IGNORECASE)

NO_CODES = (
    "The data set '{}' holds pictures, and no codes of them{}: make these with `transformers-liquid tokenize`. To learn its "
    "texts alone, give its records the 'kind' text."
)

logger = logging.get_logger(__name__)


def load_records(
    path: str | os.PathLike, split: str = "train", streaming: bool = False, codec_identity: str | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads records for [`LiquidDataCollator`].

    Without a column `kind`, records with `messages` are conversations, with `text` and `codes` drawings
    (`text_to_image`), with `text` and `images` interleaved, with `text` alone texts.

    Args:
        path (`str` or `os.PathLike`): What [`tokenize_dataset`] wrote; a `.jsonl`, `.json` or `.parquet` file; a folder
            of `Dataset.save_to_disk`; or whatever else `datasets.load_dataset` takes, such as a name on the Hub.
        split (`str`, defaults to `"train"`): The part to load.
        streaming (`bool`, defaults to `False`): Read while training, instead of before it.
        codec_identity (`str`, *optional*): The [`codec_identity`] of the model's codec. A data set that says which
            codec made its codes must say this one.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streaming, of the columns that the collator reads.

    Raises:
        ValueError: If the data set cannot be read, is empty, its columns are not those of records, or its codes are
            another codec's; a `NoCodesError` if it holds pictures, and no codes of them. What the columns hold is looked
            at by the collator, record by record.
    """
    import datasets

    if is_photo_folder(path):
        raise NoCodesError(NO_CODES.format(path, ""))
    try:
        manifest = read_manifest(path)
        check_shards(path, manifest)
        dataset = _load(str(path), split, streaming)
        if streaming:
            dataset = dataset._resolve_features()  # before, a stream of JSON has no columns
        first = next(iter(dataset))
    except Exception as error:  # readers raise anything; StopIteration says nothing
        reason = str(root_cause(error)) or f"split {split!r} is empty"
        raise ValueError(f"The data set {str(path)!r} cannot be read: {reason}") from error
    if manifest is not None and codec_identity is not None and manifest["codec"] != codec_identity:
        raise ValueError(
            f"The codes of {str(path)!r} were made with another codec than the model's: tokenize its pictures anew."
        )

    columns = dataset.column_names
    kind = next((kind for kind, names in REQUIRED_FIELDS.items() if set(names) <= set(columns)), None)
    if (kind is None and "codes" not in columns) or (kind == "text" and "kind" not in columns):
        # Else the captions of pictures alone would be trained.
        others = {name: value for name, value in first.items() if name != "text"}
        found = [name for name, value in others.items() if PICTURE_COLUMNS.fullmatch(name) or _is_picture(value)]
        if found or (kind and Path(path).is_dir() and pictures_of(path)):
            raise NoCodesError(NO_CODES.format(path, f" (it has the columns {', '.join(found)})" if found else ""))
    if kind is None:
        raise ValueError(
            f"The data set {str(path)!r} holds no records: its columns are {', '.join(columns)}, but it needs "
            "messages, text and codes, text and images (as codes), or text."
        )
    dataset = dataset.select_columns([name for name in RECORD_FIELDS if name in columns])
    if streaming:
        # Streams are mixed by columns of the same types.
        features = datasets.Features({name: _with_int32(feature) for name, feature in dataset.features.items()})
        dataset = dataset.cast(features)
        if "kind" not in columns:
            features = datasets.Features({"kind": datasets.Value("string"), **features})
            dataset = dataset.map(_with_field, fn_kwargs={"name": "kind", "value": kind}, features=features)
    elif "kind" not in columns:
        dataset = dataset.add_column("kind", [kind] * len(dataset))
    return dataset


def _load(name: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"files of records end in {', '.join(FILE_FORMATS)}.")
        check_json(name)
        how = {"split": split, "streaming": streaming, "cache_dir": cache_of(name)}
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files={split: name}, **how)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[split]
        return dataset.to_iterable_dataset() if streaming else dataset
    return datasets.load_dataset(name, split=split, streaming=streaming, cache_dir=cache_of(name))


def _is_picture(value: Any) -> bool:
    """Whether a value of a column is a picture, the bytes of one, or the name of its file."""
    if isinstance(value, list):
        return any(map(_is_picture, value))
    if isinstance(value, str):
        return (mimetypes.guess_type(urlsplit(value).path)[0] or "").startswith("image/")
    return isinstance(value, (Image, bytes)) or (
        isinstance(value, dict) and not value.keys().isdisjoint(("bytes", "path"))
    )


def _with_int32(feature: Any) -> Any:
    """The same type with int32 in place of all integers."""
    import datasets

    if isinstance(feature, dict):
        return {name: _with_int32(value) for name, value in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return datasets.List(_with_int32(feature.feature))
    return datasets.Value("int32") if isinstance(feature, datasets.Value) and "int" in feature.dtype else feature


def _with_field(record: dict[str, Any], value: Any, name: str) -> dict[str, Any]:
    return {**record, name: value}


def drop_too_long(
    dataset: datasets.Dataset | datasets.IterableDataset, collator: LiquidDataCollator
) -> datasets.Dataset | datasets.IterableDataset:
    """Leaves out the records that do not fit into the collator's `max_length`, and logs how many these are.

    Of a stream they are counted while it is read.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Of records.
        collator ([`LiquidDataCollator`]): Says what fits.

    Raises:
        ValueError: If one is no record.
    """
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        return dataset.filter(_CountingFilter(collator))
    kept = dataset.filter(_fits, True, fn_kwargs={"collator": collator}, desc="leaving out what is too long")
    if len(kept) < len(dataset):
        number = len(dataset) - len(kept)
        logger.warning(f"{number} of {len(dataset)} records do not fit into {collator.max_length} tokens.")
    return kept


def _fits(record: Mapping[str, Any], number: int, collator: LiquidDataCollator) -> bool:
    try:
        return collator.fits(record)
    except ValueError as error:
        raise ValueError(f"Record {number} of the data set cannot be used: {error}") from error


@dataclass
class _CountingFilter:
    """Whether a record of a stream fits; tells of 1, 2, 4, ... that do not."""

    collator: LiquidDataCollator
    dropped: int = 0

    def __call__(self, record: Mapping[str, Any]) -> bool:
        if self.collator.fits(record):
            return True
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:
            logger.warning(f"{self.dropped} records so far do not fit into {self.collator.max_length} tokens.")
        return False


def mix_records(
    datasets: Sequence, weights: Sequence[float] | None = None, seed: int = 0, buffer_size: int = 1000
) -> MixedRecords | datasets.IterableDataset:
    """Mixes data sets of records by weights, shuffled, and numbers the records.

    Each next record comes from a source drawn by its weight. A mixture of data sets ends when each of its sources was
    seen whole, the small ones then several times. A mixture of streams never ends, since the stream that begins anew is
    what a trainer could not resume: train for a number of steps.

    Args:
        datasets (list of `datasets.Dataset` or of `datasets.IterableDataset`): The sources, see [`load_records`].
        weights (list of `float`, *optional*): Rates of the sources, such as percentages; only their ratios count.
            Defaults to the same for all.
        seed (`int`, defaults to 0): Of the order.
        buffer_size (`int`, defaults to 1000): Of a stream, the number of records among which the next one is drawn.

    Returns:
        [`MixedRecords`], or a `datasets.IterableDataset` of streams, of the records with their position in the mixture
        as `index` (each data loader worker counts its part of a stream).

    Raises:
        ValueError: If there are no data sets, one is empty, some are streams and some are not, their columns have
            other types, or the weights are negative, all zero, or not as many as the data sets.
    """
    from datasets import Dataset, IterableDataset, interleave_datasets

    lengths = [None if isinstance(dataset, IterableDataset) else len(dataset) for dataset in datasets]
    are_streams = None in lengths
    if not lengths or 0 in lengths or (are_streams and any(lengths)):
        raise ValueError(
            "A mixture is of data sets that have records, or of streams (loaded with the same `streaming`), at least "
            f"one, got lengths {lengths}."
        )
    weights = np.ones(len(lengths)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(lengths),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(
            f"Weights are one for each of the {len(lengths)} data sets, must not be negative, and one must be positive, "
            f"got {weights.tolist()}."
        )
    probabilities = weights / weights.sum()
    drawn = np.flatnonzero(probabilities)
    how = {"probabilities": probabilities[drawn].tolist(), "seed": seed, "stopping_strategy": "all_exhausted"}
    if are_streams:
        streams = [datasets[source].repeat(None).shuffle(seed=seed, buffer_size=buffer_size) for source in drawn]
        mixture = interleave_datasets(streams, **how)
        return mixture.map(_with_field, with_indices=True, fn_kwargs={"name": "index"})

    generator = np.random.default_rng(seed)
    # Only places are interleaved: the sources keep their columns, and nothing is copied.
    places = [
        Dataset.from_dict({"source": np.full(lengths[source], source), "place": generator.permutation(lengths[source])})
        for source in drawn
    ]
    order = interleave_datasets(places, **how).with_format("numpy")
    return MixedRecords(datasets, np.asarray(order["source"][:]), np.asarray(order["place"][:]))


@dataclass(eq=False)
class MixedRecords(torch.utils.data.Dataset):
    """Records of several data sets in one order, each with its position as `index`.

    Args:
        datasets (list of sequences of records): The sources.
        sources (`np.ndarray` of ints (N,)): Which of them holds record i ...
        places (`np.ndarray` of ints (N,)): ... and where.
    """

    datasets: Sequence[Sequence[Mapping[str, Any]]]
    sources: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return {**self.datasets[self.sources[index]][int(self.places[index])], "index": index}
