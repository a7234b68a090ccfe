"""Data sets of records: loading them, leaving out what is too long, mixing them by weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging

from .collator import LiquidDataCollator
from .manifest import read_manifest


if TYPE_CHECKING:
    import datasets


# The kind of records without a column `kind`, by the first of these sets of columns that they have.
KINDS_OF_COLUMNS = {
    ("messages",): "conversation",
    ("text", "codes"): "text_to_image",
    ("text", "images"): "interleaved",
    ("text",): "text",
}
RECORD_COLUMNS = ("kind", "text", "codes", "grid", "images", "messages")
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

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
            another codec's.
    """
    import datasets

    try:
        manifest = read_manifest(path)
    except OSError as error:
        raise ValueError(f"The data set {str(path)!r} cannot be read: {error}") from error
    if manifest is not None and codec_identity is not None and manifest["codec"] != codec_identity:
        raise ValueError(
            f"The codes of {str(path)!r} were made with another codec than the model's ({manifest['codec'][:12]}..., "
            f"the model's is {codec_identity[:12]}...): they mean other pictures. Tokenize the images with this model."
        )
    try:
        dataset = _load(Path(path), str(path), split, streaming)
        if streaming:
            dataset = dataset._resolve_features()  # before, a stream of JSON has no columns
        is_empty = next(iter(dataset), None) is None
    except Exception as error:  # readers raise anything
        raise ValueError(f"The data set {str(path)!r} cannot be read: {error}") from error
    if is_empty:
        raise ValueError(f"The data set {str(path)!r} (split {split!r}) is empty.")

    columns = dataset.column_names
    kind = next((kind for names, kind in KINDS_OF_COLUMNS.items() if set(names) <= set(columns)), None)
    if kind is None:
        raise ValueError(
            f"The data set {str(path)!r} holds no records: its columns are {', '.join(columns)}, but it needs "
            "messages, text and codes, text and images (as codes), or text."
        )
    dataset = dataset.select_columns([name for name in RECORD_COLUMNS if name in columns])
    for name in ("codes", "images"):
        if name in columns and not _holds_integers(dataset.features[name], datasets):
            raise ValueError(
                f"The column {name!r} of {str(path)!r} must hold codes, that is integers, got "
                f"{dataset.features[name]}. Make codes of pictures with `transformers-liquid tokenize`."
            )
    if streaming:
        # Streams are mixed by columns of the same types.
        features = datasets.Features({name: _with_int32(dataset.features[name], datasets) for name in dataset.features})
        dataset = dataset.cast(features)
        if "kind" not in columns:
            features = datasets.Features({"kind": datasets.Value("string"), **features})
            dataset = dataset.map(_add_kind, fn_kwargs={"kind": kind}, features=features)
    elif "kind" not in columns:
        dataset = dataset.add_column("kind", [kind] * len(dataset))
    return dataset


def drop_too_long(
    dataset: datasets.Dataset | datasets.IterableDataset, collator: LiquidDataCollator
) -> datasets.Dataset | datasets.IterableDataset:
    """Leaves out the records that do not fit into the collator's `max_length`, and logs how many these are.

    Of a stream they are counted while it is read.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Of records.
        collator ([`LiquidDataCollator`]): Says what fits.

    Raises:
        ValueError: If no record fits, or one is no record.
    """
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        return dataset.filter(_CountingFilter(collator))
    kept = dataset.filter(collator.fits, desc="leaving out what is too long")
    if not len(kept):
        raise ValueError(f"None of the {len(dataset)} records fits into max_length={collator.max_length}: raise it.")
    if len(kept) < len(dataset):
        logger.warning(
            f"{len(dataset) - len(kept)} of {len(dataset)} records do not fit into {collator.max_length} tokens."
        )
    return kept


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

    probabilities = _probabilities(weights, len(datasets))
    is_stream = [isinstance(dataset, IterableDataset) for dataset in datasets]
    if len(set(is_stream)) > 1:
        raise ValueError("Some of the data sets are streams and some are not: load all with the same `streaming`.")
    drawn = {"probabilities": probabilities[probabilities > 0].tolist(), "seed": seed}
    drawn["stopping_strategy"] = "all_exhausted"
    if is_stream[0]:
        streams = [
            stream.repeat(None).shuffle(seed=seed, buffer_size=buffer_size)
            for stream, probability in zip(datasets, probabilities, strict=True)
            if probability > 0
        ]
        return interleave_datasets(streams, **drawn).map(_add_index, with_indices=True)

    lengths = [len(dataset) for dataset in datasets]
    if 0 in lengths:
        raise ValueError(f"Data set {lengths.index(0)} of the mixture is empty.")
    generator = np.random.default_rng(seed)
    # Only places are interleaved: the sources keep their columns, and nothing is copied.
    places = [
        Dataset.from_dict({"source": np.full(length, source), "row": generator.permutation(length)})
        for source, length in enumerate(lengths)
        if probabilities[source] > 0
    ]
    order = interleave_datasets(places, **drawn).with_format("numpy")
    return MixedRecords(datasets, np.asarray(order["source"][:]), np.asarray(order["row"][:]))


class MixedRecords(torch.utils.data.Dataset):
    """Records of several data sets in one order, each with its position as `index`.

    Args:
        datasets (list of sequences of records): The sources.
        sources (`np.ndarray` of ints (N,)): Which of them holds record i ...
        rows (`np.ndarray` of ints (N,)): ... and where.
    """

    def __init__(self, datasets: Sequence[Sequence[Mapping[str, Any]]], sources: np.ndarray, rows: np.ndarray) -> None:
        self.datasets = list(datasets)
        self.sources = sources
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return {**self.datasets[self.sources[index]][int(self.rows[index])], "index": index}


class _CountingFilter:
    """Whether a record of a stream fits; tells of 1, 2, 4, ... that do not."""

    def __init__(self, collator: LiquidDataCollator) -> None:
        self.collator = collator
        self.dropped = 0

    def __call__(self, record: Mapping[str, Any]) -> bool:
        if self.collator.fits(record):
            return True
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:
            logger.warning(f"{self.dropped} records so far do not fit into {self.collator.max_length} tokens.")
        return False


def _load(path: Path, name: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"files of records end in {', '.join(FILE_FORMATS)}.")
        return datasets.load_dataset(
            FILE_FORMATS[path.suffix], data_files={split: name}, split=split, streaming=streaming
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[split]
        return dataset.to_iterable_dataset() if streaming else dataset
    return datasets.load_dataset(name, split=split, streaming=streaming)


def _probabilities(weights: Sequence[float] | None, number: int) -> np.ndarray:
    if not number:
        raise ValueError("A mixture needs at least one data set.")
    weights = np.ones(number) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (number,):
        raise ValueError(f"Got {weights.size} weights for {number} data sets: give one each.")
    if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f"Weights must not be negative, and one must be positive, got {weights.tolist()}.")
    return weights / weights.sum()


def _holds_integers(feature: Any, datasets: Any) -> bool:
    if isinstance(feature, dict):
        return "codes" in feature and _holds_integers(feature["codes"], datasets)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return _holds_integers(feature.feature, datasets)
    return isinstance(feature, datasets.Value) and ("int" in feature.dtype or feature.dtype == "null")


def _with_int32(feature: Any, datasets: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _with_int32(value, datasets) for name, value in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return datasets.List(_with_int32(feature.feature, datasets))
    return datasets.Value("int32") if isinstance(feature, datasets.Value) and "int" in feature.dtype else feature


def _add_kind(record: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"kind": kind, **record}


def _add_index(record: dict[str, Any], index: int) -> dict[str, Any]:
    return {**record, "index": index}


__all__ = ["MixedRecords", "drop_too_long", "load_records", "mix_records"]
