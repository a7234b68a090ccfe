"""`transformers-liquid merge`"""

from typing import Annotated

from typer import Argument, Option

from . import options


def merge(
    adapter: Annotated[str, Argument(help="A folder or a name on the Hub.")],
    output: options.NewFolder,
    base: Annotated[str | None, Option(help="Where its base lies, if not where the adapter says.")] = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Writes the model that an adapter makes of its base, as a complete Liquid repository.

    \b
    Example:
      transformers-liquid merge my-lora --output my-model
    """
    options.check_new_folder(output)
    from transformers_liquid.models.liquid.reference import adapter_base
    from transformers_liquid.utils.files import whole_folder

    from .models import load

    if adapter_base(adapter) is None:
        raise ValueError(f"{adapter} is no adapter, it has no adapter_config.json: there is nothing to merge.")
    pipe = load(adapter, device, dtype, merge=True, base=base)
    with whole_folder(output) as place:
        pipe.save_pretrained(place)
    print(f"{output}: a complete Liquid repository.")
