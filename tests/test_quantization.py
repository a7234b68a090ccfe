"""Quantized language models draw, beside a codec in fp32: as far as a CPU can tell."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidProcessor, export_base_model


IMAGE = {"generation_mode": "image", "do_sample": False}


def int8_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def int4_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def int8_torchao():
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


CONFIGS = pytest.mark.parametrize("make_config", [int8_bitsandbytes, int4_bitsandbytes, int8_torchao])


@pytest.fixture(scope="module")
def plain():
    return LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT)


@pytest.fixture(scope="module")
def processor():
    return LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)


def is_quantized(module: nn.Module) -> bool:
    return type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor


@CONFIGS
@torch.no_grad()
def test_a_quantized_model_draws_nearly_what_the_plain_one_draws(make_config, plain, processor):
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, quantization_config=make_config())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, module in linear.items() if is_quantized(module)}
    assert quantized == {name for name in linear if ".layers." in name}  # neither the head nor the codec
    assert {parameter.dtype for parameter in model.model.vq_model.parameters()} == {torch.float32}

    inputs = processor(text=["red apple"], generation_mode="image", return_tensors="pt")
    ids = model.generate(**inputs, **IMAGE)
    assert ids.shape == (1, 64)
    assert all(token_id in model.config.image_token_range for token_id in ids[0].tolist())
    assert torch.equal(model.decode_image_tokens(ids), plain.decode_image_tokens(ids))
    expected = plain.generate(**inputs, **IMAGE)
    logits, expected_logits = (one(expected).logits.float().flatten() for one in (model, plain))
    assert torch.cosine_similarity(logits, expected_logits, dim=0) > 0.97


@CONFIGS
def test_a_reference_checkpoint_is_quantized_alike(make_config, plain, processor, tmp_path):
    export_base_model(plain, processor, tmp_path)
    model, expected = (
        LiquidForCausalLM.from_pretrained(path, quantization_config=make_config())
        for path in (tmp_path, EMOJI_CHECKPOINT)
    )
    assert {parameter.dtype for parameter in model.model.vq_model.parameters()} == {torch.float32}
    inputs = processor(text=["red apple"], generation_mode="image", return_tensors="pt")
    assert torch.equal(model.generate(**inputs, **IMAGE), expected.generate(**inputs, **IMAGE))


@pytest.mark.parametrize("make_config", [int8_bitsandbytes, int4_bitsandbytes])
def test_a_quantized_model_is_saved_and_loaded(make_config, processor, tmp_path):
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, quantization_config=make_config())
    model.save_pretrained(tmp_path)
    reloaded = LiquidForCausalLM.from_pretrained(tmp_path)
    inputs = processor(text=["red apple"], generation_mode="image", return_tensors="pt")
    assert torch.equal(reloaded.generate(**inputs, **IMAGE), model.generate(**inputs, **IMAGE))
