"""The image codec: pixels -> codes -> pixels, on diffusers' `VQModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel


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
    multiples of [`~LiquidVQModel.downsample_factor`].

    Example:

    ```python
    >>> from transformers_liquid import CHAMELEON_VQ_CONFIG, LiquidVQModel
    >>> codec = LiquidVQModel(**CHAMELEON_VQ_CONFIG)
    >>> codes = codec.encode_codes(pixel_values)  # (B, 3, 512, 512) in [-1, 1] -> (B, 32, 32) int64
    >>> pixel_values = codec.decode_codes(codes)  # (B, 3, 512, 512)
    ```
    """

    @property
    def downsample_factor(self) -> int:
        """Pixels per code along one side."""
        return downsample_factor(self.config)

    @property
    def codebook_size(self) -> int:
        """Number of codes in the codebook."""
        return self.config.num_vq_embeddings

    @torch.no_grad()
    def encode_codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turns pictures into the indices of their nearest codebook vectors.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Pictures in [-1, 1]; H and W are multiples of
                `downsample_factor`.

        Returns:
            `torch.LongTensor` of shape `(B, H / factor, W / factor)`: Codes in 0 ... `codebook_size` - 1.

        Raises:
            ValueError: If the shape does not fit the codec.
        """
        factor = self.downsample_factor
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.in_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.config.in_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"The codec reduces each side by {factor}: height and width must be positive multiples of {factor}, "
                f"got {height} x {width} pixels."
            )
        latents = self.encode(pixel_values.to(self.dtype)).latents
        return self.nearest_codes(latents)

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Turns codes into pictures.

        Args:
            codes (`torch.LongTensor` of shape `(B, h, w)`): Codes in 0 ... `codebook_size` - 1.

        Returns:
            `torch.Tensor` of shape `(B, 3, h * factor, w * factor)`: Pictures, nominally in [-1, 1] (not clamped).

        Raises:
            ValueError: If the shape does not fit or a code is outside the codebook.
        """
        if codes.ndim != 3 or not codes.numel():
            raise ValueError(
                f"codes must have shape (batch, rows, columns) and not be empty, got {tuple(codes.shape)}."
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"codes must lie in 0 ... {self.codebook_size - 1} (the codebook), got values from {low} to {high}."
            )
        quantized = self.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
        return self.decode(quantized, force_not_quantize=True).sample

    def nearest_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Indices `(B, h, w)` of the codebook vectors nearest to `latents` `(B, C, h, w)`, searched in fp32.

        diffusers' quantizer uses `torch.cdist`, which has no half-precision kernel on CPU.
        """
        codebook = self.quantize.embedding.weight.float()
        flat = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, of which |z|^2 is the same for every code.
        distances = torch.addmm((codebook**2).sum(1)[None], flat, codebook.T, alpha=-2.0)
        return distances.argmin(1).view(latents.shape[0], *latents.shape[-2:])


def downsample_factor(vq_config: dict[str, Any]) -> int:
    """Pixels per code along one side for a `VQModel` configuration: every level but the last halves the picture."""
    return 2 ** (len(vq_config["block_out_channels"]) - 1)
