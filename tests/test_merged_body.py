"""The merged body of examples/smollm2_emoji against PEFT's own forward and backward."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_base, tiny_codec, tiny_model, tiny_tokenizer

from transformers_liquid import expand_vocabulary, liquid_lora_config


sys.path.append(str(Path(__file__).parents[1] / "examples" / "smollm2_emoji"))
pytest.importorskip("peft")
from merged_body import MergedBody


@pytest.fixture
def body(monkeypatch):
    """Of a model with an adapter that says something; its base weights are not rounded."""
    tokenizer = tiny_tokenizer(["<pad>", "<s>", "</s>"])
    model, _ = expand_vocabulary(tiny_base(vocab_size=len(tokenizer)), tokenizer, tiny_codec())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
        body = MergedBody(model, liquid_lora_config(model, r=4, lora_alpha=12))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in body.trained:
            weight.normal_(0, 0.3, generator=generator)
    return body


@pytest.mark.slow
def test_rows_of_one_and_of_two_sequences_are_the_adapters_own_forward_and_backward(body):
    vocab_size = len(body.embeddings)
    generator = torch.Generator().manual_seed(1)
    pairs, whole = torch.randint(0, vocab_size, (3, 12), generator=generator), torch.arange(24).view(2, 12) * 11
    probe = torch.randn(5, 12, vocab_size, generator=generator)
    with torch.compiler.set_stance("force_eager"):
        logits = body(torch.cat([pairs, whole % vocab_size]), halved=3) @ body.table().T
    (logits * probe).sum().backward()
    found = [weight.grad for weight in body.trained]
    body.rows.grad = None

    halves = body.model(input_ids=pairs.view(6, 6), use_cache=False).logits.view(3, 12, -1)
    expected = torch.cat([halves, body.model(input_ids=whole % vocab_size, use_cache=False).logits])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    (expected * probe).sum().backward()
    layers, wanted = body.text_model.layers, [body.rows.grad]
    for name in body.factors:
        modules = [layer.get_submodule(name.removesuffix(".weight")) for layer in layers]
        for kind in ("lora_B", "lora_A"):
            wanted.append(torch.stack([getattr(module, kind)["default"].weight.grad for module in modules]))
    assert len(found) == len(wanted) == 15
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_a_vocabulary_that_does_not_end_with_the_trained_rows_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="the last of a tied vocabulary"):
        MergedBody(model, liquid_lora_config(model, r=4))
