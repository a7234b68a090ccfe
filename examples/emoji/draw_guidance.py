"""Draws the figure of docs/drawing.md: the same prompts and seeds at several guidance scales, with and without min-p.

python examples/emoji/draw_guidance.py --output docs/guidance.png
"""

from __future__ import annotations

import argparse

from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline

import transformers_liquid


PROMPTS = ("red apple", "smiling face with sunglasses", "fire engine", "woman teacher: dark skin tone")
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
# What `guidance_min_p` is in the upper and in the lower half. So small a probability leaves out nothing.
MIN_P = {"min-p 0.2": 0.2, "no min-p": 1e-9}
SIDE, LABEL, HEAD, GAP = 96, 90, 24, 6


def main(args: argparse.Namespace) -> None:
    pipe = pipeline("text-to-image", model=args.model)
    rows = [(prompt, name) for name in MIN_P for prompt in PROMPTS]
    size = (LABEL + len(SCALES) * (SIDE + GAP) + GAP, HEAD + len(rows) * (SIDE + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, scale in enumerate(SCALES):
        left = LABEL + GAP + column * (SIDE + GAP)
        draw.text((left + SIDE / 2, HEAD / 2), f"guidance {scale:g}", fill="#444", font=font, anchor="mm")
        for half, min_p in enumerate(MIN_P.values()):
            # Without guidance there is nothing that min-p would leave out.
            settings = {"guidance_scale": scale} | ({"guidance_min_p": min_p} if scale > 1 else {})
            images = pipe(list(PROMPTS), seed=args.seed, **settings)
            for index, image in enumerate(images):
                top = HEAD + (half * len(PROMPTS) + index) * (SIDE + GAP)
                sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
    for index, (prompt, name) in enumerate(rows):
        label = "\n".join([*prompt.replace(": ", ":\n").replace(" with ", "\nwith ").split("\n"), name])
        middle = (LABEL / 2 + GAP, HEAD + index * (SIDE + GAP) + SIDE / 2)
        draw.multiline_text(middle, label, fill="#444", font=font, anchor="mm", align="center")
    sheet.save(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=transformers_liquid.EMOJI_CHECKPOINT)
    parser.add_argument("--output", default="docs/guidance.png")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
