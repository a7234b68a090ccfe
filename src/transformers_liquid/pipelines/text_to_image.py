"""`pipeline("text-to-image")`: prompts in, pictures out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import logging

from ..checkpoints import EMOJI_CHECKPOINT
from ..generation.image_generation import check_context
from ..generation.interleaved import DEFAULT_MAX_NEW_TOKENS
from ..generation.sampling import put_codes
from ..generation.settings import FILTERS, ImageGenerationConfig
from ..models.liquid.configuration_liquid import LiquidConfig
from ..models.liquid.image_processing_liquid import is_column
from ..models.liquid.model_card import write_model_card
from ..models.liquid.modeling_liquid import LiquidForCausalLM
from ..models.liquid.processing_liquid import LiquidProcessor, build_processor
from ..models.liquid.prompts import CAPTION_INSTRUCTION, negative_texts, with_marks
from ..models.liquid.vocabulary import FROM_TEXT_ALONE, IMAGE_MARK, as_integers
from ..ops.merged_adapters import unload_adapters
from ..utils.streaming import tell_reader, telling_reader


logger = logging.get_logger(__name__)

# Pictures that are drawn side by side unless the caller says otherwise.
DEFAULT_BATCH_SIZE = 8


class LiquidImageGenerationPipeline(Pipeline):
    r"""Draws pictures from prompts with a [`LiquidForCausalLM`]; the task `"text-to-image"`.

    Settings that are not passed come from the model's `generation_config.image_generation_config`. Every argument of
    [`~LiquidImageGenerationPipeline.__call__`] can also be given to `pipeline(...)`, as a default for all calls.

    Args:
        model ([`LiquidForCausalLM`]): The model.
        processor ([`LiquidProcessor`], *optional*): Its processor.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): In place of a processor, as for reference repositories,
            which have none: the processor is then built from the tokenizer and the model's configuration.
        kwargs: As for every `transformers.Pipeline`: `device`, `batch_size` (defaults to 8 pictures), ...

    Raises:
        ValueError: If the model is no Liquid model, or the processor is missing or does not fit it.

    Example:

    ```python
    >>> import transformers_liquid
    >>> from transformers import pipeline
    >>> pipe = pipeline("text-to-image")
    >>> images = pipe("red apple", num_images_per_prompt=4, seed=0)
    ```
    """

    # Reference repositories have a tokenizer alone, ours a processor that holds it: neither is mandatory.
    _load_processor = None
    _load_tokenizer = None
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(
        self,
        model: LiquidForCausalLM,
        processor: LiquidProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model.config, LiquidConfig) or not model.can_generate():
            raise ValueError(
                f"text-to-image needs a LiquidForCausalLM, got {type(model).__name__}. If the checkpoint should be one, "
                "`LiquidForCausalLM.from_pretrained` says why it is not."
            )
        if not isinstance(processor, LiquidProcessor):
            if tokenizer is None:
                raise ValueError(
                    f"text-to-image needs a LiquidProcessor (or a tokenizer to build it from), got {processor!r}. Save "
                    "the processor with the model, or pass `processor=`."
                )
            processor = build_processor(model.config, tokenizer)
        processor.check_fits(model.config)
        self._progress_bar_config: dict[str, Any] = {}
        super().__init__(model, processor=processor, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the model to a device, to a `dtype`, or both, as `torch.nn.Module.to`; the codec stays in fp32."""
        self.model.to(*args, **kwargs)
        self.device = self.model.device
        return self

    def load_lora_weights(self, path: str, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Puts an adapter onto the model, its trained rows too; as in diffusers.

        Args:
            path (`str`): A folder or a name on the Hub.
            adapter_name (`str`, *optional*): For `pipe.model.set_adapter`, where there are several.
            kwargs: Of `model.load_adapter`.

        Raises:
            ValueError: If it is not whole, or of another model, which stays as it was.
        """
        self.model.load_adapter(path, adapter_name=adapter_name, **kwargs)

    def unload_lora_weights(self) -> None:
        """Takes the adapters off: the model is what it was before, or after [`~.fuse_lora`], to the bit."""
        if getattr(self.model, "peft_config", None):
            unload_adapters(self.model, merge=False)

    def fuse_lora(self) -> None:
        """Makes the active adapters a part of the weights, for good: a model without adapters remains.

        Raises:
            ValueError: If there are none.
        """
        if not getattr(self.model, "peft_config", None):
            raise ValueError("There is nothing to fuse: call load_lora_weights first.")
        unload_adapters(self.model, merge=True)

    def __call__(self, prompt: Any, **kwargs: Any) -> Any:
        """Draws pictures: in the order of the prompts, those of one prompt after each other.

        Args:
            prompt (`str`, `list[str]` or an iterable): What the pictures show. Also a column of a data set; a list of
                records (`dict`) with `prompt` and, all or none of them, `negative_prompt`, `image` and `seed`; or what
                comes one after another, of either: a generator, a `torch.utils.data.Dataset` such as transformers'
                `KeyDataset`.
            image (picture, or list of pictures or of lists of pictures, *optional*): Pictures in the context of the
                drawing, as for editing: one for all prompts, or one or several for each. `<image>` marks in a prompt say
                where they stand; without marks they come first.
            negative_prompt (`str` or `list[str]`, *optional*): What they should not show, one for all prompts or one
                each. It takes the place of "no text" in guidance, so it needs a `guidance_scale` above 1.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Pictures of each prompt.
            height (`int`, *optional*): In pixels, a multiple of the codec's factor. Defaults to the model's size.
            width (`int`, *optional*): Likewise.
            guidance_scale (`float`, *optional*): At least 1; 1 is no guidance. Defaults to the model's settings.
            seed (`int` or `list[int]`, *optional*): Picture i of the call is drawn from seed `seed + i` (or `seed[i]`),
                and is the same whatever pictures are drawn beside it.
            generator (`torch.Generator` or a list of them, *optional*): Instead of `seed`: one for all pictures in
                turn, or one each.
            batch_size (`int`, *optional*, defaults to 8): Pictures that are drawn side by side.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            callback_on_step_end (`Callable`, *optional*): Called after every step of a batch with `(pipe, step,
                timestep, callback_kwargs)`, as diffusers does: `step` is the index of the last finished code (a step
                can finish several), `timestep` the number of codes still to come, and
                `callback_kwargs["image_tokens"]` holds the ids so far, `(B, step + 1)` (with K codes a position, `(B, K,
                step + 1)`). What it returns is ignored; an
                exception ends the call. [`partial_pictures`] makes pictures of the ids.
            progress_bar (`bool`, *optional*, defaults to `True`): Whether to show one.
            return_dict (`bool`, *optional*, defaults to `False`): Whether to tell how each picture was drawn; a seed is
                then chosen where there is none.
            kwargs: Further settings of [`LiquidForCausalLM.generate`], such as `do_sample`, `temperature`,
                `top_k`, `top_p` or `guidance_min_p`, of which `None` leaves one out; and `streamer`, such as an [`ImageStreamer`], for one batch.

        Returns:
            For N pictures a list of N `PIL.Image.Image`; or an array `(N, H, W, 3)` or tensor `(N, 3, H, W)` in [0, 1];
            with `return_dict` a [`LiquidImagePipelineOutput`] with them. For what comes one after another, an iterator of
            as much for each picture, drawn by batches.

        Raises:
            ValueError: On inputs that cannot be met, for all prompts, before any drawing.
        """
        if _comes_one_after_another(prompt):
            for name in ("negative_prompt", "image", "seed", "generator"):
                if is_column(kwargs.get(name)):
                    raise ValueError(
                        f"Prompts that come one after another take one {name} for all: give a list, or records."
                    )
            return self._one_after_another(prompt, **kwargs)
        output, return_dict = self._draw_all(prompt, **kwargs)
        if isinstance(output.images[0], torch.Tensor):
            output.images = torch.stack(output.images)
        elif isinstance(output.images[0], np.ndarray):
            output.images = np.stack(output.images)
        return output if return_dict else output.images

    def _one_after_another(self, prompts: Any, seed: int | None = None, **kwargs: Any) -> Iterator[Any]:
        """As many prompts as fill a batch are drawn, and their pictures handed out."""
        size = kwargs.get("batch_size") or self._batch_size or DEFAULT_BATCH_SIZE
        seed, number = self._preprocess_params.get("seed") if seed is None else seed, 0
        # A torch data set may have an index alone.
        prompts = iter(prompts) if hasattr(prompts, "__iter__") else map(prompts.__getitem__, range(len(prompts)))
        while chunk := list(islice(prompts, size)):
            seeded = {} if seed is None else {"seed": seed + number}
            output, return_dict = self._draw_all(chunk, **seeded, **kwargs)
            number += len(output.images)
            for of_one in zip(output.images, output.seeds, output.settings, strict=True):
                yield LiquidImagePipelineOutput(*([value] for value in of_one)) if return_dict else of_one[0]

    def _draw_all(self, prompt: Any, **kwargs: Any) -> tuple[LiquidImagePipelineOutput, bool]:
        """The pictures in order and how each was drawn, and whether the caller wants to hear that."""
        batches, settings, after, others, of_each = self._prepare(prompt, **kwargs)
        return_dict = after.pop("return_dict", False)
        drawn = sorted(self._draw(batches, settings, after, **others), key=lambda indexed: indexed[0])
        images, seeds = [image for _, image in drawn], [one["seed"] for one in of_each]
        return LiquidImagePipelineOutput(images=images, seeds=seeds, settings=of_each), return_dict

    def stream(self, prompt: str | list[str], **kwargs: Any) -> Iterator[tuple[int, Any]]:
        """Draws pictures and hands out each batch of them as soon as it is done, for more than fit into memory.

        Prompts of about the same length are drawn side by side, the longest ones first: an index says which picture of
        the call came. With one `generator` for all pictures they are drawn and come in order.

        Args:
            prompt (`str` or `list[str]`): What the pictures show.
            kwargs: As in [`~LiquidImageGenerationPipeline.__call__`].

        Returns:
            An iterator of `(index, image)`: a `PIL.Image.Image`, an array `(H, W, 3)` or a tensor `(3, H, W)` in
            [0, 1].

        Raises:
            ValueError: As there: at once, not at the first picture.

        Example:

        ```python
        >>> for index, image in pipe.stream(prompts, seed=0, batch_size=16):
        ...     image.save(f"{index:06d}.png")
        ```
        """
        batches, settings, after, others = self.prepare(prompt, **kwargs)
        return self._draw(batches, settings, after, **others)

    def prepare(
        self, prompt: str | list[str], **kwargs: Any
    ) -> tuple[list[dict[str, Any]], ImageGenerationConfig, dict[str, Any], dict[str, Any]]:
        """Everything of a call before the drawing, and all its checks.

        Args:
            prompt, kwargs: As in a call.

        Returns:
            The inputs of [`~LiquidForCausalLM.generate`] for each batch, and the `indices` of its pictures; their settings;
            the arguments of [`~LiquidImageGenerationPipeline.postprocess`]; and those left over, such as `streamer`.

        Raises:
            ValueError: As there.
        """
        batches, settings, after, others, _ = self._prepare(prompt, **kwargs)
        after.pop("return_dict", None)
        return batches, settings, after, others

    @telling_reader
    def _prepare(self, prompt: Any, **kwargs: Any) -> tuple[list[dict], ImageGenerationConfig, dict, dict, list[dict]]:
        """As [`~.prepare`], with the argument `return_dict` among those of `postprocess`; and how each picture is drawn."""
        if is_column(prompt) and isinstance(next(iter(prompt), None), Mapping):
            records = list(prompt)
            if any(not isinstance(one, Mapping) or one.keys() != records[0].keys() for one in records):
                raise ValueError("Records must be dictionaries with the same fields each.")
            return self._prepare(**{name: [one[name] for one in records] for name in records[0]}, **kwargs)
        if kwargs.get("batch_size") is None:
            kwargs["batch_size"] = self._batch_size
        before, during, after = self._sanitize_parameters(**kwargs)
        after = {**self._postprocess_params, **after}
        during = {**self._forward_params, **during}
        stored, config = self.model.generation_config, during.pop("generation_config", None)
        # What these raise is raised now.
        settings, others = ImageGenerationConfig.from_call(stored, config, during)
        settings.window(settings.num_codes(self.model.config))
        if "max_time" in settings.of_transformers or others.get("stopping_criteria"):
            raise ValueError(
                "The pipeline draws whole pictures: for max_time and stopping_criteria call model.generate()."
            )
        self.postprocess(torch.zeros(1, 3, 1, 1), **{name: after[name] for name in after if name != "return_dict"})
        before = {**self._preprocess_params, **before, "height": settings.height, "width": settings.width}
        before["caption_first"] = settings.caption_first
        if after.get("return_dict") and before.get("seed") is before.get("generator") is None:
            before["seed"] = int(torch.randint(2**31, ()))
        batches = self.preprocess(prompt, **before)
        negatives = negative_texts(before.get("negative_prompt"))
        has_guidance = settings.guidance_scale > 1 or settings.image_guidance_scale is not None
        if not has_guidance and "".join(negatives).strip():
            raise ValueError(
                "A negative prompt acts through guidance, but guidance_scale is 1: raise it, or leave out the prompt."
            )
        if "streamer" in others and len(batches) > 1:
            raise ValueError(
                f"A streamer follows one batch, but these are {len(batches)}: pass a batch_size of at least the number "
                "of pictures, or draw them in several calls."
            )
        texts, copies = self.processor.check_texts(prompt, "prompt"), before.get("num_images_per_prompt", 1)
        negatives = [negatives] * len(texts) if isinstance(negatives, str) else negatives
        of_each = [
            {"prompt": text, "negative_prompt": negative or None, "seed": None, **settings.to_dict()}
            for text, negative in zip(texts, negatives, strict=True)
            for _ in range(copies)
        ]
        for batch in batches if before.get("seed") is not None else ():
            for index, generator in zip(batch["indices"], batch["generator"], strict=True):
                of_each[index]["seed"] = generator.initial_seed()
        return batches, settings, after, others, of_each

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in FILTERS}
        for name, instead in _NOT_HERE.items():
            if name in kwargs:
                raise ValueError(f"The pipeline takes no {name}: {instead}.")
        postprocess = {name: kwargs.pop(name) for name in ("output_type", "return_dict") if name in kwargs}
        only_before = ("image", "negative_prompt", "num_images_per_prompt", "seed", "generator", "batch_size")
        preprocess = {name: kwargs.pop(name) for name in only_before if name in kwargs}
        return preprocess, kwargs, postprocess

    def preprocess(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        image: Any = None,
        caption_first: bool | None = None,
        **size: int | None,
    ) -> list[dict[str, Any]]:
        """Checks everything and makes the inputs of `generate` for each batch of pictures, and their `indices`."""
        # 1. Checks
        for name, value in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        num_codes = self.model.config.image_layout.num_codes(**size)
        prompt, images = self._in_context(prompt, image, **size)
        prompts, negatives = self.processor.image_prompts(prompt, negative_prompt, **size, name="prompt", images=images)
        known = self.processor.known_words
        for text in [prompt] if isinstance(prompt, str) else prompt:
            words = re.findall(r"\w+", text.replace(IMAGE_MARK, " ").lower())
            if known is not None and words and not set(known).intersection(words):
                logger.warning(f"The model was trained on no word of the prompt {text!r}: expect no likeness.")
        lengths = [max(map(len, pair)) for pair in zip(prompts, negatives, strict=True)]
        check_context(self.model.config, max(lengths), num_codes)
        if caption_first and images:
            prompt = self._with_captions(prompt, images, batch_size)
            prompts, _ = self.processor.image_prompts(prompt, **size, name="prompt", images=images)
            check_context(self.model.config, max(map(len, prompts)), num_codes)

        # 2. One source of randomness per picture. Generators of the CPU give the same picture on every device
        number = len(prompts) * num_images_per_prompt
        if seed is not None and generator is not None:
            raise ValueError("Give seed or generator, not both.")
        seeds = None if seed is None else as_integers(seed)
        if seeds is not None and not np.issubdtype(seeds.dtype, np.integer):
            raise ValueError(f"seed must be a whole number, or one each, got {seed!r}.")
        seeds = None if seeds is None else seeds.tolist()
        seeds = range(seeds, seeds + number) if isinstance(seeds, int) else seeds
        generators = generator if seeds is None else [torch.Generator().manual_seed(one) for one in seeds]
        if isinstance(generators, (list, tuple)) and len(generators) != number:
            name = "generators" if seeds is None else "seeds"
            raise ValueError(f"Got {len(generators)} {name} for {number} pictures: give one each, or a single one.")

        # 3. Batches: the longest prompts first, since what does not fit into memory should fail at once
        order = list(range(number))
        if not isinstance(generators, torch.Generator):
            order.sort(key=lambda index: -lengths[index // num_images_per_prompt])
        names = ("input_ids", "negative_prompt_ids"), ("attention_mask", "negative_prompt_attention_mask")
        batches = []
        for start in range(0, number, batch_size):
            indices = order[start : start + batch_size]
            chosen = [index // num_images_per_prompt for index in indices]
            batch = {"indices": indices, "generator": generators}
            if isinstance(generators, (list, tuple)):
                batch["generator"] = [generators[index] for index in indices]
            padded = self.processor.pad_left([both[index] for both in (prompts, negatives) for index in chosen])
            for pair, part in zip(names, padded, strict=True):
                batch |= zip(pair, torch.tensor(part).chunk(2), strict=True)
            batches.append(batch)
        return batches

    def _in_context(self, prompt: str | list[str], image: Any, **size: int | None) -> tuple[Any, list[list[int]]]:
        """The prompts with marks for the pictures of their contexts, and the ids of these pictures."""
        if image is None:
            return prompt, []
        self.model.config.image_layout.check_one_code(FROM_TEXT_ALONE)
        prompts = self.processor.check_texts(prompt, "prompt")
        of_each = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompts)
        if len(of_each) != len(prompts):
            raise ValueError(
                f"Got {len(of_each)} images for {len(prompts)} prompts: give one for all, or a list for each."
            )
        of_each = [list(one) if isinstance(one, (list, tuple)) else [one] for one in of_each]
        for index, (text, own) in enumerate(zip(prompts, of_each, strict=True)):
            prompts[index] = with_marks(text, len(own))
        # Read as far as is needed to say what is wrong, before the codec is at work.
        self.processor.validate_inputs(of_each, prompts)
        pictures = [picture for own in of_each for picture in own]
        if not pictures:
            return prompts, []
        once = {id(picture): picture for picture in pictures}  # one for all prompts is encoded once
        pixel_values = self.processor.image_processor(list(once.values()), framing="pad", **size)["pixel_values"]
        ids = dict(zip(once, self.model.encode_images(pixel_values), strict=True))
        return prompts, [ids[id(picture)].tolist() for picture in pictures]

    def _with_captions(self, prompts: list[str], images: list[list[int]], batch_size: int) -> list[str]:
        """Prompts; behind those with pictures what the model says, if asked as in a conversation, that one will see."""
        texts, left = list(prompts), iter(images)
        asked = [index for index, prompt in enumerate(prompts) if IMAGE_MARK in prompt]
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            for index in batch:
                texts[index] += f" {CAPTION_INSTRUCTION}"
            questions = self.processor.pad_left([self.processor.turn_ids(texts[index], left) for index in batch])
            ids, mask = map(torch.tensor, questions)
            written = self.model.generate(
                **self.ensure_tensor_on_device(input_ids=ids, attention_mask=mask),
                max_new_tokens=self.model.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
                do_sample=False,
            )
            captions = self.processor.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            for index, caption in zip(batch, captions, strict=True):
                texts[index] += f" {caption.strip()}"
        return texts

    def _draw(
        self,
        batches: list[dict[str, Any]],
        settings: ImageGenerationConfig,
        after: dict[str, Any],
        progress_bar: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        streamer: BaseStreamer | None = None,
        **others: Any,
    ) -> Iterator[tuple[int, Any]]:
        num_codes = settings.num_codes(self.model.config)
        total = num_codes * sum(len(batch["indices"]) for batch in batches)
        with self.progress_bar(total=total, disable=not progress_bar) as bar:
            for batch in batches:
                watcher = _Watcher(self, bar, num_codes, callback_on_step_end, streamer)
                pixel_values = self.forward(batch, streamer=watcher, generation_config=settings, **others)
                yield from zip(batch["indices"], self.postprocess(pixel_values, **after), strict=True)

    def _forward(
        self, batch: dict[str, Any], generation_config: ImageGenerationConfig, **generate_kwargs: Any
    ) -> torch.Tensor:
        """Draws a batch; pixel values (B, 3, H, W) in [-1, 1]."""
        inputs = {name: value for name, value in batch.items() if name != "indices"}
        ids = self.model.generate(
            **inputs, generation_mode="image", generation_config=generation_config, **generate_kwargs
        )
        return self.model.decode_image_tokens(ids, generation_config.height, generation_config.width).float()

    def postprocess(self, pixel_values: torch.Tensor, output_type: str = "pil") -> Any:
        """Pixel values to pictures."""
        return self.processor.image_processor.postprocess(pixel_values, output_type)

    def progress_bar(self, total: int, disable: bool = False) -> Any:
        """A bar over codes; silent too if `transformers.utils.logging.disable_progress_bar()` was called."""
        return logging.tqdm(**{"total": total, "unit": "code", "disable": disable, **self._progress_bar_config})

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments of `tqdm` for every later bar, such as `disable=True`; as in diffusers."""
        self._progress_bar_config = kwargs

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_model_card(self.model, working_dir, repo_id.rpartition("/")[2])
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves model and processor as one repository.

        The base class would note this pipeline as custom code, which then nobody could load without
        `trust_remote_code`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


@dataclass
class LiquidImagePipelineOutput(ImagePipelineOutput):
    """Pictures, and how each was drawn: `pipe(**output.settings[i])` draws picture i again.

    Args:
        images (list of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): As in a call.
        seeds (list of `int`): Of each picture; `None` where generators were given.
        settings (list of `dict`): Of each picture: `prompt`, `negative_prompt`, `seed` and all settings. Pictures of its
            context are not there.
    """

    seeds: list[int | None]
    settings: list[dict[str, Any]]


def _comes_one_after_another(prompt: Any) -> bool:
    is_one = isinstance(prompt, (str, bytes, Mapping, np.ndarray, torch.Tensor)) or is_column(prompt)
    return isinstance(prompt, Dataset) or (isinstance(prompt, Iterable) and not is_one)


@dataclass
class _Watcher(BaseStreamer):
    """Moves the bar, calls the callback and feeds the user's streamer. A step can add several codes."""

    pipe: LiquidImageGenerationPipeline
    bar: Any
    num_codes: int
    callback: Callable[..., Any] | None = None
    streamer: BaseStreamer | None = None
    codes: list[torch.LongTensor] = field(default_factory=list)

    def put(self, value: torch.LongTensor) -> None:
        if self.streamer is not None:
            self.streamer.put(value)

    def put_codes(self, codes: torch.LongTensor) -> None:
        layout = self.pipe.model.config.image_layout
        self.bar.update(codes.shape[0] * codes.shape[-1])
        put_codes(self.streamer, codes, layout)
        if self.callback is not None:
            self.codes.append(codes)
            ids = layout.codes_to_ids(torch.cat(self.codes, dim=-1))
            number = ids.shape[-1]
            self.callback(self.pipe, number - 1, self.num_codes - number, {"image_tokens": ids})

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def fail(self, error: Exception) -> None:
        tell_reader(self.streamer, error)


# Arguments of `generate()` that would change what comes back.
_NOT_HERE = {
    "num_return_sequences": "use num_images_per_prompt",
    "return_dict_in_generate": "it returns pictures; call model.generate() for scores and states",
    "generation_mode": "it always draws",
}


PIPELINE_REGISTRY.register_pipeline(
    "text-to-image",
    pipeline_class=LiquidImageGenerationPipeline,
    pt_model=LiquidForCausalLM,
    default={"model": (EMOJI_CHECKPOINT, None)},
    type="multimodal",
)
