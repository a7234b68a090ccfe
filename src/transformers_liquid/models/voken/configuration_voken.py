"""The configuration: a base model, its vokens, and what of a diffusion model they speak to."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ...utils.versions import CACHE_NAMES


# The reference's: eight tokens after the 32,000 of Vicuna, and one that it has for pictures that are read.
REFERENCE_VOKEN_TOKEN_IDS = [*range(32000, 32008)]
REFERENCE_TEXT_CONFIG = {"model_type": "llama", "vocab_size": 32009}


@strict
class VokenConfig(PreTrainedConfig):
    r"""Configuration of a [`VokenForConditionalGeneration`].

    The defaults are the sizes and weights of MiniGPT-5 (arXiv 2310.02239) with Vicuna-7B and Stable Diffusion 2.1.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the base: any causal language model, or
            any model of images and text that writes text. Defaults to llama.
        voken_token_ids (list of `int`, *optional*): Ids of the vokens, in the order of a run. Stored, never derived.
            Defaults to the reference's 32000 ... 32007.
        state_size (`int`, *optional*): Width of what the base's head reads, the columns of its weight. Defaults to the
            base's `hidden_size`, which is not the same everywhere (OPT).
        condition_length (`int`, defaults to 77): Vectors that the diffusion model attends to for a picture.
        condition_dim (`int`, defaults to 1024): Their width.
        pooled_condition_dim (`int`, *optional*): Width of the pooled vector, for diffusion models that take one.
        mapper_hidden_size (`int`, *optional*): Width of the feature mapper. Defaults to `condition_dim`, 1024 at most.
        mapper_num_layers (`int`, defaults to 4): Layers of its encoder, and of its decoder.
        mapper_num_heads (`int`, defaults to 8): Their attention heads.
        mapper_intermediate_size (`int`, *optional*): Width of their feed-forward layers. Defaults to four times
            `mapper_hidden_size`.
        text_loss_weight (`float`, defaults to 0.01): Of the next-token loss.
        image_loss_weight (`float`, defaults to 1.0): Of the diffusion model's loss. With 0 no pictures are needed to
            train.
        caption_loss_weight (`float`, defaults to 0.1): Of the distance to the diffusion model's own encoding of the
            captions, where a batch has captions.
        unconditional_probability (`float`, defaults to 0.1): How often, in training, a picture's states are replaced by
            zeros, so that there is something for guidance to lead away from.
        snr_gamma (`float`, *optional*, defaults to 5.0): Min-SNR weighting (arXiv 2303.09556) of the loss of noise, which
            the reference has and the paper does not mention; `None` is the plain mean.
        image_decoder (`str`, *optional*): Name or path of the diffusers repository that the conditions are for.
        image_decoder_revision (`str`, *optional*): Which of its revisions on the Hub. Defaults to the newest.

    Raises:
        ValueError: If ids are not distinct, outside of the vocabulary or the base's placeholder of pictures, or sizes are
            none.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from transformers_liquid import VokenConfig, VokenForConditionalGeneration
    >>> config = VokenConfig(text_config=LlamaConfig(vocab_size=32008), condition_dim=768)
    >>> model = VokenForConditionalGeneration(config)
    ```
    """

    model_type = "voken"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        *CACHE_NAMES,
        *("text_loss", "image_loss", "caption_loss", "condition", "pooled_condition"),
    ]

    text_config: dict | PreTrainedConfig | None = None
    voken_token_ids: list[int] | None = None
    state_size: int | None = None
    condition_length: int = 77
    condition_dim: int = 1024
    pooled_condition_dim: int | None = None
    mapper_hidden_size: int | None = None
    mapper_num_layers: int = 4
    mapper_num_heads: int = 8
    mapper_intermediate_size: int | None = None
    text_loss_weight: float = 0.01
    image_loss_weight: float = 1.0
    caption_loss_weight: float = 0.1
    unconditional_probability: float = 0.1
    snr_gamma: float | None = 5.0
    image_decoder: str | None = None
    image_decoder_revision: str | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**self.text_config or REFERENCE_TEXT_CONFIG)
        if self.tie_word_embeddings is None:  # the head and the embeddings are the base's
            self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        if self.voken_token_ids is None:
            self.voken_token_ids = list(REFERENCE_VOKEN_TOKEN_IDS)
        if self.state_size is None:
            self.state_size = self.get_text_config().hidden_size
        if self.mapper_hidden_size is None:
            self.mapper_hidden_size = min(self.condition_dim, 1024)
        if self.mapper_intermediate_size is None:
            self.mapper_intermediate_size = 4 * self.mapper_hidden_size
        sizes = ["state_size", "condition_length", "condition_dim", "pooled_condition_dim", "mapper_num_layers"]
        sizes += ["mapper_hidden_size", "mapper_num_heads", "mapper_intermediate_size"]
        lowest = dict.fromkeys(sizes, 1) | {f"{kind}_loss_weight": 0 for kind in ("text", "image", "caption")}
        for name, low in lowest.items():
            if (value := getattr(self, name)) is not None and not value >= low:
                raise ValueError(f"{name} must be at least {low}, got {value}.")
        if not 0 <= self.unconditional_probability <= 1 or (self.snr_gamma is not None and self.snr_gamma <= 0):
            given = self.unconditional_probability, self.snr_gamma
            raise ValueError(f"unconditional_probability must be from 0 to 1, snr_gamma above 0 or None, got {given}.")
        if self.mapper_hidden_size % self.mapper_num_heads:
            raise ValueError(f"mapper_num_heads must divide mapper_hidden_size, which is {self.mapper_hidden_size}.")
        ids, size = self.voken_token_ids, self.get_text_config().vocab_size
        if not ids or len({*ids}) < len(ids) or not all(0 <= one < size for one in ids):
            raise ValueError(f"voken_token_ids must be different ids of the base's vocabulary of {size}, got {ids}.")
        if (placeholder := getattr(self.text_config, "image_token_id", None)) in ids:
            raise ValueError(f"Id {placeholder} stands for pictures that the base reads: it is no voken, got {ids}.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration of the language model, which a base with pictures has within its own."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)
