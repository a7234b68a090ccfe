"""`evaluate emoji`: tasks on true pictures, or on what the model has drawn itself; each by what is right."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_checkpoint
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel, ViTImageProcessorPil

from transformers_liquid.evaluation import benchmarks
from transformers_liquid.evaluation.benchmarks import BENCHMARKS, read_rows, read_samples
from transformers_liquid.evaluation.examiner import NAMED
from transformers_liquid.evaluation.judges import measure_losses
from transformers_liquid_cli import main
from transformers_liquid_cli.models import load


NAMES = ["red cat", "blue dog", "green fish", "old house"]
TASKS = [
    {"id": "n0", "measure": "names", "text": "red cat", "shows": ["red cat"], "parts": {"split": "seen"}},
    {"id": "n1", "measure": "names", "text": "blue dog", "shows": ["blue dog"], "parts": {"split": "unseen"}},
    {"id": "c0", "measure": "captions", "pictures": ["red cat"], "says": ["red cat"]},
    {"id": "q0", "measure": "questions", "text": "<image>which colour?", "pictures": ["blue dog"], "says": ["blue"]},
    {"id": "f0", "measure": "choices", "pictures": ["red cat"], "says": ["red cat"], "rather": "old house"},
    {"id": "f1", "measure": "choices", "pictures": ["red cat"], "says": ["old house"], "rather": "red cat"},
    {"id": "e0", "measure": "edits", "text": "<image> in green", "pictures": ["red cat"], "shows": NAMES},
    {"id": "r0", "measure": "round_trip", "pictures": ["green fish"]},
    {"id": "s0", "measure": "stories", "text": "once there was a red cat."},
    {"id": "p0", "measure": "persons", "text": "this <image> sees a fish.", "pictures": ["red cat"], "tells": NAMES},
]


def write(folder: Path, tasks=TASKS, pictures=None) -> Path:
    pictures = [{"text": name} for name in NAMES] if pictures is None else pictures
    (folder / "emoji").mkdir(parents=True, exist_ok=True)
    for name, lines in {"tasks": tasks, "metadata": pictures}.items():
        (folder / "emoji" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def with_files(folder: Path, size: int) -> list[dict]:
    (folder / "emoji").mkdir(parents=True)
    lines = []
    for index, name in enumerate(NAMES):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "emoji" / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "text": name, "words": [name.split()[-1]]})
    return lines


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(checkpoint: str, data: Path, output: Path, *more: str) -> int:
    where = ["--model", checkpoint, "--data", str(data), "--output", str(output), "--device", "cpu"]
    return main(["evaluate", "emoji", *where, "--max-new-tokens", "8", *more])


def classifier(folder: Path, labels: dict[str, int], pictures: torch.Tensor | None = None, seed: int = 0) -> str:
    """A tiny one of 8 x 8 pixels; the mean logit of some pictures is the same for all labels, so that they differ."""
    torch.manual_seed(seed)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    names = {index: name for name, index in reversed(labels.items())}
    model = ResNetForImageClassification(ResNetConfig(**shape, id2label=names, label2id=labels)).eval()
    with torch.no_grad():
        if pictures is not None:
            model.classifier[1].bias -= model(pixel_values=pictures).logits.mean(0)
    model.half().save_pretrained(folder)  # as many are on the Hub; read in full
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_drawings_are_what_the_nearest_true_picture_shows(checkpoint, tmp_path, capsys):
    pipe = load(checkpoint, "cpu", "auto")
    size = pipe.model.config.image_size
    data = write(tmp_path / "data", pictures=with_files(tmp_path / "data", size))
    assert run(checkpoint, data, tmp_path / "out") == 0
    rows = {row["id"]: row["scores"] for row in read_rows(tmp_path / "out" / "emoji" / "nearest" / "scores.jsonl")}
    # By hand: the codec's own pictures, squares over pixels.
    known = []
    for index in range(len(NAMES)):
        pixels = torch.from_numpy(np.asarray(Image.open(data / "emoji" / f"{index}.png")).copy()).permute(2, 0, 1)[None]
        codes = pipe.model.model.vq_model.encode_codes(pixels / 127.5 - 1)
        known.append(pipe.model.model.vq_model.decode_codes(codes)[0].clamp(-1, 1))
    drawn = sorted((tmp_path / "out" / "emoji" / "pictures").iterdir())
    for file, name, index in zip(drawn, ("n0", "n1"), range(2), strict=False):
        picture = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 127.5 - 1
        nearest = int(torch.stack([(one - picture).square().sum() for one in known]).argmin())
        assert rows[name] == {"names": float(nearest == index), "names_top5": 1.0}
    assert rows["e0"] == {"edits": 1.0, "edits_top5": 1.0}  # any of them is right
    sample = next(sample for sample in read_samples("emoji", data) if sample.id == "f0")
    assert rows["f0"]["choices"] + rows["f1"]["choices"] == 1
    losses = {}
    for text in ("red cat", "old house"):
        losses[text] = measure_losses(pipe, type(sample)("x", None, text), data / "emoji" / "0.png")["text_loss"]
    assert rows["f0"]["choices"] == float(losses["red cat"] < losses["old house"])
    # Stories, by their drawings from the same seed.
    drawn_of = {}
    for task, shown in (("s0", []), ("p0", [Image.open(data / "emoji" / "0.png")])):
        text = next(one["text"] for one in TASKS if one["id"] == task)
        inputs = pipe.processor(
            text=[text], generation_mode="interleaved", return_tensors="pt", **({"images": [shown]} if shown else {})
        )
        torch.manual_seed(zlib.crc32(task.encode()))
        how = {"max_images": 1 if shown else 3, "max_new_tokens": 60, "do_sample": True, "top_p": 0.8}
        seeded = [torch.Generator().manual_seed(zlib.crc32(task.encode()))]
        out = pipe.model.generate(**inputs, generation_mode="interleaved", generator=seeded, **how)
        drawn_of[task] = [part for part in out.parts[0] if part.ndim == 3]
    assert len(rows["s0"]["stories"]) == max(1, len(drawn_of["s0"])) and rows["s0"]["stories_end"] == 0
    assert rows["p0"] == dict.fromkeys(("persons", "persons_top5"), float(len(drawn_of["p0"]) > 0))
    assert "emoji/nearest" in capsys.readouterr().out
    # All true pictures are encoded once.
    before = (tmp_path / "out" / "emoji" / "known.safetensors").stat().st_mtime_ns
    scores = tmp_path / "out" / "emoji" / "nearest" / "scores.jsonl"
    complete = scores.read_bytes()
    scores.write_bytes(complete[: len(complete) // 2])
    assert run(checkpoint, data, tmp_path / "out") == 0 and scores.read_bytes() == complete
    assert (tmp_path / "out" / "emoji" / "known.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ("once upon a time there was a red cat.", "red cat"),
        ("it loved the Tokyo tower.", "Tokyo tower"),
        ("once there was an owl who slept.", "owl"),
        ("who lived with a dog.", "dog"),
        ("one day the man was a cook.", "cook"),
        ("and then night fell.", None),
    ],
)
def test_a_picture_of_a_story_shows_what_was_named_last_before_it(told, named):
    found = NAMED.search(told.rstrip("."))
    assert (found and found[1]) == named


def test_a_classifier_names_drawings_and_the_true_pictures_beside_them(checkpoint, tmp_path, monkeypatch, capsys):
    pipe = load(checkpoint, "cpu", "auto")
    assert pipe.model.config.image_size == 8
    tasks = [
        {"id": f"n{index}", "measure": "names", "text": f"no {index}", "shows": [NAMES[index % 4]]}
        for index in range(8)
    ]
    data = write(tmp_path / "data", [*tasks, *TASKS[-2:]], with_files(tmp_path / "data", 8))

    def read(file: Path) -> torch.Tensor:
        return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 127.5 - 1

    true = torch.stack([read(data / "emoji" / f"{index}.png") for index in range(4)])
    true = pipe.model.model.vq_model.decode_codes(pipe.model.model.vq_model.encode_codes(true)).clamp(-1, 1)
    true = ((true + 1) * 127.5).round() / 127.5 - 1
    # Two names of one picture, so to say: what shows the one shows the other.
    labels = {"red cat": 0, "blue dog": 1, "green fish": 2, "old house": 0}
    name = classifier(tmp_path / "judge", labels, true)
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, data, tmp_path / "out", "--judge", "judge") == 0
    assert "emoji/judge" in (printed := capsys.readouterr().out) and "names_ceiling" in printed
    rows = {row["id"]: row["scores"] for row in read_rows(tmp_path / "out" / "emoji" / "judge" / "scores.jsonl")}
    model, named = ResNetForImageClassification.from_pretrained(name).eval().float(), []

    def most_probable(pixels: torch.Tensor) -> int:
        logits = model(pixel_values=pixels.float()[None]).logits[0].tolist()
        return logits.index(max(logits))

    drawn = sorted((tmp_path / "out" / "emoji" / "pictures").iterdir())
    for index, file in enumerate(drawn):
        label = labels[NAMES[index % 4]]
        named += [most_probable(read(file)), most_probable(true[index % 4])]
        right = {"names": named[-2] == label, "names_ceiling": named[-1] == label}
        assert rows[f"n{index}"] == right | {"names_top5": 1.0, "names_top5_ceiling": 1.0}  # of three labels
    assert len(drawn) == 8 and len({*named}) > 1
    assert "persons_ceiling" in rows["p0"] and "stories_ceiling" not in rows["s0"]
    # The same drawings, by pixels; and other weights in the folder of that judge.
    before = contents(tmp_path / "out" / "emoji" / "pictures")
    assert run(checkpoint, data, tmp_path / "out") == 0 and contents(tmp_path / "out" / "emoji" / "pictures") == before
    assert {"emoji/judge", "emoji/nearest"} == json.loads((tmp_path / "out" / "results.json").read_text()).keys()
    classifier(tmp_path / "judge", labels, seed=1)
    assert run(checkpoint, data, tmp_path / "out", "--judge", "judge") == 2
    assert "holds another run: data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("not/there", "not/there is no image classifier of transformers"),
        ("liquid", "is no image classifier of transformers"),
        ("headless", "is no image classifier of transformers, which emoji need: .* missing keys: classifier"),
        ("lacking", "has no label for 2 names of tasks, such as 'green fish'"),
    ],
)
def test_a_judge_that_cannot_name_drawings_is_refused_before_the_first(judge, says, checkpoint, tmp_path, capsys):
    classifier(tmp_path / "lacking", {"red cat": 0, "blue dog": 1})
    ResNetModel.from_pretrained(classifier(tmp_path / "headless", {"red cat": 0})).save_pretrained(
        tmp_path / "headless"
    )
    data = write(tmp_path / "data", pictures=with_files(tmp_path / "data", 8))
    name = {"not/there": judge, "liquid": checkpoint}.get(judge, str(tmp_path / judge))
    assert run(checkpoint, data, tmp_path / "out", "--judge", name) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not [*(tmp_path / "out").rglob("*.png")]


def test_a_judge_of_emoji_needs_true_pictures(checkpoint, tmp_path, capsys):
    name = classifier(tmp_path / "judge", {name: index for index, name in enumerate(NAMES)})
    assert run(checkpoint, write(tmp_path / "data"), tmp_path / "out", "--judge", name) == 2
    assert "beside true pictures" in capsys.readouterr().err and not [*(tmp_path / "out").rglob("*.png")]


def test_a_judge_that_another_benchmark_needs_does_not_name_emoji(checkpoint, tmp_path):
    data = write(tmp_path / "data", TASKS[:1], with_files(tmp_path / "data", 8))
    (data / "genai-bench").mkdir()
    (data / "genai-bench" / "prompts.txt").write_text("red cat\n")
    (data / "genai-bench" / "genai_skills.json").write_text('{"basic": [1]}')
    (tmp_path / "scores.jsonl").write_text('{"id": "00001", "score": 0.5}\n')
    assert run(checkpoint, data, tmp_path / "out", "genai-bench", "--judge", f"scores:{tmp_path}/scores.jsonl") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "emoji/nearest" in results and len(results) == 2


def test_without_true_pictures_the_model_is_judged_by_itself_and_that_is_said(checkpoint, tmp_path, capsys):
    data = write(tmp_path / "data")
    assert run(checkpoint, data, tmp_path / "out") == 0
    assert "emoji/self" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["emoji/self"]
    assert results["measures"]["choices"]["n"] == 2 and "names_top5" not in results["measures"]
    assert {"names/split/seen", "round_trip", "stories"} <= results["measures"].keys()
    # Pictures that tasks show were drawn from their names.
    assert len([*(tmp_path / "out" / "emoji" / "shown").iterdir()]) == 3
    before = contents(tmp_path / "out")
    assert run(checkpoint, data, tmp_path / "out") == 0 and contents(tmp_path / "out") == before
    # As after a kill: drawings are there in part, and scores with a torn line.
    scores = tmp_path / "out" / "emoji" / "self" / "scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:4]) + '{"id": "f')
    (tmp_path / "out" / "emoji" / "pictures" / "000002.png").unlink()
    (tmp_path / "out" / "results.json").unlink()
    assert run(checkpoint, data, tmp_path / "out") == 0 and contents(tmp_path / "out") == before
    assert run(checkpoint, data, tmp_path / "out", "--seed", "3") == 2
    assert "another run" in capsys.readouterr().err


def test_the_tasks_of_the_package_are_there_and_need_no_data(tmp_path, capsys):
    samples = read_samples("emoji", Path(benchmarks.__file__).parent)
    measures = {sample.true["measure"] for sample in samples}
    assert measures == {"captions", "questions", "choices", "edits", "in_context", "stories", "round_trip"}
    assert not any(sample.image for sample in samples) and BENCHMARKS["emoji"].kind == "emoji"
    assert main(["evaluate", "emoji", "pope", "--output", str(tmp_path / "out")]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tasks, pictures, says",
    [
        ([TASKS[0] | {"says": ["x"]}], None, "Line 1 of .* must have shows, tells, or says"),
        ([TASKS[2] | {"sayz": ["x"]}], None, "Line 1 of .* must have shows, tells, or says"),
        ([TASKS[0] | {"shows": ["moon"]}], None, "'moon'"),
        ([TASKS[3] | {"text": "which colour?"}], None, "an <image> for each picture"),
        ([{"id": "x", "measure": "m"}], None, "an <image> for each picture"),
        ([{"id": "x", "text": "a cat"}], None, "Line 1 of .*measure"),
        ([TASKS[-1] | {"shows": NAMES}], None, "Line 1 of .* must have shows, tells, or says"),
        ([TASKS[-1] | {"tells": ["moon"]}], None, "'moon'"),
        ([TASKS[-1] | {"text": ""}], None, "an <image> for each picture"),
        ([TASKS[0], TASKS[0]], None, "come twice, such as n0"),
        (TASKS, [{"text": "a"}, {"text": "a"}], "each text once"),
        (TASKS, [{"text": "a"}, {"text": "b", "file_name": "b.png"}], "in all lines or in none"),
        (TASKS, [{"text": "b", "file_name": "b.png"}], "1 pictures .* missing, such as .*b.png"),
    ],
)
def test_bad_tasks_are_told_before_the_model_is_loaded(tasks, pictures, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_samples("emoji", write(tmp_path, tasks, pictures))
