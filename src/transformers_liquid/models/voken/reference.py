"""MiniGPT-5's released checkpoints <-> [`VokenForConditionalGeneration`]: one table of names, both directions.

The reference (github.com/eric-ai-lab/MiniGPT-5) is MiniGPT-4 with eight vokens. Its Lightning files hold what was trained
and nothing else: stage 1 the feature mapper and the whole embeddings and head; stage 2 these two again, the encoder and
decoder of the mapper, and LoRA. MiniGPT-4 itself is the picture reader of BLIP-2, one linear layer, and Vicuna.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ...codecs.vq_model import check_loading_info
from ...utils.files import check_keys, read_tensors, whole
from ...utils.optional import require
from ..liquid.chat_template import read_template
from .configuration_voken import VokenConfig
from .modeling_voken import VokenForConditionalGeneration
from .processing_voken import VokenProcessor
from .prompts import MINIGPT5_STORY_SYSTEM


if TYPE_CHECKING:
    from peft import PeftModel

# The last rows of the vocabulary, in this order: eight vokens, and what stands for a picture that is read.
ADDED_TOKENS = [*(f"[IMG{index}]" for index in range(8)), "<ImageHere>"]
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
_LORA_SCALE = LORA["lora_alpha"] / LORA["r"]

# Our name of a part -> the reference's.
NAMES = {
    "feature_mapper.query": "t2i_decoder_prompt",
    "feature_mapper.mlp.": "fc.",
    "feature_mapper.encoder_decoder.": "llm_to_t2i_mapping.",
    "text_model.language_model.": "model.llama_model.",
    "text_model.language_projection.": "llama_proj.",
}
_EMBEDDINGS = [f"text_model.language_model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
# Settings that Lightning may have pickled beside the tensors. Nothing is made of them.
_SETTINGS = [
    argparse.Namespace,
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
]


def key_table(config: VokenConfig, stage: int) -> dict[str, str]:
    """Every tensor's name in a file of the reference -> its name in [`VokenForConditionalGeneration`].

    Args:
        config ([`VokenConfig`]): The model's.
        stage (`int`): 1 or 2; 0 for the file of MiniGPT-4's linear layer.

    Returns:
        `dict`: Names to names. LoRA's are PEFT's without the name of the adapter.
    """
    parts = [("text_model.language_projection.",), ("feature_mapper.",), ("feature_mapper.encoder_decoder.",)][stage]
    with torch.device("meta"):
        keys = [key for key in VokenForConditionalGeneration(config).state_dict() if key.startswith(parts)]
    keys += _EMBEDDINGS if stage else []
    if stage == 2:
        layers = range(config.get_text_config().num_hidden_layers)
        lora = "text_model.language_model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
        keys += [lora.format(layer, name, side) for layer in layers for name in "qv" for side in "AB"]
    table = {}
    for key in keys:
        part = next((part for part in NAMES if key.startswith(part)), None)
        if part is None:  # a mapper has parts that the reference's has not
            continue
        name = NAMES[part] + key.removeprefix(part)
        if stage == 2:  # the language model alone was in a `PeftModel`
            name = name.replace("llama_model.", "llama_model.base_model.model.")
            name = re.sub(r"(lora_[AB])\.", r"\1.default.", name)
            name = re.sub(r"(embed_tokens|lm_head)\.", r"\1.modules_to_save.default.", name)
        table[name] = key
    return table


def load_minigpt5(
    stage1: str | Path,
    stage2: str | Path | None = None,
    *,
    projection: str | Path,
    vision_model: str = "Salesforce/blip2-flan-t5-xxl",
    language_model: str = "Vision-CAIR/vicuna-7b",
    image_decoder: str = "stabilityai/stable-diffusion-2-1-base",
    merge: bool = True,
    **kwargs: Any,
) -> tuple[VokenForConditionalGeneration | PeftModel, VokenProcessor]:
    """Loads MiniGPT-5 from the files of its authors. Code in these is never executed.

    Args:
        stage1 (`str` or `Path`): `stage1_cc3m.ckpt`.
        stage2 (`str` or `Path`, *optional*): `stage2_vist.ckpt` or `stage2_mmdialog.ckpt`. They need the first one too.
        projection (`str` or `Path`): `prerained_minigpt4_7b.pth`, the linear layer of MiniGPT-4.
        vision_model (`str`): A BLIP-2 of transformers with the ViT, Q-Former and query tokens of MiniGPT-4.
        language_model (`str`): Vicuna, version 0.
        image_decoder (`str`): The diffusers repository that the conditions are for. It is not loaded here.
        merge (`bool`, defaults to `True`): Whether LoRA of stage 2 becomes part of the weights.
        kwargs: Of `from_pretrained` for vision and language model, such as `dtype`.

    Returns:
        The model in eval mode, in a `PeftModel` if there is LoRA that is not merged; and its [`VokenProcessor`], which puts
        prompts as the reference does.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or holds pickled code, a key is unknown, missing or of another shape, or the
            language model is not the one that was trained.
        ImportError: If LoRA is not merged and PEFT not installed.
    """
    paths = [projection, stage1, *([] if stage2 is None else [stage2])]
    files = [_read(path, "state_dict" if index else "model") for index, path in enumerate(paths)]
    is_adapter = stage2 is not None and not merge
    if is_adapter:
        require("peft", "LoRA that is not merged")
    config = _config(files[1], vision_model, language_model, image_decoder)
    processor = _processor(config, vision_model, language_model)
    with torch.device("meta"):
        model = VokenForConditionalGeneration(config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}

    # All tensors under our names; of those that both stages have, the second one's
    tensors: dict[str, torch.Tensor] = {}
    for stage, (path, file) in enumerate(zip(paths, files, strict=True)):
        table = key_table(config, stage)
        check_keys(str(path), file, required=table, optional=())
        tensors |= {key: file[name] for name, key in table.items()}
    for key, tensor in tensors.items():
        expected = shapes[re.sub(r"lora_[AB]\.", "", key)]
        if "lora_" in key:
            expected = (LORA["r"], expected[1]) if "lora_A" in key else (expected[0], LORA["r"])
        if tensor.shape != expected:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, but the other sizes ask for {tuple(expected)}.")

    # The parts of MiniGPT-4, and these tensors in them
    model.text_model = _load_base(config.text_config, vision_model, language_model, **kwargs)
    model.generation_config = model.text_model.generation_config
    ends = processor.tokenizer("###", add_special_tokens=False).input_ids  # of Vicuna one token
    ends = [processor.tokenizer.eos_token_id, *(ends if len(ends) == 1 else [])]
    model.generation_config.update(do_sample=True, top_p=0.9, eos_token_id=ends)
    lora = {key: tensors.pop(key) for key in [*tensors] if ".lora_" in key}
    dtype = model.get_output_embeddings().weight.dtype
    tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items() if key.startswith("text_model.")}
    model.load_state_dict(tensors, strict=False, assign=True)
    if is_adapter:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        target = r"text_model\.language_model\..*\.[qv]_proj"
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=target, **LORA))
        set_peft_model_state_dict(model, {f"base_model.model.{key}": tensor for key, tensor in lora.items()})
    else:
        for key in [key for key in lora if "lora_A" in key]:
            weight = model.get_parameter(key.replace("lora_A.", ""))
            weight.data += (_LORA_SCALE * (lora[key.replace("lora_A", "lora_B")] @ lora[key])).to(weight)
    return model.eval(), processor


def save_minigpt5(model: VokenForConditionalGeneration | PeftModel, directory: str | Path) -> None:
    """Writes a model in the reference's layout: `stage1.ckpt`, and with LoRA `stage2.ckpt` too.

    The files hold neither pictures' readers nor layers of the language model: LoRA that was merged is not in them.

    Args:
        model: A model as [`load_minigpt5`] makes it (of stage 2 with `merge=False`), trained or not.
        directory (`str` or `Path`): Where to write; made if it does not exist.

    Raises:
        ValueError: If the reference cannot hold the model, saying why.
    """
    ours, config = bare_state_dict(model), model.config
    rows, lora = config.get_text_config().vocab_size, {key for key in ours if ".lora_" in key}
    adapter = model.peft_config["default"] if lora else None
    expected = {
        "its bases": (["blip-2", "llama"], [config.text_config.model_type, config.get_text_config().model_type]),
        "mapper_num_heads": (8, config.mapper_num_heads),
        "voken_token_ids": ([*range(rows - len(ADDED_TOKENS), rows - 1)], config.voken_token_ids),
        "lora_alpha / r": (_LORA_SCALE, adapter.lora_alpha / adapter.r if lora else _LORA_SCALE),
    }
    for name, (theirs, own) in expected.items():
        if theirs != own:
            raise ValueError(f"The reference cannot hold this model: {name} must be {theirs}, got {own}.")
    tables = {stage: key_table(config, stage) for stage in ((1, 2) if lora else (1,))}
    known = {key for table in tables.values() for key in table.values()}
    if unknown := {key for key in ours if key in lora or key.startswith("feature_mapper.")} - known:
        raise ValueError(f"The reference has no place for {sorted(unknown)[:10]}.")
    Path(directory).mkdir(parents=True, exist_ok=True)
    for stage, table in tables.items():
        check_keys("The model", ours, required=table.values())
        state_dict = {name: ours[key].contiguous() for name, key in table.items()}
        with whole(Path(directory, f"stage{stage}.ckpt")) as unfinished:
            torch.save({"state_dict": state_dict}, unfinished)


def bare_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model under the names that they have without PEFT; where PEFT trains a copy, the copy."""
    found = {}
    for key, tensor in model.state_dict().items():
        if ".original_module." not in key:
            key = re.sub(r"\.(base_layer|token_adapter|modules_to_save)(?=\.)|\.default(?=\.)", "", key)
            found[key.removeprefix("base_model.model.")] = tensor
    for name, module in model.named_modules():
        if hasattr(module, "trainable_tokens_delta"):
            key = name.removeprefix("base_model.model.").removesuffix(".token_adapter")
            found[f"{key}.weight"] = module.get_merged_weights(module.active_adapters)
    return found


def _read(path: str | Path, field: str) -> dict[str, torch.Tensor]:
    """The tensors of a file; PEFT's former names, which lack the adapter's, as they are today."""
    stored = read_tensors(Path(path), _SETTINGS)
    if not isinstance(stored, dict) or not isinstance(stored.get(field), dict):
        raise ValueError(f"{path} is no checkpoint of its kind: it has no {field!r}.")
    if bad := [key for key, one in stored[field].items() if not torch.is_tensor(one) or not one.is_floating_point()]:
        raise ValueError(f"{path} has {len(bad)} entries that are no weights: {', '.join(bad[:10])}.")
    name = re.compile(r"\.(lora_[AB]|modules_to_save)\.(?!default\.)")
    return {name.sub(r".\1.default.", key): tensor for key, tensor in stored[field].items()}


def _config(stage1: dict[str, torch.Tensor], vision_model: str, language_model: str, image_decoder: str) -> VokenConfig:
    """What the sizes in the file of stage 1 say."""
    names = ("t2i_decoder_prompt", "fc.0.weight", "llm_to_t2i_mapping.encoder.layers.0.linear1.weight")
    check_keys("The file of stage 1", stage1, required=(*names, "model.llama_model.lm_head.weight"))
    query, mlp, linear = (stage1[name] for name in names)
    rows = len(stage1["model.llama_model.lm_head.weight"])
    reader, text_config = AutoConfig.from_pretrained(vision_model), AutoConfig.from_pretrained(language_model)
    if (given := (reader.model_type, text_config.model_type)) != ("blip-2", "llama"):
        raise ValueError(f"MiniGPT-5 is made of a blip-2 and a llama, got {given}.")
    if (given := tuple(one.ndim for one in (query, mlp, linear))) != (3, 2, 2):
        raise ValueError(f"{', '.join(names)} in the file of stage 1 have 3, 2 and 2 dimensions, got {given}.")
    text_config.vocab_size = rows
    return VokenConfig(
        text_config=AutoConfig.for_model(
            "blip-2",
            vision_config=reader.vision_config,
            qformer_config=reader.qformer_config,
            num_query_tokens=reader.num_query_tokens,
            text_config=text_config,
            image_token_index=rows - 1,
        ),
        voken_token_ids=[*range(rows - len(ADDED_TOKENS), rows - 1)],
        state_size=mlp.shape[1],
        condition_length=query.shape[1],
        condition_dim=query.shape[2],
        mapper_hidden_size=query.shape[2],
        mapper_num_layers=sum(bool(re.fullmatch(r"llm_.*\.encoder\.layers\.\d+\.norm1\.bias", key)) for key in stage1),
        mapper_intermediate_size=len(linear),
        image_decoder=image_decoder,
    )


def _processor(config: VokenConfig, vision_model: str, language_model: str) -> VokenProcessor:
    reader, tokenizer = AutoProcessor.from_pretrained(vision_model), AutoTokenizer.from_pretrained(language_model)
    number = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED_TOKENS}, replace_extra_special_tokens=False)
    first, last = config.voken_token_ids[0], config.text_config.image_token_id
    if tokenizer.convert_tokens_to_ids(ADDED_TOKENS) != [*range(first, last + 1)]:
        raise ValueError(
            f"The files were trained with {first} tokens before the vokens, and {language_model} has {number}: give the "
            "language model that was trained."
        )
    tokenizer._set_model_specific_special_tokens({"image_token": ADDED_TOKENS[-1]})  # what stands for a picture
    base = type(reader)(reader.image_processor, tokenizer, num_query_tokens=config.text_config.num_query_tokens)
    # Of content in parts, what came before ends with a new line; the last text is what is asked.
    template = read_template("minigpt5", "voken").replace("MINIGPT5_STORY_SYSTEM", MINIGPT5_STORY_SYSTEM)
    return VokenProcessor(base, config.voken_token_ids, template)


def _load_base(config: PreTrainedConfig, vision_model: str, language_model: str, **kwargs: Any) -> PreTrainedModel:
    """BLIP-2 with another language model, the linear layer before which is still to come."""
    reader_config = copy.deepcopy(config)
    reader_config.text_config.num_hidden_layers = 0
    base, info = AutoModelForImageTextToText.from_pretrained(
        vision_model, config=reader_config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    missing = [key for key in info["missing_keys"] if not key.startswith("language_")]
    check_loading_info(vision_model, {"missing_keys": missing})
    language, info = AutoModelForCausalLM.from_pretrained(language_model, output_loading_info=True, **kwargs)
    check_loading_info(language_model, info)
    language.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=False)
    base.language_model, base.config, base.generation_config = language, config, language.generation_config
    return base
