"""One language model that reads and draws: Liquid (arXiv 2412.04332) for transformers and diffusers.

Importing this package registers its classes with the Auto classes and its pipeline as the task "text-to-image".
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import diffusers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto import modeling_auto

from .checkpoints import EMOJI_CHECKPOINT, VOKEN_EMOJI
from .codecs.llamagen import load_llamagen_codec, save_llamagen_codec
from .codecs.loading import load_codec
from .codecs.taming import load_taming_codec, save_taming_codec
from .codecs.unitok import UniTokModel, load_unitok_codec, save_unitok_codec
from .codecs.vae import CodecVAE
from .codecs.vq_model import CHAMELEON_VQ_CONFIG, LiquidVQModel
from .conversion.expand import expand_vocabulary
from .conversion.export import export_base_model, export_unitok
from .data.collator import LiquidDataCollator
from .data.mixture import load_records, mix_records
from .data.tokenize import tokenize_dataset
from .data.voken_collator import VokenDataCollator, story_samples
from .generation.guidance import GuidanceLogitsProcessor, ImageTokenLogitsProcessor, SuppressImageTokensLogitsProcessor
from .generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG
from .models.liquid.configuration_liquid import LiquidConfig
from .models.liquid.image_processing_liquid import LiquidImageProcessor
from .models.liquid.modeling_liquid import LiquidForCausalLM, LiquidModel, LiquidPreTrainedModel
from .models.liquid.processing_liquid import LiquidProcessor
from .models.liquid.unitok_reference import UniTokConfig
from .models.voken.configuration_voken import VokenConfig
from .models.voken.image_decoder import VokenCondition, VokenImageDecoder
from .models.voken.modeling_voken import VokenFeatureMapper, VokenForConditionalGeneration
from .models.voken.processing_voken import VokenProcessor
from .models.voken.reference import load_minigpt5, save_minigpt5
from .pipelines.add_vokens import add_vokens
from .pipelines.conversation import LiquidConversation
from .pipelines.interleaved_voken import InterleavedVokenPipeline
from .pipelines.streamers import ImageIteratorStreamer, ImageStreamer, partial_pictures
from .pipelines.text_to_image import LiquidImageGenerationPipeline
from .training.adapters import (
    liquid_lora_config,
    liquid_rows_config,
    voken_lora_config,
    voken_prefix_model,
    voken_stage1_config,
)


if TYPE_CHECKING:
    from .training.trainer import LiquidTrainer
    from .training.voken_trainer import VokenTrainer

__version__ = "0.1.0"

AutoConfig.register("liquid", LiquidConfig)
AutoConfig.register(UniTokConfig.model_type, UniTokConfig)
AutoModel.register(LiquidConfig, LiquidModel)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(LiquidConfig, LiquidForCausalLM)
# What goes by the name of the class (the Trainer's label smoothing, `transformers serve`) has tables of its own.
for names in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names["liquid"] = LiquidForCausalLM.__name__
AutoConfig.register("voken", VokenConfig)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(VokenConfig, VokenForConditionalGeneration)
for kind in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")["voken"] = VokenForConditionalGeneration.__name__
AutoImageProcessor.register(LiquidConfig, image_processor_classes={"pil": LiquidImageProcessor})
AutoProcessor.register(LiquidConfig, LiquidProcessor)
AutoProcessor.register(VokenConfig, VokenProcessor)
# Where DiffusionPipeline.from_pretrained looks for the class that a repository names.
diffusers.InterleavedVokenPipeline = InterleavedVokenPipeline


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import.
    if (module := {"LiquidTrainer": "trainer", "VokenTrainer": "voken_trainer"}.get(name)) is not None:
        return getattr(import_module(f".training.{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CHAMELEON_VQ_CONFIG",
    "DEFAULT_IMAGE_GENERATION_CONFIG",
    "EMOJI_CHECKPOINT",
    "VOKEN_EMOJI",
    "CodecVAE",
    "GuidanceLogitsProcessor",
    "ImageIteratorStreamer",
    "ImageStreamer",
    "ImageTokenLogitsProcessor",
    "InterleavedVokenPipeline",
    "LiquidConfig",
    "LiquidConversation",
    "LiquidDataCollator",
    "LiquidForCausalLM",
    "LiquidImageGenerationPipeline",
    "LiquidImageProcessor",
    "LiquidModel",
    "LiquidPreTrainedModel",
    "LiquidProcessor",
    "LiquidTrainer",
    "LiquidVQModel",
    "SuppressImageTokensLogitsProcessor",
    "UniTokModel",
    "VokenCondition",
    "VokenConfig",
    "VokenDataCollator",
    "VokenFeatureMapper",
    "VokenForConditionalGeneration",
    "VokenImageDecoder",
    "VokenProcessor",
    "VokenTrainer",
    "add_vokens",
    "expand_vocabulary",
    "export_base_model",
    "export_unitok",
    "liquid_lora_config",
    "liquid_rows_config",
    "load_codec",
    "load_llamagen_codec",
    "load_minigpt5",
    "load_records",
    "load_taming_codec",
    "load_unitok_codec",
    "mix_records",
    "partial_pictures",
    "save_llamagen_codec",
    "save_minigpt5",
    "save_taming_codec",
    "save_unitok_codec",
    "story_samples",
    "tokenize_dataset",
    "voken_lora_config",
    "voken_prefix_model",
    "voken_stage1_config",
]
