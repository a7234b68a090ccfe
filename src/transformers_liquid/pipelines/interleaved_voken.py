"""Text and pictures by turns, by a model with vokens and a diffusion model: the pipeline of diffusers' kind."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from string import Template
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.streamers import BaseStreamer

from ..generation.sampling import picture_seed
from ..generation.settings import eos_token_ids
from ..models import voken
from ..models.liquid.image_processing_liquid import flatten_images, is_column
from ..models.liquid.model_card import write_card
from ..models.liquid.prompts import images_in, parts_of
from ..models.voken.generation_voken import finished, segments
from ..models.voken.image_decoder import TEXT_ENCODERS, VokenCondition, VokenImageDecoder
from ..models.voken.prompts import STORY_PROMPTS
from .conversation import GrowingText, read_events


@dataclass
class VokenPipelineOutput(BaseOutput):
    """What was written and drawn.

    Args:
        segments (list of lists): For each prompt, or scene: `str` and pictures in reading order.
        messages (list of `dict`): The same as turns of the assistant: append one to its conversation to go on.
    """

    segments: list[list[Any]] = None
    messages: list[dict[str, Any]] = None


class InterleavedVokenPipeline(DiffusionPipeline):
    r"""Writes and draws by turns: a [`VokenForConditionalGeneration`] decides when and what, a diffusion model draws.

    Args:
        model ([`VokenForConditionalGeneration`]): The language model with vokens.
        processor ([`VokenProcessor`]): Its processor.
        vae, scheduler, unet or transformer: Of a diffusers text-to-image pipeline: [`VokenImageDecoder`] says of which.
        text_encoder, tokenizer (and `_2`, `_3`): Of the same, for training with captions; drawing needs none.

    Raises:
        ValueError: If there is no denoiser, or it does not attend to what the model gives.

    Example:

    ```python
    >>> pipe = DiffusionPipeline.from_pretrained("my-vokens", torch_dtype=torch.bfloat16).to("cuda")
    >>> out = pipe("Tell me the next scene with image.", images=[picture], seed=0)
    >>> out.segments[0]  # text, picture, text, ...
    ```
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->model->unet->transformer->vae"
    _optional_components = ["unet", "transformer", *TEXT_ENCODERS]

    def __init__(
        self,
        model,
        processor,
        vae,
        scheduler,
        unet=None,
        transformer=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    ) -> None:
        super().__init__()
        parts = {name: one for name, one in locals().items() if name not in ("self", "__class__")}
        self.register_modules(**parts)
        if model is not None:  # without, it is loaded for its image decoder
            self._attach()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[dict[str, Any]] | list[list[dict[str, Any]]],
        images: Any = None,
        max_new_tokens: int = 256,
        num_images: int | None = None,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 50,
        seed: int | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> VokenPipelineOutput:
        """Answers prompts or conversations with text and pictures.

        Args:
            prompt (`str` or list of `str`, or messages or a list of these): What is answered. A text is the user's turn;
                messages may hold pictures, as `{"type": "image", "image": picture}`.
            images (picture, list of pictures, or for several prompts a list of lists, *optional*): In front of each prompt
                of text.
            max_new_tokens (`int`, defaults to 256): Of text and vokens together.
            num_images (`int`, *optional*): At least so many pictures in each reply. Defaults to as the model likes.
            guidance_scale (`float`, defaults to 7.5): How far pictures lead away from the unconditional condition; 1 is no
                guidance.
            num_inference_steps (`int`, defaults to 50): Of the diffusion model, for each picture.
            seed (`int`, *optional*): The first picture of reply `j` is drawn from seed `seed + j`, further ones from seeds
                that follow from it ([`picture_seed`]), whatever is drawn beside them; text is sampled from `seed`.
            batch_size (`int`, *optional*): Pictures that are drawn side by side. Defaults to all of the call.
            kwargs: Further settings of the diffusers pipeline: `height` and `width` in pixels (by default the diffusion
                model's own), `output_type` (`"pil"`, `"np"` or `"pt"`), `callback_on_step_end`, ...; and of the model's
                `generate`: `do_sample`, `top_p`, `repetition_penalty`, `stop_strings`, ...

        Returns:
            [`VokenPipelineOutput`]

        Raises:
            ValueError: On input that cannot be met, before any work.
        """
        decoder = self._attach()
        drawing = {name: kwargs.pop(name) for name in kwargs.keys() & decoder.settings - {"generator"}}
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **drawing}
        drawing, seed = decoder.checked(settings), None if seed is None else operator.index(seed)
        if batch_size is not None and operator.index(batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if kwargs.get("num_return_sequences") not in (None, 1):
            raise ValueError("There is one reply to each prompt: leave out num_return_sequences.")
        defaults = {"generation_config": None, "max_new_tokens": max_new_tokens, "tokenizer": self.processor.tokenizer}
        kwargs = {**defaults, **kwargs, "return_dict_in_generate": False, "num_return_sequences": 1}
        config, _ = self.model._prepare_generation_config(**kwargs)
        chats = _conversations(prompt, images)
        inputs = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
        if not inputs["attention_mask"].any(1).all():
            raise ValueError("A prompt is empty: a reply needs at least one token to begin from.")
        if hasattr(self.model, "_hf_hook"):  # of enable_model_cpu_offload, which waits for `forward`
            self.model._hf_hook.pre_forward(self.model)
        inputs = inputs.to(self.model.device)

        # 1. Text with whole runs
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            ids = self.model.generate(**inputs, num_images=num_images, **kwargs)
        prompts, vokens = inputs.pop("input_ids"), self.model.config.voken_token_ids
        ends = eos_token_ids(config), config.pad_token_id
        replies = [finished(row, vokens, *ends) for row in ids[:, prompts.shape[1] :].tolist()]

        # 2. All pictures, in reading order
        padded = pad_sequence([torch.tensor(reply, dtype=torch.long) for reply in replies], batch_first=True)
        padded = padded.to(prompts.device)
        drawn: list[Any] = []
        if (padded == vokens[0]).any():
            condition, rows = self.model.conditions(torch.cat([prompts, padded], 1), prompts.shape[1], **inputs)
            rows = rows.tolist()
            seeded = [] if seed is None else enumerate(rows)
            seeds = [picture_seed(seed + row, rows[:index].count(row)) for index, row in seeded]
            generators = [torch.Generator().manual_seed(one) for one in seeds] or None
            for start in range(0, len(rows), batch_size or len(rows)):
                part = slice(start, start + (batch_size or len(rows)))
                some = VokenCondition(**{name: one[part] for name, one in condition.items()})
                drawn.extend(decoder.draw(some, self.model.unconditional(), generators and generators[part], **drawing))
        self.maybe_free_model_hooks()

        # 3. What was written and drawn
        pictures, out = iter(drawn), VokenPipelineOutput([], [])
        for reply in replies:
            pieces = [
                next(pictures) if ids is None else self.processor.decode(ids, skip_special_tokens=True)
                for ids in segments(reply, vokens)
            ]
            out.segments.append([one for one in pieces if not isinstance(one, str) or one])
            out.messages.append({"role": "assistant", "content": [_part(one) for one in out.segments[-1]]})
        return out

    def stream(self, prompt: Any, images: Any = None, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """One reply as it comes: text while it is written, pictures, which do not change the text, after it.

        Args:
            prompt, images, kwargs: As for a call, of one prompt.

        Returns:
            An iterator of `{"type": "text", "text": new text}`, `{"type": "image_start", "index": k}` where a picture
            belongs, then `{"type": "image", "index": k, "image": picture}`, and at last `{"type": "end", "output": what
            the call returns}`. Closing it stops the text within a step.

        Raises:
            ValueError: As for a call, or on several prompts.
        """
        if len(_conversations(prompt, images)) > 1:
            raise ValueError("One reply is told at a time: stream a single prompt.")
        streamer = _EventStreamer(self.processor)

        def work(criteria: list[Any]) -> None:
            out = self(prompt, images, streamer=streamer, stopping_criteria=criteria, **kwargs)
            pictures = [one for one in out.segments[0] if not isinstance(one, str)]
            for index, picture in enumerate(pictures):
                streamer.queue.put({"type": "image", "index": index, "image": picture})
            streamer.queue.put({"type": "end", "output": out})

        return read_events(streamer.queue, work, kwargs.pop("stopping_criteria", []))

    def story(
        self,
        parts: Sequence[Any],
        scenes: int = 1,
        instruction: str | None = STORY_PROMPTS["multimodal"],
        seed: int | None = None,
        **kwargs: Any,
    ) -> VokenPipelineOutput:
        """Goes on with a story: every scene, with its pictures, is context of the next.

        Args:
            parts (sequence of `str` and pictures): How it begins, in reading order.
            scenes (`int`, defaults to 1): How many replies.
            instruction (`str`, *optional*): What asks for each scene, after the story so far. Defaults to the reference's.
            seed (`int`, *optional*): As for a call; the pictures of the whole story are counted.
            kwargs: As for a call.

        Returns:
            [`VokenPipelineOutput`] with an entry for each scene.

        Raises:
            ValueError: As for a call; or if the base reads no pictures, so that none can be context.
        """
        if isinstance(parts, str) or scenes < 1:
            raise ValueError(f"A story is a list of texts and pictures, with a scene or more to come, got {parts!r}.")
        if scenes > 1 and self.processor.image_token is None:
            raise ValueError("This model's base reads no pictures: the first scene cannot be context of the next.")
        story, out, drawn = list(parts), VokenPipelineOutput([], []), 0
        for _ in range(scenes):
            asked = [*story, instruction] if instruction else story
            turn = {"role": "user", "content": [_part(one) for one in asked]}
            scene = self([turn], seed=None if seed is None else picture_seed(seed, drawn), **kwargs)
            out.segments += scene.segments
            out.messages += scene.messages
            drawn += sum(not isinstance(one, str) for one in scene.segments[0])
            story += scene.segments[0]
        return out

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in diffusers; and at the root `config.json`, by which transformers finds the model, and a card.

        Raises:
            ValueError: If a component is an adapter around a model, which diffusers would leave out.
        """
        for name, component in self.components.items():
            parts = component.modules() if isinstance(component, torch.nn.Module) else ()
            if any(type(part).__module__.startswith("peft.") for part in parts):
                raise ValueError(
                    f"{name} is a model with an adapter ({type(component).__name__}), which diffusers does not save: merge "
                    "it first (`merge_and_unload()`), or save the adapter beside the pipeline."
                )
        self._attach()  # raises if a part is missing
        super().save_pretrained(str(save_directory), **kwargs)
        self._write_root(save_directory)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        self._write_root(working_dir, repo_id.rpartition("/")[2])
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def _write_root(self, directory: str | os.PathLike, name: str | None = None) -> None:
        self.model.config.save_pretrained(directory)
        template = (Path(voken.__file__).parent / "model_card_template.md").read_text(encoding="utf-8")
        facts = self.model.config.to_dict() | {"base": self.model.config.text_config.model_type}
        facts |= {"name": name or Path(directory).resolve().name, "parameters": f"{self.model.num_parameters():,}"}
        facts["denoiser"] = type(self.unet if self.transformer is None else self.transformer).__name__
        write_card(Template(template).substitute(facts), directory)

    def _attach(self) -> VokenImageDecoder:
        """The image decoder of what the components are now: users may put another scheduler in place."""
        decoder = VokenImageDecoder.from_components(**self.components)
        ours, theirs = self.model.config.voken_token_ids, self.processor.voken_token_ids
        if ours != theirs:
            raise ValueError(f"Model and processor are not of one pipeline: their vokens are {ours} and {theirs}.")
        decoder.pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        self.model.attach(decoder)
        return decoder


class _EventStreamer(BaseStreamer):
    """Tells what `generate` writes, the prompt first, then token by token."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.queue, self.number, self.text = processor, Queue(), 0, None

    def put(self, value: torch.LongTensor) -> None:
        ids, vokens = value.flatten().tolist(), self.processor.voken_token_ids
        if self.text is None:
            self.text = GrowingText(self.processor)
        elif ids == vokens[:1]:
            self._tell([], is_over=True)
            self.queue.put({"type": "image_start", "index": self.number})
            self.number, self.text = self.number + 1, GrowingText(self.processor)
        elif ids[0] not in vokens:
            self._tell(ids)

    def end(self) -> None:
        self._tell([], is_over=True)

    def _tell(self, ids: list[int], is_over: bool = False) -> None:
        if text := self.text.new(ids, is_over):
            self.queue.put({"type": "text", "text": text})


def _part(one: Any) -> dict[str, Any]:
    """A text or a picture as a part of a message."""
    kind = "text" if isinstance(one, str) else "image"
    return {"type": kind, kind: one}


def _conversations(prompt: Any, images: Any) -> list[list[dict[str, Any]]]:
    """Prompts or messages, one or a batch, as conversations.

    Raises:
        ValueError: If they are neither, or pictures are not given as they have to be.
    """
    if isinstance(prompt, str):
        prompt, images = [prompt], [[] if images is None else images]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise ValueError(f"A prompt is a text, messages, or a list of these, got {prompt!r}.")
    if all(isinstance(one, str) for one in prompt):
        images = [[]] * len(prompt) if images is None else images
        if not is_column(images) or len(images) != len(prompt):
            raise ValueError(f"images must be a list of pictures for each of the {len(prompt)} prompts.")
        shown = [[{"type": "image", "image": image} for image in flatten_images(own)] for own in images]
        return [[{"role": "user", "content": [*own, _part(one)]}] for own, one in zip(shown, prompt, strict=True)]
    conversations = [prompt] if isinstance(prompt[0], Mapping) else prompt
    if images is not None:
        raise ValueError("Pictures of messages belong in their content: {'type': 'image', 'image': picture}.")
    images_in([{"content": parts_of(message)} for one in conversations for message in one])
    return conversations
