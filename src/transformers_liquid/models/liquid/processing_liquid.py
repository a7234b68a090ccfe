"""The processor: prompts, image placeholders and chat templates on the way in, text and pictures on the way out.

It runs no network: images travel as pixel values, and the model turns them into codes. What a prompt is made of stands in
`prompts.py`.
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import PROCESSOR_NAME, cached_file

from .chat_template import default_chat_template
from .configuration_liquid import LiquidConfig
from .image_processing_liquid import LiquidImageProcessor, flatten_images, is_column
from .prompts import TOKENIZING, LiquidPrompts
from .reference import ReferenceCheckpoint, adapter_base, hub_arguments
from .remote_code import not_copied, write_remote_code
from .vocabulary import IMAGE_MARK, IMAGE_TOKENS, ImageLayout, check_generation_mode, is_one_token


# What of a tokenizer's arguments says what happens in image mode anyway.
_OF_IMAGE_MODE = {"padding": (True, "longest"), "padding_side": ("left",)}


class LiquidImagesKwargs(ImagesKwargs, total=False):
    """
    framing (`str`, *optional*, defaults to `"pad"`):
        How an input image is brought to the target's aspect: `"pad"` shows all of it, `"crop"` fills the frame.
    height (`int`, *optional*):
        Height in pixels that input images get.
    width (`int`, *optional*):
        Width in pixels that input images get.
    """

    framing: str
    height: int | None
    width: int | None


class LiquidProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: LiquidImagesKwargs
    # As transformers before 5.20 has defaults; the newer ones read them too.
    _defaults = {"text_kwargs": {"return_tensors": "pt"}, "images_kwargs": {"return_tensors": "pt", "framing": "pad"}}


class LiquidProcessor(LiquidPrompts, ProcessorMixin):
    r"""Builds the inputs of a [`LiquidForCausalLM`] and reads its outputs.

    Args:
        image_processor ([`LiquidImageProcessor`]): PIL to pixel values and back.
        tokenizer (`PreTrainedTokenizerBase`): The base's tokenizer, with the four tokens below.
        chat_template (`str` or `dict`, *optional*): A template that writes `<image>` for each image. Defaults to
            the tokenizer's, extended to content parts; or, if it has none, to the reference's conversation for
            Gemma tokenizers and to plain `role: content` lines for others.
        image_token (`str`, defaults to `"<image>"`): The placeholder token for one code of an input image. Users
            write `<image>` for a whole image, whatever this token is called.
        boi_token (`str`, defaults to `"<boi>"`): Begins an image.
        eoi_token (`str`, defaults to `"<eoi>"`): Ends an image.
        uncond_token (`str`, defaults to `"<unconditional>"`): Stands for "no text" in classifier-free guidance.
        image_token_offset (`int`, defaults to 256000): Id of code 0. Defaults to the reference's layout.
        codebook_size (`int`, defaults to 8192): Number of codes in a codebook; with one code a position, of image ids.
        known_words (`list[str]`, *optional*): For a small model, the words of prompts that it was trained on, in
            lower case: pipelines warn of a prompt without any of them. Defaults to no list, and no warning.
        num_codebooks (`int`, defaults to 1): Codes of a position. With several, `uncond_token` may be a text of several
            tokens.

    Raises:
        ValueError: If a token is not exactly one token of the tokenizer, two of them are the same, or an id of the
            tokenizer lies among the image ids.

    Example:

    ```python
    >>> inputs = processor(text=["red apple"], generation_mode="image", return_tensors="pt")
    >>> ids = model.generate(**inputs, generation_mode="image")
    >>> images = processor.post_process_multimodal_output(model.decode_image_tokens(ids), generation_mode="image")
    ```
    """

    valid_processor_kwargs = LiquidProcessorKwargs

    register_for_auto_class = not_copied

    def __init__(
        self,
        image_processor=None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        boi_token: str = "<boi>",
        eoi_token: str = "<eoi>",
        uncond_token: str = "<unconditional>",
        image_token_offset: int = 256000,
        codebook_size: int = 8192,
        known_words: list[str] | None = None,
        num_codebooks: int = 1,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token = image_token
        self.boi_token = boi_token
        self.eoi_token = eoi_token
        self.uncond_token = uncond_token
        self.image_token_offset = image_token_offset
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.known_words = known_words
        self.image_token_id, self.boi_token_id, self.eoi_token_id, self.uncond_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in self._image_tokens
        )
        tokens = {token: self.encode(token) for token in self._image_tokens}
        if num_codebooks > 1 and len(tokens[uncond_token]) > 1:
            self.uncond_token_id = tokens.pop(uncond_token)
        number = len(self._image_tokens) - isinstance(self.uncond_token_id, list)
        if len(tokens) < number or not all(is_one_token(tokenizer, token) for token in tokens):
            raise ValueError(
                "image_token, boi_token, eoi_token and uncond_token must be four tokens of the tokenizer, of one id each, "
                f"but their ids are {tokens}. Name tokens that the tokenizer has, or add them with "
                "`transformers_liquid.expand_vocabulary`."
            )
        self.image_layout.check_vocabulary(self.tokenizer)
        if self.chat_template is None:
            self.chat_template = default_chat_template(tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads the processor of a Liquid repository, or of a reference one such as `Junfeng5/Liquid_V1_7B`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A repository saved by this package, or one with a
                tokenizer alone, in the reference layout.
            kwargs: As in transformers' `from_pretrained`; for a reference repository also `vq_checkpoint` and
                `image_token_offset`, as for the model.

        Raises:
            ValueError: If the repository is neither of the two.
        """
        kwargs.setdefault("trust_remote_code", False)
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        if cached_file(pretrained_model_name_or_path, PROCESSOR_NAME, **hub_arguments(kwargs), **quiet) is None:
            # Trainers save the processor beside an adapter, PEFT does not.
            if (base := adapter_base(pretrained_model_name_or_path, **hub_arguments(kwargs))) is not None:
                return cls.from_pretrained(base, **kwargs)
            reference = ReferenceCheckpoint.find(pretrained_model_name_or_path, **kwargs)
            reference = reference or ReferenceCheckpoint(pretrained_model_name_or_path, **kwargs)
            return build_processor(reference.config, reference.tokenizer)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __call__(
        self,
        text: str | list[str] | list[dict] | list[list[dict]] | None = None,
        images: ImageInput | None = None,
        generation_mode: str = "text",
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs: Unpack[LiquidProcessorKwargs],
    ) -> BatchFeature:
        """Prepare prompts for drawing (`generation_mode="image"`), for text about images and text (`"text"`), or for
        both by turns (`"interleaved"`).

        Args:
            text (`str` or `list[str]`): One prompt or a batch; `<image>` marks where an image goes. In interleaved mode
                also the messages of a conversation, or a batch of conversations, as in `apply_chat_template`.
            images (`ImageInput`, *optional*): The images of all marks in reading order, flat or one list per text.
                Defaults to those that messages hold themselves.
            generation_mode (`str`, defaults to `"text"`): `"text"`, `"image"` or `"interleaved"`.
            negative_prompt (`str` or `list[str]`, *optional*): Not in text mode: what pictures should not show, one for
                all prompts or one each. Replaces the unconditional text of guidance, unless it is empty. Its `<image>`
                marks, if any, stand for the images of the prompt.
            height (`int`, *optional*): In pixels, of the picture to draw and of the input images. Defaults to the
                image processor's `size`.
            width (`int`, *optional*): In pixels, like `height`.
            kwargs: Further arguments of the tokenizer and of the image processor, such as `return_tensors`
                (defaults to `"pt"`) and `framing` of input images (defaults to `"pad"`).

        Returns:
            `BatchFeature` with, left-padded and for B texts:

            - **input_ids**, **attention_mask** -- int64 (B, T).
            - **pixel_values** -- with images: float32 (N, 3, H, W) in [-1, 1] of all N images.
            - **negative_prompt_ids**, **negative_prompt_attention_mask** -- not in text mode: int64 (B, U).
            - **height**, **width** -- not in text mode: ints, if the size is not the default one.

        Raises:
            ValueError: If a text is empty or no string, contains a token that marks the inside of an image, the
                number of `<image>` marks differs from the number of images, or a size is not a positive multiple
                of the codec's factor.
        """
        check_generation_mode(generation_mode)
        if not any(True for _ in flatten_images([] if images is None else images)):
            images = None  # lists without pictures
        if generation_mode != "text":
            data, image_ids = {}, []
            if generation_mode == "interleaved":
                text, images = self._texts_to_follow(text, images)
            if any(True for _ in flatten_images([] if images is None else images)):
                self.image_layout.grid(height, width)
                framing = {name: kwargs.pop(name) for name in ("framing",) if name in kwargs}
                framing |= kwargs.pop("images_kwargs", {})
                data |= self._process_images(images, **{"framing": "pad", "height": height, "width": width, **framing})[
                    0
                ]
                image_ids = [self._image_ids(None, *picture.shape[-2:]) for picture in data["pixel_values"]]
            if generation_mode == "image":
                self.validate_inputs(images, self.check_texts(text, "text"))
                prompts, negatives = self.image_prompts(text, negative_prompt, height, width, images=image_ids)
            else:
                prompts, negatives = self._interleaved_prompts(text, image_ids, negative_prompt, height, width)
            data["input_ids"], data["attention_mask"] = self.pad_left(prompts)
            data["negative_prompt_ids"], data["negative_prompt_attention_mask"] = self.pad_left(negatives)
            height, width = self.image_layout.size(self.image_layout.grid(height, width))
            if not height == width == self.image_layout.image_size:
                data |= {"height": height, "width": width}
            nested = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {})}
            given = {"return_tensors": "pt", **nested, **kwargs}
            return_tensors = given.pop("return_tensors")
            for name, value in given.items():
                if value is not None and value not in _OF_IMAGE_MODE.get(name, ()):
                    raise ValueError(f"{name}={value!r} has no meaning for {generation_mode=}: leave it out.")
            return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["height", "width"])

        if negative_prompt is not None:
            raise ValueError("negative_prompt is about pictures: text is generated without guidance.")
        if text is not None:
            text = self.check_texts(text, "text")
            text_kwargs = kwargs.get("text_kwargs", {})
            # Given here, not as class defaults: the tokenizer's own side would win over that.
            for name, value in (("padding_side", "left"), ("padding", len(text) > 1)):
                if name not in text_kwargs:
                    kwargs.setdefault(name, value)
        if images is not None and (height is not None or width is not None):
            height, width = self.image_layout.size(self.image_layout.grid(height, width))  # plain integers
            kwargs.update(height=height, width=width)
        with TOKENIZING:
            inputs = super().__call__(images=images, text=text, **kwargs)
        for sample, ids in zip(text or (), inputs.get("input_ids", ()), strict=False):
            self.image_layout.check_ids(self.tokenizer, np.asarray(ids).tolist(), marks=sample.count(IMAGE_MARK))
        return inputs

    @property
    def image_layout(self) -> ImageLayout:
        """Where the codes lie, and all arithmetic between pixels, codes and ids."""
        return ImageLayout(
            image_token_offset=self.image_token_offset,
            codebook_size=self.codebook_size,
            num_codebooks=self.num_codebooks,
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
            uncond_token_id=self.uncond_token_id,
            image_token_id=self.image_token_id,
            image_size=self.image_processor.size,
            downsample_factor=self.image_processor.downsample_factor,
        )

    def check_fits(self, config: LiquidConfig) -> None:
        """Check that this processor and a model speak of the same ids and sizes.

        Args:
            config ([`LiquidConfig`]): The model's configuration.

        Raises:
            ValueError: Naming everything that differs.
        """
        self.image_layout.check_vocabulary(self.tokenizer)
        ours, theirs = self.image_layout, config.image_layout
        different = [
            f"{field.name} is {getattr(ours, field.name)} in the processor, {getattr(theirs, field.name)} in the model"
            for field in dataclasses.fields(ImageLayout)
            if getattr(ours, field.name) != getattr(theirs, field.name)
        ]
        if different:
            raise ValueError(
                "The processor does not fit the model: " + "; ".join(different) + ". Load both from one repository."
            )

    def validate_inputs(self, images=None, text=None, **kwargs) -> None:
        """Check that the texts hold no pieces of images, and one `<image>` mark per image."""
        if text is None:
            return super().validate_inputs(images, text)
        images = [] if images is None else images
        is_nested = is_column(images) and any(is_column(image) for image in images)
        if is_nested and len(images) == len(text):
            for index, (sample, own) in enumerate(zip(text, images, strict=True)):
                self._check_marks([sample], len(list(flatten_images(own))), f"Text {index}")
        else:
            self._check_marks(text, len(list(flatten_images(images))), "The input")

    # Hooks of ProcessorMixin

    def save_pretrained(self, save_directory, **kwargs) -> list[str]:
        """As in transformers, if what is saved can be loaded; see [`LiquidConfig.save_pretrained`]."""
        self.image_layout.check_vocabulary(self.tokenizer)
        self.auto_map = write_remote_code(save_directory, AutoProcessor=type(self).__name__)
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            del self.auto_map  # of the repository, not of the processor

    @property
    def _image_tokens(self) -> tuple[str, str, str, str]:
        return self.image_token, self.boi_token, self.eoi_token, self.uncond_token

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def _process_images(self, images: ImageInput, **kwargs) -> tuple[BatchFeature, list[str]]:
        image_inputs = self.image_processor(images, **kwargs)
        number = len(image_inputs["pixel_values"])
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(number)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What the mark of image `image_idx` becomes: boi, a placeholder per code, eoi."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.boi_token + self.image_token * self.image_layout.num_codes(height, width) + self.eoi_token

    def get_text_with_replacements(self, text: list[str], images_replacements: list[str] = (), *args, **kwargs):
        """Expand the marks of images. Users write `<image>` even where the placeholder has another name."""
        marked = copy.copy(self)
        marked.image_token = IMAGE_MARK
        return super(LiquidProcessor, marked).get_text_with_replacements(text, images_replacements, *args, **kwargs)

    # Outputs

    def batch_decode(self, sequences, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """Text of each row of ids, leaving out image ids; see the tokenizer's `batch_decode`."""
        sequences = self._without_image_ids(sequences, skip_special_tokens)
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """Text of ids, leaving out image ids; see the tokenizer's `decode`."""
        token_ids = self._without_image_ids(token_ids, skip_special_tokens)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Texts of generated ids (B, T); the hook of `pipeline("image-text-to-text")`."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, generation_mode: str | None = None, output_type: str = "pil", **kwargs: Any
    ):
        """Texts or pictures; the hook of `pipeline("any-to-any")`.

        Args:
            generated_outputs (`torch.Tensor` or [`InterleavedOutput`]): Text mode: ids (B, T). Image mode: pixel values
                (B, 3, H, W) in [-1, 1], the result of `model.decode_image_tokens(ids)`. Interleaved mode: the result of
                `model.generate`.
            generation_mode (`str`, *optional*, defaults to `"text"`): `"text"`, `"image"` or `"interleaved"`.
            output_type (`str`, defaults to `"pil"`): Of pictures: `"pil"`, `"np"` or `"pt"`.
            kwargs: Text mode: arguments of the tokenizer's `batch_decode`; `skip_special_tokens` defaults to `True`.

        Returns:
            A list of `str`; or the images as the image processor's `postprocess` returns them; or for each sequence a list
            of `{"type": "text", "text": str}` and `{"type": "image", "image": picture}`, as in messages.
        """
        if generation_mode is not None:
            check_generation_mode(generation_mode)
        if generation_mode == "image":
            return self.image_processor.postprocess(generated_outputs, output_type=output_type)
        if generation_mode == "interleaved":
            if not hasattr(generated_outputs, "parts"):
                raise ValueError(f"The result of generate() in interleaved mode has parts, got {generated_outputs!r}.")
            return [[self._part(part, output_type) for part in parts] for parts in generated_outputs.parts]
        return self.post_process_image_text_to_text(generated_outputs, **kwargs)

    def _part(self, part: torch.Tensor, output_type: str) -> dict[str, Any]:
        if part.ndim == 1:
            return {"type": "text", "text": self.decode(part, skip_special_tokens=True)}
        return {"type": "image", "image": self.image_processor.postprocess(part[None], output_type=output_type)[0]}

    def _without_image_ids(self, ids, skip_special_tokens: bool):
        if isinstance(ids, (torch.Tensor, np.ndarray)):
            ids = ids.tolist()
        if isinstance(ids, int):
            ids = [ids]
        if any(isinstance(row, (list, tuple, torch.Tensor, np.ndarray)) for row in ids):
            return [self._without_image_ids(row, skip_special_tokens) for row in ids]
        image_ids = self.image_layout.image_token_range
        # Tokens that the base reserved (`<unused0>`) are not always marked as special in its tokenizer.
        special = self.image_layout.special_image_token_ids
        return [
            int(index) for index in ids if index not in image_ids and not (skip_special_tokens and index in special)
        ]


def build_processor(config: LiquidConfig, tokenizer: PreTrainedTokenizerBase) -> LiquidProcessor:
    """The processor of a model whose repository has only a tokenizer, as in the reference layout.

    Args:
        config ([`LiquidConfig`]): Says which ids are the image tokens, and the sizes.
        tokenizer (`PreTrainedTokenizerBase`): Holds the four image tokens.

    Raises:
        ValueError: If the tokenizer does not fit the configuration.
    """
    tokens = {name: tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")) for name in IMAGE_TOKENS}
    if isinstance(config.uncond_token_id, list):
        tokens["uncond_token"] = tokenizer.decode(config.uncond_token_id)
    for name, token in tokens.items():
        # A piece of ordinary text would pass every later check.
        if token is None or not (token.startswith(("<", "[")) and token.endswith((">", "]"))):
            raise ValueError(
                f"The tokenizer does not fit the model: {name}_id is {getattr(config, f'{name}_id')}, in the tokenizer "
                f"{token!r}, no special token such as '<boi>'. Load both from one repository."
            )
    return LiquidProcessor(
        LiquidImageProcessor(size=config.image_size, downsample_factor=config.downsample_factor),
        tokenizer,
        image_token_offset=config.image_token_offset,
        codebook_size=config.codebook_size,
        num_codebooks=config.num_codebooks,
        **tokens,
    )
