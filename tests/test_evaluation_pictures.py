"""Distances of pictures are those of other implementations, and as sure as they say."""

import numpy as np
import pytest
import torch

from transformers_liquid.evaluation.pictures import frechet_distance, frechet_estimate, kernel_distance


def features(number: int, seed: int, shift: float = 0.0, width: int = 6) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_kernel_distance_is_the_mean_over_pairs_written_out():
    for case in range(200):
        drawn, true = features(3 + case % 5, case, 0.5).double().numpy(), features(4, 1000 + case).double().numpy()
        kernel = lambda x, y: (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3  # noqa: E731
        within = [
            np.mean([kernel(x, y) for i, x in enumerate(of) for j, y in enumerate(of) if i != j])
            for of in (drawn, true)
        ]
        across = np.mean([kernel(x, y) for x in drawn for y in true])
        got = kernel_distance(torch.tensor(drawn), torch.tensor(true))
        assert got == pytest.approx(sum(within) - 2 * across, rel=1e-9, abs=1e-9)


def test_the_frechet_distance_is_that_of_symmetric_roots():
    for case in range(200):
        width = 1 + case % 6
        drawn = features(3 + case % 30, case, 0.5, width).double()
        true = 2 * features(40, 500 + case, width=width).double()
        first, second = (np.cov(of.numpy().T).reshape(width, width) for of in (drawn, true))
        values, vectors = np.linalg.eigh(first)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
        shift = ((drawn.mean(0) - true.mean(0)) ** 2).sum().item()
        expected = shift + np.trace(first) + np.trace(second) - 2 * cross
        assert frechet_distance(drawn, true) == pytest.approx(expected, rel=1e-5)


def test_kernel_and_frechet_distances_are_those_of_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    fid = pytest.importorskip("torchmetrics.image.fid")
    for case in range(20):
        drawn, true = features(40, case, 0.3).double(), features(40, 100 + case).double()
        assert kernel_distance(drawn, true) == pytest.approx(kid.poly_mmd(true, drawn).item(), rel=1e-6)
        expected = fid._compute_fid(drawn.mean(0), drawn.T.cov(), true.mean(0), true.T.cov()).item()
        assert frechet_estimate(drawn, true).value == pytest.approx(expected, rel=1e-6)


def test_the_jackknife_tells_the_spread_and_takes_away_most_of_the_bias():
    true, estimates = features(20000, 0), []
    for repeat in range(40):
        estimates.append(frechet_estimate(features(200, 1 + repeat, 0.3), true))
    values, errors, corrected = (np.array(column) for column in zip(*estimates, strict=True))
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.4)
    truth = 6 * 0.3**2  # equal covariances
    assert abs(corrected.mean() - truth) < 0.4 * abs(values.mean() - truth)


@pytest.mark.parametrize(
    ("drawn", "true", "says"),
    [((1, 6), (9, 6), "two pictures"), ((9, 6), (9, 5), "one extractor"), ((9,), (9, 6), "one extractor")],
)
def test_one_picture_and_other_features_are_refused(drawn, true, says):
    for distance in (frechet_estimate, kernel_distance):
        with pytest.raises(ValueError, match=says):
            distance(torch.zeros(drawn), torch.zeros(true))
    with pytest.raises(ValueError, match="make no 20 groups"):
        frechet_estimate(torch.zeros(30, 6), torch.zeros(30, 6))
