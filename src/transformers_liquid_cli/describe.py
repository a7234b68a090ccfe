"""`transformers-liquid describe`"""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from . import options


# A path or an address of a picture: a question has spaces.
PICTURE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)|(https?|file|data):\S+", flags=re.IGNORECASE)


@options.shared(options.Running)
def describe(
    image: Annotated[str, Argument(help="A file or an URL; or a folder, with --output.")],
    question: Annotated[str | None, Argument(help="Without one, a caption is written.")] = None,
    framing: options.Framing = "pad",
    max_new_tokens: options.MaxNewTokens = 256,
    output: Annotated[
        Path | None,
        Option(
            help="For a folder: JSON lines of file_name and text, such as its metadata.jsonl. What has one is kept."
        ),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Pictures of a folder that are described together.")] = 8,
    **given: Any,
) -> None:
    """Says what one picture shows, or answers a question about it; or does so for each picture of a folder.

    \b
    Example:
      transformers-liquid describe apple.png "What colour is it?"
      transformers-liquid describe photos/ --output photos/metadata.jsonl
    """
    if question is not None and (os.path.exists(question) or PICTURE.fullmatch(question)):
        raise ValueError(f"{question} is a picture or a file, not a question: describe reads one picture at a time.")
    if os.path.isdir(image):
        from .captions import describe_folder

        given["max_new_tokens"] = max_new_tokens
        describe_folder(Path(image), output, question, framing, batch_size, given)
        return
    if output is not None:
        raise ValueError(f"--output is for the texts of a folder, got {image}.")
    import torch

    from transformers_liquid.models.liquid.image_processing_liquid import load_image

    from .models import load, write_answers

    picture = load_image(image)
    pipe = load(given["model"], given["device"], given["dtype"])
    ids = pipe.processor.caption_ids() if question is None else pipe.processor.question_ids(question)
    inputs = pipe.processor.image_processor(picture, framing=framing)
    print(*write_answers(pipe, max_new_tokens, given["seed"], input_ids=torch.tensor([ids]), **inputs))
