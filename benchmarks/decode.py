"""How fast are pictures drawn? `generate(generation_mode="image")` beside what one could do instead.

```bash
python benchmarks/decode.py --output benchmarks/results/decode.json --plot docs/decode_benchmark.png
```

Each shape is one model that draws with guidance in several ways. They take turns, so that a busy machine slows all of
them alike, and get the same prompts. `liquid-emoji` is the embedded, trained checkpoint with its own settings; the others
have the shapes of language models, 8192 codes, random weights and the reference's settings.

- `body`: forwards of the transformer body alone, for the same rows and cache: no head, no sampling. The floor of a loop
  around transformers' forward.
- `memory`: the bytes of the weights that a step reads (body and the image rows of the head) divided by the bandwidth at
  which the same device sums up a tensor of 1 GiB, the best of three. The floor of any loop, as long as the weights do
  not fit into a cache.
- `plain`: this package; on CUDA with `disable_compile=True`.
- `compiled`: with a static cache and a compiled step, the default on CUDA.
- `speculative`: `speculative=True`. Only where the weights are trained: how often guesses are right depends on them.
- `reference`: what the reference's loop does: guidance in one batch, the whole head, mask and filters over the whole
  vocabulary.
- `stock`: transformers' `generate(guidance_scale=...)`, with the restriction to image ids as a logits processor.
- `janus`: transformers' decoding loop for Janus, around the same body, with Janus' head and as many codes. Its codec,
  which the loop does not use, is a stub. For a Qwen2 body, which the loop cannot take, around a llama of its shape.

Times are of whole calls, prompts included, divided by the codes of a picture. Ratios are medians over the rounds, with
the smallest and the largest in brackets.

Then `--quality` names of emoji are drawn by liquid-emoji in four ways, and each picture is shown to the model: how many
does it call by the name that was asked for, letter for letter? Ways that draw from the same distribution score the same
within the standard errors.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import as_text, machine, ratio, synchronize, write
from transformers import (
    CompileConfig,
    DynamicCache,
    GemmaConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    Qwen2Config,
)

from transformers_liquid import (
    EMOJI_CHECKPOINT,
    ImageTokenLogitsProcessor,
    LiquidConfig,
    LiquidForCausalLM,
    LiquidProcessor,
)
from transformers_liquid.generation.sampling import _NOT_COMPILABLE
from transformers_liquid.generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG


CODEBOOK_SIZE = 8192
PAD, BOS, BOI, UNCONDITIONAL = 0, 1, 7, 9
PROMPT_LENGTH = 8


@dataclass(frozen=True)
class Shape:
    """A text config (none: the trained checkpoint), and what two CPU cores can do of it in minutes."""

    text_config: Callable[[], PreTrainedConfig] | None
    cpu_codes: int
    cpu_batches: tuple[int, ...]


SHAPES = {
    "liquid-emoji": Shape(None, cpu_codes=64, cpu_batches=(1, 2, 4, 8, 16)),
    "smollm2-135m": Shape(
        lambda: LlamaConfig(
            vocab_size=49152 + CODEBOOK_SIZE,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        cpu_codes=64,
        cpu_batches=(1, 2, 4, 8, 16),
    ),
    "qwen2.5-0.5b": Shape(
        lambda: Qwen2Config(
            vocab_size=151936 + CODEBOOK_SIZE,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
        cpu_codes=16,
        cpu_batches=(1, 2, 4, 8, 16),
    ),
    "llama-3.2-1b": Shape(
        lambda: LlamaConfig(
            vocab_size=128256 + CODEBOOK_SIZE,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        ),
        cpu_codes=16,
        cpu_batches=(1, 2, 4),
    ),
    # The other defaults are Gemma-7B's. Only with CUDA.
    "gemma-7b": Shape(lambda: GemmaConfig(vocab_size=256000 + CODEBOOK_SIZE), cpu_codes=0, cpu_batches=()),
}
LLAMA_SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)
CUDA_CODES, CUDA_BATCHES = 256, (1, 2, 4, 8, 16)

# Where every code point is an emoji: food, animals, people and things, faces, vehicles, and those of later years.
EMOJI_BLOCKS = (
    *((0x1F32D, 0x1F335), (0x1F337, 0x1F37C), (0x1F400, 0x1F43E), (0x1F442, 0x1F4FC), (0x1F600, 0x1F64F)),
    *((0x1F680, 0x1F6C5), (0x1F910, 0x1F93A), (0x1F947, 0x1F9AF), (0x1F9B4, 0x1F9FF)),
)


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    on_cuda = args.device.startswith("cuda")
    shapes = args.shapes or [name for name in SHAPES if on_cuda or name != "gemma-7b"]
    if not on_cuda and "gemma-7b" in shapes:
        raise ValueError("gemma-7b is for --device cuda: a CPU takes seconds for each of its codes.")
    dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    result: dict[str, Any] = machine(args.device) | {"shapes": []}
    print(", ".join(f"{name} {value}" for name, value in result.items() if name != "shapes"))
    for name in shapes:
        codes = args.codes or (CUDA_CODES if on_cuda else SHAPES[name].cpu_codes)
        if name == "liquid-emoji":
            codes = min(codes, 64)
        batches = args.batches or (CUDA_BATCHES if on_cuda else SHAPES[name].cpu_batches)
        subject = Subject(name, args.device, dtype, codes)
        result["shapes"].append(benchmark(subject, args.ways, batches, args.rounds))
        del subject
        gc.collect()
        torch.compiler.reset()
        write(args.output, result)
    if args.quality:
        result["quality"] = quality(args.quality, args.device)
        write(args.output, result)
    if args.plot:
        plot(result, args.plot)


# Models and prompts


class Subject:
    """A model, its settings, and prompts for it.

    Args:
        name (`str`): Of `SHAPES`.
        device, dtype (`str`): Where it runs, in what.
        codes (`int`): Of a picture.
    """

    def __init__(self, name: str, device: str, dtype: str, codes: int) -> None:
        self.name, self.device, self.codes = name, torch.device(device), codes
        make_text_config = SHAPES[name].text_config
        self.processor = None
        if make_text_config is None:
            self.processor = LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)
            model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype=dtype).to(device)
        else:
            config = LiquidConfig(
                text_config=make_text_config(),
                vq_config={
                    "down_block_types": ["DownEncoderBlock2D"],
                    "up_block_types": ["UpDecoderBlock2D"],
                    "block_out_channels": [4],
                    "norm_num_groups": 4,
                    "num_vq_embeddings": CODEBOOK_SIZE,
                    "sample_size": 8,
                },
                boi_token_id=BOI,
                uncond_token_id=UNCONDITIONAL,
            )
            torch.manual_seed(0)
            with torch.device(device):
                model = LiquidForCausalLM._from_config(config, dtype=getattr(torch, dtype))
        self.model = model.eval()
        own = getattr(model.generation_config, "image_generation_config", None)
        self.settings = own or DEFAULT_IMAGE_GENERATION_CONFIG
        read = {name: weight for name, weight in self.body.named_parameters() if "embed_tokens" not in name}
        head_row = model.get_output_embeddings().weight[0]
        self.bytes_per_step = sum(weight.nbytes for weight in read.values())
        self.bytes_per_step += model.config.codebook_size * head_row.nbytes
        self.dtype = dtype
        self.janus: JanusForConditionalGeneration | None = None

    @property
    def body(self) -> torch.nn.Module:
        return self.model.model.text_model.base_model

    def prompts(self, batch: int, round_: int) -> dict[str, torch.Tensor]:
        """Arguments of `generate`: `batch` prompts, others in each round."""
        if self.processor is not None:
            names = emoji_names()
            chosen = [names[(97 * (round_ * batch + row)) % len(names)] for row in range(batch)]
            return self.processor(text=chosen, generation_mode="image", return_tensors="pt").to(self.device)
        ids = torch.randint(100, 1000, (batch, PROMPT_LENGTH), generator=torch.Generator().manual_seed(round_))
        ids[:, 0], ids[:, -1] = BOS, BOI
        unconditional = torch.tensor([[BOS, UNCONDITIONAL, BOI]])
        both = {"input_ids": ids, "negative_prompt_ids": unconditional}
        masks = {"attention_mask": ids, "negative_prompt_attention_mask": unconditional}
        masks = {name: torch.ones_like(value) for name, value in masks.items()}
        return {name: value.to(self.device) for name, value in (both | masks).items()}


def emoji_names() -> list[str]:
    """The names of some hundred emoji, in the words of Unicode."""
    return [unicodedata.name(chr(code)).lower() for first, last in EMOJI_BLOCKS for code in range(first, last + 1)]


def make_janus(subject: Subject) -> JanusForConditionalGeneration:
    """A Janus around the subject's own body, with Janus' embeddings and head for its codes.

    Its loop fails for a body with types of layers, such as Qwen2: there a llama of the same shape stands in.
    """
    text_config, dtype = subject.body.config, subject.model.dtype
    takes_body = getattr(text_config, "layer_types", None) is None
    if not takes_body:
        text_config = LlamaConfig(**{name: getattr(text_config, name) for name in LLAMA_SHAPE})
    config = JanusConfig(
        text_config=text_config,
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=16,
            num_image_tokens=subject.codes,
            projection_dim=text_config.hidden_size,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=subject.model.config.codebook_size,
            base_channels=32,
            latent_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            projection_dim=text_config.hidden_size,
            image_token_embed_dim=text_config.hidden_size,
        ),
    )
    with subject.device:
        janus = JanusForConditionalGeneration._from_config(config, dtype=dtype).eval()
    if takes_body:
        janus.model.language_model = subject.body
    janus.generation_config.generation_kwargs = {"boi_token_id": subject.model.config.boi_token_id}
    janus.generation_config.bos_token_id, janus.generation_config.pad_token_id = BOS, PAD
    return janus


# Ways of drawing: functions of the subject, the prompts and a seed


def draw(subject: Subject, prompts: dict[str, torch.Tensor], seed: int, **options: Any) -> Any:
    """This package. The same seed gives the same pictures with all options here."""
    factor = subject.model.config.downsample_factor
    generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(len(prompts["input_ids"]))]
    return subject.model.generate(
        **prompts,
        generation_mode="image",
        height=factor,
        width=factor * subject.codes,
        generator=generators,
        **options,
    )


def draw_plain(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.LongTensor:
    return draw(subject, prompts, seed, disable_compile=True)


def draw_compiled(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.LongTensor:
    options = {}
    if subject.device.type == "cpu":
        # transformers compiles on accelerators only, unless told like this.
        options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
        options["compile_config"]._compile_all_devices = True
    ids = draw(subject, prompts, seed, **options)
    if subject.body.config.model_type in _NOT_COMPILABLE:
        raise RuntimeError("The step did not compile; the warning above says why. Leave out --ways compiled.")
    return ids


def draw_speculative(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.LongTensor:
    return draw(subject, prompts, seed, speculative=True)


@torch.no_grad()
def draw_body(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> None:
    ids, mask = with_unconditional_rows(prompts)
    cache = DynamicCache(config=subject.body.config)
    for _ in range(subject.codes):
        subject.body(**inputs_of_step(ids, mask, cache))
        ids, mask = ids[:, -1:], append_one(mask)


@torch.no_grad()
def draw_reference(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.LongTensor:
    """What the reference's loop does; `guidance_min_p`, which it does not know, is for liquid-emoji's settings."""
    text_model, settings, image_slice = (
        subject.model.model.text_model,
        subject.settings,
        subject.model.config.image_layout.image_slice,
    )
    min_p = settings.get("guidance_min_p")
    torch.manual_seed(seed)
    ids, mask = with_unconditional_rows(prompts)
    cache = DynamicCache(config=text_model.config)
    drawn = []
    for _ in range(subject.codes):
        logits = text_model(**inputs_of_step(ids, mask, cache), logits_to_keep=1).logits[:, -1]
        conditional, unconditional = logits.float().chunk(2)
        scores = unconditional + settings["guidance_scale"] * (conditional - unconditional)
        scores[:, : image_slice.start] = -torch.inf
        scores[:, image_slice.stop :] = -torch.inf
        if min_p is not None:
            probabilities = conditional[:, image_slice].softmax(-1)
            unlikely = probabilities < min_p * probabilities.amax(-1, keepdim=True)
            scores[:, image_slice][unlikely] = -torch.inf
        scores = scores / settings["temperature"]
        if settings["top_k"]:
            scores[scores < scores.topk(settings["top_k"]).values[:, -1:]] = -torch.inf
        sorted_scores, order = scores.sort(descending=True)
        probabilities = sorted_scores.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= settings["top_p"]
        scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        new_ids = scores.softmax(-1).multinomial(1)
        drawn.append(new_ids)
        ids, mask = new_ids.repeat(2, 1), append_one(mask)
    return torch.cat(drawn, dim=1)


def draw_stock(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.LongTensor:
    """Without `guidance_min_p`, which transformers does not know."""
    length = prompts["input_ids"].shape[1]
    ids = subject.model.model.text_model.generate(
        prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        negative_prompt_ids=prompts["negative_prompt_ids"],
        logits_processor=LogitsProcessorList([ImageTokenLogitsProcessor(subject.model.config)]),
        max_new_tokens=subject.codes,
        min_new_tokens=subject.codes,
        pad_token_id=PAD,
        **without_min_p(subject.settings),
    )
    return ids[:, length:]


def draw_janus(subject: Subject, prompts: dict[str, torch.Tensor], seed: int) -> torch.LongTensor:
    codes = subject.janus.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        generation_mode="image",
        **without_min_p(subject.settings),
    )
    return codes + subject.model.config.image_token_offset


def without_min_p(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "guidance_min_p"}


def with_unconditional_rows(prompts: dict[str, torch.Tensor]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The rows that `generate(generation_mode="image")` runs: left-padded ids and their mask."""
    batch, length = prompts["input_ids"].shape
    length = max(length, prompts["negative_prompt_ids"].shape[1])

    def stacked(conditional: str, unconditional: str) -> torch.LongTensor:
        rows = prompts[conditional], prompts[unconditional].expand(batch, -1)
        return torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])

    ids = stacked("input_ids", "negative_prompt_ids")
    return ids, stacked("attention_mask", "negative_prompt_attention_mask")


def inputs_of_step(ids: torch.LongTensor, mask: torch.LongTensor, cache: DynamicCache) -> dict[str, Any]:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
    }


def append_one(mask: torch.LongTensor) -> torch.LongTensor:
    return torch.nn.functional.pad(mask, (0, 1), value=1)


WAYS: dict[str, Callable[[Subject, dict[str, torch.Tensor], int], torch.LongTensor | None]] = {
    "body": draw_body,
    "plain": draw_plain,
    "compiled": draw_compiled,
    "speculative": draw_speculative,
    "reference": draw_reference,
    "stock": draw_stock,
    "janus": draw_janus,
}


def is_measured(way: str, batch: int, subject: Subject) -> bool:
    """What is not measured has no meaning, or says the same as at batch 1."""
    if way == "speculative":
        return subject.processor is not None and batch <= 4
    if way == "compiled":
        return batch == 1 or subject.device.type == "cuda"
    return batch == 1 or way in ("body", "plain", "reference")


# Measuring


def benchmark(subject: Subject, ways: list[str], batches: list[int], rounds: int) -> dict[str, Any]:
    """Runs every way and batch `rounds` times in turn, prints a table and returns what it says."""
    cases = [(way, batch) for batch in batches for way in WAYS if way in ways and is_measured(way, batch, subject)]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    if ("janus", 1) in cases:
        # Before the first compiled call: a new model class makes torch compile again.
        subject.janus = make_janus(subject)
    first_call = {case: time_one(subject, *case, round_=0) for case in cases}
    bandwidths = []
    for round_ in range(1, rounds + 1):
        bandwidths.append(read_bandwidth(subject.device))
        for case in cases:
            seconds[case].append(time_one(subject, *case, round_))
    codes_per_step = {
        batch: [count_codes_per_step(subject, batch, round_) for round_ in range(1, rounds + 1)]
        for way, batch in cases
        if way == "speculative"
    }
    memory = [subject.bytes_per_step / bandwidth for bandwidth in bandwidths]

    print(f"\n{subject.name}, {subject.dtype}, {subject.codes} codes, {rounds} rounds")
    print(
        f"{subject.bytes_per_step / 1e6:.0f} MB of weights per step, {statistics.median(bandwidths) / 1e9:.1f} GB/s\n"
    )
    print("| way | batch | ms per code | ÷ plain | ÷ body | ÷ memory | codes per forward | pictures a minute |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for way, batch in [("memory", 1), *cases]:
        taken = [subject.codes * value for value in memory] if way == "memory" else seconds[way, batch]
        row: dict[str, Any] = {
            "way": way,
            "batch": batch,
            "ms_per_code": 1000 * statistics.median(taken) / subject.codes,
        }
        for other in ("plain", "body"):
            if (other, batch) in seconds:
                row[f"per_{other}"] = ratio(taken, seconds[other, batch])
        row["per_memory"] = ratio([value / subject.codes for value in taken], memory)
        if way == "speculative":
            row["codes_per_step"] = statistics.mean(codes_per_step[batch])
        if way not in ("memory", "body"):
            row["pictures_per_minute"] = 60 * batch / statistics.median(taken)
        rows.append(row | {"seconds": taken, "first_call_seconds": first_call.get((way, batch))})
        cells = [
            f"{row['ms_per_code']:.2f}",
            *(as_text(row.get(f"per_{name}")) for name in ("plain", "body", "memory")),
        ]
        cells += [f"{row[name]:.2f}" if name in row else "" for name in ("codes_per_step", "pictures_per_minute")]
        print(f"| {way} | {batch} | " + " | ".join(cells) + " |", flush=True)
    if ("compiled", 1) in first_call:
        print(f"\nThe first compiled call took {first_call['compiled', 1]:.0f} s.")
    return {
        "shape": subject.name,
        "dtype": subject.dtype,
        "codes": subject.codes,
        "bytes_per_step": subject.bytes_per_step,
        "bytes_per_second": bandwidths,
        "rows": rows,
    }


def time_one(subject: Subject, way: str, batch: int, round_: int) -> float:
    """Seconds of one call."""
    prompts = subject.prompts(batch, round_)
    synchronize(subject.device)
    start = time.perf_counter()
    drawn = WAYS[way](subject, prompts, round_)
    synchronize(subject.device)
    seconds = time.perf_counter() - start
    if drawn is not None:
        shape, allowed = (batch, subject.codes), subject.model.config.image_token_range
        if drawn.shape != shape or not {int(drawn.min()), int(drawn.max())} <= set(allowed):
            raise RuntimeError(f"{way} drew ids of shape {tuple(drawn.shape)}, expected image ids of shape {shape}.")
    return seconds


def count_codes_per_step(subject: Subject, batch: int, round_: int) -> float:
    """Of the pictures that a round draws speculatively; counting is not part of their time."""
    options = {"speculative": True, "return_dict_in_generate": True}
    return draw(subject, subject.prompts(batch, round_), round_, **options).codes_per_step


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second: the best of three sums of 1 GiB of float32."""
    numbers = torch.ones(2**28, device=device)
    seconds = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        numbers.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


# Quality


def quality(number: int, device: str, batch: int = 16) -> dict[str, Any]:
    """How many of `number` pictures the model calls by their names, for each way of drawing them."""
    subject = Subject("liquid-emoji", device, "float32", codes=64)
    names = emoji_names()
    names = [names[len(names) * index // number] for index in range(number)]
    drawn, right = {}, {}
    for way in ("plain", "speculative", "compiled", "reference"):
        parts = [names[start : start + batch] for start in range(0, number, batch)]
        prompts = [subject.processor(text=part, generation_mode="image", return_tensors="pt") for part in parts]
        drawn[way] = torch.cat([WAYS[way](subject, part.to(device), seed) for seed, part in enumerate(prompts)])
        called = [name for ids in drawn[way].split(batch) for name in describe(subject, ids)]
        right[way] = torch.tensor([a == b for a, b in zip(called, names, strict=True)]).double()

    print(f"\n{number} names drawn by liquid-emoji and named by it\n")
    print("| way | called by its name | difference to plain | same ids as plain |")
    print("|---|---|---|---|")
    rows = []
    for way, scores in right.items():
        row: dict[str, Any] = {"way": way, "exact": mean_and_error(scores)}
        row["difference"] = mean_and_error(scores - right["plain"])
        same = (drawn[way] == drawn["plain"]).all(1).double().mean().item()
        cells = [f"{100 * mean:.1f} ± {100 * error:.1f} %" for mean, error in (row["exact"], row["difference"])]
        # The reference has noise of its own.
        row |= {} if way == "reference" else {"same_pictures": same}
        rows.append(row)
        print(f"| {way} | " + " | ".join(cells) + f" | {'' if way == 'reference' else f'{100 * same:.1f} %'} |")
    return {"pictures": number, "settings": subject.settings, "rows": rows}


def describe(subject: Subject, ids: torch.LongTensor) -> list[str]:
    """The captions of pictures drawn as `ids`, decoded to pixels and encoded again."""
    codes = subject.model.model.vq_model.encode_codes(subject.model.decode_image_tokens(ids))
    prompts = torch.tensor([subject.processor.caption_ids(one.flatten().cpu()) for one in codes], device=ids.device)
    written = subject.model.generate(input_ids=prompts, max_new_tokens=40, do_sample=False)
    return subject.processor.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


# The plot


def plot(result: dict[str, Any], path: Path) -> None:
    """Above, milliseconds per code at batch 1; below, per code and picture over the batch."""
    import matplotlib.pyplot as plt

    shapes = result["shapes"]
    figure, axes = plt.subplots(2, len(shapes), figsize=(4 * len(shapes), 6), squeeze=False, layout="constrained")
    for (above, below), shape in zip(axes.T, shapes, strict=True):
        rows = [row for row in shape["rows"] if row["batch"] == 1][::-1]
        colors = ["tab:gray" if row["way"] in ("memory", "body") else "tab:blue" for row in rows]
        bars = above.barh([row["way"] for row in rows], [row["ms_per_code"] for row in rows], color=colors)
        above.bar_label(bars, fmt="%.1f", padding=2)
        above.margins(x=0.2)
        above.set(title=f"{shape['shape']}, {shape['dtype']}", xlabel="ms per code, batch 1")
        for way in WAYS:
            points = [(row["batch"], row["ms_per_code"] / row["batch"]) for row in shape["rows"] if row["way"] == way]
            if len(points) > 1:
                below.plot(*zip(*points, strict=True), marker="o", label=way)
        below.set(xlabel="batch", ylabel="ms per code and picture", xscale="log", yscale="log")
        batches = sorted({row["batch"] for row in shape["rows"]})
        below.set_xticks(batches, labels=[str(batch) for batch in batches])
        below.minorticks_off()
        if below.lines:
            below.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="(default: all, gemma-7b with CUDA only)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="(default: all)")
    parser.add_argument("--batches", type=int, nargs="+", help="(default: 1 2 4 8 16, on a CPU less for llama-3.2-1b)")
    parser.add_argument(
        "--codes", type=int, help="of a picture (default: 256 on CUDA, 16 or 64 on a CPU, by the shape)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of every way (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=320, help="names to draw; 0 for none (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on CUDA)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    main(parser.parse_args())
