"""Icons beside the emoji: more things than emoji have, and words for colours; pictures of 64 x 64 pixels with names.

They come from the npm package `@iconify/json` 2.2.535: the sets of `SETS`, each under MIT, Apache-2.0 or CC0-1.0 (the
package's `collections.json` says which). Logos, brands, flags and sets of emoji are left out: another emoji set would
show what is held out of this one. `resvg-py` renders them on white; those of one colour in one of eight colours.

    pip install --no-deps resvg-py
    python examples/emoji/icons.py --data_dir emoji-data
"""

from __future__ import annotations

import argparse
import io
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from emoji_data import fetch
from PIL import Image
from tqdm import tqdm


PACKAGE = "@iconify/json@2.2.535"
COLOURED = ("icon-park", "flat-color-icons", "fluent-color", "marketeq", "glyphs-poly", "flat-ui")
# Sets of one colour, and which of a set's styles is taken (a whole picture in one style is enough).
SETS = dict.fromkeys(COLOURED, ("", "")) | {
    "mdi": ("", "-outline"),
    "ph": ("-fill", ""),
    "pinhead": ("", ""),
    "temaki": ("", ""),
    "maki": ("", ""),
    "healthicons": ("", "-outline"),
    "fluent": ("-24-filled", ""),
    "tabler": ("-filled", ""),
    "lucide": ("", ""),
}
COLOURS = {
    "red": "#d32f2f",
    "orange": "#f57c00",
    "yellow": "#fbc02d",
    "green": "#388e3c",
    "blue": "#1976d2",
    "purple": "#7b1fa2",
    "brown": "#6d4c41",
    "black": "#212121",
}
# Parts of names that say how an icon is drawn, not what it shows.
STYLES = re.compile(r"-(filled|fill|alt|variant|negative|outline|line|duotone|regular|\d+px|\d+)\b")


def load_icons(data_dir: str | Path) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Pictures `(N, 3, 64, 64)` uint8 on white, and `name`, `set` and `colour` (empty where it has its own) of each."""
    stored = Path(data_dir) / "icons.npz"
    if not stored.exists():
        pixels, entries = render(fetch(Path(data_dir) / "iconify", PACKAGE))
        np.savez(stored.with_suffix(".tmp.npz"), pixels=pixels, entries=np.array(json.dumps(entries)))
        stored.with_suffix(".tmp.npz").replace(stored)
    with np.load(stored) as file:
        return torch.from_numpy(file["pixels"]).permute(0, 3, 1, 2), json.loads(str(file["entries"]))


def render(package: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """All icons of `SETS` whose names are up to three plain words, one of a name in each set."""
    import resvg_py

    pixels, entries = [], []
    for name_of_set, (ending, left_out) in SETS.items():
        icons = json.loads((package / "json" / f"{name_of_set}.json").read_text(encoding="utf-8"))
        taken = set()
        for key, icon in tqdm(icons["icons"].items(), desc=name_of_set, leave=False, mininterval=5):
            name = STYLES.sub("", key).replace("-", " ")
            plain = re.fullmatch(r"[a-z]{2,}( [a-z]{2,}){0,2}", name)
            if not key.endswith(ending) or (left_out and key.endswith(left_out)) or not plain or name in taken:
                continue
            taken.add(name)
            colour = "" if name_of_set in COLOURED else list(COLOURS)[zlib.crc32(key.encode()) % len(COLOURS)]
            left, top = icon.get("left", 0), icon.get("top", 0)
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            border = 0.06 * max(width, height)
            box = f"{left - border} {top - border} {width + 2 * border} {height + 2 * border}"
            body = icon["body"].replace("currentColor", COLOURS.get(colour, "#424242"))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="64" height="64">{body}</svg>'
            drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64))))
            drawn = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), drawn.convert("RGBA").resize((64, 64)))
            pixels.append(np.asarray(drawn.convert("RGB")))
            entries.append({"name": name, "set": name_of_set, "colour": colour})
    return np.stack(pixels), entries


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    pixels, entries = load_icons(parser.parse_args().data_dir)
    for name_of_set in SETS:
        print(f"{name_of_set}: {sum(entry['set'] == name_of_set for entry in entries)}")
    print(f"{len(pixels)} icons")
