"""Linear layers for the two rows of a guided picture on a CPU.

A product of two to four rows with a large matrix takes some CPUs' libraries up to several times longer than the
transposed product, which reads the same weights once; on others it is the other way round (`benchmarks/few_rows.py`:
AMD EPYC, Intel Xeon). Decoding is made of such products.
"""

from __future__ import annotations

import timeit
from functools import cache

import torch
from torch import nn

from .views import is_plain_linear, shallow_copy, swapped


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

    def swap(module: nn.Module) -> nn.Module | None:
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):  # accelerate's is no replacement
            return module
        # Quantized and distributed weights are tensors of classes of their own.
        if not is_plain_linear(module) or type(module.weight.data) is not torch.Tensor:
            return None
        if module.weight.dtype != torch.float32:
            return None
        view = shallow_copy(module)
        view.__class__ = FewRowsLinear
        # With more rows the usual product is as fast; on several cores that takes more rows where the result is wide.
        is_wide = module.out_features >= module.in_features
        view.max_rows = 8 if is_wide and torch.get_num_threads() > 1 else 4
        return view

    return swapped(module, swap)
