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
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from ..codecs.vq_model import codec_identity
from ..data.collator import LiquidDataCollator
from ..data.mixture import drop_too_long, load_records, mix_records
from ..data.records import NoCodesError, check_datasets_installed, content_of
from ..data.tokenize import tokenize_in_cache
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.liquid.processing_liquid import LiquidProcessor
from ..models.liquid.reference import adapter_base
from ..ops.merged_adapters import unload_adapters
from ..utils.files import differences, read_json, write_json
from ..utils.hub import naming
from .adapters import liquid_lora_config, liquid_rows_config
from .arguments import DataArguments, LiquidTrainingArguments, ModelArguments, parse_arguments
from .checkpoints import alone, last_complete_checkpoint, last_whole_checkpoint, progress
from .presets import EstimateCallback, look_at, preset_options
from .trainer import LiquidTrainer, PreviewCallback


logger = logging.get_logger(__name__)

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
    # Once without the data, so that wrong options are found before pictures become codes.
    model_args, data_args, args = parse_arguments(argv)
    with naming(model_args.model):  # before data are read
        LiquidProcessor.from_pretrained(model_args.model)
    records = use_codes(model_args, data_args)
    say = print if args.process_index == 0 else lambda text: None
    if model_args.preset is not None:
        of_data, chosen = look_at(records), {}

        def choose(given: dict[str, Any]) -> dict[str, Any]:
            chosen.update(preset_options(given, **of_data))
            return chosen

        model_args, _, args = parse_arguments(argv, choose=choose)
        values = vars(model_args) | vars(args)
        told = ", ".join(f"{name}={values[name]!r}" for name in chosen)
        say(f"preset {model_args.preset} for {of_data['num_records']:,} records: {told}")
    if model_args.dry_run:
        args.push_to_hub, args.report_to, args.preview_prompts, args.resume_from_checkpoint = False, [], [], None
        args.include_num_input_tokens_seen = "all"
    with TemporaryDirectory() if model_args.dry_run else nullcontext(args.output_dir) as args.output_dir, alone(args):
        checkpoint = args.resume_from_checkpoint or last_whole_checkpoint(args.output_dir)
        trainer = build_trainer(model_args, data_args, args)
        if model_args.preset is not None or model_args.dry_run:
            trainer.add_callback(EstimateCallback(model_args.dry_run))
        done, number = progress(args.output_dir)
        is_over = checkpoint and not args.resume_from_checkpoint and done >= number == progress(checkpoint)[0]
        is_over = is_over and any(Path(args.output_dir).glob("*.safetensors"))
        if is_over:
            say(f"already finished: {args.output_dir} holds the model after {done} steps.")
        elif checkpoint:
            say(f"resuming from step {progress(checkpoint)[0]}")
        try:
            if not is_over:
                trainer.train(resume_from_checkpoint=checkpoint)
            if not is_over and not model_args.dry_run:
                trainer.save_model()
                trainer.save_state()
        except Exception:
            traceback.print_exc()  # the command line prints one line alone
            raise
        if args.push_to_hub:
            trainer.push_to_hub()


def use_codes(model_args: ModelArguments, data_args: DataArguments) -> list[Any]:
    """Makes codes of pictures among the data sets, and names these in their place.

    Returns:
        The data sets to train on.

    Raises:
        ValueError, OSError: If they cannot be read.
    """
    if model_args.preset is not None and data_args.streaming:
        raise ValueError("A preset goes by the number of records, which a stream does not tell: leave out streaming.")
    model, grids = adapter_base(model_args.model) or model_args.model, data_args.grids

    def find(path: str, streaming: bool = False) -> tuple[str, Any]:
        try:
            return path, load_records(path, streaming=streaming)
        except NoCodesError:
            path = str(tokenize_in_cache(model, path, None if grids == "square" else grids))
            return path, load_records(path, streaming=streaming)

    records = []
    for index, argument in enumerate(data_args.datasets):
        path, equals, weight = argument.rpartition("=") if "=" in argument else (argument, "", "")
        path, dataset = find(path, data_args.streaming)
        data_args.datasets[index] = path + equals + weight
        records.append(dataset)
    for index, argument in enumerate(data_args.eval_datasets):
        name, equals, path = argument.partition("=")
        if equals:
            data_args.eval_datasets[index] = name + equals + find(path)[0]
    return records


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
        for name in ("eval_datasets", "preset", "dry_run", "grids"):  # what follows from these decides
            setup.pop(name)
        setup["contents"] = [content_of(argument.rpartition("=")[0] or argument) for argument in data_args.datasets]
        check_setup(setup, args)

    # 2. What it is trained on
    names = ("unconditional_probability", "caption_probability", "max_length", "packing")
    collator = LiquidDataCollator(processor, seed=args.seed, **{name: getattr(data_args, name) for name in names})
    datasets = load_datasets(data_args, args, collator, codec_identity(model.model.vq_model))
    if not data_args.streaming and (number := len(datasets["train_dataset"])) < args.total_batch_size:
        logger.warning(
            f"There are {number:,} records, fewer than the {args.total_batch_size:,} of a step (total_batch_size): each step is "
            f"a pass over all of them, and {args.num_train_epochs:g} epochs are as many steps. Choose a smaller one, or a preset."
        )

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
    if args.preview_prompts and args.preview_steps:
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
