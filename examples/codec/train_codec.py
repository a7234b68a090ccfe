"""Trains a codec on the pictures of a folder, or fine-tunes one, for `transformers-liquid expand --codec`.

    python examples/codec/train_codec.py --pictures photos --output_dir my-codec --image_size 128 --factor 8
    transformers-liquid expand Qwen/Qwen2.5-0.5B --codec my-codec --output my-liquid

Three phases, checkpointed every epoch (see codec_training.py); run the same command again to continue a stopped run.
Pictures are cut to squares. One in twenty, and one at least, is held out: of these are the PSNR that is printed and
`reconstructions.png`. The loss knows nothing of how people see (no adversarial, no perceptual one): what is drawn is right
in the mean and a little soft. It suits drawings, icons, diagrams and one kind of photo; for photos of everything take a
codec that was trained on millions (docs/codecs.md), and fine-tune its decoder:

    python examples/codec/train_codec.py --pictures photos --output_dir my-codec --continue_from amused/amused-256

That leaves encoder and codebook, and with them all codes, as they are, unless `--epochs` says otherwise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from pathlib import Path

import torch
from codec_training import PHASES, encode, psnr, reconstruct, save_sheet, train
from torch.utils.data import DataLoader
from tqdm import tqdm

from transformers_liquid import LiquidImageProcessor, LiquidVQModel, load_codec


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def new_codec(image_size: int, factor: int, codebook_size: int, channels: int) -> LiquidVQModel:
    """One level for each halving of the picture, wider with every second."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"--factor must be a power of 2 such as 8 or 16, got {factor}.")
    widths = [channels * 2 ** (level // 2) for level in range(factor.bit_length())]
    return LiquidVQModel(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=64,
        sample_size=image_size,
        num_vq_embeddings=codebook_size,
        vq_embed_dim=16,
        norm_num_groups=8,
    )


def load(frame: LiquidImageProcessor, paths: list[Path]) -> torch.Tensor:
    return frame([str(path) for path in paths])["pixel_values"]


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    files = sorted(path for path in Path(args.pictures).rglob("*") if path.suffix.lower() in SUFFIXES)
    held_out, seen = files[::20], [path for index, path in enumerate(files) if index % 20]
    if not seen:
        raise ValueError(f"--pictures {args.pictures} has {len(files)} pictures: two are needed, and many are better.")
    if args.continue_from is None:
        codec = new_codec(args.image_size or 64, args.factor, args.codebook_size, args.channels)
    else:
        codec = load_codec(args.continue_from)
    size = args.image_size or codec.config.sample_size
    frame = LiquidImageProcessor(size, codec.downsample_factor)
    codec.register_to_config(sample_size=size)
    codec.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")

    def read(paths):
        collate = functools.partial(load, frame)
        return DataLoader(paths, args.batch_size, num_workers=args.num_workers, collate_fn=collate)

    def batches(epoch):
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(epoch)).tolist()
        return tqdm(read([seen[one] for one in order]), desc=f"epoch {epoch + 1}", leave=False, mininterval=5)

    @torch.no_grad()
    def latents():
        # Enough for k-means: a hundred vectors for each code, of whichever pictures come first in the lot.
        number = 1 + 100 * codec.codebook_size * codec.downsample_factor**2 // size**2
        lot = itertools.islice(batches(0), 1 + number // args.batch_size)
        return torch.cat([encode(codec, batch.to(codec.device)) for batch in lot])

    def report():
        pixels = torch.cat([*itertools.islice(read(held_out), 1 + 64 // args.batch_size)]).to(codec.device)
        codes, drawn = reconstruct(codec, pixels)
        print(
            f"  held out: PSNR {psnr(drawn, pixels).mean():.2f} dB, {codes.unique().numel()} codes in use", flush=True
        )
        save_sheet(pixels[:16], drawn[:16], output_dir / "reconstructions.png")

    output_dir = Path(args.output_dir)
    epochs = args.epochs or ((4, 20, 6) if args.continue_from is None else (0, 0, 6))
    rates = (args.learning_rate, args.decoder_learning_rate)
    train(codec, batches, latents, report, output_dir, dict(zip(PHASES, epochs, strict=True)), *rates)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="a folder; pictures in folders of it count too")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--continue_from", help="a codec, as `expand --codec` takes it, to fine-tune")
    parser.add_argument("--image_size", type=int, help="64, or that of the codec to fine-tune, unless given")
    parser.add_argument("--factor", type=int, default=8, help="pixels of a code along one side, of a new codec")
    parser.add_argument("--codebook_size", type=int, default=2048, help="of a new codec")
    parser.add_argument("--channels", type=int, default=32, help="of a new codec, at the finest level")
    parser.add_argument("--epochs", type=int, nargs=3, metavar=PHASES, help="epochs per phase")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--decoder_learning_rate", type=float, default=2e-4)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
