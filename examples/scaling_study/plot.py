"""Draws and judges what run.py measured: the three findings of Liquid (arXiv 2412.04332) in miniature.

    python examples/scaling_study/plot.py scaling --figures docs

Reads FOLDER/results.jsonl; writes `scaling_laws.png`, `scaling_tradeoff.png` and `scaling_synergy.png` and prints the
table of docs/scaling.md. Intervals (95 %) are of a bootstrap over seeds: means of seeds are drawn anew from the
residuals of all sizes or arms together, since two or three seeds of one say little. Differences are between models of one
seed, which saw the same records in the same order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
from matplotlib import pyplot as plt


DRAWS = 2000
EXPONENTS = np.linspace(0.01, 2, 200)
SIDES = {"image": "pictures, nats a code", "text": "texts, nats a token"}
MORE = {"generation": "more generation", "understanding": "more understanding", "text": "more text"}


class Results:
    """The last measurement of each cell.

    Args:
        folder (`Path`): Where `run.py` wrote.
    """

    def __init__(self, folder: Path):
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        self.cells = [json.loads(line) for line in lines]
        self.parameters = dict(
            sorted({cell["size"]: cell["parameters"] for cell in self.cells}.items(), key=lambda one: one[1])
        )

    def losses(self, experiment: str, size: str, arm: str, loss: str, point: int = -1) -> dict[int, float]:
        """Loss by seed."""
        return {
            cell["seed"]: cell["curve"][point][loss]
            for cell in self.cells
            if (cell["experiment"], cell["size"], cell["arm"]) == (experiment, size, arm)
        }

    def differences(self, experiment: str, size: str, arm: str, other: str, loss: str) -> np.ndarray:
        """Loss of `arm` less that of `other`, of the seeds that both have."""
        left, right = (self.losses(experiment, size, name, loss) for name in (arm, other))
        return np.array([left[seed] - right[seed] for seed in left if seed in right])


def bootstrap(groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means of groups of seeds, `(G,)`, and draws of them, `(DRAWS, G)`; these are NaN if no group has two seeds."""
    means = np.array([group.mean() for group in groups])
    scaled = [(group - group.mean()) * (len(group) / (len(group) - 1)) ** 0.5 for group in groups if len(group) > 1]
    residuals = np.concatenate([*scaled, [] if scaled else [np.nan]])
    draw = np.random.default_rng(0)
    drawn = [draw.choice(residuals, (DRAWS, len(group))).mean(1) for group in groups]
    return means, means + np.stack(drawn, 1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    return tuple(np.percentile(draws, (2.5, 97.5)))


def said(value: float, draws: np.ndarray, sign: str = "+") -> str:
    low, high = interval(draws)
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def power_law(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Least squares of E + A N^-a with E and A at least 0.

    Args:
        sizes (`np.ndarray` of shape `(S,)`): N.
        losses (`np.ndarray` of shape `(K, S)`): K sets of losses.

    Returns:
        `np.ndarray` of shape `(K, 3)`: E, A and a; NaN where losses do not fall.
    """
    best, errors = np.full((len(losses), 3), np.nan), np.full(len(losses), np.inf)
    for exponent in EXPONENTS:
        terms = np.stack([np.ones(len(sizes)), sizes**-exponent], 1)
        found = losses @ np.linalg.pinv(terms).T
        error = ((losses - found @ terms.T) ** 2).sum(1)
        better = (error < errors) & (found >= 0).all(1)
        best[better] = np.column_stack([found, np.full(len(found), exponent)])[better]
        errors[better] = error[better]
    return best


def at(law: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return law[:, :1] + law[:, 1:2] * sizes ** -law[:, 2:]


def left_out(sizes: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Root mean square errors of three laws, each fitted to all sizes but the one that it then tells."""
    logs, errors = np.log(sizes), {"with a floor": [], "without a floor": [], "logarithm": []}
    for index in range(len(sizes)):
        kept = np.arange(len(sizes)) != index
        told = (
            at(power_law(sizes[kept], losses[None, kept]), sizes[index : index + 1])[0, 0],
            np.exp(np.polyval(np.polyfit(logs[kept], np.log(losses[kept]), 1), logs[index])),
            np.polyval(np.polyfit(logs[kept], losses[kept], 1), logs[index]),
        )
        for found, value in zip(errors.values(), told, strict=True):
            found.append(value - losses[index])
    return {name: float(np.mean(np.square(found)) ** 0.5) for name, found in errors.items()}


def scaling(results: Results) -> tuple[plt.Figure, list[tuple[str, str, str]]]:
    """Finding 1: losses over sizes, at each length of training, with the law of the longest."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = []
    for axis, (loss, label) in zip(axes, SIDES.items(), strict=True):
        names = [size for size in results.parameters if results.losses("ladder", size, loss, loss)]
        sizes = np.array([results.parameters[size] for size in names], dtype=float)
        for point in range(-3, 0):
            groups = [np.array([*results.losses("ladder", size, loss, loss, point).values()]) for size in names]
            means, draws = bootstrap(groups)
            for size, group in zip(sizes, groups, strict=True):
                axis.plot([size] * len(group), group, ".", color=f"C{point + 3}", alpha=0.6)
            axis.plot(sizes, means, color=f"C{point + 3}", alpha=0.6, label=("a quarter", "half", "all steps")[point])
        law, laws = power_law(sizes, means[None]), power_law(sizes, draws)
        axis.plot(sizes, at(law, sizes)[0], "k--", label=f"{law[0, 0]:.2f} + {law[0, 1]:.1f} N^-{law[0, 2]:.2f}")
        axis.set(xscale="log", xlabel="parameters without embeddings", ylabel=label)
        axis.legend()
        fall = f"{label}: {names[-1]} less {names[0]}"
        rows.append(("1", fall, said(means[-1] - means[0], draws[:, -1] - draws[:, 0])))
        steps = np.diff(draws, axis=1)
        sure = sum(interval(step)[1] < 0 for step in steps.T)
        rows.append(("1", f"{label}: steps of the ladder with a sure fall", f"{sure} of {len(names) - 1}"))
        low, high = np.nanpercentile(laws[:, 2], (2.5, 97.5))
        rows.append(("1", f"{label}: exponent of E + A N^-a", f"{law[0, 2]:.2f} [{low:.2f}, {high:.2f}]"))
        if len(sizes) > 4:
            errors = ", ".join(f"{name} {error:.3f}" for name, error in left_out(sizes, means).items())
            rows.append(("1", f"{label}: error at the size left out", errors))
    return figure, rows


def tradeoff(results: Results) -> tuple[plt.Figure, list[tuple[str, str, str]]]:
    """Finding 2: what mixing costs each side, over sizes."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    rows = []
    for index, (loss, label) in enumerate(SIDES.items()):
        found = {size: results.differences("ladder", size, "mixed", loss, loss) for size in results.parameters}
        found = {size: group for size, group in found.items() if len(group)}
        sizes = np.array([results.parameters[size] for size in found], dtype=float)
        means, draws = bootstrap([*found.values()])
        bars = np.abs(np.array([interval(column) for column in draws.T]).T - means)
        axis.errorbar(sizes * 1.05**index, means, bars, fmt="o-", capsize=3, label=label)
        for place in (0, -1):
            rows.append(("2", f"{label}: cost of mixing, {[*found][place]}", said(means[place], draws[:, place])))
        slope, slopes = (np.polyfit(np.log10(sizes), losses.T, 1)[0] for losses in (means, draws))
        rows.append(("2", f"{label}: change of the cost a decade of size", said(slope, slopes)))
        rows.append(("2", f"{label}: smallest change that would have been seen", f"{2.8 * slopes.std():.3f}"))
    axis.axhline(0, color="k", linewidth=0.8)
    axis.set(xscale="log", xlabel="parameters without embeddings", ylabel="loss of mixed less that of one kind alone")
    axis.legend()
    return figure, rows


def synergy(results: Results) -> tuple[plt.Figure, list[tuple[str, str, str]]]:
    """Finding 3: what more records of one kind do to the other task, beside as many more texts."""
    sides = {"image": "drawing, nats a code", "caption": "names of pictures, nats a token"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = []
    sizes = [size for size in results.parameters if results.losses("synergy", size, "understanding", "image")]
    for axis, (loss, label), other in zip(axes, sides.items(), ("understanding", "generation"), strict=True):
        for place, size in enumerate(sizes):
            means, draws = bootstrap([results.differences("synergy", size, arm, "base", loss) for arm in MORE])
            bars = np.abs(np.array([interval(column) for column in draws.T]).T - means)
            where = np.arange(len(MORE)) + 0.4 * place
            axis.bar(where, means, 0.35, yerr=bars, capsize=3, label=f"{size}, {results.parameters[size]:,} parameters")
            rows.append(
                (
                    "3",
                    f"{label}, {size}: {MORE[other]} less base",
                    said(means[[*MORE].index(other)], draws[:, [*MORE].index(other)]),
                )
            )
            control = bootstrap([results.differences("synergy", size, arm, "text", loss) for arm in (other, "base")])
            rows.append(("3", f"{label}, {size}: {MORE[other]} less more text", said(control[0][0], control[1][:, 0])))
            rows.append(
                (
                    "3",
                    f"{label}, {size}: smallest difference that would have been seen",
                    f"{2.8 * control[1][:, 0].std():.3f}",
                )
            )
        axis.axhline(0, color="k", linewidth=0.8)
        axis.set(xticks=np.arange(len(MORE)) + 0.2, xticklabels=MORE.values(), ylabel=f"{label}: change against base")
        axis.legend()
    return figure, rows


def main(args: argparse.Namespace) -> None:
    results = Results(Path(args.folder))
    table = []
    for name, finding in (("laws", scaling), ("tradeoff", tradeoff), ("synergy", synergy)):
        figure, rows = finding(results)
        figure.savefig(Path(args.figures or args.folder) / f"scaling_{name}.png", dpi=120)
        table += rows
    print("| finding | measured | nats [95 %] |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in table))
    seconds = sum(cell["cpu_seconds"] for cell in results.cells)
    print(
        f"\n{len(results.cells)} models, {seconds / 60:.0f} CPU minutes, seeds {sorted({cell['seed'] for cell in results.cells})}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --output of run.py")
    parser.add_argument("--figures", help="where the figures go; the same folder if not given")
    main(parser.parse_args())
