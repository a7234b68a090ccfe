"""`transformers-liquid chat`"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from . import options


def chat(
    output: Annotated[Path, Option(help="The folder where drawn pictures go.")] = Path(),
    negative_prompt: options.NegativePrompt = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_min_p: options.GuidanceMinP = None,
    speculative: options.Speculative = None,
    greedy: options.Greedy = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    max_new_tokens: options.MaxNewTokens = 256,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    seed: options.Seed = None,
) -> None:
    """Talks on the terminal, with pictures in both directions: the model draws where it begins a picture itself.

    \b
    Example:
      transformers-liquid chat --model path/to/model
    """
    given = dict(locals())
    options.check_writable(output, folder=True)
    import transformers

    from transformers_liquid import LiquidConversation
    from transformers_liquid.models.liquid.image_processing_liquid import load_image

    from .models import load
    from .pictures import Drawing, in_order

    pipe = load(model, device, dtype)
    pipe.set_progress_bar_config(disable=None, leave=False)
    drawing = Drawing(pipe, given)
    converse = LiquidConversation(pipe.model, pipe.processor)
    messages, images = [], []

    def new_path() -> Path:
        paths = (output / f"drawing-{number}.png" for number in itertools.count())
        return next(path for path in paths if not path.exists())

    print("/image PATH shows a picture, /draw PROMPT draws one, /new starts over, /quit ends.")
    while sys.stdin is not None:  # closed
        try:
            command, _, rest = (line := input("> ").strip()).partition(" ")
            if command == "/quit":
                return
            elif command == "/new":
                messages, images = [], []
            elif command == "/image":
                images.append({"type": "image", "image": load_image(rest.strip())})
            elif command == "/draw":
                for picture in drawing.draw(in_order([rest.strip()], 1, seed, new_path())):
                    print(picture.path)
            elif command.startswith("/"):
                print(f"error: There is no {command}: only /image PATH, /draw PROMPT, /new and /quit.")
            elif line:
                pipe.processor.check_plain(line)
                asked = [*messages, {"role": "user", "content": [*images, {"type": "text", "text": line}]}]
                if seed is not None:
                    transformers.set_seed(seed)
                answer = _reply(converse, asked, new_path, drawing, seed=seed, max_new_tokens=max_new_tokens)
                messages = [*asked, {"role": "assistant", "content": answer}]
                images = []
        except EOFError:
            return
        except Exception as error:  # the conversation goes on
            print(f"error: {options.one_line(error)}")


def _reply(converse: Any, messages: list, new_path: Callable[[], Path], drawing: Any, **settings: Any) -> list[dict]:
    """Prints a reply as it comes, writes its pictures, and returns its parts."""
    from transformers_liquid.pipelines.conversation import add_event

    pictures, parts = drawing.settings | drawing.shared, []
    shared = {name: pictures.pop(name) for name in drawing.shared}
    for event in converse.stream(messages, image_generation_config=pictures, **shared, **settings):
        if event["type"] == "text":
            print(event["text"], end="", flush=True)
        elif event["type"] == "image":
            path = new_path()
            event["image"].save(path)
            print(f"\n{path}")
        add_event(parts, event)
    print()
    return parts
