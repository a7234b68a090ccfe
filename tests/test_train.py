"""`transformers-liquid train`: options, data and checkpoints are looked at before the work begins."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import CODEBOOK_SIZE, tiny_codec, tiny_model, tiny_pictures, tiny_processor

from transformers_liquid import LiquidForCausalLM, liquid_lora_config
from transformers_liquid.data.tokenize import tokenize_dataset
from transformers_liquid.models.liquid.image_processing_liquid import LiquidImageProcessor
from transformers_liquid.training.train import build_trainer, main, parse_arguments
from transformers_liquid_cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, records, and pictures tokenised with its codec and with another one."""
    folder = tmp_path_factory.mktemp("train")
    for name, seed in (("base", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_processor().save_pretrained(folder / name)
    pictures = LiquidImageProcessor(size=8, downsample_factor=2).postprocess(tiny_pictures(16))
    (folder / "pictures").mkdir()
    with open(folder / "pictures" / "metadata.jsonl", "w") as lines:
        for index, picture in enumerate(pictures):
            picture.save(folder / "pictures" / f"{index}.png")
            lines.write(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}) + "\n")
    for name in ("base", "other"):
        tokenize_dataset(
            model=str(folder / name),
            dataset="imagefolder",
            data_dir=str(folder / "pictures"),
            output=str(folder / f"codes-of-{name}"),
        )
    (folder / "alone").mkdir()
    pictures[0].save(folder / "alone" / "alone.png")
    (folder / "alone" / "metadata.jsonl").write_text("")
    with open(folder / "text.jsonl", "w") as lines:
        lines.writelines(json.dumps({"text": f"line {index}"}) + "\n" for index in range(16))
    return folder


def config(folder, output, **options):
    """A configuration file of a short run."""
    options = {
        "model": str(folder / "base"),
        "datasets": [f"{folder / 'codes-of-base'}=0.5", f"{folder / 'text.jsonl'}=0.5"],
        "output_dir": str(output),
        "max_length": 128,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "total_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    return ["--config", str(path)]


def moved_rows(folder, trained):
    """For each weight that changed, which of its rows did."""
    before = LiquidForCausalLM.from_pretrained(folder / "base").state_dict()
    after = trained.state_dict()
    changed = {
        name: (after[name] != weight).nonzero()[:, 0].unique().tolist()
        for name, weight in before.items()
        if weight.ndim
    }
    return {name: rows for name, rows in changed.items() if rows}


# Runs


def test_a_whole_run_from_a_configuration_file(folder, tmp_path, capfd):
    options = {
        "eval_datasets": [f"image={folder / 'codes-of-base'}", f"text={folder / 'text.jsonl'}"],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "preview_prompts": ["picture 1"],
    }
    assert cli(["train", *config(folder, tmp_path / "run", **options)]) == 0
    logs = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert {"eval_image_loss", "eval_image_image_accuracy", "eval_text_loss"} <= set().union(*logs)
    assert (tmp_path / "run" / "previews" / "step-000002.png").exists()
    model = LiquidForCausalLM.from_pretrained(tmp_path / "run")
    moved = moved_rows(folder, model)
    assert not any("vq_model" in name for name in moved)
    assert len(moved["model.text_model.model.embed_tokens.weight"]) > CODEBOOK_SIZE


def test_rows_alone_move_where_only_rows_are_trained(folder, tmp_path):
    main(config(folder, tmp_path / "run", trainable="rows"))
    model = LiquidForCausalLM.from_pretrained(tmp_path / "run")
    text = torch.randint(7, 250, (2, 9))
    base = LiquidForCausalLM.from_pretrained(folder / "base")
    offset = base.config.image_token_offset
    others = [index for index in range(offset) if index not in base.config.image_layout.special_image_token_ids]
    with torch.no_grad():
        assert torch.equal(model(text).logits[..., others], base(text).logits[..., others])
        assert not torch.allclose(model(text).logits[..., offset:], base(text).logits[..., offset:], atol=1e-3)


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["pictures", "pictures/metadata.jsonl"])
def test_pictures_become_codes_before_they_are_trained_on(folder, tmp_path, monkeypatch, name, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seen = {"eval_datasets": [f"seen={folder / name}"], "eval_strategy": "steps", "eval_steps": 1}
    main(config(folder, tmp_path / "run", datasets=[f"{folder / name}=1"], streaming=streaming, **seen))
    main(config(folder, tmp_path / "same", datasets=[str(folder / "codes-of-base")], streaming=streaming))
    found, expected = (LiquidForCausalLM.from_pretrained(tmp_path / run).state_dict() for run in ("run", "same"))
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_lora_trains_from_the_command_line(folder, tmp_path):
    main([*config(folder, tmp_path / "run"), "--trainable", "lora", "--lora_r", "2", "--max_z_loss_coef", "2e-4"])
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["r"] == 2 and saved["base_model_name_or_path"] == str(folder / "base")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_streaming_trains(folder, tmp_path):
    main(config(folder, tmp_path / "run", streaming=True))
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_stopped(folder, tmp_path):
    whole = config(folder, tmp_path / "whole", max_steps=4, save_steps=2)
    main(whole)
    script = (
        "import sys\n"
        "from transformers import TrainerCallback\n"
        "from transformers_liquid.training import train\n"
        "class Stop(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 3: sys.exit(9)\n"
        "built = train.build_trainer(*train.parse_arguments(sys.argv[1:]))\n"
        "built.add_callback(Stop())\n"
        "built.train()\n"
    )
    stopped = config(folder, tmp_path / "stopped", max_steps=4, save_steps=2)
    assert subprocess.run([sys.executable, "-c", script, *stopped], capture_output=True).returncode == 9
    assert sorted(path.name for path in (tmp_path / "stopped").glob("checkpoint-*")) == ["checkpoint-2"]
    main(stopped)
    expected = LiquidForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    found = LiquidForCausalLM.from_pretrained(tmp_path / "stopped").state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


# Options


def test_the_command_line_wins_over_the_file(folder, tmp_path):
    argv = config(folder, tmp_path / "run", learning_rate=0.5, lr_scheduler_type="constant")
    model_args, data_args, args = parse_arguments([*argv, "--learning_rate", "0.25", "--packing", "false"])
    assert (args.learning_rate, args.lr_scheduler_type, data_args.packing) == (0.25, "constant", False)
    assert model_args.model == str(folder / "base")


def test_a_file_holds_lists_mappings_and_switches(folder, tmp_path):
    options = {"report_to": ["tensorboard", "wandb"], "lr_scheduler_kwargs": {"num_cycles": 2}, "packing": False}
    argv = config(folder, tmp_path / "run", datasets="one", preview_prompts=["a b", "c"], lora_alpha=None, **options)
    _, data_args, args = parse_arguments(argv)
    assert (data_args.datasets, args.preview_prompts, data_args.packing) == (["one"], ["a b", "c"], False)
    assert (args.report_to, args.lr_scheduler_kwargs) == (["tensorboard", "wandb"], {"num_cycles": 2})


def test_the_defaults_are_those_of_the_paper(tmp_path):
    argv = ["--model", "m", "--datasets", "d", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, data_args, args = parse_arguments(argv)
    assert (args.learning_rate, args.total_batch_size, data_args.max_length) == (2e-5, 1024, 2048)
    assert args.lr_scheduler_type == "cosine"
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == 1024
    assert (data_args.caption_probability, data_args.unconditional_probability) == (0.2, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1.0}, "not used by the HfArgumentParser: .*--learning_rat=1.0"),
        ({"model": None}, "required: --model"),
        ({"total_batch_size": 3}, "total_batch_size=3 must be a multiple of 2"),
        ({"gradient_accumulation_steps": 4}, "leave out gradient_accumulation_steps, got 4"),
        ({"trainable": "some"}, "argument --trainable: invalid choice: 'some'"),
        ({"remove_unused_columns": True}, "would remove the codes"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(config(folder, tmp_path / "run", **options))


def test_a_bad_configuration_file_is_refused_in_one_line(tmp_path, capfd):
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert cli(["train", "--config", str(tmp_path / "list.yaml")]) == 2
    assert "must hold options as `name: value` lines" in capfd.readouterr().err
    assert cli(["train", "--config", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capfd.readouterr().err


# Data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ["{folder}/codes-of-other"]}, "codec"),
        ({"datasets": ["{folder}/nothing.jsonl"]}, "nothing.jsonl"),
        ({"datasets": ["{folder}/text.jsonl=half"]}, "PATH or PATH=WEIGHT"),
        ({"datasets": ["{folder}/text.jsonl=1", "{folder}/codes-of-base"]}, "one for each of the 2 data sets"),
        ({"streaming": True, "max_steps": -1}, "max_steps has to be specified"),
        ({"eval_strategy": "steps"}, "didn't pass an `eval_dataset`"),
        ({"eval_datasets": ["{folder}/text.jsonl"]}, "NAME=PATH"),
        ({"datasets": ["{folder}/alone"]}, "alone.png: it has no caption"),
        ({"datasets": ["{folder}/alone"], "streaming": True}, "alone.png: it has no caption"),
        ({"eval_datasets": ["seen={folder}/alone"], "eval_strategy": "steps"}, "alone.png: it has no caption"),
        ({"max_length": 10}, "16 of the 16 records of .* do not fit into max_length=10"),
    ],
)
def test_bad_data_is_refused(folder, tmp_path, options, message):
    options = {
        name: [item.format(folder=folder) for item in value] if isinstance(value, list) else value
        for name, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        main(config(folder, tmp_path / "run", **options))


@pytest.mark.parametrize("trainable", ["lora", "rows"])
def test_an_adapter_is_trained_on(folder, tmp_path, trainable):
    options = {"trainable": trainable, "lora_r": 2}
    main(config(folder, tmp_path / "first", **options))
    main(config(folder, tmp_path / "second", model=str(tmp_path / "first")))
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second"))
    different = {name for name in first if first[name] != second[name]}
    assert different <= {"target_modules", "task_type", "inference_mode"} and second["base_model_name_or_path"]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert {name: weight.shape for name, weight in first.items()} == {name: second[name].shape for name in second}
    assert all(not torch.equal(weight, second[name]) for name, weight in first.items())
    # It began where the first part ended, not anew: with a learning rate of nothing, nothing changes.
    main(config(folder, tmp_path / "still", model=str(tmp_path / "first"), trainable=trainable, learning_rate=0.0))
    still = load_file(tmp_path / "still" / "adapter_model.safetensors")
    assert all(torch.equal(weight, still[name]) for name, weight in first.items())


@pytest.mark.parametrize(("trainable", "wanted"), [("full", "lora"), ("rows", "lora")])
def test_an_adapter_is_trained_on_as_what_it_is(folder, tmp_path, trainable, wanted):
    model = LiquidForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, liquid_lora_config(model)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter is an adapter: give trainable={wanted} to train it on, or .*merge"):
        main(config(folder, tmp_path / "run", model=str(tmp_path / "adapter"), trainable=trainable))


def test_a_second_run_in_an_output_folder_is_refused_and_leaves_the_first_alone(folder, tmp_path, capfd):
    argv = config(folder, tmp_path / "run")
    script = (
        "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1] + '/.lock'): print(flush=True); input()"
    )
    (tmp_path / "run").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], **pipes) as first:
        first.stdout.readline()
        assert cli(["train", *argv]) == 2
        assert "Another process is writing to" in capfd.readouterr().err
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        first.communicate(b"\n")
    main(argv)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_records_that_are_too_long_are_dropped_on_request_only(folder, tmp_path):
    rows = [{"kind": "text", "text": f"line {index}"} for index in range(3)]
    rows.append({"kind": "text_to_image", "text": "picture", "codes": list(range(16)), "grid": [4, 4]})
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = config(folder, tmp_path / "run", datasets=[str(tmp_path / "mixed.jsonl")], max_length=15)
    with pytest.raises(ValueError, match=r"1 of the 4 records of .*mixed\.jsonl do not fit into max_length=15"):
        build_trainer(*parse_arguments(argv))
    argv = [*argv, "--too_long", "drop", "--output_dir", str(tmp_path / "dropped")]
    assert [record["kind"] for record in build_trainer(*parse_arguments(argv)).train_dataset] == ["text"] * 3


def test_a_run_does_not_go_on_with_other_settings(folder, tmp_path):
    argv = config(folder, tmp_path / "run", save_steps=1)
    main(argv)
    with pytest.raises(
        ValueError, match=r"of another run: caption_probability was 0\.2 and is now 0\.5; learning_rate was 0\.01"
    ):
        main([*argv, "--learning_rate", "0.1", "--caption_probability", "0.5"])
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()
    main([*argv, "--logging_steps", "1"])  # this one decides nothing


def test_a_run_does_not_go_on_with_other_records_under_the_same_name(folder, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"kind": "text", "text": "red"}\n' * 4)
    argv = config(folder, tmp_path / "run", datasets=[str(file)], save_steps=1)
    main(argv)
    file.write_text('{"kind": "text", "text": "blue"}\n' * 4)
    with pytest.raises(ValueError, match="of another run: contents was "):
        main(argv)


def test_the_codec_of_the_model_is_not_trained(folder, tmp_path):
    main(config(folder, tmp_path / "run"))
    codec = LiquidForCausalLM.from_pretrained(tmp_path / "run").model.vq_model.state_dict()
    assert all(torch.equal(weight, codec[name]) for name, weight in tiny_codec().state_dict().items())
