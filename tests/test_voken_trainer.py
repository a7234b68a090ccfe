"""Both stages of training vokens: what moves and what does not, and steps that do not depend on how they are put together."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_base
from tiny_vokens import VISION_BASES, VOKENS, tiny_image_pipeline, tiny_voken_model
from transformers import TrainingArguments

from transformers_liquid.models.voken.image_decoder import VokenImageDecoder
from transformers_liquid.models.voken.modeling_voken import VokenForConditionalGeneration
from transformers_liquid.training.adapters import voken_lora_config, voken_prefix_model, voken_stage1_config
from transformers_liquid.training.voken_trainer import VokenTrainer


class SteadyDecoder(VokenImageDecoder):
    """Noise and time of a picture are its own, whatever batch it is in."""

    def loss(self, latents, condition, snr_gamma=None):
        noise = torch.stack([torch.randn(one.shape, generator=self._generator(one)) for one in latents])
        timesteps = torch.cat([torch.randint(0, 1000, (1,), generator=self._generator(one)) for one in latents])
        drawn = {"noise": noise.to(latents.device), "timesteps": timesteps.to(latents.device)}
        return super().loss(latents, condition, snr_gamma, **drawn)

    def _generator(self, latents):
        return torch.Generator().manual_seed(int(latents.abs().sum() * 1000))


def record(index, pictures=1, length=3):
    """A prompt, some words to learn, and pictures to draw between them."""
    generator = torch.Generator().manual_seed(index)
    words = torch.randint(10, 200, (length,), generator=generator).tolist()
    ids = [1, *words, *[*VOKENS, 20 + index % 100] * pictures]
    return {
        "input_ids": ids,
        "labels": [-100, -100, *ids[2:]],
        "latents": torch.randn(pictures, 4, 8, 8, generator=generator),
        "captions": [f"{index}"] * pictures,
    }


def collate(records):
    longest = max(len(one["input_ids"]) for one in records)
    pad = lambda name, filler: torch.tensor([one[name] + [filler] * (longest - len(one[name])) for one in records])  # noqa: E731
    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    if latents := [one for one in records if len(one["latents"])]:
        batch["target_latents"] = torch.cat([one["latents"] for one in latents])
        batch["captions"] = [text for one in records for text in one["captions"]]
    return batch


def arguments(folder, **kwargs):
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    settings |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "max_grad_norm": 1.0}
    return TrainingArguments(output_dir=str(folder), **settings | kwargs)


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model, and loads it with its image decoder: an adapter knows its base then."""

    def load(model_type="llama", tied=False, decoder=SteadyDecoder, **kwargs):
        torch.manual_seed(0)
        pipe = tiny_image_pipeline("sd-v")
        model = tiny_voken_model(model_type, "sd-v", **kwargs)
        model.save_pretrained(tmp_path / model_type)
        model = VokenForConditionalGeneration.from_pretrained(tmp_path / model_type)
        return model.attach(decoder(pipe))

    return load


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def trained(model, folder, records, resume=None, **kwargs):
    trainer = VokenTrainer(model=model, args=arguments(folder, **kwargs), train_dataset=records, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_stage_1_moves_the_rows_of_the_vokens_and_the_mapper_and_not_a_bit_of_all_else(model_type, saved, tmp_path):
    model = saved(model_type)
    before, decoder = weights(model), model.image_decoder.pipe
    frozen = {name: weights(getattr(decoder, name)) for name in ("vae", "unet", "text_encoder")}
    adapted = get_peft_model(model, voken_stage1_config(model))
    trained(adapted, tmp_path / "run", [record(index) for index in range(40)], max_steps=20, weight_decay=0.1)
    for name, parts in frozen.items():
        now = weights(getattr(decoder, name))
        assert all(torch.equal(now[key], one) for key, one in parts.items()), name
    after = weights(adapted.merge_and_unload())
    assert after.keys() == before.keys()
    rows = torch.zeros(len(model.get_input_embeddings().weight), dtype=torch.bool)
    rows[VOKENS] = True
    for name, one in before.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            moved = (after[name] != one).any(1)
            assert torch.equal(moved, rows), name
        elif not name.endswith("bias"):  # some of those have no gradient at all
            assert torch.equal(after[name], one) != name.startswith("feature_mapper."), name


@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_stage_2_moves_lora_the_rows_and_the_encoder_decoder(model_type, saved, tmp_path):
    model = saved(model_type)
    adapted = get_peft_model(model, voken_lora_config(model))
    before = weights(adapted)
    trained(adapted, tmp_path / "run", [record(index) for index in range(40)], max_steps=20, weight_decay=0.1)
    moved = {name for name, one in weights(adapted).items() if not torch.equal(one, before[name])}
    kinds = ("lora_A.default.", "lora_B.default.", "trainable_tokens_delta.default", "encoder_decoder.modules_to_save.")
    assert all(any(kind in name for kind in kinds) for name in moved)
    assert {kind for kind in kinds for name in moved if kind in name} == {*kinds}
    lora = [name for name in moved if "lora_" in name]
    assert len(lora) == 2 * 2 * 2 and all(".q_proj." in name or ".v_proj." in name for name in lora)
    assert not any("vision" in name for name in moved)
    assert sum("trainable_tokens_delta" in name for name in moved) == 2  # rows of the embeddings and of the head
    assert all(before[name].shape == (8, 32) for name in moved if "trainable_tokens_delta" in name)


@pytest.mark.parametrize("config", [voken_stage1_config, voken_lora_config])
def test_an_adapter_is_the_same_model_when_it_is_loaded_and_when_it_is_merged(config, saved, tmp_path):
    model = saved()
    folder = model.name_or_path
    adapted = get_peft_model(model, config(model))
    trained(adapted, tmp_path / "run", [record(index) for index in range(8)], max_steps=4)
    adapted.save_pretrained(tmp_path / "adapter")
    batch = collate([record(3), record(4)])
    again = PeftModel.from_pretrained(VokenForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter")

    def results(one):
        one.double().eval()  # merging rounds
        with torch.no_grad():
            bare = one if isinstance(one, VokenForConditionalGeneration) else one.get_base_model()
            out = bare.attach(SteadyDecoder(tiny_image_pipeline("sd-v")))(**batch)
        return out.logits, out.condition, out.loss

    expected = results(adapted)
    for other in (again, adapted.merge_and_unload()):
        for one, right in zip(results(other), expected, strict=True):
            torch.testing.assert_close(one, right, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "records",
    [
        [record(index) for index in range(8)],
        # Batches of two with more and fewer labels and pictures, and one without pictures
        [
            record(index, *sizes)
            for index, sizes in enumerate([(0, 9), (0, 2), (2, 3), (1, 7), (3, 1), (0, 4), (1, 2), (1, 12)])
        ],
    ],
    ids=["even", "uneven"],
)
def test_a_step_is_the_same_at_once_and_accumulated(records, saved, tmp_path):
    steps = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = saved(unconditional_probability=0.0)
        trainer = trained(
            model,
            tmp_path / f"{size}",
            records,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            max_grad_norm=1e9,
            learning_rate=1.0,
            lr_scheduler_type="constant",
        )
        before = weights(saved(unconditional_probability=0.0))
        gradients = {name: before[name] - one for name, one in weights(model).items()}
        steps.append((trainer.state.log_history[0], gradients))
    (one, first), (other, second) = steps
    for name in ("loss", "text_loss", "image_loss", "caption_loss", "grad_norm"):
        assert one[name] == pytest.approx(other[name], rel=2e-6), name
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=1e-5)


def test_stage_1_teaches_vokens_to_say_what_the_caption_says(saved, tmp_path):
    model = saved(unconditional_probability=0.0, image_loss_weight=0.0, caption_loss_weight=1.0)
    adapted = get_peft_model(model, voken_stage1_config(model))
    records = [{**record(index), "captions": [text]} for index, text in enumerate(["ab", "zq", "mm", "k!"])]
    settings = {"max_steps": 50, "per_device_train_batch_size": 4, "logging_steps": 10, "learning_rate": 5e-3}
    logs = trained(adapted, tmp_path, records, lr_scheduler_type="constant", **settings).state.log_history
    assert logs[4]["caption_loss"] < 0.1 * logs[0]["caption_loss"]
    with torch.no_grad():
        said = model.eval()(**collate(records)).condition.flatten(1)
        captions = [one["captions"][0] for one in records]
        meant = model.image_decoder.caption_condition(captions, model.config.condition_length).embeds.flatten(1)
    assert torch.cdist(said, meant).argmin(1).tolist() == [0, 1, 2, 3]


def test_losses_are_logged_by_name_and_make_up_the_loss(saved, tmp_path):
    model = saved(unconditional_probability=0.0)
    records = [record(index) for index in range(4)]
    trainer = VokenTrainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=2, learning_rate=0.0),
        train_dataset=records,
        eval_dataset=records,
        data_collator=collate,
    )
    trainer.train()
    with torch.no_grad():
        out = model.train()(**collate(records))
    logs = trainer.state.log_history[0]
    for name in ("loss", "text_loss", "image_loss", "caption_loss"):
        assert logs[name] == pytest.approx(out[name].item(), rel=1e-5), name
    assert logs["loss"] == pytest.approx(
        0.01 * logs["text_loss"] + logs["image_loss"] + 0.1 * logs["caption_loss"], rel=1e-5
    )
    assert logs["condition_std"] == pytest.approx(out.condition.std(0).mean().item(), rel=1e-5)
    metrics = trainer.evaluate()
    for name in ("text_loss", "image_loss", "caption_loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(out[name].item(), rel=1e-5), name


def test_frozen_parts_train_without_their_dropout(saved, tmp_path):
    model = saved("opt", unconditional_probability=0.0)  # has dropout 0.1
    assert model.text_model.config.dropout > 0
    adapted = get_peft_model(model, voken_stage1_config(model))
    records = [record(index) for index in range(2)]
    logs = trained(adapted, tmp_path, records, learning_rate=0.0, max_steps=2, num_train_epochs=2).state.log_history
    with torch.no_grad():
        expected = model.eval()(**collate(records)).text_loss.item()
    assert logs[0]["text_loss"] == pytest.approx(expected, rel=1e-5) == logs[1]["text_loss"]


def test_lora_trains_with_its_dropout(saved, tmp_path):
    model = saved()
    adapted = get_peft_model(model, voken_lora_config(model))
    trained(adapted, tmp_path, [record(0), record(1)])
    parts = dict(model.named_modules())
    dropouts = [part for name, part in parts.items() if "lora_dropout" in name and isinstance(part, torch.nn.Dropout)]
    assert len(dropouts) == 4 and all(part.training and part.p == 0.05 for part in dropouts)
    assert not parts["text_model.model.layers.0.mlp"].training


def test_a_loss_that_is_not_finite_stops_the_run(saved, tmp_path):
    model = saved()
    model.feature_mapper.query.data[0, 0, 0] = torch.inf
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan in step 1, on a batch that begins with the ids \[1, "
    ):
        trained(model, tmp_path, [record(0), record(1)])


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a VokenForConditionalGeneration, got LlamaForCausalLM"):
        VokenTrainer(model=tiny_base(), args=arguments(tmp_path), data_collator=collate)


@pytest.mark.parametrize("model_type", VISION_BASES)
@pytest.mark.filterwarnings("ignore:The model was not loaded from a repository")
def test_lora_is_beside_queries_and_values_of_the_language_model_alone(model_type):
    model = tiny_voken_model(model_type)
    names = [name for name, _ in get_peft_model(model, voken_lora_config(model)).named_parameters() if "lora_A" in name]
    assert len(names) == 2 * 2 and not any("vision" in name or "visual" in name or "qformer" in name for name in names)
    assert all(".q_proj." in name or ".v_proj." in name for name in names)


def test_what_peft_cannot_train_is_refused(saved):
    for config in (voken_stage1_config, voken_lora_config, voken_prefix_model):
        with pytest.raises(
            ValueError, match=r"must be a VokenForConditionalGeneration without adapters, got LlamaForCausalLM"
        ):
            config(tiny_base())
    with pytest.raises(
        ValueError, match="GPT2LMHeadModel has no q_proj and v_proj: name the layers for LoRA in target_modules"
    ):
        voken_lora_config(saved("gpt2"))
    config = voken_lora_config(saved("gpt2"), target_modules=r"text_model\..*\.c_attn")
    assert get_peft_model(saved("gpt2"), config).peft_config["default"].r == 8
    model = saved()
    adapted = get_peft_model(model, voken_stage1_config(model))
    for config in (voken_stage1_config, voken_lora_config):
        with pytest.raises(
            ValueError, match=r"must be a VokenForConditionalGeneration without adapters, got .* with adapters"
        ):
            config(adapted.get_base_model())


@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_prefix_tuning_moves_the_prefix_the_rows_and_the_encoder_decoder_and_draws_with_it(model_type, saved, tmp_path):
    model = saved(model_type, unconditional_probability=0.0)
    adapted = voken_prefix_model(model, encoder_hidden_size=16)
    before = weights(adapted)
    trained(
        adapted,
        tmp_path / "run",
        [record(index) for index in range(20)],
        max_steps=10,
        save_strategy="steps",
        save_steps=10,
    )
    moved = {name for name, one in weights(adapted).items() if not torch.equal(one, before[name])}
    kinds = ("prompt_encoder.default.modules_to_save.", "trainable_tokens_delta.", "encoder_decoder.modules_to_save.")
    assert all(any(kind in name for kind in kinds) for name in moved)
    assert {kind for kind in kinds for name in moved if kind in name} == {*kinds}
    batch = collate([record(3)])
    adapted.eval()
    with torch.no_grad():
        expected = model(**batch)
    # A checkpoint has all of it, and goes on.
    again = voken_prefix_model(saved(model_type, unconditional_probability=0.0), encoder_hidden_size=16)
    trained(again, tmp_path / "run", [record(index) for index in range(20)], max_steps=10, resume=True)
    with torch.no_grad():
        torch.testing.assert_close(again.get_base_model().eval()(**batch).logits, expected.logits)
    # Merged, and the prefix apart
    merged = adapted.merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected.logits)
        run = batch["input_ids"]
        condition, _ = merged.conditions(run.clone(), attention_mask=torch.ones_like(run))
        torch.testing.assert_close(condition.embeds, expected.condition)
    merged.text_model.save_pretrained(tmp_path / "prefix")
    merged.text_model = merged.text_model.get_base_model()
    with torch.no_grad():
        assert not torch.allclose(merged(**batch).logits, expected.logits, atol=1e-3)
        merged.text_model = PeftModel.from_pretrained(merged.text_model, tmp_path / "prefix")
        torch.testing.assert_close(merged(**batch).logits, expected.logits)


@pytest.mark.parametrize("model_type", ["llama", *VISION_BASES])
def test_a_whole_model_that_was_stopped_ends_with_the_weights_of_one_that_was_not(model_type, saved, tmp_path):
    records = [record(index) for index in range(8)]
    model = saved(model_type, unconditional_probability=0.0)
    trained(model, tmp_path / "run", records, max_steps=4, save_strategy="steps", save_steps=2)
    again = saved(model_type, unconditional_probability=0.0)
    trained(again, tmp_path / "again", records, max_steps=4, resume=str(tmp_path / "run" / "checkpoint-2"))
    expected = weights(model)
    assert all(torch.equal(one, expected[name]) for name, one in weights(again).items())


def test_the_best_checkpoint_is_what_a_whole_model_ends_with(saved, tmp_path):
    records = [record(index) for index in range(8)]
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 10.0,
    }
    args = arguments(tmp_path / "run", max_steps=2, load_best_model_at_end=True, **settings)
    model = saved("llava", unconditional_probability=0.0)
    trainer = VokenTrainer(
        model=model, args=args, train_dataset=records, eval_dataset=records[:2], data_collator=collate
    )
    trainer.train()
    best = VokenForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint)
    expected = weights(best)
    assert all(torch.equal(one, expected[name]) for name, one in weights(model).items())
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")  # and not the last one
