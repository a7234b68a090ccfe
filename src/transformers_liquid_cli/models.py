"""Models on their devices, for the commands that need one."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor
from transformers_liquid.utils.processes import launched_processes


def silence_libraries() -> None:
    """Errors are ours to tell; bars are shown on a terminal only."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            library.utils.logging.disable_progress_bar()


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
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
    return processes, device if processes.num_processes == 1 else str(processes.device)


def load(name: str | None, device: str | None, dtype: str, **kwargs: Any) -> LiquidImageGenerationPipeline:
    """Model and processor of a checkpoint in either layout, on the device."""
    silence_libraries()
    name, place = name or EMOJI_CHECKPOINT, find_device(device)
    model = LiquidForCausalLM.from_pretrained(name, dtype=dtype, **kwargs).to(place)
    processor = LiquidProcessor.from_pretrained(name, **kwargs)
    return LiquidImageGenerationPipeline(model=model, processor=processor, device=model.device)


def write_answer(pipe: LiquidImageGenerationPipeline, max_new_tokens: int, seed: int | None, **inputs: Any) -> str:
    """The text that follows one prompt, `input_ids` of shape `(1, L)`, no longer than the context has room for."""
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
    return pipe.processor.decode(ids[0, length:], skip_special_tokens=True)
