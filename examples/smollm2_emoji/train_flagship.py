"""Trains liquid-smollm2 for so many seconds: LoRA on the linear layers of SmolLM2, and the rows of the codes.

    python examples/smollm2_emoji/train_flagship.py --data_dir liquid-smollm2 --output_dir liquid-smollm2/adapter --seconds 300

Made for one GPU and a fixed time: all sequences lie in its memory in two shapes, so that a layer compiles once for each,
and the learning rate falls with the time that is left. Everything else is the package's: records and labels (see
prepare_flagship.py), `liquid_lora_config`, the loss in chunks. Before it begins, SmolLM2 answers some hundred questions:
nine of ten answers are trained on (`chat`), so that it goes on answering as it did, and the others are held out. Some of the codes that are read (not those to predict)
are replaced by others, so that the words count for more than the picture so far. Any longer run should use
`transformers-liquid train`, which resumes; see lora.yaml.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model

from transformers_liquid import LiquidDataCollator, LiquidForCausalLM, LiquidProcessor, liquid_lora_config


# Of the sequences with pictures, how many are of which kind; and of those without.
PICTURE_SHARES = {"draw": 0.65, "unconditional": 0.07, "caption": 0.16, "edit": 0.12}
LANGUAGE_SHARES = {"chat": 0.57, "text": 0.43}
WIDTHS = (112, 192)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    base = LiquidForCausalLM.from_pretrained(Path(args.data_dir) / "base", dtype=torch.float32).to(args.device)
    answered = answer(base.eval(), args)
    model = get_peft_model(base, liquid_lora_config(base, r=args.r, lora_alpha=args.lora_alpha)).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    print(f"{sum(weight.numel() for weight in trained):,} weights are trained", flush=True)
    layers = base.model.text_model.base_model.layers if args.compile else []
    for layer in layers:  # all have the same graph: compiled once, where the whole body would take minutes
        layer.compile(dynamic=False)
    shapes = load_sequences(Path(args.data_dir) / "sequences.npz", answered, args)
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=args.device == "cuda"
    )
    codes = base.config.image_token_range
    chance = torch.Generator().manual_seed(args.seed)
    mass = torch.tensor([shape["weights"].sum().item() / shape["batch"] for shape in shapes])
    log: list[dict[str, Any]] = []
    stats, samples, step = 0, 0, 0
    started = time.perf_counter()
    for shape in shapes:  # compiled before the clock starts
        train_step(model, optimizer, *draw_batch(shape, codes, args.replaced), None)
    print(f"ready after {time.perf_counter() - started:.0f} s", flush=True)
    start = time.perf_counter()
    while (fraction := (time.perf_counter() - start) / args.seconds) < 1 and step != args.max_steps:
        # A short warm-up, then half a cosine over the time.
        rate = args.learning_rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * fraction)) / 2
        shape = shapes[torch.multinomial(mass, 1, generator=chance).item()]
        output = train_step(model, optimizer, *draw_batch(shape, codes, args.replaced), rate)
        stats, samples, step = stats + output.token_stats, samples + shape["batch"], step + 1
        if step % 50 == 0:
            (text, text_right, texts), (image, image_right, images) = stats.tolist()  # waits for the device
            entry = {"step": step, "samples": samples, "seconds": time.perf_counter() - start}
            entry |= {"text_loss": text / texts, "text_accuracy": text_right / texts}
            entry |= {"image_loss": image / images, "image_accuracy": image_right / images}
            log.append(entry)
            stats = 0
            print(json.dumps({name: round(value, 4) for name, value in entry.items()}), flush=True)
    model.eval()
    output = Path(args.output_dir)
    state = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    (output / "training.json").write_text(json.dumps({"arguments": vars(args), "log": log}) + "\n")


def answer(model: LiquidForCausalLM, args: argparse.Namespace) -> list[dict[str, str]]:
    """Questions and what the base itself answers: greedy, at most 96 tokens. Every tenth is kept for evaluation."""
    data = Path(args.data_dir)
    questions = json.loads((data / "evaluation.json").read_text(encoding="utf-8"))["questions"]
    processor = LiquidProcessor.from_pretrained(data / "base")
    conversations = [[{"role": "user", "content": question}] for question in questions]
    prompts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    inputs = processor(text=prompts, return_tensors="pt", add_special_tokens=False).to(args.device)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=96)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    pairs = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True) if a]
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "chat.json").write_text(json.dumps(pairs[::10], ensure_ascii=False, indent=1) + "\n")
    return [pair for index, pair in enumerate(pairs) if index % 10]


def load_sequences(path: Path, answered: list[dict[str, str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sequences in two shapes: padded ids and labels, and how often each sequence is to be drawn."""
    with np.load(path) as file:
        lengths, groups = file["lengths"].astype(int), file["groups"].astype(int)
        ids = file["ids"].astype(np.int32)
        labels = np.where(np.unpackbits(file["learned"], count=len(ids)), ids, -100)
        names = [*file["group_names"].tolist(), "chat"]
    collator = LiquidDataCollator(LiquidProcessor.from_pretrained(path.parent / "base"), max_length=WIDTHS[-1])
    for pair in answered:
        turns = (("user", pair["question"]), ("assistant", pair["answer"]))
        messages = [{"role": role, "content": content} for role, content in turns]
        more, learned = collator.encode({"kind": "conversation", "messages": messages})
        ids, labels = np.append(ids, more), np.append(labels, learned)
        lengths, groups = np.append(lengths, len(more)), np.append(groups, len(names) - 1)
    shares = {name: share * (1 - args.language) for name, share in PICTURE_SHARES.items()}
    shares |= {name: share * args.language for name, share in LANGUAGE_SHARES.items()}
    share = np.array([shares[name] for name in names]) / np.maximum(np.bincount(groups, minlength=len(names)), 1)
    starts = np.cumsum(lengths) - lengths
    shapes = []
    for shorter, width in zip((0, *WIDTHS), WIDTHS, strict=False):
        chosen = np.flatnonzero((lengths > shorter) & (lengths <= width))
        columns = np.minimum(starts[chosen, None] + np.arange(width), len(ids) - 1)
        is_pad = np.arange(width) >= lengths[chosen, None]
        tensors = {
            "ids": np.where(is_pad, 0, ids[columns]),
            "labels": np.where(is_pad, -100, labels[columns]),
            "weights": share[groups[chosen]].astype(np.float32),
        }
        shape = {name: torch.from_numpy(value).to(args.device) for name, value in tensors.items()}
        shapes.append(shape | {"batch": 256 * WIDTHS[0] // width // 8 * 8})
    return shapes


def draw_batch(shape: dict[str, Any], codes: range, replaced: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a batch; of the codes in the ids, a share is replaced by other codes."""
    rows = torch.multinomial(shape["weights"], shape["batch"], replacement=True)
    ids, labels = shape["ids"][rows].long(), shape["labels"][rows].long()
    others = torch.randint_like(ids, codes.start, codes.stop)
    is_replaced = (ids >= codes.start) & (ids < codes.stop) & (torch.rand(ids.shape, device=ids.device) < replaced)
    return torch.where(is_replaced, others, ids), labels


def train_step(model, optimizer, ids: torch.Tensor, labels: torch.Tensor, rate: float | None) -> Any:
    """Forward, backward and, at a learning rate, an update. Padded on the right: no label sees a pad."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        output = model(input_ids=ids, labels=labels, use_cache=False)
    output.loss.backward()
    if rate is not None:
        torch.nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="liquid-smollm2")
    parser.add_argument("--output_dir", default="liquid-smollm2/adapter")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max_steps", type=int, default=-1, help="fewer steps than the time allows")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lora_alpha", type=int, default=32)
    parser.add_argument("--language", type=float, default=0.14, help="share of sequences without pictures")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--replaced", type=float, default=0.1, help="share of the codes read that are replaced")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
