"""Writes what `transformers-liquid evaluate emoji` asks: tasks about all 3,786 emoji, with their pictures.

    python examples/emoji/tasks.py --data_dir emoji-data --output emoji-tasks
    transformers-liquid evaluate emoji loss --data emoji-tasks --output emoji-results --batch-size 64

What is held out in training is asked, and some of what is not: see evaluate.py, by which liquid-emoji is measured, for what
each measure says. Emoji whose originals are the same in every pixel count as one. Pairs for losses are the unseen emoji.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from emoji_data import load_emoji, load_pixels, split_tones
from icons import load_icons
from PIL import Image
from records import EDIT_WISHES, NO_EMOJI, QUESTIONS, World, heldout_edit, in_context, is_kept_out
from words import PHRASINGS, is_heldout, is_heldout_word, load_words

from transformers_liquid.utils.files import write_text


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
MEASURES = ("names", "current_names", "phrasings", "words", "everyday", "captions", "no_emoji", "questions")
MEASURES += ("choices", "edits", "persons", "stories", "in_context", "round_trip")
NUM_NO_EMOJI = 100


class Tasks:
    """What is asked, and what is right: lines of `tasks.jsonl` but for their ids, by measure.

    Args:
        world ([`World`]): All emoji and their words.
        pixels (`torch.Tensor` of shape `(N, 3, 64, 64)`): Their pictures.
        number (`int`): Of each measure (-1: all).
    """

    def __init__(self, world: World, pixels: torch.Tensor, number: int) -> None:
        self.world, self.number = world, number
        same = defaultdict(list)
        for item, picture in zip(world.emoji, pixels, strict=True):
            same[picture.numpy().tobytes()].append(item.name)
        self.same = {name: names for names in same.values() for name in names}
        self.carrying = defaultdict(set)  # word -> all emoji that carry it, whatever their skin tone
        for item in world.emoji:
            for word in self.words_of(item.name):
                self.carrying[word].update(self.same[item.name])

    def words_of(self, name: str) -> set[str]:
        """All that an emoji, or one of the same picture, is called."""
        bases = {split_tones(one)[0] for one in self.same[name]}
        return {word for base in bases if base in self.world.words for word in self.world.words[base].carried}

    def sample(self, items: list, number: int | None = None) -> list:
        """A fixed random sample, in order."""
        number = self.number if number is None else number
        if number < 0 or number >= len(items):
            return items
        return [items[index] for index in sorted(random.Random(0).sample(range(len(items)), number))]

    def at_most(self, number: int) -> int:
        return min(number, self.number) if self.number > 0 else number

    def name(self, number: int) -> str:
        return self.world.emoji[number].name

    def names(self) -> Iterator[dict[str, Any]]:
        for split in ("seen", "unseen_composition", "unseen_flag"):
            names = [item.name for item in self.world.emoji if item.split == split]
            for name in self.sample(names) if split == "seen" else names:
                yield {"text": name, "shows": self.same[name], "parts": {"split": split}}

    def current_names(self) -> Iterator[dict[str, Any]]:
        pairs = [(self.name(number), self.world.words.get(self.name(number))) for number in self.world.seen]
        pairs = [(name, words.current) for name, words in pairs if words and words.current != name]
        for name, current in self.sample(pairs):
            yield {"text": current, "shows": self.same[name]}

    def phrasings(self) -> Iterator[dict[str, Any]]:
        """Prompts that were held out, of names and of keywords."""
        for kind in ("names", "keywords"):
            found = []
            for name, words in self.world.words.items():
                if self.world.emoji[self.world.index[name]].split == "seen":
                    for word in getattr(words, kind):
                        if kind == "names" or not is_heldout_word(word):
                            found += [(word, p.format(word)) for p in PHRASINGS[1:] if is_heldout(name, p.format(word))]
            for word, prompt in self.sample(found):
                yield {"text": prompt, "shows": sorted(self.carrying[word]), "parts": {"of": kind}}

    def words(self) -> Iterator[dict[str, Any]]:
        """Keywords that were never trained on."""
        for word in self.sample(sorted({word for _, word in self.world.keywords if is_heldout_word(word)})):
            yield {"text": word, "shows": sorted(self.carrying[word])}

    def everyday(self) -> Iterator[dict[str, Any]]:
        for prompt, words in EVERYDAY.items():
            yield {"text": prompt, "shows": sorted(set().union(*(self.carrying[word] for word in words)))}

    def captions(self) -> Iterator[dict[str, Any]]:
        numbers = self.sample(self.world.seen, 2 * self.number if self.number > 0 else -1)
        numbers += [number for number, item in enumerate(self.world.emoji) if item.split == "unseen_composition"]
        for number in numbers:
            item = self.world.emoji[number]
            parts = {"split": item.split} | ({"group": item.group} if item.split == "seen" else {})
            yield {"pictures": [item.name], "says": self.same[item.name], "parts": parts}

    def no_emoji(self) -> Iterator[dict[str, Any]]:
        for index in range(NUM_NO_EMOJI):
            yield {"pictures": [f"{NO_EMOJI} {index}"], "says": [NO_EMOJI]}

    def questions(self) -> Iterator[dict[str, Any]]:
        for kind, questions in QUESTIONS.items():
            pairs = [(number, value) for value, members in self.world.groups[kind].items() for number in members]
            for number, value in self.sample(pairs, self.at_most(100) if self.number > 0 else -1):
                text = f"<image>{questions[0]}"
                yield {"text": text, "pictures": [self.name(number)], "says": [value], "parts": {"about": kind}}

    def choices(self) -> Iterator[dict[str, Any]]:
        """Which of two names is more probable: against any other one, and against that of another skin tone."""
        draw = random.Random(0)
        for split in ("seen", "unseen_composition"):
            for name in self.sample([item.name for item in self.world.emoji if item.split == split]):
                others = {
                    "random": draw.choice([one.name for one in self.world.emoji if one.name not in self.same[name]])
                }
                base, tone = split_tones(name)
                tones = [one for one in self.world.index if split_tones(one)[0] == base and one not in self.same[name]]
                others |= {"skin tone": draw.choice(tones)} if tone and tones else {}
                for against, other in others.items():
                    parts = {"against": against, split: against}
                    yield {"pictures": [name], "says": [name], "rather": other, "parts": parts}

    def edits(self) -> Iterator[dict[str, Any]]:
        """Held-out edits, by what changes; the emoji asked for must be the nearest."""
        kept = [edit for edit in self.world.edits if heldout_edit(self.world, edit)]
        for what in EDIT_WISHES:
            part = [edit for edit in kept if edit[1] == what and self.world.emoji[edit[0]].split == "seen"]
            for source, _, value, target in self.sample(part, self.at_most(60) if self.number > 0 else -1):
                text, shows = f"<image> {EDIT_WISHES[what][0].format(value)}", self.same[self.name(target)]
                yield {"text": text, "pictures": [self.name(source)], "shows": shows, "parts": {"of": what}}

    def persons(self) -> Iterator[dict[str, Any]]:
        people = []
        for then in self.world.people:
            found = self.world.attributes[then]
            first = self.world.index.get(f"{found['gender']}: {found.get('tone')} skin tone")
            if first is not None and is_kept_out(self.name(first), self.name(then)):
                people.append((self.name(first), self.name(then), found["role"]))
        for first, then, role in self.sample(people, self.at_most(60)):
            text = f"this is kim. <image> kim becomes a {role}."
            yield {"text": text, "pictures": [first], "tells": self.same[then]}

    def stories(self) -> Iterator[dict[str, Any]]:
        draw = random.Random(7)
        for one in draw.sample(self.world.things, min(self.at_most(60), len(self.world.things))):
            yield {"text": draw.choice(TEMPLATES).format(self.world.words[self.name(one)].names[-1])}

    def in_context(self) -> Iterator[dict[str, Any]]:
        draw, found = random.Random(3), 0
        while found < self.at_most(200):
            text, answer, numbers = in_context(self.world, draw)
            names = [self.name(number) for number in numbers]
            if is_kept_out(*names):
                found += 1
                yield {"text": text, "pictures": names, "says": [answer], "parts": {"examples": 2}}
                bare = {"text": "<image> is", "pictures": names[-1:], "says": [answer]}
                yield bare | {"parts": {"examples": 0}}

    def round_trip(self) -> Iterator[dict[str, Any]]:
        for number in self.sample(self.world.seen):
            yield {"pictures": [self.name(number)]}


def write_data(folder: Path, data_dir: str, measures: list[str], number: int) -> None:
    """Tasks with the pictures of all emoji, and pairs of unseen ones for losses."""
    emoji = load_emoji(data_dir)
    pixels, tasks = load_pixels(emoji), []
    world = World(emoji, load_words(data_dir, emoji), load_icons(data_dir)[1])
    maker = Tasks(world, pixels, number)
    for measure in measures:
        for index, task in enumerate(getattr(maker, measure)()):
            tasks.append({"id": f"{measure}/{index}", "measure": measure} | task)
    coarse = torch.rand(NUM_NO_EMOJI, 3, 9, 9, generator=torch.Generator().manual_seed(99))
    others = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1) * 2 - 1
    pictures = [*pixels, *(others if "no_emoji" in measures else [])]
    names = [item.name for item in emoji] + [f"{NO_EMOJI} {index}" for index in range(len(pictures) - len(emoji))]
    lines = {"emoji": [], "pairs": []}
    for number, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        words = sorted(maker.words_of(name)) if number < len(emoji) else []
        lines["emoji"].append({"file_name": f"{number:04}.png", "text": name, "words": words})
        if number < len(emoji) and emoji[number].split != "seen":
            lines["pairs"].append({"file_name": f"{number:04}.png", "text": name})
        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        for part in lines:
            (folder / part).mkdir(parents=True, exist_ok=True)
            if lines[part][-1:] and lines[part][-1]["file_name"] == f"{number:04}.png":
                Image.fromarray(array).save(folder / part / f"{number:04}.png")
    for path, of in {"emoji/tasks": tasks, "emoji/metadata": lines["emoji"], "pairs/metadata": lines["pairs"]}.items():
        write_text(folder / f"{path}.jsonl", "".join(json.dumps(line) + "\n" for line in of))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output", default="emoji-tasks")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--number", type=int, default=400, help="of each measure, a fixed random sample; -1 means all")
    args = parser.parse_args()
    write_data(Path(args.output), args.data_dir, args.measures, args.number)
