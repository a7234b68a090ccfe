"""What `tokenize_dataset` reads: records of a data set, their columns, and the state of the files that they name."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image

from .records import cache_of, cells_of, check_json, number_stream, root_cause, state_of


# Where pictures and texts are looked for, in this order.
IMAGE_COLUMNS = ("image", "image_path")
TEXT_COLUMNS = ("text", "caption", "txt")
# Of edits: what is drawn, what it is made of, and how; as in InstructPix2Pix and MagicBrush.
EDIT_COLUMNS = {
    "image": ("edited_image", "target_img"),
    "source": ("input_image", "original_image", "source_img"),
    "text": ("edit_prompt", "instruction"),
}

# How the names of pictures in a folder end.
PICTURE_ENDINGS = [
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
]

# What an error says of a picture that is not where its record says.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def pictures_of(folder: str | os.PathLike) -> list[Path]:
    """The pictures below a folder, in the order of their names. Hidden ones do not count."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.suffix.lower() in PICTURE_ENDINGS]
    return [file for file in files if file.is_file() and "/." not in f"/{file.relative_to(folder).as_posix()}"]


def check_pictures(files: Iterable[Path]) -> None:
    """Raises a `ValueError` that names the files of pictures that cannot be opened. Pixels are decoded later."""
    broken = []
    for file in files:
        try:
            PIL.Image.open(file).close()
        except Exception as error:  # decoders raise anything
            broken.append(f"{file} ({error})")
    if broken:
        raise ValueError(f"{tell_some(broken)} cannot be read as pictures: repair them, or take them out.")


def tell_some(names: Sequence[Any]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def open_source(
    source: Mapping[str, Any],
    kind: str,
    image_column: str | None,
    text_column: str | None,
    source_columns: str | Sequence[str] | None,
) -> tuple[Any, dict[str, Any], Any]:
    """The records with their pictures as files or bytes, the columns of images, texts and sources, and who read them."""
    import datasets

    if source_columns is not None and kind != "edit":
        raise ValueError(f"source_columns are of edits, but the kind is {kind!r}: give kind='edit', or leave them out.")

    try:
        for file in source["data_files"] or ():
            check_json(file)
        where = {name: source[name] for name in ("path", "name", "data_dir", "data_files")}
        builder = datasets.load_dataset_builder(**where)
        # Again, with a cache of its own, now that it is known which files these are.
        files = [file for of_split in (builder.config.data_files or {}).values() for file in of_split]
        if (cache := cache_of(source["path"], *files)) is not None:
            builder = datasets.load_dataset_builder(**where, cache_dir=cache)
        if not source["streaming"]:
            builder.download_and_prepare()
        read = builder.as_streaming_dataset if source["streaming"] else builder.as_dataset
        records = read(source["split"])
        columns = (records.features or {}).items()
        typed = [name for name, feature in columns if isinstance(feature, datasets.Image)]
        for name in typed:
            records = records.cast_column(name, datasets.Image(decode=False))
        first = next(iter(records))
    except Exception as error:  # readers raise anything; StopIteration says nothing
        reason = " ".join(str(root_cause(error)).split()) or "it is empty"
        place = source["data_files"] or source["data_dir"] or source["path"]
        raise ValueError(f"The data set {place!r} cannot be read: {reason}") from error

    cells, pictures = cells_of(first), (str, bytes, Mapping)
    usual = EDIT_COLUMNS if kind == "edit" else {"image": (*IMAGE_COLUMNS, *typed), "text": TEXT_COLUMNS}

    def choose(what: str, column: str | None, option: str, types: tuple[type, ...]) -> str:
        for name in [column] if column else usual[what]:
            if name in cells and isinstance(cells[name], (*types, type(None))):
                return name
        columns = ", ".join(f"{name} ({type(value).__name__})" for name, value in first.items())
        advice = "" if what != "text" else " A folder of pictures has texts if metadata.jsonl has file_name and text."
        raise ValueError(
            f"The data set has no column {column or ' or '.join(usual[what])} of {what}s, only {columns}: name the one "
            f"that holds them with {option}.{advice}"
        )

    columns = {"image_column": choose("image", image_column, "image_column", pictures)}
    columns["text_column"] = choose("text", text_column, "text_column", (str,))
    if kind == "edit":
        names = [source_columns] if isinstance(source_columns, str) else source_columns or [None]
        columns["source_columns"] = [choose("source", name, "source_columns", pictures) for name in names]
        if columns["image_column"] in columns["source_columns"]:
            raise ValueError(
                f"{columns['image_column']} is named as the source and as the result of an edit: they differ."
            )
    return records, columns, builder


def survey(
    records: Any, builder: Any, settings: Mapping[str, Any], folder: Path
) -> tuple[Mapping[int, str], list[str], set[int]]:
    """What the source of each shard is, as a digest; pictures that no record names; numbers of records without theirs.

    Pictures in files of their own count by path, size, times and text, all others by the files of the data set.
    """
    source, files = settings["source"], builder.config.data_files or {}
    columns = source["image_column"], *source.get("source_columns", ())
    origins = [([Path(file).name for file in of_split], of_split.origin_metadata) for of_split in files.values()]
    origins += [state_of(file) for of_split in files.values() for file in of_split if os.path.exists(file)]
    of_all = hashlib.sha256(repr(origins).encode()).hexdigest()
    states, named, absent = defaultdict(hashlib.sha256), set(), set()
    with suppress(ValueError):  # a stream that breaks off says so when it is read
        for number, record in number_stream(records, lambda number: True):
            cells, found = cells_of(record), []
            for image in map(cells.get, columns):
                path = image.get("path") if isinstance(image, Mapping) and image.get("bytes") is None else image
                state = path
                if isinstance(path, str) and "://" not in path:
                    named.add(os.path.abspath(folder / path))
                    try:
                        state = *state_of(folder / path), os.path.relpath(folder / path, folder)
                    except (OSError, ValueError) as error:
                        if getattr(error, "errno", None) in NOT_THERE:
                            absent.add(number)
                elif path is not None and not named:
                    return defaultdict(lambda: of_all), [], absent
                found.append(state)
            made_of = repr((*found, cells.get(source["text_column"])))
            states[number // settings["records_per_shard"]].update(made_of.encode("utf-8", "replace"))
    endings = tuple(getattr(builder, "EXTENSIONS", ()))  # of the pictures of a folder
    pictures = [file for file in files.get(source["split"], ()) if file.lower().endswith(endings)]
    unnamed = [file for file in pictures if os.path.abspath(file) not in named]
    return defaultdict(lambda: of_all, {shard: digest.hexdigest() for shard, digest in states.items()}), unnamed, absent


def image_folder(source: Mapping[str, Any]) -> Path:
    """What paths of pictures are relative to."""
    if source["data_dir"] is not None:
        return Path(source["data_dir"])
    folders = {Path(file).parent for file in source["data_files"] or ()}
    if len(folders) > 1:
        raise ValueError("`data_files` lie in several folders: give `data_dir`, and what they are relative to it.")
    return next(iter(folders), Path(source["path"]))
