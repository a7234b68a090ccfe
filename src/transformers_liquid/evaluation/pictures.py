"""Features of pictures, and distances between many drawn and many true ones from them, (N, d) and (M, d), with errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from ..pipelines.text_to_image import LiquidImageGenerationPipeline


# The network of FID by its authors' weights, as TorchScript: of NVIDIA's stylegan2-ada-pytorch, which clean-fid takes too.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SIZE, INCEPTION_FEATURES = 299, 2048
GROUPS = 20

Extractor = Callable[[Sequence[Image.Image]], torch.Tensor]


def codec_features(pipe: LiquidImageGenerationPipeline, images: Sequence[Image.Image]) -> torch.Tensor:
    """What the encoder of a model's own codec makes of pictures, before it is rounded to codes: the mean of each channel
    over positions and its standard deviation, `(B, 2 * channels)`."""
    pixels = pipe.processor.image_processor(list(images), framing="crop")["pixel_values"]
    states = pipe.model.model.vq_model.encoder(pixels.to(pipe.device)).flatten(2)
    return torch.cat([states.mean(-1), states.std(-1)], dim=1)


def load_extractor(name: str, device: torch.device) -> Extractor:
    """What makes features `(B, d)` of pictures.

    Args:
        name (`str`): `"inception"`, which is downloaded once; a file of it, `*.pt`; or an image model of transformers, a
            folder or a name on the Hub: its projected or pooled output.
        device (`torch.device`): Where it runs.

    Raises:
        ConnectionError: If Inception cannot be fetched.
        ValueError: If the file is no Inception, or, when called, if there are other features than expected.
    """
    if name == "inception":
        path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, str(path))
            except OSError as error:
                raise ConnectionError(f"Cannot fetch {INCEPTION_URL} ({error}): put that file at {path}.") from error
        name = str(path)
    if name.endswith(".pt"):
        return _inception(name, device)
    processor, model = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name).eval().to(device)

    def extract(images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = processor(images=list(images), return_tensors="pt").to(device)
        pooled = getattr(getattr(model, "get_image_features", model)(**inputs), "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{name} gives no features of whole pictures (pooler_output): choose another extractor.")
        return pooled.flatten(1)

    return extract


def _inception(path: str, device: torch.device) -> Extractor:
    """As clean-fid 0.1.35 has it: each channel resized in floating point, bicubic, and not rounded."""
    try:
        layers = torch.jit.load(path, map_location=device).eval().layers
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no Inception with `layers` in TorchScript: {error}") from error

    def resized(channel: np.ndarray) -> Image.Image:
        return Image.fromarray(channel).resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC)

    def extract(images: Sequence[Image.Image]) -> torch.Tensor:
        arrays = [np.asarray(image, dtype=np.float32).transpose(2, 0, 1) for image in images]
        channels = [[*map(resized, array)] for array in arrays]
        pixels = torch.from_numpy(np.array(channels)).clamp(0, 255).to(device)
        features = layers((pixels - 128) / 128).flatten(1)
        if features.shape[1] != INCEPTION_FEATURES:
            raise ValueError(f"{path} gives {features.shape[1]} features, Inception {INCEPTION_FEATURES}.")
        return features

    return extract


def frechet_distance(drawn: torch.Tensor, true: torch.Tensor) -> float:
    """FID of features (N, d) and (M, d): |difference of means|^2 + tr(A + B - 2 (A B)^(1/2)), covariances with N - 1."""
    drawn, true = drawn.double(), true.double()
    covariances = torch.cov(drawn.T).reshape(drawn.shape[1], -1), torch.cov(true.T).reshape(true.shape[1], -1)
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    difference = (drawn.mean(0) - true.mean(0)).square().sum()
    return (difference + covariances[0].trace() + covariances[1].trace() - 2 * root).item()


class FrechetEstimate(NamedTuple):
    """A Fréchet distance as papers give it, its standard error, and what it is without the bias of a finite number drawn."""

    value: float
    error: float
    corrected: float


def frechet_estimate(drawn: torch.Tensor, true: torch.Tensor, groups: int = GROUPS) -> FrechetEstimate:
    """The Fréchet distance and, by a jackknife that leaves out a group of drawn pictures at a time, how sure it is.

    A bootstrap would not do: pictures that are drawn twice raise the distance itself, so that its interval misses it.
    The true pictures are taken as given, as they are in a benchmark.

    Args:
        drawn (`torch.Tensor` of shape `(N, d)`): Features of drawn pictures, in an order that says nothing.
        true (`torch.Tensor` of shape `(M, d)`): Of true ones.
        groups (`int`, defaults to 20): Of the jackknife.

    Raises:
        ValueError: If there are fewer pictures than make covariances, or other features.
    """
    _check(drawn, true)
    if not 2 <= groups <= len(drawn) // 2:
        raise ValueError(f"{len(drawn)} drawn pictures make no {groups} groups of two or more: draw more pictures.")
    member, value = torch.arange(len(drawn)) % groups, frechet_distance(drawn, true)
    left_out = [frechet_distance(drawn[member != group], true) for group in range(groups)]
    without = torch.tensor(left_out, dtype=torch.float64)
    error = ((groups - 1) * without.var(correction=0)).sqrt().item()
    return FrechetEstimate(value, error, groups * value - (groups - 1) * without.mean().item())


def kernel_distance(drawn: torch.Tensor, true: torch.Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401, section 4): the unbiased estimate of the squared MMD with the kernel
    (x y / d + 1)^3, over all pairs at once instead of random subsets. Arguments as in [`frechet_estimate`]."""
    _check(drawn, true)
    drawn, true = drawn.double(), true.double()

    def total(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return sum(((some @ other.T / one.shape[1] + 1) ** 3).sum() for some in one.split(1024))

    def within(of: torch.Tensor) -> torch.Tensor:
        of_itself = (of.square().sum(1) / of.shape[1] + 1) ** 3
        return (total(of, of) - of_itself.sum()) / (len(of) * (len(of) - 1))

    return (within(drawn) + within(true) - 2 * total(drawn, true) / (len(drawn) * len(true))).item()


def _check(drawn: torch.Tensor, true: torch.Tensor) -> None:
    if drawn.ndim != 2 or true.ndim != 2 or drawn.shape[1] != true.shape[1]:
        raise ValueError(
            f"Features must be (N, d) and (M, d) of one extractor, got {tuple(drawn.shape)} and {tuple(true.shape)}."
        )
    if min(len(drawn), len(true)) < 2:
        raise ValueError(f"A distance needs two pictures or more on each side, got {len(drawn)} and {len(true)}.")
