"""Text and pictures by turns with `generate(generation_mode="interleaved")`.

In phases instead of a switch at every step: all open sequences write text until each begins a picture or ends; those
that began one draw together, in the loop that draws any picture; the end of the image is set; the text goes on. Who
waits idles, nothing blocks another, and guidance, compiled steps and speculation are those of
`generate(generation_mode="image")`. What one phase has read, the next goes on from, if the same sequences grew alike in it:
no cache has to follow sequences that join and part, whose contexts are read anew ([`_Context`]; `docs/benchmarks.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMode, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..utils.versions import CACHE_NAME, CACHE_NAMES
from .guidance import SuppressImageTokensLogitsProcessor
from .image_generation import (
    check_context,
    check_generators,
    checked_prompts,
    context_limit,
    generate_image_tokens,
    guided_sequences,
    pad_left,
    unpadded,
)
from .sampling import picture_seed
from .settings import OUR_SETTINGS, ImageGenerationConfig, eos_token_ids


if TYPE_CHECKING:
    from ..models.liquid.configuration_liquid import LiquidConfig
    from ..models.liquid.modeling_liquid import LiquidForCausalLM


DEFAULT_MAX_NEW_TOKENS, DEFAULT_MAX_IMAGES = 512, 4

# Settings that are about the whole call.
_RECORDS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
_OF_THE_CALL = {"num_return_sequences", "max_time", *_RECORDS}

# Arguments of transformers that are about one loop, or one length.
_OF_ONE_LOOP = {"custom_generate", "inputs_embeds", "position_ids", "labels"}


@dataclass
class InterleavedEvent:
    """What just happened in one sequence; for streamers with a method `put_event(event)`.

    Args:
        type (`str`): `"text"`, `"image_start"`, `"image_partial"`, `"image"` or `"end"`.
        sequence (`int`): Which one of the batch.
        ids (list of `int`): Of a text: the new ids.
        index (`int`, *optional*): Of a picture: which one of the sequence, from 0 on.
        codes (`torch.LongTensor` of shape `(n,)`, *optional*): Of `"image_partial"`: the new codes.
        pixel_values (`torch.Tensor` of shape `(3, H, W)`, *optional*): Of `"image"`, in [-1, 1].
        seed (`int`, *optional*): Of `"image"`, if the sequence has a generator.
        reason (`str`, *optional*): Of `"end"`: see [`InterleavedOutput`].
    """

    type: Literal["text", "image_start", "image_partial", "image", "end"]
    sequence: int
    ids: list[int] = field(default_factory=list)
    index: int | None = None
    codes: torch.LongTensor | None = None
    pixel_values: torch.Tensor | None = None
    seed: int | None = None
    reason: str | None = None


@dataclass
class InterleavedOutput(ModelOutput):
    """What every sequence wrote and drew.

    Args:
        sequences (`torch.LongTensor` of shape `(B, L)`): Prompts and everything after them, padded on the left.
        parts (list of B lists): In order: the ids `(n,)` of a text, or the pixel values `(3, H, W)` in [-1, 1] of a
            picture. For [`~LiquidProcessor.post_process_multimodal_output`].
        end_reasons (list of B `str`): `"eos"`; `"length"` (`max_new_tokens`); `"context"` (the model's positions);
            `"no_room"` (the text ended, but before that a picture had no room in the context); `"stopped"` (by a
            stopping criterion or `max_time`; a picture that was begun is dropped).
        seeds (list of B lists, *optional*): Of each picture: with its context, `generate(generation_mode="image")` and a
            generator of this seed draw it again.
    """

    sequences: torch.LongTensor | None = None
    parts: list[list[torch.Tensor]] | None = None
    end_reasons: list[str] | None = None
    seeds: list[list[int]] | None = None


def generate_interleaved(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor,
    *,
    attention_mask: torch.Tensor | None = None,
    negative_prompt_ids: torch.LongTensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    max_images: int | None = None,
    image_generation_config: dict[str, Any] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> InterleavedOutput:
    """`generate(generation_mode="interleaved")`: arguments and result as documented there."""
    # 1. Settings of the text, and apart from them those of the pictures
    own = {name: kwargs.pop(name) for name in kwargs.keys() & OUR_SETTINGS}
    settings = _picture_settings(model, generation_config, own, image_generation_config)
    num_codes = settings.num_codes(model.config)
    settings.window(num_codes)
    if kwargs.get("max_length") is not None:
        raise ValueError("max_length counts pictures too: pass max_new_tokens, for the text, and max_images.")
    tokenizer = kwargs.pop("tokenizer", None)
    config, model_kwargs = model._prepare_generation_config(generation_config, **kwargs)
    config.max_length = None  # transformers' own default, of which it would warn at each text
    copies, config.num_return_sequences = 1 if config.num_return_sequences is None else config.num_return_sequences, 1
    criteria = _criteria(config, stopping_criteria, tokenizer)
    budget = config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    # 2. Checks
    limit = context_limit(model.config)
    if max_images is None:
        max_images = max(1, min(DEFAULT_MAX_IMAGES, limit // (num_codes + 2)))
    _, attention_mask = checked_prompts(model.config, "input_ids", input_ids, attention_mask, begins_image=False)
    numbers = {"max_images": max_images, "max_new_tokens": budget, "num_return_sequences": copies}
    number = len(input_ids) * copies
    _check(config, model_kwargs, numbers, number)
    _check_room(input_ids.shape[1], max_images, num_codes, limit)
    generators = check_generators([generator] if isinstance(generator, torch.Generator) else generator, number)
    negatives = _negatives(model, settings, negative_prompt_ids, negative_prompt_attention_mask, len(input_ids))
    negatives = [ids for ids in negatives for _ in range(number // len(negatives))]
    model._get_logits_processor(GenerationConfig(**settings.of_transformers))  # raises what is wrong with a picture's
    if streamer is not None and not (hasattr(streamer, "put_event") and hasattr(streamer, "end")):
        raise ValueError(f"A streamer of interleaved mode has put_event(event) and end(), got {streamer!r}.")

    # 3. Phases
    emit = (lambda event: None) if streamer is None else streamer.put_event
    prompts = [ids for ids in unpadded(input_ids, attention_mask) for _ in range(copies)]
    sequences = [_Sequence(index, ids, budget, max_images, limit, emit) for index, ids in enumerate(prompts)]
    context = _Context(model, [config.to_dict(), settings.of_transformers, model_kwargs])
    text = config, LogitsProcessorList(logits_processor or []), criteria, num_codes, model_kwargs
    while writing := [one for one in sequences if one.reason is None]:
        _write(model, writing, context, *text)
        if drawing := [one for one in writing if one.begins_image]:
            _draw(model, drawing, context, settings, generators, negatives, criteria)
    if streamer is not None:
        streamer.end()
    return InterleavedOutput(
        sequences=pad_left([one.ids for one in sequences], model.device)[0],
        parts=[[torch.tensor(part) if isinstance(part, list) else part for part in one.parts] for one in sequences],
        end_reasons=[one.reason for one in sequences],
        seeds=None if generators is None else [one.seeds for one in sequences],
    )


def _picture_settings(
    model: LiquidForCausalLM, generation_config: GenerationConfig | None, own: dict[str, Any], of_pictures: Any
) -> ImageGenerationConfig:
    """The model's, those that a configuration of text holds for pictures, and the call's: its `own` and those `of_pictures`."""
    if not isinstance(of_pictures, dict | None):
        raise ValueError(f"image_generation_config must be a dictionary of settings, got {of_pictures!r}.")
    given = (getattr(generation_config, "image_generation_config", None) or {}) | own | (of_pictures or {})
    settings, unknown = ImageGenerationConfig.from_call(model.generation_config, None, given)
    if unknown or given.keys() & _OF_THE_CALL:
        raise ValueError(f"image_generation_config holds {', '.join(unknown or given)}: only settings of a picture.")
    return settings


def _negatives(model: LiquidForCausalLM, settings: ImageGenerationConfig, ids: Any, mask: Any, number: int) -> list:
    """The ids of what guidance leads away from, if given: one list for all prompts, or one for each of this number. All
    sides of a first picture without context are made, so that what is wrong with them is raised at once."""
    config, begun = model.config, torch.full((number, 1), model.config.boi_token_id, device=model.device)
    guided = dataclasses.replace(settings, guidance_scale=max(settings.guidance_scale, 2))
    _, (sides, _) = guided_sequences(config, (begun, None), (ids, mask), guided, may_lack_pictures=True)
    check_context(config, sides.shape[1], settings.num_codes(config))
    is_plain = ids is None or (ids == config.uncond_token_id).any(1).all()
    if settings.guidance_scale == 1 and settings.image_guidance_scale is None and not is_plain:
        raise ValueError("A negative prompt acts through guidance, but guidance_scale is 1: raise it.")
    return [] if ids is None else unpadded(ids, mask)


def _criteria(config: GenerationConfig, stopping_criteria: Any, tokenizer: Any) -> StoppingCriteriaList:
    """What stops the whole call: the caller's, and those of the settings, which transformers would begin anew each time."""
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time, time.time()))
        config.max_time = None
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass `tokenizer=processor.tokenizer`.")
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        config.stop_strings = None
    return criteria


def _check(config: GenerationConfig, model_kwargs: dict[str, Any], numbers: dict[str, Any], number: int) -> None:
    """Raises a `ValueError` that says what cannot be met for so many sequences."""
    mode = config.get_generation_mode(model_kwargs.get("assistant_model"))
    recorded = [name for name in _RECORDS if getattr(config, name)]
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or recorded:
        raise ValueError(
            'generation_mode="interleaved" writes text greedily or by sampling, one sequence at a time, and returns an '
            f"output of its own: got {mode.value} {' '.join(recorded)}."
        )
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    refused = {*_OF_ONE_LOOP, *(CACHE_NAMES if number > 1 else ())}
    if given := [name for name, value in model_kwargs.items() if value is not None and name in refused]:
        raise ValueError(f"{given[0]} cannot be about {number} sequences of text and pictures by turns: leave it out.")


def _check_room(length: int, most: int, num_codes: int, limit: int) -> None:
    """Raises a `ValueError` unless a prompt leaves room for an answer, and the model for the most pictures."""
    if length >= limit:
        raise ValueError(f"The prompt has {length} tokens, the model {limit} positions: no room for an answer.")
    if most * (num_codes + 2) > limit:
        raise ValueError(f"max_images must fit into the model's {limit} positions, got {most} of {num_codes} codes.")


@dataclass
class _Sequence:
    """One sequence: everything so far, and what it still may do."""

    index: int
    ids: list[int]
    budget: int
    images_left: int
    limit: int
    emit: Callable[[InterleavedEvent], None]
    parts: list[Any] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    begins_image: bool = False
    was_refused: bool = False
    reason: str | None = None

    @property
    def num_images(self) -> int:
        return sum(not isinstance(part, list) for part in self.parts)

    def tell(self, kind: str, **content: Any) -> None:
        self.emit(InterleavedEvent(kind, self.index, **content))

    def end(self, reason: str) -> None:
        self.reason = "no_room" if self.was_refused and reason in ("eos", "length") else reason
        self.tell("end", reason=self.reason)

    def end_if_used_up(self) -> None:
        if self.reason is None and self.budget == 0:
            self.end("length")
        elif self.reason is None and len(self.ids) >= self.limit:
            self.end("context")


class _TextPhase(StoppingCriteria):
    """Takes in each token of text; a sequence is done when it begins a picture or ends."""

    def __init__(
        self,
        sequences: list[_Sequence],
        criteria: StoppingCriteriaList,
        settings: GenerationConfig,
        config: LiquidConfig,
    ) -> None:
        self.sequences, self.criteria, self.boi_token_id = sequences, criteria, config.boi_token_id
        self.eos_ids = eos_token_ids(settings)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        is_stopped = [False] * len(input_ids)
        if self.criteria:
            is_stopped = self.criteria(input_ids, scores).tolist()
        for one, token, stopped in zip(self.sequences, input_ids[:, -1].tolist(), is_stopped, strict=True):
            if one.reason is not None or one.begins_image:
                continue
            one.ids.append(token)
            if token == self.boi_token_id:
                one.begins_image = True
                one.tell("image_start", index=one.num_images)
            elif token in self.eos_ids:
                one.end("eos")
            else:
                one.budget -= 1
                if not one.parts or not isinstance(one.parts[-1], list):
                    one.parts.append([])
                one.parts[-1].append(token)
                one.tell("text", ids=[token])
                if stopped:
                    one.end("stopped")
                one.end_if_used_up()
        is_done = [one.reason is not None or one.begins_image for one in self.sequences]
        return torch.tensor(is_done, device=input_ids.device)


class _TextOrImage(LogitsProcessor):
    """Lets a text begin a picture where one is left and has room; other tokens of images never."""

    def __init__(self, model: LiquidForCausalLM, sequences: list[_Sequence], num_codes: int) -> None:
        self.suppress, self.boi = SuppressImageTokensLogitsProcessor(model.config), model.config.boi_token_id
        self.sequences, self.num_codes = sequences, num_codes

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        best, boi_scores = scores.argmax(-1).tolist(), scores[:, self.boi].clone()
        scores = self.suppress(input_ids, scores)
        for row, one in enumerate(self.sequences):
            has_room = len(one.ids) + self.num_codes + 2 <= one.limit
            if one.images_left and has_room:
                scores[row, self.boi] = boi_scores[row]
            elif one.images_left and best[row] == self.boi:
                one.was_refused = True
        return scores


class _Context:
    """What the model has read of the sequences, kept from phase to phase.

    Not on CUDA, where pictures have static caches of their own; not in half precision, where what is read at once is
    rounded otherwise than token by token, so that a picture drawn again alone would be another; nor for bases whose cache
    forgets, or against the caller's choice of a cache.

    Args:
        model ([`LiquidForCausalLM`]): The model.
        settings (list of `dict`): Of the text, of pictures, and other arguments of the call.
    """

    def __init__(self, model: LiquidForCausalLM, settings: list[dict[str, Any]]) -> None:
        self.new_cache = functools.partial(DynamicCache, config=model.config.get_text_config(decoder=True))
        self.device, self.padding, self.cache = model.device, None, self.new_cache()
        unchosen = {"use_cache": True} | dict.fromkeys(("cache_implementation", *CACHE_NAMES))
        is_chosen = any(one.get(name, value) != value for one in settings for name, value in unchosen.items())
        is_plain = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        self.is_kept = is_plain and not is_chosen and model.device.type != "cuda" and model.dtype == torch.float32

    def inputs(self, sequences: list[_Sequence]) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Ids and mask of the next phase's sequences, padded, and the cache that holds what they begin with, if any."""
        ids, mask = pad_left([one.ids for one in sequences], self.device)
        if not self.is_kept:
            return ids, {"attention_mask": mask}
        padding = [(one.index, ids.shape[1] - len(one.ids)) for one in sequences]
        # Not in it yet: the begin of an image, or the last code and the end. Another side longer than all of these
        # would have moved them.
        is_held = ids.shape[1] - self.cache.get_seq_length() == (1 if sequences[0].begins_image else 2)
        if padding != self.padding or not is_held:
            self.padding, self.cache = padding, self.new_cache()
        self.cache.reorder_cache(torch.arange(len(sequences)))  # of a picture, without the other sides of guidance
        return ids, {"attention_mask": mask, CACHE_NAME: self.cache}


def _write(
    model: LiquidForCausalLM,
    writing: list[_Sequence],
    context: _Context,
    config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    num_codes: int,
    model_kwargs: dict[str, Any],
) -> None:
    """Text of each of these sequences, until all have ended or begin a picture of `num_codes` codes."""
    ids, inputs = context.inputs(writing)
    config.max_new_tokens = max(min(one.budget, one.limit - len(one.ids)) for one in writing)
    GenerationMixin.generate(
        model,
        ids,
        generation_config=config,
        logits_processor=LogitsProcessorList([*logits_processor, _TextOrImage(model, writing, num_codes)]),
        stopping_criteria=StoppingCriteriaList([_TextPhase(writing, criteria, config, model.config)]),
        **inputs,
        **model_kwargs,
    )


def _draw(
    model: LiquidForCausalLM,
    drawing: list[_Sequence],
    context: _Context,
    settings: ImageGenerationConfig,
    generators: list[torch.Generator] | None,
    negatives: list[list[int]],
    criteria: StoppingCriteriaList,
) -> None:
    """The next picture of each of these sequences, which end with the begin of an image."""
    ids, inputs = context.inputs(drawing)
    inputs |= {"stopping_criteria": criteria, "may_lack_pictures": True}
    if negatives:
        given = pad_left([negatives[one.index] for one in drawing], model.device)
        inputs["negative_prompt_ids"], inputs["negative_prompt_attention_mask"] = given
    seeds: list[int | None] = [None] * len(drawing)
    if generators is not None:
        seeds = [picture_seed(generators[one.index].initial_seed(), one.num_images) for one in drawing]
        inputs["generator"] = [
            torch.Generator(generators[one.index].device).manual_seed(seed)
            for one, seed in zip(drawing, seeds, strict=True)
        ]
    height, width = model.config.grid(settings.height, settings.width)
    codes = model.config.image_layout.ids_to_codes(
        generate_image_tokens(model, ids, streamer=_PictureStreamer(drawing), generation_config=settings, **inputs)
    )
    if codes.shape[1] < height * width:
        for one in drawing:
            one.ids.pop()
            one.end("stopped")
        return
    pictures = model.decode_codes(codes.view(-1, height, width)).float().cpu()
    for row, (one, picture, its_codes) in enumerate(zip(drawing, pictures, codes, strict=True)):
        one.ids += [*model.config.image_layout.codes_to_ids(its_codes).tolist(), model.config.eoi_token_id]
        one.begins_image, one.images_left = False, one.images_left - 1
        one.seeds.append(seeds[row])
        one.tell("image", index=one.num_images, pixel_values=picture, seed=seeds[row])
        one.parts.append(picture)
        one.end_if_used_up()


@dataclass
class _PictureStreamer(BaseStreamer):
    """Tells each sequence of its new codes."""

    drawing: list[_Sequence]

    def put(self, value: torch.LongTensor) -> None:
        """The prompts: known."""

    def put_codes(self, codes: torch.LongTensor) -> None:
        for one, new in zip(self.drawing, codes, strict=True):
            one.tell("image_partial", index=one.num_images, codes=new)

    def end(self) -> None:
        """Nothing is kept back."""
