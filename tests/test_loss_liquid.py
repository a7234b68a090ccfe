"""The chunked loss is the plain loss: same value, same gradients, through whatever head a base has."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import BASES, BOS_ID, EOI_ID, EOS_ID, IMAGE_TOKEN_OFFSET, VOCAB_SIZE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_liquid.ops import chunked_loss as loss_liquid
from transformers_liquid.ops.chunked_loss import image_targets, next_labels


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five positions at a time: several chunks, the last one not full."""
    monkeypatch.setattr(loss_liquid, "MAX_CHUNK_LOGITS", 5 * VOCAB_SIZE)


def tiny_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, VOCAB_SIZE, (2, 14), generator=generator)
    ids[:, 5:9] = IMAGE_TOKEN_OFFSET + torch.arange(8).view(2, 4)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 10:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    outputs = model(**batch, **kwargs)
    outputs.loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return outputs, gradients


def assert_same(model, batch, rtol=1e-5, **kwargs):
    plain, plain_gradients = loss_and_gradients(model, batch, skip_logits=False, **kwargs)
    chunked, gradients = loss_and_gradients(model, batch, skip_logits=True, **kwargs)
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=rtol, atol=0)
    assert plain.logits is not None and chunked.logits is None
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        scale = max(float(plain_gradients[name].abs().max()), 1e-3)
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=0, atol=10 * rtol * scale, msg=name)
    return gradients


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_chunked_loss_and_gradients_are_those_of_the_base(base, tied):
    gradients = assert_same(tiny_model(base, tied), tiny_batch(), num_items_in_batch=torch.tensor(30))
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [4, IMAGE_TOKEN_OFFSET, VOCAB_SIZE - 1]},
        },
        {"target_modules": ["q_proj"]},
    ],
    ids=["lora head", "saved head", "trainable rows", "frozen head"],
)
@pytest.mark.filterwarnings("ignore")
def test_rows_train_through_every_kind_of_adapted_head(config, tied):
    model = get_peft_model(tiny_model(tied=tied), LoraConfig(init_lora_weights=False, **config))
    gradients = assert_same(model, tiny_batch())
    if "modules_to_save" in config:
        assert any("lm_head.modules_to_save" in name for name in gradients)
    if "trainable_token_indices" in config:
        [rows] = [gradient for name, gradient in gradients.items() if "trainable_tokens_delta" in name]
        assert (rows.abs().amax(1) > 0).all() or not tied


def test_max_z_loss_is_the_mean_squared_greatest_logit():
    model, batch = tiny_model("gemma2"), tiny_batch()  # the greatest logit after soft-capping
    model.config.max_z_loss_coef = 0.01
    chunked, gradients = loss_and_gradients(model, batch, skip_logits=True)

    model.zero_grad()
    targets = next_labels(batch["labels"])
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[targets != -100].float()
    expected = torch.nn.functional.cross_entropy(logits, targets[targets != -100])
    expected = expected + 0.01 * (logits.max(-1).values ** 2).mean()
    expected.backward()
    torch.testing.assert_close(chunked.loss, expected)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("llama", {"training": True}),
        ("llama", {"training": False}),
        ("llama", {"training": True, "skip_logits": False}),
        ("llama", {"training": False, "skip_logits": True}),
        ("llama", {"training": True, "skip_logits": False, "num_items_in_batch": 7}),
        ("mixtral", {"training": True}),
        ("mixtral", {"training": True, "output_router_logits": True}),
        ("mixtral", {"training": False, "output_router_logits": True}),
        ("qwen3_moe", {"training": True, "output_router_logits": True}),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_max_z_loss_counts_wherever_there_is_a_loss(base, options, shifted):
    model, batch = tiny_model(base), tiny_batch()
    options = dict(options)
    model.train(options.pop("training"))
    model.config.text_config.output_router_logits = options.pop("output_router_logits", False)
    targets = next_labels(batch["labels"])
    logits = model(input_ids=batch["input_ids"]).logits[targets != -100]
    if shifted:
        batch["shift_labels"] = targets
        del batch["labels"]
    losses = []
    for coefficient in (0.0, 0.01):
        model.config.max_z_loss_coef = coefficient
        losses.append(model(**batch, **options).loss)
    number = options.get("num_items_in_batch", len(logits))
    expected = 0.01 * logits.amax(-1).square().sum() / number
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-3, atol=1e-5)


def test_the_sum_over_micro_batches_is_the_whole_batch():
    model, batch = tiny_model(), tiny_batch()
    number = int((batch["labels"][:, 1:] != -100).sum())
    whole, gradients = loss_and_gradients(model, batch, skip_logits=True)
    model.zero_grad()
    parts = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    losses = [model(**part, skip_logits=True, num_items_in_batch=torch.tensor(number)).loss for part in parts]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), whole.loss)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_a_scaled_loss_scales_its_gradients():
    model, batch = tiny_model(), tiny_batch()
    _, gradients = loss_and_gradients(model, batch, skip_logits=True)
    model.zero_grad()
    (3 * model(**batch, skip_logits=True).loss).backward()
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight.grad, 3 * gradients["model.text_model.model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_one_loss_gives_its_gradients_as_often_as_they_are_asked_for(tied, adapted):
    model, batch = tiny_model(tied=tied), tiny_batch()
    if adapted:
        config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [270]})
        model = get_peft_model(model, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**batch, skip_logits=True).loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    torch.autograd.grad(2 * loss, parameters, retain_graph=True)
    (3 * loss).backward()
    for parameter, gradient, copied in zip(parameters, first, kept, strict=True):
        assert torch.equal(gradient, copied)  # what was given away is not written to
        torch.testing.assert_close(parameter.grad, 3 * gradient)


def test_second_derivatives_are_refused_in_chunks_and_right_without():
    model, batch = tiny_model(), tiny_batch()
    model.set_attn_implementation("eager")
    weight = model.get_input_embeddings().weight
    with pytest.raises(RuntimeError, match=r"no second derivatives.*skip_logits=False"):
        torch.autograd.grad(model(**batch, skip_logits=True).loss, weight, create_graph=True)
    (gradient,) = torch.autograd.grad(model(**batch, skip_logits=False).loss, weight, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad.abs().max() > 0


def test_statistics_are_those_of_the_logits():
    model, batch = tiny_model(), tiny_batch()
    logits = model(input_ids=batch["input_ids"]).logits
    targets = next_labels(batch["labels"])
    # Let some labels be right.
    batch["labels"][:, 1:] = torch.where(
        (targets[:, :-1] != -100) & (torch.arange(13) % 3 == 0), logits.argmax(-1)[:, :-1], batch["labels"][:, 1:]
    )
    targets = next_labels(batch["labels"])
    with torch.no_grad():
        stats = model(**batch, skip_logits=True).token_stats
    for row, chosen in enumerate((~image_targets(model.config, targets), image_targets(model.config, targets))):
        chosen = chosen & (targets != -100)
        loss = torch.nn.functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
        right = (logits[chosen].argmax(-1) == targets[chosen]).sum()
        torch.testing.assert_close(stats[row], torch.tensor([loss.item(), float(right), float(chosen.sum())]))
    assert (stats[:, 2] > 0).all() and stats[:, 1].sum() > 3


def test_codes_eoi_and_the_eos_after_it_are_image_and_all_else_is_text():
    code = IMAGE_TOKEN_OFFSET
    targets = torch.tensor([[-100, 50, EOS_ID, code, code + 15, EOI_ID, EOS_ID, BOS_ID, EOS_ID]])
    expected = [False, False, False, True, True, True, True, False, False]
    assert image_targets(tiny_model().config, targets)[0].tolist() == expected


def test_logits_of_all_positions_never_exist_at_once():
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                tensor.numel() for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, torch.Tensor)
            )
            return result

    model = tiny_model()
    ids = torch.randint(7, VOCAB_SIZE, (4, 100))
    with Recorder():
        model(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
    assert max(sizes) < 4 * 99 * VOCAB_SIZE / 4
    sizes.clear()
    with Recorder():
        model(input_ids=ids, labels=ids, skip_logits=False).loss.backward()
    assert max(sizes) >= 4 * 99 * VOCAB_SIZE


@pytest.mark.parametrize("tied", [True, False])
def test_autocast_loss_is_the_plain_autocast_loss(tied):
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(tiny_model(tied=tied), tiny_batch(), rtol=5e-3)


def test_half_precision_weights_train():
    model = tiny_model().to(torch.bfloat16)
    assert_same(model, tiny_batch(), rtol=1e-2)


def test_logits_are_skipped_while_training_only():
    model, batch = tiny_model(), tiny_batch()
    assert model.eval()(**batch).logits is not None
    assert model.train()(**batch).logits is None
    assert model.train()(input_ids=batch["input_ids"]).logits is not None


def test_a_router_loss_is_kept():
    model, batch = tiny_model("mixtral").train(), tiny_batch()
    without = model(**batch).loss
    model.config.text_config.output_router_logits = True
    with_router = model(**batch)
    assert with_router.loss > without + 1e-4
    assert with_router.aux_loss > 0


def test_shift_labels_are_taken_as_they_are():
    model, batch = tiny_model().train(), tiny_batch()
    expected = model(**batch).loss
    shifted = model(input_ids=batch["input_ids"], shift_labels=next_labels(batch["labels"])).loss
    torch.testing.assert_close(shifted, expected)


def test_gradient_checkpointing_changes_nothing():
    model, batch = tiny_model().train(), tiny_batch()
    _, gradients = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    _, again = loss_and_gradients(model, batch)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient)


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    before = copy.deepcopy(dict(model.named_modules())).keys()
    model(**tiny_batch()).loss.backward()
    assert dict(model.named_modules()).keys() == before


def test_a_batch_without_labels_is_refused():
    batch = tiny_batch()
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match=r"All labels of this batch \(\(2, 14\) positions\) are -100"):
        tiny_model().train()(**batch)
