"""What fails in a thread that generates is raised in the one that reads its streamer, which would wait forever."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class _Failure:
    """Stands in a queue of texts: raised where transformers' streamers compare what comes with their stop signal."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __eq__(self, other: Any) -> bool:
        raise self.error

    __hash__ = None


def tell_reader(streamer: Any, error: Exception) -> None:
    """Hands an error to whoever iterates over a streamer: one with a method `fail`, or one of transformers' for texts."""
    if hasattr(streamer, "fail"):
        streamer.fail(error)
    elif hasattr(streamer, "text_queue"):
        streamer.on_finalized_text(_Failure(error))


def telling_reader(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose errors are told to the reader of its argument `streamer` too."""

    @functools.wraps(generate)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            tell_reader(kwargs.get("streamer"), error)
            raise

    return told
