"""The codec: pixels to codes and back."""

import pytest
import torch
from diffusers import VQModel

from transformers_liquid.modeling_liquid_vq import CHAMELEON_VQ_CONFIG, LiquidVQModel, downsample_factor


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


def test_codes_carry_no_gradient(codec):
    assert not codec.decode_codes(codec.encode_codes(pictures(1, 3, 8, 8))).requires_grad


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 18), (1, 3, 15, 16), (1, 3, 0, 16)])
def test_pictures_that_do_not_fit_raise_naming_their_size(codec, shape):
    with pytest.raises(ValueError, match=rf"{shape[-2]}.*{shape[-1]}"):
        codec.encode_codes(torch.zeros(shape))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 32), r"0 \.\.\. 31.*32 to 32"),
        (torch.tensor([[[0, -1]]]), "-1 to 0"),
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


def test_save_and_load_give_the_same_codec(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = LiquidVQModel.from_pretrained(tmp_path)
    pixel_values = pictures(1, 3, 16, 16)
    codes = codec.encode_codes(pixel_values)
    assert torch.equal(loaded.encode_codes(pixel_values), codes)
    assert torch.equal(loaded.decode_codes(codes), codec.decode_codes(codes))
    assert {key: loaded.config[key] for key in TINY_VQ_CONFIG} == TINY_VQ_CONFIG


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
