"""Distances between many pictures drawn and many true ones, from their features (N, d) and (M, d), with errors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .voken_measures import frechet_distance


class FrechetEstimate(NamedTuple):
    """A Fréchet distance as papers give it, its standard error, and what it is without the bias of a finite number drawn."""

    value: float
    error: float
    corrected: float


def frechet_estimate(drawn: torch.Tensor, true: torch.Tensor, groups: int = 20) -> FrechetEstimate:
    """The Fréchet distance and, by a jackknife that leaves out a group of drawn pictures at a time, how sure it is.

    A bootstrap would not do: pictures that are drawn twice raise the distance itself, so that its interval misses it.
    The true pictures are taken as given, as they are in a benchmark.

    Args:
        drawn (`torch.Tensor` of shape `(N, d)`): Features of drawn pictures, in an order that says nothing.
        true (`torch.Tensor` of shape `(M, d)`): Of true ones.
        groups (`int`, defaults to 20): Of the jackknife.

    Raises:
        ValueError: If there are fewer pictures than make covariances, or other features.
    """
    _check(drawn, true)
    if not 2 <= groups <= len(drawn) // 2:
        raise ValueError(f"{len(drawn)} drawn pictures make no {groups} groups of two or more: draw more pictures.")
    member, value = torch.arange(len(drawn)) % groups, frechet_distance(drawn, true)
    left_out = [frechet_distance(drawn[member != group], true) for group in range(groups)]
    without = torch.tensor(left_out, dtype=torch.float64)
    error = ((groups - 1) * without.var(correction=0)).sqrt().item()
    return FrechetEstimate(value, error, groups * value - (groups - 1) * without.mean().item())


def kernel_distance(drawn: torch.Tensor, true: torch.Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401, section 4): the unbiased estimate of the squared MMD with the kernel
    (x y / d + 1)^3, over all pairs at once instead of random subsets. Arguments as in [`frechet_estimate`]."""
    _check(drawn, true)
    drawn, true = drawn.double(), true.double()

    def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one @ other.T / one.shape[1] + 1) ** 3

    def within(of: torch.Tensor) -> torch.Tensor:
        pairs = kernel(of, of)
        return (pairs.sum() - pairs.trace()) / (len(of) * (len(of) - 1))

    return (within(drawn) + within(true) - 2 * kernel(drawn, true).mean()).item()


def _check(drawn: torch.Tensor, true: torch.Tensor) -> None:
    if drawn.ndim != 2 or true.ndim != 2 or drawn.shape[1] != true.shape[1]:
        raise ValueError(
            f"Features must be (N, d) and (M, d) of one extractor, got {tuple(drawn.shape)} and {tuple(true.shape)}."
        )
    if min(len(drawn), len(true)) < 2:
        raise ValueError(f"A distance needs two pictures or more on each side, got {len(drawn)} and {len(true)}.")
