"""Draws the README's sheet of labelled pictures: the first prompts of tasks.py as people type them, and names marked
with *, which were never seen in training.

python examples/emoji/draw_sheet.py --output docs/drawn_by_liquid_emoji.png
"""

from __future__ import annotations

import argparse
import textwrap

from PIL import Image, ImageDraw, ImageFont
from tasks import EVERYDAY
from transformers import pipeline

import transformers_liquid


UNSEEN = [
    *("woman astronaut: medium skin tone", "firefighter: medium-light skin tone", "woman teacher: dark skin tone"),
    *("man construction worker: medium-dark skin tone", "woman scientist: medium-dark skin tone"),
    *("vampire: dark skin tone", "merperson: medium-light skin tone", "heart hands: medium-dark skin tone"),
]
COLUMNS, SIDE, LABEL, GAP = 8, 112, 30, 8


def main(args: argparse.Namespace) -> None:
    prompts = [*EVERYDAY][:32] + UNSEEN
    images = pipeline("text-to-image", model=args.model)(prompts, seed=args.seed)
    rows = -(-len(prompts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + LABEL + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        left = GAP + index % COLUMNS * (SIDE + GAP)
        top = GAP + index // COLUMNS * (SIDE + LABEL + GAP)
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        label = "\n".join(textwrap.wrap(prompt + " *" * (prompt in UNSEEN), width=20)[:2])
        draw.multiline_text((left + SIDE / 2, top + SIDE), label, fill="#444", font=font, anchor="ma", align="center")
    sheet.save(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=transformers_liquid.EMOJI_CHECKPOINT)
    parser.add_argument("--output", default="docs/drawn_by_liquid_emoji.png")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
