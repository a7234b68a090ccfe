"""Pictures that can be looked at while they are drawn."""

from __future__ import annotations

from queue import Queue
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from ..generation.sampling import check_drawn
from ..models.liquid.image_processing_liquid import LiquidImageProcessor
from ..models.liquid.modeling_liquid import LiquidForCausalLM


def partial_pictures(
    model: LiquidForCausalLM,
    image_tokens: torch.LongTensor,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[Image.Image]:
    """The pictures that the first codes show; what is still to be drawn is grey.

    The codec normalizes over the whole picture and needs a complete grid: what is missing is like the last code above
    it, since of all ways to fill up the grid this one changes the drawn part least. A call costs one decoding of the
    codec, and with all codes gives the finished pictures.

    Args:
        model ([`LiquidForCausalLM`]): The model that draws.
        image_tokens (`torch.LongTensor` of shape `(B, n)`): The first n image ids of each picture, n >= 1; with K codes a
            position, their codes `(B, K, n)`.
        height (`int`, *optional*): Of the whole picture in pixels; defaults to `config.image_size`.
        width (`int`, *optional*): Likewise.
        dtype (`torch.dtype`, *optional*): Half precision for the codec: see [`LiquidVQModel.decode_codes`].

    Returns:
        B pictures of that size.

    Raises:
        ValueError: If there are no ids, more than the picture has codes, or ids that are no image ids.

    Example: a preview after every row of codes.

    ```python
    >>> def on_step_end(pipe, step, timestep, callback_kwargs):
    ...     if (step + 1) % 8 == 0:
    ...         partial_pictures(pipe.model, callback_kwargs["image_tokens"])[0].save("preview.png")
    >>> pipe("red apple", callback_on_step_end=on_step_end)
    ```
    """
    grid_height, grid_width = model.config.grid(height, width)
    codes, num_codes = model.config.image_layout.ids_to_codes(image_tokens), grid_height * grid_width
    number = codes.shape[-1] if codes.ndim == 2 + len(model.config.image_layout.of_position) else 0
    if not 1 <= number <= num_codes:
        raise ValueError(
            f"A picture of {grid_height} x {grid_width} codes needs image ids of shape (batch, 1 ... {num_codes}), got "
            f"{tuple(codes.shape)}. Pass the height and width that it is drawn with."
        )
    position = torch.arange(num_codes, device=codes.device)
    last_above = number - 1 - (number - 1 - position) % grid_width
    last_above = last_above.where(last_above >= 0, number - 1)
    is_drawn = position < number
    filled = codes[..., position.where(is_drawn, last_above)]
    pixel_values = model.decode_codes(filled.unflatten(-1, (grid_height, grid_width)), dtype).float().cpu()

    factor = model.config.downsample_factor
    is_blank = ~is_drawn.cpu().view(grid_height, grid_width).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    image_processor = LiquidImageProcessor(model.config.image_size, factor)
    return image_processor.postprocess(pixel_values.masked_fill(is_blank, 0.0))


class ImageStreamer(BaseStreamer):
    """Hands the partly drawn pictures of a `generate(generation_mode="image")` to a method of yours.

    Derive a class from it and write `on_finalized_images`; it is called in the thread that draws. Each call of it costs
    one decoding of the codec.

    Args:
        model ([`LiquidForCausalLM`]): The model that draws.
        every (`int`, *optional*): Codes from one preview to the next. Defaults to a row of codes.
        height (`int`, *optional*): Of the pictures in pixels, as given to `generate`; defaults to `config.image_size`.
        width (`int`, *optional*): Likewise.

    Raises:
        ValueError: If `every` is below 1 or the size does not fit the codec; while drawing, if the pictures are larger
            than `height` and `width`.
    """

    def __init__(
        self, model: LiquidForCausalLM, every: int | None = None, height: int | None = None, width: int | None = None
    ) -> None:
        grid_height, grid_width = model.config.grid(height, width)
        every = grid_width if every is None else every
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of codes, at least 1, got {every!r}.")
        self.model, self.every, self.height, self.width = model, every, height, width
        self.num_codes = grid_height * grid_width
        self.codes: list[torch.LongTensor] = []

    def put(self, value: torch.LongTensor) -> None:
        """Receives the prompts `(B, L)`, with which a drawing begins."""
        self.codes = []

    def put_codes(self, codes: torch.LongTensor) -> None:
        """Receives the codes of one or more further positions, `(B, [K,] n)`."""
        for one in codes.split(1, dim=-1):
            self.codes.append(one)
            if len(self.codes) % self.every == 0 and len(self.codes) != self.num_codes:
                self._show()

    def end(self) -> None:
        """Hands out the finished pictures."""
        self._show(stream_end=True)

    def on_finalized_images(self, images: list[Image.Image], num_codes: int, stream_end: bool = False) -> None:
        """Yours to write.

        Args:
            images (list of B `PIL.Image.Image`): The pictures so far, grey where nothing is drawn yet.
            num_codes (`int`): Codes drawn so far, of each picture.
            stream_end (`bool`): Whether these are the finished ones.
        """
        raise NotImplementedError

    def _show(self, **kwargs: bool) -> None:
        codes = torch.cat(self.codes, dim=-1)
        check_drawn(codes)
        ids = self.model.config.image_layout.codes_to_ids(codes)
        pictures = partial_pictures(self.model, ids, self.height, self.width)
        self.on_finalized_images(pictures, len(self.codes), **kwargs)


class ImageIteratorStreamer(ImageStreamer):
    """Keeps the partly drawn pictures in a queue: to iterate over `(images, num_codes)` in another thread.

    The last ones are the finished pictures; the pictures of another `generate` are there for another loop.

    Args:
        model, every, height, width: As in [`ImageStreamer`].
        timeout (`float`, *optional*): Seconds to wait for the next pictures before `queue.Empty` is raised. What fails in
            `generate` is raised here in any case.

    Example:

    ```python
    >>> streamer = ImageIteratorStreamer(model, timeout=60)
    >>> inputs = processor(text=["red apple"], generation_mode="image", return_tensors="pt")
    >>> Thread(target=model.generate, kwargs={**inputs, "generation_mode": "image", "streamer": streamer}).start()
    >>> for images, num_codes in streamer:
    ...     images[0].save("preview.png")
    ```
    """

    def __init__(self, model: LiquidForCausalLM, *args: Any, timeout: float | None = None, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.timeout = timeout
        self.image_queue: Queue[tuple[list[Image.Image], int] | Exception | None] = Queue()

    def on_finalized_images(self, images: list[Image.Image], num_codes: int, stream_end: bool = False) -> None:
        """Puts the pictures into the queue, at the end the stop signal `None` too."""
        self.image_queue.put((images, num_codes))
        if stream_end:
            self.image_queue.put(None)

    def put(self, value: torch.LongTensor) -> None:
        """Begins a drawing; that the one before failed is past, whether it was read or not."""
        super().put(value)
        while (waiting := self.image_queue.queue) and isinstance(waiting[-1], Exception):
            waiting.pop()

    def fail(self, error: Exception) -> None:
        """Puts what `generate` failed with into the queue, to be raised by the reader."""
        self.image_queue.put(error)

    def __iter__(self) -> ImageIteratorStreamer:
        return self

    def __next__(self) -> tuple[list[Image.Image], int]:
        value = self.image_queue.get(timeout=self.timeout)
        if value is None:
            raise StopIteration
        if isinstance(value, Exception):
            raise value
        return value
