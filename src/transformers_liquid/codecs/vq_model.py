"""The image codec: pixels -> codes -> pixels, on diffusers' `VQModel`."""

from __future__ import annotations

import hashlib
import inspect
import json
import operator
from typing import Any

import torch
from diffusers import VQModel
from transformers.utils.generic import maybe_autocast


# Chameleon's VQGAN as published with Liquid (taming `vqgan.yaml`: ch 128, ch_mult 1-1-2-2-4, 2 res blocks,
# no attention outside the middle block, 8192 codes of 256 channels; 512 x 512 pixels <-> 32 x 32 codes).
CHAMELEON_VQ_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 256,
    "sample_size": 512,
    "num_vq_embeddings": 8192,
    "norm_num_groups": 32,
    "vq_embed_dim": 256,
    "mid_block_add_attention": True,
}


class CodeMixin:
    """What codecs share: they speak in codes, and are loaded whole. They say which with `encode_unchecked`
    and `decode_codes`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info: bool = False, **kwargs):
        """As in diffusers, if the weights are whole.

        Raises:
            ValueError: If a weight is missing, unknown or (unless `ignore_mismatched_sizes`) of another shape.
        """
        codec, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        name = f"The codec {pretrained_model_name_or_path}"
        check_loading_info(name, info, kwargs.get("ignore_mismatched_sizes", False))
        return (codec, info) if output_loading_info else codec

    @property
    def downsample_factor(self) -> int:
        """Pixels per code along one side."""
        return downsample_factor(self.config)

    @property
    def codebook_size(self) -> int:
        """Number of codes in a codebook."""
        return self.config.num_vq_embeddings

    @property
    def num_codebooks(self) -> int:
        """Codes of a position."""
        return self.config.get("num_codebooks", 1)

    @property
    def execution_device(self) -> torch.device:
        """Where it computes: where its weights are, or where hooks of accelerate bring them."""
        hooks = [getattr(module, "_hf_hook", None) for module in self.modules()]
        devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
        return torch.device(devices[0]) if devices else self.device

    @torch.no_grad()
    def encode_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turns pictures into the indices of their nearest codebook vectors.

        In the precision of the weights, whatever autocast says: bfloat16 would change 44 % of the emoji codec's codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1]; H and W are multiples of
                `downsample_factor`.

        Returns:
            `torch.LongTensor` of shape `(B, H / factor, W / factor)`, with several codes a position `(B, num_codebooks, H /
                factor, W / factor)`: Codes in 0 ... `codebook_size` - 1.

        Raises:
            ValueError: If the shape does not fit the codec, or pixels or latents are NaN or infinite.
        """
        codes = self.encode_unchecked(pixel_values)
        if not codes.is_meta and (codes < 0).any():
            check_finite(pixel_values, "The pixels")  # which would be the cause
            check_finite(torch.where(codes < 0, torch.nan, 0.0), "The codec's latents")
        return codes

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises a `ValueError` unless these are pictures `(B, 3, H, W)` of a size that is a whole grid of codes."""
        channels = self.config.get("in_channels", 3)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {channels}, height, width), got {tuple(pixel_values.shape)}."
            )
        code_grid(*pixel_values.shape[-2:], self.downsample_factor)

    def checked_codes(self, codes: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Codes on the codec's device; raises a `ValueError` unless they, and the precision to decode in, are as
        `decode_codes` says."""
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"dtype must be torch.bfloat16, torch.float16 or None (the weights' own, {self.dtype}), got {dtype!r}."
            )
        of_position = () if self.num_codebooks == 1 else (self.num_codebooks,)
        if codes.ndim != 3 + len(of_position) or codes.shape[1:-2] != of_position or not codes.numel():
            shape = ", ".join(map(str, ("batch", *of_position, "height", "width")))
            raise ValueError(f"codes must have shape ({shape}) and not be empty, got {tuple(codes.shape)}.")
        codes = codes.to(self.execution_device)
        check_codes(codes, range(self.codebook_size))
        return codes


class LiquidVQModel(CodeMixin, VQModel):
    """A diffusers `VQModel` that also speaks in codes.

    `encode`, `decode`, `forward` and `save_pretrained` are diffusers' own. Added are
    [`~LiquidVQModel.encode_codes`] and [`~LiquidVQModel.decode_codes`], for any picture whose sides are
    multiples of [`~LiquidVQModel.downsample_factor`]. Where memory is short, `enable_slicing()` lets `decode_codes` work
    picture by picture.

    Both speak of pixels in [-1, 1] whatever the network does. A codec whose configuration says `lookup_from_codebook` is
    of the family of aMUSEd, the one for which diffusers has that option: its network works in [0, 1] (`do_normalize=False`
    in `AmusedPipeline`), which no configuration of diffusers tells.

    Example:

    ```python
    >>> from transformers_liquid import CHAMELEON_VQ_CONFIG, LiquidVQModel
    >>> codec = LiquidVQModel(**CHAMELEON_VQ_CONFIG)
    >>> codes = codec.encode_codes(pixel_values)  # (B, 3, 512, 512) in [-1, 1] -> (B, 32, 32) int64
    >>> pixel_values = codec.decode_codes(codes)  # (B, 3, 512, 512)
    ```
    """

    use_slicing = False

    @property
    def codebooks(self) -> list[torch.Tensor]:
        """The vectors `(codebook_size, channels)` of its one codebook."""
        return [self.quantize.embedding.weight]

    @torch.no_grad()
    def encode_unchecked(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `encode_codes`, but -1 where latents are not finite: for those who look for it later than each batch."""
        self.check_pixels(pixel_values)
        pixel_values = pixel_values.to(self.execution_device, self.dtype)
        if self.config.lookup_from_codebook:
            pixel_values = pixel_values / 2 + 0.5
        with maybe_autocast(self.execution_device.type, enabled=False):
            latents = self.encode(pixel_values).latents
            return self.nearest_codes(latents)

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Turns codes into pictures.

        Args:
            codes (`torch.LongTensor` of shape `(B, h, w)`): Codes in 0 ... `codebook_size` - 1.
            dtype (`torch.dtype`, *optional*): `torch.bfloat16` or `torch.float16` to compute in, by autocast: the
                weights stay what they are. Measured with the emoji checkpoint's codec on 1,024 pictures, PSNR to fp32 is
                58.4 dB (at least 54.8; no value off by more than 0.036) and 76.5 dB (72.2; 0.005). Defaults to the
                weights' own, whatever autocast says.

        Returns:
            `torch.Tensor` of shape `(B, 3, h * factor, w * factor)`: Pictures, nominally in [-1, 1] (not clamped), of
            the weights' dtype.

        Raises:
            ValueError: If the shape does not fit, a code is outside the codebook, `dtype` is no half precision, or what
                comes out is NaN or infinite.
        """
        codes = self.checked_codes(codes, dtype)
        # No cache: it would hold the weights a second time.
        with maybe_autocast(codes.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            # (B, h, w, C) seen as (B, C, h, w) is channels-last already, in which CPUs convolve faster.
            looks_up = self.config.lookup_from_codebook
            quantized = codes if looks_up else self._embed(codes).permute(0, 3, 1, 2)
            shape = (-1, *codes.shape[1:], self.quantize.vq_embed_dim)  # what diffusers makes of codes that it looks up
            pieces = quantized.split(1 if self.use_slicing else len(quantized))
            decoded = [self.decode(one, force_not_quantize=True, shape=shape).sample.to(self.dtype) for one in pieces]
        pixel_values = torch.cat(decoded)
        if looks_up:
            pixel_values = pixel_values * 2 - 1
        check_finite(pixel_values, "The decoded pixels")
        return pixel_values

    def _embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Vectors of codes: by the module's own forward, for whose duration offloading brings the weights."""
        embedding = self.quantize.embedding
        return embedding(codes if embedding.weight.is_meta else codes.to(embedding.weight.device))

    def nearest_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Indices `(B, h, w)` of the codebook vectors nearest to `latents` `(B, C, h, w)`, searched in fp32.

        -1 where a distance is not finite. diffusers' quantizer uses `torch.cdist`, which has no half-precision kernel on
        CPU.
        """
        codebook = self._embed(torch.arange(self.codebook_size, device=latents.device)).to(latents.device).float()
        flat = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, of which |z|^2 is the same for every code.
        distances = torch.addmm((codebook**2).sum(1)[None], flat, codebook.T, alpha=-2.0)
        # A minimum keeps every NaN.
        codes = torch.where(distances.amin(1).isfinite(), distances.argmin(1), -1)
        return codes.view(latents.shape[0], *latents.shape[-2:])


def downsample_factor(vq_config: dict[str, Any]) -> int:
    """Pixels per code along one side for the configuration of a codec: every level but the last halves the picture."""
    return 2 ** (len(vq_config["block_out_channels"]) - 1)


def code_grid(height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width in codes of a picture of so many pixels.

    Raises:
        ValueError: Unless both are positive multiples of `factor`, the pixels per code along one side.
    """
    try:
        grid = tuple(operator.index(side) // factor for side in (height, width))  # numpy's and torch's integers too
    except TypeError:
        grid = (0, 0)
    if min(grid) < 1 or (grid[0] * factor, grid[1] * factor) != (height, width):
        raise ValueError(
            f"height and width must be positive multiples of {factor} pixels (the codec's factor), got "
            f"height={height!r}, width={width!r}."
        )
    return grid


def check_codes(codes: torch.Tensor, codebook: range, name: str = "Code") -> None:
    """Raises a `ValueError` that names the first code (or id of a code) outside of the codebook and its position."""
    wrong = (codes < codebook.start) | (codes >= codebook.stop)
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name} {int(codes[position])} at position {', '.join(map(str, position))} is outside of the codebook "
            f"{codebook.start} ... {codebook.stop - 1}."
        )


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises a `ValueError` that names the first picture of `(B, ...)` with a value that is NaN or infinite, and where."""
    wrong = ~tensor.isfinite()
    if wrong.any():
        picture, *position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} of picture {picture} are NaN or infinite at {tuple(position)}: the picture or the codec's weights "
            "are damaged, or float16 overflowed (use float32 or bfloat16)."
        )


def check_loading_info(name: str, info: dict[str, Any], ignore_mismatched_sizes: bool = False) -> None:
    """Raises a `ValueError` if a key was missing, unknown or (unless ignored) of another shape when `name` was loaded."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(what, ())))
        if keys and not (ignore_mismatched_sizes and what == "mismatched_keys"):
            raise ValueError(
                f"{name} has {len(keys)} {what.replace('_', ' ')}: {', '.join(keys[:10])}. Weights and configuration are "
                "not of one model: save or download them again, together."
            )


def codec_identity(codec: CodeMixin) -> str:
    """What two codecs share whose codes mean the same: sha256 of the configuration and the weights in fp32.

    The default size of pictures does not count, nor do arguments that are at their defaults: a later diffusers may
    have more of them.

    Args:
        codec ([`LiquidVQModel`] or another): In fp32, as it is loaded: rounded weights have another identity.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    config = {
        name: codec.config[name]
        for name, parameter in inspect.signature(type(codec)).parameters.items()
        if name != "sample_size" and json.dumps(codec.config[name]) != json.dumps(parameter.default)
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(codec.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.float().cpu().contiguous().numpy())
    return digest.hexdigest()
