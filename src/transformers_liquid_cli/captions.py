"""Texts about pictures, and captions of a folder as JSON lines: for `describe`."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from transformers_liquid.data.source import check_pictures, pictures_of, tell_some
from transformers_liquid.models.liquid.image_processing_liquid import load_image
from transformers_liquid.utils.files import alone_in, check_keys, parse_json, read_text

from .models import load, write_answers
from .options import GOES_ON, is_folder, log, of_text, session, tell, tell_going_on


def describe_pictures(
    names: Sequence[str], read: Callable[[str], Image.Image], question: str | None, given: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Names and texts of pictures, batch by batch. The first ones are read before the model is."""
    if not names:
        return
    size = given["batch_size"]
    batches = (names[start : start + size] for start in range(0, len(names), size))
    batches = ((some, [read(name) for name in some]) for some in batches)
    first = list(islice(batches, 1))
    pipe = load(given["model"], given["device"], given["dtype"])
    ids = pipe.processor.caption_ids() if question is None else pipe.processor.question_ids(question)
    for some, pictures in chain(first, batches):
        inputs = pipe.processor.image_processor(pictures, framing=given["framing"])
        inputs |= {"input_ids": torch.tensor([ids] * len(some)), **of_text(given)}
        yield from zip(some, write_answers(pipe, given["max_new_tokens"], given["seed"], **inputs), strict=True)


def describe_folder(folder: Path, output: Path | None, question: str | None, given: Mapping[str, Any]) -> None:
    """Writes a line of `file_name` and `text` for each picture that has none yet."""
    if output is None or is_folder(output):
        raise ValueError(
            f"{folder} is a folder: name the file of JSON lines for its texts with --output, got {output}."
        )
    names = [file.relative_to(folder).as_posix() for file in pictures_of(folder)]
    if not names:
        raise ValueError(f"{folder} has no pictures.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(output.parent):
        done = set()
        lines = read_text(output).split("\n") if output.exists() else []
        for number, line in enumerate(filter(None, lines), 1):
            entry = parse_json(line, f"Line {number} of {output}")
            check_keys(f"Line {number} of {output}", entry, ("file_name", "text"))
            done.add(entry["file_name"])
        if strange := sorted(done.difference(names)):
            raise ValueError(f"{output} has texts of other pictures than those of {folder}: {tell_some(strange)}.")
        left = [name for name in names if name not in done]
        check_pictures(folder / name for name in left)
        tell_going_on(len(done), len(names), "pictures have a text")
        session.after_interrupt = GOES_ON
        texts = describe_pictures(left, lambda name: load_image(folder / name), question, given)
        bar = tqdm(texts, total=len(names), initial=len(done), desc="describing", unit=" images")
        with open(output, "ab", buffering=0) as file:
            for name, text in bar:
                entry = {"file_name": name, "text": text}
                # At once, so that a run that is killed leaves whole lines.
                file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
                os.fsync(file.fileno())
                if given["as_json"]:
                    tell(entry)
    (log.info if given["as_json"] else print)(
        f"{output}: {len(names):,} pictures, {len(left):,} of them described now."
    )
