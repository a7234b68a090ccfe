"""How fast is training? Packed batches, the loss head, tokenizing and the collator beside what one could do instead.

```bash
python benchmarks/training.py --output benchmarks/results/training.json
```

Four parts, each of which `--parts` can choose. Within a part the ways take turns, so that a busy machine slows all of
them alike; ratios are medians over the rounds, with the smallest and the largest in brackets.

- `packing`: forward and backward passes over a mixture, half of it texts (lengths log-normal, median 250 tokens, cut at
  2048), half of it images (1024 codes, descriptions of 20 to 60 tokens), four records at a time as in the reference's
  script. `packed`: one row without pads. `padded`: rows padded to the longest of the batch. `reference`: padded as well,
  as its script does, with the logits of all positions. The model has 3 layers of SmolLM2-135M's shape.
- `loss`: forward and backward passes of the head alone, hidden size 2048, vocabulary 264,192, in bfloat16, each in a
  process of its own. `plain`: transformers' loss on all logits. `chunked`: this package's. Extra memory is the peak of
  the process's memory beyond that of the same step on 8 positions: beyond weights and their gradients.
- `tokenize`: images per second of `tokenize_dataset` from JPEG files of 640 x 480 pixels, start-up excluded.
  `codec alone`: the codec on batches that are framed already. `one by one`: read, frame and encode an image at a time.
- `collator`: the collator, packing, beside forward and backward passes of SmolLM2-135M's shape on the same batch.

All weights are random, texts are words of liquid-emoji's tokenizer. CPU only.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from harness import machine, ratio, take_turns, timed, write
from transformers import LlamaConfig

from transformers_liquid import (
    CHAMELEON_VQ_CONFIG,
    EMOJI_CHECKPOINT,
    LiquidConfig,
    LiquidDataCollator,
    LiquidForCausalLM,
    LiquidImageProcessor,
    LiquidProcessor,
)
from transformers_liquid.data.tokenize import tokenize_dataset
from transformers_liquid.models.liquid.image_processing_liquid import load_image
from transformers_liquid.ops.packed_attention import use_packed_attention


MAX_LENGTH = 2048
CODES_PER_IMAGE = 1024
CODEBOOK_SIZE = 8192
# SmolLM2-135M; its vocabulary and number of layers are given where it is used.
SMOLLM2_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
# A codec of one pixel per code, where none is needed.
NO_CODEC = {
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [4],
    "norm_num_groups": 4,
    "num_vq_embeddings": CODEBOOK_SIZE,
    "sample_size": 32,
}


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds")
    # Parts that are not run now stay in the file as they are.
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    results |= machine() | {"rounds": args.rounds}
    for name in args.parts:
        results[name] = PARTS[name](args)
        write(args.output, results)


def packing(args: argparse.Namespace, batches_per_round: int = 3, batch_size: int = 4) -> dict[str, Any]:
    processor = benchmark_processor(text_rows=1600)
    model = benchmark_model(processor, num_hidden_layers=3)
    use_packed_attention(model)  # as the trainer does; rows with a mask are attended as before
    pack = LiquidDataCollator(processor, max_length=MAX_LENGTH, packing=True)
    pad = LiquidDataCollator(processor, max_length=MAX_LENGTH)
    ways = {
        "packed": lambda records: train_step(model, pack(records)),
        "padded": lambda records: train_step(model, pad(records)),
        "reference": lambda records: train_step(model, pad(records), skip_logits=False),
    }
    generator = np.random.default_rng(0)
    seconds = {name: [] for name in ways}
    useful, padded, rates = [], [], {name: [] for name in ways}
    for way in ways.values():
        way(mixture(2, processor, generator))
    for _ in range(args.rounds):
        records = mixture(batches_per_round * batch_size, processor, generator)
        batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
        useful.append(sum(pad(batch)["attention_mask"].sum().item() for batch in batches))
        padded.append(sum(pad(batch)["input_ids"].numel() for batch in batches))
        for name, way in ways.items():
            seconds[name].append(timed(lambda way=way, batches=batches: [way(batch) for batch in batches]))
            rates[name].append(useful[-1] / seconds[name][-1])
    share = sum(useful) / sum(padded)
    print_table(f"packing: {share:.0%} of the padded positions are no pads", rates, "useful tokens/s")
    return {
        "batch_size": batch_size,
        "useful_tokens": useful,
        "padded_tokens": padded,
        "useful_tokens_per_second": rates,
        "ratios": ratios(
            rates,
            {"packed / reference": ("packed", "reference", ">= 1.80"), "packed / padded": ("packed", "padded", "")},
        ),
    }


def mixture(number: int, processor: LiquidProcessor, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Texts and images in a random order, as many of each."""
    words = [token[1:] for token in processor.tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{4,}", token)]

    def text(length: float) -> str:
        return " " + " ".join(generator.choice(words, int(length)))

    lengths = np.clip(generator.lognormal(np.log(250), 1.0, number // 2), 8, MAX_LENGTH)
    texts = [{"kind": "text", "text": text(length)} for length in lengths]
    images = [image_record(text(generator.integers(20, 61)), generator) for _ in range(number - len(texts))]
    return [(texts + images)[index] for index in generator.permutation(number)]


def image_record(text: str, generator: np.random.Generator) -> dict[str, Any]:
    return {
        "kind": "text_to_image",
        "text": text,
        "codes": generator.integers(CODEBOOK_SIZE, size=CODES_PER_IMAGE).tolist(),
    }


def loss(args: argparse.Namespace) -> dict[str, Any]:
    seconds, gibibytes = {"plain": [], "chunked": []}, {"plain": [], "chunked": []}
    for _ in range(args.rounds):
        for name in seconds:
            # A process of its own, for a peak of its own.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                measured = executor.submit(measure_loss, name == "chunked", args.positions, torch.get_num_threads())
                for values, value in zip((seconds, gibibytes), measured.result(), strict=True):
                    values[name].append(value)
    print_table(f"loss: {args.positions} positions, 264192 ids, hidden size 2048, bfloat16", seconds, "s")
    print_table("", gibibytes, "GiB extra")
    return {
        "positions": args.positions,
        "seconds": seconds,
        "extra_gibibytes": gibibytes,
        "ratios": ratios(gibibytes, {"chunked / plain, extra memory": ("chunked", "plain", "<= 0.125")})
        | ratios(seconds, {"chunked / plain, time": ("chunked", "plain", "<= 1.15")}),
    }


def measure_loss(skip_logits: bool, positions: int, threads: int) -> tuple[float, float]:
    """Seconds and extra GiB of the loss and its gradients, of hidden states and a tied head's weight."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    text_config = LlamaConfig(
        vocab_size=256000 + CODEBOOK_SIZE,
        hidden_size=2048,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    config = LiquidConfig(text_config=text_config, vq_config=NO_CODEC)
    model = LiquidForCausalLM._from_config(config, dtype=torch.bfloat16).train()

    def step(length: int) -> None:
        # Embeddings are given, since the embedding layer's own gradient would count for both ways alike.
        embeddings = torch.randn(1, length, 2048, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(text_config.vocab_size, (1, length))
        model(inputs_embeds=embeddings, labels=labels, skip_logits=skip_logits).loss.backward()
        model.zero_grad()

    step(8)
    baseline = peak_memory()
    seconds = timed(lambda: step(positions))
    return seconds, (peak_memory() - baseline) / 2**30


def peak_memory() -> int:
    """The most memory in bytes that this process had; Linux only."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def tokenize(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        chameleon = Path(folder, "chameleon")
        text_config = LlamaConfig(
            vocab_size=16 + CODEBOOK_SIZE,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        config = LiquidConfig(text_config=text_config, vq_config=CHAMELEON_VQ_CONFIG, image_size=256)
        LiquidForCausalLM._from_config(config).save_pretrained(chameleon)
        for name, model, number, batch_size in (
            ("Chameleon's codec, 256 x 256", chameleon, 16, 8),
            ("liquid-emoji's codec, 64 x 64", EMOJI_CHECKPOINT, 256, 16),
        ):
            results[name] = tokenize_with(name, model, number, batch_size, args.rounds, Path(folder))
    return results


def tokenize_with(
    name: str, model: str | Path, number: int, batch_size: int, rounds: int, folder: Path
) -> dict[str, Any]:
    pictures = Path(folder, f"{number} pictures")
    write_pictures(pictures, number)
    liquid = LiquidForCausalLM.from_pretrained(model)
    codec, size = liquid.model.vq_model.eval(), liquid.config.image_size
    image_processor = LiquidImageProcessor(size, liquid.config.downsample_factor)
    framed = [
        image_processor(list(files))["pixel_values"] for files in batched(sorted(pictures.glob("*.jpg")), batch_size)
    ]
    outputs = (Path(folder, f"{number}-{call}") for call in range(rounds + 1))

    def dataset_seconds(split: str = "train") -> float:
        output = next(outputs)
        source = {"dataset": "json", "data_files": str(pictures / "metadata.jsonl"), "split": split}
        run = lambda: tokenize_dataset(model, output, **source, batch_size=batch_size)  # noqa: E731
        # The second time nothing is left to do but to start up.
        return timed(run) - timed(run)

    def codec_alone() -> None:
        for pixel_values in framed:
            codec.encode_codes(pixel_values)

    def one_by_one() -> None:
        for file in pictures.glob("*.jpg"):
            codec.encode_codes(image_processor(load_image(file))["pixel_values"])

    ways = {
        "tokenize_dataset": dataset_seconds,
        "codec alone": lambda: timed(codec_alone),
        "one by one": lambda: timed(one_by_one),
    }
    codec.encode_codes(framed[0])
    dataset_seconds(split=f"train[:{batch_size}]")  # `datasets` prepares its cache
    rates = {way: [number / seconds for seconds in taken] for way, taken in take_turns(ways, rounds).items()}
    print_table(f"tokenize: {name}, {number} images in batches of {batch_size}", rates, "images/s")
    return {
        "images": number,
        "batch_size": batch_size,
        "images_per_second": rates,
        "ratios": ratios(
            rates,
            {
                "tokenize_dataset / codec alone": ("tokenize_dataset", "codec alone", ">= 0.95"),
                "tokenize_dataset / one by one": ("tokenize_dataset", "one by one", ">= 1.50 on a GPU"),
            },
        ),
    }


def write_pictures(folder: Path, number: int) -> None:
    """Gradients with noise, and their texts."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:480, 0:640] / 480
    lines = []
    for index in range(number):
        slopes = generator.uniform(-120, 120, (2, 3))
        pixels = 128 + rows[..., None] * slopes[0] + columns[..., None] * slopes[1]
        pixels += generator.normal(0, 10, pixels.shape)
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=90)
        lines.append(json.dumps({"image_path": f"{index:05d}.jpg", "text": f"picture {index}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def collator(args: argparse.Namespace, records_per_step: int = 2) -> dict[str, Any]:
    processor = benchmark_processor(text_rows=49152)
    model = benchmark_model(processor, num_hidden_layers=30)
    collate = LiquidDataCollator(processor, packing=True)
    generator = np.random.default_rng(0)
    eight = [record for record in mixture(16, processor, generator) if record["kind"] == "text_to_image"]
    few = eight[:records_per_step]
    train_step(model, collate([{"kind": "text", "text": "a few words to warm up"}]))
    collate(eight)
    ways = {
        f"collator, {len(few)} records": lambda: 1000 * timed(lambda: collate(few)),
        "collator, 8 records": lambda: 1000 * timed(lambda: collate(eight)),
        f"step, {len(few)} records": lambda: 1000 * timed(lambda: train_step(model, collate(few))),
    }
    milliseconds = take_turns(ways, args.rounds)
    print_table("collator: SmolLM2-135M's shape", milliseconds, "ms")
    of_few, _, step = ways
    return {
        "milliseconds": milliseconds,
        "ratios": ratios(milliseconds, {"collator / step": (of_few, step, "<= 0.05")}),
    }


def benchmark_processor(text_rows: int) -> LiquidProcessor:
    """liquid-emoji's tokenizer; images have 32 x 32 of 8192 codes."""
    tokenizer = LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT).tokenizer
    tokenizer.model_max_length = MAX_LENGTH  # what it warns about
    return LiquidProcessor(LiquidImageProcessor(512, 16), tokenizer, image_token_offset=text_rows)


def benchmark_model(processor: LiquidProcessor, num_hidden_layers: int) -> LiquidForCausalLM:
    """A model of SmolLM2's shape with random weights, in training mode."""
    text_config = LlamaConfig(
        **SMOLLM2_SHAPE,
        vocab_size=processor.image_token_offset + CODEBOOK_SIZE,
        num_hidden_layers=num_hidden_layers,
        tie_word_embeddings=True,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    config = LiquidConfig(
        text_config=text_config,
        vq_config=NO_CODEC,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        uncond_token_id=processor.uncond_token_id,
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    return LiquidForCausalLM._from_config(config).train()


def train_step(model: LiquidForCausalLM, batch: dict[str, torch.Tensor], skip_logits: bool = True) -> None:
    """Forward and backward passes, without the optimizer."""
    model(**batch, skip_logits=skip_logits).loss.backward()
    model.zero_grad()


def batched(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def ratios(values: dict[str, list[float]], wanted: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
    """`wanted`: name -> numerator, denominator, goal. Prints them and returns them for the JSON file."""
    found = {}
    for name, (numerator, denominator, goal) in wanted.items():
        of_rounds = ratio(values[numerator], values[denominator])
        found[name] = of_rounds | {"goal": goal}
        numbers = f"{of_rounds['median']:9.3g} [{of_rounds['min']:.3g} - {of_rounds['max']:.3g}]"
        print(f"  {name:34} {numbers}" + (f"  goal {goal}" if goal else ""), flush=True)
    return found


def print_table(title: str, values: dict[str, list[float]], unit: str) -> None:
    if title:
        print(title)
    for name, of_rounds in values.items():
        print(f"  {name:34} {statistics.median(of_rounds):9.2f} {unit}")


PARTS = {"packing": packing, "loss": loss, "tokenize": tokenize, "collator": collator}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of every way (default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, default=4096, help="of the loss (default: %(default)s); fewer where memory is short"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    main(parser.parse_args())
