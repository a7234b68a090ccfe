"""Files that are whole or not there, and runs that go on only with the settings they began with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to; what was written becomes `path` in one step, or nothing does."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    yield unfinished
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`name was 1 and is now 2; ...`; empty where nothing differs."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)
