"""Adapters (PEFT) that train the image rows: LoRA beside them, or these rows alone."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.versions import require_version

from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..utils.optional import require


if TYPE_CHECKING:
    from peft import LoraConfig, TrainableTokensConfig


def liquid_lora_config(
    model: LiquidForCausalLM, r: int = 16, lora_alpha: int | None = None, **kwargs: Any
) -> LoraConfig:
    """LoRA on the linear layers of the base's body, and training of the rows of the codes and the image specials.

    A plain `LoraConfig` leaves the embeddings and the head frozen: the rows of the codes then stay what they were
    when the vocabulary grew, and nothing says so. Here they are `trainable_token_indices`: in the embeddings, and,
    where the head is not tied to them, in the head too. The codec and all other rows are left alone, and of the
    embeddings a saved adapter holds these rows only. PEFT copies the whole table in each forward: to draw many
    pictures, `merge_and_unload()` first.

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
    require("peft", "An adapter")
    from peft import LoraConfig

    rows = _trainable_rows(model)
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
        ValueError, ImportError: As in [`liquid_lora_config`].
    """
    require("peft", "An adapter")
    from peft import TrainableTokensConfig

    rows = _trainable_rows(model)
    # As an expression: PEFT warns about names of tied embeddings in a list, though it keeps these tied.
    modules = "|".join(re.escape(name) for name in _row_modules(model))
    return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=rows, target_modules=modules)


def _trainable_rows(model: LiquidForCausalLM) -> list[int]:
    """The ids of the codes and of the image specials, after a check of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    require_version("peft>=0.18.1", "Older ones train the embeddings of a tied model without its head.")
    is_adapted = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())
    if is_adapted or not isinstance(model, LiquidForCausalLM):
        raise ValueError(
            f"The model must be a LiquidForCausalLM without adapters, got {type(model).__name__}"
            f"{' with adapters' if is_adapted else ''}. Load it with `LiquidForCausalLM.from_pretrained`, make one with "
            "`expand_vocabulary`, or `merge_and_unload()` the adapters that it has."
        )
    if model.get_output_embeddings().bias is not None:
        raise ValueError(
            f"The head of {type(model.model.text_model).__name__} has a bias, which PEFT leaves out of the logits when "
            "it trains single rows of a head. Train the whole model instead."
        )
    if not model.name_or_path:
        warnings.warn(
            "The model was not loaded from a repository, so its adapter cannot say what it belongs to, and is worth "
            "nothing without this very model. Save the model, and train what `from_pretrained` loads.",
            stacklevel=3,
        )
    layout = model.config.image_layout
    return sorted({*layout.special_image_token_ids, *layout.image_token_range})


def _row_modules(model: LiquidForCausalLM) -> list[str]:
    """The names of the modules with a row per token; a tied head follows the embeddings by itself."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]
