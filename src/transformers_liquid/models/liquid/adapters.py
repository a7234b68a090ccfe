"""Adapters (PEFT) on disk: loaded whole onto their base, and saved with a card that says what they belong to."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from ...checkpoints import EMOJI_CHECKPOINT
from .model_card import write_card
from .reference import check_loading_info


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel, adapter: str, is_trainable: bool = False) -> PeftModel:
    """Puts a saved adapter onto its base, in place.

    Args:
        model ([`LiquidForCausalLM`]): The base.
        adapter (`str`): A folder or a name on the Hub.
        is_trainable (`bool`, defaults to `False`): Whether it is to be trained on.

    Raises:
        ValueError: If the adapter is of another model, or is not whole.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = not is_trainable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own calls
        try:
            # As `PeftModel.from_pretrained` does it, which does not tell what the file holds beyond the configuration.
            adapted = PeftModel(model, config, autocast_adapter_dtype=is_trainable)
            info = adapted.load_adapter(
                adapter, "default", is_trainable=is_trainable, autocast_adapter_dtype=is_trainable
            )
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"The adapter {adapter} does not fit {model.name_or_path}: it was trained on another model. {error}"
            ) from error
    found = {"missing_keys": info.missing_keys, "unexpected_keys": info.unexpected_keys, "mismatched_keys": ()}
    check_loading_info(f"The adapter {adapter}", found)
    return adapted


def adapter_kind(adapter: str) -> str:
    """What a saved adapter trains, in the words of `train --trainable`: `"lora"`, or `"rows"` alone."""
    from peft import PeftConfig

    return "rows" if PeftConfig.from_pretrained(adapter).peft_type == "TRAINABLE_TOKENS" else "lora"


def write_adapter_card(config: PeftConfig, base: PreTrainedModel, directory: str | Path) -> None:
    """Writes the card of a saved adapter as `README.md`, unless one is there that was written by hand.

    Args:
        config (`PeftConfig`): The adapter's.
        base ([`LiquidForCausalLM`]): What it was trained on.
        directory (`str` or `Path`): Where it is saved.
    """
    name = config.base_model_name_or_path or base.name_or_path
    is_on_hub = name.count("/") == 1 and not os.path.exists(name)
    if not is_on_hub and name:
        # Of a path, no more than helps on another machine: where the base lies beside the adapter.
        *up, last = Path(os.path.relpath(name, directory)).parts
        is_beside = set(up) == {".."} and Path(name).resolve() != Path(EMOJI_CHECKPOINT).resolve()
        name = "/".join([*up, last]) if is_beside else last
    rows = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
    rank = f"LoRA of rank {config.r}" if getattr(config, "r", None) else ""
    trained = f"{len(rows):,} rows of the vocabulary" if rows else ""
    template = Path(__file__).parent / "adapter_card_template.md"
    text = Template(template.read_text(encoding="utf-8")).substitute(
        base_metadata=f"base_model: {name}\n" if is_on_hub else "",
        name=Path(directory).resolve().name,
        base=f"`{name}`" if name else "a model that was not saved before",
        kind=" and ".join(filter(None, (rank, trained))) or config.peft_type.value,
    )
    write_card(text, directory)


def write_cards_of_our_own() -> None:
    """Has PEFT write [`write_adapter_card`] beside adapters of this package's models: its own names paths and empty fields."""
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
