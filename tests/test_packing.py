"""Records in one packed row give the losses, gradients and logits that they give in rows of their own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import BASES, CODEBOOK_SIZE, tiny_base, tiny_model, tiny_processor

from transformers_liquid import LiquidDataCollator
from transformers_liquid.data_collator import check_packing


# A state space model carries its state on; OPT counts positions itself.
UNPACKABLE = ["mamba", "opt"]
PACKABLE = [base for base in BASES if base not in UNPACKABLE]
CODES = [code % CODEBOOK_SIZE for code in range(3, 19)]
RECORDS = [
    {"kind": "text_to_image", "text": "red", "codes": CODES, "index": 0},
    {"kind": "text", "text": "a dog and its shadow", "index": 1},
    {"kind": "caption", "text": "sun", "codes": CODES[::-1], "index": 2},
    {"kind": "interleaved", "text": "<image>b<image>", "images": [[[1, 2]], [[3], [4]]], "index": 3},
]


def build_model(base, attention):
    model = tiny_model(base)
    if attention == "sdpa" and not model.model.text_model._supports_sdpa:
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("base", PACKABLE)
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("base", PACKABLE)
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
