"""Turns a causal language model and an image codec into a Liquid model: rows or a head for the codes, tokens around them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..codecs.vq_model import CodeMixin, code_grid
from ..generation.settings import eos_token_ids
from ..models.liquid.configuration_liquid import LiquidConfig, several_codes_obstacle
from ..models.liquid.modeling_liquid import LiquidForCausalLM, LiquidPreTrainedModel, assemble
from ..models.liquid.processing_liquid import LiquidProcessor, build_processor
from ..models.liquid.several_codes import CodeEmbedder, CodeHead
from ..models.liquid.vocabulary import IMAGE_TOKENS, free_tokens, is_one_token


def expand_vocabulary(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codec: CodeMixin,
    image_size: int | None = None,
    init: str = "codebook",
    seed: int = 0,
) -> tuple[LiquidForCausalLM, LiquidProcessor]:
    """Gives a language model a row for every code of a codec. What it says about text stays what it was.

    The image rows come after all rows that the base has, its padded ones included; where they begin is stored in the
    configuration. For the four special tokens, in this order of preference: a token of that name (`<image>`, `<boi>`,
    `<eoi>`, `<unconditional>`), one that the base reserved (such as `<unused0>` or `<|reserved_special_token_0|>`),
    a new token in a padded row, a new token in a new row. No row that exists is changed, so that reserved tokens and
    padded rows begin as the base has them.

    Several codes a position have no rows: beside the base stand what embeds them, which begins with the codec's vectors and
    its projection (as in UniTok's `initialize_embedder`), and a head that draws them.

    Args:
        base_model (`PreTrainedModel`): Any model that `AutoModelForCausalLM` loads. It becomes a part of the result:
            its embeddings grow in place and its weights are not copied.
        tokenizer (`PreTrainedTokenizerBase`): The base's. It becomes a part of the processor: special tokens are
            added in place.
        codec ([`LiquidVQModel`] or [`UniTokModel`]): It becomes a part of the result, frozen and in fp32.
        image_size (`int`, *optional*): Default height and width of pictures in pixels. Defaults to the codec's
            `sample_size`.
        init (`str`, defaults to `"codebook"`): What new rows begin as. `"mean"`: the mean of the tokenizer's rows (the
            reference's mean resizing). `"normal"`: draws from a normal distribution with the mean and covariance of
            these rows. `"codebook"`: such draws, but codes that look alike have rows that are alike: half of each row's
            variance follows its vector in the codebook.
        seed (`int`, defaults to 0): For the draws.

    Returns:
        The model and its processor; `save_pretrained` both into one folder.

    Raises:
        ValueError: If the base cannot be expanded, is expanded already, the tokenizer has ids beyond the base's rows,
            the codec is none of these, has several codes a position and the base changes its logits, or `image_size` does
            not fit it. Nothing has been changed then.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from transformers_liquid import expand_vocabulary, load_codec
    >>> base_model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    >>> model, processor = expand_vocabulary(base_model, tokenizer, load_codec(codec))
    >>> model.save_pretrained(out), processor.save_pretrained(out)
    ```
    """
    if (problem := _obstacle(base_model, tokenizer, codec, init)) is not None:
        raise ValueError(problem)
    image_size = codec.config.sample_size if image_size is None else image_size
    code_grid(image_size, image_size, codec.downsample_factor)

    if _is_unpacked_gguf(base_model):
        base_model.hf_quantizer.remove_quantization_config(base_model)
    num_rows, num_text_tokens = len(base_model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    ids = special_token_ids(base_model, tokenizer, list(IMAGE_TOKENS.values()))
    token_ids = {f"{name}_id": one for name, one in zip(IMAGE_TOKENS, ids, strict=True)}
    num_rows, has_rows = max(num_rows, max(ids) + 1), codec.num_codebooks == 1
    draws = "normal" if init == "codebook" else init
    grow(base_model, num_rows + codec.codebook_size * has_rows, num_text_tokens, draws, seed)
    if init == "codebook" and has_rows:
        _arrange_like_codebook(base_model, codec.codebooks[0], num_rows)
    config = LiquidConfig(
        text_config=base_model.config,
        vq_config=dict(codec.config),
        image_token_offset=num_rows * has_rows,
        image_size=image_size,
        attn_implementation=base_model.config._attn_implementation,
        **token_ids,
    )
    processor = build_processor(config, tokenizer)
    model = assemble(config, base_model, codec)
    if not has_rows:
        _begin_several_codes(model, num_text_tokens, seed)
    return model, processor


def special_token_ids(base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> list[int]:
    """Ids of tokens of these names: those that are there, then those that the base reserved, then new ones."""
    vocabulary = tokenizer.get_vocab()
    stops = tokenizer.convert_ids_to_tokens(eos_token_ids(base_model.generation_config))
    reserved = (token for token in free_tokens(tokenizer) if token not in stops)
    tokens = [token if token in vocabulary else next(reserved, token) for token in names]
    # One that is in the vocabulary, but that texts are split within, keeps its id and becomes whole.
    new_tokens = [token for token in tokens if not is_one_token(tokenizer, token)]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new_tokens], special_tokens=True
    )
    return tokenizer.convert_tokens_to_ids(tokens)


def grow(base_model: PreTrainedModel, num_rows: int, num_text_tokens: int, init: str = "mean", seed: int = 0) -> None:
    """Gives a base more rows, which begin as `init` says of its first `num_text_tokens`; the old ones stay as they are."""
    old = len(base_model.get_input_embeddings().weight)
    with torch.random.fork_rng():
        base_model.resize_token_embeddings(num_rows, mean_resizing=False)
    embeddings, head = base_model.get_input_embeddings(), base_model.get_output_embeddings()
    weights = [embeddings.weight.data]
    weights += [head.weight.data] if head.weight is not embeddings.weight else []
    weights += [head.bias.data[:, None]] if head.bias is not None else []
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        _set_new_rows(weight[:num_text_tokens], weight[old:], init, generator)


def _obstacle(
    base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codec: CodeMixin, init: str
) -> str | None:
    """Why these cannot become a Liquid model."""
    if (problem := base_obstacle(base_model, tokenizer)) is not None:
        return problem
    if not isinstance(codec, CodeMixin):
        return f"codec must be a LiquidVQModel or a UniTokModel, got {type(codec).__name__}: `load_codec` makes it one."
    if codec.num_codebooks > 1 and (problem := several_codes_obstacle(base_model.config)) is not None:
        return problem
    is_known = init in ("codebook", "normal", "mean")
    return None if is_known else f"init must be 'codebook', 'normal' or 'mean', got {init!r}."


def base_obstacle(base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why this base, whose weights are not looked at, cannot become a part of a Liquid model with this tokenizer."""
    name = type(base_model).__name__
    if isinstance(base_model, LiquidPreTrainedModel):
        return f"The base model is a {name}: it has image rows already. Train it as it is, or give the plain language model."
    is_model = isinstance(base_model, PreTrainedModel)
    if not is_model or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_model.config), None) is not type(base_model):
        return (
            f"base_model must be a causal language model as AutoModelForCausalLM loads it, got {name}. (Merge adapters "
            "first.)"
        )
    return growth_obstacle(base_model, tokenizer)


def growth_obstacle(base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why this base cannot have more rows for tokens of this tokenizer."""
    name = type(base_model).__name__
    if getattr(base_model.config, "quantization_config", None) is not None and not _is_unpacked_gguf(base_model):
        return "The base model is quantized: its rows cannot grow. Expand it in fp32 or bf16, then quantize."
    embeddings, head = base_model.get_input_embeddings(), base_model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or not isinstance(head, nn.Linear):
        return (
            f"{name} cannot be expanded: it needs an nn.Embedding before it and an nn.Linear as its head, got "
            f"{type(embeddings).__name__} and {type(head).__name__}."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return f"tokenizer must be the base's tokenizer, got {type(tokenizer).__name__}."
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id >= len(embeddings.weight):
        return (
            f"The tokenizer does not fit the base model: its token {token!r} has id {token_id}, but the model has "
            f"{len(embeddings.weight)} rows. Load both from one repository."
        )
    return None


def _is_unpacked_gguf(base_model: PreTrainedModel) -> bool:
    """Whether transformers has turned a GGUF file into ordinary weights (it marks the model as quantized even so)."""
    quantizer = getattr(base_model, "hf_quantizer", None)
    is_gguf = quantizer is not None and quantizer.quantization_config.quant_method == "gguf"
    return is_gguf and not quantizer.packed_modules


def _set_new_rows(text_rows: torch.Tensor, new_rows: torch.Tensor, init: str, generator: torch.Generator) -> None:
    # In pieces: the rows of a large base in fp32 may not fit beside it, and torch sums half precision by way of fp32.
    pieces = text_rows.split(8192)
    mean = sum(piece.sum(0, dtype=torch.float32) for piece in pieces) / len(text_rows)
    new_rows.copy_(mean)
    if init == "normal":
        centred = (piece.float() - mean for piece in pieces)
        covariance = sum(piece.T @ piece for piece in centred) / max(len(text_rows) - 1, 1)
        variances, directions = torch.linalg.eigh(covariance)
        draws = torch.randn(new_rows.shape, generator=generator).to(new_rows.device)
        new_rows.copy_(mean + (draws * variances.clamp(min=0).sqrt()) @ directions.T)


@torch.no_grad()
def _begin_several_codes(model: LiquidForCausalLM, num_text_tokens: int, seed: int) -> None:
    """Gives a model what embeds and what draws several codes a position. Embeddings have the mean and the spread of the
    first `num_text_tokens` rows of the base."""
    config, codec, base = model.config, model.model.vq_model, model.model.text_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        embedder, head = CodeEmbedder(config), CodeHead(config)
        codes = torch.randint(config.codebook_size, (16, config.num_codebooks, 16))
    embedder.codebooks.load_state_dict(codec.codebooks.state_dict())
    embedder.projection.load_state_dict(codec.post_quant_proj.state_dict())
    rows = model.get_input_embeddings().weight[:num_text_tokens].float()
    embedded, last = embedder(codes).flatten(0, 1), embedder.mlp[-1]
    last.weight.mul_((rows - rows.mean(0)).std().cpu() / (embedded - embedded.mean(0)).std())
    last.bias.add_(rows.mean(0).cpu() - embedder(codes).mean((0, 1)))
    model.model.code_embedder = embedder.to(base.device, base.dtype)
    model.code_head = head.to(base.device, base.dtype)
    model.train(base.training)


@torch.no_grad()
def _arrange_like_codebook(base_model: PreTrainedModel, codebook: torch.Tensor, offset: int) -> None:
    """Moves the rows of codes, which are drawn, so that like codes have like rows; mean and covariance stay about the same."""
    codebook = codebook.float()
    codebook = (codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-12)
    weights = (base_model.get_input_embeddings().weight, base_model.get_output_embeddings().weight)
    for weight in weights[: 1 if weights[0] is weights[1] else 2]:
        rows = weight[offset:].float()
        mean = rows.mean(0)
        # Random mixtures of as many rows as the codebook has dimensions: they lie as the rows of text tokens do.
        directions = (rows - mean)[: codebook.shape[1]]
        projected = codebook.to(rows.device)[:, : len(directions)] @ directions / len(directions) ** 0.5
        weight[offset:] = mean + (rows - mean + projected) * 0.5**0.5
