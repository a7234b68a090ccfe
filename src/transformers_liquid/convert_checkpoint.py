"""Checkpoints of the reference layout to ours and back.

The model: a plain causal language model with image rows at the end of its vocabulary and `<boi>`, `<eoi>` and
`<unconditional>` in its tokenizer <-> [`LiquidForCausalLM`].

The codec: taming-transformers' `vqgan.ckpt` + `vqgan.yaml` <-> [`LiquidVQModel`]. One table of names
([`vq_key_table`]) serves both directions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import hf_hub_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, cached_file

from .configuration_liquid import LiquidConfig
from .expand_vocabulary import _RESERVED_TOKEN, _assemble
from .modeling_liquid import LiquidForCausalLM, LiquidModel, LiquidPreTrainedModel
from .modeling_liquid_vq import LiquidVQModel
from .pipeline_liquid import build_processor
from .processing_liquid import IMAGE_MARK, LiquidProcessor


# Where the reference keeps its codec: in `chameleon/` of the Space.
REFERENCE_CODEC_REPO = "Junfeng5/Liquid_demo"
REFERENCE_CODEC_FOLDER = "chameleon"
# What the reference's tokenizer calls the tokens of [`LiquidConfig`].
REFERENCE_TOKENS = {"boi_token_id": "<boi>", "eoi_token_id": "<eoi>", "uncond_token_id": "<unconditional>"}
# The key that our exports add to the plain `config.json`: what that layout cannot say otherwise.
EXPORTED_LAYOUT_KEY = "liquid_layout"
# An export's codec that taming cannot express lies here, as diffusers saves it.
DIFFUSERS_CODEC_FOLDER = "vq_model"

TAMING_CHECKPOINT_NAME = "vqgan.ckpt"
TAMING_CONFIG_NAME = "vqgan.yaml"
DIFFUSERS_CHECKPOINT_NAME = "diffusion_pytorch_model.safetensors"
# Where a repository of the reference layout may hold a codec of its own: folder, configuration, weights.
CODEC_PLACES = (
    (REFERENCE_CODEC_FOLDER, TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME),
    ("", TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME),
    (DIFFUSERS_CODEC_FOLDER, CONFIG_NAME, DIFFUSERS_CHECKPOINT_NAME),
)

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")

# taming's discriminator and perceptual loss: training only, and the one thing in a checkpoint that is skipped.
TAMING_TRAINING_PREFIX = "loss."

# The keys of `ddconfig` that a codec differs in.
DDCONFIG_KEYS = (
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
)

# Its other keys, each with the only value that a diffusers `VQModel` can express. `dropout` acts in training only.
DDCONFIG_FIXED = {
    "double_z": False,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}

# Names inside one block: taming's, diffusers'.
RESNET_NAMES = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"))
SHORTCUT_NAMES = (("nin_shortcut", "conv_shortcut"),)
ATTENTION_NAMES = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


def is_reference_checkpoint(name_or_path: str | os.PathLike | None, **kwargs: Any) -> bool:
    """Tells the two layouts that [`LiquidForCausalLM.from_pretrained`] takes apart, without reading weights.

    Args:
        name_or_path (`str` or `os.PathLike`): A repository.
        kwargs: As in `from_pretrained`; those that say where files come from are used.

    Returns:
        `bool`: `False` for a repository of this package, `True` for a plain causal language model with `<boi>`,
        `<eoi>`, `<unconditional>` in its tokenizer and rows for codes after its text ids.

    Raises:
        ValueError: If it is neither of the two.
    """
    if name_or_path is None or isinstance(kwargs.get("config"), LiquidConfig):
        return False
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments(kwargs))
    except OSError:
        # An adapter's folder, or nothing at all: transformers finds its base or says what is missing.
        return False
    if config_dict.get("model_type") == LiquidConfig.model_type:
        return False
    _reference_tokenizer(name_or_path, _text_config(name_or_path, **kwargs), **kwargs)
    return True


def load_reference(
    cls: type[LiquidPreTrainedModel],
    name_or_path: str | os.PathLike,
    vq_checkpoint: str | os.PathLike | None = None,
    image_token_offset: int | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads a checkpoint of the reference layout, such as `Junfeng5/Liquid_V1_7B`.

    Args:
        cls (`type`): [`LiquidForCausalLM`] or [`LiquidModel`].
        name_or_path (`str` or `os.PathLike`): The language model: a name on the Hub or a local copy.
        vq_checkpoint (`str` or `os.PathLike`, *optional*): The codec: a folder with `vqgan.ckpt` and `vqgan.yaml`,
            such a `.ckpt`, or a folder or name on the Hub of a saved [`LiquidVQModel`]. Defaults to the one in the
            repository, and else to `chameleon/` of the reference's Space.
        image_token_offset (`int`, *optional*): Id of code 0, for checkpoints from which it cannot be told.
        output_loading_info (`bool`, defaults to `False`): Whether to return transformers' report as well.
        kwargs: As in `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, `quantization_config`, ...

    Returns:
        A `cls` in eval mode, or that and the report. The weights of the language model are not copied.

    Raises:
        ValueError: If no codec can be reached, the parts do not fit, or a key of theirs is unknown or missing.
    """
    config = reference_config(name_or_path, vq_checkpoint, image_token_offset, **kwargs)
    codec = _load_codec(_find_codec(name_or_path, vq_checkpoint, weights=True, **kwargs), **kwargs)
    # The class itself: AutoModelForCausalLM asks the network for an adapter even if told `local_files_only`.
    base_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
    base, info = base_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    _check_loading_info(f"The language model {name_or_path}", info)

    settings = getattr(base.generation_config, "image_generation_config", None)
    config.dtype = base.config.dtype
    config._attn_implementation = base.config._attn_implementation
    model = _assemble(config, base, codec)
    if settings is not None:
        model.generation_config.image_generation_config = settings
    _adopt_placement(model, base)
    model = model.model if issubclass(cls, LiquidModel) else model
    return (model, info) if output_loading_info else model


def reference_config(
    name_or_path: str | os.PathLike,
    vq_checkpoint: str | os.PathLike | None = None,
    image_token_offset: int | None = None,
    **kwargs: Any,
) -> LiquidConfig:
    """The configuration of a checkpoint of the reference layout, without reading weights.

    Args:
        name_or_path, vq_checkpoint, image_token_offset, kwargs: As in [`load_reference`].

    Returns:
        [`LiquidConfig`]. The codes take the last rows of the vocabulary, behind the tokenizer's: there the reference's
        `liquid/expand_vocabulary.py` puts them. The placeholder, which the reference lacks, is a token that the base
        reserved.

    Raises:
        ValueError: As in [`load_reference`].
    """
    text_config = _text_config(name_or_path, **kwargs)
    tokenizer = _reference_tokenizer(name_or_path, text_config, **kwargs)
    vq_config = _codec_config(_find_codec(name_or_path, vq_checkpoint, weights=False, **kwargs), **kwargs)
    layout = dict(getattr(text_config, EXPORTED_LAYOUT_KEY, {}))
    if image_token_offset is not None:
        layout["image_token_offset"] = image_token_offset
    if "image_token_offset" not in layout:
        layout["image_token_offset"] = _reference_offset(name_or_path, text_config, tokenizer, vq_config)
    if "image_token_id" not in layout:
        layout["image_token_id"] = _placeholder_id(tokenizer)
    token_ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in REFERENCE_TOKENS.items()}
    return LiquidConfig(text_config=text_config, vq_config=vq_config, **layout, **token_ids)


def reference_processor(
    name_or_path: str | os.PathLike, config: LiquidConfig | None = None, **kwargs: Any
) -> LiquidProcessor:
    """The processor of a checkpoint of the reference layout, which has a tokenizer alone.

    Args:
        name_or_path (`str` or `os.PathLike`): The language model: a name on the Hub or a local copy.
        config ([`LiquidConfig`], *optional*): The loaded model's. Defaults to [`reference_config`].
        kwargs: Those of [`reference_config`], if there is no `config`, and those that say where files come from.

    Raises:
        ValueError: If the tokenizer does not fit.
    """
    if config is None:
        config = reference_config(name_or_path, **kwargs)
    tokenizer = _reference_tokenizer(name_or_path, config.text_config, **hub_arguments(kwargs))
    processor = build_processor(config, tokenizer)
    processor.check_fits(config)
    return processor


def export_base_model(
    model: LiquidForCausalLM,
    processor: LiquidProcessor | PreTrainedTokenizerBase,
    directory: str | os.PathLike,
    **kwargs: Any,
) -> None:
    """Writes the reference layout: a plain causal language model that needs nothing of this package.

    Its logits are equal; its tokenizer calls the image tokens `<boi>`, `<eoi>` and `<unconditional>`, whichever
    reserved tokens they were. The codec lies beside it: as `chameleon/vqgan.ckpt` and `vqgan.yaml`, or, if taming
    cannot express it, as diffusers saves it in `vq_model/`. [`LiquidForCausalLM.from_pretrained`] reads all of it back.

    Args:
        model ([`LiquidForCausalLM`]): The model.
        processor ([`LiquidProcessor`] or `PreTrainedTokenizerBase`): Its processor, or the processor's tokenizer.
        directory (`str` or `os.PathLike`): Where to write; made if it does not exist.
        kwargs: As in transformers' `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: If the model is no [`LiquidForCausalLM`] or the tokenizer does not fit it; nothing is written then.
    """
    if not isinstance(model, LiquidForCausalLM):
        raise ValueError(
            f"Only a LiquidForCausalLM can be exported, got {type(model).__name__}. (Merge adapters first.)"
        )
    config, directory = model.config, Path(directory)
    if isinstance(processor, LiquidProcessor):
        processor.check_fits(config)
        tokenizer = processor.tokenizer
    else:
        tokenizer = build_processor(config, processor).tokenizer
    renamed = {}
    for name, token in REFERENCE_TOKENS.items():
        given = tokenizer.convert_ids_to_tokens(getattr(config, name))
        if given == token:
            continue
        if token in tokenizer.get_vocab():
            raise ValueError(
                f"{name} is {getattr(config, name)} ({given!r}), but the tokenizer has another token {token!r}."
            )
        renamed[given] = token

    text_model = model.model.text_model
    text_model.save_pretrained(directory, **kwargs)
    layout = {name: getattr(config, name) for name in ("image_token_offset", "image_token_id", "image_size")}
    config_dict = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    _write_json(directory / CONFIG_NAME, {**config_dict, EXPORTED_LAYOUT_KEY: layout})
    model.generation_config.save_pretrained(directory)
    _save_tokenizer(tokenizer, renamed, directory)
    try:
        save_taming_codec(model.model.vq_model, directory / REFERENCE_CODEC_FOLDER)
    except ValueError:
        model.model.vq_model.save_pretrained(directory / DIFFUSERS_CODEC_FOLDER)


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
    if config is None:
        config = checkpoint.with_suffix(".yaml")
    vq_config = vq_config_from_taming(config if isinstance(config, dict) else _read_yaml(Path(config)))
    codec = LiquidVQModel(**vq_config)
    state_dict = taming_to_vq_state_dict(_read_checkpoint(checkpoint), vq_config)
    for key, expected in codec.state_dict().items():
        if state_dict[key].shape != expected.shape:
            raise ValueError(
                f"{checkpoint}: the tensor for {key} has shape {tuple(state_dict[key].shape)}, but its configuration "
                f"asks for {tuple(expected.shape)}. Are checkpoint and configuration of the same codec?"
            )
    codec.load_state_dict(state_dict)
    return codec.eval()


def save_taming_codec(codec: LiquidVQModel, directory: str | Path) -> None:
    """Writes a codec as taming's `vqgan.ckpt` and `vqgan.yaml`, which [`load_taming_codec`] reads back bit by bit.

    Args:
        codec ([`LiquidVQModel`]): The codec.
        directory (`str` or `Path`): Where to write; made if it does not exist.

    Raises:
        ValueError: If taming cannot express the codec's configuration.
    """
    config = taming_config_from_vq(codec.config)
    state_dict = vq_to_taming_state_dict(codec.state_dict(), codec.config)
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
    _check_keys("The configuration", params, required=("ddconfig", "embed_dim", "n_embed"))
    if params.get("remap") is not None:
        raise ValueError("A codebook with a `remap` file is not supported: use a codec whose codes are all in use.")
    ddconfig = params["ddconfig"]
    _check_keys("ddconfig", ddconfig, required=DDCONFIG_KEYS, optional=(*DDCONFIG_FIXED, "dropout"))
    for key, value in DDCONFIG_FIXED.items():
        if ddconfig.get(key, value) != value:
            raise ValueError(f"ddconfig has {key}={ddconfig[key]!r}, but only {key}={value!r} is supported.")
    ch, ch_mult = ddconfig["ch"], ddconfig["ch_mult"]
    if ch_mult[0] != 1:
        # taming's first convolution gives ch channels, diffusers' gives as many as the first level has.
        raise ValueError(f"ddconfig has ch_mult={list(ch_mult)}, but only a first entry of 1 is supported.")
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
    ddconfig = {
        "double_z": False,
        "z_channels": vq_config["latent_channels"],
        "resolution": resolution,
        "in_channels": vq_config["in_channels"],
        "out_ch": vq_config["out_channels"],
        "ch": channels[0],
        "ch_mult": [count // channels[0] for count in channels],
        "num_res_blocks": vq_config["layers_per_block"],
        "attn_resolutions": [resolution // 2**level for level in _attention_levels(vq_config)],
        "dropout": 0.0,
    }
    params = {"embed_dim": embed_dim, "n_embed": vq_config["num_vq_embeddings"], "ddconfig": ddconfig}
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}

    given = {"norm_type": "group", "lookup_from_codebook": False, **vq_config, "vq_embed_dim": embed_dim}
    expressed = {"norm_type": "group", "lookup_from_codebook": False, **vq_config_from_taming(config)}
    for key, value in expressed.items():
        is_same = list(given[key]) == value if isinstance(value, list) else given[key] == value
        if not is_same:
            raise ValueError(
                f"A taming VQGAN cannot have {key}={given[key]!r}: the nearest it can express is {value!r}."
            )
    return config


def taming_to_vq_state_dict(state_dict: dict[str, torch.Tensor], vq_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Renames the tensors of a taming VQGAN to those of a [`LiquidVQModel`]; `loss.*` is left out.

    Args:
        state_dict (`dict`): taming's tensors.
        vq_config (`dict`): Arguments of the [`LiquidVQModel`].

    Returns:
        `dict`: The same tensors, attention projections as matrices instead of 1 x 1 convolutions.

    Raises:
        ValueError: If a key is unknown or missing, naming it.
    """
    table = vq_key_table(vq_config)
    state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith(TAMING_TRAINING_PREFIX)}
    _check_keys("The taming checkpoint", state_dict, required=table, optional=())
    return {
        key: state_dict[taming_key].flatten(1) if _is_projection(key) else state_dict[taming_key]
        for taming_key, key in table.items()
    }


def vq_to_taming_state_dict(state_dict: dict[str, torch.Tensor], vq_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inverse of [`taming_to_vq_state_dict`].

    Args:
        state_dict (`dict`): A [`LiquidVQModel`]'s tensors.
        vq_config (`dict`): Its arguments, or its `config`.

    Returns:
        `dict`: The same tensors by taming's names.

    Raises:
        ValueError: If a key is unknown or missing, naming it.
    """
    table = vq_key_table(vq_config)
    _check_keys("The codec", state_dict, required=table.values(), optional=())
    return {
        taming_key: state_dict[key][..., None, None] if _is_projection(key) else state_dict[key]
        for taming_key, key in table.items()
    }


def vq_key_table(vq_config: dict[str, Any]) -> dict[str, str]:
    """Every tensor's name in taming -> its name in [`LiquidVQModel`].

    Args:
        vq_config (`dict`): Arguments of the [`LiquidVQModel`].

    Returns:
        `dict`: Names to names.
    """
    channels = list(vq_config["block_out_channels"])
    last = len(channels) - 1
    blocks = vq_config["layers_per_block"]
    modules = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for coder in ("encoder", "decoder"):
        modules += [(f"{coder}.conv_in", f"{coder}.conv_in"), (f"{coder}.conv_out", f"{coder}.conv_out")]
        modules += [(f"{coder}.norm_out", f"{coder}.conv_norm_out")]
        modules += _resnet(f"{coder}.mid.block_1", f"{coder}.mid_block.resnets.0")
        modules += _attention(f"{coder}.mid.attn_1", f"{coder}.mid_block.attentions.0")
        modules += _resnet(f"{coder}.mid.block_2", f"{coder}.mid_block.resnets.1")
    # Both count the encoder's levels from the finest. taming counts the decoder's so too, diffusers in running order.
    for level, count in enumerate(channels):
        down, down_block = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        up, up_block = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        from_finer = channels[max(level - 1, 0)] != count
        from_coarser = channels[min(level + 1, last)] != count
        for block in range(blocks):
            modules += _resnet(f"{down}.block.{block}", f"{down_block}.resnets.{block}", from_finer and block == 0)
        for block in range(blocks + 1):
            modules += _resnet(f"{up}.block.{block}", f"{up_block}.resnets.{block}", from_coarser and block == 0)
        if level in _attention_levels(vq_config):
            for block in range(blocks):
                modules += _attention(f"{down}.attn.{block}", f"{down_block}.attentions.{block}")
            for block in range(blocks + 1):
                modules += _attention(f"{up}.attn.{block}", f"{up_block}.attentions.{block}")
        if level < last:
            modules += [(f"{down}.downsample.conv", f"{down_block}.downsamplers.0.conv")]
        if level > 0:
            modules += [(f"{up}.upsample.conv", f"{up_block}.upsamplers.0.conv")]
    table = {f"{taming}.{kind}": f"{ours}.{kind}" for taming, ours in modules for kind in ("weight", "bias")}
    return {**table, "quantize.embedding.weight": "quantize.embedding.weight"}


def _resnet(taming: str, ours: str, has_shortcut: bool = False) -> list[tuple[str, str]]:
    names = RESNET_NAMES + (SHORTCUT_NAMES if has_shortcut else ())
    return [(f"{taming}.{name}", f"{ours}.{our_name}") for name, our_name in names]


def _attention(taming: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{taming}.{name}", f"{ours}.{our_name}") for name, our_name in ATTENTION_NAMES]


def _attention_levels(vq_config: dict[str, Any]) -> list[int]:
    return [level for level, name in enumerate(vq_config["down_block_types"]) if name == "AttnDownEncoderBlock2D"]


def _is_projection(key: str) -> bool:
    return key.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight"))


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no taming checkpoint at {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds on broken files
        raise ValueError(
            f"{path} cannot be read as plain tensors: it is damaged or incomplete (download it again), or holds pickled "
            f"Python objects, which are never executed (re-save its state dict where you trust it). {error}"
        ) from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict):
        raise ValueError(f"{path} must hold a dict of tensors, or one under 'state_dict', got {type(state_dict)}.")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} must hold a dict of tensors, but {key!r} is {type(value)}.")
    return state_dict


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no taming configuration at {path}: pass it as `config`.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file of plain values: {error}") from error


def _check_keys(name: str, given: Any, required: Iterable[str], optional: Iterable[str] | None = None) -> None:
    """Raises unless `given` has the required keys, and no others than the optional ones unless these are `None`."""
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be a mapping, got {type(given)}.")
    required = set(required)
    if missing := sorted(required - given.keys()):
        raise ValueError(f"{name} lacks {len(missing)} keys that are needed: {', '.join(missing[:10])}.")
    if optional is not None and (unknown := sorted(given.keys() - required - set(optional))):
        raise ValueError(f"{name} has {len(unknown)} unknown keys: {', '.join(map(str, unknown[:10]))}.")


# The reference layout


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where files come from."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def _text_config(
    name_or_path: str | os.PathLike, config: PreTrainedConfig | str | None = None, **kwargs: Any
) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    try:
        return AutoConfig.from_pretrained(name_or_path if config is None else config, **hub_arguments(kwargs))
    except ValueError as error:
        raise _not_a_checkpoint(
            name_or_path, f"its config.json is of no model that transformers knows. {error}"
        ) from error


def _reference_tokenizer(
    name_or_path: str | os.PathLike, text_config: PreTrainedConfig, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a reference checkpoint; raises if it is the tokenizer of something else."""
    kind = f"it is of model type {text_config.model_type!r}"
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _not_a_checkpoint(name_or_path, f"{kind}, which is no causal language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_arguments(kwargs))
    except (OSError, ValueError, KeyError) as error:
        raise _not_a_checkpoint(name_or_path, f"{kind} and has no tokenizer ({error})") from error
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in REFERENCE_TOKENS.values() if token not in vocabulary]
    if missing:
        raise _not_a_checkpoint(name_or_path, f"{kind} and its tokenizer has no {', '.join(missing)}")
    num_rows = getattr(text_config.get_text_config(), "vocab_size", 0)
    if num_rows <= max(vocabulary.values()) + 1:
        raise _not_a_checkpoint(
            name_or_path,
            f"{kind}, and its vocabulary of {num_rows} has no room for image codes after the tokenizer's "
            f"{max(vocabulary.values()) + 1} ids",
        )
    return tokenizer


def _not_a_checkpoint(name_or_path: str | os.PathLike, reason: str) -> ValueError:
    return ValueError(
        f"{name_or_path} is not a Liquid checkpoint: {reason}. Expected model type 'liquid', or a causal language model "
        f"in the reference layout ({', '.join(REFERENCE_TOKENS.values())} in its tokenizer, image codes after the text "
        "ids). Turn a language model into a Liquid model with `transformers_liquid.expand_vocabulary`."
    )


def _reference_offset(
    name_or_path: str | os.PathLike,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    vq_config: dict[str, Any],
) -> int:
    """The reference expands behind the base's rows, but trains and draws behind the tokenizer's tokens."""
    num_rows, num_codes = text_config.get_text_config().vocab_size, vq_config["num_vq_embeddings"]
    behind_rows, behind_tokens = num_rows - num_codes, max(tokenizer.get_vocab().values()) + 1
    if behind_rows < behind_tokens:
        raise ValueError(
            f"{name_or_path}: the tokenizer has {behind_tokens} ids and the codec {num_codes} codes, more than the "
            f"vocabulary of {num_rows} holds. Pass the codec that the model was trained with as `vq_checkpoint=`."
        )
    if behind_rows > behind_tokens:
        raise ValueError(
            f"{name_or_path}: with {num_rows} rows, {behind_tokens} tokens and {num_codes} codes, the codes may begin "
            f"at id {behind_rows} (the last rows) or {behind_tokens} (where the reference's own scripts train and draw "
            "on a base with padded rows). Pass the one that the model was trained with as `image_token_offset=`."
        )
    return behind_rows


def _placeholder_id(tokenizer: PreTrainedTokenizerBase) -> int:
    vocabulary = tokenizer.get_vocab()
    if IMAGE_MARK in vocabulary:
        return vocabulary[IMAGE_MARK]
    special = {str(token) for token in tokenizer.special_tokens_map.values()} | set(REFERENCE_TOKENS.values())
    for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
        is_free = _RESERVED_TOKEN.fullmatch(token) and token not in special
        if is_free and tokenizer.encode(token, add_special_tokens=False) == [token_id]:
            return token_id
    raise ValueError(
        f"The tokenizer has neither {IMAGE_MARK!r} nor a reserved token such as '<unused3>' to stand for the codes of "
        "an input image. Rename an unused token of it to " + repr(IMAGE_MARK) + "."
    )


def _find_codec(
    name_or_path: str | os.PathLike, vq_checkpoint: str | os.PathLike | None, weights: bool, **kwargs: Any
) -> str | Path:
    """A folder or `.ckpt` here, or a name on the Hub. Files of the reference's Space are fetched; the weights on demand."""
    if vq_checkpoint is not None:
        return Path(vq_checkpoint) if Path(vq_checkpoint).exists() else str(vq_checkpoint)
    hub = hub_arguments(kwargs)
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    for folder, config_file, weights_file in CODEC_PLACES:
        local_weights = Path(name_or_path, hub.get("subfolder", ""), folder, weights_file)
        if local_weights.is_file():
            return local_weights.parent
        found = [
            cached_file(name_or_path, str(Path(folder, file)), **hub, **quiet)
            for file in (config_file, weights_file)[: 1 + weights]
        ]
        if None not in found:
            return Path(found[0]).parent
    try:
        found = [
            hf_hub_download(
                REFERENCE_CODEC_REPO,
                f"{REFERENCE_CODEC_FOLDER}/{file}",
                repo_type="space",
                **_codec_hub_arguments(kwargs),
            )
            for file in (TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME)[: 1 + weights]
        ]
    except OSError as error:
        raise ValueError(
            f"{name_or_path} holds no codec ({REFERENCE_CODEC_FOLDER}/{TAMING_CHECKPOINT_NAME}), and the reference's "
            f"Space {REFERENCE_CODEC_REPO} cannot be reached. Pass `vq_checkpoint=`, a folder with "
            f"{TAMING_CHECKPOINT_NAME} and {TAMING_CONFIG_NAME}. {error}"
        ) from error
    return Path(found[0]).parent


def _codec_config(location: str | Path, **kwargs: Any) -> dict[str, Any]:
    if _is_taming(location):
        folder_or_file = Path(location)
        file = folder_or_file / TAMING_CONFIG_NAME if folder_or_file.is_dir() else folder_or_file.with_suffix(".yaml")
        return vq_config_from_taming(_read_yaml(file))
    try:
        config = LiquidVQModel.load_config(location, **_codec_hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise _not_a_codec(location, error) from error
    if "num_vq_embeddings" not in config:
        raise _not_a_codec(location, f"Its config.json is of a {config.get('_class_name', 'model')}.")
    return config


def _load_codec(location: str | Path, **kwargs: Any) -> LiquidVQModel:
    if _is_taming(location):
        return load_taming_codec(location)
    try:
        codec, info = LiquidVQModel.from_pretrained(location, output_loading_info=True, **_codec_hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise _not_a_codec(location, error) from error
    _check_loading_info(f"The codec {location}", info)
    return codec.eval()


def _is_taming(location: str | Path) -> bool:
    """A `config.json` alone is of a codec saved by diffusers; beside a `vqgan.yaml` it is the language model's."""
    if not isinstance(location, Path) or location.is_file():
        return isinstance(location, Path)
    return (location / TAMING_CONFIG_NAME).is_file() or not (location / CONFIG_NAME).is_file()


def _codec_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A codec of another repository has a revision and a folder of its own."""
    return {name: value for name, value in hub_arguments(kwargs).items() if name not in ("revision", "subfolder")}


def _not_a_codec(location: str | Path, error: Any) -> ValueError:
    return ValueError(
        f"vq_checkpoint={str(location)!r} is no codec: expected a folder with {TAMING_CHECKPOINT_NAME} and "
        f"{TAMING_CONFIG_NAME}, such a .ckpt, or a folder or name on the Hub of a saved LiquidVQModel. {error}"
    )


def _check_loading_info(name: str, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info[what]))
        if keys:
            raise ValueError(f"{name} has {len(keys)} {what.replace('_', ' ')}: {', '.join(keys[:10])}.")


def _adopt_placement(model: LiquidForCausalLM, base: Any) -> None:
    """What transformers and accelerate noted on the base about devices and quantization holds for the whole."""
    if (device_map := getattr(base, "hf_device_map", None)) is not None:
        model.hf_device_map = {
            ".".join(filter(None, ("model.text_model", module))): device for module, device in device_map.items()
        }
        model.hf_device_map["model.vq_model"] = next(iter(device_map.values()))
    if (quantizer := getattr(base, "hf_quantizer", None)) is not None:
        model.hf_quantizer = quantizer
        model.config.quantization_config = base.config.quantization_config


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, renamed: dict[str, str], directory: Path) -> None:
    """Tokenizers cannot rename a token: as the reference's TRAIN.md says, its files are edited."""
    tokenizer.save_pretrained(directory)
    if not renamed:
        return
    for file in directory.glob("*.json"):
        if file.name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            _write_json(file, _rename(json.loads(file.read_text(encoding="utf-8")), renamed))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(renamed.values()), special_tokens=True)
    tokenizer.save_pretrained(directory)


def _rename(tree: Any, names: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {names.get(key, key): _rename(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rename(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
