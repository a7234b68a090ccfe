"""Trains two codecs that differ in nothing but their codes: one of 2,048, or four of 256, for each of 4 x 4 positions.

    python examples/several_codes/product_codec.py --data_dir emoji-data --output_dir begun --num_codebooks 1 --epochs 6 12
    python examples/several_codes/product_codec.py --data_dir emoji-data --output_dir k4/codec --num_codebooks 4 \\
        --continue_from begun
    python examples/several_codes/product_codec.py --data_dir emoji-data --output_dir k1/codec --num_codebooks 1 \\
        --continue_from begun

A small `UniTokModel`, in the first two phases of examples/codec/codec_training.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from transformers_liquid.codecs.unitok import UniTokModel, code_vectors


sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("codec", "emoji")]
from codec_training import MovingAverageCodebook, psnr, reconstruct, reconstruction_loss, save_sheet, schedule
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


def shifted_by_lot(pixels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    return shifted(pixels, *torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=draw).tolist())


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    _, pixels = load_things(args.data_dir)
    seen, held_out = pixels[torch.arange(len(pixels)) % 10 > 0], pixels[::10]
    size = CODEBOOK_SIZES[args.num_codebooks]
    codec = UniTokModel(num_codebooks=args.num_codebooks, num_vq_embeddings=size, **CODEC_CONFIG)
    if args.continue_from is not None:
        weights = UniTokModel.from_pretrained(args.continue_from).state_dict()
        codec.load_state_dict({name: one for name, one in weights.items() if "codebooks" not in name}, strict=False)
    codec.codebooks.requires_grad_(False)
    books = [MovingAverageCodebook(one) for one in codec.codebooks]
    optimizer = torch.optim.AdamW(codec.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    epochs = dict(zip(("continuous", "quantized", "decoder"), (*args.epochs, 0), strict=True))

    def encode(batch: torch.Tensor) -> torch.Tensor:
        """Pieces `(B, n, K, d)` of length 1."""
        with torch.autocast("cpu", torch.bfloat16):
            features = codec.quant_proj(codec.encoder(batch).flatten(2).transpose(1, 2)).float()
        return F.normalize(features.unflatten(-1, (args.num_codebooks, -1)), dim=-1)

    for epoch in range(sum(args.epochs)):
        draw, losses = torch.Generator().manual_seed(epoch), []
        phase, optimizer.param_groups[0]["lr"] = schedule(epoch, epochs, args.learning_rate, 0.0)
        if epoch == epochs["continuous"]:
            with torch.no_grad():
                found = [encode(shifted_by_lot(one, draw)) for _ in range(3) for one in seen.split(64)]
            for book, own in zip(books, torch.cat(found).unbind(2), strict=True):
                book.initialize(own.transpose(1, 2)[..., None])
        for order in torch.randperm(len(seen), generator=draw).split(32):
            batch = shifted_by_lot(seen[order], draw)
            pieces, commitment = encode(batch), torch.zeros(())
            latents = pieces.flatten(2)
            if phase == "quantized":
                codes = codec.nearest_codes(latents.detach())
                for book, own, one in zip(books, pieces.detach().unbind(2), codes.unbind(1), strict=True):
                    book.update(own.transpose(1, 2)[..., None], one)
                quantized = code_vectors(codec.codebooks, codes)
                commitment = F.mse_loss(latents, quantized)
                latents = latents + (quantized - latents).detach()
            with torch.autocast("cpu", torch.bfloat16):
                drawn = codec.decoder(codec.post_quant_proj(latents), (4, 4)).float()
            loss = reconstruction_loss(drawn, batch)
            (loss + 0.25 * commitment).backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        print(f"epoch {epoch + 1} {phase} loss {sum(losses) / len(losses):.4f}", flush=True)
    codec.save_pretrained(args.output_dir)
    for name, some in {"seen": seen, "held out": held_out}.items():
        drawn = reconstruct(codec, some)[1]
        print(f"{name}: PSNR {psnr(drawn, some).mean():.2f} dB", flush=True)
    save_sheet(held_out[:32], drawn[:32], Path(args.output_dir) / "reconstructions.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--continue_from", help="a codec: its weights, but for the codebooks, instead of new ones")
    parser.add_argument("--num_codebooks", type=int, choices=CODEBOOK_SIZES, required=True)
    parser.add_argument("--epochs", type=int, nargs=2, default=(2, 9), metavar=("CONTINUOUS", "QUANTIZED"))
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    main(parser.parse_args())
