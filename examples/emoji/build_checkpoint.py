"""Puts the trained language model and the finished codec together into the repository that the package ships.

    python examples/emoji/build_checkpoint.py --lm_dir emoji-lm=0.3 emoji-lm-more-noise=0.7 --codec_dir emoji-codec \\
        --output_dir emoji-checkpoint \\
        --image_generation_config '{"guidance_scale": 1.0, "do_sample": false}'

Of several language models the weights are averaged (Wortsman et al. 2022, arXiv 2109.01903), each with its share.
The codec may have trained on after the language model took its codes, but only its decoder: encoder and codebook must
be the same in both. Weights are stored in fp16, half as large, and load as fp32. The processor learns which words the
model was trained on, so that prompts without any of them are warned of.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from emoji_data import load_emoji
from icons import load_icons
from records import World
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from words import load_words

from transformers_liquid.codecs.vq_model import LiquidVQModel
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM
from transformers_liquid.models.liquid.processing_liquid import LiquidProcessor


# The parts of the codec that codes depend on.
ENCODING = ("encoder.", "quant_conv.", "quantize.")


def main(args: argparse.Namespace) -> None:
    folders = {folder: float(share or 1) for folder, _, share in (one.partition("=") for one in args.lm_dir)}
    models = {folder: LiquidForCausalLM.from_pretrained(folder) for folder in folders}
    model = models[args.lm_dir[0].partition("=")[0]]
    processor = LiquidProcessor.from_pretrained(model.name_or_path)
    states = [(share, models[folder].model.text_model.state_dict()) for folder, share in folders.items()]
    mean = {name: sum(share * state[name] for share, state in states) for name in states[0][1]}
    model.model.text_model.load_state_dict(mean)
    codec = LiquidVQModel.from_pretrained(args.codec_dir)
    trained_with = model.model.vq_model.state_dict()
    for name, weight in codec.state_dict().items():
        if name.startswith(ENCODING) and not torch.equal(weight, trained_with[name]):
            raise ValueError(
                f"{name} of {args.codec_dir} is not that of the codec in {args.lm_dir}: their codes differ. Train the "
                "language model with this codec."
            )
    model.model.vq_model.load_state_dict(codec.state_dict())
    processor.check_fits(model.config)
    emoji = load_emoji(args.data_dir)
    world = World(emoji, load_words(args.data_dir, emoji), load_icons(args.data_dir)[1])
    texts = [text for words in world.words.values() for text in (*words.names, *words.keywords)]
    texts += [icon["name"] for icon in world.icons]
    known = {word for text in texts for word in re.findall(r"\w+", text.lower()) if len(word) > 2}
    processor.known_words = sorted(known - {"the", "and", "with", "for", "draw", "show"})
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=40,
        image_generation_config=args.image_generation_config,
    )
    model.config.use_cache = True
    # What the tokenizer remembers of the folder it came from says nothing about this one.
    for name in ("is_local", "local_files_only"):
        processor.tokenizer.init_kwargs.pop(name, None)
    model.save_pretrained(args.output_dir)
    weights = Path(args.output_dir) / "model.safetensors"
    halves = {name: weight.half() for name, weight in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--lm_dir", nargs="+", default=["emoji-lm"], metavar="DIR[=SHARE]")
    parser.add_argument("--codec_dir", default="emoji-codec")
    parser.add_argument("--output_dir", default="emoji-checkpoint")
    parser.add_argument(
        "--image_generation_config",
        type=json.loads,
        default={"guidance_scale": 1.0, "do_sample": False},
        help="JSON: the settings of pictures that evaluate.py --sweep found best",
    )
    main(parser.parse_args())
