"""`transformers-liquid describe`"""

import os
import re
from typing import Annotated, Any

from typer import Argument

from . import options


# A path or an address of a picture: a question has spaces.
PICTURE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)|(https?|file|data):\S+", flags=re.IGNORECASE)


@options.shared(options.Running)
def describe(
    image: Annotated[str, Argument(help="A file or an URL.")],
    question: Annotated[str | None, Argument(help="Without one, a caption is written.")] = None,
    framing: options.Framing = "pad",
    max_new_tokens: options.MaxNewTokens = 256,
    **given: Any,
) -> None:
    """Says what one picture shows, or answers a question about it.

    \b
    Example:
      transformers-liquid describe apple.png "What colour is it?"
    """
    if question is not None and (os.path.exists(question) or PICTURE.fullmatch(question)):
        raise ValueError(f"{question} is a picture or a file, not a question: describe reads one picture at a time.")
    import torch

    from transformers_liquid.models.liquid.image_processing_liquid import load_image

    from .models import load, write_answer

    picture = load_image(image)
    pipe = load(given["model"], given["device"], given["dtype"])
    ids = pipe.processor.caption_ids() if question is None else pipe.processor.question_ids(question)
    inputs = pipe.processor.image_processor(picture, framing=framing)
    print(write_answer(pipe, max_new_tokens, given["seed"], input_ids=torch.tensor([ids]), **inputs).strip())
