"""The README and the pages of docs/ are executed: what they show is what happens. Their links lead somewhere."""

import io
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from runpy import run_path

import pytest
import yaml
from PIL import Image
from tiny_vokens import tiny_voken_pipeline

from transformers_liquid import EMOJI_CHECKPOINT, VOKEN_EMOJI, LiquidForCausalLM
from transformers_liquid_cli import main


ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("modeling_cards/*.md")))
}
# Blocks below this comment need weights that no test machine has.
NOT_RUN = "<!-- not run by the tests"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language, but for those marked as not run."""
    found = re.finditer(rf"(?P<before>[^\n]*)\n```{language}\n(?P<code>.*?)```", PAGES[page], flags=re.DOTALL)
    return [match["code"] for match in found if not match["before"].startswith(NOT_RUN)]


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.startswith("transformers-liquid ")]


RUN = [page for page in PAGES if page == "README.md" or page.startswith("docs/")]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec")
    LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("vokens")
    tiny_voken_pipeline("llava").save_pretrained(path)
    return path


@pytest.fixture
def folder(codec, vokens, tmp_path, monkeypatch):
    """What the examples speak of: a model, a codec, pictures, texts, prompts."""
    for name in ("picture.png", "apple.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("red apple\ndog face\n")
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("my-liquid", "path/to/liquid"):
        (tmp_path / name).symlink_to(EMOJI_CHECKPOINT, target_is_directory=True)
    (tmp_path / "my-vokens").symlink_to(vokens, target_is_directory=True)
    (tmp_path / "path" / "to" / "codec").symlink_to(codec, target_is_directory=True)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "red.png")
    (tmp_path / "photos" / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a red square"}\n')
    pair = '{"input_image": "photos/red.png", "edit_prompt": "the same again", "edited_image": "picture.png"}'
    (tmp_path / "edits.jsonl").write_text(pair + "\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "a red square is red"}\n')
    options = {"datasets": ["texts.jsonl"], "max_steps": 1, "total_batch_size": 8, "use_cpu": True}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"model": "my-liquid", "output_dir": "my-run", **options}))
    (tmp_path / "pairs.tsv").write_text("caption\timage_path\na red square\tpicture.png\n")
    options = {"model": "my-vokens", "datasets": ["pairs.tsv"], "max_steps": 1, "total_batch_size": 8, "use_cpu": True}
    for stage in (1, 2):
        settings = {"stage": stage, "output_dir": f"my-stage{stage}", **options}
        (tmp_path / f"stage{stage}.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "benchmarks" / "pope").mkdir(parents=True)
    (tmp_path / "benchmarks" / "val2014").symlink_to(tmp_path / "photos")
    question = '{"question_id": 1, "image": "red.png", "text": "Is there a dog in the image?", "label": "no"}\n'
    for part in ("random", "popular", "adversarial"):
        (tmp_path / "benchmarks" / "pope" / f"coco_pope_{part}.json").write_text(question)
    (tmp_path / "benchmarks" / "pairs").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if blocks(page, "python")])
def test_every_python_block_runs_in_order(page, folder):
    namespace: dict = {"__name__": "example"}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), namespace)
    for picture in folder.glob("*.png"):
        assert Image.open(picture).width >= 64


@pytest.mark.parametrize(
    ("page", "line"),
    [
        pytest.param(page, line, marks=pytest.mark.slow if line.split()[1] in ("tokenize", "train", "expand") else ())
        for page in RUN
        for line in dict.fromkeys(commands(page))
    ],
)
def test_every_command_runs(page, line, folder, capsys):
    assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


def test_the_readme_shows_both_doors_and_is_short():
    assert len(blocks("README.md", "python")) >= 3 and len(commands("README.md")) >= 3
    assert len(PAGES["README.md"].encode()) <= 8192


def anchors(text: str) -> set[str]:
    """What headings can be linked to as, by GitHub's rules."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name if name else ROOT / page).resolve()
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """Paths in commands and in text, as far as they begin with a folder of the repository."""
    for path in re.findall(r"(?<![\w/.-])((?:benchmarks|docs|examples|tests|modeling_cards)/[\w./-]*\w)", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("checkpoint", [EMOJI_CHECKPOINT, VOKEN_EMOJI])
def test_an_embedded_checkpoint_carries_its_card_of_modeling_cards(checkpoint):
    embedded = Path(checkpoint, "README.md").read_text(encoding="utf-8")
    assert PAGES[f"modeling_cards/{Path(checkpoint).name}.md"] == embedded


@pytest.mark.skipif(
    f"typer=={version('typer')}\n" not in (ROOT / "constraints.txt").read_text(), reason="words of typer"
)
def test_the_page_of_options_is_what_the_parsers_say():
    assert run_path(str(ROOT / "docs" / "make_cli.py"))["page"]() == PAGES["docs/cli.md"], "python docs/make_cli.py"
