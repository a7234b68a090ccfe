"""Measures liquid-emoji: names, words that people use, captions, edits, stories, in-context learning.

    python examples/emoji/evaluate.py --data_dir emoji-data --model emoji-checkpoint --output emoji-evaluation

Writes the tasks of tasks.py to OUTPUT/data, and what `transformers-liquid evaluate emoji loss --data OUTPUT/data` says of
them to OUTPUT/results; of these OUTPUT.json, each measure with its number and a 95 % interval, and OUTPUT.png: prompts of
ordinary people with what was drawn. What a picture shows is told from the nearest of the codec's reconstructions of all
3,786 emoji, by squared error over pixels. Stopped and started again, it goes on.

- names (seen, unseen compositions, unseen flags): the nearest is the emoji named, or among the nearest five;
- current names: the same for Unicode's name where the data set has an older one;
- phrasings, words, everyday: prompts that were held out, words that were never trained on, and `EVERYDAY`. Right is a
  picture whose emoji carries the word in Unicode's or emojilib's lists; skin tones nobody asked for count as right;
- captions: the greedy answer is the name, letter for letter, by group; and that a picture is no emoji;
- questions: skin tone, role, gender, colour;
- choices: the name is more probable than another one, or than that of another skin tone;
- edits: pairs that were held out;
- stories: pictures that show what the text before them says, and stories that end; persons who keep skin tone and gender;
- in context: the label of a third picture after two labelled ones, and without them;
- round trip: codes that the codec finds again in what it has drawn from them. Its PSNR is what train_codec.py prints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from tasks import MEASURES, write_data

from transformers_liquid import LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor
from transformers_liquid.evaluation.run import evaluate, table
from transformers_liquid.models.liquid.image_processing_liquid import contact_sheet, load_image
from transformers_liquid.utils.files import write_json


def main(args: argparse.Namespace) -> None:
    output = Path(args.output)
    write_data(output / "data", args.data_dir, args.measures, args.number)
    model = LiquidForCausalLM.from_pretrained(args.model).eval()
    pipe = LiquidImageGenerationPipeline(model, LiquidProcessor.from_pretrained(args.model))
    weights = hashlib.sha256(Path(args.model, "model.safetensors").read_bytes()).hexdigest()
    how = {"batch_size": args.batch_size, "max_new_tokens": 40, "drawing": {"seed": args.seed}}
    results = evaluate(pipe, ["emoji", "loss"], output / "data", output / "results", weights, **how)
    print(table({name: of["measures"] for name, of in results.items()}))
    found: dict[str, Any] = {"settings": model.generation_config.image_generation_config, "number": args.number}
    for name, measured in results["emoji/nearest"]["measures"].items():
        measure, *part = name.split("/")
        of_measure = found.setdefault(measure.removesuffix("_top5"), {})
        of_part = of_measure.setdefault(part[-1], {}) if part else of_measure
        of_part["top5" if measure.endswith("_top5") else "top1"] = measured
    write_json(output.with_suffix(".json"), found | {"loss": results["loss"]["measures"]})
    tasks = [json.loads(line) for line in (output / "data/emoji/tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = [task["measure"] for task in tasks if "shows" in task]
    files = sorted((output / "results/emoji/pictures").iterdir())
    if everyday := [file for file, measure in zip(files, drawn, strict=True) if measure == "everyday"]:
        contact_sheet([load_image(str(file)) for file in everyday], columns=10).save(output.with_suffix(".png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="emoji-data")
    parser.add_argument("--model", default="emoji-checkpoint")
    parser.add_argument("--output", default="emoji-evaluation", help="a folder, and the path of results without ending")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--number", type=int, default=400, help="of each measure, a fixed random sample; -1 means all")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
