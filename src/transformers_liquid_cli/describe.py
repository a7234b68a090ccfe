"""`transformers-liquid describe`"""

import os
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from . import options


@options.shared(options.Written, options.Running)
def describe(
    images: Annotated[
        list[str],
        Argument(
            metavar="IMAGE",
            help="Files, URLs or - for standard input; behind them, what is asked about each, else captions are written. Or "
            "a folder, with --output.",
        ),
    ],
    framing: options.Framing = "pad",
    max_new_tokens: options.MaxNewTokens = 256,
    output: Annotated[
        Path | None,
        Option(
            help="For a folder: JSON lines of file_name and text, such as its metadata.jsonl. What has one is kept."
        ),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Pictures that are described together.")] = 8,
    as_json: options.Json = False,
    **given: Any,
) -> None:
    """Says what pictures show, or answers a question about each.

    \b
    Example:
      transformers-liquid describe apple.png "What colour is it?"
      transformers-liquid describe photos/ --output photos/metadata.jsonl
    """
    from transformers_liquid.data.source import names_picture

    *before, last = images
    is_picture = last == "-" or os.path.exists(last) or names_picture(last)
    question = last if before and not is_picture else None
    names = images if question is None else before
    given |= {"framing": framing, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "as_json": as_json}
    if len(names) == 1 and os.path.isdir(names[0]):
        from .captions import describe_folder

        describe_folder(Path(names[0]), output, question, given)
        return
    if output is not None:
        raise ValueError(f"--output is for the texts of a folder, got {', '.join(names)}.")
    from transformers_liquid.models.liquid.image_processing_liquid import open_image

    from .captions import describe_pictures
    from .pictures import read_picture

    for name in names[batch_size:]:  # what is behind the first batch is decoded later
        if name != "-" and not name.startswith(("http:", "https:", "data:")):
            open_image(name).close()
    for name, text in describe_pictures(names, read_picture, question, given):
        line = text if len(names) == 1 else f"{name}: {text}"
        options.tell({"file_name": name, "text": text} if as_json else line, as_json)
