"""The files of CC3M, VIST and MMDialog as MiniGPT-5 (arXiv 2310.02239) prepares them, and our own, to records."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..models.voken.prompts import ORDER_PROMPTS
from ..utils.files import check_keys, parse_json, read_json, read_text


# What a part of a turn of MMDialog may be.
MMDIALOG = ("__TEXT__", "__MEDIA__")


def load_voken_records(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, image_folder: str | Path | None = None
) -> list[dict[str, Any]]:
    """Records for [`VokenDataCollator`]; their pictures are paths.

    Args:
        path (`str` or `Path`): One of

            - `*.tsv` as of CC3M, with the columns `caption` and `image_path`. As in the reference, captions are made
              plain, and every hundredth pair comes a second time, as an order;
            - `*_cleaned.json` as of VIST: stories by their names, lists of `caption`, `image_id`, `sequence_index`; beside
              it `*_image_mapping.json`, paths by `image_id`;
            - `*.jsonl` as of MMDialog: a `conversation` of turns a line, of which each is learned after the three before
              it; a turn of more than 50 tokens ends a dialogue;
            - `*.jsonl` with records of the collator.
        tokenizer (`PreTrainedTokenizerBase`): Counts tokens.
        image_folder (`str` or `Path`, *optional*): What paths of pictures begin at. Defaults to the folder of the file.

    Raises:
        ValueError: If the file is of none of these kinds, or pictures are not there.
    """
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    if path.suffix == ".tsv":
        records = list(_cc3m(path))
    elif path.name.endswith("_cleaned.json"):
        places = read_json(path.with_name(path.name.replace("_cleaned", "_image_mapping")))
        records = [_vist(scenes, places) for scenes in read_json(path).values()]
    elif path.suffix == ".jsonl":
        lines = [parse_json(line, path) for line in read_text(path).split("\n") if line.strip()]
        records = []
        for line in lines:
            if isinstance(line, dict) and "conversation" in line:
                records += _mmdialog(line["conversation"], tokenizer)
            else:
                check_keys(f"A line of {path}", line, ("kind",))
                records.append(line)
    else:
        raise ValueError(f"{path} must be a .tsv of CC3M, a _cleaned.json of VIST, or .jsonl (MMDialog, records).")
    missing = []

    def find(image: Any) -> str:
        if not isinstance(image, str):
            raise ValueError(f"Pictures in {path} are paths, and images a list of these, got {image!r}.")
        place = folder / image
        missing.extend([] if place.is_file() else [str(place)])
        return str(place)

    for record in records:
        contents = [message.get("content") for message in record.get("messages") or () if isinstance(message, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if images := record.get("images"):
            record["images"] = [find(one) for one in (images if isinstance(images, list) else [[images]])]
        for one in (record, *parts):
            if isinstance(one, dict) and one.get("image"):
                one["image"] = find(one["image"])
    if missing or not records:
        number = f"{len(missing)} of their pictures are not there"
        raise ValueError(f"{path} has {len(records)} records, and {number}: {missing[:3]}.")
    return records


def _cc3m(path: Path) -> Iterator[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    for index, row in enumerate(rows):
        given = {name: value for name, value in row.items() if value}
        check_keys(f"Line {index + 2} of {path}", given, required=("caption", "image_path"))
        text = " ".join(re.sub(r"[.!\"()*#:;~]", " ", row["caption"].lower()).split())
        yield {"kind": "text_to_image", "text": text, "image": row["image_path"]}
        if index % 100 == 0:
            order = ORDER_PROMPTS[index // 100 % len(ORDER_PROMPTS)].format(text)
            yield {"kind": "text_to_image", "text": order, "image": row["image_path"], "captions": [text]}


def _vist(scenes: list[dict[str, Any]], places: dict[str, str]) -> dict[str, Any]:
    for scene in scenes if isinstance(scenes, list) else [scenes]:
        check_keys("A scene", scene, ("caption", "image_id", "sequence_index"))
    scenes = sorted(scenes, key=lambda scene: int(scene["sequence_index"]))
    ids = [str(scene["image_id"]) for scene in scenes]  # as JSON has them in a mapping
    check_keys("The mapping of pictures", places, required=ids)
    images = [places[one] for one in ids]
    return {"kind": "story", "texts": [scene["caption"] for scene in scenes], "images": images}


def _mmdialog(conversation: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    turns: list[tuple[str, list[str]]] = []
    for turn in conversation if isinstance(conversation, list) else [conversation]:
        check_keys("A turn", turn, ("turn",))
        for part in turn["turn"] if isinstance(turn["turn"], list) else [turn["turn"]]:
            if not isinstance(part, dict) or not all(isinstance(part.get(name, ""), str) for name in MMDIALOG):
                raise ValueError(f"A turn is a list of {{'__TEXT__': ...}} and {{'__MEDIA__': ...}}, not of {part!r}.")
        text = " ".join(part["__TEXT__"] for part in turn["turn"] if "__TEXT__" in part)
        if len(tokenizer(text, add_special_tokens=False).input_ids) > 50:
            break
        turns.append((text, [part["__MEDIA__"] for part in turn["turn"] if "__MEDIA__" in part]))
    for end in range(1, len(turns)):
        some = turns[max(0, end - 3) : end + 1]
        messages = []
        for index, (text, images) in enumerate(some):
            parts = [{"type": "text", "text": f"{text} " if images else text}, *({"type": "image"} for _ in images)]
            role = "user" if (len(some) - index) % 2 == 0 else "assistant"
            messages.append({"role": role, "content": parts})
        images = [image for _, own in some for image in own]
        yield {"kind": "conversation", "messages": messages, "images": images}
