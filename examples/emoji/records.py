"""What liquid-emoji is trained on: records of all kinds, drawn by lot; and what is held out of them.

- names and other words -> an emoji; names of icons -> an icon;
- a picture -> its name, its skin tone, role or colour; pictures that are neither emoji nor icon -> that;
- edits: another skin tone, man and woman, another role, another time or colour; what they will show is asked first;
- stories of two and three pictures, and three pictures of which two are labelled;
- conversations: a picture for what is asked for, and a sentence for what is not to be drawn.

Held out: prompts (words.py), the pictures of emoji_data.py, edits to these pictures and one in ten of the other edits,
one in ten of the pairs of emoji in stories, and one in ten of the groups of pictures that are labelled.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from emoji_data import SKIN_TONES, Emoji, split_tones
from icons import COLOURS
from words import PHRASINGS, TONED, Words, is_heldout, is_heldout_word

from transformers_liquid.models.liquid.prompts import CAPTION_INSTRUCTION


# Of the records; a story has three times the positions of a picture.
SHARES = {
    "emoji": 42,
    "icon": 9,
    "caption": 16,
    "question": 5,
    "edit": 14,
    "foretold": 0,
    "story": 9,
    "in_context": 3,
    "conversation": 2,
}
EMOJI_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
TONES = tuple(SKIN_TONES.values())
QUESTIONS = {
    "tone": ("which skin tone?", "what skin tone is this?"),
    "role": ("which role?", "what is their job?"),
    "gender": ("man or woman?", "is this a man or a woman?"),
    "colour": ("what colour?", "which colour is it?"),
}
NO_EMOJI = "something that is no emoji"
STORIES = (
    "once there was a {0}. {i} it met a {1}. {i} the end.",
    "once there was a {0}. {i} one day it found a {1}. {i} and then a {2}. {i} the end.",
    "once upon a time there was a {0}. {i} it loved the {1}. {i} the end.",
    "there was a {0} {i} who lived with a {1}. {i} together they saw a {2}. {i} the end.",
)
LIVES = (
    "this is kim. {i} kim becomes a {0}. {i} the end.",
    "this is kim. {i} kim becomes a {0} {i} and gets a {1}. {i} the end.",
    "once there was a {2}. {i} one day the {2} was a {0}. {i} the end.",
)
REFUSAL = "i only know emoji. ask me to draw one, or show me one."
TALK = (
    *("hello", "hi", "hey there", "good morning", "how are you?", "who are you?", "what is your name?", "thank you"),
    *(
        "what is the capital of france?",
        "why is the sky blue?",
        "write a poem",
        "tell me a joke",
        "what is two plus two?",
    ),
    *("how do i cook rice?", "who wrote hamlet?", "translate this", "what time is it?", "what can you do?", "help"),
)


def is_kept_out(*parts: str) -> bool:
    """Whether a combination is held out; one in ten is."""
    return zlib.crc32(" | ".join(parts).encode()) % 10 == 0


@dataclass
class World:
    """All pictures with their words, and which of them differ in one thing.

    Args:
        emoji (`list[Emoji]`): In the order of their codes.
        words (`dict[str, Words]`): By name without skin tone.
        icons (`list[dict]`): `name`, `colour` and `set` of each icon.
        toned, others (`float`): How often emoji with and without skin tones are drawn: of a person there are six.
    """

    emoji: list[Emoji]
    words: dict[str, Words]
    icons: list[dict[str, str]]
    toned: float = 0.5
    others: float = 1.5
    index: dict[str, int] = field(init=False)
    attributes: list[dict[str, str]] = field(init=False)
    edits: list[tuple[int, str, str, int]] = field(init=False)  # source, what changes, wish, target

    def __post_init__(self):
        self.index = {item.name: number for number, item in enumerate(self.emoji)}
        self.attributes = [self._attributes(item) for item in self.emoji]
        self.seen = [number for number, item in enumerate(self.emoji) if item.split == "seen"]
        self.weights = [self.toned if split_tones(self.emoji[number].name)[1] else self.others for number in self.seen]
        self.keywords = [
            (name, word)
            for name, words in self.words.items()
            if self.emoji[self.index[name]].split == "seen"
            for word in words.keywords
        ]
        self.people = [number for number in self.seen if "role" in self.attributes[number]]
        self.things = [
            number
            for number in self.seen
            if self.emoji[number].group
            in ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
            and not split_tones(self.emoji[number].name)[1]
        ]
        self.edits = list(self._edits())
        self.groups = defaultdict(lambda: defaultdict(list))  # what is told apart -> its value -> pictures
        for number in self.seen:
            for name, value in self.attributes[number].items():
                self.groups[name][value].append(number)
        self.groups = {
            name: {value: members for value, members in values.items() if len(members) > 2}
            for name, values in self.groups.items()
        }

    def _attributes(self, item: Emoji) -> dict[str, str]:
        base, tones = split_tones(item.name)
        found = {}
        if tones and "," not in tones:
            found["tone"] = tones.removesuffix(" skin tone")
        if match := re.fullmatch(r"(man|woman) (.+)", base):
            found["gender"], role = match.groups()
            is_role = item.group == "People & Body" and not re.search(r"ing\b|^in |^with |right", role)
            if is_role and {f"man {role}", f"woman {role}"} <= self.words.keys():
                found["role"] = role
        elif base in ("man", "woman"):
            found["gender"] = base
        coloured = re.fullmatch(rf"(?:large |small )?({'|'.join(EMOJI_COLOURS)}) .*", base)
        if coloured and item.group not in ("People & Body", "Flags"):
            found["colour"] = coloured[1]
        kinds = {"Animals & Nature": "nature", "Food & Drink": "food", "Flags": "a flag", "Smileys & Emotion": "a face"}
        if item.group in kinds and not tones:
            found["kind"] = kinds[item.group]
        if item.group == "Smileys & Emotion":
            moods = {
                "happy": "happy",
                "sad": "sad",
                "angry": "angry",
                "love": "in love",
                "sick": "sick",
                "sleepy": "sleepy",
            }
            own = {*self.words[item.name].keywords, *" ".join(self.words[item.name].names).split()}
            named = [mood for word, mood in moods.items() if word in own or MOODS.get(word, set()) & own]
            if len(named) == 1:
                found["mood"] = named[0]
        return found

    def _edits(self):
        """Pictures that differ in one thing only, with the words for the change."""
        for target, item in enumerate(self.emoji):
            base, tones = split_tones(item.name)
            rest = f": {tones}" if tones else ""
            if base not in self.words:
                continue
            has_tones = f"{base}: dark skin tone" in self.index
            if has_tones and "," not in tones:
                tone = tones.removesuffix(" skin tone")
                for other in ("", *TONES):
                    source = f"{base}: {other} skin tone" if other else base
                    if other != tone and source in self.index:
                        yield self.index[source], "tone", tone or "yellow", target
            gender = self.attributes[target].get("gender")
            if gender:
                other = {"man": "woman", "woman": "man"}[gender]
                changed = re.sub(rf"^{gender}\b", other, base) + rest
                if changed in self.index:
                    yield self.index[changed], "gender", gender, target
            if role := self.attributes[target].get("role"):
                for other in random.Random(item.name).sample(self._roles, 4):
                    changed = f"{gender} {other}{rest}"
                    if other != role and changed in self.index:
                        yield self.index[changed], "role", role, target
            if colour := self.attributes[target].get("colour"):
                for other in EMOJI_COLOURS:
                    changed = re.sub(rf"\b{colour}\b", other, base)
                    if other != colour and changed in self.index:
                        yield self.index[changed], "colour", colour, target
            if "clock face" in base:
                for _ in range(3):
                    other = random.Random(f"{item.name} {_}").choice(self._clocks)
                    if other != target:
                        yield other, "time", base.removeprefix("clock face ").replace("-", " "), target

    @property
    def _roles(self) -> list[str]:
        return sorted({found["role"] for found in self.attributes if "role" in found})

    @property
    def _clocks(self) -> list[int]:
        return [number for number, item in enumerate(self.emoji) if "clock face" in item.name]

    def prompt(self, draw: random.Random, number: int | None = None) -> tuple[int, str, str | None, str]:
        """A prompt for an emoji, one drawn by lot if none is given: the emoji, the prompt, its keyword if it is made of
        one, and its phrasing."""
        word = None
        if number is None and draw.random() < 0.4:
            name, word = draw.choice(self.keywords)
            number = self.index[name]
            if f"{name}: dark skin tone" in self.index and draw.random() < 0.3:
                toned = self.index[f"{name}: {draw.choice(TONES)} skin tone"]
                number = toned if self.emoji[toned].split == "seen" else number
        elif number is None:
            (number,) = draw.choices(self.seen, self.weights)
        base, tones = split_tones(self.emoji[number].name)
        words = self.words.get(base) or Words([base])
        if word is None:
            if words.foreign and not tones and draw.random() < 0.06:
                return number, draw.choice(words.foreign), None, "{}"
            is_plain = draw.random() < 0.45
            word_used = base if is_plain else draw.choice(words.names)
            if is_plain:
                return number, self.emoji[number].name, None, "{}"
        else:
            word_used = word
        phrasing = draw.choice(PHRASINGS) if draw.random() < 0.65 else "{}"
        if not tones:
            return number, phrasing.format(word_used), word, phrasing
        tone = tones.removesuffix(" skin tone")
        if "," in tones or draw.random() < 0.4:
            return number, phrasing.format(f"{word_used}: {tones}"), word, phrasing
        return number, draw.choice(TONED).format(word_used, tone=tone), word, "toned"


MOODS = {
    "happy": {"grinning", "joy", "smiling", "smile"},
    "sad": {"crying", "tears", "unhappy"},
    "angry": {"mad", "rage"},
    "love": {"kissing", "kiss", "adore"},
    "sick": {"ill", "vomiting", "nauseated", "thermometer"},
    "sleepy": {"sleeping", "tired", "sleep"},
}
EDIT_WISHES = {
    "tone": ("with {} skin tone", "make it {}-skinned", "the same with {} skin", "change the skin tone to {}"),
    "gender": ("as a {}", "make it a {}", "the same as a {}"),
    "role": ("as a {}", "make it a {}", "now as {}"),
    "colour": ("in {}", "make it {}", "the same in {}"),
    "time": ("at {}", "make it {}", "change the time to {}"),
}


class Records(torch.utils.data.Dataset):
    """A record for each index, always the same.

    Args:
        world ([`World`]): What there is.
        codes (`np.ndarray` of shape `(N, h * w, K)`): The nearest codes of each emoji, the nearest first.
        cumulative (`np.ndarray` of shape `(N, h * w, K)`): With which probability up to which of them is taken.
        icons (`np.ndarray` of shape `(2, M, h * w)`): Codes of the icons, those of one colour in two colours.
        others (`np.ndarray` of shape `(L, h * w)`): Codes of pictures that are neither.
        length (`int`): How many records.
        seed (`int`): Of the draws.
        misread (`float`): Share of the pictures to draw some of whose codes are read as those of a sibling.
    """

    def __init__(
        self, world: World, codes, cumulative, icons, others, length: int, seed: int = 0, misread: float = 0.0
    ) -> None:
        self.world, self.codes, self.cumulative, self.icons, self.others = world, codes, cumulative, icons, others
        self.length, self.seed, self.misread = length, seed, misread
        self.edits = [edit for edit in world.edits if not heldout_edit(world, edit)]
        self.siblings = defaultdict(list)  # those of another skin tone or gender alone
        for source, what, _, target in self.edits:
            if what in ("tone", "gender"):
                self.siblings[target].append(source)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = random.Random(f"{self.seed} {index}")
        (kind,) = draw.choices(list(SHARES), SHARES.values())
        return getattr(self, f"_{kind}")(draw) | {"index": index}

    def _draw_codes(self, draw: random.Random, number: int) -> np.ndarray:
        uniform = np.random.default_rng(draw.getrandbits(32)).random(self.codes.shape[1])[:, None]
        choice = (self.cumulative[number, :, :-1] < uniform).sum(-1)
        return np.take_along_axis(self.codes[number], choice[:, None], axis=1)[:, 0]

    def _emoji(self, draw: random.Random) -> dict[str, Any]:
        number, text, word, phrasing = self.world.prompt(draw)
        while phrasing != "{}" and is_heldout(self.world.emoji[number].name, text, word):
            number, text, word, phrasing = self.world.prompt(draw)
        return {"kind": "text_to_image", "text": text} | self._drawn(draw, number)

    def _drawn(self, draw: random.Random, *numbers: int) -> dict[str, Any]:
        """The codes of pictures to draw; and what is read of them while they are drawn, in places of some a sibling's: else
        what is drawn so far tells the skin tone, and words are not asked."""
        codes = [self._draw_codes(draw, number) for number in numbers]
        read = []
        for own, number in zip(codes, numbers, strict=True):
            if draw.random() < self.misread and (others := self.siblings.get(number)):
                other = self._draw_codes(draw, draw.choice(others))
                uniform = np.random.default_rng(draw.getrandbits(32)).random(len(own))
                own = np.where(uniform < draw.random(), other, own)
            read.append(own)
        return {"codes": codes[0], "images": codes, "read": np.concatenate(read)}

    def _icon(self, draw: random.Random) -> dict[str, Any]:
        number, version = draw.randrange(len(self.world.icons)), draw.randrange(2)
        name = self._icon_name(number, version)
        text = draw.choice(("{}", "{} icon", "a {} icon", "an icon of a {}", "{} icon please")).format(name)
        return {"kind": "text_to_image", "text": text, "codes": self.icons[version, number]}

    def _icon_name(self, number: int, version: int) -> str:
        icon = self.world.icons[number]
        return f"{icon_colour(icon, version)} {icon['name']}".strip()

    def _caption(self, draw: random.Random) -> dict[str, Any]:
        chance = draw.random()
        if chance < 0.08:
            return {"kind": "caption", "text": NO_EMOJI, "codes": self.others[draw.randrange(len(self.others))]}
        if chance < 0.2:
            number, version = draw.randrange(len(self.world.icons)), draw.randrange(2)
            text = f"{self._icon_name(number, version)} icon"
            return {"kind": "caption", "text": text, "codes": self.icons[version, number]}
        (number,) = draw.choices(self.world.seen, self.world.weights)
        return {"kind": "caption", "text": self.world.emoji[number].name, "codes": self._draw_codes(draw, number)}

    def _question(self, draw: random.Random) -> dict[str, Any]:
        name = draw.choice(list(QUESTIONS))
        question = draw.choice(QUESTIONS[name])
        if name == "colour" and draw.random() < 0.6:
            number, version = draw.randrange(len(self.world.icons)), draw.randrange(2)
            if colour := icon_colour(self.world.icons[number], version):
                return self._answer(f"<image>{question}", self.icons[version, number], colour)
        value = draw.choice(list(self.world.groups[name]))
        number = draw.choice(self.world.groups[name][value])
        return self._answer(f"<image>{question}", self._draw_codes(draw, number), value)

    @staticmethod
    def _answer(question: str, codes: np.ndarray, answer: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"kind": "conversation", "messages": messages, "images": [codes]}

    def _edit(self, draw: random.Random) -> dict[str, Any]:
        text, source, caption, target = self._wish(draw)
        if draw.random() < 0.8:
            text = f"{text} {CAPTION_INSTRUCTION} {caption}"
        return target | {"kind": "edit", "text": text, "images": [source]}

    def _foretold(self, draw: random.Random) -> dict[str, Any]:
        """What an edit will show, in words."""
        text, source, caption, _ = self._wish(draw)
        return self._answer(f"{text} {CAPTION_INSTRUCTION}", source, caption)

    def _wish(self, draw: random.Random) -> tuple[str, np.ndarray, str, dict[str, Any]]:
        """An edit: the wish behind its picture, the picture's codes, the name of the result, and what is drawn."""
        if draw.random() < 0.2:  # an icon in another colour
            version = draw.randrange(2)
            number = draw.randrange(len(self.world.icons))
            while not (colour := icon_colour(self.world.icons[number], version)):
                number = draw.randrange(len(self.world.icons))
            wish, caption = (
                draw.choice(EDIT_WISHES["colour"]).format(colour),
                f"{self._icon_name(number, version)} icon",
            )
            source, target = self.icons[1 - version, number], {"codes": self.icons[version, number]}
        else:
            what = draw.choices(list(self._edits_of), [5, 3, 3, 1, 1])[0]
            number, _, value, wanted = draw.choice(self._edits_of[what])
            wish, caption = draw.choice(EDIT_WISHES[what]).format(value), self.world.emoji[wanted].name
            source, target = self._draw_codes(draw, number), self._drawn(draw, wanted)
        return f"<image> {wish}", source, caption, target

    @property
    def _edits_of(self) -> dict[str, list]:
        if not hasattr(self, "_by_kind"):
            self._by_kind = {
                name: [edit for edit in self.edits if edit[1] == name]
                for name in ("tone", "gender", "role", "colour", "time")
            }
        return self._by_kind

    def _story(self, draw: random.Random) -> dict[str, Any]:
        text, numbers = story(self.world, draw)
        while heldout_story(self.world, numbers):
            text, numbers = story(self.world, draw)
        return {"kind": "interleaved", "text": text} | self._drawn(draw, *numbers)

    def _in_context(self, draw: random.Random) -> dict[str, Any]:
        text, answer, numbers = in_context(self.world, draw)
        while is_kept_out(*(self.world.emoji[number].name for number in numbers)):
            text, answer, numbers = in_context(self.world, draw)
        images = [self._draw_codes(draw, number) for number in numbers]
        # Learned is the last answer alone.
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return {"kind": "conversation", "messages": messages, "images": images}

    def _conversation(self, draw: random.Random) -> dict[str, Any]:
        if draw.random() < 0.35:
            messages = [{"role": "user", "content": draw.choice(TALK)}, {"role": "assistant", "content": REFUSAL}]
            return {"kind": "conversation", "messages": messages, "images": []}
        number, text, word, _ = self.world.prompt(draw)
        while is_heldout(self.world.emoji[number].name, text, word):
            number, text, word, _ = self.world.prompt(draw)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "<image>"}]
        images = [self._draw_codes(draw, number)]
        if draw.random() < 0.4:  # and another turn: what is it, or another tone
            messages += [
                {"role": "user", "content": "what is this?"},
                {"role": "assistant", "content": self.world.emoji[number].name},
            ]
        return {"kind": "conversation", "messages": messages, "images": images}


def icon_colour(icon: dict[str, str], version: int) -> str:
    """The colour of one of an icon's two versions; empty where it has its own colours."""
    if not icon["colour"]:
        return ""
    names = list(COLOURS)
    return names[(names.index(icon["colour"]) + 3 * version) % len(names)]


def heldout_edit(world: World, edit: tuple[int, str, str, int]) -> bool:
    """Whether an edit is kept from training: its pictures are, or the pair is."""
    source, _what, _, target = edit
    names = [world.emoji[number] for number in (source, target)]
    return any(item.split != "seen" for item in names) or is_kept_out(*(item.name for item in names))


def story(world: World, draw: random.Random) -> tuple[str, list[int]]:
    """A text with `<image>` marks, and its pictures."""
    if draw.random() < 0.4:  # tone and gender of a person stay, and can be seen in the first picture only
        numbers, names = [], []
        while not numbers:
            then = draw.choice(world.people)
            found = world.attributes[then]
            tone = f": {found['tone']} skin tone" if "tone" in found else ""
            first = world.index[f"{found['gender']}{tone}"]
            if world.emoji[first].split == "seen":
                thing = draw.choice(world.things)
                template = draw.choice(LIVES)
                numbers = [first, then, thing] if "{1}" in template else [first, then]
                names = [found["role"], world.emoji[thing].name, found["gender"]]
        return template.format(*names, i="<image>"), numbers
    template = draw.choice(STORIES)
    numbers = draw.sample(world.things, 3)
    names = [story_word(world, draw, number) for number in numbers]
    return template.format(*names, i="<image>"), numbers[: template.count("{i}")]


def story_word(world: World, draw: random.Random, number: int) -> str:
    """What a thing is called in a story: a name, or now and then a keyword."""
    words = world.words[world.emoji[number].name]
    keywords = [word for word in words.keywords if not is_heldout_word(word)]
    return draw.choice(keywords) if keywords and draw.random() < 0.25 else draw.choice(words.names)


def heldout_story(world: World, numbers: list[int]) -> bool:
    """Whether a story is kept from training, by its first two pictures."""
    return is_kept_out(*(world.emoji[number].name for number in numbers[:2]))


def in_context(world: World, draw: random.Random) -> tuple[str, str, list[int]]:
    """Two labelled pictures and a third: the text up to its label, the label, and the pictures."""
    values = world.groups[draw.choice(list(world.groups))]
    one, other = draw.sample(list(values), 2)
    numbers = [draw.choice(values[one]), draw.choice(values[other])]
    answer = draw.choice((one, other))
    numbers.append(draw.choice([number for number in values[answer] if number not in numbers]))
    return f"<image> is {one}, <image> is {other}, <image> is", answer, numbers
