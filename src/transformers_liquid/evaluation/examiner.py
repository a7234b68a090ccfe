"""The benchmark `emoji`: small tasks of a model that reads and draws, each with what is right.

What a drawing shows is told from the nearest of true pictures where these are at hand, or by a classifier of pictures.
Where they are not, all pictures are drawn by the model, which also names its drawings: then it is judged by itself, and
what it neither draws nor knows is no mistake.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..models.liquid.image_processing_liquid import load_image
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.files import whole
from .benchmarks import Sample, read_pictures
from .judges import ClassifierJudge, measure_losses


PICTURES_NAME, KNOWN_NAME, NEAREST, ENCODED_AT_ONCE = "pictures", "known.safetensors", 5, 64
# What a story names last before a picture; and how it goes on.
NAMED = re.compile(r".*\b(?:a|an|the) ([^.]+?)(?: who.*)?$", re.DOTALL)
STORY = {"generation_mode": "interleaved", "max_new_tokens": 60, "do_sample": True, "top_p": 0.8}
STORY_IMAGES, STORY_END = 3, "the end."


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
        judge ([`ClassifierJudge`], *optional*): What names drawings, and true pictures beside them: its `ceiling`.
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
        judge: ClassifierJudge | None = None,
    ) -> None:
        self.pipe, self.pictures, self.folder = pipe, read_pictures(data), folder
        self.max_new_tokens, self.seed, self.judge = max_new_tokens, drawing["seed"], judge
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
    def __call__(self, sample: Sample, picture: Path) -> dict[str, float | list[float]]:
        task = sample.true
        if "shows" in task or "tells" in task:
            if "shows" in task:
                named, right = self._drawn[picture], task["shows"]
            else:
                drawn = [part[None] for part in self._told(sample, max_images=1) if torch.is_tensor(part)]
                named, right = self._named(drawn[0])[0] if drawn else [], task["tells"]
            scores = {"": named[:1], f"_top{NEAREST}": named} if self.has_files else {"": named}
            if self.judge is not None:
                true = self._named(self._decoded(self._ids(right[:1])))[0]
                scores |= {"_ceiling": true[:1], f"_top{NEAREST}_ceiling": true}
                right = [self.judge.label_of[name] for name in right]
            scores = {name: not {*of}.isdisjoint(right) for name, of in scores.items()}
        elif "rather" in task:
            said = [replace(sample, question=text) for text in (task["says"][0], task["rather"])]
            losses = [measure_losses(self.pipe, one, picture)["text_loss"] for one in said]
            scores = {"": losses[0] < losses[1]}
        elif "says" in task:
            scores = {"": self._said(sample.question, self._ids(task["pictures"])) in task["says"]}
        elif task["pictures"]:
            ids = self._ids(task["pictures"])
            scores = {"": (self._encoded(self._decoded(ids)) == ids).float().mean().item()}
        else:
            story = [sample.question, *self._told(sample, STORY_IMAGES)]
            ends = isinstance(story[-1], str) and story[-1].strip().endswith(STORY_END)
            scores = {"": self._shows_what_is_told(story), "_end": ends}
        return {task["measure"] + name: np.array(value, dtype=float).tolist() for name, value in scores.items()}

    def _ids(self, names: Sequence[str]) -> torch.Tensor:
        return self._known["ids"][[[*self.files].index(name) for name in names]]

    @cached_property
    def _known(self) -> dict[str, torch.Tensor]:
        """Of all pictures the `ids` and, if drawings are compared with them, their `pixels` `(N, 3 * H * W)` as the codec
        has them, which no drawing can be better than. Kept in a file, since thousands take minutes."""
        if not (path := self.folder / KNOWN_NAME).is_file():
            files, made = [*self.files.values()], defaultdict(list)
            for start in range(0, len(files), ENCODED_AT_ONCE):
                made["ids"].append(self._encoded(self._pixels(files[start : start + ENCODED_AT_ONCE])))
                if self.has_files:
                    made["pixels"].append(self._decoded(made["ids"][-1]).flatten(1).half())
            with whole(path) as unfinished:
                save_file({name: torch.cat(of).cpu() for name, of in made.items()}, unfinished)
        known = {name: of.to(self.pipe.device) for name, of in load_file(path).items()}
        if self.has_files:
            known["pixels"] = known["pixels"].float()
            known["squares"] = known["pixels"].square().sum(1)
        return known

    def _pixels(self, files: Sequence[Path]) -> torch.Tensor:
        images = [load_image(str(file)) for file in files]
        return self.pipe.processor.image_processor(images, framing="pad")["pixel_values"].to(self.pipe.device)

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.pipe.model.encode_images(pixels))

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

    def _named(self, drawn: torch.Tensor) -> list[list[str]]:
        """What drawings `(B, 3, H, W)` show: the labels of the judge; or the nearest pictures, by squares over pixels; or
        the model's own names."""
        if self.judge is not None:
            return self.judge(self.pipe.processor.image_processor.postprocess(drawn), NEAREST)
        if not self.has_files:
            return [[self._said("", ids[None])] for ids in self._encoded(drawn)]
        distances, names = self._known["squares"] - 2 * drawn.flatten(1) @ self._known["pixels"].T, [*self.files]
        nearest = distances.topk(min(NEAREST, len(names)), largest=False).indices
        return [[names[index] for index in indices] for indices in nearest.tolist()]

    @cached_property
    def _drawn(self) -> dict[Path, list[str]]:
        """What each drawing for a task shows; many at a time, which is several times as fast."""
        files = [file for file in self.about if file.parent.name == PICTURES_NAME]
        batches = [files[start : start + ENCODED_AT_ONCE] for start in range(0, len(files), ENCODED_AT_ONCE)]
        return {file: named for of in batches for file, named in zip(of, self._named(self._pixels(of)), strict=True)}

    def _told(self, sample: Sample, max_images: int) -> list[str | torch.Tensor]:
        """How a story goes on: texts and drawings `(3, H, W)`."""
        shown = [load_image(str(self.files[name])) for name in sample.true["pictures"]]
        prompt = {"text": [sample.question], "images": [shown]} if shown else {"text": [sample.question]}
        inputs = self.pipe.processor(**prompt, generation_mode="interleaved", return_tensors="pt").to(self.pipe.device)
        seed = self.seed + zlib.crc32(sample.id.encode())  # of each its own: else all have the same things happen
        torch.manual_seed(seed)
        how = {"max_images": max_images, "generator": [torch.Generator().manual_seed(seed)], **STORY}
        parts = self.pipe.model.generate(**inputs, **how).parts[0]
        decode = partial(self.pipe.processor.decode, skip_special_tokens=True)
        return [part.clamp(-1, 1) if part.ndim == 3 else decode(part) for part in parts]

    def _shows_what_is_told(self, parts: Sequence[str | torch.Tensor]) -> list[bool]:
        """Of each picture of a story, whether it shows what was named last before it; a story without one fails once."""
        right, text = [], ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            named, shows = NAMED.search(text.strip().rstrip(".")), self._named(part[None])[0][0]
            words = self.pictures.get(shows, {}).get("words")
            right.append(
                named is not None and (named[1] in words if words else {*named[1].split()} <= {*shows.split()})
            )
            text = ""
        return right or [False]
