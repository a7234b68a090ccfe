"""`transformers-liquid expand`"""

import os
from typing import Annotated, Literal

from typer import Argument, Option

from . import options


def expand(
    base: Annotated[str, Argument(help="A causal language model: a folder, a name on the Hub, or a .gguf file.")],
    codec: Annotated[
        str,
        Option(help="liquid-emoji, chameleon, or a file, a folder or a name on the Hub, such as amused/amused-256."),
    ],
    output: options.NewFolder,
    image_size: Annotated[int | None, Option(min=1, help="In pixels; the codec's unless given.")] = None,
    init: Annotated[
        Literal["codebook", "normal", "mean"],
        Option(
            help="What new rows of the vocabulary begin as: drawn like the base's rows (normal), and alike for codes that "
            "look alike (codebook), or all the same (mean)."
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
    if gguf_file is None and base.endswith(".gguf"):
        base, gguf_file = os.path.split(base)
        base = base or "."
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from transformers_liquid import expand_vocabulary
    from transformers_liquid.codecs.loading import find_codec
    from transformers_liquid.codecs.vq_model import code_grid, downsample_factor
    from transformers_liquid.conversion.expand import base_obstacle
    from transformers_liquid.models.liquid.reference import adapter_base, check_loading_info
    from transformers_liquid.utils.files import whole_folder
    from transformers_liquid.utils.hub import naming
    from transformers_liquid.utils.optional import require

    from .models import find_device, silence_libraries

    silence_libraries()
    # All that can be found out without weights
    found, place = find_codec(codec), find_device(device)
    size = found.config["sample_size"] if image_size is None else image_size
    code_grid(size, size, downsample_factor(found.config))
    with naming(base):
        if adapter_base(base) is not None:
            raise ValueError(f"{base} is an adapter: merge it into its base (transformers-liquid merge), then expand.")
        source = {"trust_remote_code": False}
        if gguf_file is not None:
            require("gguf", "A GGUF file")
            source["gguf_file"] = gguf_file
        config = AutoConfig.from_pretrained(base, **source)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{base} is of model type {config.model_type!r}, which is no causal language model.")
        tokenizer = AutoTokenizer.from_pretrained(base, **source)
        with torch.device("meta"):
            problem = base_obstacle(AutoModelForCausalLM.from_config(config), tokenizer)
        if problem is not None:
            raise ValueError(problem)
        base_model, info = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True, **source)
        check_loading_info(base, info | {"unexpected_keys": ()})  # such as heads for other tasks
    vq_model = found.load()
    base_model = base_model.to(place)
    model, processor = expand_vocabulary(base_model, tokenizer, vq_model, image_size=image_size, init=init, seed=seed)
    with whole_folder(output) as place:
        model.save_pretrained(place)
        processor.save_pretrained(place)
    ids = model.config.image_token_range
    print(f"{output}: {base} with image ids {ids.start} ... {ids.stop - 1}. Train it from there.")
