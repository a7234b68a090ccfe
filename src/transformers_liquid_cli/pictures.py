"""How the pictures of a command are drawn, and PNGs that say how they were."""

import hashlib
import json
import os
import random
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin

from transformers_liquid import EMOJI_CHECKPOINT, LiquidImageGenerationPipeline
from transformers_liquid.generation.settings import ImageGenerationConfig
from transformers_liquid.models.liquid.image_processing_liquid import contact_sheet, load_image
from transformers_liquid.utils.files import differences, parse_json, whole

from .models import reading
from .options import PROG, STDIO, is_folder, log, one_line


# Where a PNG says how it was drawn: JSON, under this key.
METADATA_KEY = "transformers_liquid"

# What of a picture's settings there is an option for, beside `--greedy`.
SETTINGS = ("guidance_scale", "guidance_min_p", "speculative", "temperature", "top_k", "top_p")

# What of its record says how it was drawn, but does not change it.
# Speculation draws the same; the contents of the checkpoint and of pictures are compared by themselves.
NO_MATTER = ("settings", "device", "version", "command", "speculative", "batch_size", "note", "identity", "image")

# What a configuration says of where and by what it was saved.
NO_CONTENT = ("_name_or_path", "auto_map", "architectures", "dtype", "transformers_version")
NO_CONTENT += ("base_model_name_or_path", "peft_version")  # of an adapter


class Picture(NamedTuple):
    """What is drawn, and where it goes."""

    prompt: str
    seed: int
    path: Path


class Drawing:
    """What the pictures of one command share: its options, on top of the checkpoint's settings.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): Draws them.
        options (`Mapping`): The command's, by their names.
        images (pairs of `str` and pictures): Of the context of each drawing: their names and what is there.
    """

    def __init__(
        self,
        pipe: LiquidImageGenerationPipeline,
        options: Mapping[str, Any],
        images: Sequence[tuple[str, Image.Image]] = (),
    ) -> None:
        given = {name: options[name] for name in SETTINGS if options[name] is not None}
        if options["greedy"]:
            given["do_sample"] = False
        with reading(options["model"] or EMOJI_CHECKPOINT):
            settings, _ = ImageGenerationConfig.from_call(pipe.model.generation_config, None, given)
        layout = pipe.model.config.image_layout
        height, width = layout.size(layout.grid(options["height"], options["width"]))
        self.pipe, self.model, self.batch_size = pipe, options["model"], 1
        self.settings = settings.to_dict()
        self.shared = {"negative_prompt": options["negative_prompt"], "height": height, "width": width}
        self.images = [image for _, image in images]
        digests = [hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() for image in self.images]
        self.context = {"image": [name for name, _ in images], "image_sha256": digests} if images else {}

    @cached_property
    def identity(self) -> str:
        """Of the checkpoint; it takes as long as reading the weights once."""
        return identity(self.pipe)

    def of(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the pipeline is to be told with prompts."""
        return self.shared | ({"image": [self.images] * len(prompts)} if self.images else {})

    def check(self, prompts: Sequence[str]) -> None:
        """Raises what is wrong with prompts, or with what they all share."""
        self.pipe.preprocess(prompts, **self.of(prompts))

    def sort_out(self, lines: Mapping[int, str], file: Path | None) -> tuple[dict[int, str], dict[int, str]]:
        """The lines of a file that can be drawn, and what is wrong with the others, which is told, by their numbers."""

        def wrong(numbers: list[int]) -> dict[int, str]:
            """By halves: all lines together have the pictures of their context encoded once."""
            try:
                self.check([lines[number] for number in numbers])
            except ValueError as error:
                if len(numbers) == 1:
                    return {numbers[0]: one_line(error)}
                half = len(numbers) // 2
                return wrong(numbers[:half]) | wrong(numbers[half:])
            return {}

        bad = wrong(list(lines)) if lines else {}
        for number, reason in bad.items():
            log.error(f"{file}, line {number} is left out: {reason}")
        return {number: line for number, line in lines.items() if number not in bad}, bad

    def by_turns(self) -> dict[str, Any]:
        """The settings as a conversation takes them."""
        settings = {name: value for name, value in self.settings.items() if name not in self.shared}
        return {"image_generation_config": settings, **self.shared}

    def draw(self, pictures: Sequence[Picture], batch_size: int = 1, **kwargs: Any) -> Iterator[Picture]:
        """Draws and writes pictures; each is handed out as soon as it and all before are there. `kwargs` are the
        pipeline's."""
        if not pictures:
            return
        prompts, seeds, _ = map(list, zip(*pictures, strict=True))
        self.batch_size = min(batch_size, len(pictures))
        drawn = self.pipe.stream(
            prompts, seed=seeds, batch_size=batch_size, **self.of(prompts), **self.settings, **kwargs
        )
        done, written = 0, set()
        for index, image in drawn:
            save_png(image, pictures[index].path, self.record(pictures[index]))
            written.add(index)
            while done in written:  # the pipeline begins with the longest prompts
                yield pictures[done]
                done += 1

    def save_sheet(self, pictures: Sequence[Picture], path: Path, columns: int | None = None) -> None:
        """Writes pictures that are drawn on one sheet."""
        sheet = contact_sheet([load_image(picture.path) for picture in pictures], columns)
        save_png(sheet, path, [read_metadata(picture.path) for picture in pictures])

    def record(self, picture: Picture) -> dict[str, Any]:
        """Everything that a picture depends on, and the command that makes it again."""
        place = {"device": self.pipe.device.type, "dtype": str(self.pipe.dtype).removeprefix("torch.")}
        settings = {name: value for name, value in self.settings.items() if name in SETTINGS and value is not True}
        options = {"model": self.model, "seed": picture.seed, **self.shared, **settings, **place}
        # With "=", and after "--", a value may begin with a dash.
        words = [f"--image={name}" for name in self.context.get("image", ())]
        words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        words += ["--greedy"] * (not self.settings.get("do_sample")) + ["--"] * picture.prompt.startswith("-")
        record = {
            "prompt": picture.prompt,
            "seed": picture.seed,
            "model": self.model or Path(EMOJI_CHECKPOINT).name,
            "identity": self.identity,
            **self.context,
            **self.shared,
            "settings": self.settings,
            **place,
            # In half precision it decides how sums are rounded.
            "batch_size": self.batch_size,
            "version": version("transformers-liquid"),
            "command": shlex.join([PROG, "generate", *words, picture.prompt]),
        }
        if self.pipe.dtype.itemsize < 4 and self.batch_size > 1:
            record["note"] = (
                f"In {place['dtype']}, what is drawn beside a picture decides how sums are rounded: the command draws this one "
                "alone, and may now and then draw another."
            )
        return record


def read_picture(name: str) -> Image.Image:
    """A picture of a file, of an URL, or of standard input."""
    return load_image(sys.stdin.buffer.read() if name == str(STDIO) else name)


def identity(pipe: LiquidImageGenerationPipeline) -> str:
    """What checkpoints share that draw the same, wherever they lie: sha256 of the configuration, the tokenizer, and a
    checksum of each weight, which is exact on every device and takes as long as reading the weights once."""

    def content(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in NO_CONTENT}

    config = json.loads(pipe.model.config.to_json_string(), object_hook=content)
    adapters = [content(adapter.to_dict()) for adapter in getattr(pipe.model, "peft_config", {}).values()]
    # A fast tokenizer, but for what its last call said of pads and cuts.
    tokenizer = json.loads(pipe.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    known, sets = [config, adapters, tokenizer], lambda value: sorted(value) if isinstance(value, set) else str(value)
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=sets).encode())
    # Words of 64 bits, each with a factor: these are odd and differ, so that no word changes, and no two change places,
    # without the sum. Pieces of 8 MB stay in a processor's cache.
    factors = torch.arange(2**20, device=pipe.model.device) * 2 + 1
    for name, weight in sorted(pipe.model.state_dict().items()):
        data, checksum = weight.flatten().view(torch.uint8), 0
        if len(data) % 8 or data.storage_offset() % 8:
            data = torch.nn.functional.pad(data, (0, -len(data) % 8))
        for words in data.view(torch.int64).split(len(factors)):
            checksum = (31 * checksum + int((words * factors[: len(words)]).sum())) % 2**64
        digest.update(f"{name} {tuple(weight.shape)} {checksum}".encode())
    return digest.hexdigest()


def of_lines(lines: dict[int, str], num_images: int, seed: int, folder: Path) -> list[Picture]:
    """Names and seeds depend on the line alone, so that lines can be added at the end."""
    suffixes = [f"-{image}" for image in range(num_images)] if num_images > 1 else [""]
    return [
        Picture(line, seed + (number - 1) * num_images + image, folder / f"{number:06}-{_slug(line)}{suffix}.png")
        for number, line in lines.items()
        for image, suffix in enumerate(suffixes)
    ]


def in_order(prompts: list[str], num_images: int, seed: int | None, output: Path) -> list[Picture]:
    """To the file, to numbered files beside it, or to files in the folder named after the prompts."""
    seed = random.randrange(2**31) if seed is None else seed
    prompts = [prompt for prompt in prompts for _ in range(num_images)]
    digits, pictures = len(str(len(prompts) - 1)), []
    for index, prompt in enumerate(prompts):
        path = output
        if is_folder(output):
            path = output / f"{index:0{digits}}-{_slug(prompt)}.png"
        elif len(prompts) > 1:
            path = output.with_stem(f"{output.stem}-{index:0{digits}}")
        pictures.append(Picture(prompt, seed + index, path))
    return pictures


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-")


def check_apart(pictures: list[Picture], sheet: Path | None, read: Sequence[str | Path | None]) -> None:
    """Nothing is written over what a command reads, or has just written."""
    paths = {os.path.realpath(picture.path) for picture in pictures}
    for path in filter(None, (sheet, *read)):
        if (real := os.path.realpath(path)) in paths:
            raise ValueError(
                f"A picture would be written to {path}, which is another file of this command: rename one."
            )
        paths |= {real} if path is sheet else set()


def without_file(drawing: Drawing, pictures: list[Picture], folder: Path) -> list[Picture]:
    """The pictures that are still to be drawn. Raises if the folder holds one that would be drawn in another way."""
    wanted, damaged = {picture.path: picture for picture in pictures}, set()
    for path in sorted(folder.glob("*.png")):
        if not re.match(r"\d{6,}-", path.name):
            continue
        wrong = "belongs to no line of the prompts file, nor to --num-images as given"
        if path in wanted:
            try:
                before, now = read_metadata(path), drawing.record(wanted[path])
            except DamagedPictureError as error:
                damaged.add(path)
                log.info(f"{one_line(error)} It is drawn again.")
                continue
            if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
                wrong = "does not say how it was drawn"
            elif different := differences(_settings(before), _settings(now)):
                wrong = f"was drawn otherwise: {different}"
            elif before.get("identity") != now["identity"]:
                wrong = "was drawn by other weights or with another tokenizer, or does not say by which"
            else:
                continue
        raise ValueError(
            f"{path} {wrong}. Give the same arguments as before, choose another --output-dir, or delete the file."
        )
    return [picture for picture in pictures if picture.path in damaged or not picture.path.exists()]


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """All that pictures of one checkpoint must share to be the same, as JSON keeps it."""
    same = {name: value for name, value in (record | record["settings"]).items() if name not in NO_MATTER}
    return json.loads(json.dumps(same))


class DamagedPictureError(ValueError):
    """A file that holds no whole picture."""


def save_png(image: Image.Image, path: Path, record: Any) -> None:
    """Writes a picture, whole or not at all, with its record, or with a list of them for a sheet."""
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
    if path == STDIO:
        image.save(sys.stdout.buffer, format="PNG", pnginfo=metadata)
        return
    with whole(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=metadata)


def save_beside(story: Path, number: int, image: Image.Image) -> Path:
    """Writes a picture of a story beside it, whole or not at all."""
    path = story.with_name(f"{story.stem}-{number}.png")
    with whole(path) as unfinished:
        image.save(unfinished, format="PNG")
    return path


def read_metadata(path: str | Path) -> dict[str, Any] | list[dict[str, Any]]:
    """How a picture of `generate` was drawn.

    Args:
        path (`str` or `Path`): The PNG.

    Returns:
        `dict`: Prompt, seed, model, sizes, settings, and the command that draws it again; a list of them for a
        sheet of pictures.

    Raises:
        DamagedPictureError: If it cannot be read to its end.
        ValueError: If the picture does not say.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
            image.verify()
        with Image.open(path) as image:  # `verify` does not decode, and no picture can be loaded after it
            image.load()
    except Exception as error:  # decoders raise anything on broken files; those of the file system have a number
        if getattr(error, "errno", None) is not None:
            raise
        raise DamagedPictureError(f"{path} is damaged, or no picture: {one_line(error)}.") from error
    if text is None:
        raise ValueError(f"{path} does not say how it was drawn: only the PNGs of `{PROG} generate` do.")
    return parse_json(text, f"What {path} says of how it was drawn")
