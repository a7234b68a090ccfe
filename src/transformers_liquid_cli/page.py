"""The page of `transformers-liquid app`: what the command line does, in a browser."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import signature
from itertools import count
from pathlib import Path
from queue import Queue
from typing import Any

import gradio as gr
import torch
from transformers import StoppingCriteria, TextStreamer

from transformers_liquid import EMOJI_CHECKPOINT, LiquidConversation, LiquidImageGenerationPipeline, partial_pictures
from transformers_liquid.models.liquid.image_processing_liquid import load_image
from transformers_liquid.pipelines.conversation import add_event, read_events

from .models import write_answers
from .options import Drawn, one_line
from .pictures import Drawing, in_order


MOST_PICTURES, MOST_WAITING, MOST_TOKENS = 8, 8, 256
# Fonts of the visitor's machine: the page asks nothing of other hosts.
LOOKS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
ABOUT = "It draws and names what it has one of {:,} words for, such as {}. A conversation is beyond it."
OF_DRAWING = [name for name in signature(Drawn).parameters if name != "greedy"]
WHOLE_NUMBERS = ("top_k", "height", "width", "speculative")


class Page:
    """Four tabs around a model, which works for one visitor after the other.

    Args:
        pipe ([`LiquidImageGenerationPipeline`]): What draws and answers.
        model (`str`, *optional*): Its name, as the command line takes it.
    """

    def __init__(self, pipe: LiquidImageGenerationPipeline, model: str | None) -> None:
        self.pipe, self.model, self.numbers = pipe, model, count()
        self.drawing = self._drawing({})
        self.every = pipe.model.config.grid()[1]
        self.converse = LiquidConversation(pipe.model, pipe.processor)
        self.folder = tempfile.TemporaryDirectory(prefix="transformers-liquid-")

    def _drawing(self, given: dict[str, Any], pictures: list[str] = ()) -> Drawing:
        options = {name: one.default for name, one in signature(Drawn).parameters.items()}
        options |= {name: one or None for name, one in given.items()} | {"model": self.model}
        return Drawing(self.pipe, options, [(Path(path).name, load_image(path)) for path in pictures])

    def _new_path(self) -> Path:
        return Path(self.folder.name, f"{next(self.numbers):06}.png")

    # What the tabs do

    def draw(self, prompt: str, seed: int | None, number: int, given: dict[str, Any], *shown: str | None) -> Iterator:
        """Pictures while they grow, then files of them that say how they were drawn; and the seed of the first."""
        if None in shown:
            raise ValueError("Choose the picture that is to be changed.")
        drawing, queue = self._drawing(given, shown), Queue()
        drawing.identity = self.drawing.identity  # reads all weights, once
        pictures = in_order([prompt], number, seed, self._new_path())
        size = {name: drawing.shared[name] for name in ("height", "width")}

        def work(criteria: list[StoppingCriteria]) -> None:
            told = 0

            def watch(pipe: Any, step: int, _: int, values: dict[str, torch.Tensor]) -> None:
                nonlocal told
                if criteria[-1].is_set():
                    raise InterruptedError
                if step + 1 - told >= self.every:
                    told = step + 1
                    queue.put(
                        {"type": "partial", "images": partial_pictures(pipe.model, values["image_tokens"], **size)}
                    )

            drawn = drawing.draw(pictures, number, callback_on_step_end=watch, progress_bar=False)
            queue.put({"type": "end", "images": [str(picture.path) for picture in drawn]})

        for event in read_events(queue, work):
            yield event["images"], pictures[0].seed

    def ask(self, path: str | None, question: str) -> Iterator[str]:
        """The answer, or without a question the caption, as far as it is written."""
        if path is None:
            raise ValueError("Choose the picture that is asked about.")
        processor, queue = self.pipe.processor, Queue()
        ids = processor.question_ids(question) if question.strip() else processor.caption_ids()
        inputs = processor.image_processor(load_image(path), framing="pad") | {"input_ids": torch.tensor([ids])}

        def work(criteria: list[StoppingCriteria]) -> None:
            told = _Teller(queue, processor.tokenizer)
            write_answers(self.pipe, MOST_TOKENS, None, **inputs, streamer=told, stopping_criteria=criteria)

        answer = ""
        for event in read_events(queue, work):
            answer += event["text"]
            yield answer.strip()

    def tell(self, message: dict[str, Any], before: list[dict], shown: list[dict], most: int) -> Iterator:
        """A reply of text and pictures as it comes: the conversation, what is shown of it, and an empty field."""
        parts = [{"type": "image", "image": load_image(path)} for path in message["files"]]
        if text := message["text"].strip():
            self.pipe.processor.check_plain(text)
            parts.append({"type": "text", "text": text})
        if not parts:
            raise ValueError("Write how it begins, or add a picture.")
        before = [*before, {"role": "user", "content": parts}]
        shown = [*shown, *(_bubble("user", {"path": path}) for path in message["files"])]
        shown += [_bubble("user", text)] * bool(text)
        answer: list[dict[str, Any]] = []
        settings = {"max_images": most, "max_new_tokens": MOST_TOKENS, "every": self.every}
        for event in self.converse.stream(before, **settings, **self.drawing.by_turns()):
            now = []
            if "image" in event:
                event["image"].save(path := self._new_path())
                now = [_bubble("assistant", {"path": str(path)})]
            if event["type"] == "image":
                shown += now
            elif event["type"] == "text" and answer and answer[-1]["type"] == "text":
                shown[-1] = _bubble("assistant", answer[-1]["text"] + event["text"])
            elif event["type"] == "text":
                shown.append(_bubble("assistant", event["text"]))
            add_event(answer, event)
            after = [*before, {"role": "assistant", "content": list(answer)}] if answer else before
            yield after, shown + (now if event["type"] == "image_partial" else []), None

    # How it looks

    def launch(self, host: str, port: int, **kwargs: Any) -> Any:
        """Serves the page until it is interrupted; `kwargs` are gradio's."""
        queue = self._build().queue(max_size=MOST_WAITING, default_concurrency_limit=1)
        looks = {"theme": gr.themes.Default(**LOOKS), "footer_links": [], "share": False}
        return queue.launch(server_name=host, server_port=port or None, **looks, **kwargs)

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="transformers-liquid", analytics_enabled=False) as page:
            gr.Markdown(f"## {Path(self.model or EMOJI_CHECKPOINT).name}")
            if known := self.pipe.processor.known_words:
                words = [word for word in known if word.isalpha()]
                gr.Markdown(ABOUT.format(len(known), ", ".join(words[:: len(words) // 12 + 1])))
            with gr.Tab("Draw"):
                self._drawing_tab("Draw", "What to draw")
            with gr.Tab("Edit"):
                self._drawing_tab("Edit", "What to change", gr.Image(type="filepath", label="Picture", height=256))
            with gr.Tab("Ask"):
                picture = gr.Image(type="filepath", label="Picture", height=256)
                question = gr.Textbox(label="Question", placeholder="Without one, a caption is written.")
                answer = gr.Textbox(label="Answer", interactive=False, render=False)
                self._run("Ask", self.ask, question.submit, [picture, question], [answer])
                answer.render()
            with gr.Tab("Story"):
                before, shown = gr.State([]), gr.Chatbot(label="Story", height=480, buttons=["copy"])
                field = gr.MultimodalTextbox(label="How it begins, or goes on", file_types=["image"], submit_btn=False)
                most = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures in a reply, at most")
                self._run("Tell", self.tell, field.submit, [field, before, shown, most], [before, shown, field])
                gr.Button("New").click(lambda: ([], [], None), None, [before, shown, field])
        return page

    def _drawing_tab(self, name: str, asked: str, *pictures: gr.Image) -> None:
        prompt = gr.Textbox(label=asked)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            is_kept = gr.Checkbox(False, label="Keep this seed")
            number = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures")
        with gr.Accordion("Settings", open=False), gr.Row():
            settings = [self._setting(one) for one in OF_DRAWING]
        # As files they keep what they say of how they were drawn.
        drawn = gr.Gallery(label="Pictures", columns=4, height=320, format="png", fit_columns=False, render=False)

        def draw(prompt: str, seed: int, is_kept: bool, number: float, *values: Any) -> Iterator:
            given = dict(zip(OF_DRAWING, values, strict=False))
            yield from self.draw(prompt, seed if is_kept else None, int(number), given, *values[len(given) :])

        self._run(name, draw, prompt.submit, [prompt, seed, is_kept, number, *settings, *pictures], [drawn, seed])
        drawn.render()

    def _setting(self, name: str) -> gr.components.Component:
        label, value = name.replace("_", " ").capitalize(), self.drawing.settings.get(name) or None
        if name == "negative_prompt":
            return gr.Textbox(label=label)
        return gr.Number(value, label=label, precision=0 if name in WHOLE_NUMBERS else None)

    def _run(self, name: str, work: Callable, submit: Callable, inputs: list[Any], outputs: list[Any]) -> None:
        """A button that begins, as Enter does, and one that stops within a step."""

        @wraps(work)
        def told(*values: Any) -> Iterator:
            try:
                yield from work(*values)
            except (ValueError, OSError) as error:
                raise gr.Error(one_line(error), print_exception=False) from error

        with gr.Row():
            begin, stop = gr.Button(name, variant="primary"), gr.Button("Stop")
        event = gr.on([begin.click, submit], told, inputs, outputs, concurrency_id="model", show_progress="minimal")
        stop.click(None, cancels=[event])


class _Teller(TextStreamer):
    """Puts words into a queue as they are written."""

    def __init__(self, queue: Queue, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue = queue

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.queue.put({"type": "end" if stream_end else "text", "text": text})


def _bubble(role: str, content: str | dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": content}
