"""From questions to numbers in three stages: answers, their scores, and results with intervals.

Each stage is a file, whole or not there but for the answers, which grow by batches: after a kill the same call goes on to
the same bytes. What a run depends on is written down first, and another run does not mix with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..models.liquid.image_processing_liquid import load_image
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.files import (
    UNFINISHED,
    alone_in,
    check_keys,
    differences,
    parse_json,
    read_json,
    read_text,
    whole,
    write_json,
)
from .benchmarks import BENCHMARKS, Measure, Sample, read_samples
from .intervals import bootstrap_interval, clustered_mean


RUN_NAME, ANSWERS_NAME, SCORES_NAME, RESULTS_NAME = "run.json", "answers.jsonl", "scores.jsonl", "results.json"


def evaluate(
    pipe: LiquidImageGenerationPipeline,
    names: Sequence[str],
    data: str | os.PathLike,
    output: str | os.PathLike,
    identity: str,
    limit: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Asks a model the questions of benchmarks, greedily, and writes what its answers are worth.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): The model and its processor.
        names (sequence of `str`): Of `BENCHMARKS`.
        data (path): Holds the files as published: see [`read_samples`].
        output (path): The folder of the run. It gets `NAME/` with all answers and scores, and `results.json`.
        identity (`str`): What models share that answer the same, such as a digest of the weights.
        limit (`int`, *optional*): Only the questions about the first so many pictures of each benchmark.
        batch_size (`int`, defaults to 1): Questions in one forward.
        max_new_tokens (`int`, defaults to 128): Of an answer.

    Returns:
        `dict`: What `results.json` holds: by benchmark `run`, and `measures` with `value`, `interval`, `n`.

    Raises:
        ValueError: On bad data, or a folder of another run, before any answer.
    """
    output, data = Path(output), Path(data)
    samples = {name: read_samples(name, data, limit) for name in names}
    runs = {}
    for name in names:
        (output / name).mkdir(parents=True, exist_ok=True)
        runs[name] = {
            "benchmark": name,
            "model": identity,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "limit": limit,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "data": {file: _digest(data / file) for file in BENCHMARKS[name].files},
            "versions": {one: version(one) for one in ("torch", "transformers", "transformers-liquid")},
        }
    with alone_in(output):
        for left in output.rglob(f".*{UNFINISHED}"):  # by a process that was killed
            left.unlink()
        for name, run in runs.items():
            begin(output / name, run)
        for name in names:
            answers = answer(pipe, samples[name], output / name / ANSWERS_NAME, batch_size, max_new_tokens)
            score(name, samples[name], answers, data, output / name / SCORES_NAME)
        path = output / RESULTS_NAME
        results = read_json(path) if path.is_file() else {}
        for name in names:
            rows = read_rows(output / name / SCORES_NAME)
            measures = {one: aggregate(of) for one, of in BENCHMARKS[name].measures(rows).items()}
            results[name] = {"run": runs[name], "measures": measures}
        write_json(path, results)
    return results


def _digest(path: Path) -> str:
    """sha256 of a file, or of all texts in a folder with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*.txt")):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()


def begin(folder: Path, run: Mapping[str, Any]) -> None:
    """Writes down what a run depends on; raises if the folder holds another one."""
    file = folder / RUN_NAME
    if not file.is_file():
        if any(folder.iterdir()):
            raise ValueError(f"{folder} holds something else ({RUN_NAME} is missing): choose a new folder.")
        write_json(file, run)
    elif different := differences(read_json(file), dict(run)):
        raise ValueError(f"{folder} holds another run: {different}. Give the same arguments, or choose a new folder.")


@torch.no_grad()
def answer(
    pipe: LiquidImageGenerationPipeline, samples: Sequence[Sample], path: Path, batch_size: int, max_new_tokens: int
) -> list[str]:
    """The greedy answers to questions, in order; those that an earlier call wrote are taken from the file.

    Raises:
        ValueError: If the file is damaged, or answers other questions, or a question leaves no room for an answer.
    """
    processor, lines = pipe.processor, []
    if path.is_file():
        lines = read_text(path).split("\n")[:-1]  # what follows the last line break was torn by a kill
    if len(lines) < len(samples):
        lines = lines[: len(lines) // batch_size * batch_size]  # batches are answered as a whole
    done = [parse_json(line, f"Line {number} of {path}") for number, line in enumerate(lines, start=1)]
    for number, one in enumerate(done, start=1):
        check_keys(f"Line {number} of {path}", one, ("id", "answer"))
    if [one["id"] for one in done] != [sample.id for sample in samples[: len(done)]]:
        raise ValueError(f"{path} answers other questions than those asked: choose a new folder.")
    if len(done) == len(samples):
        return [one["answer"] for one in done]
    limit = getattr(pipe.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for sample in samples[len(done) :]:
        if (length := len(processor.question_ids(sample.question))) >= limit:
            raise ValueError(
                f"Question {sample.id} has {length} tokens, the model {limit} positions: there is no room for an answer."
            )
    with whole(path) as unfinished:
        unfinished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    starts = range(len(done), len(samples), batch_size)
    with path.open("a", encoding="utf-8") as file:
        for start in tqdm(starts, disable=None, desc=path.parent.name):
            asked = samples[start : start + batch_size]
            ids, mask = processor.pad_left([processor.question_ids(one.question) for one in asked])
            pictures = processor.image_processor([load_image(str(one.image)) for one in asked], framing="pad")
            inputs = {"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask), **pictures}
            length = inputs["input_ids"].shape[1]
            out = pipe.model.generate(
                **pipe.ensure_tensor_on_device(**inputs),
                do_sample=False,
                max_new_tokens=min(max_new_tokens, limit - length),
            )
            texts = processor.batch_decode(out[:, length:], skip_special_tokens=True)
            new = [{"id": one.id, "answer": text.strip()} for one, text in zip(asked, texts, strict=True)]
            file.writelines(json.dumps(one) + "\n" for one in new)
            file.flush()
            os.fsync(file.fileno())
            done += new
    return [one["answer"] for one in done]


def score(name: str, samples: Sequence[Sample], answers: Sequence[str], data: Path, path: Path) -> None:
    """Writes what each answer is worth."""
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for sample, text in zip(samples, answers, strict=True):
            picture = sample.image.relative_to(data).as_posix()
            row = {"id": sample.id, "picture": picture, "groups": sample.groups}
            row["scores"] = {key: float(value) for key, value in BENCHMARKS[name].score(sample, text).items()}
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path).splitlines()
    return [parse_json(line, f"Line {number} of {path}") for number, line in enumerate(lines, start=1)]


def aggregate(measure: Measure) -> dict[str, Any]:
    """The number, its interval of 95 % (`None` where it has none), and of how many samples."""
    if measure.value is not None:
        value = float(measure.value(measure.counts.sum(0)))
        interval = bootstrap_interval(measure.counts, measure.value, measure.strata)
    else:
        mean, error = clustered_mean(*measure.counts.T)
        value = 100 * mean
        interval = None if math.isnan(error) else [value + side * 196 * error for side in (-1, 1)]
    return {"value": value if math.isfinite(value) else None, "interval": interval and [*interval], "n": measure.n}


def compare(first: str | os.PathLike, second: str | os.PathLike) -> dict[str, dict[str, dict[str, Any]]]:
    """What the second run has more than the first, on the same questions.

    Args:
        first, second (path): `results.json` of two runs, with their folders beside them.

    Returns:
        `dict`: By benchmark of both and by measure: `value`, `interval` and `n` of the difference. Both runs are drawn
        again together, picture by picture: what is hard for both widens no interval.

    Raises:
        ValueError: If they have no benchmark in common, or not the same questions.
    """
    first, second = Path(first), Path(second)
    common = [name for name in read_json(first) if name in read_json(second)]
    if not common:
        raise ValueError(f"{first} and {second} have no benchmark in common.")
    differences_of: dict[str, dict[str, dict[str, Any]]] = {}
    for name in common:
        rows = [read_rows(path.parent / name / SCORES_NAME) for path in (first, second)]
        if len({tuple((row["id"], row["picture"]) for row in of) for of in rows}) > 1:
            raise ValueError(f"{name} of {first} and of {second} are about other questions: nothing to compare.")
        of_first, of_second = (BENCHMARKS[name].measures(of) for of in rows)
        differences_of[name] = {one: aggregate(_difference(of_first[one], of_second[one])) for one in of_first}
    return differences_of


def _difference(first: Measure, second: Measure) -> Measure:
    width = first.counts.shape[1]

    def value(totals: np.ndarray) -> np.ndarray:
        number = first.value or (lambda of: 100 * of[..., 0] / of[..., 1])
        return number(totals[..., width:]) - number(totals[..., :width])

    counts = np.concatenate([first.counts, second.counts], axis=1)
    return first._replace(counts=counts, value=value)


def table(results: Mapping[str, Mapping[str, Any]], paper: bool = False) -> str:
    """Results as lines of text: benchmark, measure, value, interval, n, and the paper's values if asked for.

    Parts of benchmarks, which have a `/` in their name, are left to `results.json`.
    """
    lines = [["benchmark", "measure", "value", "95 % interval", "n", *["paper"] * paper]]
    for name, measures in results.items():
        for measure, of in measures.items():
            if "/" not in measure:
                value = "none" if of["value"] is None else f"{of['value']:.2f}"
                interval = "none" if of["interval"] is None else "{:.2f} .. {:.2f}".format(*of["interval"])
                printed = " / ".join(map(str, BENCHMARKS[name].paper.get(measure, ("-",))))
                lines.append([name, measure, value, interval, str(of["n"]), *[printed] * paper])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
