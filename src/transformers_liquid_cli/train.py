"""`transformers-liquid train`"""

from typer import Context

from . import options


def train(
    context: Context,
    config: options.TrainingFile = None,
    help_all: options.HelpAll = False,
) -> None:
    """Trains a model on text and image codes. The same command again continues a stopped run.

    \b
    Example:
      transformers-liquid train --model my-liquid --datasets photos --preset lora --output-dir my-lora
      transformers-liquid train --config train.yaml --learning-rate 1e-4

    \b
    What is trained:
      --model MODEL                    a saved Liquid model: a folder or a name on the Hub (required); an adapter is trained on
      --preset full|lora|rows          what is trained, with options for this number of records; those that are given win
      --dry-run                        three steps: what time and memory all of them take
      --trainable full|lora|rows       the whole language model, LoRA and the image rows, or these rows alone
      --lora-r N, --lora-alpha N, --lora-dropout P
      --dtype DTYPE                    of the weights, float32 unless given
      --attn-implementation NAME       sdpa, eager, flash_attention_2, ...
      --max-z-loss-coef X              weight of the max-z loss

    \b
    On what:
      --datasets PATH[=WEIGHT] ...     outputs of `tokenize`, JSON lines or parquet, names on the Hub, or pictures with
                                       captions, which are tokenized first (required)
      --grids square|common            of these: the model's square, or from 16:9 to 9:16
      --eval-datasets NAME=PATH ...    what to evaluate on
      --streaming                      read while training; needs --max-steps
      --max-length N                   longest record in tokens
      --too-long raise|drop            what to do with records whose picture does not fit
      --no-packing                     a record in each sequence, with pads
      --unconditional-probability P, --caption-probability P

    \b
    How, with the paper's defaults:
      --output-dir DIR                 checkpoints, and the state that a stopped run goes on from
      --total-batch-size N             records in each step, over all processes
      --preview-prompts PROMPT ...     what to draw while training
      --preview-steps N                steps from one sheet of previews to the next
      and every option of transformers.TrainingArguments, such as --learning-rate or --max-steps
    """
    words = options.trainer_words(context, config, help_all)
    from transformers_liquid.training.train import main

    main(words)
