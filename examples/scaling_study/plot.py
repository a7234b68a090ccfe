"""Draws and judges what run.py measured: the three findings of Liquid (arXiv 2412.04332) in miniature.

    python examples/scaling_study/plot.py scaling --figures docs

Reads FOLDER/results.jsonl; writes `scaling_laws.png`, `scaling_tradeoff.png` and `scaling_synergy.png` and prints the
table of docs/scaling.md. Differences are between models of one seed, which saw the same records in the same order.
Intervals (95 %) are of a parametric bootstrap over seeds, whose spread is pooled over all sizes or arms of a line in a figure,
since the two or three seeds of one say little, and itself uncertain (so that those of differences are Student's).
A change would have been visible from 2.8 standard errors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np


matplotlib.use("Agg")
from matplotlib import pyplot as plt


DRAWS = 2000
FIGURES = {"laws": 2, "tradeoff": 2, "synergy": 3}  # panels
SIDES = {"image": "pictures (nats a code)", "text": "texts (nats a token)"}
TASKS = {
    "image": ("drawing (nats a code)", "understanding"),
    "caption": ("naming (nats a token)", "generation"),
    "reading": ("naming, wrong picture less right", "generation"),
}
LAWS = ("E + A N^-a", "A N^-a", "c - b log N")
MORE = {"text": "more text", "generation": "more to draw", "understanding": "more to name"}


def load(folder: str | Path) -> dict[tuple, dict[str, Any]]:
    """Results by experiment, size, arm and seed, from the smallest model to the largest."""
    lines = Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()
    cells = sorted(map(json.loads, lines), key=lambda result: result["parameters"])
    for cell in cells:
        cell["losses"]["reading"] = cell["losses"]["misread"] - cell["losses"]["caption"]
    return {tuple(cell["cell"].values())[:4]: cell for cell in cells if cell["cell"]["experiment"] != "rates"}


def seeds_of(cells: dict, experiment: str, arm: str, loss: str, less: str | None = None) -> dict:
    """By parameters, an array over seeds of a loss, less that of another arm if one is given."""
    found = {}
    for (kind, size, name, seed), cell in cells.items():
        other = cells.get((experiment, size, less, seed))
        if (kind, name) == (experiment, arm) and (other or not less):
            value = cell["losses"][loss] - (other["losses"][loss] if other else 0.0)
            found.setdefault(cell["parameters"], []).append(value)
    return {parameters: np.array(values) for parameters, values in found.items()}


def bootstrap(groups: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means over the seeds of G groups, `(G,)`, and draws of them, `(DRAWS, G)`: NaN if no group has two seeds."""
    groups = list(groups)
    means, seeds = (np.array([of(group) for group in groups]) for of in (np.mean, len))
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    draw = np.random.default_rng(0)
    deviation = np.sqrt(squares / draw.chisquare((seeds - 1).sum() or np.nan, (DRAWS, 1)))
    return means, means + deviation * draw.standard_normal((DRAWS, len(groups))) / np.sqrt(seeds)


def draw(axis: plt.Axes, places: Iterable, groups: Iterable[np.ndarray], label: str, style: str = "o-") -> tuple:
    """Draws means and their intervals; returns what `bootstrap` does."""
    means, draws = bootstrap(groups)
    bars = np.abs(np.nan_to_num(np.percentile(draws, (2.5, 97.5), axis=0) - means))
    axis.errorbar(list(places), means, bars, fmt=style, capsize=3, label=label)
    return means, draws


def said(value: float, draws: np.ndarray) -> str:
    """A value with its interval, and from where a change would have been visible."""
    if np.isnan(draws).all():
        return f"{value:+.3f}, no interval from one seed | "
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}] | {2.8 * (high - low) / 3.92:.3f}"


def power_law(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Least squares of E + A N^-a, E and A at least 0, to losses `(K, S)` at S sizes: `(K, 3)`, NaN where they rise."""
    best, errors = np.full((len(losses), 3), np.nan), np.full(len(losses), np.inf)
    for exponent in np.linspace(0.01, 2, 200):
        terms = np.stack([np.ones(len(sizes)), sizes**-exponent], 1)
        found = losses @ np.linalg.pinv(terms).T
        error = np.where((found >= 0).all(1), ((losses - found @ terms.T) ** 2).sum(1), np.inf)
        best[error < errors] = np.insert(found, 2, exponent, axis=1)[error < errors]
        errors = np.minimum(error, errors)
    return best


def errors_left_out(sizes: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Root mean square errors of three laws, each fitted to all sizes but the one that it then tells."""
    logs, missed = np.log(sizes), []
    for one, log in enumerate(logs):
        kept = np.arange(len(sizes)) != one
        floor, factor, exponent = power_law(sizes[kept], losses[None, kept])[0]
        line, logarithm = (np.polyval(np.polyfit(logs[kept], of[kept], 1), log) for of in (np.log(losses), losses))
        missed.append(np.array([floor + factor * sizes[one] ** -exponent, np.exp(line), logarithm]) - losses[one])
    return dict(zip(LAWS, np.sqrt(np.mean(np.square(missed), axis=0)).tolist(), strict=True))


def main(args: argparse.Namespace) -> None:
    cells, rows = load(args.folder), []
    figures = {name: plt.subplots(1, panels, figsize=(10, 4), layout="constrained") for name, panels in FIGURES.items()}
    for law, tradeoff, (loss, label) in zip(figures["laws"][1], figures["tradeoff"][1], SIDES.items(), strict=True):
        for arm, name, style in ((loss, f"{label}, alone", "C0o"), ("mixed", f"{label}, mixed", "C1o")):
            groups = seeds_of(cells, "ladder", arm, loss)
            sizes = np.array([*groups], dtype=float)
            means, draws = draw(law, groups, groups.values(), arm, style)
            (floor, factor, exponent), exponents = power_law(sizes, means[None])[0], power_law(sizes, draws)[:, 2]
            curve = np.geomspace(sizes[0], sizes[-1])
            label_of_law = f"{floor:.2f} + {factor:.3g} N^-{exponent:.2f}"
            law.plot(curve, floor + factor * curve**-exponent, f"{style[:2]}:", label=label_of_law)
            rows.append(f"1 | {name}: largest less smallest | {said(means[-1] - means[0], draws[:, -1] - draws[:, 0])}")
            rows.append(f"1 | {name}: a of E + A N^-a | {said(exponent, exponents)}")
            missed = ", ".join(f"{form} {error:.3f}" for form, error in errors_left_out(sizes, means).items())
            rows.append(f"1 | {name}: error at a size left out | {missed} |")
        groups = seeds_of(cells, "ladder", "mixed", loss, less=loss)
        means, draws = draw(tradeoff, groups, groups.values(), "mixed less one kind")
        for place, name in ((0, "smallest"), (-1, "largest")):
            rows.append(f"2 | {label}: cost of mixing, {name} | {said(means[place], draws[:, place])}")
        slopes = [np.polyfit(np.log10([*groups]), losses.T, 1)[0] for losses in (means, draws)]
        rows.append(f"2 | {label}: change of the cost with ten times the size | {said(*slopes)}")
        for axis in (law, tradeoff):
            axis.set(xscale="log", xlabel="thousand parameters without embeddings", ylabel=label)
            axis.set_xticks(sizes, [f"{size / 1000:,.0f}" for size in sizes])
            axis.minorticks_off()
    for axis, (loss, (label, arm)) in zip(figures["synergy"][1], TASKS.items(), strict=True):
        for size in seeds_of(cells, "synergy", arm, loss):
            groups = [seeds_of(cells, "synergy", more, loss, "base")[size] for more in MORE]
            draw(axis, (name.replace(" ", "\n") for name in MORE.values()), groups, f"{size:,} parameters", "o")
            for less in ("base", "text"):  # what is taken away has no residuals
                arms = [more for more in MORE if more != less]
                means, draws = bootstrap(seeds_of(cells, "synergy", more, loss, less)[size] for more in arms)
                what, at = f"{MORE[arm]} less {MORE.get(less, less)}", arms.index(arm)
                rows.append(f"3 | {label}, {size:,}: {what} | {said(means[at], draws[:, at])}")
        axis.set(ylabel=f"{label}\nchange from base", xlim=(-0.5, 2.5))
    for name, (figure, axes) in figures.items():
        for axis in axes:
            if name != "laws":
                axis.axhline(0, color="k", linewidth=0.8)
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4 - len(axes), fontsize=8)
        figure.savefig(Path(args.figures or args.folder) / f"scaling_{name}.png", dpi=100)
    head = "| finding | measured | nats [95 %] | visible from |\n|---|---|---|---|"
    print(head, *(f"| {row} |" for row in rows), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --output of run.py")
    parser.add_argument("--figures", help="where the figures go; the same folder if not given")
    main(parser.parse_args())
