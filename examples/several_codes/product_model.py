"""Trains a small language model around a codec of product_codec.py, and measures what it draws and describes.

    python examples/several_codes/product_model.py --data_dir emoji-data --codec_dir k4/codec --output_dir k4/lm
    python examples/several_codes/product_model.py --data_dir emoji-data --codec_dir k1/codec --output_dir k1/lm

Both codecs get the same llama, by `expand_vocabulary`: one code a position becomes rows of the vocabulary, several get a head.
It learns names -> pictures, and names of pictures that are moved by a few pixels. It is asked about other moves. What comes out
is in `results.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from product_codec import load_things, psnr, reconstruct, save_sheet, shifted
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from transformers_liquid import LiquidDataCollator, expand_vocabulary, load_codec
from transformers_liquid.models.liquid.prompts import CAPTION_INSTRUCTION
from transformers_liquid.training.trainer import LiquidTrainer


sys.path.append(str(Path(__file__).parents[1] / "emoji"))
from train_lm import train_tokenizer


GROUPS = ("Animals & Nature",)
NUM_TEXT_TOKENS, NUM_CHOICES = 800, 10
LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
SHIFTS = [(down, right) for down in (-4, 0, 4) for right in (-4, 0, 4)]
UNSEEN_SHIFTS = [(2, -2), (-3, 1)]


def record(index: int, names: list[str], pictures: list[torch.Tensor]) -> dict:
    """By turns a name to draw and a picture to name, the same ones whatever the codec."""
    draw = random.Random(index)
    one, is_asked = draw.randrange(len(names)), index % 2
    codes = pictures[draw.randrange(len(SHIFTS)) if is_asked else SHIFTS.index((0, 0))][one]
    return {
        "kind": "caption" if is_asked else "text_to_image",
        "text": names[one],
        "codes": codes.numpy(),
        "index": index,
    }


def main(args: argparse.Namespace) -> None:
    set_seed(0)
    names, pixels = load_things(args.data_dir, GROUPS)
    codec = load_codec(args.codec_dir)
    pictures = [torch.cat([codec.encode_codes(part) for part in shifted(pixels, *shift).split(64)]) for shift in SHIFTS]
    tokenizer = train_tokenizer(names, NUM_TEXT_TOKENS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **LLAMA, **special))
    model, processor = expand_vocabulary(base, tokenizer, codec)
    trainer = LiquidTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            warmup_steps=50,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            seed=0,
        ),
        processing_class=processor,
        train_dataset=[record(index, names, pictures) for index in range(args.max_steps * args.batch_size)],
        data_collator=LiquidDataCollator(processor, unconditional_probability=0.0, caption_probability=0.0),
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    measure(model.eval(), processor, names, pixels, Path(args.output_dir))


@torch.no_grad()
def measure(model, processor, names: list[str], pixels: torch.Tensor, output_dir: Path) -> None:
    """Writes PSNR, right drawings, exact names and right choices among names."""
    known = reconstruct(model.model.vq_model, pixels)[1]
    results = {"parameters": sum(p.numel() for n, p in model.named_parameters() if "vq_model" not in n)}
    results["psnr"] = psnr(known, pixels).mean().item()
    drawn = []
    for start in range(0, len(names), 64):
        inputs = processor(text=names[start : start + 64], generation_mode="image", return_tensors="pt")
        ids = model.generate(**inputs, generation_mode="image", guidance_scale=1.0, do_sample=False)
        drawn.append(model.decode_image_tokens(ids))
    drawn = torch.cat(drawn)
    save_sheet(pixels[:64], drawn[:64], output_dir / "drawn.png")
    nearest = torch.cdist(drawn.flatten(1), known.flatten(1)).argmin(1)
    results["drawn"] = (nearest == torch.arange(len(names))).float().mean().item()
    collator, draw, exact, right = LiquidDataCollator(processor), random.Random(0), [], []
    for shift in UNSEEN_SHIFTS:
        moved = shifted(pixels, *shift)
        prompts = torch.tensor([processor.caption_ids()] * len(names))
        answers = model.generate(prompts, pixel_values=moved, do_sample=False, max_new_tokens=16)
        texts = (
            one.split(CAPTION_INSTRUCTION)[-1] for one in processor.batch_decode(answers, skip_special_tokens=True)
        )
        exact += [text.strip() == name for text, name in zip(texts, names, strict=True)]
        asked = [
            {"kind": "caption", "text": choice, "codes": codes.numpy()}
            for name, codes in zip(names, reconstruct(model.model.vq_model, moved)[0], strict=True)
            for choice in (name, *draw.sample([one for one in names if one != name], NUM_CHOICES - 1))
        ]
        for start in range(0, len(asked), 16 * NUM_CHOICES):
            batch = collator(asked[start : start + 16 * NUM_CHOICES])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
            right += (losses.view(-1, NUM_CHOICES).argmin(1) == 0).tolist()
    results |= {"named": sum(exact) / len(exact), "chosen": sum(right) / len(right), "names": len(names)}
    (output_dir / "results.json").write_text(json.dumps(results))
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--codec_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=900)
    parser.add_argument("--batch_size", type=int, default=32)
    main(parser.parse_args())
