"""The image codec: pixels -> codes -> pixels, on diffusers' `VQModel`."""

from __future__ import annotations

import hashlib
import inspect
import json
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


class LiquidVQModel(VQModel):
    """A diffusers `VQModel` that also speaks in codes.

    `encode`, `decode`, `forward`, `save_pretrained` and `from_pretrained` are diffusers' own. Added are
    [`~LiquidVQModel.encode_codes`] and [`~LiquidVQModel.decode_codes`], for any picture whose sides are
    multiples of [`~LiquidVQModel.downsample_factor`]. Where memory is short, `decode_codes` works picture by picture
    (`enable_slicing()`, the same pictures) and tile by tile ([`~LiquidVQModel.enable_tiling`], nearly the same).

    Example:

    ```python
    >>> from transformers_liquid import CHAMELEON_VQ_CONFIG, LiquidVQModel
    >>> codec = LiquidVQModel(**CHAMELEON_VQ_CONFIG)
    >>> codes = codec.encode_codes(pixel_values)  # (B, 3, 512, 512) in [-1, 1] -> (B, 32, 32) int64
    >>> pixel_values = codec.decode_codes(codes)  # (B, 3, 512, 512)
    ```
    """

    use_slicing = False
    use_tiling = False
    tile_sample_min_size: int
    tile_overlap_factor: float

    @property
    def downsample_factor(self) -> int:
        """Pixels per code along one side."""
        return downsample_factor(self.config)

    @property
    def codebook_size(self) -> int:
        """Number of codes in the codebook."""
        return self.config.num_vq_embeddings

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float = 0.25) -> None:
        """Lets [`~LiquidVQModel.decode_codes`] decode large pictures in overlapping tiles, blended where they overlap.

        Chameleon's codec takes 2.7 GB for a picture of 64 x 64 codes, in tiles of 512 pixels 0.7, of 256 pixels 0.25.

        An approximation: group norms and the attention of the middle block see one tile instead of all. Measured with
        the emoji checkpoint's codec on four mosaics of 64 x 64 codes, tiles of 64, 128 and 256 pixels have a PSNR of
        26.0, 30.7 and 35.3 dB to whole decoding, and are as near to the original (21.9, 21.9 and 21.6 dB; whole: 21.4).
        Single pictures enlarged to 32 x 32 codes lose up to 2.7 dB to the original in tiles of 64 pixels, 0.1 in tiles
        of 128: take tiles as large as memory allows. Codes are never computed by tiles: they would depend on the tiling.

        Args:
            tile_sample_min_size (`int`, *optional*): Height and width of a tile in pixels, a multiple of
                `downsample_factor`; pictures that fit into one are decoded whole. Defaults to the codec's `sample_size`.
            tile_overlap_factor (`float`, defaults to 0.25): The part of a tile's side that it shares with its neighbour,
                0 ... 0.5.

        Raises:
            ValueError: If a tile is no whole number of codes, or tiles would overlap by more than half.
        """
        size = self.config.sample_size if tile_sample_min_size is None else tile_sample_min_size
        if size <= 0 or size % self.downsample_factor:
            raise ValueError(
                f"tile_sample_min_size must be a positive multiple of {self.downsample_factor} pixels (one code), "
                f"got {size}."
            )
        if not 0 <= tile_overlap_factor <= 0.5:
            raise ValueError(f"tile_overlap_factor must lie in 0 ... 0.5, got {tile_overlap_factor}.")
        self.tile_sample_min_size, self.tile_overlap_factor = size, tile_overlap_factor
        super().enable_tiling()

    @torch.no_grad()
    def encode_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turns pictures into the indices of their nearest codebook vectors.

        In the precision of the weights, whatever autocast says: bfloat16 would change 44 % of the emoji codec's codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1]; H and W are multiples of
                `downsample_factor`.

        Returns:
            `torch.LongTensor` of shape `(B, H / factor, W / factor)`: Codes in 0 ... `codebook_size` - 1.

        Raises:
            ValueError: If the shape does not fit the codec.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.in_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.config.in_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        code_grid(*pixel_values.shape[-2:], self.downsample_factor)
        with maybe_autocast(pixel_values.device.type, enabled=False):
            latents = self.encode(pixel_values.to(self.dtype)).latents
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
            ValueError: If the shape does not fit, a code is outside the codebook, or `dtype` is no half precision.
        """
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"dtype must be torch.bfloat16, torch.float16 or None (the weights' own, {self.dtype}), got {dtype!r}."
            )
        if codes.ndim != 3 or not codes.numel():
            raise ValueError(
                f"codes must have shape (batch, rows, columns) and not be empty, got {tuple(codes.shape)}."
            )
        check_codes(codes, self.codebook_size)
        fits_a_tile = not self.use_tiling or max(codes.shape[1:]) * self.downsample_factor <= self.tile_sample_min_size
        decode = self._decode_whole if fits_a_tile else self._decode_tiles
        # No cache: it would hold the weights a second time.
        with maybe_autocast(codes.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            return torch.cat([decode(piece) for piece in codes.split(1 if self.use_slicing else len(codes))])

    def _decode_tiles(self, codes: torch.Tensor) -> torch.Tensor:
        """Every pixel is a mean of the tiles that show it; a tile's weight falls off where it overlaps its neighbours."""
        factor = self.downsample_factor
        size = self.tile_sample_min_size // factor
        overlap = int(size * self.tile_overlap_factor)
        batch, rows, columns = codes.shape
        pictures = torch.zeros(batch, self.config.out_channels, rows * factor, columns * factor, device=codes.device)
        weights = torch.zeros_like(pictures[0, 0])
        for top in _tile_starts(rows, size, overlap):
            for left in _tile_starts(columns, size, overlap):
                tile = self._decode_whole(codes[:, top : top + size, left : left + size])
                height, width = tile.shape[-2:]
                weight = torch.outer(*(_ramps(length, overlap * factor, codes.device) for length in (height, width)))
                area = (..., slice(top * factor, top * factor + height), slice(left * factor, left * factor + width))
                pictures[area] += tile * weight
                weights[area] += weight
        return (pictures / weights).to(self.dtype)

    def _decode_whole(self, codes: torch.Tensor) -> torch.Tensor:
        # (B, h, w, C) seen as (B, C, h, w) is channels-last already, in which CPUs convolve faster.
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2)
        return self.decode(quantized, force_not_quantize=True).sample.to(self.dtype)

    def nearest_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Indices `(B, h, w)` of the codebook vectors nearest to `latents` `(B, C, h, w)`, searched in fp32.

        diffusers' quantizer uses `torch.cdist`, which has no half-precision kernel on CPU.
        """
        codebook = self.quantize.embedding.weight.float()
        flat = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, of which |z|^2 is the same for every code.
        distances = torch.addmm((codebook**2).sum(1)[None], flat, codebook.T, alpha=-2.0)
        return distances.argmin(1).view(latents.shape[0], *latents.shape[-2:])


def _tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of equal size begin that cover `length`; the last ends where it ends."""
    return [*range(0, length - size, size - overlap), max(length - size, 0)]


def _ramps(length: int, overlap: int, device: torch.device) -> torch.Tensor:
    """Weights that rise over `overlap` pixels at the one end and fall at the other."""
    up = torch.arange(1, length + 1, device=device)
    return torch.minimum(up, up.flip(0)).clamp(max=overlap + 1) / (overlap + 1)


def downsample_factor(vq_config: dict[str, Any]) -> int:
    """Pixels per code along one side for a `VQModel` configuration: every level but the last halves the picture."""
    return 2 ** (len(vq_config["block_out_channels"]) - 1)


def code_grid(height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width in codes of a picture of so many pixels.

    Raises:
        ValueError: Unless both are positive multiples of `factor`, the pixels per code along one side.
    """
    if any(not isinstance(side, int) or side < factor or side % factor for side in (height, width)):
        raise ValueError(
            f"height and width must be positive multiples of {factor} pixels (the codec's factor), got "
            f"height={height!r}, width={width!r}."
        )
    return height // factor, width // factor


def check_codes(codes: torch.Tensor, codebook_size: int) -> None:
    """Raises a `ValueError` that names the first code outside of the codebook and its position."""
    wrong = (codes < 0) | (codes >= codebook_size)
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"Code {int(codes[position])} at position {', '.join(map(str, position))} is outside of the codebook "
            f"0 ... {codebook_size - 1}."
        )


def codec_identity(codec: LiquidVQModel) -> str:
    """What two codecs share whose codes mean the same: sha256 of the configuration and the weights in fp32.

    The default size of pictures does not count, nor do arguments of `VQModel` that are at their defaults: a later
    diffusers may have more of them.

    Args:
        codec ([`LiquidVQModel`]): In fp32, as it is loaded: rounded weights have another identity.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    config = {
        name: codec.config[name]
        for name, parameter in inspect.signature(LiquidVQModel).parameters.items()
        if name != "sample_size" and json.dumps(codec.config[name]) != json.dumps(parameter.default)
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(codec.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.float().cpu().contiguous().numpy())
    return digest.hexdigest()
