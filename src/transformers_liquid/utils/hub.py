"""Where files of a repository come from, and errors that name the one that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HFValidationError


# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where files come from."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


@contextmanager
def naming(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Errors about a repository that is not there name it: those of transformers speak of the network alone."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        if os.path.exists(name_or_path):
            raise
        raise OSError(f"There is no {str(name_or_path)!r} here, nor was it found on the Hub: {error}") from error
