"""`transformers-liquid story`"""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from . import options


@options.shared(options.Drawn, options.Written, options.Running)
def story(
    prompt: Annotated[str, Argument(help="How it begins.")],
    output: Annotated[Path, Option(writable=True, help="A new .md; its pictures go beside it.")] = Path("story.md"),
    max_images: Annotated[int | None, Option(min=1, help="Most pictures.", show_default="4, or what fits")] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    **given: Any,
) -> None:
    """Goes on from a beginning with text and pictures by turns, and writes both down.

    \b
    Example:
      transformers-liquid story "once there was a cat" --max-images 2 --seed 1 --output cat.md
    """
    options.check_new_story(output)
    options.check_greedy(given)
    import transformers

    from transformers_liquid import LiquidConversation
    from transformers_liquid.utils.files import write_text

    from .models import load
    from .pictures import Drawing, save_beside

    pipe, seed = load(given["model"], given["device"], given["dtype"]), given["seed"]
    settings = {"max_images": max_images, "max_new_tokens": max_new_tokens}
    settings |= Drawing(pipe, given).by_turns() | options.of_text(given)
    if seed is not None:
        transformers.set_seed(seed)
    converse = LiquidConversation(pipe.model, pipe.processor)
    written, events = prompt, converse.stream(prompt, seed=seed, **settings)
    print(prompt, end="", flush=True)
    for event in events:
        if event["type"] == "text":
            written += event["text"]
            print(event["text"], end="", flush=True)
        elif event["type"] == "image":
            path = save_beside(output, event["index"], event["image"])
            written += f"\n\n![]({path.name})\n\n"
            print(f"\n{path}")
    write_text(output, written.strip() + "\n")
    print(f"\n{output} ({event['reason']})")
