"""The recipes of examples/ run from end to end on data that is made up and small."""

import json
import re
import runpy
import sys
from pathlib import Path

import codec_training
import emoji_data
import numpy as np
import pytest
import scaling_data
import torch
import voken_emoji_data
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY_VQ_CONFIG, tiny_base, tiny_tokenizer
from transformers import AutoModelForImageClassification

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidVQModel, load_codec, tokenize_dataset
from transformers_liquid_cli import main


EXAMPLES = Path(__file__).parents[1] / "examples"
TONES = ["1F3FB", "1F3FF"]

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script of examples/ as from a command line, in an empty folder; nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("npm_config_offline", "true")

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    return run


def picture(index: int) -> Image.Image:
    """Noise in patches: no two latents of a codec are the same."""
    noise = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


def test_the_emoji_recipe_builds_a_checkpoint_that_draws(run, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_data, "NUM_UNSEEN_COMPOSITIONS", 2)
    monkeypatch.setattr(emoji_data, "NUM_UNSEEN_FLAGS", 1)
    data = tmp_path / "emoji-data"
    folder = data / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    kinds = {"Flags": ["ONE FLAG", "OTHER FLAG"], "Food & Drink": [f"THING NUMBER {index}" for index in range(40)]}
    kinds["Symbols"] = [f"{colour} {what}" for colour in ("RED", "BLUE") for what in ("HEART", "CIRCLE", "SQUARE")]
    kinds["Smileys & Emotion"] = [f"{mood} FACE {index}" for mood in ("HAPPY", "SAD") for index in range(3)]
    kinds["Travel & Places"] = [f"CLOCK FACE {time} OCLOCK" for time in ("ONE", "TWO", "SIX", "TEN")]
    roles = ["", *(f" {role}" for role in ("TEACHER", "COOK", "PILOT", "SINGER", "FARMER"))]
    kinds["People & Body"] = [f"{gender}{role}" for gender in ("MAN", "WOMAN") for role in roles]
    entries, keywords = [], {}
    for group, names in kinds.items():
        for name in names:
            code = f"{0x1F000 + len(entries):X}"
            variations = {tone: {"image": f"{code}-{tone}.png", "has_img_google": True} for tone in TONES}
            entry = {"name": name, "unified": code, "category": group, "image": f"{code}.png", "has_img_google": True}
            entry |= {"subcategory": "country-flag" if group == "Flags" else "other", "short_names": [name.lower()]}
            entry["skin_variations"] = variations if group == "People & Body" else {}
            entries.append(entry)
            keywords[chr(int(code, 16))] = [name.lower(), f"word{len(entries)}", "shared"]
            for file in (entry["image"], *(one["image"] for one in entry["skin_variations"].values())):
                picture(len(list(folder.iterdir()))).save(folder / file)
    icons = [{"name": f"icon {index}", "set": "ph", "colour": "red" if index % 2 else ""} for index in range(60)]
    np.savez(
        data / "icons.npz",
        pixels=np.stack([np.asarray(picture(1000 + index)) for index in range(len(icons))]),
        entries=np.array(json.dumps(icons)),
    )
    files = {"package/emoji.json": entries, "emojilib/package/dist/emoji-en-US.json": keywords}
    for package, part in (("cldr", "annotations"), ("cldr-derived", "annotationsDerived")):
        for language in ("en", "de", "es", "fr"):
            said = {one: {"tts": [f"a {words[0]}"], "default": words[1:]} for one, words in keywords.items()}
            content = {part: {"annotations": said if package == "cldr" else {}}}
            files[f"{package}/package/{part}/{language}/annotations.json"] = content
    files |= {f"{package}package/package.json": {} for package in ("", "emojilib/", "cldr/", "cldr-derived/")}
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(json.dumps(content))

    run("emoji/train_codec.py", "--epochs", "1", "1", "1", "--icons", "8")
    run("emoji/train_judge.py", "--codec", "emoji-codec", "--epochs", "2")
    judge = AutoModelForImageClassification.from_pretrained("emoji-judge")
    names = {item.name for item in emoji_data.load_emoji(data)}
    assert judge.config.label2id.keys() == names and {*judge.config.id2label.values()} <= names
    assert judge.config.accuracy.keys() == {"originals", "reconstructions"}
    steps = ("--max_steps", "2", "--batch_size", "8", "--use_cpu", "--no-bf16", "--text_tokens", "700")
    run("emoji/train_lm.py", *steps, "--output_dir", "emoji-lm-1")
    words = ("--continue_from", "emoji-lm-1", "--word_vectors", "emoji-lm-1")
    run("emoji/train_lm.py", *steps[:-1], "650", *words, "--misread", "0.5", "--shares", json.dumps({"foretold": 50}))
    settings = {"guidance_scale": 1.5, "do_sample": True, "top_k": 50}
    run("emoji/build_checkpoint.py", "--image_generation_config", json.dumps(settings))
    measures = ("names", "phrasings", "captions", "edits", "stories", "in_context")
    run("emoji/evaluate.py", "--number", "4", "--batch_size", "8", "--measures", *measures)
    results = json.loads((tmp_path / "emoji-evaluation.json").read_text())
    assert results["names"]["unseen_flag"]["top1"]["n"] == 1 and {"edits", "stories", "in_context"} <= results.keys()
    for script, picture_of in (("draw_sheet", "sheet.png"), ("draw_stories", ".")):
        run(f"emoji/{script}.py", "--model", "emoji-checkpoint", "--output", picture_of)
    assert Image.open(tmp_path / "sheet.png").width > 900
    assert all((tmp_path / name).exists() for name in ("stories.png", "editing.png"))
    model = LiquidForCausalLM.from_pretrained("emoji-checkpoint")
    assert model.generation_config.image_generation_config == settings
    assert (
        model.dtype == torch.float32
        and load_file("emoji-checkpoint/model.safetensors").popitem()[1].dtype == torch.float16
    )


def test_a_codec_is_trained_on_a_folder_and_fine_tuned_and_becomes_a_part_of_a_model(run, tmp_path, capsys):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for index in range(9):
        picture(index).resize((40, 30 + index)).save(
            tmp_path / "photos" / ("more" if index % 2 else "") / f"{index}.png"
        )
    common = ("--pictures", "photos", "--batch_size", "4", "--num_workers", "0", "--learning_rate", "3e-3")
    new = ("--image_size", "32", "--factor", "4", "--codebook_size", "32", "--channels", "8")
    run("codec/train_codec.py", *common, *new, "--epochs", "3", "3", "1", "--output_dir", "codec")
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 7 and losses[2] < losses[0] and "held out: PSNR" in said
    assert Image.open("codec/reconstructions.png").size == (32, 64)  # one picture, above it the original
    run("codec/train_codec.py", *common, *new, "--epochs", "3", "3", "2", "--output_dir", "codec")  # goes on
    said = capsys.readouterr().out
    assert "epoch 8 decoder" in said and "epoch 7" not in said

    run("codec/train_codec.py", *common, "--continue_from", "codec", "--epochs", "0", "0", "1", "--output_dir", "tuned")
    before, after = load_codec("codec"), load_codec("tuned")
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(before.encode_codes(pictures), after.encode_codes(pictures))
    assert not torch.equal(before.decoder.conv_out.weight, after.decoder.conv_out.weight)
    tiny_base(vocab_size=270).save_pretrained("base")
    tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"]).save_pretrained("base")
    assert main(["expand", "base", "--codec", "tuned", "--output", "liquid", "--device", "cpu"]) == 0
    assert LiquidForCausalLM.from_pretrained("liquid").config.grid() == (8, 8)


def test_a_codec_of_amuseds_family_is_fine_tuned_in_its_own_range(tmp_path):
    codec = LiquidVQModel(**TINY_VQ_CONFIG, lookup_from_codebook=True)
    pictures = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = codec_training.encode(codec, pictures)
        codes = codec.nearest_codes(latents)
        assert torch.equal(codes, codec.encode_codes(pictures))
        vectors = codec.quantize.embedding(codes).permute(0, 3, 1, 2)
        torch.testing.assert_close(codec_training.decode(codec, vectors), codec.decode_codes(codes))


def test_the_figure_of_guidance_is_drawn(run, tmp_path):
    run("emoji/draw_guidance.py", "--output", "guidance.png")
    assert Image.open(tmp_path / "guidance.png").size > (600, 800)


def test_the_three_runs_train_are_measured_and_plotted(run, tmp_path):
    data = tmp_path / "smollm2-emoji"
    data.mkdir()
    (data / "base").symlink_to(EMOJI_CHECKPOINT, target_is_directory=True)
    for name, number in (("emoji", 6), ("emoji-validation", 4)):
        photos = tmp_path / f"{name}-pictures"
        photos.mkdir()
        lines = [{"file_name": f"{index}.png", "text": f"{name} {index}"} for index in range(number)]
        (photos / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for index in range(number):
            picture(index).save(photos / f"{index}.png")
        tokenize_dataset(EMOJI_CHECKPOINT, data / name, "imagefolder", data_dir=str(photos))
    for name in ("text", "heldout-sotu", "heldout-moby-dick"):
        (data / f"{name}.jsonl").write_text(json.dumps({"text": "a red apple and a blue heart"}) + "\n")

    short = (
        "--max_steps=2",
        "--logging_steps=1",
        "--eval_steps=1",
        "--save_steps=2",
        "--preview_steps=2",
        "--bf16=false",
    )
    for name in ("full", "lora", "rows"):
        config = EXAMPLES / "smollm2_emoji" / f"{name}.yaml"
        assert main(["train", "--config", str(config), *short, "--warmup_steps=1"]) == 0
    for name in ("base", "full", "lora", "rows"):
        arguments = ("--model", f"smollm2-emoji/{name}", "--output", f"smollm2-emoji/evaluation-{name}")
        run("smollm2_emoji/evaluate.py", *arguments, "--num_shown", "4")
    run("smollm2_emoji/plot.py", "--output", "plot", "--results", "results.json")
    assert {*json.loads((tmp_path / "results.json").read_text())["evaluations"]} == {"base", "full", "lora", "rows"}
    assert (tmp_path / "plot_losses.png").exists() and (tmp_path / "plot_drawings.png").exists()


def test_voken_emoji_is_trained_in_all_its_parts_and_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(voken_emoji_data, "NUM_UNSEEN", 3)
    monkeypatch.setattr(emoji_data, "NUM_UNSEEN_COMPOSITIONS", 1)
    monkeypatch.setattr(emoji_data, "NUM_UNSEEN_FLAGS", 1)
    folder = tmp_path / "emoji-data" / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    people = [f"{who}{role}" for who in ("WOMAN", "MAN") for role in ("", " COOK", " PILOT", " JUDGE")]
    entries = []
    for index, name in enumerate([*people, "RED APPLE", "ONE FLAG"]):
        tones = {tone: {"image": f"{index}-{tone}.png", "has_img_google": True} for tone in emoji_data.SKIN_TONES}
        entry = {"name": name, "unified": f"{index}", "category": "People & Body" if name in people else "Things"}
        entry |= {"subcategory": "country-flag" if "FLAG" in name else "other", "has_img_google": True}
        entry |= {"image": f"{index}.png", "skin_variations": tones if name in people else {}, "short_names": []}
        entries.append(entry)
        for file in (entry["image"], *(one["image"] for one in entry["skin_variations"].values())):
            picture(len(list(folder.iterdir()))).save(folder / file)
    for file, content in {"emoji": entries, "package": {}}.items():
        (folder.parents[2] / f"{file}.json").write_text(json.dumps(content))
    no_previews = "--option=--preview_steps=0"
    run("voken_emoji/train.py", "--share", "0", no_previews)
    run("voken_emoji/train.py", "--share", "0", no_previews)  # all is there
    run("voken_emoji/evaluate.py", "--number", "3", "--steps", "1")
    results = json.loads((tmp_path / "voken-emoji" / "shipped" / "evaluation.json").read_text())
    assert [*results["scenes"]] == ["none", "text", "picture", "both"] and results["told"]["of"] == 3
    assert (tmp_path / "voken-emoji" / "shipped" / "evaluation.png").exists()
    for ablation in ("fixed_queries", "decoder_only"):
        run("voken_emoji/train.py", "--share", "0", no_previews, "--ablation", ablation)
    run("voken_emoji/evaluate.py", "--number", "1", "--steps", "1", "--model", "voken-emoji/stage1-fixed_queries")
    base, queries, silent = (
        load_file(f"voken-emoji/{name}/model/model.safetensors")
        for name in ("base", "stage1-fixed_queries", "stage1-decoder_only")
    )
    query, out, decoder = (
        f"feature_mapper.{name}"
        for name in ("query", "encoder_decoder.encoder.layers.0.linear2.weight", "mlp.0.weight")
    )
    assert torch.equal(base[query], queries[query]) and not torch.equal(base[decoder], queries[decoder])
    assert not silent[out].any() and not torch.equal(base[query], silent[query])


def test_the_scaling_study_is_run_in_parts(run, tmp_path, monkeypatch):
    sizes = {"TEXT_TOKENS": 300, "HELDOUT_FAMILIES": 4, "HELDOUT_ADDRESSES": 2, "NUM_HELDOUT": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(scaling_data, name, value)
    data, results = tmp_path / "emoji-data", tmp_path / "scaling" / "results.jsonl"
    icons = [{"name": f"thing{index} icon", "set": "ph", "colour": "red" if index % 2 else ""} for index in range(60)]
    texts = data / "sotu" / "package" / "data"
    texts.mkdir(parents=True)
    for year in range(6):
        (texts / f"{year}.txt").write_text(" ".join(f"day {day} of year{year}" for day in range(200)))
    np.savez(
        data / "icons.npz",
        pixels=np.stack([np.asarray(picture(index)) for index in range(len(icons))]),
        entries=np.array(json.dumps(icons)),
    )
    found = scaling_data.load_data(data)
    names = [{one["text"].split()[-2] for one in part} for part in (found.pictures, found.heldout_pictures)]
    assert len(found.heldout_pictures) == 4 and not names[0] & names[1]
    years = [set(re.findall(r"year\d", str(part))) for part in (found.texts, found.heldout_texts)]
    assert years[0] == {"year0", "year2", "year4"} and years[1] and not years[0] & years[1]

    settings = ("--sizes", "S", "--seeds", "1", "--sequences", "32")
    run("scaling_study/run.py", *settings)
    first = results.read_text().splitlines()
    results.write_text("\n".join(first[:-1]) + "\n")
    run("scaling_study/run.py", *settings)  # as if it had been killed in the last cell
    both = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(both) == len({str(cell["cell"]) for cell in both}) == 3 + 4 + 4
    assert json.loads(first[-1])["losses"] == both[-1]["losses"]
    tokens = {cell["cell"]["arm"]: cell["tokens"] for cell in both if cell["cell"]["experiment"] == "ladder"}
    assert tokens["mixed"] == tokens["text"] + tokens["image"]
    with pytest.raises(ValueError, match=r"--sequences \{32\}, not 8"):
        run("scaling_study/run.py", *settings[:-1], "8")


def test_the_scaling_study_finds_the_law_and_the_costs_that_were_put_in(run, tmp_path, capsys):
    draw = np.random.default_rng(0)
    arms = ("ladder", "text", 0.0), ("ladder", "image", 0.0), ("ladder", "mixed", 0.2)
    arms += ("synergy", "base", 0.0), ("synergy", "text", -1.0), ("synergy", "generation", -2.0)
    arms += (("synergy", "understanding", -3.0),)
    lines = []
    for index, parameters in enumerate((20_000, 50_000, 200_000, 700_000, 2_000_000)):
        for experiment, arm, cost in arms:
            for seed in range(3):
                cost = 0.1 * (4 - index) if arm == "mixed" else cost
                loss = 3 + 40 * parameters**-0.3 + cost + draw.normal(0, 0.005)
                losses = {"image": loss, "text": loss, "caption": loss, "misread": loss + 1}
                cell = {"experiment": experiment, "size": str(index), "arm": arm, "seed": seed, "factor": 1.0}
                lines.append(json.dumps({"cell": cell, "parameters": parameters, "losses": losses}))
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    run("scaling_study/plot.py", ".")
    rows = [[part.strip() for part in line.split("|")[1:4]] for line in capsys.readouterr().out.splitlines()]
    said = {what: [float(number) for number in re.findall(r"[-+]?\d+\.\d+", value)] for _, what, value in rows}
    images = "pictures (nats a code)"
    value, low, high = said[f"{images}, alone: a of E + A N^-a"]
    assert low <= 0.3 <= high and high - low < 0.1 and abs(value - 0.3) < 0.02
    floor, power, logarithm = said[f"{images}, alone: error at a size left out"]
    assert floor < 0.02 < power < logarithm
    value, low, high = said[f"{images}: change of the cost with ten times the size"]
    assert low <= value <= high < 0
    value, low, high = said["drawing (nats a code), 2,000,000: more to name less more text"]
    assert abs(value + 2) < 0.02 and low <= -2 <= high
    assert all((tmp_path / f"scaling_{name}.png").exists() for name in ("laws", "tradeoff", "synergy"))


def test_intervals_of_the_scaling_study_hold_the_truth_as_often_as_they_say():
    bootstrap = runpy.run_path(str(EXAMPLES / "scaling_study" / "plot.py"))["bootstrap"]
    draw, held = np.random.default_rng(0), []
    for _ in range(400):
        _, draws = bootstrap([draw.normal(index, 1, size=2 + index % 2) for index in range(4)])
        slopes = np.polyfit(range(4), draws.T, 1)[0]
        held.append(
            [
                low <= truth <= high
                for values, truth in ((slopes, 1), (draws[:, 0], 0))
                for low, high in [np.percentile(values, (2.5, 97.5))]
            ]
        )
    assert np.all(np.abs(np.mean(held, axis=0) - 0.95) < 0.03)


def test_one_code_a_position_is_compared_with_four(run, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_data, "NUM_UNSEEN_COMPOSITIONS", 0)
    monkeypatch.setattr(emoji_data, "NUM_UNSEEN_FLAGS", 0)
    folder = tmp_path / "emoji-data" / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    draw, entries = np.random.default_rng(0), []
    for index in range(60):
        name = "".join(draw.choice([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], 24))
        kind = "Animals & Nature" if index < 40 else "Activities"
        entry = {
            "name": name,
            "unified": f"{index:X}",
            "category": kind,
            "image": f"{index}.png",
            "has_img_google": True,
        }
        entries.append(entry | {"subcategory": "other", "short_names": [name.lower()]})
        picture(index).save(folder / f"{index}.png")
    for name, content in {"emoji.json": entries, "package.json": {}}.items():
        (tmp_path / "emoji-data" / "package" / name).write_text(json.dumps(content))
    codec = "several_codes/product_codec.py"
    run(codec, "--num_codebooks", "1", "--output_dir", "begun", "--epochs", "0", "1")
    run(codec, "--num_codebooks", "4", "--output_dir", "codec", "--continue_from", "begun", "--epochs", "1", "1")
    small = ("--max_steps", "2", "--batch_size", "4")
    run("several_codes/product_model.py", "--codec_dir", "codec", "--output_dir", "model", *small)
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["names"] == 40 and all(0 <= results[name] <= 1 for name in ("drawn", "named", "chosen"))
    assert LiquidForCausalLM.from_pretrained("model").config.num_codebooks == 4
