"""Trains liquid-smollm2 for so many seconds: LoRA on the linear layers of SmolLM2, and the rows of the codes.

    python examples/smollm2_emoji/train_flagship.py --data_dir liquid-smollm2 --output_dir liquid-smollm2/adapter --seconds 300

Made for one GPU and a fixed time. Records, labels and the adapter are the package's (see prepare_flagship.py,
`liquid_lora_config`); any longer run should use `transformers-liquid train`, which resumes; see lora.yaml. Here instead:

- Every batch has one shape: rows of 192 tokens, most of them halved between two pictures, the others an edit or a
  sequence without pictures. All sequences lie in the memory of the device, and nothing waits for it but the log.
- A step merges the adapter into bfloat16 weights once and runs plain layers with them: for so many tokens this is
  cheaper than LoRA's own branches. One layer is compiled, and called with the weights of each.
- Codes are learned among codes, all that drawing looks at; other labels among the whole vocabulary. Some of the codes
  that are read (not those to predict) are replaced by others, so that the words count for more than the picture so far.
- The learning rate is constant for half of the time and then falls to zero. The adapter is saved every minute.

The language stays because SmolLM2 teaches itself: the divergence of the next-token distributions without and with the
adapter, on sequences without pictures, is a part of the loss (distillation, Hinton et al., arXiv 1503.02531). What the
base makes of them is computed once. These sequences are texts and what SmolLM2, before it is trained, answers to some
hundred questions; of these every tenth is held out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from merged_body import MergedBody
from peft import PeftModel

from transformers_liquid import LiquidForCausalLM, LiquidProcessor, liquid_lora_config


WIDTH = 192
# The parts of a batch: of 16 rows how many, how wide their sequences are, and how often each group is drawn.
PARTS = {
    "pictures": (13, WIDTH // 2, {"draw": 0.87, "unconditional": 0.05, "caption": 0.08}),
    "edits": (1, WIDTH, {"edit": 1.0}),
    "language": (2, WIDTH, {"chat": 0.6, "text": 0.4}),
}
NAME_WEIGHT = 3.0  # of a prompt that is the very name of an emoji, against other phrasings
TEXT_WEIGHT = 0.1  # of captions and ends of pictures in the loss, against codes
NUM_TEXT_TARGETS = 1024  # more than a batch has: some 450 of 96 rows
MEASURES = ("image_loss", "image_accuracy", "text_loss", "text_accuracy", "divergence")
SAMPLED_ANSWERS = 3  # to a question, beside the most likely one


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    started = time.perf_counter()
    base = LiquidForCausalLM.from_pretrained(Path(args.data_dir) / "base", dtype=torch.float32).to(args.device)
    codes = base.config.image_token_range
    answered = answer(base.eval(), args)
    print(f"answered after {time.perf_counter() - started:.0f} s", flush=True)
    body = MergedBody(base, liquid_lora_config(base, r=args.r, lora_alpha=args.lora_alpha))
    print(f"{sum(weight.numel() for weight in body.trained):,} weights are trained", flush=True)
    parts = load_sequences(Path(args.data_dir), answered, args)
    eager = torch.compiler.set_stance("force_eager")  # a forward without gradients is not worth compiling
    with eager, torch.no_grad(), torch.autocast(args.device, dtype=torch.bfloat16):
        taught = [body(ids.long(), 0).bfloat16() for ids in parts["language"]["ids"].split(64)]
    parts["language"]["taught"] = torch.cat(taught)
    torch.compiler.set_stance("default" if args.compile else "force_eager")
    optimizer = torch.optim.AdamW(body.trained, betas=(0.9, 0.98), weight_decay=0.0, fused=args.device == "cuda")
    train_step(body, optimizer, draw_batch(parts, codes, args), args, None).tolist()  # compiled before the clock starts
    print(f"ready after {time.perf_counter() - started:.0f} s", flush=True)
    log: list[dict[str, Any]] = []
    sums, step = 0, 0
    start = saved = time.perf_counter()
    while (fraction := (time.perf_counter() - start) / args.seconds) < 1 and step != args.max_steps:
        rate = args.learning_rate * min(1, (step + 1) / 100, 2 * (1 - fraction))
        sums, step = sums + train_step(body, optimizer, draw_batch(parts, codes, args), args, rate), step + 1
        if step % 50 == 0:
            means = dict(zip(MEASURES, (sums / 50).tolist(), strict=True))  # waits for the device
            log.append({"step": step, "seconds": time.perf_counter() - start} | means)
            sums = 0
            print(json.dumps({name: round(value, 4) for name, value in log[-1].items()}), flush=True)
            if time.perf_counter() - saved > 60:
                saved = time.perf_counter()
                save(body.model, log, args)
    save(body.model, log, args)


def answer(model: LiquidForCausalLM, args: argparse.Namespace) -> list[list[int]]:
    """Ids of questions and what the base itself answers, at most 96 tokens. Every tenth is kept for evaluation."""
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
                both = processor.encode(prompts[index]) + processor.encode(pair["answer"])
                taught.append([*both, model.config.eos_token_id][:WIDTH])
            elif pair["answer"] and not options["do_sample"]:
                heldout.append(pair)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "chat.json").write_text(json.dumps(heldout, ensure_ascii=False, indent=1) + "\n")
    return taught


def load_sequences(data: Path, answered: list[list[int]], args) -> dict[str, dict[str, torch.Tensor]]:
    """For each part of a batch its sequences: padded ids, what each position is to predict (-100: nothing), and sums of
    how often each is drawn. Of sequences without pictures every token is to be predicted."""
    with np.load(data / "sequences.npz") as file:
        lengths, groups = file["lengths"].astype(int), file["groups"].astype(int)
        ids = file["ids"].astype(np.int32)
        labels = np.where(np.unpackbits(file["learned"], count=len(ids)), ids, -100)
        names = [*file["group_names"].tolist(), "chat"]
    processor = LiquidProcessor.from_pretrained(data / "base")
    ids = np.concatenate([ids, *answered])
    labels = np.append(labels, ids[len(labels) :])
    lengths = np.append(lengths, [len(one) for one in answered])
    groups = np.append(groups, [len(names) - 1] * len(answered))
    starts = np.cumsum(lengths) - lengths
    weights = 1 / np.bincount(groups, minlength=len(names))[groups]
    emoji = json.loads((data / "evaluation.json").read_text(encoding="utf-8"))["all"]
    prompts = {tuple(processor.encode(one["name"])) for one in emoji}
    for index in np.flatnonzero(groups == names.index("draw")):
        # Between the begin of the text and that of the picture, which is 64 codes with their end and that of the text.
        if tuple(ids[starts[index] + 1 : starts[index] + lengths[index] - 67].tolist()) in prompts:
            weights[index] *= NAME_WEIGHT
    parts = {}
    for part, (_, width, shares) in PARTS.items():
        share = np.array([shares.get(name, 0.0) for name in names])[groups] * weights
        chosen = np.flatnonzero((share > 0) & (lengths <= width))
        columns = np.minimum(starts[chosen, None] + np.arange(width + 1), len(ids) - 1)
        is_pad = np.arange(width + 1) >= lengths[chosen, None]
        values = {
            "ids": np.where(is_pad, 0, ids[columns])[:, :-1],
            "targets": np.where(is_pad, -100, labels[columns])[:, 1:],
            "sums": (np.cumsum(share[chosen]) / share[chosen].sum()).astype(np.float32),
        }
        parts[part] = {name: torch.from_numpy(value).to(args.device) for name, value in values.items()}
    return parts


def draw_batch(parts: dict[str, dict[str, torch.Tensor]], codes: range, args) -> dict[str, torch.Tensor]:
    """Rows of ids and targets, and what the base makes of the last; a share of the codes in the ids is replaced."""
    found: dict[str, list[torch.Tensor]] = {"ids": [], "targets": []}
    for name, (rows, width, _) in PARTS.items():
        chance = torch.rand(args.batch_size * rows // 16 * WIDTH // width, device=args.device)
        picked = torch.searchsorted(parts[name]["sums"], chance).clamp(max=len(parts[name]["sums"]) - 1)
        for kind, tensors in found.items():
            tensors.append(parts[name][kind][picked].view(-1, WIDTH).long())
    ids, targets = (torch.cat(tensors) for tensors in found.values())
    is_replaced = (ids >= codes.start) & (torch.rand(ids.shape, device=ids.device) < args.replaced)
    ids = torch.where(is_replaced, torch.randint_like(ids, codes.start, codes.stop), ids)
    return {"ids": ids, "targets": targets, "taught": parts["language"]["taught"][picked]}


@torch.compile(dynamic=False)
def measure(body: MergedBody, hidden: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """The means that are called `MEASURES`; the last rows are the language that the base teaches."""
    pictures, language = hidden.split([len(hidden) - len(taught), len(taught)])
    pictures, wanted = pictures.flatten(0, 1), targets[: -len(taught)].flatten()
    head = body.table().bfloat16()
    first_code = len(head) - body.num_codes
    # A fixed number of places, for which nobody has to wait.
    places = ((wanted >= 0) & (wanted < first_code)).int().argsort(descending=True)[:NUM_TEXT_TARGETS]
    means = []
    for states, weights, ids in (
        (pictures, head[first_code:], torch.where(wanted >= first_code, wanted - first_code, -100)),
        (pictures[places], head, torch.where(wanted < first_code, wanted, -100)[places]),
    ):
        logits = F.linear(states, weights).float()
        means += [F.cross_entropy(logits, ids), (logits.argmax(-1) == ids).sum() / (ids >= 0).sum()]
    moved, known = F.linear(language, head), F.linear(taught, body.embeddings.bfloat16())
    moved, known = (logits.float().log_softmax(-1) for logits in (moved, known))
    divergence = F.kl_div(moved, known, reduction="none", log_target=True).sum(-1)
    is_language = targets[-len(taught) :] >= 0
    return torch.stack([*means, (divergence * is_language).sum() / is_language.sum()])


def train_step(body: MergedBody, optimizer, batch: dict[str, torch.Tensor], args, rate: float | None) -> torch.Tensor:
    """Forward, backward and, at a learning rate, an update; returns the means that are called `MEASURES`.

    Padded on the right: no target sees a pad.
    """
    with torch.autocast(args.device, dtype=torch.bfloat16):
        hidden = body(batch["ids"], args.batch_size * PARTS["pictures"][0] // 16)
        means = measure(body, hidden, batch["targets"], batch["taught"])
    (means[0] + TEXT_WEIGHT * means[2] + args.language * means[4]).backward()
    if rate is not None:
        torch.nn.utils.clip_grad_norm_(body.trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means.detach()


def save(model: PeftModel, log: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Writes the adapter beside its place and moves it there, so that a kill leaves a whole one."""
    output, beside = Path(args.output_dir), Path(args.output_dir) / "unfinished"
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    model.save_pretrained(beside, state_dict={name: weight.to(torch.bfloat16) for name, weight in trained.items()})
    (beside / "training.json").write_text(json.dumps({"arguments": vars(args), "log": log}) + "\n")
    for path in beside.iterdir():
        path.replace(output / path.name)
    beside.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="liquid-smollm2")
    parser.add_argument("--output_dir", default="liquid-smollm2/adapter")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max_steps", type=int, default=-1, help="fewer steps than the time allows")
    parser.add_argument("--batch_size", type=int, default=96, help="rows of a batch, a multiple of 16")
    parser.add_argument("--r", type=int, default=12)
    parser.add_argument("--lora_alpha", type=int, default=36)
    parser.add_argument("--language", type=float, default=4.0, help="weight of the language's divergence in the loss")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--replaced", type=float, default=0.1, help="share of the codes read that are replaced")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
