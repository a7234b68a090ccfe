"""Pictures as people have them: read with their captions or refused by name, tokenized once, trained on by a preset."""

import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny import tiny_base, tiny_checkpoint, tiny_model, tiny_processor, tiny_tokenizer

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM
from transformers_liquid.data.mixture import load_records
from transformers_liquid.data.source import read_photos
from transformers_liquid.data.tokenize import tokenize_dataset, tokenize_in_cache
from transformers_liquid.training.arguments import parse_arguments
from transformers_liquid.training.presets import preset_options
from transformers_liquid_cli import main


COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def draw(folder, size=(12, 12)):
    """A picture of each colour in a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for color in COLORS:
        Image.new("RGB", size, color).save(Path(folder, f"{color}.png"))


def beside():
    draw("photos/more")
    for color in COLORS:
        Path("photos", "more", f"{color}.txt").write_text(f"{color}\n")
    return "photos"


def folders():
    for color in COLORS:
        Path("photos", color).mkdir(parents=True)
        Image.new("RGB", (12, 12), color).save(f"photos/{color}/1.png")
    return "photos"


def metadata_jsonl():
    draw("photos")
    lines = [{"file_name": f"{color}.png", "text": color} for color in COLORS]
    Path("photos", "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "photos"


def metadata_csv():
    draw("photos")
    lines = ["file_name,text", *(f'{color}.png,"{color}"' for color in COLORS)]
    Path("photos", "metadata.csv").write_text("\n".join(lines))
    return "photos"


def csv_file():
    draw("photos")
    lines = ["id,image,caption", *(f"{index},photos/{color}.png,{color}" for index, color in enumerate(COLORS))]
    Path("list.csv").write_text("\n".join(lines))
    return "list.csv"


def captions_jsonl():
    return f"{metadata_jsonl()}/metadata.jsonl"


def tars():
    draw("photos")
    Path("tars").mkdir()
    with tarfile.open("tars/00000.tar", "w") as tar:
        for color in COLORS:
            tar.add(f"photos/{color}.png", f"{color}.png")
            member = tarfile.TarInfo(f"{color}.txt")
            member.size = len(color)
            tar.addfile(member, io.BytesIO(color.encode()))
    return "tars"


def repository():
    """As `push_to_hub` writes it."""
    draw("photos")
    images = [{"bytes": Path("photos", f"{color}.png").read_bytes(), "path": None} for color in COLORS]
    data = datasets.Dataset.from_dict({"image": images, "text": list(COLORS)}).cast_column("image", datasets.Image())
    Path("repository", "data").mkdir(parents=True)
    data.to_parquet("repository/data/train-00000-of-00001.parquet")
    return "repository"


OF_FOLDERS = [beside, folders, metadata_jsonl, metadata_csv]


@pytest.mark.parametrize("write", OF_FOLDERS)
def test_photos_are_read_with_their_captions(write):
    folder = Path(write())
    Path(folder, ".hidden").mkdir()
    Path(folder, ".hidden", "x.png").write_bytes(b"no picture")
    records = read_photos(folder)
    assert sorted(record["text"] for record in records) == sorted(COLORS)
    for record in records:
        pixel = Image.open(folder / record["image"]).getpixel((0, 0))
        assert pixel == Image.new("RGB", (1, 1), record["text"]).getpixel((0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("write", [*OF_FOLDERS, csv_file, captions_jsonl, tars, repository])
def test_every_layout_becomes_the_codes_of_its_pictures(write, model):
    codes = tokenize_in_cache(model, write())
    codec = LiquidForCausalLM.from_pretrained(model).model.vq_model
    expected = {}
    for color in COLORS:
        pixels = tiny_processor().image_processor(Image.new("RGB", (12, 12), color))["pixel_values"]
        expected[color] = codec.encode_codes(pixels).flatten().tolist()
    records = load_records(codes)
    assert {record["text"]: record["codes"] for record in records} == expected and len(records) == len(COLORS)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda folder: (folder / "red.txt").unlink(),
            r"1 files cannot be used\. photos/more/red\.png: it has no caption",
        ),
        (lambda folder: (folder / "red.png").unlink(), r"red\.txt: there is no picture of this name"),
        (lambda folder: (folder / "red.txt").write_text(" \n"), r"red\.png: Its text is empty"),
        (lambda folder: (folder / "red.txt").write_text("a <boi>"), r"red\.png: Its text contains '<boi>'"),
        (lambda folder: (folder / "red.png").write_bytes(b"GIF"), r"red\.png: cannot identify image file"),
        (lambda folder: [file.unlink() for file in folder.glob("*.png")], r"photos has no pictures"),
        (
            lambda folder: (folder / "metadata.csv").write_text("file_name,text\nx.png,x\nred.png,red\n"),
            r"4 files .*x\.png: it has a caption and is not there; .*blue\.png: it has no caption; .*green",
        ),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"text": "x"}'), r"Record 1 of .* lacks .* file_name"),
    ],
)
def test_what_lacks_its_other_half_is_refused_by_name(harm, message):
    folder = Path(beside())
    harm(folder / "more")
    with pytest.raises(ValueError, match=message):
        read_photos(folder)


@pytest.mark.parametrize("write", [beside, metadata_jsonl])
def test_training_on_incomplete_photos_ends_before_anything_is_encoded(write, model, capsys):
    folder = Path(write())
    Image.new("RGB", (8, 8)).save(folder / "alone.png")
    command = ["train", "--model", model, "--datasets", "photos", "--output-dir", "run", "--use-cpu"]
    assert main([*command, "--preset", "lora"]) == 2
    assert "alone.png: it has no caption" in capsys.readouterr().err
    assert not Path("cache", "liquid_codes").exists() and not Path("run").exists()


def test_photos_without_any_captions_are_refused_with_the_ways_to_give_them(model, capsys):
    draw("photos")
    for command in (["tokenize", "--output", "codes", "--dataset"], ["train", "--output-dir", "run", "--datasets"]):
        assert main([*command, "photos", "--model", model]) == 2
        assert re.search(
            r"(no column text|has no caption).*\.txt files beside them, .* folders .* metadata\.jsonl",
            capsys.readouterr().err,
        )


def test_codes_are_made_once_for_the_same_pictures_and_codec(model, tmp_path):
    folder = beside()
    first = tokenize_in_cache(model, folder)
    (shard,) = first.glob("data/*.parquet")
    before, content = shard.stat().st_mtime_ns, shard.read_bytes()
    assert tokenize_in_cache(model, f"{folder}/") == first and shard.stat().st_mtime_ns == before

    shard.unlink()  # as if it had been interrupted
    assert tokenize_in_cache(model, folder) == first and shard.read_bytes() == content

    Path(folder, "more", "red.txt").write_text("crimson")
    changed = tokenize_in_cache(model, folder)
    assert changed != first and "crimson" in [record["text"] for record in load_records(changed)]

    other = tiny_model(seed=1)
    other.save_pretrained("other")
    assert tokenize_in_cache("other", folder) not in (first, changed)
    assert len(list(first.parent.iterdir())) == 3


def test_common_grids_hold_photos_in_their_proportions(model):
    draw("photos/wide", size=(40, 24))
    draw("photos/tall", size=(24, 40))
    tokenize_dataset(model, "codes", "photos", grids="common", num_workers=1)
    records = load_records("codes")
    assert {(record["text"], *record["grid"]) for record in records} == {("wide", 3, 5), ("tall", 5, 3)}


def test_common_grids_need_no_more_codes_than_the_square():
    for size in (8, 16, 64):
        layout = tiny_model().config.image_layout.__class__(0, 16, 1, 2, 3, 4, size, 2)
        square, *others = layout.common_grids()
        assert square == layout.grid() and all(height * width <= square[0] ** 2 for height, width in others)
        ratios = [height / width for height, width in others]
        assert len({*ratios, 1.0}) == len(others) + 1 and min(ratios) < 0.65 and max(ratios) > 1.5


# Presets


@pytest.mark.parametrize("preset", ["full", "lora", "rows"])
@pytest.mark.parametrize("processes", [1, 6])
@pytest.mark.parametrize("number", [1, 3, 12, 50, 3000, 50_000])
def test_a_preset_suits_the_number_of_records(preset, processes, number, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = dict.fromkeys(("total_batch_size", "per_device_train_batch_size")) | {"preset": preset}
    options = preset_options(given, number, 256, ("a", "b"))
    at_once = options["per_device_train_batch_size"] * processes
    assert options["total_batch_size"] % at_once == 0 and options["per_device_train_batch_size"] * 256 <= 4096
    assert options["total_batch_size"] <= max(number, processes) or number < 8 == options["total_batch_size"]
    steps = options["num_train_epochs"] * number / options["total_batch_size"]
    assert 500 <= steps <= 2000 and options["num_train_epochs"] >= 3
    assert options["trainable"] == preset and (options.get("preview_prompts") == ["a", "b"]) == (processes == 1)


@pytest.mark.parametrize(
    "words", ["--total-batch-size 6", "--per_device_train_batch_size=3", "--learning-rate 1 --trainable rows"]
)
def test_options_that_are_given_win_over_the_preset(words, tmp_path):
    argv = ["--model", "m", "--datasets", "d", "--output_dir", str(tmp_path), "--use_cpu", "--preset", "lora"]
    model_args, _, args = parse_arguments([*argv, *words.split()], choose=lambda given: preset_options(given, 100))
    options = vars(model_args) | vars(args)
    expected = {"save_total_limit": 2, "preset": "lora"} | {
        "--total-batch-size 6": {"total_batch_size": 6, "per_device_train_batch_size": 2, "trainable": "lora"},
        "--per_device_train_batch_size=3": {"total_batch_size": 9, "per_device_train_batch_size": 3},
    }.get(words, {"learning_rate": 1.0, "trainable": "rows"})
    assert {name: options[name] for name in expected} == expected


def test_a_preset_of_a_stream_is_refused(model, capsys):
    beside()
    command = ["train", "--model", model, "--datasets", "photos", "--output-dir", "run", "--preset", "lora"]
    assert main([*command, "--streaming", "--max-steps", "2"]) == 2
    assert "leave out streaming" in capsys.readouterr().err


def test_a_dry_run_tells_what_a_run_takes_and_leaves_nothing(model, capfd):
    beside()
    command = f"train --model {model} --datasets photos --output-dir run --use-cpu --disable-tqdm true --save-steps 1"
    assert main([*command.split(), "--preset", "rows", "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"photos holds pictures: they become codes in .*liquid_codes", said)
    assert "preset rows for 4 records: trainable='rows', learning_rate=0.005, total_batch_size=4" in said
    assert "preview_prompts=['blue', 'green', 'red', 'white']" in said
    told = re.search(
        r"500 optimizer steps of 4 records\.\n.*?A step takes ([\d.]+) s and ([\d,]+) tokens: 500 of them about ([\d.]+) "
        r"(s|min) and ([\d,]+) tokens, .* Memory: [\d.]+ GiB\.",
        said,
        flags=re.DOTALL,
    )
    seconds, tokens = float(told[3]) * {"s": 1, "min": 60}[told[4]], float(told[5].replace(",", ""))
    assert seconds == pytest.approx(500 * float(told[1]), abs=3) and tokens >= 500 * 4 * 18
    assert not Path("run").exists()


def test_fewer_records_than_a_step_takes_are_told(model, caplog):
    Path("texts.jsonl").write_text('{"text": "red"}\n' * 3)
    command = ["train", "--model", model, "--datasets", "texts.jsonl", "--output-dir", "run", "--use-cpu"]
    assert main([*command, "--total-batch-size", "8", "--max-steps", "1"]) == 0
    assert "There are 3 records, fewer than the 8 of a step" in caplog.text


def test_going_on_says_from_where_and_a_finished_run_that_it_is(model, capfd):
    Path("texts.jsonl").write_text('{"text": "red"}\n' * 8)
    command = ["train", "--model", model, "--datasets", "texts.jsonl", "--output-dir", "run", "--use-cpu"]
    command += ["--total-batch-size", "8", "--max-steps", "3", "--save-steps", "2", "--disable-tqdm", "true"]
    assert main(command) == 0
    assert "resuming" not in capfd.readouterr().out
    weights = Path("run", "model.safetensors")
    before = weights.stat().st_mtime_ns
    assert main(command) == 0
    assert "already finished: run holds the model after 3 steps." in capfd.readouterr().out
    assert weights.stat().st_mtime_ns == before
    weights.unlink()
    assert main(command) == 0
    assert "resuming from step 3\n" in capfd.readouterr().out and weights.is_file()

    for path in Path("run", "checkpoint-3").iterdir():  # as if it had stopped before
        path.unlink()
    Path("run", "trainer_state.json").unlink()
    assert main(command) == 0
    assert "resuming from step 2\n" in capfd.readouterr().out and weights.stat().st_mtime_ns > before


@pytest.mark.slow
def test_from_a_folder_of_photos_to_a_model_that_draws(capfd):
    """A person's whole way: own pictures with captions, a language model, a codec, three commands."""
    Path("photos").mkdir()
    for index in range(12):
        picture = Image.new("RGBA", (72, 72))
        picture.paste((20 * index, 255 - 20 * index, 128, 255), (8, 8, 40 + 2 * index, 64))
        picture.save(f"photos/{index:02d}.png")
        Path("photos", f"{index:02d}.txt").write_text(f"emoji number {index}\n")
    base = tiny_base(vocab_size=270)
    base.config.max_position_embeddings = 512
    base.save_pretrained("base")
    tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"]).save_pretrained("base")
    LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model.save_pretrained("codec")

    assert main(["expand", "base", "--codec", "codec", "--output", "mine", "--device", "cpu"]) == 0
    command = "train --model mine --datasets photos/ --preset lora --output-dir lora --use-cpu --max-steps 4"
    assert main(command.split()) == 0
    said = capfd.readouterr().out
    assert "preset lora for 12 records" in said and "4 optimizer steps of 8 records" in said
    assert [path.name for path in sorted(Path("lora", "previews").iterdir())][-1] == "step-000004.png"
    assert len(list(Path("lora").glob("checkpoint-*"))) == 2  # save_total_limit
    command = "generate emoji --model lora --output drawn.png --seed 1 --device cpu"
    assert main(command.split()) == 0
    assert Image.open("drawn.png").size == (64, 64)
    command = "describe photos --model lora --output captions.jsonl --device cpu --max-new-tokens 3"
    assert main(command.split()) == 0
    assert len(Path("captions.jsonl").read_text().splitlines()) == 12
