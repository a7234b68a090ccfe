"""`transformers-liquid convert`"""

from typing import Annotated

from typer import Argument, Option

from . import options


def convert(
    model: Annotated[str, Argument(help="A checkpoint in the reference's layout or in ours.")],
    output: options.NewFolder,
    vq_checkpoint: Annotated[str | None, Option(help="The codec of a reference checkpoint.")] = None,
    to_base: Annotated[bool, Option("--to-base", help="A plain language model, as the reference has it.")] = False,
    to_taming: Annotated[bool, Option("--to-taming", help="The codec alone, as vqgan.ckpt and vqgan.yaml.")] = False,
    device: options.Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Writes a checkpoint in another layout. Without an option it becomes a complete Liquid repository.

    \b
    Example:
      transformers-liquid convert Junfeng5/Liquid_V1_7B --output liquid-7b
    """
    if to_base and to_taming:
        raise ValueError("--to-base and --to-taming name two layouts: give one of them.")
    options.check_new_folder(output)
    from transformers_liquid import export_base_model, save_taming_codec
    from transformers_liquid.utils.files import whole_folder

    from .models import load

    codec = {} if vq_checkpoint is None else {"vq_checkpoint": vq_checkpoint}  # a tokenizer would keep None
    pipe = load(model, device, dtype, merge=True, **codec)
    with whole_folder(output) as place:
        if to_base:
            export_base_model(pipe.model, pipe.processor, place)
            what = f"a plain {pipe.model.config.text_config.model_type}, its codec beside it"
        elif to_taming:
            save_taming_codec(pipe.model.model.vq_model, place)
            what = "the codec as taming-transformers keeps it"
        else:
            pipe.save_pretrained(place)
            what = "a complete Liquid repository"
    print(f"{output}: {what}.")
