"""Records of text and image codes to batches of ids and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from .processing_liquid import TEXT_TO_IMAGE_INSTRUCTIONS, LiquidProcessor


IGNORE_INDEX = -100
RECORD_KINDS = ("text_to_image", "caption", "text")


@dataclass
class LiquidDataCollator:
    r"""Makes training batches of a [`LiquidForCausalLM`] from records; for `Trainer(data_collator=...)`.

    A record is a mapping with `"kind"`, `"text"` and, but for kind `"text"`, `"codes"`: the image as raw codes (no
    offset), a list, numpy or torch ints; 2-D (rows, columns) if its size is not the default one, else 1-D or 2-D. Other
    columns but `"index"` are ignored, so train with `remove_unused_columns=False`. The rows of a batch, with the ids
    that carry a label in brackets:

    | kind            | ids                                                                         |
    |-----------------|-----------------------------------------------------------------------------|
    | `text_to_image` | bos text, one of ten instructions, boi [codes eoi eos]                      |
    |                 | bos `<unconditional>` boi [codes eoi eos], with `unconditional_probability` |
    | `caption`       | bos boi codes eoi `The caption of this image is:` [text eos]                |
    | `text`          | bos [text eos]                                                              |

    bos is there if the tokenizer has one. Rows are padded on the right; pads have label -100 by their position, since
    pad and eos may be the same id. The records and rates are those of the reference's training (arXiv 2412.04332).

    Args:
        processor ([`LiquidProcessor`]): Builds the prompts.
        unconditional_probability (`float`, defaults to 0.1): Rate of text-to-image rows whose whole text becomes
            `<unconditional>`, for classifier-free guidance.
        caption_probability (`float`, defaults to 0.0): Rate of text-to-image records that are turned into captions;
            the paper uses 0.2.
        max_length (`int`, *optional*): Longest row. A text that is too long loses its end (and then its eos, since
            it does not end there); the instruction stays, and an image is never cut.
        pad_to_multiple_of (`int`, *optional*): Row lengths are rounded up to a multiple of this.
        seed (`int`, defaults to 0): Of the draws. A record with an `"index"` (int) gets the same draws whatever the
            batch it is in, different ones in each epoch that `set_epoch` announces; others draw from a running
            generator (one per data loader worker).

    Returns:
        `dict` of int64 tensors (B, T): `input_ids`, `attention_mask`, `labels`.
    """

    processor: LiquidProcessor
    unconditional_probability: float = 0.1
    caption_probability: float = 0.0
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    seed: int = 0
    epoch: int = field(default=0, init=False)
    _generators: dict[int | None, np.random.Generator] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name in ("unconditional_probability", "caption_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if self.processor.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos token, which ends each record: set tokenizer.eos_token.")

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self.encode(record) for record in records]
        length = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.processor.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
        }
        for row, (ids, labels) in enumerate(rows):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = torch.tensor(labels)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Give records with an `"index"` the draws of another epoch."""
        self.epoch = epoch

    def encode(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of one record, without padding.

        Raises:
            ValueError: If the record's kind, text, codes or size are not as the class says, or its image does not
                fit into `max_length`.
        """
        kind, text = record.get("kind"), record.get("text")
        if kind not in RECORD_KINDS:
            raise ValueError(f"A record's 'kind' must be one of {', '.join(RECORD_KINDS)}, got {kind!r}.")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"A record's 'text' must be a string that is not empty, got {text!r}.")
        # All are drawn in every case, so that changing one rate leaves the other draws as they are.
        draws = self._generator(record).random(3)
        if kind == "text_to_image" and draws[0] < self.caption_probability:
            kind = "caption"

        if kind == "text":
            self.processor.check_plain(text)
            return self._with_text(self.processor.bos_ids, text)
        codes, size = record.get("codes"), self._image_size(record)
        if kind == "caption":
            self.processor.check_plain(text)
            return self._with_text(self.processor.caption_ids(codes), text)
        target = [*self.processor.codes_to_ids(codes), self.processor.eoi_token_id, self.eos_token_id]
        prompt = self.processor.unconditional_ids(**size)
        self._check_room(len(prompt) + len(target), "the image")
        if draws[1] >= self.unconditional_probability:
            instruction = TEXT_TO_IMAGE_INSTRUCTIONS[int(draws[2] * len(TEXT_TO_IMAGE_INSTRUCTIONS))]
            room = None if self.max_length is None else self.max_length - len(target)
            prompt = self.processor.image_prompt_ids(text, **size, instruction=instruction, max_length=room)
        return prompt + target, [IGNORE_INDEX] * len(prompt) + target

    def _with_text(self, prompt: list[int], text: str) -> tuple[list[int], list[int]]:
        self._check_room(len(prompt) + 1, "the prompt and a token of text")
        room = None if self.max_length is None else self.max_length - len(prompt)
        target = [*self.processor.encode(text), self.eos_token_id][:room]
        return prompt + target, [IGNORE_INDEX] * len(prompt) + target

    def _check_room(self, length: int, what: str) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"max_length={self.max_length} has no room for {what}: that needs {length} tokens. Raise max_length "
                "or use smaller images; an image is never cut."
            )

    def _image_size(self, record: Mapping[str, Any]) -> dict[str, int | None]:
        """Height and width in pixels of a record's image; `None` is the default size."""
        if record.get("codes") is None:
            raise ValueError(f"A record of kind {record['kind']!r} needs 'codes', got only {sorted(record)}.")
        shape = np.shape(record["codes"])
        if len(shape) == 2:
            factor = self.processor.image_processor.downsample_factor
            return {"height": shape[0] * factor, "width": shape[1] * factor}
        rows, columns = self.processor.grid()
        if shape != (rows * columns,):
            raise ValueError(
                f"Codes of shape {tuple(shape)} are no image of the default size, {rows} x {columns} codes: give those "
                "of another size as rows and columns."
            )
        return {"height": None, "width": None}

    def _generator(self, record: Mapping[str, Any]) -> np.random.Generator:
        if record.get("index") is not None:
            return np.random.default_rng([self.seed, self.epoch, int(record["index"])])
        # Each worker has a copy of the collator: the loader's seed for it makes their draws differ, in each epoch.
        worker = get_worker_info()
        worker_seed = None if worker is None else worker.seed
        if worker_seed not in self._generators:
            self._generators[worker_seed] = np.random.default_rng(
                self.seed if worker_seed is None else [self.seed, worker_seed]
            )
        return self._generators[worker_seed]

    @property
    def eos_token_id(self) -> int:
        """The id that ends each record."""
        return self.processor.tokenizer.eos_token_id


__all__ = ["IGNORE_INDEX", "LiquidDataCollator"]
