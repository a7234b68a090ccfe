"""LlamaGen's `vq_ds16_t2i.pt` and its like <-> [`LiquidVQModel`]: taming's table of names, with other words in it.

Read in `tokenizer/tokenizer_image/vq_model.py` of https://github.com/FoundationVision/LlamaGen (arXiv 2406.06525). Its
quantizer compares directions: latents and codebook are divided by their lengths. A codebook of unit vectors is nearest
to a latent where it is nearest to the latent's direction, so that the codebook alone has to be divided, once.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..utils.files import read_tensors
from .taming import NAMES, check_expressible, codec_from_tensors, tensors_from_codec, vq_key_table
from .vq_model import LiquidVQModel


# diffusers' name of a part of a path -> LlamaGen's, which counts the levels of both halves in running order.
LLAMAGEN_NAMES = NAMES | {
    ".mid_block.resnets.0.": ".mid.0.",
    ".mid_block.attentions.0.": ".mid.1.",
    ".mid_block.resnets.1.": ".mid.2.",
    ".down_blocks.": ".conv_blocks.",
    ".up_blocks.": ".conv_blocks.",
    ".resnets.": ".res.",
}

# Which codes its training has seen lately: a record that nothing else depends on.
USAGE_KEY = "quantize.codebook_used"
CODEBOOK_KEY = "quantize.embedding.weight"


def load_llamagen_codec(path: str | Path) -> LiquidVQModel:
    """Loads a codec of LlamaGen, such as `vq_ds16_t2i.pt`, as a [`LiquidVQModel`]. Code in the file is never executed.

    Args:
        path (`str` or `Path`): The checkpoint. The architecture is read off its tensors.

    Returns:
        `LiquidVQModel`, in float32 and eval mode. Its `sample_size` is 256, the smallest that the published ones were
        trained for.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, holds pickled code or another model, or a key is unknown, missing or of another
            shape.
    """
    path = Path(path)
    stored = read_tensors(path, allowed=[Namespace])  # the options of its training script, where it saved them
    stored = stored if isinstance(stored, dict) else {}
    tensors = {key: tensor for key, tensor in stored.get("model", stored).items() if key != USAGE_KEY}
    if not {"encoder.conv_blocks.0.res.0.conv1.weight", "encoder.conv_out.weight", CODEBOOK_KEY} <= tensors.keys():
        raise ValueError(
            f"{str(path)!r} is no codec: LlamaGen's have encoder.conv_blocks... in `model`, it has "
            f"{', '.join(list(tensors)[:3]) or 'no tensors'} ... (a taming VQGAN needs its configuration beside it: "
            f"{path.with_suffix('.yaml').name})."
        )
    vq_config = vq_config_from_llamagen(tensors)
    if getattr(stored.get("args"), "codebook_l2_norm", True):
        tensors[CODEBOOK_KEY] = F.normalize(tensors[CODEBOOK_KEY].float(), dim=-1)
    return codec_from_tensors("LlamaGen", path, tensors, vq_config, llamagen_key_table(vq_config))


def save_llamagen_codec(codec: LiquidVQModel, path: str | Path) -> None:
    """Writes a codec as LlamaGen keeps it, which [`load_llamagen_codec`] and LlamaGen's own scripts read.

    Args:
        codec ([`LiquidVQModel`]): The codec.
        path (`str` or `Path`): The file to write, such as `vq_ds16.pt`.

    Raises:
        ValueError: If LlamaGen cannot express the codec.
    """
    tensors = tensors_from_codec(codec, llamagen_key_table(codec.config))
    # A file of LlamaGen does not tell the size of pictures.
    expressed = vq_config_from_llamagen(tensors) | {"sample_size": codec.config.sample_size}
    check_expressible("A codec of LlamaGen", codec.config, expressed)
    if (tensors[CODEBOOK_KEY].float().norm(dim=-1) - 1).abs().max() > 1e-3:
        raise ValueError(
            "A codec of LlamaGen has a codebook of unit vectors, this one has others: its codes would change."
        )
    torch.save({"model": tensors | {USAGE_KEY: torch.zeros(65536)}}, path)


def vq_config_from_llamagen(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of the [`LiquidVQModel`] that holds these tensors: attention at the coarsest level and in the middle."""
    places = [re.match(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight", key) for key in tensors]
    places = {(int(place[1]), int(place[2])) for place in places if place}
    levels = [level for level, index in sorted(places) if index == 0]
    widths = [len(tensors[f"encoder.conv_blocks.{level}.res.0.conv1.weight"]) for level in levels]
    codebook_size, width = tensors[CODEBOOK_KEY].shape
    plain = len(widths) - 1
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
        "block_out_channels": widths,
        "layers_per_block": sum(level == 0 for level, _ in places),
        "act_fn": "silu",
        "latent_channels": len(tensors["encoder.conv_out.weight"]),
        "sample_size": 256,
        "num_vq_embeddings": codebook_size,
        "norm_num_groups": 32,
        "vq_embed_dim": width,
        "mid_block_add_attention": True,
    }


def llamagen_key_table(vq_config: dict[str, Any]) -> dict[str, str]:
    """Every tensor's name in LlamaGen -> its name in [`LiquidVQModel`]; see [`vq_key_table`]."""
    return vq_key_table(vq_config, LLAMAGEN_NAMES, counts_from_finest=False)
