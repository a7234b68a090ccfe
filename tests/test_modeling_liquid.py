"""The model: every base keeps its logits, images go in and out as ids, and transformers' doors stay open."""

import contextlib
import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import (
    BASES,
    BOI_ID,
    BOS_ID,
    CODEBOOK_SIZE,
    EOI_ID,
    IMAGE_ID,
    IMAGE_TOKEN_OFFSET,
    UNCOND_ID,
    VOCAB_SIZE,
    tiny_codec,
    tiny_config,
    tiny_model,
    tiny_pictures,
    tiny_processor,
    tiny_text_config,
)
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM, LiquidModel
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor
from transformers_liquid.ops.views import StandIn


ALL_BASES = pytest.mark.parametrize("model_type", BASES)
TIED_OR_NOT = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def _ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Text and image ids, no placeholders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(IMAGE_ID + 1, VOCAB_SIZE, (rows, length), generator=generator)


def _bare_base(model: LiquidForCausalLM):
    """The base as an instance of its own: what transformers makes of the same configuration and weights."""
    config = type(model.config.text_config).from_dict(model.config.text_config.to_dict())
    base = AutoModelForCausalLM.from_config(config)
    base.load_state_dict(model.model.text_model.state_dict())
    return base.eval()


def _is_tied(model: LiquidForCausalLM) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


# Bases


@ALL_BASES
@TIED_OR_NOT
def test_logits_are_the_bare_bases_before_and_after_save_and_load(model_type, tied, tmp_path):
    model = tiny_model(model_type, tied)
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = _bare_base(model)(ids, attention_mask=mask).logits
        assert expected.std() > 0.05
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        reloaded, info = LiquidForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        torch.testing.assert_close(reloaded(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert _is_tied(model) == _is_tied(reloaded) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(value, reloaded.state_dict()[name]), name


@TIED_OR_NOT
def test_tied_weights_are_one_tensor_after_every_load(tied, tmp_path):
    tiny_model("llama", tied).save_pretrained(tmp_path / "first")
    for arguments in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}):
        model = LiquidForCausalLM.from_pretrained(tmp_path / "first", **arguments)
        assert _is_tied(model) == tied, arguments
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    assert _is_tied(model) == tied
    model.save_pretrained(tmp_path / "second")
    assert _is_tied(LiquidForCausalLM.from_pretrained(tmp_path / "second")) == tied


@ALL_BASES
def test_every_base_draws_pictures_in_a_batch(model_type):
    model = tiny_model(model_type)
    ids, mask = _prompts()
    pictures = model.generate(ids, attention_mask=mask, generation_mode="image", guidance_scale=3.0)
    assert pictures.shape == (2, 16)
    assert model.decode_image_tokens(pictures).shape == (2, 3, 8, 8)


@ALL_BASES
def test_every_base_writes_what_it_wrote_before(model_type):
    model = tiny_model(model_type)
    ids, mask = _prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = _bare_base(model).generate(ids, **settings)
    assert expected[:, 6:].unique().numel() > 1
    assert torch.equal(model.generate(ids, **settings, suppress_image_tokens=False), expected)
    beams = _bare_base(model).generate(ids, **settings, num_beams=2)
    assert torch.equal(model.generate(ids, **settings, num_beams=2, suppress_image_tokens=False), beams)


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """A long and a short prompt for pictures, left-padded."""
    ids = torch.tensor([[BOS_ID, 50, 60, 70, 80, BOI_ID], [0, 0, 0, BOS_ID, 90, BOI_ID]])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "cohere", "granite", "gpt2", "mamba", "phi"])
@TIED_OR_NOT
def test_greedy_pictures_equal_a_full_recomputation_without_cache(model_type, tied):
    model = tiny_model(model_type, tied)
    base = _bare_base(model)
    scale = 3.0
    ids, mask = _prompts()
    drawn = model.generate(ids, attention_mask=mask, generation_mode="image", guidance_scale=scale, do_sample=False)

    def next_logits(ids: list[int]) -> torch.Tensor:
        logits = base(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return logits[IMAGE_TOKEN_OFFSET : IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE]

    with torch.no_grad():
        for row, row_mask, picture in zip(ids, mask, drawn.tolist(), strict=True):
            prompt = row[row_mask.bool()].tolist()
            expected = []
            for _ in range(16):
                conditional = next_logits(prompt + expected)
                unconditional = next_logits([BOS_ID, UNCOND_ID, BOI_ID, *expected])
                guided = unconditional + scale * (conditional - unconditional)
                expected.append(IMAGE_TOKEN_OFFSET + int(guided.argmax()))
            assert picture == expected


# Loss and training


def test_the_loss_is_the_bases_with_and_without_the_number_of_items_in_the_batch():
    model = tiny_model()
    base, ids = _bare_base(model), _ids()
    labels = ids.masked_fill(ids < 100, -100)
    torch.testing.assert_close(model(ids, labels=labels).loss, base(ids, labels=labels).loss)
    items = torch.tensor(50)
    loss = model(ids, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(loss, base(ids, labels=labels, num_items_in_batch=items).loss)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / 50
    torch.testing.assert_close(loss, by_hand)


def test_the_last_logits_alone_can_be_asked_for():
    model, ids = tiny_model(), _ids()
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "mamba"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    model, ids = tiny_model(model_type), _ids()
    _no_dropout(model).train()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def _no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_the_codec_stays_frozen_and_in_eval_mode_while_the_language_model_learns():
    model = tiny_model(tied=False).train()
    codec = copy.deepcopy(model.model.vq_model.state_dict())
    head = model.get_output_embeddings().weight.detach().clone()
    assert model.model.text_model.training
    assert not any(module.training for module in model.model.vq_model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids = _placeholder_prompt()
    model(ids, pixel_values=tiny_pictures(), labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_output_embeddings().weight, head)
    for name, value in model.model.vq_model.state_dict().items():
        assert torch.equal(value, codec[name]), name


def test_the_codec_is_frozen_after_a_load(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for model in (LiquidForCausalLM.from_pretrained(tmp_path), LiquidModel.from_pretrained(tmp_path).train()):
        codec = model.get_submodule("model.vq_model" if isinstance(model, LiquidForCausalLM) else "vq_model")
        assert not any(parameter.requires_grad for parameter in codec.parameters())
        assert not codec.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_codec_stays_in_fp32_when_the_language_model_is_loaded_in_half_precision(dtype, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = LiquidForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.model.text_model.parameters()} == {dtype}
    assert {parameter.dtype for parameter in half.model.vq_model.parameters()} == {torch.float32}
    pictures = tiny_pictures(2)
    assert torch.equal(torch.stack(half.encode_images(pictures)), torch.stack(model.encode_images(pictures)))
    ids, mask = _prompts()
    drawn = half.generate(ids, attention_mask=mask, generation_mode="image", guidance_scale=2.0)
    assert half.decode_image_tokens(drawn).dtype == torch.float32


def test_an_adapter_trains_and_leaves_the_rest():
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2))
    ids = _placeholder_prompt()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    first = adapted(input_ids=ids, pixel_values=tiny_pictures(), labels=ids).loss
    first.backward()
    optimizer.step()
    assert adapted(input_ids=ids, pixel_values=tiny_pictures(), labels=ids).loss < first
    merged = adapted.unload()
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, before[name]), name


# Back ends


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_sdpa_equals_eager(model_type):
    model = tiny_model(model_type)
    ids = _ids()
    assert model.model.text_model.config._attn_implementation == "sdpa"
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    assert model.model.text_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_the_forward_compiles_into_one_graph():
    model, ids = tiny_model(), _ids(1, 6)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_static_cache_draws_and_writes_the_same(model_type):
    model = tiny_model(model_type)
    ids, mask = _prompts()
    settings = {"attention_mask": mask, "do_sample": False, "disable_compile": True}
    for mode in ({"generation_mode": "image", "guidance_scale": 2.0}, {"max_new_tokens": 8, "min_new_tokens": 8}):
        dynamic = model.generate(ids, **settings, **mode)
        assert torch.equal(model.generate(ids, **settings, **mode, cache_implementation="static"), dynamic)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_nothing(device_map, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    mapped = LiquidForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    ids, mask = _prompts()
    torch.testing.assert_close(mapped(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    settings = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
    expected = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(mapped.generate(ids, attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("model_class", [LiquidForCausalLM, LiquidModel])
def test_quantizers_leave_the_codec_alone_and_take_the_language_model(model_class):
    # Asks transformers which layers it would hand over; tests/test_quantization.py runs what is installed.
    model = model_class(tiny_config())
    left_out = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    taken = {name for name in linear if should_convert_module(name, left_out)}
    codec = {name for name in linear if "vq_model" in name}
    assert codec
    assert not codec & taken
    assert {name for name in linear if ".layers." in name} == taken
    assert not model._keep_in_fp32_modules & model._keep_in_fp32_modules_strict  # as transformers wants it


def test_a_stateful_base_refuses_assisted_generation():
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        tiny_model("mamba").generate(_ids(1), prompt_lookup_num_tokens=2, max_new_tokens=4)


# Embeddings


def test_resizing_to_the_tokenizers_length_is_refused():
    model = tiny_model()
    end = IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE
    with pytest.raises(ValueError, match=f"to {IMAGE_TOKEN_OFFSET} rows would delete image rows.* least {end} rows"):
        model.resize_token_embeddings(IMAGE_TOKEN_OFFSET)
    with pytest.raises(ValueError, match="would delete image rows"):
        model.model.resize_token_embeddings(end - 1)
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE


@TIED_OR_NOT
def test_resizing_upwards_keeps_logits_and_reloads(tied, tmp_path):
    model, ids = tiny_model(tied=tied), _ids()
    expected = model(ids).logits
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 8
    torch.testing.assert_close(model(ids).logits[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded = LiquidForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


# Pictures in prompts


def _placeholder_prompt(pictures: int = 1) -> torch.Tensor:
    return torch.tensor([[BOS_ID, *[BOI_ID, *[IMAGE_ID] * 16, EOI_ID] * pictures, 40, 41]])


def test_placeholders_become_the_ids_of_the_codes_in_reading_order():
    model = tiny_model()
    pictures = tiny_pictures(3)
    codes = model.model.vq_model.encode_codes(pictures).flatten(1)
    assert len({tuple(row) for row in codes.tolist()}) == 3
    one, two, three = (codes + IMAGE_TOKEN_OFFSET).tolist()
    ids = torch.cat([_placeholder_prompt(2), torch.tensor([[0] * 18 + _placeholder_prompt(1)[0].tolist()])])
    mask = (ids != 0).long()
    by_hand = torch.tensor(
        [
            [BOS_ID, BOI_ID, *one, EOI_ID, BOI_ID, *two, EOI_ID, 40, 41],
            [*[0] * 18, BOS_ID, BOI_ID, *three, EOI_ID, 40, 41],
        ]
    )
    assert torch.equal(model.model.fill_image_placeholders(ids, pictures), by_hand)
    expected = model(by_hand, attention_mask=mask).logits
    assert torch.equal(model(ids, pixel_values=pictures, attention_mask=mask).logits, expected)
    assert torch.equal(model(ids, pixel_values=list(pictures), attention_mask=mask).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=pictures, attention_mask=mask).logits, expected)
    hidden = model.model(ids, pixel_values=pictures, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), expected)


def test_pictures_of_different_sizes_share_a_row():
    model = tiny_model()
    wide, small = tiny_pictures(1, 4, 12)[0], tiny_pictures(1, 4, 4)[0]
    ids = torch.tensor([[BOS_ID, BOI_ID, *[IMAGE_ID] * 12, EOI_ID, BOI_ID, *[IMAGE_ID] * 4, EOI_ID, 40]])
    filled = model.model.fill_image_placeholders(ids, [wide, small])
    expected = [model.model.vq_model.encode_codes(picture[None]).flatten() for picture in (wide, small)]
    assert torch.equal(filled[0, 2:14], expected[0] + IMAGE_TOKEN_OFFSET)
    assert torch.equal(filled[0, 16:20], expected[1] + IMAGE_TOKEN_OFFSET)


def test_placeholders_and_pictures_that_do_not_match_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="room for 1 images, but 2 were given"):
        model(_placeholder_prompt(1), pixel_values=tiny_pictures(2))
    ids = torch.cat([_placeholder_prompt(2), _placeholder_prompt(2)])
    ids[1, 20] = 99
    with pytest.raises(ValueError, match=r"Image 3 has 16 codes.*sequence 1 from position 21 on has 15 placeholders"):
        model(ids, pixel_values=tiny_pictures(4))
    with pytest.raises(ValueError, match="no pixel_values were given"):
        model.generate(_placeholder_prompt(), max_new_tokens=1)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_beam_search_with_several_pictures_a_row_equals_ids_resolved_by_hand(num_return_sequences):
    model = tiny_model()
    ids, pictures = torch.cat([_placeholder_prompt(2), _placeholder_prompt(2)]), tiny_pictures(4)
    resolved = ids.clone()
    resolved[ids == IMAGE_ID] = (model.model.vq_model.encode_codes(pictures) + IMAGE_TOKEN_OFFSET).flatten()
    settings = {"num_beams": 3, "num_return_sequences": num_return_sequences, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(resolved, **settings)
    found = model.generate(ids, pixel_values=pictures, **settings)
    assert torch.equal(found[:, -6:], expected[:, -6:])
    assert len(found) == 2 * num_return_sequences
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pictures, **settings)
    assert torch.equal(embedded, expected[:, -6:])


# Modes


class _Favour(LogitsProcessor):
    """Would make the model emit nothing but the given ids."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.ids] += 1000
        return scores


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}])
@pytest.mark.parametrize("favoured", [range(IMAGE_TOKEN_OFFSET, VOCAB_SIZE), [IMAGE_ID, BOI_ID, EOI_ID, UNCOND_ID]])
def test_text_never_holds_an_image_id_unless_asked_for(settings, favoured):
    model = tiny_model()
    processor = LogitsProcessorList([_Favour(favoured)])
    arguments = {"logits_processor": processor, "max_new_tokens": 6, "min_new_tokens": 6, **settings}
    never = {*range(IMAGE_TOKEN_OFFSET, VOCAB_SIZE), IMAGE_ID, BOI_ID, EOI_ID, UNCOND_ID}
    text = model.generate(_ids(2, 4), **arguments)[:, 4:]
    assert not never & set(text.flatten().tolist())
    anything = model.generate(_ids(2, 4), **arguments, suppress_image_tokens=False)[:, 4:]
    assert set(anything.flatten().tolist()) <= set(favoured)


def test_settings_of_images_are_refused_for_text_and_unknown_modes_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"not used by the model.*height.*guidance_min_p"):
        model.generate(_ids(), height=8, guidance_min_p=0.1)
    with pytest.raises(ValueError, match=r"generation_mode must be 'text', 'image' or 'interleaved', got .*'video'"):
        model.generate(_ids(), generation_mode="video")


# Ids and pictures


def test_encoding_and_decoding_go_through_the_codec():
    model, codec, pictures = tiny_model(), tiny_codec(), tiny_pictures(2, 4, 12)
    ids = torch.stack(model.encode_images(pictures))
    codes = codec.encode_codes(pictures)
    assert torch.equal(ids, codes.flatten(1) + IMAGE_TOKEN_OFFSET)
    assert codes.unique().numel() > 2
    decoded = model.decode_image_tokens(ids, height=4, width=12)
    torch.testing.assert_close(decoded, codec.decode_codes(codes).clamp(-1, 1))
    assert decoded.shape == (2, 3, 4, 12)
    torch.testing.assert_close(model.decode_image_tokens(ids[0], height=4, width=12), decoded[:1])


def test_a_head_that_fsdp_wrapped_stays_whole():
    model = tiny_model(tied=False)
    head = model.get_output_embeddings()
    assert type(model.image_head_view().get_output_embeddings()) is not StandIn
    head.__class__ = type("FSDPLinear", (FSDPModule, torch.nn.Linear), {})
    view = model.image_head_view().get_output_embeddings()
    assert type(view) is StandIn and view.head is head
    hidden_states = torch.ones(1, head.in_features)
    assert torch.equal(view(hidden_states), head(hidden_states)[..., model.config.image_layout.image_slice])


def test_ids_that_are_no_picture_are_named():
    model = tiny_model()
    ids = torch.full((1, 16), IMAGE_TOKEN_OFFSET)
    with pytest.raises(ValueError, match=r"4 x 4 codes needs 16 image ids, got 15"):
        model.decode_image_tokens(ids[:, 1:])
    ids[0, 5] = 44
    with pytest.raises(ValueError, match=rf"Id 44 at position 0, 5.*{IMAGE_TOKEN_OFFSET} ... {VOCAB_SIZE - 1}"):
        model.decode_image_tokens(ids)


def test_a_checkpoint_without_codec_is_refused(tmp_path):
    model = tiny_model()
    weights = {name: value for name, value in model.state_dict().items() if "vq_model" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"has no codec weights.*model\.vq_model\."):
        LiquidForCausalLM.from_pretrained(tmp_path)


def test_a_layout_outside_of_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=f"needs ids 270 ... 285.*vocabulary of {VOCAB_SIZE}"):
        tiny_config(image_token_offset=270)
    with pytest.raises(ValueError, match=f"boi_token_id={IMAGE_TOKEN_OFFSET} must be a text id"):
        tiny_config(boi_token_id=IMAGE_TOKEN_OFFSET)
    with pytest.raises(ValueError, match=r"multiples of 2 pixels.*height=9"):
        tiny_config(image_size=9)


def test_the_base_and_the_wrapper_share_one_configuration():
    config = tiny_config(tiny_text_config("qwen2", tied=False))
    model = LiquidForCausalLM(config)
    assert model.config.text_config is model.model.text_model.config
    assert config.tie_word_embeddings is False


# What is loaded is whole


def without(*parts):
    return lambda weights: {name: value for name, value in weights.items() if not any(part in name for part in parts)}


NORM = "model.text_model.model.norm.weight"
NOT_WHOLE = {
    "a layer is missing": (without(".layers.1."), {}, "9 missing keys: model.text_model.model.layers.1."),
    "one weight is missing": (without(NORM), {}, f"1 missing keys: {NORM}"),
    "the embeddings are missing": (without("embed_tokens", "lm_head"), {}, r"missing keys: .*embed_tokens\.weight"),
    "the language model is missing": (without("text_model"), {}, "21 missing keys: model.text_model"),
    "the codec's encoder is missing": (without("vq_model.encoder"), {}, r"no codec weights .*model\.vq_model\.encoder"),
    "everything is missing": (lambda weights: {}, {}, "no codec weights"),
    "a weight is unknown": (
        lambda weights: weights | {"model.text_model.extra": torch.ones(2)},
        {},
        "1 unexpected keys: model.text_model.extra",
    ),
    "a weight has another shape": (
        lambda weights: weights | {NORM: torch.ones(2)},
        {},
        rf"1 mismatched keys: \('{NORM}', torch.Size\(\[2\]\), torch.Size\(\[32\]\)\)",
    ),
    "there are fewer layers": (None, {"num_hidden_layers": 1}, "9 unexpected keys: model.text_model.model.layers.1."),
    "there are more layers": (None, {"num_hidden_layers": 3}, "9 missing keys: model.text_model.model.layers.2."),
    "there are more ids": (None, {"vocab_size": VOCAB_SIZE + 8}, "mismatched keys: .*embed_tokens"),
    "another base with other weights": (None, {"model_type": "qwen2"}, "missing keys: .*q_proj.bias"),
    "another base with such weights": (
        None,
        {"model_type": "gemma"},
        "LlamaForCausalLM, but .* 'gemma' .* GemmaForCausalLM",
    ),
    "a base much like it": (None, {"model_type": "mistral"}, "LlamaForCausalLM, but .* 'mistral'"),
}


def broken(path, change, settings, tied=True):
    """A repository with something changed in its weights or in its `text_config`."""
    tiny_model(tied=tied).save_pretrained(path)
    file, config_file = path / "model.safetensors", path / "config.json"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config["text_config"] |= settings
    config_file.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("model_class", [LiquidForCausalLM, LiquidModel, AutoModelForCausalLM])
@pytest.mark.parametrize("what", list(NOT_WHOLE))
def test_a_checkpoint_that_is_not_whole_is_refused_naming_its_keys(what, model_class, tmp_path):
    change, settings, message = NOT_WHOLE[what]
    if model_class is LiquidModel:  # its names are shorter
        message = "keys|weights"
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(broken(tmp_path, change, settings))


@pytest.mark.parametrize("tied", [True, False])
def test_flipped_ties_are_refused(tied, tmp_path):
    message = "lm_head.weight of its own" if not tied else "1 missing keys: .*lm_head.weight"
    with pytest.raises(ValueError, match=message):
        LiquidForCausalLM.from_pretrained(broken(tmp_path, None, {"tie_word_embeddings": not tied}, tied=tied))


def test_weights_of_another_shape_are_left_out_where_asked(tmp_path):
    broken(tmp_path, lambda weights: weights | {NORM: torch.ones(2)}, {})
    model, info = LiquidForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert model.model.text_model.model.norm.weight.shape == (32,)
    assert [key for key, *_ in info["mismatched_keys"]] == [NORM]


def test_new_weights_can_be_asked_for():
    config = tiny_config()
    model, info = LiquidForCausalLM.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert len(info["missing_keys"]) > 100
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_who_asks_for_the_loading_info_may_load_a_checkpoint_without_any_weight(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    save_file({"placeholder": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = LiquidForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] >= {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="has no codec weights"):
        LiquidForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
@pytest.mark.parametrize("liquid", [True, False])
def test_code_of_a_checkpoint_runs_only_where_the_caller_says_so(kind, liquid, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for file, auto_map in [
        ("config.json", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "code.T"]}),
    ]:
        if (kind == "model") == (file == "config.json"):
            content = json.loads((tmp_path / file).read_text()) | {"auto_map": auto_map, "tokenizer_class": "Theirs"}
            if not liquid and kind == "model":
                content |= {"model_type": "theirs"}
            (tmp_path / file).write_text(json.dumps(content))
    if not liquid:
        (tmp_path / "processor_config.json").unlink()
    for load in (LiquidForCausalLM.from_pretrained, LiquidModel.from_pretrained, LiquidProcessor.from_pretrained):
        with contextlib.suppress(ValueError, OSError):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


# The codec stays exact


ROUNDED = {
    "half": lambda model, path: model.half(),
    "bfloat16": lambda model, path: model.bfloat16(),
    "to": lambda model, path: model.to(torch.bfloat16),
    "to a device too": lambda model, path: model.to("cpu", torch.float16),
    "double": lambda model, path: model.double(),
    "within another module": lambda model, path: torch.nn.ModuleList([model]).half()[0],
    "loaded so": lambda model, path: LiquidForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
    "the base class": lambda model, path: LiquidModel.from_pretrained(path).half(),
    "made so": lambda model, path: _filled(
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16), model
    ),
    "on disk": lambda model, path: LiquidForCausalLM.from_pretrained(
        path, device_map={"model.text_model": "cpu", "model.vq_model": "disk"}, offload_folder=path / "offloaded"
    ),
    "in part on disk": lambda model, path: LiquidForCausalLM.from_pretrained(
        path,
        device_map={"model.text_model": "cpu"}
        | {f"model.vq_model.{part}": "cpu" for part in ("encoder", "quant_conv", "post_quant_conv")}
        | {f"model.vq_model.{part}": "disk" for part in ("decoder", "quantize")},
        offload_folder=path / "offloaded",
    ),
    "where there is room": lambda model, path: LiquidForCausalLM.from_pretrained(
        path, device_map="auto", max_memory={"cpu": 110_000}, offload_folder=path / "offloaded"
    ),
}


def _filled(model, source):
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("way", list(ROUNDED))
def test_the_codec_gives_the_same_codes_and_pictures_wherever_and_however_the_model_is(way, tmp_path):
    plain, pixel_values = tiny_model(), tiny_pictures(4)
    plain.save_pretrained(tmp_path)
    ids = torch.stack(plain.encode_images(pixel_values))
    expected = plain.decode_image_tokens(ids)
    model = ROUNDED[way](copy.deepcopy(plain), tmp_path)
    assert torch.equal(torch.stack(model.encode_images(pixel_values)), ids)
    assert model.base_model.vq_model.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(model.encode_images(pixel_values)), ids)
    if isinstance(model, LiquidForCausalLM):
        assert torch.equal(model.decode_image_tokens(ids), expected)
        assert torch.equal(
            model.decode_image_tokens(ids, dtype=torch.bfloat16), plain.decode_image_tokens(ids, dtype=torch.bfloat16)
        )


def test_a_codec_that_was_rounded_by_itself_reads_no_pictures():
    model = tiny_model()
    model.model.vq_model.half()
    with pytest.raises(ValueError, match=r"The codec is in torch\.float16, in which it gives other codes"):
        model.encode_images(tiny_pictures())
    with pytest.raises(ValueError, match=r"in torch\.float16"):
        model(input_ids=torch.full((1, 16), IMAGE_ID), pixel_values=tiny_pictures())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_and_codecs_that_are_no_numbers_are_named(value):
    model, pixel_values = tiny_model(), tiny_pictures(3)
    pixel_values[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"The pixels of picture 1 are NaN or infinite at \(2, 3, 4\)"):
        model.encode_images(pixel_values)
    with pytest.raises(ValueError, match=r"The pixels of picture 0 are NaN or infinite at \(2, 3, 4\)"):
        model.encode_images(list(pixel_values))
    codec = model.model.vq_model
    for part, run in [
        (codec.encoder.conv_in, lambda: codec.encode_codes(tiny_pictures())),
        (codec.decoder.conv_out, lambda: model.decode_image_tokens(torch.full((1, 16), IMAGE_TOKEN_OFFSET))),
    ]:
        part.bias.data[0] = value
        with pytest.raises(ValueError, match="of picture 0 are NaN or infinite"):
            run()
