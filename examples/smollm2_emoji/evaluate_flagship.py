"""Measures liquid-smollm2: what it draws and calls by name, what it edits, and whether it still chats.

    python examples/smollm2_emoji/evaluate_flagship.py --data_dir liquid-smollm2 --adapter liquid-smollm2/adapter \\
        --output liquid-smollm2/evaluation

Writes OUTPUT.json and OUTPUT.png (the codec's reconstruction above, what the model draws below). With `--limit` a fixed
random sample of each kind is measured.
- top1, top5: the drawn picture is compared by squared error over pixels with the codec's reconstructions of all 3,786
  emoji; fewer than one, or five, others are nearer than the one that was asked for (equal ones count as one).
- `seen`: names that were trained on; `phrasings`: other words for seen emoji, held out; `unseen_composition`,
  `unseen_flag`: as for liquid-emoji; `edits`: of seen pictures to compositions that are held out.
- exact_name: the caption written for the codes of an emoji (greedy) is its name, letter for letter.
- perplexity of held-out texts, and of the base's own answers to held-out questions, before and after; and how many of
  those answers are given again, word for word.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from transformers_liquid import LiquidForCausalLM, LiquidProcessor


SETTINGS = (
    {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "guidance_scale": 2.0, "guidance_min_p": 0.2},
    {"do_sample": False, "guidance_scale": 2.0, "guidance_min_p": 0.1},
    {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "guidance_scale": 1.0},
)


def main(args: argparse.Namespace) -> None:
    data = Path(args.data_dir)
    heldout = json.loads((data / "evaluation.json").read_text(encoding="utf-8"))
    heldout["chat"] = json.loads((Path(args.adapter) / "chat.json").read_text(encoding="utf-8"))
    processor = LiquidProcessor.from_pretrained(data / "base")
    base = LiquidForCausalLM.from_pretrained(data / "base", dtype=args.dtype).to(args.device).eval()
    result: dict[str, Any] = {"dtype": args.dtype, "limit": args.limit}
    result["before"] = language(base, processor, heldout, args)
    model = PeftModel.from_pretrained(base, args.adapter).merge_and_unload().eval()
    result["after"] = language(model, processor, heldout, args)
    write(result, args.output)

    judge = Judge(model, np.load(data / "sequences.npz")["codes"], [one["name"] for one in heldout["all"]])
    wanted: dict[str, list[tuple[int, Any]]] = {"phrasings": [], "edits": []}
    for index, one in enumerate(heldout["all"]):
        wanted.setdefault(one["split"], []).append((index, one["name"]))
    wanted["phrasings"] = [(judge.index[one["name"]], one["text"]) for one in heldout["phrasings"]]
    wanted["edits"] = [(judge.index[one["name"]], one) for one in heldout["edits"]]
    wanted = {name: sample(items, args.limit) for name, items in wanted.items()}
    start = time.perf_counter()
    sheets = []
    for number, settings in enumerate(SETTINGS[: args.settings]):
        scores: dict[str, Any] = {"settings": settings}
        for split, items in wanted.items():
            drawn = draw(model, processor, [what for _, what in items], settings, args)
            scores[split] = judge.nearest(drawn, [index for index, _ in items])
            if number == 0:
                picks = torch.linspace(0, len(items) - 1, min(24, len(items))).long().tolist()
                known = judge.pixels[[items[pick][0] for pick in picks]]
                sheets.append(torch.cat([known, drawn[picks]], dim=-2))
                result[f"shown_{split}"] = [
                    what if isinstance(what, str) else what["name"] for _, what in (items[pick] for pick in picks)
                ]
        result.setdefault("drawing", []).append(scores)
        print(json.dumps(scores), flush=True)
        write(result, args.output)
    result["seconds"] = time.perf_counter() - start
    for split in ("seen", "unseen_composition"):
        result.setdefault("exact_name", {})[split] = judge.exact_names(model, processor, wanted[split], args)
    write(result, args.output)
    strips = [torch.cat(list(sheet), dim=-1) for sheet in sheets]
    width = max(strip.shape[-1] for strip in strips)
    sheet = torch.cat([torch.nn.functional.pad(strip, (0, width - strip.shape[-1]), value=1.0) for strip in strips], 1)
    pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(Path(args.output).with_suffix(".png"))


def write(result: dict[str, Any], output: str) -> None:
    Path(output).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def sample(items: list, limit: int) -> list:
    return items if limit <= 0 or len(items) <= limit else random.Random(0).sample(items, limit)


@torch.no_grad()
def language(model, processor: LiquidProcessor, heldout: dict[str, Any], args) -> dict[str, Any]:
    """Perplexities of texts and of the base's answers, and the answers that the model gives itself."""
    scores: dict[str, Any] = {}
    bos, offset = processor.bos_ids, processor.image_token_offset
    for name in ("sotu", "moby_dick"):
        sequences = [(bos, processor.encode(text)[:150]) for text in sample(heldout[name], args.limit)]
        scores[f"{name}_perplexity"] = perplexity(model, sequences, args, offset)
    pairs = sample(heldout["chat"], args.limit)
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": pair["question"]}], add_generation_prompt=True)
        for pair in pairs
    ]
    sequences = [
        (processor.encode(prompt), processor.encode(pair["answer"]))
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    scores["answers_perplexity"] = perplexity(model, sequences, args, offset)
    inputs = processor(text=prompts, return_tensors="pt", add_special_tokens=False).to(args.device)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=96)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    scores["same_answers"] = sum(answer == pair["answer"] for answer, pair in zip(answers, pairs, strict=True)) / len(
        pairs
    )
    scores["answers"] = [
        {"question": pair["question"], "answer": answer} for pair, answer in zip(pairs[:10], answers, strict=False)
    ]
    return scores


def perplexity(model, sequences: list[tuple[list[int], list[int]]], args, offset: int) -> float:
    """Over the second part of each sequence, among text ids."""
    total, number = 0.0, 0
    for start in range(0, len(sequences), args.batch_size):
        part = sequences[start : start + args.batch_size]
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in column], True, value).to(args.device)
            for column, value in (
                ([first + second for first, second in part], 0),
                ([[-100] * len(first) + second for first, second in part], -100),
            )
        )
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :offset].float()
        labels = labels[:, 1:]
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        number += (labels != -100).sum().item()
    return math.exp(total / number)


@torch.no_grad()
def draw(model, processor: LiquidProcessor, wanted: list[Any], settings: dict[str, Any], args) -> torch.Tensor:
    """Pictures `(N, 3, H, W)` of prompts, or of edits; picture i has seed i."""
    pictures = []
    for start in range(0, len(wanted), args.batch_size):
        part = wanted[start : start + args.batch_size]
        if isinstance(part[0], str):
            inputs = processor(text=part, generation_mode="image", return_tensors="pt").to(args.device)
        else:
            prompts = [edit_prompt(processor, one) for one in part]
            length = max(len(one) for one in prompts)
            ids, mask = torch.zeros(len(part), length, dtype=torch.long), torch.zeros(len(part), length)
            for row, prompt in enumerate(prompts):
                ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = torch.tensor(prompt), 1
            inputs = {"input_ids": ids.to(args.device), "attention_mask": mask.long().to(args.device)}
        generators = [torch.Generator().manual_seed(start + row) for row in range(len(part))]
        # Each size of a batch would be compiled.
        options = {"generation_mode": "image", "generator": generators, "disable_compile": True}
        ids = model.generate(**inputs, **options, **settings)
        pictures.append(model.decode_image_tokens(ids).float())
    return torch.cat(pictures)


def edit_prompt(processor: LiquidProcessor, edit: dict[str, Any]) -> list[int]:
    """The conversation of an edit up to the begin of the new picture."""
    pieces = processor.conversation_ids(edit["messages"], edit["images"])
    asked, answer = pieces[0][0], pieces[-1][0]
    return [*asked, *answer[: answer.index(processor.boi_token_id) + 1]]


class Judge:
    """Knows what the codec makes of all emoji.

    Args:
        model ([`LiquidForCausalLM`]): Holds the codec.
        codes (`np.ndarray` of shape `(N, 64)`): Of all emoji.
        names (`list[str]`): Theirs.
    """

    def __init__(self, model: LiquidForCausalLM, codes: np.ndarray, names: list[str]) -> None:
        self.codes, self.names = codes.astype(int), names
        self.index = {name: number for number, name in enumerate(names)}
        grids = torch.from_numpy(self.codes).view(-1, *model.config.grid()).to(model.device)
        decoded = [model.model.vq_model.decode_codes(part).clamp(-1, 1) for part in grids.split(128)]
        self.pixels = torch.cat(decoded).float()
        groups: dict[bytes, int] = {}
        self.group = torch.tensor([groups.setdefault(row.tobytes(), len(groups)) for row in self.codes])

    def nearest(self, drawn: torch.Tensor, indices: list[int]) -> dict[str, float]:
        known = self.pixels.flatten(1)
        distances = known.square().sum(1) - 2 * drawn.flatten(1).to(known) @ known.T
        own = distances.gather(1, torch.tensor(indices, device=known.device)[:, None])
        same = (self.group[indices][:, None] == self.group[None]).to(known.device)
        nearer = ((distances < own - 1e-2) & ~same).sum(1)
        return {
            "number": len(indices),
            "top1": (nearer < 1).float().mean().item(),
            "top5": (nearer < 5).float().mean().item(),
        }

    def exact_names(self, model, processor: LiquidProcessor, items: list[tuple[int, Any]], args) -> float:
        right = 0
        for start in range(0, len(items), args.batch_size):
            part = [index for index, _ in items[start : start + args.batch_size]]
            prompts = torch.tensor([processor.caption_ids(self.codes[index].tolist()) for index in part])
            ids = model.generate(input_ids=prompts.to(args.device), max_new_tokens=32, do_sample=False)
            written = processor.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
            for index, text in zip(part, written, strict=True):
                twins = torch.nonzero(self.group == self.group[index]).flatten().tolist()
                right += text.strip() in {self.names[twin] for twin in twins}
        return right / len(items)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="liquid-smollm2")
    parser.add_argument("--adapter", default="liquid-smollm2/adapter")
    parser.add_argument("--output", default="liquid-smollm2/evaluation", help="path of the results, without ending")
    parser.add_argument("--limit", type=int, default=0, help="at most so many of each kind (default: all)")
    parser.add_argument("--settings", type=int, default=1, help="how many of the settings to try")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
