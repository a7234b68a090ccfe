"""Plots the three runs and compares what evaluate.py wrote about them.

    python examples/smollm2_emoji/plot.py --data_dir smollm2-emoji --output docs/training

Reads RUN/trainer_state.json and evaluation-RUN.{json,png} of base, full, lora and rows (base has no run). Writes
OUTPUT_losses.png, OUTPUT_drawings.png and RESULTS, and prints the table of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RUNS = {"full": "full", "lora": "LoRA + rows", "rows": "rows only"}
MODELS = {"base": "before"} | RUNS
PANELS = {"image": "image loss (nats per label)", "text": "text loss (nats per label)"}


def main(args: argparse.Namespace) -> None:
    data = Path(args.data_dir)
    histories = {
        run: json.loads((data / run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"] for run in RUNS
    }
    results = {model: json.loads((data / f"evaluation-{model}.json").read_text(encoding="utf-8")) for model in MODELS}
    plot_losses(histories).savefig(f"{args.output}_losses.png", dpi=120)
    join_sheets({model: data / f"evaluation-{model}.png" for model in MODELS}).save(f"{args.output}_drawings.png")
    published = {"evaluations": results, "histories": histories}
    Path(args.results).write_text(json.dumps(published, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def plot_losses(histories: dict[str, list[dict]]) -> plt.Figure:
    """Losses over steps: of training as thin lines, of held-out data as thick ones."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 4), layout="constrained")
    for axis, (kind, label) in zip(axes, PANELS.items(), strict=True):
        for index, (run, name) in enumerate(RUNS.items()):
            for key, style in (
                (f"{kind}_loss", {"linewidth": 0.8, "alpha": 0.5}),
                (f"eval_{kind}_{kind}_loss", {"linewidth": 2, "marker": "o", "markersize": 3, "label": name}),
            ):
                points = [(entry["step"], entry[key]) for entry in histories[run] if key in entry]
                axis.plot(*zip(*points, strict=True), color=f"C{index}", **style)
        axis.set(xlabel="steps", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(title="held out (thin: training)")
    return figure


def join_sheets(paths: dict[str, Path], label_width: int = 90) -> Image.Image:
    """The codec's reconstructions once, and below them what each model draws."""
    sheets = {model: Image.open(path) for model, path in paths.items()}
    width, height = next(iter(sheets.values())).size
    side = height // 2
    rows = {"the data": next(iter(sheets.values())).crop((0, 0, width, side))}
    rows |= {MODELS[model]: sheet.crop((0, side, width, height)) for model, sheet in sheets.items()}
    joined = Image.new("RGB", (label_width + width, side * len(rows)), "white")
    draw, font = ImageDraw.Draw(joined), ImageFont.load_default(size=13)
    for index, (name, row) in enumerate(rows.items()):
        joined.paste(row, (label_width, index * side))
        draw.text((label_width - 8, (index + 0.5) * side), name, fill="#444", font=font, anchor="rm")
    # Between names that were trained on and names that were not.
    draw.line([(label_width + width // 2, 0), (label_width + width // 2, joined.height)], fill="#888")
    return joined


def table(results: dict[str, dict]) -> str:
    """Markdown, one row per model."""
    columns = {
        "image loss, trained on": lambda result: f"{result['image_loss']['seen']:.2f}",
        "image loss, held out": lambda result: f"{result['image_loss']['heldout']:.2f}",
        "top-1, trained on": lambda result: f"{result['top1']['seen']:.0%}",
        "top-1, held out": lambda result: f"{result['top1']['heldout']:.0%}",
        "perplexity, addresses": lambda result: f"{result['perplexity']['sotu']:.2f}",
        "perplexity, Moby Dick": lambda result: f"{result['perplexity']['moby-dick']:.2f}",
        "the same among text ids": lambda result: f"{result['perplexity_of_text_ids']['moby-dick']:.2f}",
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for model, name in MODELS.items():
        lines.append(f"| {name} | " + " | ".join(value(results[model]) for value in columns.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="smollm2-emoji", help="holds the runs and the evaluations")
    parser.add_argument("--output", default="docs/training", help="beginning of the paths of the pictures")
    parser.add_argument("--results", default="benchmarks/results/smollm2_emoji.json", help="JSON file to write")
    main(parser.parse_args())
