"""UniTok (arXiv 2502.20321): a codec with several codes a position; `unitok_tokenizer.pth` <-> [`UniTokModel`].

A ViTamin hybrid (arXiv 2404.02132: convolutions, then a transformer) reads pictures, and its mirror image draws them.
Between them a projection by attention makes vectors of which each piece has a codebook of its own, in which the code is
the vector of the greatest cosine. Facts are those of `models/` in github.com/FoundationVision/UniTok.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from ..utils.files import check_keys, read_tensors
from .vq_model import CodeMixin, LiquidVQModel, check_finite


UNITOK_CHECKPOINT_NAME = "unitok_tokenizer.pth"

# Of the sizes that the checkpoint names. Heads have 64 channels.
UNITOK_SIZES: dict[str, dict[str, Any]] = {
    "vitamin_base": {"block_out_channels": [3, 128, 128, 256, 768], "num_layers": 14, "num_attention_heads": 12},
    "vitamin_large": {"block_out_channels": [3, 160, 160, 320, 1024], "num_layers": 31, "num_attention_heads": 16},
}
# What the checkpoint calls the arguments of [`UniTokModel`] that its size does not say.
ARGS = {"img_size": "sample_size", "num_codebooks": "num_codebooks", "vocab_width": "vq_embed_dim"}
# Its other settings of the network, each with the only value that is supported.
ARGS_FIXED = {"quant_proj": "attn", "num_query": 0}

# What compares pictures with texts, and how often codes were used in training: no part of drawing, and skipped.
SKIPPED = re.compile(r"(text_encoder|fc_norm|projection)\..*|logit_scale|quantizer\.codebooks\.\d+\.vocab_usage")


class UniTokModel(CodeMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    """A codec with `num_codebooks` codes a position, saved and loaded as models of diffusers are.

    Args:
        sample_size (`int`, defaults to 256): Height and width of the pictures it was trained on.
        num_codebooks (`int`, defaults to 8): Codes of a position.
        num_vq_embeddings (`int`, defaults to 4096): Codes of each codebook.
        vq_embed_dim (`int`, defaults to 64): Channels of a position, of which each codebook has an equal share.
        block_out_channels (list of `int`): Channels of the pixels and after each halving: by the stem, the two stages of
            convolutions, and where the transformer begins. Defaults to those of the published codec.
        layers_per_block (list of `int`): Blocks of the two stages.
        num_layers (`int`, defaults to 31): Of the transformer.
        num_attention_heads (`int`, defaults to 16): Of the transformer.

    Example:

    ```python
    >>> codec = load_unitok_codec("unitok_tokenizer.pth")
    >>> codes = codec.encode_codes(pixel_values)  # (B, 3, 256, 256) in [-1, 1] -> (B, 8, 16, 16) int64
    >>> pixel_values = codec.decode_codes(codes)  # (B, 3, 256, 256)
    ```
    """

    use_slicing = False  # `enable_slicing()` lets `decode_codes` work picture by picture

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        num_codebooks: int = 8,
        num_vq_embeddings: int = 4096,
        vq_embed_dim: int = 64,
        block_out_channels: tuple[int, ...] = (3, 160, 160, 320, 1024),
        layers_per_block: tuple[int, ...] = (2, 4),
        num_layers: int = 31,
        num_attention_heads: int = 16,
    ):
        super().__init__()
        width = block_out_channels[-1]
        if vq_embed_dim % num_codebooks or width % vq_embed_dim:
            raise ValueError(
                f"num_codebooks must divide vq_embed_dim, and that the last of block_out_channels, got {num_codebooks}, "
                f"{vq_embed_dim} and {width}."
            )
        self.encoder = _Encoder(block_out_channels, layers_per_block, num_layers, num_attention_heads)
        self.quant_proj = AttnProjection(width, vq_embed_dim)
        self.codebooks = nn.ParameterList(
            torch.randn(num_vq_embeddings, vq_embed_dim // num_codebooks) for _ in range(num_codebooks)
        )
        self.post_quant_proj = AttnProjection(vq_embed_dim, width)
        self.decoder = _Decoder(block_out_channels, layers_per_block, num_layers, num_attention_heads)

    @torch.no_grad()
    def encode_unchecked(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `encode_codes`, but -1 where a score is not finite: see [`LiquidVQModel.encode_unchecked`]."""
        self.check_pixels(pixel_values)
        with maybe_autocast(self.execution_device.type, enabled=False):
            features = self.encoder(pixel_values.to(self.execution_device, self.dtype))
            height, width = features.shape[-2:]
            features = self.quant_proj(features.flatten(2).transpose(1, 2))
            codes = self.nearest_codes(features).unflatten(-1, (height, width))
        return codes if self.num_codebooks > 1 else codes[:, 0]

    def nearest_codes(self, features: torch.Tensor) -> torch.LongTensor:
        """Codes `(B, num_codebooks, n)` of the codebooks' vectors nearest to features `(B, n, channels)`, by their cosines in
        fp32; -1 where one is not finite."""
        codebooks = F.normalize(torch.stack([*self.codebooks]).float(), dim=-1)
        pieces = F.normalize(features.float().unflatten(-1, (len(codebooks), -1)), dim=-1)
        scores = torch.einsum("bnkd,kvd->bknv", pieces, codebooks.to(pieces.device))
        return torch.where(scores.amax(-1).isfinite(), scores.argmax(-1), -1)

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Turns codes `(B, num_codebooks, h, w)` into pictures `(B, 3, h * 16, w * 16)`; else as
        [`LiquidVQModel.decode_codes`]."""
        codes = self.checked_codes(codes, dtype)
        codes = codes if self.num_codebooks > 1 else codes[:, None]
        with maybe_autocast(codes.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            decoded = []
            for piece in codes.split(1 if self.use_slicing else len(codes)):
                features = self.post_quant_proj(code_vectors(self.codebooks, piece.flatten(2)))
                decoded.append(self.decoder(features, piece.shape[-2:]).to(self.dtype))
        pixel_values = torch.cat(decoded)
        check_finite(pixel_values, "The decoded pixels")
        return pixel_values


def codec_class(vq_config: dict[str, Any]) -> type[CodeMixin]:
    """The class of a codec of this configuration."""
    return UniTokModel if "num_codebooks" in vq_config else LiquidVQModel


def code_vectors(codebooks: nn.ParameterList, codes: torch.LongTensor) -> torch.Tensor:
    """The vectors `(B, n, channels)` of codes `(B, K, n)`: those of all codebooks side by side, each of length 1."""
    # Normalized after they are looked up, which is the same and costs less.
    vectors = [F.normalize(F.embedding(codes[:, index], one), dim=-1) for index, one in enumerate(codebooks)]
    return torch.cat(vectors, dim=-1)


def _named(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


class AttnProjection(nn.Module):
    """From one number of channels to another by attention; what becomes fewer is the mean over the heads.

    Args:
        in_channels, out_channels (`int`): One of them divides the other.
        causal (`bool`): Whether positions see those before them alone.
    """

    def __init__(self, in_channels: int, out_channels: int, causal: bool = False):
        super().__init__()
        width, self.head_dim = max(in_channels, out_channels), min(in_channels, out_channels)
        self.causal, self.averages = causal, in_channels > out_channels
        self.norm1 = nn.LayerNorm(in_channels)
        qkv = nn.Linear(in_channels, 3 * width, bias=False)
        self.attn = _named(qkv=qkv, proj=nn.Linear(out_channels, out_channels))
        self.attn.q_bias, self.attn.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm3 = nn.LayerNorm(in_channels)
        self.norm2 = nn.LayerNorm(out_channels)
        self.mlp = _GatedMLP(out_channels)

    def forward(self, hidden_states: torch.Tensor, num_last: int | None = None) -> torch.Tensor:
        """`(B, n, in_channels)` to `(B, n, out_channels)`, or to those of the last `num_last` positions alone."""
        number = hidden_states.shape[1] if num_last is None else num_last
        query, key, value = self.attn.qkv(self.norm1(hidden_states)).chunk(3, dim=-1)
        query, value = query[:, -number:] + self.attn.q_bias, value + self.attn.v_bias
        heads = [one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in (query, key, value)]
        mask = None
        if self.causal:
            mask = torch.ones(number, key.shape[1], dtype=torch.bool, device=key.device).tril(key.shape[1] - number)
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
        attended = attended.mean(2) if self.averages else attended.flatten(2)
        hidden_states = self.proj(self.norm3(hidden_states[:, -number:])) + self.attn.proj(attended)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class _GatedMLP(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.w0, self.w1 = nn.Linear(channels, 2 * channels), nn.Linear(channels, 2 * channels)
        self.w2 = nn.Linear(2 * channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.norm(hidden_states)
        return self.w2(F.gelu(self.w0(hidden_states), approximate="tanh") * self.w1(hidden_states))


class _Layer(nn.Module):
    """Of the transformer: attention without positions, then the gated MLP."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.attn = _named(qkv=nn.Linear(channels, 3 * channels), proj=nn.Linear(channels, channels))
        self.mlp = _GatedMLP(channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.attn.qkv(self.norm1(hidden_states)).chunk(3, dim=-1)
        heads = [one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in projected]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.attn.proj(attended)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class _Norm2d(nn.LayerNorm):
    """Over the channels of pictures."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Upsample(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class _ConvBlock(nn.Module):
    """An inverted bottleneck around a convolution of each channel, which halves or doubles the picture if `scale` says so."""

    def __init__(self, in_channels: int, out_channels: int, scale: float = 1.0):
        super().__init__()
        width = 4 * out_channels
        self.pre_norm = _Norm2d(in_channels, eps=1e-6)
        self.conv1_1x1 = nn.Conv2d(in_channels, width, 1)
        self.up = _Upsample(width, width) if scale == 2 else nn.Identity()
        self.conv2_kxk = nn.Conv2d(width, width, 3, stride=2 if scale == 0.5 else 1, padding=1, groups=width)
        self.conv3_1x1 = nn.Conv2d(width, out_channels, 1)
        self.shortcut: nn.Module = nn.Identity()
        if scale == 2:
            self.shortcut = _Upsample(in_channels, out_channels)
        elif scale == 0.5:
            expand = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
            pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
            self.shortcut = nn.Sequential(OrderedDict(pool=pool, expand=expand))
        elif in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(hidden_states)
        hidden_states = self.up(F.gelu(self.conv1_1x1(self.pre_norm(hidden_states))))
        return self.conv3_1x1(F.gelu(self.conv2_kxk(hidden_states))) + shortcut


def _stage(in_channels: int, out_channels: int, num_blocks: int, scale: float) -> nn.Sequential:
    blocks = [_ConvBlock(in_channels, out_channels, scale)]
    return nn.Sequential(*blocks, *(_ConvBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))


class _Encoder(nn.Module):
    """Pictures to features `(B, channels, h, w)`."""

    def __init__(self, channels: tuple[int, ...], layers_per_block: tuple[int, ...], num_layers: int, num_heads: int):
        super().__init__()
        pixels, stem, first, second, width = channels
        conv = nn.Conv2d(pixels, stem, 3, stride=2, padding=1)
        self.stem = _named(conv1=conv, norm1=_Norm2d(stem, eps=1e-6), conv2=nn.Conv2d(stem, stem, 3, padding=1))
        self.stages = nn.Sequential(
            _stage(stem, first, layers_per_block[0], 0.5), _stage(first, second, layers_per_block[1], 0.5)
        )
        proj = nn.Conv2d(second, width, 3, stride=2, padding=1)
        self.pool = _named(norm=_Norm2d(second, eps=1e-6), proj=proj)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)  # the same for all positions
        self.blocks = nn.Sequential(*(_Layer(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.stem.conv2(F.gelu(self.stem.norm1(self.stem.conv1(pixel_values))))
        features = self.pool.proj(self.pool.norm(self.stages(features)))
        tokens = features.flatten(2).transpose(1, 2) + self.pos_embed
        return self.norm(self.blocks(tokens)).transpose(1, 2).unflatten(-1, features.shape[-2:])


class _Decoder(nn.Module):
    """Features `(B, h * w, channels)` to pictures."""

    def __init__(self, channels: tuple[int, ...], layers_per_block: tuple[int, ...], num_layers: int, num_heads: int):
        super().__init__()
        pixels, _, first, second, width = channels
        self.blocks = nn.Sequential(*(_Layer(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up_conv1 = _Upsample(width, second)
        self.up_conv2 = _stage(second, second, layers_per_block[1], 2)
        self.up_conv3 = _stage(second, first, layers_per_block[0], 2)
        conv = nn.Conv2d(first, pixels, 3, padding=1)
        self.up_conv4 = _named(conv1=_Upsample(first, first), norm1=_Norm2d(first, eps=1e-6), conv2=conv)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        features = self.norm(self.blocks(features)).transpose(1, 2).unflatten(-1, grid)
        features = self.up_conv3(self.up_conv2(self.up_conv1(features)))
        last = self.up_conv4
        return last.conv2(F.gelu(last.norm1(last.conv1(features))))


def unitok_key_table(codec: UniTokModel) -> dict[str, str]:
    """Every tensor's name in `unitok_tokenizer.pth` -> its name in [`UniTokModel`]."""
    table = {}
    for key in codec.state_dict():
        name = re.sub(r"^encoder\.(?=stem|stages|pool)", "encoder.patch_embed.backbone.", key)
        table[re.sub(r"^codebooks\.(\d+)$", r"quantizer.codebooks.\1.codebook.weight", name)] = key
    return table


def load_unitok_codec(path: str | Path, config: dict[str, Any] | None = None) -> UniTokModel:
    """Loads the published `unitok_tokenizer.pth`. Code in the file is never executed.

    Args:
        path (`str` or `Path`): The checkpoint, or its folder.
        config (`dict`, *optional*): Arguments of [`UniTokModel`], for a size that has no name in `UNITOK_SIZES`.

    Returns:
        [`UniTokModel`] in float32 and eval mode. What compares pictures with texts is left out.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged or holds pickled code, is of another network, or a key is unknown, missing or
            of another shape.
    """
    path = Path(path) / UNITOK_CHECKPOINT_NAME if Path(path).is_dir() else Path(path)
    stored = read_tensors(path)
    check_keys(str(path), stored, required=("args", "trainer"))
    with torch.device("meta"):  # the tensors read become its weights
        codec = UniTokModel(**config_from_args(stored["args"]) if config is None else config)
    table, tensors = unitok_key_table(codec), stored["trainer"].get("unitok", {})
    # A bias of keys that is always 0.
    zeros = [name for name in tensors if name.endswith(".attn.zero_k_bias") and not tensors[name].any()]
    tensors = {name: one for name, one in tensors.items() if not SKIPPED.fullmatch(name) and name not in zeros}
    check_keys(f"The UniTok checkpoint {path}", tensors, required=table, optional=())
    expected = codec.state_dict()
    for name, key in table.items():
        if tensors[name].shape != expected[key].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, but a codec of these arguments has "
                f"{tuple(expected[key].shape)}. Is the checkpoint whole and of this size?"
            )
    codec.load_state_dict({key: tensors[name].float() for name, key in table.items()}, assign=True)
    return codec.eval()


def save_unitok_codec(codec: UniTokModel, path: str | Path) -> None:
    """Writes a codec as `unitok_tokenizer.pth` has it, which [`load_unitok_codec`] reads back bit by bit.

    What compares pictures with texts is not there: UniTok's own code reads the file with `strict=False`.

    Args:
        codec ([`UniTokModel`]): The codec.
        path (`str` or `Path`): The file.
    """
    ours, config = codec.state_dict(), codec.config
    state_dict = {name: ours[key] for name, key in unitok_key_table(codec).items()}
    for name in ("quant_proj", "post_quant_proj"):
        state_dict[f"{name}.attn.zero_k_bias"] = torch.zeros_like(ours[f"{name}.attn.q_bias"])
    size = {"vocab_size": config.num_codebooks * config.num_vq_embeddings}
    args = {theirs: config[name] for theirs, name in ARGS.items()} | ARGS_FIXED | size
    of_size = {name: json.loads(json.dumps(config[name])) for name in UNITOK_SIZES["vitamin_large"]}  # lists, as there
    args["model"] = next((name for name, size in UNITOK_SIZES.items() if size == of_size), None)
    torch.save({"args": args, "trainer": {"unitok": state_dict}}, path)


def config_from_args(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of [`UniTokModel`] for the `args` of a checkpoint.

    Raises:
        ValueError: If one is missing, or asks for another network.
    """
    check_keys("args", args, required=("model", "vocab_size", *ARGS, *ARGS_FIXED))
    for name, value in ARGS_FIXED.items():
        if args[name] != value:
            raise ValueError(f"The UniTok checkpoint has {name}={args[name]!r}, but only {value!r} is supported.")
    if args["model"] not in UNITOK_SIZES:
        raise ValueError(f"The UniTok checkpoint is a {args['model']!r}: expected {', '.join(UNITOK_SIZES)}.")
    own = {name: args[theirs] for theirs, name in ARGS.items()}
    return own | UNITOK_SIZES[args["model"]] | {"num_vq_embeddings": args["vocab_size"] // args["num_codebooks"]}
