"""Who gives scores to pictures: models of transformers by name, files of scores, servers, and the model itself by its losses."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor

from ..codecs.vq_model import check_loading_info
from ..data.collator import LiquidDataCollator
from ..models.liquid.image_processing_liquid import load_image
from ..pipelines.text_to_image import LiquidImageGenerationPipeline
from ..utils.files import check_keys
from .benchmarks import Sample, read_rows


# VQAScore (arXiv 2404.01291): how sure a model is of this answer. The words are those of its authors' newest judges.
QUESTION, ANSWER = 'Does this figure show "{}"? Please answer yes or no.', "Yes"

# What WISE asks for (arXiv 2503.07265), in words of our own.
INSTRUCTION = Path(__file__).with_name("wise_instruction.txt")
GRADE = re.compile(r"(Consistency|Realism|Aesthetic Quality)[\s:*]*([0-2])(?!\d|\.\d)", re.IGNORECASE)
ASKED, TRIES, SECONDS = 3, 6, 120  # times for grades, times for one reply, and how long a reply may take

# Scores of a picture by name, several of one name if it is a story's; none if the judge could not be brought to grade it.
Judge = Callable[[Sample, Path], dict[str, float | list[float]]]


def load_judge(
    name: str, pipe: LiquidImageGenerationPipeline, samples: Sequence[Sample], judged: tuple[str, ...]
) -> Judge:
    """A judge of drawn pictures, by its name.

    Args:
        name (`str`): `"scores:FILE"`: of a judge elsewhere, a line of JSON for each sample, with its `id` and all of
            `judged`. `"openai:MODEL"`: a model behind an OpenAI-compatible server, where `OPENAI_BASE_URL` says, with
            `OPENAI_API_KEY`. `"self"`: the model that has drawn. Else an image-text-to-text model of transformers, a folder
            or a name on the Hub.
        pipe ([`LiquidImageGenerationPipeline`]): What has drawn.
        samples (sequence of [`Sample`]): What is to be judged.
        judged (`tuple`): What is asked for: one score, or the grades of WISE.

    Raises:
        ValueError: If it cannot judge that, or the file has not exactly these samples.
    """
    kind, _, place = name.partition(":")
    if kind == "scores":
        return _written_scores(Path(place), samples, judged)
    if (kind == "openai") != (len(judged) > 1):
        wanted = "openai:MODEL" if len(judged) > 1 else "a model that says how probable its answer is"
        raise ValueError(f"{name} cannot judge this: expected {wanted}, or scores:FILE.")
    if kind == "openai":
        return partial(grade, place)
    if name == "self":
        return partial(vqa_score, pipe.model, pipe.processor)
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval().to(pipe.device)
    if model.config.is_encoder_decoder or not processor.chat_template:
        raise ValueError(f"{name} must be a decoder with a chat template, which VQAScore is asked in.")
    return partial(vqa_score, model, processor)


class ClassifierJudge:
    """Names pictures of `emoji` by an image classifier of transformers.

    Args:
        name (`str`): Its folder, or its name on the Hub. Names that have one id in its `label2id` are one to it.
        device (`torch.device`): Where it runs.
        samples (sequence of [`Sample`]): The tasks.

    Raises:
        ValueError: If it is no such model, or lacks a name that a task asks for.
    """

    def __init__(self, name: str, device: torch.device, samples: Sequence[Sample]) -> None:
        try:
            self.model, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
            self.processor = AutoProcessor.from_pretrained(name)
            check_loading_info(name, info)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is no image classifier of transformers, which emoji need: {error}") from error
        self.model.eval().to(device, torch.float32)
        labels = self.model.config.id2label
        self.label_of = {one: labels[int(index)] for one, index in self.model.config.label2id.items()}
        asked = {one for task in samples for key in ("shows", "tells") for one in task.true.get(key, ())}
        if lacking := sorted(asked - self.label_of.keys()):
            raise ValueError(f"{name} has no label for {len(lacking)} names of tasks, such as {lacking[0]!r}.")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], number: int) -> list[list[str]]:
        """The most probable labels of each picture, at most so many."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        labels = self.model.config.id2label
        best = self.model(**inputs).logits.topk(min(number, len(labels))).indices.tolist()
        return [[labels[index] for index in indices] for indices in best]


def _written_scores(path: Path, samples: Sequence[Sample], judged: tuple[str, ...]) -> Judge:
    given, best = {}, 1 if len(judged) == 1 else 2
    for number, one in enumerate(read_rows(path), start=1):
        check_keys(f"Line {number} of {path}", one, ("id", *judged))
        given[one["id"]] = {name: one[name] for name in judged}
        in_range = [isinstance(one[name], int | float) and 0 <= one[name] <= best for name in judged]
        if not all(in_range) or len(given) < number:
            raise ValueError(f"Line {number} of {path} has an id for the second time, or a score beyond 0 ... {best}.")
    if different := given.keys() ^ {sample.id for sample in samples}:
        raise ValueError(
            f"{path} must have a line for each of {len(samples)} samples: see {min(different, key=str)!r}."
        )
    return lambda sample, picture: given[sample.id]


@torch.no_grad()
def measure_losses(pipe: LiquidImageGenerationPipeline, sample: Sample, picture: Path) -> dict[str, float]:
    """What training would say of a pair, as [`LiquidTrainer`] evaluates it: sums over labels of the losses in nats and of
    those that are the most probable id, of the picture's codes (and its end) after the text, and of the text after it."""
    pixels = pipe.processor.image_processor(load_image(str(picture)), framing="crop")["pixel_values"]
    ids = pipe.model.encode_images(pixels.to(pipe.device))[0]
    codes = pipe.model.config.image_layout.ids_to_codes(ids).tolist()
    record, scores = {"text": sample.question, "codes": codes, "index": 0}, {}  # the index is for one phrasing for all
    collator = LiquidDataCollator(pipe.processor, unconditional_probability=0.0)
    for row, (name, kind) in enumerate({"text": "caption", "image": "text_to_image"}.items()):
        inputs = pipe.ensure_tensor_on_device(**collator([record | {"kind": kind}]))
        stats = pipe.model(**inputs, skip_logits=True).token_stats[row].tolist()
        scores |= zip((f"{name}_loss", f"{name}_accuracy", f"{name}_labels"), stats, strict=True)
    return scores


@torch.no_grad()
def vqa_score(model: Any, processor: Any, sample: Sample, picture: Path) -> dict[str, float]:
    """VQAScore (arXiv 2404.01291, section 3): the geometric mean of the probabilities of the answer's tokens."""
    question = {"type": "text", "text": QUESTION.format(sample.question)}
    asked = [{"role": "user", "content": [{"type": "image", "image": load_image(str(picture))}, question]}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    form = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, **form)["input_ids"][0]
    inputs = processor.apply_chat_template(answered, continue_final_message=True, **form)
    begin, answer = inputs["input_ids"][0].tensor_split([len(prompt)])
    if not len(answer) or not begin.equal(prompt):
        raise ValueError(f"The chat template of {type(processor).__name__} does not put an answer behind its prompt.")
    logits = model(**inputs.to(model.device, model.dtype)).logits[0, -len(answer) - 1 : -1].float().cpu()
    return {"score": logits.log_softmax(-1).gather(1, answer[:, None]).mean().exp().item()}


def grade(model: str, sample: Sample, picture: Path) -> dict[str, float]:
    """The grades of WISE that a model behind a server gives one picture; none if it gives no readable ones."""
    text = INSTRUCTION.read_text(encoding="utf-8").format(prompt=sample.question, explanation=sample.true)
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    for _ in range(ASKED):
        said = ask(model, messages)
        found = GRADE.findall(said)
        grades = {name.lower().replace(" ", "_"): float(value) for name, value in found}
        if len(grades) == len(found) == 3:
            return grades
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Only the three lines."}]
    return {}


def ask(model: str, messages: Sequence[dict[str, Any]]) -> str:
    """The reply of an OpenAI-compatible server, asked again while it is busy.

    Raises:
        ConnectionError: If it has none, with what it says instead.
    """
    base, key = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1", os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({"model": model, "messages": messages, "temperature": 0}).encode()
    request = Request(f"{base.rstrip('/')}/chat/completions", data=body, headers=headers)
    for attempt in range(1, TRIES + 1):
        wait = 2.0**attempt
        try:
            with urlopen(request, timeout=SECONDS) as response:
                return json.load(response)["choices"][0]["message"]["content"] or ""
        except HTTPError as error:
            problem = f"{error.code} {error.read(500).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                break
            after = error.headers.get("Retry-After", "")
            wait = min(int(after), SECONDS) if after.isdigit() else wait
        except (OSError, ValueError, LookupError, TypeError) as error:  # no connection, or no such reply
            problem = repr(error)
        time.sleep(wait if attempt < TRIES else 0)
    raise ConnectionError(f"{model} at {base} gives no reply: {problem}. The same command goes on from here.")
