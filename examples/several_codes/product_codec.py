"""Trains two codecs that differ in nothing but their codes: one of 2,048, or four of 256, for each of 4 x 4 positions.

    python examples/several_codes/product_codec.py --data_dir emoji-data --output_dir begun --num_codebooks 1 --epochs 6 12 0
    python examples/several_codes/product_codec.py --data_dir emoji-data --output_dir k4/codec --num_codebooks 4 \\
        --continue_from begun
    python examples/several_codes/product_codec.py --data_dir emoji-data --output_dir k1/codec --num_codebooks 1 \\
        --continue_from begun

A small `UniTokModel`, in the three phases of examples/codec/codec_training.py. Run a command again to continue it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from transformers_liquid.codecs.unitok import UniTokModel, code_vectors


sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("codec", "emoji")]
from codec_training import (
    PHASES,
    MovingAverageCodebook,
    psnr,
    reconstruct,
    reconstruction_loss,
    save_sheet,
    schedule,
)
from emoji_data import load_emoji, load_pixels, split_tones


CODEC_CONFIG = {
    "sample_size": 64,
    "vq_embed_dim": 32,
    "block_out_channels": [3, 24, 24, 48, 192],
    "layers_per_block": [1, 2],
    "num_layers": 2,
    "num_attention_heads": 3,
}
CODEBOOK_SIZES = {1: 2048, 4: 256}  # one code as in liquid-emoji
MAX_SHIFT = 4
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities")


def load_things(data_dir: str, groups: tuple[str, ...] = GROUPS) -> tuple[list[str], torch.Tensor]:
    """Names and pictures of the emoji of these groups."""
    emoji = [one for one in load_emoji(data_dir) if one.group in groups and not split_tones(one.name)[1]]
    return [one.name for one in emoji], load_pixels(emoji)


def shifted(pixels: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Pictures moved by a few pixels; what comes in is white."""
    moved = F.pad(pixels, (MAX_SHIFT,) * 4, value=1.0).roll((down, right), (-2, -1))
    return moved[..., MAX_SHIFT:-MAX_SHIFT, MAX_SHIFT:-MAX_SHIFT]


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    _, pixels = load_things(args.data_dir)
    seen, held_out = pixels[torch.arange(len(pixels)) % 10 > 0], pixels[::10]
    codec = UniTokModel(
        num_codebooks=args.num_codebooks, num_vq_embeddings=CODEBOOK_SIZES[args.num_codebooks], **CODEC_CONFIG
    )
    if args.continue_from is not None:
        weights = UniTokModel.from_pretrained(args.continue_from).state_dict()
        codec.load_state_dict({name: one for name, one in weights.items() if "codebooks" not in name}, strict=False)
    codec.codebooks.requires_grad_(False)
    books = [MovingAverageCodebook(one) for one in codec.codebooks]
    optimizer = torch.optim.AdamW(codec.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    output_dir, start, epochs = Path(args.output_dir), 0, dict(zip(PHASES, args.epochs, strict=True))
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = output_dir / "training_state.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        for book, own in zip(books, state["books"], strict=True):
            book.load_state_dict(own)
        start = state["epoch"]

    def features(batch):
        with torch.autocast("cpu", torch.bfloat16):
            found = codec.quant_proj(codec.encoder(batch).flatten(2).transpose(1, 2)).float()
        return F.normalize(found.unflatten(-1, (args.num_codebooks, -1)), dim=-1)  # (B, n, K, d)

    for epoch in range(start, sum(args.epochs)):
        began = time.perf_counter()
        draw = torch.Generator().manual_seed(epoch)
        phase, rate = schedule(epoch, epochs, args.learning_rate, args.decoder_learning_rate)
        if phase == "quantized" and epoch == epochs["continuous"]:
            with torch.no_grad():
                found = torch.cat([features(shifted(one, *_shift(draw))) for _ in range(3) for one in seen.split(64)])
            for book, own in zip(books, found.unbind(2), strict=True):
                book.initialize(own.transpose(1, 2)[..., None])
        for group in optimizer.param_groups:
            group["lr"] = rate
        codec.encoder.requires_grad_(phase != "decoder")
        codec.quant_proj.requires_grad_(phase != "decoder")
        losses = []
        for order in torch.randperm(len(seen), generator=draw).split(args.batch_size):
            batch = shifted(seen[order], *_shift(draw))
            pieces = features(batch)
            latents, commitment = pieces.flatten(2), torch.zeros(())
            if phase != "continuous":
                codes = codec.nearest_codes(latents.detach())
                if phase == "quantized":
                    for book, own, one in zip(books, pieces.detach().unbind(2), codes.unbind(1), strict=True):
                        book.update(own.transpose(1, 2)[..., None], one)
                quantized = code_vectors(codec.codebooks, codes)
                commitment = F.mse_loss(latents, quantized) if phase == "quantized" else commitment
                latents = latents + (quantized - latents).detach()
            with torch.autocast("cpu", torch.bfloat16):
                drawn = codec.decoder(codec.post_quant_proj(latents), (4, 4)).float()
            loss = reconstruction_loss(drawn, batch)
            (loss + 0.25 * commitment).backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        state = {"codec": codec.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(state | {"books": [book.state_dict() for book in books]}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        seconds = time.perf_counter() - began
        print(
            f"epoch {epoch + 1} {phase} lr {rate:.1e} loss {sum(losses) / len(losses):.4f} {seconds:.0f} s", flush=True
        )
        if phase != "continuous" and (epoch % 3 == 1 or epoch + 1 == sum(args.epochs)):
            for name, some in {"seen": seen, "held out": held_out}.items():
                codes, drawn = reconstruct(codec, some)
                print(f"  {name}: PSNR {psnr(drawn, some).mean():.2f} dB", flush=True)
            save_sheet(held_out[:32], drawn[:32], output_dir / "reconstructions.png")
            codec.save_pretrained(output_dir)
            codec.train()


def _shift(draw: torch.Generator) -> list[int]:
    return torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=draw).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--continue_from", help="a codec: its weights, but for the codebooks, instead of new ones")
    parser.add_argument("--num_codebooks", type=int, choices=CODEBOOK_SIZES, required=True)
    parser.add_argument("--epochs", type=int, nargs=3, default=(2, 9, 0), metavar=PHASES, help="epochs per phase")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--decoder_learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
