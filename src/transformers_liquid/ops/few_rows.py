"""Linear layers for the two rows of a guided picture on a CPU.

A product of two to four rows with a large matrix takes some CPUs' libraries up to several times longer than the
transposed product, which reads the same weights once; on others it is the other way round (`benchmarks/few_rows.py`:
AMD EPYC, Intel Xeon). Decoding is made of such products.
"""

from __future__ import annotations

import timeit
from collections import OrderedDict
from functools import cache

import torch
from torch import nn

from .views import is_plain_linear, shallow_copy


class FewRowsLinear(nn.Linear):
    """`nn.Linear`, transposed for 2 to `max_rows` rows."""

    max_rows: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        if not 1 < rows <= self.max_rows:
            return super().forward(input)
        columns = input.reshape(rows, self.in_features).T
        output = self.weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], self.weight, columns)
        return output.T.contiguous().view(*input.shape[:-1], self.out_features)


@cache
def is_transposed_faster() -> bool:
    """Whether this CPU multiplies two rows faster transposed: measured once, in a few milliseconds."""
    source = torch.Generator().manual_seed(0)
    weight, rows = torch.rand(1024, 1024, generator=source), torch.rand(2, 1024, generator=source)
    usual = timeit.repeat(lambda: nn.functional.linear(rows, weight), number=5, repeat=7)
    transposed = timeit.repeat(lambda: (weight @ rows.T).T.contiguous(), number=5, repeat=7)
    return min(transposed) < min(usual)


def few_rows_view(module: nn.Module) -> nn.Module:
    """A view of a module tree with the same weights and [`FewRowsLinear`] in place of every plain `nn.Linear`.

    Subclasses, quantized layers, layers with hooks and modules whose `forward` somebody replaced stay as they are, and so
    does the original.
    """
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):  # accelerate's is no replacement
        return module
    if is_plain_linear(module):
        # Quantized and distributed weights are tensors of classes of their own.
        if type(module.weight.data) is not torch.Tensor or module.weight.dtype != torch.float32:
            return module
        view = shallow_copy(module)
        view.__class__ = FewRowsLinear
        # With more rows the usual product is as fast; on several cores that takes more rows where the result is wide.
        is_wide = module.out_features >= module.in_features
        view.max_rows = 8 if is_wide and torch.get_num_threads() > 1 else 4
        return view
    children = {name: few_rows_view(child) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = shallow_copy(module)
    view._modules.update(children)
    # What transformers hangs onto a view must not stay with the original.
    view._forward_hooks = OrderedDict(module._forward_hooks)
    return view
