"""Continued pretraining of a Liquid model: `transformers-liquid train --config train.yaml [--option value ...]`.

    accelerate launch --config_file fsdp2.yaml -m transformers_liquid train --config train.yaml

Options are those of [`ModelArguments`], [`DataArguments`] and [`LiquidTrainingArguments`], that is everything that
`transformers.TrainingArguments` has, in a YAML file, on the command line, or both (the command line wins). The defaults
are those of the paper (arXiv 2412.04332). The same command again continues a stopped run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..codecs.vq_model import codec_identity
from ..data.collator import LiquidDataCollator
from ..data.manifest import check_datasets_installed
from ..data.mixture import drop_too_long, load_records, mix_records
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.liquid.processing_liquid import LiquidProcessor
from ..utils.files import differences, write_json
from .adapters import liquid_lora_config, liquid_rows_config
from .trainer import LiquidTrainer, PreviewCallback


TRAINABLE = ("full", "lora", "rows")
TOO_LONG = ("raise", "drop")

# What a run was started with: in the output folder, to be compared when it goes on.
SETUP_NAME = "training_setup.json"

# Of `TrainingArguments`, what decides where a run ends up.
_DECISIVE = (
    "total_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
)


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(metadata={"help": "A saved Liquid model: a folder or a name on the Hub."})
    trainable: str = field(
        default="full",
        metadata={
            "help": "What moves: the whole language model, LoRA on its linear layers with the image rows, or these rows alone.",
            "choices": TRAINABLE,
        },
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of LoRA."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of LoRA. Defaults to twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights. With --bf16, fp32 weights are autocast."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    max_z_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the max-z loss (2e-4 in Baichuan 2). Defaults to the model's."}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    datasets: list[str] = field(
        metadata={
            "help": "PATH or PATH=WEIGHT of each data set: an output of `transformers-liquid tokenize`, a JSON-lines or "
            "parquet file of records, or a name on the Hub."
        }
    )
    eval_datasets: list[str] = field(
        default_factory=list, metadata={"help": "NAME=PATH of each data set to evaluate on."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of before; needs max_steps."})
    max_length: int = field(default=2048, metadata={"help": "Longest record in tokens."})
    too_long: str = field(
        default="raise",
        metadata={"help": "What to do with records whose image does not fit.", "choices": TOO_LONG},
    )
    packing: bool = field(default=True, metadata={"help": "Put the records of a batch into one row without pads."})
    unconditional_probability: float = field(default=0.1, metadata={"help": "Rate of pictures drawn from no text."})
    caption_probability: float = field(default=0.2, metadata={"help": "Rate of pairs turned into captions."})


@dataclass
class LiquidTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine, constant, ..."})
    total_batch_size: int = field(
        default=1024,
        metadata={"help": "Records in each step, over all processes; reached by accumulating gradients."},
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Gradient clipping. Defaults to 1.0, for 7B parameters and more to 0.5."}
    )
    preview_prompts: list[str] = field(default_factory=list, metadata={"help": "What to draw while training."})
    preview_steps: int = field(default=500, metadata={"help": "Steps between two sheets of previews."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator chooses."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite stops the run."})

    def __post_init__(self):
        # Rows of different lengths cannot be cut out of one process's batch.
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} follows from total_batch_size, "
                "per_device_train_batch_size and the number of processes: set total_batch_size instead."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove the codes: leave it out.")
        at_once = self.per_device_train_batch_size * self.world_size
        if self.total_batch_size % at_once:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} is no multiple of {at_once}: {self.per_device_train_batch_size} "
                f"records on each of {self.world_size} processes. Change per_device_train_batch_size or total_batch_size."
            )
        self.gradient_accumulation_steps = self.total_batch_size // at_once


def main(argv: Sequence[str]) -> None:
    """Trains as the arguments say, or goes on where a run of the same arguments stopped.

    Args:
        argv (`Sequence[str]`): The command line without the command.

    Raises:
        ValueError: On arguments or data that cannot be used, before training.
    """
    check_datasets_installed()
    trainer = build_trainer(*parse_arguments(argv))
    checkpoint = trainer.args.resume_from_checkpoint or last_complete_checkpoint(trainer.args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
    except Exception:
        traceback.print_exc()  # the command line prints one line alone
        raise
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, LiquidTrainingArguments]:
    """Options of a YAML file (`--config`) and of the command line, which wins.

    Raises:
        ValueError: On an unknown or missing option, naming it.
    """
    parser = _Parser((ModelArguments, DataArguments, LiquidTrainingArguments), prog="transformers-liquid train")
    parser.add_argument("--config", type=Path, help="a YAML file with any of the options below")
    config = _read_config(argv)
    known = {action.dest: action for action in parser._actions}
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(f"The configuration has unknown options: {', '.join(unknown)}. `train --help` lists them all.")
    for name, value in config.items():
        known[name].required = False
        if known[name].nargs in ("+", "*") and not isinstance(value, list):
            raise ValueError(f"The option {name} of the configuration must be a list, got {value!r}.")
        if known[name].choices is not None and value not in known[name].choices:
            raise ValueError(f"The option {name} must be one of {', '.join(known[name].choices)}, got {value!r}.")
    parser.set_defaults(**config)
    *arguments, _ = parser.parse_args_into_dataclasses(args=list(argv))
    return tuple(arguments)


def build_trainer(model_args: ModelArguments, data_args: DataArguments, args: LiquidTrainingArguments) -> LiquidTrainer:
    """Model, data and trainer; everything that can be wrong is found out here.

    Raises:
        ValueError: If the arguments, the data or the checkpoints in the output folder do not go together.
    """
    set_seed(args.seed)
    # 1. What is trained
    if args.deepspeed_plugin is not None:
        # Loaded whole, and spread over the processes later: before, its codec and its packing are looked at.
        unset_hf_deepspeed_config()
    model = LiquidForCausalLM.from_pretrained(
        model_args.model, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation
    )
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.set_deepspeed_weakref()
    processor = LiquidProcessor.from_pretrained(model_args.model)
    processor.check_fits(model.config)
    if model_args.max_z_loss_coef is not None:
        model.config.max_z_loss_coef = model_args.max_z_loss_coef
    if not args.resume_from_checkpoint:
        check_setup(model_args, data_args, args)

    # 2. What it is trained on
    collator = LiquidDataCollator(
        processor,
        unconditional_probability=data_args.unconditional_probability,
        caption_probability=data_args.caption_probability,
        max_length=data_args.max_length,
        packing=data_args.packing,
        seed=args.seed,
    )
    identity = codec_identity(model.model.vq_model)
    train_dataset, eval_datasets = load_datasets(data_args, args, collator, identity)

    # 3. The trainer
    if model_args.trainable != "full":
        model = _with_adapters(model, model_args)
    trainer = LiquidTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets or None,
        processing_class=processor,
    )
    if args.preview_prompts:
        trainer.add_callback(PreviewCallback(trainer, args.preview_prompts, args.preview_steps))
    return trainer


def load_datasets(
    data_args: DataArguments, args: LiquidTrainingArguments, collator: LiquidDataCollator, codec_identity: str
) -> tuple[Any, dict[str, Any]]:
    """The mixture to train on, and the data sets to evaluate on by their names."""

    def load(path: str, streaming: bool) -> Any:
        dataset = load_records(path, streaming=streaming, codec_identity=codec_identity)
        if streaming and data_args.too_long == "raise":
            return dataset  # the collator says it when it meets one
        fitting = drop_too_long(dataset, collator)
        if data_args.too_long == "raise" and len(fitting) < len(dataset):
            raise ValueError(
                f"{len(dataset) - len(fitting)} of the {len(dataset)} records of {path} do not fit into max_length="
                f"{data_args.max_length}. Raise max_length, or leave them out with too_long=drop."
            )
        return fitting

    pairs = [_split_weight(dataset) for dataset in data_args.datasets]
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        raise ValueError(f"Give every data set a weight or none: got {', '.join(data_args.datasets)}.")
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("With streaming, the length of the data is unknown: set max_steps.")
    mixture = mix_records([load(path, data_args.streaming) for path, _ in pairs], weights or None, seed=args.seed)

    eval_datasets = {}
    for argument in data_args.eval_datasets:
        name, equals, path = argument.partition("=")
        if not equals:
            raise ValueError(f"eval_datasets are given as NAME=PATH, got {argument!r}.")
        eval_datasets[name] = mix_records([load(path, False)], None, seed=args.seed)
    if args.eval_strategy != "no" and not eval_datasets:
        raise ValueError(f"eval_strategy={args.eval_strategy} needs eval_datasets (NAME=PATH).")
    return mixture, eval_datasets


def check_setup(model_args: ModelArguments, data_args: DataArguments, args: LiquidTrainingArguments) -> None:
    """Writes down what decides where the run ends up, or compares it with what an earlier part was started with.

    Raises:
        ValueError: If the output folder holds checkpoints of a run with other settings, naming each of them.
    """
    setup = dataclasses.asdict(model_args) | dataclasses.asdict(data_args)
    setup |= {name: getattr(args, name) for name in _DECISIVE}
    setup.pop("eval_datasets")
    setup = json.loads(json.dumps(setup, default=str))
    path = Path(args.output_dir) / SETUP_NAME
    if last_complete_checkpoint(args.output_dir) is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if different := differences(before, setup):
            raise ValueError(
                f"{args.output_dir} holds checkpoints of another run: {different}. Use these settings to go on, "
                "another output_dir to begin anew, or resume_from_checkpoint to go on with new settings on purpose."
            )
    elif args.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, setup)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; its state comes last."""
    checkpoints = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))) if checkpoints else None


class _Parser(HfArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _read_config(argv: Sequence[str]) -> dict[str, Any]:
    finder = _Parser([], add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(args=list(argv))[0].config
    if path is None:
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines.")
    return config


def _split_weight(dataset: str) -> tuple[str, float | None]:
    path, equals, weight = dataset.rpartition("=")
    if not equals:
        return dataset, None
    try:
        return path, float(weight)
    except ValueError as error:
        raise ValueError(f"A data set is given as PATH or PATH=WEIGHT, got {dataset!r}.") from error


def _with_adapters(model: LiquidForCausalLM, model_args: ModelArguments) -> Any:
    from peft import get_peft_model

    if model_args.trainable == "rows":
        return get_peft_model(model, liquid_rows_config(model))
    config = liquid_lora_config(
        model, r=model_args.lora_r, lora_alpha=model_args.lora_alpha, lora_dropout=model_args.lora_dropout
    )
    return get_peft_model(model, config)


if __name__ == "__main__":
    main(sys.argv[1:])
