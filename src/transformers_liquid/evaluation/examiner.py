"""The benchmark `emoji`: small tasks of a model that reads and draws, each with what is right.

What a drawing shows is told from the nearest of true pictures where these are at hand. Where they are not, all pictures are
drawn by the model, which also names its drawings: then it is judged by itself, and what it neither draws nor knows is no
mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..models.liquid.image_processing_liquid import load_image
from ..pipelines.conversation import LiquidConversation
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.files import whole
from .benchmarks import Sample, read_pictures
from .judges import measure_losses


PICTURES_NAME, NEAREST = "pictures", 5
# What a story names last before a picture; and how it goes on.
NAMED = re.compile(r"\b(?:a|an|the) ([^.]+?)(?: who.*)?$")
STORY = {"max_images": 3, "max_new_tokens": 60, "do_sample": True, "top_p": 0.8}


def draw(
    pipe: LiquidImageGenerationPipeline, samples: Sequence[Sample], folder: Path, batch_size: int, **settings: Any
) -> list[Path]:
    """Draws the texts of samples into a folder, each from a seed of its own; batches that are there stay as they are.

    Args:
        settings: What the pipeline is told, with `seed`; `image` has those that marks in the texts stand for.

    Raises:
        ValueError: If a text or a setting is none to draw with, before the first picture.
    """
    folder.mkdir(exist_ok=True)
    paths, seed = [folder / f"{number:06}.png" for number in range(1, len(samples) + 1)], settings.pop("seed")
    prompts, images = [sample.question for sample in samples], settings.pop("image", None)
    batches = range(0, len(paths), batch_size)
    left = [start for start in batches if not all(path.is_file() for path in paths[start : start + batch_size])]
    settings |= {"batch_size": batch_size, "progress_bar": False}
    if left:
        pipe.stream(prompts, image=images, seed=seed, **settings)  # says what is wrong with any of them
    for start in tqdm(left, disable=None, desc=folder.parent.name):
        batch = slice(start, start + batch_size)
        shown = images and images[batch]
        for index, image in pipe.stream(prompts[batch], image=shown, seed=seed + start, **settings):
            with whole(paths[start + index]) as unfinished:
                image.save(unfinished, format="PNG")
    return paths


class Examiner:
    """Has a model draw what tasks ask for and, as a [`Judge`], do the rest of each, and says what it is worth.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): The model and its processor.
        samples (sequence of [`Sample`]): The tasks.
        data (`Path`): Holds the pictures: see [`read_pictures`].
        folder (`Path`): Where drawings go.
        batch_size (`int`): Pictures drawn side by side.
        max_new_tokens (`int`): Of an answer.
        drawing (`Mapping`): What the pipeline is told.
    """

    def __init__(
        self,
        pipe: LiquidImageGenerationPipeline,
        samples: Sequence[Sample],
        data: Path,
        folder: Path,
        batch_size: int,
        max_new_tokens: int,
        drawing: Mapping[str, Any],
    ) -> None:
        self.pipe, self.pictures = pipe, read_pictures(data)
        self.max_new_tokens, self.seed = max_new_tokens, drawing["seed"]
        shown = list(dict.fromkeys(name for sample in samples for name in sample.true["pictures"]))
        self.has_files = all("file_name" in one for one in self.pictures.values())
        if self.has_files:
            self.files = {name: data / "emoji" / one["file_name"] for name, one in self.pictures.items()}
        else:
            named = [Sample(name, None, name) for name in shown]
            self.files = dict(zip(shown, draw(pipe, named, folder / "shown", batch_size, **drawing), strict=True))
        asked = [sample for sample in samples if "shows" in sample.true]
        images = [[str(self.files[name]) for name in sample.true["pictures"]] for sample in asked]
        drawn = iter(draw(pipe, asked, folder / PICTURES_NAME, batch_size, image=images, **drawing))
        # The picture that a task is about: what was drawn for it, or the first that it shows.
        self.about = [
            next(drawn) if "shows" in task else self.files[task["pictures"][0]] if task["pictures"] else Path(sample.id)
            for sample in samples
            for task in [sample.true]
        ]

    @torch.no_grad()
    def __call__(self, sample: Sample, picture: Path) -> dict[str, float]:
        task, scores = sample.true, {}
        if "shows" in task:
            named = self._named(load_image(str(picture)))
            scores[""] = named[0] in task["shows"]
            if self.has_files:
                scores[f"_top{NEAREST}"] = not {*named}.isdisjoint(task["shows"])
        elif "rather" in task:
            told = [replace(sample, question=text) for text in (task["says"][0], task["rather"])]
            losses = [measure_losses(self.pipe, one, self.files[task["pictures"][0]]) for one in told]
            scores[""] = losses[0]["text_loss"] < losses[1]["text_loss"]
        elif "says" in task:
            ids = self._ids([load_image(str(self.files[name])) for name in task["pictures"]])
            scores[""] = self._said(sample.question, ids) in task["says"]
        elif task["pictures"]:
            ids = self._ids([load_image(str(self.files[task["pictures"][0]]))])
            again = self.pipe.model.encode_images(self._decoded(ids))[0]
            scores[""] = (again == ids[0]).float().mean()
        else:
            scores[""] = self._told(sample.question)
        return {task["measure"] + name: float(value) for name, value in scores.items()}

    @cached_property
    def known(self) -> torch.Tensor:
        """All true pictures `(N, 3 * H * W)` as the codec has them, which no drawing can be better than."""
        images = [load_image(str(file)) for file in self.files.values()]
        batches = [self._ids(images[start : start + 64]) for start in range(0, len(images), 64)]
        return torch.cat([self._decoded(ids) for ids in batches]).flatten(1)

    def _ids(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = self.pipe.processor.image_processor(images, framing="pad")["pixel_values"]
        return torch.stack(self.pipe.model.encode_images(pixels.to(self.pipe.device)))

    def _decoded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.pipe.model.decode_image_tokens(ids).clamp(-1, 1)

    def _said(self, text: str, images: torch.Tensor) -> str:
        """The greedy answer to a text with pictures; a caption if there is no text."""
        processor, layout = self.pipe.processor, self.pipe.model.config.image_layout
        codes = layout.ids_to_codes(images).tolist()
        prompt = processor.interleaved_ids(text, codes) if text else processor.caption_ids(codes[0])
        inputs = self.pipe.ensure_tensor_on_device(input_ids=torch.tensor([prompt]))
        out = self.pipe.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        return processor.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()

    def _named(self, image: Image.Image) -> list[str]:
        """What a drawing shows: the nearest pictures, by squares over pixels, or the model's own name for it."""
        if not self.has_files:
            return [self._said("", self._ids([image]))]
        pixels = self.pipe.processor.image_processor(image, framing="pad")["pixel_values"].to(self.known.device)
        order = (self.known - pixels.flatten(1)).square().sum(1).argsort()
        return [[*self.pictures][index] for index in order[:NEAREST].tolist()]

    def _told(self, text: str) -> float:
        """How many of a story's pictures show what it has named last; 0 if there is none."""
        torch.manual_seed(self.seed)
        right = []
        for event in LiquidConversation(self.pipe.model, self.pipe.processor).stream(text, seed=self.seed, **STORY):
            if event["type"] == "text":
                text += event["text"]
            elif event["type"] == "image":
                named, (shows, *_) = NAMED.search(text.strip().rstrip(".")), self._named(event["image"])
                words = self.pictures.get(shows, {}).get("words", ())
                right.append(named is not None and (named[1] in words or {*named[1].split()} <= {*shows.split()}))
                text = ""
        return sum(right) / len(right) if right else 0.0
