"""The emoji data set: 3,786 pictures of 64 x 64 pixels with their names, and the split used by every script here.

Pictures and names come from the npm package `emoji-datasource-google` 16.0.0 (MIT; the artwork is Google's Noto
Emoji, Apache-2.0). Nothing of it is stored in this repository; `npm` fetches it once:

    python examples/emoji/emoji_data.py --data_dir emoji-data
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image


PACKAGE = "emoji-datasource-google@16.0.0"
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
NUM_UNSEEN_COMPOSITIONS, NUM_UNSEEN_FLAGS = 150, 10


@dataclass(frozen=True)
class Emoji:
    """One picture: its lower-case name, its group, its file and the split it belongs to."""

    name: str
    group: str
    path: Path
    split: str  # "seen", "unseen_composition" or "unseen_flag"
    short_names: tuple[str, ...] = ()  # as in chats, such as "dog"; of emoji without skin tones


def fetch(folder: str | Path, package: str = PACKAGE) -> Path:
    """Fetches an npm package into `folder` unless it is already there; returns the package's files."""
    folder = Path(folder)
    if not (folder / "package" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.PIPE)
        with tarfile.open(folder / packed.stdout.decode().split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def load_emoji(data_dir: str | Path) -> list[Emoji]:
    """All pictures in the package's order, split reproducibly.

    Held out are 150 person x skin-tone compositions (at most one per person, so that every person and every tone
    is seen, only never together) and 10 flags.
    """
    package = fetch(data_dir)
    found: list[tuple[str, str, str, str, tuple[str, ...]]] = []  # name, group, file, kind, short names
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        # Unicode renamed U+1F935; the data set still gives it the name of its masculine variant.
        name = "person in tuxedo" if entry["unified"] == "1F935" else entry["name"].lower()
        if entry["has_img_google"]:
            kind = "flag" if entry["subcategory"] == "country-flag" else "plain"
            short_names = tuple(short_name.replace("_", " ") for short_name in entry["short_names"])
            found.append((name, entry["category"], entry["image"], kind, short_names))
        for tones, variation in entry.get("skin_variations", {}).items():
            if variation["has_img_google"]:
                described = ", ".join(f"{SKIN_TONES[tone]} skin tone" for tone in tones.split("-"))
                kind = f"composition of {name}" if "-" not in tones else "pair"
                found.append((f"{name}: {described}", entry["category"], variation["image"], kind, ()))

    draw = random.Random(0)
    flags = sorted(name for name, _, _, kind, _ in found if kind == "flag")
    compositions: dict[str, list[str]] = {}
    for name, _, _, kind, _ in found:
        if kind.startswith("composition of "):
            compositions.setdefault(kind, []).append(name)
    people = draw.sample(sorted(compositions), NUM_UNSEEN_COMPOSITIONS)
    unseen = {draw.choice(compositions[person]): "unseen_composition" for person in people}
    unseen |= dict.fromkeys(draw.sample(flags, NUM_UNSEEN_FLAGS), "unseen_flag")
    folder = package / "img" / "google" / "64"
    return [
        Emoji(name, group, folder / file, unseen.get(name, "seen"), short_names)
        for name, group, file, _, short_names in found
    ]


def split_tones(name: str) -> tuple[str, str]:
    """A name without its skin tones, and these, such as `"dark skin tone"`; empty if it has none."""
    base, _, tones = name.rpartition(": ") if name.endswith("skin tone") else (name, "", "")
    return base, tones


def load_pixels(emoji: list[Emoji]) -> torch.Tensor:
    """All pictures on white, `(N, 3, 64, 64)` float32 in [-1, 1]."""
    pixels = np.empty((len(emoji), 64, 64, 3), dtype=np.uint8)
    for index, item in enumerate(emoji):
        picture = Image.open(item.path).convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        if on_white.size != (64, 64):
            raise ValueError(f"{item.path} is {on_white.size}, expected 64 x 64 pixels.")
        pixels[index] = np.asarray(on_white)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    emoji = load_emoji(parser.parse_args().data_dir)
    for split in ("seen", "unseen_composition", "unseen_flag"):
        print(f"{split}: {sum(item.split == split for item in emoji)}")
