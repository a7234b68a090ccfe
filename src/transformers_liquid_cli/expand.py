"""`transformers-liquid expand`"""

import os
from typing import Annotated, Any, Literal

from typer import Argument, Option

from . import options


def expand(
    base: Annotated[str, Argument(help="A causal language model: a folder, a name on the Hub, or a .gguf file.")],
    codec: Annotated[
        str, Option(help="liquid-emoji, chameleon, or a file, a folder, a name on the Hub (docs/codecs.md).")
    ],
    output: options.NewFolder,
    image_size: Annotated[int | None, Option(min=1, help="In pixels; the codec's unless given.")] = None,
    init: Annotated[
        Literal["codebook", "normal", "mean"],
        Option(
            help="New rows of the vocabulary are drawn (normal), alike for like codes (codebook), or all one (mean)."
        ),
    ] = "codebook",
    gguf_file: Annotated[
        str | None, Option("--gguf-file", "--gguf_file", help="The file to take of a base that has such.")
    ] = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    seed: options.Seed = 0,
) -> None:
    """Turns a language model and a codec into a Liquid model.

    \b
    Example:
      transformers-liquid expand Qwen/Qwen2.5-0.5B --codec amused/amused-256 --output qwen-liquid
    """
    options.check_new_folder(output)
    from transformers_liquid import expand_vocabulary, load_codec
    from transformers_liquid.codecs.vq_model import code_grid
    from transformers_liquid.utils.files import whole_folder

    from .models import find_device, silence_libraries

    silence_libraries()
    vq_model, place = load_codec(codec), find_device(device)
    if image_size is not None:
        code_grid(image_size, image_size, vq_model.downsample_factor)
    base_model, tokenizer = _load_base(base, gguf_file, dtype)
    base_model = base_model.to(place)
    model, processor = expand_vocabulary(base_model, tokenizer, vq_model, image_size=image_size, init=init, seed=seed)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{output}: {base} with {model.config.image_layout.place}. Train it from there.")


def _load_base(base: str, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer; what keeps them from being expanded is found out before weights are read."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from transformers_liquid.codecs.vq_model import check_loading_info
    from transformers_liquid.conversion.expand import base_obstacle
    from transformers_liquid.models.liquid.reference import adapter_base
    from transformers_liquid.utils.hub import naming
    from transformers_liquid.utils.optional import require

    given, source = base, {"trust_remote_code": False}
    if gguf_file is None and base.endswith(".gguf"):
        folder, gguf_file = os.path.split(base)
        base = folder or "."
    if gguf_file is not None:
        require("gguf", "A GGUF file")
        source["gguf_file"] = gguf_file
    elif adapter_base(base) is not None:
        raise ValueError(f"{base} is an adapter: merge it into its base (transformers-liquid merge), then expand.")
    with naming(given):
        config = AutoConfig.from_pretrained(base, **source)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{base} is of model type {config.model_type!r}, which is no causal language model.")
        tokenizer = AutoTokenizer.from_pretrained(base, **source)
        with torch.device("meta"):
            problem = base_obstacle(AutoModelForCausalLM.from_config(config), tokenizer)
        if problem is not None:
            raise ValueError(problem)
        model, info = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True, **source)
        check_loading_info(base, info | {"unexpected_keys": ()})  # such as heads for other tasks
    return model, tokenizer
