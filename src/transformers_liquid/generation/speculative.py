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
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation import GenerateDecoderOnlyOutput, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .sampling import ImageRows, draw_codes, without_max_length


if TYPE_CHECKING:
    from ..models.liquid.modeling_liquid import LiquidForCausalLM
    from .image_generation import GuidanceLogitsProcessor


# Codes per forward of `speculative=True`: with which the embedded checkpoint is fastest on a CPU.
DEFAULT_WINDOW = 12

# Outputs that a step has for its drafts too.
_NOT_RECORDED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class SpeculativeImageOutput(GenerateDecoderOnlyOutput):
    """Image ids, and how they came about.

    Args:
        accepted_codes (`torch.LongTensor` of shape `(steps, B)`): How many codes of each picture every forward made
            final; the prompts' forward counts as the first. Pictures that were already done have 0.
    """

    accepted_codes: torch.LongTensor | None = None

    @property
    def codes_per_step(self) -> float:
        """Codes of one picture per forward in which it took part, on average over the pictures."""
        return float(self.accepted_codes.sum() / (self.accepted_codes > 0).sum())


def check_speculative(speculative: bool | int | None, num_codes: int, settings: dict[str, Any]) -> int | None:
    """The window of speculative decoding, or `None` for the plain loop.

    Args:
        speculative (`bool` or `int`, *optional*): As in [`LiquidForCausalLM.generate`].
        num_codes (`int`): Of the picture.
        settings (`dict`): The other settings.

    Raises:
        ValueError: If the window is below 2 or above the picture, or another setting rules it out.
    """
    if speculative is None or speculative is False or (speculative is True and num_codes == 1):
        return None
    window = min(DEFAULT_WINDOW, num_codes) if speculative is True else speculative
    if not isinstance(window, int) or not 2 <= window <= num_codes:
        raise ValueError(
            f"speculative must be True, or a window of 2 ... {num_codes} codes (the picture), got {speculative!r}."
        )
    if settings.get("use_cache") is False:
        raise ValueError("Speculative decoding needs the cache: leave out use_cache=False or speculative.")
    given = [name for name in _NOT_RECORDED if settings.get(name)]
    if given:
        raise ValueError(f"Speculative decoding does not record {given[0]}: leave out one of the two.")
    return window


def speculative_sample_image_tokens(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    window: int,
    guidance: GuidanceLogitsProcessor | None = None,
    guided: range | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    image_streamer: BaseStreamer | None = None,
    processors_see_ids: bool = True,
    **model_kwargs: Any,
) -> SpeculativeImageOutput | torch.LongTensor:
    """Beside [`sample_image_tokens`]: the same pictures in fewer forwards.

    Every picture of a batch goes at its own pace. Where guidance sets in or ends, pictures wait for each other.

    Args:
        window (`int`): Codes per forward: the next one and `window - 1` drafts.
        image_streamer (`BaseStreamer`, *optional*): Receives the B ids of a position once all pictures have it.
        others: As for [`sample_image_tokens`].

    Returns:
        `torch.LongTensor` of shape `(B, new ids)`, or a [`SpeculativeImageOutput`].

    Raises:
        ValueError: If the base's cache cannot take back what was guessed wrong, as the state of mamba.
    """
    rows = ImageRows(model, input_ids, generation_config, model_kwargs, guidance, guided)
    num_pictures, num_codes, offset = rows.num_pictures, rows.num_codes, model.config.image_token_offset
    noise = None
    if generation_config.do_sample:
        beyond = torch.zeros(num_pictures, window, model.config.codebook_size, device=input_ids.device)
        noise = torch.cat([*(rows.noise(position, generator) for position in range(num_codes)), beyond], dim=1)
    if processors_see_ids:
        logits_processor = _AtEveryPosition(logits_processor)
    step = rows.step_function(may_compile=not processors_see_ids)
    criteria = without_max_length(stopping_criteria)
    # The ids of the prompts, then of the final codes of every picture, then the drafts.
    prompts, start = input_ids[:num_pictures], input_ids.shape[1]
    ids = torch.cat([prompts, prompts.new_zeros(num_pictures, num_codes + 2 * window)], dim=1)
    done = [0] * num_pictures
    accepted: list[list[int]] = []

    while (shown := min(done)) < num_codes:
        # 1. Logits behind the last final code of every picture, and behind the drafts
        columns = torch.tensor(done)[:, None] + torch.arange(window)
        noise_here = None if noise is None else _noise_of(noise, columns)
        columns = (columns + start).to(ids.device)
        seen_ids = (ids, columns) if processors_see_ids else None
        if rows.must_start(shown):
            revocable = functools.partial(_make_revocable, length=generation_config.max_cache_len)
            outputs = rows.start(shown, ids[:, start : start + shown], revocable)
            cache = _AlignedCache(rows)
            first = None if noise is None else noise_here[:, :1]
            codes, scores = draw_codes(outputs.logits[:, -1:], seen_ids, rows.guidance, logits_processor, first)
            drawn, agreed = codes.expand(-1, window) + offset, [1] * num_pictures
        else:
            inputs = cache.inputs(ids.gather(1, columns - 1), shown)
            codes, scores, _ = step(model, inputs, seen_ids, rows.guidance, logits_processor, noise_here)
            drawn = codes + offset
            agreed = _num_final(drawn, ids.gather(1, columns[:, :-1])).tolist()

        # 2. Draws become final codes or the next drafts; what nothing is known of is guessed to be like the last
        ids.scatter_(1, columns, drawn)
        ids.scatter_(1, columns + window, drawn[:, -1:].expand(-1, window))
        stop = rows.next_change(shown)
        accepted.append([min(new, stop - before) for new, before in zip(agreed, done, strict=True)])
        done = [before + new for before, new in zip(done, accepted[-1], strict=True)]
        cache.accept(accepted[-1])

        # 3. What all pictures have
        final = ids[:, : start + min(done)]
        if image_streamer is not None:
            for column in final[:, start + shown :].cpu().T:
                image_streamer.put(column)
        if criteria and criteria(final, scores[:, 0]).all():
            break

    if image_streamer is not None:
        image_streamer.end()
    if not generation_config.return_dict_in_generate:
        return final[:, start:]
    return SpeculativeImageOutput(sequences=final[:, start:], accepted_codes=torch.tensor(accepted))


def _noise_of(noise: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
    """The noise `(B, W, codebook_size)` that belongs to positions `(B, W)`, whichever step looks at them."""
    return noise[torch.arange(len(noise))[:, None], positions]


def _num_final(drawn: torch.LongTensor, drafts: torch.LongTensor) -> torch.LongTensor:
    """How many draws of `(B, W)` are final: the first one, and each one that only right drafts `(B, W - 1)` precede."""
    return 1 + (drawn[:, :-1] == drafts).long().cumprod(1).sum(1)


class _AlignedCache:
    """The cache of a batch whose pictures go at their own pace.

    All rows end at the same slot: one that is behind is moved to the right and begins with more padding, so that no gap
    comes between its tokens, and windows of sliding attention stay what they are.

    Args:
        rows ([`ImageRows`]): Just started.
    """

    def __init__(self, rows: ImageRows) -> None:
        self.rows = rows
        if not rows.cache.is_compileable:
            rows.cache.activate_past_recording()
        mask = rows.kwargs.get("attention_mask")
        # Of all final tokens. The last one of each row is not in the cache: it comes with the next forward.
        self.mask = torch.ones_like(rows.ids) if mask is None else mask
        self.done = [0] * rows.num_pictures
        # Tokens of the last forward, from that last one on: of the start, one.
        self.num_fed = 1

    def inputs(self, fed: torch.LongTensor, position: int) -> dict[str, Any]:
        """The arguments of the forward of the last final code and the drafts, `(B, window)`."""
        rows = self.rows
        if rows.guidance is not None and not rows.is_guided(position):
            rows.drop_unconditional()
            self.mask = self.mask[: rows.num_pictures]
        self.num_fed = fed.shape[1]
        mask = torch.nn.functional.pad(self.mask, (0, self.num_fed - 1), value=1)
        # Drafts beyond the picture may be beyond the model's positions; what they give is not used.
        limit = getattr(rows.model.config.get_text_config(), "max_position_embeddings", None)
        positions = (mask.cumsum(1) - 1).clamp(min=0, max=None if limit is None else limit - 1)
        own = {"attention_mask": mask, "position_ids": positions[:, -self.num_fed :], "logits_to_keep": 0}
        fed = fed.repeat(len(mask) // len(fed), 1)
        return rows.model.prepare_inputs_for_generation(fed, **{**rows.kwargs, **own})

    def accept(self, accepted: list[int]) -> None:
        """Keeps so many of each picture's last codes, takes back the others, and aligns the rows again."""
        before = max(self.done)
        self.done = [done + new for done, new in zip(self.done, accepted, strict=True)]
        advance = max(self.done) - before
        width = self.mask.shape[1]
        shifts = [advance - new for new in accepted] * (len(self.mask) // len(accepted))
        mask = torch.nn.functional.pad(self.mask, (0, self.num_fed), value=1)
        for row, shift in enumerate(shifts):
            if shift:
                mask[row] = mask[row].roll(shift)
                mask[row, : max(shift, 0)] = 0
        self.mask = mask[:, : width + advance]

        in_cache, surplus = width - 1 + self.num_fed, self.num_fed - advance
        for layer in self.rows.cache.layers:
            for row, shift in enumerate(shifts):
                if shift:
                    for states in (layer.keys, layer.values):
                        states[row, :, :in_cache] = states[row, :, :in_cache].roll(shift, dims=1)
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.sub_(surplus)
            else:
                layer.crop(-surplus)


class _AtEveryPosition:
    """Runs logits processors that look at ids for one position of one picture at a time."""

    def __init__(self, logits_processor: LogitsProcessorList) -> None:
        self.logits_processor = logits_processor

    def __call__(self, seen: tuple[torch.LongTensor, torch.LongTensor], scores: torch.Tensor) -> torch.Tensor:
        ids, columns = seen
        per_picture = scores.view(len(ids), -1, scores.shape[-1])
        processed = [
            self.logits_processor(ids[picture : picture + 1, : columns[picture, position]], one[None])
            for picture, positions in enumerate(per_picture)
            for position, one in enumerate(positions)
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
