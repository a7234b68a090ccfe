"""Checkpoints of a run: which one is the newest, whether it is whole, and that one run alone writes them."""

from __future__ import annotations

import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..utils.files import alone_in, read_json


logger = logging.get_logger(__name__)

# What a run needs to go on as if it had never stopped, as the Trainer, FSDP or DeepSpeed (`global_step`) writes it.
_PARTS = {
    "weights": ("*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer": ("optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
    "trainer state": (TRAINER_STATE_NAME,),
}


def alone(args: TrainingArguments) -> AbstractContextManager[None]:
    """Keeps other runs out of the output folder, with a `ValueError`; the processes of one run share it."""
    if args.process_index:
        return nullcontext()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return alone_in(Path(args.output_dir))


def check_checkpoint(folder: str | Path) -> None:
    """Checks that nothing of a checkpoint is missing or cut off; contents are not looked at.

    Raises:
        ValueError: If something is, naming it.
    """
    folder = Path(folder)
    for part, patterns in _PARTS.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise ValueError(f"The checkpoint {folder} has no {part} ({' or '.join(patterns)}).")
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
            elif path.suffix == ".json":
                for shard in read_json(path).get("weight_map", {}).values():
                    (folder / shard).stat()
        except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
            raise ValueError(f"{path} is damaged, or what it names is missing: {error}") from error


def progress(folder: str | Path) -> tuple[int, int]:
    """How many steps of how many are done, as the trainer's state in a folder says; 0 of 1 if there is none."""
    path = Path(folder, TRAINER_STATE_NAME)
    state = read_json(path) if path.is_file() else {"global_step": 0, "max_steps": 1}
    return state["global_step"], state["max_steps"]


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; its state comes last."""
    return next((str(folder) for folder in _newest_first(output_dir)), None)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that [`check_checkpoint`] lets pass; those that it does not are warned about.

    Raises:
        ValueError: If there are checkpoints and none is whole.
    """
    problem = None
    for folder in _newest_first(output_dir):
        try:
            check_checkpoint(folder)
            return str(folder)
        except ValueError as error:
            problem = error
            logger.warning(f"{folder.name} is passed over: {error}")
    if problem is not None:
        raise ValueError(f"No checkpoint in {output_dir} can be continued; begin anew in another folder. {problem}")
    return None


def _newest_first(output_dir: str | Path) -> list[Path]:
    """The checkpoints that were written to their end, whatever else the folder holds."""
    folders = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    steps = {int(step): folder for folder in folders if (step := folder.name.rpartition("-")[2]).isdecimal()}
    return [steps[step] for step in sorted(steps, reverse=True)]
