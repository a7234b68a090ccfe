"""`transformers-liquid generate`"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from . import options


DEFAULT_OUTPUT = Path("liquid.png")

Output = Annotated[Path | None, Option(writable=True, help="A .png, or a folder.", show_default=str(DEFAULT_OUTPUT))]
Images = Annotated[
    list[str] | None,
    Option(
        help="A picture in the context, a file or an URL, as for editing; may be given again. It stands where a prompt "
        "says <image>, else before the prompt."
    ),
]
PromptsFile = Annotated[
    Path | None, Option(help="More prompts, one in a line. What cannot be drawn is told and left out (exit code 2).")
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
    _check(prompts, lines, output, output_dir, sheet)
    from transformers_liquid.models.liquid.image_processing_liquid import load_image

    from .models import find_processes, load
    from .pictures import Drawing, check_apart, in_order, of_lines, without_file

    images, seed = [(name, load_image(name)) for name in image or ()], given["seed"]

    # 2. What needs it: what is wrong with a prompt is raised, what is wrong with a line is reported
    processes, device = find_processes(given["device"], output_dir)
    if output_dir is not None and processes.is_main_process:
        _go_alone(context, output_dir)
    drawing = Drawing(load(given["model"], device, given["dtype"]), given, images)
    drawing.check(prompts or ["a"])
    good, bad = drawing.sort_out(lines)
    _tell(bad if processes.is_main_process else {}, prompts_file)
    if output_dir is None:
        pictures = left = in_order([*prompts, *good.values()], num_images, seed, output or DEFAULT_OUTPUT)
    else:
        pictures = of_lines(good, num_images, seed or 0, output_dir)
        left = without_file(drawing, pictures, output_dir)
    check_apart(pictures, sheet, [prompts_file, *(image or ())])

    # 3. Every process draws its share of what is left, once all of them have seen what that is
    processes.wait_for_everyone()
    share = left[processes.process_index :: processes.num_processes]
    drawing.pipe.set_progress_bar_config(
        desc=f"{len(share)} of {len(left)} pictures", disable=None if processes.is_main_process else True
    )
    for picture in drawing.draw(share, batch_size):
        if output_dir is None:
            print(picture.path)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return
    if output_dir is not None:
        print(f"{output_dir}: {len(pictures)} pictures, {len(left)} of them drawn now.")
    if sheet is not None and pictures:
        drawing.save_sheet(pictures, sheet, columns=num_images if num_images > 1 else None)
        print(sheet)
    if bad:
        raise ValueError(f"{len(bad)} of {len(lines)} lines of {prompts_file} were left out, as said above.")


def _go_alone(context: Context, folder: Path) -> None:
    """Keeps other runs out of the folder until the command ends, and removes what a killed one left there half written."""
    from transformers_liquid.utils.files import UNFINISHED, alone_in

    context.with_resource(alone_in(folder))
    for unfinished in folder.glob(f".*{UNFINISHED}"):
        unfinished.unlink()


def _tell(bad: dict[int, str], prompts_file: Path | None) -> None:
    for number, reason in bad.items():
        print(f"{options.PROG}: {prompts_file}, line {number} is left out: {reason}", file=sys.stderr)


def _read_lines(prompts_file: Path | None) -> list[str]:
    """The lines of the prompts file, the empty ones too."""
    if prompts_file is None:
        return []
    try:
        with prompts_file.open(encoding="utf-8-sig") as file:
            return [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts_file} is no text in UTF-8: {error}") from error


def _check(
    prompts: Sequence[str], lines: list[str], output: Path | None, output_dir: Path | None, sheet: Path | None
) -> None:
    """Raises what is wrong with what to draw, or a place that cannot be written to."""
    if not prompts and not any(lines):
        raise ValueError("Nothing to draw: give a PROMPT, or --prompts-file with one prompt in a line.")
    if output_dir is not None and (prompts or output is not None):
        raise ValueError(
            "--output-dir names pictures after lines: give --prompts-file, and neither PROMPT nor --output."
        )
    output = output_dir or output or DEFAULT_OUTPUT
    options.check_writable(output, folder=output_dir is not None or options.is_folder(output))
    if sheet is not None:
        options.check_writable(sheet, folder=False)
