"""`transformers-liquid serve`"""

import socket
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from . import options


def serve(
    model: Annotated[str | None, Argument(help="A folder or a name on the Hub.")] = None,
    host: Annotated[str, Option(help="Who may come: 0.0.0.0 lets in the whole network.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, Option(envvar="TRANSFORMERS_LIQUID_API_KEY", help="What clients must send; none unless given.")
    ] = None,
    slots: Annotated[int, Option(min=1, help="Pictures that are drawn side by side.")] = 8,
    max_waiting: Annotated[int, Option(min=1, help="Pictures that may wait for them.")] = 64,
    compile: Annotated[
        bool, Option("--compile", help="Compile the step before the first picture, which takes a minute.")
    ] = False,
    device: options.Device = None,
    dtype: options.DType = "auto",
) -> None:
    """Serves pictures, edits and chat behind OpenAI's HTTP API. SIGTERM or Ctrl-C ends it when its work is done.

    \b
    Example:
      transformers-liquid serve path/to/model --port 8000
    """
    from transformers_liquid.utils.optional import require

    for library in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        require(library, "The server", "serve")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server(
        (host, port), family=family
    )  # what is taken is found out before the model is loaded
    from transformers_liquid import EMOJI_CHECKPOINT
    from transformers_liquid.serving.engine import PictureEngine
    from transformers_liquid.serving.server import serve

    from .models import load

    model = EMOJI_CHECKPOINT if model is None else model
    name = Path(model).resolve().name if Path(model).is_dir() else model
    engine = PictureEngine(load(model, device, dtype), slots, max_waiting, compile)
    print(f"http://{host}:{listening.getsockname()[1]}/v1 serves {name}.", flush=True)
    serve(engine, name, listening, api_key)
