"""Where files of a repository come from, and errors that name the one that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file


# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where files come from."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def part_of(name_or_path: Any, part: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that lead to a part of a pipeline's repository, each of which is a folder.

    Args:
        name_or_path (`str` or `os.PathLike`): As for `from_pretrained`: of such a repository, or of any other.
        part (`str`): Which folder.
        kwargs (`dict`): The arguments of the caller; with a `subfolder`, or for another repository, they are left as they are.
    """
    if name_or_path is None or kwargs.get("subfolder"):
        return kwargs
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    index = cached_file(name_or_path, "model_index.json", **hub_arguments(kwargs), **quiet)
    return kwargs if index is None else {**kwargs, "subfolder": part}


@contextmanager
def naming(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Errors about a repository that is not there name it: those of transformers speak of the network alone."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        if os.path.exists(name_or_path):
            raise
        raise OSError(f"There is no {str(name_or_path)!r} here, nor was it found on the Hub: {error}") from error
