"""Rooms import only what lies below them; imports for type checkers alone do not count."""

import ast
from pathlib import Path

import pytest

import transformers_liquid


SOURCE = Path(transformers_liquid.__file__).parents[1]
# From the ground up. A room may import those before it, and itself. The face of the package lies above its rooms; the
# command line above it, in a package of its own, since what is in here cannot be imported at once.
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
    "__init__",
    "transformers_liquid_cli",
    "__main__",
]


def room(module: list[str]) -> str:
    """Where a module of ours lies: `["transformers_liquid", "utils", "files"]` in `utils`."""
    package, *inside = module
    if package == "transformers_liquid_cli":
        return package
    return inside[0] if inside and inside[0] in LAYERS else "__init__"


def imports(tree: ast.AST, package: list[str]) -> list[list[str]]:
    """What a module in a package imports of ours, within functions too, but not under `if TYPE_CHECKING:`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            found += [[*above, *(node.module or "").split("."), alias.name] for alias in node.names]
        else:
            found += imports(node, package)
    return [[part for part in name if part] for name in found if name[0].startswith("transformers_liquid")]


@pytest.mark.parametrize(
    "path", sorted(SOURCE.glob("transformers_liquid*/**/*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_a_room_imports_only_what_lies_below_it(path):
    module = [*path.relative_to(SOURCE).with_suffix("").parts]
    for name in imports(ast.parse(path.read_text(encoding="utf-8")), module[:-1]):
        assert LAYERS.index(room(name)) <= LAYERS.index(room(module)), f"{'.'.join(module)} imports {'.'.join(name)}"


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in SOURCE.glob("transformers_liquid/*/__init__.py")}
    assert folders <= {*LAYERS}


def test_the_rule_sees_what_it_should():
    code = "from ..training.trainer import x\nif TYPE_CHECKING:\n    from ..data import y\ndef f():\n    import torch\n    from . import z"
    assert [room(name) for name in imports(ast.parse(code), ["transformers_liquid", "models"])] == [
        "training",
        "models",
    ]
