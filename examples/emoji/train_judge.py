"""Trains a judge of drawn emoji: a classifier of pictures, from all 3,786 emoji to their names, in five CPU minutes.

    python examples/emoji/train_judge.py --data_dir emoji-data --output_dir emoji-judge
    transformers-liquid evaluate emoji --data emoji-tasks --judge emoji-judge --output emoji-results

It sees originals and what the codec makes of them, so that the artefacts of drawings are known to it, shifted and noisy.
Emoji that are the same in every pixel share a label: `label2id` has all names, `id2label` the first of each. The folder is
one of transformers, for `AutoModelForImageClassification`; its `config.accuracy` says how many of the pictures it names
rightly at the end, as they are. It was trained on these, so that it may be worse at drawings of them.
"""

from __future__ import annotations

import argparse

import torch
from emoji_data import load_emoji, load_pixels
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from transformers_liquid import EMOJI_CHECKPOINT, load_codec


def accuracy(model: ResNetForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of pictures `(N, 3, 64, 64)` whose most probable label is the right one."""
    model.eval()
    with torch.no_grad():
        named = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in pixels.split(256)])
    return (named == labels).float().mean().item()


@torch.no_grad()
def reconstructions(codec_name: str, pixels: torch.Tensor) -> torch.Tensor:
    codec = load_codec(codec_name).eval()
    return torch.cat([codec.decode_codes(codec.encode_codes(batch)).clamp(-1, 1) for batch in pixels.split(128)])


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    emoji = load_emoji(args.data_dir)
    originals = load_pixels(emoji)
    views = torch.stack([originals, reconstructions(args.codec, originals)])
    label_of: dict[bytes, int] = {}
    labels = torch.tensor([label_of.setdefault(one.numpy().tobytes(), len(label_of)) for one in originals])
    label2id = {item.name: label for item, label in zip(emoji, labels.tolist(), strict=True)}
    config = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label={label: name for name, label in reversed(label2id.items())},
        label2id=label2id,
    )
    model = ResNetForImageClassification(config)
    steps = args.epochs * -(-len(emoji) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, steps)
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for chosen in tqdm(torch.randperm(len(emoji)).split(args.batch_size), leave=False, mininterval=5):
            pixels = views[torch.randint(2, chosen.shape), chosen]
            pixels = pixels.roll(torch.randint(-3, 4, (2,)).tolist(), dims=(2, 3))
            pixels = pixels + torch.randn_like(pixels) * 0.15 * torch.rand(len(pixels), 1, 1, 1)
            loss = model(pixel_values=pixels, labels=labels[chosen]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(chosen) / len(emoji)
        print(f"epoch {epoch + 1}: loss {total:.3f}", flush=True)
    kinds = zip(("originals", "reconstructions"), views, strict=True)
    config.accuracy = {kind: accuracy(model, pixels, labels) for kind, pixels in kinds}
    print(config.accuracy)
    model.save_pretrained(args.output_dir)
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(args.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", default="emoji-judge")
    parser.add_argument("--codec", default=EMOJI_CHECKPOINT, help="whose reconstructions it knows")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
