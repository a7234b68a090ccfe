"""Drawing pictures with `generate()`: logits processors, settings, and what happens before the decoding loop."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import StoppingCriteriaList
from transformers.generation.configuration_utils import STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .sampling import sample_image_tokens
from .speculative import check_speculative, speculative_sample_image_tokens


if TYPE_CHECKING:
    from ..models.liquid.configuration_liquid import LiquidConfig
    from ..models.liquid.modeling_liquid import LiquidForCausalLM


# The reference's settings, for models whose generation_config.json has no `image_generation_config`.
DEFAULT_IMAGE_GENERATION_CONFIG: dict[str, Any] = {
    "guidance_scale": 7.0,
    "do_sample": True,
    "temperature": 0.99,
    "top_k": 4096,
    "top_p": 0.96,
}

# What of transformers' generation settings has a meaning for a fixed number of codes.
_IMAGE_SETTINGS = {
    *(
        "guidance_scale",
        "guidance_min_p",
        "guidance_interval",
        "speculative",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    ),
    *("epsilon_cutoff", "eta_cutoff", "top_h", "renormalize_logits", "remove_invalid_values", "max_time"),
    *("num_return_sequences", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("prefill_chunk_size", "compile_config", "disable_compile"),
}


class ImageTokenLogitsProcessor(LogitsProcessor):
    """Restricts the next token to image ids; for stock `generate()` calls.

    Args:
        config (`LiquidConfig`): Says where the image ids lie.
    """

    def __init__(self, config: LiquidConfig) -> None:
        self.image_slice = config.image_slice

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
        self.image_slice = config.image_slice
        self.specials = config.special_image_token_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.image_slice] = -torch.inf
        scores[:, self.specials] = -torch.inf
        return scores


class GuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance in one batch: conditional rows, then as many unconditional rows.

    Both halves of what it returns are the guided scores `u + guidance_scale * (c - u)`, so that in a stock greedy
    `generate()` call both rows of a pair get the same token. (When sampling, stock `generate()` draws for each row
    apart; `generate(generation_mode="image")` draws once for both.) With `guidance_min_p`, put it after restrictions
    such as [`ImageTokenLogitsProcessor`], so that the best token is an allowed one; else the order does not matter.

    Args:
        guidance_scale (`float`): 1 follows the prompt alone, more follows it more strongly.
        guidance_min_p (`float`, *optional*): Choose only among tokens that the conditional row gives at least this
            fraction of its best token's probability. Guidance amplifies tokens that neither row supports; this
            leaves them out.

    Raises:
        ValueError: If `guidance_scale` is below 1 or not finite, or `guidance_min_p` not in (0, 1].
    """

    def __init__(self, guidance_scale: float, guidance_min_p: float | None = None) -> None:
        if not (math.isfinite(guidance_scale) and guidance_scale >= 1):
            raise ValueError(f"guidance_scale must be a finite number >= 1 (1 is no guidance), got {guidance_scale}.")
        if guidance_min_p is not None and not 0 < guidance_min_p <= 1:
            raise ValueError(f"guidance_min_p must be in (0, 1], got {guidance_min_p}.")
        self.guidance_scale = guidance_scale
        self.log_min_p = None if guidance_min_p is None else math.log(guidance_min_p)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(scores) % 2:
            raise ValueError(
                f"Guidance needs conditional and unconditional rows in equal number, got {len(scores)} rows."
            )
        return self.guide(scores).repeat(2, 1)

    def guide(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The guided scores of every pair, once: `(2 B, vocabulary)` to `(B, vocabulary)`."""
        conditional, unconditional = scores.chunk(2)
        guided = torch.lerp(unconditional, conditional, self.guidance_scale)
        # What is forbidden in both rows stays forbidden: -inf minus -inf would be NaN.
        excluded = conditional == -torch.inf
        if self.log_min_p is not None:
            excluded = conditional < conditional.amax(-1, keepdim=True) + self.log_min_p
        return guided.masked_fill(excluded, -torch.inf)


def generate_image_tokens(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor,
    *,
    height: int | None = None,
    width: int | None = None,
    attention_mask: torch.Tensor | None = None,
    negative_prompt_ids: torch.LongTensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> ModelOutput | torch.LongTensor:
    """`generate(generation_mode="image")`: arguments and result as documented there.

    1. settings: the defaults, then the model's, then the caller's;
    2. rows: the conditional ones, then the unconditional ones, padded together;
    3. transformers' `generate()` prepares cache, processors and criteria, and runs [`sample_image_tokens`] or
       [`speculative_liquid.speculative_sample_image_tokens`].
    """
    settings, model_kwargs = _split_settings(model, generation_config, kwargs)
    guidance_scale = settings.pop("guidance_scale")
    guidance = GuidanceLogitsProcessor(guidance_scale, settings.pop("guidance_min_p", None))
    rows, columns = model.config.grid(height, width)
    num_codes = rows * columns
    guided = guided_codes(settings.pop("guidance_interval", None), num_codes)
    window = check_speculative(settings.pop("speculative", None), num_codes, settings)
    _check_image_inputs(model, input_ids, num_codes, generator, settings.get("num_return_sequences") or 1)

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    batch_size = len(input_ids)
    if guidance_scale > 1:
        if negative_prompt_ids is None:
            negative_prompt_ids = _unconditional_prompt(model.config, input_ids)
        input_ids, attention_mask = _stack_left_padded(
            (input_ids, attention_mask),
            _repeat_to(batch_size, negative_prompt_ids, negative_prompt_attention_mask),
        )
        check_context(model, input_ids, num_codes)
    if streamer is not None:
        streamer.put(input_ids[:batch_size].cpu())

    has_own_processors = bool(logits_processor)
    if _compiles_by_default(model, settings, model_kwargs, has_own_processors):
        settings["cache_implementation"] = "static"
    loop, options = sample_image_tokens, {}
    if window is not None:
        loop, options = speculative_sample_image_tokens, {"window": window}
    if settings.get("cache_implementation") in STATIC_CACHE_IMPLEMENTATIONS:
        # Room for drafts beyond the last code, and the same for prompts of similar length: one graph serves them all.
        length = input_ids.shape[1] + num_codes + (window or 0)
        settings["max_cache_len"] = max(settings.get("max_cache_len") or 0, math.ceil(length / 128) * 128)
    # The view has logits of the image rows only, so processors and scores are `codebook_size` wide.
    return GenerationMixin.generate(
        model.image_head_view(),
        input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(max_new_tokens=num_codes, **settings),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        custom_generate=functools.partial(
            loop,
            guidance=guidance if guidance_scale > 1 else None,
            guided=guided,
            generator=generator,
            image_streamer=streamer,
            processors_see_ids=has_own_processors,
            **options,
        ),
        **model_kwargs,
    )


def guided_codes(interval: tuple[float, float] | None, num_codes: int) -> range:
    """The positions of the codes that `guidance_interval` lets guidance act on.

    Args:
        interval (`tuple[float, float]`, *optional*): Start and stop as fractions of the picture's codes.
        num_codes (`int`): Of the picture.

    Raises:
        ValueError: Unless 0 <= start < stop <= 1, and a code lies between.
    """
    if interval is None:
        return range(num_codes)
    is_pair = isinstance(interval, (list, tuple)) and len(interval) == 2
    if (
        not is_pair
        or not all(isinstance(end, (int, float)) for end in interval)
        or not 0 <= interval[0] < interval[1] <= 1
    ):
        raise ValueError(
            "guidance_interval must be two fractions of the picture's codes with 0 <= start < stop <= 1, such as "
            f"(0.0, 0.75), got {interval!r}."
        )
    guided = range(math.ceil(interval[0] * num_codes), math.ceil(interval[1] * num_codes))
    if not guided:
        raise ValueError(
            f"No code of the {num_codes} lies in guidance_interval={interval!r}: widen it, or leave guidance out with "
            "guidance_scale=1."
        )
    return guided


def _compiles_by_default(
    model: LiquidForCausalLM, settings: dict[str, Any], model_kwargs: dict[str, Any], has_own_processors: bool
) -> bool:
    """Whether a static cache is chosen although nobody asked: on CUDA, where the compiled step is possible."""
    chosen = [settings.get(name) for name in ("cache_implementation", "disable_compile", "return_dict_in_generate")]
    return (
        model.device.type == "cuda"
        and model._can_compile_fullgraph
        and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
        and settings.get("use_cache", True)
        and not any(chosen)
        and not has_own_processors
        and "past_key_values" not in model_kwargs
    )


def image_settings(stored: GenerationConfig | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that pictures are drawn with: the defaults, what a repository stores, what is given.

    Args:
        stored (`GenerationConfig`, *optional*): Its `image_generation_config` counts.
        given (`dict`): Names and values.

    Returns:
        `dict`: With `guidance_scale` and `do_sample`; without sampling settings if nothing is sampled.
    """
    own = getattr(stored, "image_generation_config", None) or {}
    settings = DEFAULT_IMAGE_GENERATION_CONFIG | own | given
    if not settings["do_sample"]:
        # As transformers does not: sampling settings of the repository say nothing against a greedy call.
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_k", "top_p")}
    if settings["guidance_scale"] is None:
        settings["guidance_scale"] = 1.0
    return settings


def _split_settings(
    model: LiquidForCausalLM, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into the settings of an image and what is left for the model."""
    settings = {}
    if generation_config is not None:
        # A config with image settings, such as the copy of the model's that pipelines pass, is about text elsewhere.
        given = getattr(generation_config, "image_generation_config", None) or generation_config.to_diff_dict()
        settings = {name: value for name, value in given.items() if name in _IMAGE_SETTINGS and value is not None}
    known = GenerationConfig._get_default_generation_params().keys() | GenerationConfig().to_dict().keys()
    model_kwargs = {}
    for name, value in kwargs.items():
        if name in _IMAGE_SETTINGS:
            settings = settings if value is None and name == "guidance_min_p" else settings | {name: value}
        elif name == "max_new_tokens":
            # A limit for text: the stock any-to-any pipeline passes it whatever it generates.
            continue
        elif name not in known:
            model_kwargs[name] = value
        elif value is not None:
            raise ValueError(
                f"{name}={value} has no meaning for images: a picture is exactly rows x columns codes, drawn greedily "
                f"or by sampling. Settings for images: {', '.join(sorted(_IMAGE_SETTINGS))}, height, width."
            )
    return image_settings(model.generation_config, settings), model_kwargs


def _check_image_inputs(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor | None,
    num_codes: int,
    generator: torch.Generator | list[torch.Generator] | None,
    num_return_sequences: int,
) -> None:
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f'generation_mode="image" needs input_ids of shape (batch, length), got {shape}.')
    boi = model.config.boi_token_id
    wrong = (input_ids[:, -1] != boi).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"Every prompt must end with the begin-of-image token ({boi}); row {wrong[0]} ends with "
            f'{int(input_ids[wrong[0], -1])}. Use the processor with generation_mode="image" (it pads on the left).'
        )
    if isinstance(generator, list) and len(generator) != len(input_ids) * num_return_sequences:
        raise ValueError(
            f"A list of generators needs one for each of the {len(input_ids) * num_return_sequences} pictures, "
            f"got {len(generator)}."
        )
    check_context(model, input_ids, num_codes)


def check_context(model: LiquidForCausalLM, input_ids: torch.LongTensor, num_codes: int) -> None:
    """Raises a `ValueError` unless prompts of shape `(B, L)` and a picture of `num_codes` codes fit the positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and input_ids.shape[1] + num_codes > limit:
        raise ValueError(
            f"The prompt has {input_ids.shape[1]} tokens and the picture {num_codes} codes, together more than the "
            f"model's {limit} positions. Shorten the prompt or draw a smaller picture."
        )


def _unconditional_prompt(config: LiquidConfig, input_ids: torch.LongTensor) -> torch.LongTensor:
    """`bos <unconditional> <boi>`, with bos where the prompts have one."""
    bos = getattr(config, "bos_token_id", None)
    has_bos = bos is not None and bool((input_ids == bos).any())
    ids = [bos] * has_bos + [config.uncond_token_id, config.boi_token_id]
    return torch.tensor([ids], dtype=input_ids.dtype, device=input_ids.device)


def _repeat_to(
    batch_size: int, ids: torch.LongTensor, attention_mask: torch.Tensor | None
) -> tuple[torch.LongTensor, torch.Tensor]:
    """One unconditional prompt serves all rows; else there must be one for each."""
    if len(ids) not in (1, batch_size):
        raise ValueError(f"negative_prompt_ids must have 1 or {batch_size} rows (the prompts), got {len(ids)}.")
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    repeats = batch_size // len(ids)
    return ids.repeat(repeats, 1), attention_mask.repeat(repeats, 1)


def _stack_left_padded(*batches: tuple[torch.LongTensor, torch.Tensor]) -> tuple[torch.LongTensor, torch.Tensor]:
    """Stacks left-padded batches of (ids, mask); every row keeps its own mask, so no row attends to a pad."""
    length = max(ids.shape[1] for ids, _ in batches)
    device = batches[0][0].device
    padded = [
        [torch.nn.functional.pad(part.to(device), (length - part.shape[1], 0)) for part in batch] for batch in batches
    ]
    ids, masks = zip(*padded, strict=True)
    return torch.cat(ids), torch.cat(masks)
