"""`transformers-liquid merge`"""

from typing import Annotated

from typer import Argument

from . import options
from .convert import convert


def merge(
    adapter: Annotated[str, Argument(help="A folder or a name on the Hub.")],
    output: options.NewFolder,
    device: options.Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Writes the model that an adapter makes of its base, as a complete Liquid repository.

    \b
    Example:
      transformers-liquid merge my-lora --output my-model
    """
    from transformers_liquid.models.liquid.reference import adapter_base

    if adapter_base(adapter) is None:
        raise ValueError(f"{adapter} is no adapter, it has no adapter_config.json: there is nothing to merge.")
    convert(adapter, output, device=device, dtype=dtype)
