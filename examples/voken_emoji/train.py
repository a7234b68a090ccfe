"""voken-emoji: a small language model that reads pictures, a small diffusion model, and the vokens between them, from nothing.

    python examples/voken_emoji/train.py --data_dir emoji-data --output_dir voken-emoji

The VAE is the codec of liquid-emoji without its quantizer. Run again to continue; each part is made once:
1. `diffusion`: a UNet of 4.1 M weights and a CLIP text model learn to draw names;
2. `base`: a LLaVA of 256 channels with vokens (`add_vokens`) learns to read pictures and stories, and by captions alone,
   without the diffusion model, what names and scenes of stories show;
3. `stage1`, `stage2`: as MiniGPT-5, by `transformers-liquid voken train` with the .yaml beside this file; stage 1 with scenes
   beside names, stage 2 with names beside stories;
4. `shipped`: the same in fp16, which is loaded as fp32.
`--share 0.01` makes a hundredth of the steps of each, to see whether all runs. `--ablation NAME` trains stage 1 once more
(`stage1-NAME`, for `evaluate.py --model`) without one of its parts, as in the paper's tables 5 and 7; the one without
guidance is `evaluate.py --guidance_scale 1`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from voken_emoji_data import write_data

from transformers_liquid import (
    CodecVAE,
    InterleavedVokenPipeline,
    VokenCondition,
    VokenDataCollator,
    VokenImageDecoder,
    VokenTrainer,
    add_vokens,
    story_samples,
)
from transformers_liquid.data.voken_collator import drawing_pixels
from transformers_liquid.data.voken_records import load_voken_records
from transformers_liquid.models.liquid.image_processing_liquid import load_image
from transformers_liquid.models.voken.prompts import CAPTION_PROMPT, STORY_PROMPTS
from transformers_liquid.training.voken_train import WEIGHTS
from transformers_liquid.training.voken_train import main as train_stage
from transformers_liquid.utils.files import whole_folder


LENGTH = 16  # tokens of a name, and vectors of a condition
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
ABLATIONS = {
    "no_caption_loss": ["--caption_loss_weight=0"],
    "no_image_loss": ["--image_loss_weight=0"],
    "fixed_queries": ["--frozen_mapper_parts=query"],
    "decoder_only": ["--frozen_mapper_parts=encoder_decoder.encoder"],
}


def main(args: argparse.Namespace) -> None:
    set_seed(0)
    folder = Path(args.output_dir)
    if not (folder / "unseen.json").exists():
        write_data(args.data_dir, folder)
    if not (folder / "diffusion" / "model_index.json").exists():
        train_diffusion(folder, args)
    if not (folder / "base" / "model_index.json").exists():
        train_base(folder, args)
    here, base = Path(__file__).parent, "base"
    if args.ablation == "decoder_only":
        base = "base-decoder_only"
        if not (folder / base / "model_index.json").exists():
            pipe = InterleavedVokenPipeline.from_pretrained(folder / "base")
            silence(pipe.model.feature_mapper.encoder_decoder.encoder)
            pipe.save_pretrained(folder / base)
    end = f"-{args.ablation}" if args.ablation else ""
    # With names alone, stage 1 would forget what to draw in a story, and stage 2 would not find it again; with stories alone,
    # stage 2 would forget names.
    stages = [("stage1", base, [*5 * ["names"], "scenes"]), ("stage2", "stage1", [*20 * ["names"], "stories"])]
    for stage, before, datasets in stages[:1] if args.ablation else stages:
        name = f"{stage}{end}"
        if (folder / name / "model_index.json").exists():
            continue
        options = [f"--model={folder / before}", f"--output_dir={folder / name}", f"--image_folder={folder / 'images'}"]
        options += [
            f"--max_steps={steps(args, stage)}",
            "--datasets",
            *(str(folder / f"{data}.jsonl") for data in datasets),
        ]
        train_stage(
            ["--config", str(here / f"{stage}.yaml"), *options, *ABLATIONS.get(args.ablation, []), *args.option]
        )
    shipped = folder / "shipped"
    if not args.ablation and not (shipped / "model_index.json").exists():
        shipped.mkdir(exist_ok=True)
        with whole_folder(shipped) as place:
            pipe = InterleavedVokenPipeline.from_pretrained(folder / "stage2")
            pipe.model.config.image_decoder = None  # it is there beside the model
            pipe.model.generation_config.update(do_sample=True, top_p=0.9)  # else every story has the likeliest role
            pipe.save_pretrained(place)
            for file in Path(place).rglob("*.safetensors"):
                save_file({name: one.half() for name, one in load_file(file).items()}, file, metadata={"format": "pt"})


def silence(encoder: torch.nn.TransformerEncoder) -> None:
    """Makes every layer of the encoder give what it gets: nothing is added to it."""
    for layer in encoder.layers:
        for last in (layer.self_attn.out_proj, layer.linear2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)


def steps(args: argparse.Namespace, part: str) -> int:
    return max(2, round(args.share * {"diffusion": 4000, "base": 5000, "stage1": 1400, "stage2": 400}[part]))


def train_diffusion(folder: Path, args: argparse.Namespace) -> None:
    tokenizer = build_tokenizer(folder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(64, 96), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64, attention_head_dim=8,
    )  # fmt: skip
    records = load_voken_records(folder / "names.jsonl", tokenizer, folder / "images")
    pixels = torch.stack([drawing_pixels(load_image(record["image"]), (64, 64)) for record in records])
    std = CodecVAE("liquid-emoji", scaling_factor=1.0).encode(pixels[:256]).latent_dist.mean.std().item()
    vae = CodecVAE("liquid-emoji", scaling_factor=1 / std)
    scheduler = DDPMScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    decoder = VokenImageDecoder(pipe)
    drawer = Drawer(decoder)
    latents = torch.cat([decoder.encode(some) for some in pixels.split(64)])
    data = [{"latents": one, "text": record["text"]} for one, record in zip(latents, records, strict=True)]
    # Persons in other skin tones say much about each other, things little.
    data += [one for one in data if not one["text"].startswith(("man", "woman"))]
    fit(
        Trainer,
        drawer,
        folder / "diffusion-training",
        args,
        "diffusion",
        32,
        8e-4,
        train_dataset=data,
        data_collator=drawer.collate,
    )
    pipe.save_pretrained(folder / "diffusion")


class Drawer(torch.nn.Module):
    """UNet and text encoder, trained by the loss that they are judged by."""

    def __init__(self, decoder: VokenImageDecoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = (
            decoder.denoiser.requires_grad_(True),
            decoder.pipe.text_encoder.requires_grad_(True),
        )
        self.__dict__["decoder"] = decoder

    def forward(self, latents: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        condition = VokenCondition(embeds=self.text_encoder(input_ids)[0])
        return {"loss": self.decoder.loss(latents, condition).mean()}

    def collate(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = ["" if torch.rand(()) < 0.1 else record["text"] for record in records]
        ids = self.decoder.pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        return {"latents": torch.stack([record["latents"] for record in records]), "input_ids": ids}


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A token for each word of the names, the stories and what is asked."""
    lines = [
        json.loads(line) for file in ("names", "stories") for line in (folder / f"{file}.jsonl").open(encoding="utf-8")
    ]
    texts = [text for line in lines for text in line.get("texts", [line.get("text", "")])]
    split = pre_tokenizers.Whitespace()
    asked = [CAPTION_PROMPT, *STORY_PROMPTS.values()]
    words = sorted({word for text in [*texts, *asked] for word, _ in split.pre_tokenize_str(text.lower())})
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*SPECIALS, *words])}, "<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), split
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=LENGTH, extra_special_tokens={"image_token": "<image>"}, **names
    )


def train_base(folder: Path, args: argparse.Namespace) -> None:
    tokenizer = build_tokenizer(folder)
    tokenizer.model_max_length = 512
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    text = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    text |= {
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(
        "llava",
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    settings = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, image_token="<image>", **settings)
    diffusion = StableDiffusionPipeline.from_pretrained(folder / "diffusion")
    mapper = {"mapper_num_layers": 2, "mapper_num_heads": 4, "condition_length": LENGTH}
    pipe = add_vokens(AutoModelForImageTextToText.from_config(config), processor, diffusion, **mapper)
    weights = {name: getattr(pipe.model.config, name) for name in WEIGHTS}
    pipe.model.config.update({"image_loss_weight": 0.0, "text_loss_weight": 1.0, "caption_loss_weight": 1.0})
    files = {
        name: load_voken_records(folder / f"{name}.jsonl", tokenizer, folder / "images")
        for name in ("names", "captions", "stories", "scenes")
    }
    things = [record for record in files["names"] if not record["text"].startswith(("man", "woman"))]
    told = [sample for record in files["stories"] for sample in story_samples(record, ["text"])]
    collator = VokenDataCollator(pipe.processor, captions=True)
    # What is drawn is learned by the diffusion model's encoding of its name. Many captions, since skin tones are read last;
    # words of things are rarer than those of people.
    records = 2 * files["names"] + 8 * things + 8 * files["captions"] + told[::4] + 2 * files["scenes"]
    place = folder / "base-training"
    fit(VokenTrainer, pipe.model, place, args, "base", 32, 7e-4, train_dataset=records, data_collator=collator)
    pipe.model.config.update(weights)
    pipe.save_pretrained(folder / "base")


def fit(
    kind: type[Trainer],
    model: Any,
    folder: Path,
    args: argparse.Namespace,
    part: str,
    size: int,
    rate: float,
    **data: Any,
):
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps(args, part), per_device_train_batch_size=size, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=50, logging_steps=50, save_steps=500, save_total_limit=1, report_to="none",
        remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = kind(model=model.train(), args=settings, **data)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--output_dir", default="voken-emoji")
    parser.add_argument("--ablation", choices=ABLATIONS, help="of stage 1")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps")
    parser.add_argument(
        "--option", nargs="*", default=[], help="for the stages, such as --option=--caption_loss_weight=0"
    )
    main(parser.parse_args())
