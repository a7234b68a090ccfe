"""The Trainer says what it learns, stops when it cannot, and leaves checkpoints that draw."""

import math
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CODEBOOK_SIZE, tiny_model, tiny_processor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, pipeline

from transformers_liquid import LiquidDataCollator, LiquidForCausalLM, LiquidProcessor, liquid_lora_config
from transformers_liquid.ops.chunked_loss import image_targets, next_labels
from transformers_liquid.training.checkpoints import check_checkpoint, last_whole_checkpoint
from transformers_liquid.training.train import LiquidTrainingArguments, last_complete_checkpoint
from transformers_liquid.training.trainer import LiquidTrainer, PreviewCallback


def records(number=24):
    """Pictures and texts by turns."""
    rows = []
    for index in range(number):
        if index % 2:
            rows.append({"kind": "text", "text": f"line {index}", "index": index})
        else:
            codes = [(index + place) % CODEBOOK_SIZE for place in range(16)]
            rows.append({"kind": "text_to_image", "text": f"picture {index}", "codes": codes, "index": index})
    return rows


def build_trainer(folder, model=None, packing=True, callbacks=None, caption_probability=0.0, **kwargs):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "total_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **kwargs,
    }
    processor = tiny_processor()
    return LiquidTrainer(
        model=tiny_model() if model is None else model,
        args=LiquidTrainingArguments(**arguments),
        train_dataset=records(),
        eval_dataset=records(10),
        data_collator=LiquidDataCollator(processor, packing=packing, caption_probability=caption_probability),
        processing_class=processor,
        callbacks=callbacks,
    )


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


class StopAfter(TrainerCallback):
    """Ends the run as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Losses


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_the_mean_over_all_labels_by_modality(tmp_path, packing):
    trainer = build_trainer(tmp_path, packing=packing, per_device_eval_batch_size=3, caption_probability=0.5)
    metrics = trainer.evaluate()

    model, collator = tiny_model(), LiquidDataCollator(tiny_processor(), unconditional_probability=0.0)
    losses, images, right = [], [], []
    for record in records(10):
        batch = collator([record])
        logits = model(input_ids=batch["input_ids"]).logits
        targets = next_labels(batch["labels"])
        labelled = targets != -100
        losses.append(torch.nn.functional.cross_entropy(logits[labelled], targets[labelled], reduction="none"))
        images.append(image_targets(model.config, targets)[labelled])
        right.append(logits.argmax(-1)[labelled] == targets[labelled])
    losses, images, right = torch.cat(losses).detach(), torch.cat(images), torch.cat(right).float()
    expected = {
        "eval_loss": losses.mean(),
        "eval_text_loss": losses[~images].mean(),
        "eval_image_loss": losses[images].mean(),
        "eval_text_accuracy": right[~images].mean(),
        "eval_image_accuracy": right[images].mean(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-4
    )


def test_training_logs_the_losses_of_both_modalities(tmp_path):
    trainer = build_trainer(tmp_path, packing=False)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    for log in logs:
        assert {"text_loss", "image_loss", "text_accuracy", "image_accuracy"} <= log.keys()
        # `loss` is the mean over the labels of both.
        low, high = sorted([log["text_loss"], log["image_loss"]])
        assert low < log["loss"] < high


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_packed_and_padded_runs_end_at_the_same_weights(tmp_path, trainable):
    tiny_model().save_pretrained(tmp_path)
    ends = []
    for packing in (True, False):
        model = LiquidForCausalLM.from_pretrained(tmp_path)
        if trainable == "lora":
            torch.manual_seed(0)
            model = get_peft_model(model, liquid_lora_config(model, r=2))
        trainer = build_trainer(tmp_path / str(packing), model=model, packing=packing, save_strategy="no")
        trainer.train()
        ends.append(weights(trainer.model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-3, atol=1e-5)


def test_accumulating_gradients_changes_nothing(tmp_path):
    ends = []
    for at_once in (4, 1):
        folder = tmp_path / str(at_once)
        trainer = build_trainer(folder, per_device_train_batch_size=at_once, save_strategy="no")
        assert trainer.args.gradient_accumulation_steps == 4 // at_once
        trainer.train()
        ends.append(weights(trainer.model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-3, atol=1e-5)


def test_draws_change_with_the_epoch(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="no")
    trainer.train()
    assert trainer.data_collator.epoch == 1


def test_a_loss_that_is_not_finite_names_the_step_and_the_records(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.model.get_input_embeddings().weight.data[100] = math.nan
    with pytest.raises(FloatingPointError, match=r"The loss is nan in step 1, on the records with index \[\d+, \d+\]"):
        trainer.train()


# The Trainer's own options


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_eval_metrics": True},
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"include_for_metrics": ["inputs", "loss"]},
        {"per_device_eval_batch_size": 3},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_metrics_see_the_logits_and_labels_of_all_records(tmp_path, options, packing):
    trainer = build_trainer(tmp_path, packing=packing, **options)
    right = []

    def compute_metrics(prediction, compute_result=True):
        batches = ([prediction.predictions], [prediction.label_ids])
        if options.get("eval_do_concat_batches") is False:
            batches = (prediction.predictions, prediction.label_ids)
        for logits, labels in zip(*batches, strict=True):
            logits, labels = torch.as_tensor(logits), next_labels(torch.as_tensor(labels))
            right.append((logits.argmax(-1) == labels)[labels != -100])
        return {"accuracy": float(torch.cat(right).float().mean())}

    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate()
    plain = build_trainer(tmp_path, packing=packing).evaluate()
    assert {name: metrics[name] for name in plain if "loss" in name} == pytest.approx(
        {name: value for name, value in plain.items() if "loss" in name}, rel=1e-4
    )
    # Each label counts once, whichever modality.
    batch = trainer.eval_data_collator(records(10))
    is_image = image_targets(trainer.model.config, next_labels(batch["labels"]))
    shares = {"image": int(is_image.sum()), "text": int((next_labels(batch["labels"]) != -100).sum() - is_image.sum())}
    expected = sum(plain[f"eval_{name}_accuracy"] * share for name, share in shares.items()) / sum(shares.values())
    assert len(torch.cat(right)) == sum(shares.values())
    assert metrics["eval_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["unconditional_probability", "caption_probability", "edit_dropout"])
def test_nothing_is_dropped_or_turned_in_evaluation(tmp_path, name):
    trainer = build_trainer(tmp_path, caption_probability=0.5)
    assert getattr(trainer.data_collator, name) > 0
    assert getattr(trainer.eval_data_collator, name) == 0


def test_predictions_are_logits(tmp_path):
    trainer = build_trainer(tmp_path, packing=False)
    batch = trainer.eval_data_collator(records(4))
    output = trainer.predict(records(4))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = torch.as_tensor(output.label_ids)
    assert torch.equal(labels, batch["labels"])
    torch.testing.assert_close(
        torch.as_tensor(output.predictions)[labels != -100], logits[labels != -100], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("packing", [True, False])
def test_the_trainer_of_transformers_smooths_labels_of_the_next_position(tmp_path, packing):
    arguments = TrainingArguments(
        str(tmp_path),
        label_smoothing_factor=0.1,
        remove_unused_columns=False,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = LiquidDataCollator(tiny_processor(), packing=packing, unconditional_probability=0.0)
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=records(4), data_collator=collator)
    trainer.train()
    batch = collator(records(4))
    targets = next_labels(batch.pop("labels"))
    expected = torch.nn.functional.cross_entropy(
        tiny_model()(**batch, use_cache=False).logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": True},
        {"save_strategy": "best", "metric_for_best_model": "eval_image_accuracy"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"neftune_noise_alpha": 5.0},
        {"include_num_input_tokens_seen": "non_padding"},
        {"bf16": True},
        {"dataloader_drop_last": True},
        {"optim": "adafactor"},
        {"accelerator_config": {"even_batches": False}},
        {"gradient_checkpointing": True},
        {"prediction_loss_only": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer_work(tmp_path, options):
    trainer = build_trainer(tmp_path, packing=False, eval_strategy="steps", eval_steps=2, **options)
    trainer.train()
    assert trainer.state.global_step == 4
    assert {"eval_loss", "eval_image_loss", "eval_text_loss"} <= trainer.state.log_history[-2].keys()
    if "load_best_model_at_end" in options:
        best = LiquidForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
        assert all(torch.equal(weight, best[name]) for name, weight in weights(trainer.model).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove_unused_columns": True}, "remove the codes"),
        ({"label_names": ["targets"]}, "calls them labels"),
        ({"label_smoothing_factor": 0.1}, "needs no logits"),
        ({"use_liger_kernel": True}, "built-in models only"),
        ({"bf16_full_eval": True}, "round the weights"),
        ({"fp16_full_eval": True}, "round the weights"),
        ({"train_sampling_strategy": "group_by_length"}, "have no length"),
        ({"train_sampling_strategy": "batch_rebalance"}, "have no length"),
        ({"debug": "underflow_overflow"}, "NaN stops the run anyway"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True cannot be used"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cannot be used"),
        ({"neftune_noise_alpha": 5.0}, "train with packing=False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("arguments_class", [LiquidTrainingArguments, TrainingArguments])
def test_options_that_cannot_be_met_are_refused_before_training(tmp_path, arguments_class, options, message):
    common = {"remove_unused_columns": False, "use_cpu": True, "save_strategy": "no"}
    with pytest.raises(ValueError, match=message):
        LiquidTrainer(
            model=tiny_model(),
            args=arguments_class(str(tmp_path), **common | options),
            train_dataset=records(),
            data_collator=LiquidDataCollator(tiny_processor(), packing=True),
        )


def test_batches_do_not_shrink_below_the_total(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size=True would change total_batch_size"):
        build_trainer(tmp_path, auto_find_batch_size=True)


@pytest.mark.parametrize("metric", ["loss", "eval_accuracy", "held-out_perplexity"])
def test_a_best_metric_that_is_not_measured_is_refused_before_training(tmp_path, metric):
    options = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_steps": 1, "eval_steps": 1}
    trainer = build_trainer(tmp_path, metric_for_best_model="loss", **options)
    sets = {"held-out": records(4), "other": records(6)}
    arguments = {"data_collator": LiquidDataCollator(tiny_processor()), "eval_dataset": sets}
    trainer.args.metric_for_best_model = metric
    with pytest.raises(
        ValueError,
        match=f"{metric.removeprefix('eval_')}' is not measured: expected one of held-out_loss, .*other_loss",
    ):
        LiquidTrainer(model=tiny_model(), args=trainer.args, train_dataset=records(), **arguments)
    trainer.args.metric_for_best_model = "other_loss"
    trainer = LiquidTrainer(model=tiny_model(), args=trainer.args, train_dataset=records(), **arguments)
    trainer.train()
    assert trainer.state.best_metric == min(
        log["eval_other_loss"] for log in trainer.state.log_history if "eval_other_loss" in log
    )


# Checkpoints


def test_every_checkpoint_is_a_complete_repository_that_draws(tmp_path):
    trainer = build_trainer(tmp_path, caption_probability=0.5)
    trainer.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / "README.md").is_file()
        model = LiquidForCausalLM.from_pretrained(folder)
        LiquidProcessor.from_pretrained(folder).check_fits(model.config)
        assert model.config.use_cache and model.generation_config.use_cache
        assert model.generation_config.image_generation_config["guidance_scale"] == 7.0
        for name, weight in tiny_model().model.vq_model.state_dict().items():
            assert torch.equal(weight, model.model.vq_model.state_dict()[name]), name
        assert pipeline("text-to-image", model=str(folder))("a", seed=0)[0].size == (8, 8)
    assert all(torch.equal(weight, trainer.model.state_dict()[name]) for name, weight in model.state_dict().items())


def test_an_adapters_checkpoint_draws_too(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    model = LiquidForCausalLM.from_pretrained(tmp_path / "base")
    trainer = build_trainer(tmp_path, model=get_peft_model(model, liquid_lora_config(model, r=2)), learning_rate=0.1)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert not (folder / "model.safetensors").exists()
    ids = torch.tensor([[10, 20, 30]])
    loaded = LiquidForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(input_ids=ids).logits)
    base = LiquidForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(loaded(ids).logits, base(ids).logits, atol=1e-2)
    assert pipeline("text-to-image", model=str(folder))("a", seed=0)[0].size == (8, 8)


def test_a_run_that_goes_on_ends_at_the_same_weights(tmp_path):
    whole = build_trainer(tmp_path / "whole", caption_probability=0.5, max_steps=8)
    whole.train()
    stopped = build_trainer(tmp_path / "stopped", caption_probability=0.5, max_steps=8, callbacks=[StopAfter(5)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = build_trainer(tmp_path / "stopped", caption_probability=0.5, max_steps=8)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "stopped"))
    for name, weight in weights(whole.model).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:  # files cannot grow beyond this, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    trainer = build_trainer(tmp_path, callbacks=[FillDisk()])
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written .* earlier checkpoints are intact"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = build_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_a_checkpoint_that_was_cut_off_is_not_continued(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"cut off")
    assert last_complete_checkpoint(tmp_path) is None
    for step in (2, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def finished_run(folder, model=None, **kwargs):
    """Checkpoints 1 to 3 of a run, and its weights after step 4, which is not saved."""
    trainer = build_trainer(folder, model, save_strategy="steps", save_steps=1, **kwargs)
    trainer.train()
    for path in (folder / "checkpoint-4").rglob("*"):
        path.unlink()
    return weights(trainer.model)


def empty(path):
    path.write_bytes(b"")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "trainer_state.json": [empty, cut],
    "model.safetensors": [empty, cut, os.unlink],
    "optimizer.pt": [empty, cut, os.unlink],
    "scheduler.pt": [empty, cut, os.unlink],
    "rng_state.pth": [empty, cut, os.unlink],
    "config.json": [empty, cut],
    "training_args.bin": [cut],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, finished_run(folder)


@pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name, damages in DAMAGES.items() for damage in damages]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, run, caplog, name, damage):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-3" / name)
    with caplog.at_level("WARNING", logger="transformers_liquid"):
        found = last_whole_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    assert "checkpoint-3 is passed over" in caplog.text
    assert name.partition("_")[0].partition(".")[0] in caplog.text or damage is os.unlink
    with pytest.raises(ValueError, match="checkpoint-3"):  # asked for by name
        build_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_run_that_goes_on_before_a_damaged_checkpoint_ends_at_the_same_weights(tmp_path, run):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    os.unlink(tmp_path / "checkpoint-3" / "optimizer.pt")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-x")  # of the user's own
    resumed = build_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(weight, resumed.model.state_dict()[name]) for name, weight in run[1].items())


def test_without_any_whole_checkpoint_nothing_begins_anew_in_silence(tmp_path):
    finished_run(tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be continued; .* has no optimizer"):
        last_whole_checkpoint(tmp_path)


def test_a_shard_that_is_missing_makes_a_checkpoint_no_whole_one(tmp_path):
    finished_run(tmp_path)
    folder = tmp_path / "checkpoint-3"
    LiquidForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    check_checkpoint(folder)
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged, or what it names is missing"):
        check_checkpoint(folder)


def test_a_checkpoint_of_other_weights_is_refused_and_tied_ones_are_not_called_missing(tmp_path, run, caplog):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    with caplog.at_level("WARNING", logger="transformers"):
        build_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "missing" not in caplog.text
    path = tmp_path / "checkpoint-3" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.text_model.model.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing_keys=\['model.text_model.model.norm.weight'\]"):
        build_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_two_runs_do_not_share_an_output_folder(tmp_path):
    refused = []

    class SecondRun(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                script = (
                    "import sys; from filelock import FileLock\nFileLock(sys.argv[1] + '/.lock', timeout=0).acquire()"
                )
                refused.append(subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True))

    trainer = build_trainer(tmp_path, callbacks=[SecondRun()])
    trainer.train()
    assert "Timeout" in refused[0].stderr
    trainer.train(resume_from_checkpoint=True)  # this one may come back


# Previews


def test_previews_show_the_run_and_do_not_disturb_it(tmp_path):
    ends = []
    for name in ("without", "with"):
        trainer = build_trainer(tmp_path / name, report_to=["tensorboard"], save_strategy="no")
        if name == "with":
            trainer.add_callback(PreviewCallback(trainer, ["picture 0", "picture 2", "picture 4"], steps=3))
        trainer.train()
        ends.append(weights(trainer.model))
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    sheets = sorted((tmp_path / "with" / "previews").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-000000.png", "step-000003.png", "step-000004.png"]
    assert Image.open(sheets[0]).size == (16, 16)
    events = EventAccumulator(str(next((tmp_path / "with").rglob("events.*")).parent))
    events.Reload()
    assert [image.step for image in events.Images("previews")] == [0, 3, 4]
    assert "train/image_loss" in events.Tags()["scalars"]


def test_bad_preview_prompts_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        PreviewCallback(build_trainer(tmp_path), [" "], steps=1)


def test_another_collator_is_refused(tmp_path):
    collator = DataCollatorForLanguageModeling(tiny_processor().tokenizer, mlm=False)
    with pytest.raises(ValueError, match="must be a LiquidDataCollator, got DataCollatorForLanguageModeling"):
        LiquidTrainer(model=tiny_model(), data_collator=collator)
