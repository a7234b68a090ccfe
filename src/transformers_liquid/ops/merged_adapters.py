"""Adapters (PEFT) as a part of the weights: for drawing, which is made of small steps, and for good.

An adapter's layers take their own products, and one that trains rows of the vocabulary copies the whole table, in each
step: several times what a small step takes without (`benchmarks/adapters.py`).
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from .views import is_left_alone, shallow_copy, swapped


def merged_view(module: nn.Module) -> nn.Module:
    """A view of a module tree that computes with plain layers what the active adapters make of it.

    The merged weights are those of PEFT's own `merge`, in memory of their own, which goes with the view. Adapters of
    quantized, sharded or offloaded weights stay beside them, and so do those for which there is no memory.
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
        view._modules["base_layer"] = own
        view.__dict__.update(merged_adapters=[], _caches={})
        try:
            own._parameters = {
                name: None if parameter is None else nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in base._parameters.items()
            }
            view.merge()
        except (NotImplementedError, torch.OutOfMemoryError):
            return module
        merged[layer] = own.weight
        return own

    return swapped(module, swap)


def unload_adapters(model: nn.Module, merge: bool) -> None:
    """Takes all adapters out of a model, in place; with `merge`, what the active ones do becomes a part of the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for parent in list(model.modules()):
        if isinstance(parent, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, AuxiliaryTrainingWrapper):
                keeps = merge and child.unload_and_optionally_merge_module(True, safe_merge=False, adapter_names=None)
                setattr(parent, name, keeps or child.original_module)
            elif isinstance(child, BaseTunerLayer):
                if merge:
                    child.merge()
                setattr(parent, name, child.get_base_layer())
    model.__dict__.pop("peft_config", None)
    model._hf_peft_config_loaded = False
