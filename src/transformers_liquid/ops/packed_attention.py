"""Attention for packed rows: each record on its own, instead of a whole row behind a mask.

transformers keeps the records of a packed row apart with a mask of the whole row, so that all pairs of tokens of
different records are computed and thrown away. Here `sdpa` runs record by record. With flash attention, transformers
does the like itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


PACKED_SDPA = "packed_sdpa"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Prepares a model for packed rows: `sdpa` becomes `packed_sdpa` wherever that keeps records apart.

    Args:
        model (`PreTrainedModel`): A [`LiquidForCausalLM`] as it will be trained.

    Raises:
        ValueError: If the base does not keep the records of a packed row apart: see [`check_packing`].
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED_SDPA)
        try:
            return check_packing(model)
        except ValueError:  # the base does not tell its attention where records begin
            model.set_attn_implementation("sdpa")
    check_packing(model)


def packed_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of transformers; of a packed row, record by record.

    Args:
        module (`nn.Module`): The attention layer.
        query (`torch.Tensor` of shape `(B, heads, L, head_dim)`): Queries.
        key, value (`torch.Tensor` of shape `(B, key-value heads, L, head_dim)`): Keys and values.
        attention_mask (`torch.Tensor`, *optional*): As for `sdpa`.
        position_ids (`torch.LongTensor` of shape `(1, L)`, *optional*): 0 where a record begins.
        kwargs: As for `sdpa`.

    Returns:
        `torch.Tensor` of shape `(B, L, heads, head_dim)`, and `None`.
    """
    length = query.shape[2]
    is_row = position_ids is not None and position_ids.shape == (1, length) and key.shape[2] == length
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist() if is_row else []
    if len(starts) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # One split instead of many slices: the gradient of each slice would be a tensor of the whole row.
    lengths = [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)]
    tensors = (query, key, value)
    if query.device.type == "cpu":  # in half precision, torch's backward pass takes four times as long there
        tensors = tuple(tensor.float() for tensor in tensors)
    outputs = []
    for start, *parts in zip(starts, *(tensor.split(lengths, dim=2) for tensor in tensors), strict=True):
        part = slice(start, start + parts[0].shape[2])
        mask = None if attention_mask is None else attention_mask[..., part, part]
        outputs.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1).to(query.dtype), None


def packed_sdpa_mask(
    q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """The mask of `sdpa`, but none for a packed row of causal attention without a window: its records need none."""
    # transformers forbids the skip for packed rows, for masks of a base's own (by vmap) and for steps with a cache.
    is_packed = not kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap", False)
    is_whole = attention_mask is None and kwargs.get("local_size") is None and q_length == kv_length > 1
    if is_packed and is_whole:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Checks that a model keeps the records of a packed row apart, by three small forward passes.

    What a base does with positions that begin again is nowhere declared: state space models carry their state from one
    record into the next, others count positions themselves. So a record is read alone, behind another one in a packed
    row, and as the other one's continuation; packed, it must give the logits it gives alone.

    Args:
        model (`nn.Module`): A [`LiquidForCausalLM`], its base or a PEFT model of them, as it will be trained: the
            attention implementation counts too.

    Raises:
        ValueError: If the records are not kept apart.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 16), generator=generator).to(model.device)
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    was_training = model.training
    model.eval()
    alone = model(input_ids=ids[:, 8:], use_cache=False).logits.float()
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:].float()
    continued = model(input_ids=ids, use_cache=False).logits[:, 8:].float()
    model.train(was_training)
    # Relative to what reading on would change, so that neither the logits' scale nor half precision matters.
    leaked = ((packed - alone).norm() / (continued - alone).norm()).item()
    if not leaked < 0.1:
        raise ValueError(
            f"{model.config.model_type} with the base {model.config.get_text_config().model_type} does not keep the "
            f"records of a packed row apart (packing changes their logits by {leaked:.0%} of what running them on "
            "would): train with packing=False."
        )


AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention_forward)
AttentionMaskInterface.register(PACKED_SDPA, packed_sdpa_mask)
