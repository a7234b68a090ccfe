"""Draws the figures of the pages on stories and on editing.

    python examples/emoji/draw_stories.py --model emoji-checkpoint --output docs

Writes OUTPUT/stories.png, replies of texts and pictures by turns, and OUTPUT/editing.png: a picture that was drawn, and what
became of it.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline

import transformers_liquid
from transformers_liquid import LiquidForCausalLM, LiquidProcessor


BEGINNINGS = (
    "once there was a cat.",
    "once there was a rocket.",
    "once upon a time there was a penguin.",
    "this is kim.",
    "once there was a woman.",
)
EDITS = {
    "woman firefighter": ("make it dark-skinned", "as a man", "as a astronaut"),
    "red heart": ("in green", "make it blue", "in purple"),
    "man cook: medium skin tone": ("as a woman", "with light skin tone", "as a teacher"),
    "clock face three oclock": ("at one oclock", "at six thirty", "at ten oclock"),
}
SIDE, GAP = 96, 10


def main(args: argparse.Namespace) -> None:
    model = LiquidForCausalLM.from_pretrained(args.model)
    processor = LiquidProcessor.from_pretrained(args.model)
    rows = []
    for seed, beginning in enumerate(BEGINNINGS, args.seed):
        torch.manual_seed(seed)
        output = model.generate(
            **processor(text=[beginning], generation_mode="interleaved"),
            generation_mode="interleaved",
            max_images=3,
            max_new_tokens=60,
            do_sample=True,
            top_p=0.8,
            generator=[torch.Generator().manual_seed(seed)],
        )
        (parts,) = processor.post_process_multimodal_output(output, generation_mode="interleaved")
        rows.append([beginning, *(part[part["type"]] for part in parts)])
    sheet(rows).save(Path(args.output) / "stories.png")
    pipe = pipeline("text-to-image", model=args.model, progress_bar=False)
    rows = []
    for name, wishes in EDITS.items():
        (picture,) = pipe(name, seed=args.seed)
        rows.append([name, picture])
        for wish in wishes:
            rows[-1] += [wish, pipe(wish, image=picture, seed=args.seed)[0]]
    sheet(rows).save(Path(args.output) / "editing.png")


def sheet(rows: list[list[str | Image.Image]]) -> Image.Image:
    """Texts and pictures of each row side by side."""
    width = max(len(row) for row in rows) * (SIDE + GAP) + GAP
    image = Image.new("RGB", (width, len(rows) * (SIDE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    for line, row in enumerate(rows):
        for column, part in enumerate(row):
            left, top = GAP + column * (SIDE + GAP), GAP + line * (SIDE + GAP)
            if isinstance(part, str):
                text = "\n".join(textwrap.wrap(part, 14))
                where = (left + SIDE / 2, top + SIDE / 2)
                draw.multiline_text(where, text, fill="#333", font=font, anchor="mm", align="center")
            else:
                image.paste(part.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
    return image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=transformers_liquid.EMOJI_CHECKPOINT)
    parser.add_argument("--output", default="docs")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
