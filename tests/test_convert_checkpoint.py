"""Checkpoints in the reference's layout load by name alone, and models go back to that layout.

The layout is that of `Junfeng5/Liquid_V1_7B` and of the Space `Junfeng5/Liquid_demo`, tiny and with random weights,
served from huggingface_hub's own cache without any network.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import BASES, tiny_base, tiny_codec, tiny_model, tiny_processor, tiny_tokenizer
from tokenizers import AddedToken, processors
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
)

from transformers_liquid import (
    LiquidConfig,
    LiquidForCausalLM,
    LiquidModel,
    LiquidProcessor,
    LiquidVQModel,
    expand_vocabulary,
    export_base_model,
    save_taming_codec,
)
from transformers_liquid.codecs.taming import vq_config_from_taming
from transformers_liquid.models.liquid.reference import ReferenceCheckpoint


MODEL_NAME, SPACE_NAME = "Junfeng5/Liquid_V1_7B", "Junfeng5/Liquid_demo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Gemma's first ids, with <unused0>, <unused1>, <unused2> renamed as the reference's TRAIN.md says.
GEMMA_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
GEMMA_TOKENS = [
    *GEMMA_SPECIALS,
    *("<boi>", "<eoi>", "<unconditional>", *(f"<unused{index}>" for index in range(3, 10))),
    *("<start_of_turn>", "<end_of_turn>"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "\n", *"abcdefghijklmnopqrstuvwxyz."),
]
NUM_TEXT_TOKENS, NUM_CODES = len(GEMMA_TOKENS), 24
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 8,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TAMING_CONFIG = {"embed_dim": 8, "n_embed": NUM_CODES, "ddconfig": DDCONFIG}


def gemma_base(vocab_size=NUM_TEXT_TOKENS + NUM_CODES):
    config = GemmaConfig(
        **BASES["gemma"],
        vocab_size=vocab_size,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return GemmaForCausalLM(config).eval()


def write_gemma_tokenizer(directory, tokens=GEMMA_TOKENS):
    """`tokenizer.json` and `tokenizer_config.json` with the keys that the reference's has."""
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    special = [*GEMMA_SPECIALS[:5], "<boi>", "<eoi>", "<unconditional>"]
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special if token in tokens])
    added = [token for token in tokens if token.startswith(("<unused", "<start_of", "<end_of", "<2", "[@"))]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.save(str(directory / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(tokens.index(token)): {"content": token, **flags, "special": token in special}
            for token in (*special, *added)
            if token in tokens
        },
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "legacy": None,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_reference(directory, **kwargs):
    directory.mkdir(parents=True)
    gemma_base(**kwargs).save_pretrained(directory, max_shard_size="40KB")
    write_gemma_tokenizer(directory)
    return directory


def write_codec(directory, n_embed=NUM_CODES):
    """As in the Space: with the discriminator's tensors in the checkpoint, and its settings in the configuration."""
    config = {**TAMING_CONFIG, "n_embed": n_embed}
    save_taming_codec(tiny_codec(**vq_config_from_taming(config)), directory)
    checkpoint = torch.load(directory / "vqgan.ckpt")
    checkpoint["state_dict"]["loss.discriminator.main.0.weight"] = torch.zeros(2)
    torch.save(checkpoint, directory / "vqgan.ckpt")
    params = {**config, "lossconfig": {"target": "vqperceptual.VQLPIPSWithDiscriminator", "params": {}}}
    (directory / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"target": "VQModel", "params": params}}))
    return directory


def serve(cache_dir, kind, name, directory):
    """Puts a repository where huggingface_hub looks before it asks the network."""
    folder = cache_dir / f"{kind}s--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    for file in directory.rglob("*"):
        if file.is_file():
            blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = folder / "snapshots" / COMMIT / file.relative_to(directory)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference") / "Liquid_V1_7B")


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory):
    return write_codec(tmp_path_factory.mktemp("space") / "chameleon")


@pytest.fixture(scope="module")
def home(reference, codec_dir, tmp_path_factory):
    """What HF_HOME points to on a machine that has fetched the reference and its Space before."""
    home = tmp_path_factory.mktemp("home")
    serve(home / "hub", "model", MODEL_NAME, reference)
    serve(home / "hub", "space", SPACE_NAME, codec_dir.parent)
    return home


@pytest.fixture
def hub(home):
    return {"cache_dir": home / "hub", "local_files_only": True}


@pytest.fixture
def local(reference, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(reference, tmp_path / "local")


@pytest.fixture
def ids():
    return torch.randint(0, NUM_TEXT_TOKENS + NUM_CODES, (2, 9), generator=torch.Generator().manual_seed(1))


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# The name alone


@torch.no_grad()
def test_the_name_alone_loads_a_model_with_the_logits_of_the_bare_gemma(hub, reference, codec_dir, ids):
    model = LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub)
    bare = GemmaForCausalLM.from_pretrained(reference)
    assert torch.equal(model(ids).logits, bare(ids).logits)
    assert same_weights(model.model.vq_model, tiny_codec(**vq_config_from_taming(TAMING_CONFIG)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.model.vq_model.parameters())


def test_the_layout_is_that_of_gemma_and_its_renamed_reserved_tokens(hub):
    config = LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub).config
    assert isinstance(config, LiquidConfig)
    assert config.image_token_range == range(NUM_TEXT_TOKENS, NUM_TEXT_TOKENS + NUM_CODES)
    # boi, eoi, unconditional: as in the reference; the placeholder: <unused3>, which it never uses.
    assert (config.boi_token_id, config.eoi_token_id, config.uncond_token_id, config.image_token_id) == (7, 8, 9, 10)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 1, 0)
    assert (config.image_size, config.downsample_factor) == (8, 2)


def test_pictures_are_drawn_with_the_settings_of_the_reference(hub):
    settings = LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub).generation_config.image_generation_config
    assert settings == {"guidance_scale": 7.0, "do_sample": True, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}


def test_embeddings_and_head_stay_one_tensor(hub):
    model = LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_dtype_goes_to_the_language_model_and_the_codec_stays_fp32(hub):
    model = LiquidForCausalLM.from_pretrained(MODEL_NAME, dtype=torch.bfloat16, **hub)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.model.vq_model.parameters()} == {torch.float32}


@torch.no_grad()
def test_device_map_and_attention_implementation_pass_through(hub, reference, ids, tmp_path):
    """One layer stays on disk, as on a machine that the model does not fit into."""
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {"model.layers.1": "disk"} | dict.fromkeys(on_cpu, "cpu")
    model = LiquidForCausalLM.from_pretrained(
        MODEL_NAME, device_map=device_map, offload_folder=tmp_path, attn_implementation="eager", **hub
    )
    assert model.config._attn_implementation == model.model.text_model.config._attn_implementation == "eager"
    assert model.hf_device_map["model.text_model.model.layers.1"] == "disk"
    bare = GemmaForCausalLM.from_pretrained(reference, attn_implementation="eager")
    assert torch.equal(model(ids).logits, bare(ids).logits)


def test_the_headless_class_and_the_loading_report(hub):
    model, info = LiquidModel.from_pretrained(MODEL_NAME, output_loading_info=True, **hub)
    assert type(model) is LiquidModel
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_processor_of_the_name_alone_fits_the_model(hub):
    processor = LiquidProcessor.from_pretrained(MODEL_NAME, **hub)
    processor.check_fits(LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub).config)
    assert processor.image_token == "<unused3>"
    text = "a cat Generate an image based on this description."
    # How the reference does it: the whole text with its <boi>, bos by the tokenizer.
    expected = AutoTokenizer.from_pretrained(MODEL_NAME, **hub)(text + "<boi>").input_ids
    assert processor.image_prompt_ids("a cat") == expected
    assert expected[0] == 2 and expected[-1] == 7


SCRIPT = """
import numpy as np
import transformers_liquid
from transformers import pipeline
from transformers_liquid import LiquidForCausalLM, LiquidProcessor

pipe = pipeline("text-to-image", model="Junfeng5/Liquid_V1_7B", progress_bar=False)
images = pipe("a cat", num_images_per_prompt=2, seed=0)
model = LiquidForCausalLM.from_pretrained("Junfeng5/Liquid_V1_7B")
processor = LiquidProcessor.from_pretrained("Junfeng5/Liquid_V1_7B")
again = transformers_liquid.LiquidImageGenerationPipeline(model, processor)(["a cat"] * 2, seed=0, progress_bar=False)
assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(images, again, strict=True))
print(type(pipe).__name__, [image.size for image in images])
"""


def run(home, *command, **kwargs):
    """In a process of its own, with huggingface_hub's switches in the environment as a user sets them."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **kwargs)


@pytest.mark.slow
def test_the_name_alone_is_enough_for_the_pipeline_offline(home):
    result = run(home, "-c", SCRIPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "LiquidImageGenerationPipeline [(8, 8), (8, 8)]"


@pytest.mark.slow
def test_the_name_alone_is_enough_for_the_command_line_offline(home, tmp_path):
    output = tmp_path / "cat.png"
    command = ["-m", "transformers_liquid", "generate", "a cat", "--model", MODEL_NAME, "--output", str(output)]
    result = run(home, *command, "--seed", "0")
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size > 0


# Local copies


@pytest.mark.parametrize("source", ["folder", "ckpt", "diffusers"])
@torch.no_grad()
def test_vq_checkpoint_gives_a_local_copy_its_codec(source, reference, codec_dir, tmp_path):
    vq_checkpoint = {"folder": codec_dir, "ckpt": codec_dir / "vqgan.ckpt", "diffusers": tmp_path / "codec"}[source]
    codec = tiny_codec(**vq_config_from_taming(TAMING_CONFIG))
    codec.save_pretrained(tmp_path / "codec")
    model = LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=str(vq_checkpoint))
    assert same_weights(model.model.vq_model, codec)
    processor = LiquidProcessor.from_pretrained(reference, vq_checkpoint=str(vq_checkpoint))
    processor.check_fits(model.config)


@pytest.mark.parametrize("folder", ["chameleon", "."])
def test_a_codec_in_the_local_copy_is_preferred_to_the_space(folder, local, codec_dir, home):
    """The Space in the cache has another codec."""
    other = tiny_codec(seed=7, **vq_config_from_taming(TAMING_CONFIG))
    save_taming_codec(other, local / folder)
    model = LiquidForCausalLM.from_pretrained(local, cache_dir=home / "hub", local_files_only=True)
    assert same_weights(model.model.vq_model, other)


@torch.no_grad()
def test_saved_as_ours_it_reloads_equal_and_needs_no_space(hub, ids, tmp_path):
    model, processor = (
        LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub),
        LiquidProcessor.from_pretrained(MODEL_NAME, **hub),
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LiquidForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert same_weights(again, model)
    settings = model.generation_config.image_generation_config
    assert again.generation_config.image_generation_config == settings
    AutoProcessor.from_pretrained(tmp_path).check_fits(again.config)


# Back to a plain base


@torch.no_grad()
def test_an_export_is_the_plain_gemma_again(hub, reference, codec_dir, ids, tmp_path):
    model, processor = (
        LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub),
        LiquidProcessor.from_pretrained(MODEL_NAME, **hub),
    )
    export_base_model(model, processor, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is GemmaForCausalLM
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert same_weights(plain, GemmaForCausalLM.from_pretrained(reference))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(reference).get_vocab()

    ours, theirs = (torch.load(path / "vqgan.ckpt")["state_dict"] for path in (tmp_path / "plain/chameleon", codec_dir))
    theirs.pop("loss.discriminator.main.0.weight")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_exported_base_writes_text_with_stock_transformers(hub, ids, tmp_path):
    model = LiquidForCausalLM.from_pretrained(MODEL_NAME, **hub)
    export_base_model(model, LiquidProcessor.from_pretrained(MODEL_NAME, **hub), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids.clamp(max=200), suppress_image_tokens=False, **arguments)
    assert torch.equal(plain.generate(ids.clamp(max=200), **arguments), expected)


@pytest.mark.parametrize("base", ["reserved", "padded", "bare"])
@torch.no_grad()
def test_an_expanded_model_makes_the_round_trip_through_the_plain_layout(base, tmp_path):
    """Reserved tokens get the reference's names; padded rows leave no doubt where the codes are."""
    reserved = [f"<unused{index}>" for index in range(6)] if base == "reserved" else None
    tokenizer = tiny_tokenizer(["<pad>", "<s>", "</s>"], reserved)
    rows = len(tokenizer) + (50 if base == "padded" else 0)
    language_model = tiny_base("llama", vocab_size=rows)
    model, processor = expand_vocabulary(language_model, tokenizer, tiny_codec(), image_size=12)
    model.generation_config.image_generation_config = {"guidance_scale": 2.0, "top_k": 5}
    export_base_model(model, processor, tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for token, token_id in (("<boi>", model.config.boi_token_id), ("<eoi>", model.config.eoi_token_id)):
        assert tokenizer.encode(token, add_special_tokens=False) == [token_id]
        assert token in tokenizer.decode([token_id]) and tokenizer.decode([token_id], skip_special_tokens=True) == ""
    assert tokenizer.encode("a cat") == processor.tokenizer.encode("a cat")

    again = LiquidForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, model.config.image_token_range.stop, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    assert same_weights(again, model)
    layout = ("image_layout", "vq_config", "tie_word_embeddings")
    assert [getattr(again.config, name) for name in layout] == [getattr(model.config, name) for name in layout]
    assert again.generation_config.image_generation_config == {"guidance_scale": 2.0, "top_k": 5}
    LiquidProcessor.from_pretrained(tmp_path).check_fits(model.config)


def test_a_codec_that_taming_cannot_express_is_exported_as_diffusers_saves_it(tmp_path):
    model = tiny_model()
    export_base_model(model, tiny_processor(), tmp_path)
    assert same_weights(LiquidVQModel.from_pretrained(tmp_path / "vq_model"), model.model.vq_model)
    assert same_weights(LiquidForCausalLM.from_pretrained(tmp_path), model)


def test_an_export_with_a_tokenizer_of_another_model_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="The tokenizer does not fit the model"):
        export_base_model(tiny_model(), tiny_tokenizer(["<pad>", "<s>", "</s>"]), tmp_path / "plain")
    with pytest.raises(ValueError, match="Only a LiquidForCausalLM can be exported, got LlamaForCausalLM"):
        export_base_model(tiny_base(), tiny_processor(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# Bad input


def test_without_a_codec_the_error_names_vq_checkpoint(reference, tmp_path):
    for load in (LiquidForCausalLM.from_pretrained, LiquidProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"holds no codec.*Liquid_demo cannot be reached.*`vq_checkpoint=`"):
            load(reference, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("kind", ["missing", "folder of something else", "model"])
def test_a_vq_checkpoint_that_is_no_codec_is_named(kind, reference, tmp_path):
    path = tmp_path / "codec"
    if kind == "folder of something else":
        path.mkdir()
        BertConfig().save_pretrained(path)
    elif kind == "model":
        gemma_base().save_pretrained(path)
    with pytest.raises(ValueError, match=r"^'.*codec' is no codec: expected a folder with vqgan.ckpt"):
        LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=path, local_files_only=True)


def test_a_folder_without_vqgan_ckpt_is_no_codec(reference, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vqgan\.yaml"):
        LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=tmp_path)


def test_a_checkpoint_of_another_model_type_is_named_with_the_way_out(tmp_path):
    BertConfig(vocab_size=400).save_pretrained(tmp_path)
    tiny_tokenizer(["<pad>", "<s>", "</s>"]).save_pretrained(tmp_path)
    expected = "model type 'bert' and its tokenizer has no <boi>, <eoi>, <unconditional>.*`.*expand_vocabulary`"
    for load in (LiquidForCausalLM.from_pretrained, LiquidProcessor.from_pretrained):
        with pytest.raises(ValueError, match=expected):
            load(tmp_path, vq_checkpoint=tmp_path)


def test_a_language_model_that_is_not_expanded_is_pointed_to_expand_vocabulary(tmp_path):
    path = write_reference(tmp_path / "gemma", vocab_size=NUM_TEXT_TOKENS)
    with pytest.raises(ValueError, match=r"no room for image codes.*expand_vocabulary"):
        ReferenceCheckpoint.find(path)


def test_a_checkpoint_without_tokenizer_is_named(local):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (local / file).unlink()
    with pytest.raises(ValueError, match="model type 'gemma' and its tokenizer has no <boi>"):
        LiquidForCausalLM.from_pretrained(local)


def test_a_codec_alone_is_not_a_model(tmp_path):
    tiny_codec().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a Liquid checkpoint"):
        LiquidForCausalLM.from_pretrained(tmp_path)


def test_a_missing_repository_keeps_the_message_of_transformers(tmp_path):
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        LiquidForCausalLM.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


def test_a_codec_with_more_codes_than_rows_does_not_fit(reference, tmp_path):
    write_codec(tmp_path, n_embed=NUM_CODES + 1)
    with pytest.raises(ValueError, match=f"{NUM_TEXT_TOKENS} ids and the codec {NUM_CODES + 1} codes, more than"):
        LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=tmp_path)


def test_codes_that_may_begin_at_two_ids_are_not_guessed(codec_dir, tmp_path):
    """On a base with padded rows the reference's own scripts disagree."""
    path = write_reference(tmp_path / "padded", vocab_size=NUM_TEXT_TOKENS + 5 + NUM_CODES)
    with pytest.raises(ValueError, match=rf"at id {NUM_TEXT_TOKENS + 5}.*or {NUM_TEXT_TOKENS} .*`image_token_offset=`"):
        LiquidForCausalLM.from_pretrained(path, vq_checkpoint=codec_dir)
    arguments = {"vq_checkpoint": codec_dir, "image_token_offset": NUM_TEXT_TOKENS}
    model = LiquidForCausalLM.from_pretrained(path, **arguments)
    assert model.config.image_token_offset == NUM_TEXT_TOKENS
    LiquidProcessor.from_pretrained(path, **arguments).check_fits(model.config)


def test_a_tokenizer_whose_ids_reach_into_the_codes_does_not_fit(local, codec_dir):
    write_gemma_tokenizer(local, [*GEMMA_TOKENS, "extra"])
    with pytest.raises(ValueError, match="more than the vocabulary"):
        LiquidForCausalLM.from_pretrained(local, vq_checkpoint=codec_dir)


def test_a_missing_tensor_of_the_language_model_is_named(local, codec_dir):
    edit_weights(local, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"has 1 missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        LiquidForCausalLM.from_pretrained(local, vq_checkpoint=codec_dir)


def test_an_unknown_tensor_of_the_language_model_is_named(local, codec_dir):
    edit_weights(local, "model.layers.1.mlp.up_proj.weight", copy_as="model.layers.1.mlp.side_proj.weight")
    with pytest.raises(ValueError, match=r"has 1 unexpected keys: model\.layers\.1\.mlp\.side_proj\.weight"):
        LiquidForCausalLM.from_pretrained(local, vq_checkpoint=codec_dir)


def edit_weights(directory, key, copy_as=None):
    """Removes a tensor, or adds a copy of it."""
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = directory / index["weight_map"][key]
    tensors = load_file(shard)
    if copy_as is None:
        del tensors[key], index["weight_map"][key]
    else:
        tensors[copy_as] = tensors[key].clone()
        index["weight_map"][copy_as] = shard.name
    save_file(tensors, shard, metadata={"format": "pt"})
    index_file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("decoder.conv_in.weight"), "lacks 1 keys that are needed: decoder.conv_in.weight"),
        (lambda state: state.update({"decoder.conv_mid.weight": torch.zeros(1)}), "1 unknown keys: decoder.conv_mid"),
    ],
)
def test_a_codec_with_missing_or_unknown_keys_is_refused_by_name(edit, message, reference, codec_dir, tmp_path):
    shutil.copytree(codec_dir, tmp_path / "codec")
    checkpoint = torch.load(codec_dir / "vqgan.ckpt")
    edit(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "codec/vqgan.ckpt")
    with pytest.raises(ValueError, match=message):
        LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=tmp_path / "codec")


def test_a_diffusers_codec_with_a_missing_tensor_is_refused_by_name(reference, tmp_path):
    tiny_codec(**vq_config_from_taming(TAMING_CONFIG)).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight"):
        LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_ckpt_is_refused_and_not_run(reference, codec_dir, tmp_path):
    shutil.copytree(codec_dir, tmp_path / "codec")
    with open(tmp_path / "codec/vqgan.ckpt", "wb") as file:
        pickle.dump({"state_dict": Payload(str(tmp_path / "executed"))}, file)
    with pytest.raises(ValueError, match="holds pickled Python objects, which are never executed"):
        LiquidForCausalLM.from_pretrained(reference, vq_checkpoint=tmp_path / "codec")
    assert not (tmp_path / "executed").exists()


def test_vq_checkpoint_is_refused_for_a_repository_of_ours(codec_dir, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert ReferenceCheckpoint.find(tmp_path) is None
    with pytest.raises(ValueError, match="holds its own codec"):
        LiquidForCausalLM.from_pretrained(tmp_path, vq_checkpoint=codec_dir)


def test_a_base_without_a_free_token_for_the_placeholder_says_so(codec_dir, tmp_path):
    path = write_reference(tmp_path / "reference")
    tokens = [token if not token.startswith("<unused") else f"word{index}" for index, token in enumerate(GEMMA_TOKENS)]
    write_gemma_tokenizer(path, tokens)
    with pytest.raises(ValueError, match="neither '<image>' nor a reserved token"):
        LiquidForCausalLM.from_pretrained(path, vq_checkpoint=codec_dir)
