"""Draws the figures of docs/drawing.md: the same prompts and seed, one setting changed at a time.

python examples/emoji/draw_settings.py --output docs/settings
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline

import transformers_liquid


PROMPTS = ("fruit", "animal", "a happy face", "vehicle", "woman teacher: dark skin tone")
# A figure each, a column for each: what the call is given. All else is the checkpoint's own. Without guidance, its
# min-p leaves out nothing and the filters have something to do.
PLAIN = {"guidance_scale": 1.0, "top_p": 1.0}
FIGURES = {
    "guidance_scale": [{"guidance_scale": scale} for scale in (1.0, 2.0, 4.0, 7.0, 12.0)],
    "guidance_min_p": [{"guidance_min_p": p} for p in (None, 0.01, 0.1, 0.5, 1.0)],
    "temperature": [PLAIN | {"temperature": value} for value in (0.2, 0.7, 1.0, 1.3, 2.0)],
    "top_p": [PLAIN | {"temperature": 1.3, "top_p": value} for value in (0.3, 0.6, 0.8, 0.9, 1.0)],
    "top_k": [PLAIN | {"temperature": 1.3, "top_k": value} for value in (1, 4, 16, 64, None)],
    "min_p": [PLAIN | {"temperature": 1.3, "min_p": value} for value in (None, 0.01, 0.05, 0.1, 0.3)],
    "seed": [{"seed": seed} for seed in (0, 1, 2, 3, 4)],
    "negative_prompt": [{"negative_prompt": text} for text in (None, "red", "cat", "girl", "bus")],
    "size": [{"width": width, "height": height} for width, height in ((64, 64), (96, 64), (64, 96), (32, 32))],
}
SIDE, GAP, HEAD = 80, 6, 34


def draw_figure(pipe, settings: list[dict], seed: int) -> Image.Image:
    columns = []
    for given in settings:
        seeds = [given.get("seed", seed)] * len(PROMPTS)
        columns.append(pipe(list(PROMPTS), **given | {"seed": seeds}))
    size = (len(columns) * (SIDE + GAP) + GAP, HEAD + len(PROMPTS) * (SIDE + GAP))
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=11)
    draw = ImageDraw.Draw(sheet)
    for column, (given, images) in enumerate(zip(settings, columns, strict=True)):
        left = GAP + column * (SIDE + GAP)
        changed = [name for name in given if any(other[name] != given[name] for other in settings)]
        label = "\n".join(
            f"{given[name]:g}" if isinstance(given[name], float) else str(given[name]) for name in changed
        )
        draw.multiline_text((left + SIDE / 2, HEAD / 2), label, fill="#444", font=font, anchor="mm", align="center")
        for row, image in enumerate(images):
            image.thumbnail((SIDE, SIDE))
            sheet.paste(
                image, (left + (SIDE - image.width) // 2, HEAD + row * (SIDE + GAP) + (SIDE - image.height) // 2)
            )
    return sheet


def main(args: argparse.Namespace) -> None:
    pipe = pipeline("text-to-image", model=args.model)
    pipe.set_progress_bar_config(disable=True)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.figures or FIGURES:
        sheet = draw_figure(pipe, FIGURES[name], args.seed)
        sheet.quantize(192).save(args.output / f"{name}.png", optimize=True)
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=transformers_liquid.EMOJI_CHECKPOINT)
    parser.add_argument("--figures", nargs="*", choices=list(FIGURES))
    parser.add_argument("--output", type=Path, default=Path("docs/settings"))
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
