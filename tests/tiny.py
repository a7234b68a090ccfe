"""Tiny real models, codecs, tokenizers and processors: random weights, everything else as in the large ones."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from transformers_liquid.codecs.vq_model import LiquidVQModel
from transformers_liquid.models.liquid.configuration_liquid import LiquidConfig
from transformers_liquid.models.liquid.image_processing_liquid import LiquidImageProcessor
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor


# 8 x 8 pixels <-> 4 x 4 codes of 16.
TINY_VQ_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "sample_size": 8,
    "num_vq_embeddings": 16,
    "norm_num_groups": 4,
    "vq_embed_dim": 4,
    "mid_block_add_attention": True,
}
# 64 x 64 pixels <-> 4 x 4 positions of 4 codes of 16.
TINY_UNITOK_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "num_codebooks": 4,
    "num_vq_embeddings": 16,
    "vq_embed_dim": 8,
    "block_out_channels": [3, 4, 4, 8, 32],
    "layers_per_block": [1, 2],
    "num_layers": 2,
    "num_attention_heads": 2,
}
CODEBOOK_SIZE = TINY_VQ_CONFIG["num_vq_embeddings"]

# The tokens of `tiny_tokenizer` before the 256 bytes. Their ids: 0, 1, 2, ...
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<boi>", "<eoi>", "<unconditional>"]
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, BOI_ID, EOI_ID, UNCOND_ID = range(7)
IMAGE_TOKEN_OFFSET = len(SPECIAL_TOKENS) + 256
VOCAB_SIZE = IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_NO_KV_HEADS = {name: value for name, value in _SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}

# What sets each base apart is switched on: windows shorter than a picture, caps and scales that change logits.
BASES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "qwen2": _SHAPE,
    "qwen3": _SHAPE,
    "mistral": _SHAPE | {"sliding_window": 6},
    "gemma": _SHAPE,
    "gemma2": _SHAPE | {"sliding_window": 6, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": _SHAPE | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _SHAPE,
    "cohere": _SHAPE | {"logit_scale": 0.25},
    "granite": _SHAPE | {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "olmo2": _SHAPE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": _NO_KV_HEADS,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": _SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": _SHAPE | _MOE | {"num_experts": 4},
    "phi": _NO_KV_HEADS,
}


def tiny_text_config(model_type: str = "llama", tied: bool = True, vocab_size: int = VOCAB_SIZE, **kwargs: Any):
    """The configuration of a base of two layers and 32 channels."""
    return AutoConfig.for_model(
        model_type,
        **BASES[model_type],
        **{
            "vocab_size": vocab_size,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "tie_word_embeddings": tied,
            **kwargs,
        },
    )


def tiny_base(model_type: str = "llama", tied: bool = True, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """A bare causal language model, in eval mode."""
    return _randomize(AutoModelForCausalLM.from_config(tiny_text_config(model_type, tied, **kwargs)), seed).eval()


def tiny_codec(seed: int = 0, **kwargs: Any) -> LiquidVQModel:
    """A codec of 16 codes, 2 pixels per code; its pictures use many of its codes."""
    return _randomize_codec(LiquidVQModel(**{**TINY_VQ_CONFIG, **kwargs}), seed).eval()


def tiny_config(text_config: PreTrainedConfig | None = None, **kwargs: Any) -> LiquidConfig:
    """The configuration of `tiny_model`: the layout of `tiny_tokenizer`."""
    return LiquidConfig(
        **{
            "text_config": tiny_text_config() if text_config is None else text_config,
            "vq_config": TINY_VQ_CONFIG,
            "image_token_offset": IMAGE_TOKEN_OFFSET,
            "boi_token_id": BOI_ID,
            "eoi_token_id": EOI_ID,
            "uncond_token_id": UNCOND_ID,
            "image_token_id": IMAGE_ID,
            **kwargs,
        }
    )


def tiny_model(model_type: str = "llama", tied: bool = True, seed: int = 0, **kwargs: Any) -> LiquidForCausalLM:
    """A Liquid model of about 20,000 parameters, in eval mode."""
    model = LiquidForCausalLM(tiny_config(tiny_text_config(model_type, tied, **kwargs)))
    _randomize(model.model.text_model, seed)
    _randomize_codec(model.model.vq_model, seed)
    return model.eval()


def tiny_model_of_several_codes(model_type: str = "llama", seed: int = 0, **kwargs: Any) -> LiquidForCausalLM:
    """Such a model with 4 codes a position, which have no rows in the vocabulary; in eval mode."""
    text_config = tiny_text_config(model_type, vocab_size=IMAGE_TOKEN_OFFSET)
    codec = {"vq_config": TINY_UNITOK_CONFIG, "image_token_offset": 0}
    model = LiquidForCausalLM(tiny_config(text_config, **codec | kwargs))
    _randomize(model, seed)
    return model.eval()


def tiny_tokenizer(special_tokens: list[str] | None = None, extra_tokens: list[str] | None = None, **kwargs: Any):
    """A tokenizer of bytes: `special_tokens` (`<pad>`, `<s>`, `</s>` among them) have the first ids.

    Args:
        special_tokens: Defaults to `SPECIAL_TOKENS`.
        extra_tokens: Added tokens that are not special, as Gemma's `<unused0>`; after the special ones.
    """
    special_tokens = SPECIAL_TOKENS if special_tokens is None else special_tokens
    extra_tokens = extra_tokens or []
    tokens = [*special_tokens, *extra_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special_tokens)
    backend.add_tokens(extra_tokens)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **kwargs})


def tiny_processor(**kwargs: Any) -> LiquidProcessor:
    """The processor of `tiny_model`."""
    return LiquidProcessor(
        LiquidImageProcessor(size=TINY_VQ_CONFIG["sample_size"], downsample_factor=2),
        tiny_tokenizer(),
        **{"image_token_offset": IMAGE_TOKEN_OFFSET, "codebook_size": CODEBOOK_SIZE, **kwargs},
    )


def tiny_processor_of_several_codes() -> LiquidProcessor:
    """The processor of `tiny_model_of_several_codes`."""
    own = {"image_token_offset": 0, "codebook_size": TINY_UNITOK_CONFIG["num_vq_embeddings"], "num_codebooks": 4}
    return LiquidProcessor(LiquidImageProcessor(size=64, downsample_factor=16), tiny_tokenizer(), **own)


def tiny_checkpoint(path: Any, max_position_embeddings: int = 256) -> str:
    """A folder with a model and its processor."""
    model = tiny_model()
    model.config.text_config.max_position_embeddings = max_position_embeddings
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return str(path)


def tiny_pictures(number: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Random pixel values `(number, 3, height, width)` in [-1, 1]."""
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough that logits depend on every layer; biases and norms count too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(std=0.2, generator=generator)
        elif not name.endswith(("A_log", "D", "dt_proj.bias")):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _randomize_codec(codec: LiquidVQModel, seed: int) -> LiquidVQModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in codec.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return codec
