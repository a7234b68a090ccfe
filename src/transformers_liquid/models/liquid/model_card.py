"""Fills the card that every saved repository carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from ...generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG


if TYPE_CHECKING:
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
    image_ids = config.image_token_range
    return Template((Path(__file__).parent / "model_card_template.md").read_text(encoding="utf-8")).substitute(
        # A path on the machine that trained it helps nobody.
        base_metadata=f"base_model: {base}\n" if base.count("/") == 1 and not Path(base).exists() else "",
        name=name,
        base=f"`{text_config.model_type}`" + (f" (`{base}`)" if base.count("/") == 1 else ""),
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        codec=(
            f"a VQ codec with {config.codebook_size:,} codes of {vq_config.get('vq_embed_dim')} channels, "
            f"{config.downsample_factor} × {config.downsample_factor} pixels per code"
        ),
        grid=f"{grid_height} × {grid_width} = {grid_height * grid_width}",
        vocab_size=f"{text_config.vocab_size:,}",
        image_ids=f"{image_ids.start} … {image_ids.stop - 1}",
        **dataclasses.asdict(config.image_layout),
        settings=", ".join(f"`{key}={value}`" for key, value in (settings or DEFAULT_IMAGE_GENERATION_CONFIG).items()),
    )


def write_model_card(model: LiquidPreTrainedModel, directory: str | Path, name: str | None = None) -> None:
    """Writes `README.md` into a saved repository, unless one is there: a card written by hand is never replaced.

    Args:
        model ([`LiquidPreTrainedModel`]): The model that is saved.
        directory (`str` or `Path`): Where it is saved.
        name (`str`, *optional*): What the repository is called. Defaults to the name of the directory.
    """
    write_card(model_card(model, name or Path(directory).resolve().name), directory)


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
