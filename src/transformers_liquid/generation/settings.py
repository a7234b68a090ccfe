"""All settings of a picture: which there are, what they are by default, and what they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig


if TYPE_CHECKING:
    from ..models.liquid.configuration_liquid import LiquidConfig


# The reference's settings, for models whose generation_config.json has no `image_generation_config`.
DEFAULT_IMAGE_GENERATION_CONFIG: dict[str, Any] = {
    "guidance_scale": 7.0,
    "do_sample": True,
    "temperature": 0.99,
    "top_k": 4096,
    "top_p": 0.96,
}

# Codes per forward of `speculative=True`: with which the embedded checkpoint is fastest on a CPU.
DEFAULT_WINDOW = 12

OUR_SETTINGS = (
    *("guidance_scale", "guidance_min_p", "guidance_context", "image_guidance_scale"),
    *("caption_first", "speculative", "height", "width"),
)

# What narrows the choice; `None` leaves it out.
FILTERS = (
    *("guidance_min_p", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "top_h"),
)

# What of transformers' generation settings has a meaning for a fixed number of codes.
_TRANSFORMERS_SETTINGS = (
    *("do_sample", *FILTERS[1:]),
    *("renormalize_logits", "remove_invalid_values", "max_time", "num_return_sequences"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("compile_config", "disable_compile"),
)
_SETTINGS = {*OUR_SETTINGS, *_TRANSFORMERS_SETTINGS}

# Everything that is a setting of some `generate()`, and no argument of a model.
_KNOWN = _SETTINGS | GenerationConfig._get_default_generation_params().keys() | GenerationConfig().to_dict().keys()
_KNOWN |= {
    "image_generation_config",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
}

# What a caller's `GenerationConfig` may say about text: where it begins and ends, and who wrote it.
_OF_TEXT = {
    *("max_length", "max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}


def _plain(value: Any) -> Any:
    """A number of numpy or of torch as one of Python; everything else as it is."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    return value.item()


@dataclass
class ImageGenerationConfig:
    """All settings of a picture, checked.

    Args:
        height (`int`, *optional*): In pixels; defaults to `config.image_size`.
        width (`int`, *optional*): Likewise.
        guidance_scale (`float`, *optional*): 1 (or `None`) follows the prompt alone, more follows it more strongly.
        guidance_min_p (`float`, *optional*): Choose only among codes that the prompt alone gives at least this fraction
            of its best code's probability.
        guidance_context (`"none"` or `"images"`, defaults to `"none"`): What the unconditional side of guidance sees of
            the context: nothing, or its pictures without its text.
        image_guidance_scale (`float`, *optional*): Guidance with three sides: how strongly the pictures of the context
            are followed, beside `guidance_scale`, which then is about the text: see [`GuidanceLogitsProcessor`].
            Interleaved mode takes both also where there are no pictures yet: until one is drawn, that side is the
            unconditional one.
        caption_first (`bool`, *optional*): With pictures in the context, the pipeline has the model say what will be seen, and
            draw that with these words behind the prompt. `generate()` draws from the ids it gets.
        speculative (`bool` or `int`, *optional*): Draw several codes per forward: `True`, or how many.
        of_transformers (`dict`): Those that transformers' own `GenerationConfig` has, such as `temperature`.

    Raises:
        ValueError: If a value is none of those.
    """

    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    guidance_min_p: float | None = None
    guidance_context: str | None = None
    image_guidance_scale: float | None = None
    caption_first: bool | None = None
    speculative: bool | int | None = None
    of_transformers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "guidance_min_p", "image_guidance_scale"):
            setattr(self, name, _plain(getattr(self, name)))
        self.guidance_scale = 1.0 if self.guidance_scale is None else self.guidance_scale
        if not (isinstance(self.guidance_scale, Real) and 1 <= self.guidance_scale < math.inf):
            raise ValueError(
                f"guidance_scale must be a finite number >= 1 (1 is no guidance), got {self.guidance_scale}."
            )
        if self.guidance_context not in (None, "none", "images"):
            raise ValueError(f"guidance_context must be 'none' or 'images', got {self.guidance_context!r}.")
        scale = self.image_guidance_scale
        if scale is not None and not (isinstance(scale, Real) and 0 <= scale < math.inf):
            raise ValueError(f"image_guidance_scale must be a finite number of at least 0, got {scale!r}.")
        if scale is not None and self.guidance_context == "images":
            raise ValueError("image_guidance_scale has a side with the pictures already: leave out guidance_context.")
        if not isinstance(self.caption_first, bool | None):
            raise ValueError(f"caption_first must be True or False, got {self.caption_first!r}.")
        # transformers leaves its filter out above 1.
        for name, value in (("guidance_min_p", self.guidance_min_p), ("top_p", self.of_transformers.get("top_p"))):
            if value is not None and not (isinstance(value, Real) and 0 < value <= 1):
                raise ValueError(f"{name} must be in (0, 1], got {value}.")
        copies = _plain(self.of_transformers.get("num_return_sequences", 1))
        if not isinstance(copies, int) or copies < 1:
            raise ValueError(f"num_return_sequences must be a whole number of at least 1, got {copies!r}.")
        if "num_return_sequences" in self.of_transformers:
            self.of_transformers = self.of_transformers | {"num_return_sequences": copies}
        self.speculative = _plain(self.speculative)

    @classmethod
    def from_call(
        cls, stored: GenerationConfig | None, config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[ImageGenerationConfig, dict[str, Any]]:
        """The settings of a call: the defaults, then what the model stores, then what the caller says.

        Args:
            stored (`GenerationConfig`, *optional*): The model's; its `image_generation_config` counts.
            config (`GenerationConfig`, *optional*): The caller's; or the result of an earlier call, which stands.
            kwargs (`dict`): The caller's, and arguments of other kinds.

        Returns:
            The settings, and the arguments of other kinds.

        Raises:
            ValueError: If one has no meaning for pictures.
        """
        if isinstance(config, cls):
            return config, kwargs
        text, stored = stored, getattr(stored, "image_generation_config", None) or {}
        if not isinstance(stored, dict):
            raise ValueError(f"The model's image_generation_config must be a dictionary of settings, got {stored!r}.")
        settings = DEFAULT_IMAGE_GENERATION_CONFIG | stored
        if config is not None:
            given = getattr(config, "image_generation_config", None)
            if not given:
                given = config.to_diff_dict()
            elif given == stored:
                # A copy of the model's, as pipelines pass it: what differs was set for this call.
                before = text.to_dict()
                # Pipelines of transformers fill in its defaults, which nobody asked for.
                before |= GenerationConfig._get_default_generation_params() | {
                    name: before.get(name) for name in _SETTINGS
                }
                given = {name: value for name, value in config.to_dict().items() if value != before.get(name)}
            # With image settings of its own it is about text elsewhere.
            settings |= {name: value for name, value in given.items() if name not in _OF_TEXT and value is not None}
        given = {name: value for name, value in kwargs.items() if name in _KNOWN}  # by the call itself
        if (own := given.pop("image_generation_config", None)) is not None:
            if not isinstance(own, dict):
                raise ValueError(f"image_generation_config must be a dictionary of settings, got {own!r}.")
            if unknown := sorted(map(str, own.keys() - _SETTINGS)):
                raise ValueError(
                    f"image_generation_config holds {', '.join(unknown)}, which has no meaning for images. Settings for "
                    f"images: {', '.join((*_TRANSFORMERS_SETTINGS, *OUR_SETTINGS))}."
                )
            given = own | given
        settings |= given
        # A limit for text: the stock any-to-any pipeline passes it whatever it generates.
        settings.pop("max_new_tokens", None)
        for name, value in settings.items():
            if name not in _SETTINGS and value is not None:
                raise ValueError(
                    f"{name}={str(value)[:80]} has no meaning for images: a picture is a whole grid of codes, drawn "
                    f"greedily or by sampling. Settings for images: {', '.join((*_TRANSFORMERS_SETTINGS, *OUR_SETTINGS))}."
                )
        settings["do_sample"] = _plain(settings["do_sample"])
        if not isinstance(settings["do_sample"], bool | None):
            raise ValueError(f"do_sample must be True or False, got {settings['do_sample']!r}.")
        settings["do_sample"] = bool(settings["do_sample"])
        if not settings["do_sample"]:
            # As transformers does not: sampling settings of the repository say nothing against a greedy call.
            settings |= dict.fromkeys(("temperature", "top_k", "top_p"))
        ours = {name: settings.get(name) for name in OUR_SETTINGS}
        of_transformers = {name: settings[name] for name in _TRANSFORMERS_SETTINGS if settings.get(name) is not None}
        other = {name: value for name, value in kwargs.items() if name not in _KNOWN}
        made = cls(**ours, of_transformers=of_transformers)
        if made.guidance_scale == 1 and made.image_guidance_scale is None:
            for name in ("guidance_min_p", "guidance_context"):
                if given.get(name) not in (None, "none"):
                    raise ValueError(
                        f"{name} acts through guidance, but guidance_scale is 1: raise it, or leave it out."
                    )
        return made, other

    def to_dict(self) -> dict[str, Any]:
        """All settings that are set, in one dictionary."""
        ours = {name: getattr(self, name) for name in OUR_SETTINGS if getattr(self, name) is not None}
        return ours | self.of_transformers

    def num_codes(self, config: LiquidConfig) -> int:
        """Of a picture of this size."""
        return config.image_layout.num_codes(self.height, self.width)

    def window(self, num_codes: int) -> int | None:
        """Codes per forward of speculative decoding, or `None` for the plain loop.

        Raises:
            ValueError: If it is below 2 or above the picture, or another setting rules it out.
        """
        if self.speculative is None or self.speculative is False or (self.speculative is True and num_codes == 1):
            return None
        window = min(DEFAULT_WINDOW, num_codes) if self.speculative is True else self.speculative
        if not isinstance(window, int) or not 2 <= window <= num_codes:
            raise ValueError(
                f"speculative must be True, or a window of 2 ... {num_codes} codes (the picture), got {window!r}."
            )
        against = ["needs the cache"] if self.of_transformers.get("use_cache") is False else []
        # A step has these for its drafts too.
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            against += [f"does not record {name}"] if self.of_transformers.get(name) else []
        if against:
            raise ValueError(f"Speculative decoding {against[0]}: leave out one of the two.")
        return window


def eos_token_ids(settings: GenerationConfig) -> list[int]:
    """What ends a text: none, one or several."""
    eos = settings.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])
