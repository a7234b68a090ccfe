"""The words for each emoji: its names, and what people call it; which of them are held out.

Names and keywords come from npm: `emojilib` 4.0.3 (MIT), `cldr-annotations-full` and `cldr-annotations-derived-full`
48.2.0 (Unicode License v3).
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from emoji_data import Emoji, fetch, split_tones


PACKAGES = {
    "emojilib": "emojilib@4.0.3",
    "cldr": "cldr-annotations-full@48.2.0",
    "cldr-derived": "cldr-annotations-derived-full@48.2.0",
}
LANGUAGES = ("de", "es", "fr")  # beside English: names only
PHRASINGS = (
    *("{}", "a {}", "the {}", "{} emoji", "an emoji of {}", "a picture of {}", "a picture of a {}", "my {}", "some {}"),
    *("draw {}", "draw a {}", "draw me a {}", "show me {}", "an icon of {}", "{} please", "i want a {}", "one {}"),
)
TONED = ("{tone} skin tone {}", "{tone}-skinned {}", "{} with {tone} skin", "a {} with {tone} skin tone")
# Of the phrasings of seen emoji one in ten is held out, and of the keywords one in forty in whatever phrasing.
HELDOUT_PHRASINGS, HELDOUT_WORDS = 10, 40


@dataclass
class Words:
    """The words for one emoji, or for a person whatever the skin tone.

    Attributes:
        names: The data set's name, then Unicode's current one and other full names.
        keywords: Words that mean it best of all emoji, or second best.
        foreign: Its names in other languages.
        current: Unicode's current name.
        carried: All that the packages say of it: whole names, keywords, and the words of both.
    """

    names: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    current: str = ""
    carried: set[str] = field(default_factory=set)


def load_words(data_dir: str | Path, emoji: list[Emoji]) -> dict[str, Words]:
    """The words for each emoji, by its name without skin tones.

    A keyword belongs to the emoji that it fits best: those whose name ends with it, whose name holds it, then those for
    which both packages have it, the shortest name first; and to the second best, if that fits as well.
    """
    found, foreign = _annotations(Path(data_dir)), {}
    for language in LANGUAGES:
        for key, names in _cldr(Path(data_dir), language, "tts").items():
            foreign.setdefault(key, []).extend(name.lower() for name in names)
    words, owners, current = {}, defaultdict(list), {}
    first_names = {item.name for item in emoji}
    for item in emoji:
        if split_tones(item.name)[1]:
            continue
        tts, keywords = found.get(key_of(item), ([], []))
        names = [item.name, *tts]
        current[item.name] = names[-1]
        names += [name for name in item.short_names if re.fullmatch(r"[a-z][a-z0-9 -]+", name) and len(name) > 2]
        for name in (item.name, *tts):
            if country := re.fullmatch(r"(?:flag: (.+))|(?:(.+) flag)", name):
                country = next(filter(None, country.groups()))
                names += [country, f"{country} flag", f"flag of {country}", f"the flag of {country}"]
        names = [item.name, *(name for name in dict.fromkeys(names) if name not in first_names)]
        carried = {part for text in (*names, *keywords) for part in (text, *re.findall(r"[^ :,]+", text))}
        words[item.name] = Words(
            names, foreign=foreign.get(key_of(item), []), current=current[item.name], carried=carried
        )
        for word in keywords:
            if word not in names:
                owners[word].append(item.name)  # once for each package
    taken = {name for entry in words.values() for name in entry.names}
    for word, items in owners.items():
        if word in taken:
            continue
        fits = {name: (_fit(word, current[name]), items.count(name)) for name in dict.fromkeys(items)}
        best = sorted(fits, key=lambda name: (fits[name], -len(current[name].split())), reverse=True)
        for name in best[:2]:
            if fits[name] == fits[best[0]]:
                words[name].keywords.append(word)
    return words


def _fit(word: str, name: str) -> int:
    return 2 if name.endswith(f" {word}") else 1 if word in name.split() else 0


def _cldr(data_dir: Path, language: str, kind: str) -> dict[str, list[str]]:
    found = {}
    for folder, part in (("cldr", "annotations"), ("cldr-derived", "annotationsDerived")):
        path = fetch(data_dir / folder, PACKAGES[folder]) / part / language / "annotations.json"
        for characters, entry in json.loads(path.read_text(encoding="utf-8"))[part]["annotations"].items():
            found.setdefault(plain(characters), []).extend(entry.get(kind, []))
    return found


def _annotations(data_dir: Path) -> dict[str, tuple[list[str], list[str]]]:
    """English names and keywords by the characters of an emoji."""
    names, keywords = _cldr(data_dir, "en", "tts"), _cldr(data_dir, "en", "default")
    library = fetch(data_dir / "emojilib", PACKAGES["emojilib"]) / "dist" / "emoji-en-US.json"
    for characters, own in json.loads(library.read_text(encoding="utf-8")).items():
        own = [word.replace("_", " ") for word in own]
        keywords[plain(characters)] = [*dict.fromkeys(own), *keywords.get(plain(characters), [])]
    clean = re.compile(r"[a-z0-9][a-z0-9 :,'’.&-]*")  # neither ":D" nor other scripts
    return {
        key: tuple(
            [word for word in map(str.lower, part.get(key, [])) if clean.fullmatch(word)] for part in (names, keywords)
        )
        for key in {*names, *keywords}
    }


def plain(characters: str) -> str:
    """Characters of an emoji without variation selectors."""
    return characters.replace("\ufe0f", "")


def key_of(item: Emoji) -> str:
    """The characters of an emoji, told from the name of its file."""
    return plain("".join(chr(int(code, 16)) for code in item.path.stem.split("-")))


def is_heldout_word(word: str) -> bool:
    """Whether a keyword is kept from training in whatever phrasing."""
    return zlib.crc32(word.encode()) % HELDOUT_WORDS == 0


def is_heldout(name: str, prompt: str, word: str | None = None) -> bool:
    """Whether a prompt for an emoji, made of a keyword if one is given, is kept from training."""
    held_word = word is not None and is_heldout_word(word)
    return held_word or zlib.crc32(f"{name} {prompt}".encode()) % HELDOUT_PHRASINGS == 0


if __name__ == "__main__":
    import sys

    from emoji_data import load_emoji

    for name, entry in load_words(sys.argv[1], load_emoji(sys.argv[1])).items():
        print(name, "|", *entry.names[1:], "|", *entry.keywords, "|", *entry.foreign, sep="  ")
