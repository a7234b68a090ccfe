"""The sequences of a batch of pictures, and the plain loop: one forward for all, guidance, filters, one draw a pair."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from ..utils.versions import CACHE_NAME
from .guidance import GuidanceLogitsProcessor


if TYPE_CHECKING:
    from ..models.liquid.modeling_liquid import LiquidForCausalLM
    from ..models.liquid.vocabulary import ImageLayout


logger = logging.get_logger(__name__)

# Base model types whose step did not compile in this process.
_NOT_COMPILABLE: set[str] = set()

# Those whose step compiles for a whole static cache only.
_NOT_GROWING: set[str] = set()

# A static cache longer than two such pieces is read by whole pieces, as many as hold something. None: always all of it.
CACHE_PIECE: int | None = 160

# That costs a second compilation, and is done for caches of at least this share of the bytes of the weights.
LARGE_CACHE = 0.25

# Positions whose noise is made at once. Fixed, since a generator of an accelerator gives other numbers in other blocks.
NOISE_BLOCK = 32


class GrowingStaticLayer(StaticLayer):
    """A static layer whose `max_cache_len` can be less than it stores: a forward attends to no more.

    What is behind has yet to be written and a mask would hide it: the result is the same, with less to read. It
    stores more than is ever read, since to the compiler a part is another case than the whole.
    """

    SPARE = 8

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys[:, :, : self.max_cache_len], values[:, :, : self.max_cache_len]


@dataclass
class ImageSequences:
    """The sequences of B pictures in the model, and what they are drawn with.

    Both loops know codes alone; here, at the door of the network, they become ids.

    Args:
        model ([`LiquidForCausalLM`]): A view whose logits are those of the codes
            ([`~LiquidForCausalLM.image_head_view`]).
        ids (`torch.LongTensor` of shape `(S, L)`): The prompts; S = B, or 2 B (3 B) with guidance: conditional, then
            (with the pictures of the context alone, then) unconditional.
        logits_processor, stopping_criteria, generation_config, kwargs: As prepared by `generate()`.
        guidance ([`GuidanceLogitsProcessor`], *optional*): Merges the halves.
        generator (`torch.Generator` or a list of B of them, *optional*): For the noise.
        streamer (`BaseStreamer`, *optional*): Gets the codes as they are drawn: see [`put_codes`].
        processors_see_ids (`bool`): Whether a logits processor may look at the ids; such a step is not compiled.
    """

    model: LiquidForCausalLM
    ids: torch.LongTensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    kwargs: dict[str, Any]
    guidance: GuidanceLogitsProcessor | None
    generator: torch.Generator | list[torch.Generator] | None
    streamer: BaseStreamer | None
    processors_see_ids: bool

    def __post_init__(self) -> None:
        self.num_pictures = len(self.ids) // (1 if self.guidance is None else self.guidance.num_sides)
        self.prompt_length = self.ids.shape[1]
        self.layout = self.model.config.image_layout
        self.num_codes = self.generation_config.max_length - self.prompt_length
        # A picture's length is fixed, and asking for it would make an accelerator wait.
        self.criteria = StoppingCriteriaList(
            one for one in self.stopping_criteria if not isinstance(one, MaxLengthCriteria)
        )
        self.base = self.model.config.get_text_config().model_type
        self.codes: torch.LongTensor | None = None

    @property
    def cache(self) -> Any:
        return self.kwargs.get(self.model.model._cache_argument)

    @property
    def picture_ids(self) -> torch.LongTensor:
        """Prompts and codes of every picture once, `(B, length)`: what processors and criteria see."""
        return self.ids[: self.num_pictures]

    def noise(self) -> Iterator[torch.Tensor | None]:
        """Gumbel noise `(B, 1, K * codebook_size)` of one position after another; `None` for greedy drawing."""
        if not self.generation_config.do_sample:
            yield from [None] * self.num_codes
            return
        width = self.layout.num_codebooks * self.layout.codebook_size
        yield from noise_by_position(self.generator, self.num_codes, self.num_pictures, width, self.ids.device)

    def start(self, prepare: Callable[[Cache], None] | None = None) -> ModelOutput:
        """Reads the prompts in one forward; of a cache that runs already, what it does not hold yet.

        Sequences with equal ids and masks are read once and get copies of their cache. `prepare` is called with the
        cache before.
        """
        cache, mask, settings = self.cache, self.kwargs.get("attention_mask"), self.generation_config
        if prepare is not None:
            prepare(cache)
        is_users = getattr(cache, "_is_user_defined", False)
        if not is_users and not settings.return_dict_in_generate:  # whoever gets a cache back goes on with the whole
            self._make_growing(cache)
        if is_users and cache.get_seq_length():
            # It holds the beginning of each prompt once. Unconditional sequences have no past: theirs is a copy of the
            # conditional one that their masks hide, but for the few tokens of their own, which all then read once more.
            of_prompts = torch.arange(self.num_pictures, device=self.ids.device) // (settings.num_return_sequences or 1)
            cache.reorder_cache(of_prompts.repeat(len(self.ids) // self.num_pictures))
            if self.guidance is not None:
                own = self.prompt_length if mask is None else int(mask[self.num_pictures :].sum(1).max())
                cache.crop(min(0, self.prompt_length - own - cache.get_seq_length()))

        sequences = torch.cat([self.ids, torch.ones_like(self.ids) if mask is None else mask], dim=1).tolist()
        distinct = {tuple(one): index for index, one in reversed(list(enumerate(sequences)))}
        firsts = sorted(distinct.values())
        records_all = settings.return_dict_in_generate and (settings.output_attentions or settings.output_hidden_states)
        if len(firsts) == len(sequences) or cache is None or is_users or records_all:
            return self.model._prefill(self.ids, settings, self.kwargs)

        first_kwargs = {
            name: value[firsts] if torch.is_tensor(value) and value.ndim and len(value) == len(self.ids) else value
            for name, value in self.kwargs.items()
        }
        outputs = self.model._prefill(self.ids[firsts], settings, first_kwargs)
        copies = torch.tensor([firsts.index(distinct[tuple(one)]) for one in sequences], device=self.ids.device)
        cache.reorder_cache(copies)
        for layer in cache.layers:
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                # The compiler has to hear again that the cache stays where it is.
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)
        outputs.logits = outputs.logits[copies.to(outputs.logits.device)]
        return outputs

    def _make_growing(self, cache: Cache | None) -> None:
        """Not sliding windows: beside them every length would be compiled anew."""
        layers = getattr(cache, "layers", [])
        if CACHE_PIECE is None or self.base in _NOT_GROWING or getattr(cache, "offloading", True):
            return
        if all(
            type(one) is StaticLayer and not one.is_initialized and one.max_cache_len > 2 * CACHE_PIECE
            for one in layers
        ):
            layers[:] = [GrowingStaticLayer(one.max_cache_len + GrowingStaticLayer.SPARE) for one in layers]

    @functools.cached_property
    def _is_cache_large(self) -> bool:
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return stored >= LARGE_CACHE * sum(weight.nbytes for weight in self.model.model.text_model.parameters())

    def grow_cache(self, length: int) -> None:
        """Before a forward that fills a growing cache up to `length`: it reads little more than that."""
        for layer in getattr(self.cache, "layers", []):
            if isinstance(layer, GrowingStaticLayer):
                most = layer.keys.shape[2] - layer.SPARE
                read = math.ceil(length / CACHE_PIECE) * CACHE_PIECE
                is_whole = self.base in _NOT_GROWING or not self._is_cache_large
                layer.max_cache_len = most if is_whole else min(read, most)

    def inputs(self) -> dict[str, Any]:
        """The arguments of the forward of one more code."""
        self.grow_cache(self.ids.shape[1])
        length = 1 if self.kwargs["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=length, **self.kwargs)
        return self.model.code_inputs(inputs, self.codes)

    def append(self, codes: torch.LongTensor, outputs: ModelOutput) -> None:
        """Takes in the codes of one more position, `(B, 1)`, or `(B, K, 1)` if it has K."""
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes], dim=-1)
        new_ids = self.layout.sequence_ids(codes).repeat(len(self.ids) // self.num_pictures, 1)
        self.ids = torch.cat([self.ids, new_ids], dim=1)

    def step_function(self, may_compile: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor, ModelOutput]]:
        """[`image_step`], compiled where transformers would compile a forward."""
        if self.processors_see_ids or not may_compile or self.base in _NOT_COMPILABLE:
            return image_step
        if not self.model._valid_auto_compile_criteria(self.kwargs, self.generation_config):
            return image_step
        config = self.generation_config.compile_config or self.model._default_compile_config()
        compiled = torch.compile(image_step, **config.to_dict())

        def compiled_or_plain_step(*args: Any) -> tuple[torch.Tensor, torch.Tensor, ModelOutput]:
            if self.base not in _NOT_COMPILABLE:
                try:
                    codes, scores, outputs = compiled(*args)
                    return codes.clone(), scores, outputs  # a CUDA graph writes each run's results to the same place
                except torch._dynamo.exc.TorchDynamoException as error:
                    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    if self.base not in _NOT_GROWING and isinstance(self.cache.layers[0], GrowingStaticLayer):
                        _NOT_GROWING.add(self.base)
                        logger.warning(
                            f"A step of {self.base} that reads a part of the cache did not compile ({reason})."
                        )
                        return image_step(*args)
                    _NOT_COMPILABLE.add(self.base)
                    logger.warning(
                        f"The decoding step of {self.base} did not compile, pictures are drawn without ({reason}). Pass "
                        "`disable_compile=True` to leave the attempt out."
                    )
            return image_step(*args)

        return compiled_or_plain_step


def sample_codes(sequences: ImageSequences) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """Draws the codes of all pictures, one position after the other.

    With a static cache on an accelerator everything from the forward to the draw is compiled into one graph.

    Args:
        sequences ([`ImageSequences`]): Of the pictures.

    Returns:
        Codes `(B, n)`, with K codes a position `(B, K, n)`; or a `GenerateDecoderOnlyOutput` with them as `sequences`.
    """
    config = sequences.generation_config
    recorded: dict[str, list[Any]] = {
        name: []
        for name in ("scores", "logits", "attentions", "hidden_states")
        if config.return_dict_in_generate and getattr(config, f"output_{name}")
    }
    step = sequences.step_function(may_compile=not recorded)
    guided = sequences.guidance, sequences.logits_processor

    for noise in sequences.noise():
        seen_ids = sequences.picture_ids if sequences.processors_see_ids else None
        if sequences.codes is None:
            outputs = sequences.start()
            codes, scores = sequences.model.draw_codes(outputs.logits[:, -1:], seen_ids, *guided, noise)
        else:
            codes, scores, outputs = step(sequences.model, sequences.inputs(), seen_ids, *guided, noise)
        sequences.append(codes, outputs)
        put_codes(sequences.streamer, codes, sequences.layout)
        for name, values in recorded.items():
            values.append(scores[:, 0] if name == "scores" else outputs[name])
        # Freed before the next forward, or two sets of outputs would be alive at once.
        del outputs
        if sequences.criteria and sequences.criteria(sequences.picture_ids, scores[:, 0]).all():
            break

    codes = sequences.codes
    if not config.return_dict_in_generate:
        return codes
    if "logits" in recorded:
        recorded["logits"] = [logits[:, -1].float() for logits in recorded["logits"]]
    return GenerateDecoderOnlyOutput(
        sequences=codes, **{CACHE_NAME: sequences.cache}, **{name: tuple(values) for name, values in recorded.items()}
    )


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
    return *model.draw_codes(outputs.logits, ids, guidance, logits_processor, noise), outputs


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
        logits (`torch.Tensor` of shape `(R, W, codebook_size)`): Of W positions; R = 2 B or 3 B with guidance, else B.
        ids (`torch.LongTensor`, *optional*): For logits processors that look at them.
        guidance ([`GuidanceLogitsProcessor`], *optional*): Merges the halves.
        logits_processor (`LogitsProcessorList`): See scores of shape `(B * W, codebook_size)`.
        noise (`torch.Tensor` of shape `(B, W, codebook_size)`, *optional*): Greedy without.

    Returns:
        Codes `(B, W)`, and the scores `(B, W, codebook_size)` that they were drawn from. The code is -1 where no score
        is the largest, since one is NaN or infinite: [`check_drawn`] looks for it once, not step by step.
    """
    _, width, codebook_size = logits.shape
    # Processors may work in place; the logits stay the model's.
    scores = logits.reshape(-1, codebook_size).to(dtype=torch.float32, copy=guidance is None)
    if guidance is not None:
        scores = guidance.guide(scores)
    scores = logits_processor(ids, scores).view(-1, width, codebook_size)
    noisy = scores if noise is None else scores + noise
    codes = noisy.argmax(-1)
    return codes.where(noisy.gather(-1, codes[..., None])[..., 0].isfinite(), -1), scores


def check_drawn(codes: torch.LongTensor) -> None:
    """Raises a `ValueError` that names the first of codes `(B, [K,] n)` that could not be drawn."""
    wrong = (codes < 0).nonzero().tolist()
    if wrong:
        picture, *_, position = wrong[0]
        raise ValueError(
            f"The scores of picture {picture} of the batch at position {position} are NaN or infinite, so no code can be drawn. Half "
            "precision may have overflowed (load the model in bfloat16 or float32), weights may be damaged, or a "
            "temperature or a logits processor leaves nothing to choose from."
        )


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


def noise_by_position(
    generator: torch.Generator | list[torch.Generator] | None, num_positions: int, *size: Any
) -> Iterator[torch.Tensor]:
    """[`gumbel_noise`], `(num_pictures, 1, codebook_size)` of one position after another."""
    for start in range(0, num_positions, NOISE_BLOCK):
        # A block at a time: each transfer would make the host wait for the accelerator, step by step.
        yield from gumbel_noise(generator, min(NOISE_BLOCK, num_positions - start), *size)[:, :, None]


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a sequence, from that of its generator: of the first one it is the same."""
    # By the golden ratio, in 32 bits: generators of the CPU look at no others.
    return seed if index == 0 else (seed + index * 0x9E3779B9) % 2**32


def put_codes(streamer: BaseStreamer | None, codes: torch.LongTensor, layout: ImageLayout) -> None:
    """Hands new codes `(B, [K,] n)` to a streamer: one of codes has a `put_codes`, to others they are ids `(B, [K])` by
    position."""
    if streamer is None or not codes.numel():
        return
    if hasattr(streamer, "put_codes"):
        streamer.put_codes(codes)
    else:
        for ids in layout.codes_to_ids(codes.cpu()).unbind(-1):
            streamer.put(ids)
