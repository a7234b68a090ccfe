"""A pipeline's repository, each part of which is a folder; the model and the processor are found from its root too."""

from __future__ import annotations

from typing import Any

from transformers.utils import cached_file

from ...utils.hub import hub_arguments


def part_of(name_or_path: Any, part: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that lead to a part, where the name is that of a pipeline's repository.

    Args:
        name_or_path (`str` or `os.PathLike`): As for `from_pretrained`.
        part (`str`): Which folder.
        kwargs (`dict`): The arguments of the caller; with a `subfolder` they are left as they are.
    """
    if name_or_path is None or kwargs.get("subfolder"):
        return kwargs
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    index = cached_file(name_or_path, "model_index.json", **hub_arguments(kwargs), **quiet)
    return kwargs if index is None else {**kwargs, "subfolder": part}
