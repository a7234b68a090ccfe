"""Trains the codec of liquid-emoji: 64 x 64 pixels <-> 8 x 8 codes.

    python examples/emoji/train_codec.py --data_dir emoji-data --output_dir emoji-codec

Three phases, checkpointed every epoch; run the same command again to continue a stopped run:
1. continuous: encoder and decoder without a codebook, so that the codebook starts from a k-means of useful latents;
2. quantized: straight-through training, the codebook by exponential moving averages, dead codes revived;
3. decoder: encoder and codebook frozen (codes are final: the language model can be trained meanwhile).

The loss is the mean squared error plus a little of the error of the picture's gradients (sharper edges). Only "seen"
pictures are trained on. With `--icons N`, N icons (see icons.py) are drawn by lot for every epoch beside the emoji.
The decoder alone is trained on, with icons, by

    python examples/emoji/train_codec.py --data_dir emoji-data --output_dir emoji-codec-2 --continue_from emoji-codec \
        --epochs 0 0 30 --icons 1000 --decoder_learning_rate 1e-3
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import load_emoji, load_pixels
from icons import load_icons
from PIL import Image
from tqdm import tqdm

from transformers_liquid.codecs.vq_model import LiquidVQModel


CODEC_CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 48, 96, 160],
    "layers_per_block": 1,
    "latent_channels": 64,
    "sample_size": 64,
    "num_vq_embeddings": 2048,
    "vq_embed_dim": 16,
    "norm_num_groups": 8,
}
PHASES = ("continuous", "quantized", "decoder")


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    emoji = load_emoji(args.data_dir)
    pixels = load_pixels(emoji)
    train = pixels[[index for index, item in enumerate(emoji) if item.split == "seen"]]
    icons = load_icons(args.data_dir)[0] if args.icons else torch.empty(0, *pixels.shape[1:])
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    codec = LiquidVQModel(**CODEC_CONFIG)
    if args.continue_from is not None:
        codec.load_state_dict(LiquidVQModel.from_pretrained(args.continue_from).state_dict())
    codebook = MovingAverageCodebook(codec.quantize.embedding.weight)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    epochs = dict(zip(PHASES, args.epochs, strict=True))
    start = 0
    checkpoint = output_dir / "training_state.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        codec.load_state_dict(state["codec"])
        codebook.load_state_dict(state["codebook"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]

    for epoch in range(start, sum(epochs.values())):
        phase, learning_rate = schedule(epoch, epochs, args.learning_rate, args.decoder_learning_rate)
        if phase == "quantized" and epoch == epochs["continuous"]:
            codebook.initialize(torch.cat([codec.encode(batch).latents.detach() for batch in train.split(256)]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        draw = torch.Generator().manual_seed(epoch)
        some = icons[torch.randperm(len(icons), generator=draw)[: args.icons]]
        shown = torch.cat([train, some.float() / 127.5 - 1])
        loss = train_epoch(codec, codebook, optimizer, shown, phase, args.batch_size, epoch)
        torch.save(
            {
                "codec": codec.state_dict(),
                "codebook": codebook.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
            },
            checkpoint.with_suffix(".tmp"),
        )
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        print(f"epoch {epoch + 1} {phase} lr {learning_rate:.1e} loss {loss:.4f}", flush=True)
        if phase != "continuous" and (epoch % 5 == 4 or epoch + 1 == sum(epochs.values())):
            report(codec, emoji, pixels, output_dir)
            codec.save_pretrained(output_dir)


def schedule(epoch: int, epochs: dict[str, int], peak: float, decoder_peak: float) -> tuple[str, float]:
    """Phase and learning rate of an epoch: one cosine over the first two phases, a lower one over the third."""
    joint = epochs["continuous"] + epochs["quantized"]
    if epoch >= joint:
        return "decoder", decoder_peak * (0.5 * (1 + math.cos(math.pi * (epoch - joint) / epochs["decoder"])) + 0.02)
    phase = "continuous" if epoch < epochs["continuous"] else "quantized"
    return phase, peak * (0.5 * (1 + math.cos(math.pi * epoch / joint)) + 0.02)


def train_epoch(codec, codebook, optimizer, train, phase: str, batch_size: int, epoch: int) -> float:
    """One pass over the training pictures; returns the mean reconstruction loss."""
    codec.train()
    codec.requires_grad_(True)
    codec.quantize.requires_grad_(False)
    if phase == "decoder":
        codec.encoder.requires_grad_(False)
        codec.quant_conv.requires_grad_(False)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
    total = 0.0
    batches = order.split(batch_size)
    for indices in tqdm(batches, desc=f"epoch {epoch + 1} ({phase})", leave=False, mininterval=5):
        picture = train[indices]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.set_grad_enabled(phase != "decoder"):
                latents = codec.encode(picture).latents.float()
            commitment = latents.new_zeros(())
            if phase != "continuous":
                codes = codec.nearest_codes(latents)
                quantized = codec.quantize.embedding(codes).permute(0, 3, 1, 2)
                if phase == "quantized":
                    codebook.update(latents.detach(), codes)
                    commitment = F.mse_loss(latents, quantized)
                latents = latents + (quantized - latents).detach()
            drawn = codec.decode(latents, force_not_quantize=True).sample.float()
        loss = reconstruction_loss(drawn, picture)
        (loss + 0.25 * commitment).backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
    return total / len(batches)


def reconstruction_loss(drawn: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Mean squared error plus a little of the absolute error of horizontal and vertical differences."""
    error = drawn - picture
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.square().mean() + 0.02 * edges


class MovingAverageCodebook:
    """Keeps a codebook at the running mean of the latents assigned to each code (van den Oord et al. 2017, app. A)."""

    def __init__(self, weight: torch.Tensor, decay: float = 0.99) -> None:
        self.weight, self.decay = weight, decay
        self.counts = torch.ones(len(weight))
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
        self.counts, self.sums = torch.ones(len(centres)), centres.clone()

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
    """Codes `(N, 8, 8)` and pictures after encoding and decoding."""
    codec.eval()
    codes = torch.cat([codec.encode_codes(batch) for batch in pixels.split(128)])
    return codes, torch.cat([codec.decode_codes(batch).clamp(-1, 1) for batch in codes.split(128)])


def psnr(drawn: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for values in [-1, 1]."""
    return 10 * torch.log10(4 / (drawn - picture).square().mean((1, 2, 3)).clamp_min(1e-10))


def report(codec: LiquidVQModel, emoji, pixels: torch.Tensor, output_dir: Path) -> None:
    """Prints the PSNR of every split and draws originals above reconstructions."""
    codes, drawn = reconstruct(codec, pixels)
    quality = psnr(drawn, pixels)
    for split in ("seen", "unseen_composition", "unseen_flag"):
        chosen = torch.tensor([item.split == split for item in emoji])
        mean_square = 10 * math.log10(4 / (drawn - pixels)[chosen].square().mean().item())
        print(f"  {split}: PSNR {quality[chosen].mean():.2f} dB (of the mean error: {mean_square:.2f} dB)", flush=True)
    print(f"  codes in use: {codes.unique().numel()} of {codec.codebook_size}", flush=True)
    shown = torch.linspace(0, len(emoji) - 1, 64).long().view(4, 16)
    rows = [torch.cat([torch.cat(list(part[row]), dim=-1) for part in (pixels, drawn)], dim=-2) for row in shown]
    sheet = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(output_dir / "reconstructions.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", default="emoji-codec")
    parser.add_argument("--epochs", type=int, nargs=3, default=(6, 28, 6), metavar=PHASES, help="epochs per phase")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--decoder_learning_rate", type=float, default=2.25e-4)
    parser.add_argument("--continue_from", help="a trained codec: its weights instead of new ones")
    parser.add_argument("--icons", type=int, default=0, help="icons in an epoch, beside the emoji")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
