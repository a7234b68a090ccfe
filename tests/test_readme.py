"""The README is executed: what it shows is what happens."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from transformers_liquid import EMOJI_CHECKPOINT


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Blocks below this comment need weights that no test machine has.
NOT_RUN = "<!-- not run by the tests"


def blocks(language: str) -> list[str]:
    """The code blocks of a language, but for those marked as not run."""
    found = re.finditer(rf"(?P<before>[^\n]*)\n```{language}\n(?P<code>.*?)```", README, flags=re.DOTALL)
    return [match["code"] for match in found if not match["before"].startswith(NOT_RUN)]


def test_every_python_block_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    assert len(blocks("python")) >= 3
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    pictures = list(tmp_path.glob("**/*.png"))
    assert pictures and all(Image.open(picture).size[0] >= 64 for picture in pictures)


@pytest.mark.parametrize(
    "line",
    [
        line.split("#")[0].strip()
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("transformers-liquid ")
    ],
)
def test_every_command_of_the_readme_runs(line, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    (tmp_path / "prompts.txt").write_text("red apple\ndog face\n")
    (tmp_path / "my-liquid").symlink_to(EMOJI_CHECKPOINT, target_is_directory=True)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "red.png")
    (tmp_path / "photos" / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a red square"}\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "a red square is red"}\n')
    options = {"datasets": ["texts.jsonl"], "max_steps": 1, "total_batch_size": 8, "use_cpu": True}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"model": "my-liquid", "output_dir": "my-run", **options}))
    command = [sys.executable, "-m", "transformers_liquid", *shlex.split(line)[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, input="/quit\n", timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_only_files_that_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_embedded_checkpoint_carries_the_card_of_modeling_cards():
    card = ROOT / "modeling_cards" / "liquid-emoji.md"
    embedded = ROOT / "src" / "transformers_liquid" / "checkpoints" / "liquid-emoji" / "README.md"
    assert card.read_text(encoding="utf-8") == embedded.read_text(encoding="utf-8")
