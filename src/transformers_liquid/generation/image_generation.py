"""Drawing pictures with `generate()`: what happens before the decoding loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import StoppingCriteriaList
from transformers.generation.configuration_utils import STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..utils.versions import CACHE_NAMES
from .guidance import GuidanceLogitsProcessor, VocabularyLogitsProcessor, looks_for_ids
from .sampling import ImageSequences, check_drawn, sample_codes
from .settings import ImageGenerationConfig
from .speculative import speculative_sample_codes


if TYPE_CHECKING:
    from ..models.liquid.configuration_liquid import LiquidConfig
    from ..models.liquid.modeling_liquid import LiquidForCausalLM


def generate_image_tokens(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor,
    *,
    attention_mask: torch.Tensor | None = None,
    negative_prompt_ids: torch.LongTensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    may_lack_pictures: bool = False,
    **kwargs: Any,
) -> ModelOutput | torch.LongTensor:
    """`generate(generation_mode="image")`: arguments and result as documented there. With `may_lack_pictures`, sides of
    guidance about pictures of the context are the unconditional one where there are none.

    1. settings: the defaults, then the model's, then the caller's;
    2. sequences: the conditional ones, then the unconditional ones, padded together;
    3. transformers' `generate()` prepares cache, processors and criteria, and runs [`sample_codes`] or
       [`speculative_sample_codes`].
    """
    settings, model_kwargs = ImageGenerationConfig.from_call(model.generation_config, generation_config, kwargs)
    num_codes = settings.num_codes(model.config)
    window = settings.window(num_codes)
    copies = settings.of_transformers.get("num_return_sequences", 1)
    if input_ids is not None:
        generator = check_generators(generator, len(input_ids) * copies)
        if streamer is not None:
            streamer.put(input_ids.cpu())
    conditional, unconditional = (input_ids, attention_mask), (negative_prompt_ids, negative_prompt_attention_mask)
    sides = model.config, conditional, unconditional, settings, may_lack_pictures
    guidance, (input_ids, attention_mask) = guided_sequences(*sides)
    check_context(model.config, input_ids.shape[1], num_codes)

    has_own_processors = bool(logits_processor)
    # Room for drafts beyond the last code.
    length = input_ids.shape[1] + num_codes + (window or 0)
    cache_settings = _cache_settings(model, settings.of_transformers, model_kwargs, has_own_processors, length)
    drawing = guidance, generator, streamer, has_own_processors

    of_ids = [one for one in logits_processor or () if looks_for_ids(one)]
    if need_ids := [type(one).__name__ for one in of_ids] + ["speculative"] * (window is not None):
        model.config.image_layout.check_one_code(f"codes have no ids: leave out {need_ids[0]}, which looks for them.")

    def draw(view, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        for index, one in enumerate(logits_processor):
            if any(one is users for users in of_ids):
                logits_processor[index] = VocabularyLogitsProcessor(one, model.config)
        prepared_by_generate = input_ids, logits_processor, stopping_criteria, generation_config, prepared
        sequences = ImageSequences(view, *prepared_by_generate, *drawing)
        return sample_codes(sequences) if window is None else speculative_sample_codes(sequences, window)

    # The view has logits of the codes only, so processors and scores are `codebook_size` wide.
    drawn = GenerationMixin.generate(
        model.image_head_view(),
        input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(max_new_tokens=num_codes, **settings.of_transformers | cache_settings),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        custom_generate=draw,
        **model_kwargs,
    )
    check_drawn(drawn if isinstance(drawn, torch.Tensor) else drawn.sequences)
    if streamer is not None:
        streamer.end()
    layout = model.config.image_layout
    if isinstance(drawn, torch.Tensor):
        return layout.codes_to_ids(drawn)
    drawn.sequences = layout.codes_to_ids(drawn.sequences)
    return drawn


def check_generators(generator: Any, number: int) -> torch.Generator | list[torch.Generator] | None:
    """Of a call; raises a `ValueError` unless they are one for all of `number` pictures, one each, or none."""
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}.")
    if not isinstance(generator, list | tuple):
        return generator
    if len(generators) != number:
        raise ValueError(f"A list of generators needs one for each of the {number} pictures, got {len(generators)}.")
    return generators


def _cache_settings(
    model: LiquidForCausalLM,
    settings: dict[str, Any],
    model_kwargs: dict[str, Any],
    has_own_processors: bool,
    length: int,
) -> dict[str, Any]:
    """A static cache if nobody asked, on CUDA, where the compiled step is possible; and the size of a static cache."""
    chosen = [settings.get(name) for name in ("cache_implementation", "disable_compile", "return_dict_in_generate")]
    implementation = settings.get("cache_implementation")
    if (
        model.device.type == "cuda"
        and model._can_compile_fullgraph
        and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
        and settings.get("use_cache", True)
        and not any(chosen)
        and not has_own_processors
        and not model_kwargs.keys() & {*CACHE_NAMES}
    ):
        implementation = "static"
    if implementation not in STATIC_CACHE_IMPLEMENTATIONS:
        return {}
    # The same for prompts of similar length: one graph serves them all.
    room = max(settings.get("max_cache_len", 0), math.ceil(length / 128) * 128)
    return {"cache_implementation": implementation, "max_cache_len": room}


def guided_sequences(
    config: LiquidConfig,
    conditional: tuple[torch.LongTensor | None, torch.Tensor | None],
    unconditional: tuple[torch.LongTensor | None, torch.Tensor | None],
    settings: ImageGenerationConfig,
    may_lack_pictures: bool,
) -> tuple[GuidanceLogitsProcessor | None, tuple[torch.LongTensor, torch.Tensor]]:
    """Guidance, if any; ids and masks of the prompts and, for guidance, of as many of each other side, padded together.

    Every sequence keeps its own mask, so none attends to a pad. One unconditional prompt serves all; without any it is
    `bos <unconditional> <boi>`, with bos where the prompts have one.
    """
    ids, mask = checked_prompts(config, "input_ids", *conditional)
    if settings.guidance_scale == 1 and settings.image_guidance_scale is None:
        return None, (ids, mask)
    guidance = GuidanceLogitsProcessor(settings.guidance_scale, settings.guidance_min_p, settings.image_guidance_scale)
    if unconditional[0] is None:
        if unconditional[1] is not None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_ids: leave it out.")
        bos = getattr(config, "bos_token_id", None)
        has_bos = bos is not None and bool((ids == bos).any())
        uncond = [config.uncond_token_id] if isinstance(config.uncond_token_id, int) else config.uncond_token_id
        unconditional = ids.new_tensor([[bos] * has_bos + [*uncond, config.boi_token_id]]), None
    other_ids, other_mask = checked_prompts(config, "negative_prompt_ids", *unconditional)
    if len(other_ids) not in (1, len(ids)):
        raise ValueError(f"negative_prompt_ids must be one sequence or {len(ids)} (the prompts), got {len(other_ids)}.")
    sides = [(ids, mask), (other_ids.expand(len(ids), -1), other_mask.expand(len(ids), -1))]
    if guidance.num_sides == 3:
        sides.insert(1, _pictures_alone(config, sides, may_lack_pictures))
    elif settings.guidance_context == "images":
        if not (other_ids == config.uncond_token_id).any(1).all():
            raise ValueError("A negative prompt and guidance_context='images' both say what guidance leads away from.")
        sides[1] = _pictures_alone(config, sides, may_lack_pictures)
    length = max(side.shape[1] for side, _ in sides)
    return guidance, tuple(
        torch.cat([torch.nn.functional.pad(part.to(ids.device), (length - part.shape[1], 0)) for part in parts])
        for parts in zip(*sides, strict=True)
    )


def _pictures_alone(
    config: LiquidConfig, sides: list[tuple[torch.LongTensor, torch.LongTensor]], may_lack_pictures: bool
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and masks of the conditional side without its text; where it has no pictures, of the unconditional side."""
    layout, bos = config.image_layout, getattr(config, "bos_token_id", None)
    of_pictures = {layout.boi_token_id, layout.eoi_token_id, *layout.image_token_range}
    conditional, unconditional = (unpadded(*side) for side in sides)
    found = []
    for ids, instead in zip(conditional, unconditional, strict=True):
        kept = [token for token in ids if token in of_pictures]
        found.append([*ids[: int(ids[0] == bos)], *kept] if len(kept) > 1 else instead)
    if found == unconditional and not may_lack_pictures:
        raise ValueError(
            "guidance_context='images' and image_guidance_scale are about pictures in the context, and the prompts have "
            "none: leave them out, or give the processor images."
        )
    return pad_left(found, sides[0][0].device)


def unpadded(ids: torch.LongTensor, mask: torch.Tensor | None) -> list[list[int]]:
    """The ids of each sequence that its mask shows."""
    mask = torch.ones_like(ids) if mask is None else mask
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def pad_left(
    sequences: Sequence[list[int]], device: torch.device | str, pad_token_id: int = 0
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and masks `(B, L)` of sequences, pads before them."""
    length = max(map(len, sequences))
    ids = [[pad_token_id] * (length - len(one)) + one for one in sequences]
    mask = [[0] * (length - len(one)) + [1] * len(one) for one in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def checked_prompts(
    config: LiquidConfig,
    name: str,
    ids: torch.LongTensor | None,
    mask: torch.Tensor | None,
    begins_image: bool = True,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and mask of prompts; raises a `ValueError` that calls them `name` unless a picture (or, with `begins_image`
    false, a text) can begin after each."""
    mode = "image" if begins_image else "interleaved"
    is_ids = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() and ids.dtype in (torch.int32, torch.int64)
    if not is_ids:
        given = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, torch.Tensor) else repr(ids)
        raise ValueError(f'generation_mode="{mode}" needs {name} of shape (batch, length), got {given}.')
    wrong = ((ids[:, -1] == config.boi_token_id) != begins_image).nonzero().flatten().tolist()
    if wrong:
        must = "must" if begins_image else "must not"
        raise ValueError(
            f"Every prompt of {name} {must} end with the begin-of-image token ({config.boi_token_id}); prompt {wrong[0]} "
            f'ends with {int(ids[wrong[0], -1])}. Use the processor with generation_mode="{mode}" (it pads on the left).'
        )
    vocab_size = config.get_text_config().vocab_size
    wrong = ids[(ids == config.image_token_id) | (ids < 0) | (ids >= vocab_size)].tolist()
    if wrong:
        raise ValueError(
            f"{name} holds {wrong[0]}, an image placeholder or no id of the vocabulary of {vocab_size}. Use the processor "
            f'with generation_mode="{mode}".'
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all() or not mask[:, -1].all():
        raise ValueError(
            f"The attention mask of {name} must hold 1 for what is attended to, as the last token of each prompt, and else "
            f"0, in the shape {tuple(ids.shape)}, got shape {tuple(mask.shape)} and values {mask.unique().tolist()[:4]}."
        )
    return ids, mask.to(ids)


def context_limit(config: LiquidConfig) -> int:
    """How many positions the model has."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_context(config: LiquidConfig, length: int, num_codes: int) -> None:
    """Raises a `ValueError` unless prompts of a length and a picture of `num_codes` codes fit the model's positions."""
    limit = context_limit(config)
    if length + num_codes > limit:
        raise ValueError(
            f"The prompt has {length} tokens and the picture {num_codes} codes, together more than the "
            f"model's {limit} positions. Shorten the prompt or draw a smaller picture."
        )
