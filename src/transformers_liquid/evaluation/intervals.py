"""Intervals of 95 % for what is measured on questions that share pictures: pictures are drawn again, not questions.

Of shares Wilson's interval with the cluster-robust standard error (Miller, arXiv 2411.00640, section 2.2), of all else the
bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


RESAMPLES = 2000
_CHUNK = 50  # resamples at a time: their weights fit into memory for as many pictures as VQAv2 has


def clustered_mean(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """A mean over samples, and its standard error where those of a cluster hang together.

    Args:
        sums (`np.ndarray` of shape `(G,)`): Of the scores of each cluster.
        sizes (`np.ndarray` of shape `(G,)`): How many samples each has.

    Returns:
        Two `float`: the mean, and the error; NaN for one cluster, which says nothing of others.
    """
    number, mean = len(sums), sums.sum() / sizes.sum()
    squares = np.square(sums - mean * sizes).sum()
    error = np.sqrt(squares * number / (number - 1)) / sizes.sum() if number > 1 else np.nan
    return float(mean), float(error)


def wilson_interval(share: float, error: float, number: int) -> tuple[float, float] | None:
    """Wilson's interval (JASA 22, 1927, page 209) for as many independent answers as would have this error.

    That is the effective sample size of surveys, for which this interval is recommended (PMC6690503). Where all answers are
    the same their error says nothing, and those of a cluster count as one.

    Args:
        share (`float`): Between 0 and 1.
        error (`float`): Its standard error.
        number (`int`): Of clusters.

    Returns:
        Two `float`; or `None` if there is no error.
    """
    if not error >= 0:
        return None
    spread, z = share * (1 - share), 1.96
    effective = spread / error**2 + 1 if error else number
    middle, half = share + z**2 / (2 * effective), z * np.sqrt(spread / effective + (z / effective) ** 2 / 4)
    # What lies beyond 0 or 1 is rounding.
    return tuple(float(np.clip((middle + side * half) / (1 + z**2 / effective), 0, 1)) for side in (-1, 1))


def bootstrap_interval(
    counts: np.ndarray, value: Callable[[np.ndarray], np.ndarray], strata: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile interval of a number that is made of totals over clusters.

    Args:
        counts (`np.ndarray` of shape `(G, k)`): What each cluster adds to the totals.
        value: The number for totals of shape `(..., k)`.
        strata (`np.ndarray` of shape `(G,)`, *optional*): Clusters are replaced by those of the same stratum only.
        seed (`int`, defaults to 0): Of the resamples.

    Returns:
        Two `float`, or `None` where no interval can be told: one cluster, or a number that some resamples do not have.
    """
    strata = np.zeros(len(counts), dtype=int) if strata is None else np.unique(strata, return_inverse=True)[1]
    members = [counts[strata == stratum] for stratum in range(strata.max() + 1)]
    random, totals = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = [random.multinomial(len(of), np.full(len(of), 1 / len(of)), size=_CHUNK) @ of for of in members]
        totals.append(sum(drawn))
    values = value(np.concatenate(totals))
    if len(counts) < 2 or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
