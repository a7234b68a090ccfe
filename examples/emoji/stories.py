"""Teaches liquid-emoji to write and draw by turns, and to edit: a short fine-tune, and what it is worth.

    python examples/emoji/stories.py --data_dir emoji-data --output_dir emoji-stories

Trains on made-up stories of two emoji ("once there was a red apple. <image> it met a rocket. <image> the end."), on edits
("<image> with dark skin tone") and, so that nothing is lost, on names and pictures as before. Run again to continue.
Then it measures, and writes to stories.json:
- stories: of how many prompts "once there was a NAME." the reply is picture, text, picture, text and an end; how many
  first pictures are nearest to the emoji NAME, and how many second ones to the emoji that the text before them names;
- edits of seen pictures to compositions that are held out: how many are nearest to the emoji asked for, with two and
  with three sides of guidance.
Nearest is by squared error over pixels among the codec's reconstructions of all 3,786 emoji.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from emoji_data import SKIN_TONES, load_emoji, load_pixels
from PIL import Image
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from transformers_liquid import EMOJI_CHECKPOINT, LiquidDataCollator, LiquidForCausalLM, LiquidProcessor, LiquidTrainer


STORY = "once there was a {}. <image> it met a {}. <image> the end."
SHARES = {"interleaved": 0.4, "edit": 0.25, "text_to_image": 0.35}


def main(args: argparse.Namespace) -> None:
    set_seed(0)
    emoji = load_emoji(args.data_dir)
    processor = LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT)
    codec = model.model.vq_model
    codes = torch.cat([codec.encode_codes(batch) for batch in load_pixels(emoji).split(128)])
    output = Path(args.output_dir)
    trainer = LiquidTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            adam_beta2=0.98,
            logging_steps=50,
            save_steps=200,
            save_total_limit=1,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Records(emoji, codes, args.max_steps * args.batch_size),
        data_collator=LiquidDataCollator(processor, caption_probability=0.2),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if output.is_dir() else None)
    model.eval()
    model.config.use_cache = True
    model.save_pretrained(output)
    processor.save_pretrained(output)
    evaluate(model, processor, emoji, codes, args)


class Records(torch.utils.data.Dataset):
    """A story, an edit or a picture with its name for each index, always the same."""

    def __init__(self, emoji: list, codes: torch.Tensor, length: int) -> None:
        self.emoji, self.codes, self.length = emoji, codes, length
        self.seen = [index for index, item in enumerate(emoji) if item.split == "seen"]
        self.edits = [edit for edit in edits(emoji) if emoji[edit[2]].split == "seen"]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = random.Random(index)
        (kind,) = draw.choices(list(SHARES), SHARES.values())
        if kind == "edit":
            source, wish, target = draw.choice(self.edits)
            images = [self.codes[source].tolist()]
            return {"kind": kind, "index": index, "text": wish, "images": images, "codes": self.codes[target].tolist()}
        first, second = draw.sample(self.seen, 2)
        if kind == "text_to_image":
            return {"kind": kind, "index": index, "text": self.emoji[first].name, "codes": self.codes[first].tolist()}
        text = STORY.format(self.emoji[first].name, self.emoji[second].name)
        images = [self.codes[first].tolist(), self.codes[second].tolist()]
        return {"kind": kind, "index": index, "text": text, "images": images}


def edits(emoji: list) -> list[tuple[int, str, int]]:
    """Which picture, with which words, becomes which: between skin tones of a person, and from no tone to one."""
    index, found = {item.name: number for number, item in enumerate(emoji)}, []
    for target, item in enumerate(emoji):
        person, _, tone = item.name.partition(": ")
        if tone.count("skin tone") != 1:
            continue
        sources = [person, *(f"{person}: {other} skin tone" for other in SKIN_TONES.values())]
        found += [
            (index[name], f"<image> with {tone}", target)
            for name in sources
            if name != item.name and name in index and emoji[index[name]].split == "seen"
        ]
    return found


@torch.no_grad()
def evaluate(model: LiquidForCausalLM, processor: LiquidProcessor, emoji: list, codes: torch.Tensor, args) -> None:
    known = torch.cat([model.decode_codes(part) for part in codes.split(128)])
    index = {item.name: number for number, item in enumerate(emoji)}

    def is_nearest(picture: torch.Tensor, wanted: int | None) -> bool:
        distances = (known - picture).flatten(1).square().sum(1)
        return wanted is not None and bool(distances[wanted] <= distances.min() + 1e-2)

    draw = random.Random(1)
    names = draw.sample([item.name for item in emoji if item.split == "seen"], args.number)
    inputs = processor(text=[f"once there was a {name}." for name in names], generation_mode="interleaved")
    generators = [torch.Generator().manual_seed(seed) for seed in range(args.number)]
    output = model.generate(
        **inputs, generation_mode="interleaved", max_new_tokens=40, max_images=2, do_sample=True, generator=generators
    )
    result: dict[str, Any] = {"stories": args.number, "whole": 0, "first": 0, "second": 0, "examples": []}
    for name, parts, reason in zip(names, output.parts, output.end_reasons, strict=True):
        texts = [processor.decode(part, skip_special_tokens=True) if part.ndim == 1 else "<image>" for part in parts]
        pictures = [part for part in parts if part.ndim == 3]
        result["whole"] += [text == "<image>" for text in texts] == [True, False, True, False] and reason == "eos"
        result["examples"].append([*texts, reason])
        result["first"] += bool(pictures) and is_nearest(pictures[0], index[name])
        met = re.search(r"it met a (.*?)\.", " ".join(texts))
        if len(pictures) == 2 and met:
            result["second"] += is_nearest(pictures[1], index.get(met[1]))
    blank = [torch.ones_like(known[0])] * 2
    shown = [[*(part for part in parts if part.ndim == 3), *blank][:2] for parts in output.parts[:6]]
    sheet = torch.cat([torch.cat(pair, -1) for pair in shown], -2)

    wanted = draw.sample([edit for edit in edits(emoji) if emoji[edit[2]].split == "unseen_composition"], args.number)
    sources = (known[[source for source, _, _ in wanted]] + 1) / 2
    inputs = processor(
        text=[wish for _, wish, _ in wanted], images=[[picture] for picture in sources], generation_mode="image"
    )
    result["edits"] = {"number": args.number}
    for name, settings in (("two sides", {}), ("three sides", {"image_guidance_scale": args.image_guidance_scale})):
        ids = model.generate(**inputs, generation_mode="image", generator=list(generators), **settings)
        drawn = model.decode_image_tokens(ids)
        result["edits"][name] = sum(is_nearest(one, target) for one, (_, _, target) in zip(drawn, wanted, strict=True))
        result["edits"][f"{name}, as the source"] = sum(
            is_nearest(one, source) for one, (source, _, _) in zip(drawn, wanted, strict=True)
        )
    pairs = torch.cat([sources * 2 - 1, drawn], -1)[:6]
    sheet = torch.cat([sheet, torch.cat(list(pairs), -2)], -1)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(Path(args.output_dir) / "stories.png")
    (Path(args.output_dir) / "stories.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "examples"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", default="emoji-stories")
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--number", type=int, default=60, help="stories and edits to measure")
    parser.add_argument("--image_guidance_scale", type=float, default=1.5)
    main(parser.parse_args())
