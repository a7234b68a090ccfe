"""A conversation with text and pictures on both sides: messages in, ordered parts out, as they come if you like."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..generation.interleaved import InterleavedEvent
from ..models.liquid.image_processing_liquid import is_column
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.liquid.processing_liquid import LiquidProcessor
from .streamers import partial_pictures


class LiquidConversation:
    """Answers messages with text and pictures by turns.

    Args:
        model ([`LiquidForCausalLM`]): The model.
        processor ([`LiquidProcessor`]): Its processor.

    Example:

    ```python
    >>> converse = LiquidConversation(model, processor)
    >>> messages = [{"role": "user", "content": "Tell me a story about a cat."}]
    >>> reply = converse(messages, max_images=2, seed=0)
    >>> messages.append({"role": "assistant", "content": reply})  # to go on
    ```
    """

    def __init__(self, model: LiquidForCausalLM, processor: LiquidProcessor) -> None:
        processor.check_fits(model.config)
        self.model, self.processor = model, processor

    def __call__(self, messages: str | Sequence[dict[str, Any]], **kwargs: Any) -> list[dict[str, Any]]:
        """The reply, whole.

        Args:
            messages (list of `dict`): With `role` and `content`: a string, or parts `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}` with anything that the image processor loads. Or a `str`, which is to be
                continued as it stands.
            kwargs: `seed` (`int`) of the pictures, and what [`~LiquidForCausalLM.generate`] knows in interleaved mode:
                `max_new_tokens`, `max_images`, `height`, `guidance_scale`, `do_sample`, ...

        Returns:
            Parts as above, in order; a message's content. Pictures are `PIL.Image.Image`.

        Raises:
            ValueError: On messages or settings that cannot be met, before any work.
        """
        parts: list[dict[str, Any]] = []
        for event in self.stream(messages, **kwargs):
            add_event(parts, event)
        return parts

    def stream(
        self,
        messages: str | Sequence[dict[str, Any]],
        seed: int | None = None,
        every: int | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        """The reply as it comes. Closing the iterator stops the model within a step.

        Args:
            messages: As in a call.
            seed (`int`, *optional*): Of the first picture; those of later ones follow from it.
            every (`int`, *optional*): Codes from one preview of a picture to the next, each of which costs one decoding of
                the codec. Without it there are none.
            negative_prompt (`str`, *optional*): What pictures should not show.
            height (`int`, *optional*): Of pictures in pixels; defaults to the model's size.
            width (`int`, *optional*): Likewise.
            kwargs: As in a call.

        Returns:
            An iterator of `{"type": "text", "text": new text}`, `{"type": "image_start", "index": j}`, `{"type":
            "image_partial", "index": j, "image": preview, "num_codes": k}`, `{"type": "image", "index": j, "image":
            picture, "seed": seed or None}` and at last `{"type": "end", "reason": as in InterleavedOutput}`.

        Raises:
            ValueError: As in a call, at once.
        """
        ours = kwargs.keys() & {"streamer", "generation_mode", *(["generator"] if seed is not None else [])}
        if ours or kwargs.get("num_return_sequences") not in (None, 1):
            what = ", ".join(sorted(ours)) or "num_return_sequences"
            raise ValueError(f"A conversation gives one reply as events: leave out {what}; give seed or generator.")
        of_pictures = {"negative_prompt": negative_prompt, "height": height, "width": width}
        prompt = [messages] if is_column(messages) else messages
        inputs = self.processor(prompt, generation_mode="interleaved", **of_pictures).to(self.model.device)
        if seed is not None:
            kwargs["generator"] = torch.Generator().manual_seed(operator.index(seed))
        events = _EventQueue(self.model, self.processor, every, height, width)
        criteria = kwargs.pop("stopping_criteria", [])

        def work(criteria: list[StoppingCriteria]) -> None:
            kwargs.update(streamer=events, stopping_criteria=criteria)
            self.model.generate(**inputs, generation_mode="interleaved", **kwargs)

        return read_events(events.queue, work, criteria)


def read_events(queue: Queue, work: Callable[[list], None], criteria: Sequence = ()) -> Iterator[dict[str, Any]]:
    """The events of a generation in another thread, to its last, `"end"`. What fails before the first is raised at once.

    Args:
        queue (`Queue`): Where the work puts its events.
        work: What generates, given `criteria` and one that stops it within a step when the iterator is closed.
        criteria (sequence of `StoppingCriteria`): The caller's.
    """
    cancel = Cancelled()

    def follow() -> None:
        try:
            work([*criteria, cancel])
        except Exception as error:  # raised again in the thread that reads
            queue.put(error)

    thread = Thread(target=follow, daemon=True)
    thread.start()
    events = _events(queue, cancel, thread)
    next(events)  # a generator that was never begun would not hear that it is dropped
    return events


def _events(queue: Queue[Any], cancel: Cancelled, thread: Thread) -> Iterator[dict[str, Any]]:
    """What comes; before it `None`, once the first is there."""

    def get() -> dict[str, Any]:
        if isinstance(event := queue.get(), Exception):
            raise event
        return event

    try:
        event = get()
        yield None
        while event["type"] != "end":
            yield event
            event = get()
        yield event
    finally:
        cancel.set()
        thread.join()


def add_event(parts: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Adds what an event of a stream brings to the parts of the reply so far."""
    if event["type"] == "text" and parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += event["text"]
    elif event["type"] in ("text", "image"):
        parts.append({name: event[name] for name in ("type", event["type"])})


class GrowingText:
    """The text of ids that come one after another.

    Args:
        processor: What decodes them.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.ids, self.told = processor, [], ""

    def new(self, ids: Sequence[int], is_over: bool = False) -> str:
        """What is new in the text, but for characters of which a part of the bytes is still to come."""
        self.ids += ids
        text = self.processor.decode(self.ids, skip_special_tokens=True)
        if len(text) <= len(self.told) or (not is_over and text.endswith("\N{REPLACEMENT CHARACTER}")):
            return ""
        new, self.told = text[len(self.told) :], text
        return new


class Cancelled(Event, StoppingCriteria):
    """Once it is set, a generation stops within a step."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.is_set(), device=input_ids.device)


class _EventQueue(BaseStreamer):
    """Events of one sequence on their way to the thread that reads them, ids as text and codes as pictures."""

    def __init__(
        self,
        model: LiquidForCausalLM,
        processor: LiquidProcessor,
        every: int | None,
        height: int | None,
        width: int | None,
    ) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"every must be a whole number of codes, at least 1, got {every!r}.")
        self.model, self.processor, self.every, self.size = model, processor, every, (height, width)
        self.queue: Queue[dict[str, Any] | Exception] = Queue()
        self.text = GrowingText(processor)
        self.codes: list[torch.LongTensor] = []

    def put_event(self, event: InterleavedEvent) -> None:
        if text := self.text.new(event.ids, is_over=event.type != "text"):
            self.queue.put({"type": "text", "text": text})
        if event.type == "text":
            return
        told: dict[str, Any] = {"type": event.type, "index": event.index}
        if event.type == "end":
            told = {"type": "end", "reason": event.reason}
        elif event.type == "image_start":
            self.text, self.codes = GrowingText(self.processor), []
        elif event.type == "image_partial":
            self.codes.append(event.codes)
            codes = torch.cat(self.codes)[None]
            if self.every is None or codes.shape[1] % self.every:
                return
            ids = self.model.config.image_layout.codes_to_ids(codes)
            told |= {"image": partial_pictures(self.model, ids, *self.size)[0], "num_codes": codes.shape[1]}
        else:
            pictures = self.processor.image_processor.postprocess(event.pixel_values[None])
            told |= {"image": pictures[0], "seed": event.seed}
        self.queue.put(told)

    def put(self, value: Any) -> None:
        """Events tell everything."""

    def end(self) -> None:
        """The last event has told so."""
