"""A codec of codes as the VAE of a diffusion model: the same pictures, without the rounding to codes."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from diffusers import AutoencoderKL

# diffusers finds out how to load a part of a pipeline by the base class that its module shows.
from diffusers import ModelMixin as ModelMixin
from torch import nn

from ..utils.hub import hub_arguments
from .loading import load_codec
from .vq_model import LiquidVQModel, codec_identity


class CodecVAE(AutoencoderKL):
    """A VQ codec without its quantizer, as the VAE of any of diffusers' pipelines. Its posterior has next to no variance.

    It is saved as the name of its codec, without weights.

    Args:
        codec (`str`): Whose it is: a name or path as for [`load_codec`], with one code a position.
        scaling_factor (`float`): What latents are multiplied with for a diffusion model: one by their standard deviation.
        identity (`str`, *optional*): Of the codec that is expected (`codec_identity`).

    Raises:
        OSError: If there is no codec of that name.
        ValueError: If it has several codes a position, or is not the one that is expected.

    Example:

    ```python
    >>> vae = CodecVAE("liquid-emoji", scaling_factor=0.9)
    >>> latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    ```
    """

    def __init__(self, codec: str, scaling_factor: float, identity: str | None = None) -> None:
        ours = load_codec(codec)
        if not isinstance(ours, LiquidVQModel):
            raise ValueError(f"A codec of one code a position becomes a VAE, {codec} is a {type(ours).__name__}.")
        if identity not in (None, found := codec_identity(ours)):
            raise ValueError(f"The VAE is of a codec {identity[:12]}, but {codec} is {found[:12]}, another one.")
        known = inspect.signature(AutoencoderKL).parameters.keys() & ours.config.keys()
        with torch.device("meta"):
            super().__init__(**{name: ours.config[name] for name in known} | {"scaling_factor": scaling_factor})
        self.encoder, self.decoder, self.post_quant_conv = ours.encoder, ours.decoder, ours.post_quant_conv
        # Mean, and the logarithm of the variance.
        channels = ours.quant_conv.out_channels
        self.quant_conv = nn.Conv2d(ours.quant_conv.in_channels, 2 * channels, 1)
        self.quant_conv.weight.data = nn.functional.pad(ours.quant_conv.weight, (0, 0) * 3 + (0, channels))
        self.quant_conv.bias.data = nn.functional.pad(ours.quant_conv.bias, (0, channels), value=-30.0)
        self.register_to_config(codec=codec, identity=found, latent_channels=channels)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> CodecVAE:
        """Makes it of the codec that a folder names, as when it was saved; `kwargs` as in diffusers: where it lies, `dtype`.

        Raises:
            OSError, ValueError: See there.
        """
        config = cls.load_config(pretrained_model_name_or_path, **hub_arguments(kwargs))
        vae = cls(*(config[name] for name in ("codec", "scaling_factor", "identity")))
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))  # its former name
        # diffusers' own `to` warns of parts to keep in float32, of which there are none.
        return vae if dtype is None else nn.Module.to(vae, dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes its configuration, which names the codec; `kwargs` as for diffusers' `save_config`."""
        self.save_config(save_directory, **kwargs)
