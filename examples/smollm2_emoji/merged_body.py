"""The body of a language model with its adapter merged for each step, and rows of two sequences: see train_flagship.py."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AttentionInterface

from transformers_liquid import LiquidForCausalLM


def attend_halves(module, query, key, value, attention_mask, halved=0, **kwargs) -> tuple[torch.Tensor, None]:
    """Causal attention; each of the first `halved` rows holds two sequences, which do not see each other."""
    outputs = []
    for rows, number in ((slice(0, halved), 2), (slice(halved, None), 1)) if halved else ((slice(None), 1),):
        states = [whole[rows].unflatten(2, (number, -1)).transpose(1, 2).flatten(0, 1) for whole in (query, key, value)]
        output = F.scaled_dot_product_attention(*states, is_causal=True, scale=module.scaling, enable_gqa=True)
        outputs.append(output.transpose(1, 2).reshape(-1, query.shape[2], *output.shape[1::2]))
    return torch.cat(outputs), None


class MergedBody:
    """The body of a language model, run with plain layers into which an adapter has been merged.

    Args:
        base ([`LiquidForCausalLM`]): Gets the adapter; its trained rows are the last of the vocabulary.
        config ([`~peft.LoraConfig`]): Of `liquid_lora_config`.

    Raises:
        ValueError: If the trained rows are not the last, or the head is not tied.
    """

    def __init__(self, base: LiquidForCausalLM, config: LoraConfig) -> None:
        self.text_model = base.model.text_model.base_model
        layers, self.plain = self.text_model.layers, copy.deepcopy(self.text_model.layers[0]).requires_grad_(False)
        AttentionInterface.register("halves", attend_halves)
        self.plain.self_attn.config._attn_implementation = "halves"
        self.weights = {
            name: torch.stack([layer.get_parameter(name).detach() for layer in layers])
            for name, _ in self.plain.named_parameters()
        }
        self.model = get_peft_model(base, config).train()
        tokens = self.text_model.embed_tokens.token_adapter
        self.rows, self.embeddings = tokens.trainable_tokens_delta["default"], tokens.base_layer.weight.detach()
        first = len(self.embeddings) - len(self.rows)
        if tokens.token_indices["default"][0] != first or not base.config.tie_word_embeddings:
            raise ValueError("The trained rows have to be the last of a tied vocabulary: expand a tied base for this.")
        self.trained, self.factors, self.scaling = [self.rows], {}, config.lora_alpha / config.r
        self.num_codes = len(base.config.image_token_range)
        for path, module in layers[0].named_modules():
            if isinstance(module, LoraLayer):
                name = f"{path}.weight"
                self.weights[name] = self.weights[name].bfloat16()
                for kind in ("lora_B", "lora_A"):
                    apart = [getattr(layer.get_submodule(path), kind)["default"].weight for layer in layers]
                    self.trained.append(torch.stack(apart).detach().requires_grad_())
                    for weight, one in zip(apart, self.trained[-1].detach(), strict=True):
                        weight.data = one  # so that the adapter is trained with it
                self.factors[name] = self.trained[-2:]

    def __call__(self, ids: torch.Tensor, halved: int) -> torch.Tensor:
        """Last hidden states of rows `(batch_size, length)`; each of the first `halved` holds two sequences."""
        hidden = F.embedding(ids, self.table())
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        positions[:halved] %= ids.shape[1] // 2
        position_embeddings = self.text_model.rotary_emb(hidden, position_ids=positions)
        merged = self.weights | {
            name: torch.baddbmm(self.weights[name], up, down, alpha=self.scaling)
            for name, (up, down) in self.factors.items()
        }
        for weights in zip(*merged.values(), strict=True):
            hidden = self.run_layer(dict(zip(merged, weights, strict=True)), hidden, position_embeddings, halved)
        return self.text_model.norm(hidden)

    def table(self) -> torch.Tensor:
        """The embeddings, which are the head too, `(vocab_size, hidden_size)`."""
        return torch.cat([self.embeddings[: -len(self.rows)], self.rows])

    @torch.compile(dynamic=False)  # once for all layers
    def run_layer(self, weights, hidden, position_embeddings, halved: int) -> torch.Tensor:
        options = {"position_embeddings": position_embeddings, "halved": halved}
        return torch.func.functional_call(self.plain, weights, (hidden,), options)
