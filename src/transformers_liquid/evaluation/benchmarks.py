"""Benchmarks: their files as published, and the numbers they are known by."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..utils.files import check_keys, parse_json, read_json, read_text, read_yaml
from ..utils.optional import require
from .answers import eval_ai, gqa_right, mme_says, pope_says_yes, vqa_v2
from .pictures import GROUPS


# What LLaVA-1.5 asks for in all of them, and the Liquid paper with its files.
SHORT = "\nAnswer the question using a single word or phrase."
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
POPE_PARTS = ("random", "popular", "adversarial")
# Of WISE, with the last `prompt_id` of each.
WISE_PARTS = {"cultural": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}
WISE_WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}


_FACTS = read_yaml(Path(__file__).with_name("benchmarks.yaml"))
FILES, ORIGINS, TASKS, PAPER = (_FACTS[name] for name in ("files", "origins", "tasks", "paper"))


@dataclass(frozen=True)
class Sample:
    """A question about a picture, or a text and a picture of it.

    Args:
        id (`str`): Its name, once in a benchmark.
        image (`Path`, *optional*): The picture: questions that share it are a cluster. Of what is drawn the true one, or
            none.
        question (`str`): With what is said of how to answer; or the text.
        true: What is right: a word, or the answers of ten people. Of what is drawn, what a judge is told about it.
        groups (`Mapping`): Parts of the benchmark that it is in, by what they are parts by.
    """

    id: str
    image: Path | None
    question: str
    true: Any = None
    groups: Mapping[str, Any] = field(default_factory=dict)


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


def _per_picture(rows: Rows, columns: Callable[[Mapping[str, Any]], Sequence[float]]) -> np.ndarray:
    totals: dict[str, np.ndarray] = {}
    for row in rows:
        totals[row["picture"]] = totals.get(row["picture"], 0) + np.array(columns(row), dtype=float)
    return np.stack(list(totals.values()))


def mean_measures(rows: Rows) -> dict[str, Measure]:
    """The mean of every score over the samples that have it; and of each, by group, `score/by/group`."""
    parts: dict[str, list] = {"": list(rows)}
    for row in rows:
        for by, group in row["groups"].items():
            parts.setdefault(f"/{by}/{group}", []).append(row)
    measures = {}
    for part, of in parts.items():
        for name in dict.fromkeys(name for row in rows for name in row["scores"]):
            if own := [row for row in of if name in row["scores"]]:
                of_each = _per_picture(
                    own, lambda row, name=name: (np.sum(row["scores"][name]), np.size(row["scores"][name]))
                )
                measures[name + part] = Measure(of_each, int(of_each[:, 1].sum()))
    return measures


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, and what it measures.

    Args:
        samples: Reads its files.
        score: What an answer to a sample is worth, by name.
        measures: Of rows, scored samples with their `picture`, `groups` and `scores`; not of features.
        kind: What is measured: answers, losses, drawn pictures by a judge, or by their distance to true ones; or
            what lm-evaluation-harness does.
        judged: The names of what a judge gives a picture.
    """

    samples: Callable[[Path], list[Sample]]
    score: Callable[[Sample, str], dict[str, float]] | None = None
    measures: Callable[[Rows], dict[str, Measure]] = mean_measures
    kind: Literal["answers", "loss", "judge", "features", "language", "emoji"] = "answers"
    judged: tuple[str, ...] = ()


def read_rows(path: Path, grows: bool = False) -> list[dict[str, Any]]:
    """What a file of JSON lines holds; of one that `grows`, what a kill has torn behind the last line break is left out."""
    lines = enumerate(read_text(path).split("\n")[: -1 if grows else None], start=1)
    return [parse_json(line, f"Line {number} of {path}") for number, line in lines if line.strip()]


def _vqav2(data: Path) -> list[Sample]:
    known = {one["question_id"]: one for one in read_json(data / FILES["vqav2"][1])["annotations"]}
    samples = []
    for one in read_json(data / FILES["vqav2"][0])["questions"]:
        if one["question_id"] not in known:
            raise ValueError(f"{data / FILES['vqav2'][1]} has no answers to question {one['question_id']}.")
        truth = known[one["question_id"]]
        groups = {name: truth[name] for name in ("answer_type", "question_type")}
        given = [answer["answer"] for answer in truth["answers"]]
        image = data / "val2014" / f"COCO_val2014_{one['image_id']:012}.jpg"
        samples.append(Sample(str(one["question_id"]), image, one["question"] + SHORT, given, groups))
    return samples


def _vqa_score(sample: Sample, answer: str) -> dict[str, float]:
    return {"vqa_v2": vqa_v2(answer, sample.true), "eval_ai": eval_ai(answer, sample.true)}


def _gqa(data: Path) -> list[Sample]:
    samples = []
    for name, one in read_json(data / FILES["gqa"][0]).items():
        image = data / "gqa" / "images" / f"{one['imageId']}.jpg"
        groups = {by: one["types"][by] for by in ("structural", "semantic")}
        samples.append(Sample(name, image, one["question"] + SHORT, one["answer"], groups))
    return samples


def _textvqa(data: Path) -> list[Sample]:
    # The `question_id` of this file is that of the picture, and comes again with each of its questions.
    asked = {
        (one["question_id"], one["text"].split("\n")[0].lower()): one["text"]
        for one in read_rows(data / FILES["textvqa"][1])
    }
    samples = []
    for one in read_json(data / FILES["textvqa"][0])["data"]:
        key = one["image_id"], one["question"].lower()
        if key not in asked:
            raise ValueError(f"{data / FILES['textvqa'][1]} does not ask {one['question']!r} about {one['image_id']}.")
        image = data / "textvqa" / "train_images" / f"{one['image_id']}.jpg"
        samples.append(Sample(str(one["question_id"]), image, asked[key], one["answers"]))
    return samples


def _pope(data: Path) -> list[Sample]:
    samples = []
    for part, name in zip(POPE_PARTS, FILES["pope"], strict=True):
        for one in read_rows(data / name):
            if one["label"] not in ("yes", "no"):
                raise ValueError(f"{data / name}: a label must be yes or no, got {one['label']!r}.")
            place = f"{part}/{one['question_id']}"
            image = data / "val2014" / one["image"]
            samples.append(Sample(place, image, one["text"] + SHORT, one["label"], {"part": part}))
    return samples


def _pope_score(sample: Sample, answer: str) -> dict[str, float]:
    says, true = pope_says_yes(answer), sample.true == "yes"
    return {"tp": says and true, "fp": says and not true, "fn": not says and true, "tn": not says and not true}


def _ratios(totals: np.ndarray) -> np.ndarray:
    """In per cent, of totals `(..., 2 * parts)`: by turns what is divided and by what."""
    return 100 * totals[..., ::2] / totals[..., 1::2]


def _pope_measures(rows: Rows) -> dict[str, Measure]:
    """Of each part, `f1/part/random`; and the mean of the three F1, which papers call POPE."""
    kinds = {  # what is divided by what, of true and false positives, false and true negatives
        "f1": ((2, 0, 0, 0), (2, 1, 1, 0)),
        "accuracy": ((1, 0, 0, 1), (1, 1, 1, 1)),
        "precision": ((1, 0, 0, 0), (1, 1, 0, 0)),
        "recall": ((1, 0, 0, 0), (1, 0, 1, 0)),
        "yes_ratio": ((1, 1, 0, 0), (1, 1, 1, 1)),
    }

    def terms(row: Mapping[str, Any], kind: str) -> np.ndarray:
        return np.array(kinds[kind]) @ [row["scores"][name] for name in ("tp", "fp", "fn", "tn")]

    parts = {part: [row for row in rows if row["groups"]["part"] == part] for part in POPE_PARTS}
    parts = {part: of for part, of in parts.items() if of}
    f1 = _per_picture(rows, lambda row: np.outer([row["groups"]["part"] == part for part in parts], terms(row, "f1")))
    mean = Measure(f1.reshape(len(f1), -1), len(rows), lambda of: _ratios(of).mean(-1))
    return {"f1": mean} | {
        f"{kind}/part/{part}": Measure(_per_picture(of, partial(terms, kind=kind)), len(of))
        for part, of in parts.items()
        for kind in kinds
    }


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
    pictures: dict[str, list] = {}
    for row in rows:
        pictures.setdefault(row["picture"], []).append(row)
    part_of = np.array([of[0]["groups"]["part"] for of in pictures.values()])
    right = np.array([[row["scores"]["right"] for row in of] for of in pictures.values()])
    worth = right.sum(1) / 2 + right.all(1)
    sums = {"perception": PERCEPTION, "cognition": COGNITION}
    measures = {}
    for name, parts in (sums | {f"score/part/{part}": [part] for part in (*PERCEPTION, *COGNITION)}).items():
        if (own := np.isin(part_of, parts)).any():
            found, strata = np.unique(part_of[own], return_inverse=True)
            is_of = np.eye(len(found))[strata]
            counts = np.stack([worth[own, None] * is_of, is_of], axis=2).reshape(len(is_of), -1)
            measures[name] = Measure(counts, 2 * len(is_of), lambda of: _ratios(of).sum(-1), strata)
    return measures


def _pairs(data: Path) -> list[Sample]:
    """The pictures of a folder and their texts, as `datasets` reads such folders."""
    lines = read_rows(data / FILES["folder"][0])
    return [Sample(one["file_name"], data / "pairs" / one["file_name"], one["text"]) for one in lines]


def _loss_measures(rows: Rows) -> dict[str, Measure]:
    """Nats for a label, and how many labels are the most probable id: of the pictures drawn, and of their captions."""
    measures = {}
    for name, total in product(("loss", "accuracy"), ("image_labels", "text_labels")):
        name = total.replace("labels", name)
        counts = _per_picture(rows, lambda row, names=(name, total): [row["scores"][one] for one in names])
        value = None if "accuracy" in name else lambda totals: totals[..., 0] / totals[..., 1]
        measures[name] = Measure(counts, len(rows), value)
    return measures


def read_pictures(data: Path) -> dict[str, Mapping[str, Any]]:
    """All that tasks of `emoji` are about, by `text`: with the `file_name` of a true picture or, all of them, without; and
    maybe other `words` for it."""
    path = data / FILES["emoji"][1]
    pictures = {one["text"]: one for one in read_rows(path)}
    files = [path.with_name(one["file_name"]) for one in pictures.values() if "file_name" in one]
    if len(pictures) < len(read_rows(path)) or len(files) not in (0, len(pictures)):
        raise ValueError(f"{path} must have each text once, and a file_name in all lines or in none.")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"{len(missing)} pictures of {path} are missing, such as {missing[0]}.")
    return pictures


def _emoji(data: Path) -> list[Sample]:
    path, pictures, samples = data / FILES["emoji"][0], read_pictures(data), []
    for number, one in enumerate(read_rows(path), start=1):
        check_keys(f"Line {number} of {path}", one, ("id", "measure"))
        shown, text = one.setdefault("pictures", []), one.setdefault("text", "")
        is_caption = not text and len(shown) == 1 and not {"shows", "tells"} & one.keys()
        kinds = one.keys() - {"id", "measure", "parts", "text", "pictures"}
        if kinds not in (set(), {"shows"}, {"tells"}, {"says"}, {"says", "rather"}):
            raise ValueError(
                f"Line {number} of {path} must have shows, tells, or says, which may have rather beside it, or none."
            )
        if unknown := {*shown, *one.get("shows", ()), *one.get("tells", ())} - pictures.keys():
            raise ValueError(
                f"Line {number} of {path} speaks of {min(unknown)!r}, which is not in {FILES['emoji'][1]}."
            )
        if (text.count("<image>") != len(shown) or not text) and not is_caption:
            raise ValueError(
                f"Line {number} of {path} must have a text with an <image> for each picture, or one picture."
            )
        file = pictures[shown[0]].get("file_name") if shown else None
        image = path.with_name(file) if file else None
        samples.append(Sample(one["id"], image, text, one, one.get("parts", {})))
    return samples


def _mjhq(data: Path) -> list[Sample]:
    samples = []
    for name, one in read_json(data / FILES["mjhq"][0]).items():
        image = data / "mjhq" / "mjhq30k_imgs" / one["category"] / f"{name}.jpg"
        samples.append(Sample(name, image, one["prompt"], groups={"category": one["category"]}))
    return samples


def _genai_bench(data: Path) -> list[Sample]:
    text, skills = (data / name for name in FILES["genai-bench"])
    prompts, numbers_of = read_text(text).rstrip("\n").split("\n"), read_json(skills)
    if unknown := {number for numbers in numbers_of.values() for number in numbers} - {*range(1, len(prompts) + 1)}:
        raise ValueError(f"{skills} speaks of lines that {text} does not have, such as {min(unknown, key=str)}.")
    samples = []
    for number, prompt in enumerate(prompts, start=1):
        groups = {"skill": [name for name, numbers in numbers_of.items() if number in numbers]}
        samples.append(Sample(f"{number:05}", None, prompt.strip(), groups=groups))
    return samples


def _genai_measures(rows: Rows) -> dict[str, Measure]:
    """The mean of all, and of the prompts of each skill, of which one has several; `basic` and `advanced` are two."""
    scores = [dict.fromkeys(("overall", *row["groups"]["skill"]), row["scores"]["score"]) for row in rows]
    return mean_measures([row | {"scores": of, "groups": {}} for row, of in zip(rows, scores, strict=True)])


def _wise(data: Path) -> list[Sample]:
    samples = []
    for name in FILES["wise"]:
        for one in parse_json(read_text(data / name), data / name):
            part = [*WISE_PARTS][bisect_left([*WISE_PARTS.values()], one["prompt_id"])]
            groups = {"category": part, "subcategory": one["Subcategory"]}
            samples.append(Sample(str(one["prompt_id"]), None, one["Prompt"], one["Explanation"], groups))
    return samples


def _wise_measures(rows: Rows) -> dict[str, Measure]:
    """WiScore and what it is made of, in per cent of the best; of the pictures that have scores."""
    scored = [row | {"scores": {name: value / 2 for name, value in row["scores"].items()}} for row in rows]
    for of in (row["scores"] for row in scored if row["scores"]):
        of["wiscore"] = sum(weight * of[name] for name, weight in WISE_WEIGHTS.items())
    return mean_measures(scored)


BENCHMARKS = {
    "vqav2": Benchmark(_vqav2, _vqa_score),
    "gqa": Benchmark(_gqa, lambda sample, answer: {"accuracy": float(gqa_right(answer, sample.true))}),
    "textvqa": Benchmark(_textvqa, lambda sample, answer: {"eval_ai": eval_ai(answer, sample.true)}),
    "pope": Benchmark(_pope, _pope_score, _pope_measures),
    "mme": Benchmark(_mme, lambda sample, answer: {"right": float(mme_says(answer) == sample.true)}, _mme_measures),
    "emoji": Benchmark(_emoji, kind="emoji"),
    "loss": Benchmark(_pairs, measures=_loss_measures, kind="loss"),
    "folder": Benchmark(_pairs, kind="features"),
    "mjhq": Benchmark(_mjhq, kind="features"),
    "genai-bench": Benchmark(_genai_bench, measures=_genai_measures, kind="judge", judged=("score",)),
    "wise": Benchmark(_wise, measures=_wise_measures, kind="judge", judged=tuple(WISE_WEIGHTS)),
    **{name: Benchmark(lambda data: [], kind="language") for name in TASKS},
}


def check_benchmarks(names: Sequence[str], measured_by: Mapping[str, str | None]) -> set[str]:
    """The kinds of benchmarks; raises unless all are known, and have the `judge` or the `features` that they need;
    `emoji` may have a judge."""
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ValueError(f"No benchmark is called {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}.")
    kinds = {BENCHMARKS[name].kind for name in names}
    for kind, by in measured_by.items():
        if (kind in kinds) != (by is not None) and not (by and kind == "judge" and "emoji" in kinds):
            who = ", ".join(name for name, of in BENCHMARKS.items() if of.kind == kind)
            raise ValueError(f"{who} need --{kind}, and nothing else does.")
    if "language" in kinds:
        require("lm_eval", "A language task", extra="eval")
    return kinds


def read_samples(name: str, data: Path, limit: int | None = None) -> list[Sample]:
    """The samples of a benchmark, after all that can be wrong with its files was looked for.

    Args:
        name (`str`): One of `BENCHMARKS`.
        data (`Path`): The folder that holds `name/` with the files as published.
        limit (`int`, *optional*): Only of the first so many pictures, with all of their questions.

    Raises:
        ValueError: If a file or a picture is missing, not in the published format, or has an id twice.
    """
    benchmark = BENCHMARKS[name]
    if missing := [one for one in FILES[name] if not (data / one).exists()]:
        raise ValueError(f"{name} needs {', '.join(missing)} in {data}. That is {ORIGINS[name]}.")
    try:
        samples = benchmark.samples(data)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: files of {data} are not in the published format ({error!r}).") from error
    if twice := [one for one, times in Counter(sample.id for sample in samples).items() if times > 1]:
        raise ValueError(f"{name}: {len(twice)} ids of {data} come twice, such as {twice[0]}.")
    for sample in samples:
        if isinstance(sample.true, list) and len(sample.true) != 10:
            raise ValueError(f"Question {sample.id} must have the answers of ten people, got {len(sample.true)}.")
    if not samples and benchmark.kind != "language":
        raise ValueError(f"{name}: files of {data} hold no question, or nothing to draw.")
    # What has no picture yet counts by itself.
    images = list(dict.fromkeys(sample.image or sample.id for sample in samples))[:limit]
    if missing := [str(image) for image in images if isinstance(image, Path) and not image.is_file()]:
        raise ValueError(f"{name}: {len(missing)} pictures are missing, such as {missing[0]}: see {ORIGINS[name]}.")
    if benchmark.kind == "features" and len(images) < 2 * GROUPS:
        raise ValueError(
            f"{name} has {len(images)} pictures here: a distance with its error needs {2 * GROUPS} or more."
        )
    chosen = {*images}
    return [sample for sample in samples if (sample.image or sample.id) in chosen]
