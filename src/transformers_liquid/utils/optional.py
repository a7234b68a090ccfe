"""Libraries that only some of the package needs."""

from importlib import import_module


def require(library: str, what: str, extra: str = "train") -> None:
    """Raises an `ImportError` that says how to get a library, of an extra of ours, unless it is there; `what` needs it."""
    try:
        import_module(library)
    except ImportError as error:
        advice = f'`pip install {library}`, or in a clone of this package `pip install -e ".[{extra}]"`'
        raise ImportError(f"{what} needs {library}, which cannot be imported ({error}): {advice}.") from error
