"""The same weights, looked at in another way: parts of a model can be swapped in a view, and the model stays as it is."""

from __future__ import annotations

import copy
from collections import OrderedDict
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


def swapped(module: nn.Module, swap: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A view of a module tree in which `swap` says what stands for a module; of which it says `None`, the children.

    The original stays as it is, and is returned where nothing is to be swapped.
    """
    if (other := swap(module)) is not None:
        return other
    children = {name: swapped(child, swap) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = shallow_copy(module)
    view._modules.update(children)
    # What transformers hangs onto a view must not stay with the original.
    view._forward_hooks = OrderedDict(module._forward_hooks)
    return view


def is_left_alone(module: nn.Module) -> bool:
    """Whether nobody hung a hook onto a module or replaced its `forward`."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in module.__dict__ and not any(getattr(module, name) for name in hooks)


def is_plain_linear(module: nn.Module, unsharded: bool = False) -> bool:
    """Whether a product with its weight is all that a layer does: no adapter, quantizer or hook around it.

    A layer that FSDP wrapped is one only while its weight is whole, which `unsharded` says; its hooks are FSDP's.
    """
    if unsharded and isinstance(module, FSDPModule):
        # FSDP puts a class of its own before the module's.
        return type(module).__mro__[2] is nn.Linear and "forward" not in module.__dict__
    return type(module) is nn.Linear and is_left_alone(module)


class StandIn(nn.Module):
    """Runs `forward` in place of a head."""

    def __init__(self, head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.__dict__.update(head=head, forward=forward)

    @property
    def weight(self) -> torch.Tensor:
        """Mamba looks at its dtype."""
        return self.head.weight
