"""One name is enough for a codec: each layout is recognised by what is there, and computes what its own code computes.

The oracles: diffusers' `VQModel` as `AmusedPipeline` calls it, transformers' `ChameleonVQVAE`, and LlamaGen's network in
plain PyTorch, written here after its published description (arXiv 2406.06525) with its parameter names.
"""

import json
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import VQModel
from test_convert_codec import OracleAttention, OracleResnet, make_config, make_oracle, norm, write
from tiny import TINY_UNITOK_CONFIG, tiny_base, tiny_codec, tiny_model
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

from transformers_liquid import (
    EMOJI_CHECKPOINT,
    CodecVAE,
    LiquidForCausalLM,
    LiquidVQModel,
    UniTokModel,
    load_codec,
    load_llamagen_codec,
    save_llamagen_codec,
    save_taming_codec,
)
from transformers_liquid.codecs.llamagen import llamagen_key_table, vq_config_from_llamagen
from transformers_liquid.codecs.vq_model import codec_identity


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def pixels(height=32, width=48):
    return torch.rand(2, 3, height, width) * 2 - 1


# LlamaGen


def llamagen_level(n_in, n_out, blocks, attends, resample):
    level = nn.ModuleDict(
        {
            "res": nn.ModuleList([OracleResnet(n_in if i == 0 else n_out, n_out) for i in range(blocks)]),
            "attn": nn.ModuleList([OracleAttention(n_out) for _ in range(blocks if attends else 0)]),
        }
    )
    if resample:
        level[resample] = nn.ModuleDict({"conv": nn.Conv2d(n_out, n_out, 3, 2 if resample == "downsample" else 1)})
    return level


class LlamaGenHalf(nn.Module):
    def __init__(self, n_in, n_out, widths, blocks, is_encoder, resample):
        super().__init__()
        first, last = widths[0], widths[-1]
        middle = last if is_encoder else first
        self.conv_in, self.conv_out = nn.Conv2d(n_in, first, 3, padding=1), nn.Conv2d(last, n_out, 3, padding=1)
        self.norm_out, self.is_encoder = norm(last), is_encoder
        self.mid = nn.ModuleList([OracleResnet(middle, middle), OracleAttention(middle), OracleResnet(middle, middle)])
        self.conv_blocks, n = nn.ModuleList(), first
        for i, width in enumerate(widths):
            is_coarsest = i == (len(widths) - 1 if is_encoder else 0)
            is_end = i == len(widths) - 1
            self.conv_blocks.append(llamagen_level(n, width, blocks, is_coarsest, None if is_end else resample))
            n = width

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.mid if not self.is_encoder else ():
            x = block(x)
        for level in self.conv_blocks:
            for i, block in enumerate(level["res"]):
                x = block(x)
                x = level["attn"][i](x) if len(level["attn"]) else x
            if "downsample" in level:
                x = level["downsample"]["conv"](F.pad(x, (0, 1, 0, 1)))
            if "upsample" in level:
                x = level["upsample"]["conv"](F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1)))
        for block in self.mid if self.is_encoder else ():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class OracleLlamaGen(nn.Module):
    """VQ-16 where no argument is given."""

    def __init__(self, widths=(128, 128, 256, 256, 512), blocks=2, z=256, codes=16384, dim=8):
        super().__init__()
        self.encoder = LlamaGenHalf(3, z, widths, blocks, True, "downsample")
        self.decoder = LlamaGenHalf(z, 3, widths[::-1], blocks + 1, False, "upsample")
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, dim)})
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)

    def forward(self, x):
        directions = F.normalize(self.quant_conv(self.encoder(x)), dim=1)
        book = F.normalize(self.quantize["embedding"].weight, dim=1)
        codes = torch.einsum("bchw,nc->bhwn", directions, book).argmax(-1)  # the smallest angle
        return codes, self.decoder(self.post_quant_conv(book[codes].permute(0, 3, 1, 2)))


@pytest.fixture
def llamagen(tmp_path):
    """A narrow codec of LlamaGen, whose codebook is of no length in particular, and its file as training saves it."""
    oracle = OracleLlamaGen((32, 32, 64), blocks=1, z=16, codes=64, dim=4).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        oracle.quantize["embedding"].weight.mul_(torch.rand(64, 1) * 5)
    model = oracle.state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    stored = {"model": model, "steps": 7, "args": Namespace(vq_model="VQ-16", codebook_l2_norm=True)}
    torch.save(stored, tmp_path / "vq_ds4.pt")
    return oracle, tmp_path / "vq_ds4.pt"


@torch.no_grad()
def test_a_codec_of_llamagen_computes_what_llamagen_computes(llamagen):
    oracle, path = llamagen
    codec, pixel_values = load_codec(path), pixels()
    codes, expected = oracle(pixel_values)
    assert len(codes.unique()) > 10  # else the comparison would say little
    assert torch.equal(codec.encode_codes(pixel_values), codes)
    torch.testing.assert_close(codec.decode_codes(codes), expected, atol=1e-5, rtol=1e-5)
    assert not codec.training and codec.downsample_factor == 4


def test_the_table_names_every_tensor_of_llamagens_published_codec_once():
    with torch.device("meta"):
        state_dict = OracleLlamaGen().state_dict()
        vq_config = vq_config_from_llamagen(state_dict)
        codec = LiquidVQModel(**vq_config)
    table = llamagen_key_table(vq_config)
    assert table.keys() == state_dict.keys()
    assert sorted(table.values()) == sorted(codec.state_dict())
    assert (codec.codebook_size, codec.downsample_factor) == (16384, 16)
    for name, key in table.items():
        assert state_dict[name].numel() == codec.state_dict()[key].numel()
    assert 71e6 < codec.num_parameters() < 73e6  # 72M, as its README says


@torch.no_grad()
def test_what_goes_to_llamagen_comes_back_the_same(llamagen, tmp_path):
    codec = load_codec(llamagen[1])
    save_llamagen_codec(codec, tmp_path / "again.pt")
    written = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    assert written.pop("quantize.codebook_used").shape == (65536,)
    llamagen[0].load_state_dict(written)  # its own network takes it
    pixel_values = pixels()
    assert torch.equal(llamagen[0](pixel_values)[0], codec.encode_codes(pixel_values))
    again = load_llamagen_codec(tmp_path / "again.pt")
    for key, tensor in codec.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=1e-6 if "quantize" in key else 0)


def test_what_llamagen_cannot_hold_is_refused(llamagen, tmp_path):
    codec = load_codec(llamagen[1])
    with torch.no_grad():
        codec.quantize.embedding.weight[3] *= 2
    with pytest.raises(ValueError, match="codebook of unit vectors"):
        save_llamagen_codec(codec, tmp_path / "new.pt")
    plain = dict(codec.config) | {"down_block_types": ["DownEncoderBlock2D"] * 3}
    with pytest.raises(ValueError, match="cannot have down_block_types"):
        save_llamagen_codec(LiquidVQModel.from_config(plain), tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()


def test_a_codebook_that_was_trained_without_directions_is_left_as_it_is(llamagen):
    stored = torch.load(llamagen[1], weights_only=False)
    stored["args"].codebook_l2_norm = False
    torch.save(stored, llamagen[1])
    assert torch.equal(load_codec(llamagen[1]).quantize.embedding.weight, stored["model"]["quantize.embedding.weight"])


# aMUSEd


@pytest.fixture
def amused(tmp_path):
    """A narrow codec in the layout of amused/amused-256, whose configuration is that of diffusers' conversion script."""
    codec = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 12],
        layers_per_block=2,
        latent_channels=4,
        sample_size=32,
        num_vq_embeddings=64,
        norm_num_groups=4,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    ).eval()
    torch.nn.init.normal_(codec.quantize.embedding.weight, std=0.2)
    codec.save_pretrained(tmp_path / "amused" / "vqvae")
    index = {"_class_name": "AmusedPipeline", "_diffusers_version": "0.25.0.dev0"}
    index |= {"transformer": ["diffusers", "UVit2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "amused" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "amused" / "transformer").mkdir()
    (tmp_path / "amused" / "transformer" / "config.json").write_text('{"sample_size": 16}')
    return codec, tmp_path / "amused"


@torch.no_grad()
def test_amuseds_codec_reads_and_draws_as_its_pipeline_does(amused):
    oracle, folder = amused
    pixel_values = pixels()
    latents = oracle.encode(pixel_values / 2 + 0.5).latents  # its pictures are in [0, 1]
    codes = oracle.quantize(latents)[2][2].view(2, 8, 12)
    drawn = oracle.decode(codes, force_not_quantize=True, shape=(2, 8, 12, 4)).sample
    assert len(codes.unique()) > 4
    for name in (folder, folder / "vqvae"):
        codec = load_codec(name)
        for slicing in (False, True):
            codec.use_slicing = slicing
            assert torch.equal(codec.encode_codes(pixel_values), codes)
            torch.testing.assert_close(codec.decode_codes(codes) / 2 + 0.5, drawn, atol=1e-4, rtol=1e-5)
    assert load_codec(folder).config.sample_size == 64  # 16 codes of 4 pixels, as the pipeline draws
    assert codec_identity(load_codec(folder)) == codec_identity(load_codec(folder / "vqvae"))


@torch.no_grad()
def test_what_is_saved_of_amuseds_codec_is_still_diffusers_own(amused, tmp_path):
    codec, pixel_values = load_codec(amused[1]), pixels()
    codec.save_pretrained(tmp_path / "saved")
    assert VQModel.from_pretrained(tmp_path / "saved").config.lookup_from_codebook
    again = load_codec(tmp_path / "saved")
    assert torch.equal(again.encode_codes(pixel_values), codec.encode_codes(pixel_values))


# Chameleon


def chameleon(folder, with_decoder):
    """A tiny Chameleon as transformers saves it; its codec and what that computes."""
    params = make_config((1, 2), z_channels=16, embed_dim=16)
    oracle = make_oracle(params)
    vq_config = ChameleonVQVAEConfig(
        embed_dim=16, num_embeddings=64, latent_channels=16, resolution=32, base_channels=32,
        channel_multiplier=[1, 2], num_res_blocks=1,
    )  # fmt: skip
    config = ChameleonConfig(
        vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, vq_config=vq_config, vocabulary_map={"<image>": 4, "IMGIMGA": 5},
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config)
    report = model.model.vqmodel.load_state_dict(oracle.state_dict(), strict=False)
    assert not report.missing_keys and all(key.startswith("decoder.") for key in report.unexpected_keys)
    state_dict = model.state_dict()
    if with_decoder:
        state_dict |= {f"model.vqmodel.{key}": oracle.state_dict()[key] for key in report.unexpected_keys}
    model.save_pretrained(folder, state_dict=state_dict)
    return oracle, model.model.vqmodel


@torch.no_grad()
def test_chameleons_codec_reads_as_transformers_does_and_draws_as_taming_does(tmp_path):
    oracle, theirs = chameleon(tmp_path / "anole", with_decoder=True)
    codec, pixel_values = load_codec(tmp_path / "anole"), pixels(32, 32)
    codes = theirs.encode(pixel_values).image_tokens.view(2, 16, 16)
    assert len(codes.unique()) > 3
    assert torch.equal(codec.encode_codes(pixel_values), codes)
    torch.testing.assert_close(codec.decode_codes(codes), oracle(pixel_values)[1], atol=1e-5, rtol=1e-5)
    assert codec.config.sample_size == 32


def test_chameleon_without_its_decoder_says_where_the_whole_codec_is(tmp_path):
    chameleon(tmp_path / "chameleon", with_decoder=False)
    with pytest.raises(ValueError, match=r"not the decoder.*`chameleon`.*Junfeng5/Liquid_demo"):
        load_codec(tmp_path / "chameleon")


# By name


def test_a_liquid_checkpoint_lends_its_codec(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "liquid")
    assert same_weights(load_codec(tmp_path / "liquid"), model.model.vq_model)
    emoji = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT).model.vq_model
    assert same_weights(load_codec("liquid-emoji"), emoji)
    monkeypatch.chdir(tmp_path)
    tiny_codec(seed=5).save_pretrained("liquid-emoji")  # what lies here comes first
    assert same_weights(load_codec("liquid-emoji"), tiny_codec(seed=5))


@pytest.mark.parametrize("name", ["chameleon", "Junfeng5/Liquid_demo", "Junfeng5/Liquid_V1_7B"])
def test_chameleon_is_fetched_from_the_references_space(name, tmp_path, monkeypatch):
    commit = "0" * 40
    space = tmp_path / "spaces--Junfeng5--Liquid_demo"
    (space / "refs").mkdir(parents=True)
    (space / "refs" / "main").write_text(commit)
    codec = tiny_codec(norm_num_groups=32, block_out_channels=[32, 32])
    save_taming_codec(codec, space / "snapshots" / commit / "chameleon")
    monkeypatch.chdir(tmp_path)
    assert same_weights(load_codec(name, cache_dir=tmp_path, local_files_only=True), codec)


def test_names_on_the_hub_may_go_on_with_a_file_or_a_folder(llamagen, amused, tmp_path):
    for repository in ("peizesun--llamagen_t2i", "amused--amused-256"):
        place = tmp_path / f"models--{repository}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("1" * 40)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    snapshot = tmp_path / "models--peizesun--llamagen_t2i" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    llamagen[1].rename(snapshot / "vq_ds16_t2i.pt")
    load_codec("peizesun/llamagen_t2i/vq_ds16_t2i.pt", **hub)
    snapshot = tmp_path / "models--amused--amused-256" / "snapshots"
    snapshot.mkdir()
    amused[1].rename(snapshot / ("1" * 40))
    assert same_weights(load_codec("amused/amused-256/vqvae", **hub), load_codec("amused/amused-256", **hub))


def test_each_layout_of_a_folder_is_recognised(tmp_path):
    params = make_config((1, 2))
    for name in ("", "chameleon"):
        (tmp_path / "taming" / name).mkdir(parents=True, exist_ok=True)
    write(tmp_path / "taming" / "chameleon", params, make_oracle(params).state_dict())
    tiny_base().save_pretrained(tmp_path / "taming")  # the language model of a reference repository
    expected = load_codec(tmp_path / "taming" / "chameleon")
    assert same_weights(load_codec(tmp_path / "taming"), expected)
    assert same_weights(load_codec(tmp_path / "taming" / "chameleon" / "vqgan.ckpt"), expected)
    (tmp_path / "taming" / "chameleon" / "vqgan.ckpt").rename(tmp_path / "last.pt")
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(params))
    assert same_weights(load_codec(tmp_path / "last.pt"), expected)
    tiny_codec().save_pretrained(tmp_path / "diffusers")
    assert same_weights(load_codec(tmp_path / "diffusers"), tiny_codec())
    tiny_codec().half().save_pretrained(tmp_path / "half")
    assert load_codec(tmp_path / "half").dtype == torch.float32


def test_what_is_no_codec_is_told_with_what_was_found(tmp_path):
    tiny_base().save_pretrained(tmp_path / "llama")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(
        '{"_class_name": "SanaPipeline", "vae": ["diffusers", "X"]}'
    )
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    for name, error, message in [
        (tmp_path / "llama", ValueError, "is no codec: expected.*Found: a model of type 'llama', which has no codec"),
        (tmp_path / "photos", FileNotFoundError, "is no codec: expected.*Found: a folder of cat.png"),
        (tmp_path / "pipeline", ValueError, "is no codec.*Found: a SanaPipeline without a VQModel"),
        (tmp_path / "weights.pt", ValueError, r"is no codec: LlamaGen's have.*it has weight.*weights\.yaml"),
        (tmp_path / "nothing", ValueError, "is no codec.*Found: nothing of that name"),
        ("none/at/all", ValueError, "^'none/at/all' is no codec.*Found: nothing of that name"),
    ]:
        with pytest.raises(error, match=message):
            load_codec(name, local_files_only=True)


# As the VAE of a diffusion model


def test_a_codec_is_a_vae_that_rounds_nothing(tmp_path):
    codec = tiny_codec()
    codec.save_pretrained(tmp_path / "codec")
    vae = CodecVAE(str(tmp_path / "codec"), scaling_factor=0.5)
    picture = pixels(16, 16)
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
        latents = codec.encode(picture).latents
        torch.testing.assert_close(posterior.mean, latents, rtol=0, atol=0)
        torch.testing.assert_close(posterior.sample(), latents, rtol=0, atol=1e-5)
        expected = codec.decode(latents, force_not_quantize=True).sample
        torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=0, atol=0)
    assert latents.shape[1] == vae.config.latent_channels


def test_a_vae_of_a_codec_is_saved_as_its_name(tmp_path):
    tiny_codec().save_pretrained(tmp_path / "codec")
    vae = CodecVAE(str(tmp_path / "codec"), scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    assert [file.name for file in (tmp_path / "vae").iterdir()] == ["config.json"]
    again = CodecVAE.from_pretrained(tmp_path, subfolder="vae", torch_dtype=torch.bfloat16)
    assert same_weights(again, vae.to(torch.bfloat16)) and again.config.scaling_factor == 0.5
    tiny_codec(seed=5).save_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match=r"The VAE is of a codec [0-9a-f]{12}, but .*codec is [0-9a-f]{12}, another"):
        CodecVAE.from_pretrained(tmp_path / "vae")
    UniTokModel(**TINY_UNITOK_CONFIG).save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match=r"A codec of one code a position becomes a VAE, .*several is a UniTokModel"):
        CodecVAE(str(tmp_path / "several"), scaling_factor=1.0)
