"""`transformers-liquid info`"""

import json
import re
from pathlib import Path
from typing import Annotated

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
        _tell_picture(picture, as_json)
        return
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
        card = None if card is None else _first_paragraph(read_text(card))
        processor = cached_file(base or name, PROCESSOR_NAME, **optional)
        known = None if processor is None else read_json(processor).get("known_words")
    of_codec = empty.model.vq_model.num_parameters()
    text, factor = config.get_text_config(), config.downsample_factor
    positions = getattr(text, "max_position_embeddings", "unlimited")
    height, width = config.grid()
    if as_json:
        facts = {"model": name, "layout": "liquid" if reference is None else "reference", "adapter_of": base}
        facts |= {"num_parameters": empty.num_parameters() - of_codec, "num_codec_parameters": of_codec}
        facts |= {"height": height * factor, "width": width * factor, "settings": settings.to_dict(), "card": card}
        options.tell(facts | {"known_words": known, "config": config.to_dict()})
        return
    layout = ("" if base is None else f"adapter of {base}, ") + ("liquid" if reference is None else "reference")
    lines = {
        "checkpoint": f"{name} ({layout} layout)",
        "base model": f"{text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}, {positions} positions",
        "parameters": f"{empty.num_parameters() - of_codec:,} + {of_codec:,} of the codec",
        "vocabulary": f"{text.vocab_size:,} rows, {config.image_layout.place}",
        "special ids": f"boi {config.boi_token_id}, eoi {config.eoi_token_id}, unconditional {config.uncond_token_id}, "
        f"placeholder {config.image_token_id}",
        "codec": f"{f'{config.num_codebooks} x ' * bool(config.image_layout.of_position)}{config.codebook_size:,} codes, {factor} x {factor} pixels each",
        "picture": f"{height * factor} x {width * factor} pixels = {height} x {width} codes",
        "settings": ", ".join(f"{name}={value}" for name, value in settings.to_dict().items()),
        "knows": "any words"
        if known is None
        else f"{len(known):,} words, such as {', '.join(known[:: len(known) // 24 + 1])}",
        "card": card or "none",
    }
    options.tell_lines(lines)


def _tell_picture(picture: Path, as_json: bool) -> None:
    from .pictures import read_metadata

    record = read_metadata(picture)
    for one in record if as_json and isinstance(record, list) else [record]:  # of a sheet
        options.tell(one if as_json else json.dumps(one, indent=2, ensure_ascii=False), as_json)


def _first_paragraph(card: str) -> str:
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    paragraphs = (part for part in re.split(r"\n\s*\n", text) if part.strip() and not part.lstrip().startswith("#"))
    return " ".join(next(paragraphs, "empty").split())
