"""Several codes a position, as in UniTok's language model (arXiv 2502.20321, section 4.3): one embedding for all of them, and
a head that draws one after the other. Facts are those of `eval/liquid/model/` in github.com/FoundationVision/UniTok.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, LogitsProcessorList
from transformers.utils import ModelOutput

from ...codecs.unitok import AttnProjection, code_vectors
from ...generation.sampling import draw_codes
from ...ops.chunked_loss import IGNORE_INDEX, chunked_causal_lm_loss


if TYPE_CHECKING:
    from ...generation.guidance import GuidanceLogitsProcessor
    from .configuration_liquid import LiquidConfig
    from .modeling_liquid import LiquidForCausalLM


# Layers of the head that draws the codes of a position.
NUM_HEAD_LAYERS = 3


class CodeEmbedder(nn.Module):
    """The codes of a position to its embedding, which knows those of the positions before it in the picture.

    Args:
        config ([`LiquidConfig`]): With a codec of several codes a position.
    """

    def __init__(self, config: LiquidConfig):
        super().__init__()
        codec, hidden_size = config.vq_config, config.get_text_config().hidden_size
        channels, width = codec["vq_embed_dim"], codec["block_out_channels"][-1]
        self.codebooks = nn.ParameterList(
            torch.randn(config.codebook_size, channels // config.num_codebooks) for _ in range(config.num_codebooks)
        )
        self.projection = AttnProjection(channels, width, causal=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, codes: torch.LongTensor, num_last: int | None = None) -> torch.Tensor:
        """Embeddings `(B, n, hidden)` of the codes `(B, K, n)` of pictures from their first position on, or of the last
        `num_last` of these positions alone."""
        # What could not be drawn is found when all is drawn.
        vectors = code_vectors(self.codebooks, codes.clamp(min=0))
        return self.mlp(self.projection(vectors, num_last))


class CodeHead(nn.Module):
    """The codes of a position, each from the hidden state there and from the codes before it.

    Args:
        config ([`LiquidConfig`]): With a codec of several codes a position. The head has three layers of its base.
    """

    def __init__(self, config: LiquidConfig):
        super().__init__()
        text_config = config.get_text_config()
        own = {"num_hidden_layers": NUM_HEAD_LAYERS, "vocab_size": 1}
        own |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        left_out = ("layer_types", "quantization_config", "dtype")
        settings = {name: value for name, value in text_config.to_dict().items() if name not in left_out}
        self.body = AutoModel.from_config(AutoConfig.for_model(**settings | own))
        self.body.set_input_embeddings(None)
        self.codebooks = nn.ModuleList(
            nn.Embedding(config.codebook_size, text_config.hidden_size) for _ in range(config.num_codebooks - 1)
        )
        self.output = nn.Linear(text_config.hidden_size, config.codebook_size)

    def forward(self, hidden_states: torch.Tensor, codes: torch.LongTensor) -> torch.Tensor:
        """Logits `(N, k + 1, codebook_size)` of the first k + 1 codes, of hidden states `(N, hidden)` and of the first k
        codes `(N, k)` of positions."""
        embeds = [hidden_states] + [
            self.codebooks[index](one) for index, one in enumerate(codes.clamp(min=0).unbind(1))
        ]
        return self.output(self.body(inputs_embeds=torch.stack(embeds, 1), use_cache=False).last_hidden_state)

    def draw(
        self,
        hidden_states: torch.Tensor,
        ids: torch.LongTensor | None,
        guidance: GuidanceLogitsProcessor | None,
        logits_processor: LogitsProcessorList,
        noise: torch.Tensor | None,
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """As [`generation.sampling.draw_codes`], codebook by codebook; all sides of guidance go on with the same code.

        Args:
            hidden_states (`torch.Tensor` of shape `(R, W, hidden)`): In place of logits.
            ids, guidance, logits_processor: As there.
            noise (`torch.Tensor` of shape `(B, W, K * codebook_size)`, *optional*): Of one codebook after the other.

        Returns:
            Codes `(B, K, W)`, and the scores `(B, W, K, codebook_size)` that they were drawn from.
        """
        num_codebooks, positions = len(self.codebooks) + 1, hidden_states.flatten(0, 1)
        noises = [None] * num_codebooks if noise is None else noise.chunk(num_codebooks, dim=-1)
        before = torch.zeros(len(positions), 0, dtype=torch.long, device=positions.device)
        drawn, scores = [], []
        for own_noise in noises:
            logits = self(positions, before)[:, -1].unflatten(0, hidden_states.shape[:2])
            codes, own_scores = draw_codes(logits, ids, guidance, logits_processor, own_noise)
            drawn.append(codes)
            scores.append(own_scores)
            of_all_sides = codes.repeat(len(hidden_states) // len(codes), 1).flatten()
            before = torch.cat([before, of_all_sides[:, None]], dim=1)
        return torch.stack(drawn, 1), torch.stack(scores, 2)

    def loss(
        self, hidden_states: torch.Tensor, codes: torch.LongTensor, max_z_loss_coef: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over all codes `(N, K)` of their cross-entropies and `max_z_loss_coef` times their squared greatest
        logits; and the statistics of [`LiquidCausalLMOutputWithPast`] of these labels, `(3,)`."""
        number = codes.numel()
        if not number:  # runs all the same: in every process, every weight has a gradient
            hidden_states, codes = (
                hidden_states.new_zeros(1, hidden_states.shape[-1]),
                codes.new_zeros(1, codes.shape[1]),
            )
        logits = self(hidden_states, codes[:, :-1]).flatten(0, 1).float()
        cross_entropies = F.cross_entropy(logits, codes.flatten(), reduction="sum")
        best, predicted = logits.max(-1)
        loss = cross_entropies + max_z_loss_coef * best.square().sum()
        is_right = (predicted == codes.flatten()).sum()
        stats = torch.stack([cross_entropies.detach(), is_right, torch.full_like(is_right, number)])
        return (loss, stats) if number else (loss * 0, stats * 0)


def code_targets(
    config: LiquidConfig, input_ids: torch.LongTensor | None, image_codes: Any, targets: torch.LongTensor
) -> torch.LongTensor:
    """The codes `(N, K)` of the N positions whose target is a placeholder, of pictures `(K, n)` in reading order.

    Raises:
        ValueError: If there are such targets and no pictures.
    """
    is_code = targets == config.image_token_id
    if image_codes is None or not len(image_codes):
        if is_code.any():
            raise ValueError("Labels of a picture need its codes: pass image_codes or pixel_values with input_ids.")
        return targets.new_zeros(0, config.num_codebooks)
    of_positions = targets.new_zeros(*targets.shape, config.num_codebooks)
    of_positions[input_ids == config.image_token_id] = torch.cat([one.T for one in image_codes]).to(targets)
    return of_positions.roll(-1, dims=1)[is_code]


def loss_of_several_codes(
    model: LiquidForCausalLM,
    outputs: ModelOutput,
    targets: torch.LongTensor,
    is_image: torch.BoolTensor,
    codes: torch.LongTensor,
    num_items: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy over all ids of text and all codes, and its statistics; as in UniTok's `forward`.

    Args:
        model ([`LiquidForCausalLM`]): The model.
        outputs, targets, is_image, num_items: As in [`chunked_causal_lm_loss`]; of codes, the target is the placeholder.
        codes (`torch.LongTensor` of shape `(N, K)`): Of the positions that have it.
    """
    is_code = targets == model.config.image_token_id
    if num_items is None:
        num_items = (targets[~is_code] != IGNORE_INDEX).sum() + codes.numel()
    texts = targets.masked_fill(is_code, IGNORE_INDEX)
    loss, token_stats = chunked_causal_lm_loss(model.model.text_model, outputs, texts, is_image, 0.0, num_items)
    hidden_states = outputs.last_hidden_state[is_code]
    of_codes, stats = model.code_head.loss(hidden_states, codes, model.config.max_z_loss_coef)
    return loss + of_codes / num_items, torch.stack([token_stats[0], token_stats[1] + stats])
