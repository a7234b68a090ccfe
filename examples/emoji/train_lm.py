"""Trains the language model of liquid-emoji from scratch: names -> pictures and pictures -> names.

    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm-1
    python examples/emoji/train_lm.py --data_dir emoji-data --codec_dir emoji-codec --output_dir emoji-lm \\
        --continue_from emoji-lm-1 --epochs 8 --learning_rate 6e-4 --warmup_steps 50 --seed 1

(the second, short run: over eight settings of evaluate.py --sweep, 75 unseen names went up by 3 points in the mean)

The codec of train_codec.py stays as it is; its codes are computed once. Only "seen" emoji are trained on. Run the same
command again to continue a stopped run. `output_dir` becomes a complete repository (model, codec, processor).

What lets a small model draw names that it never saw ("a known person with a new skin tone"):
- codes whose vectors lie close begin with embeddings that lie close (a random projection of the codebook);
- a picture has not one sequence of codes but many: codes nearly as near to the latent are drawn now and then
  (stochastic sampling of codes, Lee et al. 2022, arXiv 2203.01941);
- some of the codes that the model reads, not those that it must predict, are replaced by others: it learns to trust
  the words more than the picture so far.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_data import load_emoji, load_pixels
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from transformers_liquid.codecs.vq_model import LiquidVQModel
from transformers_liquid.data.collator import LiquidDataCollator
from transformers_liquid.models.liquid.configuration_liquid import LiquidConfig
from transformers_liquid.models.liquid.image_processing_liquid import LiquidImageProcessor
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor
from transformers_liquid.models.liquid.prompts import CAPTION_INSTRUCTION, TEXT_TO_IMAGE_INSTRUCTIONS


# Besides the standard caption prompt, these ask for the name of a picture too.
QUESTIONS = ("What is this?", "Describe this image.", "What is in this image?")
# One turn: the picture and the question, without roles.
CHAT_TEMPLATE = "{{ bos_token }}{%- for message in messages -%}{{ message['content'] | replace('<image>\n', '<image>') }}{%- endfor -%}"


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    emoji = load_emoji(args.data_dir)
    seen = [index for index, item in enumerate(emoji) if item.split == "seen"]
    names = [emoji[index].name for index in seen]
    codec = LiquidVQModel.from_pretrained(args.codec_dir).eval()
    processor = build_processor(build_tokenizer(names, args.text_tokens), codec)
    model = build_model(processor, codec, args.attention_dropout)
    if args.continue_from is not None:
        trained = LiquidForCausalLM.from_pretrained(args.continue_from)
        model.load_state_dict(trained.state_dict())
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (model.model.text_model, codec)]
    print(f"{len(seen)} pictures; parameters: language model {counts[0]:,}, codec {counts[1]:,}", flush=True)

    dataset = EmojiDataset(names, codec, load_pixels(emoji)[seen], args.resampled_codes, args.seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            logging_steps=50,
            save_steps=args.save_steps,
            save_total_limit=1,
            remove_unused_columns=False,
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=dataset,
        data_collator=EmojiDataCollator(
            LiquidDataCollator(
                processor,
                unconditional_probability=args.unconditional_probability,
                caption_probability=args.caption_probability,
                seed=args.seed,
            ),
            args.replaced_codes,
            args.seed,
        ),
    )
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.use_cache = True  # the Trainer turns it off
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


def build_tokenizer(names: list[str], text_tokens: int) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE of the names, in which every instruction is a single token."""
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
    phrases = [*TEXT_TO_IMAGE_INSTRUCTIONS, CAPTION_INSTRUCTION, *QUESTIONS]
    trainer = trainers.BpeTrainer(
        vocab_size=text_tokens - len(phrases),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(names, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    if tokenizer.get_vocab_size() != text_tokens:
        raise ValueError(f"The names give only {tokenizer.get_vocab_size()} tokens, asked for {text_tokens}.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<boi>", "<eoi>", "<unconditional>", "<image>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
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


def build_model(processor: LiquidProcessor, codec: LiquidVQModel, attention_dropout: float) -> LiquidForCausalLM:
    """A new llama around the trained codec."""
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        vocab_size=processor.image_token_offset + processor.codebook_size,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=attention_dropout,
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


class EmojiDataset(torch.utils.data.Dataset):
    """Records of names and codes; codes are drawn anew each time, nearly always the nearest ones.

    Args:
        names (`list[str]`): One for each picture.
        codec ([`LiquidVQModel`]): Encodes them.
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): The pictures in [-1, 1].
        resampled (`float`): Share of codes, on average, that are not the nearest ones.
        seed (`int`): Of the draws.
    """

    def __init__(
        self,
        names: list[str],
        codec: LiquidVQModel,
        pixels: torch.Tensor,
        resampled: float,
        seed: int,
        nearest: int = 8,
    ) -> None:
        self.names = names
        self.draw = np.random.default_rng(seed)
        codebook = codec.quantize.embedding.weight.detach()
        distances, codes = [], []
        with torch.no_grad():
            for batch in pixels.split(64):
                latents = codec.encode(batch).latents.permute(0, 2, 3, 1).flatten(1, 2)
                found = torch.cdist(latents, codebook[None]).square().topk(nearest, largest=False)
                distances.append(found.values)
                codes.append(found.indices)
        self.codes = torch.cat(codes).numpy()  # (N, h * w, nearest), the nearest first
        further = torch.cat(distances)
        further = further - further[..., :1]
        temperature = _temperature(further, resampled)
        self.cumulative = (-further / temperature).softmax(-1).cumsum(-1).numpy()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        uniform = self.draw.random(self.cumulative.shape[1])[:, None]
        choice = (self.cumulative[index, :, :-1] < uniform).sum(-1)
        codes = np.take_along_axis(self.codes[index], choice[:, None], axis=1)[:, 0]
        return {"kind": "text_to_image", "text": self.names[index], "codes": codes}


def _temperature(further: torch.Tensor, resampled: float) -> float:
    """The temperature at which a share `resampled` of draws does not fall on the first; found by bisection."""
    low, high = 1e-6, float(further.mean())
    for _ in range(30):
        temperature = (low * high) ** 0.5
        share = 1 - (-further / temperature).softmax(-1)[..., 0].mean()
        low, high = (low, temperature) if share > resampled else (temperature, high)
    return low


class EmojiDataCollator:
    """The package's collator; then some codes that are read are replaced, and captions are asked for in other words.

    Args:
        collator ([`LiquidDataCollator`]): Makes the batches.
        replaced (`float`): Share of the codes read (labels stay) that are replaced by other codes of the batch.
        seed (`int`): Of the draws.
    """

    def __init__(self, collator: LiquidDataCollator, replaced: float, seed: int) -> None:
        self.collator, self.replaced = collator, replaced
        self.generator = torch.Generator().manual_seed(seed)
        processor = collator.processor
        self.first_code = processor.image_token_offset
        (self.caption_id,) = processor.encode(CAPTION_INSTRUCTION)
        self.question_ids = torch.tensor([self.caption_id, *(processor.encode(question)[0] for question in QUESTIONS)])

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(records)
        ids = batch["input_ids"]
        codes = ids[ids >= self.first_code]
        replaced = (ids >= self.first_code) & (torch.rand(ids.shape, generator=self.generator) < self.replaced)
        ids[replaced] = codes[torch.randint(len(codes), (int(replaced.sum()),), generator=self.generator)]
        asked = ids == self.caption_id
        ids[asked] = self.question_ids[
            torch.randint(len(self.question_ids), (int(asked.sum()),), generator=self.generator)
        ]
        return batch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--codec_dir", default="emoji-codec")
    parser.add_argument("--output_dir", default="emoji-lm")
    parser.add_argument("--continue_from", help="a finished --output_dir: its weights instead of new ones")
    parser.add_argument("--epochs", type=float, default=48)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--attention_dropout", type=float, default=0.0)
    parser.add_argument("--text_tokens", type=int, default=1600, help="size of the tokenizer")
    parser.add_argument("--caption_probability", type=float, default=0.2)
    parser.add_argument("--unconditional_probability", type=float, default=0.1)
    parser.add_argument("--resampled_codes", type=float, default=0.1, help="share of codes that are not the nearest")
    parser.add_argument("--replaced_codes", type=float, default=0.1, help="share of codes that are read wrong")
    parser.add_argument("--save_steps", type=int, default=250)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--use_cpu", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
