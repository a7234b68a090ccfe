"""Speculative Jacobi decoding: several codes per forward, and exactly the pictures of the plain loop.

Every step runs the last known code and a window of guesses (drafts) for the codes after it. The logits behind the first
draft are right whatever the draft is; those behind the second are right if the first draft was; and so on. As in
speculative Jacobi decoding (arXiv 2410.01699) the drafts are the draws of the step before, made under drafts
that were partly wrong, so that a window settles from its front to its back.

What couples the draws of one step to those of the next (arXiv 2510.24211) is their noise: a position keeps its Gumbel
noise until it is final, and a draw is the argmax of scores plus noise. A draft is therefore final as soon as it is drawn
behind final codes, and it is then the very code that the plain loop draws: not only from the same distribution, but
the same picture for the same seed. Two draws from p and q that share their Gumbel noise agree with a probability of at
least (1 - d) / (1 + d), d being the total variation distance of p and q (arXiv 2408.07978). The maximal coupling reaches
1 - d in one step, but gives other pictures, and over several steps we measured no difference (`docs/benchmarks.md`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation import GenerateDecoderOnlyOutput

from .sampling import ImageSequences, draw_codes, put_codes


@dataclass
class SpeculativeImageOutput(GenerateDecoderOnlyOutput):
    """Pictures, and how they came about.

    Args:
        accepted_codes (`torch.LongTensor` of shape `(steps, B)`): How many codes of each picture every forward made
            final; the prompts' forward counts as the first. Pictures that were already done have 0.
    """

    accepted_codes: torch.LongTensor | None = None

    @property
    def codes_per_step(self) -> float:
        """Codes of one picture per forward in which it took part, on average over the pictures."""
        return float(self.accepted_codes.sum() / (self.accepted_codes > 0).sum())


def speculative_sample_codes(sequences: ImageSequences, window: int) -> SpeculativeImageOutput | torch.LongTensor:
    """Beside [`sample_codes`]: the same pictures in fewer forwards. Every picture of a batch goes at its own pace.

    Args:
        sequences ([`ImageSequences`]): Of the pictures. A streamer gets a position once all pictures have it.
        window (`int`): Codes per forward: the next one and `window - 1` drafts.

    Returns:
        Codes `(B, n)`, or a [`SpeculativeImageOutput`] with them as `sequences`.

    Raises:
        ValueError: If the base's cache cannot take back what was guessed wrong, as the state of mamba.
    """
    config, num_codes = sequences.generation_config, sequences.num_codes
    prompts, device = sequences.picture_ids, sequences.ids.device
    noise = None
    if config.do_sample:
        beyond = torch.zeros(len(prompts), window, sequences.model.config.codebook_size, device=device)
        noise = torch.cat([*sequences.noise(), beyond], dim=1)
    logits_processor = sequences.logits_processor
    if sequences.processors_see_ids:
        logits_processor = _AtEveryPosition(logits_processor, sequences)
    step = sequences.step_function(may_compile=True)
    # The final codes of every picture, then the drafts.
    codes = prompts.new_zeros(len(prompts), num_codes + 2 * window)
    done = [0] * len(prompts)
    accepted: list[list[int]] = []

    while (shown := min(done)) < num_codes:
        # 1. Logits behind the last final code of every picture, and behind the drafts
        positions = torch.tensor(done)[:, None] + torch.arange(window)
        noise_here = None if noise is None else _noise_of(noise, positions)
        positions = positions.to(device)
        seen = (codes, positions) if sequences.processors_see_ids else None
        if not accepted:
            outputs = sequences.start(functools.partial(_make_revocable, length=config.max_cache_len))
            cache = _AlignedCache(sequences)
            first = None if noise is None else noise_here[:, :1]
            drawn, scores = draw_codes(outputs.logits[:, -1:], seen, sequences.guidance, logits_processor, first)
            drawn, agreed = drawn.expand(-1, window), [1] * len(prompts)
        else:
            inputs = cache.inputs(sequences.layout.codes_to_ids(codes.gather(1, positions - 1)))
            drawn, scores, _ = step(sequences.model, inputs, seen, sequences.guidance, logits_processor, noise_here)
            agreed = _num_final(drawn, codes.gather(1, positions[:, :-1])).tolist()

        # 2. Draws become final codes or the next drafts; what nothing is known of is guessed to be like the last
        codes.scatter_(1, positions, drawn)
        codes.scatter_(1, positions + window, drawn[:, -1:].expand(-1, window))
        accepted.append([min(new, num_codes - before) for new, before in zip(agreed, done, strict=True)])
        done = [before + new for before, new in zip(done, accepted[-1], strict=True)]
        cache.accept(accepted[-1])

        # 3. What all pictures have
        final = codes[:, : min(done)]
        put_codes(sequences.streamer, final[:, shown:], sequences.layout)
        ids = torch.cat([prompts, sequences.layout.codes_to_ids(final)], dim=1) if sequences.criteria else None
        if sequences.criteria and sequences.criteria(ids, scores[:, 0]).all():
            break

    if not config.return_dict_in_generate:
        return final
    return SpeculativeImageOutput(sequences=final, accepted_codes=torch.tensor(accepted))


def _noise_of(noise: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
    """The noise `(B, W, codebook_size)` that belongs to positions `(B, W)`, whichever step looks at them."""
    return noise[torch.arange(len(noise))[:, None], positions]


def _num_final(drawn: torch.LongTensor, drafts: torch.LongTensor) -> torch.LongTensor:
    """How many draws of `(B, W)` are final: the first one, and each one that only right drafts `(B, W - 1)` precede."""
    return 1 + (drawn[:, :-1] == drafts).long().cumprod(1).sum(1)


class _AlignedCache:
    """The cache of a batch whose pictures go at their own pace.

    All sequences end at the same slot: one that is behind is moved to the right and begins with more padding, so that
    no gap comes between its tokens, and windows of sliding attention stay what they are.

    Args:
        sequences ([`ImageSequences`]): Just started.
    """

    def __init__(self, sequences: ImageSequences) -> None:
        self.sequences = sequences
        if not sequences.cache.is_compileable:
            sequences.cache.activate_past_recording()
        mask = sequences.kwargs.get("attention_mask")
        # Of all final tokens. The last one of each sequence is not in the cache: it comes with the next forward.
        self.mask = torch.ones_like(sequences.ids) if mask is None else mask
        self.done = [0] * sequences.num_pictures
        # Tokens of the last forward, from that last one on: of the start, one.
        self.num_fed = 1

    def inputs(self, fed: torch.LongTensor) -> dict[str, Any]:
        """The arguments of the forward of the ids of the last final code and of the drafts, `(B, window)`."""
        model = self.sequences.model
        self.num_fed = fed.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, self.num_fed - 1), value=1)
        self.sequences.grow_cache(mask.shape[1])
        # Drafts beyond the picture may be beyond the model's positions; what they give is not used.
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        positions = (mask.cumsum(1) - 1).clamp(min=0, max=None if limit is None else limit - 1)
        positions = positions[:, -self.num_fed :].contiguous()  # a slice's strides differ from step to step
        own = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 0}
        fed = fed.repeat(len(mask) // len(fed), 1)
        return model.prepare_inputs_for_generation(fed, **{**self.sequences.kwargs, **own})

    def accept(self, accepted: list[int]) -> None:
        """Keeps so many of each picture's last codes, takes back the others, and aligns the sequences again."""
        before = max(self.done)
        self.done = [done + new for done, new in zip(self.done, accepted, strict=True)]
        advance = max(self.done) - before
        width = self.mask.shape[1]
        shifts = [advance - new for new in accepted] * (len(self.mask) // len(accepted))
        mask = torch.nn.functional.pad(self.mask, (0, self.num_fed), value=1)
        for index, shift in enumerate(shifts):
            if shift:
                mask[index] = mask[index].roll(shift)
                mask[index, : max(shift, 0)] = 0
        self.mask = mask[:, : width + advance]

        in_cache, surplus = width - 1 + self.num_fed, self.num_fed - advance
        for layer in self.sequences.cache.layers:
            for index, shift in enumerate(shifts):
                if shift:
                    for states in (layer.keys, layer.values):
                        states[index, :, :in_cache] = states[index, :, :in_cache].roll(shift, dims=1)
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.sub_(surplus)
            else:
                layer.crop(-surplus)


class _AtEveryPosition:
    """Runs logits processors that look at ids for one position of one picture at a time."""

    def __init__(self, logits_processor: LogitsProcessorList, sequences: ImageSequences) -> None:
        self.logits_processor, self.sequences = logits_processor, sequences

    def __call__(self, seen: tuple[torch.LongTensor, torch.LongTensor], scores: torch.Tensor) -> torch.Tensor:
        codes, positions = seen
        ids = torch.cat([self.sequences.picture_ids, self.sequences.layout.codes_to_ids(codes)], dim=1)
        positions = positions + self.sequences.prompt_length
        per_picture = scores.view(len(ids), -1, scores.shape[-1])
        processed = [
            self.logits_processor(ids[picture : picture + 1, : positions[picture, index]], one[None])
            for picture, of_picture in enumerate(per_picture)
            for index, one in enumerate(of_picture)
        ]
        return torch.cat(processed)


def _make_revocable(cache: Cache | None, length: int) -> None:
    """Static layers of sliding attention keep everything, since what they overwrite cannot come back."""
    for index, layer in enumerate(getattr(cache, "layers", [])):
        if isinstance(layer, StaticSlidingWindowLayer):
            cache.layers[index] = StaticLayer(length)
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer) or cache.offloading:
            raise ValueError(
                "Speculative decoding takes back what it guessed wrong, and a cache with "
                f"{'offloading' if cache.offloading else type(layer).__name__} cannot: leave out `speculative`."
            )
