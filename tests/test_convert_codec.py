"""taming's VQGAN checkpoints and ours are the same codec.

The oracle is a VQGAN in plain PyTorch, written here after the paper (arXiv 2012.09841), with taming's parameter names.
"""

import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from transformers_liquid.codecs.taming import (
    load_taming_codec,
    save_taming_codec,
    taming_config_from_vq,
    vq_config_from_taming,
    vq_key_table,
)
from transformers_liquid.codecs.vq_model import CHAMELEON_VQ_CONFIG, LiquidVQModel


CHAMELEON_YAML = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 8192
    ddconfig:
      double_z: false
      z_channels: 256
      resolution: 512
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 1, 2, 2, 4]
      num_res_blocks: 2
      attn_resolutions: []
      dropout: 0.0
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {disc_start: 10000}
"""


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class OracleResnet(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if "nin_shortcut" in self._modules else x)


class OracleAttention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm = norm(n)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, pixels)
        weights = torch.einsum("bci,bcj->bij", q, k).div(x.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


def oracle_middle(n):
    return nn.ModuleDict({"block_1": OracleResnet(n, n), "attn_1": OracleAttention(n), "block_2": OracleResnet(n, n)})


def oracle_level(n_in, n_out, blocks, attends, resample):
    level = nn.ModuleDict(
        {
            "block": nn.ModuleList([OracleResnet(n_in if i == 0 else n_out, n_out) for i in range(blocks)]),
            "attn": nn.ModuleList([OracleAttention(n_out) for _ in range(blocks if attends else 0)]),
        }
    )
    if resample:
        level[resample] = nn.ModuleDict({"conv": nn.Conv2d(n_out, n_out, 3, 2 if resample == "downsample" else 1)})
    return level


def run_level(level, x):
    for i, block in enumerate(level["block"]):
        x = block(x)
        x = level["attn"][i](x) if len(level["attn"]) else x
    return x


class OracleEncoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, z_channels, resolution, in_channels, **_):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        n = ch
        for i, width in enumerate(widths):
            attends = resolution // 2**i in attn_resolutions
            self.down.append(oracle_level(n, width, num_res_blocks, attends, "downsample" if i < last else None))
            n = width
        self.mid = oracle_middle(n)
        self.norm_out, self.conv_out = norm(n), nn.Conv2d(n, z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = run_level(level, x)
            if "downsample" in level:
                x = level["downsample"]["conv"](F.pad(x, (0, 1, 0, 1)))
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class OracleDecoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, attn_resolutions, z_channels, resolution, out_ch, **_):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        n = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z_channels, n, 3, padding=1), oracle_middle(n)
        levels = {}
        for i in reversed(range(len(widths))):
            attends = resolution // 2**i in attn_resolutions
            levels[i] = oracle_level(n, widths[i], num_res_blocks + 1, attends, "upsample" if i else None)
            n = widths[i]
        self.up = nn.ModuleList([levels[i] for i in range(len(widths))])
        self.norm_out, self.conv_out = norm(n), nn.Conv2d(n, out_ch, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up):
            x = run_level(level, x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.pad(x.repeat_interleave(2, 2).repeat_interleave(2, 3), (1, 1, 1, 1)))
        return self.conv_out(F.silu(self.norm_out(x)))


class OracleVQGAN(nn.Module):
    def __init__(self, ddconfig, embed_dim, n_embed):
        super().__init__()
        self.encoder, self.decoder = OracleEncoder(**ddconfig), OracleDecoder(**ddconfig)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(n_embed, embed_dim)})
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def forward(self, x):
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        book = self.quantize["embedding"].weight
        codes = (z[..., None, :] - book).pow(2).sum(-1).argmin(-1)
        return codes, self.decoder(self.post_quant_conv(book[codes].permute(0, 3, 1, 2)))


def make_config(ch_mult, blocks=1, attn=(), z_channels=16, embed_dim=16, n_embed=64, resolution=32, channels=3):
    ddconfig = {
        "double_z": False,
        "z_channels": z_channels,
        "resolution": resolution,
        "in_channels": channels,
        "out_ch": channels,
        "ch": 32,
        "ch_mult": list(ch_mult),
        "num_res_blocks": blocks,
        "attn_resolutions": list(attn),
        "dropout": 0.0,
    }
    return {"ddconfig": ddconfig, "embed_dim": embed_dim, "n_embed": n_embed}


CONFIGS = {
    "chameleon-but-narrow": make_config((1, 1, 2, 2, 4), blocks=2),
    "attention-inside": make_config((1, 2, 2), attn=(16, 8)),
    "attention-at-the-finest": make_config((1, 2), attn=(32,), blocks=2),
    "uneven": make_config((1, 3, 2, 3), z_channels=8, embed_dim=4, attn=(8,)),
    "one-level-grey": make_config((1,), channels=1),
}


def make_oracle(params, seed=0):
    torch.manual_seed(seed)
    oracle = OracleVQGAN(**params)
    with torch.no_grad():
        for parameter in oracle.parameters():  # affine norms and biases away from 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return oracle.eval()


def write(directory, params, state_dict):
    torch.save(state_dict, directory / "vqgan.ckpt")
    (directory / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_converted_codec_computes_what_taming_computes(name, tmp_path):
    params = CONFIGS[name]
    oracle = make_oracle(params)
    write(tmp_path, params, {"state_dict": oracle.state_dict()})
    codec = load_taming_codec(tmp_path)

    pixel_values = torch.rand(2, params["ddconfig"]["in_channels"], 32, 48) * 2 - 1
    codes, expected = oracle(pixel_values)
    assert len(codes.unique()) > 3  # else the comparison would say little
    assert torch.equal(codec.encode_codes(pixel_values), codes)
    torch.testing.assert_close(codec.decode_codes(codes), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_taming_to_ours_to_taming_is_the_same_bit_by_bit(name, tmp_path):
    params = CONFIGS[name]
    state_dict = make_oracle(params).state_dict()
    write(tmp_path, params, state_dict)
    codec = load_taming_codec(tmp_path)
    save_taming_codec(codec, tmp_path / "new" / "folder")

    written = torch.load(tmp_path / "new" / "folder" / "vqgan.ckpt", weights_only=True)["state_dict"]
    assert written.keys() == state_dict.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in state_dict.items())
    config = yaml.safe_load((tmp_path / "new" / "folder" / "vqgan.yaml").read_text())
    assert config["model"]["params"] == params
    again = load_taming_codec(tmp_path / "new" / "folder" / "vqgan.ckpt")
    assert all(torch.equal(tensor, codec.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_chameleons_yaml_is_the_default_codec_and_back():
    config = yaml.safe_load(CHAMELEON_YAML)
    assert vq_config_from_taming(config) == CHAMELEON_VQ_CONFIG
    params = config["model"]["params"]
    assert taming_config_from_vq(CHAMELEON_VQ_CONFIG)["model"]["params"] == {
        key: params[key] for key in ("ddconfig", "embed_dim", "n_embed")
    }


def test_the_table_names_every_tensor_of_chameleon_once():
    with torch.device("meta"):
        codec = LiquidVQModel(**CHAMELEON_VQ_CONFIG)
        params = yaml.safe_load(CHAMELEON_YAML)["model"]["params"]
        oracle = OracleVQGAN(params["ddconfig"], params["embed_dim"], params["n_embed"])
    table = vq_key_table(CHAMELEON_VQ_CONFIG)
    assert table.keys() == oracle.state_dict().keys()
    assert sorted(table.values()) == sorted(codec.state_dict())


def test_config_can_be_given_flat_or_as_another_file(tmp_path):
    params = CONFIGS["one-level-grey"]
    torch.save(make_oracle(params).state_dict(), tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(FileNotFoundError, match=r"last\.yaml"):
        load_taming_codec(tmp_path / "last.ckpt")
    for config in (params, tmp_path / "model.yaml"):
        assert load_taming_codec(tmp_path / "last.ckpt", config=config).config.in_channels == 1


def test_training_only_weights_are_skipped_and_nothing_else(tmp_path):
    params = CONFIGS["one-level-grey"]
    state_dict = make_oracle(params).state_dict()
    write(tmp_path, params, {**state_dict, "loss.discriminator.main.0.weight": torch.zeros(1)})
    codec = load_taming_codec(tmp_path)
    assert torch.equal(codec.quantize.embedding.weight, state_dict["quantize.embedding.weight"])
    assert not codec.training

    write(tmp_path, params, {**state_dict, "decoder.up.7.attn.0.q.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown.*decoder\.up\.7\.attn\.0\.q\.weight"):
        load_taming_codec(tmp_path)

    del state_dict["decoder.mid.attn_1.q.bias"]
    write(tmp_path, params, state_dict)
    with pytest.raises(ValueError, match=r"lacks.*decoder\.mid\.attn_1\.q\.bias"):
        load_taming_codec(tmp_path)


@pytest.mark.parametrize(
    ("key", "shape"), [("quantize.embedding.weight", (63, 16)), ("encoder.mid.attn_1.k.weight", (32, 32, 3, 3))]
)
def test_tensors_of_another_shape_raise_naming_the_key(key, shape, tmp_path):
    params = CONFIGS["one-level-grey"]
    write(tmp_path, params, {**make_oracle(params).state_dict(), key: torch.zeros(shape)})
    with pytest.raises(ValueError, match=key.replace("mid.attn_1.k", "mid_block.attentions.0.to_k")):
        load_taming_codec(tmp_path)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_code_in_a_checkpoint_is_refused_unexecuted(tmp_path):
    params = CONFIGS["one-level-grey"]
    write(tmp_path, params, {"state_dict": make_oracle(params).state_dict(), "callbacks": Payload()})
    with pytest.raises(ValueError, match="never executed"):
        load_taming_codec(tmp_path)
    (tmp_path / "vqgan.ckpt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="never executed"):
        load_taming_codec(tmp_path)
    (tmp_path / "vqgan.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="YAML"):
        load_taming_codec(tmp_path)


def test_damaged_checkpoints_raise_naming_the_file(tmp_path):
    params = CONFIGS["one-level-grey"]
    write(tmp_path, params, make_oracle(params).state_dict())
    data = (tmp_path / "vqgan.ckpt").read_bytes()
    for content in (b"", b"<html>404</html>", data[: len(data) // 2]):
        (tmp_path / "vqgan.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"vqgan\.ckpt.*damaged"):
            load_taming_codec(tmp_path)
    for content in (torch.zeros(3), {"state_dict": {"quant_conv.weight": 3}}):
        torch.save(content, tmp_path / "vqgan.ckpt")
        with pytest.raises(ValueError, match="The taming checkpoint lacks"):
            load_taming_codec(tmp_path)
    (tmp_path / "vqgan.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vqgan\.ckpt"):
        load_taming_codec(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, "double_z=True"),
        ({"attn_type": "linear"}, "attn_type='linear'"),
        ({"resamp_with_conv": False}, "resamp_with_conv=False"),
        ({"ch_mult": [2, 4]}, r"ch_mult\[0\]=2"),
        ({"mystery": 1}, "mystery"),
    ],
)
def test_what_diffusers_cannot_express_raises(change, message):
    params = make_config((1, 2))
    with pytest.raises(ValueError, match=message):
        vq_config_from_taming({**params, "ddconfig": {**params["ddconfig"], **change}})


def test_incomplete_configurations_raise_naming_what_is_missing():
    params = make_config((1, 2))
    with pytest.raises(ValueError, match="n_embed"):
        vq_config_from_taming({"ddconfig": params["ddconfig"], "embed_dim": 4})
    del params["ddconfig"]["resolution"]
    with pytest.raises(ValueError, match="resolution"):
        vq_config_from_taming(params)
    with pytest.raises(ValueError, match="remap"):
        vq_config_from_taming({**make_config((1, 2)), "remap": "used.npy"})
    with pytest.raises(ValueError, match="lacks 3 keys"):
        vq_config_from_taming(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups=16"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"block_out_channels": [64, 96]}, "block_out_channels"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "up_block_types"),
        ({"norm_type": "spatial"}, "norm_type"),
    ],
)
def test_what_taming_cannot_express_is_not_saved(change, message, tmp_path):
    codec = LiquidVQModel(**{**vq_config_from_taming(make_config((1, 2))), **change})
    with pytest.raises(ValueError, match=message):
        save_taming_codec(codec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
