"""Two processes, as `examples/accelerate/` starts them, against one: over gloo on a CPU.

Run as a script, this file is what two processes run under FSDP2.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor

from transformers_liquid import LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor
from transformers_liquid.ops import chunked_loss as loss_liquid
from transformers_liquid.training import train


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"

# Epsilon is large, since Adam turns the rounding of a gradient near zero into a whole step.
SETTINGS = {
    "total_batch_size": 8,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,
    "packing": True,
    "use_cpu": True,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_processes_log_and_learn_what_one_does(tmp_path):
    # 13 records to evaluate on, 3 on each process at a time: the last round is one of 1 and 0.
    data = {"datasets": [write_records(tmp_path / "train.jsonl", 40)], **EVALUATION}
    data["eval_datasets"] = [f"held_out={write_records(tmp_path / 'eval.jsonl', 13)}"]
    # Only the first process draws, while the other one waits for it.
    data |= {"preview_prompts": ["red apple"], "preview_steps": 2}
    model = save_model(tmp_path / "model")
    one = write_config(tmp_path / "one", model=model, per_device_train_batch_size=4, **data)
    two = write_config(tmp_path / "two", model=model, per_device_train_batch_size=2, **data)
    train.main(["--config", one])
    launch("ddp.yaml", "-m", "transformers_liquid", "train", "--config", two)

    assert_same_logs(tmp_path / "one", tmp_path / "two")
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-5)
    assert len(list((tmp_path / "two" / "previews").iterdir())) == 3


@pytest.mark.slow
def test_fsdp2_shards_learns_the_same_and_saves_repositories_that_draw(tmp_path):
    data = {"datasets": [write_records(tmp_path / "train.jsonl", 40)], **EVALUATION}
    data["eval_datasets"] = [f"held_out={write_records(tmp_path / 'eval.jsonl', 13)}"]
    tied, untied = save_model(tmp_path / "model"), save_model(tmp_path / "untied-model", tied=False)
    runs = {
        "tied": {"model": tied},
        "untied": {"model": untied},
        "lora": {"model": untied, "trainable": "lora", "lora_r": 4},
    }
    for name, run in runs.items():
        train.main(["--config", write_config(tmp_path / f"one-{name}", per_device_train_batch_size=4, **data, **run)])
    configs = [
        write_config(tmp_path / f"two-{name}", per_device_train_batch_size=2, **data, **run)
        for name, run in runs.items()
    ]
    from_checkpoint = {"model": tied, "resume_from_checkpoint": str(tmp_path / "two-tied" / "checkpoint-2")}
    configs.append(write_config(tmp_path / "two-again", per_device_train_batch_size=2, **data, **from_checkpoint))
    lora_on_tied = {"model": tied, "trainable": "lora", "per_device_train_batch_size": 2}
    refused = write_config(tmp_path / "refused", **data, **lora_on_tied)
    output = launch("fsdp2.yaml", __file__, *configs, refused)

    # Everything is in shards, but for the codec.
    assert output.count("sharded: all but the codec") == len(configs)
    assert "refused: FSDP cannot shard LoRA on a base whose head is tied" in output
    for name in runs:
        assert_same_logs(tmp_path / f"one-{name}", tmp_path / f"two-{name}")
        expected = weights(tmp_path / f"one-{name}")
        torch.testing.assert_close(weights(tmp_path / f"two-{name}"), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights(tmp_path / "two-again"), weights(tmp_path / "two-tied"), rtol=0, atol=0)

    checkpoint = tmp_path / "two-tied" / "checkpoint-2"
    model, processor = LiquidForCausalLM.from_pretrained(checkpoint), LiquidProcessor.from_pretrained(checkpoint)
    pipe = LiquidImageGenerationPipeline(model=model, processor=processor)
    assert pipe(["red apple"], seed=0)[0].size == (8, 8)
    codec = LiquidForCausalLM.from_pretrained(tied).model.vq_model.state_dict()
    torch.testing.assert_close(model.model.vq_model.state_dict(), codec, rtol=0, atol=0)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_the_result_is_identical(tmp_path):
    data = {"datasets": [write_records(tmp_path / "train.jsonl", 40)], "model": save_model(tmp_path / "model")}
    data |= {"max_steps": 12, "per_device_train_batch_size": 2}
    whole, killed = write_config(tmp_path / "whole", **data), write_config(tmp_path / "killed", **data)
    command = [sys.executable, "-m", "transformers_liquid", "train", "--config", killed]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "killed" / "checkpoint-2" / "trainer_state.json", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint-12").exists()

    train.main(["--config", whole])
    train.main(["--config", killed])
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), rtol=0, atol=0)
    assert logs(tmp_path / "killed") == logs(tmp_path / "whole")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_ends_all(tmp_path):
    records = [{"kind": "text", "text": "abc"} for _ in range(16)]
    records[5]["text"] = "a~c"
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    model, tilde = tiny_model(tied=False), tiny_processor().tokenizer.encode("~")[0]
    model.get_input_embeddings().weight.data[tilde] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    config = write_config(
        tmp_path / "run", model=str(tmp_path / "model"), datasets=[str(path)], per_device_train_batch_size=1
    )
    output = launch("ddp.yaml", "-m", "transformers_liquid", "train", "--config", config, returncode=1)
    assert "The loss is nan in step" in output and "index [" in output


def test_the_zero3_configuration_is_one_that_accelerate_knows():
    config = ClusterConfig.from_yaml_file(CONFIGS / "zero3.yaml")
    assert config.distributed_type == DistributedType.DEEPSPEED
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert set(config.deepspeed_config) <= set(options)
    assert (config.deepspeed_config["zero_stage"], config.deepspeed_config["zero3_save_16bit_model"]) == (3, True)


def save_model(path: Path, tied: bool = True) -> str:
    tiny_model(tied=tied).save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return str(path)


def write_records(path: Path, number: int) -> str:
    """Texts, pictures and captions of unlike lengths."""
    generator = torch.Generator().manual_seed(number)
    records = []
    for index in range(number):
        record = {"kind": ("text", "text_to_image", "caption")[index % 3], "text": "abcdefghijklmnop"[: 2 + index % 11]}
        if index % 3:
            record["codes"] = torch.randint(16, (16,), generator=generator).tolist()
        records.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_config(output_dir: Path, **settings) -> str:
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(output_dir), **settings}))
    return str(path)


def environment() -> dict[str, str]:
    source = Path(train.__file__).parents[2]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(source), str(Path(__file__).parent)]),
    }


def launch(config: str, *command: str, returncode: int = 0) -> str:
    """What two processes print, started by accelerate as a configuration of `examples/` says, but in fp32."""
    options = ["--config_file", str(CONFIGS / config), "--num_processes", "2", "--mixed_precision", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    result = subprocess.run(
        [*launcher, *command],
        env=environment(),
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == returncode, result.stdout
    return result.stdout


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or not path.stat().st_size:  # written, not only opened
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = output_dir.glob("*.safetensors")
    return load_file(path)


def logs(output_dir: Path) -> list[dict[str, float]]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    # Of a run that went on, the mean is over the part since then.
    varying = ("runtime", "per_second", "total_flos", "train_loss")
    return [{name: value for name, value in log.items() if not name.endswith(varying)} for log in state["log_history"]]


def assert_same_logs(one: Path, two: Path) -> None:
    for expected, log in zip(logs(one), logs(two), strict=True):
        assert log == pytest.approx(expected, abs=1e-5)


def train_sharded(configs: list[str]) -> None:
    # Several chunks, and not as many on each process.
    loss_liquid.MAX_CHUNK_LOGITS = 3000
    parse_arguments, build_trainer = train.parse_arguments, train.build_trainer
    trainers = []

    def parse_and_allow_fsdp(argv):
        arguments = parse_arguments(argv)
        # accelerate leaves FSDP out on CPUs, though torch has it there. All that follows is as on GPUs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    def build_and_keep(*arguments):
        trainers.append(build_trainer(*arguments))
        return trainers[-1]

    train.parse_arguments, train.build_trainer = parse_and_allow_fsdp, build_and_keep
    for config in configs:
        try:
            train.main(["--config", config])
        except ValueError as error:
            print(f"refused: {error}", flush=True)
            continue
        state_dict = trainers[-1].model.state_dict()
        whole = {
            name for name, tensor in state_dict.items() if not isinstance(tensor, torch.distributed.tensor.DTensor)
        }
        if PartialState().is_main_process and whole == {name for name in state_dict if "vq_model." in name}:
            print("sharded: all but the codec", flush=True)


if __name__ == "__main__":
    train_sharded(sys.argv[1:])
