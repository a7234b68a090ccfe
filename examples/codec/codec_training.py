"""How a codec is trained, for train_codec.py here and for examples/emoji.

Three phases:
1. continuous: encoder and decoder without a codebook, so that the codebook starts from a k-means of useful latents;
2. quantized: straight-through training, the codebook by exponential moving averages, dead codes revived;
3. decoder: encoder and codebook frozen (codes are final: a language model can be trained meanwhile).

The loss is the mean squared error plus a little of the error of the picture's gradients (sharper edges).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from transformers_liquid import LiquidVQModel


PHASES = ("continuous", "quantized", "decoder")


def train(
    codec: LiquidVQModel,
    batches: Callable[[int], Iterable[torch.Tensor]],
    latents: Callable[[], torch.Tensor],
    report: Callable[[], None],
    output_dir: Path,
    epochs: dict[str, int],
    learning_rate: float,
    decoder_learning_rate: float,
) -> None:
    """Trains and saves a codec. A checkpoint is written every epoch; the same call continues a stopped run.

    Args:
        codec ([`LiquidVQModel`]): On the device to train on.
        batches: The batches of an epoch's number, pictures `(B, 3, H, W)` in [-1, 1].
        latents: Latents `(N, C, h, w)` for the codebook to begin with.
        report: Is called where the codec is saved.
        output_dir (`Path`): Where to.
        epochs (`dict`): How many there are of each of the `PHASES`.
        learning_rate, decoder_learning_rate (`float`): The greatest of the first two phases, and of the third.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    codebook = MovingAverageCodebook(codec.quantize.embedding.weight)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    start, checkpoint = 0, output_dir / "training_state.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=codec.device)
        codec.load_state_dict(state["codec"])
        codebook.load_state_dict(state["codebook"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    for epoch in range(start, sum(epochs.values())):
        phase, rate = schedule(epoch, epochs, learning_rate, decoder_learning_rate)
        if phase == "quantized" and epoch == epochs["continuous"]:
            codebook.initialize(latents())
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = train_epoch(codec, codebook, optimizer, batches(epoch), phase)
        state = {"codec": codec.state_dict(), "codebook": codebook.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"epoch": epoch + 1}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        print(f"epoch {epoch + 1} {phase} lr {rate:.1e} loss {loss:.4f}", flush=True)
        if phase != "continuous" and (epoch % 5 == 4 or epoch + 1 == sum(epochs.values())):
            report()
            codec.save_pretrained(output_dir)


def schedule(epoch: int, epochs: dict[str, int], peak: float, decoder_peak: float) -> tuple[str, float]:
    """Phase and learning rate of an epoch: one cosine over the first two phases, a lower one over the third."""
    joint = epochs["continuous"] + epochs["quantized"]
    if epoch >= joint:
        return "decoder", decoder_peak * (0.5 * (1 + math.cos(math.pi * (epoch - joint) / epochs["decoder"])) + 0.02)
    phase = "continuous" if epoch < epochs["continuous"] else "quantized"
    return phase, peak * (0.5 * (1 + math.cos(math.pi * epoch / joint)) + 0.02)


def encode(codec: LiquidVQModel, picture: torch.Tensor) -> torch.Tensor:
    """Latents of pictures in [-1, 1], with gradients; the networks of aMUSEd's family work in [0, 1]."""
    return codec.quant_conv(codec.encoder(picture / 2 + 0.5 if codec.config.lookup_from_codebook else picture))


def decode(codec: LiquidVQModel, latents: torch.Tensor) -> torch.Tensor:
    drawn = codec.decoder(codec.post_quant_conv(latents), latents if codec.config.norm_type == "spatial" else None)
    return drawn * 2 - 1 if codec.config.lookup_from_codebook else drawn


def train_epoch(codec, codebook, optimizer, batches: Iterable[torch.Tensor], phase: str) -> float:
    """One pass over the training pictures; returns the mean reconstruction loss."""
    codec.train()
    codec.requires_grad_(True)
    codec.quantize.requires_grad_(False)
    if phase == "decoder":
        codec.encoder.requires_grad_(False)
        codec.quant_conv.requires_grad_(False)
    losses = []
    for picture in batches:
        picture = picture.to(codec.device)
        with torch.autocast(codec.device.type, dtype=torch.bfloat16):
            with torch.set_grad_enabled(phase != "decoder"):
                latents = encode(codec, picture).float()
            commitment = latents.new_zeros(())
            if phase != "continuous":
                codes = codec.nearest_codes(latents)
                quantized = codec.quantize.embedding(codes).permute(0, 3, 1, 2)
                if phase == "quantized":
                    codebook.update(latents.detach(), codes)
                    commitment = F.mse_loss(latents, quantized)
                latents = latents + (quantized - latents).detach()
            drawn = decode(codec, latents).float()
        loss = reconstruction_loss(drawn, picture)
        (loss + 0.25 * commitment).backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return sum(losses) / len(losses)


def reconstruction_loss(drawn: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Mean squared error plus a little of the absolute error of horizontal and vertical differences."""
    error = drawn - picture
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.square().mean() + 0.02 * edges


class MovingAverageCodebook:
    """Keeps a codebook at the running mean of the latents assigned to each code (van den Oord et al. 2017, app. A)."""

    def __init__(self, weight: torch.Tensor, decay: float = 0.99) -> None:
        self.weight, self.decay = weight, decay
        self.counts = weight.new_ones(len(weight))
        self.sums = weight.detach().clone()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts, self.sums = state["counts"], state["sums"]

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor, steps: int = 20) -> None:
        """k-means over all latents `(N, C, h, w)`."""
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
        # Most latents of emoji are the white margin: start from distinct vectors.
        vectors_drawn = vectors[torch.randperm(len(vectors))[: 8 * len(self.weight)]].unique(dim=0)
        centres = vectors_drawn[torch.randperm(len(vectors_drawn))[: len(self.weight)]].clone()
        for _ in range(steps):
            nearest = torch.cat(
                [(part @ centres.T * -2 + centres.square().sum(1)).argmin(1) for part in vectors.split(16384)]
            )
            counts = torch.bincount(nearest, minlength=len(centres)).float()
            sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
            badly_served = badly_coded(vectors, centres[nearest], len(centres))
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), badly_served)
        self.weight.copy_(centres)
        self.counts, self.sums = centres.new_ones(len(centres)), centres.clone()

    @torch.no_grad()
    def update(self, latents: torch.Tensor, codes: torch.Tensor) -> None:
        """One moving-average step; codes that have died out are moved onto latents of this batch."""
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
        codes = codes.flatten()
        counts = torch.bincount(codes, minlength=len(self.weight)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = (self.counts < 0.02).nonzero().flatten()[:64]  # a few at a time: each changes what the others are worth
        self.counts[dead] = 0.2
        self.sums[dead] = 0.2 * badly_coded(vectors, self.weight[codes], len(dead))
        self.weight.copy_(self.sums / self.counts[:, None])


def badly_coded(vectors: torch.Tensor, coded: torch.Tensor, number: int) -> torch.Tensor:
    """Some of the vectors, the likelier the further they lie from their code (most latents are plain white margin)."""
    if number == 0:
        return vectors[:0]
    return vectors[torch.multinomial((vectors - coded).square().sum(1) + 1e-12, number, replacement=True)]


@torch.no_grad()
def reconstruct(codec: LiquidVQModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(N, h, w)` and pictures after encoding and decoding."""
    codec.eval()
    codes = torch.cat([codec.encode_codes(batch) for batch in pixels.split(128)])
    return codes, torch.cat([codec.decode_codes(batch).clamp(-1, 1) for batch in codes.split(128)])


def psnr(drawn: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for values in [-1, 1]."""
    return 10 * torch.log10(4 / (drawn - picture).square().mean((1, 2, 3)).clamp_min(1e-10))


def save_sheet(pixels: torch.Tensor, drawn: torch.Tensor, path: Path, columns: int = 16) -> None:
    """Draws pictures above their reconstructions."""
    pairs = torch.cat([pixels, drawn], dim=-2)
    pairs = F.pad(pairs, (0, 0, 0, 0, 0, 0, 0, -len(pairs) % min(columns, len(pairs))), value=1.0)
    rows = [torch.cat(list(row), dim=-1) for row in pairs.split(columns)]
    sheet = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(sheet).save(path)
