"""What saved repositories hold so that `trust_remote_code=True` loads them where nobody has imported this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


# The module that repositories carry: transformers copies such a file and its relative imports, so it imports the package.
REMOTE_MODULE = "modeling_liquid_remote"


def write_remote_code(directory: str | Path, **classes: str) -> dict[str, str]:
    """Writes the module and returns the `auto_map` of a configuration: the classes in it, by those of transformers."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).parent / f"{REMOTE_MODULE}.py.txt", Path(directory, f"{REMOTE_MODULE}.py"))
    return {auto_class: f"{REMOTE_MODULE}.{name}" for auto_class, name in classes.items()}


@classmethod
def not_copied(cls: type, auto_class: Any = None) -> None:
    """In place of `register_for_auto_class`, after which transformers would save a file of this package, and break it off."""
