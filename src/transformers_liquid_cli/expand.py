"""`transformers-liquid expand`"""

from typing import Annotated, Literal

from typer import Argument, Option

from . import options


def expand(
    base: Annotated[str, Argument(help="A causal language model: a folder or a name on the Hub.")],
    codec: Annotated[str, Option(help="A saved LiquidVQModel, or a folder with vqgan.ckpt and vqgan.yaml.")],
    output: options.NewFolder,
    image_size: Annotated[int | None, Option(min=1, help="In pixels; the codec's unless given.")] = None,
    init: Annotated[Literal["mean", "normal"], Option(help="What new rows of the vocabulary begin as.")] = "mean",
    device: options.Device = None,
    dtype: options.DType = "auto",
    seed: options.Seed = 0,
) -> None:
    """Turns a language model and a codec into a Liquid model.

    \b
    Example:
      transformers-liquid expand Qwen/Qwen2.5-0.5B --codec path/to/codec --output qwen-liquid
    """
    options.check_new_folder(output)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from transformers_liquid import expand_vocabulary
    from transformers_liquid.models.liquid.reference import adapter_base, check_loading_info, load_codec, naming
    from transformers_liquid.utils.files import whole_folder

    from .models import find_device, silence_libraries

    silence_libraries()
    vq_model = load_codec(codec)
    with naming(base):
        if adapter_base(base) is not None:
            raise ValueError(f"{base} is an adapter: merge it into its base with PEFT (merge_and_unload), then expand.")
        kwargs = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
        base_model, info = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        check_loading_info(base, info | {"unexpected_keys": ()})  # such as heads for other tasks
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    base_model = base_model.to(find_device(device))
    model, processor = expand_vocabulary(base_model, tokenizer, vq_model, image_size=image_size, init=init, seed=seed)
    with whole_folder(output) as place:
        model.save_pretrained(place)
        processor.save_pretrained(place)
    ids = model.config.image_token_range
    print(f"{output}: {base} with image ids {ids.start} ... {ids.stop - 1}. Train it from there.")
