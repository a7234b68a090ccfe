"""The server as a deployment of Ray Serve, and the pictures of a whole data set by Ray Data.

    serve run transformers_liquid.serving.ray:app model=path/to/model num_replicas=4 num_gpus=1

Each replica is a process with the model, a picture engine and the routes of `transformers-liquid serve`.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from transformers import pipeline

from ..checkpoints import EMOJI_CHECKPOINT
from .engine import PictureEngine
from .server import Server


class Arguments(BaseModel):
    """What `serve run` takes behind the name of the app, and a config file of Ray as its `args`.

    Args:
        model (`str`): A folder or a name on the Hub; the embedded checkpoint unless given.
        dtype (`str`, defaults to `"auto"`): As in `from_pretrained`.
        slots (`int`, defaults to 8), max_waiting (`int`, defaults to 64): As in [`PictureEngine`], of each replica.
        num_replicas (`int`, defaults to 1): Processes. A config file can have Ray choose: `autoscaling_config`.
        num_gpus (`float`, defaults to 0): Of each replica.
        api_key (`str`, *optional*): What clients must send; `TRANSFORMERS_LIQUID_API_KEY` unless given.
    """

    model_config = ConfigDict(extra="forbid")
    model: str = EMOJI_CHECKPOINT
    dtype: str = "auto"
    slots: int = 8
    max_waiting: int = 64
    num_replicas: int = 1
    num_gpus: float = 0
    api_key: str | None = Field(default_factory=lambda: os.environ.get("TRANSFORMERS_LIQUID_API_KEY"))


@serve.deployment
@serve.ingress()
class Replica:
    """A model and its server; Ray asks it for the app, and whether it is well."""

    def __init__(self, asked: Arguments) -> None:
        pipe = pipeline("text-to-image", model=asked.model, dtype=asked.dtype)
        self.engine = PictureEngine(pipe, asked.slots, asked.max_waiting)
        name = Path(asked.model).resolve().name if Path(asked.model).is_dir() else asked.model
        self.server = Server(self.engine, name, asked.api_key)

    def __serve_build_asgi_app__(self) -> Any:
        return self.server.app

    def check_health(self) -> None:
        if not self.engine.is_alive:
            raise RuntimeError("The picture engine has ended.")


def app(asked: Arguments) -> serve.Application:
    """What `serve run` starts."""
    return Replica.options(
        num_replicas=asked.num_replicas,
        max_ongoing_requests=asked.slots + asked.max_waiting,  # what its engine holds
        ray_actor_options={"num_gpus": asked.num_gpus},
    ).bind(asked)


class DrawBatch:
    """Draws the pictures of prompts, for Ray Data: a model for each of its workers.

    Args:
        model (`str`): A folder or a name on the Hub.
        settings: As in [`~LiquidImageGenerationPipeline.__call__`].

    Example:

    ```python
    >>> prompts = ray.data.read_parquet("prompts/")  # prompt, seed
    >>> drawn = prompts.map_batches(
    ...     DrawBatch, fn_constructor_args=["path/to/model"], batch_size=16, num_gpus=1, compute=ray.data.ActorPoolStrategy(size=8)
    ... )
    >>> drawn.write_parquet("pictures/")  # and image, as PNG
    ```
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.pipe, self.settings = pipeline("text-to-image", model=model), settings
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds the `image` to records with `prompt`, `seed` and, where there is one, `negative_prompt`."""
        if "seed" not in batch:
            raise ValueError(
                "Each record needs a seed: batches are drawn anywhere, in any order, and again on failure."
            )
        known = [name for name in ("prompt", "negative_prompt", "seed") if name in batch]
        records = [dict(zip(known, one, strict=True)) for one in zip(*(batch[name] for name in known), strict=True)]
        images = np.empty(len(records), dtype=object)
        for index, image in enumerate(self.pipe(records, batch_size=len(records), **self.settings)):
            image.save(file := io.BytesIO(), format="PNG")
            images[index] = file.getvalue()
        return batch | {"image": images}
