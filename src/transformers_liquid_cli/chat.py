"""`transformers-liquid chat`"""

import itertools
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from . import options


def chat(
    output: Annotated[Path, Option(help="The folder where drawn pictures go.")] = Path(),
    negative_prompt: options.NegativePrompt = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_min_p: options.GuidanceMinP = None,
    speculative: options.Speculative = None,
    greedy: options.Greedy = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    max_new_tokens: options.MaxNewTokens = 256,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.DType = "auto",
    seed: options.Seed = None,
) -> None:
    """Talks on the terminal, with pictures in both directions.

    \b
    Example:
      transformers-liquid chat --model path/to/model
    """
    given = dict(locals())
    options.check_writable(output, folder=True)
    from transformers import TextStreamer

    from transformers_liquid.models.liquid.image_processing_liquid import load_image

    from .models import load, write_answer
    from .pictures import Drawing, in_order

    pipe = load(model, device, dtype)
    pipe.set_progress_bar_config(disable=None, leave=False)
    drawing = Drawing(pipe, given)
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages, images = [], []
    print("/image PATH shows a picture, /draw PROMPT draws one, /new starts over, /quit ends.")
    while sys.stdin is not None:  # closed
        try:
            command, _, rest = (line := input("> ").strip()).partition(" ")
            if command == "/quit":
                return
            elif command == "/new":
                messages, images = [], []
            elif command == "/image":
                images.append({"type": "image", "image": load_image(rest.strip())})
            elif command == "/draw":
                paths = (output / f"drawing-{number}.png" for number in itertools.count())
                path = next(path for path in paths if not path.exists())
                for picture in drawing.draw(in_order([rest.strip()], 1, seed, path)):
                    print(picture.path)
            elif command.startswith("/"):
                print(f"error: There is no {command}: only /image PATH, /draw PROMPT, /new and /quit.")
            elif line:
                pipe.processor.check_plain(line)
                asked = [*messages, {"role": "user", "content": [*images, {"type": "text", "text": line}]}]
                inputs = pipe.processor.apply_chat_template(
                    asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
                answer = write_answer(pipe, max_new_tokens, seed, streamer=streamer, **inputs)
                messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                images = []
        except EOFError:
            return
        except Exception as error:  # the conversation goes on
            print(f"error: {options.one_line(error)}")
