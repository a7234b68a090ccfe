"""Any language or vision-language model and any text-to-image pipeline that is known become one that writes and draws."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline

from ..conversion.expand import grow, growth_obstacle, special_token_ids
from ..models.voken.configuration_voken import VokenConfig
from ..models.voken.image_decoder import VokenImageDecoder
from ..models.voken.modeling_voken import VokenFeatureMapper, VokenForConditionalGeneration
from ..models.voken.processing_voken import VokenProcessor
from .interleaved_voken import InterleavedVokenPipeline


def add_vokens(
    base_model: transformers.PreTrainedModel,
    processor: transformers.ProcessorMixin | transformers.PreTrainedTokenizerBase,
    image_pipeline: DiffusionPipeline,
    num_vokens: int = 8,
    token_format: str = "[IMG{}]",
    **kwargs: Any,
) -> InterleavedVokenPipeline:
    """Gives a model vokens and a mapper from their states to what a diffusion model attends to; both untrained.

    For the vokens, in this order of preference: tokens of that name, tokens that the base reserved, new tokens in padded
    rows, new tokens in new rows. No row that exists is changed; new ones begin as the mean of the old (the reference's
    mean resizing), so that logits over the old vocabulary stay what they were.

    Args:
        base_model (`PreTrainedModel`): A causal language model, or a model of images and text that writes text. It
            becomes a part of the result: its embeddings grow in place and its weights are not copied.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The base's, or its tokenizer if it reads no pictures.
            Tokens are added in place.
        image_pipeline (`DiffusionPipeline`): What draws: see [`VokenImageDecoder`]. Its models are frozen in place; it
            needs its text encoders for training with captions alone.
        num_vokens (`int`, defaults to 8): Vokens of a picture.
        token_format (`str`, defaults to `"[IMG{}]"`): What new tokens are called.
        kwargs: Further arguments of [`VokenConfig`], such as `mapper_hidden_size` (by default the condition's, 1024 at
            most) and `condition_length` (by default the texts' length that the diffusion model knows: 77; PixArt and Sana
            300).

    Raises:
        ValueError: If the base has vokens already, writes no text, or cannot grow, or the pipeline is not one that vokens
            can condition. Nothing has been changed then.

    Example:

    ```python
    >>> base = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> processor = AutoProcessor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> image_pipeline = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers")
    >>> add_vokens(base, processor, image_pipeline).save_pretrained("my-vokens")
    ```
    """
    config = getattr(base_model, "config", None)
    mappings = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    expected = next((one[type(config)] for one in mappings if type(config) in one), None)
    if type(base_model) is not expected or isinstance(config, VokenConfig) or config.is_encoder_decoder:
        raise ValueError(
            "base_model must be a causal language model or a model of images and text, as AutoModelForCausalLM and "
            f"AutoModelForImageTextToText load it, and without vokens, got {type(base_model).__name__}. (Merge adapters "
            "first.)"
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    if (problem := growth_obstacle(base_model, tokenizer)) is not None:
        raise ValueError(problem)
    names = [token_format.format(index) for index in range(num_vokens)]
    if not names or len({*names}) < len(names):
        raise ValueError(f"num_vokens must be at least 1, and token_format make a name of each, got {names}.")
    decoder = VokenImageDecoder.from_components(**image_pipeline.components)
    settings = {
        "text_config": config,
        "voken_token_ids": [0],  # until all else is certain
        "state_size": base_model.get_output_embeddings().in_features,
        "condition_dim": decoder.condition_dim,
        "pooled_condition_dim": decoder.pooled_dim,
        "dtype": config.dtype,
        "attn_implementation": config._attn_implementation,
    }
    if unknown := sorted(kwargs.keys() - ({field.name for field in fields(VokenConfig)} - settings.keys())):
        raise ValueError(f"{', '.join(unknown)} cannot be chosen here: give arguments of VokenConfig.")
    name = image_pipeline.config.get("_name_or_path")
    defaults = {"condition_length": decoder.text_length, "image_decoder": str(name) if name else None}
    config = VokenConfig(**settings | defaults | kwargs)

    # From here on nothing fails.
    num_rows, num_text_tokens = len(base_model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    config.voken_token_ids = voken_token_ids = special_token_ids(base_model, tokenizer, names)
    grow(base_model, max(num_rows, max(voken_token_ids) + 1), num_text_tokens)
    with torch.device("meta"):
        model = VokenForConditionalGeneration(config)
    model.text_model, config.text_config = base_model, base_model.config  # nothing is copied, and one object each
    model.feature_mapper = VokenFeatureMapper(config).to(base_model.device)
    model.generation_config = base_model.generation_config
    model.train(base_model.training)
    return InterleavedVokenPipeline(model, VokenProcessor(processor, voken_token_ids), **decoder.components)
