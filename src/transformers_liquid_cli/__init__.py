"""`transformers-liquid COMMAND`: each command calls the function of `transformers_liquid` that does it.

The command line is a package of its own, beside the library: importing anything of `transformers_liquid` registers its
classes, which costs torch, transformers and diffusers, seconds before `--help` or a mistyped option is answered. For the
same reason a command imports what it needs when it runs, after all that can be checked without. `models` and `pictures`
are for running commands only.

Bad input ends with exit code 2 and one line on stderr, before any long work; `--verbose` shows where in the code it was
found. Failures that nobody foresaw end with 1, and Ctrl-C with 130 and how to go on.
"""

import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from typing import Annotated

import typer
from safetensors import SafetensorError

from . import options
from .app import app as page
from .chat import chat
from .convert import convert
from .describe import describe
from .env import env
from .evaluate import evaluate
from .expand import expand
from .generate import generate
from .info import info
from .merge import merge
from .options import PROG, VisibleStream, one_line, session, visible
from .serve import serve
from .story import story
from .tokenize import tokenize
from .train import train
from .voken import voken_app


# Plain text, no tracebacks: `main` tells errors.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
# --sheet was called --grid, which was too close to tokenize's --grids.
OTHER_NAMES = {generate: {"grid": "sheet"}, describe: {"temperature": "text-temperature", "top-p": "text-top-p"}}
for command, names in OTHER_NAMES.items():
    app.command(context_settings={"token_normalize_func": lambda name, names=names: names.get(name, name)})(command)
app.command("app")(page)
for command in (chat, story, expand, convert, merge, tokenize, evaluate, serve, info, env):
    app.command()(command)
app.command(context_settings=options.TRAINER_CONTEXT)(train)
app.add_typer(voken_app, name="voken")


def _print_version(context: typer.Context, is_asked: bool) -> None:
    if is_asked:
        print(f"{PROG} {version('transformers-liquid')}")
        context.exit()


ShowVersion = typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")


@app.callback()
def _before_commands(show_version: Annotated[bool, ShowVersion] = False) -> None:
    """Draws and reads pictures with one language model."""


for registered in (app.registered_callback, *app.registered_commands, *voken_app.registered_commands):
    registered.callback = options.telling_more_or_less(registered.callback)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (list of `str`, *optional*): The arguments. Defaults to those of the process.

    Returns:
        `int`: The exit code: 0; 2 on bad input and 1 on what nobody foresaw, with one line on stderr; 130 when
        interrupted.
    """
    out, code = sys.stdout, 2  # None where it is closed
    try:
        with options.telling(), redirect_stdout(out and VisibleStream(out)):
            ended = app(argv, prog_name=PROG, standalone_mode=False) or 0
            print(end="", flush=True)  # what cannot be written is found out now
        if ended == 130:
            print(f"\n{PROG}: interrupted. {session.after_interrupt}", file=sys.stderr)
        return ended
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        message = f"{error.format_message()} (see `{context.command_path if context else PROG} --help`)"
    except SafetensorError as error:
        is_damaged = "I/O error" not in str(error)  # such as "I/O error: No space left on device"
        message = "a file of weights is damaged or incomplete, download it again: " * is_damaged + str(error)
    except Exception as error:
        if session.is_verbose:
            traceback.print_exc()
        # An end of file within a command comes as an abort.
        error = error.__cause__ if isinstance(error, typer.Abort) and error.__cause__ else error
        message, code = one_line(error), 2 if options.is_meant(error) or isinstance(error, EOFError) else 1
    finally:
        # The interpreter would try to write again, and end with a traceback and a code of its own.
        try:
            print(end="", file=out, flush=True)
        except OSError:
            with suppress(OSError):
                out.close()
    print(f"{PROG}: error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code
