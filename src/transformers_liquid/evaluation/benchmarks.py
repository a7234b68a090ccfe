"""Benchmarks of questions about pictures: their files as published, and the numbers they are known by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.files import parse_json, read_json, read_text
from .answers import eval_ai, gqa_right, mme_says, pope_says_yes, vqa_v2


# What LLaVA-1.5 asks for in all of them, and the Liquid paper with its files.
SHORT = "\nAnswer the question using a single word or phrase."
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
POPE_PARTS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Sample:
    """A question about a picture.

    Args:
        id (`str`): Its name, once in a benchmark.
        image (`Path`): The picture: questions that share it are a cluster.
        question (`str`): With what is said of how to answer.
        true: What is right: a word, or the answers of ten people.
        groups (`Mapping`): Parts of the benchmark that it is in, by what they are parts by.
    """

    id: str
    image: Path
    question: str
    true: Any
    groups: Mapping[str, str] = field(default_factory=dict)


class Measure(NamedTuple):
    """A number over all samples, made of totals over pictures.

    Args:
        counts (`np.ndarray` of shape `(G, k)`): What each picture adds to the totals. Of a mean: the scores and their number.
        n (`int`): How many samples it is about.
        value (callable, *optional*): The number for totals `(..., k)`; `None` for a mean, in per cent.
        strata (`np.ndarray` of shape `(G,)`, *optional*): Parts of fixed size that the pictures belong to.
    """

    counts: np.ndarray
    n: int
    value: Callable[[np.ndarray], np.ndarray] | None = None
    strata: np.ndarray | None = None


Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, and what it measures.

    Args:
        files: Files and folders that must be there, under the folder of data.
        origin: Where they are published.
        samples: Reads them.
        score: What an answer to a sample is worth, by name.
        measures: Of rows, scored samples with their `picture`, `groups` and `scores`.
        paper: The numbers of the Liquid paper (arXiv 2412.04332, table 6), by measure.
    """

    files: tuple[str, ...]
    origin: str
    samples: Callable[[Path], list[Sample]]
    score: Callable[[Sample, str], dict[str, float]]
    measures: Callable[[Rows], dict[str, Measure]]
    paper: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def _per_picture(rows: Rows, columns: Callable[[Mapping[str, Any]], Sequence[float]]) -> np.ndarray:
    totals: dict[str, np.ndarray] = {}
    for row in rows:
        totals[row["picture"]] = totals.get(row["picture"], 0) + np.array(columns(row), dtype=float)
    return np.stack(list(totals.values()))


def mean_measures(rows: Rows) -> dict[str, Measure]:
    """The mean of every score; and of each, by group, `score/by/group`."""
    parts: dict[str, list] = {"": list(rows)}
    for row in rows:
        for by, group in row["groups"].items():
            parts.setdefault(f"/{by}/{group}", []).append(row)
    return {
        name + part: Measure(_per_picture(of, lambda row, name=name: (row["scores"][name], 1)), len(of))
        for part, of in parts.items()
        for name in rows[0]["scores"]
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield parse_json(line, f"Line {number} of {path}")


def _coco(data: Path, image_id: int) -> Path:
    return data / "val2014" / f"COCO_val2014_{image_id:012}.jpg"


def _vqav2(data: Path) -> list[Sample]:
    known = {one["question_id"]: one for one in read_json(data / _VQAV2[1])["annotations"]}
    samples = []
    for one in read_json(data / _VQAV2[0])["questions"]:
        if one["question_id"] not in known:
            raise ValueError(f"{data / _VQAV2[1]} has no answers to question {one['question_id']}.")
        truth = known[one["question_id"]]
        groups = {name: truth[name] for name in ("answer_type", "question_type")}
        given = _ten(one["question_id"], [answer["answer"] for answer in truth["answers"]])
        image = _coco(data, one["image_id"])
        samples.append(Sample(str(one["question_id"]), image, one["question"] + SHORT, given, groups))
    return samples


def _ten(question: Any, given: list[str]) -> list[str]:
    if len(given) != 10:
        raise ValueError(f"Question {question} must have the answers of ten people, got {len(given)}.")
    return given


def _gqa(data: Path) -> list[Sample]:
    return [
        Sample(
            name,
            data / "gqa" / "images" / f"{one['imageId']}.jpg",
            one["question"] + SHORT,
            one["answer"],
            {by: one["types"][by] for by in ("structural", "semantic")},
        )
        for name, one in read_json(data / _GQA[0]).items()
    ]


def _textvqa(data: Path) -> list[Sample]:
    # The `question_id` of this file is that of the picture, and comes again with each of its questions.
    asked = {
        (one["question_id"], one["text"].split("\n")[0].lower()): one["text"] for one in _lines(data / _TEXTVQA[1])
    }
    samples = []
    for one in read_json(data / _TEXTVQA[0])["data"]:
        key = one["image_id"], one["question"].lower()
        if key not in asked:
            raise ValueError(f"{data / _TEXTVQA[1]} does not ask {one['question']!r} about {one['image_id']}.")
        image = data / "textvqa" / "train_images" / f"{one['image_id']}.jpg"
        given = _ten(one["question_id"], one["answers"])
        samples.append(Sample(str(one["question_id"]), image, asked[key], given))
    return samples


def _pope(data: Path) -> list[Sample]:
    samples = []
    for part, name in zip(POPE_PARTS, _POPE, strict=True):
        for one in _lines(data / name):
            if one["label"] not in ("yes", "no"):
                raise ValueError(f"{data / name}: a label must be yes or no, got {one['label']!r}.")
            place = f"{part}/{one['question_id']}"
            image = data / "val2014" / one["image"]
            samples.append(Sample(place, image, one["text"] + SHORT, one["label"], {"part": part}))
    return samples


def _pope_score(sample: Sample, answer: str) -> dict[str, float]:
    says, true = pope_says_yes(answer), sample.true == "yes"
    return {"tp": says and true, "fp": says and not true, "fn": not says and true, "tn": not says and not true}


def _pope_measures(rows: Rows) -> dict[str, Measure]:
    """Of each part, `f1/part/random`; and the mean of the three F1, which papers call POPE."""

    def ratio(columns: np.ndarray, above: Sequence[float], below: Sequence[float]) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):  # never a yes: no precision
            return 100 * (columns @ np.array(above)) / (columns @ np.array(below))

    kinds = {  # of true and false positives, false and true negatives
        "f1": ((2, 0, 0, 0), (2, 1, 1, 0)),
        "accuracy": ((1, 0, 0, 1), (1, 1, 1, 1)),
        "precision": ((1, 0, 0, 0), (1, 1, 0, 0)),
        "recall": ((1, 0, 0, 0), (1, 0, 1, 0)),
        "yes_ratio": ((1, 1, 0, 0), (1, 1, 1, 1)),
    }
    parts = [part for part in POPE_PARTS if any(row["groups"]["part"] == part for row in rows)]

    def columns(row: Mapping[str, Any]) -> list[float]:
        return [
            row["scores"][name] * (row["groups"]["part"] == part) for part in parts for name in ("tp", "fp", "fn", "tn")
        ]

    def mean(totals: np.ndarray) -> np.ndarray:
        return np.mean([ratio(totals[..., 4 * one : 4 * one + 4], *kinds["f1"]) for one in range(len(parts))], axis=0)

    counts = _per_picture(rows, columns)
    measures = {"f1": Measure(counts, len(rows), mean)}
    for index, part in enumerate(parts):
        own = counts[:, 4 * index : 4 * index + 4]
        for name, (above, below) in kinds.items():
            value = lambda totals, above=above, below=below: ratio(totals, above, below)  # noqa: E731
            measures[f"{name}/part/{part}"] = Measure(own, int(own.sum()), value)
    return measures


def _mme(data: Path) -> list[Sample]:
    samples = []
    for name in (*PERCEPTION, *COGNITION):
        folder = data / "mme" / name
        nested = (folder / "questions_answers_YN").is_dir()
        texts, images = (folder / "questions_answers_YN", folder / "images") if nested else (folder, folder)
        found = {
            path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        }
        for path in sorted(texts.glob("*.txt")):
            lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
            if len(lines) != 2 or any(len(line) != 2 or line[1].strip() not in ("Yes", "No") for line in lines):
                raise ValueError(f"{path} must hold two lines, a question, a tab, and Yes or No.")
            if path.stem not in found:
                raise ValueError(f"{images} has no picture {path.stem}, which {path} asks about.")
            for number, (question, true) in enumerate(lines):
                question = question.replace("Please answer yes or no.", "").strip() + SHORT
                place = f"{name}/{path.stem}/{number}"
                samples.append(Sample(place, found[path.stem], question, true.strip().lower(), {"part": name}))
    return samples


def _mme_measures(rows: Rows) -> dict[str, Measure]:
    """Of each part 100 * (accuracy + accuracy of pictures with both right); `perception` and `cognition` are sums."""
    parts = [part for part in (*PERCEPTION, *COGNITION) if any(row["groups"]["part"] == part for row in rows)]
    pictures: dict[str, list] = {}
    for row in rows:
        pictures.setdefault(row["picture"], []).append(row)
    counts = np.zeros((len(pictures), len(parts), 2))
    for index, of in enumerate(pictures.values()):
        right = [row["scores"]["right"] for row in of]
        counts[index, parts.index(of[0]["groups"]["part"])] = sum(right) / 2 + all(right), 1
    strata = counts[..., 1].argmax(1)

    def total(columns: list[int]) -> Callable[[np.ndarray], np.ndarray]:
        def value(totals: np.ndarray) -> np.ndarray:
            totals = totals.reshape(*totals.shape[:-1], len(parts), 2)[..., columns, :]
            return (100 * totals[..., 0] / totals[..., 1]).sum(-1)

        return value

    sums = {"perception": PERCEPTION, "cognition": COGNITION} | {f"score/part/{part}": [part] for part in parts}
    measures = {}
    for name, of in sums.items():
        if columns := [parts.index(part) for part in of if part in parts]:
            n = 2 * int(counts[:, columns, 1].sum())
            measures[name] = Measure(counts.reshape(len(counts), -1), n, total(columns), strata)
    return measures


_VQAV2 = ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/v2_mscoco_val2014_annotations.json")
_GQA = ("gqa/testdev_balanced_questions.json",)
_TEXTVQA = ("textvqa/TextVQA_0.5.1_val.json", "textvqa/llava_textvqa_val_v051_ocr.jsonl")
_POPE = tuple(f"pope/coco_pope_{part}.json" for part in POPE_PARTS)
_MME = tuple(f"mme/{part}" for part in (*PERCEPTION, *COGNITION))

BENCHMARKS = {
    "vqav2": Benchmark(
        _VQAV2,
        "https://visualqa.org/download.html, pictures of COCO val2014 in val2014/",
        _vqav2,
        lambda sample, answer: {"vqa_v2": vqa_v2(answer, sample.true), "eval_ai": eval_ai(answer, sample.true)},
        mean_measures,
        {"vqa_v2": (68.0, 71.3)},
    ),
    "gqa": Benchmark(
        _GQA,
        "https://cs.stanford.edu/people/dorarad/gqa/download.html, pictures in gqa/images/",
        _gqa,
        lambda sample, answer: {"accuracy": float(gqa_right(answer, sample.true))},
        mean_measures,
        {"accuracy": (56.1, 58.4)},
    ),
    "textvqa": Benchmark(
        _TEXTVQA,
        "https://textvqa.org/dataset, pictures in textvqa/train_images/; the questions with OCR tokens are of LLaVA's eval.zip",
        _textvqa,
        lambda sample, answer: {"eval_ai": eval_ai(answer, sample.true)},
        mean_measures,
        {"eval_ai": (40.4, 42.4)},
    ),
    "pope": Benchmark(
        _POPE,
        "https://github.com/AoiDragon/POPE/tree/main/output/coco, pictures of COCO val2014 in val2014/",
        _pope,
        _pope_score,
        _pope_measures,
        {"f1": (81.1,)},
    ),
    "mme": Benchmark(
        _MME,
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        _mme,
        lambda sample, answer: {"right": float(mme_says(answer) == sample.true)},
        _mme_measures,
        {"perception": (1107.2, 1119.3)},
    ),
}


def read_samples(name: str, data: Path, limit: int | None = None) -> list[Sample]:
    """The questions of a benchmark, after all that can be wrong with its files was looked for.

    Args:
        name (`str`): One of `BENCHMARKS`.
        data (`Path`): The folder that holds `name/` with the files as published.
        limit (`int`, *optional*): Only of the first so many pictures, with all of their questions.

    Raises:
        ValueError: If a file or a picture is missing, not in the published format, or has an id twice.
    """
    benchmark = BENCHMARKS[name]
    if missing := [one for one in benchmark.files if not (data / one).exists()]:
        raise ValueError(f"{name} needs {', '.join(missing)} in {data}. They are published at {benchmark.origin}.")
    try:
        samples = benchmark.samples(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: files of {data} are not in the published format ({error!r}).") from error
    if twice := [one for one, times in Counter(sample.id for sample in samples).items() if times > 1]:
        raise ValueError(f"{name}: {len(twice)} questions of {data} come twice, such as {twice[0]}.")
    if not samples:
        raise ValueError(f"{name}: files of {data} hold no question.")
    images = list(dict.fromkeys(sample.image for sample in samples))[:limit]
    if missing := [str(image) for image in images if not image.is_file()]:
        raise ValueError(f"{name}: {len(missing)} pictures are missing, such as {missing[0]}: see {benchmark.origin}.")
    chosen = {*images}
    return [sample for sample in samples if sample.image in chosen]
