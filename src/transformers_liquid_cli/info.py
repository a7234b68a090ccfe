"""`transformers-liquid info`"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from . import options


def info(
    picture: Annotated[Path | None, Argument(help="A PNG of `generate`: how it was drawn.")] = None,
    model: options.Model = None,
    as_json: options.Json = False,
) -> None:
    """Prints what a checkpoint is, or how a picture was drawn. It reads no weights.

    \b
    Example:
      transformers-liquid info --model Junfeng5/Liquid_V1_7B
    """
    if picture is not None:
        from .pictures import read_metadata

        record = read_metadata(picture)
        if not as_json:
            print(json.dumps(record, indent=2, ensure_ascii=False))
            return
        for one in record if isinstance(record, list) else [record]:
            options.tell(one)
        return
    facts = _facts(model)
    if as_json:
        options.tell(facts)
        return
    (height, width), factor, known = facts["grid"], facts["downsample_factor"], facts["known_words"]
    first, codes = facts["image_token_offset"], facts["codebook_size"]
    adapter = "" if facts["adapter_of"] is None else f"adapter of {facts['adapter_of']}, "
    layers = f"{facts['num_layers']} layers of {facts['hidden_size']}, {facts['positions'] or 'unlimited'} positions"
    words = (
        "any words" if known is None else f"{len(known):,} words, such as {', '.join(known[:: len(known) // 24 + 1])}"
    )
    lines = {
        "checkpoint": f"{facts['model']} ({adapter}{facts['layout']} layout)",
        "base model": f"{facts['base_model']}, {layers}",
        "parameters": f"{facts['num_parameters']:,} + {facts['num_codec_parameters']:,} of the codec",
        "vocabulary": f"{facts['vocab_size']:,} rows, image ids {first} ... {first + codes - 1}",
        "special ids": ", ".join(f"{name} {value}" for name, value in facts["special_ids"].items()),
        "codec": f"{codes:,} codes, {factor} x {factor} pixels each",
        "picture": f"{height * factor} x {width * factor} pixels = {height} x {width} codes",
        "settings": ", ".join(f"{name}={value}" for name, value in facts["settings"].items()),
        "knows": words,
        "card": "none" if facts["card"] is None else facts["card"],
    }
    options.tell_lines(lines)


def _facts(model: str | None) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME, PROCESSOR_NAME, cached_file

    from transformers_liquid import LiquidConfig, LiquidForCausalLM
    from transformers_liquid.checkpoints import find_checkpoint
    from transformers_liquid.generation.settings import ImageGenerationConfig
    from transformers_liquid.models.liquid.reference import ReferenceCheckpoint, adapter_base
    from transformers_liquid.utils.files import read_json, read_text

    from .models import reading, silence_libraries

    silence_libraries()
    name = find_checkpoint(model)
    with reading(name):
        base = adapter_base(name)
        reference = ReferenceCheckpoint.find(base or name)
        config = LiquidConfig.from_pretrained(base or name) if reference is None else reference.config
        with torch.device("meta"):
            empty = LiquidForCausalLM(config)
        optional = {"_raise_exceptions_for_missing_entries": False}
        has_settings = cached_file(base or name, GENERATION_CONFIG_NAME, **optional) is not None
        stored = GenerationConfig.from_pretrained(base or name) if has_settings else None
        settings, _ = ImageGenerationConfig.from_call(stored, None, {})
        card = cached_file(name, "README.md", **optional)
        processor = cached_file(base or name, PROCESSOR_NAME, **optional)
    of_codec, text = empty.model.vq_model.num_parameters(), config.get_text_config()
    special = {"boi": config.boi_token_id, "eoi": config.eoi_token_id, "unconditional": config.uncond_token_id}
    return {
        "model": name,
        "layout": "liquid" if reference is None else "reference",
        "adapter_of": base,
        "base_model": text.model_type,
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "positions": getattr(text, "max_position_embeddings", None),
        "num_parameters": empty.num_parameters() - of_codec,
        "num_codec_parameters": of_codec,
        "vocab_size": text.vocab_size,
        "image_token_offset": config.image_token_range.start,
        "codebook_size": config.codebook_size,
        "special_ids": special | {"placeholder": config.image_token_id},
        "downsample_factor": config.downsample_factor,
        "grid": list(config.grid()),
        "settings": settings.to_dict(),
        "known_words": None if processor is None else read_json(processor).get("known_words"),
        "card": None if card is None else _first_paragraph(read_text(card)),
    }


def _first_paragraph(card: str) -> str:
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    paragraphs = (part for part in re.split(r"\n\s*\n", text) if part.strip() and not part.lstrip().startswith("#"))
    return " ".join(next(paragraphs, "empty").split())
