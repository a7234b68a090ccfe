"""Language tasks by lm-evaluation-harness: on copies of data sets, offline, on the model as on its plain export."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_checkpoint, tiny_model, tiny_processor

from transformers_liquid.evaluation.benchmarks import FILES, TASKS
from transformers_liquid_cli import main


lm_eval = pytest.importorskip("lm_eval")

WORDS = ["eats", "runs away", "sleeps till noon", "jumps over it", "sings", "reads a long book"]


def copy(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> None:
    """A data set as it lies on the Hub: a card that names the files of each configuration and split."""
    card = ["---", "configs:"]
    for name, splits in configs.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            file = folder / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def hellaswag(number: int) -> dict:
    source = np.random.default_rng(number)
    return {
        "ind": number,
        "activity_label": "Cooking",
        "ctx_a": f"A man has {number} pans.",
        "ctx_b": "he",
        "endings": source.choice(WORDS, 4, replace=False).tolist(),
        "source_id": "x",
        "label": str(number % 4),
    }


def arc(number: int) -> dict:
    choices = {"text": np.random.default_rng(number).choice(WORDS, 4, replace=False).tolist(), "label": list("ABCD")}
    return {
        "id": str(number),
        "question": f"What does {number} do?",
        "choices": choices,
        "answerKey": "ABCD"[number % 4],
    }


def subject(number: int, name: str) -> dict:
    return {"question": f"{name} {number}?", "subject": name, "choices": WORDS[:4], "answer": number % 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rows = [hellaswag(number) for number in range(14)]
    copy(root / FILES["hellaswag"][0], {"default": {"train": rows[:2], "validation": rows}})
    rows = [arc(number) for number in range(12)]
    splits = {"train": rows[:2], "validation": rows[:2], "test": rows}
    copy(root / FILES["arc_easy"][0], {"ARC-Easy": splits, "ARC-Challenge": splits | {"test": rows[:10]}})
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), 2048)


def command(checkpoint, data, output, *names) -> list[str]:
    where = ["--model", checkpoint, "--data", str(data), "--output", str(output), "--device", "cpu"]
    return ["evaluate", *names, *where, "--batch-size", "3"]


@pytest.fixture(scope="module")
def finished(checkpoint, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    assert main(command(checkpoint, data, output, "hellaswag", "arc_easy", "arc_challenge")) == 0
    return output


def test_accuracies_are_those_of_the_likeliest_ending_by_its_sum_and_by_its_length(finished):
    model, processor, right, right_by_length = tiny_model(), tiny_processor(), [], []
    for row in map(hellaswag, range(14)):
        context, sums = f"Cooking: {row['ctx_a']} He", []
        for ending in row["endings"]:
            ids, begin = processor.encode(f"{context} {ending}"), len(processor.encode(context))
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(logs[place - 1, ids[place]].item() for place in range(begin, len(ids))))
        right.append(int(np.argmax(sums)) == int(row["label"]))
        lengths = [len(ending) for ending in row["endings"]]
        right_by_length.append(int(np.argmax(np.array(sums) / lengths)) == int(row["label"]))
    measures = json.loads((finished / "results.json").read_text())["hellaswag"]["measures"]
    for name, of in {"acc": right, "acc_norm": right_by_length}.items():
        square = 1.96**2 / len(of)  # Wilson's: (share - p)^2 = square p (1 - p)
        ends = np.roots([1 + square, -2 * np.mean(of) - square, np.mean(of) ** 2])
        assert measures[name]["value"] == pytest.approx(100 * np.mean(of))
        assert measures[name]["interval"] == pytest.approx(sorted(100 * ends.real))
        assert measures[name]["n"] == 14
    assert 0 < np.mean(right) < 1


def test_the_plain_export_has_the_same_numbers(finished, checkpoint, tmp_path):
    assert main(["convert", checkpoint, "--output", str(tmp_path / "base"), "--to-base"]) == 0
    results = json.loads((finished / "results.json").read_text())
    for task in ("hellaswag", "arc_easy", "arc_challenge"):
        found = lm_eval.simple_evaluate(
            "hf",
            f"pretrained={tmp_path / 'base'},dtype=float32",
            tasks=[f"{task}-{task}"],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(finished / task / "tasks")),
            device="cpu",
        )
        of = found["results"][f"{task}-{task}"]
        for metric, measure in results[task]["measures"].items():
            assert measure["value"] == pytest.approx(100 * of[f"{metric},none"])
            assert measure["n"] == of["sample_len"] == {"hellaswag": 14, "arc_easy": 12, "arc_challenge": 10}[task]


def test_the_same_command_again_asks_the_model_nothing(finished, checkpoint, data, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    before = (finished / "results.json").read_bytes()
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", None)
    assert main(command(checkpoint, data, finished, "hellaswag", "arc_easy", "arc_challenge")) == 0
    assert (finished / "results.json").read_bytes() == before


def test_one_question_has_no_interval(checkpoint, data, tmp_path):
    assert main([*command(checkpoint, data, tmp_path, "hellaswag"), "--limit", "1"]) == 0
    measure = json.loads((tmp_path / "results.json").read_text())["hellaswag"]["measures"]["acc"]
    assert (measure["interval"], measure["n"]) == (None, 1)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_results(finished, checkpoint, data, tmp_path):
    arguments = command(checkpoint, data, tmp_path, "hellaswag", "arc_easy", "arc_challenge")
    script = f"""
import os, signal
from lm_eval.models.huggingface import HFLM
from transformers_liquid_cli import main
call, calls = HFLM._model_call, 0
def die(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, *args, **kwargs)
HFLM._model_call = die
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(arguments) == 0
    assert (tmp_path / "results.json").read_bytes() == (finished / "results.json").read_bytes()


@pytest.mark.slow
def test_mmlu_is_asked_after_five_examples_and_is_the_mean_over_all_questions(checkpoint, tmp_path):
    stock = Path(lm_eval.__file__).parent / "tasks"
    names = [file.stem.removeprefix("mmlu_") for file in sorted(stock.glob(TASKS["mmlu"]))]
    assert len(names) == 57
    rows = {name: [subject(number, name) for number in range(2 + index % 3)] for index, name in enumerate(names)}
    few = {name: [subject(number, name) for number in range(5)] for name in names}
    copy(tmp_path / FILES["mmlu"][0], {name: {"test": rows[name], "dev": few[name]} for name in names})
    assert main(command(checkpoint, tmp_path, tmp_path / "out", "mmlu")) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["mmlu"]["measures"]["acc"]
    assert results["n"] == sum(map(len, rows.values()))
    model, processor, right = tiny_model(), tiny_processor(), []
    for name in names:
        about = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        form = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer:"
        shots = "".join(f"{form.format(**one)} {'ABCD'[one['answer']]}\n\n" for one in few[name])
        for one in rows[name]:
            ids = processor.encode(f"{about}{shots}{form.format(**one)} A")
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1]
            right.append(int(logs[[processor.encode(letter)[0] for letter in "ABCD"]].argmax()) == one["answer"])
    assert results["value"] == pytest.approx(100 * np.mean(right))


def test_data_that_is_missing_is_told_with_its_folder_and_where_it_is_from(checkpoint, data, tmp_path, capsys):
    assert main(command("not/there", data, tmp_path, "language")) == 2
    error = capsys.readouterr().err
    assert "language/aps/super_glue" in error and "huggingface.co/datasets/aps/super_glue" in error


def test_other_data_in_the_folder_of_a_run_is_refused(finished, checkpoint, data, capsys):
    file = data / FILES["hellaswag"][0] / "default" / "validation.jsonl"
    before = file.read_text()
    file.write_text(before.replace("sings", "hums"))
    assert main(command(checkpoint, data, finished, "hellaswag")) == 2
    file.write_text(before)
    assert "holds another run: data was" in capsys.readouterr().err
