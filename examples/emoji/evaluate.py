"""Measures liquid-emoji: names, words that people use, captions, edits, stories, in-context learning.

    python examples/emoji/evaluate.py --data_dir emoji-data --model emoji-checkpoint --output emoji-evaluation

Writes OUTPUT.json, each measure with its number and a 95 % interval (Wilson's), and OUTPUT.png: prompts of ordinary
people with what was drawn. What a picture shows is told from the nearest of the codec's reconstructions of all 3,786
emoji, by squared error over pixels; emoji whose originals are the same in every pixel count as one.

- seen, unseen compositions, unseen flags: the nearest is the emoji named (top-1), among the nearest five (top-5);
- current names: the same for Unicode's name where the data set has an older one;
- phrasings, words, everyday: prompts that were held out, words that were never trained on, and `EVERYDAY`. Right is a
  picture whose emoji carries the word in Unicode's or emojilib's lists; skin tones nobody asked for count as right;
- captions: the greedy answer is the name, letter for letter, by group; and that a picture is no emoji;
- questions: skin tone, role, gender, colour;
- edits: pairs that were held out;
- stories: pictures that show what the text before them says; persons who keep skin tone and gender;
- in context: the label of a third picture after two labelled ones, and without them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from emoji_data import load_emoji, load_pixels, split_tones
from icons import load_icons
from PIL import Image
from records import EDIT_WISHES, NO_EMOJI, QUESTIONS, World, heldout_edit, in_context, is_kept_out
from tqdm import tqdm
from words import PHRASINGS, is_heldout, is_heldout_word, load_words

from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor


# As people type them, and words of which the emoji must carry one.
EVERYDAY = {
    "a puppy": ("puppy", "dog"),
    "the moon": ("moon",),
    "a kitten": ("kitten", "kitty", "cat"),
    "a beer": ("beer",),
    "a slice of pizza": ("pizza",),
    "happy face": ("happy",),
    "a sad face": ("sad",),
    "someone crying": ("crying", "cry"),
    "a car": ("car", "automobile"),
    "a house": ("house", "home"),
    "a tree": ("tree",),
    "flowers": ("flower", "bouquet"),
    "a birthday cake": ("birthday",),
    "coffee": ("coffee",),
    "a cup of tea": ("tea",),
    "the sun": ("sun", "sunny"),
    "rainy day": ("rain", "rainy"),
    "snowman": ("snowman",),
    "a ghost": ("ghost",),
    "a robot": ("robot",),
    "a monkey": ("monkey",),
    "an elephant": ("elephant",),
    "a scary monster": ("monster",),
    "a plane": ("airplane", "aeroplane", "plane"),
    "a bike": ("bicycle", "bike"),
    "a boat": ("boat", "sailboat", "ship"),
    "a phone": ("phone", "telephone"),
    "a laptop": ("laptop", "computer"),
    "a gift": ("gift", "present"),
    "money": ("money", "dollar", "cash"),
    "fire": ("fire", "flame"),
    "a heart": ("heart",),
    "a broken heart": ("broken", "heartbroken"),
    "thumbs up": ("thumb", "thumbs", "+1", "thumbsup"),
    "clapping hands": ("clap", "clapping"),
    "a doctor": ("doctor", "health"),
    "a policeman": ("police", "policeman", "cop"),
    "a chef": ("chef", "cook"),
    "a princess": ("princess",),
    "santa": ("santa", "christmas", "claus"),
    "a baby": ("baby",),
    "an old man": ("old", "older", "grandfather", "elderly"),
    "japan": ("japan",),
    "the flag of france": ("france",),
    "italy": ("italy",),
    "a fish": ("fish",),
    "a bird": ("bird",),
    "a snake": ("snake",),
    "a butterfly": ("butterfly",),
    "an apple": ("apple",),
    "a banana": ("banana",),
    "strawberries": ("strawberry",),
    "a burger": ("burger", "hamburger"),
    "fries": ("fries",),
    "ice cream": ("ice", "icecream"),
    "a guitar": ("guitar",),
    "a soccer ball": ("soccer", "football"),
    "a book": ("book",),
    "scissors": ("scissors",),
    "a rocket": ("rocket",),
}
TEMPLATES = ("once there was a {}.", "once upon a time there was a {}.")


def main(args: argparse.Namespace) -> None:
    model = LiquidForCausalLM.from_pretrained(args.model).eval()
    processor = LiquidProcessor.from_pretrained(args.model)
    emoji = load_emoji(args.data_dir)
    world = World(emoji, load_words(args.data_dir, emoji), load_icons(args.data_dir)[1])
    examiner = Examiner(model, processor, world, load_pixels(emoji), args)
    result: dict[str, Any] = {"settings": model.generation_config.image_generation_config, "number": args.number}
    for name in args.measures:
        start = time.perf_counter()
        result[name] = getattr(examiner, name)()
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(result[name])[:1500]}", flush=True)
        Path(args.output).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def rate(right: list[bool]) -> dict[str, float]:
    """The share of what is right, the number, and Wilson's 95 % interval."""
    if not right:
        return {"rate": float("nan"), "n": 0, "low": 0.0, "high": 1.0}
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return {
        "rate": round(p, 4),
        "n": n,
        "low": round((middle - half) / (1 + z * z / n), 4),
        "high": round((middle + half) / (1 + z * z / n), 4),
    }


class Examiner:
    """Draws and asks, and tells from the nearest emoji what came of it.

    Args:
        model ([`LiquidForCausalLM`]), processor ([`LiquidProcessor`]): What is measured.
        world ([`World`]): All emoji and their words.
        pixels (`torch.Tensor` of shape `(N, 3, 64, 64)`): Their pictures in [-1, 1].
        args (`argparse.Namespace`): `number` of each measure (-1: all), `batch_size`, `seed`, `output`.
    """

    def __init__(self, model, processor, world: World, pixels: torch.Tensor, args: argparse.Namespace) -> None:
        self.model, self.processor, self.world, self.pixels, self.args = model, processor, world, pixels, args
        codec = model.model.vq_model
        self.codes = torch.cat([codec.encode_codes(batch) for batch in pixels.split(128)])
        self.known = torch.cat([codec.decode_codes(batch).clamp(-1, 1) for batch in self.codes.split(128)])
        groups: dict[bytes, int] = {}
        self.group = torch.tensor([groups.setdefault(picture.numpy().tobytes(), len(groups)) for picture in pixels])

    def sample(self, items: list, number: int | None = None) -> list:
        """A fixed random sample, in order."""
        number = self.args.number if number is None else number
        if number < 0 or number >= len(items):
            return items
        return [items[index] for index in sorted(random.Random(0).sample(range(len(items)), number))]

    def draw(self, prompts: list[str], images: list[int] | None = None) -> torch.Tensor:
        """A picture `(N, 3, 64, 64)` for each prompt; of edits, from emoji; a picture does not depend on the others."""
        found = []
        for start in tqdm(range(0, len(prompts), self.args.batch_size), desc="draw", leave=False, mininterval=5):
            part = slice(start, start + self.args.batch_size)
            pictures = {} if images is None else {"images": [[self.shown(one)] for one in images[part]]}
            inputs = self.processor(text=prompts[part], generation_mode="image", return_tensors="pt", **pictures)
            seeds = range(self.args.seed + start, self.args.seed + start + len(prompts[part]))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            ids = self.model.generate(**inputs, generation_mode="image", generator=generators)
            found.append(self.model.decode_image_tokens(ids))
        return torch.cat(found)

    def shown(self, number: int) -> torch.Tensor:
        """The picture of an emoji as a processor takes it: in [0, 1]."""
        return (self.pixels[number] + 1) / 2

    def distances(self, drawn: torch.Tensor) -> torch.Tensor:
        known = self.known.flatten(1)
        return known.square().sum(1) - 2 * drawn.flatten(1) @ known.T

    def nearest(self, drawn: torch.Tensor) -> list[int]:
        return self.distances(drawn).argmin(1).tolist()

    def is_among(self, drawn: torch.Tensor, wanted: list[int], number: int = 1) -> list[bool]:
        """Whether fewer than `number` other emoji are nearer than the one that was wanted."""
        distances = self.distances(drawn)
        own = distances.gather(1, torch.tensor(wanted)[:, None])
        same = self.group[wanted][:, None] == self.group[None]
        # The sum over pixels has a rounding error of about 1e-3.
        return (((distances < own - 1e-2) & ~same).sum(1) < number).tolist()

    def carries(self, number: int, words: tuple[str, ...]) -> bool:
        """Whether an emoji, whatever its skin tone, or one of the same picture carries one of the words."""
        same = (self.group == self.group[number]).nonzero().flatten().tolist()
        bases = {split_tones(self.world.emoji[one].name)[0] for one in same}
        return any(
            word in self.world.words[base].carried for base in bases if base in self.world.words for word in words
        )

    def names(self) -> dict[str, Any]:
        result = {}
        for split in ("seen", "unseen_composition", "unseen_flag"):
            wanted = [number for number, item in enumerate(self.world.emoji) if item.split == split]
            wanted = self.sample(wanted) if split == "seen" else wanted
            if wanted:
                drawn = self.draw([self.world.emoji[number].name for number in wanted])
                result[split] = {f"top{k}": rate(self.is_among(drawn, wanted, k)) for k in (1, 5)}
                error = (self.known[wanted] - self.pixels[wanted]).square().mean((1, 2, 3)).clamp_min(1e-10)
                result[split]["psnr"] = round((10 * torch.log10(4 / error)).mean().item(), 2)
        return result

    def current_names(self) -> dict[str, Any]:
        pairs = [
            (number, self.world.words[self.world.emoji[number].name].current)
            for number in self.world.seen
            if self.world.emoji[number].name in self.world.words
        ]
        pairs = self.sample([(number, name) for number, name in pairs if name != self.world.emoji[number].name])
        wanted = [number for number, _ in pairs]
        return rate(self.is_among(self.draw([name for _, name in pairs]), wanted))

    def phrasings(self) -> dict[str, Any]:
        """Prompts that were held out, of names and of keywords."""
        result = {}
        for kind in ("names", "keywords"):
            found = []
            for name, words in self.world.words.items():
                if self.world.emoji[self.world.index[name]].split == "seen":
                    for word in getattr(words, kind):
                        keyword = word if kind == "keywords" else None
                        if keyword is None or not is_heldout_word(word):
                            found += [(word, p.format(word)) for p in PHRASINGS[1:] if is_heldout(name, p.format(word))]
            found = self.sample(found)
            seen = self.nearest(self.draw([prompt for _, prompt in found]))
            result[kind] = rate([self.carries(one, (word,)) for one, (word, _) in zip(seen, found, strict=True)])
        return result

    def words(self) -> dict[str, Any]:
        """Keywords that were never trained on."""
        found = sorted({word for _, word in self.world.keywords if is_heldout_word(word)})
        found = self.sample(found)
        seen = self.nearest(self.draw(found))
        return rate([self.carries(one, (word,)) for one, word in zip(seen, found, strict=True)])

    def everyday(self) -> dict[str, Any]:
        drawn = self.draw(list(EVERYDAY))
        seen = self.nearest(drawn)
        right = [self.carries(one, words) for one, words in zip(seen, EVERYDAY.values(), strict=True)]
        sheet = torch.cat([torch.cat(list(row), -1) for row in drawn.unflatten(0, (-1, 10))], -2)
        pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(Path(self.args.output).with_suffix(".png"))
        wrong = [
            f"{prompt}: {self.world.emoji[one].name}"
            for prompt, one, ok in zip(EVERYDAY, seen, right, strict=True)
            if not ok
        ]
        return rate(right) | {"wrong": wrong}

    def answer(self, prompts: list[list[int]]) -> list[str]:
        """Greedy answers to prompts of ids."""
        found = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in tqdm(range(0, len(order), self.args.batch_size), desc="answer", leave=False, mininterval=5):
            batch = order[start : start + self.args.batch_size]
            length = max(len(prompts[index]) for index in batch)
            pads = [length - len(prompts[index]) for index in batch]
            pad = self.processor.pad_token_id
            ids = torch.tensor([[pad] * n + prompts[index] for n, index in zip(pads, batch, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (length - n) for n in pads])
            output = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
            texts = self.processor.batch_decode(output[:, length:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                found[index] = text.strip()
        return found

    def asked(self, text: str, numbers: list[int]) -> list[int]:
        return self.processor.interleaved_ids(text, [self.codes[number].flatten() for number in numbers])

    def captions(self) -> dict[str, Any]:
        numbers = self.sample(self.world.seen, 2 * self.args.number if self.args.number > 0 else -1)
        numbers += [number for number, item in enumerate(self.world.emoji) if item.split == "unseen_composition"]
        texts = self.answer([self.processor.caption_ids(self.codes[number].flatten()) for number in numbers])
        names: dict[int, set[str]] = {}
        for item, group in zip(self.world.emoji, self.group.tolist(), strict=True):
            names.setdefault(group, set()).add(item.name)
        groups: dict[str, list[bool]] = {}
        vocabulary = {word for item in self.world.emoji for word in item.name.split()}
        nonsense = 0
        for number, text in zip(numbers, texts, strict=True):
            item = self.world.emoji[number]
            key = item.group if item.split == "seen" else item.split
            groups.setdefault(key, []).append(text in names[int(self.group[number])])
            nonsense += any(word not in vocabulary for word in text.split())
        seen = [ok for key, values in groups.items() if key != "unseen_composition" for ok in values]
        return (
            {"seen": rate(seen)}
            | {key: rate(values) for key, values in groups.items()}
            | {"answers with words of no name": round(nonsense / len(numbers), 4)}
        )

    def no_emoji(self) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(99)
        coarse = torch.rand(100, 3, 9, 9, generator=draw)
        pictures = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1) * 2 - 1
        codes = self.model.model.vq_model.encode_codes(pictures)
        texts = self.answer([self.processor.caption_ids(one.flatten()) for one in codes])
        return rate([text == NO_EMOJI for text in texts])

    def questions(self) -> dict[str, Any]:
        result = {}
        for name, questions in QUESTIONS.items():
            pairs = [(number, value) for value, members in self.world.groups[name].items() for number in members]
            pairs = self.sample(pairs, 100)
            texts = self.answer([self.asked(f"<image>{questions[0]}", [number]) for number, _ in pairs])
            result[name] = rate([text == value for text, (_, value) in zip(texts, pairs, strict=True)])
        return result

    def edits(self) -> dict[str, Any]:
        """Held-out edits, by what changes; the emoji asked for must be the nearest."""
        kept = [edit for edit in self.world.edits if heldout_edit(self.world, edit)]
        result, everything = {}, []
        for what in EDIT_WISHES:
            part = [edit for edit in kept if edit[1] == what and self.world.emoji[edit[0]].split == "seen"]
            part = self.sample(part, 60)
            if not part:
                continue
            prompts = [f"<image> {EDIT_WISHES[what][0].format(value)}" for _, _, value, _ in part]
            drawn = self.draw(prompts, [source for source, *_ in part])
            right = self.is_among(drawn, [target for *_, target in part])
            unchanged = self.is_among(drawn, [source for source, *_ in part])
            result[what] = rate(right) | {"as the source": round(sum(unchanged) / len(part), 3)}
            everything += right
        return {"all": rate(everything)} | result

    def interleaved(self, texts: list[str], images: list[list[int]] | None, max_images: int):
        """Parts of replies: texts as strings and pictures."""
        pictures = {} if images is None else {"images": [[self.shown(one) for one in part] for part in images]}
        inputs = self.processor(text=texts, generation_mode="interleaved", return_tensors="pt", **pictures)
        generators = [torch.Generator().manual_seed(self.args.seed + row) for row in range(len(texts))]
        output = self.model.generate(
            **inputs,
            generation_mode="interleaved",
            max_new_tokens=60,
            max_images=max_images,
            do_sample=True,
            top_p=0.8,
            generator=generators,
        )
        return [
            [part if part.ndim == 3 else self.processor.decode(part, skip_special_tokens=True) for part in parts]
            for parts in output.parts
        ]

    def stories(self) -> dict[str, Any]:
        draw = random.Random(7)
        things = draw.sample(self.world.things, min(60, len(self.world.things)))
        prompts = [
            draw.choice(TEMPLATES).format(self.world.words[self.world.emoji[one].name].names[-1]) for one in things
        ]
        replies = self.interleaved(prompts, None, 3)
        right, ends = [], []
        for prompt, parts in zip(prompts, replies, strict=True):
            said = prompt
            for part in parts:
                if isinstance(part, str):
                    said = part
                    continue
                named = re.findall(r"\b(?:a|an|the) ([^.]+?)(?: who.*)?$", said.strip().rstrip("."))
                names = [name.strip() for name in named]
                (one,) = self.nearest(part[None])
                right.append(bool(names) and self.carries(one, (names[-1],)))
            ends.append(bool(parts) and isinstance(parts[-1], str) and parts[-1].strip().endswith("the end."))
        result = {"pictures": rate(right), "ends": rate(ends), "pictures a story": round(len(right) / len(prompts), 2)}
        result["examples"] = [
            [prompt, *(part if isinstance(part, str) else "<image>" for part in parts)]
            for prompt, parts in zip(prompts[:5], replies, strict=False)
        ]
        people = []
        for then in self.world.people:
            found = self.world.attributes[then]
            first = self.world.index.get(f"{found['gender']}: {found.get('tone')} skin tone")
            if first is not None and is_kept_out(self.world.emoji[first].name, self.world.emoji[then].name):
                people.append((first, then))
        if not people:
            return result
        people = self.sample(people, 60)
        texts = [f"this is kim. <image> kim becomes a {self.world.attributes[then]['role']}." for _, then in people]
        replies = self.interleaved(texts, [[first] for first, _ in people], 1)
        kept = Counter()
        drawn = [
            next((part for part in parts if not isinstance(part, str)), torch.ones(3, 64, 64)) for parts in replies
        ]
        for one, (_, then) in zip(self.nearest(torch.stack(drawn)), people, strict=True):
            for name in ("role", "tone", "gender"):
                kept[name] += self.world.attributes[one].get(name) == self.world.attributes[then].get(name)
        exact = self.is_among(torch.stack(drawn), [then for _, then in people])
        result["persons"] = rate(exact) | {name: round(count / len(people), 3) for name, count in kept.items()}
        return result

    def in_context(self) -> dict[str, Any]:
        draw, found = random.Random(3), []
        while len(found) < 200:
            text, answer, numbers = in_context(self.world, draw)
            if is_kept_out(*(self.world.emoji[number].name for number in numbers)):
                found.append((text, answer, numbers))
        shown = self.answer([self.asked(text, numbers) for text, _, numbers in found])
        bare = self.answer([self.asked("<image> is", numbers[-1:]) for _, _, numbers in found])
        return {
            "two examples": rate([text == answer for text, (_, answer, _) in zip(shown, found, strict=True)]),
            "no example": rate([text == answer for text, (_, answer, _) in zip(bare, found, strict=True)]),
        }


MEASURES = ("names", "current_names", "phrasings", "words", "everyday", "captions", "no_emoji", "questions")
MEASURES += ("edits", "stories", "in_context")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--model", default="emoji-checkpoint")
    parser.add_argument("--output", default="emoji-evaluation", help="path of the results, without ending")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--number", type=int, default=400, help="of each measure, a fixed random sample; -1 means all")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
