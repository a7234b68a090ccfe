"""Captions of a folder of pictures, as JSON lines: for `describe`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from transformers_liquid.data.source import check_pictures, pictures_of, tell_some
from transformers_liquid.models.liquid.image_processing_liquid import load_image
from transformers_liquid.utils.files import alone_in, check_keys, parse_json, read_text

from .models import load, write_answers
from .options import is_folder


def describe_folder(
    folder: Path, output: Path | None, question: str | None, framing: str, batch_size: int, given: Mapping[str, Any]
) -> None:
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
        pipe = load(given["model"], given["device"], given["dtype"])
        ids = pipe.processor.caption_ids() if question is None else pipe.processor.question_ids(question)
        bar = tqdm(total=len(names), initial=len(done), desc="describing", unit=" images")
        with bar, open(output, "ab", buffering=0) as file:
            for start in range(0, len(left), batch_size):
                some = left[start : start + batch_size]
                pictures = [load_image(folder / name) for name in some]
                inputs = pipe.processor.image_processor(pictures, framing=framing)
                prompts = torch.tensor([ids] * len(some))
                texts = write_answers(pipe, given["max_new_tokens"], given["seed"], input_ids=prompts, **inputs)
                entries = [{"file_name": name, "text": text} for name, text in zip(some, texts, strict=True)]
                # At once, so that a run that is killed leaves whole lines.
                file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
                os.fsync(file.fileno())
                bar.update(len(some))
    print(f"{output}: {len(names):,} pictures, {len(left):,} of them described now.")
