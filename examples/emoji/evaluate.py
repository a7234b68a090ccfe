"""Measures liquid-emoji on names that it was trained on and on names that it never saw.

    python examples/emoji/evaluate.py --data_dir emoji-data --model emoji-checkpoint --output emoji-evaluation
    python examples/emoji/evaluate.py --data_dir emoji-data --model emoji-lm --sweep --output emoji-sweep

Writes OUTPUT.json and OUTPUT.png (originals, reconstructions and drawn pictures). For each split:
- top-1 and top-5: the drawn picture is compared with the codec's reconstructions of all 3,786 emoji by mean squared
  error over pixels; top-k counts the pictures for which fewer than k other emoji are nearer than the one named. Emoji
  whose originals are the same in every pixel count as one.
- exact name: the caption written for a picture (greedy) is its name, letter for letter.
- PSNR: of the codec's reconstructions, the mean over pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from emoji_data import Emoji, load_emoji, load_pixels
from PIL import Image
from tqdm import tqdm

from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor


SPLITS = ("seen", "unseen_composition", "unseen_flag")
GREEDY = {"do_sample": False}
SAMPLING = [
    {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9))
]
GUIDANCE = [{"guidance_scale": 1.0}] + [
    {"guidance_scale": scale, "guidance_min_p": min_p} for scale, min_p in product((1.5, 2.0, 3.0), (None, 0.1, 0.3))
]


def main(args: argparse.Namespace) -> None:
    model = LiquidForCausalLM.from_pretrained(args.model).eval()
    processor = LiquidProcessor.from_pretrained(args.model)
    emoji = load_emoji(args.data_dir)
    judge = Judge(model, emoji, load_pixels(emoji), args.batch_size)
    chosen = choose(emoji, None if args.num_seen < 0 else args.num_seen)

    result: dict[str, Any] = {}
    if args.sweep:
        # Settings are chosen on half of the unseen compositions: the other half has no part in the choice.
        chosen = {"seen": chosen["seen"], "unseen_composition": chosen["unseen_composition"][::2]}
        settings = [guidance | drawing for drawing in (GREEDY, *SAMPLING) for guidance in GUIDANCE]
        result |= {"sizes": sizes(chosen), "sweep": []}
        for setting in settings:
            _, scores = draw_and_judge(model, processor, judge, emoji, chosen, setting, args)
            result["sweep"].append({"settings": setting, **scores})
            print(json.dumps(setting), table(scores), flush=True)
            Path(args.output).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return

    result["sizes"] = sizes(chosen)
    start = time.perf_counter()
    drawn, scores = draw_and_judge(model, processor, judge, emoji, chosen, {}, args)
    result["settings"] = model.generation_config.image_generation_config
    result["seconds_per_picture"] = (time.perf_counter() - start) / sum(len(indices) for indices in chosen.values())
    for split, indices in chosen.items():
        scores[split]["exact_name"] = judge.exact_names(model, processor, indices, args.batch_size)
        scores[split]["psnr"] = judge.psnr(indices)
    result |= scores
    print(table(scores))
    Path(args.output).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    contact_sheet(judge, chosen, drawn).save(Path(args.output).with_suffix(".png"))


def choose(emoji: list[Emoji], num_seen: int | None) -> dict[str, list[int]]:
    """Indices of each split; of the seen ones a fixed random sample."""
    chosen = {split: [index for index, item in enumerate(emoji) if item.split == split] for split in SPLITS}
    if num_seen is not None:
        order = torch.randperm(len(chosen["seen"]), generator=torch.Generator().manual_seed(0))[:num_seen]
        chosen["seen"] = [chosen["seen"][index] for index in order.sort().values]
    return chosen


def sizes(chosen: dict[str, list[int]]) -> dict[str, int]:
    """Number of pictures of each split."""
    return {split: len(indices) for split, indices in chosen.items()}


def draw_and_judge(model, processor, judge: Judge, emoji, chosen, setting, args) -> tuple[dict, dict]:
    """Draws every chosen emoji from its name; returns the pictures and the scores of each split."""
    drawn, scores = {}, {}
    for split, indices in chosen.items():
        if indices:
            names = [emoji[index].name for index in indices]
            drawn[split] = draw(model, processor, names, setting, args.batch_size, args.seed)
            scores[split] = judge.nearest_neighbours(drawn[split], indices)
    return drawn, scores


def draw(model, processor, names: list[str], setting: dict, batch_size: int, seed: int) -> torch.Tensor:
    """One picture `(N, 3, 64, 64)` for each name; a picture does not depend on the others."""
    pictures = []
    for start in tqdm(range(0, len(names), batch_size), desc="draw", leave=False, mininterval=5):
        batch = names[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(batch))]
        inputs = processor(text=batch, generation_mode="image", return_tensors="pt")
        ids = model.generate(**inputs, generation_mode="image", generator=generators, **setting)
        pictures.append(model.decode_image_tokens(ids))
    return torch.cat(pictures)


class Judge:
    """Knows what the codec makes of all emoji, and compares pictures and names with them.

    Args:
        model ([`LiquidForCausalLM`]): Holds the codec.
        emoji (`list[Emoji]`): All of them.
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): Their pictures in [-1, 1].
        batch_size (`int`): For encoding and decoding.
    """

    def __init__(self, model: LiquidForCausalLM, emoji: list[Emoji], pixels: torch.Tensor, batch_size: int) -> None:
        self.emoji, self.pixels = emoji, pixels
        codec = model.model.vq_model
        self.codes = torch.cat([codec.encode_codes(batch) for batch in pixels.split(batch_size)])
        self.reconstructions = torch.cat(
            [codec.decode_codes(batch).clamp(-1, 1) for batch in self.codes.split(batch_size)]
        )
        groups: dict[bytes, int] = {}
        self.group = torch.tensor([groups.setdefault(picture.numpy().tobytes(), len(groups)) for picture in pixels])

    def nearest_neighbours(self, drawn: torch.Tensor, indices: list[int]) -> dict[str, float]:
        """Shares of pictures whose named emoji is the nearest, and among the five nearest."""
        known = self.reconstructions.flatten(1)
        distances = known.square().sum(1) - 2 * drawn.flatten(1) @ known.T
        own = distances.gather(1, torch.tensor(indices)[:, None])
        same = self.group[indices][:, None] == self.group[None]
        nearer = ((distances < own - 1e-2) & ~same).sum(1)  # the sum over pixels has a rounding error of about 1e-3
        return {"top1": (nearer < 1).float().mean().item(), "top5": (nearer < 5).float().mean().item()}

    @torch.no_grad()
    def exact_names(self, model, processor, indices: list[int], batch_size: int) -> float:
        """Share of pictures that are given their name (or that of an identical picture)."""
        names: dict[int, set[str]] = {}
        for item, group in zip(self.emoji, self.group.tolist(), strict=True):
            names.setdefault(group, set()).add(item.name)
        right = 0
        for start in tqdm(range(0, len(indices), batch_size), desc="describe", leave=False, mininterval=5):
            batch = indices[start : start + batch_size]
            prompts = torch.tensor([processor.caption_ids(self.codes[index].flatten()) for index in batch])
            ids = model.generate(input_ids=prompts, max_new_tokens=40, do_sample=False)
            written = processor.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
            groups = self.group[batch].tolist()
            right += sum(text in names[group] for text, group in zip(written, groups, strict=True))
        return right / len(indices)

    def psnr(self, indices: list[int]) -> float:
        """Peak signal-to-noise ratio of the reconstructions in dB."""
        error = (self.reconstructions[indices] - self.pixels[indices]).square().mean((1, 2, 3))
        return (10 * torch.log10(4 / error.clamp_min(1e-10))).mean().item()


def table(scores: dict[str, dict[str, float]]) -> str:
    """Scores in one line."""
    return " | ".join(
        f"{split}: " + " ".join(f"{name} {value:.3f}" for name, value in values.items())
        for split, values in scores.items()
    )


def contact_sheet(
    judge: Judge, chosen: dict[str, list[int]], drawn: dict[str, torch.Tensor], columns: int = 20
) -> Image.Image:
    """Blocks of three rows: originals, reconstructions, pictures drawn from the names; one block of seen emoji, two of
    unseen compositions, one of unseen flags."""
    blocks = []
    for split, count in (("seen", 1), ("unseen_composition", 2), ("unseen_flag", 1)):
        indices = chosen[split]
        picks = torch.linspace(0, len(indices) - 1, min(columns * count, len(indices))).long()
        for part in picks.split(columns):
            rows = [source[[indices[i] for i in part]] for source in (judge.pixels, judge.reconstructions)]
            rows = [torch.cat(list(row), dim=-1) for row in (*rows, drawn[split][part])]
            block = torch.cat(rows, dim=-2)
            blocks.append(torch.nn.functional.pad(block, (0, 64 * columns - block.shape[-1], 0, 8), value=1.0))
    sheet = ((torch.cat(blocks, dim=-2) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(sheet.numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--model", default="emoji-checkpoint")
    parser.add_argument("--output", default="emoji-evaluation", help="path of the results, without ending")
    parser.add_argument("--num_seen", type=int, default=512, help="seen emoji, a fixed random sample; -1 means all")
    parser.add_argument("--sweep", action="store_true", help="compare settings instead of using the model's own")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
