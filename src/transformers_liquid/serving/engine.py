"""Pictures of many requests side by side: each joins the batch and leaves it at any step.

A picture is the one that the pipeline draws for its seed, whoever is drawn beside it: its noise belongs to its seed and
its positions, its settings are its own, and its sequences keep their own masks and positions. Whoever comes is read apart,
in one forward, and moved into the cache of the others ([`JoinedCache`]), so that it waits for no one's end.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from ..generation.guidance import GuidanceLogitsProcessor
from ..generation.image_generation import guided_sequences, pad_left, unpadded
from ..generation.sampling import ImageSequences, check_drawn, draw_codes, noise_by_position
from ..generation.settings import FILTERS, ImageGenerationConfig
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..pipelines.streamers import partial_pictures
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.versions import CACHE_NAME


logger = logging.get_logger(__name__)

# What says how a picture looks; the others say how it is computed, which is the engine's to choose.
_OF_PICTURES = {"do_sample", *FILTERS, "renormalize_logits", "remove_invalid_values"}


class EngineFullError(RuntimeError):
    """More wait than may; `retry_after` seconds from now there may be room."""

    def __init__(self, waiting: str, retry_after: float) -> None:
        super().__init__(f"{waiting} are waiting already: try again in {retry_after:.0f} seconds.")
        self.retry_after = retry_after


@dataclass
class PictureEvent:
    """What just happened in a request.

    Args:
        type (`str`): `"partial"`, `"image"`, or `"error"`, which ends the request.
        index (`int`): Which picture of the request.
        image (`PIL.Image.Image`, *optional*): The picture; of `"partial"` grey where nothing is drawn yet.
        num_codes (`int`): Codes drawn so far.
        error (`Exception`, *optional*): What failed.
    """

    type: str
    index: int
    image: Image.Image | None = None
    num_codes: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class PictureRequest:
    """Pictures that were asked for together; iterating over it gives their events, up to the last picture.

    Args:
        num_pictures (`int`): How many.
        seeds (list of `int`): Of each.
        prompt_ids (`torch.LongTensor` of shape `(1, L)`): What they are drawn from, with the codes of its pictures.
        num_codes (`int`): Of each picture.
        tell (`Callable`, *optional*): Called in a thread of the engine with each [`PictureEvent`], in place of iterating.
    """

    num_pictures: int
    seeds: list[int]
    prompt_ids: torch.LongTensor
    num_codes: int
    tell: Callable[[PictureEvent], None] | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self._events: queue.Queue[PictureEvent | None] = queue.Queue()
        self.tell = self.tell or self._events.put

    def cancel(self) -> None:
        """Its pictures are dropped before the next step; nothing more is told, and iterating over it ends."""
        self.is_cancelled = True
        self._events.put(None)

    def __iter__(self) -> Iterator[PictureEvent]:
        done = 0
        while done < self.num_pictures and (event := self._events.get()) is not None:
            if event.error is not None:
                raise event.error
            yield event
            done += event.type == "image"


@dataclass(eq=False)
class _Picture:
    """One picture, from the request to its last code."""

    request: PictureRequest
    index: int
    generator: torch.Generator
    guidance: GuidanceLogitsProcessor | None
    prompts: list[list[int]]  # of each side of guidance
    settings: ImageGenerationConfig
    previews: set[int]
    drawn: list[torch.LongTensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.filters = {name: value for name, value in self.settings.of_transformers.items() if name in _OF_PICTURES}
        # Pictures that have the same are read together, and their codes are drawn together.
        of_guidance = ("guidance_scale", "guidance_min_p", "image_guidance_scale")
        values = [getattr(self.settings, name) for name in of_guidance]
        self.kind = (len(self.prompts), *values, *sorted(self.filters.items()))


class JoinedCache:
    """The cache of sequences that join and leave: all end together, a shorter one begins with padding.

    So one forward serves them all, and windows of sliding attention stay what they are. It is never longer than its
    longest sequence.

    Args:
        model ([`LiquidForCausalLM`]): Reads from it.
    """

    def __init__(self, model: LiquidForCausalLM) -> None:
        self.model = model
        self.lengths: list[int] = []
        self.cache: Cache | None = None

    def join(self, cache: Cache, lengths: list[int]) -> None:
        """Takes in sequences of these lengths, behind the others."""
        if not self.lengths:
            self.cache = cache
        for mine, new in zip(self.cache.layers, cache.layers, strict=True) if self.lengths else ():
            width = max(mine.keys.shape[2], new.keys.shape[2])
            for name in ("keys", "values"):
                both = [getattr(layer, name) for layer in (mine, new)]
                padded = [torch.nn.functional.pad(one, (0, 0, width - one.shape[2], 0)) for one in both]
                setattr(mine, name, torch.cat(padded))
        self.lengths += lengths
        self._trim()

    def keep(self, indices: list[int]) -> None:
        """All other sequences leave."""
        self.cache.reorder_cache(torch.tensor(indices, dtype=torch.long))
        self.lengths = [self.lengths[index] for index in indices]
        self._trim()

    def _trim(self) -> None:
        longest = max(self.lengths, default=0)
        for layer in self.cache.layers:
            width = min(longest, layer.keys.shape[2])
            start = layer.keys.shape[2] - width
            # Contiguous: to the compiler anything else is another case.
            layer.keys, layer.values = (one[:, :, start:].contiguous() for one in (layer.keys, layer.values))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = longest

    def forward(self, ids: torch.LongTensor, call: Callable[..., Any]) -> torch.Tensor:
        """The logits `(S, 1, codebook_size)` behind one more id of each sequence, `(S, 1)`; `call` is the model's forward."""
        longest = max(self.lengths) + 1
        lengths = torch.tensor(self.lengths)[:, None]
        mask = (torch.arange(longest) >= longest - 1 - lengths).long().to(ids.device, non_blocking=True)
        inputs = {self.model.model._cache_argument: self.cache, "use_cache": True, "attention_mask": mask}
        inputs["position_ids"] = lengths.to(ids.device, non_blocking=True)
        self.lengths = [length + 1 for length in self.lengths]
        return call(**self.model.prepare_inputs_for_generation(ids, **inputs), return_dict=True).logits


class PictureEngine:
    """Draws pictures in threads of its own, which others ask from any thread.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): What checks requests and draws; its model is not to be changed meanwhile.
        slots (`int`, defaults to 8): Pictures that are drawn side by side.
        max_waiting (`int`, defaults to 64): Pictures that may wait for them.
        compile (`bool`, defaults to `False`): Whether the step is compiled, before the first picture, which takes a minute or
            so: once for all numbers and lengths of sequences. Needs a C++ compiler on a CPU.

    Raises:
        ValueError: If the base's cache cannot be moved, as the state of mamba; or with `compile`, if it has sliding windows.

    Example:

    ```python
    >>> engine = PictureEngine(pipe, slots=16)
    >>> engine("red apple", seed=3)[0].save("apple.png")
    >>> for event in engine.submit("a cat", num_images_per_prompt=2, partial_images=3):
    ...     event.image.save(f"cat-{event.index}-{event.num_codes}.png")
    >>> engine.close()
    ```
    """

    def __init__(
        self, pipe: LiquidImageGenerationPipeline, slots: int = 8, max_waiting: int = 64, compile: bool = False
    ) -> None:
        for name, value in (("slots", slots), ("max_waiting", max_waiting)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        pipe.model.config.image_layout.check_one_code("pictures do not join a batch that runs: use the pipeline.")
        layers = DynamicCache(config=pipe.model.config.get_text_config(decoder=True)).layers
        kinds = {type(layer) for layer in layers}
        if kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise ValueError(
                f"Pictures join a batch by moving their caches, and one of {', '.join(kind.__name__ for kind in kinds)} "
                "cannot be moved: draw with the pipeline."
            )
        if compile and kinds != {DynamicLayer}:
            raise ValueError(
                "The step of a base with sliding windows would be compiled at every length: leave out compile."
            )
        self.pipe, self.slots, self.max_waiting = pipe, slots, max_waiting
        # With AMX that takes half the time, and no one sees it (see [`LiquidVQModel.decode_codes`]).
        has_amx = pipe.model.device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
        self.preview_dtype = torch.bfloat16 if has_amx else None
        self.view = pipe.model.image_head_view()
        self.forward = torch.compile(self.view.forward, dynamic=True) if compile else self.view
        self.cache = JoinedCache(self.view)
        self.running: list[_Picture] = []
        self.waiting: deque[_Picture] = deque()
        # What was done so far; seconds from a picture's begin to its end.
        self.num_codes = self.num_steps = self.num_pictures = 0
        self.num_seconds = 0.0
        self._changed, self._is_closed = threading.Condition(), False
        # One thread draws, another one decodes what is to be shown, so that no step waits for a preview.
        self._shown: queue.Queue[tuple[list[_Picture], torch.LongTensor] | None] = queue.Queue(slots)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._show)]
        for thread in self._threads:
            thread.start()

    def __call__(self, prompt: str, **settings: Any) -> list[Image.Image]:
        """The pictures of a request, whole: see [`~PictureEngine.submit`]."""
        done = {event.index: event.image for event in self.submit(prompt, **settings) if event.type == "image"}
        return [done[index] for index in sorted(done)]

    def submit(
        self,
        prompt: str,
        partial_images: int = 0,
        tell: Callable[[PictureEvent], None] | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> PictureRequest:
        """Asks for pictures of one prompt.

        Args:
            prompt (`str`): What they show.
            partial_images (`int`, defaults to 0): How often each is shown before it is done, evenly. Each costs one decoding
                of the codec.
            tell (`Callable`, *optional*): Gets the events: see [`PictureRequest`].
            seed (`int`, *optional*): Picture i is that of `seed + i`. Any unless given.
            settings: As in [`~LiquidImageGenerationPipeline.__call__`]: `num_images_per_prompt`, `image`,
                `negative_prompt`, `height`, `width`, `guidance_scale`, `temperature`, ... What changes only how a picture
                is computed, `speculative`, is of no effect.

        Returns:
            [`PictureRequest`].

        Raises:
            ValueError: On what cannot be met, at once.
            EngineFullError: If too many pictures wait.
            RuntimeError: If the engine is closed.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string, got {prompt!r}.")
        if type(partial_images) is not int or partial_images < 0:
            raise ValueError(f"partial_images must be a whole number of at least 0, got {partial_images!r}.")
        seed = random.randrange(2**31) if seed is None else seed
        config = self.pipe.model.config
        batches, checked, after, others = self.pipe.prepare(prompt, seed=seed, **{**settings, "batch_size": 1})
        refused = (checked.of_transformers.keys() & settings.keys()) - _OF_PICTURES | after.keys() | others.keys()
        if refused:
            raise ValueError(f"The picture engine takes no {', '.join(sorted(refused))}: leave it out.")
        batches.sort(key=lambda batch: batch["indices"])
        num_codes, one = checked.num_codes(config), batches[0]
        negative = one["negative_prompt_ids"], one["negative_prompt_attention_mask"]
        sides = (one["input_ids"], one["attention_mask"]), negative, checked
        guidance, ids_and_mask = guided_sequences(config, *sides, may_lack_pictures=False)
        generators = [batch["generator"][0] for batch in batches]
        seeds = [generator.initial_seed() for generator in generators]
        request = PictureRequest(len(batches), seeds, one["input_ids"], num_codes, tell)
        previews = {round(num_codes * (one + 1) / (partial_images + 1)) for one in range(partial_images)} - {
            0,
            num_codes,
        }
        same = guidance, unpadded(*ids_and_mask), checked, previews
        pictures = [_Picture(request, index, generator, *same) for index, generator in enumerate(generators)]
        with self._changed:
            if self._is_closed:
                raise RuntimeError("The engine is closed.")
            if len(self.waiting) + len(pictures) > self.max_waiting:
                pace = self.num_seconds / max(1, self.num_pictures) / self.slots
                raise EngineFullError(f"{len(self.waiting)} pictures", max(1.0, pace * len(self.waiting)))
            self.waiting.extend(pictures)
            self._changed.notify()
        return request

    @property
    def is_alive(self) -> bool:
        """Whether it draws."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Takes no more requests, and returns when those that it has are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()

    # In the thread that draws

    @torch.no_grad()
    def _run(self) -> None:
        if self.forward is not self.view:
            self._compile()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.running or self._is_closed)
                is_over = not (self.waiting or self.running)
            if is_over:
                return self._shown.put(None)
            try:
                self._leave([one for one in self.running if one.request.is_cancelled])
                if self.running:
                    self._step()
                self._admit()
                self._hand_over()
            except Exception as error:  # such as a lack of memory: those who are drawn hear of it, and it goes on
                logger.exception("A step of the picture engine failed.")
                for one in self.running:
                    self._fail(one, error)
                self.running, self.cache = [], JoinedCache(self.view)

    def _compile(self) -> None:
        """One step of other numbers than a base has of heads or their dimensions, which the compiler would take for one."""
        ids = torch.full((13, 17), self.view.config.boi_token_id, device=self.view.device)
        cache = JoinedCache(self.view)
        cache.join(self.view(ids, use_cache=True, return_dict=True)[CACHE_NAME], [17] * 13)
        try:
            cache.forward(ids[:, :1], self.forward)
        except torch._dynamo.exc.TorchDynamoException as error:
            logger.warning(
                f"The step did not compile, pictures are drawn without: {str(error).strip().splitlines()[0]}"
            )
            self.forward = self.view

    def _fail(self, picture: _Picture, error: Exception) -> None:
        if not picture.request.is_cancelled:
            picture.request.is_cancelled = True
            picture.request.tell(PictureEvent("error", picture.index, error=error))

    def _admit(self) -> None:
        """Those who wait take the free slots."""
        new: list[_Picture] = []
        with self._changed:
            while self.waiting and len(self.running) + len(new) < self.slots:
                picture = self.waiting.popleft()
                new += [picture] * (not picture.request.is_cancelled)
        for pictures in _grouped(new, lambda one: one.kind):
            try:
                cache = self._read(pictures)
            except Exception as error:
                for one in pictures:
                    self._fail(one, error)
                continue
            self.running += pictures
            self.cache.join(cache, [len(prompt) for one in pictures for prompt in one.prompts])
            self._arrange()

    def _read(self, pictures: list[_Picture]) -> Cache:
        """Their prompts in one forward, prepared by transformers as the pipeline's are, and the first code of each."""
        first = pictures[0]
        ids, mask = pad_left([prompt for one in pictures for prompt in one.prompts], self.view.device)

        def read(view, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
            prepared_by_generate = input_ids, logits_processor, stopping_criteria, generation_config, prepared
            sequences = ImageSequences(view, *prepared_by_generate, first.guidance, None, None, False)
            logits, codebook_size = sequences.start().logits[:, -1:], sequences.layout.codebook_size
            for one in pictures:
                one.began_at, one.logits_processor = time.monotonic(), logits_processor
                size = one.request.num_codes, 1, codebook_size
                of_positions = noise_by_position([one.generator], *size, view.device)
                one.noise = of_positions if generation_config.do_sample else itertools.repeat(None)
            self._draw(pictures, logits.unflatten(0, (len(pictures), -1)).transpose(0, 1).flatten(0, 1))
            return sequences.cache

        settings = GenerationConfig(max_new_tokens=1, **first.filters)
        return GenerationMixin.generate(
            self.view, ids, attention_mask=mask, generation_config=settings, custom_generate=read
        )

    def _draw(self, pictures: list[_Picture], logits: torch.Tensor) -> None:
        """The next code of pictures of one kind; logits of their conditional sequences, then of each other side."""
        noise = [next(one.noise) for one in pictures]
        noise = None if noise[0] is None else torch.cat(noise)
        codes, _ = draw_codes(logits, None, pictures[0].guidance, pictures[0].logits_processor, noise)
        for one, code in zip(pictures, codes, strict=True):
            one.drawn.append(code)
        self.num_codes += len(pictures)

    def _leave(self, pictures: list[_Picture]) -> None:
        if not pictures:
            return
        kept = [one for one in self.running if one not in pictures]
        if kept:
            self.cache.keep([index for one in kept for index in self._places(one)])
        else:
            self.cache = JoinedCache(self.view)
        self.running = kept
        self._arrange()

    def _places(self, picture: _Picture) -> range:
        """Which of the cache's sequences are a picture's."""
        start = sum(len(one.prompts) for one in self.running[: self.running.index(picture)])
        return range(start, start + len(picture.prompts))

    def _arrange(self) -> None:
        """Pictures by their settings, with the places of their conditional sequences, then of those of each other side."""
        self.groups = []
        for pictures in _grouped(self.running, lambda one: one.kind):
            places = torch.tensor([[*self._places(one)] for one in pictures])
            self.groups.append((pictures, places.T.flatten().to(self.view.device)))

    def _step(self) -> None:
        """One more code of every picture, in one forward."""
        last = [one.drawn[-1].expand(len(one.prompts)) for one in self.running]
        ids = self.view.config.image_layout.codes_to_ids(torch.cat(last))[:, None]
        # A single sequence would be compiled anew.
        logits = self.cache.forward(ids, self.forward if len(ids) > 1 else self.view)
        for pictures, places in self.groups:
            self._draw(pictures, logits[places])
        self.num_steps += 1

    def _hand_over(self) -> None:
        """Codes of previews that are due, and of pictures that are done, which leave."""
        done = [one for one in self.running if len(one.drawn) == one.request.num_codes]
        due = [*(one for one in self.running if len(one.drawn) in one.previews), *done]
        self._leave(done)
        # The codec decodes those of one size together.
        for pictures in _grouped(due, lambda one: (len(one.drawn), one.settings.height, one.settings.width)):
            self._shown.put((pictures, torch.stack([torch.cat(one.drawn) for one in pictures])))
        if done:  # whoever is told of them asks for the next ones, which are to be drawn side by side as these were
            self._shown.join()

    # In the thread that decodes

    @torch.no_grad()
    def _show(self) -> None:
        while (handed := self._shown.get()) is not None:
            pictures, codes = handed
            try:
                self._tell(pictures, codes)
            except Exception as error:
                logger.exception("Pictures could not be decoded.")
                for one in pictures:
                    self._fail(one, error)
            finally:
                self._shown.task_done()

    def _tell(self, pictures: list[_Picture], codes: torch.LongTensor) -> None:
        """Pictures of equal size and equally many codes `(B, n)` as events of their requests."""
        wanted = []
        for index, one in enumerate(pictures):
            try:
                check_drawn(codes[[index]])
            except ValueError as error:
                self._fail(one, error)
            wanted += [index] * (not one.request.is_cancelled)
        if not wanted:
            return
        number, first = codes.shape[1], pictures[0]
        is_done = number == first.request.num_codes
        ids = self.view.config.image_layout.codes_to_ids(codes[wanted])
        dtype = None if is_done else self.preview_dtype
        images = partial_pictures(self.pipe.model, ids, first.settings.height, first.settings.width, dtype)
        self.num_pictures += len(images) * is_done
        for index, image in zip(wanted, images, strict=True):
            one = pictures[index]
            self.num_seconds += (time.monotonic() - one.began_at) * is_done
            if not one.request.is_cancelled:
                one.request.tell(PictureEvent("image" if is_done else "partial", one.index, image, number))


def _grouped(pictures: list[_Picture], key: Callable[[_Picture], tuple]) -> Iterable[list[_Picture]]:
    """Lists of those with equal keys, in their order."""
    groups: dict[tuple, list[_Picture]] = {}
    for one in pictures:
        groups.setdefault(key(one), []).append(one)
    return groups.values()
