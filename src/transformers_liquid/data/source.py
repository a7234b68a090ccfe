"""What `tokenize_dataset` reads: records of a data set, their columns, and the state of the files that they name."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image

from ..utils.files import check_keys, parse_json, read_text
from .records import FILE_FORMATS, cache_of, cells_of, check_json, check_text, number_stream, root_cause, state_of


# Where pictures and texts are looked for, in this order.
IMAGE_COLUMNS = ("image", "image_path", "file_name")
TEXT_COLUMNS = ("text", "caption", "txt")
# Of edits: what is drawn, what it is made of, and how; as in InstructPix2Pix and MagicBrush.
EDIT_COLUMNS = {
    "image": ("edited_image", "target_img"),
    "source": ("input_image", "original_image", "source_img"),
    "text": ("edit_prompt", "instruction"),
}

# What names the pictures of a folder, with their texts.
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (
    "Captions of a folder of pictures are .txt files beside them, the names of the folders that they lie in, or file_name and "
    "text in metadata.jsonl or metadata.csv."
)
# How the names of pictures in a folder end.
PICTURE_ENDINGS = (".avif", ".bmp", ".gif", ".heic", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# How those of files end by which `datasets` knows what a folder is.
DATA_ENDINGS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".zip")

# What an error says of a picture that is not where its record says.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def files_of(folder: str | os.PathLike) -> list[Path]:
    """The files below a folder in the order of their names, but for hidden ones."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return files


def pictures_of(folder: str | os.PathLike) -> list[Path]:
    """The pictures among [`files_of`] a folder."""
    return [file for file in files_of(folder) if file.suffix.lower() in PICTURE_ENDINGS]


def names_picture(text: str) -> bool:
    """Whether a text is a path or an address of a picture: those have no spaces, which prompts and questions have."""
    text = text.lower()
    is_address = text.startswith(("http:", "https:", "file:", "data:"))
    return " " not in text and (is_address or text.endswith(PICTURE_ENDINGS))


def is_photo_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder holds pictures, and no data but `METADATA` of them."""
    names = {file.suffix.lower() for file in files_of(folder) if file.name not in METADATA}
    return not names.isdisjoint(PICTURE_ENDINGS) and names.isdisjoint(DATA_ENDINGS)


def has_own_captions(folder: str | os.PathLike) -> bool:
    """Whether a folder of pictures has texts that `datasets` would not find: beside them, or in the names of folders."""
    files, splits = files_of(folder), [Path(folder, split) for split in ("train", "validation", "test")]
    if not is_photo_folder(folder) or any(split.is_dir() for split in splits):
        return False
    is_beside, places = any(file.suffix == ".txt" for file in files), {file.parent for file in files}
    return all(file.name not in METADATA for file in files) and (is_beside or places != {Path(folder)})


def read_photos(folder: str | os.PathLike) -> list[dict[str, str]]:
    """The pictures of a folder with their captions, of which none may be without the other.

    Captions are those of `metadata.jsonl` or `metadata.csv` (`file_name` and `text`), else those of `.txt` files beside the
    pictures, else the names of the folders that pictures lie in.

    Returns:
        Records of `image`, a path relative to the folder, and `text`.

    Raises:
        ValueError: If there are no pictures, or naming those that have no caption or cannot be opened, and the captions
            that have no picture.
    """
    folder, files = Path(folder), files_of(folder)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_ENDINGS]
    metadata = [file for file in files if file.name in METADATA]
    beside = dict.fromkeys(file for file in files if file.suffix == ".txt")
    problems = []
    if metadata:
        pairs = [pair for file in metadata for pair in _read_metadata(file)]
        there = set(pictures)
        problems = [f"{file}: it has a caption and is not there" for file, _ in pairs if file not in there]
    elif beside:
        named = {file.with_suffix(".txt") for file in pictures}
        problems = [f"{text}: there is no picture of this name" for text in beside if text not in named]
        own = {file: text for file in pictures if (text := file.with_suffix(".txt")) in beside}
        pairs = [(file, read_text(text).strip()) for file, text in own.items()]
    else:
        pairs = [(file, file.parent.name) for file in pictures if file.parent != folder]
    if not pictures:
        raise ValueError(f"{folder} has no pictures.")
    named = {file for file, _ in pairs}
    problems += [f"{file}: it has no caption" for file in pictures if file not in named]
    for file, text in pairs:
        try:
            check_text(text)
        except ValueError as error:
            problems.append(f"{file}: {error}")
    check_pictures(pictures, problems)
    return [{"image": file.relative_to(folder).as_posix(), "text": text} for file, text in pairs]


def _read_metadata(file: Path) -> list[tuple[Path, str]]:
    """The pictures that a file of metadata names, with their captions."""
    if file.suffix == ".csv":
        lines = list(csv.DictReader(io.StringIO(read_text(file))))
    else:
        lines = [parse_json(line, file) for line in read_text(file).split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        check_keys(f"Record {number} of {file}", line, ("file_name",))
    column = next((name for name in TEXT_COLUMNS if lines and name in lines[0]), TEXT_COLUMNS[0])
    return [(file.parent / line["file_name"], line.get(column)) for line in lines]


def check_pictures(pictures: Iterable[Path], problems: Sequence[str] = ()) -> None:
    """Raises a `ValueError` that tells of pictures that cannot be opened, and of other `problems` with them.

    Pixels are decoded later.
    """
    of_captions, problems = bool(problems), list(problems)
    for file in pictures:
        try:
            PIL.Image.open(file).close()
        except Exception as error:  # decoders raise anything
            problems.append(f"{file}: {error}")
    if problems:
        advice = f". {CAPTIONS}" if of_captions else ""
        raise ValueError(f"{len(problems)} files cannot be used. {tell_some(problems)}{advice}")


def tell_some(names: Sequence[Any]) -> str:
    """The first of many names, and how many more there are."""
    return "; ".join(map(str, names[:5])) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")


def source_of(
    dataset: str, name: str | None, data_dir: str | None, data_files: str | Sequence[str] | None, **more: Any
) -> dict[str, Any]:
    """Where a data set comes from, as the arguments of `load_dataset`; of a file, its builder and the file."""
    files = [data_files] if isinstance(data_files, str) else data_files and list(data_files)
    if files is None and Path(dataset).is_file() and (builder := FILE_FORMATS.get(Path(dataset).suffix)):
        dataset, files = builder, [dataset]
    return {"path": dataset, "name": name, "data_dir": data_dir, "data_files": files, **more}


def open_source(
    source: Mapping[str, Any],
    kind: str,
    image_column: str | None,
    text_column: str | None,
    source_columns: str | Sequence[str] | None,
) -> tuple[Any, dict[str, Any], Any]:
    """The records with their pictures as files or bytes, the columns of images, texts and sources, and who read them.

    Of pictures with texts that `datasets` does not find, that is nobody: [`read_photos`] did.
    """
    import datasets

    if source_columns is not None and kind != "edit":
        raise ValueError(f"source_columns are of edits, but the kind is {kind!r}: give kind='edit', or leave them out.")
    if source["data_files"] is None and has_own_captions(image_folder(source)):
        return _open_photos(source, kind, {image_column, text_column})

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
        advice = f" {CAPTIONS}" if what == "text" else ""
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


def _open_photos(source: Mapping[str, Any], kind: str, columns: set[str | None]) -> tuple[Any, dict[str, Any], None]:
    """As `open_source`, of pictures with texts that `datasets` does not find."""
    import datasets

    folder = image_folder(source)
    if kind == "edit" or columns != {None}:
        raise ValueError(f"{folder} is a folder of pictures with captions, and has neither edits nor columns.")
    records = datasets.Dataset.from_list(read_photos(folder))
    records = records.to_iterable_dataset() if source["streaming"] else records
    return records, {"image_column": "image", "text_column": "text"}, None


def survey(
    records: Any, builder: Any, settings: Mapping[str, Any], folder: Path
) -> tuple[Mapping[int, str], list[str], set[int]]:
    """What the source of each shard is, as a digest; pictures that no record names; numbers of records without theirs.

    Pictures in files of their own count by path, size, times and text, all others by the files of the data set.
    """
    source, files = settings["source"], {} if builder is None else builder.config.data_files or {}
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
