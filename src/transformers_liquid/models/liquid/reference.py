"""What a checkpoint of the reference layout says: its configuration, its tokenizer, its codec. Builds no model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from ...codecs.taming import (
    TAMING_CHECKPOINT_NAME,
    TAMING_CONFIG_NAME,
    load_taming_codec,
    read_yaml,
    vq_config_from_taming,
)
from ...codecs.vq_model import LiquidVQModel
from .configuration_liquid import LiquidConfig
from .vocabulary import IMAGE_MARK, REFERENCE_TOKENS, RESERVED_TOKEN


# Where the reference keeps its codec: in `chameleon/` of the Space.
REFERENCE_CODEC_REPO = "Junfeng5/Liquid_demo"
REFERENCE_CODEC_FOLDER = "chameleon"
# The key that our exports add to the plain `config.json`: what that layout cannot say otherwise.
EXPORTED_LAYOUT_KEY = "liquid_layout"
# An export's codec that taming cannot express lies here, as diffusers saves it.
DIFFUSERS_CODEC_FOLDER = "vq_model"

DIFFUSERS_CHECKPOINT_NAME = "diffusion_pytorch_model.safetensors"
# Where a repository of the reference layout may hold a codec of its own: folder, configuration, weights.
CODEC_PLACES = (
    (REFERENCE_CODEC_FOLDER, TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME),
    ("", TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME),
    (DIFFUSERS_CODEC_FOLDER, CONFIG_NAME, DIFFUSERS_CHECKPOINT_NAME),
)

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


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
        return False  # nothing there: transformers says what is missing
    if config_dict.get("model_type") == LiquidConfig.model_type:
        return False
    if "model_type" not in config_dict and find_adapter_config_file(name_or_path, **hub_arguments(kwargs)) is not None:
        return False  # transformers loads the base of an adapter
    reference_tokenizer(name_or_path, _text_config(name_or_path, **kwargs), **kwargs)
    return True


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
    tokenizer = reference_tokenizer(name_or_path, text_config, **kwargs)
    vq_config = _codec_config(find_codec(name_or_path, vq_checkpoint, weights=False, **kwargs), **kwargs)
    layout = dict(getattr(text_config, EXPORTED_LAYOUT_KEY, {}))
    if image_token_offset is not None:
        layout["image_token_offset"] = image_token_offset
    if "image_token_offset" not in layout:
        layout["image_token_offset"] = _reference_offset(name_or_path, text_config, tokenizer, vq_config)
    if "image_token_id" not in layout:
        layout["image_token_id"] = _placeholder_id(tokenizer)
    token_ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in REFERENCE_TOKENS.items()}
    return LiquidConfig(text_config=text_config, vq_config=vq_config, **layout, **token_ids)


def load_codec(name_or_path: str | os.PathLike, **kwargs: Any) -> LiquidVQModel:
    """Loads a codec from wherever one may lie.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder with `vqgan.ckpt` and `vqgan.yaml`, such a `.ckpt`, or a folder or
            name on the Hub of a saved [`LiquidVQModel`].
        kwargs: As in `from_pretrained`; those that say where files come from are used.

    Returns:
        [`LiquidVQModel`] in eval mode.

    Raises:
        ValueError: If it is no codec, or a key of it is unknown or missing.
    """
    location = Path(name_or_path) if Path(name_or_path).exists() else str(name_or_path)
    if _is_taming(location):
        return load_taming_codec(location)
    _codec_config(location, **kwargs)
    try:
        codec, info = LiquidVQModel.from_pretrained(location, output_loading_info=True, **_codec_hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise _not_a_codec(location, error) from error
    check_loading_info(f"The codec {location}", info)
    return codec.eval()


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


def reference_tokenizer(
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
        is_free = RESERVED_TOKEN.fullmatch(token) and token not in special
        if is_free and tokenizer.encode(token, add_special_tokens=False) == [token_id]:
            return token_id
    raise ValueError(
        f"The tokenizer has neither {IMAGE_MARK!r} nor a reserved token such as '<unused3>' to stand for the codes of "
        "an input image. Rename an unused token of it to " + repr(IMAGE_MARK) + "."
    )


def find_codec(
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
        return vq_config_from_taming(read_yaml(file))
    try:
        config = LiquidVQModel.load_config(location, **_codec_hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise _not_a_codec(location, error) from error
    if "num_vq_embeddings" not in config:
        raise _not_a_codec(location, f"Its config.json is of a {config.get('_class_name', 'model')}.")
    return config


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
        f"{str(location)!r} is no codec: expected a folder with {TAMING_CHECKPOINT_NAME} and "
        f"{TAMING_CONFIG_NAME}, such a .ckpt, or a folder or name on the Hub of a saved LiquidVQModel. {error}"
    )


def check_loading_info(name: str, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info[what]))
        if keys:
            raise ValueError(f"{name} has {len(keys)} {what.replace('_', ' ')}: {', '.join(keys[:10])}.")
