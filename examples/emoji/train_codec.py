"""Trains the codec of liquid-emoji: 64 x 64 pixels <-> 8 x 8 codes.

    python examples/emoji/train_codec.py --data_dir emoji-data --output_dir emoji-codec

Three phases, checkpointed every epoch, as examples/codec/codec_training.py has them; run the same command again to
continue a stopped run. Only "seen" pictures are trained on. With `--icons N`, N icons (see icons.py) are drawn by lot for
every epoch beside the emoji. The decoder alone is trained on, with icons, by

    python examples/emoji/train_codec.py --data_dir emoji-data --output_dir emoji-codec-2 --continue_from emoji-codec \
        --epochs 0 0 30 --icons 1000 --decoder_learning_rate 1e-3
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from emoji_data import load_emoji, load_pixels
from icons import load_icons
from tqdm import tqdm

from transformers_liquid.codecs.vq_model import LiquidVQModel


sys.path.append(str(Path(__file__).parents[1] / "codec"))
from codec_training import PHASES, psnr, reconstruct, save_sheet, train


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


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    emoji = load_emoji(args.data_dir)
    pixels = load_pixels(emoji)
    seen = pixels[[index for index, item in enumerate(emoji) if item.split == "seen"]]
    icons = load_icons(args.data_dir)[0] if args.icons else torch.empty(0, *pixels.shape[1:])
    codec = LiquidVQModel(**CODEC_CONFIG)
    if args.continue_from is not None:
        codec.load_state_dict(LiquidVQModel.from_pretrained(args.continue_from).state_dict())

    def batches(epoch):
        draw = torch.Generator().manual_seed(epoch)
        some = icons[torch.randperm(len(icons), generator=draw)[: args.icons]]
        shown = torch.cat([seen, some.float() / 127.5 - 1])
        order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(epoch)).split(args.batch_size)
        return (shown[one] for one in tqdm(order, desc=f"epoch {epoch + 1}", leave=False, mininterval=5))

    train(
        codec,
        batches,
        lambda: torch.cat([codec.encode(batch).latents.detach() for batch in seen.split(256)]),
        lambda: report(codec, emoji, pixels, Path(args.output_dir)),
        Path(args.output_dir),
        dict(zip(PHASES, args.epochs, strict=True)),
        args.learning_rate,
        args.decoder_learning_rate,
    )


def report(codec: LiquidVQModel, emoji, pixels: torch.Tensor, output_dir: Path) -> None:
    """Prints the PSNR of every split and draws originals above reconstructions."""
    codes, drawn = reconstruct(codec, pixels)
    quality = psnr(drawn, pixels)
    for split in ("seen", "unseen_composition", "unseen_flag"):
        chosen = torch.tensor([item.split == split for item in emoji])
        mean_square = 10 * math.log10(4 / (drawn - pixels)[chosen].square().mean().item())
        print(f"  {split}: PSNR {quality[chosen].mean():.2f} dB (of the mean error: {mean_square:.2f} dB)", flush=True)
    print(f"  codes in use: {codes.unique().numel()} of {codec.codebook_size}", flush=True)
    shown = torch.linspace(0, len(emoji) - 1, 64).long()
    save_sheet(pixels[shown], drawn[shown], output_dir / "reconstructions.png")


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
