"""The options of `transformers-liquid train`: of a YAML file, of the command line, or of both."""

# ruff: noqa: RUF009 (`HfArg` makes fields)

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from ..checkpoints import find_checkpoint
from ..utils.files import read_yaml
from .presets import preset_options


# Options of `TrainingArguments` and of its `accelerator_config` that these models and batches cannot meet: what they may
# be, and why nothing else. All others work.
_LIMITED: dict[str, tuple[tuple, str]] = {
    "remove_unused_columns": ((False,), "it would remove the codes before the collator reads them"),
    "label_names": ((None, ["labels"]), "the collator calls them labels"),
    "label_smoothing_factor": (
        (0,),
        "the loss needs no logits of a whole batch, smoothing does: `transformers.Trainer` can",
    ),
    "use_liger_kernel": ((False,), "it knows built-in models only, and would change nothing here"),
    "bf16_full_eval": ((False,), "it would round the weights for good, the codec's too; bf16 evaluates in bf16"),
    "fp16_full_eval": ((False,), "it would round the weights for good, the codec's too; fp16 evaluates in fp16"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "records have no length before the collator; packing needs none",
    ),
    "debug": (([],), "its hooks know no name for the parts that the loss is computed with; NaN stops the run anyway"),
    "split_batches": ((False,), "per_device_train_batch_size counts the records of one process"),
    "dispatch_batches": ((None, False), "sequences of different lengths cannot be cut out of one process's batch"),
    "parallelism_config": ((None,), "sequences and layers are not split over processes: use FSDP or DeepSpeed"),
    "n_gpu": ((0, 1), "each GPU needs a process of its own: start with `accelerate launch`, or show one GPU only"),
}


# What a preset goes by, if it is given.
PRESET_INPUTS = {"preset": str, "total_batch_size": int, "per_device_train_batch_size": int}


def check_arguments(args: TrainingArguments) -> None:
    """Refuses the options of the Trainer that would train or measure something else than they say.

    Raises:
        ValueError: Naming the option, and why.
    """
    options = vars(args.accelerator_config) | vars(args) | {"n_gpu": args.n_gpu}
    for name, (allowed, why) in _LIMITED.items():
        # Not every version of transformers has each of them.
        if (value := options.get(name, allowed[0])) not in allowed:
            raise ValueError(f"{name}={value!r} cannot be used: {why}. It must be {' or '.join(map(repr, allowed))}.")


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = HfArg(help="A saved Liquid model: a folder or a name on the Hub.")
    preset: Literal["full", "lora", "rows"] | None = HfArg(
        default=None,
        help="What is trained, with options that suit the number of records; those that are given win.",
    )
    dry_run: bool = HfArg(
        default=False,
        help="Try three steps, say how long all of them take and what memory, and stop. Nothing is saved.",
    )
    trainable: Literal["full", "lora", "rows"] | None = HfArg(
        default=None,
        help="What moves: the whole language model; LoRA on its linear layers, and the image rows; or these rows alone. "
        "Defaults to full, and for an adapter as the model to what it trains.",
    )
    lora_r: int = HfArg(default=64, help="Rank of LoRA.")
    lora_alpha: int | None = HfArg(default=None, help="Scale of LoRA. Defaults to twice the rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout of LoRA.")
    dtype: str = HfArg(default="float32", help="Of the weights. With --bf16, fp32 weights are autocast.")
    attn_implementation: str | None = HfArg(default=None, help="sdpa, eager, flash_attention_2, ...")
    max_z_loss_coef: float | None = HfArg(default=None, help="Weight of the max-z loss. Defaults to the model's.")

    def __post_init__(self):
        self.model = find_checkpoint(self.model)


@dataclass
class DataArguments:
    """What it is trained on."""

    datasets: list[str] = HfArg(
        help="PATH or PATH=WEIGHT of each data set: an output of `transformers-liquid tokenize`, a JSON-lines or parquet "
        "file of records, or a name on the Hub. Pictures with captions are tokenized first."
    )
    grids: Literal["square", "common"] = HfArg(
        default="square", help="Of pictures that are tokenized first: the model's square, or from 16:9 to 9:16."
    )
    eval_datasets: list[str] = HfArg(default_factory=list, help="NAME=PATH of each data set to evaluate on.")
    streaming: bool = HfArg(default=False, help="Read while training instead of before; needs max_steps.")
    max_length: int = HfArg(default=2048, help="Longest record in tokens.")
    too_long: Literal["raise", "drop"] = HfArg(default="raise", help="What happens to records that do not fit.")
    packing: bool = HfArg(default=True, help="Put the records of a batch into one sequence without pads.")
    unconditional_probability: float = HfArg(default=0.1, help="Rate of pictures drawn from no text.")
    caption_probability: float = HfArg(default=0.2, help="Rate of pairs turned into captions.")


@dataclass
class LiquidTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults."""

    learning_rate: float = HfArg(default=2e-5, help="Peak learning rate.")
    lr_scheduler_type: str = HfArg(default="cosine", help="cosine, constant, ...")
    total_batch_size: int = HfArg(default=1024, help="Records in each step, of all processes and accumulated.")
    max_grad_norm: float | None = HfArg(default=None, help="Gradient clipping. Defaults to 1.0, from 7B on to 0.5.")
    report_to: list[str] = HfArg(default_factory=lambda: ["none"], help="none, all, tensorboard, wandb, ...")
    preview_prompts: list[str] = HfArg(default_factory=list, help="What to draw while training.")
    preview_steps: float = HfArg(
        default=500, help="Steps between two sheets of previews; below 1, a share of all steps; 0 for no previews."
    )
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator chooses.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="A loss that is not finite stops the run.")

    def __post_init__(self):
        super().__post_init__()
        check_arguments(self)
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size=True would change total_batch_size: leave it out.")
        at_once = self.per_device_train_batch_size * self.world_size
        if self.total_batch_size % at_once or self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} must be a multiple of {at_once}, the records of all processes at "
                "once. It decides how often gradients are accumulated: leave out gradient_accumulation_steps, got "
                f"{self.gradient_accumulation_steps}."
            )
        self.gradient_accumulation_steps = self.total_batch_size // at_once


def parse_arguments(
    argv: Sequence[str],
    options: Sequence[type] = (ModelArguments, DataArguments, LiquidTrainingArguments),
    prog: str = "transformers-liquid train",
    choose: Callable[[dict[str, Any]], dict[str, Any]] = preset_options,
) -> tuple[Any, ...]:
    """Options of a YAML file (`--config`) and of the command line, which wins.

    Args:
        argv (`Sequence[str]`): The command line without the command.
        options (sequence of dataclasses): What there is.
        prog (`str`): What help is about.
        choose: From those of `PRESET_INPUTS` that are given, the values of options that are not.

    Returns:
        One of each of the dataclasses.

    Raises:
        ValueError: On an unknown, missing or wrong option, naming it.
    """
    finder = _Parser([], prog=prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, help="a YAML file with any of the options below")
    file = finder.parse_known_args(args=list(argv))[0].config
    # As if they stood on the command line before all that does.
    words = [*_as_words({} if file is None else read_yaml(file)), *argv]
    peeker = _Parser([], prog=prog, add_help=False, allow_abbrev=False)
    for name, kind in PRESET_INPUTS.items():
        peeker.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=kind)
    words = [*_as_words(choose(vars(peeker.parse_known_args(args=words)[0]))), *words]
    parser = _Parser(options, prog=finder.prog, parents=[finder], allow_abbrev=False)
    *arguments, _ = parser.parse_args_into_dataclasses(args=words)
    return tuple(arguments)


def _as_words(options: dict[str, Any]) -> list[str]:
    """Options as they stand on a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


class _Parser(HfArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")
