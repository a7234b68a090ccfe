"""The options that several commands have, the checks of where they write, and how all of them print."""

import json
import logging
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from typer import Context, Option


PROG = "transformers-liquid"

# Standard input or output in place of a file.
STDIO = Path("-")

# What the library and its commands tell on stderr beside errors.
log = logging.getLogger("transformers_liquid")


@dataclass
class Session:
    """What is known of the command that runs where it ends."""

    is_verbose: bool = sys.flags.dev_mode
    after_interrupt: str = "The same command begins anew."


session = Session()
GOES_ON = "The same command goes on from there."

# What commands that train do not know are options of the Trainer.
TRAINER_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

# Which model, and how it runs
Model = Annotated[
    str | None, Option(help="A folder or a name on the Hub.", show_default="liquid-emoji, the embedded one")
]
Device = Annotated[str | None, Option(help="Such as cpu or cuda:1; an accelerator if there is one.")]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Option(help="Of the weights.")]
Seed = Annotated[int | None, Option(min=0, max=2**32 - 1, help="The same seed gives the same result.")]
MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer.")]
TrainingFile = Annotated[
    Path | None, Option("--config", help="A YAML file with any of the options; the command line wins.")
]
HelpAll = Annotated[bool, Option("--help-all", help="Show every option with its default, the Trainer's too, and exit.")]
NewFolder = Annotated[Path, Option(help="A new folder.")]
Json = Annotated[bool, Option("--json", help="JSON in lines on standard output, all else on standard error.")]
Framing = Annotated[
    Literal["crop", "pad"],
    Option(
        help="How a picture becomes square. pad shows all of it: a question (describe) may be about the margins. crop "
        "fills the square: a model that learns from pads (tokenize) draws pads."
    ),
]


@dataclass
class Running:
    """Which model, and how it runs: options for [`shared`]."""

    model: Model = None
    device: Device = None
    dtype: DType = "auto"
    seed: Seed = None


@dataclass
class Drawn:
    """How a picture is drawn: options for [`shared`]."""

    negative_prompt: Annotated[str | None, Option(help="What the pictures should not show.")] = None
    height: Annotated[int | None, Option(help="Of the pictures, in pixels; the model's unless given.")] = None
    width: Annotated[int | None, Option(help="Likewise.")] = None
    guidance_scale: Annotated[
        float | None, Option(help="1 is no guidance. The checkpoint's unless given, as all below.")
    ] = None
    guidance_min_p: Annotated[
        float | None, Option("--guidance-min-p", help="Guidance chooses among codes this probable.")
    ] = None
    speculative: Annotated[
        int | None, Option(help="Draw up to that many codes in a step, such as 12: the same picture.")
    ] = None
    greedy: Annotated[bool, Option("--greedy", help="Always take the most probable code.")] = False
    temperature: Annotated[float | None, Option(help="Below 1, the probable codes become more so.")] = None
    top_k: Annotated[int | None, Option(help="Draw among that many of the most probable codes.")] = None
    top_p: Annotated[float | None, Option(help="Draw among codes of this probability together.")] = None


@dataclass
class Written:
    """How text is written: options for [`shared`]."""

    text_temperature: Annotated[float | None, Option(min=0.01, help="Draw words by chance, surer ones below 1.")] = None
    text_top_p: Annotated[float | None, Option(min=0.01, max=1, help="Draw among words this probable together.")] = None


@dataclass
class Telling:
    """How much is told on stderr: an option of all commands."""

    verbose: Annotated[bool | None, Option("--verbose/--quiet", "-v/-q", help="Tell more, or errors alone.")] = None


def trainer_words(context: Context, config: Path | None, help_all: bool) -> list[str]:
    """What a command that trains was given, for the parser of the Trainer's options."""
    session.after_interrupt = "The same command goes on from the last checkpoint."
    words = ["--help"] if help_all else context.args
    return words if config is None else ["--config", str(config), *words]


def telling_more_or_less(command: Callable) -> Callable:
    """Gives a command the option of [`Telling`]."""

    @wraps(command)
    def run(*args: Any, verbose: bool | None, **kwargs: Any) -> Any:
        if verbose is not None:
            session.is_verbose = verbose
            log.setLevel(logging.DEBUG if verbose else logging.ERROR)
        if verbose is False:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (`telling` puts back what was there)
        return command(*args, **kwargs)

    return shared(Telling)(run)


@contextmanager
def telling() -> Iterator[None]:
    """A session, in which what is logged comes to stderr."""
    session.__init__()
    handler = logging.StreamHandler(sys.stderr and VisibleStream(sys.stderr))
    handler.setFormatter(logging.Formatter(f"{PROG}: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with redirect_stderr(sys.stderr):
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)


def shared(*groups: type) -> Callable[[Callable], Callable]:
    """Gives a command the options of groups, as `**given`, behind its own."""

    def add(command: Callable) -> Callable:
        own = [one for one in signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]
        more = [one.replace(kind=one.KEYWORD_ONLY) for group in groups for one in signature(group).parameters.values()]
        command.__signature__ = Signature([*own, *more])
        return command

    return add


def check_greedy(given: dict[str, Any]) -> None:
    if given["greedy"] and any(given[name] is not None for name in ("temperature", "top_k", "top_p")):
        raise ValueError("--greedy draws nothing by chance: leave out --temperature, --top-k and --top-p.")


def of_text(given: dict[str, Any]) -> dict[str, Any]:
    """What `generate` is to be told of the options of [`Written`]; nothing without them."""
    chosen = {name: given[f"text_{name}"] for name in ("temperature", "top_p") if given[f"text_{name}"]}
    return chosen and {"do_sample": True, **chosen}


def tell(value: Any, as_json: bool = True) -> None:
    """A line on standard output, at once: by default of JSON."""
    print(json.dumps(value, ensure_ascii=False, default=str) if as_json else value, flush=True)


def tell_going_on(done: int, total: int, what: str) -> None:
    if done:
        log.info(f"{'Already finished' if done == total else 'Going on'}: {done} of {total} {what}.")


def tell_lines(values: dict[str, Any]) -> None:
    width = max(12, *map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}} {value}")


def is_folder(path: Path) -> bool:
    return path != STDIO and (path.is_dir() or not path.suffix)


def check_writable(path: Path, folder: bool) -> None:
    """Finds out now what would fail after the work: whether a folder, or else a PNG, can be written. Makes the folder."""
    if not folder and (path.suffix.lower() != ".png" or path.is_dir()):
        raise ValueError(f"Pictures are written as PNG: expected a path that ends with .png or a folder, got {path}.")
    parent = path if folder else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=parent):
        pass


def check_resumable(folder: Path) -> None:
    """As [`check_writable`], for a command that goes on where it was interrupted."""
    check_writable(folder, folder=True)
    session.after_interrupt = GOES_ON


def check_new_story(path: Path) -> None:
    """A story is never written over something; its pictures go beside it."""
    if path.suffix.lower() != ".md" or path.exists():
        raise ValueError(f"A story is written to a new file that ends with .md, got {path}.")
    check_writable(path.parent, folder=True)


def check_new_folder(path: Path) -> None:
    """A checkpoint is never written over something."""
    # Hidden is what a killed process leaves, which the next one clears away.
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise ValueError(f"{path} is not empty: choose a new folder, nothing is overwritten.")
    check_writable(path, folder=True)


def visible(text: str) -> str:
    """Text of models, cards and pictures with what would steer a terminal written out, as JSON does: `\\u001b`."""

    def steers(character: str) -> bool:
        # Controls, lone surrogates, separators of lines, and the invisible ones, such as those that turn the direction;
        # emoji and scripts need the (non-)joiners U+200C and U+200D.
        is_of_kind = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return is_of_kind and character not in "\n\t\u200c\u200d"

    return "".join(json.dumps(character)[1:-1] if steers(character) else character for character in text)


def is_meant(error: BaseException) -> bool:
    """Whether what an error says was written for users."""
    return isinstance(error, ValueError | OSError | ImportError | FloatingPointError) and bool(str(error))


def one_line(error: BaseException) -> str:
    """What an error says; those that nobody wrote for users, with their names."""
    return visible(" ".join((str(error) if is_meant(error) else f"{type(error).__name__}: {error}").split()))


@dataclass
class VisibleStream:
    """Standard output, on which everything that is printed is `visible`, whatever the terminal's encoding."""

    stream: TextIO

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            return self.stream.write(text)  # says that it takes no bytes, which is how typer finds out
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
