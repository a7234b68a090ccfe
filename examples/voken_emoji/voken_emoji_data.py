"""Names and stories of emoji, as records for `transformers-liquid voken train`.

A story is of one person, whose gender and skin tone only its pictures show: "this is kim." <woman: dark skin tone> "kim as
firefighter." <woman firefighter: dark skin tone> "kim as pilot." <woman pilot: dark skin tone>.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from transformers_liquid import story_samples


sys.path.append(str(Path(__file__).parents[1] / "emoji"))
from emoji_data import SKIN_TONES, load_emoji


TONES = ["", *(f": {tone} skin tone" for tone in SKIN_TONES.values())]
PEOPLE = ["kim", "alex", "robin", "sasha", "noa", "jo", "mika", "charlie"]
NUM_THINGS, NUM_UNSEEN = 300, 80


def write_data(data_dir: str | Path, folder: Path) -> None:
    """Writes what is learned (`names.jsonl`, their `captions.jsonl`, `stories.jsonl`, and `scenes.jsonl`, one scene of each
    story with the name of what it shows), `unseen.json` to be judged on, and the pictures, on white."""
    emoji = load_emoji(data_dir)
    paths = {one.name: one.path for one in emoji}
    roles = sorted({one[1] for name in paths if (one := re.fullmatch(r"woman ([a-z ]+): light skin tone", name))})
    roles = [
        role for role in roles if all(f"{who} {role}{tone}" in paths for who in ("woman", "man") for tone in TONES)
    ]
    people = [
        f"{who}{role}{tone}"
        for who in ("woman", "man")
        for role in ["", *(f" {one}" for one in roles)]
        for tone in TONES
    ]
    draw = random.Random(0)
    things = sorted(one.name for one in emoji if one.group not in ("People & Body", "Flags"))
    things = draw.sample(things, min(NUM_THINGS, len(things)))
    # What no story to learn ends with: a role of a person that is seen in other roles, the role of other persons.
    unseen = {
        *draw.sample([(who, role, tone) for who in ("woman", "man") for role in roles for tone in TONES], NUM_UNSEEN)
    }

    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in [*people, *things]:
        opened = Image.open(paths[name]).convert("RGBA")
        Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB").save(
            images / file_of(name)
        )
    names = [{"kind": "text_to_image", "text": name, "image": file_of(name)} for name in [*people, *things]]
    captions = [record | {"kind": "caption"} for record in names]
    stories = []
    for _ in range(8 * len(people)):
        who, tone, person = draw.choice(("woman", "man")), draw.choice(TONES), draw.choice(PEOPLE)
        seen = [role for role in roles if (who, role, tone) not in unseen]
        stories.append(story(person, who, tone, draw.sample(seen, 2)))
    tests = [
        story(draw.choice(PEOPLE), who, tone, [role]) | {"who": who, "role": role, "tone": tone}
        for who, role, tone in sorted(unseen)
    ]
    shows, scenes = {record["image"]: record["text"] for record in names}, []
    for one in stories:
        scene = draw.choice(story_samples(one, ["image", "multimodal"])[1:])  # the first one has nothing before it
        scenes.append(scene | {"captions": [shows[scene["messages"][-1]["content"][-1]["image"]]]})
    for file, records in {"names": names, "captions": captions, "stories": stories, "scenes": scenes}.items():
        (folder / f"{file}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    (folder / "unseen.json").write_text(json.dumps(tests, indent=1), encoding="utf-8")


def file_of(name: str) -> str:
    return re.sub("[^a-z]+", "-", name) + ".png"


def story(person: str, who: str, tone: str, roles: list[str]) -> dict[str, Any]:
    names = [f"{who}{tone}", *(f"{who} {role}{tone}" for role in roles)]
    texts = [f"this is {person}.", *(f"{person} as {role}." for role in roles)]
    return {"kind": "story", "texts": texts, "images": [file_of(name) for name in names]}
