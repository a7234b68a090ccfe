"""From samples to numbers in three stages: answers or pictures, their scores, and results with intervals.

What a stage writes is whole or not there, or grows by batches: after a kill the same call goes on to the same bytes. What a
run depends on is written down first, and another run does not mix with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_NAME

from ..models.liquid.image_processing_liquid import load_image
from ..models.liquid.vocabulary import FROM_TEXT_ALONE
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.files import UNFINISHED, alone_in, check_keys, differences, read_json, whole, write_json
from .benchmarks import BENCHMARKS, FILES, PAPER, Measure, Sample, check_benchmarks, read_rows, read_samples
from .examiner import PICTURES_NAME, Examiner, draw
from .intervals import bootstrap_interval, clustered_mean, wilson_interval
from .judges import ClassifierJudge, Judge, load_judge, measure_losses
from .language import measure_language
from .pictures import (
    Extractor,
    codec_features,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    load_extractor,
)


RUN_NAME, ANSWERS_NAME, SCORES_NAME, RESULTS_NAME = "run.json", "answers.jsonl", "scores.jsonl", "results.json"
FEATURES_NAME = "features.safetensors"
VERSIONS = ("torch", "transformers", "transformers-liquid")
EXTRACTED_AT_ONCE, TEXTS = 16, (".txt", ".json", ".jsonl", ".parquet")


def evaluate(
    pipe: LiquidImageGenerationPipeline,
    names: Sequence[str],
    data: str | os.PathLike,
    output: str | os.PathLike,
    identity: str,
    limit: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    drawing: Mapping[str, Any] | None = None,
    judge: str | None = None,
    features: str | None = None,
) -> dict[str, Any]:
    """Asks a model the questions of benchmarks, greedily, or has it draw, and writes what that is worth.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): The model and its processor.
        names (sequence of `str`): Of `BENCHMARKS`.
        data (path): Holds the files as published: see [`read_samples`].
        output (path): The folder of the run. It gets `NAME/` with all answers, pictures and scores, and `results.json`.
        identity (`str`): What models share that answer the same, such as a digest of the weights.
        limit (`int`, *optional*): Only what is about the first so many pictures of each benchmark.
        batch_size (`int`, defaults to 1): Questions in one forward, or pictures drawn side by side.
        max_new_tokens (`int`, defaults to 128): Of an answer.
        drawing (`Mapping`, *optional*): What the pipeline is told with prompts. The first is drawn from `seed`, the
            others from those that follow.
        judge (`str`, *optional*): Who gives scores to drawn pictures: see [`load_judge`]. Where no benchmark needs one, who
            names drawings of `emoji`: see [`ClassifierJudge`].
        features (`str`, *optional*): Whose features are compared: `"codec"`, the model's own, or see [`load_extractor`].

    Returns:
        `dict`: What `results.json` holds: by benchmark, of drawn pictures `NAME/JUDGE` or `NAME/FEATURES`, `run`,
        `measures` with `value`, `interval`, `n`, and the ids `without_score` if the judge left out some.

    Raises:
        ValueError: On bad data, or a folder of another run, before any answer or picture.
    """
    output, data, drawing = Path(output), Path(data), {"seed": 0, **(drawing or {})}
    kinds, namer = check_benchmarks(names, measured_by := {"judge": judge, "features": features}), None
    samples = {name: read_samples(name, data, limit) for name in names}
    if "emoji" in samples:
        own = None if "judge" in kinds else judge
        measured_by["emoji"], namer = load_namer(pipe, samples["emoji"], data, own)
    shared = {"model": identity, "dtype": str(pipe.dtype).removeprefix("torch."), "limit": limit}
    shared |= {"batch_size": batch_size, "versions": {one: version(one) for one in VERSIONS}}
    runs, tools = {}, {}
    for name in names:
        benchmark, by = BENCHMARKS[name], measured_by.get(BENCHMARKS[name].kind)
        key = name if by is None else f"{name}/" + re.sub(r"[^\w.]+", "-", by).strip("-.")
        runs[key] = {"benchmark": name, **shared, "data": {file: _digest(data / file) for file in FILES[name]}}
        runs[key] |= {"drawing": drawing} if by else {}
        runs[key] |= {} if benchmark.kind in ("judge", "features") else {"max_new_tokens": max_new_tokens}
        if benchmark.kind == "loss":
            tools[key] = partial(measure_losses, pipe)
        elif benchmark.kind == "judge":
            tools[key] = load_judge(by, pipe, samples[name], benchmark.judged)
        elif benchmark.kind == "features":
            tools[key] = partial(codec_features, pipe) if by == "codec" else load_extractor(by, pipe.device)
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output):
        runs, results, file = begin_all(output, runs, measured_by), {}, output / RESULTS_NAME
        for key, run in runs.items():
            name, folder, of = run["benchmark"], output / key, samples[run["benchmark"]]
            path, pictures = folder / SCORES_NAME, [sample.image for sample in of]
            if {"judge", "features"} & run.keys():
                pictures = draw(pipe, of, output / name / PICTURES_NAME, batch_size, **drawing)
            if "features" in run:
                compared = extract(tools[key], pictures, [sample.image for sample in of], folder / FEATURES_NAME)
                found = {"measures": distances(of, **compared)}
            elif BENCHMARKS[name].kind == "language":
                found = {"measures": measure_language(pipe, name, data, folder, limit, batch_size)}
            else:
                if key in tools:
                    workers = batch_size if run.get("judge", "").startswith("openai:") else 1
                    judge_all(tools[key], of, pictures, path, batch_size, workers)
                elif "emoji" in run:
                    tool = Examiner(pipe, of, data, output / name, batch_size, max_new_tokens, drawing, namer)
                    judge_all(tool, of, tool.about, path, batch_size)
                else:
                    score(name, of, answer(pipe, of, folder / ANSWERS_NAME, batch_size, max_new_tokens), data, path)
                found = summary(name, read_rows(path))
            results[key] = {"run": run, **found}
        write_json(file, (read_json(file) if file.is_file() else {}) | results)
    return results


def load_namer(
    pipe: LiquidImageGenerationPipeline, samples: Sequence[Sample], data: Path, judge: str | None
) -> tuple[str, ClassifierJudge | None]:
    """Who says what drawings of `emoji` show: a classifier, the nearest of true pictures, or the model itself."""
    pipe.model.config.image_layout.check_one_code(FROM_TEXT_ALONE)
    has_files = "file_name" in read_rows(data / FILES["emoji"][1])[0]
    if judge is None:
        return "nearest" if has_files else "self", None
    if not has_files:
        raise ValueError("--judge names drawings of emoji beside true pictures: give these with --data.")
    return judge, ClassifierJudge(judge, pipe.device, samples)


def begin_all(output: Path, runs: dict[str, dict], measured_by: dict[str, str | None]) -> dict[str, dict[str, Any]]:
    """Clears what a killed process left, and begins all runs: those that draw, and within them those that measure."""
    for left in output.rglob(f".*{UNFINISHED}"):
        left.unlink()
    begun = {}
    for key, run in runs.items():
        begin(output / run["benchmark"], run)
        begun[key], kind = run, BENCHMARKS[run["benchmark"]].kind
        if kind in measured_by:
            begun[key] = run | {kind: measured_by[kind]}
            given = Path(measured_by[kind].removeprefix("scores:"))
            files = [file for file in (given, given / SAFE_WEIGHTS_NAME) if file.is_file()]
            begun[key]["data"] = run["data"] | {str(file): _digest(file) for file in files}
            begin(output / key, begun[key])
    return begun


def summary(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measures of scored samples, and which of these have no score."""
    measures = {one: aggregate(measure) for one, measure in BENCHMARKS[name].measures(rows).items()}
    without = [row["id"] for row in rows if not row["scores"]]
    return {"measures": measures} | ({"without_score": without} if without else {})


def _digest(path: Path) -> str:
    """sha256 of a file, or of all texts and tables in a folder with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else [one for one in sorted(path.rglob("*")) if one.suffix in TEXTS]:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()


def begin(folder: Path, run: Mapping[str, Any]) -> None:
    """Writes down what a run depends on; raises if the folder holds another one."""
    folder.mkdir(parents=True, exist_ok=True)
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
    processor, done = pipe.processor, _read_done(path, samples, batch_size, "answer")
    limit = getattr(pipe.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for sample in samples[len(done) :]:
        if (length := len(processor.question_ids(sample.question))) >= limit:
            raise ValueError(f"Question {sample.id} has {length} tokens of {limit}: there is no room for an answer.")

    def write(chosen: slice) -> list[dict[str, Any]]:
        asked = samples[chosen]
        ids, mask = processor.pad_left([processor.question_ids(one.question) for one in asked])
        pictures = processor.image_processor([load_image(str(one.image)) for one in asked], framing="pad")
        inputs = {"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask), **pictures}
        length = inputs["input_ids"].shape[1]
        inputs, room = pipe.ensure_tensor_on_device(**inputs), min(max_new_tokens, limit - length)
        out = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=room)
        texts = processor.batch_decode(out[:, length:], skip_special_tokens=True)
        return [{"id": one.id, "answer": text.strip()} for one, text in zip(asked, texts, strict=True)]

    return [one["answer"] for one in _extend(path, done, samples, batch_size, write)]


def _read_done(path: Path, samples: Sequence[Sample], batch_size: int, key: str) -> list[dict[str, Any]]:
    """What an earlier call wrote of whole batches, a line for each sample, with its `id` and `key`."""
    done = read_rows(path, grows=True) if path.is_file() else []
    if len(done) < len(samples):
        done = done[: len(done) // batch_size * batch_size]
    for number, one in enumerate(done, start=1):
        check_keys(f"Line {number} of {path}", one, ("id", key))
    if [one["id"] for one in done] != [sample.id for sample in samples[: len(done)]]:
        raise ValueError(f"{path} answers other questions than those asked: choose a new folder.")
    return done


def _extend(
    path: Path, done: list[dict[str, Any]], samples: Sequence[Sample], batch_size: int, write: Callable[[slice], Any]
) -> list[dict[str, Any]]:
    """Appends what `write` makes of the samples that are left, batch by batch; returns all."""
    if len(done) == len(samples):
        return done
    with whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in done), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        for start in tqdm(range(len(done), len(samples), batch_size), disable=None, desc=path.parent.name):
            new = write(slice(start, start + batch_size))
            file.writelines(json.dumps(one) + "\n" for one in new)
            file.flush()
            os.fsync(file.fileno())
            done += new
    return done


def judge_all(
    judge: Judge, samples: Sequence[Sample], pictures: Sequence[Path], path: Path, batch_size: int, workers: int = 1
) -> None:
    """Writes what a judge gives each picture; what an earlier call wrote stays. A server has several `workers`."""

    def write(chosen: slice) -> list[dict[str, Any]]:
        together = [samples[chosen], pictures[chosen]]
        with ThreadPoolExecutor(workers) as pool:  # what fails ends the batch after its other answers have come
            given = [*(pool.map if workers > 1 else map)(judge, *together)]
        return [
            {"id": sample.id, "picture": picture.name, "groups": sample.groups, "scores": scores}
            for sample, picture, scores in zip(*together, given, strict=True)
        ]

    _extend(path, _read_done(path, samples, batch_size, "scores"), samples, batch_size, write)


@torch.no_grad()
def extract(extractor: Extractor, drawn: Sequence[Path], true: Sequence[Path], path: Path) -> dict[str, torch.Tensor]:
    """The features `(N, d)` of `drawn` and `true` pictures, or those that an earlier call wrote."""
    if not path.is_file():
        features = {}
        for name, images in {"drawn": drawn, "true": true}.items():
            batches = [images[start : start + EXTRACTED_AT_ONCE] for start in range(0, len(images), EXTRACTED_AT_ONCE)]
            made = [extractor([*map(load_image, batch)]) for batch in tqdm(batches, disable=None, desc=name)]
            features[name] = torch.cat(made).float().cpu()
        with whole(path) as unfinished:
            save_file(features, unfinished)
    return load_file(path)


def distances(samples: Sequence[Sample], drawn: torch.Tensor, true: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Fréchet and kernel distances of features `(N, d)`, and of those in each group of samples."""
    value, error, corrected = frechet_estimate(drawn, true)
    interval = [value + side * 1.96 * error for side in (-1, 1)]
    found = {"fid": (value, interval), "fid_corrected": (corrected, None)}
    found["kid_x1000"] = 1000 * kernel_distance(drawn, true), None
    measures = {name: {"value": one, "interval": of, "n": len(samples)} for name, (one, of) in found.items()}
    parts = [sample.groups.get("category") for sample in samples]
    for part in sorted({*parts} - {None}):
        of = [index for index, own in enumerate(parts) if own == part]
        value = frechet_distance(drawn[of], true[of]) if len(of) > 1 else None
        measures[f"fid/category/{part}"] = {"value": value, "interval": None, "n": len(of)}
    return measures


def score(name: str, samples: Sequence[Sample], answers: Sequence[str], data: Path, path: Path) -> None:
    """Writes what each answer is worth."""
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for sample, text in zip(samples, answers, strict=True):
            picture = sample.image.relative_to(data).as_posix()
            row = {"id": sample.id, "picture": picture, "groups": sample.groups}
            row["scores"] = {key: float(value) for key, value in BENCHMARKS[name].score(sample, text).items()}
            file.write(json.dumps(row) + "\n")


def aggregate(measure: Measure) -> dict[str, Any]:
    """The number, its interval of 95 % (`None` where it has none), and of how many samples."""
    if measure.value is not None:
        value = float(measure.value(measure.counts.sum(0)))
        interval = bootstrap_interval(measure.counts, measure.value, measure.strata)
    else:
        sums, sizes = measure.counts[measure.counts[:, 1] > 0].T
        mean, error = clustered_mean(sums, sizes) if len(sums) else (math.nan, math.nan)
        value, interval = 100 * mean, wilson_interval(mean, error, len(sums))
        interval = interval and [100 * side for side in interval]
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
    of_each = {name: BENCHMARKS[name.split("/")[0]] for name in read_json(first) if name in read_json(second)}
    common = [name for name, of in of_each.items() if of.kind not in ("features", "language")]
    if not common:
        raise ValueError(f"{first} and {second} have no benchmark in common that is a number for each sample.")
    differences_of: dict[str, dict[str, dict[str, Any]]] = {}
    for name in common:
        rows = [read_rows(path.parent / name / SCORES_NAME) for path in (first, second)]
        if len({tuple((row["id"], row["picture"]) for row in of) for of in rows}) > 1:
            raise ValueError(f"{name} of {first} and of {second} are about other questions: nothing to compare.")
        both = [pair for pair in zip(*rows, strict=True) if all(row["scores"] for row in pair)]
        if not both:
            raise ValueError(f"{name}: no picture has scores in both runs.")
        of_first, of_second = (of_each[name].measures(of) for of in zip(*both, strict=True))
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
                printed = " / ".join(map(str, PAPER.get(name, {}).get(measure, ("-",))))
                lines.append([name, measure, value, interval, str(of["n"]), *[printed] * paper])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
