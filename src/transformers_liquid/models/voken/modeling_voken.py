"""MiniGPT-5 (arXiv 2310.02239): a language model that writes vokens where a picture belongs, and a mapper from the states
that put them out to what a diffusion model attends to.

The base is nested whole, whatever it is: any causal language model, or any that reads pictures. The diffusion model is
attached beside it, frozen, and not a part of the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from ...generation.settings import eos_token_ids
from ...utils.hub import part_of
from ...utils.versions import CACHE_NAMES
from ..liquid.reference import load_whole
from .configuration_voken import VokenConfig
from .generation_voken import VokenRunLogitsProcessor
from .image_decoder import VokenCondition, VokenImageDecoder


def auto_class_of(config: PreTrainedConfig) -> type:
    """The door of transformers to a base: that of models of images and text, if it is one, or of language models."""
    reads_pictures = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if reads_pictures else transformers.AutoModelForCausalLM


@dataclasses.dataclass
class VokenOutput(CausalLMOutputWithPast):
    """As in transformers, and what the loss is made of.

    Args:
        text_loss (`torch.FloatTensor`, *optional*): The base's own next-token loss.
        image_loss (`torch.FloatTensor`, *optional*): The diffusion model's loss, the mean over pictures.
        caption_loss (`torch.FloatTensor`, *optional*): Mean squared distance to the diffusion model's own encoding of the
            captions.
        condition (`torch.FloatTensor` of shape `(N, condition_length, condition_dim)`, *optional*): Of the N pictures.
        pooled_condition (`torch.FloatTensor` of shape `(N, pooled_condition_dim)`, *optional*): Likewise.
    """

    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    condition: torch.FloatTensor | None = None
    pooled_condition: torch.FloatTensor | None = None


class VokenFeatureMapper(nn.Module):
    """From the states that put out a run of vokens to a condition: theta_MLP, theta_enc-dec and q of equation 2.

    At the reference's sizes it is the reference's, weight for weight. Neither the states nor the queries get positions, so
    that states are a set to it: what tells vokens apart is their content alone.

    Args:
        config ([`VokenConfig`]): Its sizes.
    """

    def __init__(self, config: VokenConfig) -> None:
        super().__init__()
        width, layers = config.mapper_hidden_size, config.mapper_num_layers
        self.mlp = nn.Sequential(nn.Linear(config.state_size, width), nn.GELU(), nn.Linear(width, width))
        layer = {"d_model": width, "nhead": config.mapper_num_heads, "dim_feedforward": config.mapper_intermediate_size}
        layer |= {"dropout": 0.0, "norm_first": True, "batch_first": True}
        # Given, since the one that nn.Transformer builds warns that it does without nested tensors.
        norm = nn.LayerNorm(width)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), layers, norm, enable_nested_tensor=False)
        self.encoder_decoder = nn.Transformer(**layer, num_decoder_layers=layers, custom_encoder=encoder)
        # A pooled vector is one more query's.
        has_pooled = config.pooled_condition_dim is not None
        self.query = nn.Parameter(torch.randn(1, config.condition_length + has_pooled, width))
        is_wide = width == config.condition_dim
        self.projection = nn.Identity() if is_wide else nn.Linear(width, config.condition_dim)
        self.pooled_projection = nn.Linear(width, config.pooled_condition_dim) if has_pooled else None

    def forward(self, states: torch.Tensor) -> VokenCondition:
        """The condition of each picture.

        Args:
            states (`torch.Tensor` of shape `(N, number of vokens, state_size)`): Zeros for the unconditional condition.
        """
        states = self.mlp(states.to(self.query.dtype))
        mapped = self.encoder_decoder(states, self.query.expand(len(states), -1, -1))
        if self.pooled_projection is None:
            return VokenCondition(embeds=self.projection(mapped))
        return VokenCondition(embeds=self.projection(mapped[:, :-1]), pooled=self.pooled_projection(mapped[:, -1]))


class VokenForConditionalGeneration(PreTrainedModel, GenerationMixin):
    r"""A language model that says where pictures belong, with vokens, and what they show, with the states of the vokens.

    A run of all vokens in their order stands for one picture. The states that put out its vokens become the condition
    of a diffusion model.

    Args:
        config ([`VokenConfig`]): Of base and mapper. The image decoder is no part of it: see `attach`.

    Example:

    ```python
    >>> from transformers_liquid import VokenForConditionalGeneration, VokenImageDecoder
    >>> model = VokenForConditionalGeneration.from_pretrained("my-vokens")
    >>> model.attach(VokenImageDecoder.from_pretrained("stabilityai/stable-diffusion-2-1-base"))
    >>> loss = model(**batch, labels=labels, target_pixel_values=pictures, captions=captions).loss
    ```
    """

    config_class = VokenConfig
    base_model_prefix = ""
    output_modalities = ("image", "text")
    # Losses are means over the batch: the Trainer has to divide by the number of accumulated ones.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [*CACHE_NAMES]
    _no_split_modules = ["VokenFeatureMapper"]
    # None of its own, the base has them; PEFT looks for a base's tied weights only where there is a mapping.
    _tied_weights_keys = {}
    # Quantizers leave out what is named here: attention reads the weights of its projections without calling them.
    _keep_in_fp32_modules = ["feature_mapper"]
    _keep_in_fp32_modules_strict = ["feature_mapper"]

    def __init__(self, config: VokenConfig) -> None:
        super().__init__(config)
        self.text_model = auto_class_of(config.text_config).from_config(config.text_config, trust_remote_code=False)
        # One object: what resizing writes to the one must be read from the other.
        config.text_config = self.text_model.config
        if (size := self.get_output_embeddings().in_features) != config.state_size:
            raise ValueError(f"The base's head reads states of {size}, but state_size={config.state_size}.")
        self.feature_mapper = VokenFeatureMapper(config)
        self.__dict__.update(_image_decoder=None, _where={})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own for every layer of the mapper, as in the reference: transformers' would make matrices a quarter."""
        if isinstance(module, VokenFeatureMapper):
            init.normal_(module.query)
            module.encoder_decoder._reset_parameters()  # after its layers: of all matrices
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a saved model, or that of a pipeline's whole repository, whose diffusion model then draws.

        Raises:
            ValueError: If weights are missing, unknown or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        found = part_of(pretrained_model_name_or_path, "model", kwargs)
        load = functools.partial(super().from_pretrained, pretrained_model_name_or_path, *model_args)
        name = str(pretrained_model_name_or_path)
        model, info = load_whole(load, name, output_loading_info=wants_info, **found)
        model.__dict__["_where"] = {key: kwargs.get(key) for key in ("cache_dir", "local_files_only", "token")}
        if found is not kwargs:
            model.config.update({"image_decoder": name, "image_decoder_revision": kwargs.get("revision")})
            model._where["variant"] = kwargs.get("variant")
        return (model, info) if wants_info else model

    @property
    def input_modalities(self) -> tuple[str, ...]:
        return self.text_model.input_modalities

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.text_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_output_embeddings(value)

    def attach(self, decoder: VokenImageDecoder) -> VokenForConditionalGeneration:
        """Gives the model its image decoder, which is no part of its modules: nothing of it is saved, trained or sharded.

        Raises:
            ValueError: If the decoder attends to something else than the mapper gives.
        """
        ours = self.config.condition_dim, self.config.pooled_condition_dim
        if ours != (decoder.condition_dim, decoder.pooled_dim):
            raise ValueError(
                f"The image decoder is told what to draw by vectors of {decoder.condition_dim} (pooled: "
                f"{decoder.pooled_dim}), but this model was made for {ours[0]} (pooled: {ours[1]})."
            )
        self.__dict__["_image_decoder"] = decoder
        return self

    @property
    def image_decoder(self) -> VokenImageDecoder:
        """What draws: the one that was attached, else `config.image_decoder`, which is loaded when it is needed.

        Raises:
            ValueError: If there is neither.
        """
        if self._image_decoder is None:
            if self.config.image_decoder is None:
                raise ValueError(
                    "This model has no image decoder: `model.attach(VokenImageDecoder(pipe))`, or name its diffusers "
                    "repository in `config.image_decoder`."
                )
            where = {"revision": self.config.image_decoder_revision, **self._where}
            decoder = VokenImageDecoder.from_pretrained(self.config.image_decoder, **where)
            decoder.pipe.to(self.device, None if self.dtype == torch.float32 else self.dtype)
            self.attach(decoder)
        return self._image_decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_pixel_values: torch.Tensor | None = None,
        target_latents: torch.Tensor | None = None,
        captions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> VokenOutput:
        """Next-token logits; with labels, the loss of texts and pictures.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): Text, the base's own placeholders of pictures that it reads,
                and runs of vokens for pictures to draw.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where a token is attended to.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Ids to predict, -100 elsewhere. Every label that is
                the first voken stands for a picture to draw.
            pixel_values (`torch.Tensor`, *optional*): Pictures that the base reads, as its processor makes them.
            target_pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`, *optional*): The N pictures to draw, in [-1, 1],
                in reading order over the batch.
            target_latents (`torch.Tensor` of shape `(N, C, h, w)`, *optional*): Instead: their latents
                ([`VokenImageDecoder.encode`]).
            captions (sequence of N `str`, *optional*): What they show, for the caption loss; without them there is none.
            kwargs: Of the base, such as `image_grid_thw`.

        Returns:
            [`VokenOutput`]: `loss = text_loss_weight * text_loss + image_loss_weight * image_loss + caption_loss_weight *
            caption_loss`, of what there is.

        Raises:
            ValueError: If pictures, captions and runs to draw differ in number, or a run is not whole.
        """
        inputs = {"attention_mask": attention_mask, "pixel_values": pixel_values, **kwargs}
        targets = target_pixel_values if target_latents is None else target_latents
        if labels is None and targets is None and captions is None:
            return self._read(input_ids, **inputs)[0]
        if labels is None or input_ids is None or input_ids.shape != labels.shape:
            raise ValueError("Labels need input_ids of their shape, and pictures to learn need labels: they say where.")
        rows, before = self._find_runs(input_ids, labels == self.config.voken_token_ids[0], attention_mask)
        if not (labels[:, 1:] != -100).any() or not (target_pixel_values is None or target_latents is None):
            raise ValueError("Give labels other than -100, and target_pixel_values or target_latents, not both.")
        needed = {"target pictures": targets} if self.config.image_loss_weight else {}
        for name, one in (needed | ({} if captions is None else {"captions": captions})).items():
            if (number := 0 if one is None else len(one)) != len(rows):
                each = rows.bincount(minlength=len(labels)).tolist()
                raise ValueError(
                    f"The labels hold {len(rows)} runs of vokens to draw (by sequence: {each}), but there are {number} "
                    f"{name}. They come in reading order over the batch, one for each run."
                )
        if isinstance(captions, str) or not all(isinstance(one, str) for one in captions or ()):
            raise ValueError(f"captions must be a text for each picture to draw, got {list(captions)!r}.")
        out, states = self._read(input_ids, labels=labels, **{"use_cache": False, **inputs})
        if not len(rows):
            condition = self.unconditional()
        else:
            is_dropped = torch.zeros_like(rows, dtype=torch.bool)
            if self.training:
                is_dropped = torch.rand(len(rows), device=rows.device) < self.config.unconditional_probability
            run_states = states[rows[:, None], before].masked_fill(is_dropped[:, None, None], 0.0)
            condition = self.feature_mapper(run_states)
        out.text_loss = out.loss
        # Every weight takes part in every step: processes of which one has no pictures wait for each other.
        out.loss = self.config.text_loss_weight * out.text_loss + 0.0 * sum(one.sum() for one in condition.values())
        if not len(rows):
            return out
        out.condition, out.pooled_condition = condition.embeds, condition.pooled
        if self.config.image_loss_weight:
            latents = self.image_decoder.encode(target_pixel_values) if target_latents is None else target_latents
            loss = self.image_decoder.loss(latents.to(states.device), condition, self.config.snr_gamma)
            out.image_loss = loss.mean()
            out.loss = out.loss + self.config.image_loss_weight * out.image_loss
        if captions is not None and self.config.caption_loss_weight:
            texts = ["" if dropped else text for text, dropped in zip(captions, is_dropped.tolist(), strict=True)]
            target = self.image_decoder.caption_condition(texts, self.config.condition_length)
            pairs = [(condition[name].float(), target[name].to(condition[name].device).float()) for name in condition]
            out.caption_loss = sum(nn.functional.mse_loss(*pair) for pair in pairs)
            out.loss = out.loss + self.config.caption_loss_weight * out.caption_loss
        return out

    def conditions(
        self, input_ids: torch.LongTensor, first_new: int = 0, **inputs: Any
    ) -> tuple[VokenCondition, torch.LongTensor]:
        """The conditions of all pictures of finished sequences, by one forward.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): Sequences with runs of vokens, as `generate` returns them.
            first_new (`int`, defaults to 0): Runs before this position are context: nothing is drawn from them.
            inputs: As for `generate`: `attention_mask`, `pixel_values`, ...; what is of the prompts' length holds for the
                prompts, and text comes after them.

        Returns:
            The [`VokenCondition`] of N runs in reading order, and the sequence of each, `(N,)`.

        Raises:
            ValueError: If a run is not whole.
        """
        is_first = input_ids == self.config.voken_token_ids[0]
        is_first[:, :first_new] = False
        # What holds for each token after the prompts
        new = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
        of_tokens = {name: inputs[name] for name in new if inputs.get(name) is not None}
        for name, one in of_tokens.items():
            of_tokens[name] = nn.functional.pad(one, (0, input_ids.shape[1] - one.shape[1]), value=new[name])
        mask = of_tokens.get("attention_mask")
        rows, before = self._find_runs(input_ids, is_first, mask)
        if mask is not None:
            # Padding goes to the right, where it moves no position and no state, whatever the base.
            order = mask.argsort(dim=1, descending=True, stable=True)
            of_tokens = {name: one.gather(1, order) for name, one in of_tokens.items()}
            input_ids, before = input_ids.gather(1, order), mask.cumsum(1)[rows[:, None], before] - 1
        _, states = self._read(input_ids, keep_logits=False, **inputs | of_tokens)
        return self.feature_mapper(states[rows[:, None], before]), rows

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        generation_mode: str = "text",
        num_images: int | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.Tensor:
        """Writes text with runs of vokens, by the base's own `generate()`, or draws what a prompt leads to.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): The prompts; or as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): Of the text; defaults to the model's.
            logits_processor (`LogitsProcessorList`, *optional*): Yours; that of runs comes after them.
            generation_mode (`"text"` or `"image"`, defaults to `"text"`): What to generate.
            num_images (`int`, *optional*): Text mode: at least so many runs in `max_new_tokens`.
            kwargs: As in transformers, and pictures to read as the base's processor makes them. Image mode: settings of
                the diffusion model's pipeline, such as `guidance_scale`, `num_inference_steps`, `height`, `width` and
                `generator`; those of text have no effect there, since every token of a run is known.

        Returns:
            Text mode: as in transformers, prompts and continuations with whole runs, but for one that the last token cut
            off. Image mode: pictures `(B, 3, height, width)` in [0, 1], the one that comes right after each prompt.

        Raises:
            ValueError: If `num_images` runs have no room in `max_new_tokens`, or an argument is unknown.
        """
        input_ids, vokens = kwargs.pop("input_ids", inputs), self.config.voken_token_ids
        if input_ids is None or generation_mode not in ("text", "image"):
            raise ValueError(f"Give input_ids, and as generation_mode 'text' or 'image', got {generation_mode!r}.")
        reader = self._reader(kwargs.get("pixel_values"))
        reader.generation_config = self.generation_config
        config, others = reader._prepare_generation_config(generation_config, **kwargs)
        if generation_mode == "image":
            kwargs = others
            decoder = self.image_decoder
            drawing = {name: kwargs.pop(name) for name in decoder.settings - {"output_type"} & kwargs.keys()}
            reader._validate_model_kwargs(kwargs | {"num_images": num_images})
            run = torch.tensor(vokens, device=input_ids.device).expand(len(input_ids), -1)
            condition, _ = self.conditions(torch.cat([input_ids, run], 1), input_ids.shape[1], **kwargs)
            return decoder.draw(condition, self.unconditional(), output_type="pt", **drawing)
        room, number = config.max_new_tokens or 0, operator.index(num_images or 0)
        if num_images is not None and not 0 < (needed := number * len(vokens)) <= room:
            raise ValueError(f"num_images={number} must be at least 1; it takes {needed} of max_new_tokens={room}.")
        runs = VokenRunLogitsProcessor(vokens, number, eos_token_ids(config), input_ids.shape[1], room)
        kwargs["logits_processor"] = LogitsProcessorList([*(logits_processor or []), runs])
        return reader.generate(input_ids=input_ids, generation_config=generation_config, **kwargs)

    def unconditional(self) -> VokenCondition:
        """The condition of a picture of which nothing is known: what the mapper makes of zeros, `(1, L, D)`."""
        query = self.feature_mapper.query
        return self.feature_mapper(query.new_zeros(1, len(self.config.voken_token_ids), self.config.state_size))

    def _read(
        self, input_ids: torch.LongTensor | None, keep_logits: bool = True, **inputs: Any
    ) -> tuple[VokenOutput, torch.Tensor]:
        """What there is of the base's own output, and the states that its head read, `(B, T, state_size)`.

        At the head's door, since not every base has a body that can be called without it.
        """
        reader, states = self._reader(inputs.get("pixel_values")), []

        def at_the_door(_: nn.Module, read: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            states.append(read[0])
            return None if keep_logits else (read[0][:, :1],)

        hook = reader.get_output_embeddings().register_forward_pre_hook(at_the_door)
        try:
            outputs = reader(input_ids=input_ids, **{name: one for name, one in inputs.items() if one is not None})
        finally:
            hook.remove()
        names = {field.name for field in dataclasses.fields(VokenOutput)}
        return VokenOutput(**{name: one for name, one in outputs.items() if name in names}), states[0]

    def _reader(self, pixel_values: torch.Tensor | None) -> PreTrainedModel:
        """The base; or its language model alone where the base demands pictures (BLIP-2) and there are none."""
        argument = inspect.signature(self.text_model.forward).parameters.get("pixel_values")
        demands = argument is not None and argument.default is inspect.Parameter.empty
        return self.text_model.language_model if demands and pixel_values is None else self.text_model

    def _find_runs(self, ids: torch.Tensor, is_first: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """The sequence `(N,)` of every run that begins where `is_first`, and the positions `(N, n)` of its states: those
        before the vokens.

        Raises:
            ValueError: If a run is not whole, or nothing is before it that could have put it out.
        """
        rows, columns = is_first.nonzero(as_tuple=True)
        vokens = torch.tensor(self.config.voken_token_ids, device=ids.device)
        run = columns[:, None] + torch.arange(len(vokens), device=ids.device)
        # A run that the sequence cuts off repeats its last id here, and vokens are different.
        is_good = (ids[rows[:, None], run.clamp(max=ids.shape[1] - 1)] == vokens).all(1) & (columns > 0)
        if mask is not None:
            is_good &= mask[rows, columns - 1].bool()
        if not is_good.all():
            index = int((~is_good).nonzero()[0])
            raise ValueError(
                f"The first voken at position {int(columns[index])} of sequence {int(rows[index])} begins no run: that is "
                f"{vokens.tolist()}, after at least one other token, whose state puts the first one out."
            )
        return [rows, run - 1]
