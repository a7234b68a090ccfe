"""Benchmarks of what is drawn: features are the extractor's, scores the judge's, losses the trainer's; runs go on."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from tiny_vokens import VOCAB_SIZE, tiny_base_processor, tiny_voken_base
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from transformers_liquid import LiquidDataCollator, LiquidTrainer
from transformers_liquid.evaluation import judges
from transformers_liquid.evaluation.benchmarks import BENCHMARKS, Sample, read_rows, read_samples
from transformers_liquid.evaluation.pictures import load_extractor
from transformers_liquid.evaluation.run import evaluate, table
from transformers_liquid.training.arguments import LiquidTrainingArguments
from transformers_liquid_cli import main
from transformers_liquid_cli.models import load


CPU = torch.device("cpu")
SKILLS = {"basic": [1, 2], "advanced": [3, 4], "attribute": [1], "scene": [1, 2], "counting": [3, 4], "negation": [4]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def picture(seed: int, height: int = 12, width: int = 10) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(41):
        (root / "pairs").mkdir(exist_ok=True)
        picture(index, 8 + index % 3).save(root / "pairs" / f"p{index}.png")
        lines.append({"file_name": f"p{index}.png", "text": f"a thing {index}"})
    write(root / "pairs" / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    meta = {
        f"n{index}": {"category": ("animals", "food")[index % 2], "prompt": f"prompt {index}"} for index in range(40)
    }
    write(root / "mjhq" / "meta_data.json", meta)
    for index, (name, one) in enumerate(meta.items()):
        folder = root / "mjhq" / "mjhq30k_imgs" / one["category"]
        folder.mkdir(parents=True, exist_ok=True)
        picture(100 + index, 20, 20).save(folder / f"{name}.jpg")
    write(root / "genai-bench" / "prompts.txt", "".join(f"a cat and {number} dogs\n" for number in range(1, 6)))
    write(root / "genai-bench" / "genai_skills.json", SKILLS)
    ids = {"cultural_common_sense": [1, 400], "spatio-temporal_reasoning": [401, 568], "natural_science": [801, 1000]}
    for name, of in ids.items():
        entry = {"Category": "x", "Subcategory": name[:4]}
        write(
            root / "wise" / f"{name}.json",
            [entry | {"prompt_id": one, "Prompt": f"wise {one}", "Explanation": f"{one} means"} for one in of],
        )
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VISION)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    tiny_voken_base("llava", vocab_size=VOCAB_SIZE).save_pretrained(path)
    processor = tiny_base_processor("llava")
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'] + ':' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    processor.save_pretrained(path)
    return str(path)


def command(checkpoint, data, output, *more) -> list[str]:
    where = ["--model", checkpoint, "--data", str(data), "--output", str(output), "--device", "cpu"]
    return ["evaluate", *more, *where, "--batch-size", "4"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Features


class Inception(torch.nn.Module):
    """Of the published file's form: `layers` takes (B, 3, 299, 299) in [-1, 1] and gives (B, 2048)."""

    def __init__(self, width: int = 2048):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.AvgPool2d(13), torch.nn.Flatten(), torch.nn.Linear(3 * 23 * 23, width)
        )


def save_inception(path: Path, width: int = 2048) -> torch.nn.Module:
    torch.jit.script(Inception(width).eval()).save(str(path))
    return Inception(width)


def bicubic(channel: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resizing with a = -0.5 whose support grows where it shrinks, as Pillow's, written out."""

    def weights(length: int) -> np.ndarray:
        scale = length / size
        stretch, out = max(scale, 1.0), np.zeros((size, length))
        for index in range(size):
            center = (index + 0.5) * scale
            low, high = max(int(center - 2 * stretch + 0.5), 0), min(int(center + 2 * stretch + 0.5), length)
            for place in range(low, high):
                x = abs((place - center + 0.5) / stretch)
                out[index, place] = (
                    1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0
                )
        return out / out.sum(1, keepdims=True)

    return weights(channel.shape[0]) @ channel @ weights(channel.shape[1]).T


def test_inception_sees_pictures_resized_in_floating_point_and_not_rounded(tmp_path):
    network = save_inception(tmp_path / "inception.pt")
    images = [picture(0, 40, 64), picture(1, 320, 310)]
    pixels = np.stack([[bicubic(np.asarray(one, float)[..., c], 299) for c in range(3)] for one in images]).clip(0, 255)
    assert np.abs(pixels - pixels.round()).max() > 0.4
    expected = network.layers(torch.tensor((pixels - 128) / 128, dtype=torch.float32))
    got = load_extractor(str(tmp_path / "inception.pt"), CPU)(images)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_inception_by_name_is_the_file_in_the_cache_or_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        "transformers_liquid.evaluation.pictures.INCEPTION_URL", "file:///nowhere/inception-2015-12-05.pt"
    )
    with pytest.raises(ConnectionError, match=r"put that file at .*checkpoints/inception-2015-12-05.pt"):
        load_extractor("inception", CPU)
    save_inception(tmp_path / "checkpoints" / "inception-2015-12-05.pt")
    assert load_extractor("inception", CPU)([picture(0)]).shape == (1, 2048)


def test_extractors_of_another_size_or_kind_are_refused(tmp_path):
    save_inception(tmp_path / "small.pt", width=512)
    with pytest.raises(ValueError, match="gives 512 features, Inception 2048"):
        load_extractor(str(tmp_path / "small.pt"), CPU)([picture(0)])
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no Inception"):
        load_extractor(str(tmp_path / "weights.pt"), CPU)


def test_features_of_models_of_transformers_are_projected_or_pooled(tmp_path, vit):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    images = [picture(0), picture(1, 30)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(load_extractor(str(tmp_path), CPU)(images), expected)
        model = ViTModel.from_pretrained(vit).eval()
        pixels = ViTImageProcessorPil.from_pretrained(vit)(images=images, return_tensors="pt")["pixel_values"]
        states = model(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(load_extractor(vit, CPU)(images), torch.tanh(model.pooler.dense(states)))


def test_features_of_the_codec_are_means_and_spreads_of_its_encoder_and_need_no_network(checkpoint, data, tmp_path):
    assert main(command(checkpoint, data, tmp_path, "folder", "--features", "codec", "--batch-size", "8")) == 0
    pipe, samples = load(checkpoint, "cpu", "auto"), read_samples("folder", data)
    features = load_file(tmp_path / "folder" / "codec" / "features.safetensors")
    drawn = [tmp_path / "folder" / "pictures" / f"{index:06}.png" for index in (1, 2)]
    for side, files in {"drawn": drawn, "true": [sample.image for sample in samples[:2]]}.items():
        images = [Image.open(file).convert("RGB") for file in files]
        pixels = pipe.processor(images=images, return_tensors="pt", framing="crop")["pixel_values"]
        with torch.no_grad():
            states = pipe.model.model.vq_model.encoder(pixels).numpy()
        expected = np.concatenate([states.mean((2, 3)), states.std((2, 3), ddof=1)], axis=1)
        np.testing.assert_allclose(features[side][:2].numpy(), expected, atol=1e-5)
    assert np.isfinite(json.loads((tmp_path / "results.json").read_text())["folder/codec"]["measures"]["fid"]["value"])


# Distances, end to end


@pytest.fixture(scope="module")
def compared(checkpoint, data, vit, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    assert main(command(checkpoint, data, output, "mjhq", "folder", "--features", vit, "--seed", "3")) == 0
    return output


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """By the roots of symmetric matrices: tr (A^(1/2) B A^(1/2))^(1/2)."""
    first, second = np.cov(one.T), np.cov(other.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross


def test_mjhq_and_a_folder_are_distances_of_what_is_drawn_to_the_true_pictures(compared, checkpoint, data, vit):
    pipe, extract = load(checkpoint, "cpu", "auto"), load_extractor(vit, CPU)
    results = json.loads((compared / "results.json").read_text())
    for name, number in {"mjhq": 40, "folder": 41}.items():
        (key,) = [key for key in results if key.startswith(f"{name}/")]
        samples = read_samples(name, data)
        drawn = [Image.open(compared / name / "pictures" / f"{index + 1:06}.png") for index in range(number)]
        for index in (0, 5, number - 1):
            alone = pipe(samples[index].question, seed=3 + index, progress_bar=False)[0]
            assert np.array_equal(np.asarray(drawn[index]), np.asarray(alone))
        with torch.no_grad():
            of_drawn, of_true = (
                torch.cat([extract([one.convert("RGB")]) for one in images]).double().numpy()
                for images in (drawn, [Image.open(sample.image) for sample in samples])
            )
        measures = results[key]["measures"]
        assert measures["fid"]["value"] == pytest.approx(frechet(of_drawn, of_true), rel=1e-3)
        groups = np.arange(number) % 20
        left = np.array([frechet(of_drawn[groups != group], of_true) for group in range(20)])
        error = math.sqrt(19 * left.var())
        low, high = measures["fid"]["interval"]
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=1e-2)
        assert results[key]["run"]["features"] == vit and measures["kid_x1000"]["n"] == number
    food = [index for index, sample in enumerate(read_samples("mjhq", data)) if sample.groups["category"] == "food"]
    mjhq = next(of for key, of in results.items() if key.startswith("mjhq/"))
    features = load_file(next(compared.glob("mjhq/*/features.safetensors")))
    part = frechet(*(features[side][food].double().numpy() for side in ("drawn", "true")))
    assert mjhq["measures"]["fid/category/food"]["value"] == pytest.approx(part, rel=1e-3)


def test_pictures_are_drawn_once_for_all_who_measure_them_and_other_ones_are_refused(
    compared, checkpoint, data, tmp_path, vit, capsys
):
    before, other = files(compared), tmp_path / "other"
    ViTModel(ViTConfig(**VISION)).save_pretrained(other)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(other)
    assert main(command(checkpoint, data, compared, "mjhq", "--features", str(other), "--seed", "3")) == 0
    after = files(compared)
    assert {name for name in after if after[name] != before.get(name)} >= {"results.json"}
    assert all(after[name] == content for name, content in before.items() if name != "results.json")
    assert len([key for key in json.loads(after["results.json"]) if key.startswith("mjhq/")]) == 2
    assert "mjhq/" in capsys.readouterr().out
    assert main(command(checkpoint, data, compared, "mjhq", "--features", vit, "--seed", "4")) == 2
    assert "holds another run: drawing was" in capsys.readouterr().err
    assert files(compared) == after


def test_the_papers_settings_draw_whatever_the_checkpoint_says_and_its_number_stands_beside(
    checkpoint, data, vit, tmp_path, capsys
):
    assert main(command(checkpoint, data, tmp_path, "mjhq", "--features", vit, "--as-paper")) == 0
    assert "5.47" not in capsys.readouterr().out  # which is by other features
    fid = {"fid": {"value": 6.0, "interval": None, "n": 30000}}
    assert table({"mjhq/inception": fid}, paper=True).splitlines()[1].split() == [
        "mjhq/inception",
        "fid",
        "6.00",
        "none",
        "30000",
        "5.47",
    ]
    run = json.loads((tmp_path / "mjhq" / "run.json").read_text())
    paper = {"guidance_scale": 7.0, "temperature": 0.99, "top_k": 4096, "top_p": 0.96, "do_sample": True}
    assert paper.items() <= run["drawing"].items() and (run["dtype"], run["limit"]) == ("float16", None)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["draw", "extract", "judge"])
def test_drawing_that_was_killed_goes_on_to_the_same_bytes(stage, checkpoint, data, vit, tmp_path):
    """SIGKILL while the seventh picture is written, while features are made, or after the first of two batches of scores, in
    bfloat16, where batches matter."""
    more = ["genai-bench", "--judge", "self"] if stage == "judge" else ["folder", "--features", vit]
    more += ["--dtype", "bfloat16"]
    assert main(command(checkpoint, data, tmp_path / "whole", *more)) == 0
    arguments = command(checkpoint, data, tmp_path / "killed", *more)
    script = f"""
import os, signal
from PIL import Image
from transformers_liquid.evaluation import run
from transformers_liquid.evaluation.run import evaluate, table
from transformers_liquid_cli import main
save, calls = Image.Image.save, 0
def torn(self, path, *args, **kwargs):
    global calls
    calls += 1
    save(self, path, *args, **kwargs)
    if calls == 7:
        os.truncate(path, 20)
        os.kill(os.getpid(), signal.SIGKILL)
if {stage!r} == "draw":
    Image.Image.save = torn
elif {stage!r} == "judge":
    sync = os.fsync
    def fsync(fd):
        sync(fd)
        if os.readlink(f"/proc/self/fd/{{fd if isinstance(fd, int) else fd.fileno()}}").endswith("/scores.jsonl"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = fsync
else:
    run.save_file = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
main({arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed").rglob("*.png"))) >= (5 if stage == "judge" else 6)
    assert stage != "judge" or len(read_rows(next((tmp_path / "killed").rglob("scores.jsonl")))) == 4
    assert main(arguments) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_one_picture_makes_no_distance_and_that_is_told_before_the_model_is_loaded(data, tmp_path, capsys):
    argv = command("not/there", data, tmp_path, "mjhq", "--features", "inception", "--limit", "1")
    assert main(argv) == 2
    assert "mjhq has 1 pictures here" in capsys.readouterr().err


# Judges


def by_hand(model, processor, image: Image.Image, text: str) -> float:
    """exp of the mean log probability of the tokens of "Yes", one forward for each of them."""
    question = {"type": "text", "text": f'Does this figure show "{text}"? Please answer yes or no.'}
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    space = "" if type(processor).__name__ == "LiquidProcessor" else " "
    tokens, logs = processor.tokenizer.encode(f"{space}Yes", add_special_tokens=False), []
    for token in tokens:
        with torch.no_grad():
            logs.append(model(**inputs).logits[0, -1].double().log_softmax(-1)[token].item())
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert len(tokens) >= 3
    return math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("judge", ["llava", "self"])
def test_vqascore_is_the_probability_of_yes_and_genai_bench_is_its_mean_by_skill(
    judge, llava, checkpoint, data, tmp_path, capsys
):
    name = llava if judge == "llava" else "self"
    assert main(command(checkpoint, data, tmp_path, "genai-bench", "--judge", name)) == 0
    assert "overall" in capsys.readouterr().out
    if judge == "llava":
        model, processor = (
            AutoModelForImageTextToText.from_pretrained(llava).eval(),
            AutoProcessor.from_pretrained(llava),
        )
    else:
        pipe = load(checkpoint, "cpu", "auto")
        model, processor = pipe.model, pipe.processor
    (file,) = tmp_path.glob("genai-bench/*/scores.jsonl")
    scores = []
    for number, row in enumerate(read_rows(file), start=1):
        assert row["picture"] == f"{number:06}.png"
        image = Image.open(tmp_path / "genai-bench" / "pictures" / row["picture"])
        scores.append(by_hand(model, processor, image, f"a cat and {number} dogs"))
        assert row["scores"]["score"] == pytest.approx(scores[-1], rel=1e-4)
    assert len({round(score, 9) for score in scores}) > 1
    (results,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert results["measures"]["overall"]["value"] == pytest.approx(100 * np.mean(scores), rel=1e-4)
    assert results["measures"]["overall"]["n"] == 5
    for skill, lines in SKILLS.items():
        of = results["measures"][skill]
        assert (of["value"], of["n"]) == (
            pytest.approx(100 * np.mean([scores[n - 1] for n in lines]), rel=1e-4),
            len(lines),
        )


def test_scores_of_a_judge_elsewhere_are_joined_by_id(checkpoint, data, tmp_path, capsys):
    file = tmp_path / "scores.jsonl"
    rows = [{"id": f"{number:05}", "score": number / 10} for number in range(5, 0, -1)]
    write(file, "".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(checkpoint, data, tmp_path / "out", "genai-bench", "--judge", f"scores:{file}")) == 0
    (results,) = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    assert [results["measures"][name]["value"] for name in ("basic", "advanced", "overall")] == pytest.approx(
        [15, 35, 30]
    )
    write(file, "".join(json.dumps(row | {"score": 0}) + "\n" for row in rows))
    assert main(command(checkpoint, data, tmp_path / "out", "genai-bench", "--judge", f"scores:{file}")) == 2
    assert "holds another run: data was" in capsys.readouterr().err
    for bad, says in {
        json.dumps(rows[0]) + "\n": "a line for each of 5",
        json.dumps(rows[0] | {"score": math.nan}) + "\n": "beyond 0 ... 1",
        json.dumps(rows[0] | {"score": 999}) + "\n": "beyond 0 ... 1",
        json.dumps(rows[0] | {"score": "high"}) + "\n": "beyond 0 ... 1",
        json.dumps(rows[0] | {"id": 5}) + "\n": "a line for each of 5",
        "".join(json.dumps(row) + "\n" for row in (*rows, rows[0])): "second time",
        '{"id": "00001"}\n': "lacks 1 keys",
        '{"id": "000': "Line 1 of",
    }.items():
        write(file, bad)
        assert main(command(checkpoint, data, tmp_path / "other", "genai-bench", "--judge", f"scores:{file}")) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("other/**/*.png"))


@contextmanager
def server(replies):
    """An OpenAI-compatible one: `replies(text, number)` gives a status and a reply to what was said last."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            text = body["messages"][0]["content"][0]["text"]
            status, reply = replies(text, len([1 for *_, one in asked if one["messages"][0] == body["messages"][0]]))
            content = json.dumps({"choices": [{"message": {"content": reply}}]}) if status == 200 else reply
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


GRADES = {1: (2, 1, 0), 400: (1, 1, 1), 401: (0, 2, 2), 568: (2, 2, 2), 801: (1, 0, 1), 1000: (0, 0, 0)}


def three(grades) -> str:
    return "Consistency: {}\n**Realism**: {}\nAesthetic Quality: {}".format(*grades)


def prompt_id(text: str) -> int:
    return int(text.split("wise ")[1].split()[0])


def test_wise_is_graded_by_a_server_that_is_now_and_then_busy_or_rude(checkpoint, data, tmp_path, monkeypatch, capsys):
    def replies(text, number):
        one = prompt_id(text)
        if one == 400 and number < 3:
            return (429, "slow down") if number == 1 else (503, "no")
        if one == 401 and number == 1:
            return 200, "What a picture! Consistency: 5"
        if one == 1000:
            return 200, "I will not."
        return 200, three(GRADES[one])

    with server(replies) as (url, asked):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        arguments = command(checkpoint, data, tmp_path, "wise", "--judge", "openai:gpt-4o")
        assert main(arguments) == 0
        first = len(asked)
        assert (
            first == 3 + 3 + 2 + judges.ASKED
        )  # three graded at once, one after two tries, one asked twice, one in vain
        before = files(tmp_path)
        assert main(arguments) == 0
        assert len(asked) == first and files(tmp_path) == before
    assert "1 pictures have no score, such as 1000" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["wise/openai-gpt-4o"]
    assert results["without_score"] == ["1000"]
    scores = {one: (0.7 * c + 0.2 * r + 0.1 * a) / 2 for one, (c, r, a) in GRADES.items() if one != 1000}
    assert results["measures"]["wiscore"]["value"] == pytest.approx(100 * np.mean([*scores.values()]))
    assert results["measures"]["wiscore"]["n"] == 5
    parts = {"cultural": [1, 400], "time": [401], "space": [568], "physics": [801]}
    for part, of in parts.items():
        value = results["measures"][f"wiscore/category/{part}"]["value"]
        assert value == pytest.approx(100 * np.mean([scores[one] for one in of]))
    assert all(b"sk-secret" not in content for content in before.values())
    path, headers, body = asked[0]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", "Bearer sk-secret", "gpt-4o")
    assert "means" in body["messages"][0]["content"][0]["text"]
    assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_server_that_fails_ends_the_run_which_goes_on_later(checkpoint, data, tmp_path, monkeypatch, capsys):
    broken = [True]

    def replies(text, number):
        if broken[0] and prompt_id(text) == 801:
            return 401, "who are you?"
        return 200, three(GRADES[prompt_id(text)])

    with server(replies) as (url, asked):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        arguments = command(checkpoint, data, tmp_path, "wise", "--judge", "openai:m")
        assert main(arguments) == 2
        assert "401 who are you?" in capsys.readouterr().err
        assert "Authorization" not in asked[0][1] and not (tmp_path / "results.json").exists()
        broken[0], already = False, len(asked)
        assert already == 6
        assert main(arguments) == 0
        assert len(asked) == already + 2  # the second batch of four: the first was kept
    assert "without_score" not in json.loads((tmp_path / "results.json").read_text())["wise/openai-m"]


def test_a_server_that_stays_busy_is_asked_a_limited_number_of_times(monkeypatch, tmp_path):
    picture(0).save(tmp_path / "p.png")
    with server(lambda text, number: (429, "slow down")) as (url, asked):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(ConnectionError, match="429 slow down"):
            judges.grade("m", Sample("1", None, "wise 1", "x"), tmp_path / "p.png")
        assert len(asked) == judges.TRIES


@pytest.mark.parametrize(
    ("said", "grades"),
    [
        ("consistency: 2 realism: 1 aesthetic quality: 0", (2, 1, 0)),
        ("**Consistency:** 1\n**Realism:** 1\n**Aesthetic Quality:** 2", (1, 1, 2)),
        ("Consistency: 3\nRealism: 1\nAesthetic Quality: 1", None),
        ("Consistency: 20\nRealism: 1\nAesthetic Quality: 1", None),
        ("Consistency: 1.5\nRealism: 1\nAesthetic Quality: 1", None),
        ("Consistency: 1\nRealism: 1", None),
        ("Consistency: 1\nConsistency: 2\nRealism: 1\nAesthetic Quality: 1", None),
        ("", None),
    ],
)
def test_only_three_grades_of_0_to_2_count(said, grades, monkeypatch, tmp_path):
    picture(0).save(tmp_path / "p.png")
    with server(lambda text, number: (200, said)) as (url, _):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        got = judges.grade("m", Sample("1", None, "wise 1", "x"), tmp_path / "p.png")
    names = ("consistency", "realism", "aesthetic_quality")
    assert got == ({} if grades is None else dict(zip(names, grades, strict=True)))


# Losses


def test_losses_are_those_of_the_trainer(checkpoint, data, tmp_path):
    assert main(command(checkpoint, data, tmp_path, "loss", "--limit", "7")) == 0
    pipe = load(checkpoint, "cpu", "auto")
    codes = []
    for sample in read_samples("loss", data, 7):
        pixels = pipe.processor.image_processor(Image.open(sample.image), framing="crop")["pixel_values"]
        codes.append(pipe.model.model.vq_model.encode_codes(pixels)[0].tolist())
    measures = json.loads((tmp_path / "results.json").read_text())["loss"]["measures"]
    for kind, name in {"text_to_image": "image", "caption": "text"}.items():
        records = [
            {"kind": kind, "text": sample.question, "codes": of, "index": 0}
            for sample, of in zip(read_samples("loss", data, 7), codes, strict=True)
        ]
        trainer = LiquidTrainer(
            model=pipe.model,
            args=LiquidTrainingArguments(
                str(tmp_path / "t"), report_to="none", use_cpu=True, remove_unused_columns=False
            ),
            eval_dataset=records,
            data_collator=LiquidDataCollator(pipe.processor),
            processing_class=pipe.processor,
        )
        expected = trainer.evaluate()
        assert measures[f"{name}_loss"]["value"] == pytest.approx(expected[f"eval_{name}_loss"], rel=1e-5)
        assert measures[f"{name}_accuracy"]["value"] == pytest.approx(100 * expected[f"eval_{name}_accuracy"], rel=1e-5)
        assert measures[f"{name}_loss"]["n"] == 7
    low, high = measures["text_loss"]["interval"]
    assert low < measures["text_loss"]["value"] < high


def test_losses_ask_in_the_words_that_pictures_are_asked_for_in(checkpoint):
    pipe = load(checkpoint, "cpu", "auto")
    record = {"kind": "text_to_image", "text": "a thing", "codes": [[0] * 4] * 4, "index": 0}
    ids, _ = LiquidDataCollator(pipe.processor, unconditional_probability=0.0).encode(record)
    prompt = pipe.processor.image_prompt_ids("a thing")
    assert ids[: len(prompt)] == prompt


# Comparing, and bad input


def test_runs_of_one_judge_are_compared_where_both_have_scores(tmp_path, capsys):
    rows = [
        {
            "id": str(one),
            "picture": f"{one}.png",
            "groups": {"category": "time"},
            "scores": {"consistency": 1.0, "realism": 1.0, "aesthetic_quality": grade},
        }
        for one, grade in enumerate((0.0, 1.0, 2.0))
    ]
    for name, changed in {"a": {}, "b": {"consistency": 2.0}}.items():
        of = [row | {"scores": row["scores"] | changed} for row in rows]
        if name == "b":
            of[0] = of[0] | {"scores": {}}
        write(tmp_path / name / "wise" / "openai-m" / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in of))
        write(tmp_path / name / "results.json", {"wise/openai-m": {}, "mjhq/inception": {}, "hellaswag": {}})
    both = [str(tmp_path / name / "results.json") for name in "ab"]
    assert main(["evaluate", "--compare", *both]) == 0
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in capsys.readouterr().out.splitlines()}
    assert lines["wise/openai-m", "wiscore"] == ["35.00", "35.00", "..", "35.00", "2"]
    write(
        tmp_path / "b" / "wise" / "openai-m" / "scores.jsonl",
        "".join(json.dumps(row | {"scores": {}}) + "\n" for row in rows),
    )
    assert main(["evaluate", "--compare", *both]) == 2
    assert "no picture has scores in both" in capsys.readouterr().err
    for name in "ab":
        write(tmp_path / name / "results.json", {"mjhq/inception": {}, "hellaswag": {}})
    assert main(["evaluate", "--compare", *both]) == 2
    assert "in common that is a number for each sample" in capsys.readouterr().err


def test_language_tasks_say_what_they_need_to_be_installed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(command("not/there", data, tmp_path, "language")) == 2
    assert 'pip install -e ".[eval]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["mjhq"], "folder, mjhq need --features"),
        (["wise", "genai-bench"], "genai-bench, wise need --judge"),
        (["loss", "--judge", "self"], "nothing else does"),
        (["loss", "--seed", "1"], "leave out seed"),
        (["loss", "--guidance-scale", "2"], "leave out guidance_scale"),
        (["mjhq", "--features", "inception", "--as-paper", "--top-k", "3"], "leave out what differs"),
    ],
)
def test_options_for_other_benchmarks_are_told(argv, says, data, tmp_path, capsys):
    where = ["--model", "not/there", "--data", str(data), "--output", str(tmp_path)]
    assert main(["evaluate", *argv, *where]) == 2
    assert says in capsys.readouterr().err


def test_the_function_too_wants_a_judge(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match="genai-bench, wise need --judge"):
        evaluate(load(checkpoint, "cpu", "auto"), ["wise"], data, tmp_path, "x")


@pytest.mark.parametrize(
    ("name", "judge", "says"),
    [
        ("wise", "self", "expected openai:MODEL, or scores:FILE"),
        ("genai-bench", "openai:m", "expected a model that says how probable"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_drawing(name, judge, says, checkpoint, data, tmp_path, capsys):
    assert main(command(checkpoint, data, tmp_path, name, "--judge", judge)) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("name", "file", "change", "says"),
    [
        ("mjhq", "mjhq/meta_data.json", None, "huggingface.co/datasets/playgroundai/MJHQ-30K"),
        ("mjhq", "mjhq/mjhq30k_imgs/food/n1.jpg", None, "1 pictures are missing"),
        ("mjhq", "mjhq/meta_data.json", lambda t: '{"a": {"prompt": "x"}}', "not in the published format"),
        ("folder", "pairs/metadata.jsonl", lambda t: t + t.split("\n")[0], "come twice"),
        ("loss", "pairs/metadata.jsonl", lambda t: t.replace("file_name", "name", 1), "not in the published format"),
        ("genai-bench", "genai-bench/genai_skills.json", lambda t: t.replace("4", "6", 1), "such as 6"),
        ("wise", "wise/natural_science.json", lambda t: t.replace("1000", "1001", 1), "not in the published format"),
        ("wise", "wise/natural_science.json", lambda t: t[:-4], "damaged"),
    ],
)
def test_bad_data_is_told_before_anything_is_drawn(name, file, change, says, data, tmp_path, capsys):
    import shutil

    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    path = copy / file
    path.unlink() if change is None else path.write_text(change(path.read_text()))
    by = {"judge": ["--judge", "openai:m"], "features": ["--features", "inception"]}.get(BENCHMARKS[name].kind, [])
    assert main(command("not/there", copy, tmp_path / "out", name, *by)) == 2
    assert says in capsys.readouterr().err


def test_texts_that_cannot_be_drawn_are_told_before_the_first_picture(checkpoint, data, tmp_path, capsys):
    write(tmp_path / "genai-bench" / "prompts.txt", "a cat\n" + "very long " * 60 + "\n")
    write(tmp_path / "genai-bench" / "genai_skills.json", {"basic": [1, 2]})
    assert main(command(checkpoint, tmp_path, tmp_path / "out", "genai-bench", "--judge", "self")) == 2
    assert not list(tmp_path.rglob("*.png"))
