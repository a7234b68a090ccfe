"""Benchmarks: answers are worth what the official rules say, runs go on after a kill, intervals hold the truth."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_checkpoint

from transformers_liquid.evaluation.answers import eval_ai, gqa_right, mme_says, pope_says_yes, vqa_v2
from transformers_liquid.evaluation.benchmarks import (
    BENCHMARKS,
    COGNITION,
    PERCEPTION,
    POPE_PARTS,
    WISE_WEIGHTS,
    read_samples,
)
from transformers_liquid.evaluation.intervals import bootstrap_interval, clustered_mean, wilson_interval
from transformers_liquid.evaluation.run import aggregate, answer, read_rows
from transformers_liquid_cli import main


QUESTIONS = [name for name, benchmark in BENCHMARKS.items() if benchmark.kind == "answers"]
SHORT = "\nAnswer the question using a single word or phrase."


# The rules, in other words than the package's

WORDS = [
    "two",
    "2",
    "none",
    "Zero",
    "ten",
    "a",
    "the",
    "an",
    "The",
    "dog",
    "t-shirt",
    "3.",
    "1,000",
    "1,5",
    "St.",
    "Louis",
    "Dont",
    "cant",
    "wouldnt've",
    "shouldn'tve",
    "ow's'at",
    "yall'd've",
    "somebody'd",
    "someoned",
    "Im",
    "let's",
    "man's",
    "yes!",
    "no?",
    "(left)",
    "[x]",
    '"red"',
    "black/white",
    "re-do",
    "hat,",
    "a_b",
    "3.5",
    "end.",
    "x;",
    "<y>",
    "yes",
    "no",
]
OFFICIAL_MARKS = [
    ";",
    "/",
    "[",
    "]",
    '"',
    "{",
    "}",
    "(",
    ")",
    "=",
    "+",
    "\\",
    "_",
    "-",
    ">",
    "<",
    "@",
    "`",
    ",",
    "?",
    "!",
]
# The part of the official table that `WORDS` touch, as it is published.
TABLE = {"dont": "don't", "cant": "can't", "wouldnt've": "wouldn't've", "shouldn'tve": "shouldn't've"}
TABLE |= {"ow's'at": "'ow's'at", "yall'd've": "y'all'd've", "somebody'd": "somebodyd", "someoned": "someone'd"}


def phrase(source: random.Random) -> str:
    return source.choice(["", " "]).join(
        [" ".join(source.choices(WORDS, k=source.randint(1, 4))), source.choice(["", "\n", "\t"])]
    )


def punctuated(text: str) -> str:
    comma = any(text[i].isdigit() and text[i + 1] == "," and text[i + 2].isdigit() for i in range(len(text) - 2))
    out = list(text)
    for index, character in enumerate(text):
        if character in OFFICIAL_MARKS:
            gone = comma or f"{character} " in text or f" {character}" in text
            out[index] = "" if gone else " "
    joined, kept, periods = "".join(out), "", 0
    for index, character in enumerate(joined):
        if character == "." and periods < 32 and not joined[index + 1 : index + 2].isdigit():
            periods += 1
        else:
            kept += character
    return kept


def plain(text: str) -> str:
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    out = []
    for word in text.lower().split():
        word = "0" if word == "none" else str(numbers.index(word)) if word in numbers else word
        if word not in {"a", "an", "the"}:
            out.append(TABLE.get(word, word))
    return " ".join(out)


def leave_one_out(answer: str, given: list[str]) -> float:
    return sum(min(1, sum(a == answer for j, a in enumerate(given) if j != i) / 3) for i in range(10)) / 10


def expected_vqa_v2(answer: str, given: list[str]) -> float:
    given = given if len(set(given)) == 1 else [punctuated(one) for one in given]
    return leave_one_out(plain(punctuated(answer.replace("\n", " ").replace("\t", " ").strip())), given)


def expected_eval_ai(answer: str, given: list[str]) -> float:
    def uniform(text):
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        return plain(punctuated(text.replace("\n", " ").replace("\t", " ").strip()))

    return leave_one_out(uniform(answer), [uniform(one) for one in given])


def test_vqa_accuracies_are_those_of_the_official_rules_on_many_answers():
    source, hits = random.Random(0), 0
    for _ in range(400):
        pool = [phrase(source) for _ in range(source.randint(1, 4))]
        given, text = source.choices(pool, k=10), source.choice(pool)
        if source.random() < 0.5:  # people write what the rules leave as it is
            given = [plain(punctuated(one)) for one in given]
        assert vqa_v2(text, given) == pytest.approx(expected_vqa_v2(text, given), abs=1e-12), (text, given)
        assert eval_ai(text, given) == pytest.approx(expected_eval_ai(text, given), abs=1e-12), (text, given)
        hits += vqa_v2(text, given) > 0
    assert hits > 80


@pytest.mark.parametrize(
    ("text", "given", "official", "ai"),
    [
        ("two", ["two"] * 10, 0, 1),  # unanimous answers stay as they are, the model's becomes "2"
        ("t-shirt", ["t-shirt"] * 10, 0, 1),
        ("the dog", ["dog"] * 2 + [f"{i}x" for i in range(8)], 0.6, 0.6),
        ("3.", ["3"] * 10, 1, 1),
        ("St. Louis", ["st louis"] * 10, 1, 1),
        ("", ["dog"] * 10, 0, 0),
    ],
)
def test_traps_of_vqa_accuracy(text, given, official, ai):
    assert (vqa_v2(text, given), eval_ai(text, given)) == pytest.approx((official, ai))


def test_yes_and_no_are_read_by_the_rules_of_pope_and_mme():
    source = random.Random(1)
    words = ["Yes", "yes", "No", "no", "not", "No,", "none", "Not", "cat", "a.", ".", "Yes.", "NO", "nope", " "]
    for _ in range(400):
        text = " ".join(source.choices(words, k=source.randint(1, 4)))
        first = re.sub(",", "", text[: text.index(".")] if "." in text else text)
        assert pope_says_yes(text) == (not any(word in ("No", "not", "no") for word in re.split(" ", first)))
        low = text.lower().strip().replace(".", "")
        said = low if low in ("yes", "no") else "yes" if "yes" in low[:4] else "no" if "no" in low[:4] else "other"
        assert mme_says(text) == said
    assert gqa_right("Red.", "red") and not gqa_right("red ", "red") and not gqa_right("Red", "Red")
    for _ in range(400):
        true = source.choice(["red", "t-shirt", "no.", "2 dogs"])
        text = source.choice([true, true.title(), "red"]) + source.choice(["", ".", "..", " ", ". "])
        end = len(text)
        while end and text[end - 1] == ".":
            end -= 1
        assert gqa_right(text, true) == ("".join(map(str.lower, text[:end])) == true)


# Numbers over samples


def rows_of(groups: dict, scores: list[dict], pictures: list) -> list[dict]:
    return [
        {"id": str(i), "picture": str(p), "groups": {k: v[i] for k, v in groups.items()}, "scores": s}
        for i, (s, p) in enumerate(zip(scores, pictures, strict=True))
    ]


def test_pope_is_the_mean_of_three_f1_and_precision_of_no_yes_is_none():
    source = random.Random(2)
    for case in range(200):
        part = [POPE_PARTS[i % 3] for i in range(60)]
        says = [source.random() < 0.5 and not (case % 5 == 0 and part[i] == "random") for i in range(60)]
        true = [source.random() < 0.5 for _ in range(60)]
        scores = [
            {"tp": s and t, "fp": s and not t, "fn": t and not s, "tn": not s and not t}
            for s, t in zip(says, true, strict=True)
        ]
        measures = BENCHMARKS["pope"].measures(rows_of({"part": part}, scores, [i // 6 for i in range(60)]))
        f1s = []
        for name in POPE_PARTS:
            pairs = [(s, t) for s, t, p in zip(says, true, part, strict=True) if p == name]
            right, yes, positives = sum(s and t for s, t in pairs), sum(s for s, _ in pairs), sum(t for _, t in pairs)
            f1s.append(200 * right / (yes + positives))
            value = {
                kind: np.nan if m["value"] is None else m["value"]
                for kind in ("precision", "recall", "accuracy", "yes_ratio", "f1")
                for m in [aggregate(measures[f"{kind}/part/{name}"])]
            }
            assert value["f1"] == pytest.approx(f1s[-1])
            assert value["recall"] == pytest.approx(100 * right / positives)
            assert value["yes_ratio"] == pytest.approx(100 * yes / len(pairs))
            assert value["accuracy"] == pytest.approx(100 * np.mean([s == t for s, t in pairs]))
            assert np.isnan(value["precision"]) if not yes else value["precision"] == pytest.approx(100 * right / yes)
        assert float(measures["f1"].value(measures["f1"].counts.sum(0))) == pytest.approx(np.mean(f1s))
    never = aggregate(measures["precision/part/random"]._replace(counts=np.zeros((3, 2))))
    assert never["value"] is None and never["interval"] is None


def test_mme_sums_accuracies_of_questions_and_of_pictures():
    source = random.Random(3)
    for _ in range(200):
        parts = [part for part in (*PERCEPTION, *COGNITION) for _ in range(6)]
        right = [float(source.random() < 0.6) for _ in parts]
        rows = rows_of({"part": parts}, [{"right": one} for one in right], [i // 2 for i in range(len(parts))])
        measures, total = BENCHMARKS["mme"].measures(rows), {}
        for start in range(0, len(parts), 6):
            own = right[start : start + 6]
            both = [own[i] == own[i + 1] == 1 for i in (0, 2, 4)]
            total[parts[start]] = 100 * (np.mean(own) + np.mean(both))
        for name, of in {"perception": PERCEPTION, "cognition": COGNITION}.items():
            m = measures[name]
            assert float(m.value(m.counts.sum(0))) == pytest.approx(sum(total[part] for part in of))
        m = measures["score/part/OCR"]
        assert float(m.value(m.counts.sum(0))) == pytest.approx(total["OCR"]) and m.n == 6
    assert measures["perception"].n == 60


def test_wise_weighs_grades_and_genai_bench_counts_a_prompt_in_all_of_its_skills():
    source = random.Random(4)
    for _ in range(200):
        grades = [
            {} if source.random() < 0.2 else {name: source.randint(0, 2) for name in WISE_WEIGHTS} for _ in range(9)
        ]
        parts = [source.choice("ab") for _ in grades]
        rows = rows_of({"category": parts, "subcategory": ["x"] * 9}, grades, range(9))
        points = [
            (part, (7 * one["consistency"] + 2 * one["realism"] + one["aesthetic_quality"]) / 0.2)
            for part, one in zip(parts, grades, strict=True)
            if one
        ]
        measures = BENCHMARKS["wise"].measures(rows)
        for name in ("", "/category/a", "/category/b"):
            own = [value for part, value in points if name.endswith(f"/{part}") or not name]
            if own:
                found = aggregate(measures[f"wiscore{name}"])
                assert found["value"] == pytest.approx(np.mean(own)) and found["n"] == len(own)
            else:
                assert f"wiscore{name}" not in measures
        skills = [source.sample(["basic", "advanced", "counting"], source.randint(1, 3)) for _ in range(7)]
        scores = [source.random() for _ in skills]
        rows = rows_of({"skill": skills}, [{"score": score} for score in scores], range(7))
        for name, measure in BENCHMARKS["genai-bench"].measures(rows).items():
            own = [score for score, of in zip(scores, skills, strict=True) if name in ("overall", *of)]
            found = aggregate(measure)
            assert found["value"] == pytest.approx(100 * np.mean(own)) and found["n"] == len(own)


def test_a_story_counts_each_of_its_pictures():
    scores = [{"stories": [1.0, 0.0, 1.0], "stories_end": 1.0}, {"stories": [0.0], "stories_end": 0.0}]
    measures = BENCHMARKS["emoji"].measures(rows_of({}, scores, range(2)))
    found = {name: aggregate(measure) for name, measure in measures.items()}
    assert {name: (of["value"], of["n"]) for name, of in found.items()} == {"stories": (50, 4), "stories_end": (50, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_intervals_hold_the_truth_as_often_as_they_say(share):
    source, held, held_by_bootstrap = np.random.default_rng(0), 0, 0
    for repeat in range(400):
        sizes = source.integers(1, 9, size=120)
        levels = source.beta(4 * share, 4 * (1 - share), size=120)  # questions about a picture hang together
        sums = source.binomial(sizes, levels).astype(float)
        low, high = wilson_interval(*clustered_mean(sums, sizes), len(sums))
        held += low < share < high
        if share == 0.5 and repeat < 200:
            low, high = bootstrap_interval(np.stack([sums, sizes], axis=1), lambda of: of[..., 0] / of[..., 1])
            held_by_bootstrap += low < share < high
    assert 367 <= held <= 393  # 95 % of 400, three standard deviations either way
    assert share != 0.5 or 183 <= held_by_bootstrap <= 198  # of 200


def test_wilsons_interval_is_where_the_score_test_would_reject():
    source = np.random.default_rng(3)
    for _ in range(300):
        number = int(source.integers(2, 400))
        right = (source.random(number) < source.choice([0.02, 0.3, 0.98])).astype(float)
        mean, error = clustered_mean(right, np.ones(number))
        # (share - p)^2 = 1.96^2 p (1 - p) / n, solved for p
        square = 1.96**2 / number
        low, high = sorted(np.roots([1 + square, -2 * mean - square, mean**2]).real)
        assert wilson_interval(mean, error, number) == pytest.approx((low, high), abs=1e-9)
        # A picture whose four questions have one answer says as much as a single question.
        repeated = clustered_mean(4 * right, 4 * np.ones(number))
        assert wilson_interval(*repeated, number) == pytest.approx((low, high), abs=1e-9)
    assert wilson_interval(0.0, 0.0, 10)[0] == 0
    low, high = wilson_interval(1.0, 0.0, 60)
    assert low == pytest.approx(60 / (60 + 1.96**2)) and high == pytest.approx(1.0)
    assert wilson_interval(1.0, float("nan"), 1) is None


def test_an_error_of_single_questions_is_that_of_the_mean_and_one_picture_has_none():
    scores = np.random.default_rng(1).random(50)
    assert clustered_mean(scores, np.ones(50)) == pytest.approx((scores.mean(), scores.std(ddof=1) / 50**0.5))
    assert np.isnan(clustered_mean(np.ones(1), np.ones(1))[1])
    assert bootstrap_interval(np.ones((1, 2)), lambda of: of[..., 0]) is None


# End to end, in the published formats


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for image_id in (7, 42):
        draw(root / "val2014" / f"COCO_val2014_{image_id:012}.jpg")
    questions = [
        {"question_id": 10 * i + k, "image_id": i, "question": f"What {k}?"} for i in (7, 42) for k in range(3)
    ]
    write(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    ten = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
    write(
        root / "vqav2/v2_mscoco_val2014_annotations.json",
        {
            "annotations": [
                q | {"answers": ten, "answer_type": "other", "question_type": "what"} for q in reversed(questions)
            ]
        },
    )
    write(
        root / "gqa/testdev_balanced_questions.json",
        {
            f"20{i}": {
                "question": f"Is it {i}?",
                "imageId": f"n{i % 2}",
                "answer": "yes",
                "types": {"structural": "verify", "semantic": "attr", "detailed": "x"},
            }
            for i in range(4)
        },
    )
    for i in range(2):
        draw(root / f"gqa/images/n{i}.jpg")
        draw(root / f"textvqa/train_images/t{i}.jpg")
    asked = [(f"t{i}", f"What Word {k}?") for i in range(2) for k in range(2)]
    write(
        root / "textvqa/TextVQA_0.5.1_val.json",
        {
            "data": [
                {"question": q.title(), "image_id": i, "question_id": 34 + n, "answers": ["stop"] * 10}
                for n, (i, q) in enumerate(asked)
            ]
        },
    )
    lines = [
        {"question_id": i, "image": f"train_images/{i}.jpg", "text": f"{q}\nReference OCR token: A{SHORT}"}
        for i, q in asked
    ]
    write(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", "\n".join(map(json.dumps, reversed(lines))))
    for part in POPE_PARTS:
        lines = [
            {
                "question_id": k,
                "image": f"COCO_val2014_{(7, 42)[k // 3]:012}.jpg",
                "text": f"Is there a {k}?",
                "label": ("yes", "no")[k % 2],
            }
            for k in range(5 if part == "random" else 6)  # that part is shorter in the version of LLaVA
        ]
        write(root / f"pope/coco_pope_{part}.json", "\n".join(map(json.dumps, lines)) + "\n")
    for part in (*PERCEPTION, *COGNITION):
        nested = part in ("posters", "celebrity", "scene", "landmark", "artwork")
        texts, images = ("questions_answers_YN/", "images/") if nested else ("", "")
        for i in range(2):
            draw(root / f"mme/{part}/{images}{i}.png")
            write(
                root / f"mme/{part}/{texts}{i}.txt",
                "Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n",
            )
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def command(checkpoint, data, output, *more) -> list[str]:
    words = [
        "evaluate",
        *QUESTIONS,
        "--model",
        checkpoint,
        "--data",
        str(data),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    return [*words, "--max-new-tokens", "4", "--batch-size", "2", *more]


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    assert main(command(checkpoint, data, output)) == 0
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_benchmark_runs_from_its_published_files(finished):
    results = json.loads((finished / "results.json").read_text())
    n = {name: next(iter(of["measures"].values()))["n"] for name, of in results.items()}
    assert n == {"vqav2": 6, "gqa": 4, "textvqa": 4, "pope": 17, "mme": 40}
    assert results["vqav2"]["measures"]["vqa_v2/answer_type/other"]["n"] == 6
    assert results["pope"]["measures"]["f1/part/random"]["n"] == 5
    assert results["mme"]["measures"]["cognition"]["n"] == 16
    for of in results.values():
        assert all(m["value"] is None or 0 <= m["value"] <= 2000 for m in of["measures"].values())


def test_answers_are_those_that_the_model_gives_one_by_one(finished, checkpoint, data):
    from transformers_liquid_cli.models import load

    pipe = load(checkpoint, "cpu", "auto")
    for name in ("vqav2", "textvqa"):
        samples = read_samples(name, data)
        for sample, row in zip(samples, read_rows(finished / name / "answers.jsonl"), strict=True):
            messages = [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.open(sample.image)},
                        {"type": "text", "text": sample.question},
                    ],
                }
            ]
            inputs = pipe.processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            out = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=4)
            text = pipe.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert row == {"id": sample.id, "answer": text.strip()}


def test_textvqa_asks_with_ocr_tokens_although_ids_of_pictures_repeat(data):
    samples = read_samples("textvqa", data)
    assert [s.id for s in samples] == ["34", "35", "36", "37"]
    assert [s.question for s in samples] == [f"What Word {k}?\nReference OCR token: A{SHORT}" for k in (0, 1, 0, 1)]


def test_the_same_command_again_changes_nothing_and_another_is_refused(finished, checkpoint, data, capsys):
    before = files(finished)
    assert main(command(checkpoint, data, finished)) == 0
    assert files(finished) == before
    capsys.readouterr()
    assert main(command(checkpoint, data, finished, "--limit", "1")) == 2
    assert "limit was None and is now 1" in capsys.readouterr().err
    assert files(finished) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["begin", "answer", "score", "aggregate"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(stage, finished, checkpoint, data, tmp_path):
    """SIGKILL in the middle of each stage: the fifth time that it writes anything."""
    arguments = command(checkpoint, data, tmp_path)
    script = f"""
import json, os, signal
from transformers_liquid.evaluation import run
from transformers_liquid_cli import main
place, calls = {stage!r}, 0
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if place == "begin":
    run.answer = die
elif place == "answer":
    sync = os.fsync
    def fsync(fd):
        global calls
        calls += 1
        if calls == 12:
            os.write(fd if isinstance(fd, int) else fd.fileno(), b'{{"id": "to')
            die()
        sync(fd)
    os.fsync = fsync
elif place == "score":
    dumps = json.dumps
    def torn(value, *args, **kwargs):
        if "picture" in value:
            die()
        return dumps(value, *args, **kwargs)
    run.json.dumps = torn
else:
    run.aggregate = die
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "results.json").exists()
    assert main(arguments) == 0
    assert files(tmp_path) == files(finished)


def test_two_runs_are_compared_question_by_question(finished, data, tmp_path, capsys):
    other = tmp_path / "other"
    for name in QUESTIONS:
        write(other / name / "scores.jsonl", (finished / name / "scores.jsonl").read_text())
    rows = read_rows(finished / "vqav2" / "scores.jsonl")
    for row in rows:
        row["scores"]["vqa_v2"] += 0.25
    write(other / "vqav2" / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(other / "results.json", (finished / "results.json").read_text())
    assert main(["evaluate", "--compare", str(finished / "results.json"), str(other / "results.json")]) == 0
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in capsys.readouterr().out.splitlines()}
    assert lines["vqav2", "vqa_v2"] == ["25.00", "25.00", "..", "25.00", "6"]
    assert lines["vqav2", "eval_ai"] == ["0.00", "0.00", "..", "0.00", "6"]
    write(other / "vqav2" / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert main(["evaluate", "--compare", str(finished / "results.json"), str(other / "results.json")]) == 2
    assert "other questions" in capsys.readouterr().err


# Bad input


@pytest.fixture
def copy(data, tmp_path):
    import shutil

    return Path(shutil.copytree(data, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "file", "change", "says"),
    [
        ("vqav2", "vqav2/v2_mscoco_val2014_annotations.json", None, "visualqa.org"),
        ("vqav2", "vqav2/v2_mscoco_val2014_annotations.json", lambda t: t[:-9], "damaged"),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            lambda t: '{"annotations": []}',
            "no answers to question",
        ),
        ("vqav2", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", lambda t: "{}", "not in the published format"),
        ("vqav2", "val2014/COCO_val2014_000000000042.jpg", None, "1 pictures are missing"),
        ("gqa", "gqa/testdev_balanced_questions.json", lambda t: "{}", "no question"),
        ("textvqa", "textvqa/llava_textvqa_val_v051_ocr.jsonl", lambda t: t.split("\n")[0], "does not ask"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", lambda t: t.replace('["stop", ', "[", 1), "ten people, got 9"),
        ("pope", "pope/coco_pope_random.json", lambda t: t.replace("yes", "maybe", 1), "got 'maybe'"),
        ("pope", "pope/coco_pope_random.json", lambda t: t.split("\n")[0] + "\n" + t, "come twice"),
        ("pope", "pope/coco_pope_random.json", lambda t: t[:-9], "Line 5 of"),
        ("mme", "mme/count/0.txt", lambda t: t.split("\n")[0], "two lines"),
        ("mme", "mme/count/0.png", None, "no picture 0"),
    ],
)
def test_bad_data_is_told_before_the_model_is_loaded(name, file, change, says, copy, tmp_path, capsys):
    path = copy / file
    path.unlink() if change is None else path.write_text(change(path.read_text()))
    argv = ["evaluate", name, "--model", "not/there", "--data", str(copy), "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nlvr", "--data", ".", "--output", "out"], "there are vqav2"),
        (["pope"], "Give benchmarks"),
        (["pope", "--data", ".", "--output", "out", "--seed", "1"], "greedy"),
        (["pope", "--data", ".", "--output", "out", "--as-paper", "--limit", "3"], "float16"),
        (["pope", "--compare", "a", "b"], "leave out benchmarks"),
    ],
)
def test_bad_options_are_told(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *argv]) == 2
    assert says in capsys.readouterr().err


def test_answers_to_other_questions_and_foreign_folders_are_refused(checkpoint, data, finished, tmp_path):
    from transformers_liquid.evaluation.run import begin

    lines = (finished / "gqa" / "answers.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(reversed(lines)))
    from transformers_liquid_cli.models import load

    pipe = load(checkpoint, "cpu", "auto")
    with pytest.raises(ValueError, match="other questions"):
        answer(pipe, read_samples("gqa", data), path, 2, 4)
    path.write_text("[1]\n[2]\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* lacks 2 keys"):
        answer(pipe, read_samples("gqa", data), path, 2, 4)
    path.unlink()
    pipe.model.config.text_config.max_position_embeddings = 80
    with pytest.raises(ValueError, match="no room for an answer"):
        answer(pipe, read_samples("gqa", data), path, 2, 4)
    assert not path.exists()
    write(tmp_path / "else.txt", "")
    with pytest.raises(ValueError, match="something else"):
        begin(tmp_path, {})
