"""Writes the reference layout: a plain causal language model with its codec beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers  # its models, as they are used
from huggingface_hub import save_torch_state_dict
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..codecs.taming import save_taming_codec
from ..codecs.unitok import UNITOK_CHECKPOINT_NAME, save_unitok_codec
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.liquid.processing_liquid import LiquidProcessor, build_processor
from ..models.liquid.reference import (
    DIFFUSERS_CODEC_FOLDER,
    EXPORTED_LAYOUT,
    EXPORTED_LAYOUT_KEY,
    REFERENCE_CODEC_FOLDER,
)
from ..models.liquid.unitok_reference import UNITOK_TOKENS, UniTokConfig, to_unitok
from ..models.liquid.vocabulary import REFERENCE_TOKENS
from ..utils.files import read_json, write_json


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
    config.image_layout.check_one_code(
        "a plain causal language model has no place for the head that draws them: use save_pretrained, or export_unitok for "
        "UniTok's own layout."
    )
    if isinstance(processor, LiquidProcessor):
        processor.check_fits(config)
        tokenizer = processor.tokenizer
    else:
        tokenizer = build_processor(config, processor).tokenizer
    # What the image tokens are called here -> what the reference calls them.
    renamed = {
        tokenizer.convert_ids_to_tokens(getattr(config, name)): token for name, token in REFERENCE_TOKENS.items()
    }
    renamed = {given: token for given, token in renamed.items() if given != token}
    if taken := [token for token in renamed.values() if token in tokenizer.get_vocab()]:
        raise ValueError(
            f"The tokenizer has other tokens of the reference's names, {', '.join(taken)}: rename them first."
        )

    text_model = model.model.text_model
    text_model.save_pretrained(directory, **kwargs)
    layout = {name: getattr(config, name) for name in EXPORTED_LAYOUT}
    layout["codebook_size"] = config.codebook_size  # which engines that draw need, as eoi_token_id
    layout["eoi_token_id"] = config.eoi_token_id
    config_dict = read_json(directory / CONFIG_NAME)
    write_json(directory / CONFIG_NAME, {**config_dict, EXPORTED_LAYOUT_KEY: layout})
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if renamed:
        # Tokenizers cannot rename a token: as the reference's TRAIN.md says, its files are edited.
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            if (file := directory / name).exists():
                write_json(file, _rename(read_json(file), renamed))
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.add_tokens(list(renamed.values()), special_tokens=True)
        tokenizer.save_pretrained(directory)
    try:
        save_taming_codec(model.model.vq_model, directory / REFERENCE_CODEC_FOLDER)
    except ValueError:
        model.model.vq_model.save_pretrained(directory / DIFFUSERS_CODEC_FOLDER)


def export_unitok(
    model: LiquidForCausalLM, processor: LiquidProcessor, directory: str | os.PathLike, max_shard_size: str = "5GB"
) -> None:
    """Writes UniTok's own layout, that of `FoundationVision/unitok_mllm`, with the codec as `unitok_tokenizer.pth` beside it.

    Args:
        model ([`LiquidForCausalLM`]): With several codes a position, on llama.
        processor ([`LiquidProcessor`]): Its processor.
        directory (`str` or `os.PathLike`): Where to write; made if it does not exist.
        max_shard_size (`str`, defaults to `"5GB"`): Of files with weights.

    Raises:
        ValueError: If the model is another one, the processor does not fit it, or its image tokens are not those of the
            layout; nothing is written then.
    """
    text_model = getattr(getattr(model, "model", None), "text_model", None)
    if (
        not isinstance(model, LiquidForCausalLM)
        or model.code_head is None
        or not isinstance(text_model, transformers.LlamaForCausalLM)
    ):
        raise ValueError(
            f"UniTok's layout has several codes a position and llama, got {type(model).__name__} on "
            f"{type(text_model).__name__}."
        )
    processor.check_fits(model.config)
    tokens = {name: getattr(processor, name) for name in UNITOK_TOKENS}
    if tokens != UNITOK_TOKENS:
        raise ValueError(f"UniTok's layout has the image tokens {UNITOK_TOKENS}, got {tokens}.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(to_unitok(model.state_dict()), directory, max_shard_size=max_shard_size)
    config_dict = text_model.config.to_dict() | {"architectures": ["MiniGeminiLlamaForCausalLM"]}
    layout = {name: getattr(model.config, name) for name in ("vq_config", "image_size")}
    write_json(
        directory / CONFIG_NAME, config_dict | {"model_type": UniTokConfig.model_type, EXPORTED_LAYOUT_KEY: layout}
    )
    model.generation_config.save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    save_unitok_codec(model.model.vq_model, directory / UNITOK_CHECKPOINT_NAME)


def _rename(tree: Any, names: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {names.get(key, key): _rename(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rename(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree
