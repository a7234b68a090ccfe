"""Fills the card that every saved repository carries."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from ...checkpoints import EMOJI_CHECKPOINT
from ...generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG


if TYPE_CHECKING:
    from peft import PeftConfig

    from .modeling_liquid import LiquidPreTrainedModel

# What the empty card says that transformers, or diffusers, puts into a repository when it pushes one without a card.
GENERATED_BY_TRANSFORMERS = "This model card has been automatically generated."


def model_card(model: LiquidPreTrainedModel, name: str) -> str:
    """The card of a model as Markdown with YAML metadata, filled from its configuration.

    Args:
        model ([`LiquidPreTrainedModel`]): The model that is saved.
        name (`str`): What the repository is called.
    """
    config, vq_config = model.config, model.config.vq_config
    text_config = config.get_text_config()
    grid_height, grid_width = config.grid()
    base = text_config.name_or_path
    settings = getattr(model.generation_config, "image_generation_config", None) if model.can_generate() else None
    image_ids, several = config.image_token_range, config.num_codebooks > 1
    return Template((Path(__file__).parent / "model_card_template.md").read_text(encoding="utf-8")).substitute(
        # A path on the machine that trained it helps nobody.
        base_metadata=f"base_model: {base}\n" if base.count("/") == 1 and not Path(base).exists() else "",
        name=name,
        base=f"`{text_config.model_type}`" + (f" (`{base}`)" if base.count("/") == 1 else ""),
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        codec=(
            f"a VQ codec with {f'{config.num_codebooks} codes a position, each one of ' if several else ''}"
            f"{config.codebook_size:,} codes of {vq_config.get('vq_embed_dim')} channels, "
            f"{config.downsample_factor} × {config.downsample_factor} pixels per code"
        ),
        grid=f"{grid_height} × {grid_width} = {grid_height * grid_width}",
        vocab_size=f"{text_config.vocab_size:,}",
        image_ids="none (a head beside the vocabulary draws the codes)"
        if several
        else f"{image_ids.start} … {image_ids.stop - 1}, in the order of the codes",
        **dataclasses.asdict(config.image_layout),
        settings=", ".join(f"`{key}={value}`" for key, value in (settings or DEFAULT_IMAGE_GENERATION_CONFIG).items()),
    )


def write_model_card(model: LiquidPreTrainedModel, directory: str | Path, name: str | None = None) -> None:
    """Writes `README.md` into a saved repository, unless one is there: a card written by hand is never replaced.

    A model that has adapters saves these alone.

    Args:
        model ([`LiquidPreTrainedModel`]): The model that is saved.
        directory (`str` or `Path`): Where it is saved.
        name (`str`, *optional*): What the repository is called. Defaults to the name of the directory.
    """
    if model._hf_peft_config_loaded:
        return write_adapter_card(model.peft_config[model.active_adapters()[0]], model, directory)
    write_card(model_card(model, name or Path(directory).resolve().name), directory)


def write_adapter_card(config: PeftConfig, base: LiquidPreTrainedModel, directory: str | Path) -> None:
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
    template = Path(__file__).parent / "adapter_card_template.md"
    text = Template(template.read_text(encoding="utf-8")).substitute(
        base_metadata=f"base_model: {name}\n" if is_on_hub else "",
        name=Path(directory).resolve().name,
        base=f"`{name}`" if name else "a model that was not saved before",
        kind=config.peft_type.value,
    )
    write_card(text, directory)


def write_card(text: str, directory: str | Path) -> None:
    """Writes a card as `README.md`, unless one is there that was written by hand."""
    path = Path(directory) / "README.md"
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if GENERATED_BY_TRANSFORMERS not in before:
            return
        tags = [f"- {tag}\n" for tag in ModelCard(before).data.tags or []]
        text = text.replace("tags:\n", "tags:\n" + "".join(tag for tag in tags if tag not in text), 1)
    path.write_text(text, encoding="utf-8")
