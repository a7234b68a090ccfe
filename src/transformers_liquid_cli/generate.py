"""`transformers-liquid generate`"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from . import options
from .options import STDIO, log


DEFAULT_OUTPUT = Path("liquid.png")

Output = Annotated[
    Path | None,
    Option(
        writable=True,
        help="A .png, or a folder; - writes one picture to standard output.",
        show_default=str(DEFAULT_OUTPUT),
    ),
]
Images = Annotated[
    list[str] | None,
    Option(
        help="A picture in the context, as for editing: a file, an URL or - for standard input; may be given again. It "
        "stands where a prompt says <image>, else before the prompt."
    ),
]
PromptsFile = Annotated[
    Path | None,
    Option(
        help="More prompts, one in a line; - reads standard input. Empty lines and those that begin with # are none. What "
        "cannot be drawn is told and left out (exit code 2)."
    ),
]
OutputDir = Annotated[
    Path | None,
    Option(
        help="A folder for pictures named after the lines of --prompts-file. The same command draws what is missing, on "
        "any number of processes of `accelerate launch`. The seed is 0 unless given."
    ),
]


@options.shared(options.Drawn, options.Running)
def generate(
    context: Context,
    prompts: Annotated[list[str], Argument(metavar="PROMPT", help="What to draw.")] = (),
    image: Images = None,
    prompts_file: PromptsFile = None,
    output: Output = None,
    output_dir: OutputDir = None,
    sheet: Annotated[Path | None, Option(writable=True, help="Also write all pictures on one sheet, a .png.")] = None,
    num_images: Annotated[int, Option(min=1, max=10**6, help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, Option(min=1, help="Pictures drawn side by side.")] = 8,
    as_json: options.Json = False,
    **given: Any,
) -> None:
    """Draws pictures from prompts and writes them as PNGs, batch by batch.

    \b
    Example:
      transformers-liquid generate "red apple" "dog face" --num-images 2 --seed 7 --output drawn --sheet sheet.png
    """
    # 1. What can be checked without the model
    lines = _read_lines(prompts_file)
    options.check_greedy(given)
    if output_dir is not None and (prompts or output is not None):
        raise ValueError(
            "--output-dir names pictures after lines: give --prompts-file, and neither PROMPT nor --output."
        )
    output = output or DEFAULT_OUTPUT
    _check((len(prompts) + len(lines)) * num_images, output, output_dir, sheet, as_json)
    from .models import find_processes, load
    from .pictures import Drawing, check_apart, in_order, of_lines, read_picture, without_file

    images, seed = [(name, read_picture(name)) for name in image or ()], given["seed"]

    # 2. What needs it: what is wrong with a prompt is raised, what is wrong with a line is reported
    processes, device = find_processes(given["device"], output_dir)
    if output_dir is not None and processes.is_main_process:
        _go_alone(context, output_dir)
    drawing = Drawing(load(given["model"], device, given["dtype"]), given, images)
    drawing.check(prompts or (drawing.pipe.processor.known_words or ["a"])[:1])
    good, bad = drawing.sort_out(lines, prompts_file)
    if output_dir is None:
        pictures = left = in_order([*prompts, *good.values()], num_images, seed, output)
    else:
        pictures = of_lines(good, num_images, seed or 0, output_dir)
        left = without_file(drawing, pictures, output_dir)
    check_apart(pictures, sheet, [prompts_file, *(image or ())])
    options.tell_going_on(len(pictures) - len(left), len(pictures), "pictures are there")

    # 3. Every process draws its share of what is left, once all of them have seen what that is
    processes.wait_for_everyone()
    share = left[processes.process_index :: processes.num_processes]
    drawing.pipe.set_progress_bar_config(
        desc=f"{len(share)} of {len(left)} pictures", disable=None if processes.is_main_process else True
    )
    for picture in drawing.draw(share, batch_size):
        if output_dir is None and output != STDIO:
            _tell(picture.path, as_json)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return
    if output_dir is None and seed is None and pictures:
        log.info(f"The seed was {pictures[0].seed}, and one more for each further picture.")
    say = log.info if as_json else print
    if output_dir is not None:
        for picture in pictures if as_json else ():
            _tell(picture.path, as_json)
        say(f"{output_dir}: {len(pictures)} pictures, {len(left)} of them drawn now.")
    if sheet is not None and pictures:
        drawing.save_sheet(pictures, sheet, columns=num_images if num_images > 1 else None)
        say(sheet)
    if bad:
        raise ValueError(f"{len(bad)} of {len(lines)} lines of {prompts_file} were left out, as said above.")


def _go_alone(context: Context, folder: Path) -> None:
    """Keeps other runs out of the folder until the command ends, and removes what a killed one left there half written."""
    from transformers_liquid.utils.files import UNFINISHED, alone_in

    context.with_resource(alone_in(folder))
    for unfinished in folder.glob(f".*{UNFINISHED}"):
        unfinished.unlink()


def _tell(path: Path, as_json: bool) -> None:
    from .pictures import read_metadata

    options.tell({"path": path, **read_metadata(path)} if as_json else path, as_json)


def _read_lines(prompts_file: Path | None) -> dict[int, str]:
    """The prompts of a file by the numbers of their lines."""
    if prompts_file is None:
        return {}
    try:
        with nullcontext(sys.stdin) if prompts_file == STDIO else prompts_file.open(encoding="utf-8-sig") as file:
            lines = {number: line.strip() for number, line in enumerate(file, start=1)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts_file} is no text in UTF-8: {error}") from error
    return {number: line for number, line in lines.items() if line and not line.startswith("#")}


def _check(num_pictures: int, output: Path, output_dir: Path | None, sheet: Path | None, as_json: bool) -> None:
    """Raises what is wrong with how much is drawn, or a place that cannot be written to."""
    if not num_pictures:
        raise ValueError("Nothing to draw: give a PROMPT, or --prompts-file with one prompt in a line.")
    if output == STDIO and (num_pictures > 1 or as_json or sheet is not None or sys.stdout.isatty()):
        raise ValueError(
            "--output - writes one picture to a pipe or a file, and nothing else: give one PROMPT, and neither --json nor "
            "--sheet."
        )
    options.session.after_interrupt = (
        "Pictures that are written stay; with --prompts-file and --output-dir it would go on."
    )
    if output_dir is not None:
        options.check_resumable(output_dir)
    elif output != STDIO:
        options.check_writable(output, folder=options.is_folder(output))
    if sheet is not None:
        options.check_writable(sheet, folder=False)
