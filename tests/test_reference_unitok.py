"""UniTok's language model as it is published: tiny random weights under its names, read, drawn with and written back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_unitok import Oracle, published, write
from test_several_codes import K, N, V, head_logits, random_codes
from tiny import TINY_UNITOK_CONFIG, tiny_base, tiny_text_config, tiny_tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, pipeline

from transformers_liquid import (
    LiquidForCausalLM,
    LiquidModel,
    LiquidProcessor,
    UniTokModel,
    export_unitok,
    load_unitok_codec,
)
from transformers_liquid.models.liquid.unitok_reference import from_unitok, to_unitok


TOKENS = ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>", "<0x02>"]
HIDDEN, WIDTH, CHANNELS = 32, 32, 8
LLAMA = tiny_text_config(tied=False, vocab_size=len(TOKENS) + 256, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def language_model(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under every name of `MiniGeminiLlamaForCausalLM`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: one.clone() for name, one in tiny_base(tied=False, vocab_size=LLAMA.vocab_size).state_dict().items()
    }

    def add(name, *shape, bias=False):
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        if bias:
            tensors[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.1

    name = "model.multi_embedder"
    for index in range(K):
        add(f"{name}.quantizer.codebooks.{index}.codebook", V, CHANNELS // K)
        tensors[f"{name}.quantizer.codebooks.{index}.vocab_usage"] = torch.zeros(V)
    of_codec = {name: one for name, one in published(1).items() if name.startswith("post_quant_proj.")}
    tensors |= {one.replace("post_quant_proj", f"{name}.attn_projection"): tensor for one, tensor in of_codec.items()}
    add(f"{name}.mm_projector.0", WIDTH, bias=True)
    add(f"{name}.mm_projector.1", HIDDEN, WIDTH, bias=True)
    add(f"{name}.mm_projector.3", HIDDEN, HIDDEN, bias=True)
    for layer in range(3):
        for part, tensor in tensors.copy().items():
            if part.startswith("model.layers.0."):
                shape = tensor.shape
                tensors[part.replace("model.layers.0", f"ar_head.layers.{layer}")] = torch.randn(
                    shape, generator=generator
                ) * 0.2 + (len(shape) == 1)
    add("ar_head.norm", HIDDEN)
    add("ar_head.linear_head", V, HIDDEN, bias=True)
    for index in range(K - 1):
        add(f"ar_head.codebooks.{index}", V, HIDDEN)
    return tensors


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "unitok_mllm"
    path.mkdir()
    save_file(language_model(), path / "model.safetensors", {"format": "pt"})
    config = LLAMA.to_dict() | {"model_type": "mini_gemini", "architectures": ["MiniGeminiLlamaForCausalLM"]}
    # What the published sizes are known by is too large here.
    config["liquid_layout"] = {"vq_config": TINY_UNITOK_CONFIG, "image_size": 64}
    (path / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(TOKENS, pad_token=None, unk_token="<unk>").save_pretrained(path)
    write(path / "unitok_tokenizer.pth", published())
    return str(path)


@pytest.fixture(scope="module")
def model(repository):
    return LiquidForCausalLM.from_pretrained(repository)


def test_every_weight_is_where_the_reference_has_it(repository, model):
    """Text, embeddings of codes and logits of codes, each by the published names alone."""
    tensors = language_model()
    llama = LlamaForCausalLM(LLAMA).eval()
    llama.load_state_dict({name: one for name, one in tensors.items() if name in llama.state_dict()})
    ids = torch.tensor([[1, 9, 20, 33]])
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)

    name, codes = "model.multi_embedder", random_codes(2)
    oracle = Oracle({one.removeprefix(f"{name}."): tensor for one, tensor in tensors.items() if one.startswith(name)})
    x = oracle.projection("attn_projection", oracle.vectors(codes), WIDTH // CHANNELS, causal=True)
    x = oracle.linear("mm_projector.1", oracle.norm("mm_projector.0", x))
    expected = oracle.linear("mm_projector.3", F.gelu(x))
    torch.testing.assert_close(model.model.code_embedder(codes).double(), expected, atol=1e-4, rtol=1e-4)

    head = {one.removeprefix("code_head."): one for one in model.state_dict() if one.startswith("code_head.")}
    theirs = {"output": "linear_head", "body.layers": "layers", "body.norm": "norm", "codebooks": "codebooks"}
    for ours, full in head.items():
        place = next(one for one in theirs if ours.startswith(one))
        assert torch.equal(model.state_dict()[full], tensors[f"ar_head.{ours.replace(place, theirs[place], 1)}"])
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    logits = model.code_head(hidden, random_codes(3)[:, :-1, 0])
    torch.testing.assert_close(
        logits.double(), head_logits(model, hidden, random_codes(3)[:, :-1, 0]), atol=1e-4, rtol=1e-4
    )

    codec = load_unitok_codec(f"{repository}/unitok_tokenizer.pth", TINY_UNITOK_CONFIG)
    assert all(torch.equal(model.model.vq_model.state_dict()[key], one) for key, one in codec.state_dict().items())


def test_prompts_are_the_references(repository):
    processor = LiquidProcessor.from_pretrained(repository)
    tokenizer = tiny_tokenizer(TOKENS)
    inputs = processor(text=["red"], generation_mode="image")
    asked = tokenizer.encode("red Generate an image based on this description.", add_special_tokens=False)
    assert inputs["input_ids"].tolist() == [[1, *asked, 3]]
    assert inputs["negative_prompt_ids"].tolist() == [
        [1, *tokenizer.encode("<unconditional>", add_special_tokens=False), 3]
    ]


def test_questions_are_asked_in_the_references_words(repository, tmp_path):
    """The words of `vicuna_v1` in the reference; around a picture stand its begin and its end."""
    words = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    words += "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:"
    LiquidProcessor.from_pretrained(repository).save_pretrained(tmp_path)
    for name in (repository, tmp_path):
        processor = LiquidProcessor.from_pretrained(name)
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}]
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == f"<s>{words}"
        messages += [{"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Why?"}]
        expected = f"<s>{words} A dog.</s>USER: Why? ASSISTANT:"
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
        system = [{"role": "system", "content": "Be short."}, *messages[2:]]
        assert processor.apply_chat_template(system) == "<s>Be short. USER: Why? "
    before, after = (processor.tokenizer.encode(part, add_special_tokens=False) for part in words.split("<image>"))
    assert processor.question_ids("What is this?", np.zeros((K, 16), int)) == [1, *before, 3, *[5] * 16, 4, *after]


def test_without_a_negative_prompt_the_text_is_the_references(repository, model):
    processor = LiquidProcessor.from_pretrained(repository)
    inputs = processor(text=["red"], generation_mode="image")
    given = model.generate(**inputs, generation_mode="image", generator=torch.Generator().manual_seed(0))
    left_out = {name: one for name, one in inputs.items() if not name.startswith("negative")}
    assert torch.equal(
        given, model.generate(**left_out, generation_mode="image", generator=torch.Generator().manual_seed(0))
    )


def test_the_name_alone_is_enough(repository, model):
    assert isinstance(AutoModelForCausalLM.from_pretrained(repository), LiquidForCausalLM)
    assert isinstance(LiquidModel.from_pretrained(repository), LiquidModel)
    processor = AutoProcessor.from_pretrained(repository)
    processor.check_fits(model.config)
    pipe = pipeline("text-to-image", model=repository)
    image = pipe("red", seed=0)[0]
    inputs = processor(text=["red"], generation_mode="image")
    codes = model.generate(**inputs, generation_mode="image", generator=[torch.Generator().manual_seed(0)])
    assert codes.shape == (1, K, N)
    expected = processor.post_process_multimodal_output(model.decode_image_tokens(codes), generation_mode="image")[0]
    assert image.tobytes() == expected.tobytes()


def test_its_settings_are_the_references(model):
    settings = {"guidance_scale": 5.0, "do_sample": True, "temperature": 0.9, "top_k": 2048, "top_p": 0.96}
    assert model.generation_config.image_generation_config == settings
    assert model.config.max_z_loss_coef == 5e-5


def test_a_published_configuration_has_the_published_codec():
    config = AutoConfig.for_model("mini_gemini").from_dict({"hidden_size": 64, "vocab_size": 32000})
    with torch.device("meta"):
        expected, codec = UniTokModel(), UniTokModel(**config.vq_config)
    assert {name: one.shape for name, one in codec.state_dict().items()} == {
        name: one.shape for name, one in expected.state_dict().items()
    }
    assert config.grid() == (16, 16) and config.num_codebooks == 8


def test_there_and_back_bit_by_bit(repository, model, tmp_path):
    export_unitok(model, LiquidProcessor.from_pretrained(repository), tmp_path)
    written, before = load_file(tmp_path / "model.safetensors"), language_model()
    assert written.keys() == {name for name in before if not name.endswith("vocab_usage")}
    assert all(torch.equal(before[name], one) for name, one in written.items())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mini_gemini"
    again = LiquidForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], one) for name, one in model.state_dict().items())
    assert to_unitok(from_unitok(before)).keys() == written.keys()


def test_our_own_layout_keeps_all(repository, model, tmp_path):
    model.save_pretrained(tmp_path)
    LiquidProcessor.from_pretrained(repository).save_pretrained(tmp_path)
    again, processor = LiquidForCausalLM.from_pretrained(tmp_path), LiquidProcessor.from_pretrained(tmp_path)
    processor.check_fits(again.config)
    assert again.config.uncond_token_id == model.config.uncond_token_id
    assert all(torch.equal(again.state_dict()[name], one) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ar_head.norm.weight": None}, "missing keys: code_head.body.norm.weight"),
        ({"model.vision_tower.weight": torch.zeros(2)}, "unexpected keys"),
        ({"ar_head.linear_head.bias": torch.zeros(3)}, "mismatched keys"),
    ],
)
def test_weights_of_another_model_are_refused(repository, tmp_path, change, message):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "unitok_tokenizer.pth"):
        (tmp_path / file).symlink_to(f"{repository}/{file}")
    tensors = {name: one for name, one in (language_model() | change).items() if one is not None}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        LiquidForCausalLM.from_pretrained(tmp_path)


def test_another_model_has_no_place_in_the_layout(tmp_path):
    with pytest.raises(ValueError, match="several codes a position and llama, got LlamaForCausalLM"):
        export_unitok(tiny_base(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
