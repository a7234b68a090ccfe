"""Adapters (PEFT) that train new rows of the vocabulary: image rows or vokens, with LoRA beside them or what else is new."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.versions import require_version

from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.voken.modeling_voken import VokenForConditionalGeneration
from ..utils.optional import require


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel, TrainableTokensConfig


def liquid_lora_config(
    model: LiquidForCausalLM, r: int = 16, lora_alpha: int | None = None, **kwargs: Any
) -> LoraConfig:
    """LoRA on the linear layers of the base's body, and training of the rows of the codes and the image specials.

    A plain `LoraConfig` leaves the embeddings and the head frozen: the rows of the codes then stay what they were
    when the vocabulary grew, and nothing says so. Here they are `trainable_token_indices`: in the embeddings, and,
    where the head is not tied to them, in the head too. The codec and all other rows are left alone, and of the
    embeddings a saved adapter holds these rows only. PEFT copies the whole table in each forward, except that
    pictures are drawn with merged weights.

    - With several codes a position there are no rows of codes: what embeds and draws them is trained whole.
    - Experts that are fused parameters are no linear layers and stay frozen, like their router: attention alone is
      adapted in mixtral and qwen3_moe. Name them in `target_parameters` to adapt them.
    - Of state space mixers (mamba) only the input projection is adapted: their kernels read the other weights without
      calling the layer, so that an adapter there would do nothing.

    Args:
        model ([`LiquidForCausalLM`]): Loaded from where it is saved, so that the adapter knows its base. It is not
            changed.
        r (`int`, defaults to 16): Rank.
        lora_alpha (`int`, *optional*): Updates are scaled by `lora_alpha / r`. Defaults to `2 * r`.
        kwargs: Of [`peft.LoraConfig`], such as `lora_dropout`; they replace what is chosen here, such as
            `target_modules`.

    Returns:
        [`peft.LoraConfig`] for `get_peft_model`.

    Raises:
        ValueError: If the model is no [`LiquidForCausalLM`], has adapters already, or its head has a bias.
        ImportError: If PEFT is not installed or too old.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> model = LiquidForCausalLM.from_pretrained("path/to/liquid")
    >>> model = get_peft_model(model, liquid_lora_config(model, r=64))
    ```

    QLoRA differs in how the model is loaded (needs bitsandbytes; the codec and the head stay as they are):

    ```python
    >>> quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    >>> model = LiquidForCausalLM.from_pretrained("path/to/liquid", quantization_config=quantization)
    >>> model = prepare_model_for_kbit_training(model)
    >>> model = get_peft_model(model, liquid_lora_config(model, r=64))
    ```
    """
    rows = _trainable_rows(model)
    from peft import LoraConfig

    # The linear layers of the base's body, whatever their number.
    text_model, names = model.model.text_model, set()
    for parent in text_model.base_model.modules():
        linear = {name for name, child in parent.named_children() if isinstance(child, nn.Linear | Conv1D)}
        is_state_space_mixer = "A_log" in dict(parent.named_parameters(recurse=False))
        names |= {name for name in linear if name.startswith("in_proj")} if is_state_space_mixer else linear
    body = re.escape(f"model.text_model.{text_model.base_model_prefix}.")
    defaults = {
        "task_type": "CAUSAL_LM",
        "target_modules": rf"{body}(.*\.)?({'|'.join(sorted(names))})",
        # For other `target_modules`, such as "all-linear".
        "exclude_modules": r"model\.vq_model\..*",
        "trainable_token_indices": dict.fromkeys(_row_modules(model), rows),
    }
    if model.code_head is not None:
        defaults["modules_to_save"] = ["code_embedder", "code_head"]
    return LoraConfig(r=r, lora_alpha=2 * r if lora_alpha is None else lora_alpha, **defaults | kwargs)


def liquid_rows_config(model: LiquidForCausalLM) -> TrainableTokensConfig:
    """Training of the rows of the codes and the four image specials, and of nothing else.

    For inputs of text ids, the logits of text ids stay those of the frozen base to the bit: with the adapter, after a
    reload, and after merging.

    Args:
        model ([`LiquidForCausalLM`]): As in [`liquid_lora_config`].

    Returns:
        [`peft.TrainableTokensConfig`] for `get_peft_model`.

    Raises:
        ValueError, ImportError: As in [`liquid_lora_config`]; or if codes have no rows, with several of them a position.
    """
    rows = _trainable_rows(model)
    without_rows = "codes have no rows of the vocabulary to train alone: use liquid_lora_config."
    model.config.image_layout.check_one_code(without_rows)
    from peft import TrainableTokensConfig

    # As an expression: PEFT warns about names of tied embeddings in a list, though it keeps these tied.
    modules = "|".join(re.escape(name) for name in _row_modules(model))
    return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=rows, target_modules=modules)


def voken_stage1_config(model: VokenForConditionalGeneration, **kwargs: Any) -> LoraConfig:
    """Training of the rows of the vokens and of the whole feature mapper: the first stage of MiniGPT-5.

    All other rows stay as they are to the bit, which masked gradients would not give: weight decay moves what has none.

    Args:
        model ([`VokenForConditionalGeneration`]): As in [`liquid_lora_config`].
        kwargs: Of [`peft.LoraConfig`].

    Returns:
        [`peft.LoraConfig`] for `get_peft_model`, without any LoRA.

    Raises:
        ValueError, ImportError: As in [`liquid_lora_config`].
    """
    _check_bare(model, VokenForConditionalGeneration)
    return _voken_config(model, **{"modules_to_save": ["feature_mapper"]} | kwargs)


def voken_lora_config(
    model: VokenForConditionalGeneration,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    **kwargs: Any,
) -> LoraConfig:
    """LoRA on queries and values of the language model, and training of the rows of the vokens and of the mapper's encoder
    and decoder: the second stage of MiniGPT-5, with its numbers. The mapper's MLP and queries are frozen.

    Args:
        model ([`VokenForConditionalGeneration`]): As in [`liquid_lora_config`].
        r (`int`, defaults to 8): Rank.
        lora_alpha (`int`, defaults to 16): Updates are scaled by `lora_alpha / r`.
        lora_dropout (`float`, defaults to 0.05): Of what LoRA reads.
        kwargs: Of [`peft.LoraConfig`]; they replace what is chosen here, such as `target_modules`.

    Returns:
        [`peft.LoraConfig`] for `get_peft_model`.

    Raises:
        ValueError: As in [`liquid_lora_config`]; or if the language model has no `q_proj` and `v_proj`.
        ImportError: As in [`liquid_lora_config`].
    """
    _check_bare(model, VokenForConditionalGeneration)
    names = [name for name, module in model.named_modules() if module is model.text_model.get_decoder()]
    target = rf"{re.escape(names[0])}\..*[._][qv]_proj"
    if "target_modules" not in kwargs and not any(re.fullmatch(target, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"{type(model.text_model).__name__} has no q_proj and v_proj: name the layers for LoRA in target_modules, such as "
            r"r'text_model\..*\.c_attn'."
        )
    lora = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target}
    return _voken_config(model, modules_to_save=["feature_mapper.encoder_decoder"], **lora | kwargs)


def voken_prefix_model(
    model: VokenForConditionalGeneration, num_virtual_tokens: int = 5, encoder_hidden_size: int = 1024
) -> PeftModel:
    """Prefix tuning of the language model in place of LoRA, the second stage's other form in MiniGPT-5, with its numbers.

    The prefix is a part of every forward pass, also where conditions are drawn. It cannot be merged: after training,
    `model = adapted.merge_and_unload()` has a `PeftModel` as `model.text_model`, whose `save_pretrained` writes the prefix
    alone. To use it, put `PeftModel.from_pretrained(model.text_model, path)` in place of the `text_model` of the model that
    it was trained on.

    Args:
        model ([`VokenForConditionalGeneration`]): As in [`liquid_lora_config`]. Its language model is wrapped in place.
        num_virtual_tokens (`int`, defaults to 5): Length of the prefix.
        encoder_hidden_size (`int`, defaults to 1024): Width of the MLP that makes it.

    Returns:
        [`peft.PeftModel`] that trains the prefix, the rows of the vokens, and the mapper's encoder and decoder.

    Raises:
        ValueError, ImportError: As in [`liquid_lora_config`].
    """
    _check_bare(model, VokenForConditionalGeneration)
    from peft import PrefixTuningConfig, get_peft_model

    prefix = {"num_virtual_tokens": num_virtual_tokens, "encoder_hidden_size": encoder_hidden_size}
    model.text_model = get_peft_model(
        model.text_model, PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=True, **prefix)
    )
    parts = ["feature_mapper.encoder_decoder", "text_model.prompt_encoder.default"]
    return get_peft_model(model, _voken_config(model, modules_to_save=parts))


def _voken_config(model: VokenForConditionalGeneration, **kwargs: Any) -> LoraConfig:
    """Training of the rows of the vokens, and of what `kwargs` say."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES  # no LoRA

    rows = dict.fromkeys(_row_modules(model), sorted(model.config.voken_token_ids))
    defaults = {"task_type": "CAUSAL_LM", "target_modules": DUMMY_TARGET_MODULES, "trainable_token_indices": rows}
    return LoraConfig(**defaults | kwargs)


def _trainable_rows(model: LiquidForCausalLM) -> list[int]:
    """The ids of the codes and of the image specials, after a check of the model."""
    _check_bare(model, LiquidForCausalLM)
    layout = model.config.image_layout
    return sorted({*layout.special_image_token_ids, *layout.image_token_range})


def _check_bare(model: nn.Module, kind: type[nn.Module]) -> None:
    """Raises unless PEFT is there and can train single rows of the model, which is of the kind and has no adapters."""
    require("peft", "An adapter")
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    require_version("peft>=0.18.1", "Older ones train the embeddings of a tied model without its head.")
    is_adapted = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())
    if is_adapted or not isinstance(model, kind):
        maker = "expand_vocabulary" if kind is LiquidForCausalLM else "add_vokens"
        raise ValueError(
            f"The model must be a {kind.__name__} without adapters, got {type(model).__name__}"
            f"{' with adapters' if is_adapted else ''}. Load it with `{kind.__name__}.from_pretrained`, make one with "
            f"`{maker}`, or `merge_and_unload()` the adapters that it has."
        )
    if model.get_output_embeddings().bias is not None:
        base = getattr(model, "model", model).text_model
        raise ValueError(
            f"The head of {type(base).__name__} has a bias, which PEFT leaves out of the logits when it trains single rows of "
            "a head. Train the whole model instead."
        )
    if not model.name_or_path:
        warnings.warn(
            "The model was not loaded from a repository, so its adapter cannot say what it belongs to, and is worth "
            "nothing without this very model. Save the model, and train what `from_pretrained` loads.",
            stacklevel=4,
        )


def _row_modules(model: LiquidForCausalLM) -> list[str]:
    """The names of the modules with a row per token; a tied head follows the embeddings by itself."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]
