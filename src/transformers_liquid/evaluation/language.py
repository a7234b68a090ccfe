"""Language tasks, by lm-evaluation-harness on the model as it is: with all of its ids, those of pictures too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.files import write_text
from .benchmarks import FILES, TASKS
from .intervals import wilson_interval


def measure_language(
    pipe: LiquidImageGenerationPipeline, name: str, data: Path, folder: Path, limit: int | None, batch_size: int
) -> dict[str, dict[str, Any]]:
    """The accuracies of a task, on a local copy of its data set; what an earlier call was told by the model is not asked again.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): The model and its processor.
        name (`str`): Of `TASKS`. MMLU is asked after five examples, as in the paper, and is the mean over its questions.
        data (`Path`): Holds the copy: see `FILES`.
        folder (`Path`): Where the task's configuration and the model's replies go.
        limit (`int`, *optional*): Only so many questions; of each subject.
        batch_size (`int`): Requests in one forward.

    Returns:
        `dict`: `acc`, and `acc_norm` where answers are compared by their length too; intervals by the harness' standard error.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    stock, local, tasks = Path(lm_eval.__file__).parent / "tasks", folder / "tasks", []
    for file in sorted(stock.glob(TASKS[name])):
        tasks.append(f"{name}-{file.stem}")
        config = {"include": str(file), "task": tasks[-1], "dataset_path": str((data / FILES[name][0]).resolve())}
        local.mkdir(exist_ok=True)
        write_text(local / f"{tasks[-1]}.yaml", json.dumps(config | ({"num_fewshot": 5} if name == "mmlu" else {})))
    harness = HFLM(pretrained=pipe.model, tokenizer=pipe.tokenizer, batch_size=batch_size)
    manager = TaskManager(include_defaults=False, include_path=str(local))
    # Errors of means are no bootstrap, but there are none without.
    how = {"limit": limit, "use_cache": str(folder / "requests"), "bootstrap_iters": 1, "log_samples": False}
    found = lm_eval.simple_evaluate(harness, tasks=tasks, task_manager=manager, **how)["results"].values()
    measures = {}
    for metric in ("acc", "acc_norm"):
        key, error = f"{metric},none", f"{metric}_stderr,none"
        rows = [(of["sample_len"], of[key], np.nan if of[error] == "N/A" else of[error]) for of in found if key in of]
        if rows:
            numbers, values, errors = np.array(rows).T
            number, value = int(numbers.sum()), float(numbers @ values / numbers.sum())
            interval = wilson_interval(value, np.linalg.norm(numbers * errors) / number, number)
            interval = interval and [100 * side for side in interval]
            measures[metric] = {"value": 100 * value, "interval": interval, "n": number}
    return measures
