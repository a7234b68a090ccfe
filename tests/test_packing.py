"""Records in one packed row give the losses, gradients and logits that they give in rows of their own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import BASES, BOI_ID, CODEBOOK_SIZE, tiny_base, tiny_model, tiny_processor

from transformers_liquid import LiquidDataCollator
from transformers_liquid.ops.packed_attention import check_packing, use_packed_attention


# A state space model carries its state on; OPT counts positions itself.
UNPACKABLE = ["mamba", "opt"]
PACKABLE = [base for base in BASES if base not in UNPACKABLE]
COMBINATIONS = [(base, attention) for base in PACKABLE for attention in ("packed_sdpa", "sdpa", "eager")]
COMBINATIONS.append(("opt", "packed_sdpa"))
CODES = [code % CODEBOOK_SIZE for code in range(3, 19)]
RECORDS = [
    {"kind": "text_to_image", "text": "red", "codes": CODES, "index": 0},
    {"kind": "text", "text": "a dog and its shadow", "index": 1},
    {"kind": "caption", "text": "sun", "codes": CODES[::-1], "index": 2},
    {"kind": "interleaved", "text": "<image>b<image>", "images": [[[1, 2]], [[3], [4]]], "index": 3},
]


def build_model(base, attention):
    model = tiny_model(base)
    if attention.endswith("sdpa") and not model.model.text_model._supports_sdpa:
        pytest.skip(f"{base} has no sdpa")
    model.set_attn_implementation(attention)
    return model


def collate(**kwargs):
    return LiquidDataCollator(tiny_processor(), **kwargs)(RECORDS)


def gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, use_cache=False, **kwargs).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("base", "attention"), COMBINATIONS)
def test_a_packed_row_gives_the_loss_and_gradients_of_padded_rows(base, attention):
    model = build_model(base, attention)
    padded, packed = collate(), collate(packing=True)
    assert (padded["labels"] != -100).sum() == (packed["labels"] != -100).sum()
    for skip_logits in (False, True):
        expected_loss, expected = gradients(model, padded, skip_logits=skip_logits)
        loss, actual = gradients(model, packed, skip_logits=skip_logits)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name)


@pytest.mark.parametrize(("base", "attention"), COMBINATIONS)
@torch.no_grad()
def test_each_record_of_a_packed_row_has_the_logits_it_has_alone(base, attention):
    model = build_model(base, attention)
    batch = collate(packing=True)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(RECORDS)
    for start, end in zip(starts, [*starts[1:], logits.shape[1]], strict=True):
        alone = model(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits
        torch.testing.assert_close(logits[:, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", PACKABLE)
def test_check_packing_lets_models_that_isolate_records_pass(base):
    for model in (tiny_model(base), tiny_base(base), tiny_model(base).to(torch.bfloat16)):
        check_packing(model.train())
        assert model.training


@pytest.mark.parametrize("base", UNPACKABLE)
def test_check_packing_refuses_models_that_mix_records(base):
    for model in (tiny_model(base), tiny_base(base)):
        with pytest.raises(ValueError, match=f"the base {base} does not keep the records of a packed row apart"):
            check_packing(model)


def test_check_packing_takes_adapters_and_leaves_no_gradients():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    check_packing(model)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("base", ["llama", "gemma3_text"])
@torch.no_grad()
def test_a_model_that_ignores_restarting_positions_is_refused(base):
    model = tiny_model(base)
    forward = model.model.text_model.forward
    model.model.text_model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="by 100% of what running them on"):
        check_packing(model)


# packed_sdpa


@pytest.mark.parametrize("base", BASES)
def test_sdpa_runs_record_by_record_wherever_that_works(base):
    model = tiny_model(base)
    if base == "mamba":
        with pytest.raises(ValueError, match="does not keep the records of a packed row apart"):
            use_packed_attention(model)
        return
    use_packed_attention(model)
    expected = "packed_sdpa" if model.model.text_model._supports_sdpa else "eager"
    assert model.config.get_text_config()._attn_implementation == expected


def test_a_base_that_hides_its_positions_from_its_attention_keeps_sdpa(monkeypatch):
    model = tiny_model("llama")
    for layer in model.model.text_model.model.layers:
        forward = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *args, position_ids, forward=forward, **kwargs: forward(*args, **kwargs)
        )
    use_packed_attention(model)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_no_pairs_of_tokens_of_different_records_are_computed():
    model, batch = build_model("llama", "packed_sdpa"), collate(packing=True)
    lengths = []
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda query, *args, **kwargs: (
        lengths.append(query.shape[2]) or attention(query, *args, **kwargs)
    )
    try:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    expected = [end - start for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True)]
    assert lengths == expected * model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("base", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pictures_and_padded_batches_are_those_of_sdpa(base, cache):
    ids, mask = torch.randint(7, 250, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4], mask[0, :4], ids[:, -1] = 0, 0, BOI_ID
    found = []
    for attention in ("sdpa", "packed_sdpa"):
        model = build_model(base, attention)
        inputs = {"input_ids": ids, "attention_mask": mask}
        logits = model(**inputs).logits[:, 4:]
        settings = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
        found.append((logits, model.generate(**inputs, **settings, cache_implementation=cache)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
