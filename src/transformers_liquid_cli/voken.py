"""`transformers-liquid voken COMMAND`: a language model that says what to draw, and a diffusion model that draws it."""

import os
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option, Typer

from . import options


voken_app = Typer(help="A language model that says what to draw, and a diffusion model that draws it (MiniGPT-5).")


@voken_app.command()
def add(
    base: Annotated[str, Argument(help="A language model, or one that reads pictures: a folder or a name on the Hub.")],
    image_model: Annotated[str, Argument(help="A text-to-image repository of diffusers.")],
    output: options.NewFolder,
    num_vokens: Annotated[int, Option(min=1, help="Vokens of a picture.")] = 8,
    mapper_hidden_size: Annotated[
        int | None, Option(min=1, help="Width of the mapper.", show_default="that of the condition, at most 1024")
    ] = None,
    dtype: options.DType = "auto",
    seed: options.Seed = 0,
) -> None:
    """Gives a model vokens, for a diffusion model.

    \b
    Example:
      transformers-liquid voken add Qwen/Qwen2.5-VL-3B-Instruct stabilityai/stable-diffusion-2-1-base --output my-vokens
    """
    options.check_new_folder(output)
    from diffusers import DiffusionPipeline
    from transformers import AutoConfig, AutoProcessor, set_seed

    from transformers_liquid import add_vokens
    from transformers_liquid.models.liquid.reference import check_loading_info, naming
    from transformers_liquid.models.voken.modeling_voken import auto_class_of
    from transformers_liquid.utils.files import whole_folder

    from .models import reading, silence_libraries

    silence_libraries()
    set_seed(seed)
    with naming(base):
        auto_class = auto_class_of(AutoConfig.from_pretrained(base))
        model, info = auto_class.from_pretrained(base, dtype=dtype, output_loading_info=True)
        check_loading_info(base, info | {"unexpected_keys": ()})  # such as heads for other tasks
        processor = AutoProcessor.from_pretrained(base)
    with naming(image_model), reading(image_model):
        image_pipeline = DiffusionPipeline.from_pretrained(image_model, torch_dtype=model.dtype)
    pipe = add_vokens(model, processor, image_pipeline, num_vokens, mapper_hidden_size=mapper_hidden_size)
    with whole_folder(output) as place:
        pipe.save_pretrained(place)
    print(f"{output}: {base} with vokens {pipe.model.config.voken_token_ids} for {image_model}. Train it from there.")


@voken_app.command(context_settings=options.TRAINER_CONTEXT)
def train(context: Context, config: options.TrainingFile = None, help_all: options.HelpAll = False) -> None:
    """Trains a stage. The same command again continues a stopped run.

    \b
    Example:
      transformers-liquid voken train --config stage1.yaml --max-steps 1000

    \b
    The most needed:
      --model MODEL              what `voken add` or an earlier stage made (required)
      --stage 1|2                captions: vokens and mapper; or stories and dialogues: vokens, LoRA, encoder-decoder
      --datasets FILE ...        .tsv of CC3M, _cleaned.json of VIST, .jsonl of MMDialog or of records (required)
      --image-folder DIR         what paths of pictures begin at
      --output-dir DIR           checkpoints, and the trained repository
      --total-batch-size N       records in each step, over all processes
      --preview-prompts PROMPT ... --preview-steps N
    """
    words = options.trainer_words(context, config, help_all)
    from transformers_liquid.training.voken_train import main

    main(words)


@voken_app.command()
def story(
    prompt: Annotated[list[str], Argument(help="How it begins: texts, and files of pictures.")],
    model: Annotated[str, Option(help="A repository with vokens: a folder or a name on the Hub.")] = "voken-emoji",
    output: Annotated[Path, Option(help="A new .md; its pictures go beside it.")] = Path("story.md"),
    scenes: Annotated[int, Option(min=1, help="How many.")] = 1,
    num_images: Annotated[int | None, Option(min=1, help="At least so many in each.")] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    steps: Annotated[int, Option(min=1, help="Of the diffusion model.")] = 50,
    guidance_scale: Annotated[float, Option(help="1 is no guidance.")] = 7.5,
    device: options.Device = None,
    dtype: options.DType = "auto",
    seed: options.Seed = None,
) -> None:
    """Goes on with a story, each scene with what was told and drawn before, and writes it down.

    \b
    Example:
      transformers-liquid voken story --model my-vokens "once there was a cat" --scenes 3 --seed 1
    """
    options.check_new_story(output)
    import torch

    from transformers_liquid import InterleavedVokenPipeline
    from transformers_liquid.checkpoints import find_checkpoint
    from transformers_liquid.data.source import names_picture
    from transformers_liquid.models.liquid.image_processing_liquid import load_image
    from transformers_liquid.models.liquid.reference import naming
    from transformers_liquid.utils.files import write_text

    from .models import find_device, reading, silence_libraries
    from .pictures import save_beside

    silence_libraries()
    if missing := [one for one in prompt if names_picture(one) and not os.path.isfile(one)]:
        raise ValueError(f"No file of these names, which are those of pictures: {', '.join(missing)}.")
    parts = [load_image(one) if os.path.isfile(one) else one for one in prompt]
    with naming(model), reading(model):
        kwargs = {} if dtype == "auto" else {"torch_dtype": getattr(torch, dtype)}
        pipe = InterleavedVokenPipeline.from_pretrained(find_checkpoint(model), **kwargs).to(find_device(device))
    pipe.set_progress_bar_config(disable=None)  # on a terminal alone
    drawing = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "num_images": num_images}
    out = pipe.story(parts, scenes=scenes, seed=seed, max_new_tokens=max_new_tokens, **drawing)
    written, number = " ".join(one for one in parts if isinstance(one, str)), 0
    for piece in (piece for scene in out.segments for piece in scene):
        if not isinstance(piece, str):
            number, piece = number + 1, f"\n\n![]({save_beside(output, number, piece).name})\n\n"
        written += piece
    write_text(output, written.strip() + "\n")
    print(f"{written.strip()}\n\n{output}")


@voken_app.command()
def convert(
    model: Annotated[str, Argument(help="stage1_cc3m.ckpt of MiniGPT-5; or a repository with vokens.")],
    stage2: Annotated[Path | None, Argument(help="stage2_vist.ckpt or stage2_mmdialog.ckpt.")] = None,
    *,
    output: options.NewFolder,
    projection: Annotated[Path | None, Option(help="prerained_minigpt4_7b.pth of MiniGPT-4.")] = None,
    vision_model: Annotated[str, Option(help="A BLIP-2.")] = "Salesforce/blip2-flan-t5-xxl",
    language_model: Annotated[str, Option(help="Vicuna, version 0.")] = "Vision-CAIR/vicuna-7b",
    image_model: Annotated[str, Option(help="What draws.")] = "stabilityai/stable-diffusion-2-1-base",
    dtype: options.DType = "auto",
) -> None:
    """Makes a repository of MiniGPT-5's files; or these of a repository that has its parts.

    \b
    Example:
      transformers-liquid voken convert stage1_cc3m.ckpt stage2_vist.ckpt --projection prerained_minigpt4_7b.pth --output minigpt5
    """
    is_file = os.path.isfile(model)
    if is_file != (projection is not None) or (stage2 is not None and not is_file):
        raise ValueError("Files of MiniGPT-5 need --projection, the layer of MiniGPT-4; a repository stands alone.")
    options.check_new_folder(output)
    from transformers_liquid import InterleavedVokenPipeline, VokenForConditionalGeneration, VokenImageDecoder
    from transformers_liquid.models.liquid.reference import naming
    from transformers_liquid.models.voken.reference import load_minigpt5, save_minigpt5
    from transformers_liquid.utils.files import whole_folder

    from .models import silence_libraries

    silence_libraries()
    if not is_file:
        with naming(model):
            loaded = VokenForConditionalGeneration.from_pretrained(model, dtype=dtype)
        with whole_folder(output) as place:
            save_minigpt5(loaded, place)
        print(f"{output}: what stage 1 trained of {model}, as a file of MiniGPT-5. Merged LoRA is not in it.")
        return
    names = {"projection": projection, "vision_model": vision_model, "language_model": language_model}
    loaded, processor = load_minigpt5(model, stage2, image_decoder=image_model, dtype=dtype, **names)
    decoder = VokenImageDecoder.from_pretrained(image_model, torch_dtype=loaded.dtype)
    pipe = InterleavedVokenPipeline(loaded, processor, **decoder.components)
    with whole_folder(output) as place:
        pipe.save_pretrained(place)
    print(f"{output}: MiniGPT-5 as a repository that writes and draws.")
