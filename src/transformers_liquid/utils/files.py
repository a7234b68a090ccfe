"""Files that are whole or not there, folders of one writer, and runs that go on only with the settings they began with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError


LOCK_NAME = ".lock"

# How the name of a file ends that is still being written; a killed process leaves it behind.
UNFINISHED = ".unfinished"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to; what was written becomes `path` in one step, or nothing does.

    Several may write one file at once: the last one to end wins.

    Raises:
        OSError: If the file system fails, naming `path`: no space left, no permission.
    """
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}{UNFINISHED}")
    try:
        yield unfinished
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())  # a name that is on the disk before its content is a damaged file after a crash
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: str | os.PathLike) -> str:
    """What a text file says, without the byte order mark of Windows; a `ValueError` that names it if it is no UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def parse_json(text: str, origin: str | os.PathLike) -> Any:
    """What JSON says; a `ValueError` that names its `origin`, such as the file, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is damaged, or no JSON: {error}") from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a file of JSON holds; a `ValueError` that names it if it holds none."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it must hold an object of JSON, got {type(value).__name__}.")
    return value


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The options that a file of YAML holds; a `ValueError` that names it if it holds none, or more than plain values."""
    try:
        value = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no YAML of plain values: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines, got {type(value).__name__}.")
    return value


def read_tensors(path: Path, allowed: Sequence[type | tuple[type, str]] = ()) -> Any:
    """What a file of `torch.save` holds. Code in it is never executed.

    Args:
        path (`Path`): The file.
        allowed: Classes of which it may hold objects beside tensors, as for `torch.serialization.safe_globals`.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, or holds other pickled objects.
    """
    with path.open("rb") as file, torch.serialization.safe_globals(list(allowed)):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and zipfile raise many kinds on broken files
            raise ValueError(
                f"{path} cannot be read as plain tensors: it is damaged or incomplete (download it again), or "
                "holds pickled Python objects, which are never executed (re-save its state dict where you trust it). "
                f"{error}"
            ) from error


def check_keys(name: str, given: Any, required: Iterable[str], optional: Iterable[str] | None = None) -> None:
    """Raises unless `given` has the required keys, and no others than the optional ones unless these are `None`."""
    given, required = given if isinstance(given, dict) else {}, set(required)
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{name} lacks {len(missing)} keys that are needed: {', '.join(missing[:10])}.")
    if optional is not None and (unknown := sorted(given.keys() - required - set(optional))):
        raise ValueError(f"{name} has {len(unknown)} unknown keys: {', '.join(map(str, unknown[:10]))}.")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps every other process that asks out of a folder that is there; this one may ask again.

    Raises:
        ValueError: If another one is in it.
    """
    lock = FileLock(folder.resolve() / LOCK_NAME, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder}: wait until it ends, or choose another folder."
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, of the same name; what was written comes into `path` when all of it is there, or nothing does.

    Args:
        path (`Path`): A folder that is there, and empty but for what a killed process left.

    Raises:
        OSError: If the file system fails.
        ValueError: If another process is writing to it.
    """
    with alone_in(path):
        for left in path.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left)
        with TemporaryDirectory(prefix=".", suffix=UNFINISHED, dir=path) as unfinished:
            place = Path(unfinished, path.resolve().name)
            place.mkdir()
            try:
                yield place
            except (SafetensorError, RuntimeError) as error:  # of safetensors and of torch.save
                raise OSError(f"{path} could not be written, nothing of it is left: {error}") from error
            for part in list(place.iterdir()):
                os.replace(part, path / part.name)


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`name was 1 and is now 2; ...`; empty where nothing differs."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)
