"""`transformers.Trainer` for models with vokens: losses by name, the same step however it is accumulated, previews."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from ..data.voken_collator import VokenDataCollator
from ..models.voken.modeling_voken import VokenForConditionalGeneration
from ..pipelines.interleaved_voken import InterleavedVokenPipeline
from .trainer import EpochCallback, PreviewCallback, WholeTrainer, bare_model


# What a loss is made of, each a mean: over labels, over pictures, over pictures with captions. The last one is no loss: a
# mapper that gives the same condition for all pictures has learned nothing yet, whatever the losses are.
MEASURES = ("text_loss", "image_loss", "caption_loss", "condition_std")


class VokenTrainer(WholeTrainer):
    r"""Trains a [`VokenForConditionalGeneration`], or a PEFT model around one, on batches of a [`VokenDataCollator`].

    What it adds to the Trainer:

    - `text_loss`, `image_loss`, `caption_loss` and `condition_std` (of the conditions of a batch, over its pictures) are
      logged beside `loss`, each the mean since the last log, on all processes;
    - each loss of a step is the mean over all its labels or pictures, however these are spread over accumulated batches
      and processes;
    - the image decoder is moved to the device of the model, and frozen parts train without their dropout (with
      `gradient_checkpointing` they keep it, since layers in eval mode are not recomputed);
    - a loss that is not finite stops the run, and a checkpoint that cannot be written is removed.

    Args:
        args: As for the Trainer, first of all `model`, `args`, `data_collator`, `train_dataset`, and the
            [`VokenProcessor`] as `processing_class`. Train with `remove_unused_columns=False`.
        kwargs: As for the Trainer.

    Raises:
        ValueError: If the model is another one, or has no image decoder that its losses need.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = bare_model(self.model)
        if not isinstance(model, VokenForConditionalGeneration):
            raise ValueError(f"The model must be a VokenForConditionalGeneration, got {type(model).__name__}.")
        if model.config.image_loss_weight or model.config.caption_loss_weight:
            model.image_decoder.pipe.to(self.args.device)
        self._frozen = []
        if not self.args.gradient_checkpointing:
            parts = [part for name, part in model.named_modules() if "lora_" not in name]  # has a dropout of its own
            self._frozen = [part for part in parts if not any(one.requires_grad for one in part.parameters())]
        self._totals: list[int] = []
        if isinstance(self.data_collator, VokenDataCollator):
            self.add_callback(EpochCallback(self.data_collator))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """As in the Trainer; counts what the losses of the whole step are means over, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        numbers = torch.tensor([self._numbers(batch) for batch in batches], device=device).sum(0)
        self._totals = self.accelerator.reduce(numbers, reduction="sum").tolist() if batches else []
        return batches, None

    def _numbers(self, batch: dict[str, Any]) -> list[int]:
        """Labels, pictures, and pictures with captions."""
        pictures = int((batch["labels"] == bare_model(self.model).config.voken_token_ids[0]).sum())
        return [int((batch["labels"][:, 1:] != -100).sum()), pictures, pictures * (batch.get("captions") is not None)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in the Trainer.

        Raises:
            FloatingPointError: If the loss is not finite, naming the step.
        """
        for part in self._frozen:
            part.training = False
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._check_finite(loss, f"a batch that begins with the ids {inputs['input_ids'][0, :20].tolist()}")
        numbers, config = self._numbers(inputs), bare_model(self.model).config
        stats = dict.fromkeys(MEASURES, (0.0, 0))
        for index, (name, number) in enumerate(zip(MEASURES, numbers, strict=False)):
            if name not in outputs:
                continue
            stats[name] = number * outputs[name].item(), number
            if model.training:
                # The Trainer averages over the accumulated batches, and over the processes.
                at_once = self.current_gradient_accumulation_steps * self.accelerator.num_processes
                share = number * at_once / self._totals[index]
                loss = loss + getattr(config, f"{name}_weight") * (share - 1) * outputs[name]
        if len(outputs.get("condition", ())) > 1:
            stats["condition_std"] = outputs["condition"].detach().double().std(0).mean().item(), 1
        stats = torch.tensor([*stats.values()], dtype=torch.float64, device=loss.device)
        self._stats["train" if model.training else "eval"] += stats
        return (loss, outputs) if return_outputs else loss

    # The Trainer looks for the names of the modules in a checkpoint; some bases, such as LLaVA, are saved under others.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if model is not None or not isinstance(self.model, VokenForConditionalGeneration):  # FSDP's, or an adapter
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _pop_stats(self, phase: str, prefix: str) -> dict[str, float]:
        stats, self._stats[phase] = self._stats[phase], 0.0
        stats = self.accelerator.reduce(stats, reduction="sum").tolist()
        return {
            f"{prefix}{name}": total / number for name, (total, number) in zip(MEASURES, stats, strict=True) if number
        }


class VokenPreviewCallback(PreviewCallback):
    """As [`PreviewCallback`], for a [`VokenTrainer`]: the picture that each prompt leads to at once."""

    def _pipeline(self, trainer: VokenTrainer, prompts: list[str]) -> InterleavedVokenPipeline:
        model = bare_model(trainer.model)
        pipe = InterleavedVokenPipeline(model, trainer.processing_class, **model.image_decoder.components)
        pipe.processor(text=prompts)
        return pipe

    def _pictures(self) -> list[Image.Image]:
        run = len(self.pipe.processor.voken_token_ids)
        out = self.pipe(self.prompts, seed=0, num_images=1, max_new_tokens=run)
        return [picture for (picture,) in out.segments]
