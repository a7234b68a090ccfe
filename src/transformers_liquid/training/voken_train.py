"""The two stages of MiniGPT-5 (arXiv 2310.02239): `transformers-liquid voken train --config stage1.yaml [--option value ...]`.

Options are those of [`VokenArguments`] and [`VokenTrainingArguments`], and so of `transformers.TrainingArguments`. The same
command again continues a stopped run; what it trained becomes a whole pipeline in the output folder.
"""

# ruff: noqa: RUF009 (`HfArg` makes fields)

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import torch
from transformers import set_seed
from transformers.hf_argparser import HfArg

from ..checkpoints import find_checkpoint
from ..data.records import content_of
from ..data.voken_collator import VokenDataCollator, story_samples
from ..data.voken_records import load_voken_records
from ..models.liquid.reference import naming
from ..models.voken.configuration_voken import VokenConfig
from ..models.voken.processing_voken import VokenProcessor
from ..models.voken.prompts import STORY_PROMPTS
from ..pipelines.interleaved_voken import InterleavedVokenPipeline
from ..utils.optional import require
from .adapters import voken_lora_config, voken_stage1_config
from .arguments import LiquidTrainingArguments, parse_arguments
from .checkpoints import alone, last_whole_checkpoint
from .train import check_setup
from .voken_trainer import VokenPreviewCallback, VokenTrainer


# Options of a run that are not what is saved with the model.
WEIGHTS = ("text_loss_weight", "image_loss_weight", "caption_loss_weight")
# What one of the stages alone knows.
OF_STAGE = {1: ("caption_loss_weight",), 2: ("lora_r", "lora_alpha", "lora_dropout", "target_modules")}


@dataclass
class VokenArguments:
    """What is trained, and on what."""

    model: str = HfArg(help="What `voken add`, or an earlier stage, made: a folder or a name on the Hub.")
    datasets: list[str] = HfArg(help="Files of CC3M, VIST, MMDialog, or of records.")
    stage: Literal[1, 2] = HfArg(
        default=1, help="1: vokens and mapper, with captions. 2: vokens, LoRA and the mapper's encoder and decoder."
    )
    image_folder: str | None = HfArg(default=None, help="Where paths of pictures begin; else in the files' folders.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Of what is frozen.")
    text_loss_weight: float | None = HfArg(default=None, help="In this run. Defaults to the model's, as the next two.")
    image_loss_weight: float | None = HfArg(default=None, help="0 needs no diffusion model in a step.")
    caption_loss_weight: float | None = HfArg(default=None, help="In stage 1.")
    story_tasks: list[str] = HfArg(default_factory=lambda: list(STORY_PROMPTS), help="Of image, multimodal, text.")
    flip_probability: float = HfArg(default=0.0, help="How often the pictures of a record are mirrored.")
    frozen_mapper_parts: list[str] = HfArg(
        default_factory=list, help="Of the mapper, what does not learn, such as query or encoder_decoder.encoder."
    )
    max_length: int | None = HfArg(default=None, help="Longest sequence; longer ones are refused.")
    lora_r: int = HfArg(default=8, help="Rank of LoRA.")
    lora_alpha: int = HfArg(default=16, help="Scale of LoRA.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout of LoRA.")
    target_modules: str | None = HfArg(default=None, help="Layers for LoRA, as an expression; else q_proj, v_proj.")

    def __post_init__(self):
        self.model = find_checkpoint(self.model)


@dataclass
class VokenTrainingArguments(LiquidTrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults."""

    learning_rate: float = HfArg(default=2e-4, help="Peak learning rate.")
    lr_scheduler_type: str = HfArg(default="linear", help="cosine, constant, ...")
    warmup_steps: float = HfArg(default=1000, help="Steps to the peak.")
    total_batch_size: int = HfArg(default=48, help="Records in each step, of all processes and accumulated.")
    hub_strategy: str = HfArg(default="end", help="Must stay end: what is pushed is the whole pipeline.")

    def __post_init__(self):
        super().__post_init__()
        if self.push_to_hub and (self.hub_strategy != "end" or getattr(self, "hub_revision", None)):
            raise ValueError("What is pushed is the whole pipeline, at the end: leave out hub_strategy, hub_revision.")


def main(argv: Sequence[str]) -> None:
    """Trains a stage as the arguments say, or goes on where a run of the same arguments stopped.

    Args:
        argv (`Sequence[str]`): The command line without the command.

    Raises:
        ValueError: On arguments or data that cannot be used, before training.
    """
    require("peft", "Training vokens")
    options = VokenArguments, VokenTrainingArguments
    arguments, args = parse_arguments(argv, options, "transformers-liquid voken train")
    with alone(args):
        checkpoint = args.resume_from_checkpoint or last_whole_checkpoint(args.output_dir)
        pipe, trainer = build_voken_trainer(arguments, args)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            if args.should_save:
                model, own = trainer.model.merge_and_unload(), VokenConfig.from_pretrained(arguments.model)
                model.config.update({name: getattr(own, name) for name in WEIGHTS})
                pipe.register_modules(model=model)
                pipe.save_pretrained(args.output_dir)
                if args.push_to_hub:
                    pipe.push_to_hub(trainer.hub_model_id, private=args.hub_private_repo, token=args.hub_token)
        except Exception:
            traceback.print_exc()  # the command line prints one line alone
            raise


def build_voken_trainer(
    arguments: VokenArguments, args: VokenTrainingArguments
) -> tuple[InterleavedVokenPipeline, VokenTrainer]:
    """The pipeline and a trainer of its model; everything that can be wrong is found out here.

    Raises:
        ValueError: If the arguments, the data or the checkpoints in the output folder do not go together.
    """
    from peft import get_peft_model

    set_seed(args.seed)
    for name in OF_STAGE[3 - arguments.stage]:
        if getattr(arguments, name) not in (0, getattr(VokenArguments, name)):
            raise ValueError(f"{name} has no effect in stage {arguments.stage}: leave it out.")
    if not args.resume_from_checkpoint:
        check_setup(
            dataclasses.asdict(arguments) | {"contents": [content_of(path) for path in arguments.datasets]}, args
        )
    with naming(arguments.model):
        processor, records = VokenProcessor.from_pretrained(arguments.model), []
    for path in arguments.datasets:
        for record in load_voken_records(path, processor.tokenizer, arguments.image_folder):
            is_story = record.get("kind") == "story"
            records += story_samples(record, arguments.story_tasks) if is_story else [record]
    records = [record | {"index": index} for index, record in enumerate(records)]
    pipe = InterleavedVokenPipeline.from_pretrained(arguments.model, torch_dtype=getattr(torch, arguments.dtype))
    model = pipe.model
    weights = {name: one for name in WEIGHTS if (one := getattr(arguments, name)) is not None}
    VokenConfig.from_dict(model.config.to_dict() | weights)  # checks them
    model.config.update(weights)
    collator = VokenDataCollator(
        processor,
        model.image_decoder if model.config.image_loss_weight else None,
        captions=arguments.stage == 1 and model.config.caption_loss_weight > 0,
        seed=args.seed,
        **{name: getattr(arguments, name) for name in ("story_tasks", "flip_probability", "max_length")},
    )
    for record in records:
        collator.samples(record)
    lora = {"r": arguments.lora_r, "lora_alpha": arguments.lora_alpha, "lora_dropout": arguments.lora_dropout}
    lora |= {"target_modules": arguments.target_modules} if arguments.target_modules else {}
    config = voken_stage1_config(model) if arguments.stage == 1 else voken_lora_config(model, **lora)
    adapted = get_peft_model(model, config)
    for part in arguments.frozen_mapper_parts:
        try:
            attrgetter(part)(model.feature_mapper).requires_grad_(False)
        except AttributeError as error:
            raise ValueError(f"The mapper has no {part} that could be frozen: see frozen_mapper_parts.") from error
    trainer = VokenTrainer(adapted, args, collator, train_dataset=records, processing_class=processor)
    if args.preview_prompts and args.preview_steps:
        trainer.add_callback(VokenPreviewCallback(trainer, args.preview_prompts, args.preview_steps))
    return pipe, trainer
