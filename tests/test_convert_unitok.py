"""UniTok's codec against a functional forward that knows nothing but the names and shapes of the published checkpoint."""

import pytest
import torch
from tiny import TINY_UNITOK_CONFIG, tiny_pictures
from torch.nn import functional as F

from transformers_liquid.codecs.loading import load_codec
from transformers_liquid.codecs.unitok import (
    UNITOK_SIZES,
    UniTokModel,
    config_from_args,
    load_unitok_codec,
    save_unitok_codec,
    unitok_key_table,
)
from transformers_liquid.codecs.vq_model import codec_identity


WIDTH, CHANNELS, HEADS, HIDDEN = 32, 8, 2, (4, 8)


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under every name that UniTok's own classes give them, of the size of `TINY_UNITOK_CONFIG`."""
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def add(name, *shape, bias=True):
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        if bias:
            tensors[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.1

    def add_mlp(name, channels):
        add(f"{name}.norm", channels)
        add(f"{name}.w0", 2 * channels, channels)
        add(f"{name}.w1", 2 * channels, channels)
        add(f"{name}.w2", channels, 2 * channels)

    def add_block(name, inner, outer, scale):
        add(f"{name}.pre_norm", inner)
        add(f"{name}.conv1_1x1", 4 * outer, inner, 1, 1)
        add(f"{name}.conv2_kxk", 4 * outer, 1, 3, 3)
        add(f"{name}.conv3_1x1", outer, 4 * outer, 1, 1)
        if scale == "up":
            add(f"{name}.up.conv", 4 * outer, 4 * outer, 3, 3)
            add(f"{name}.shortcut.conv", outer, inner, 3, 3)
        elif scale == "down" and inner != outer:
            add(f"{name}.shortcut.expand", outer, inner, 1, 1)

    def add_projection(name, inner, outer):
        width = max(inner, outer)
        add(f"{name}.norm1", inner)
        add(f"{name}.norm2", outer)
        add(f"{name}.norm3", inner)
        add(f"{name}.attn.qkv", 3 * width, inner, bias=False)
        for bias in ("q_bias", "v_bias"):
            tensors[f"{name}.attn.{bias}"] = torch.randn(width, generator=generator) * 0.1
        tensors[f"{name}.attn.zero_k_bias"] = torch.zeros(width)
        add(f"{name}.attn.proj", outer, outer)
        add(f"{name}.proj", outer, inner)
        add_mlp(f"{name}.mlp", outer)

    stem, first, second = 4, *HIDDEN
    backbone = "encoder.patch_embed.backbone"
    add(f"{backbone}.stem.conv1", stem, 3, 3, 3)
    add(f"{backbone}.stem.norm1", stem)
    add(f"{backbone}.stem.conv2", stem, stem, 3, 3)
    add_block(f"{backbone}.stages.0.0", stem, first, "down")
    add_block(f"{backbone}.stages.1.0", first, second, "down")
    add_block(f"{backbone}.stages.1.1", second, second, None)
    add(f"{backbone}.pool.proj", WIDTH, second, 3, 3)
    add(f"{backbone}.pool.norm", second)
    tensors["encoder.pos_embed"] = torch.randn(1, 1, WIDTH, generator=generator) * 0.1
    for side in ("encoder", "decoder"):
        for layer in range(2):
            name = f"{side}.blocks.{layer}"
            add(f"{name}.norm1", WIDTH)
            add(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
            add(f"{name}.attn.proj", WIDTH, WIDTH)
            add(f"{name}.norm2", WIDTH)
            add_mlp(f"{name}.mlp", WIDTH)
        add(f"{side}.norm", WIDTH)
    add_projection("quant_proj", WIDTH, CHANNELS)
    for index in range(4):
        add(f"quantizer.codebooks.{index}.codebook", 16, CHANNELS // 4, bias=False)
        tensors[f"quantizer.codebooks.{index}.vocab_usage"] = torch.zeros(16)
    add_projection("post_quant_proj", CHANNELS, WIDTH)
    add("decoder.up_conv1.conv", second, WIDTH, 3, 3)
    add_block("decoder.up_conv2.0", second, second, "up")
    add_block("decoder.up_conv2.1", second, second, None)
    add_block("decoder.up_conv3.0", second, first, "up")
    add("decoder.up_conv4.conv1.conv", first, first, 3, 3)
    add("decoder.up_conv4.norm1", first)
    add("decoder.up_conv4.conv2", 3, first, 3, 3)
    tensors["logit_scale"] = torch.zeros(())
    add("fc_norm", WIDTH)
    add("projection", 12, WIDTH)
    tensors["text_encoder.positional_embedding"] = torch.zeros(7, 12)
    return tensors


class Oracle:
    """The forward of UniTok, in plain functions of the tensors."""

    def __init__(self, tensors):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def get(self, name):
        return self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")

    def linear(self, name, x):
        return F.linear(x, *self.get(name))

    def norm(self, name, x, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], *self.get(name), eps)

    def norm2d(self, name, x):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        weight, bias = (one[None, :, None, None] for one in self.get(name))
        return (x - mean) / (variance + 1e-6).sqrt() * weight + bias

    def conv(self, name, x, **kwargs):
        return F.conv2d(x, *self.get(name), **kwargs)

    def grow(self, name, x):
        return self.conv(f"{name}.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2), padding=1)

    def mlp(self, name, x):
        x = self.norm(f"{name}.norm", x)
        return self.linear(
            f"{name}.w2", F.gelu(self.linear(f"{name}.w0", x), approximate="tanh") * self.linear(f"{name}.w1", x)
        )

    def attend(self, query, key, value, heads, causal=False):
        query, key, value = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (query, key, value))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2)

    def block(self, name, x, scale=None):
        shortcut = x
        if scale == "up":
            shortcut = self.grow(f"{name}.shortcut", x)
        elif scale == "down":
            ones = torch.ones_like(x[:1, :1])
            window = {"kernel_size": 3, "stride": 2, "padding": 1}
            shortcut = F.avg_pool2d(x, **window) / F.avg_pool2d(ones, **window)
            if f"{name}.shortcut.expand.weight" in self.tensors:
                shortcut = self.conv(f"{name}.shortcut.expand", shortcut)
        x = F.gelu(self.conv(f"{name}.conv1_1x1", self.norm2d(f"{name}.pre_norm", x)))
        x = self.grow(f"{name}.up", x) if scale == "up" else x
        stride = 2 if scale == "down" else 1
        x = F.gelu(self.conv(f"{name}.conv2_kxk", x, padding=1, stride=stride, groups=x.shape[1]))
        return self.conv(f"{name}.conv3_1x1", x) + shortcut

    def transformer(self, side, x):
        for layer in range(2):
            name = f"{side}.blocks.{layer}"
            qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x)).chunk(3, -1)
            x = x + self.linear(f"{name}.attn.proj", self.attend(*qkv, HEADS).flatten(2))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))
        return self.norm(f"{side}.norm", x)

    def projection(self, name, x, heads, causal=False):
        get = self.tensors.__getitem__
        bias = torch.cat([get(f"{name}.attn.q_bias"), get(f"{name}.attn.zero_k_bias"), get(f"{name}.attn.v_bias")])
        qkv = F.linear(self.norm(f"{name}.norm1", x, 1e-5), get(f"{name}.attn.qkv.weight"), bias).chunk(3, -1)
        attended = self.attend(*qkv, heads, causal)
        attended = attended.mean(2) if x.shape[-1] > get(f"{name}.proj.weight").shape[0] else attended.flatten(2)
        x = self.linear(f"{name}.proj", self.norm(f"{name}.norm3", x, 1e-5)) + self.linear(
            f"{name}.attn.proj", attended
        )
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-5))

    def encode(self, pixel_values):
        name = "encoder.patch_embed.backbone"
        x = self.conv(f"{name}.stem.conv1", pixel_values.double(), stride=2, padding=1)
        x = self.conv(f"{name}.stem.conv2", F.gelu(self.norm2d(f"{name}.stem.norm1", x)), padding=1)
        x = self.block(f"{name}.stages.0.0", x, "down")
        x = self.block(f"{name}.stages.1.1", self.block(f"{name}.stages.1.0", x, "down"))
        x = self.conv(f"{name}.pool.proj", self.norm2d(f"{name}.pool.norm", x), stride=2, padding=1)
        x = self.transformer("encoder", x.flatten(2).transpose(1, 2) + self.tensors["encoder.pos_embed"])
        features = self.projection("quant_proj", x, WIDTH // CHANNELS)
        codes = []
        for index, piece in enumerate(features.chunk(4, -1)):
            codebook = F.normalize(self.tensors[f"quantizer.codebooks.{index}.codebook.weight"], dim=1)
            codes.append((F.normalize(piece, dim=-1) @ codebook.T).argmax(-1))
        return torch.stack(codes, 1)

    def vectors(self, codes, name="quantizer.codebooks"):
        books = [F.normalize(self.tensors[f"{name}.{index}.codebook.weight"], dim=1) for index in range(4)]
        return torch.cat([book[codes[:, index]] for index, book in enumerate(books)], -1)

    def decode(self, codes, grid):
        x = self.projection("post_quant_proj", self.vectors(codes), WIDTH // CHANNELS)
        x = self.transformer("decoder", x).transpose(1, 2).unflatten(-1, grid)
        x = self.block("decoder.up_conv2.0", self.grow("decoder.up_conv1", x), "up")
        x = self.block("decoder.up_conv3.0", self.block("decoder.up_conv2.1", x), "up")
        x = F.gelu(self.norm2d("decoder.up_conv4.norm1", self.grow("decoder.up_conv4.conv1", x)))
        return self.conv("decoder.up_conv4.conv2", x, padding=1)


def write(path, tensors, **args):
    args = {"model": "vitamin_large", "img_size": 64, "vocab_size": 64, "vocab_width": 8, "num_codebooks": 4} | args
    args = {"quant_proj": "attn", "num_query": 0, "dtype": torch.float32} | args
    torch.save({"args": args, "trainer": {"unitok": tensors, "config": {}}}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("unitok") / "unitok_tokenizer.pth", published())


@pytest.fixture(scope="module")
def codec(file):
    return load_unitok_codec(file, TINY_UNITOK_CONFIG)


def test_every_published_tensor_has_one_name_here(codec):
    table = unitok_key_table(codec)
    left_out = {"logit_scale", "text_encoder.positional_embedding"}
    left_out |= {f"{name}.{kind}" for name in ("fc_norm", "projection") for kind in ("weight", "bias")}
    left_out |= {name for name in published() if name.endswith(("vocab_usage", "zero_k_bias"))}
    assert table.keys() == published().keys() - left_out
    assert {*table.values()} == codec.state_dict().keys()


@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_codes_are_those_of_unitok(codec, size):
    pixel_values = tiny_pictures(3, *size)
    codes = codec.encode_codes(pixel_values)
    assert codes.shape == (3, 4, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(codes.flatten(2), Oracle(published()).encode(pixel_values))
    assert len(codes.unique()) > 8


def test_pictures_are_those_of_unitok(codec):
    codes = torch.randint(16, (2, 4, 4, 3), generator=torch.Generator().manual_seed(0))
    expected = Oracle(published()).decode(codes.flatten(2), (4, 3))
    torch.testing.assert_close(codec.decode_codes(codes).double(), expected, atol=1e-4, rtol=1e-4)
    codec.enable_slicing()
    torch.testing.assert_close(codec.decode_codes(codes).double(), expected, atol=1e-4, rtol=1e-4)
    codec.use_slicing = False


def test_there_and_back_bit_by_bit(codec, tmp_path):
    save_unitok_codec(codec, tmp_path / "again.pth")
    again = load_unitok_codec(tmp_path / "again.pth", TINY_UNITOK_CONFIG)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in codec.state_dict().items())
    stored = torch.load(tmp_path / "again.pth", weights_only=True)["trainer"]["unitok"]
    assert all(torch.equal(tensor, published()[name]) for name, tensor in stored.items())


def test_it_is_saved_as_models_of_diffusers_are(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    for again in (UniTokModel.from_pretrained(tmp_path), load_codec(tmp_path)):
        assert codec_identity(again) == codec_identity(codec)
    assert codec_identity(UniTokModel(**TINY_UNITOK_CONFIG)) != codec_identity(codec)


def test_the_published_sizes_have_names(tmp_path):
    args = {
        "img_size": 256,
        "vocab_size": 32768,
        "vocab_width": 64,
        "num_codebooks": 8,
        "quant_proj": "attn",
        "num_query": 0,
    }
    config = config_from_args(args | {"model": "vitamin_large"})
    with torch.device("meta"):
        codec, default = UniTokModel(**config), UniTokModel()
    shapes = {name: tensor.shape for name, tensor in codec.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in default.state_dict().items()}
    assert codec.downsample_factor == 16 and UNITOK_SIZES["vitamin_large"]["num_layers"] == 31


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.norm.weight": None}, "lacks 1 keys that are needed: decoder.norm.weight"),
        ({"encoder.cls_token": torch.zeros(1)}, "has 1 unknown keys: encoder.cls_token"),
        ({"decoder.norm.bias": torch.zeros(7)}, r"decoder.norm.bias has shape \(7,\)"),
        ({"quant_proj.attn.zero_k_bias": torch.ones(32)}, "unknown keys: quant_proj.attn.zero_k_bias"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, change, message):
    tensors = {name: one for name, one in (published() | change).items() if one is not None}
    with pytest.raises(ValueError, match=message):
        load_unitok_codec(write(tmp_path / "other.pth", tensors), TINY_UNITOK_CONFIG)


def test_settings_of_another_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="quant_proj='linear', but only 'attn'"):
        load_unitok_codec(write(tmp_path / "linear.pth", {}, quant_proj="linear"))
    with pytest.raises(ValueError, match="is a 'vit_small': expected vitamin_base, vitamin_large"):
        load_codec(write(tmp_path / "small.pth", {}, model="vit_small"))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save(
        {"args": object.__new__(type("Evil", (), {"__reduce__": lambda self: (print, ("ran",))}))}, tmp_path / "x.pth"
    )
    with pytest.raises(ValueError, match="never executed"):
        load_unitok_codec(tmp_path / "x.pth")


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 4, 4), (0, 4, 4, 4)])
def test_codes_of_another_shape_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"codes must have shape \(batch, 4, height, width\)"):
        codec.decode_codes(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="Code 16 at position 0, 3, 0, 0 is outside"):
        codec.decode_codes(torch.tensor([0, 0, 0, 16]).view(1, 4, 1, 1))


def test_what_is_not_finite_has_no_codes(codec):
    with pytest.raises(ValueError, match="The pixels of picture 1"):
        codec.encode_codes(tiny_pictures(2, 64, 64).index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ValueError, match="multiples of 16"):
        codec.encode_codes(tiny_pictures(1, 64, 40))
