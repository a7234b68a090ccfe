"""A codec from wherever one may lie. Each place is recognised by the files and keys that are there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..checkpoints import find_checkpoint
from ..utils.files import read_json
from ..utils.hub import hub_arguments, naming
from .llamagen import load_llamagen_codec
from .taming import (
    TAMING_CHECKPOINT_NAME,
    TAMING_CONFIG_NAME,
    codec_from_tensors,
    load_taming_codec,
    load_taming_config,
    vq_config_from_taming,
    vq_key_table,
)
from .unitok import codec_class, load_unitok_codec
from .vq_model import CodeMixin, LiquidVQModel, downsample_factor


# Where the reference keeps its codec: in `chameleon/` of the Space. Its published models do without one of their own.
REFERENCE_CODEC_REPO = "Junfeng5/Liquid_demo"
REFERENCE_CODEC_FOLDER = "chameleon"
REFERENCE_CODEC_NAMES = ("chameleon", REFERENCE_CODEC_REPO, "Junfeng5/Liquid_V1_7B")
# A codec of an export that taming cannot express lies here, as diffusers saves it.
DIFFUSERS_CODEC_FOLDER = "vq_model"

PIPELINE_INDEX_NAME = "model_index.json"
EXPECTED = (
    f"expected a folder with {TAMING_CHECKPOINT_NAME} and {TAMING_CONFIG_NAME}, such a .ckpt, a .pt of LlamaGen, UniTok's "
    ".pth, a saved LiquidVQModel or VQModel, a pipeline of diffusers with a VQModel (amused/amused-256), or a Liquid "
    "checkpoint (liquid-emoji); names on the Hub may go on with a file or folder."
)


@dataclass(frozen=True)
class FoundCodec:
    """A codec that was found.

    Attributes:
        config (`dict`): Arguments of its [`LiquidVQModel`].
        load (`Callable`): Reads its weights, which are fetched for it: [`LiquidVQModel`] in float32 and eval mode.
    """

    config: dict[str, Any]
    load: Callable[[], CodeMixin]


def load_codec(name_or_path: str | os.PathLike, **kwargs: Any) -> CodeMixin:
    """Loads a codec from wherever one may lie.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder or a name on the Hub of one of these, or a file:
            a Liquid checkpoint, of which the language model is not read (`"liquid-emoji"` is the embedded one);
            a saved [`LiquidVQModel`] or diffusers `VQModel`; a pipeline of diffusers that has one, such as
            `"amused/amused-256"`; taming's `vqgan.ckpt` and `vqgan.yaml`; a checkpoint of LlamaGen, such as
            `"peizesun/llamagen_t2i/vq_ds16_t2i.pt"`; UniTok's
            `"FoundationVision/unitok_tokenizer/unitok_tokenizer.pth"`; Chameleon as transformers saves it, where it has a decoder.
            `"chameleon"` is the codec of the reference.
        kwargs: As in `from_pretrained`; those that say where files come from are used.

    Returns:
        [`LiquidVQModel`], or a [`UniTokModel`] of several codes a position, in float32 and eval mode.

    Raises:
        OSError: If there is nothing of that name, or the network fails.
        ValueError: If it is no codec, or a key of it is unknown or missing.
    """
    return find_codec(name_or_path, **hub_arguments(kwargs)).load()


def find_codec(name_or_path: str | os.PathLike, **hub: Any) -> FoundCodec:
    """What [`load_codec`] loads, without its weights where these lie apart from its configuration."""
    given = os.fspath(name_or_path)
    name = find_checkpoint(given)
    if name in REFERENCE_CODEC_NAMES and not os.path.exists(name):
        folder = fetch_reference_codec(weights=False, **hub)
        return FoundCodec(
            load_taming_config(folder), lambda: load_taming_codec(fetch_reference_codec(weights=True, **hub))
        )
    if not os.path.exists(name):
        on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?", name)  # a repository, and what of it
        if on_hub is None:
            raise ValueError(_no_codec(given, "nothing of that name, here or on the Hub"))
        name, inside = on_hub.groups()
        if inside and Path(inside).suffix:
            with naming(given):
                name = cached_file(name, inside, **hub)
        elif inside:
            hub = hub | {"subfolder": inside}
    if not os.path.isfile(name):
        with naming(given):
            return _in_repository(name, given, hub)
    if Path(name).suffix == ".ckpt" or Path(name).with_suffix(".yaml").is_file():
        return FoundCodec(load_taming_config(name), partial(load_taming_codec, name))
    codec = load_unitok_codec(name) if Path(name).suffix == ".pth" else load_llamagen_codec(name)
    return FoundCodec(dict(codec.config), lambda: codec)


def fetch_reference_codec(weights: bool, **hub: Any) -> str:
    """The folder of the reference's codec, from its Space; its weights on demand."""
    for name in (TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME)[: 1 + weights]:
        file = hf_hub_download(REFERENCE_CODEC_REPO, f"{REFERENCE_CODEC_FOLDER}/{name}", repo_type="space", **hub)
    return str(Path(file).parent)


def _in_repository(name: str, given: str, hub: dict[str, Any]) -> FoundCodec:
    """The codec of a folder or a repository of the Hub, which an error calls as it was `given`."""
    find = partial(cached_file, name, _raise_exceptions_for_missing_entries=False, **hub)

    def read(file: str) -> dict[str, Any]:
        return {} if (found := find(file)) is None else read_json(found)

    for folder in (REFERENCE_CODEC_FOLDER, ""):
        if (file := find(os.path.join(folder, TAMING_CONFIG_NAME))) is not None:
            return FoundCodec(load_taming_config(Path(file).parent), partial(_load_taming, name, folder, hub))

    config, index = read(CONFIG_NAME), read(PIPELINE_INDEX_NAME)
    if "num_vq_embeddings" in config:
        return FoundCodec(config, partial(_load_diffusers, name, codec_class(config), **hub))
    if config.get("model_type") == "liquid":
        return FoundCodec(config["vq_config"], partial(_load_liquid, name, config["vq_config"], hub))
    if config.get("model_type") == "chameleon":
        return _in_chameleon(name, config, hub)

    classes = {part: value[-1] for part, value in index.items() if isinstance(value, list)}
    part = next(
        (part for part, kind in classes.items() if kind in ("VQModel", "LiquidVQModel")), DIFFUSERS_CODEC_FOLDER
    )
    if "num_vq_embeddings" in (vq_config := read(f"{part}/{CONFIG_NAME}")):
        # A VQModel does not know the size of pictures, but what draws in its latents does.
        denoiser = next((part for part in ("transformer", "unet") if part in classes), "")
        size = read(os.path.join(denoiser, CONFIG_NAME)).get("sample_size")
        size = {"sample_size": size * downsample_factor(vq_config)} if isinstance(size, int) else {}
        where = hub | {"subfolder": Path(hub.get("subfolder", ""), part).as_posix()}
        return FoundCodec(vq_config | size, partial(_load_diffusers, name, LiquidVQModel, **where, **size))

    if kind := config.get("model_type", config.get("_class_name")):
        raise ValueError(_no_codec(given, f"a model of type {kind!r}, which has no codec"))
    if kind := index.get("_class_name"):
        raise ValueError(_no_codec(given, f"a {kind} without a VQModel"))
    if os.path.isdir(name):
        raise FileNotFoundError(_no_codec(given, f"a folder of {', '.join(sorted(os.listdir(name))[:5]) or 'nothing'}"))
    raise ValueError(_no_codec(given, "nothing of that name, here or on the Hub"))


def _no_codec(given: str, found: str) -> str:
    return f"{given!r} is no codec: {EXPECTED} Found: {found}."


def _load_taming(name: str, folder: str, hub: dict[str, Any]) -> LiquidVQModel:
    return load_taming_codec(Path(cached_file(name, os.path.join(folder, TAMING_CHECKPOINT_NAME), **hub)).parent)


def _load_diffusers(name: str, kind: type[CodeMixin], **kwargs: Any) -> CodeMixin:
    return kind.from_pretrained(name, **kwargs).float().eval()


def _load_liquid(name: str, vq_config: dict[str, Any], hub: dict[str, Any]) -> CodeMixin:
    codec = codec_class(vq_config)(**vq_config)
    try:
        codec.load_state_dict(_read_part(name, "vq_model.", hub))
    except RuntimeError as error:
        raise ValueError(f"{name} holds no codec that fits its configuration: {error}") from error
    return codec.eval()


def _in_chameleon(name: str, config: dict[str, Any], hub: dict[str, Any]) -> FoundCodec:
    """Chameleon as transformers saves it, with taming's names within `model.vqmodel`.

    transformers has the encoder alone, and so has facebook/chameleon-7b; conversions of Anole (transformers' pull request
    32013) keep the decoder.
    """
    theirs = AutoConfig.for_model("chameleon", vq_config=config.get("vq_config", {})).vq_config
    ddconfig = {
        "double_z": theirs.double_latent,
        "attn_type": theirs.attn_type,
        "ch": theirs.base_channels,
        "ch_mult": list(theirs.channel_multiplier),
        "num_res_blocks": theirs.num_res_blocks,
        "attn_resolutions": theirs.attn_resolutions or [],
        "z_channels": theirs.latent_channels,
        "resolution": theirs.resolution,
        "in_channels": theirs.in_channels,
        "out_ch": theirs.in_channels,
    }
    vq_config = vq_config_from_taming(
        {"ddconfig": ddconfig, "embed_dim": theirs.embed_dim, "n_embed": theirs.num_embeddings}
    )

    def load() -> LiquidVQModel:
        tensors = _read_part(name, "vqmodel.", hub)
        if not any(key.startswith("decoder.") for key in tensors):
            raise ValueError(
                f"{name!r} has the half of Chameleon's codec that reads pictures, not the decoder that draws them "
                "(transformers leaves it out). `chameleon` is the name of the whole codec, from the reference's Space "
                f"{REFERENCE_CODEC_REPO}."
            )
        return codec_from_tensors("Chameleon", name, tensors, vq_config, vq_key_table(vq_config))

    return FoundCodec(vq_config, load)


def _read_part(name: str, prefix: str, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of a part of a model, without the files that hold none of it."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        files = {file for key, file in read_json(index)["weight_map"].items() if prefix in key}
    tensors = {}
    for file in files:
        with safe_open(cached_file(name, file, **hub), framework="pt") as stored:
            keys = [key for key in stored.keys() if prefix in key]  # noqa: SIM118 (it is no mapping)
            tensors |= {key.partition(prefix)[2]: stored.get_tensor(key) for key in keys}
    return tensors
