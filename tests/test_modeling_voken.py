"""The model with vokens: its mapper is the reference's, its states are the base's, its losses are the paper's."""

import math

import pytest
import torch
from tiny_vokens import (
    CAUSAL_BASES,
    VISION_BASES,
    VOKENS,
    picture_inputs,
    tiny_base_config,
    tiny_voken_config,
    tiny_voken_model,
)
from torch import nn

from transformers_liquid import VokenConfig, VokenFeatureMapper, VokenForConditionalGeneration


class Reference(nn.Module):
    """What MiniGPT-5's published code builds (eric-ai-lab/MiniGPT-5, model.py), with its names and default sizes."""

    def __init__(self, state_size=4096, width=1024, length=77, layers=4, heads=8):
        super().__init__()
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, length, width))
        self.fc = nn.Sequential(nn.Linear(state_size, width), nn.GELU(), nn.Linear(width, width))
        self.llm_to_t2i_mapping = nn.Transformer(
            batch_first=True, norm_first=True, d_model=width, num_encoder_layers=layers, num_decoder_layers=layers,
            dim_feedforward=width * 4, dropout=0.0, nhead=heads,
        )  # fmt: skip

    def forward(self, states):
        states = self.fc(states)
        return self.llm_to_t2i_mapping(src=states, tgt=self.t2i_decoder_prompt.repeat(len(states), 1, 1))


KEYS = {"t2i_decoder_prompt": "query", "fc.": "mlp.", "llm_to_t2i_mapping.": "encoder_decoder."}


def ours(name: str) -> str:
    reference, own = next(pair for pair in KEYS.items() if name.startswith(pair[0]))
    return own + name.removeprefix(reference)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_mapper_is_the_reference_weight_for_weight():
    reference = Reference(32, 16, 6, 2, 2).eval()
    mapper = VokenFeatureMapper(tiny_voken_config(condition_dim=16, mapper_num_layers=2)).eval()
    mapper.load_state_dict({ours(name): value for name, value in reference.state_dict().items()})
    states = torch.randn(3, 8, 32)
    torch.testing.assert_close(mapper(states).embeds, reference(states), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_default_sizes_are_the_references():
    with torch.device("meta"):
        mapper, reference = VokenFeatureMapper(VokenConfig()), Reference()
    assert {ours(name): value.shape for name, value in reference.state_dict().items()} == {
        name: value.shape for name, value in mapper.state_dict().items()
    }
    sizes = [
        sum(one.numel() for one in part.parameters()) for part in (mapper.encoder_decoder, mapper.mlp, nn.Identity())
    ]
    assert [*sizes[:2], mapper.query.numel()] == [117_575_680, 5_244_928, 78_848]


@pytest.mark.parametrize("pooled", [None, 12])
def test_a_mapper_of_another_width_projects_and_gives_the_pooled_vector_a_query_of_its_own(pooled):
    mapper = VokenFeatureMapper(tiny_voken_config(pooled_condition_dim=pooled)).eval()
    states = torch.randn(2, 8, 32)
    condition = mapper(states)
    plain = mapper.encoder_decoder(mapper.mlp(states), mapper.query.expand(2, -1, -1))
    torch.testing.assert_close(condition.embeds, mapper.projection(plain[:, :6]))
    assert condition.embeds.shape == (2, 6, 8) and mapper.query.shape == (1, 6 + (pooled is not None), 16)
    if pooled is not None:
        torch.testing.assert_close(condition.pooled, mapper.pooled_projection(plain[:, 6]))


def test_the_mapper_begins_as_torch_and_the_reference_begin_it_whatever_transformers_would_do():
    model = VokenForConditionalGeneration(tiny_voken_config(mapper_hidden_size=128, mapper_num_heads=8))
    mapper = model.feature_mapper
    for name, weight in mapper.encoder_decoder.named_parameters():
        if weight.ndim > 1:  # uniform in ± sqrt(6 / (fan in + fan out))
            assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.05), name
    assert mapper.mlp[0].weight.abs().max().item() == pytest.approx(32**-0.5, rel=0.01)
    assert mapper.query.std().item() == pytest.approx(1, rel=0.1)
    assert (mapper.encoder_decoder.encoder.layers[0].norm1.weight == 1).all()


def tokens(model_type, *parts):
    """Two sequences of a base, each with a picture to read if it reads pictures, and the tensors of these."""
    ids, tensors = ([], {}) if model_type in CAUSAL_BASES else picture_inputs(model_type, 2)
    return torch.tensor([[1, *ids, *part] for part in parts]), tensors


@pytest.mark.parametrize("model_type", [*CAUSAL_BASES, *VISION_BASES])
def test_states_are_those_that_put_out_the_vokens(model_type):
    """For every base: the head's input at the positions before the vokens, once with all ids and once step by step."""
    model = tiny_voken_model(model_type)
    ids, tensors = tokens(model_type, [40, *VOKENS, 41, *VOKENS], [41, 42, *VOKENS, *VOKENS])
    condition, rows = model.conditions(ids, **tensors)
    assert rows.tolist() == [0, 0, 1, 1]

    plain = model.text_model(input_ids=ids, output_hidden_states=True, **tensors)
    hidden = plain.language_model_outputs if "blip" in model_type else plain
    states = hidden.hidden_states[-1]
    if states.shape[-1] != model.config.state_size:  # of OPT, in some versions
        states = model.text_model.model.decoder.project_out(states)
    firsts = (ids == VOKENS[0]).nonzero().tolist()
    expected = torch.stack([states[row, column - 1 : column + 7] for row, column in firsts])
    torch.testing.assert_close(condition.embeds, model.feature_mapper(expected).embeds, atol=1e-5, rtol=0)
    # What the head makes of them are the logits with which each voken was put out.
    logits = torch.stack([plain.logits[row, column - 1 : column + 7] for row, column in firsts])
    heads = model.get_output_embeddings()(expected)
    if model_type not in ("gemma2", "cohere"):  # which change the scores after the head
        torch.testing.assert_close(heads, logits, atol=1e-5, rtol=0)


def batch(model_type="llama"):
    ids, tensors = tokens(model_type, [40, 41, *VOKENS, 42, 2], [43, *VOKENS, 44, 45, 2])
    labels = ids.clone()
    labels[:, :-11] = -100
    return {"input_ids": ids, "labels": labels, **tensors}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mamba", "opt", "llava", "qwen2_5_vl", "blip-2"])
def test_the_loss_is_the_weighted_sum_of_text_picture_and_caption(model_type):
    model = tiny_voken_model(model_type, "sd")
    inputs, latents, captions = batch(model_type), torch.randn(2, 4, 8, 8), ["ab", "c d"]
    torch.manual_seed(1)
    out = model(**inputs, target_latents=latents, captions=captions)

    labels = inputs["labels"]
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.text_loss, expected, atol=1e-6, rtol=0)
    decoder, _ = model.image_decoder, inputs.pop("labels")
    torch.manual_seed(1)
    image_loss = decoder.loss(latents, model.conditions(inputs.pop("input_ids"), **inputs)[0], 5.0).mean()
    torch.testing.assert_close(out.image_loss, image_loss, atol=1e-5, rtol=0)
    text = decoder.pipe.tokenizer(captions, padding="max_length", max_length=6, truncation=True, return_tensors="pt")
    target = decoder.pipe.text_encoder(text.input_ids)[0]
    torch.testing.assert_close(out.caption_loss, (out.condition - target).square().mean())
    torch.testing.assert_close(out.loss, 0.01 * out.text_loss + out.image_loss + 0.1 * out.caption_loss)
    out.loss.backward()
    assert all(one.grad is not None for one in model.feature_mapper.parameters())
    assert all(one.grad is None for one in decoder.denoiser.parameters())


def test_pictures_are_trained_as_their_latents_are():
    model, pictures = tiny_voken_model(family="sd"), torch.rand(2, 3, 16, 16) * 2 - 1
    torch.manual_seed(1)
    from_pixels = model(**batch(), target_pixel_values=pictures)
    torch.manual_seed(1)
    latents = model.image_decoder.encode(pictures)
    assert model(**batch(), target_latents=latents).loss == from_pixels.loss
    assert from_pixels.caption_loss is None


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_batch_without_pictures_has_the_text_loss_alone_and_a_gradient_for_every_weight(family):
    model = tiny_voken_model(family=family)
    ids = torch.tensor([[1, 40, 41, 42, 2]])
    out = model(ids, labels=ids)
    assert out.loss == 0.01 * out.text_loss and out.image_loss is None
    out.loss.backward()
    assert all(one.grad is not None and not one.grad.any() for one in model.feature_mapper.parameters())


def test_every_dropped_picture_has_the_unconditional_condition_and_the_empty_caption():
    model = tiny_voken_model(family="sd", unconditional_probability=1.0)
    model.train()
    out = model(**batch(), target_latents=torch.randn(2, 4, 8, 8), captions=["ab", "c d"])
    assert torch.equal(out.condition, model.unconditional().embeds.expand(2, -1, -1))
    empty = model.image_decoder.caption_condition([""]).embeds
    torch.testing.assert_close(out.caption_loss, (out.condition - empty).square().mean())
    model.eval()
    assert not torch.equal(model(**batch(), target_latents=torch.randn(2, 4, 8, 8)).condition, out.condition)


def test_a_tenth_of_the_pictures_is_dropped():
    model = tiny_voken_model(image_loss_weight=0.0).train()
    ids = torch.tensor([[1, 40, *VOKENS]] * 500)
    nothing = model.unconditional().embeds
    dropped = 0
    with torch.no_grad():
        for _ in range(20):
            condition = model(ids, labels=ids).condition
            dropped += int((condition - nothing).abs().amax((1, 2)).lt(1e-6).sum())
    assert dropped / 10_000 == pytest.approx(0.1, abs=0.01)


def refused(model=None, **changes):
    model = tiny_voken_model(family="sd") if model is None else model
    with pytest.raises(ValueError) as error:
        model(**{**batch(), "target_latents": torch.randn(2, 4, 8, 8), **changes})
    return str(error.value)


def test_targets_that_are_not_as_many_as_runs_are_refused():
    message = refused(target_latents=torch.randn(3, 4, 8, 8))
    assert "2 runs" in message and "[1, 1]" in message and "3 target pictures" in message
    assert "0 target pictures" in refused(target_latents=None)
    ids = torch.tensor([[1, 40, 41]])
    assert "0 runs" in refused(input_ids=ids, labels=ids)
    assert "1 captions" in refused(captions=["a"])
    assert "captions must be a text" in refused(captions=["a", None])
    assert "not both" in refused(target_pixel_values=torch.zeros(2, 3, 16, 16))


def test_pictures_of_another_size_or_kind_are_refused():
    assert "multiples of 2" in refused(target_latents=None, target_pixel_values=torch.zeros(2, 3, 15, 16))
    assert "2 pictures with 4 channels" in refused(target_latents=torch.randn(2, 3, 8, 8))


def test_runs_that_are_not_whole_are_refused():
    ids = torch.tensor([[1, 40, *VOKENS[:5], 41, 42, 43]])
    message = refused(input_ids=ids, labels=ids, target_latents=torch.randn(1, 4, 8, 8))
    assert "position 2 of sequence 0 begins no run" in message
    ids = torch.tensor([[1, 40, *VOKENS[:7]]])
    assert "begins no run" in refused(input_ids=ids, labels=ids, target_latents=torch.randn(1, 4, 8, 8))
    ids = torch.tensor([[*VOKENS, 41]])
    assert "position 0 of sequence 0 begins no run" in refused(
        input_ids=ids, labels=ids, target_latents=torch.randn(1, 4, 8, 8)
    )
    ids = torch.tensor([[0, 0, *VOKENS]])
    mask = torch.tensor([[0, 0] + [1] * 8])
    assert "position 2 of sequence 0 begins no run" in refused(
        input_ids=ids, labels=ids, attention_mask=mask, target_latents=torch.randn(1, 4, 8, 8)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 11, 32)}, "Labels need input_ids"),
        ({"labels": None}, "pictures to learn need labels"),
        ({"labels": torch.tensor([[1, 40]])}, "Labels need input_ids of their shape"),
        ({"labels": None, "target_pixel_values": None, "captions": ["a"]}, "pictures to learn need labels"),
        ({"captions": "a"}, "captions must be a text for each"),
        ({"target_pixel_values": torch.zeros(1, 4, 16, 16)}, r"must be floats \(N, 3, H, W\)"),
        ({"target_pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, r"must be floats \(N, 3, H, W\)"),
        ({"target_pixel_values": torch.zeros(1, 3, 16)}, r"must be floats \(N, 3, H, W\)"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, message):
    ids = torch.tensor([[1, 40, 41, *VOKENS]])
    batch = {"input_ids": ids, "labels": ids, "target_pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(ValueError, match=message):
        tiny_voken_model(family="sd")(**{**batch, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "Give input_ids"),
        ({"generation_mode": "sound"}, "'text' or 'image', got 'sound'"),
        ({"generation_mode": "image", "guidance_skale": 2.0}, "guidance_skale"),
        ({"generation_mode": "image", "num_images": 2}, "num_images"),
        ({"generation_mode": "image", "output_type": "np"}, "output_type"),
    ],
)
def test_arguments_that_generate_does_not_know_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_voken_model(family="sd").generate(**{"input_ids": torch.tensor([[1, 40]]), **arguments})


def test_outputs_are_a_tuple_if_asked_for():
    ids = torch.tensor([[1, 40]])
    model = tiny_voken_model()
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_a_batch_without_labels_to_learn_is_refused():
    assert "labels other than -100" in refused(labels=torch.full((2, 13), -100))


def test_a_model_without_an_image_decoder_says_so():
    assert "no image decoder" in refused(tiny_voken_model())


def test_an_image_decoder_of_another_width_is_refused():
    decoder = tiny_voken_model(family="sdxl").image_decoder
    with pytest.raises(ValueError, match=r"vectors of 16 \(pooled: 12\)"):
        tiny_voken_model().attach(decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"voken_token_ids": [300, 301]}, "different ids of the base's vocabulary"),
        ({"voken_token_ids": [4, 4]}, "different ids"),
        ({"voken_token_ids": []}, "different ids"),
        ({"mapper_num_heads": 3}, "must divide"),
        ({"mapper_num_heads": 0}, "mapper_num_heads must be at least 1"),
        ({"condition_length": 0}, "at least 1"),
        ({"pooled_condition_dim": 0}, "at least 1"),
        ({"mapper_intermediate_size": -4}, "at least 1"),
        ({"caption_loss_weight": -0.1}, "caption_loss_weight must be at least 0"),
        ({"text_loss_weight": math.nan}, "text_loss_weight must be at least 0"),
        ({"unconditional_probability": 1.1}, "from 0 to 1"),
        ({"snr_gamma": 0.0}, "snr_gamma above 0"),
        ({"text_config": tiny_base_config("llava"), "voken_token_ids": [3, 4]}, "it is no voken"),
    ],
)
def test_configurations_that_cannot_be_met_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_voken_config(**change)


def test_a_state_size_that_is_not_the_heads_is_refused():
    with pytest.raises(ValueError, match="reads states of 24"):
        VokenForConditionalGeneration(tiny_voken_config("opt", state_size=32))
