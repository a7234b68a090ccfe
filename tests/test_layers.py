"""Rooms import only what lies below them; imports for type checkers alone do not count."""

import ast
from pathlib import Path

import pytest

import transformers_liquid


PACKAGE = Path(transformers_liquid.__file__).parent
# From the ground up. A room may import those before it, and itself. The command line lies above them all, beside the
# package, since what is in here cannot be imported at once.
LAYERS = [
    "checkpoints",
    "utils",
    "codecs",
    "ops",
    "generation",
    "models",
    "conversion",
    "pipelines",
    "data",
    "training",
    "evaluation",
    "serving",
]
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]


def imports(tree: ast.AST) -> list[ast.ImportFrom]:
    """All relative imports, within functions too, but for those under `if TYPE_CHECKING:`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        found += [node] if isinstance(node, ast.ImportFrom) and node.level else imports(node)
    return found


def test_no_room_imports_the_command_line():
    assert [path for path in MODULES if "transformers_liquid_cli" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below_it(path):
    parts = path.relative_to(PACKAGE).parts
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        target = [*parts[: len(parts) - node.level], *(node.module or node.names[0].name).split(".")]
        assert LAYERS.index(target[0]) <= LAYERS.index(parts[0]), f"{path}: {ast.unparse(node)}"
