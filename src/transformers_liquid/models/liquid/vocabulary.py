"""Images in a vocabulary: where their codes lie, and the tokens around them.

[`ImageLayout`] is the only place that does arithmetic between pixels, codes and token ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...codecs.vq_model import check_codes, code_grid


# What users write in a text for an image, whatever the placeholder token of the tokenizer is called.
IMAGE_MARK = "<image>"
# What `check_one_code` says where a drawing would have pictures before it.
FROM_TEXT_ALONE = "pictures are drawn from text alone: leave out other pictures, or pass generation_mode='text'."

# The tokens around images: the argument of [`LiquidProcessor`], and what a token that is new to a base is called.
IMAGE_TOKENS = {
    "image_token": IMAGE_MARK,
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "uncond_token": "<unconditional>",
}

# What the reference's tokenizer calls the tokens of [`LiquidConfig`]; it has no placeholder.
REFERENCE_TOKENS = {f"{name}_id": token for name, token in IMAGE_TOKENS.items() if name != "image_token"}

# <unused0> (Gemma), <|reserved_special_token_0|> (Llama 3), <|extra_0|> (Qwen), <SPECIAL_20> (Mistral), ...
RESERVED_TOKEN = re.compile(
    r"[<\[]\|?(unused|reserved|reserved_special_token|reserved_token|extra|extra_id|special|placeholder|dummy)_?\d+\|?[>\]]",
    re.IGNORECASE,
)


def as_integers(values: Any) -> np.ndarray:
    """Integers as the ecosystem has them: lists, arrays, tensors, tables' floats that are whole; others as they are."""
    values = values.numpy(force=True) if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.dtype == object:  # arrays in an array
        values = np.array(values.tolist())
    is_whole = np.issubdtype(values.dtype, np.floating) and (values % 1 == 0).all()
    return values.astype(np.int64) if is_whole else values


def check_generation_mode(mode: str) -> None:
    """Text, pictures or both by turns: what can be asked for."""
    if mode not in ("text", "image", "interleaved"):
        raise ValueError(f"generation_mode must be 'text', 'image' or 'interleaved', got {mode!r}.")


@dataclass(frozen=True)
class ImageLayout:
    """How pictures, their codes and token ids correspond: what a configuration and a processor must agree on.

    Args:
        image_token_offset (`int`): Id of code 0; code `c` has id `image_token_offset + c`.
        codebook_size (`int`): Number of codes of a codebook, and of image ids.
        boi_token_id (`int`): Begins an image.
        eoi_token_id (`int`): Ends an image.
        uncond_token_id (`int` or list of `int`): Stands for "no text".
        image_token_id (`int`): Placeholder for one position of an image whose codes stand beside the ids.
        image_size (`int`): Default height and width in pixels.
        downsample_factor (`int`): Pixels per code along one side.
        num_codebooks (`int`, defaults to 1): Codes of a position. Several have no ids: every position of a picture is a
            placeholder in a sequence, the offset is 0, and what is called ids of codes are the codes themselves,
            `(..., num_codebooks, n)` of n positions.
    """

    image_token_offset: int
    codebook_size: int
    boi_token_id: int
    eoi_token_id: int
    uncond_token_id: int | list[int]
    image_token_id: int
    image_size: int
    downsample_factor: int
    num_codebooks: int = 1

    @property
    def image_token_range(self) -> range:
        """All image ids."""
        return range(self.image_token_offset, self.image_token_offset + self.codebook_size * (self.num_codebooks == 1))

    @property
    def image_slice(self) -> slice:
        """Where the vocabulary rows of codes lie in the embeddings, and their scores in the logits."""
        return slice(self.image_token_range.start, self.image_token_range.stop)

    @property
    def place(self) -> str:
        """Where the codes lie, in words."""
        ids = self.image_token_range
        return (
            f"image ids {ids.start} ... {ids.stop - 1}" if ids else f"{self.num_codebooks} codes a position without ids"
        )

    @property
    def special_image_token_ids(self) -> list[int]:
        """The ids of boi, eoi, the unconditional token and the placeholder."""
        uncond = (
            [] if isinstance(self.uncond_token_id, list) else [self.uncond_token_id]
        )  # of several tokens it is text
        return [self.boi_token_id, self.eoi_token_id, *uncond, self.image_token_id]

    @property
    def of_position(self) -> tuple[int, ...]:
        """The dimension of codes before those of the picture: none, or that of several codes a position."""
        return () if self.num_codebooks == 1 else (self.num_codebooks,)

    def check_one_code(self, otherwise: str) -> None:
        """Raises a `ValueError` that says what is `otherwise` if there are several codes a position."""
        if self.num_codebooks > 1:
            raise ValueError(f"With several codes a position (here {self.num_codebooks}), {otherwise}")

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width in codes of a picture.

        Args:
            height (`int`, *optional*): In pixels; `None` means `image_size`.
            width (`int`, *optional*): In pixels; `None` means `image_size`.

        Raises:
            ValueError: Unless both are positive multiples of the codec's factor.
        """
        height = self.image_size if height is None else height
        width = self.image_size if width is None else width
        return code_grid(height, width, self.downsample_factor)

    def size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of a picture of so many codes."""
        grid_height, grid_width = grid
        return grid_height * self.downsample_factor, grid_width * self.downsample_factor

    def common_grids(self) -> list[tuple[int, int]]:
        """Grids of common proportions, from 16:9 to 9:16, none with more codes than the default one, which is the first."""
        side = self.grid()[0]
        grids = [self.grid()]
        for long, short in ((4, 3), (3, 2), (16, 9)):
            height = math.floor(side * math.sqrt(short / long))
            width = min(round(height * long / short), side * side // height)
            grids += [(height, width), (width, height)]
        return list({height / width: (height, width) for height, width in grids}.values())

    def num_codes(self, height: int | None = None, width: int | None = None) -> int:
        """Number of codes of a picture: see `grid`."""
        grid_height, grid_width = self.grid(height, width)
        return grid_height * grid_width

    def codes_to_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Token ids of codes, any shape. They are not looked at, which would make an accelerator wait."""
        return codes.long() + self.image_token_offset

    def ids_to_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes of image token ids, any shape.

        Raises:
            ValueError: If an id is no image id, naming it and its position.
        """
        check_codes(ids, range(self.image_token_offset, self.image_token_offset + self.codebook_size), "Id")
        return ids - self.image_token_offset

    def sequence_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """What stands in a sequence for codes: their ids, or with several codes a position one placeholder for each
        position `(..., n)`."""
        if self.num_codebooks == 1:
            return self.codes_to_ids(codes)
        return torch.full_like(codes[..., 0, :], self.image_token_id, dtype=torch.long)

    def is_picture(self, ids: torch.Tensor) -> torch.BoolTensor:
        """Where ids are what [`~ImageLayout.sequence_ids`] writes."""
        return self.is_image_token(ids) if self.num_codebooks == 1 else ids == self.image_token_id

    def is_image_token(self, ids: torch.Tensor) -> torch.BoolTensor:
        """Where ids are those of codes."""
        return (ids >= self.image_token_range.start) & (ids < self.image_token_range.stop)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a `ValueError` if a token of the tokenizer has the id of a code."""
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if index in self.image_token_range:
                raise ValueError(
                    f"The tokenizer does not fit: its token {token!r} has id {index}, one of the {self.place}. In place of a token added to it, use one that the base "
                    "reserved, or add it before `expand_vocabulary`."
                )

    def check_ids(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], marks: int = 0, ends: bool = True) -> None:
        """Raises a `ValueError` if a text became more than text: by a normalizer, or by tokens that were added.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): What made the ids.
            ids (list of `int`): The text's.
            marks (`int`, defaults to 0): For how many images there may be a boi and an eoi.
            ends (`bool`, defaults to `True`): Whether bos and eos may be there, as a chat template writes them.
        """
        forbidden = [] if ends else [tokenizer.bos_token_id, tokenizer.eos_token_id]
        most = dict.fromkeys(self.special_image_token_ids[2:-1] + forbidden, 0)
        most |= dict.fromkeys([self.boi_token_id, self.eoi_token_id], marks)
        for index in set(ids):
            if index in self.image_token_range:
                self.check_vocabulary(tokenizer)
            if ids.count(index) > most.get(index, len(ids)):
                raise ValueError(
                    f"The text becomes {tokenizer.convert_ids_to_tokens(index)!r} (id {index}), which is no text but "
                    "stands around texts and images: remove it."
                )


def is_one_token(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether a token is in the vocabulary, and texts are not split within it."""
    return tokenizer.encode(token, add_special_tokens=False) == [tokenizer.get_vocab().get(token)]


def free_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The tokens that a base reserved and that its tokenizer has no use for, in the order of their ids."""
    in_use = {str(token) for token in tokenizer.special_tokens_map.values()}
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        is_free = RESERVED_TOKEN.fullmatch(token) and token not in in_use
        if is_free and token not in str(tokenizer.chat_template) and is_one_token(tokenizer, token):
            yield token
