"""`transformers-liquid app`"""

from typing import Annotated

from typer import Option

from . import options


def app(
    model: options.Model = None,
    host: Annotated[str, Option(help="Who may come: 0.0.0.0 lets in the whole network.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes the first free one from 7860 on.")] = 7860,
    device: options.Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Opens a page that draws, edits, answers questions about pictures, and tells stories. Ctrl-C ends it.

    \b
    Example:
      transformers-liquid app --port 7860
    """
    from transformers_liquid.utils.optional import require

    require("gradio", "The page", "app")
    from .models import load
    from .page import Page

    pipe = load(model, device, dtype)
    Page(pipe, model).launch(host, port)
