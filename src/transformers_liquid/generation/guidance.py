"""Logits processors: what restricts the next token to codes or to text, and guidance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

from .settings import ImageGenerationConfig


if TYPE_CHECKING:
    from ..models.liquid.configuration_liquid import LiquidConfig


class ImageTokenLogitsProcessor(LogitsProcessor):
    """Restricts the next token to image ids; for stock `generate()` calls.

    Args:
        config (`LiquidConfig`): Says where the image ids lie.
    """

    sees_vocabulary = True

    def __init__(self, config: LiquidConfig) -> None:
        self.image_slice = config.image_layout.image_slice

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        restricted = torch.full_like(scores, -torch.inf)
        restricted[:, self.image_slice] = scores[:, self.image_slice]
        return restricted


class SuppressImageTokensLogitsProcessor(LogitsProcessor):
    """Keeps image ids and the four image specials out of text.

    Args:
        config (`LiquidConfig`): Says where they lie.
    """

    def __init__(self, config: LiquidConfig) -> None:
        self.image_slice = config.image_layout.image_slice
        self.specials = config.image_layout.special_image_token_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any():
            raise ValueError(
                f"The scores of sequence {int(scores.isnan().any(1).nonzero()[0])} at position {input_ids.shape[1]} are NaN: "
                "weights are damaged, or half precision overflowed (load the model in bfloat16 or float32)."
            )
        scores = scores.clone()
        scores[:, self.image_slice] = -torch.inf
        scores[:, self.specials] = -torch.inf
        return scores


class VocabularyLogitsProcessor(LogitsProcessor):
    """Shows the scores of codes as those of the vocabulary, to a processor that looks for ids among them.

    Args:
        processor (`LogitsProcessor`): Such as transformers' own, which penalize, forbid or count ids.
        config (`LiquidConfig`): Says where the image ids lie.
    """

    def __init__(self, processor: LogitsProcessor, config: LiquidConfig) -> None:
        self.processor, self.image_slice = processor, config.image_layout.image_slice
        self.vocab_size = config.get_text_config().vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        whole = scores.new_full((len(scores), self.vocab_size), -torch.inf)
        whole[:, self.image_slice] = scores
        return self.processor(input_ids, whole)[:, self.image_slice]


def looks_for_ids(processor: LogitsProcessor) -> bool:
    """Whether a processor takes columns of scores for ids: transformers' own, and others that say so."""
    is_of_transformers = any(one.__module__ == LogitsProcessor.__module__ for one in type(processor).__mro__[:-2])
    return getattr(processor, "sees_vocabulary", is_of_transformers)


class GuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance in one batch: conditional sequences, then as many unconditional ones.

    With `image_guidance_scale` there are three sides, in the middle sequences i with the pictures of the context but not
    its text, and the guided scores are `u + image_guidance_scale * (i - u) + guidance_scale * (c - i)` (InstructPix2Pix,
    arXiv 2211.09800, section 3.2). All parts of what it returns are the same; with two they are the guided scores `u + guidance_scale * (c - u)`, so that in a stock greedy
    `generate()` call both sequences of a pair get the same token. (When sampling, stock `generate()` draws for each
    sequence apart; `generate(generation_mode="image")` draws once for both.) With `guidance_min_p`, put it after
    restrictions such as [`ImageTokenLogitsProcessor`], so that the best token is an allowed one; else the order does not
    matter.

    Args:
        guidance_scale (`float`): 1 follows the prompt alone, more follows it more strongly.
        guidance_min_p (`float`, *optional*): Choose only among tokens that the conditional sequence gives at least this
            fraction of its best token's probability. Guidance amplifies tokens that neither sequence supports; this
            leaves them out.
        image_guidance_scale (`float`, *optional*): How strongly the pictures of the context are followed.

    Raises:
        ValueError: If `guidance_scale` is below 1 or not finite, or `guidance_min_p` not in (0, 1].
    """

    def __init__(
        self, guidance_scale: float, guidance_min_p: float | None = None, image_guidance_scale: float | None = None
    ) -> None:
        ImageGenerationConfig(
            guidance_scale=guidance_scale, guidance_min_p=guidance_min_p, image_guidance_scale=image_guidance_scale
        )
        self.guidance_scale, self.image_guidance_scale = guidance_scale, image_guidance_scale
        self.num_sides = 2 if image_guidance_scale is None else 3
        self.log_min_p = None if guidance_min_p is None else math.log(guidance_min_p)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(scores) % self.num_sides:
            raise ValueError(
                f"Guidance needs conditional and unconditional sequences in equal number, got {len(scores)} sequences "
                f"for {self.num_sides} sides."
            )
        return self.guide(scores).repeat(self.num_sides, 1)

    def guide(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The guided scores of all sides, once: `(num_sides * B, vocabulary)` to `(B, vocabulary)`."""
        conditional, *pictures, unconditional = scores.chunk(self.num_sides)
        if pictures:
            guided = torch.lerp(unconditional, pictures[0], self.image_guidance_scale)
            guided = guided + self.guidance_scale * (conditional - pictures[0])
        else:
            guided = torch.lerp(unconditional, conditional, self.guidance_scale)
        # What is forbidden on both sides stays forbidden: -inf minus -inf would be NaN.
        excluded = conditional == -torch.inf
        if self.log_min_p is not None:
            excluded = conditional < conditional.amax(-1, keepdim=True) + self.log_min_p
        return guided.masked_fill(excluded, -torch.inf)
