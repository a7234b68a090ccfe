"""Pairs, stories and dialogues of texts and pictures to batches of a model with vokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..models.liquid.image_processing_liquid import to_rgb
from ..models.liquid.prompts import parts_of
from ..models.voken.image_decoder import VokenImageDecoder
from ..models.voken.processing_voken import VokenProcessor
from ..models.voken.prompts import CAPTION_PROMPT, STORY_PROMPTS
from ..ops.chunked_loss import IGNORE_INDEX
from .records import required_field


# What a record of each kind must have.
VOKEN_FIELDS = {
    "text_to_image": ("text", "image"),
    "caption": ("text", "image"),
    "text": ("text",),
    "conversation": ("messages",),
    "story": ("texts", "images"),
}


@dataclass
class VokenDataCollator:
    r"""Makes training batches of a [`VokenForConditionalGeneration`]; for `Trainer(data_collator=...)`.

    A record is a mapping with a `"kind"` and the fields of its kind. What is learned, in brackets, is the last turn, in
    which pictures are drawn: a run of vokens each. Pictures before it are read by the base.

    | kind            | fields                | turns                                                                  |
    |-----------------|-----------------------|------------------------------------------------------------------------|
    | `text_to_image` | `text`, `image`       | user: text; assistant: [picture]                                       |
    | `caption`       | `text`, `image`       | user: picture, "Describe this picture."; assistant: [text]             |
    | `text`          | `text`                | user: a new line; assistant: [text]                                    |
    | `conversation`  | `messages`, (`images`) | as in `apply_chat_template`; the last one is the assistant's           |
    | `story`         | `texts`, `images`     | for each scene and task, user: all before it and what is asked;        |
    |                 |                       | assistant: [picture], [text picture] or [text]                         |

    A story becomes several sequences; `story_samples` makes records of them, one each. Pictures are paths or PIL images.
    In `messages` they are parts `{"type": "image"}`, which take the `images` in turn unless they have an `"image"`.

    Args:
        processor ([`VokenProcessor`]): Of the model.
        decoder ([`VokenImageDecoder`], *optional*): The one that is trained for: says the size of pictures to draw. Without
            it there are no target pictures, for training with captions alone (`image_loss_weight=0`).
        captions (`bool`, defaults to `False`): Whether to give captions, for the caption loss of stage 1: every picture to
            draw needs one. It is the text of a pair or a scene; a conversation has `captions`.
        story_tasks (sequence of `str`): What is learned of each scene, of `"image"`, `"multimodal"`, `"text"`. The last
            two begin with the second scene.
        latents (mapping, *optional*): Latents `(C, h, w)` of pictures to draw by their paths, from [`cache_latents`].
        flip_probability (`float`, defaults to 0.0): How often all pictures of a record are mirrored, those read and those
            drawn alike. With an `"index"` (int) that depends on it, the seed and the epoch that `set_epoch` announces.
        seed (`int`, defaults to 0): See there.
        max_length (`int`, *optional*): Longest sequence. Longer ones are refused, since a run cannot be cut.

    Returns:
        `dict` with `input_ids`, `attention_mask`, `labels` int64 (B, T), padded on the right; what the base's processor
        makes of pictures; and with N > 0 pictures to draw, in reading order, `target_pixel_values` float32 (N, 3, H, W)
        in [-1, 1] or `target_latents` (N, C, h, w), and `captions`, a list of N `str`.

    Raises:
        ValueError: If an option, or a record, is not as described here.
    """

    processor: VokenProcessor
    decoder: VokenImageDecoder | None = None
    captions: bool = False
    story_tasks: Sequence[str] = tuple(STORY_PROMPTS)
    latents: Mapping[str, torch.Tensor] | None = None
    flip_probability: float = 0.0
    seed: int = 0
    max_length: int | None = None
    # Shared memory, so that an epoch announced here reaches the workers that a data loader keeps.
    _epoch: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if not self.story_tasks or not {*self.story_tasks} <= STORY_PROMPTS.keys():
            raise ValueError(f"story_tasks must be some of {', '.join(STORY_PROMPTS)}, got {self.story_tasks!r}.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be from 0 to 1, got {self.flip_probability}.")
        if self.latents is not None and (self.decoder is None or self.flip_probability):
            raise ValueError("Cached latents are of one size and not mirrored: give the decoder, and no flips.")
        # What ends a turn, as the template writes it.
        turns = _conversation([_text("\0")], [_text("\0")], [])["messages"]
        tokenizer = self.processor.tokenizer
        end = self.processor.apply_chat_template(turns, tokenize=False).rpartition("\0")[2]
        self.end_ids = tokenizer(end, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
        if None in self.end_ids:
            raise ValueError("Nothing ends a turn: set tokenizer.eos_token, or a chat template that ends turns.")

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        contexts, targets, captions = [], [], []
        for record in records:
            flip = False
            if self.flip_probability:
                index, seed = record.get("index"), [self.seed, int(self._epoch)]
                drawn = torch.rand(()) if index is None else np.random.default_rng([*seed, index]).random()
                flip = bool(drawn < self.flip_probability)
            for turns, own in self.samples(record):
                for turn in turns[:-1] if self.latents is not None else turns:  # those with latents are known by paths
                    for part in turn["content"]:
                        if part["type"] == "image":
                            picture = to_rgb(part["image"])
                            part["image"] = ImageOps.mirror(picture) if flip else picture
                contexts.append(turns[:-1])
                targets.append(turns[-1]["content"])
                captions += own
        written = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        batch = dict(self.processor.apply_chat_template(contexts, **written))
        # What has a value for each token loses its pads, which are on the left; the rest is of pictures.
        masks, rows = batch.pop("attention_mask").bool(), []
        prompts = {name: batch.pop(name).long() for name, one in [*batch.items()] if one.shape == masks.shape}
        for index, (mask, target) in enumerate(zip(masks, targets, strict=True)):
            ids = self._target(target)
            row = {name: nn.functional.pad(one[index, mask], (0, len(ids))) for name, one in prompts.items()}
            row["input_ids"][-len(ids) :] = ids
            row["labels"] = nn.functional.pad(ids, (int(mask.sum()), 0), value=IGNORE_INDEX)
            row["labels"][0] = IGNORE_INDEX  # nothing predicts it
            row["attention_mask"] = torch.ones_like(row["labels"])
            if self.max_length is not None and len(row["labels"]) > self.max_length:
                raise ValueError(
                    f"A sequence has {len(row['labels'])} tokens, more than max_length={self.max_length}, and a run of vokens "
                    "cannot be cut: raise it, or leave out long records."
                )
            rows.append(row)
        fill = {"input_ids": self.processor.tokenizer.pad_token_id or 0, "labels": IGNORE_INDEX}
        batch |= {name: pad_sequence([row[name] for row in rows], True, fill.get(name, 0)) for name in rows[0]}
        drawn = [part["image"] for target in targets for part in target if part["type"] == "image"]
        if drawn and self.captions:
            batch["captions"] = captions
        if drawn and self.latents is not None:
            batch["target_latents"] = torch.stack([self._cached(picture) for picture in drawn])
        elif drawn and self.decoder is not None:
            batch["target_pixel_values"] = torch.stack([drawing_pixels(one, self.decoder.size) for one in drawn])
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Gives records with an `"index"` the draws of another epoch."""
        self._epoch.fill_(epoch)

    def samples(self, record: Mapping[str, Any]) -> list[tuple[list[dict[str, Any]], list[str]]]:
        """The conversations of a record, whose last turns are learned, each with the captions of what it draws.

        Raises:
            ValueError: If it is not as described here. Pictures are not opened yet.
        """
        kind = record.get("kind")
        if kind not in VOKEN_FIELDS:
            raise ValueError(f"A record's 'kind' must be one of {', '.join(VOKEN_FIELDS)}, got {kind!r}.")
        for name in VOKEN_FIELDS[kind]:
            required_field(record, name)
        if kind == "story":
            return [one for sample in story_samples(record, self.story_tasks) for one in self.samples(sample)]
        if kind != "conversation":
            text, image = _text(record["text"]), _image(record.get("image"))
            turns = {
                "text_to_image": ([text], [image]),
                "caption": ([image, _text(CAPTION_PROMPT)], [text]),
                "text": ([_text("\n")], [text]),  # transformers takes an empty text for no text
            }
            record = _conversation(*turns[kind], record.get("captions") or [record["text"]])

        images = list(record.get("images") or ())
        turns = [dict(message, content=parts_of(message)) for message in record["messages"]]
        parts = [part for turn in turns for part in turn["content"]]
        places = [part for part in parts if part["type"] == "image" and not part.get("image")]
        if len(places) != len(images):
            raise ValueError(f"Messages have {len(places)} places for pictures, but there are {len(images)} images.")
        for part, image in zip(places, images, strict=True):
            part["image"] = image
        for part in parts:
            if part["type"] == "image" and not isinstance(part["image"], str | Path | Image.Image):
                raise ValueError(f"A picture is a path or a PIL image, got {type(part['image']).__name__}.")
        if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
            raise ValueError(f"The last turn is what is learned: the assistant's, got {turns[-1:]!r}.")
        number, captions = sum(part["type"] == "image" for part in turns[-1]["content"]), record.get("captions") or ()
        is_short = len(captions) != number and (self.captions or captions) and number
        if is_short or isinstance(captions, str) or not all(isinstance(one, str) for one in captions):
            given = f"{number} pictures, with {len(captions)} captions"
            raise ValueError(f"The last turn draws {given}: needed is a text each.")
        return [(turns, list(captions) if number else [])]

    def _target(self, parts: list[dict[str, Any]]) -> torch.Tensor:
        """Ids of what is learned."""
        ids: list[int] = []
        vokens, tokenizer = self.processor.voken_token_ids, self.processor.tokenizer
        forbidden = {*vokens, *tokenizer.convert_tokens_to_ids([one for one in (self.processor.image_token,) if one])}
        for part in parts:
            if part["type"] == "image":
                ids += vokens
                continue
            words = tokenizer(part["text"], add_special_tokens=False).input_ids
            if found := forbidden.intersection(words):
                tokens = tokenizer.convert_ids_to_tokens(sorted(found))
                raise ValueError(f"A text to learn has {', '.join(tokens)}, which stands for pictures: remove it.")
            ids += words
        return torch.tensor(ids + self.end_ids)

    def _cached(self, picture: Any) -> torch.Tensor:
        latents, expected = self.latents.get(str(picture)), self.decoder.latent_shape()
        if latents is None or latents.shape != expected:
            raise ValueError(
                f"Cached latents of {picture} have the shape {getattr(latents, 'shape', None)}, expected {expected}: make "
                "them with `cache_latents` for this decoder, of pictures that are given by their paths."
            )
        return latents


def story_samples(record: Mapping[str, Any], tasks: Sequence[str] = tuple(STORY_PROMPTS)) -> list[dict[str, Any]]:
    """A story as conversations, one for each scene and task.

    Args:
        record: With `texts` and `images`, one of each for every scene.
        tasks (sequence of `str`): Of `"image"` (every scene), `"multimodal"` and `"text"` (from the second scene on).

    Raises:
        ValueError: If texts and images differ in number, or nothing can be learned.
    """
    texts, images = record["texts"], record["images"]
    if isinstance(texts, str) or len(texts) != len(images):
        given = f"{len(texts)} texts and {len(images)} images"
        raise ValueError(f"A story has lists: a picture for each text, got {given}.")
    if bad := [text for text in texts if not (isinstance(text, str) and text.strip())]:
        raise ValueError(f"The texts of a story are strings and not empty, got {bad[0]!r}.")
    samples, before = [], []
    for text, image in zip(texts, images, strict=True):
        for task in tasks:
            if task != "image" and not before:
                continue
            asked = [*before, _text(STORY_PROMPTS[task].format(text=text))]
            asked += [_image(image)] if task == "text" else []
            told, drawn = _text(text), _image(image)
            answer = {"image": [drawn], "multimodal": [told, drawn], "text": [told]}[task]
            samples.append(_conversation(asked, answer, [text]))
        before += [_text(text), _image(image)]
    if not samples:
        raise ValueError(f"A story of {len(texts)} scenes has nothing to learn for {', '.join(tasks)}.")
    return samples


@torch.no_grad()
def cache_latents(
    pictures: Sequence[str | Path], decoder: VokenImageDecoder, batch_size: int = 16
) -> dict[str, torch.Tensor]:
    """Latents of pictures to draw, by their paths, for [`VokenDataCollator`]: with them no picture is encoded in training.

    Args:
        pictures (sequence of paths): The pictures.
        decoder ([`VokenImageDecoder`]): Whose VAE encodes them.
        batch_size (`int`, defaults to 16): How many are encoded at once.
    """
    paths, latents = list(dict.fromkeys(map(str, pictures))), {}
    for start in range(0, len(paths), batch_size):
        some = paths[start : start + batch_size]
        pixels = torch.stack([drawing_pixels(to_rgb(path), decoder.size) for path in some])
        latents |= zip(some, decoder.encode(pixels).cpu(), strict=True)
    return latents


def drawing_pixels(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """What is drawn: all of a picture, padded with white to the form of `size` (width, height); (3, H, W) in [-1, 1]."""
    fitted = ImageOps.pad(picture, size, Image.Resampling.BILINEAR, color="white")
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _conversation(asked: list[dict[str, Any]], answer: list[dict[str, Any]], captions: list[str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"kind": "conversation", "messages": turns, "captions": captions}
