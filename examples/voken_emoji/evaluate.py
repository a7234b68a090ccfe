"""What voken-emoji draws and tells, and what it needs for that: names, and scenes with more and less of what came before.

    python examples/voken_emoji/evaluate.py --output_dir voken-emoji

Writes `evaluation.json` and `evaluation.png` (eight names; the picture before and the one of eight scenes; these as they
are drawn in each context) into the model's folder:
- names: top-1, and that of the diffusion model's own text encoder;
- scenes: a person as something that no story showed it as, drawn with no context, with the text before, with the picture
  before, and with both (the paper's Table 6): how many have the tone, the gender, the role and all that is asked;
- told: how many pictures of scenes are told word for word.
A picture counts as the emoji that is nearest by squared error over pixels, among the VAE's own of all that are known.
With each share comes its 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from voken_emoji_data import TONES, file_of

from transformers_liquid import InterleavedVokenPipeline
from transformers_liquid.data.voken_collator import drawing_pixels
from transformers_liquid.models.liquid.image_processing_liquid import contact_sheet, load_image
from transformers_liquid.models.voken.prompts import STORY_PROMPTS


CONTEXTS = ("none", "text", "picture", "both")


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    names = [json.loads(line)["text"] for line in (folder / "names.jsonl").open(encoding="utf-8")]
    pixels = torch.stack([drawing_pixels(load_image(folder / "images" / file_of(name)), (64, 64)) for name in names])
    pipe = InterleavedVokenPipeline.from_pretrained(args.model)
    known = torch.cat([pipe.vae(some).sample.clamp(-1, 1) for some in pixels.split(64)]).flatten(1)

    def nearest(picture: Image.Image) -> str:
        return names[int((known - drawing_pixels(picture, (64, 64)).flatten()).square().sum(1).argmin())]

    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "seed": 0}
    run = {"num_images": 1, "max_new_tokens": len(pipe.processor.voken_token_ids), "do_sample": False}
    result: dict[str, Any] = {"settings": settings, "names": {}, "scenes": {}}

    # 1. Names
    chosen = random.Random(1).sample(names, min(args.number, len(names)))
    drawn = [out[0] for out in pipe(chosen, **settings, **run).segments]
    own = StableDiffusionPipeline.from_pretrained(folder / "diffusion", safety_checker=None)
    seeds = [torch.Generator().manual_seed(index) for index in range(len(chosen))]
    guided = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "generator": seeds}
    for what, pictures in {"vokens": drawn, "its own text encoder": own(chosen, **guided).images}.items():
        result["names"][what] = share([nearest(one) == name for one, name in zip(pictures, chosen, strict=True)])
    sheet = [*drawn[:8]]

    # 2. Scenes
    tests = json.loads((folder / "unseen.json").read_text(encoding="utf-8"))[: args.number]
    for scene in (0, 1):
        sheet += [load_image(folder / "images" / test["images"][scene]) for test in tests[:8]]
    part = lambda one: {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one}  # noqa: E731
    for context in CONTEXTS:
        turns = []
        for test in tests:
            before = [test["texts"][0]] if context in ("text", "both") else []
            before += [Image.open(folder / "images" / test["images"][0])] if context in ("picture", "both") else []
            asked = [*before, STORY_PROMPTS["image"].format(text=test["texts"][1])]
            turns.append([{"role": "user", "content": [*map(part, asked)]}])
        drawn = [out[0] for out in pipe(turns, **settings, **run).segments]
        found = [re.fullmatch(rf"(woman|man) ?(.*?)({'|'.join(TONES[::-1])})", nearest(one)) for one in drawn]
        # The name of a thing is none of a person.
        told = [one.groups() if one else ("", "", None) for one in found]
        right = {what: [got[index] == test[what] for got, test in zip(told, tests, strict=True)]
                 for index, what in enumerate(("who", "role", "tone"))}  # fmt: skip
        right["all"] = [all(one) for one in zip(*right.values(), strict=True)]
        result["scenes"][context] = {what: share(one) for what, one in right.items()}
        sheet += drawn[:8]

    # 3. Told
    turns = []
    for test in tests:
        shown = [Image.open(folder / "images" / image) for image in test["images"]]
        asked = [test["texts"][0], shown[0], STORY_PROMPTS["text"], shown[1]]
        turns.append([{"role": "user", "content": [*map(part, asked)]}])
    replies = ["".join(map(str, out)) for out in pipe(turns, max_new_tokens=24, do_sample=False, **settings).segments]
    words = lambda text: re.findall(r"\w+", text.lower())  # noqa: E731
    result["told"] = share(
        [words(reply) == words(test["texts"][1]) for reply, test in zip(replies, tests, strict=True)]
    )
    place = Path(args.model)
    contact_sheet(sheet, columns=8).save(place / "evaluation.png")
    (place / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def share(right: list[bool]) -> dict[str, Any]:
    """How many of all, with Wilson's interval."""
    n, z = len(right), 1.96
    p, half = sum(right) / n, z * math.sqrt(sum(right) * (n - sum(right)) / n**3 + z * z / (4 * n * n))
    low, high = ((p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"right": sum(right), "of": n, "share": round(p, 3), "interval": [round(low, 3), round(high, 3)]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="voken-emoji", help="of train.py")
    parser.add_argument("--model", default="voken-emoji/shipped")
    parser.add_argument("--number", type=int, default=80, help="names, and scenes, to measure")
    parser.add_argument("--steps", type=int, default=15, help="of the diffusion model")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    main(parser.parse_args())
