"""`transformers-liquid COMMAND`: each command calls the function of the package that does it.

Bad input ends with exit code 2 and one line on stderr, before any long work. Of a file of prompts, each line that cannot
be drawn is told, the others are drawn, and the exit code is 2 too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, set_seed
from transformers.utils import cached_file

from .codecs.taming import save_taming_codec
from .conversion.expand import expand_vocabulary
from .conversion.export import export_base_model
from .data.tokenize import IMAGE_KINDS, SKIPPED_NAME, tokenize_dataset
from .generation.settings import ImageGenerationConfig
from .models.liquid.configuration_liquid import LiquidConfig
from .models.liquid.image_processing_liquid import FRAMINGS, contact_sheet, load_image
from .models.liquid.modeling_liquid import LiquidForCausalLM
from .models.liquid.processing_liquid import LiquidProcessor
from .models.liquid.reference import ReferenceCheckpoint, load_codec
from .pipelines.streamers import ImageStreamer
from .pipelines.text_to_image import DEFAULT_BATCH_SIZE, EMOJI_CHECKPOINT, LiquidImageGenerationPipeline
from .utils.files import differences, whole


PROG = "transformers-liquid"

# Where a PNG says how it was drawn: JSON, under this key.
METADATA_KEY = "transformers_liquid"

# What of a picture's settings `generate` has an option for.
SETTINGS = ("guidance_scale", "guidance_min_p", "temperature", "top_k", "top_p", "speculative")

# What of its record must be the same, with all settings, for a picture not to be drawn again.
IDENTITY = ("prompt", "negative_prompt", "seed", "model", "height", "width", "dtype")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (list of `str`, *optional*): The arguments. Defaults to those of the process.

    Returns:
        `int`: The exit code: 0; 2 on bad input, with one line on stderr; 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["train"]:
            train(argv[1:])
            return 0
        args = build_parser().parse_args(argv)
        _silence_libraries()
        args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError, SafetensorError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, SafetensorError):
            message = f"a file of weights is damaged or incomplete, download it again: {message}"
        print(f"{PROG}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


# Commands


def generate(args: argparse.Namespace) -> None:
    """Draws pictures from prompts and writes them as PNGs, batch by batch."""
    # 1. What can be checked without the model
    lines = _read_lines(args)
    _check_generate(args)
    processes = _processes(args)

    # 2. What needs it: what is wrong with any prompt is raised, what is wrong with a line of the file is reported
    pipe = _load_pipeline(args)
    settings = _image_settings(pipe.model, args)
    size = {"height": args.height, "width": args.width}
    pipe.preprocess(args.prompts or "a", negative_prompt=args.negative_prompt, **size)
    bad = _bad_lines(pipe, lines, size)
    if processes.is_main_process:
        for number, reason in bad.items():
            print(f"{PROG}: {args.prompts_file}, line {number} is left out: {reason}", file=sys.stderr)
    pictures = _pictures(args, lines, bad)
    records = {picture.path: _record(args, pipe, picture.prompt, picture.seed, settings) for picture in pictures}

    # 3. Every process takes its share of what is left, once all of them have seen what that is
    left = pictures if args.output_dir is None else _left(args.output_dir, pictures, records)
    processes.wait_for_everyone()
    share = left[processes.process_index :: processes.num_processes]

    # 4. Pictures are written as soon as they are drawn
    def write(image: Image.Image, path: Path) -> None:
        _save_picture(image, path, records[path])
        if args.output_dir is None:
            print(path)

    if share:
        of_all = f"{len(share)} of {len(left)} pictures" if len(share) < len(left) else f"{len(left)} pictures"
        bar = {"desc": of_all if len(left) > 1 else None, "disable": None if processes.is_main_process else True}
        pipe.set_progress_bar_config(**bar)
        preview = {} if args.preview_every is None else {"streamer": _PreviewWriter(pipe.model, args)}
        drawn = pipe.stream(
            [picture.prompt for picture in share],
            negative_prompt=args.negative_prompt,
            seed=[picture.seed for picture in share],
            batch_size=args.batch_size,
            **size,
            **settings,
            **preview,
        )
        _write_behind(write, ((image, share[index].path) for index, image in drawn), args.batch_size)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return

    # 5. All of it
    if args.output_dir is not None:
        print(f"{args.output_dir}: {len(pictures)} pictures, {len(left)} of them drawn now.")
    if args.grid is not None:
        columns = args.num_images if args.num_images > 1 else math.ceil(math.sqrt(len(pictures)))
        images = [load_image(picture.path) for picture in pictures]
        _save_picture(contact_sheet(images, columns), args.grid, [records[picture.path] for picture in pictures])
        print(args.grid)
    if bad:
        raise ValueError(f"{len(bad)} of {len(lines)} lines of {args.prompts_file} were left out, as said above.")


def describe(args: argparse.Namespace) -> None:
    """Prints what a picture shows, or the answer to a question about it."""
    image = load_image(args.image)
    if args.question is not None and not args.question.strip():
        raise ValueError("The question is empty: write one, or leave it out for a caption.")
    model, processor = _load(args)
    input_ids = processor.caption_ids() if args.question is None else processor.question_ids(args.question)
    pixel_values = processor.image_processor(image, framing=args.framing)["pixel_values"].to(model.device)
    print(_write(model, processor, torch.tensor([input_ids]), args, pixel_values=pixel_values).strip())


def chat(args: argparse.Namespace) -> None:
    """A conversation on the terminal, with pictures in both directions."""
    _check_writable(args.output, is_directory=True)
    pipe = _load_pipeline(args)
    pipe.set_progress_bar_config(disable=None, leave=False)
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    print("/image PATH shows a picture, /draw PROMPT draws one, /new starts over, /quit ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/new":
                messages, images = [], []
            elif command == "/image":
                images.append(load_image(rest.strip()))
            elif command == "/draw":
                print(_draw(pipe, rest.strip(), args))
            elif command.startswith("/"):
                raise ValueError(f"There is no {command}: only /image PATH, /draw PROMPT, /new and /quit.")
            elif line:
                pipe.processor.check_plain(line)
                content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": line}]
                asked = [*messages, {"role": "user", "content": content}]
                answer = _answer(pipe, asked, args, streamer)
                messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                images = []
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}")


def expand(args: argparse.Namespace) -> None:
    """Turns a language model and a codec into a Liquid model."""
    _check_new_directory(args.output)
    codec = load_codec(args.codec)
    base_model = AutoModelForCausalLM.from_pretrained(args.base, dtype=_dtype(args.dtype)).to(_device(args.device))
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model, processor = expand_vocabulary(
        base_model, tokenizer, codec, image_size=args.image_size, init=args.init, seed=args.seed or 0
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    ids = model.config.image_token_range
    print(f"{args.output}: {args.base} with image ids {ids.start} ... {ids.stop - 1}. Train it from there.")


def train(argv: Sequence[str]) -> None:
    """Trains a model on text and image codes; has options of its own."""
    from .training.train import main  # imports the Trainer, which takes seconds

    main(argv)


def convert(args: argparse.Namespace) -> None:
    """Writes a checkpoint in another layout."""
    _check_new_directory(args.output)
    model, processor = _load(args, vq_checkpoint=args.vq_checkpoint)
    if args.to_base:
        export_base_model(model, processor, args.output)
        print(f"{args.output}: a plain {model.config.text_config.model_type}, its codec beside it.")
    elif args.to_taming:
        save_taming_codec(model.model.vq_model, args.output)
        print(f"{args.output}: the codec as taming-transformers keeps it.")
    else:
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)
        print(f"{args.output}: a complete Liquid repository.")


def tokenize(args: argparse.Namespace) -> None:
    """Turns a data set of pictures with texts into codes to train on. An interrupted call goes on where it stopped."""
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    manifest = tokenize_dataset(**settings)
    if PartialState().is_main_process:
        skipped = f", {manifest['num_skipped']:,} skipped (see {SKIPPED_NAME})" if manifest["num_skipped"] else ""
        print(f"{args.output}: {manifest['num_records']:,} pictures as codes{skipped}.")


def info(args: argparse.Namespace) -> None:
    """Prints what is known of a checkpoint without its weights, or how a picture was drawn."""
    if args.picture is not None:
        print(json.dumps(read_metadata(args.picture), indent=2, ensure_ascii=False))
        return
    reference = ReferenceCheckpoint.find(args.model)
    config = LiquidConfig.from_pretrained(args.model) if reference is None else reference.config
    text_config = config.get_text_config()
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_codec_parameters = sum(parameter.numel() for parameter in model.model.vq_model.parameters())
    rows, columns = config.grid()
    ids, size = config.image_token_range, config.image_size
    lines = {
        "checkpoint": f"{args.model} ({'liquid' if reference is None else 'reference'} layout)",
        "base model": f"{text_config.model_type}, {text_config.num_hidden_layers} layers of {text_config.hidden_size}, "
        f"{getattr(text_config, 'max_position_embeddings', 'unlimited')} positions",
        "parameters": f"{num_parameters - num_codec_parameters:,} + {num_codec_parameters:,} of the codec",
        "vocabulary": f"{text_config.vocab_size:,} rows, image ids {ids.start} ... {ids.stop - 1}",
        "special ids": f"boi {config.boi_token_id}, eoi {config.eoi_token_id}, unconditional {config.uncond_token_id}, "
        f"placeholder {config.image_token_id}",
        "codec": f"{config.codebook_size:,} codes, {config.downsample_factor} x {config.downsample_factor} pixels each",
        "picture": f"{size} x {size} pixels = {rows} x {columns} codes",
        "settings": ", ".join(f"{name}={value}" for name, value in _stored_settings(args.model).items()),
        "card": _card_summary(args.model),
    }
    for name, value in lines.items():
        print(f"{name:<12} {value}")


# Arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the function of the chosen one is its `run`."""
    parser = _Parser(prog=PROG, description="Draws and reads pictures with one language model.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('transformers-liquid')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(run, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            run.__name__,
            help=run.__doc__,
            description=run.__doc__,
            epilog=f"example:\n  {PROG} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    command = add(generate, 'generate "red apple" "dog face" --num-images 2 --seed 7 --output drawn --grid sheet.png')
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    command.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="further prompts, one in a line; lines that cannot be drawn are reported and left out (exit code 2)",
    )
    output = command.add_mutually_exclusive_group()
    output.add_argument(
        "--output",
        type=Path,
        default=Path("liquid.png"),
        metavar="PATH",
        help="a .png, or a folder (default: %(default)s)",
    )
    output.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="a folder for the pictures of --prompts-file, named after its lines: the same command draws what is "
        "missing, on any number of processes of `accelerate launch`. The seed is 0 unless given",
    )
    command.add_argument("--grid", type=Path, metavar="FILE", help="also write a contact sheet, a .png")
    command.add_argument("--num-images", type=_count, default=1, metavar="N", help="pictures of each prompt")
    command.add_argument(
        "--batch-size", type=_count, default=DEFAULT_BATCH_SIZE, metavar="N", help="drawn side by side"
    )
    command.add_argument(
        "--preview-every", type=_count, metavar="K", help="of a single picture: write what is drawn every K codes"
    )
    _add_drawing_arguments(command)
    _add_model_arguments(command)

    command = add(describe, 'describe apple.png "What colour is it?"')
    command.add_argument("image", metavar="IMAGE", help="a file or an URL")
    command.add_argument("question", nargs="?", metavar="QUESTION", help="without one, a caption is written")
    command.add_argument(
        "--framing", choices=FRAMINGS, default="pad", help="show all of the picture, or fill the frame"
    )
    _add_text_arguments(command)
    _add_model_arguments(command)

    command = add(chat, "chat --model path/to/model")
    command.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where drawn pictures go")
    _add_drawing_arguments(command)
    _add_text_arguments(command)
    _add_model_arguments(command)

    command = add(expand, "expand Qwen/Qwen2.5-0.5B --codec path/to/codec --output qwen-liquid")
    command.add_argument("base", metavar="BASE", help="a causal language model: a folder or a name on the Hub")
    command.add_argument(
        "--codec",
        required=True,
        metavar="PATH",
        help="a saved LiquidVQModel, or a folder with vqgan.ckpt and vqgan.yaml",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--image-size", type=_count, metavar="PIXELS", help="default: the codec's")
    command.add_argument("--init", choices=("mean", "normal"), default="mean", help="what new rows begin as")
    _add_device_arguments(command)

    add(train, "train --config train.yaml --learning_rate 1e-4")

    command = add(convert, "convert Junfeng5/Liquid_V1_7B --output liquid-7b")
    command.add_argument("model", metavar="MODEL", help="a checkpoint in the reference's layout or in ours")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument(
        "--vq-checkpoint", metavar="PATH", help="the codec of a reference checkpoint, if not the default"
    )
    to = command.add_mutually_exclusive_group()
    to.add_argument("--to-base", action="store_true", help="write a plain language model, as the reference has it")
    to.add_argument("--to-taming", action="store_true", help="write the codec alone, as vqgan.ckpt and vqgan.yaml")
    _add_device_arguments(command, seed=False)

    command = add(tokenize, "tokenize --dataset imagefolder --data-dir photos --model path/to/liquid --output codes")
    command.add_argument(
        "--dataset",
        required=True,
        help="what load_dataset takes: imagefolder, json, parquet, a folder, a name on the Hub",
    )
    command.add_argument("--dataset-config-name", metavar="NAME", help="for a data set that has several")
    command.add_argument("--data-dir", metavar="DIR", help="the folder of the pictures, or of what names them")
    command.add_argument("--data-files", nargs="+", metavar="FILE", help="as in load_dataset")
    command.add_argument("--split", default="train", help="default: %(default)s")
    command.add_argument("--streaming", action="store_true", help="read without a copy in the cache")
    command.add_argument("--image-column", metavar="NAME", help="default: image, image_path, or one of pictures")
    command.add_argument("--text-column", metavar="NAME", help="default: text, caption or txt")
    command.add_argument("--model", required=True, metavar="MODEL", help="whose codec: a folder or a name on the Hub")
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder, or an interrupted one"
    )
    command.add_argument(
        "--grids",
        nargs="+",
        type=_grid,
        metavar="ROWSxCOLUMNS",
        help="a picture takes the closest by proportions (default: the model's square)",
    )
    command.add_argument("--framing", choices=FRAMINGS, default="crop", help="fill the frame, or show all of a picture")
    command.add_argument("--kind", choices=IMAGE_KINDS, default="text_to_image", help="of the records")
    command.add_argument("--batch-size", type=_count, default=16, metavar="N", help="encoded together")
    command.add_argument("--num-workers", type=_count, default=8, metavar="N", help="threads that read pictures")
    command.add_argument("--records-per-shard", type=_count, default=1000, metavar="N", help="records per file")

    command = add(info, "info --model Junfeng5/Liquid_V1_7B")
    command.add_argument(
        "picture", nargs="?", type=Path, metavar="PICTURE", help="a PNG of `generate`: how it was drawn"
    )
    command.add_argument("--model", default=EMOJI_CHECKPOINT, metavar="MODEL", help="default: the embedded checkpoint")
    return parser


def _add_model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default=EMOJI_CHECKPOINT,
        metavar="MODEL",
        help="a folder or a name on the Hub (default: the embedded checkpoint)",
    )
    _add_device_arguments(command)


def _add_device_arguments(command: argparse.ArgumentParser, seed: bool = True) -> None:
    command.add_argument("--device", help="such as cpu or cuda:1 (default: an accelerator if there is one)")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    if seed:
        command.add_argument("--seed", type=_seed, metavar="N", help="the same seed gives the same result")


def _add_drawing_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--negative-prompt", metavar="TEXT", help="what the pictures should not show")
    command.add_argument("--height", type=int, metavar="PIXELS")
    command.add_argument("--width", type=int, metavar="PIXELS")
    command.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="1 is no guidance (default of each: the checkpoint's)",
    )
    command.add_argument("--guidance-min-p", type=float, metavar="P", help="guidance chooses among codes this probable")
    command.add_argument(
        "--speculative",
        type=int,
        nargs="?",
        const=True,
        metavar="WINDOW",
        help="draw several codes in a step, up to WINDOW",
    )
    command.add_argument("--greedy", action="store_true", help="always take the most probable code")
    command.add_argument("--temperature", type=float, metavar="T")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--top-p", type=float, metavar="P")


def _add_text_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help="longest answer")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _grid(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS such as 32x32, got {text!r}")
    rows, columns = text.split("x")
    return int(rows), int(columns)


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in 0 ... 2**32 - 1, got {value}")
    return value


# Models


def _load(args: argparse.Namespace, **kwargs: Any) -> tuple[LiquidForCausalLM, LiquidProcessor]:
    """Model and processor of a checkpoint in either layout, on the device."""
    device = _device(args.device)
    model = LiquidForCausalLM.from_pretrained(args.model, dtype=_dtype(args.dtype), **kwargs).to(device)
    processor = LiquidProcessor.from_pretrained(args.model, **kwargs)
    processor.check_fits(model.config)
    return model, processor


def _load_pipeline(args: argparse.Namespace) -> LiquidImageGenerationPipeline:
    model, processor = _load(args)
    return LiquidImageGenerationPipeline(model=model, processor=processor, device=model.device)


def _processes(args: argparse.Namespace) -> PartialState:
    """The processes of `accelerate launch`, each with a device of its own; or this one alone."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # A process that is done may wait long for the others.
    processes = PartialState(cpu=on_cpu, timeout=timedelta(days=365))
    if processes.num_processes > 1:
        if args.output_dir is None:
            raise ValueError("Several processes share the lines of a file: give --prompts-file and --output-dir.")
        if args.device is not None:
            raise ValueError(f"Each process has a device of its own: leave out --device {args.device}.")
        args.device = str(processes.device)
    return processes


def _device(name: str | None) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was not built with
        raise ValueError(f"--device {name} cannot be used here: {error}") from error


def _dtype(name: str) -> str | torch.dtype:
    return name if name == "auto" else getattr(torch, name)


# Text


def _write(
    model: LiquidForCausalLM,
    processor: LiquidProcessor,
    input_ids: torch.LongTensor,
    args: argparse.Namespace,
    **kwargs: Any,
) -> str:
    """The text that follows one prompt of shape `(1, L)`, no longer than the context has room for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = input_ids.shape[1]
    if limit is not None and length >= limit:
        raise ValueError(
            f"The prompt has {length} tokens, the model {limit} positions: there is no room for an answer."
        )
    max_new_tokens = args.max_new_tokens if limit is None else min(args.max_new_tokens, limit - length)
    if args.seed is not None:
        set_seed(args.seed)
    ids = model.generate(input_ids.to(model.device), max_new_tokens=max_new_tokens, **kwargs)
    return processor.decode(ids[0, length:], skip_special_tokens=True)


def _answer(
    pipe: LiquidImageGenerationPipeline,
    messages: list[dict[str, Any]],
    args: argparse.Namespace,
    streamer: TextStreamer,
) -> str:
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(pipe.device)
    pixel_values = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    return _write(pipe.model, pipe.processor, inputs["input_ids"], args, streamer=streamer, **pixel_values)


# Pictures


@dataclass
class _Picture:
    prompt: str
    seed: int
    path: Path


class _PreviewWriter(ImageStreamer):
    """Writes the partly drawn picture where the finished one goes."""

    def __init__(self, model: LiquidForCausalLM, args: argparse.Namespace) -> None:
        super().__init__(model, args.preview_every, args.height, args.width)
        self.path = args.output

    def on_finalized_images(self, images: list[Image.Image], num_codes: int, stream_end: bool = False) -> None:
        if not stream_end:
            _write_png(images[0], self.path)


def _draw(pipe: LiquidImageGenerationPipeline, prompt: str, args: argparse.Namespace) -> Path:
    """One picture of a conversation."""
    settings = _image_settings(pipe.model, args)
    seed = random.randrange(2**31) if args.seed is None else args.seed
    size = {"height": args.height, "width": args.width}
    [image] = pipe(prompt, negative_prompt=args.negative_prompt, seed=seed, **size, **settings)
    number = 0
    while (path := args.output / f"drawing-{number}.png").exists():
        number += 1
    _save_picture(image, path, _record(args, pipe, prompt, seed, settings))
    return path


def _image_settings(model: LiquidForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """All settings that a picture is drawn with: the checkpoint's, and what the arguments say instead."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if args.greedy:
        given["do_sample"] = False
    settings, _ = ImageGenerationConfig.from_call(model.generation_config, None, given)
    return settings.to_dict()


def _stored_settings(model: str) -> dict[str, Any]:
    try:
        stored = GenerationConfig.from_pretrained(model)
    except OSError:
        stored = None
    return ImageGenerationConfig.from_call(stored, None, {})[0].to_dict()


def _read_lines(args: argparse.Namespace) -> list[str]:
    """The lines of the prompts file, the empty ones too."""
    lines = []
    if args.prompts_file is not None:
        try:
            with args.prompts_file.open(encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompts_file} is no text in UTF-8: {error}") from error
    if not args.prompts and not any(lines):
        raise ValueError("Nothing to draw: give a PROMPT, or --prompts-file with one prompt in a line.")
    return lines


def _check_generate(args: argparse.Namespace) -> None:
    """What is wrong with the arguments by themselves."""
    for index, prompt in enumerate(args.prompts):
        if not prompt.strip():
            raise ValueError(f"Prompt {index} is empty: write what the picture shows.")
    given = [name for name in ("temperature", "top_k", "top_p") if getattr(args, name) is not None]
    if args.greedy and given:
        raise ValueError(f"--greedy draws nothing by chance: leave out --{given[0].replace('_', '-')}.")
    if args.output_dir is not None and (args.prompts or args.prompts_file is None):
        raise ValueError(
            "--output-dir names pictures after the lines of a file: give --prompts-file, and no PROMPT beside it."
        )
    if args.preview_every is not None and (
        len(args.prompts) * args.num_images != 1 or args.prompts_file is not None or _is_directory(args.output)
    ):
        raise ValueError("--preview-every is for a single picture: give one PROMPT, and a .png as --output.")
    if args.output_dir is not None:
        _check_writable(args.output_dir, is_directory=True)
    else:
        _check_writable(args.output)
    if args.grid is not None:
        _check_writable(args.grid, is_directory=False)


def _bad_lines(pipe: LiquidImageGenerationPipeline, lines: list[str], size: dict[str, int | None]) -> dict[int, str]:
    """Number (from 1) and fault of each line that cannot be drawn."""
    bad = {}
    for number, line in enumerate(lines, start=1):
        try:
            if not line:
                raise ValueError("It is empty: write what the picture shows.")
            pipe.preprocess(line, **size)
        except ValueError as error:
            bad[number] = " ".join(str(error).split())
    return bad


def _pictures(args: argparse.Namespace, lines: list[str], bad: dict[int, str]) -> list[_Picture]:
    """What the command draws, whether it is there already or not."""
    good = {number: line for number, line in enumerate(lines, start=1) if number not in bad}
    if not args.prompts and not good:
        raise ValueError(f"Nothing to draw: no line of {args.prompts_file} can be drawn, as said above.")
    if args.output_dir is not None:
        # Names and seeds depend on the line alone, so that lines can be added at the end.
        seed = args.seed or 0
        suffixes = [f"-{image}" for image in range(args.num_images)] if args.num_images > 1 else [""]
        pictures = []
        for number, line in good.items():
            stem = f"{number:06}-{_slug(line)}"
            for image, suffix in enumerate(suffixes):
                path = args.output_dir / f"{stem}{suffix}.png"
                pictures.append(_Picture(line, seed + (number - 1) * args.num_images + image, path))
        return pictures
    seed = random.randrange(2**31) if args.seed is None else args.seed
    prompts = [prompt for prompt in [*args.prompts, *good.values()] for _ in range(args.num_images)]
    paths = _picture_paths(args.output, prompts)
    return [
        _Picture(prompt, seed + index, path) for index, (prompt, path) in enumerate(zip(prompts, paths, strict=True))
    ]


def _left(folder: Path, pictures: list[_Picture], records: dict[Path, dict[str, Any]]) -> list[_Picture]:
    """The pictures without a file. Raises if the folder holds one that this command would draw in another way."""
    instead = "Give the same arguments as before, choose another --output-dir, or delete the file."
    for path in sorted(folder.glob("*.png")):
        if not re.match(r"\d{6,}-", path.name):
            continue
        if path not in records:
            raise ValueError(f"{path} belongs to no line of the prompts file, nor to --num-images as given. {instead}")
        if different := differences(_identity(read_metadata(path)), _identity(records[path])):
            raise ValueError(f"{path} was drawn otherwise: {different}. {instead}")
    return [picture for picture in pictures if not picture.path.exists()]


def _picture_paths(output: Path, prompts: list[str]) -> list[Path]:
    """Where each picture goes: the file, numbered files beside it, or files in the folder named after the prompts."""
    digits = len(str(len(prompts) - 1))
    if _is_directory(output):
        return [output / f"{index:0{digits}}-{_slug(prompt)}.png" for index, prompt in enumerate(prompts)]
    if len(prompts) == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index:0{digits}}{output.suffix}") for index in range(len(prompts))]


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """All that pictures must share to be the same, as JSON keeps it. Speculation does not change them."""
    settings = {name: value for name, value in record["settings"].items() if name != "speculative"}
    return json.loads(json.dumps({name: record.get(name) for name in IDENTITY} | settings))


def _write_behind(write: Callable[..., None], drawn: Iterable[tuple[Any, ...]], limit: int) -> None:
    """Writes pictures in another thread while the next ones are drawn; no more than `limit` of them wait for it."""
    with ThreadPoolExecutor(max_workers=1) as writer:
        written: deque[Future] = deque()
        for arguments in drawn:
            written.append(writer.submit(write, *arguments))
            if len(written) > limit:
                written.popleft().result()
        for one in written:
            one.result()


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-")


def _is_directory(path: Path) -> bool:
    return path.is_dir() or not path.suffix


def _check_writable(path: Path, is_directory: bool | None = None) -> None:
    """Finds out now what would fail after the work. Makes the folder."""
    is_directory = _is_directory(path) if is_directory is None else is_directory
    if not is_directory and (path.suffix.lower() != ".png" or path.is_dir()):
        raise ValueError(f"Pictures are written as PNG: expected a path that ends with .png or a folder, got {path}.")
    folder = path if is_directory else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.is_file() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file is write-protected")
    except OSError as error:
        raise ValueError(f"Cannot write to {path}: {error.strerror or error}. Choose another place.") from error


def _check_new_directory(path: Path) -> None:
    """A checkpoint is never written over something."""
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: choose a new folder, nothing is overwritten.")
    _check_writable(path, is_directory=True)


def _record(
    args: argparse.Namespace,
    pipe: LiquidImageGenerationPipeline,
    prompt: str,
    seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Everything that a picture depends on, and the command that makes it again."""
    rows, columns = pipe.model.config.grid(args.height, args.width)
    size = {
        "height": rows * pipe.model.config.downsample_factor,
        "width": columns * pipe.model.config.downsample_factor,
    }
    options = {"model": args.model} if args.model != EMOJI_CHECKPOINT else {}
    options |= {"seed": seed, **size}
    options |= {name: settings[name] for name in SETTINGS if name in settings}
    options |= {"negative_prompt": args.negative_prompt} if args.negative_prompt is not None else {}
    options |= {"device": pipe.device.type, "dtype": str(pipe.dtype).removeprefix("torch.")}
    # With "=", and after "--", a value may begin with a dash.
    command = [PROG, "generate"]
    for name, value in options.items():
        command.append(f"--{name.replace('_', '-')}" + (f"={value}" if value is not True else ""))
    command += ["--greedy"] * (not settings["do_sample"]) + ["--"] * prompt.startswith("-") + [prompt]
    return {
        "prompt": prompt,
        "negative_prompt": args.negative_prompt,
        "seed": seed,
        "model": Path(args.model).name if args.model == EMOJI_CHECKPOINT else args.model,
        **size,
        "settings": settings,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "version": version("transformers-liquid"),
        "command": shlex.join(command),
    }


def _save_picture(image: Image.Image, path: Path, record: dict[str, Any] | list[dict[str, Any]]) -> None:
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
    _write_png(image, path, pnginfo=metadata)


def _write_png(image: Image.Image, path: Path, **kwargs: Any) -> None:
    with whole(path) as unfinished:
        image.save(unfinished, format="PNG", **kwargs)


def read_metadata(path: str | Path) -> dict[str, Any] | list[dict[str, Any]]:
    """How a picture of `generate` was drawn.

    Args:
        path (`str` or `Path`): The PNG.

    Returns:
        `dict`: Prompt, seed, model, sizes, settings, and the command that draws it again; a list of them for a
        contact sheet.

    Raises:
        ValueError: If the picture does not say.
    """
    with Image.open(path) as image:
        text = image.info.get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} does not say how it was drawn: only the PNGs of `{PROG} generate` do.")
    return json.loads(text)


# The rest


def _card_summary(model: str) -> str:
    """The first paragraph of the checkpoint's card."""
    path = cached_file(model, "README.md", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return "none"
    text = Path(path).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip() and not part.lstrip().startswith("#")]
    return " ".join(paragraphs[0].split()) if paragraphs else "empty"


def _silence_libraries() -> None:
    """Errors are ours to tell; bars are shown on a terminal only."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
