"""The diffusion model that draws what vokens condition: its training loss and its drawing, for the families of diffusers.

The only file that knows these families. Everything about time, noise and guidance is diffusers' own: its pipelines draw
from embeddings alone, without their text encoders, and its schedulers say what a denoiser has to predict.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers  # its parts, as they are used: pipelines and schedulers take their time to import
import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import nn

from ...utils.hub import hub_arguments


# The denoisers that are known, and the pipelines that draw with them.
PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "UNet2DConditionModel (text_time)": "StableDiffusionXLPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
}
MASKED = ("PixArtTransformer2DModel", "SanaTransformer2DModel")  # they are told which vectors of a text are padding
TEXT_ENCODERS = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
# What is taken of a diffusers pipeline; its text encoders are needed for captions alone.
COMPONENTS = ["vae", "scheduler", "unet", "transformer", *TEXT_ENCODERS]


@dataclass
class VokenCondition(BaseOutput):
    """What a diffusion model is told in place of an encoded prompt.

    Args:
        embeds (`torch.Tensor` of shape `(N, condition_length, condition_dim)`): What it attends to.
        pooled (`torch.Tensor` of shape `(N, pooled_condition_dim)`, *optional*): For those that take a vector too.
    """

    embeds: torch.Tensor = None
    pooled: torch.Tensor | None = None


class VokenImageDecoder:
    """A frozen diffusers text-to-image model that is told by embeddings what to draw.

    Args:
        pipe (`DiffusionPipeline`): Stable Diffusion 1 or 2 (which predict noise, velocity or the picture), SDXL, SD3,
            PixArt-Sigma or Sana. Its text encoders may be `None`: only [`~VokenImageDecoder.caption_condition`] needs
            them. Its models are frozen in place.

    Raises:
        ValueError: If there is no denoiser, or it or what it predicts is unknown.

    Example:

    ```python
    >>> decoder = VokenImageDecoder.from_pretrained("stabilityai/stable-diffusion-2-1-base")
    >>> latents = decoder.encode(pixel_values)
    >>> loss = decoder.loss(latents, model.feature_mapper(states)).mean()
    >>> images = decoder.draw(condition, model.unconditional(), guidance_scale=7.5)
    ```
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline) -> None:
        self.pipe, (self.denoiser, self.family) = pipe, _known(pipe.components)
        if not isinstance(pipe, getattr(diffusers, PIPELINES[self.family])):
            raise ValueError(f"{type(pipe).__name__} draws from more than texts: pass a {PIPELINES[self.family]}.")
        for part in (self.denoiser, pipe.vae):
            # diffusers leaves weights that it does not find without data, as offloading leaves others.
            missing = [name for name, one in part.named_parameters() if one.is_meta]
            if missing and not any(hasattr(one, "_hf_hook") for one in part.modules()):
                raise ValueError(f"{type(part).__name__} lacks {len(missing)} weights: {', '.join(missing[:10])}.")
        taken, given = self.denoiser.config.in_channels, pipe.vae.config.latent_channels
        if taken != given:
            raise ValueError(f"The denoiser takes {taken} channels, the VAE gives {given}: that is no pair.")
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        # Drawing changes the time steps of its scheduler, and not every one knows velocities: training has its own.
        config = pipe.scheduler.config
        is_flow = config.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(pipe.scheduler).__name__
        self.prediction_type = "flow" if is_flow else config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {self.prediction_type!r} of the scheduler is unknown.")
        if is_flow:
            shift = config.get("shift") or config.get("flow_shift") or 1.0
            self.noise_scheduler = diffusers.FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=shift)
        else:
            self.noise_scheduler = diffusers.DDPMScheduler.from_config(config)

    @classmethod
    def from_components(cls, **components: Any) -> VokenImageDecoder:
        """From the parts of a diffusers pipeline, by their names there; what is not needed is left out.

        Raises:
            ValueError: As for the class.
        """
        pipeline = getattr(diffusers, PIPELINES[_known(components)[1]])
        names = inspect.signature(pipeline.__init__).parameters
        required = [name for name, one in names.items() if one.default is inspect.Parameter.empty and name != "self"]
        parts = dict.fromkeys(required) | {name: components.get(name) for name in COMPONENTS if name in names}
        parts |= {name: False for name in ("requires_safety_checker", "add_watermarker") if name in names}
        return cls(pipeline(**parts))

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> VokenImageDecoder:
        """The image decoder of a diffusers repository, or of one of an [`InterleavedVokenPipeline`].

        Args:
            name (`str`): Name or path of the repository.
            kwargs: As in diffusers' `from_pretrained`, such as `torch_dtype` and `revision`.
        """
        index = diffusers.DiffusionPipeline.load_config(name, **hub_arguments(kwargs))
        unused = {part: None for part in ("model", "processor", "safety_checker") if part in index}
        return cls.from_components(**diffusers.DiffusionPipeline.from_pretrained(name, **unused, **kwargs).components)

    @property
    def components(self) -> dict[str, Any]:
        """All parts that an [`InterleavedVokenPipeline`] has, by their names in diffusers; `None` for what this one lacks."""
        return {name: self.pipe.components.get(name) for name in COMPONENTS}

    @property
    def condition_dim(self) -> int:
        """Width of what the denoiser attends to."""
        config = self.denoiser.config
        names = "caption_channels", "joint_attention_dim", "encoder_hid_dim", "cross_attention_dim"
        dim = next(config[name] for name in names if config.get(name))
        # Of Sana, cross_attention_dim is the width within; of UNets it may be one for each block, all the same.
        return dim if isinstance(dim, int) else dim[0]

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled vector, if the denoiser takes one."""
        config = self.denoiser.config
        if "text_time" in self.family:
            return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return config.get("pooled_projection_dim")

    @property
    def text_length(self) -> int:
        """How many vectors of a text the denoiser knows: the usual `condition_length`."""
        if self.family in MASKED:
            return 300
        tokenizer = self.pipe.components.get("tokenizer")
        return 77 if tokenizer is None else tokenizer.model_max_length

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures that the denoiser was made for."""
        _, height, width = (side * self.pipe.vae_scale_factor for side in self.latent_shape())
        return width, height

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape of the latents of a picture of so many pixels, by default of the denoiser's own size.

        Raises:
            ValueError: If the denoiser cannot draw this size.
        """
        size, factor = self.denoiser.config.sample_size, self.pipe.vae_scale_factor
        own = (size, size) if isinstance(size, int) else size
        height = own[0] * factor if height is None else height
        width = own[1] * factor if width is None else width
        step = factor * (self.denoiser.config.get("patch_size") or 1)
        if height % step or width % step or min(height, width) < step:
            raise ValueError(f"Height and width must be multiples of {step}, got pictures of {height} x {width}.")
        return self.denoiser.config.in_channels, height // factor, width // factor

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents of pictures, scaled as the denoiser knows them.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`): In [-1, 1].
            generator (`torch.Generator`, *optional*): For the sample of the VAE's posterior.

        Raises:
            ValueError: If the denoiser cannot draw pictures of this size.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
            raise ValueError(f"Pictures must be floats (N, 3, H, W), got {pixel_values.dtype}, {pixel_values.shape}.")
        self.latent_shape(*pixel_values.shape[-2:])
        vae = self.pipe.vae
        overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
        if overflows:
            vae.float()
        encoded = vae.encode(pixel_values.to(vae.device, vae.dtype))
        if overflows:
            vae.half()
        latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latent
        return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def caption_condition(self, texts: Sequence[str], length: int | None = None) -> VokenCondition:
        """What the diffusion model's own text encoders make of captions, the target of L_CAP.

        Args:
            texts (sequence of `str`): The captions.
            length (`int`, *optional*): How many vectors, for families with no fixed number (SD3, PixArt, Sana).

        Raises:
            ValueError: If there is no text encoder, or it gives another number of vectors.
        """
        if self.pipe.text_encoder is None or self.pipe.tokenizer is None:
            raise ValueError("Captions need the diffusion model's text encoders: load them, or caption_loss_weight=0.")
        parameters, device = inspect.signature(self.pipe.encode_prompt).parameters, self.pipe.text_encoder.device
        arguments = dict.fromkeys({"prompt_2", "prompt_3"} & parameters.keys())
        of_t5 = (length or 0) - (self.text_length if self.family == "SD3Transformer2DModel" else 0)
        if "max_sequence_length" in parameters and of_t5 > 0:
            arguments["max_sequence_length"] = of_t5
        arguments |= {"prompt": list(texts), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        embeds, *others = self.pipe.encode_prompt(device=device, **arguments)
        if length is not None and embeds.shape[1] != length:
            raise ValueError(
                f"The text encoders give {embeds.shape[1]} vectors, the condition has {length}: give `add_vokens` that "
                "condition_length, or set `caption_loss_weight=0`."
            )
        return VokenCondition(embeds=embeds, pooled=None if self.pooled_dim is None else others[1])

    def loss(
        self,
        latents: torch.Tensor,
        condition: VokenCondition,
        snr_gamma: float | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The denoiser's training loss of each picture; gradients flow through it into the condition.

        Args:
            latents (`torch.Tensor` of shape `(N, C, h, w)`): From `encode`.
            condition ([`VokenCondition`]): Of the same N pictures.
            snr_gamma (`float`, *optional*): Min-SNR weighting (arXiv 2303.09556, section 3.4): min(snr, gamma) of the loss
                of the picture, and the same in terms of noise (divided by snr) or velocity (by snr + 1). Flows are not
                weighted.
            noise (`torch.Tensor` of shape `(N, C, h, w)`, *optional*): Instead of being drawn.
            timesteps (`torch.Tensor` of shape `(N,)`, *optional*): Likewise: of 0 ... 999 uniformly; of flows in (0,
                1000], logit-normally, as SD3 was trained (arXiv 2403.03206).
            generator (`torch.Generator`, *optional*): On the latents' device, for both.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32.

        Raises:
            ValueError: If latents do not fit the denoiser, or min-SNR is not defined: noise predicted from nothing but
                noise (`rescale_betas_zero_snr`).
        """
        number, channels = len(condition.embeds), self.denoiser.config.in_channels
        if latents.ndim != 4 or latents.shape[:2] != (number, channels):
            given = tuple(latents.shape)
            raise ValueError(f"Latents must be of {number} pictures with {channels} channels, got {given}.")
        self.latent_shape(*(side * self.pipe.vae_scale_factor for side in latents.shape[-2:]))
        latents, scheduler = latents.float(), self.noise_scheduler
        if snr_gamma and self.prediction_type == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
            raise ValueError("Min-SNR of noise divides by 0 where there is nothing but noise: set snr_gamma=None.")
        where = {"generator": generator, "device": latents.device}
        if noise is None:
            noise = torch.randn(latents.shape, **where)
        steps = scheduler.config.num_train_timesteps
        if self.prediction_type == "flow":
            if timesteps is None:
                u = torch.randn(number, **where).sigmoid()
                timesteps = scheduler.timesteps.to(latents.device)[(u * steps).long()]
            sigma = (timesteps / steps).view(-1, 1, 1, 1)
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        else:
            if timesteps is None:
                timesteps = torch.randint(0, steps, (number,), **where)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            velocity = scheduler.get_velocity(latents, noise, timesteps)
            target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[self.prediction_type]
        predicted = self._denoise(noisy.to(self.denoiser.dtype), timesteps, condition)
        loss = (predicted.float() - target).square().flatten(1).mean(1)
        if snr_gamma is None or self.prediction_type == "flow":
            return loss
        snr = diffusers.training_utils.compute_snr(scheduler, timesteps)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction_type]
        return loss * snr.clamp(max=snr_gamma) / divisor

    def _denoise(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: VokenCondition) -> torch.Tensor:
        told = VokenCondition(**{name: one.to(noisy) for name, one in condition.items()})
        arguments: dict[str, Any] = {"encoder_hidden_states": told.embeds}
        if self.family == "SD3Transformer2DModel":
            arguments["pooled_projections"] = told.pooled
        elif "text_time" in self.family:
            height, width = (side * self.pipe.vae_scale_factor for side in noisy.shape[-2:])
            time_ids = noisy.new_tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
            arguments["added_cond_kwargs"] = {"text_embeds": told.pooled, "time_ids": time_ids}
        elif self.family in MASKED:
            arguments["encoder_attention_mask"] = noisy.new_ones(told.embeds.shape[:2])
        if self.family == "PixArtTransformer2DModel":
            arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        elif self.family == "SanaTransformer2DModel":
            timesteps = timesteps * self.denoiser.config.get("timestep_scale", 1.0)
        predicted = self.denoiser(noisy, timestep=timesteps, **arguments).sample
        return predicted[:, : noisy.shape[1]]  # what else PixArt predicts is the variance

    @torch.no_grad()
    def draw(
        self, condition: VokenCondition, unconditional: VokenCondition, generator: Any = None, **kwargs: Any
    ) -> list[Any] | np.ndarray | torch.Tensor:
        """Pictures, by diffusers' own pipeline.

        Args:
            condition ([`VokenCondition`]): Of N pictures.
            unconditional ([`VokenCondition`]): Of one: what guidance leads away from.
            generator (`torch.Generator` or a list of N, *optional*): Where the noise comes from.
            kwargs: Of the pipeline: `guidance_scale`, `num_inference_steps`, `height`, `width`, `output_type`,
                `callback_on_step_end`, ...

        Returns:
            N pictures: a list of `PIL.Image.Image`, or for `output_type` `"np"` or `"pt"` an array or tensor in [0, 1].

        Raises:
            ValueError: On a size that the denoiser cannot draw, or an argument that the pipeline does not know.
        """
        arguments: dict[str, Any] = {}
        for name, one in condition.items():
            kind = "prompt_embeds" if name == "embeds" else "pooled_prompt_embeds"
            arguments |= {kind: one, f"negative_{kind}": unconditional[name].expand_as(one)}
        arguments = {name: one.to(self.denoiser.device, self.denoiser.dtype) for name, one in arguments.items()}
        if self.family in MASKED:
            mask = arguments["prompt_embeds"].new_ones(condition.embeds.shape[:2])
            arguments |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
            arguments |= {"negative_prompt": None, "use_resolution_binning": False}
        return self.pipe(generator=generator, **arguments, **self.checked(kwargs)).images

    @property
    def settings(self) -> set[str]:
        """The arguments of the diffusers pipeline that say how to draw, not what."""
        names = inspect.signature(self.pipe.__call__).parameters.keys()
        return {name for name in names - {"kwargs", "return_dict", "use_resolution_binning"} if "prompt" not in name}

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of a drawing with its size, before any work.

        Raises:
            ValueError: On a size that the denoiser cannot draw, or a setting that the pipeline does not know.
        """
        if unknown := sorted(settings.keys() - self.settings):
            raise ValueError(f"{type(self.pipe).__name__} draws from vokens and takes no {', '.join(unknown)} here.")
        if settings.get("output_type", "pil") not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {settings['output_type']!r}.")
        if (steps := settings.get("num_inference_steps", 1)) < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}.")
        if not math.isfinite(scale := settings.get("guidance_scale", 1.0)):
            raise ValueError(f"guidance_scale must be a number, got {scale}.")
        _, *size = self.latent_shape(settings.get("height"), settings.get("width"))
        height, width = (side * self.pipe.vae_scale_factor for side in size)
        return {**settings, "height": height, "width": width}


def _known(components: dict[str, Any]) -> tuple[nn.Module, str]:
    """The denoiser among the parts of a pipeline, and which of `PIPELINES` it belongs to."""
    found = [components[name] for name in ("unet", "transformer") if components.get(name) is not None]
    if len(found) != 1:
        raise ValueError(f"A pipeline that draws has a unet or a transformer, these parts have {len(found)}.")
    family, config = type(found[0]).__name__, found[0].config
    # What it is told beside texts: UNets; PixArt-alpha; distilled ones.
    kinds = [config.get("addition_embed_type"), getattr(found[0], "use_additional_conditions", False) and "sizes"]
    kinds += ["guidance"] if config.get("guidance_embeds") else []
    family += "".join(f" ({kind})" for kind in kinds if kind)
    if family not in PIPELINES:
        raise ValueError(f"{family} is no denoiser that vokens can condition. Known are: {', '.join(PIPELINES)}.")
    if missing := [name for name in ("vae", "scheduler") if components.get(name) is None]:
        raise ValueError(f"A pipeline that draws has a {' and a '.join(missing)}, which these parts lack.")
    return found[0], family
