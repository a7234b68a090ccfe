"""What a checkpoint of the reference layout says: its configuration, its tokenizer, its codec. Builds no model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from ...checkpoints import EMOJI_CHECKPOINT
from ...codecs.loading import (
    DIFFUSERS_CODEC_FOLDER,
    REFERENCE_CODEC_FOLDER,
    REFERENCE_CODEC_REPO,
    fetch_reference_codec,
    find_codec,
    load_codec,
)
from ...codecs.taming import TAMING_CHECKPOINT_NAME, TAMING_CONFIG_NAME
from ...codecs.vq_model import LiquidVQModel, check_loading_info
from ...utils.files import read_json
from ...utils.hub import hub_arguments, naming
from .configuration_liquid import LiquidConfig
from .vocabulary import IMAGE_MARK, REFERENCE_TOKENS, free_tokens


# The key that our exports add to the plain `config.json`: what that layout cannot say otherwise.
EXPORTED_LAYOUT_KEY = "liquid_layout"
EXPORTED_LAYOUT = ("image_token_offset", "image_token_id", "image_size")
DIFFUSERS_CHECKPOINT_NAME = "diffusion_pytorch_model.safetensors"
# Where a repository of the reference layout may hold a codec of its own: folder, configuration, weights.
CODEC_PLACES = (
    (REFERENCE_CODEC_FOLDER, TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME),
    ("", TAMING_CONFIG_NAME, TAMING_CHECKPOINT_NAME),
    (DIFFUSERS_CODEC_FOLDER, CONFIG_NAME, DIFFUSERS_CHECKPOINT_NAME),
)


class ReferenceCheckpoint:
    """A checkpoint of the reference layout, such as `Junfeng5/Liquid_V1_7B`; each part of it is read once.

    A plain causal language model with `<boi>`, `<eoi>`, `<unconditional>` in its tokenizer and rows for codes after its
    text ids. Its weights are never read here, those of its codec on demand.

    Args:
        name_or_path (`str` or `os.PathLike`): The language model: a name on the Hub or a local copy.
        vq_checkpoint (`str` or `os.PathLike`, *optional*): The codec: what [`load_codec`] takes. Defaults to the one in
            the repository, and else to `chameleon/` of the reference's Space.
        image_token_offset (`int`, *optional*): Id of code 0, for checkpoints from which it cannot be told.
        config (`PreTrainedConfig` or `str`, *optional*): The language model's, or where it lies.
        kwargs: As in `from_pretrained`; those that say where files come from are used.

    Attributes:
        text_config (`PreTrainedConfig`): The language model's.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.

    Raises:
        ValueError: If it is no such checkpoint.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        vq_checkpoint: str | os.PathLike | None = None,
        image_token_offset: int | None = None,
        config: PreTrainedConfig | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.name_or_path, self.vq_checkpoint, self.image_token_offset = name_or_path, vq_checkpoint, image_token_offset
        self.hub = hub_arguments(kwargs)
        # A codec of another repository has a revision and a folder of its own.
        self.codec_hub = {name: self.hub[name] for name in self.hub if name not in ("revision", "subfolder")}
        # Neither runs code of the checkpoint, nor asks whether it may, unless the caller says so.
        trust = {"trust_remote_code": bool(kwargs.get("trust_remote_code"))}
        problem, cause = None, None
        try:
            if not isinstance(config, PreTrainedConfig):
                config = AutoConfig.from_pretrained(name_or_path if config is None else config, **self.hub, **trust)
            kind = f"it is of model type {config.model_type!r}"
            if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                problem = f"{kind}, which is no causal language model"
        except ValueError as error:
            problem, cause = f"its config.json is of no model that transformers knows. {error}", error
        if problem is None:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path, **self.hub, **trust)
            vocabulary = self.tokenizer.get_vocab()
            num_tokens = max(vocabulary.values()) + 1
            num_rows = getattr(config.get_text_config(), "vocab_size", 0)
            if missing := [token for token in REFERENCE_TOKENS.values() if token not in vocabulary]:
                problem = f"{kind} and its tokenizer has no {', '.join(missing)}"
            elif num_rows <= num_tokens:
                problem = (
                    f"{kind}, and its vocabulary of {num_rows} has no room for image codes after the tokenizer's "
                    f"{num_tokens} ids"
                )
        if problem is not None:
            raise ValueError(
                f"{name_or_path} is not a Liquid checkpoint: {problem}. Expected model type 'liquid', or a causal "
                f"language model in the reference layout ({', '.join(REFERENCE_TOKENS.values())} in its tokenizer, image "
                "codes after the text ids). Turn a language model into a Liquid model with "
                "`transformers_liquid.expand_vocabulary`."
            ) from cause
        self.text_config: PreTrainedConfig = config

    @classmethod
    def find(cls, name_or_path: str | os.PathLike | None, **kwargs: Any) -> ReferenceCheckpoint | None:
        """Tells the two layouts that [`LiquidForCausalLM.from_pretrained`] takes apart, without reading weights.

        Args:
            name_or_path (`str` or `os.PathLike`): A repository.
            kwargs: As in `from_pretrained`.

        Returns:
            The reference checkpoint; `None` for a repository of this package, and where only transformers can say what
            is missing.

        Raises:
            ValueError: If it is neither of the two.
        """
        config = kwargs.get("config")
        # One of several codes may be what AutoConfig made of a checkpoint of another type.
        if name_or_path is None or (isinstance(config, LiquidConfig) and config.num_codebooks == 1):
            return None
        hub = hub_arguments(kwargs)
        try:
            with naming(name_or_path):
                config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        except OSError:
            if not os.path.exists(name_or_path):
                raise
            return None
        model_type = config_dict.get("model_type")
        for kind in cls.__subclasses__():
            if kind.model_type == model_type:
                return kind(name_or_path, **kwargs)
        if model_type == LiquidConfig.model_type or isinstance(config, LiquidConfig):
            return None
        if "model_type" not in config_dict and find_adapter_config_file(name_or_path, **hub) is not None:
            return None  # transformers loads the base of an adapter
        return cls(name_or_path, **kwargs)

    @cached_property
    def config(self) -> LiquidConfig:
        """The configuration of the whole; no weights are fetched for it.

        The codes take the last rows of the vocabulary, behind the tokenizer's: there the reference's
        `liquid/expand_vocabulary.py` puts them. The placeholder, which the reference lacks, is a token that the base
        reserved.

        Raises:
            ValueError: If the parts do not fit, or do not say where the codes begin.
        """
        vocabulary = self.tokenizer.get_vocab()
        vq_config = find_codec(self._find_codec(weights=False), **self.codec_hub).config
        exported = getattr(self.text_config, EXPORTED_LAYOUT_KEY, {})
        layout = {name: exported[name] for name in EXPORTED_LAYOUT if name in exported}
        if self.image_token_offset is not None:
            layout["image_token_offset"] = self.image_token_offset
        if "image_token_offset" not in layout:
            layout["image_token_offset"] = self._offset(max(vocabulary.values()) + 1, vq_config["num_vq_embeddings"])
        if "image_token_id" not in layout:
            placeholder = IMAGE_MARK if IMAGE_MARK in vocabulary else next(free_tokens(self.tokenizer), None)
            if placeholder is None:
                raise ValueError(
                    f"The tokenizer has neither {IMAGE_MARK!r} nor a reserved token such as '<unused3>' to stand for the "
                    f"codes of an input image. Rename an unused token of it to {IMAGE_MARK!r}."
                )
            layout["image_token_id"] = vocabulary[placeholder]
        token_ids = {name: vocabulary[token] for name, token in REFERENCE_TOKENS.items()}
        return LiquidConfig(text_config=self.text_config, vq_config=vq_config, **layout, **token_ids)

    @cached_property
    def codec(self) -> LiquidVQModel:
        """The codec, in eval mode.

        Raises:
            ValueError: If none can be reached, or a key of it is unknown or missing.
        """
        return load_codec(self._find_codec(weights=True), **self.codec_hub)

    def _offset(self, num_tokens: int, num_codes: int) -> int:
        """The reference expands behind the base's rows, but trains and draws behind the tokenizer's tokens."""
        num_rows = self.text_config.get_text_config().vocab_size
        behind_rows = num_rows - num_codes
        if behind_rows < num_tokens:
            raise ValueError(
                f"{self.name_or_path}: the tokenizer has {num_tokens} ids and the codec {num_codes} codes, more than the "
                f"vocabulary of {num_rows} holds. Pass the codec that the model was trained with as `vq_checkpoint=`."
            )
        if behind_rows > num_tokens:
            raise ValueError(
                f"{self.name_or_path}: with {num_rows} rows, {num_tokens} tokens and {num_codes} codes, the codes may "
                f"begin at id {behind_rows} (the last rows) or {num_tokens} (where the reference's own scripts train and "
                "draw on a base with padded rows). Pass the one that the model was trained with as "
                "`image_token_offset=`."
            )
        return behind_rows

    def _find_codec(self, weights: bool) -> str:
        """A folder or `.ckpt` here, or a name on the Hub. The Space's files are fetched; the weights on demand."""
        if self.vq_checkpoint is not None:
            return str(self.vq_checkpoint)
        quiet = {
            f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
        }
        for folder, config_file, weights_file in CODEC_PLACES:
            local_weights = Path(self.name_or_path, self.hub.get("subfolder", ""), folder, weights_file)
            if local_weights.is_file():
                return str(local_weights.parent)
            found = [
                cached_file(self.name_or_path, str(Path(folder, file)), **self.hub, **quiet)
                for file in (config_file, weights_file)[: 1 + weights]
            ]
            if None not in found:
                return str(Path(found[0]).parent)
        try:
            return fetch_reference_codec(weights, **self.codec_hub)
        except OSError as error:
            raise ValueError(
                f"{self.name_or_path} holds no codec ({REFERENCE_CODEC_FOLDER}/{TAMING_CHECKPOINT_NAME}), and the "
                f"reference's Space {REFERENCE_CODEC_REPO} cannot be reached. Pass `vq_checkpoint=`, a folder with "
                f"{TAMING_CHECKPOINT_NAME} and {TAMING_CONFIG_NAME}. {error}"
            ) from error


def adapter_base(name_or_path: str | os.PathLike, **hub: Any) -> str | None:
    """The model that an adapter (PEFT) belongs to; `None` for what is no adapter.

    Raises:
        ValueError: If the adapter does not say.
    """
    with naming(name_or_path):
        file = find_adapter_config_file(name_or_path, **hub)
    if file is None:
        return None
    if not (base := read_json(file).get("base_model_name_or_path")):
        raise ValueError(
            f"The adapter {name_or_path} does not say of which model: add base_model_name_or_path to {file}."
        )
    # What comes with the package lies elsewhere on each machine.
    is_embedded = Path(base).parts[-3:] == Path(EMOJI_CHECKPOINT).parts[-3:]
    return EMOJI_CHECKPOINT if is_embedded else base


def load_whole(
    load: Callable[..., Any],
    name: str,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model and the loading info of transformers' `from_pretrained`, which draws what is missing at random.

    Args:
        load: Some class' `from_pretrained` with the checkpoint, to be called with `kwargs`.
        name (`str`): What an error calls it.
        ignore_mismatched_sizes (`bool`, defaults to `False`): As in transformers.
        output_loading_info (`bool`, defaults to `False`): Whether the caller gets the loading info too: then a checkpoint
            that has no weight of the model at all is loaded, as transformers does it.

    Raises:
        ValueError: If a weight is missing, unknown, of another shape, or not tied as the configuration says.
    """
    model, info = load(output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    if output_loading_info and info["missing_keys"] >= model.state_dict().keys() - model.all_tied_weights_keys.keys():
        return model, info
    codec = sorted(key for key in info["missing_keys"] if "vq_model." in key)
    if codec:
        raise ValueError(
            f"{name} has no codec weights ({len(codec)} are missing, the first is {codec[0]!r}). Save the model with its "
            "codec, or use `expand_vocabulary` to add one."
        )
    check_loading_info(name, info, ignore_mismatched_sizes)
    # transformers leaves apart what is stored apart, whatever the configuration says.
    if apart := sorted(model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys):
        raise ValueError(
            f"{name} holds {', '.join(apart)} of its own, but its configuration says `tie_word_embeddings`: correct the "
            "configuration."
        )
    return model, info
