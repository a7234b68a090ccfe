"""The codec: pixels to codes and back."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from tiny import IMAGE_TOKEN_OFFSET, tiny_model

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM
from transformers_liquid.codecs.vq_model import CHAMELEON_VQ_CONFIG, LiquidVQModel, downsample_factor


TINY_VQ_CONFIG = {
    **CHAMELEON_VQ_CONFIG,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 16],
    "layers_per_block": 1,
    "latent_channels": 8,
    "vq_embed_dim": 4,
    "norm_num_groups": 4,
    "num_vq_embeddings": 32,
    "sample_size": 16,
}


@pytest.fixture
def codec():
    torch.manual_seed(0)
    codec = LiquidVQModel(**TINY_VQ_CONFIG).eval()
    # Codes as spread out as the latents are, so that many of them are used.
    codec.quantize.embedding.weight.data.normal_(std=0.5)
    return codec


def pictures(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (4, 4), (32, 20)])
@torch.no_grad()
def test_encode_codes_finds_the_nearest_codebook_vector(codec, height, width):
    pixel_values = pictures(2, 3, height, width)
    latents = codec.quant_conv(codec.encoder(pixel_values)).permute(0, 2, 3, 1)
    distances = (latents[..., None, :].double() - codec.quantize.embedding.weight.double()).norm(dim=-1)

    codes = codec.encode_codes(pixel_values)
    assert codes.shape == (2, height // 4, width // 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, distances.argmin(-1))


def test_a_picture_uses_more_than_one_code(codec):
    assert len(codec.encode_codes(pictures(2, 3, 32, 32)).unique()) > 3


@torch.no_grad()
def test_codebook_vectors_are_their_own_nearest(codec):
    latents = codec.quantize.embedding.weight.T.reshape(1, 4, 4, 8)
    assert torch.equal(codec.nearest_codes(latents), torch.arange(32).view(1, 4, 8))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
@torch.no_grad()
def test_decoding_codes_equals_diffusers_reconstruction(codec, height, width):
    pixel_values = pictures(2, 3, height, width)
    reconstruction = codec.decode_codes(codec.encode_codes(pixel_values))
    assert reconstruction.shape == pixel_values.shape
    torch.testing.assert_close(reconstruction, codec(pixel_values).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decode_codes_equals_diffusers_decode_of_the_codebook_vectors(codec):
    codes = torch.randint(32, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    latents = codec.quantize.get_codebook_entry(codes.flatten(), (3, 2, 5, 4))
    torch.testing.assert_close(codec.decode_codes(codes), codec.decode(latents).sample, atol=1e-5, rtol=1e-5)


def test_pictures_of_a_batch_do_not_influence_each_other(codec):
    pixel_values = pictures(3, 3, 16, 16)
    alone = torch.cat([codec.encode_codes(picture[None]) for picture in pixel_values])
    assert torch.equal(codec.encode_codes(pixel_values), alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["pixel", "latent", "codebook"])
def test_what_is_not_finite_has_no_codes_and_its_picture_is_named(codec, value, what):
    codec, pixel_values = copy.deepcopy(codec), pictures(3, 3, 16, 16)
    if what == "pixel":
        pixel_values[1, 0, 3, 2] = value
    elif what == "latent":
        codec.quant_conv.weight.data *= value
    else:
        codec.quantize.embedding.weight.data[5, 1] = value
    with pytest.raises(ValueError, match=f"of picture {1 if what == 'pixel' else 0} are NaN or infinite"):
        codec.encode_codes(pixel_values)


def test_codes_carry_no_gradient(codec):
    assert not codec.decode_codes(codec.encode_codes(pictures(1, 3, 8, 8))).requires_grad


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 18), (1, 3, 15, 16), (1, 3, 0, 16)])
def test_pictures_that_do_not_fit_raise_naming_their_size(codec, shape):
    with pytest.raises(ValueError, match=rf"{shape[-2]}.*{shape[-1]}"):
        codec.encode_codes(torch.zeros(shape))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 32), r"Code 32 at position 0, 0, 0 .* 0 \.\.\. 31"),
        (torch.tensor([[[0, -1]]]), "Code -1 at position 0, 0, 1 "),
        (torch.zeros(2, 2, dtype=torch.long), r"\(2, 2\)"),
        (torch.zeros(1, 0, 2, dtype=torch.long), r"\(1, 0, 2\)"),
    ],
)
def test_codes_that_do_not_fit_raise_naming_them(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        codec.decode_codes(codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_half_precision_codec_takes_float32_pictures(codec, dtype):
    pixel_values = pictures(1, 3, 16, 24)
    expected = codec.decode_codes(codec.encode_codes(pixel_values))
    codes = codec.to(dtype).encode_codes(pixel_values)
    latents = codec.encode(pixel_values.to(dtype)).latents.permute(0, 2, 3, 1)
    distances = (latents[..., None, :].double() - codec.quantize.embedding.weight.double()).norm(dim=-1)
    assert torch.equal(codes, distances.argmin(-1))  # searched in float32, not in half precision
    decoded = codec.decode_codes(codes)
    assert decoded.dtype == dtype
    assert decoded.shape == expected.shape


@pytest.fixture(scope="module")
def emoji_codec():
    return LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model


@pytest.fixture(scope="module")
def emoji_codes():
    """`(64, 8, 8)`: the codes of 64 pictures."""
    codes = json.loads((Path(__file__).parent / "emoji_codes.json").read_text(encoding="utf-8"))
    return torch.tensor([*codes["seen"].values(), *codes["unseen_composition"].values()]).view(-1, 8, 8)


def random_codes(*shape):
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(0))


def decoder_inputs(codec):
    """What the decoder is given from now on."""
    inputs = []
    codec.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return inputs


def psnr(pictures, expected):
    """In dB, of each picture in [-1, 1]."""
    return 10 * torch.log10(4 / (pictures - expected).pow(2).mean((1, 2, 3)))


# Half precision


def test_autocast_changes_no_code(codec):
    pixel_values = pictures(4, 3, 32, 32)
    codes = codec.encode_codes(pixel_values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode_codes(pixel_values), codes)


def test_autocast_changes_no_picture_unless_asked(codec):
    codes = random_codes(2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = codec.decode_codes(codes)
    assert torch.equal(inside, codec.decode_codes(codes))


@pytest.mark.parametrize(("dtype", "decibels"), [(torch.bfloat16, 54), (torch.float16, 72)])
def test_half_precision_pictures_are_float32_and_as_near_as_the_docstring_says(
    emoji_codec, emoji_codes, dtype, decibels
):
    codes = emoji_codes[::8]  # CPUs without half-precision instructions are slow
    expected = emoji_codec.decode_codes(codes).clamp(-1, 1)
    decoded = emoji_codec.decode_codes(codes, dtype=dtype)
    assert decoded.dtype == torch.float32
    assert not torch.equal(decoded.clamp(-1, 1), expected)
    assert psnr(decoded.clamp(-1, 1), expected).min() > decibels


def test_half_precision_computes_in_it_and_keeps_no_second_copy_of_the_weights(codec):
    seen = []
    codec.decoder.mid_block.resnets[0].conv1.register_forward_hook(
        lambda module, args, output: seen.append((output.dtype, torch.is_autocast_cache_enabled(), module.weight.dtype))
    )
    codec.decode_codes(random_codes(1, 2, 2), dtype=torch.bfloat16)
    assert seen == [(torch.bfloat16, False, torch.float32)]


def test_the_model_hands_the_precision_on():
    model = tiny_model()
    codes = torch.arange(16)
    expected = model.model.vq_model.decode_codes(codes.view(1, 4, 4), dtype=torch.bfloat16).clamp(-1, 1)
    decoded = model.decode_image_tokens(codes + IMAGE_TOKEN_OFFSET, dtype=torch.bfloat16)
    assert torch.equal(decoded, expected)
    assert not torch.equal(decoded, model.decode_image_tokens(codes + IMAGE_TOKEN_OFFSET))


@pytest.mark.parametrize("dtype", [16, "bfloat16", torch.int8, torch.float64])
def test_what_is_no_half_precision_raises(codec, dtype):
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float16 or None.*got"):
        codec.decode_codes(random_codes(1, 2, 2), dtype=dtype)


# Memory


def test_codes_enter_the_decoder_channels_last(codec):
    inputs = decoder_inputs(codec)
    codec.decode_codes(random_codes(2, 4, 6))
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_slicing_decodes_picture_by_picture_what_a_batch_gives(codec):
    codes = random_codes(3, 4, 5)
    expected = codec.decode_codes(codes)
    inputs = decoder_inputs(codec)
    codec.enable_slicing()
    torch.testing.assert_close(codec.decode_codes(codes), expected, atol=1e-5, rtol=1e-5)
    codec.disable_slicing()
    codec.decode_codes(codes)
    assert [len(batch) for batch in inputs] == [1, 1, 1, 3]


def test_save_and_load_give_the_same_codec(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = LiquidVQModel.from_pretrained(tmp_path)
    pixel_values = pictures(1, 3, 16, 16)
    codes = codec.encode_codes(pixel_values)
    assert torch.equal(loaded.encode_codes(pixel_values), codes)
    assert torch.equal(loaded.decode_codes(codes), codec.decode_codes(codes))
    assert {key: loaded.config[key] for key in TINY_VQ_CONFIG} == TINY_VQ_CONFIG


@pytest.mark.parametrize("kwargs", [{}, {"low_cpu_mem_usage": False}, {"output_loading_info": True}])
@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_weights_that_are_not_whole_are_refused(what, kwargs, codec, tmp_path):
    codec.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights, key = load_file(path), "decoder.conv_in.weight"
    if what == "unexpected":
        weights["decoder.more"] = weights[key].clone()
    else:
        del weights[key]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"has 1 {what} keys: decoder\.(conv_in\.weight|more)"):
        LiquidVQModel.from_pretrained(tmp_path, **kwargs)


def test_loading_takes_the_arguments_of_diffusers(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    loaded, info = LiquidVQModel.from_pretrained(
        tmp_path, subfolder="codec", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert loaded.dtype == torch.bfloat16 and not info["missing_keys"]


@torch.no_grad()
def test_diffusers_own_vqmodel_reads_it(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    plain = VQModel.from_pretrained(tmp_path)
    pixel_values = pictures(1, 3, 16, 16)
    torch.testing.assert_close(
        plain(pixel_values).sample, codec.decode_codes(codec.encode_codes(pixel_values)), atol=1e-5, rtol=1e-5
    )


def test_chameleon_maps_512_pixels_to_32_codes_of_8192():
    with torch.device("meta"):
        codec = LiquidVQModel(**CHAMELEON_VQ_CONFIG)
        codes = codec.encode_codes(torch.zeros(1, 3, 512, 256))
    assert codes.shape == (1, 32, 16)
    assert (codec.downsample_factor, codec.codebook_size) == (16, 8192)
    assert downsample_factor(CHAMELEON_VQ_CONFIG) == 16
