"""Adapters (PEFT): loaded whole or not at all, and saved with a card that says what they belong to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ...ops.adapter_rows import combine_rows_too
from ...ops.merged_adapters import unload_adapters
from .model_card import write_adapter_card
from .reference import check_loading_info


if TYPE_CHECKING:
    from peft import PeftModel

    from .modeling_liquid import LiquidPreTrainedModel


def load_whole_adapter(
    load: Callable[..., Any], model: LiquidPreTrainedModel, adapter: Any, *args: Any, **kwargs: Any
) -> Any:
    """The loading info of transformers' `load_adapter`, which draws what is missing at random.

    Raises:
        ValueError: If weights of the adapter are missing, or are not the model's, which then stays as it was.
    """
    is_first, conversions = not model._hf_peft_config_loaded, getattr(model, "_weight_conversions", None)
    before = dict(model.named_parameters())
    logger = logging.get_logger("transformers.integrations.peft")
    try:
        logger.disabled = True  # it reports trained rows of a tied head as missing: they are the embeddings'
        info = load(adapter, *args, **kwargs)
        info.missing_keys = info.missing_keys & (dict(model.named_parameters()).keys() - before)
        check_loading_info(f"The adapter {adapter}", vars(info))
    except (ValueError, RuntimeError, IndexError) as error:
        if is_first:
            unload_adapters(model, merge=False)
        raise ValueError(
            f"The adapter {adapter} does not fit {model.name_or_path}, or is not whole. {error}"
        ) from error
    finally:
        logger.disabled = False
        model._weight_conversions = conversions  # the adapter's would be undone where the whole model is saved
    return info


def adjust_peft() -> None:
    """Before a model gets its first adapter: PEFT's sums of adapters combine rows too, and of this package's models it writes
    [`write_adapter_card`], since its own card names paths and empty fields."""
    combine_rows_too()
    from peft import PeftModel

    from .modeling_liquid import LiquidPreTrainedModel

    write = PeftModel.create_or_update_model_card
    if hasattr(write, "__wrapped__"):
        return

    @functools.wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if isinstance(base := self.get_base_model(), LiquidPreTrainedModel):
            write_adapter_card(self.active_peft_config, base, output_dir)
        else:
            write(self, output_dir)

    PeftModel.create_or_update_model_card = create_or_update_model_card
