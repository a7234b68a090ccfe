"""`transformers.Trainer` for mixed sequences: losses by modality, and checkpoints that draw."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from ..data.collator import LiquidDataCollator
from ..data.voken_collator import VokenDataCollator
from ..models.liquid.image_processing_liquid import contact_sheet
from ..ops.chunked_loss import IGNORE_INDEX
from ..ops.packed_attention import use_packed_attention
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from .arguments import check_arguments
from .checkpoints import alone, check_checkpoint, last_whole_checkpoint


# What is measured on each data set to evaluate on.
METRICS = ("loss", "text_loss", "image_loss", "text_accuracy", "image_accuracy")


class WholeTrainer(Trainer):
    """What every trainer here adds: checkpoints that are whole, one run a folder, and an end when the loss is no number."""

    def create_accelerator_and_postprocess(self) -> None:
        check_arguments(self.args)  # here, because nothing was done yet
        self._stats: dict[str, torch.Tensor | float] = {"train": 0.0, "eval": 0.0}
        self.args.accelerator_config.dispatch_batches = False  # of streams, the default is otherwise
        if self.args.max_grad_norm is None:  # here, because DeepSpeed is told now
            is_large = sum(weight.numel() for weight in self.model.parameters()) >= 7e9
            self.args.max_grad_norm = 0.5 if is_large else 1.0
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate would round losses and counts to half precision, and add up gradients in it.
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in the Trainer, alone in the output folder; `True` goes on from the newest checkpoint that is whole.

        Raises:
            ValueError: If another run is in the output folder, or the checkpoint is not whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir) or True
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        with alone(self.args):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._pop_stats("train", "")}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._stats["eval"] = 0.0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._pop_stats("eval", f"{metric_key_prefix}_"))
        return output

    def _pop_stats(self, phase: str, prefix: str) -> dict[str, float]:
        """What was measured since the last time beside the loss, on all processes."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card that `save_pretrained` wrote stays."""

    def _check_finite(self, loss: torch.Tensor, records: str) -> None:
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}, on {records}. Look at these records; or "
                "lower learning_rate, or train in bf16 instead of fp16. Continue from an earlier checkpoint."
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({error}) and has been removed; earlier checkpoints are intact. Make "
                "room on the disk (save_total_limit keeps only the last ones), then run the same command again."
            ) from error


class LiquidTrainer(WholeTrainer):
    r"""Trains a [`LiquidForCausalLM`], or a PEFT model around one.

    What it adds to the Trainer:

    - losses are computed in chunks, in evaluation too: the logits of a batch never exist all at once;
    - `text_loss`, `image_loss`, `text_accuracy` and `image_accuracy` are logged beside `loss`, each the mean over all
      labels of its kind since the last log, on all processes. `eval_loss` is a mean over labels likewise;
    - a loss that is not finite stops the run and names the step and the records;
    - the collator's draws change from epoch to epoch; evaluation is without draws of kinds or dropped texts;
    - a checkpoint that cannot be written is removed, so that the last one on disk is always whole.

    Pass the [`LiquidProcessor`] as `processing_class` to have it saved with each checkpoint: a full model's are
    complete repositories then. Train with `remove_unused_columns=False`.

    Args:
        args: As for the Trainer, first of all `model`, `args`, `train_dataset`, `processing_class`.
        data_collator ([`LiquidDataCollator`]): Makes the batches.
        kwargs: As for the Trainer.

    Raises:
        ValueError: If the collator is another one, or packs records for a base that cannot keep them apart; or with
            FSDP, if there is LoRA on a tied base.
    """

    def __init__(self, *args: Any, data_collator: LiquidDataCollator, **kwargs: Any):
        if not isinstance(data_collator, LiquidDataCollator):
            raise ValueError(f"data_collator must be a LiquidDataCollator, got {type(data_collator).__name__}.")
        data_collator = dataclasses.replace(data_collator, return_indices=True)
        super().__init__(*args, data_collator=data_collator, **kwargs)
        sets = [f"{name}_" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else [""]
        metrics = [f"{prefix}{metric}" for prefix in sets for metric in METRICS]
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if metric and self.eval_dataset and self.compute_metrics is None and metric not in metrics:
            raise ValueError(f"metric_for_best_model={metric!r} is not measured: expected one of {', '.join(metrics)}.")
        # The Trainer turns the cache off for good, and saved models would draw slowly. With labels none is used anyway.
        self.model.config.use_cache = True
        adapters = {config.peft_type for config in getattr(self.model, "peft_config", {}).values()}
        if self.is_fsdp_enabled and "LORA" in adapters and self.model.config.tie_word_embeddings:
            raise ValueError(
                "FSDP cannot shard LoRA on a base whose head is tied to its embeddings: use DDP, or train all of it."
            )
        # DeepSpeed rounds all weights to the type that it trains in.
        codec = bare_model(self.model).model.vq_model if self.is_deepspeed_enabled else torch.nn.Module()
        self._codec = {f"model.vq_model.{name}": tensor.cpu().clone() for name, tensor in codec.state_dict().items()}
        if not all(tensor.numel() for tensor in self._codec.values()):
            raise ValueError("With ZeRO-3, load the model before the TrainingArguments: its codec is in pieces.")
        if data_collator.packing:
            use_packed_attention(bare_model(self.model))
            if self.args.neftune_noise_alpha is not None:
                raise ValueError("neftune_noise_alpha goes by the length of a record: train with packing=False.")
        no_draws = {"unconditional_probability": 0.0, "caption_probability": 0.0, "edit_dropout": 0.0}
        self.eval_data_collator = dataclasses.replace(data_collator, **no_draws)
        self.add_callback(EpochCallback(data_collator))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in the Trainer.

        Raises:
            FloatingPointError: If the loss is not finite, naming the step and the records.
        """
        inputs = {**inputs, "skip_logits": True, "use_cache": False}
        indices = inputs.pop("record_indices")
        counts = True
        if not model.training:
            inputs["labels"], counts = self._labels_without_repeats(inputs, len(indices))
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._check_finite(loss, f"the records with index {indices.tolist()} (-1: unknown)")
        if outputs.get("token_stats") is not None:
            self._stats["train" if model.training else "eval"] += outputs["token_stats"].detach() * counts
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """As in the Trainer; a position of a picture has as many labels as codes."""
        config = bare_model(self.model).config
        if config.num_codebooks > 1:
            all_labels = [batch["labels"].flatten() for batch in batch_samples]
            counts = [torch.where(labels == config.image_token_id, config.num_codebooks, 1) for labels in all_labels]
            batch_samples = [
                {"labels": labels.repeat_interleave(count)} for labels, count in zip(all_labels, counts, strict=True)
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in the Trainer, for `compute_metrics` and `predict()` too; their logits take a second forward pass."""
        loss, *_ = super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        inputs = self._prepare_inputs(dict(inputs))
        number = len(inputs.pop("record_indices"))
        labels, counts = self._labels_without_repeats(inputs, number)
        del inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        return loss, logits, labels if counts else torch.full_like(labels, IGNORE_INDEX)

    def _labels_without_repeats(self, inputs: dict[str, Any], number: int) -> tuple[torch.Tensor, bool]:
        """Where the last batch is too small for all processes, the first records come again: those do not count.

        Returns:
            The labels, without those of repeated records; and whether there are others. If not, labels are as they were.
        """
        labels, state = inputs["labels"], self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels, True
        new = state.remainder - self.accelerator.process_index * number
        if new <= 0 or new >= number:
            return labels, new > 0
        is_repeat = torch.arange(number, device=labels.device)[:, None] >= new
        if self.data_collator.packing:
            is_repeat = is_repeat[(inputs["position_ids"][0] == 0).cumsum(0) - 1].T
        return labels.masked_fill(is_repeat, IGNORE_INDEX), True

    def _pop_stats(self, phase: str, prefix: str) -> dict[str, float]:
        stats, self._stats[phase] = self._stats[phase], 0.0
        if not isinstance(stats, torch.Tensor):  # the base computed its loss itself
            return {}
        stats = self.accelerator.reduce(stats.double(), reduction="sum").cpu()
        metrics = {}
        for name, (losses, right, number) in zip(("text", "image"), stats.tolist(), strict=True):
            if number:
                metrics |= {f"{prefix}{name}_loss": losses / number, f"{prefix}{name}_accuracy": right / number}
        if phase == "eval":
            losses, _, number = stats.sum(0).tolist()
            metrics[f"{prefix}loss"] = losses / number
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = bare_model(self.model).all_tied_weights_keys  # these are not missing
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(f"The checkpoint holds other weights than the model: {load_result}.")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is not None:
            # Gathered from all processes, tied weights are no longer one tensor and would be saved twice.
            tied = bare_model(self.model).all_tied_weights_keys
            state_dict = {
                name: self._codec.get(name, tensor) for name, tensor in state_dict.items() if name not in tied
            }
        super()._save(output_dir, state_dict)


class PreviewCallback(TrainerCallback):
    """Draws the same prompts every so many steps: `previews/step-N.png` in the output folder, and TensorBoard.

    Args:
        trainer ([`LiquidTrainer`]): Its model, its processor and its TensorBoard.
        prompts (`Sequence[str]`): What to draw.
        steps (`float`): Between two contact sheets; below 1, a share of all steps. One is drawn before the first step and
            after the last too.

    Raises:
        ValueError: If a prompt cannot be drawn, or the model's weights are spread over processes.
    """

    def __init__(self, trainer: LiquidTrainer, prompts: Sequence[str], steps: float):
        if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "Previews need the whole model in one process: leave out preview_prompts with FSDP and DeepSpeed."
            )
        self.pipe = self._pipeline(trainer, list(prompts))
        self.pipe.set_progress_bar_config(disable=True)
        self.trainer, self.prompts, self.steps = trainer, list(prompts), steps

    def _pipeline(self, trainer: WholeTrainer, prompts: list[str]) -> DiffusionPipeline:
        """What draws, when it is certain that it can draw the prompts."""
        model = bare_model(trainer.model)
        pipe = LiquidImageGenerationPipeline(model=model, processor=trainer.processing_class, device=model.device)
        pipe.preprocess(prompts)
        return pipe

    def _pictures(self) -> list[Image.Image]:
        return self.pipe(self.prompts, seed=0)  # the same noise on each sheet

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.steps < 1:
            self.steps = math.ceil(self.steps * state.max_steps)
        if state.global_step == 0:
            self._draw(args, state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            self._draw(args, state)

    def _draw(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        was_training = self.trainer.model.training
        self.trainer.model.eval()
        sheet = contact_sheet(self._pictures())
        self.trainer.model.train(was_training)
        folder = Path(args.output_dir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step-{state.global_step:06d}.png")
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("previews", np.asarray(sheet), state.global_step, dataformats="HWC")


class EpochCallback(TrainerCallback):
    """Tells a collator which epoch it is, for draws that are the same when a run is resumed."""

    def __init__(self, collator: LiquidDataCollator | VokenDataCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.collator.set_epoch(int(state.epoch))


def bare_model(model: torch.nn.Module) -> PreTrainedModel:
    """The model itself, without PEFT around it; adapters inside it stay."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
