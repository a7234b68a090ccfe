"""The configuration: a base language model, a codec, and where the codec's codes lie in the vocabulary."""

from __future__ import annotations

import dataclasses
import json

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ...codecs.vq_model import CHAMELEON_VQ_CONFIG, downsample_factor
from ...utils.versions import CACHE_NAMES
from .remote_code import not_copied, write_remote_code
from .vocabulary import ImageLayout


# Which class of this package each of transformers' Auto classes loads.
AUTO_CLASSES = {"AutoConfig": "LiquidConfig", "AutoModel": "LiquidModel", "AutoProcessor": "LiquidProcessor"}
AUTO_CLASSES |= dict.fromkeys(
    ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"), "LiquidForCausalLM"
)


@strict
class LiquidConfig(PreTrainedConfig):
    r"""Configuration of a [`LiquidForCausalLM`].

    The defaults of the layout are those of the reference checkpoint on Gemma-7B (arXiv 2412.04332):
    256,000 text ids, then 8,192 image ids.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of any causal language model, its
            `vocab_size` counting text and image rows. Defaults to llama.
        vq_config (`dict`, *optional*): Arguments of [`LiquidVQModel`], or of [`UniTokModel`], which has several codes a
            position. Defaults to Chameleon's VQGAN.
        image_token_offset (`int`, *optional*): Id of code 0; code `c` has id `image_token_offset + c`. Stored,
            never derived from the size of the tokenizer or of the embeddings. Defaults to the last
            `num_vq_embeddings` rows of the vocabulary. Several codes a position have no rows: then it is 0.
        boi_token_id (`int`, defaults to 7): Begins an image.
        eoi_token_id (`int`, defaults to 8): Ends an image.
        uncond_token_id (`int`, defaults to 9): Stands for "no text" in classifier-free guidance; with several codes a
            position also a list of ids, of a text that stands for it.
        image_token_id (`int`, defaults to 10): Placeholder for one code of an input image; never a code itself.
        image_size (`int`, *optional*): Default height and width in pixels. Defaults to the codec's `sample_size`.
        max_z_loss_coef (`float`, defaults to 0.0): Weight of the mean squared greatest logit in the training loss, which
            keeps logits from growing. Baichuan 2 (arXiv 2309.10305), where it comes from, uses 2e-4. With several codes
            a position it is about the logits of codes alone, as in UniTok, which uses 5e-5.
        image_generation_config (`dict`, *optional*): Settings of pictures for a model that is made of its configuration
            alone; a repository's `generation_config.json` outranks them. Saving a model writes both.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from transformers_liquid import LiquidConfig, LiquidForCausalLM
    >>> config = LiquidConfig(text_config=LlamaConfig(vocab_size=32000 + 8192), image_token_offset=32000)
    >>> model = LiquidForCausalLM(config)
    ```
    """

    model_type = "liquid"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [*CACHE_NAMES]

    text_config: dict | PreTrainedConfig | None = None
    vq_config: dict | None = None
    image_token_offset: int | None = None
    boi_token_id: int = 7
    eoi_token_id: int = 8
    uncond_token_id: int | list[int] = 9
    image_token_id: int = 10
    image_size: int | None = None
    max_z_loss_coef: float = 0.0
    image_generation_config: dict | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool = True

    register_for_auto_class = not_copied

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, (dict, PreTrainedConfig, type(None))):
            raise ValueError(f"text_config must be a configuration or its dictionary, got {self.text_config!r}.")
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama"} | (self.text_config or {}))
        super().__post_init__(**kwargs)
        # As JSON has it, and without what diffusers notes in a codec's own configuration.
        vq_config = CHAMELEON_VQ_CONFIG if self.vq_config is None else self.vq_config
        vq_config = {key: value for key, value in vq_config.items() if not key.startswith("_")}
        self.vq_config = json.loads(json.dumps(vq_config))
        if self.image_token_offset is None:
            self.image_token_offset = 0 if self.num_codebooks > 1 else self.text_config.vocab_size - self.codebook_size
        if self.image_size is None:
            self.image_size = self.vq_config.get("sample_size", 512)
        # The head and the embeddings are the base's: what it says about tying holds.
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(self.text_config, name, None))

        vocab_size = self.text_config.vocab_size
        if self.num_codebooks > 1:
            self._check_several_codes()
        elif self.image_token_offset < 0 or self.image_token_offset + self.codebook_size > vocab_size:
            raise ValueError(
                f"The codebook needs ids {self.image_token_offset} ... "
                f"{self.image_token_offset + self.codebook_size - 1}, but the language model has a vocabulary of "
                f"{vocab_size}. Give the base the image rows first: see `transformers_liquid.expand_vocabulary`."
            )
        special = {
            name: getattr(self, name) for name in ("boi_token_id", "eoi_token_id", "uncond_token_id", "image_token_id")
        }
        if self.num_codebooks > 1 and isinstance(self.uncond_token_id, list):
            del special["uncond_token_id"]
        if len({*map(str, special.values())}) < len(special):
            raise ValueError(f"{', '.join(special)} must be four different ids, got {special}.")
        for name, token_id in special.items():
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size or token_id in self.image_token_range:
                raise ValueError(
                    f"{name}={token_id} must be a text id: in 0 ... {vocab_size - 1} and outside of the "
                    f"{self.image_layout.place}."
                )
        self.grid()

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers, and writes a module with which `trust_remote_code=True` loads the repository."""
        self.auto_map = write_remote_code(save_directory, **AUTO_CLASSES)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_several_codes(self) -> None:
        """Raises a `ValueError` if several codes a position do not fit what else is configured."""
        if self.image_token_offset != 0:
            raise ValueError(
                f"Several codes a position have no rows in the vocabulary: image_token_offset must be 0, got "
                f"{self.image_token_offset}."
            )
        if (problem := several_codes_obstacle(self.text_config)) is not None:
            raise ValueError(problem)

    @property
    def codebook_size(self) -> int:
        """Number of codes of a codebook; with one code a position, of image ids."""
        return self.vq_config["num_vq_embeddings"]

    @property
    def num_codebooks(self) -> int:
        """Codes of a position."""
        return self.vq_config.get("num_codebooks", 1)

    @property
    def downsample_factor(self) -> int:
        """Pixels per code along one side."""
        return downsample_factor(self.vq_config)

    @property
    def image_layout(self) -> ImageLayout:
        """Where the codes lie, and all arithmetic between pixels, codes and ids."""
        return ImageLayout(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ImageLayout)})

    @property
    def image_token_range(self) -> range:
        """All image ids."""
        return self.image_layout.image_token_range

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width in codes of a picture: see [`ImageLayout.grid`]."""
        return self.image_layout.grid(height, width)


def several_codes_obstacle(text_config: PreTrainedConfig) -> str | None:
    """Why a base of this configuration cannot draw several codes a position."""
    scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if given := [name for name in scaled if getattr(text_config, name, None) not in (None, 1)]:
        return (
            f"Several codes a position are drawn from the hidden states of the base, which {given[0]} of "
            f"{text_config.model_type!r} would change: use another base, such as llama or qwen3."
        )
    return None
