"""Liquid (arXiv 2412.04332): any causal language model whose vocabulary also holds the codes of an image codec.

The base model is nested whole, head included, so that whatever it does to its logits (soft-capping, scaling, biases)
stays its own. Images exist only as token ids: nothing here but the codec knows about pixels.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from ...codecs.unitok import codec_class
from ...codecs.vq_model import CodeMixin
from ...generation.guidance import SuppressImageTokensLogitsProcessor
from ...generation.image_generation import generate_image_tokens
from ...generation.interleaved import generate_interleaved
from ...generation.sampling import draw_codes
from ...generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG
from ...ops.chunked_loss import (
    LiquidCausalLMOutputWithPast,
    chunked_causal_lm_loss,
    image_targets,
    max_z_loss,
    next_labels,
)
from ...ops.few_rows import few_rows_view, is_transposed_faster
from ...ops.merged_adapters import merged_view
from ...ops.views import StandIn, is_plain_linear, shallow_copy
from ...utils.streaming import telling_reader
from ...utils.versions import CACHE_NAME, CACHE_NAMES
from .adapters import adjust_peft, load_whole_adapter
from .configuration_liquid import LiquidConfig
from .model_card import write_model_card
from .placeholders import PlacesPictures
from .reference import ReferenceCheckpoint, load_whole
from .remote_code import not_copied
from .several_codes import CodeEmbedder, CodeHead, code_targets, loss_of_several_codes
from .unitok_reference import UniTokReference
from .vocabulary import FROM_TEXT_ALONE, check_generation_mode


class LiquidPreTrainedModel(PreTrainedModel):
    config_class = LiquidConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = [*CACHE_NAMES]
    # None of its own, the base has them; PEFT looks for a base's tied weights only where there is a mapping.
    _tied_weights_keys = {}
    _keep_in_fp32_modules_strict = ["vq_model"]
    # Quantizers leave out what is named here, an expression for whole names: of the head class and of the base class.
    _keep_in_fp32_modules = [r"(?:model\.)?vq_model"]
    register_for_auto_class = not_copied

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, vq_checkpoint=None, **kwargs):
        """Loads a Liquid repository, or a reference one such as `Junfeng5/Liquid_V1_7B`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A repository saved by this package, or a plain
                causal language model whose vocabulary already holds the image codes (the reference layout); its
                codec is then fetched from where the reference keeps it.
            vq_checkpoint (`str` or `os.PathLike`, *optional*): Where the codec of a reference repository lies
                instead: a folder with `vqgan.ckpt` and `vqgan.yaml`, or a codec saved by [`LiquidVQModel`].
            kwargs: As in transformers' `from_pretrained`.

        Raises:
            ValueError: If the checkpoint is neither of the two, holds no codec, or is not whole: with weights that are
                missing, unknown, of another shape (unless `ignore_mismatched_sizes`) or not tied as it says. (With
                `output_loading_info`, none at all are fine, as in transformers.)
        """
        # Code of a checkpoint runs where the caller says so, never by a prompt.
        kwargs.setdefault("trust_remote_code", False)
        reference = ReferenceCheckpoint.find(pretrained_model_name_or_path, vq_checkpoint=vq_checkpoint, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        if isinstance(reference, UniTokReference):
            load = functools.partial(super(LiquidPreTrainedModel, LiquidForCausalLM).from_pretrained, None)
            kwargs |= {"config": reference.config, "state_dict": reference.state_dict()}
            model, info = load_whole(load, str(reference.name_or_path), **kwargs)
            model.base_model.vq_model.requires_grad_(False)
        elif reference is not None:
            kwargs.pop("image_token_offset", None)
            config, codec = reference.config, reference.codec
            # The class itself: AutoModelForCausalLM asks the network for an adapter even if told `local_files_only`.
            load = functools.partial(_base_class(config).from_pretrained, reference.name_or_path)
            base, info = load_whole(load, f"The language model {reference.name_or_path}", **kwargs)
            model = assemble(config, base, codec)
        if reference is not None:
            model = model.model if issubclass(cls, LiquidModel) else model
            return (model, info) if wants_info else model
        if vq_checkpoint is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a Liquid repository and holds its own codec: `vq_checkpoint` is "
                "for reference checkpoints."
            )
        load = functools.partial(super().from_pretrained, pretrained_model_name_or_path, *model_args)
        if pretrained_model_name_or_path is None and not kwargs.get("state_dict"):
            # There is nothing to be whole: transformers' way to ask for new weights.
            model, info = load(output_loading_info=True, **kwargs)
        else:
            name = str(pretrained_model_name_or_path)
            model, info = load_whole(load, name, output_loading_info=wants_info, **kwargs)
        base, trained = _base_class(model.config).__name__, model.config.text_config.architectures
        if trained and base not in trained:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds the weights of {', '.join(trained)}, but its text_config.model_type "
                f"{model.config.text_config.model_type!r} is that of {base}: correct its config.json."
            )
        model.base_model.vq_model.requires_grad_(False)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers, and writes a model card (`README.md`) unless there is one; so does `push_to_hub`."""
        # Some bases' weights have the same names: the configuration says whose they are.
        self.config.text_config.architectures = [_base_class(self.config).__name__]
        if self.can_generate():
            self.config.image_generation_config = self.generation_config.image_generation_config
        super().save_pretrained(save_directory, *args, **kwargs)
        write_model_card(self, save_directory)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config":  # the first thing that PEFT does to a model
            adjust_peft()
        super().__setattr__(name, value)

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As in transformers, but an adapter is loaded whole or not at all.

        Raises:
            ValueError: If weights of the adapter are missing, or are not the model's, which then stays as it was.
        """
        return load_whole_adapter(super().load_adapter, self, peft_model_id, *args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        write_model_card(self, working_dir, repo_id.rpartition("/")[2])
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, but refuses to delete image rows.

        Raises:
            ValueError: If fewer rows would remain than the image ids need, as in
                `resize_token_embeddings(len(tokenizer))`.
        """
        needed = self.config.image_token_range.stop
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"Resizing to {new_num_tokens} rows would delete image rows: image ids end at {needed - 1}, so at "
                f"least {needed} rows must remain. The tokenizer does not count image ids: do not resize to its length."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class LiquidModel(PlacesPictures, LiquidPreTrainedModel):
    """The whole base language model (`text_model`) beside the codec (`vq_model`)."""

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.text_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        # One object: what resizing writes to the one must be read from the other.
        config.text_config = self.text_model.config
        codec = codec_class(config.vq_config)(**config.vq_config)
        # Whatever the default dtype is; ZeRO-3 has taken the weights apart by now.
        self.vq_model = (codec if is_deepspeed_zero3_enabled() else codec.float()).requires_grad_(False)
        # With one code a position, codes are rows of the vocabulary.
        self.code_embedder = CodeEmbedder(config) if config.num_codebooks > 1 else None
        self._cache_argument = next(
            name for name in CACHE_NAMES if name in inspect.signature(self.text_model.forward).parameters
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> LiquidModel:
        super().train(mode)
        self.vq_model.eval()
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LiquidModel:
        """`.half()`, `.to(torch.bfloat16)`, ... are for the language model: a rounded codec gives other codes."""

        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        codec, self._modules["vq_model"] = self.vq_model, None
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules["vq_model"] = codec
        codec._apply(without_rounding, recurse)
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        image_codes: torch.LongTensor | list[torch.LongTensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the base model's body; arguments as in [`LiquidForCausalLM.forward`]."""
        cache = past_key_values if cache is None else cache
        inputs = self._text_inputs(input_ids, pixel_values, inputs_embeds, cache, image_codes)
        outputs = self.text_model.base_model(**inputs, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **{CACHE_NAME: outputs.get(self._cache_argument)},
        )


class LiquidForCausalLM(LiquidPreTrainedModel, GenerationMixin):
    """A causal language model that reads and draws.

    Example:

    ```python
    >>> from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidProcessor
    >>> model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT)
    >>> processor = LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)
    >>> inputs = processor(text=["red apple"], generation_mode="image", return_tensors="pt")
    >>> ids = model.generate(**inputs, generation_mode="image")
    >>> images = processor.post_process_multimodal_output(model.decode_image_tokens(ids), generation_mode="image")
    ```
    """

    output_modalities = ("image", "text")

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.model = LiquidModel(config)
        self.code_head = CodeHead(config) if config.num_codebooks > 1 else None
        # What a state space model cannot do (assisted generation) or compile, its wrapper cannot either.
        self._is_stateful = self.model.text_model._is_stateful
        self._can_compile_fullgraph = self.model.text_model._can_compile_fullgraph
        self.post_init()

    @property
    def generation_config(self) -> GenerationConfig | None:
        """Settings of text, and in `image_generation_config` those of pictures, which outlive a config without any."""
        return self.__dict__.get("_generation_config")

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | None) -> None:
        if config is not None and getattr(config, "image_generation_config", None) is None:
            config = copy.copy(config)
            config.image_generation_config = dict(
                self.config.image_generation_config or DEFAULT_IMAGE_GENERATION_CONFIG
                if self.generation_config is None
                else self.generation_config.image_generation_config
            )
            # transformers drops custom entries from a generation config that says it was derived from a model config.
            config._from_model_config = False
        self.__dict__["_generation_config"] = config

    def get_output_embeddings(self) -> nn.Module:
        return self.model.text_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.text_model.set_output_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        image_codes: torch.LongTensor | list[torch.LongTensor] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits over text and image ids together, or the loss alone.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Text ids, image ids and, where pictures are given in
                `pixel_values`, one placeholder (`config.image_token_id`) per code.
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)` or a list of N tensors `(3, H, W)`, *optional*):
                Pictures in [-1, 1] in reading order over the batch.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 where a token is attended to.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Positions. Where they restart in a batch of
                one row without an attention mask, another document begins, which attends to itself alone.
            past_key_values, cache (`Cache`, *optional*): The base model's cache, under its name before and after
                transformers 5.24.
            inputs_embeds (`torch.Tensor` of shape `(B, L, hidden)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return the cache. With labels, the default is `False`.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): Text and image ids to predict, -100 elsewhere. With
                several codes a position, `config.image_token_id` where the codes of a picture are to be predicted.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): As in transformers; 0 keeps all positions.
            skip_logits (`bool`, *optional*): With labels: whether to compute the loss in chunks, without ever holding
                all logits. Defaults to whether the model is training. With several codes a position always.
            image_codes (`torch.LongTensor` of shape `(N, K, n)` or a list of N tensors `(K, n)`, *optional*): With K
                codes a position, in place of `pixel_values`: of pictures in reading order.
            kwargs: Handed to the base model and its loss (`num_items_in_batch`, `shift_labels`, ...).

        Returns:
            The base model's own output: `loss`, `logits` of shape `(B, L, vocabulary)`, `past_key_values`, ...; with
            `skip_logits` a [`LiquidCausalLMOutputWithPast`] with the loss, its statistics and no logits.

        Raises:
            ValueError: If placeholders and pictures do not match, or there is nothing to learn.
        """
        cache = past_key_values if cache is None else cache
        if self.code_head is not None and pixel_values is not None and input_ids is not None:
            image_codes, pixel_values = self.model.encode_images(pixel_values), None
        inputs = self.model._text_inputs(input_ids, pixel_values, inputs_embeds, cache, image_codes)
        inputs.update(attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        labels = kwargs.get("shift_labels") if labels is None else labels  # a base wants both
        has_labels = labels is not None
        # The Trainer turns the cache off in the whole's configuration, which the base does not read.
        if use_cache is None and (has_labels or not self.config.use_cache):
            use_cache = False
        skip_logits = has_labels and (self.training if skip_logits is None else skip_logits)
        # A base's router loss is part of its own loss, and ZeRO-3 gathers a head's weight for its own forward only.
        routes = getattr(self.config.get_text_config(), "output_router_logits", False)
        text_model = self.model.text_model
        if self.code_head is not None and has_labels:
            if routes or is_deepspeed_zero3_enabled():
                raise ValueError("Several codes a position are not trained with a router's loss or with ZeRO-3.")
        elif not skip_logits or routes or is_deepspeed_zero3_enabled():
            outputs = text_model(labels=labels, logits_to_keep=logits_to_keep, use_cache=use_cache, **inputs)
            if has_labels and self.config.max_z_loss_coef:
                z_loss = max_z_loss(outputs.logits, labels, **kwargs)
                outputs.loss = outputs.loss + self.config.max_z_loss_coef * z_loss
            return outputs

        targets, num_items = inputs.pop("shift_labels", None), inputs.pop("num_items_in_batch", None)
        outputs = text_model.base_model(use_cache=use_cache, **inputs)
        targets = (next_labels(labels) if targets is None else targets).to(outputs.last_hidden_state.device)
        is_image = image_targets(self.config, targets)
        if self.code_head is None:
            loss, token_stats = chunked_causal_lm_loss(
                text_model, outputs, targets, is_image, self.config.max_z_loss_coef, num_items
            )
        else:
            codes = code_targets(self.config, input_ids, image_codes, targets)
            loss, token_stats = loss_of_several_codes(self, outputs, targets, is_image, codes, num_items)
        return LiquidCausalLMOutputWithPast(
            loss=loss,
            token_stats=token_stats,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **{CACHE_NAME: outputs.get(self.model._cache_argument)},
        )

    def code_inputs(self, inputs: dict[str, Any], codes: torch.LongTensor) -> dict[str, Any]:
        """The arguments of a forward whose ids end with those of the codes that were drawn, `(B, n)` or `(B, K, n)`.

        With several codes a position they become embeddings; a projection of a picture's earlier positions is part of
        these, for which the codes are its cache: it is small beside the language model.
        """
        if self.code_head is None:
            return inputs
        ids = inputs["input_ids"]
        number = min(ids.shape[1], codes.shape[-1])
        drawn = self.model.code_embedder(codes, number).repeat(len(ids) // len(codes), 1, 1)
        before = self.get_input_embeddings()(ids[:, : ids.shape[1] - number])
        return inputs | {"input_ids": None, "inputs_embeds": torch.cat([before, drawn.to(before)], dim=1)}

    def draw_codes(self, logits: torch.Tensor, *drawing: Any) -> tuple[torch.LongTensor, torch.Tensor]:
        """Codes `(B, W)`, or with K codes a position `(B, K, W)`, of what a view for images returns as logits: see
        [`generation.sampling.draw_codes`]."""
        return draw_codes(logits, *drawing) if self.code_head is None else self.code_head.draw(logits, *drawing)

    def prepare_inputs_for_generation(self, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:
        # Named, since generate() looks here whether a model takes embeddings.
        return self.model.text_model.prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        # transformers tells by the name of the class which models call their cache `cache_params`.
        if "past_key_values" in model_kwargs:
            model_kwargs[self.model._cache_argument] = model_kwargs.pop("past_key_values")

    def encode_images(self, pixel_values: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
        """Turns pictures into image token ids: see [`LiquidModel.encode_images`]."""
        return self.model.encode_images(pixel_values)

    @torch.no_grad()
    def decode_image_tokens(
        self,
        image_tokens: torch.LongTensor,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Turns image token ids into pictures.

        Args:
            image_tokens (`torch.LongTensor` of shape `(B, n)` or `(n,)`): Image ids, row by
                row, as returned by `generate(generation_mode="image")`; with K codes a position, codes `(B, K, n)` or
                `(K, n)`.
            height (`int`, *optional*): Of the picture in pixels; defaults to `config.image_size`.
            width (`int`, *optional*): Of the picture in pixels; defaults to `config.image_size`.
            dtype (`torch.dtype`, *optional*): Half precision for the codec: see [`LiquidVQModel.decode_codes`].

        Returns:
            `torch.Tensor` of shape `(B, 3, height, width)` in [-1, 1].

        Raises:
            ValueError: If an id is no image id, if there are not as many as the picture has codes, or `dtype` is no half
                precision.
        """
        grid_height, grid_width = self.config.grid(height, width)
        is_one = image_tokens.ndim == 1 + len(self.config.image_layout.of_position)
        image_tokens = image_tokens[None] if is_one else image_tokens
        if image_tokens.shape[-1] != grid_height * grid_width:
            raise ValueError(
                f"A picture of {grid_height} x {grid_width} codes needs {grid_height * grid_width} image ids, got "
                f"{image_tokens.shape[-1]}. Pass the height and width that the ids were generated with; of a picture that "
                "was stopped before its end, see `partial_pictures`."
            )
        return self.decode_codes(
            self.config.image_layout.ids_to_codes(image_tokens).unflatten(-1, (grid_height, grid_width)), dtype=dtype
        )

    @torch.no_grad()
    def decode_codes(self, codes: torch.LongTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Turns codes `(B, [K,] grid_height, grid_width)` into pictures `(B, 3, H, W)` in [-1, 1]."""
        return self.model.vq_model.decode_codes(codes, dtype=dtype).clamp(-1, 1)

    @telling_reader
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        generation_mode: str = "text",
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        suppress_image_tokens: bool = True,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """Writes text or draws pictures with transformers' own `generate()`.

        Args:
            inputs (`torch.LongTensor` of shape `(B, L)`, *optional*): The prompts; or as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): Defaults to the model's; in image mode to its
                `image_generation_config`.
            logits_processor (`LogitsProcessorList`, *optional*): Yours. In image mode they see all ids so far, and after
                guidance scores of shape `(B, codebook_size)`: the id of column c is `config.image_token_offset + c`.
                transformers' own, and yours with an attribute `sees_vocabulary = True`, look for ids among the scores:
                they see `(B, vocabulary)`, -inf but for the codes.
            generation_mode (`"text"`, `"image"` or `"interleaved"`, defaults to `"text"`): What to generate.
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)` or a list of N tensors, *optional*): Pictures for
                the placeholders in the prompts.
            suppress_image_tokens (`bool`, defaults to `True`): Text mode: never emit an image id or one of the four
                image specials.
            kwargs: As in transformers' `generate`: `input_ids`, `attention_mask`, `stopping_criteria`, `streamer`,
                `negative_prompt_ids`, `negative_prompt_attention_mask`, `guidance_scale`, `temperature`, `top_k`, ...
                Image mode knows more:

                - `height`, `width` (`int`): In pixels, multiples of the codec's factor.
                - `generator` (`torch.Generator` or a list of B * num_return_sequences of them): Where the draws come
                  from. With one for each picture, a picture does not depend on its batch.
                - `guidance_min_p` (`float`): Guidance chooses only among codes that the prompt alone gives at least this
                  fraction of the best code's probability. Off in the reference.
                - `speculative` (`bool` or `int`): Draws several codes per forward; the pictures are the same
                  ([`generation.speculative`]). `True`, or the number of codes in a forward.

                - `guidance_context` (`"none"` or `"images"`), `image_guidance_scale` (`float`): With pictures in the
                  prompt, as for editing: see [`generation.settings.ImageGenerationConfig`], where all settings of a
                  picture are.

                Interleaved mode writes and draws by turns. Sampling settings given here are those of the text; the
                settings above, and `image_generation_config` (`dict`) with any other, are those of the pictures. Beside
                them:

                - `max_new_tokens` (`int`, defaults to 512): Of text; pictures do not count.
                - `max_images` (`int`, defaults to 4, or what fits): After so many, the text goes on alone.
                - `generator`: Of one seed for each sequence. Picture j of a sequence depends on its context, this seed
                  and j, not on the batch. Text is sampled as transformers does.
                - `streamer`: With a method `put_event`, called with each [`generation.interleaved.InterleavedEvent`].
                - `stopping_criteria`: Asked at every step, of pictures too.
                - `guidance_context="images"`, `image_guidance_scale`: Of a picture with none before it, the side with the
                  pictures alone is the unconditional one, so that they may be given before there are any.
                - `past_key_values`: A running cache of one sequence.

        Returns:
            Text mode: as in transformers (prompts and continuations). Image mode: `torch.LongTensor` of shape
            `(B * num_return_sequences, number of codes)`, the image ids alone (with K codes a position the codes, `(B *
            num_return_sequences, K, positions)`), for [`~LiquidForCausalLM.decode_image_tokens`]; or an output with these as `sequences` if
            `return_dict_in_generate`. Interleaved mode: a [`generation.interleaved.InterleavedOutput`].

        Raises:
            ValueError: On settings that cannot be met, before any work.
        """
        check_generation_mode(generation_mode)
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "Gradient checkpointing keeps no cache: call `model.eval()` before `generate`, `model.train()` after it."
            )
        input_ids = kwargs.pop("input_ids", inputs)
        if generation_mode == "interleaved" or (generation_mode == "image" and pixel_values is not None):
            self.config.image_layout.check_one_code(FROM_TEXT_ALONE)
        if pixel_values is not None and input_ids is None and kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"] = self.model.fill_image_embeds(kwargs["inputs_embeds"], pixel_values)
        elif pixel_values is not None and self.code_head is not None:
            kwargs["inputs_embeds"] = self.model.embed_pictures(input_ids, self.model.encode_images(pixel_values))
        elif pixel_values is not None:
            input_ids = self.model.fill_image_placeholders(input_ids, pixel_values)
            negative = kwargs.get("negative_prompt_ids")
            if negative is not None and (negative == self.config.image_token_id).any():
                kwargs["negative_prompt_ids"] = self.model.fill_image_placeholders(negative, pixel_values)
        elif input_ids is not None and (input_ids == self.config.image_token_id).any():
            raise ValueError("The prompts hold image placeholders, but no pixel_values were given.")

        settings = {"generation_config": generation_config, "logits_processor": logits_processor}
        if generation_mode != "text":
            if not suppress_image_tokens:
                raise ValueError("A picture is made of image tokens: leave out suppress_image_tokens.")
            if kwargs.get("caption_first"):
                raise ValueError("generate() draws from the ids that it gets: caption_first is for the pipeline.")
            draw = generate_image_tokens if generation_mode == "image" else generate_interleaved
            return draw(self, input_ids, **settings, **kwargs)
        scale = kwargs.get("guidance_scale", (generation_config or self.generation_config).guidance_scale)
        if kwargs.get("negative_prompt_ids") is not None and scale in (None, 1):
            raise ValueError(
                'negative_prompt_ids act through guidance: pass generation_mode="image" or guidance_scale.'
            )
        if suppress_image_tokens:
            suppress = SuppressImageTokensLogitsProcessor(self.config)
            settings["logits_processor"] = LogitsProcessorList([*(logits_processor or []), suppress])
        return super().generate(input_ids, **settings, **kwargs)

    def image_head_view(self) -> LiquidForCausalLM:
        """This model with only the image rows in its head: logits have `codebook_size` columns, column c is code c. With
        several codes a position, for which [`~LiquidForCausalLM.draw_codes`] has a head, they are the hidden states.

        Weights are shared, but for those that adapters change ([`merged_view`]), and this model is left as it is. The base's own head path still runs, so soft-capping,
        scaling and biases hold. Its generation config is empty: what the base has there is about text.
        """
        view, view.model = shallow_copy(self), shallow_copy(self.model)
        view.model.text_model = shallow_copy(merged_view(self.model.text_model))
        head, rows = view.get_output_embeddings(), self.config.image_layout.image_slice
        if self.code_head is not None:
            sliced = StandIn(head, lambda hidden_states: hidden_states)
        elif is_plain_linear(head):
            sliced = nn.Linear(head.in_features, rows.stop - rows.start, bias=head.bias is not None, device="meta")
            for name, parameter in head.named_parameters():
                setattr(sliced, name, nn.Parameter(parameter[rows], requires_grad=False))
        else:  # with hooks, or adapters of quantized weights, it runs whole
            sliced = StandIn(head, lambda hidden_states: head(hidden_states)[..., rows])
        view.set_output_embeddings(sliced)
        if self.device.type == "cpu" and is_transposed_faster():
            view.model.text_model = few_rows_view(view.model.text_model)
        view.generation_config = GenerationConfig()
        return view


def _base_class(config: LiquidConfig) -> type[PreTrainedModel]:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]


def assemble(config: LiquidConfig, base_model: PreTrainedModel, codec: CodeMixin) -> LiquidForCausalLM:
    """Puts a base model and a codec into a [`LiquidForCausalLM`] without copying their weights."""
    config.dtype = base_model.config.dtype
    config._attn_implementation = base_model.config._attn_implementation
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    model.model.text_model = base_model
    model.model.vq_model = codec.to(base_model.device).float().requires_grad_(False)
    # One object: what resizing writes to the one must be read from the other.
    config.text_config = base_model.config
    # The base's settings for text, and for images where it stores any.
    model.generation_config = base_model.generation_config
    # What transformers and accelerate noted on the base about devices and quantization holds for the whole.
    if (device_map := getattr(base_model, "hf_device_map", None)) is not None:
        model.hf_device_map = {
            ".".join(filter(None, ("model.text_model", module))): device for module, device in device_map.items()
        }
        model.hf_device_map["model.vq_model"] = next(iter(device_map.values()))
    if (quantizer := getattr(base_model, "hf_quantizer", None)) is not None:
        model.hf_quantizer = quantizer
        model.config.quantization_config = base_model.config.quantization_config
    return model.train(base_model.training)
