"""Draws the figures of docs/how_it_works.md with the embedded model: codes, guidance, the course of a drawing, speculation.

python examples/emoji/draw_how_it_works.py --output docs/how_it_works
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidProcessor, partial_pictures


PROMPT, SEED = "red apple", 0
# Where guidance is shown: at a code of this prompt, with so many of its candidates.
GUIDED_PROMPT, POSITION, CANDIDATES = "a dog with a hat", 1, 8


def write_numbers(axes, numbers: torch.Tensor, title: str, size: float, colors: torch.Tensor | None = None) -> None:
    """A grid of numbers, coloured by `colors`."""
    axes.imshow(numbers if colors is None else colors, cmap="Pastel1" if colors is None else "viridis", alpha=0.6)
    for row, column in torch.cartesian_prod(*(torch.arange(side) for side in numbers.shape)).tolist():
        axes.text(column, row, int(numbers[row, column]), ha="center", va="center", fontsize=size)
    axes.set_title(title, fontsize=9)


def finish(figure, path: Path) -> None:
    for axes in figure.axes:
        if axes.get_label() != "chart":
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    with Image.open(path) as image:
        image = image.convert("RGB").quantize(128)
    image.save(path, optimize=True)
    print(path)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    model, processor = LiquidForCausalLM.from_pretrained(args.model), LiquidProcessor.from_pretrained(args.model)
    args.output.mkdir(parents=True, exist_ok=True)

    def draw(prompt, **settings):
        inputs = processor(text=[prompt], generation_mode="image", return_tensors="pt")
        generator = [torch.Generator().manual_seed(SEED)]
        return model.generate(
            **inputs, generation_mode="image", generator=generator, return_dict_in_generate=True, **settings
        )

    def picture_of(ids):
        return processor.post_process_multimodal_output(model.decode_image_tokens(ids), generation_mode="image")[0]

    output = draw(PROMPT, speculative=12)
    ids = output.sequences
    picture = picture_of(ids)
    offset = model.config.image_token_offset

    # 1. Pixels, codes, ids, pixels
    codes = model.model.vq_model.encode_codes(processor.image_processor(picture, return_tensors="pt")["pixel_values"])
    figure, (left, middle, right, last) = plt.subplots(1, 4, figsize=(12, 3.2))
    left.imshow(picture)
    left.set_title("64 × 64 pixels", fontsize=9)
    write_numbers(middle, codes[0], "encoded: 8 × 8 codes", 6.5)
    write_numbers(right, codes[0] + offset, f"code + {offset}: ids", 6.5)
    last.imshow(picture_of((codes + offset).flatten(1)))
    last.set_title("decoded again", fontsize=9)
    finish(figure, args.output / "codes.png")

    # 2. The course of a drawing
    steps = (1, 9, 17, 25, 33, 49, 64)
    figure, columns = plt.subplots(1, len(steps), figsize=(10.5, 1.7))
    for axes, step in zip(columns, steps, strict=True):
        axes.imshow(partial_pictures(model, ids[:, :step])[0])
        axes.set_title(f"{step} of 64", fontsize=9)
    finish(figure, args.output / "course.png")

    # 3. Guidance at one position
    drawn = draw(GUIDED_PROMPT).sequences[:, :POSITION]
    prompt = processor(text=[GUIDED_PROMPT], generation_mode="image", return_tensors="pt")["input_ids"]
    nothing = [processor.tokenizer.bos_token_id, processor.uncond_token_id, processor.boi_token_id]
    sides = [torch.cat([start, drawn], dim=1) for start in (prompt, torch.tensor([nothing]))]
    with_words, without = (model(side).logits[0, -1, offset : offset + 2048].float().log_softmax(-1) for side in sides)
    scale = 4.0
    guided = (without + scale * (with_words - without)).log_softmax(-1)
    allowed = torch.where(with_words < with_words.max() + torch.tensor(0.1).log(), -torch.inf, guided).log_softmax(-1)
    best = sum(scores.exp() for scores in (with_words, without, guided, allowed)).topk(CANDIDATES).indices
    figure, bars = plt.subplots(figsize=(7.5, 2.6), subplot_kw={"label": "chart"})
    named = {
        "u: without words": without, "c: with the prompt": with_words, f"u + {scale:g} (c − u)": guided, "and min-p": allowed
    }  # fmt: skip
    for index, (name, scores) in enumerate(named.items()):
        bars.bar(torch.arange(CANDIDATES) + (index - 1.5) * 0.2, scores[best].exp(), 0.19, label=name)
    bars.set_xticks(range(CANDIDATES), [f"code {code}" for code in best.tolist()], fontsize=8)
    bars.set_ylabel("probability", fontsize=9)
    bars.legend(fontsize=8, frameon=False)
    finish(figure, args.output / "guidance.png")

    # 4. Speculation: which forward gave which code
    accepted = output.accepted_codes[:, 0]
    forward_of = torch.arange(1, len(accepted) + 1).repeat_interleave(accepted)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3))
    every = torch.arange(1, 65).view(8, 8)
    write_numbers(left, every, "plain: 64 forwards", 8, every)
    which = forward_of.view(8, 8)
    write_numbers(right, which, f"speculative: {len(accepted)} forwards", 8, which)
    finish(figure, args.output / "speculation.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_CHECKPOINT)
    parser.add_argument("--output", type=Path, default=Path("docs/how_it_works"))
    main(parser.parse_args())
