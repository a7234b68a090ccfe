"""Continued pretraining of a Liquid model: `transformers-liquid train --config train.yaml [--option value ...]`.

    accelerate launch --config_file fsdp2.yaml -m transformers_liquid train --config train.yaml

Options are those of [`ModelArguments`], [`DataArguments`] and [`LiquidTrainingArguments`], that is everything that
`transformers.TrainingArguments` has, in a YAML file, on the command line, or both (the command line wins). The defaults
are those of the paper (arXiv 2412.04332). The same command again continues a stopped run.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..codecs.vq_model import codec_identity
from ..data.collator import LiquidDataCollator
from ..data.mixture import drop_too_long, load_records, mix_records
from ..data.records import check_datasets_installed, content_of
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.liquid.processing_liquid import LiquidProcessor
from ..models.liquid.reference import adapter_base
from ..ops.merged_adapters import unload_adapters
from ..utils.files import differences, read_json, write_json
from .adapters import liquid_lora_config, liquid_rows_config
from .arguments import DataArguments, LiquidTrainingArguments, ModelArguments, parse_arguments
from .checkpoints import alone, last_complete_checkpoint, last_whole_checkpoint
from .trainer import LiquidTrainer, PreviewCallback


# What a run was started with: in the output folder, to be compared when it goes on.
SETUP_NAME = "training_setup.json"

# Of `TrainingArguments`, what decides where a run ends up.
_DECISIVE = [
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
]


def main(argv: Sequence[str]) -> None:
    """Trains as the arguments say, or goes on where a run of the same arguments stopped.

    Args:
        argv (`Sequence[str]`): The command line without the command.

    Raises:
        ValueError: On arguments or data that cannot be used, before training.
    """
    check_datasets_installed()
    *arguments, args = parse_arguments(argv)
    with alone(args):
        checkpoint = args.resume_from_checkpoint or last_whole_checkpoint(args.output_dir)
        trainer = build_trainer(*arguments, args)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            trainer.save_state()
        except Exception:
            traceback.print_exc()  # the command line prints one line alone
            raise
        if args.push_to_hub:
            trainer.push_to_hub()


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
    base = adapter_base(model_args.model)
    own = "full"
    if base is not None:
        from peft import PeftConfig, PeftModel

        own = "rows" if PeftConfig.from_pretrained(model_args.model).peft_type == "TRAINABLE_TOKENS" else "lora"
        if model_args.trainable not in (None, own):
            raise ValueError(
                f"{model_args.model} is an adapter: give trainable={own} to train it on, or train what "
                "`transformers-liquid merge` makes of it."
            )
    model_args.trainable = model_args.trainable or own
    model = LiquidForCausalLM.from_pretrained(
        base or model_args.model, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation
    )
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.set_deepspeed_weakref()
    processor = LiquidProcessor.from_pretrained(model_args.model)
    processor.check_fits(model.config)
    if model_args.max_z_loss_coef is not None:
        model.config.max_z_loss_coef = model_args.max_z_loss_coef
    if not args.resume_from_checkpoint:
        setup = dataclasses.asdict(model_args) | dataclasses.asdict(data_args)
        setup.pop("eval_datasets")
        setup["contents"] = [content_of(argument.rpartition("=")[0] or argument) for argument in data_args.datasets]
        check_setup(setup, args)

    # 2. What it is trained on
    names = ("unconditional_probability", "caption_probability", "max_length", "packing")
    collator = LiquidDataCollator(processor, seed=args.seed, **{name: getattr(data_args, name) for name in names})
    datasets = load_datasets(data_args, args, collator, codec_identity(model.model.vq_model))

    # 3. The trainer
    if base is not None:
        model.load_adapter(model_args.model)  # says what is wrong with it
        unload_adapters(model, merge=False)
        model = PeftModel.from_pretrained(model, model_args.model, is_trainable=True)
    elif model_args.trainable != "full":
        from peft import get_peft_model

        lora = {"r": model_args.lora_r, "lora_alpha": model_args.lora_alpha, "lora_dropout": model_args.lora_dropout}
        is_lora = model_args.trainable == "lora"
        model = get_peft_model(model, liquid_lora_config(model, **lora) if is_lora else liquid_rows_config(model))
    trainer = LiquidTrainer(model=model, args=args, data_collator=collator, processing_class=processor, **datasets)
    if args.preview_prompts:
        trainer.add_callback(PreviewCallback(trainer, args.preview_prompts, args.preview_steps))
    return trainer


def load_datasets(
    data_args: DataArguments, args: LiquidTrainingArguments, collator: LiquidDataCollator, codec_identity: str
) -> dict[str, Any]:
    """The mixture to train on, and the data sets to evaluate on by their names, as arguments of the Trainer."""

    def load(path: str, streaming: bool = False) -> Any:
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

    sources, weights = [], []
    for argument in data_args.datasets:
        path, equals, weight = argument.rpartition("=")
        try:
            weights += [float(weight)] if equals else []
        except ValueError as error:
            raise ValueError(f"A data set is given as PATH or PATH=WEIGHT, got {argument!r}.") from error
        sources.append(load(path if equals else argument, data_args.streaming))
    mixture = mix_records(sources, weights or None, seed=args.seed)

    eval_datasets = {}
    for argument in data_args.eval_datasets:
        name, equals, path = argument.partition("=")
        if not equals:
            raise ValueError(f"eval_datasets are given as NAME=PATH, got {argument!r}.")
        eval_datasets[name] = mix_records([load(path)], seed=args.seed)
    return {"train_dataset": mixture, "eval_dataset": eval_datasets or None}


def check_setup(setup: dict[str, Any], args: LiquidTrainingArguments) -> None:
    """Writes down what decides where the run ends up, or compares it with what an earlier part was started with.

    Args:
        setup (`dict`): The options of model and data, and what the data sets hold as `contents`.
        args ([`LiquidTrainingArguments`]): Of which some decide, too.

    Raises:
        ValueError: If the output folder holds checkpoints of a run with other settings, naming each of them.
    """
    setup = json.loads(json.dumps(setup | {name: getattr(args, name) for name in _DECISIVE}, default=str))
    path = Path(args.output_dir) / SETUP_NAME
    if last_complete_checkpoint(args.output_dir) is not None and path.is_file():
        before = {"contents": setup["contents"]} | read_json(path)  # those of former versions have none
        if different := differences(before, setup):
            raise ValueError(
                f"{args.output_dir} holds checkpoints of another run: {different}. Use these settings to go on, "
                "another output_dir to begin anew, or resume_from_checkpoint to go on with new settings on purpose."
            )
    elif args.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, setup)
