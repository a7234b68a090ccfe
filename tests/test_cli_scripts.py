"""What the command line promises to scripts: lines of JSON, pipes, and what it says beside its results."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer
from PIL import Image
from test_cli import environment, error_of, run
from tiny import EOS_ID, tiny_model, tiny_processor

from transformers_liquid import EMOJI_CHECKPOINT, VOKEN_EMOJI, LiquidConversation, LiquidForCausalLM, LiquidProcessor
from transformers_liquid.checkpoints import find_checkpoint
from transformers_liquid.training.arguments import ModelArguments
from transformers_liquid_cli import app, main
from transformers_liquid_cli.options import VisibleStream, visible
from transformers_liquid_cli.pictures import read_metadata


HERE = "--model ours --device cpu"
FOLDER = f"generate --prompts-file prompts.txt --output-dir drawn {HERE}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.generation_config.image_generation_config = {"guidance_scale": 1.5, "do_sample": True, "top_k": 12}
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def here(checkpoint, tmp_path, monkeypatch):
    """A folder with a checkpoint, `ours`, pictures and prompts."""
    monkeypatch.chdir(tmp_path)
    Path("ours").symlink_to(checkpoint, target_is_directory=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "green")):
        Image.new("RGB", (20, 10), colour).save(name)
    Path("prompts.txt").write_text("red apple\n\n# a note\ndog\n  # another\na longer prompt\n")


@pytest.fixture
def stdin(monkeypatch):
    def put(content):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return put


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


# generate


def test_json_of_generate_is_what_the_pngs_say_in_the_order_of_the_prompts(capsys):
    command = f"generate a 'a much longer prompt' b {HERE} --seed 7 --batch-size 1 --output drawn --sheet sheet.png"
    assert run(f"{command} --json") == 0
    captured = capsys.readouterr()
    told = objects(captured.out)
    assert [one.pop("path") for one in told] == [
        f"drawn/{name}.png" for name in ("0-a", "1-a-much-longer-prompt", "2-b")
    ]
    assert [(one["prompt"], one["seed"]) for one in told] == [("a", 7), ("a much longer prompt", 8), ("b", 9)]
    assert told == read_metadata("sheet.png") and "sheet.png" in captured.err
    shutil.rmtree("drawn")
    assert run(command) == 0
    assert capsys.readouterr().out.split() == [*(f"drawn/{one}" for one in sorted(os.listdir("drawn"))), "sheet.png"]


def test_json_of_a_folder_tells_all_its_pictures_those_that_were_there_too(capsys):
    assert run(FOLDER) == 0
    Path("drawn/000004-dog.png").unlink()
    capsys.readouterr()
    assert run(f"{FOLDER} --json") == 0
    captured = capsys.readouterr()
    paths = [f"drawn/{name}.png" for name in ("000001-red-apple", "000004-dog", "000006-a-longer-prompt")]
    assert objects(captured.out) == [{"path": path, **read_metadata(path)} for path in paths]
    assert "Going on: 2 of 3 pictures are there." in captured.err and "1 of them drawn now" in captured.err
    assert run(FOLDER) == 0
    assert "Already finished: 3 of 3 pictures are there." in capsys.readouterr().err


def test_a_prompts_file_has_comments_and_empty_lines_which_are_counted(capsys):
    assert run(FOLDER) == 0
    assert capsys.readouterr().err.count("left out") == 0
    records = {path.name: read_metadata(path) for path in sorted(Path("drawn").glob("*.png"))}
    assert [(name[:6], one["prompt"], one["seed"]) for name, one in records.items()] == [
        ("000001", "red apple", 0),
        ("000004", "dog", 3),
        ("000006", "a longer prompt", 5),
    ]


def test_prompts_come_from_standard_input(stdin):
    assert run(FOLDER) == 0
    stdin(Path("prompts.txt").read_bytes())
    assert run(FOLDER.replace("prompts.txt", "-").replace("drawn", "piped")) == 0
    for path in Path("drawn").glob("*.png"):
        assert Path("piped", path.name).read_bytes() == path.read_bytes()
    stdin(b"\n# nothing\n")
    assert run(FOLDER.replace("prompts.txt", "-")) == 2
    stdin(b"\xff\xfe\n")
    assert run(FOLDER.replace("prompts.txt", "-")) == 2


def test_one_picture_goes_to_standard_output_as_it_would_to_a_file(capfdbinary):
    assert run(f"generate 'red apple' {HERE} --seed 3 --output apple.png") == 0
    capfdbinary.readouterr()
    assert main(["generate", "red apple", *HERE.split(), "--seed", "3", "--output", "-"]) == 0
    assert capfdbinary.readouterr().out == Path("apple.png").read_bytes() and not Path("-").exists()


@pytest.mark.parametrize(
    "options", ["a b", "a --num-images 2", "a --json", "a --sheet s.png", "--prompts-file prompts.txt"]
)
def test_standard_output_takes_one_picture_and_nothing_else(options, capsys):
    assert "--output - writes one picture" in error_of(f"generate {options} --output - --model nowhere", capsys)


def test_no_picture_is_written_to_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(VisibleStream, "isatty", lambda self: True, raising=False)
    assert "--output - writes one picture to a pipe" in error_of("generate a --output - --model nowhere", capsys)


def test_a_picture_in_the_context_comes_from_standard_input(stdin, capsys):
    assert run(f"generate blue --image a.png {HERE} --seed 1 --output file.png") == 0
    stdin(Path("a.png").read_bytes())
    assert run(f"generate blue --image - {HERE} --seed 1 --output piped.png") == 0
    np.testing.assert_array_equal(np.asarray(Image.open("piped.png")), np.asarray(Image.open("file.png")))


def test_a_seed_that_was_not_given_is_told(capsys):
    assert run(f"generate a {HERE}") == 0
    assert f"The seed was {read_metadata('liquid.png')['seed']}, " in capsys.readouterr().err


# describe


def test_describe_reads_many_pictures_as_each_alone(capsys):
    options = f"{HERE} --max-new-tokens 6"
    for question in ("", "'what is this?'"):
        alone = []
        for name in ("a.png", "b.png", "c.png"):
            assert run(f"describe {name} {question} {options}") == 0
            alone.append(capsys.readouterr().out.rstrip("\n"))
        assert run(f"describe a.png b.png c.png {question} {options} --batch-size 2 --json") == 0
        told = objects(capsys.readouterr().out)
        assert [one["file_name"] for one in told] == ["a.png", "b.png", "c.png"]
        assert [visible(one["text"]) for one in told] == alone


def test_describe_reads_a_picture_from_standard_input(stdin, capsys):
    assert run(f"describe a.png {HERE} --max-new-tokens 6") == 0
    expected = capsys.readouterr().out
    stdin(Path("a.png").read_bytes())
    assert run(f"describe - {HERE} --max-new-tokens 6") == 0
    assert capsys.readouterr().out == expected


def test_json_of_a_folder_is_what_its_file_of_captions_gets(capsys):
    Path("photos").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(name, "photos")
    command = f"describe photos {HERE} --max-new-tokens 3 --output captions.jsonl"
    assert run(f"{command} --json") == 0
    captured = capsys.readouterr()
    assert captured.out == Path("captions.jsonl").read_text() and "2 of them described now" in captured.err
    assert run(command) == 0
    assert "Already finished: 2 of 2 pictures have a text." in capsys.readouterr().err


@pytest.mark.parametrize("names", ["a.png none.png", "none.png what", "a.png b.png none.png c.png what"])
def test_every_picture_is_looked_for_before_the_model_is_read(names, capsys):
    assert "none.png" in error_of(f"describe {names} --batch-size 1 --model nowhere", capsys)


# Text by chance


@pytest.mark.parametrize("names", [("temperature", "top-p"), ("text-temperature", "text-top-p")])
def test_describe_draws_words_as_generate_does(names, capsys):
    options = f"--{names[0]} 5 --{names[1]} 0.9 --seed 3 --max-new-tokens 12"
    assert run(f"describe a.png {HERE} {options}") == 0
    model, processor = LiquidForCausalLM.from_pretrained("ours"), LiquidProcessor.from_pretrained("ours")
    ids = torch.tensor([processor.caption_ids()])
    pixel_values = processor.image_processor(Image.open("a.png"), framing="pad")["pixel_values"]
    how = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "max_new_tokens": 12}
    transformers.set_seed(3)
    written = model.generate(ids, pixel_values=pixel_values, **how)
    expected = processor.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert capsys.readouterr().out == f"{visible(expected)}\n"


@pytest.mark.parametrize("command", ["story dog --output tale.md", "chat"])
def test_story_and_chat_draw_words_by_chance_where_asked(command, stdin, monkeypatch, capsys):
    seen, stream = [], LiquidConversation.stream

    def watch(self, *args, **kwargs):
        seen.append(kwargs)
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(LiquidConversation, "stream", watch)
    stdin(b"dog\n/quit\n")
    assert run(f"{command} {HERE} --text-temperature 5 --text-top-p 0.5 --max-new-tokens 2 --temperature 0.5") == 0
    assert {"do_sample": True, "temperature": 5.0, "top_p": 0.5}.items() <= seen[0].items()
    assert seen[0]["image_generation_config"]["temperature"] == 0.5


@pytest.mark.parametrize("option", ["--text-temperature 0", "--text-top-p 1.5"])
def test_what_no_chance_can_be_is_wrong_use(option, capsys):
    assert f"Invalid value for '{option.split()[0]}'" in error_of(f"chat {option}", capsys)


# chat


def test_what_is_drawn_in_a_chat_stays_in_its_context(stdin, monkeypatch, capsys):
    seen, stream = [], LiquidConversation.stream

    def watch(self, messages, **kwargs):
        seen.append(messages)
        return stream(self, messages, **kwargs)

    monkeypatch.setattr(LiquidConversation, "stream", watch)
    stdin(b"/help\n/draw red apple\nwhat is it?\n/quit\n")
    assert run(f"chat {HERE} --max-new-tokens 2 --seed 1") == 0
    said = capsys.readouterr().out
    for command in ("/image PATH", "/draw PROMPT", "/new", "/help", "/quit"):
        assert f"{command} " in said
    [[asked, drawn, question]] = seen
    assert "drawing-0.png" in said and asked["content"] == [{"type": "text", "text": "red apple"}]
    assert drawn["role"] == "assistant" and question["content"] == [{"type": "text", "text": "what is it?"}]
    np.testing.assert_array_equal(np.asarray(drawn["content"][0]["image"]), np.asarray(Image.open("drawing-0.png")))


def test_lines_of_a_chat_are_found_again_in_the_next(monkeypatch):
    readline = pytest.importorskip("readline")
    from transformers_liquid_cli.chat import remember_lines

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", os.getcwd())
    kept = []
    monkeypatch.setattr("atexit.register", lambda *call: kept.append(call))
    readline.clear_history()
    remember_lines()
    readline.add_history("a cat")
    [(write, file)] = kept
    write(file)
    readline.clear_history()
    remember_lines()
    assert readline.get_history_item(1) == "a cat" and Path(file).stat().st_mode & 0o77 == 0
    readline.clear_history()


# What is told beside results


def test_quiet_leaves_results_and_errors_alone(capsys):
    Path("prompts.txt").write_text("red apple\n<boi>\n")
    assert run(f"{FOLDER} --quiet") == 2
    captured = capsys.readouterr()
    assert captured.out == "drawn: 1 pictures, 1 of them drawn now.\n"
    lines = captured.err.splitlines()
    assert len(lines) == 2 and "line 2 is left out" in lines[0] and "1 of 2 lines" in lines[1]
    assert run(f"describe a.png b.png -q {HERE} --max-new-tokens 2") == 0
    assert capsys.readouterr().err == ""
    assert main(["--quiet", *shlex.split(f"generate a {HERE}")]) == 0
    assert capsys.readouterr().err == ""


def test_verbose_tells_what_is_loaded_and_where_errors_come_from(capsys):
    assert run(f"generate a {HERE} --verbose") == 0
    assert "ours is loaded: " in capsys.readouterr().err
    assert run(f"generate a --height 7 {HERE} --verbose") == 2
    assert "Traceback" in capsys.readouterr().err
    assert run(f"generate a --height 7 {HERE}") == 2  # of one command, not of those that follow
    assert "Traceback" not in capsys.readouterr().err


def test_every_command_can_be_quiet():
    group = typer.main.get_command(app)
    for commands in (group.commands, group.commands["voken"].commands):
        for name, command in commands.items():
            if not hasattr(command, "commands"):
                assert "--quiet" in {word for one in command.params for word in one.secondary_opts}, name


@pytest.mark.parametrize(
    ("command", "how"),
    [(FOLDER, "The same command goes on from there."), (f"generate a {HERE}", "with --prompts-file and --output-dir")],
)
def test_an_interrupt_says_how_to_go_on(command, how, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_liquid_cli.pictures.save_png", interrupt)
    assert run(command) == 130
    captured = capsys.readouterr()
    assert "transformers-liquid: interrupted. " in captured.err and how in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_ctrl_c_while_tokenizing_loses_only_the_shard_in_flight(capsys):
    Path("photos").mkdir()
    entries = [{"file_name": f"{number}.png", "text": f"{number}"} for number in range(400)]
    for entry in entries:
        Image.new("RGB", (900, 900)).save(f"photos/{entry['file_name']}", compress_level=0)
    Path("photos/metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    command = "tokenize --dataset imagefolder --data-dir photos --model ours --output codes --records-per-shard 4"
    words = [sys.executable, "-m", "transformers_liquid", *command.split()]
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list(Path().glob("codes/data/train-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers, too
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted. The same command goes on from there." in said
    assert run(command) == 0
    assert "Going on: " in capsys.readouterr().err
    assert run(command) == 0
    assert "Already finished: 400 of 400 records are done." in capsys.readouterr().err


# Names, info, env, completion


def test_a_model_is_known_by_the_name_on_its_card(capsys):
    assert find_checkpoint(None) == find_checkpoint("liquid-emoji") == EMOJI_CHECKPOINT
    assert find_checkpoint("voken-emoji") == VOKEN_EMOJI and find_checkpoint("ours") == "ours"
    assert ModelArguments(model="liquid-emoji").model == EMOJI_CHECKPOINT  # of train
    assert run("info --model liquid-emoji") == 0
    assert EMOJI_CHECKPOINT in capsys.readouterr().out
    Path("liquid-emoji").symlink_to("ours")
    assert find_checkpoint("liquid-emoji") == "liquid-emoji"


def test_json_of_info_holds_the_facts_as_numbers(capsys):
    assert run("info --model ours --json") == 0
    [facts] = objects(capsys.readouterr().out)
    model = LiquidForCausalLM.from_pretrained("ours")
    of_codec = model.model.vq_model.num_parameters()
    assert facts["num_codec_parameters"] == of_codec
    assert facts["num_parameters"] + of_codec == sum(parameter.numel() for parameter in model.parameters())
    assert facts["config"]["image_token_offset"] == model.config.image_token_offset
    assert (facts["layout"], facts["height"], facts["width"]) == ("liquid", 8, 8)
    assert facts["settings"]["guidance_scale"] == 1.5 and facts["known_words"] is None
    assert run(f"generate a b {HERE} --output drawn --sheet sheet.png") == 0
    capsys.readouterr()
    assert run("info sheet.png --json") == 0
    assert objects(capsys.readouterr().out) == read_metadata("sheet.png")


def test_env_tells_versions_devices_and_the_cache(capsys):
    assert run("env --json") == 0
    [facts] = objects(capsys.readouterr().out)
    for library in ("torch", "transformers", "diffusers", "accelerate", "huggingface-hub"):
        assert facts[library] == version(library)
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.") and facts["cache"]
    assert facts["cpu"].endswith("GB free")
    assert run("env") == 0
    assert f"torch               {version('torch')}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [("transformers-liquid des", ["describe"]), ("transformers-liquid generate --js", ["--json"])],
)
def test_a_shell_completes_commands_and_options(words, expected, monkeypatch, capsys):
    monkeypatch.setenv("_TRANSFORMERS_LIQUID_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0 and capsys.readouterr().out.split() == expected
