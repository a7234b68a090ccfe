"""`transformers-liquid chat`"""

import atexit
import itertools
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from . import options


COMMANDS = {
    "/image PATH": "shows a picture, beside what is written next",
    "/draw PROMPT": "draws a picture, which stays in the conversation",
    "/new": "starts over",
    "/help": "says this",
    "/quit": "ends, as Ctrl-D does",
}
HELP = "\n".join(f"{command:<13} {what}" for command, what in COMMANDS.items())


@options.shared(options.Drawn, options.Written, options.Running)
def chat(
    output: Annotated[Path, Option(help="The folder where drawn pictures go.")] = Path(),
    max_new_tokens: options.MaxNewTokens = 256,
    **given: Any,
) -> None:
    """Talks on the terminal, with pictures in both directions: the model draws where it begins a picture itself.

    \b
    Example:
      transformers-liquid chat --model path/to/model
    """
    options.check_greedy(given)
    options.check_writable(output, folder=True)
    options.session.after_interrupt = f"Pictures stay in {output}; /quit ends a conversation."
    import transformers

    from transformers_liquid import LiquidConversation
    from transformers_liquid.models.liquid.image_processing_liquid import load_image

    from .models import load
    from .pictures import Drawing, in_order

    pipe, seed = load(given["model"], given["device"], given["dtype"]), given["seed"]
    pipe.set_progress_bar_config(disable=None, leave=False)
    drawing = Drawing(pipe, given)
    converse = LiquidConversation(pipe.model, pipe.processor)
    settings = {"max_new_tokens": max_new_tokens, **drawing.by_turns(), **options.of_text(given)}
    messages, images = [], []

    def new_path() -> Path:
        paths = (output / f"drawing-{number}.png" for number in itertools.count())
        return next(path for path in paths if not path.exists())

    if known := pipe.processor.known_words:
        print(
            f"A small model: it draws and names what it has one of {len(known)} words for. A conversation is beyond it."
        )
    print("/image PATH shows a picture, /draw PROMPT draws one, /help lists all commands, /quit ends.")
    if sys.stdin is not None and sys.stdin.isatty():
        remember_lines()
    while sys.stdin is not None:  # closed
        try:
            command, _, rest = (line := input("> ").strip()).partition(" ")
            if command == "/quit":
                return
            elif command == "/help":
                print(HELP)
            elif command == "/new":
                messages, images = [], []
            elif command == "/image":
                images.append({"type": "image", "image": load_image(rest.strip())})
            elif command == "/draw":
                for picture in drawing.draw(in_order([rest.strip()], 1, seed, new_path())):
                    print(picture.path)
                    drawn = {"type": "image", "image": load_image(picture.path)}
                    messages.append({"role": "user", "content": [{"type": "text", "text": picture.prompt}]})
                    messages.append({"role": "assistant", "content": [drawn]})
            elif command.startswith("/"):
                print(f"error: There is no {command}: only {', '.join(COMMANDS)}.")
            elif line:
                pipe.processor.check_plain(line)
                asked = [*messages, {"role": "user", "content": [*images, {"type": "text", "text": line}]}]
                if seed is not None:
                    transformers.set_seed(seed)
                answer = _reply(converse.stream(asked, seed=seed, **settings), new_path)
                messages = [*asked, {"role": "assistant", "content": answer}]
                images = []
        except EOFError:
            return
        except Exception as error:  # the conversation goes on
            print(f"error: {options.one_line(error)}")


def remember_lines() -> None:
    """On a terminal, lines can be edited, and found again, those of former conversations too."""
    with suppress(ImportError, OSError):  # Windows has no readline
        import readline

        from huggingface_hub.constants import HF_HOME

        (history := Path(HF_HOME, "transformers-liquid-chat-history")).touch(mode=0o600)
        readline.read_history_file(history)
        atexit.register(readline.write_history_file, history)


def _reply(events: Iterable[dict[str, Any]], new_path: Callable[[], Path]) -> list[dict]:
    """Prints a reply as it comes, writes its pictures, and returns its parts."""
    from transformers_liquid.pipelines.conversation import add_event

    parts = []
    for event in events:
        if event["type"] == "text":
            print(event["text"], end="", flush=True)
        elif event["type"] == "image":
            path = new_path()
            event["image"].save(path)
            print(f"\n{path}")
        add_event(parts, event)
    print()
    return parts
