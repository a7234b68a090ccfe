"""Fills the card that every saved pipeline with vokens carries."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from ..liquid.model_card import write_card


def write_pipeline_card(components: dict[str, Any], directory: str | Path, name: str | None = None) -> None:
    """Writes `README.md` into a saved pipeline's repository, unless one is there: see [`write_card`].

    Args:
        components (`dict`): Of the pipeline.
        directory (`str` or `Path`): Where it is saved.
        name (`str`, *optional*): What the repository is called. Defaults to the name of the directory.
    """
    model = components["model"]
    template = Template((Path(__file__).parent / "model_card_template.md").read_text(encoding="utf-8"))
    denoiser = components["transformer"] if components["unet"] is None else components["unet"]
    config = model.config
    pooled = config.pooled_condition_dim
    text = template.substitute(
        config.to_dict(),
        name=name or Path(directory).resolve().name,
        base=config.text_config.model_type,
        parameters=f"{model.num_parameters():,}",
        mapper_parameters=f"{sum(one.numel() for one in model.feature_mapper.parameters()):,}",
        denoiser=type(denoiser).__name__,
        number=len(config.voken_token_ids),
        pooled="" if pooled is None else f", and a pooled one of {pooled}",
    )
    write_card(text, directory)
