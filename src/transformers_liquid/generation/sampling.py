"""The image decoding loop: one forward for all rows of a batch, guidance, filters, one draw for both rows of a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging


if TYPE_CHECKING:
    from ..models.liquid.modeling_liquid import LiquidForCausalLM
    from .image_generation import GuidanceLogitsProcessor


logger = logging.get_logger(__name__)

# Base model types whose step did not compile in this process.
_NOT_COMPILABLE: set[str] = set()

# Positions whose noise is made at once. Fixed, since a generator of an accelerator gives other numbers in other blocks.
NOISE_BLOCK = 32


def sample_image_tokens(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    guidance: GuidanceLogitsProcessor | None = None,
    guided: range | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    image_streamer: BaseStreamer | None = None,
    processors_see_ids: bool = True,
    **model_kwargs: Any,
) -> ModelOutput | torch.LongTensor:
    """The image decoding loop: one forward for all rows, guidance, filters, one draw for both rows of a pair.

    With a static cache on an accelerator everything from the forward to the draw is compiled into one graph.

    Args:
        model ([`LiquidForCausalLM`]): A view whose logits are those of the codes
            ([`~LiquidForCausalLM.image_head_view`]).
        input_ids (`torch.LongTensor` of shape `(R, L)`): R = B, or 2 B with guidance: conditional, then unconditional.
        logits_processor, stopping_criteria, generation_config, model_kwargs: As prepared by `generate()`.
        guidance ([`GuidanceLogitsProcessor`], *optional*): Merges the halves.
        guided (`range`, *optional*): The codes that are drawn with guidance. Defaults to all.
        generator (`torch.Generator` or a list of B of them, *optional*): For the noise.
        image_streamer (`BaseStreamer`, *optional*): Receives the B new ids of every step.
        processors_see_ids (`bool`, defaults to `True`): Whether a logits processor may look at the ids; such a step
            is not compiled.

    Returns:
        `torch.LongTensor` of shape `(B, new ids)`, or a `GenerateDecoderOnlyOutput`.
    """
    rows = ImageRows(model, input_ids, generation_config, model_kwargs, guidance, guided)
    recorded: dict[str, list[Any]] = {
        name: []
        for name in ("scores", "logits", "attentions", "hidden_states")
        if _is_recorded(name, generation_config)
    }
    step = rows.step_function(may_compile=not recorded and not processors_see_ids)
    criteria = without_max_length(stopping_criteria)
    drawn = input_ids[: rows.num_pictures, :0]

    for position in range(rows.num_codes):
        noise = rows.noise(position, generator)
        if rows.must_start(position):
            outputs = rows.start(position, drawn)
            ids = rows.ids[: rows.num_pictures]
            codes, scores = draw_codes(outputs.logits[:, -1:], ids, rows.guidance, logits_processor, noise)
        else:
            inputs = rows.inputs(position)
            ids = rows.ids[: rows.num_pictures] if processors_see_ids else None
            codes, scores, outputs = step(model, inputs, ids, rows.guidance, logits_processor, noise)
        new_ids = codes + model.config.image_token_offset
        drawn = torch.cat([drawn, new_ids], dim=1)
        rows.append(new_ids, outputs)
        if image_streamer is not None:
            image_streamer.put(new_ids[:, 0].cpu())
        for name, values in recorded.items():
            values.append(scores[:, 0] if name == "scores" else outputs[name])
        # Freed before the next forward, or two sets of outputs would be alive at once.
        del outputs
        if criteria and criteria(rows.ids[: rows.num_pictures], scores[:, 0]).all():
            break

    if image_streamer is not None:
        image_streamer.end()
    if not generation_config.return_dict_in_generate:
        return drawn
    if "logits" in recorded:
        recorded["logits"] = [logits[:, -1].float() for logits in recorded["logits"]]
    return GenerateDecoderOnlyOutput(
        sequences=drawn, past_key_values=rows.cache, **{name: tuple(values) for name, values in recorded.items()}
    )


class ImageRows:
    """The rows of B pictures in the model: their ids, masks and cache, and whether unconditional rows run.

    Conditional rows always run, unconditional ones only where guidance applies.

    Args:
        model, input_ids, generation_config, model_kwargs, guidance, guided: As for [`sample_image_tokens`].
    """

    def __init__(
        self,
        model: LiquidForCausalLM,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        guidance: GuidanceLogitsProcessor | None,
        guided: range | None,
    ) -> None:
        self.model, self.generation_config = model, generation_config
        self.prompts, self.prompt_kwargs = input_ids, model_kwargs
        self.num_pictures = len(input_ids) // 2 if guidance is not None else len(input_ids)
        self.num_codes = generation_config.max_length - input_ids.shape[1]
        self.all_guided = range(self.num_codes) if guided is None else guided
        self.when_guided = guidance
        self.noise_ahead: list[torch.Tensor] = []
        # Of the rows that run now.
        self.guidance: GuidanceLogitsProcessor | None = None
        self.ids, self.kwargs = input_ids, model_kwargs

    @property
    def cache(self) -> Any:
        return self.kwargs.get(self.model.model._cache_argument)

    def noise(self, position: int, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor | None:
        """Gumbel noise of a position, `(B, 1, codebook_size)`, asked for one after another; none for greedy drawing."""
        if not self.generation_config.do_sample:
            return None
        if not self.noise_ahead:
            # A block at a time: each transfer would make the host wait for the accelerator, step by step.
            number = min(NOISE_BLOCK, self.num_codes - position)
            size = number, self.num_pictures, self.model.config.codebook_size
            self.noise_ahead = list(gumbel_noise(generator, *size, self.ids.device))
        return self.noise_ahead.pop(0)[:, None]

    def is_guided(self, position: int) -> bool:
        return self.when_guided is not None and position in self.all_guided

    def must_start(self, position: int) -> bool:
        """Whether the rows of a position have no cache yet: at the first code, and where guidance sets in."""
        return position == 0 or (self.is_guided(position) and self.guidance is None)

    def next_change(self, position: int) -> int:
        """Where guidance sets in or ends next, or the picture ends."""
        changes = {self.all_guided.start, self.all_guided.stop} if self.when_guided is not None else set()
        return min(change for change in changes | {self.num_codes} if change > position)

    def start(
        self, position: int, drawn: torch.LongTensor, prepare: Callable[[Cache], None] | None = None
    ) -> ModelOutput:
        """Runs the prompts and the ids drawn so far, `(B, n)`, in one forward; equal rows run once.

        `prepare` is called with the empty cache.
        """
        running = slice(None) if self.is_guided(position) else slice(self.num_pictures)
        self.guidance = self.when_guided if self.is_guided(position) else None
        self.kwargs = _select_rows(self.prompt_kwargs, len(self.prompts), running)
        prompts = self.prompts[running]
        self.ids = torch.cat([prompts, drawn.repeat(len(prompts) // self.num_pictures, 1)], dim=1)
        if position > 0:
            self.kwargs.pop(self.model.model._cache_argument, None)
            self.kwargs = self.model._update_model_kwargs_for_generation({}, self.kwargs, num_new_tokens=position)
            max_cache_length = self.generation_config.max_length - 1
            self.model._prepare_cache_for_generation(
                self.generation_config, self.kwargs, None, len(self.ids), max_cache_length
            )
        if prepare is not None:
            prepare(self.cache)
        return _shared_prefill(self.model, self.ids, self.generation_config, self.kwargs)

    def inputs(self, position: int) -> dict[str, Any]:
        """The arguments of the forward of one more code. Unconditional rows end where guidance does."""
        if self.guidance is not None and not self.is_guided(position):
            self.drop_unconditional()
        length = 1 if self.kwargs["use_cache"] else None
        return self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=length, **self.kwargs)

    def drop_unconditional(self) -> None:
        conditional = slice(self.num_pictures)
        self.kwargs = _select_rows(self.kwargs, len(self.ids), conditional)
        self.ids, self.guidance = self.ids[conditional], None
        if self.cache is not None:
            self.cache.reorder_cache(torch.arange(self.num_pictures, device=self.ids.device))
            _mark_static(self.cache)

    def append(self, new_ids: torch.LongTensor, outputs: ModelOutput) -> None:
        """Takes in the new ids, `(B, 1)`."""
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.ids = torch.cat([self.ids, new_ids.repeat(len(self.ids) // self.num_pictures, 1)], dim=1)

    def step_function(self, may_compile: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor, ModelOutput]]:
        """[`image_step`], compiled where transformers would compile a forward."""
        base = self.model.config.get_text_config().model_type
        if not may_compile or base in _NOT_COMPILABLE:
            return image_step
        if not self.model._valid_auto_compile_criteria(self.prompt_kwargs, self.generation_config):
            return image_step
        config = self.generation_config.compile_config or self.model._default_compile_config()
        return functools.partial(_compiled_or_plain_step, torch.compile(image_step, **config.to_dict()), base)


def image_step(
    model: LiquidForCausalLM,
    inputs: dict[str, Any],
    ids: torch.LongTensor | None,
    guidance: GuidanceLogitsProcessor | None,
    logits_processor: LogitsProcessorList,
    noise: torch.Tensor | None,
) -> tuple[torch.LongTensor, torch.Tensor, ModelOutput]:
    """One forward and [`draw_codes`]; what is compiled into one graph."""
    outputs = model(**inputs, return_dict=True)
    return *draw_codes(outputs.logits, ids, guidance, logits_processor, noise), outputs


def draw_codes(
    logits: torch.Tensor,
    ids: torch.LongTensor | None,
    guidance: GuidanceLogitsProcessor | None,
    logits_processor: LogitsProcessorList,
    noise: torch.Tensor | None,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Guidance, filters, and a draw by Gumbel-argmax: the code with the largest score plus noise.

    The noise alone decides by chance, so equal logits and equal noise give equal codes, however they are computed.

    Args:
        logits (`torch.Tensor` of shape `(R, W, codebook_size)`): Of W positions; R = 2 B with guidance, else B.
        ids (`torch.LongTensor`, *optional*): For logits processors that look at them.
        guidance ([`GuidanceLogitsProcessor`], *optional*): Merges the halves.
        logits_processor (`LogitsProcessorList`): See scores of shape `(B * W, codebook_size)`.
        noise (`torch.Tensor` of shape `(B, W, codebook_size)`, *optional*): Greedy without.

    Returns:
        Codes `(B, W)`, and the scores `(B, W, codebook_size)` that they were drawn from.
    """
    _, width, codebook_size = logits.shape
    # Processors may work in place; the logits stay the model's.
    scores = logits.reshape(-1, codebook_size).to(dtype=torch.float32, copy=guidance is None)
    if guidance is not None:
        scores = guidance.guide(scores)
    scores = logits_processor(ids, scores).view(-1, width, codebook_size)
    return (scores if noise is None else scores + noise).argmax(-1), scores


def gumbel_noise(
    generator: torch.Generator | list[torch.Generator] | None,
    num_positions: int,
    num_pictures: int,
    codebook_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Standard Gumbel noise `(num_positions, num_pictures, codebook_size)`: what a draw by argmax adds to the scores.

    A list of generators gives each picture its own, so that it does not depend on its batch; generators of the CPU
    give the same noise on any device, and in blocks the same as position by position.
    """
    if isinstance(generator, list):
        size = num_positions, codebook_size
        uniform = torch.stack([torch.rand(size, generator=one, device=one.device) for one in generator], dim=1)
    else:
        source = device if generator is None else generator.device
        uniform = torch.rand(num_positions, num_pictures, codebook_size, generator=generator, device=source)
    if uniform.device != device and device.type == "cuda":
        uniform = uniform.pin_memory()  # else the copy below would wait for all work before it
    uniform = uniform.to(device, non_blocking=True)
    # A uniform of 0 gives -inf: that code is not drawn. 1 does not occur.
    return -torch.log(-torch.log(uniform))


def without_max_length(stopping_criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    """The criteria that are worth asking: a picture's length is fixed, and asking makes an accelerator wait."""
    return StoppingCriteriaList(one for one in stopping_criteria if not isinstance(one, MaxLengthCriteria))


def _shared_prefill(
    model: LiquidForCausalLM,
    input_ids: torch.LongTensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> ModelOutput:
    """The first forward, of shape `(R, L)`. Rows with equal ids and masks run once and get copies of their cache."""
    mask = model_kwargs.get("attention_mask")
    rows = torch.cat([input_ids, torch.ones_like(input_ids) if mask is None else mask], dim=1).tolist()
    distinct = {tuple(row): index for index, row in reversed(list(enumerate(rows)))}
    firsts = sorted(distinct.values())
    cache = model_kwargs.get(model.model._cache_argument)
    records_rows = generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    )
    if len(firsts) == len(rows) or cache is None or getattr(cache, "_is_user_defined", False) or records_rows:
        return model._prefill(input_ids, generation_config, model_kwargs)

    first_kwargs = _select_rows(model_kwargs, len(rows), firsts)
    outputs = model._prefill(input_ids[firsts], generation_config, first_kwargs)
    copies = torch.tensor([firsts.index(distinct[tuple(row)]) for row in rows], device=input_ids.device)
    cache.reorder_cache(copies)
    _mark_static(cache)
    outputs.logits = outputs.logits[copies.to(outputs.logits.device)]
    return outputs


def _select_rows(model_kwargs: dict[str, Any], num_rows: int, rows: slice | list[int]) -> dict[str, Any]:
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == num_rows else value
        for name, value in model_kwargs.items()
    }


def _mark_static(cache: Cache) -> None:
    """Tells the compiler again that a static cache stays where it is, after its rows were copied."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and layer.is_initialized:
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)


def _compiled_or_plain_step(
    compiled: Callable, base: str, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, ModelOutput]:
    if base not in _NOT_COMPILABLE:
        try:
            return compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            _NOT_COMPILABLE.add(base)
            reason = str(error).strip().splitlines()[0]
            logger.warning(
                f"The decoding step of {base} did not compile, pictures are drawn without ({type(error).__name__}: "
                f"{reason}). Pass `disable_compile=True` to leave the attempt out."
            )
    return image_step(*args)


def _is_recorded(name: str, generation_config: GenerationConfig) -> bool:
    return bool(generation_config.return_dict_in_generate and getattr(generation_config, f"output_{name}"))
