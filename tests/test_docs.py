"""What the documentation says of the package is so: quoted messages, public names, options; its notebooks run."""

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import transformers_liquid


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def strings_of_the_source() -> list[str]:
    """Every string of the source, with … for what is filled in."""
    strings = []
    for path in ROOT.glob("src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


def says(string: str, parts: list[str]) -> bool:
    """Whether a string has these parts, in this order."""
    place = 0
    for part in parts:
        if (found := string.find(part, place)) < 0:
            return False
        place = found + len(part)
    return True


def test_messages_of_the_page_of_troubles_are_those_of_the_source():
    strings = strings_of_the_source()
    messages = re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        assert any(says(string, [part.strip() for part in message.split("…")]) for string in strings), message


def test_the_page_of_the_api_has_each_public_name_once():
    names = re.findall(r"^::: transformers_liquid\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(transformers_liquid.__all__)


def test_every_page_is_in_the_navigation_and_in_the_table_of_pages():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    table = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages == set(re.findall(r"(?<![\w/])[\w]+\.md$", navigation, flags=re.MULTILINE))
    assert pages - {"README.md"} <= set(re.findall(r"\]\((\w+\.md)\)", table))
    assert {f"notebooks/{path.name}" for path in NOTEBOOKS} == set(re.findall(r"\]\((notebooks/[^)]+)\)", table))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_cell_by_cell(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "notebook"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            # What takes minutes is learned in two steps here.
            code = re.sub(r"^steps = \d+$", "steps = 2", "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(code, path.name, "exec"), namespace)
    assert isinstance(namespace["sheet"], Image.Image)
