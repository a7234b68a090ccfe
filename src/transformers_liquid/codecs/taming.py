"""taming-transformers' `vqgan.ckpt` + `vqgan.yaml` <-> [`LiquidVQModel`]: one table of names, both directions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from ..utils.files import check_keys, read_tensors, read_yaml
from .vq_model import LiquidVQModel


TAMING_CHECKPOINT_NAME = "vqgan.ckpt"
TAMING_CONFIG_NAME = "vqgan.yaml"

# taming's discriminator and perceptual loss: training only, and the one thing in a checkpoint that is skipped.
TAMING_TRAINING_PREFIX = "loss."

# The keys of `ddconfig` that a codec differs in.
DDCONFIG_KEYS = {
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
}

# Its other keys, each with the only value that a diffusers `VQModel` can express. `dropout` acts in training only.
DDCONFIG_FIXED = {
    "double_z": False,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}

# diffusers' name of a part of a path -> taming's. Both count the encoder's levels from the finest; taming counts the
# decoder's so too, diffusers in running order.
NAMES = {
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.attentions.0.": ".mid.attn_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".down_blocks.": ".down.",
    ".up_blocks.": ".up.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_norm_out.": ".norm_out.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}


def load_taming_codec(path: str | Path, config: str | Path | dict[str, Any] | None = None) -> LiquidVQModel:
    """Loads a taming VQGAN, such as Chameleon's, as a [`LiquidVQModel`]. Code in the file is never executed.

    Args:
        path (`str` or `Path`): The checkpoint, or the directory of `vqgan.ckpt` and `vqgan.yaml`.
        config (`str`, `Path` or `dict`, *optional*): taming's configuration. Defaults to the `.yaml` file of the
            checkpoint's name, beside it.

    Returns:
        `LiquidVQModel`, in float32 and eval mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or holds pickled code, the configuration is not one that diffusers' `VQModel`
            can express, or a key is unknown, missing or of another shape.
    """
    checkpoint = Path(path) / TAMING_CHECKPOINT_NAME if Path(path).is_dir() else Path(path)
    vq_config = load_taming_config(path, config)
    stored = read_tensors(checkpoint)
    tensors = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(TAMING_TRAINING_PREFIX)}
    return codec_from_tensors("taming", checkpoint, tensors, vq_config, vq_key_table(vq_config))


def codec_from_tensors(
    layout: str, path: str | Path, tensors: dict[str, torch.Tensor], vq_config: dict[str, Any], table: dict[str, str]
) -> LiquidVQModel:
    """A codec of tensors that go by other names, in float32 and eval mode.

    Args:
        layout (`str`): Whose names they are.
        path (`str` or `Path`): Where they lie.
        tensors (`dict`): Names to tensors.
        vq_config (`dict`): Arguments of the [`LiquidVQModel`].
        table (`dict`): Each of the names to that in [`LiquidVQModel`].

    Raises:
        ValueError: If a tensor is unknown, missing or of another shape.
    """
    check_keys(f"The {layout} checkpoint", tensors, required=table, optional=())
    with torch.device("meta"):  # the tensors become its weights
        codec = LiquidVQModel(**vq_config)
    state_dict = {key: tensors[its].float() for its, key in table.items()}
    for key, expected in codec.state_dict().items():
        if expected.ndim == 2:  # an attention projection, which is a 1 x 1 convolution there
            state_dict[key] = state_dict[key].flatten(1)
        if state_dict[key].shape != expected.shape:
            raise ValueError(
                f"{path}: the tensor for {key} has shape {tuple(state_dict[key].shape)}, but its configuration "
                f"asks for {tuple(expected.shape)}. Are checkpoint and configuration of the same codec?"
            )
    codec.load_state_dict(state_dict, assign=True)
    return codec.eval()


def tensors_from_codec(codec: LiquidVQModel, table: dict[str, str]) -> dict[str, torch.Tensor]:
    """The inverse of [`codec_from_tensors`]."""
    ours = codec.state_dict()
    tensors = {name: ours[key] for name, key in table.items()}
    return {
        name: tensor[..., None, None] if tensor.ndim == 2 and ".attentions." in table[name] else tensor
        for name, tensor in tensors.items()
    }


def load_taming_config(path: str | Path, config: str | Path | dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of the [`LiquidVQModel`] that [`load_taming_codec`] loads, without the weights; as there."""
    if not isinstance(config, dict):
        default = Path(path) / TAMING_CONFIG_NAME if Path(path).is_dir() else Path(path).with_suffix(".yaml")
        file = default if config is None else Path(config)
        config = read_yaml(file)
    return vq_config_from_taming(config)


def save_taming_codec(codec: LiquidVQModel, directory: str | Path) -> None:
    """Writes a codec as taming's `vqgan.ckpt` and `vqgan.yaml`, which [`load_taming_codec`] reads back bit by bit.

    Args:
        codec ([`LiquidVQModel`]): The codec.
        directory (`str` or `Path`): Where to write; made if it does not exist.

    Raises:
        ValueError: If taming cannot express the codec's configuration.
    """
    config = taming_config_from_vq(codec.config)
    state_dict = tensors_from_codec(codec, vq_key_table(codec.config))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state_dict}, directory / TAMING_CHECKPOINT_NAME)
    (directory / TAMING_CONFIG_NAME).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def vq_config_from_taming(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of [`LiquidVQModel`] for a taming configuration.

    Args:
        config (`dict`): `{"ddconfig": {...}, "embed_dim": int, "n_embed": int}`, or a whole `vqgan.yaml`, which holds
            that under `model.params`.

    Returns:
        `dict`: For Chameleon's `vqgan.yaml`, `CHAMELEON_VQ_CONFIG`.

    Raises:
        ValueError: If a key is missing, or asks for what diffusers' `VQModel` cannot express.
    """
    params = config
    for level in ("model", "params"):
        params = params.get(level, params) if isinstance(params, dict) else params
    check_keys("The configuration", params, required=("ddconfig", "embed_dim", "n_embed"))
    ddconfig = params["ddconfig"]
    check_keys("ddconfig", ddconfig, required=DDCONFIG_KEYS, optional=(*DDCONFIG_FIXED, "dropout"))
    # A file that remaps codes stands beside `ddconfig`.
    # taming's first convolution gives ch channels, diffusers' gives as many as the first level has.
    ch, ch_mult = ddconfig["ch"], ddconfig["ch_mult"]
    given = {"remap": params.get("remap"), "ch_mult[0]": ch_mult[0], **ddconfig}
    for key, value in (DDCONFIG_FIXED | {"remap": None, "ch_mult[0]": 1}).items():
        if given.get(key, value) != value:
            raise ValueError(f"The configuration has {key}={given[key]!r}, but only {key}={value!r} is supported.")
    # Level i works at resolution / 2**i; taming attends wherever that number is listed.
    attends = [ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"] for level in range(len(ch_mult))]
    return {
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": ["AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in reversed(attends)],
        "block_out_channels": [ch * factor for factor in ch_mult],
        "layers_per_block": ddconfig["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": ddconfig["z_channels"],
        "sample_size": ddconfig["resolution"],
        "num_vq_embeddings": params["n_embed"],
        "norm_num_groups": 32,
        "vq_embed_dim": params["embed_dim"],
        "mid_block_add_attention": True,
    }


def taming_config_from_vq(vq_config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of [`vq_config_from_taming`], nested as in taming's `vqgan.yaml`.

    Args:
        vq_config (`dict`): Arguments of [`LiquidVQModel`], or its `config`.

    Returns:
        `dict`: `{"model": {"target": ..., "params": {...}}}`.

    Raises:
        ValueError: If taming cannot express the configuration, naming what is in the way.
    """
    channels, resolution = vq_config["block_out_channels"], vq_config["sample_size"]
    embed_dim = vq_config["latent_channels"] if vq_config["vq_embed_dim"] is None else vq_config["vq_embed_dim"]
    attends = [level for level, kind in enumerate(vq_config["down_block_types"]) if kind == "AttnDownEncoderBlock2D"]
    ddconfig = {
        "double_z": False,
        "z_channels": vq_config["latent_channels"],
        "resolution": resolution,
        "in_channels": vq_config["in_channels"],
        "out_ch": vq_config["out_channels"],
        "ch": channels[0],
        "ch_mult": [count // channels[0] for count in channels],
        "num_res_blocks": vq_config["layers_per_block"],
        "attn_resolutions": [resolution // 2**level for level in attends],
        "dropout": 0.0,
    }
    params = {"embed_dim": embed_dim, "n_embed": vq_config["num_vq_embeddings"], "ddconfig": ddconfig}
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}

    check_expressible("A taming VQGAN", vq_config, vq_config_from_taming(config))
    return config


def check_expressible(name: str, vq_config: dict[str, Any], expressed: dict[str, Any]) -> None:
    """Raises a `ValueError` if a codec of another repository, which says `expressed`, cannot say all of `vq_config`."""
    given = {"norm_type": "group", "lookup_from_codebook": False, **vq_config}
    if given["vq_embed_dim"] is None:
        given["vq_embed_dim"] = given["latent_channels"]
    for key, value in ({"norm_type": "group", "lookup_from_codebook": False} | expressed).items():
        is_same = list(given[key]) == value if isinstance(value, list) else given[key] == value
        if not is_same:
            raise ValueError(f"{name} cannot have {key}={given[key]!r}: the nearest it can express is {value!r}.")


def vq_key_table(
    vq_config: dict[str, Any], names: dict[str, str] = NAMES, counts_from_finest: bool = True
) -> dict[str, str]:
    """Every tensor's name in taming -> its name in [`LiquidVQModel`].

    Args:
        vq_config (`dict`): Arguments of the [`LiquidVQModel`].
        names (`dict`, *optional*): What the other one calls each part of a path.
        counts_from_finest (`bool`, defaults to `True`): Whether it counts the decoder's levels from the finest.

    Returns:
        `dict`: Names to names.
    """
    last = len(vq_config["block_out_channels"]) - 1
    with torch.device("meta"):
        keys = list(LiquidVQModel(**vq_config).state_dict())
    table = {}
    for key in keys:
        name = key
        if counts_from_finest:
            name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{last - int(level[1])}", name)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        table[name] = key
    return table
