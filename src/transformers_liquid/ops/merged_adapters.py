"""Adapters (PEFT) as a part of the weights, while they stay apart in the model: for drawing, which is made of small steps.

An adapter's layers take their own products, and one that trains rows of the vocabulary copies the whole table, in each
step: several times what a small step takes without (`benchmarks/adapters.py`).
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers.utils import logging

from .views import is_left_alone, shallow_copy, swapped


logger = logging.get_logger(__name__)


def merged_view(module: nn.Module) -> nn.Module:
    """A view of a module tree that computes with plain layers what the active adapters make of it.

    The merged weights are those of PEFT's own `merge`, in memory of their own, which goes with the view. Adapters of
    quantized, sharded or offloaded weights stay beside them, and so do all where there is no memory.
    """
    if "peft" not in sys.modules:
        return module
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    merged: dict[nn.Module, nn.Parameter] = {}

    def swap(module: nn.Module) -> nn.Module | None:
        layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        if not isinstance(layer, BaseTunerLayer):
            return None
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        # Quantized and distributed weights are tensors of classes of their own, offloaded ones are elsewhere.
        is_plain = weight is not None and type(weight.data) is torch.Tensor and weight.is_floating_point()
        if layer.base_layer is not base or not is_plain or not all(map(is_left_alone, (module, layer, base))):
            return module
        if layer.disable_adapters or layer.merged:
            return module if layer.disable_adapters and layer.merged else base
        own, view = shallow_copy(base), shallow_copy(layer)
        if (tied := getattr(layer, "tied_adapter", None)) in merged:
            own._parameters = base._parameters | {"weight": merged[tied]}
            return own
        own._parameters = {
            name: None if parameter is None else nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in base._parameters.items()
        }
        view._modules["base_layer"] = own
        view.__dict__.update(merged_adapters=[], _caches={})
        try:
            view.merge()
        except NotImplementedError:
            return module
        merged[layer] = own.weight
        return own

    try:
        return swapped(module, swap)
    except torch.OutOfMemoryError:
        logger.warning_once("There is no memory to draw with merged weights: drawing is slower. Merge the adapter.")
        return module
