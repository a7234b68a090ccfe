"""Models on their devices, for the commands that need one, and what each command does with an adapter."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError

from transformers_liquid import LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor
from transformers_liquid.checkpoints import find_checkpoint
from transformers_liquid.models.liquid.reference import adapter_base
from transformers_liquid.ops.merged_adapters import unload_adapters
from transformers_liquid.utils.optional import require
from transformers_liquid.utils.processes import launched_processes

from .options import log, one_line, session


def silence_libraries() -> None:
    """Errors are ours to tell, unless more is asked for; bars are shown on a terminal only."""
    for library in (transformers, diffusers):
        speak = library.utils.logging
        (speak.set_verbosity_warning if session.is_verbose else speak.set_verbosity_error)()
        if sys.stderr is None or not sys.stderr.isatty():
            library.utils.logging.disable_progress_bar()


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        empty = torch.empty(0, device=name)
        empty.tolist()  # meta tensors have no numbers
        return empty.device
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was not built with
        raise ValueError(f"--device {name} cannot be used here: {error}") from error


def find_processes(device: str | None, output_dir: Path | None) -> tuple[PartialState, str | None]:
    """The processes of `accelerate launch`, and the device of this one; or this one alone, on the device asked for."""
    processes = launched_processes()
    if processes.num_processes > 1 and (output_dir is None or device is not None):
        raise ValueError(
            "Several processes, each on a device of its own, share the lines of a file: give --prompts-file and "
            "--output-dir, and leave out --device."
        )
    if not processes.is_main_process:
        log.setLevel(logging.CRITICAL)
    return processes, device if processes.num_processes == 1 else str(processes.device)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """What libraries stumble over in a damaged or foreign checkpoint is told with its name."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError):
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged, or not as its configuration says: {one_line(error)}") from error


def load(
    name: str | None, device: str | None, dtype: str, merge: bool = False, **kwargs: Any
) -> LiquidImageGenerationPipeline:
    """Model and processor of a checkpoint in either layout, on the device; of an adapter, on top of its base.

    Args:
        merge (`bool`, defaults to `False`): Whether an adapter becomes part of the weights.
    """
    silence_libraries()
    name, place = find_checkpoint(name), find_device(device)
    with reading(name):
        base = adapter_base(name)
        if base is not None:
            require("peft", f"{name} is an adapter: that")
        try:
            model = LiquidForCausalLM.from_pretrained(base or name, dtype=dtype, **kwargs)
        except OSError as error:
            if base is None:
                raise
            raise OSError(f"{name} is an adapter of {base}, as its adapter_config.json says. {error}") from error
        if base is not None:
            model.load_adapter(name)
        if base is not None and merge:
            unload_adapters(model, merge=True)
        processor = LiquidProcessor.from_pretrained(name, **kwargs)
    model = model.to(place)
    log.debug(f"{name} is loaded: {model.num_parameters():,} parameters in {model.dtype} on {model.device}.")
    return LiquidImageGenerationPipeline(model=model, processor=processor, device=model.device)


def write_answers(
    pipe: LiquidImageGenerationPipeline, max_new_tokens: int, seed: int | None, **inputs: Any
) -> list[str]:
    """The texts that follow prompts, `input_ids` of shape `(B, L)`, no longer than the context has room for."""
    limit = getattr(pipe.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    length = inputs["input_ids"].shape[1]
    if length >= limit:
        raise ValueError(
            f"The prompt has {length} tokens, the model {limit} positions: there is no room for an answer."
        )
    if seed is not None:
        transformers.set_seed(seed)
    inputs = pipe.ensure_tensor_on_device(**inputs)
    ids = pipe.model.generate(**inputs, max_new_tokens=min(max_new_tokens, limit - length))
    return [text.strip() for text in pipe.processor.batch_decode(ids[:, length:], skip_special_tokens=True)]
