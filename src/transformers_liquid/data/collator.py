"""Records of text and image codes to batches of ids and labels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..models.liquid.processing_liquid import LiquidProcessor
from ..models.liquid.prompts import TEXT_TO_IMAGE_INSTRUCTIONS, TooLongError
from ..models.liquid.vocabulary import IMAGE_MARK, as_integers
from ..ops.chunked_loss import IGNORE_INDEX
from .records import REQUIRED_FIELDS, required_field


@dataclass
class LiquidDataCollator:
    r"""Makes training batches of a [`LiquidForCausalLM`] from records; for `Trainer(data_collator=...)`.

    A record is a mapping with a `"kind"` and the fields of its kind, as a `datasets` data set has them. Fields that are
    `None` count as absent, others are ignored, so train with `remove_unused_columns=False`. The sequences of a batch,
    with the ids that carry a label in brackets:

    | kind            | fields                     | ids                                                             |
    |-----------------|----------------------------|-----------------------------------------------------------------|
    | `text_to_image` | `text`, `codes`, (`grid`)  | bos text, one of ten instructions, boi [codes eoi eos]          |
    |                 |                            | or bos `<unconditional>` boi [codes eoi eos]                    |
    | `caption`       | `text`, `codes`, (`grid`)  | bos boi codes eoi `The caption of this image is:` [text eos]    |
    | `text`          | `text`                     | bos [text eos]                                                  |
    | `edit`          | `text`, `images`, `codes`, | bos text with its images, one of ten instructions,              |
    |                 | (`grid`)                   | boi [codes eoi eos]; without the text, the images, or both      |
    | `interleaved`   | `text`, `images`,          | bos [text boi codes eoi text ... eos], without the first        |
    |                 | (`given`)                  | `given` texts and images in brackets                            |
    | `conversation`  | `messages`, (`images`)     | the chat template's prompt [answer] prompt [answer] ...         |

    `codes` are raw codes (no offset): flat, with the `grid` [height, width] if that is not the default one, or 2-D, after
    a first dimension of K with K codes a position; lists, numpy or torch ints. `text` of an interleaved record and of an edit (as in "`<image>` in blue") has an
    `<image>` mark for each of `images`, which are codes or mappings with `codes` and `grid`. `messages` are as in [`LiquidProcessor.conversation_ids`].

    bos is there if the tokenizer has one, or the chat template writes it. The first id of a sequence never has a label:
    nothing predicts it. Sequences are padded on the right; pads have label -100 by their position, since pad and eos
    may be the same id. The first three kinds and their rates are those of the reference's training (arXiv 2412.04332).

    Args:
        processor ([`LiquidProcessor`]): Builds the prompts.
        unconditional_probability (`float`, defaults to 0.1): Rate of text-to-image records whose whole text becomes
            `<unconditional>`, for classifier-free guidance.
        caption_probability (`float`, defaults to 0.0): Rate of text-to-image records that are turned into captions;
            the paper uses 0.2.
        edit_dropout (`float`, defaults to 0.05): Rates at which edits lose their text, their images, and both, which
            become `<unconditional>`, for guidance with two and three sides; as in InstructPix2Pix (arXiv 2211.09800).
        max_length (`int`, *optional*): Longest sequence. Text that is too long loses its end (and then its eos, since it
            does not end there): the description, the caption, what follows the last image, the last answer. Prompts
            and instructions stay, and an image is never cut.
        pad_to_multiple_of (`int`, *optional*): Lengths are rounded up to a multiple of this.
        packing (`bool`, defaults to `False`): Put all records of a batch into one sequence without pads. Positions begin at
            0 again with each, by which transformers keeps them apart; see [`check_packing`].
        return_indices (`bool`, defaults to `False`): Add the records' `"index"`, -1 for none, for those who report on
            them.
        seed (`int`, defaults to 0): Of the draws. A record with an `"index"` (int) gets the same draws whatever the
            batch and the worker it is in, different ones in each epoch that `set_epoch` announces; others draw from
            a running generator (one per data loader worker).

    Returns:
        `dict` of int64 tensors: `input_ids`, `attention_mask`, `labels` (B, T); or, packed, `input_ids`,
        `position_ids`, `labels` (1, T). With `return_indices` also `record_indices` (B,); with K codes a position also
        `image_codes` (N, K, n) of all pictures in reading order, or a list of N of (K, n) if they differ in size.
    """

    processor: LiquidProcessor
    unconditional_probability: float = 0.1
    caption_probability: float = 0.0
    edit_dropout: float = 0.05
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    packing: bool = False
    return_indices: bool = False
    seed: int = 0
    # Shared memory, so that an epoch announced here reaches the workers that a data loader keeps.
    _epoch: torch.Tensor = field(init=False, repr=False)
    _longest_instruction: str = field(init=False, repr=False)
    _generators: dict[int | tuple[int, int], np.random.Generator] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name in ("unconditional_probability", "caption_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if not 0 <= 3 * self.edit_dropout <= 1:
            raise ValueError(f"edit_dropout must be between 0 and a third, got {self.edit_dropout}.")
        if self.packing and self.pad_to_multiple_of is not None:
            raise ValueError("A packed sequence has no pads: leave out pad_to_multiple_of.")
        if self.processor.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos token, which ends each record: set tokenizer.eos_token.")
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._longest_instruction = max(
            TEXT_TO_IMAGE_INSTRUCTIONS, key=lambda sentence: len(self.processor.encode(sentence))
        )

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, labels, pictures = zip(*map(self._drawn, records), strict=True)
        if self.packing:
            parts = {"input_ids": ids, "position_ids": [range(len(sequence)) for sequence in ids], "labels": labels}
            batch = {name: torch.from_numpy(np.concatenate(arrays))[None] for name, arrays in parts.items()}
        else:
            batch = {
                "input_ids": self._stack(ids, self.processor.pad_token_id),
                "attention_mask": self._stack([np.ones_like(sequence) for sequence in ids], 0),
                "labels": self._stack(labels, IGNORE_INDEX),
            }
        if (num_codebooks := self.processor.num_codebooks) > 1:
            codes = [torch.from_numpy(one.reshape(num_codebooks, -1)).long() for own in pictures for one in own]
            is_one_size = len({one.shape for one in codes}) == 1
            batch["image_codes"] = (
                torch.stack(codes) if is_one_size else codes or torch.zeros(0, num_codebooks, 1).long()
            )
        if self.return_indices:
            batch["record_indices"] = torch.tensor([_index(record) for record in records])
        return batch

    def _stack(self, sequences: Sequence[list[int]], filler: int) -> torch.Tensor:
        multiple = self.pad_to_multiple_of or 1
        length = math.ceil(max(map(len, sequences)) / multiple) * multiple
        padded = [np.pad(sequence, (0, length - len(sequence)), constant_values=filler) for sequence in sequences]
        return torch.from_numpy(np.stack(padded))

    @property
    def epoch(self) -> int:
        """The epoch that `set_epoch` announced."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Give records with an `"index"` the draws of another epoch."""
        self._epoch.fill_(epoch)

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether `encode` finds room for a record within `max_length`, whatever it draws.

        Raises:
            ValueError: As `encode`, but for the length.
        """
        try:
            # No form is longer: neither another instruction, nor no text, nor a caption.
            self._encode(record, record.get("kind"), self._longest_instruction)
        except TooLongError:
            return False
        return True

    def encode(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of one record, without padding.

        Raises:
            ValueError: If the record's kind or fields are not as the class says, or no id of it has a label.
            TooLongError: If what may not be cut does not fit into `max_length`; a `ValueError` too.
        """
        return self._drawn(record)[:2]

    def _drawn(self, record: Mapping[str, Any]) -> tuple[list[int], list[int], list[np.ndarray]]:
        """Ids and labels of a record in the form that is drawn for it, and the codes of its pictures."""
        if (index := _index(record)) >= 0:
            generator = np.random.default_rng([self.seed, self.epoch, index])
        else:
            # Each worker has a copy of the collator: the loader's seed for it makes their draws differ, in each epoch.
            worker = get_worker_info()
            seed = self.seed if worker is None else (self.seed, worker.seed)
            generator = self._generators.setdefault(seed, np.random.default_rng(seed))
        # All are drawn in every case, so that changing one rate leaves the other draws as they are.
        draws = generator.random(3)
        kind = record.get("kind")
        if kind == "text_to_image" and draws[0] < self.caption_probability:
            kind = "caption"
        instruction = TEXT_TO_IMAGE_INSTRUCTIONS[int(draws[2] * len(TEXT_TO_IMAGE_INSTRUCTIONS))]
        if kind == "edit":
            dropped = [
                name
                for index, name in enumerate(("text", "images", "both"))
                if index * self.edit_dropout <= draws[1] < (index + 1) * self.edit_dropout
            ]
            return self._edit(record, instruction, *dropped)
        return self._encode(record, kind, None if draws[1] < self.unconditional_probability else instruction)

    def _encode(
        self, record: Mapping[str, Any], kind: str, instruction: str | None
    ) -> tuple[list[int], list[int], list[np.ndarray]]:
        """Ids, labels and pictures of a record as one of `kind`; of a picture to draw, after its text and this instruction, or
        after no text."""
        if kind not in REQUIRED_FIELDS:
            raise ValueError(f"A record's 'kind' must be one of {', '.join(REQUIRED_FIELDS)}, got {kind!r}.")
        processor, eos_token_id = self.processor, self.processor.tokenizer.eos_token_id
        if kind == "conversation":
            images = record.get("images")
            images = [self._codes(image) for image in ([] if images is None else images)]
            return self._sequence(processor.conversation_ids(required_field(record, "messages"), images), images)
        text = required_field(record, "text")
        if kind == "edit":
            return self._edit(record, instruction)
        if kind == "interleaved":
            images = [self._codes(image) for image in required_field(record, "images")]
            ids = processor.interleaved_ids(text, images)
            begin = self._end_of_given(text, ids, record.get("given") or 0)
            return self._sequence([(ids[:begin], False), ([*ids[begin:], eos_token_id], True)], images)
        if kind == "text_to_image":
            codes = self._codes(record)
            target = [*processor.codes_to_ids(codes), processor.eoi_token_id, eos_token_id]
            size = processor.image_layout.size(codes.shape[-2:])
            if instruction is None:
                prompt = processor.unconditional_ids(*size)
            else:  # the text is cut, so that all of `target` fits behind
                self._check_room(len(processor.bos_ids) + 2 + len(target))
                room = None if self.max_length is None else self.max_length - len(target)
                prompt = processor.image_prompt_ids(text, *size, instruction=instruction, max_length=room)
            self._check_room(len(prompt) + len(target))
            return self._sequence([(prompt, False), (target, True)], [codes])
        processor.check_plain(text)
        images = [] if kind == "text" else [self._codes(record)]
        prompt = processor.caption_ids(*images) if images else processor.bos_ids
        return self._sequence([(prompt, False), ([*processor.encode(text), eos_token_id], True)], images)

    def _edit(
        self, record: Mapping[str, Any], instruction: str, dropped: str | None = None
    ) -> tuple[list[int], list[int], list[np.ndarray]]:
        """Ids, labels and pictures of an edit, of which nothing, its `"text"`, its `"images"` or `"both"` are dropped."""
        processor, codes = self.processor, self._codes(record)
        text, images = required_field(record, "text"), [self._codes(one) for one in required_field(record, "images")]
        if not images:
            raise ValueError("An edit needs at least one of 'images', which it changes, got none.")
        size = processor.image_layout.size(codes.shape[-2:])
        ids = [processor.codes_to_ids(one) for one in images]
        (prompt,), _ = processor.image_prompts(text, None, *size, images=ids, instruction=instruction)
        words = text.replace(IMAGE_MARK, " ").strip()
        if dropped == "images" and not words:
            dropped = "both"  # without its images, nothing is left of the text either
        if dropped == "text":
            pictures = [token for one in ids for token in (processor.boi_token_id, *one, processor.eoi_token_id)]
            prompt = [*processor.bos_ids, *pictures, processor.boi_token_id]
        elif dropped == "images":
            prompt = processor.image_prompt_ids(words, *size, instruction=instruction)
        elif dropped == "both":
            prompt = processor.unconditional_ids(*size)
        target = [*processor.codes_to_ids(codes), processor.eoi_token_id, processor.tokenizer.eos_token_id]
        self._check_room(len(prompt) + len(target))
        images = [] if dropped in ("images", "both") else images
        return self._sequence([(prompt, False), (target, True)], [*images, codes])

    def _end_of_given(self, text: str, ids: list[int], given: int) -> int:
        """Where in the ids of an interleaved text its first `given` parts end."""
        parts = [part for part in re.split(f"({re.escape(IMAGE_MARK)})", text) if part]
        if not isinstance(given, int) or not 0 <= given < len(parts):
            raise ValueError(f"given={given!r} of {len(parts)} parts leave nothing to learn of the record {text!r}.")
        if not given:
            return len(self.processor.bos_ids)
        number, is_text = parts[:given].count(IMAGE_MARK), parts[given - 1] != IMAGE_MARK
        edge = self.processor.boi_token_id if is_text else self.processor.eoi_token_id
        places = np.flatnonzero(np.array(ids) == edge)  # a text ends where the next image begins
        return int(places[number] if is_text else places[number - 1] + 1)

    def _codes(self, image: Mapping[str, Any] | Sequence) -> np.ndarray:
        """The codes ([K,] grid_height, grid_width) of a record, or of an image in it."""
        codes, grid = image, None
        if isinstance(image, Mapping):
            codes, grid = required_field(image, "codes"), image.get("grid")
        codes, of_position = as_integers(codes), self.processor.image_layout.of_position
        if codes.shape[: len(of_position)] != of_position:
            raise ValueError(
                f"Codes of shape {codes.shape} do not begin with the {self.processor.num_codebooks} codes of each position: "
                "make them with the codec of this model."
            )
        default, shape = self.processor.image_layout.grid(), codes.shape[len(of_position) :]
        if grid is None and len(shape) == 2:
            if shape == (1, math.prod(default)) != default:
                raise ValueError(
                    f"Codes of shape {codes.shape} are as many as those of an image of {' x '.join(map(str, default))} "
                    "codes: leave out the batch axis, or give an image of one row its 'grid' [height, width]."
                )
            return codes
        grid = default if grid is None else tuple(as_integers(grid).reshape(-1).tolist())
        is_grid = len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
        if not is_grid or shape not in (grid, (math.prod(grid),)):
            raise ValueError(
                f"Codes of shape {codes.shape} are no image of {' x '.join(map(str, grid))} codes: give those of "
                "another size than the default one a 'grid' [height, width], or give them in two dimensions. Make codes "
                "of pictures with `transformers-liquid tokenize`."
            )
        return codes.reshape(*of_position, *grid)

    def _sequence(
        self, pieces: list[tuple[list[int], bool]], images: list[np.ndarray]
    ) -> tuple[list[int], list[int], list[np.ndarray]]:
        """Joins pieces of ids and whether they are learned; cuts the last one, but not through an image. The images in
        them go with them."""
        ids = np.array([index for piece, _ in pieces for index in piece], dtype=np.int64)
        learned = np.repeat([is_learned for _, is_learned in pieces], [len(piece) for piece, _ in pieces])
        learned[0] = False
        labels = np.where(learned, ids, IGNORE_INDEX)
        if self.max_length is not None and len(ids) > self.max_length:
            image_ends = np.flatnonzero(ids == self.processor.eoi_token_id)
            self._check_room(max(len(ids) - len(pieces[-1][0]) + 1, 2, *(image_ends[-1:] + 1)))
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if (labels == IGNORE_INDEX).all():
            raise ValueError(f"No id of the record has a label, so that nothing is learned from it: {ids.tolist()}.")
        return ids.tolist(), labels.tolist(), images

    def _check_room(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise TooLongError(
                f"max_length={self.max_length} has no room for the record: what may not be cut has {length} tokens. "
                "Raise max_length, use smaller images (an image is never cut) or leave out such records with "
                "`drop_too_long`."
            )


def _index(record: Mapping[str, Any]) -> int:
    """Where in a mixture a record stands; -1 if it does not say."""
    return -1 if record.get("index") is None else int(record["index"])
