import pytest
import torch
from tiny import (
    CODEBOOK_SIZE,
    IMAGE_TOKEN_OFFSET,
    TINY_VQ_CONFIG,
    VOCAB_SIZE,
    tiny_codec,
    tiny_config,
    tiny_text_config,
)
from transformers import AutoConfig

from transformers_liquid import CHAMELEON_VQ_CONFIG, LiquidConfig, LiquidVQModel


@pytest.fixture
def config():
    return tiny_config(tiny_text_config("llama", tied=True))


def test_the_default_is_chameleons_codec_at_the_end_of_the_vocabulary():
    config = LiquidConfig()
    assert config.vq_config == CHAMELEON_VQ_CONFIG
    assert (config.codebook_size, config.downsample_factor, config.image_size) == (8192, 16, 512)
    assert config.grid() == (32, 32) and config.image_layout.num_codes() == 1024
    assert config.image_token_range.stop == config.text_config.vocab_size


def test_saving_and_loading_keeps_every_field(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LiquidConfig
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": loaded.name_or_path}
    assert loaded.text_config.to_dict() == config.text_config.to_dict()


def test_a_codec_loaded_from_a_path_gives_its_configuration(tmp_path):
    tiny_codec().save_pretrained(tmp_path)
    codec = LiquidVQModel.from_pretrained(tmp_path)
    assert (
        tiny_config(vq_config=dict(codec.config)).vq_config
        == tiny_config(vq_config=dict(tiny_codec().config)).vq_config
    )


def test_codes_and_ids_are_each_others_inverse(config):
    codes = torch.arange(CODEBOOK_SIZE).view(4, -1)
    ids = config.image_layout.codes_to_ids(codes)
    assert ids[0, 0] == IMAGE_TOKEN_OFFSET and ids[-1, -1] == IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE - 1
    assert torch.equal(config.image_layout.ids_to_codes(ids), codes)
    assert ids[1, 2] in config.image_token_range and torch.equal(
        torch.arange(VOCAB_SIZE)[config.image_layout.image_slice], ids.flatten()
    )


def test_an_id_that_is_no_code_is_named_with_its_position_and_the_valid_range(config):
    ids = torch.full((2, 3), IMAGE_TOKEN_OFFSET)
    ids[1, 2] = 5
    valid = f"{IMAGE_TOKEN_OFFSET} ... {IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE - 1}"
    with pytest.raises(ValueError, match=rf"Id 5 at position 1, 2 is outside of the codebook {valid}"):
        config.image_layout.ids_to_codes(ids)


@pytest.mark.parametrize("size", [{"height": 0}, {"width": 3}, {"height": -2}, {"height": 4, "width": 5}])
def test_sizes_that_are_no_positive_multiples_of_the_factor_are_refused(config, size):
    assert config.downsample_factor == 2
    with pytest.raises(ValueError, match="positive multiples of 2 pixels"):
        config.grid(**size)


@pytest.mark.parametrize("name", ["boi_token_id", "eoi_token_id", "image_token_id"])
def test_two_image_tokens_of_one_id_are_refused(name, config):
    with pytest.raises(ValueError, match="must be four different ids"):
        tiny_config(**{name: config.uncond_token_id})


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=f"has a vocabulary of {VOCAB_SIZE}"):
        tiny_config(tiny_text_config("llama", tied=True), image_token_offset=VOCAB_SIZE - CODEBOOK_SIZE + 1)
    with pytest.raises(ValueError, match=f"boi_token_id={IMAGE_TOKEN_OFFSET} must be a text id"):
        tiny_config(tiny_text_config("llama", tied=True), boi_token_id=IMAGE_TOKEN_OFFSET)


def test_a_codec_config_with_tuples_or_private_keys_becomes_plain_json():
    private = {**TINY_VQ_CONFIG, "block_out_channels": tuple(TINY_VQ_CONFIG["block_out_channels"]), "_class_name": "x"}
    config = tiny_config(tiny_text_config("llama", tied=True), vq_config=private)
    assert config.vq_config == TINY_VQ_CONFIG


@pytest.mark.parametrize("text_config", [[], "llama", 5])
def test_a_text_config_that_is_none_is_refused(text_config):
    with pytest.raises(ValueError, match="text_config must be a configuration or its dictionary, got "):
        LiquidConfig(text_config=text_config)
