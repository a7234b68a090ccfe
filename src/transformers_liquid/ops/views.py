"""The same weights, looked at in another way: parts of a model can be swapped in a view, and the model stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares every child and weight, but whose children can be swapped without touching the original."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    # accelerate's hooks bind `forward` to the original module.
    view.__dict__.pop("forward", None)
    return view


def is_plain_linear(module: nn.Module, unsharded: bool = False) -> bool:
    """Whether a product with its weight is all that a layer does: no adapter, quantizer or hook around it.

    A layer that FSDP wrapped is one only while its weight is whole, which `unsharded` says; its hooks are FSDP's.
    """
    own_class = type(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    is_hooked = any(getattr(module, name) for name in hooks)
    if unsharded and isinstance(module, FSDPModule):
        own_class, is_hooked = own_class.__mro__[2], False  # FSDP puts a class of its own before the module's
    return own_class is nn.Linear and "forward" not in module.__dict__ and not is_hooked


class StandIn(nn.Module):
    """Runs `forward` in place of a head."""

    def __init__(self, head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.__dict__.update(head=head, forward=forward)

    @property
    def weight(self) -> torch.Tensor:
        """Mamba looks at its dtype."""
        return self.head.weight
