"""UniTok's language model as it is published (`FoundationVision/unitok_mllm`, model type `mini_gemini`): a llama, and beside
its weights those of what embeds and draws several codes a position. Facts are those of `eval/liquid/` in
github.com/FoundationVision/UniTok.
"""

from __future__ import annotations

import os
import re
from functools import cached_property, partial
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from ...codecs.unitok import UNITOK_CHECKPOINT_NAME, UNITOK_SIZES, UniTokModel, load_unitok_codec
from ...utils.files import read_json
from .chat_template import read_template
from .configuration_liquid import LiquidConfig
from .reference import EXPORTED_LAYOUT_KEY, ReferenceCheckpoint, hub_arguments


# Where the codec is published.
UNITOK_CODEC_REPO = "FoundationVision/unitok_tokenizer"
# Bytes that no text has are its image tokens, and "no text" is a text. It has no placeholder; the next byte is ours.
UNITOK_TOKENS = {"boi_token": "<0x00>", "eoi_token": "<0x01>", "image_token": "<0x02>"}
UNITOK_TOKENS |= {"uncond_token": "<unconditional>"}
# UniTok's settings of `infer_genai.py`, and the weight of the z-loss in its `forward`.
UNITOK_IMAGE_GENERATION_CONFIG = {"guidance_scale": 5.0, "do_sample": True}
UNITOK_IMAGE_GENERATION_CONFIG |= {"temperature": 0.9, "top_k": 2048, "top_p": 0.96}
UNITOK_MAX_Z_LOSS_COEF = 5e-5

# How our names of weights begin and end -> UniTok's. In both directions, the first one that fits.
NAMES = [
    ("model.code_embedder.codebooks.", "", "model.multi_embedder.quantizer.codebooks.", ".codebook.weight"),
    ("model.code_embedder.projection.", "", "model.multi_embedder.attn_projection.", ""),
    ("model.code_embedder.mlp.", "", "model.multi_embedder.mm_projector.", ""),
    ("model.text_model.lm_head.", "", "lm_head.", ""),
    ("model.text_model.model.", "", "model.", ""),
    ("code_head.output.", "", "ar_head.linear_head.", ""),
    ("code_head.codebooks.", "", "ar_head.codebooks.", ""),
    ("code_head.body.", "", "ar_head.", ""),
]
# How often codes were used in training, and a bias that is always 0.
SKIPPED = re.compile(
    r"model\.multi_embedder\.(quantizer\.codebooks\.\d+\.vocab_usage|attn_projection\.attn\.zero_k_bias)"
)


def from_unitok(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under UniTok's names under ours, without its codec. An unknown name stays, and is refused in loading."""
    theirs = [(*one[2:], *one[:2]) for one in NAMES]
    return {_renamed(name, theirs): one for name, one in tensors.items() if not SKIPPED.fullmatch(name)}


def to_unitok(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of [`from_unitok`]."""
    tensors = {_renamed(name, NAMES): one for name, one in state_dict.items() if ".vq_model." not in name}
    name = "model.multi_embedder.attn_projection.attn."
    return tensors | {f"{name}zero_k_bias": torch.zeros_like(tensors[f"{name}q_bias"])}


def _renamed(name: str, table: list[tuple[str, str, str, str]]) -> str:
    for prefix, suffix, new_prefix, new_suffix in table:
        if name.startswith(prefix) and name.endswith(suffix):
            return new_prefix + name[len(prefix) : len(name) - len(suffix)] + new_suffix
    return name


class UniTokConfig(LiquidConfig):
    """By which `AutoConfig` knows `FoundationVision/unitok_mllm`. What it loads is a [`LiquidConfig`]; only the one of the
    loaded model has the ids of the text that stands for "no text", which are the tokenizer's."""

    model_type = "mini_gemini"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        theirs = ("model_type", "architectures", "auto_map", EXPORTED_LAYOUT_KEY)
        of_llama = {name: value for name, value in config_dict.items() if name not in theirs}
        codec = {"sample_size": 256, "num_codebooks": 8, "num_vq_embeddings": 4096, "vq_embed_dim": 64}
        ours = {
            "text_config": of_llama | {"model_type": "llama"},
            "vq_config": codec | {"layers_per_block": [2, 4]} | UNITOK_SIZES["vitamin_large"],
            "image_token_offset": 0,
            "boi_token_id": 3,
            "eoi_token_id": 4,
            "image_token_id": 5,
            "uncond_token_id": 6,
            "max_z_loss_coef": UNITOK_MAX_Z_LOSS_COEF,
            "image_generation_config": UNITOK_IMAGE_GENERATION_CONFIG,
        }
        return LiquidConfig.from_dict(ours | config_dict.get(EXPORTED_LAYOUT_KEY, {}), **kwargs)


class UniTokReference(ReferenceCheckpoint):
    """A checkpoint in the layout of `FoundationVision/unitok_mllm`; as [`ReferenceCheckpoint`].

    Args:
        name_or_path (`str` or `os.PathLike`): A name on the Hub or a local copy.
        vq_checkpoint (`str` or `os.PathLike`, *optional*): The codec, `unitok_tokenizer.pth`, or its folder. Defaults to
            the one in the repository, and else to that of `FoundationVision/unitok_tokenizer`.
        kwargs: As in `from_pretrained`; those that say where files come from are used.

    Raises:
        ValueError: If its tokenizer lacks the bytes that are its image tokens.
    """

    model_type = UniTokConfig.model_type

    def __init__(self, name_or_path: str | os.PathLike, vq_checkpoint: str | os.PathLike | None = None, **kwargs: Any):
        self.name_or_path, self.vq_checkpoint, self.hub = name_or_path, vq_checkpoint, hub_arguments(kwargs)
        self._find = partial(cached_file, name_or_path, _raise_exceptions_for_missing_entries=False, **self.hub)
        config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **self.hub)
        self._config: LiquidConfig = UniTokConfig.from_dict(config_dict)
        self.text_config = self._config.text_config
        here = {"config": self.text_config, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(name_or_path, **here, **self.hub)
        single = [token for name, token in UNITOK_TOKENS.items() if name != "uncond_token"]
        if missing := [token for token in single if token not in self.tokenizer.get_vocab()]:
            raise ValueError(
                f"{name_or_path}: the tokenizer has no bytes {', '.join(missing)}, which begin and end images."
            )
        if self.tokenizer.chat_template is None:  # Vicuna's words, `vicuna_v1` of `eval/liquid/conversation.py`
            self.tokenizer.chat_template = read_template("vicuna")
        # Their ids stay; but texts are no longer split within their names.
        self.tokenizer.add_tokens(
            [AddedToken(one, special=True, normalized=False) for one in single], special_tokens=True
        )

    @cached_property
    def config(self) -> LiquidConfig:
        """The configuration of the whole."""
        for name, token in UNITOK_TOKENS.items():
            ids = self.tokenizer.encode(token, add_special_tokens=False)
            setattr(self._config, f"{name}_id", ids if name == "uncond_token" and len(ids) > 1 else ids[0])
        self._config.name_or_path = str(self.name_or_path)
        return self._config

    @cached_property
    def codec(self) -> UniTokModel:
        """The codec, in eval mode."""
        file = self.vq_checkpoint or self._find(UNITOK_CHECKPOINT_NAME)
        if file is None:
            where = {name: self.hub[name] for name in self.hub if name not in ("revision", "subfolder")}
            file = hf_hub_download(UNITOK_CODEC_REPO, UNITOK_CHECKPOINT_NAME, **where)
        return load_unitok_codec(file, self.config.vq_config)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights under our names, those of the codec with them."""
        index = self._find(SAFE_WEIGHTS_INDEX_NAME) or self._find(WEIGHTS_INDEX_NAME)
        names = {SAFE_WEIGHTS_NAME if self._find(SAFE_WEIGHTS_NAME) else WEIGHTS_NAME}
        if index is not None:
            names = {*read_json(index)["weight_map"].values()}
        tensors: dict[str, torch.Tensor] = {}
        for name in sorted(names):
            tensors |= load_state_dict(cached_file(self.name_or_path, name, **self.hub))
        return from_unitok(tensors) | {f"model.vq_model.{key}": one for key, one in self.codec.state_dict().items()}
