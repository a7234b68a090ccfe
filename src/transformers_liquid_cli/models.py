"""Models on their devices, for the commands that need one, and what each command does with an adapter."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from transformers.utils import PROCESSOR_NAME, cached_file

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor
from transformers_liquid.models.liquid.reference import adapter_base, check_loading_info
from transformers_liquid.utils.optional import require
from transformers_liquid.utils.processes import launched_processes

from .options import one_line


def silence_libraries() -> None:
    """Errors are ours to tell; bars are shown on a terminal only."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
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
    name, place = EMOJI_CHECKPOINT if name is None else name, find_device(device)
    with reading(name):
        base = adapter_base(name)
        if base is not None:
            require("peft", f"{name} is an adapter: that")
        model = LiquidForCausalLM.from_pretrained(base or name, dtype=dtype, **kwargs)
        if base is not None:
            model = add_adapter(model, name, merge)
        # Trainers save the processor beside the adapter, PEFT does not.
        quiet = dict.fromkeys(
            ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
        )
        has_processor = base is None or cached_file(name, PROCESSOR_NAME, **quiet) is not None
        processor = LiquidProcessor.from_pretrained(name if has_processor else base, **kwargs)
    model = model.to(place)
    return LiquidImageGenerationPipeline(model=model, processor=processor, device=model.device)


def add_adapter(model: LiquidForCausalLM, adapter: str, merge: bool) -> LiquidForCausalLM:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own calls
        # As `PeftModel.from_pretrained` does it, which does not tell what the file holds beyond the configuration.
        adapted = PeftModel(model, config, autocast_adapter_dtype=False)
        info = adapted.load_adapter(adapter, "default", autocast_adapter_dtype=False)
    found = {"missing_keys": info.missing_keys, "unexpected_keys": info.unexpected_keys, "mismatched_keys": ()}
    check_loading_info(f"The adapter {adapter}", found)
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


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
