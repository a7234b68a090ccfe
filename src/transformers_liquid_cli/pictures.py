"""How the pictures of a command are drawn, and PNGs that say how they were."""

import json
import random
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

from transformers_liquid import EMOJI_CHECKPOINT, LiquidImageGenerationPipeline
from transformers_liquid.generation.settings import ImageGenerationConfig
from transformers_liquid.models.liquid.image_processing_liquid import contact_sheet, load_image
from transformers_liquid.utils.files import differences, parse_json, whole

from .options import PROG, is_folder


# Where a PNG says how it was drawn: JSON, under this key.
METADATA_KEY = "transformers_liquid"

# What of a picture's settings there is an option for, beside `--greedy`.
SETTINGS = ("guidance_scale", "guidance_min_p", "speculative", "temperature", "top_k", "top_p")

# What of its record says how it was drawn, but does not change it.
NO_MATTER = ("settings", "device", "version", "command", "speculative", "batch_size")


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
    """

    def __init__(self, pipe: LiquidImageGenerationPipeline, options: Mapping[str, Any]) -> None:
        given = {name: options[name] for name in SETTINGS if options[name] is not None}
        if options["greedy"]:
            given["do_sample"] = False
        settings, _ = ImageGenerationConfig.from_call(pipe.model.generation_config, None, given)
        layout = pipe.model.config.image_layout
        height, width = layout.size(layout.grid(options["height"], options["width"]))
        self.pipe, self.model, self.batch_size = pipe, options["model"], 1
        self.settings = settings.to_dict()
        self.shared = {"negative_prompt": options["negative_prompt"], "height": height, "width": width}

    def check(self, prompts: str | list[str]) -> None:
        """Raises what is wrong with prompts, or with what they all share."""
        self.pipe.preprocess(prompts, **self.shared)

    def sort_out(self, lines: Sequence[str]) -> tuple[dict[int, str], dict[int, str]]:
        """The lines that can be drawn, and what is wrong with the others, by their numbers from 1."""
        good, bad = {}, {}
        for number, line in enumerate(lines, start=1):
            try:
                self.check(line)
                good[number] = line
            except ValueError as error:
                bad[number] = " ".join(str(error).split())
        return good, bad

    def draw(self, pictures: Sequence[Picture], batch_size: int = 1) -> Iterator[Picture]:
        """Draws and writes pictures; each is handed out as soon as it is there."""
        if not pictures:
            return
        prompts, seeds, _ = map(list, zip(*pictures, strict=True))
        self.batch_size = min(batch_size, len(pictures))
        drawn = self.pipe.stream(prompts, seed=seeds, batch_size=batch_size, **self.shared, **self.settings)
        for index, image in drawn:
            save_png(image, pictures[index].path, self.record(pictures[index]))
            yield pictures[index]

    def save_sheet(self, pictures: Sequence[Picture], path: Path, columns: int | None = None) -> None:
        """Writes pictures that are drawn on one sheet."""
        sheet = contact_sheet([load_image(picture.path) for picture in pictures], columns)
        save_png(sheet, path, [self.record(picture) for picture in pictures])

    def record(self, picture: Picture) -> dict[str, Any]:
        """Everything that a picture depends on, and the command that makes it again."""
        place = {"device": self.pipe.device.type, "dtype": str(self.pipe.dtype).removeprefix("torch.")}
        settings = {name: value for name, value in self.settings.items() if name in SETTINGS and value is not True}
        options = {"model": self.model, "seed": picture.seed, **self.shared, **settings, **place}
        # With "=", and after "--", a value may begin with a dash.
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        words += ["--greedy"] * (not self.settings["do_sample"]) + ["--"] * picture.prompt.startswith("-")
        return {
            "prompt": picture.prompt,
            "seed": picture.seed,
            "model": self.model or Path(EMOJI_CHECKPOINT).name,
            **self.shared,
            "settings": self.settings,
            **place,
            # In half precision it decides how sums are rounded.
            "batch_size": self.batch_size,
            "version": version("transformers-liquid"),
            "command": shlex.join([PROG, "generate", *words, picture.prompt]),
        }


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


def without_file(drawing: Drawing, pictures: list[Picture], folder: Path) -> list[Picture]:
    """The pictures that are still to be drawn. Raises if the folder holds one that would be drawn in another way."""
    wanted = {picture.path: picture for picture in pictures}
    for path in sorted(folder.glob("*.png")):
        if not re.match(r"\d{6,}-", path.name):
            continue
        wrong = "belongs to no line of the prompts file, nor to --num-images as given"
        if path in wanted:
            different = differences(_identity(read_metadata(path)), _identity(drawing.record(wanted[path])))
            wrong = different and f"was drawn otherwise: {different}"
        if wrong:
            raise ValueError(
                f"{path} {wrong}. Give the same arguments as before, choose another --output-dir, or delete the file."
            )
    return [picture for picture in pictures if not picture.path.exists()]


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """All that pictures must share to be the same, as JSON keeps it. Speculation does not change them."""
    same = {name: value for name, value in (record | record["settings"]).items() if name not in NO_MATTER}
    return json.loads(json.dumps(same))


def save_png(image: Image.Image, path: Path, record: Any) -> None:
    """Writes a picture, whole or not at all, with its record, or with a list of them for a sheet."""
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
    with whole(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=metadata)


def read_metadata(path: str | Path) -> dict[str, Any] | list[dict[str, Any]]:
    """How a picture of `generate` was drawn.

    Args:
        path (`str` or `Path`): The PNG.

    Returns:
        `dict`: Prompt, seed, model, sizes, settings, and the command that draws it again; a list of them for a
        sheet of pictures.

    Raises:
        ValueError: If the picture does not say.
    """
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} does not say how it was drawn: only the PNGs of `{PROG} generate` do.")
    return parse_json(text, f"What {path} says of how it was drawn")
