"""The benchmark `emoji`: small tasks of a model that reads and draws, each with what is right.

What a drawing shows is told from the nearest of true pictures where these are at hand. Where they are not, all pictures are
drawn by the model, which also names its drawings: then it is judged by itself, and what it neither draws nor knows is no
mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..models.liquid.image_processing_liquid import load_image
from ..pipelines.conversation import LiquidConversation
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from .benchmarks import Picture, Sample
from .judges import measure_losses


NEAREST = 5
# What a story names last before a picture; and how it goes on.
NAMED = re.compile(r"\b(?:a|an|the) ([^.]+?)(?: who.*)?$")
STORY = {"max_images": 3, "max_new_tokens": 60, "do_sample": True, "top_p": 0.8}


class Examiner:
    """Has a model do the tasks and says what that is worth: a [`Judge`].

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): The model and its processor.
        pictures (`Mapping`): All that tasks are about, by name.
        shown (`Mapping`): The files of those that tasks show, by name.
        max_new_tokens (`int`): Of an answer.
        seed (`int`): Of stories.
    """

    def __init__(
        self,
        pipe: LiquidImageGenerationPipeline,
        pictures: Mapping[str, Picture],
        shown: Mapping[str, Path],
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.pipe, self.pictures, self.shown, self.seed = pipe, pictures, shown, seed
        self.max_new_tokens, self.known = max_new_tokens, None
        if files := [one.file for one in pictures.values() if one.file]:
            # As the codec has them, which no drawing can be better than.
            self.known = torch.cat([self._decoded(self._ids(load_image(str(file)))) for file in files]).flatten(1)

    @torch.no_grad()
    def __call__(self, sample: Sample, picture: Path) -> dict[str, float]:
        task, scores = sample.true, {}
        if "shows" in task:
            named = self._named(load_image(str(picture)))
            scores[""] = named[0] in task["shows"]
            if self.known is not None:
                scores[f"_top{NEAREST}"] = not {*named}.isdisjoint(task["shows"])
        elif "rather" in task:
            told = [replace(sample, question=text) for text in (task["says"][0], task["rather"])]
            losses = [measure_losses(self.pipe, one, self.shown[task["pictures"][0]]) for one in told]
            scores[""] = losses[0]["text_loss"] < losses[1]["text_loss"]
        elif "says" in task:
            ids = [self._ids(load_image(str(self.shown[name]))) for name in task["pictures"]]
            scores[""] = self._said(sample.question, ids) in task["says"]
        elif task["pictures"]:
            ids = self._ids(load_image(str(self.shown[task["pictures"][0]])))
            again = self.pipe.model.encode_images(self._decoded(ids))[0]
            scores[""] = (again == ids).float().mean()
        else:
            scores[""] = self._told(sample.question)
        return {task["measure"] + name: float(value) for name, value in scores.items()}

    def _ids(self, image) -> torch.Tensor:
        pixels = self.pipe.processor.image_processor(image, framing="pad")["pixel_values"]
        return self.pipe.model.encode_images(pixels.to(self.pipe.device))[0]

    def _decoded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.pipe.model.decode_image_tokens(ids[None]).clamp(-1, 1)

    def _said(self, text: str, images: list[torch.Tensor]) -> str:
        """The greedy answer to a text with pictures; a caption if there is no text."""
        processor, layout = self.pipe.processor, self.pipe.model.config.image_layout
        codes = [layout.ids_to_codes(ids).tolist() for ids in images]
        prompt = processor.interleaved_ids(text, codes) if text else processor.caption_ids(codes[0])
        inputs = self.pipe.ensure_tensor_on_device(input_ids=torch.tensor([prompt]))
        out = self.pipe.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        return processor.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()

    def _named(self, image) -> list[str]:
        """What a drawing shows: the nearest pictures, by squares over pixels, or the model's own name for it."""
        if self.known is None:
            return [self._said("", [self._ids(image)])]
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
                words = self.pictures[shows].words if shows in self.pictures else ()
                right.append(named is not None and (named[1] in words or {*named[1].split()} <= {*shows.split()}))
                text = ""
        return sum(right) / len(right) if right else 0.0
