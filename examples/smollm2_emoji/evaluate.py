"""Measures a model of this example: text perplexity, image loss, and what it draws.

    python examples/smollm2_emoji/evaluate.py --model smollm2-emoji/base --output smollm2-emoji/evaluation-base
    python examples/smollm2_emoji/evaluate.py --model smollm2-emoji/lora --output smollm2-emoji/evaluation-lora

`--model` is a whole model or an adapter's folder. Writes OUTPUT.json and OUTPUT.png (the codec's reconstructions above
what the model draws; half of the names were trained on, half were not).
- perplexity: of held-out texts, over tokens, the first one given the bos token alone; among all ids, and among the ids
  of the base's own tokens (`perplexity_of_text_ids`), which new rows cannot change.
- image_loss: cross-entropy per code in nats among all ids, given the name and the codes before it, without guidance.
- top1: the share of drawn pictures whose nearest emoji of the data set, by mean squared error between the picture and
  the codec's reconstructions, is the one named.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm import tqdm
from transformers import set_seed

from transformers_liquid import LiquidForCausalLM, LiquidProcessor
from transformers_liquid.ops.chunked_loss import IGNORE_INDEX


TEXTS = ("sotu", "moby-dick")


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    start = time.perf_counter()
    data = Path(args.data_dir)
    model = load_model(args.model).eval()
    processor = LiquidProcessor.from_pretrained(data / "base")
    result: dict[str, Any] = {"perplexity": {}, "perplexity_of_text_ids": {}, "image_loss": {}, "top1": {}}

    for name in TEXTS:
        lines = (data / f"heldout-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [text_row(processor, json.loads(line)["text"]) for line in lines]
        losses = mean_losses(model, rows, args.batch_size, [None, processor.image_token_offset])
        for key, loss in zip(("perplexity", "perplexity_of_text_ids"), losses, strict=True):
            result[key][name] = math.exp(loss)

    records = {
        split: read_records(data / folder) for split, folder in (("seen", "emoji"), ("heldout", "emoji-validation"))
    }
    known = records["seen"] + records["heldout"]
    reconstructions = decode(model, [record["codes"] for record in known])
    sheet = []
    for split, first in (("seen", 0), ("heldout", len(records["seen"]))):
        # Of the seen ones as many as of the others, evenly spread.
        number = len(records["heldout"])
        picks = torch.linspace(0, len(records[split]) - 1, number).long()
        chosen = [records[split][index] for index in picks]
        rows = [image_row(processor, record) for record in chosen]
        [result["image_loss"][split]] = mean_losses(model, rows, args.batch_size, [None])
        drawn = draw(model, processor, [record["text"] for record in chosen], args.batch_size, args.seed)
        result["top1"][split] = top1(drawn, reconstructions, first + picks)
        shown = torch.linspace(0, number - 1, args.num_shown // 2).long()
        sheet.append(torch.cat([reconstructions[first + picks[shown]], drawn[shown]], dim=-2))
        result[f"drawn_{split}"] = [chosen[index]["text"] for index in shown]

    result["seconds"] = round(time.perf_counter() - start)
    Path(args.output).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    to_image(torch.cat(list(torch.cat(sheet)), dim=-1)).save(Path(args.output).with_suffix(".png"))
    print(json.dumps(result, indent=2))


def load_model(path: str) -> LiquidForCausalLM:
    """A whole model; or an adapter, merged into the base that it names."""
    if not (Path(path) / "adapter_config.json").exists():
        return LiquidForCausalLM.from_pretrained(path)
    from peft import PeftConfig, PeftModel

    base = LiquidForCausalLM.from_pretrained(PeftConfig.from_pretrained(path).base_model_name_or_path)
    return PeftModel.from_pretrained(base, path).merge_and_unload()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a tokenised data set."""
    return list(datasets.load_dataset(str(folder), split="train"))


def text_row(processor: LiquidProcessor, text: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text. It is a piece of a longer one, so that no eos is expected at its end."""
    ids = processor.encode(text)
    return processor.bos_ids + ids, [IGNORE_INDEX] * len(processor.bos_ids) + ids


def image_row(processor: LiquidProcessor, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels of a picture after its name; labels on the codes alone."""
    prompt, codes = processor.image_prompt_ids(record["text"]), processor.codes_to_ids(record["codes"])
    return prompt + codes, [IGNORE_INDEX] * len(prompt) + codes


@torch.no_grad()
def mean_losses(
    model: LiquidForCausalLM, rows: list[tuple[list[int], list[int]]], batch_size: int, limits: list[int | None]
) -> list[float]:
    """For each limit, the mean cross-entropy over all labels in nats among the ids below it (`None`: all ids)."""
    totals, number = torch.zeros(len(limits), dtype=torch.float64), 0
    for batch in batches(rows, batch_size):
        ids = pad([ids for ids, _ in batch], 0)
        labels = pad([labels for _, labels in batch], IGNORE_INDEX)[:, 1:]
        # Padded on the right: under causal attention no label sees a pad.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][labels != IGNORE_INDEX]
        labels = labels[labels != IGNORE_INDEX]
        losses = [torch.nn.functional.cross_entropy(logits[:, :limit], labels, reduction="sum") for limit in limits]
        totals, number = totals + torch.stack(losses), number + len(labels)
    return (totals / number).tolist()


def batches(rows: list, batch_size: int) -> Iterator[list]:
    """Rows of about the same length together."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in tqdm(range(0, len(rows), batch_size), leave=False, mininterval=5):
        yield rows[start : start + batch_size]


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows as one tensor, filled on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def draw(
    model: LiquidForCausalLM, processor: LiquidProcessor, names: list[str], batch_size: int, seed: int
) -> torch.Tensor:
    """A picture `(N, 3, H, W)` for each name, with the model's own settings; picture `i` has seed `seed + i`."""
    pictures = []
    for start in tqdm(range(0, len(names), batch_size), leave=False, mininterval=5):
        batch = names[start : start + batch_size]
        inputs = processor(text=batch, generation_mode="image", return_tensors="pt")
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(batch))]
        ids = model.generate(**inputs, generation_mode="image", generator=generators)
        pictures.append(model.decode_image_tokens(ids))
    return torch.cat(pictures)


@torch.no_grad()
def decode(model: LiquidForCausalLM, codes: list[list[int]]) -> torch.Tensor:
    """The codec's pictures `(N, 3, H, W)` of codes."""
    rows, columns = model.config.grid()
    grids = torch.tensor(codes).view(-1, rows, columns)
    return torch.cat([model.model.vq_model.decode_codes(batch).clamp(-1, 1) for batch in grids.split(64)])


def top1(drawn: torch.Tensor, reconstructions: torch.Tensor, own: torch.Tensor) -> float:
    """Share of pictures that are nearest to their own reconstruction."""
    distances = torch.cdist(drawn.flatten(1), reconstructions.flatten(1))
    return (distances.argmin(1) == own).float().mean().item()


def to_image(pixels: torch.Tensor) -> Image.Image:
    """A picture of pixels `(3, H, W)` in [-1, 1]."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", default="smollm2-emoji", help="what prepare.py wrote")
    parser.add_argument("--output", required=True, help="path of the results, without ending")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_shown", type=int, default=16, help="pictures on the sheet")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
