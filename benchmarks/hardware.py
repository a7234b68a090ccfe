"""How much memory do drawing and training take? Computed from the shapes of models, for the table of docs/hardware.md.

python benchmarks/hardware.py

Nothing is measured: models are built without weights and their parameters counted.

- drawing: weights and cache in bfloat16, the codec in float32, for one guided picture of 512 x 512 (1,024 codes).
- training: for a learned parameter 16 bytes (weight, gradient and the two moments of AdamW, all in float32), for any
  other 2 (bfloat16), for the codec 4.
- activations of 1,000 tokens, bfloat16: 34 bytes x hidden size a layer, or with gradient checkpointing 2 a layer and
  one layer's 34 (Korthikanti et al., arXiv 2205.05198, without the part of attention, which sdpa does not keep).
- minutes: 6 floating-point operations a parameter and token, at 40 % of the 989e12 a second that NVIDIA says of an H100.
"""

from __future__ import annotations

import warnings

import torch
from decode import SHAPES
from peft import get_peft_model

from transformers_liquid import (
    CHAMELEON_VQ_CONFIG,
    LiquidConfig,
    LiquidForCausalLM,
    liquid_lora_config,
    liquid_rows_config,
)


CODES, PROMPT, LORA_RANK = 1024, 40, 64
NAMES = {
    "smollm2-135m": "SmolLM2-135M",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "gemma-7b": "Gemma-7B, the published model",
}


def build(shape: str) -> LiquidForCausalLM:
    text_config = SHAPES[shape].text_config()
    offset = text_config.vocab_size - CHAMELEON_VQ_CONFIG["num_vq_embeddings"]
    config = LiquidConfig(
        text_config=text_config,
        vq_config=CHAMELEON_VQ_CONFIG,
        image_token_offset=offset,
        image_token_id=offset - 4,
        boi_token_id=offset - 3,
        eoi_token_id=offset - 2,
        uncond_token_id=offset - 1,
    )
    with torch.device("meta"):
        return LiquidForCausalLM(config)


def num_parameters(module: torch.nn.Module, learned: bool = False) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad or not learned)


def line(shape: str) -> list[str]:
    """One line of the table, in decimal GB."""
    model = build(shape)
    config = model.config.get_text_config()
    language, codec = num_parameters(model.model.text_model), num_parameters(model.model.vq_model) * 4
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 2 * (PROMPT + CODES) * 2
    drawing = language * 2 + codec + cache
    training = [language * 16 + codec]
    for adapter in (liquid_lora_config(model, r=LORA_RANK), liquid_rows_config(model)):
        learned = num_parameters(get_peft_model(build(shape), adapter), learned=True)
        training.append(language * 2 + learned * 16 + codec)
    layer = 34 * config.hidden_size * 1000
    activations = [config.num_hidden_layers * layer, config.num_hidden_layers * 2 * config.hidden_size * 1000 + layer]
    minutes = 6 * language * 1e7 / (0.4 * 989e12) / 60
    sizes = (language * 2, drawing, cache, *training, *activations)
    return [*(f"{size / 1e9:.1f}" if size > 1e8 else f"{size / 1e9:.2f}" for size in sizes), f"{minutes:.1f}"]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # of adapters on models that are in no repository
    heads = ("weights", "draw one", "each further", "full", "LoRA, r = 64", "rows", "activations", "checkpointed")
    print(f"| GB | {' | '.join(heads)} | minutes |\n{'|---' * 10}|")
    for shape, name in NAMES.items():
        print(f"| {name} | {' | '.join(line(shape))} |")
