"""Tiny real bases with vokens, and tiny diffusers pipelines of every family that can draw from them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import SPECIAL_TOKENS, tiny_text_config, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlavaProcessor,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from transformers_liquid.models.voken.configuration_voken import VokenConfig
from transformers_liquid.models.voken.image_decoder import VokenImageDecoder
from transformers_liquid.models.voken.modeling_voken import VokenForConditionalGeneration
from transformers_liquid.pipelines.add_vokens import add_vokens
from transformers_liquid.pipelines.interleaved_voken import InterleavedVokenPipeline


# Bytes and specials as in tiny.py, then eight vokens.
VOKENS = [*range(len(SPECIAL_TOKENS) + 256, len(SPECIAL_TOKENS) + 264)]
VOCAB_SIZE = VOKENS[-1] + 1
PLACEHOLDER = 3  # `<image>`

CAUSAL_BASES = ["llama", "gemma2", "cohere", "mamba", "gpt2", "opt"]
VISION_BASES = ["llava", "qwen2_5_vl", "blip-2", "instructblip"]
FAMILIES = ["sd", "sd-v", "sd-x0", "sdxl", "sd3", "pixart", "sana"]

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QFORMER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
    "vocab_size": VOCAB_SIZE,
}


def tiny_base_config(model_type: str, vocab_size: int = VOCAB_SIZE, tied: bool = False) -> Any:
    """The configuration of a base of two layers, with pictures of 16 x 16 pixels where it reads any."""
    if model_type not in VISION_BASES:
        config = tiny_text_config(model_type, tied, vocab_size)
        if model_type == "opt":
            config.word_embed_proj_dim = 24  # its head reads another width than its layers
        return config
    text = tiny_text_config("llama", tied, vocab_size).to_dict()
    if model_type == "llava":
        return AutoConfig.for_model(
            "llava",
            vision_config={"model_type": "clip_vision_model", **_VISION},
            text_config=text,
            image_token_index=PLACEHOLDER,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
    if model_type == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        text = tiny_text_config("qwen2", tied, vocab_size).to_dict()
        return AutoConfig.for_model(
            "qwen2_5_vl",
            text_config=text | {"model_type": "qwen2_5_vl_text", "rope_parameters": rope},
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
            | {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [0]},
            image_token_id=PLACEHOLDER,
            vision_start_token_id=4,
            vision_end_token_id=5,
            video_token_id=6,
            tie_word_embeddings=tied,
        )
    return AutoConfig.for_model(
        model_type,
        vision_config=_VISION,
        qformer_config=_QFORMER,
        text_config=text,
        num_query_tokens=4,
        image_token_index=PLACEHOLDER,
    )


def tiny_voken_base(model_type: str = "llama", vocab_size: int = VOCAB_SIZE, tied: bool = False) -> PreTrainedModel:
    """A base in eval mode, with weights large enough that its outputs depend on its inputs."""
    config = tiny_base_config(model_type, vocab_size, tied)
    auto_class = AutoModelForImageTextToText if model_type in VISION_BASES else AutoModelForCausalLM
    return _randomized(auto_class.from_config(config)).eval()


def picture_inputs(model_type: str, number: int = 1, seed: int = 0) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The ids that stand for a picture in a prompt of a base, and the tensors of `number` pictures."""
    generator = torch.Generator().manual_seed(seed)
    if model_type == "qwen2_5_vl":
        patches = torch.randn(number * 16, 3 * 2 * 4 * 4, generator=generator)
        return [4, *[PLACEHOLDER] * 4, 5], {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * number),
        }
    tensors = {"pixel_values": torch.randn(number, 3, 16, 16, generator=generator)}
    if model_type == "instructblip":
        ids = torch.full((number, 3), 40)
        tensors |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    return [PLACEHOLDER] * 4, tensors


def tiny_voken_config(model_type: str = "llama", **kwargs: Any) -> VokenConfig:
    """Conditions of 6 vectors of 8, from a mapper of width 16."""
    base = tiny_base_config(model_type)
    return VokenConfig(
        **{
            "text_config": base,
            "voken_token_ids": VOKENS,
            "state_size": 24 if model_type == "opt" else 32,
            "condition_length": 6,
            "condition_dim": 8,
            "mapper_hidden_size": 16,
            "mapper_num_layers": 1,
            "mapper_num_heads": 2,
            **kwargs,
        }
    )


def tiny_voken_model(
    model_type: str = "llama", family: str | None = None, **kwargs: Any
) -> VokenForConditionalGeneration:
    """A model with vokens, in eval mode; with a family, its image decoder attached and the condition made for it."""
    decoder = None if family is None else VokenImageDecoder(tiny_image_pipeline(family))
    if decoder is not None:
        kwargs = {"condition_dim": decoder.condition_dim, "pooled_condition_dim": decoder.pooled_dim, **kwargs}
    model = VokenForConditionalGeneration(tiny_voken_config(model_type, **kwargs)).eval()
    _randomized(model.text_model)
    return model if decoder is None else model.attach(decoder)


def tiny_image_pipeline(family: str = "sd", text: bool = True, length: int = 6, seed: int = 0) -> Any:
    """A text-to-image pipeline of 16 x 16 pixels (Sana: 32), of a few thousand weights; with its text encoders if `text`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _PIPELINES[family.split("-")[0]](family, text, length)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip(length: int, projection: int | None = None, width: int = 8) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or width,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def _tokenizer(length: int) -> Any:
    return tiny_tokenizer(model_max_length=length)


def _vae(**kwargs: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **kwargs,
    )


def _unet(**kwargs: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **kwargs,
    )


def _sd(family: str, text: bool, length: int) -> StableDiffusionPipeline:
    kinds = {"sd": "epsilon", "sd-v": "v_prediction", "sd-x0": "sample"}
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if kinds[family] == "sample":
        scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False, steps_offset=1, **scheduler)
    else:
        scheduler = PNDMScheduler(prediction_type=kinds[family], skip_prk_steps=True, steps_offset=1, **scheduler)
    return StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.5),
        text_encoder=_clip(length) if text else None,
        tokenizer=_tokenizer(length) if text else None,
        unet=_unet(cross_attention_dim=8),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(family: str, text: bool, length: int) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.5),
        text_encoder=_clip(length) if text else None,
        text_encoder_2=_clip(length, 12) if text else None,
        tokenizer=_tokenizer(length) if text else None,
        tokenizer_2=_tokenizer(length) if text else None,
        unet=_unet(
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        add_watermarker=False,
    )


def _sd3(family: str, text: bool, length: int) -> StableDiffusion3Pipeline:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=24, d_kv=12, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return StableDiffusion3Pipeline(
        vae=_vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=_clip(3, 8) if text else None,
        tokenizer=_tokenizer(3) if text else None,
        text_encoder_2=_clip(3, 4, 12) if text else None,
        tokenizer_2=_tokenizer(3) if text else None,
        text_encoder_3=T5EncoderModel(config) if text else None,
        tokenizer_3=_tokenizer(length - 3) if text else None,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart(family: str, text: bool, length: int) -> PixArtSigmaPipeline:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return PixArtSigmaPipeline(
        tokenizer=_tokenizer(length) if text else None,
        text_encoder=T5EncoderModel(config) if text else None,
        vae=_vae(scaling_factor=0.5),
        transformer=_uneven(
            PixArtTransformer2DModel(
                sample_size=8,
                num_layers=1,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_channels=8,
                in_channels=4,
                cross_attention_dim=16,
                out_channels=8,
                norm_type="ada_norm_single",
                use_additional_conditions=False,
            )
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def _sana(family: str, text: bool, length: int) -> SanaPipeline:
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    return SanaPipeline(
        tokenizer=_tokenizer(length) if text else None,
        text_encoder=Gemma2Model(config) if text else None,
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=_uneven(
            SanaTransformer2DModel(
                sample_size=16,  # its pipeline draws multiples of 32 pixels
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=4,
                cross_attention_dim=8,
                caption_channels=8,
            )
        ),
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction", beta_schedule="linear"
        ),
    )


_PIPELINES = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "pixart": _pixart, "sana": _sana}


def _uneven(model: torch.nn.Module) -> torch.nn.Module:
    """Some transformers begin with a last layer of zeros, from which no gradient comes."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith("A_log"):
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def tiny_base_processor(model_type: str = "llama", **kwargs: Any) -> Any:
    """The processor of a base without vokens: a tokenizer, or pictures of 16 x 16 pixels beside it."""
    if model_type == "llava":
        return LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
            tiny_tokenizer(**kwargs),
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        )
    if model_type == "blip-2":
        image_processor = BlipImageProcessor(size={"height": 16, "width": 16})
        return Blip2Processor(image_processor, tiny_tokenizer(**kwargs), num_query_tokens=4)
    return tiny_tokenizer(**kwargs)


def tiny_voken_pipeline(model_type: str = "llama", family: str = "sd", **kwargs: Any) -> InterleavedVokenPipeline:
    """A base of 263 tokens and a diffusion model with vokens added, of random weights."""
    base = tiny_voken_base(model_type, vocab_size=VOKENS[0])
    kwargs = {"condition_length": 6, "mapper_num_layers": 1, "mapper_num_heads": 2, **kwargs}
    pipe = add_vokens(base, tiny_base_processor(model_type), tiny_image_pipeline(family), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe
