"""Trains liquid-smollm2 for so many seconds: LoRA on the linear layers of SmolLM2, and the rows of the codes.

    python examples/smollm2_emoji/train_flagship.py --data_dir liquid-smollm2 --output_dir liquid-smollm2/adapter --seconds 300

Made for one GPU and a fixed time: all sequences lie in its memory in two shapes, so that a layer compiles once for each,
and the learning rate falls with the time that is left. Everything else is the package's: records and labels (see
prepare_flagship.py), `liquid_lora_config`, the loss in chunks. Some of the codes that are read (not those to predict) are
replaced by others, so that the words count for more than the picture so far. Any longer run should use
`transformers-liquid train`, which resumes; see lora.yaml.

The language stays because SmolLM2 teaches itself: at each step some sequences without pictures are read with and without
the adapter, and the divergence of the two next-token distributions is a part of the loss (distillation, Hinton et al.,
arXiv 1503.02531). These sequences are texts and what SmolLM2, before it is trained, answers to some hundred questions; of
these every tenth is held out.
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


# How many of the sequences with pictures are of which kind, and of those without.
PICTURE_SHARES = {"draw": 0.65, "unconditional": 0.07, "caption": 0.16, "edit": 0.12}
LANGUAGE_SHARES = {"chat": 0.6, "text": 0.4}
WIDTHS, LANGUAGE_SHAPE = (112, 192), (40, 160)
SAMPLED_ANSWERS = 3  # to a question, beside the most likely one


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
    shapes, language = load_sequences(Path(args.data_dir) / "sequences.npz", answered, args)
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=args.device == "cuda"
    )
    codes = base.config.image_token_range
    chance = torch.Generator().manual_seed(args.seed)
    mass = torch.tensor([shape["weights"].sum().item() / shape["batch"] for shape in shapes])
    log: list[dict[str, Any]] = []
    stats, left, samples, step = 0, 0, 0, 0
    started = time.perf_counter()
    for shape in shapes:  # compiled before the clock starts
        train_step(model, optimizer, draw_batch(shape, codes, args.replaced), draw_batch(language), args, None)
    print(f"ready after {time.perf_counter() - started:.0f} s", flush=True)
    start = time.perf_counter()
    while (fraction := (time.perf_counter() - start) / args.seconds) < 1 and step != args.max_steps:
        # A short warm-up, then half a cosine over the time.
        rate = args.learning_rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * fraction)) / 2
        shape = shapes[torch.multinomial(mass, 1, generator=chance).item()]
        batch = draw_batch(shape, codes, args.replaced)
        token_stats, divergence = train_step(model, optimizer, batch, draw_batch(language), args, rate)
        stats, left, samples, step = stats + token_stats, left + divergence, samples + shape["batch"], step + 1
        if step % 50 == 0:
            (text, text_right, texts), (image, image_right, images) = stats.tolist()  # waits for the device
            entry = {"step": step, "samples": samples, "seconds": time.perf_counter() - start}
            entry |= {"text_loss": text / texts, "text_accuracy": text_right / texts}
            entry |= {"image_loss": image / images, "image_accuracy": image_right / images}
            entry["divergence"] = left.item() / 50
            log.append(entry)
            stats, left = 0, 0
            print(json.dumps({name: round(value, 4) for name, value in entry.items()}), flush=True)
    model.eval()
    output = Path(args.output_dir)
    state = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    (output / "training.json").write_text(json.dumps({"arguments": vars(args), "log": log}) + "\n")


def answer(model: LiquidForCausalLM, args: argparse.Namespace) -> list[dict[str, str]]:
    """Questions and what the base itself answers, at most 96 tokens. Every tenth question is kept for evaluation."""
    data = Path(args.data_dir)
    questions = json.loads((data / "evaluation.json").read_text(encoding="utf-8"))["questions"]
    processor = LiquidProcessor.from_pretrained(data / "base")
    conversations = [[{"role": "user", "content": question}] for question in questions]
    prompts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    inputs = processor(text=prompts, return_tensors="pt", add_special_tokens=False).to(args.device)
    taught, heldout = [], []
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0, "num_return_sequences": SAMPLED_ANSWERS}):
        ids = model.generate(**inputs, max_new_tokens=96, **options)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in enumerate(answers):
            index = number * len(questions) // len(answers)
            pair = {"question": questions[index], "answer": text.strip()}
            if pair["answer"] and index % 10:
                taught.append(pair)
            elif pair["answer"] and not options["do_sample"]:
                heldout.append(pair)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "chat.json").write_text(json.dumps(heldout, ensure_ascii=False, indent=1) + "\n")
    return taught


def load_sequences(
    path: Path, answered: list[dict[str, str]], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The sequences with pictures in two shapes, and those without: padded ids and labels, and how often each is drawn."""
    with np.load(path) as file:
        lengths, groups = file["lengths"].astype(int), file["groups"].astype(int)
        ids = file["ids"].astype(np.int32)
        labels = np.where(np.unpackbits(file["learned"], count=len(ids)), ids, -100)
        names = [*file["group_names"].tolist(), "chat"]
    collator = LiquidDataCollator(LiquidProcessor.from_pretrained(path.parent / "base"), max_length=WIDTHS[-1])
    more = []
    for pair in answered:
        turns = (("user", pair["question"]), ("assistant", pair["answer"]))
        messages = [{"role": role, "content": content} for role, content in turns]
        more.append(collator.encode({"kind": "conversation", "messages": messages}))
    ids = np.concatenate([ids, *(one for one, _ in more)])
    labels = np.concatenate([labels, *(learned for _, learned in more)])
    lengths = np.append(lengths, [len(one) for one, _ in more])
    groups = np.append(groups, [len(names) - 1] * len(more))
    shares = PICTURE_SHARES | LANGUAGE_SHARES
    share = np.array([shares[name] for name in names]) / np.maximum(np.bincount(groups, minlength=len(names)), 1)
    starts = np.cumsum(lengths) - lengths

    def shape_of(chosen: np.ndarray, width: int, batch: int) -> dict[str, Any]:
        columns = np.minimum(starts[chosen, None] + np.arange(width), len(ids) - 1)
        is_pad = np.arange(width) >= lengths[chosen, None]
        tensors = {
            "ids": np.where(is_pad, 0, ids[columns]),
            "labels": np.where(is_pad, -100, labels[columns]),
            "is_pad": is_pad,
            "weights": share[groups[chosen]].astype(np.float32),
        }
        return {name: torch.from_numpy(value).to(args.device) for name, value in tensors.items()} | {"batch": batch}

    is_language = np.isin(groups, [names.index(name) for name in LANGUAGE_SHARES])
    shapes = []
    for shorter, width in zip((0, *WIDTHS), WIDTHS, strict=False):
        chosen = np.flatnonzero(~is_language & (lengths > shorter) & (lengths <= width))
        shapes.append(shape_of(chosen, width, 256 * WIDTHS[0] // width // 8 * 8))
    return shapes, shape_of(np.flatnonzero(is_language), LANGUAGE_SHAPE[1], LANGUAGE_SHAPE[0])


def draw_batch(shape: dict[str, Any], codes: range = range(0), replaced: float = 0.0) -> dict[str, torch.Tensor]:
    """Ids, labels and where the pads are; of the codes in the ids, a share is replaced by other codes."""
    rows = torch.multinomial(shape["weights"], shape["batch"], replacement=True)
    ids, labels = shape["ids"][rows].long(), shape["labels"][rows].long()
    if codes:
        others = torch.randint_like(ids, codes.start, codes.stop)
        chance = torch.rand(ids.shape, device=ids.device)
        ids = torch.where((ids >= codes.start) & (ids < codes.stop) & (chance < replaced), others, ids)
    return {"ids": ids, "labels": labels, "is_pad": shape["is_pad"][rows]}


def train_step(model, optimizer, pictures, language, args, rate: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and, at a learning rate, an update: the statistics of tokens, and how far the language has moved.

    Padded on the right: no label sees a pad.
    """
    device = pictures["ids"].device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        output = model(input_ids=pictures["ids"], labels=pictures["labels"], use_cache=False)
    output.loss.backward()
    with torch.autocast(device, dtype=torch.bfloat16):
        with torch.no_grad(), model.disable_adapter():
            taught = model(input_ids=language["ids"], use_cache=False).logits.float().log_softmax(-1)
        logits = model(input_ids=language["ids"], use_cache=False).logits.float().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(logits, taught, reduction="none", log_target=True).sum(-1)
    divergence = divergence[~language["is_pad"]].mean()
    (args.language * divergence).backward()
    if rate is not None:
        torch.nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return output.token_stats, divergence.detach()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="liquid-smollm2")
    parser.add_argument("--output_dir", default="liquid-smollm2/adapter")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max_steps", type=int, default=-1, help="fewer steps than the time allows")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lora_alpha", type=int, default=16)
    parser.add_argument("--language", type=float, default=2.0, help="weight of the language's divergence in the loss")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--replaced", type=float, default=0.1, help="share of the codes read that are replaced")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
