"""Pictures to `pixel_values` in [-1, 1] and back, with Pillow only."""

import base64
import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from huggingface_hub import get_session
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import TensorType

from ...codecs.vq_model import code_grid


FRAMINGS = ("crop", "pad")

# The mean colour of CLIP's training data, which the reference pads questions' pictures with.
PAD_COLOR = (122, 116, 104)

# A picture beyond this is refused, and one so elongated that framing would blow it up beyond it: half a GB of RGB.
MAX_PIXELS = 2**27

# Of a picture's file, and of the time that the web may take to send it.
MAX_FILE_BYTES = 2**28
MAX_WEB_SECONDS = 60

WEB = ("http://", "https://")
# Those 4xx that say nothing about the picture: the web is slow, or busy.
PASSING_STATUS = (408, 425, 429)
# How pictures in base64 begin: a URL of data, or the first bytes of PNG, JPEG, GIF and WebP.
BASE64 = ("data:image/", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")


class LiquidImageProcessorKwargs(TypedDict, total=False):
    """What can be overridden by `from_pretrained(..., name=value)`."""

    size: int
    downsample_factor: int
    framing: str


class LiquidImageProcessor(BaseImageProcessor):
    """Frames pictures for the codec, and turns what the codec decodes into pictures.

    Args:
        size (`int`, defaults to 512): Height and width in pixels of the result when none are asked for.
        downsample_factor (`int`, defaults to 16): Pixels per code along one side; sides must be its multiples.
        framing (`str`, defaults to `"crop"`): How a picture is brought to the target's proportions. `"crop"` resizes
            until the target is covered and keeps the centre (the reference's training data). `"pad"` centres the whole
            picture on a canvas of colour (122, 116, 104), then resizes (the reference's questions about pictures).

    Raises:
        ValueError: If `size` is no positive multiple of `downsample_factor`, or `framing` is unknown.

    Example:

    ```python
    >>> image_processor = LiquidImageProcessor()
    >>> pixel_values = image_processor(PIL.Image.open("cat.png"))["pixel_values"]  # (1, 3, 512, 512)
    >>> picture = image_processor.postprocess(pixel_values)[0]
    ```
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = LiquidImageProcessorKwargs

    def __init__(self, size: int = 512, downsample_factor: int = 16, framing: str = "crop", **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.downsample_factor = downsample_factor
        self.framing = framing
        code_grid(size, size, downsample_factor)
        _check_framing(framing)

    def preprocess(
        self,
        images: Any,
        framing: Literal["crop", "pad"] | None = None,
        height: int | None = None,
        width: int | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """Frames pictures to one size.

        Args:
            images: A picture, or a (nested) list of them, flattened in reading order. A picture is what [`load_image`]
                takes, or a numpy array or torch tensor `(H, W)`, `(H, W, C)` or `(C, H, W)` with C of 1 (grey), 2
                (grey, alpha), 3 (RGB) or 4 (RGBA); uint8, uint16, or floats in [0, 1]. A 4-D array is a batch.
            framing (`str`, *optional*): `"crop"` or `"pad"`. Defaults to `self.framing`.
            height, width (`int`, *optional*): Size of the result in pixels. Each defaults to `self.size`.
            return_tensors (`str`, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for numpy as well.

        Returns:
            `BatchFeature` with `pixel_values`: float32 `(N, 3, height, width)` in [-1, 1].

        Raises:
            ValueError: If a picture, `framing` or the size cannot be used.
        """
        framing = self.framing if framing is None else framing
        height = self.size if height is None else height
        width = self.size if width is None else width
        factor = self.downsample_factor
        height, width = (side * factor for side in code_grid(height, width, factor))
        _check_framing(framing)
        pictures = [_frame(to_rgb(image), framing, height, width) for image in flatten_images(images)]
        # float64 until the end, as the reference computes it.
        pixel_values = (np.stack(pictures) / 255.0 * 2.0 - 1.0).astype(np.float32).transpose(0, 3, 1, 2)
        return BatchFeature({"pixel_values": np.ascontiguousarray(pixel_values)}, tensor_type=return_tensors)

    def postprocess(
        self, pixel_values: torch.Tensor, output_type: Literal["pil", "np", "pt"] = "pil"
    ) -> "list[PIL.Image.Image] | np.ndarray | torch.Tensor":
        """Turns decoded pixels into pictures, with diffusers' conventions.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Pixels, nominally in [-1, 1]; clamped.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            A list of B RGB pictures, an array `(B, H, W, 3)` in [0, 1], or a tensor `(B, 3, H, W)` in [0, 1].

        Raises:
            ValueError: If the shape or `output_type` is wrong, or `pixel_values` are not finite.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have shape (batch, 3, height, width), got {tuple(pixel_values.shape)}. Of image ids, "
                "pass model.decode_image_tokens(ids)."
            )
        if not pixel_values.isfinite().all():
            raise ValueError("pixel_values contain NaN or infinity: decode in float32 or bfloat16 instead of float16.")
        return VaeImageProcessor().postprocess(pixel_values.detach(), output_type=output_type)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """The hook of `ProcessorMixin`; here `preprocess` loads what it is given."""
        return image_url_or_urls


def contact_sheet(images: "list[PIL.Image.Image]", columns: int | None = None) -> PIL.Image.Image:
    """Pictures of one size side by side, row by row; the last row is filled up with white. Nearly square by itself."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blanks = [PIL.Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    return make_image_grid([*images, *blanks], rows=rows, cols=columns)


def load_image(image: "str | Path | bytes | PIL.Image.Image") -> PIL.Image.Image:
    """Loads one picture as RGB.

    The EXIF orientation is applied, transparency is blended on white, and 16-bit grey is brought to 8 bits.

    Args:
        image: What [`open_image`] takes, or a Pillow picture.

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: If the picture is corrupt, truncated, animated, empty, too large to be trusted, or of a kind whose
            brightness range is unknown, or as `open_image`.
        OSError, TypeError: As `open_image`.
    """
    is_ours = not isinstance(image, PIL.Image.Image)  # so that nothing is copied
    image = open_image(image) if is_ours else image
    with _decoding(image):
        # 16 bits of grey; other pictures of these modes have no known range.
        is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        frames = getattr(image, "n_frames", 1)  # Pillow defines it only for formats that can hold several
        if 0 in image.size:
            problem = f"it has no pixels ({image.width} x {image.height})"
        elif image.width * image.height > MAX_PIXELS:
            problem = f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}. Downscale it first"
        elif frames > 1 and image.format != "MPO":  # cameras' MPO: the picture, then thumbnails or depth
            problem = f"it has {frames} frames: choose one and save it as a PNG"
        elif image.mode in ("I", "F") and not is_deep:
            problem = f"pixels of mode {image.mode!r} have no known range: scale them to 8 bits"
        else:
            image = PIL.ImageOps.exif_transpose(image, in_place=is_ours) or image
            return image if image.mode == "RGB" and not image.has_transparency_data else _in_rgb(image, is_deep)
    raise ValueError(f"Cannot read {_name(image)} as a picture: {problem}.")


def _in_rgb(image: PIL.Image.Image, is_deep: bool) -> PIL.Image.Image:
    """Strip by strip: whole, what comes between the two would take four times the memory."""
    canvas = PIL.Image.new("RGB", image.size)
    rows = math.ceil(2**22 / image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if is_deep:
            strip = PIL.Image.fromarray((np.asarray(strip) / 257.0).round().astype(np.uint8))
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = PIL.Image.alpha_composite(PIL.Image.new("RGBA", strip.size, "white"), strip)
        canvas.paste(strip.convert("RGB"), (0, top))
    return canvas


def open_image(image: "str | Path | bytes") -> PIL.Image.Image:
    """Fetches a picture and reads what it says of itself; its pixels are decoded later, by [`load_image`].

    Args:
        image: A path, an `http(s)://` or `data:image/` URL, the bytes of a picture file, or these in base64.

    Raises:
        ValueError: If there is no picture there: it is of no known format, no regular file, too large a file, no
            base64, or the web says that it has none.
        OSError: If it cannot be fetched now: a missing file, a disk or a network that fails.
        TypeError: If `image` is nothing of the above.
    """
    data, name = image, _name(image)
    if isinstance(image, str) and image.startswith(WEB):
        data = _fetch(image)
    elif isinstance(image, str) and image.startswith(BASE64):
        try:
            data = base64.b64decode("".join(image.removeprefix("data:").rpartition(",")[2].split()), validate=True)
        except ValueError as error:
            raise ValueError(f"Cannot read {name} as a picture: it is no base64 ({error}).") from error
    elif not isinstance(image, (str, bytes, PathLike)):
        raise TypeError(f"A picture is a str, an os.PathLike, bytes or a Pillow picture, got {image!r}.")
    elif not isinstance(image, bytes):
        path = Path(image)
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device be read without end
            raise ValueError(f"Cannot read {name} as a picture: it is no regular file.")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"Cannot read {name} as a picture: it has more than {MAX_FILE_BYTES:,} bytes.")
    with _decoding(image):
        opened = PIL.Image.open(io.BytesIO(data))
    opened.filename = "" if isinstance(image, bytes) else str(image)  # for those who tell of it
    return opened


def _fetch(url: str) -> bytes:
    """What the web has under a URL, at most `MAX_FILE_BYTES` and a bit, within `MAX_WEB_SECONDS`."""
    data, deadline = bytearray(), time.monotonic() + MAX_WEB_SECONDS
    if not urlsplit(url).hostname:
        raise ValueError(f"Cannot read {_name(url)} as a picture: it names no host.")
    try:
        with get_session().stream("GET", url, follow_redirects=True, timeout=MAX_WEB_SECONDS / 6) as response:
            if response.is_client_error and response.status_code not in PASSING_STATUS:
                status = f"{response.status_code} {response.reason_phrase}"
                raise ValueError(f"Cannot read {_name(url)} as a picture: the web says {status}.")
            for chunk in response.raise_for_status().iter_bytes():
                data += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {MAX_WEB_SECONDS} seconds")
                if len(data) > MAX_FILE_BYTES:
                    break
    except ValueError:
        raise
    except Exception as error:  # the client's own errors: which client it is, is up to huggingface_hub
        raise ConnectionError(f"Cannot fetch {_name(url)} now: {error or type(error).__name__}.") from error
    return bytes(data)


@contextmanager
def _decoding(image: Any) -> Iterator[None]:
    """Decoders raise anything from OSError to struct.error on broken files."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        problem = f"{error}. It may be corrupt or truncated: re-save it as an RGB PNG"
        if isinstance(error, PIL.Image.DecompressionBombError):
            problem = f"{error} Downscale it first"
        elif isinstance(error, PIL.UnidentifiedImageError):
            problem = "it is corrupt or of no known format"
        raise ValueError(f"Cannot read {_name(image)} as a picture: {problem}.") from error


def _name(image: Any) -> str:
    """What an error calls a picture."""
    name = getattr(image, "filename", None) if isinstance(image, PIL.Image.Image) else image
    return f"{str(name)[:200]!r}" if name and isinstance(name, (str, Path)) else "the picture"


def flatten_images(images: Any) -> Iterator[Any]:
    """The pictures of a (nested) list, of a column of a data set or a table, or of a batch, in reading order."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    if is_batch or is_column(images):
        for image in images:
            yield from flatten_images(image)
    else:
        yield images


def is_column(values: Any) -> bool:
    """Whether values are a list, or of what the ecosystem has in place of one: `datasets.Column`, `pandas.Series`."""
    is_array = isinstance(values, (np.ndarray, torch.Tensor)) and values.dtype != object
    is_one = is_array or isinstance(values, (str, bytes, Mapping))
    return not is_one and all(hasattr(values, name) for name in ("__len__", "__getitem__", "__iter__"))


def to_rgb(image: Any) -> PIL.Image.Image:
    """What [`load_image`] takes, or an array or tensor of any layout, bytes or floats in [0, 1], as RGB."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        return load_image(image)
    array, problem = image, None
    # From the range of its type to 0 ... 255.
    scale = {np.dtype(np.uint8): 1.0, np.dtype(np.uint16): 1 / 257.0}.get(array.dtype)
    if array.ndim not in (2, 3) or 0 in array.shape:
        problem = f"have shape (H, W), (H, W, C) or (C, H, W), got {array.shape}"
    elif np.issubdtype(array.dtype, np.floating):
        scale = 255.0
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
            problem = f"lie in [0, 1] if of floats, got {array.min()} to {array.max()}: rescale it, or pass uint8"
    elif scale is None:
        problem = f"be uint8, uint16 or floats in [0, 1], got {array.dtype}: convert it first"
    if problem is not None:
        raise ValueError(f"A picture must {problem}.")
    if array.ndim == 3:
        if infer_channel_dimension_format(array, num_channels=(1, 2, 3, 4)) == ChannelDimension.FIRST:
            array = array.transpose(1, 2, 0)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return load_image(PIL.Image.fromarray(np.ascontiguousarray((array * scale).round().astype(np.uint8))))


def _check_framing(framing: str) -> None:
    if framing not in FRAMINGS:
        raise ValueError(f"framing must be one of {FRAMINGS}, got {framing!r}.")


def _frame(image: PIL.Image.Image, framing: str, height: int, width: int) -> PIL.Image.Image:
    """A picture of the target's size: resized and cut (`"crop"`), or put on a canvas and resized (`"pad"`)."""
    if framing == "crop":
        scale = max(height / image.height, width / image.width)
        full_width, full_height = round(image.width * scale), round(image.height * scale)
    else:
        full_width = max(image.width, round(image.height * width / height))
        full_height = max(image.height, round(image.width * height / width))
    if full_width * full_height > MAX_PIXELS:
        raise ValueError(
            f"A picture of {image.width} x {image.height} is too elongated: framing it would need {full_width} x "
            f"{full_height} pixels. Crop or downscale it first."
        )
    if framing == "crop":
        image = image.resize((full_width, full_height), PIL.Image.Resampling.LANCZOS)
        left, top = (full_width - width) // 2, (full_height - height) // 2
        return image.crop((left, top, left + width, top + height))
    canvas = PIL.Image.new("RGB", (full_width, full_height), PAD_COLOR)
    canvas.paste(image, ((full_width - image.width) // 2, (full_height - image.height) // 2))
    return canvas.resize((width, height), PIL.Image.Resampling.LANCZOS)
