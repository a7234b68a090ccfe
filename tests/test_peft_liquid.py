"""Adapters: which weights they train, what they leave alone, what is saved, and what is merged."""

import copy
import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import (
    BASES,
    BOI_ID,
    CODEBOOK_SIZE,
    EOI_ID,
    IMAGE_ID,
    IMAGE_TOKEN_OFFSET,
    UNCOND_ID,
    VOCAB_SIZE,
    tiny_base,
    tiny_codec,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_tokenizer,
)
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from transformers_liquid import LiquidDataCollator, LiquidForCausalLM, expand_vocabulary
from transformers_liquid.training.adapters import liquid_lora_config, liquid_rows_config


ROWS = [IMAGE_ID, BOI_ID, EOI_ID, UNCOND_ID, *range(IMAGE_TOKEN_OFFSET, VOCAB_SIZE)]
TEXT_IDS = [token_id for token_id in range(VOCAB_SIZE) if token_id not in ROWS]
TRAINABLE_BASES = [model_type for model_type in BASES if model_type != "phi"]

TIED_OR_NOT = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
BOTH_CONFIGS = pytest.mark.parametrize("make_config", [liquid_lora_config, liquid_rows_config])


def _load(path, model_type="llama", tied=True):
    """What a user trains: a model loaded from where it was saved."""
    if not (path / "config.json").exists():
        tiny_model(model_type, tied).save_pretrained(path)
    return LiquidForCausalLM.from_pretrained(path)


def _frozen(path):
    """The base, frozen as below an adapter: torch folds some matrix products otherwise where a weight wants gradients."""
    return LiquidForCausalLM.from_pretrained(path).requires_grad_(False)


def _disturb(adapted):
    """Gives every trainable weight a value as far from its first as training could."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.eval()


def _ids(ids=range(VOCAB_SIZE), length=12):
    ids = torch.tensor([token_id for token_id in ids if token_id != 0])
    return ids[torch.randint(len(ids), (2, length), generator=torch.Generator().manual_seed(1))]


def _draw(model):
    prompt = _ids(TEXT_IDS, 5)
    prompt[:, -1] = BOI_ID
    settings = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)


# What is trained


@TIED_OR_NOT
@pytest.mark.parametrize("model_type", TRAINABLE_BASES)
def test_lora_adapts_every_linear_layer_of_the_body_and_neither_codec_nor_head(model_type, tied):
    model = tiny_model(model_type, tied)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    body = {name for name in linear if "vq_model" not in name and "lm_head" not in name}
    if model_type == "mamba":
        body = {name for name in body if name.endswith("in_proj")}
    assert len(body) >= 2
    assert len(linear - body) > 1
    adapted = get_peft_model(model, liquid_lora_config(model)).get_base_model()
    assert {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)} == body
    rows = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert len(rows) == (1 if tied else 2)


def test_the_configuration_is_readable_and_does_not_depend_on_the_number_of_layers(tmp_path):
    config = liquid_lora_config(_load(tmp_path))
    names = "down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj"
    assert config.target_modules == rf"model\.text_model\.model\.(.*\.)?({names})"
    assert config.trainable_token_indices == {"model.text_model.model.embed_tokens": ROWS}
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (16, 32, 0.0, "CAUSAL_LM")
    one_layer = tiny_text_config()
    one_layer.num_hidden_layers = 1
    assert liquid_lora_config(LiquidForCausalLM(tiny_config(one_layer))).target_modules == config.target_modules
    config = liquid_rows_config(_load(tmp_path / "untied", tied=False))
    assert config.target_modules == r"model\.text_model\.model\.embed_tokens|model\.text_model\.lm_head"
    assert (config.token_indices, config.task_type) == (ROWS, "CAUSAL_LM")


def test_arguments_of_lora_config_go_to_it_and_even_all_linear_leaves_the_codec_alone():
    model = tiny_model(tied=False)
    config = liquid_lora_config(model, r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear")
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 6, True)
    adapted = get_peft_model(model, config)
    lora = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert lora
    assert all(".layers." in name for name in lora)


@BOTH_CONFIGS
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("qwen2", False), ("gpt2", True), ("gemma2", False)])
def test_every_trainable_weight_gets_a_gradient(make_config, model_type, tied, tmp_path):
    adapted = _disturb(get_peft_model(model := _load(tmp_path, model_type, tied), make_config(model)))
    ids = torch.tensor([ROWS])
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.any(), name
        if "trainable_tokens" in name and (tied or "lm_head" in name):
            assert parameter.grad.any(dim=1).all(), name


# What is kept


@BOTH_CONFIGS
@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", True), ("llama", False), ("gemma2", True), ("gpt2", False), ("mamba", True)]
)
def test_adapters_are_small_reload_and_merge_into_a_model_that_draws_the_same(model_type, tied, make_config, tmp_path):
    model = _load(tmp_path / "base", model_type, tied)
    adapted = _disturb(get_peft_model(model, make_config(model)))
    ids = _ids()
    expected, drawn = adapted(input_ids=ids).logits, _draw(adapted)
    base = _frozen(tmp_path / "base")
    assert not torch.equal(drawn, _draw(base))

    adapted.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tables = [tensor for name, tensor in tensors.items() if "lora_" not in name]
    # PEFT writes tied rows twice if they are all that it trains.
    is_one = tied and make_config is liquid_lora_config
    assert [tensor.shape for tensor in tables] == [(len(ROWS), 32)] * (1 if is_one else 2)
    assert not any(VOCAB_SIZE in tensor.shape for tensor in tensors.values())

    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(reloaded(input_ids=ids).logits, expected)

    merged = adapted.merge_and_unload()
    assert type(merged) is LiquidForCausalLM
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(_draw(merged), drawn)
    merged.save_pretrained(tmp_path / "merged")
    saved = _frozen(tmp_path / "merged")
    assert torch.equal(saved(ids).logits, merged(ids).logits)
    for one in (merged, saved):
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == tied


@BOTH_CONFIGS
def test_an_adapter_finds_its_base_by_itself(make_config, tmp_path):
    model = _load(tmp_path / "base")
    adapted = _disturb(get_peft_model(model, make_config(model)))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_processor().save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=_ids()).logits, adapted(input_ids=_ids()).logits)


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [*((model_type, True) for model_type in TRAINABLE_BASES), ("llama", False), ("gpt2", False), ("mamba", False)],
)
def test_training_the_rows_alone_leaves_text_as_it_was_to_the_bit(model_type, tied, tmp_path):
    model = _load(tmp_path / "base", model_type, tied)
    base = _frozen(tmp_path / "base")
    text = _ids(TEXT_IDS)
    before = base(text).logits
    expected = before[..., TEXT_IDS]
    adapted = get_peft_model(model, liquid_rows_config(model)).eval()
    assert torch.equal(adapted(input_ids=text).logits, before)
    adapted = _disturb(adapted)
    after = adapted(input_ids=text).logits
    assert torch.equal(after[..., TEXT_IDS], expected)
    assert (after[..., ROWS] != before[..., ROWS]).all(dim=1).any(dim=0).all()

    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(reloaded(input_ids=text).logits, after)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged(text).logits, after)


# Training


class _Collator(LiquidDataCollator):
    """Remembers which ids the model has seen."""

    def __call__(self, records):
        batch = super().__call__(records)
        self.seen = getattr(self, "seen", set()) | set(batch["input_ids"][batch["attention_mask"] == 1].tolist())
        return batch


def _records():
    codes = [[(index * 5 + code) % CODEBOOK_SIZE for code in range(CODEBOOK_SIZE)] for index in range(4)]
    return [
        *({"kind": "text_to_image", "text": "a cat", "codes": one} for one in codes),
        *({"kind": "caption", "text": "two dogs", "codes": one} for one in codes[:2]),
        *({"kind": "text", "text": "Just words."} for _ in range(2)),
    ]


def _train(adapted, tmp_path, **arguments):
    """Four steps over all records."""
    defaults = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 0.01, "max_grad_norm": 0.0}
    defaults |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"remove_unused_columns": False, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
    collator = _Collator(tiny_processor(), unconditional_probability=0.5)
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(output_dir=str(tmp_path / "run"), **defaults | arguments),
        train_dataset=[record | {"index": index} for index, record in enumerate(_records())],
        data_collator=collator,
    )
    trainer.train()
    return collator.seen


def _moved_rows(before, after):
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


@BOTH_CONFIGS
@TIED_OR_NOT
def test_the_trainer_moves_exactly_the_image_and_special_rows(make_config, tied, tmp_path):
    model = _load(tmp_path / "base", "llama", tied)
    base = _frozen(tmp_path / "base")
    adapted = get_peft_model(model, make_config(model))
    seen = _train(adapted, tmp_path)
    assert {BOI_ID, EOI_ID, UNCOND_ID, *range(IMAGE_TOKEN_OFFSET, VOCAB_SIZE)} <= seen
    assert IMAGE_ID not in seen

    text = _ids(TEXT_IDS)
    keeps_text = torch.equal(adapted.eval()(input_ids=text).logits[..., TEXT_IDS], base(text).logits[..., TEXT_IDS])
    assert keeps_text == (make_config is liquid_rows_config)
    merged = adapted.merge_and_unload()
    embeddings, head = (
        _moved_rows(getter(base).weight, getter(merged).weight)
        for getter in (LiquidForCausalLM.get_input_embeddings, LiquidForCausalLM.get_output_embeddings)
    )
    # A head learns from every id that it could have said; embeddings of their own only from ids that they were given.
    assert head == set(ROWS)
    assert embeddings == (set(ROWS) if tied else set(ROWS) & seen)

    linear = "_proj.weight"
    for name, before in base.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            continue
        is_adapted = make_config is liquid_lora_config and name.endswith(linear) and "vq_model" not in name
        assert torch.equal(merged.get_parameter(name), before) != is_adapted, name


def test_without_these_rows_in_its_configuration_lora_leaves_them_where_they_were(tmp_path):
    model = _load(tmp_path / "base")
    base = _frozen(tmp_path / "base")
    plain = LoraConfig(target_modules=liquid_lora_config(model).target_modules, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, plain)
    _train(adapted, tmp_path)
    merged = adapted.merge_and_unload()
    assert not torch.equal(merged(_ids()).logits, base(_ids()).logits)
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)


@BOTH_CONFIGS
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
    ids=["checkpointing", "reentrant checkpointing", "accumulation"],
)
def test_checkpointing_and_accumulation_train_the_same_adapter(make_config, arguments, tmp_path):
    trained = []
    for settings in ({}, arguments):
        model = _load(tmp_path / "base")
        torch.manual_seed(0)
        adapted = get_peft_model(model, make_config(model))
        _train(adapted, tmp_path, optim="sgd", learning_rate=0.1, **settings)
        trained.append({name: value for name, value in adapted.named_parameters() if value.requires_grad})
    plain, other = trained
    initial = _load(tmp_path / "base").get_input_embeddings().weight[sorted(ROWS)]
    rows = next(value for name, value in plain.items() if "trainable_tokens" in name)
    assert (rows - initial).abs().max() > 1e-2
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=name)


# What is refused


@BOTH_CONFIGS
def test_models_that_cannot_be_adapted_are_refused(make_config):
    with pytest.raises(
        ValueError, match=r"must be a LiquidForCausalLM without adapters, got LlamaForCausalLM.*from_pretrained"
    ):
        make_config(tiny_base())
    with pytest.raises(ValueError, match=r"must be a LiquidForCausalLM without adapters, got LiquidModel"):
        make_config(tiny_model().model)
    model = tiny_model()
    adapted = get_peft_model(model, make_config(model))
    for one in (model, adapted):
        with pytest.raises(ValueError, match=r"without adapters, got .* with adapters\..*merge_and_unload"):
            make_config(one)
    make_config(adapted.merge_and_unload())


@BOTH_CONFIGS
@TIED_OR_NOT
def test_a_head_with_a_bias_is_refused_because_peft_would_lose_it(make_config, tied):
    model, ids = tiny_model("phi", tied), _ids()
    with pytest.raises(ValueError, match=r"head of PhiForCausalLM has a bias.*Train the whole model"):
        make_config(model)
    # The day that this fails, the refusal can go.
    before = model(ids).logits
    name = "embed_tokens" if tied else "lm_head"
    adapted = get_peft_model(model, TrainableTokensConfig(token_indices=ROWS, target_modules=[name])).eval()
    assert not torch.allclose(adapted(input_ids=ids).logits, before, atol=1e-3)


def test_an_expanded_model_that_was_not_saved_first_is_warned_about(tmp_path):
    model, _ = expand_vocabulary(tiny_base(vocab_size=IMAGE_TOKEN_OFFSET), tiny_tokenizer(), tiny_codec())
    model.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"not loaded from a repository.*Save the model"):
        config = liquid_lora_config(model)
    adapted = _disturb(get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(VOCAB_SIZE in tensor.shape for tensor in tensors.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        liquid_lora_config(LiquidForCausalLM.from_pretrained(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(LiquidForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=_ids()).logits, adapted(input_ids=_ids()).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make_config", [liquid_lora_config, liquid_rows_config])
def test_nothing_is_called_missing_that_is_there_and_what_is_missing_is_refused(make_config, tied, tmp_path, caplog):
    model = _load(tmp_path / "base", tied=tied)
    adapted = get_peft_model(model, make_config(model))
    adapted.save_pretrained(tmp_path / "adapter")
    with caplog.at_level("WARNING"):
        LiquidForCausalLM.from_pretrained(tmp_path / "adapter")
    assert "MISSING" not in caplog.text and "missing" not in caplog.text
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"The adapter .* has 1 missing keys"):
        LiquidForCausalLM.from_pretrained(tmp_path / "adapter")


@TIED_OR_NOT
@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_a_weighted_sum_of_adapters_is_one_of_their_rows_too(how, tied, tmp_path):
    folders = []
    for seed in range(2):
        model = _load(tmp_path / "base", tied=tied)
        adapted = get_peft_model(model, liquid_lora_config(model, r=2))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        folders.append(tmp_path / str(seed))
        adapted.save_pretrained(folders[-1])
    model = PeftModel.from_pretrained(_load(tmp_path / "base", tied=tied), folders[0], adapter_name="first")
    model.load_adapter(folders[1], adapter_name="second")
    options = {"density": 0.5} if how in ("ties", "dare_linear", "magnitude_prune") else {}
    model.add_weighted_adapter(["first", "second"], [0.75, -0.5], "mixed", combination_type=how, **options)
    model.add_weighted_adapter(["first", "second"], [1.0, 0.0], "same", combination_type="linear")

    def rows(name):
        model.set_adapter(name)
        liquid = model.get_base_model()
        ids = torch.arange(VOCAB_SIZE)
        head = liquid.get_output_embeddings()(torch.eye(32))
        return torch.cat([liquid.get_input_embeddings()(ids), head.T]).detach()

    base = _load(tmp_path / "base", tied=tied)
    base = torch.cat([base.get_input_embeddings().weight, base.get_output_embeddings().weight]).detach()
    expected = base + 0.75 * (rows("first") - base) - 0.5 * (rows("second") - base)
    torch.testing.assert_close(rows("mixed"), expected)
    torch.testing.assert_close(rows("same"), rows("first"))
    mixed = rows("mixed")
    model.save_pretrained(tmp_path / "all")
    model = PeftModel.from_pretrained(_load(tmp_path / "base", tied=tied), tmp_path / "all" / "mixed", "mixed")
    torch.testing.assert_close(rows("mixed"), mixed)


def test_adapters_of_different_rows_are_not_combined(tmp_path):
    model = _load(tmp_path / "base")
    adapted = get_peft_model(model, liquid_lora_config(model, r=2), adapter_name="all")
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [270]})
    adapted.add_adapter("one", config)
    adapted.add_adapter("none", LoraConfig(r=2, target_modules=["q_proj"]))
    for other in ("one", "none"):
        with pytest.raises(ValueError, match=f"all, {other} train different rows"):
            adapted.add_weighted_adapter(["all", other], [0.5, 0.5], "mixed")
    with pytest.raises(ValueError, match="none, all train different rows"):
        adapted.add_weighted_adapter(["none", "all"], [0.5, 0.5], "mixed")
    with pytest.raises(ValueError, match="Adapter another does not exist"):
        adapted.add_weighted_adapter(["all", "another"], [0.5, 0.5], "mixed")
    adapted.add_weighted_adapter(["none"], [0.5], "half of none")
    assert "half of none" not in adapted.get_base_model().get_input_embeddings().token_adapter.token_indices


# Drawing


def _layers(model):
    return {type(module).__module__.partition(".")[0] for module in model.modules()}


@BOTH_CONFIGS
@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", True), ("llama", False), ("gemma3_text", True), ("gpt2", False), ("mamba", True)]
)
def test_an_adapter_draws_with_the_weights_of_the_merged_model_and_stays_as_it_was(make_config, model_type, tied):

    def adapt():  # old versions of PEFT make adapters of rows that cannot be copied
        torch.manual_seed(0)
        base = tiny_model(model_type, tied)
        return base, _disturb(get_peft_model(base, make_config(base)))

    (model, adapted), (_, other) = adapt(), adapt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn, view = _draw(adapted), model.image_head_view()
    assert "peft" in _layers(model)
    assert "peft" not in _layers(view)
    if tied:
        table = view.get_input_embeddings().weight
        head = view.get_output_embeddings().weight
        assert head.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = other.merge_and_unload()
    assert torch.equal(merged.image_head_view()(_ids()).logits, view(_ids()).logits)
    assert torch.equal(_draw(merged), drawn)


def test_after_an_exception_an_adapter_is_as_it_was(monkeypatch):
    model = tiny_model()
    adapted = _disturb(get_peft_model(model, liquid_lora_config(model)))
    expected, names = adapted(input_ids=_ids()).logits, [name for name, _ in model.named_modules()]

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle")

    stop = {"generation_mode": "image", "stopping_criteria": [fail]}
    with pytest.raises(RuntimeError, match="in the middle"):
        adapted.generate(input_ids=torch.tensor([[5, BOI_ID]]), **stop)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(adapted(input_ids=_ids()).logits, expected)


def test_each_draws_with_the_adapters_that_are_active():
    model = tiny_model()
    bare = _draw(model)
    with_dora = liquid_lora_config(model, use_dora=True, trainable_token_indices=None)
    adapted = get_peft_model(model, liquid_lora_config(model))
    adapted.add_adapter("other", with_dora)
    adapted.set_adapter("other")
    _disturb(adapted)
    other = _draw(adapted)
    assert torch.equal(other, _draw(copy.deepcopy(adapted).merge_and_unload()))
    adapted.set_adapter("default")
    assert not torch.equal(_draw(_disturb(adapted)), other)
    with adapted.disable_adapter():
        assert torch.equal(_draw(adapted), bare)
    drawn = _draw(adapted)
    adapted.merge_adapter()
    assert torch.equal(_draw(adapted), drawn)


def test_layers_that_somebody_hooked_run_as_they_are():
    model = tiny_model()
    adapted = _disturb(get_peft_model(model, liquid_lora_config(model)))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    _draw(adapted)
    assert calls
