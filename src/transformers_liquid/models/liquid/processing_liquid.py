"""The processor: prompts, image placeholders and chat templates on the way in, text and pictures on the way out.

It runs no network: images travel as pixel values, and the model turns them into codes. Every prompt of the package is
built by one of `image_prompt_ids`, `unconditional_ids`, `caption_ids`, `question_ids`, `interleaved_ids` and
`conversation_ids`, for inference and for training alike.
"""

import copy
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import PROCESSOR_NAME, cached_file

from ...codecs.vq_model import check_codes
from .chat_template import default_chat_template
from .configuration_liquid import LiquidConfig
from .image_processing_liquid import LiquidImageProcessor, flatten_images, is_column
from .reference import ReferenceCheckpoint, hub_arguments
from .vocabulary import IMAGE_MARK, IMAGE_TOKENS, ImageLayout, as_integers, check_generation_mode, is_one_token


# The first one is the reference's sentence at inference; the others vary the wording in training.
TEXT_TO_IMAGE_INSTRUCTIONS = [
    " Generate an image based on this description.",
    " Draw a picture of what is described.",
    " Turn the text above into an image.",
    " Make an image that shows this.",
    " Paint the scene that these words describe.",
    " Produce a picture that fits the description.",
    " Show what this text describes as an image.",
    " Please render the preceding description as a picture.",
    " Use the words above to create an image.",
    " Visualize the description you have just read.",
]
CAPTION_INSTRUCTION = "The caption of this image is:"

# Fast tokenizers keep how to pad and cut between calls: one call at a time, whichever thread it is in.
_TOKENIZING = threading.RLock()

# What of a tokenizer's arguments says what happens in image mode anyway.
_OF_IMAGE_MODE = {"padding": (True, "longest"), "padding_side": ("left",)}


class TooLongError(ValueError):
    """What may not be cut is longer than `max_length`."""


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


class LiquidProcessor(ProcessorMixin):
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
        codebook_size (`int`, defaults to 8192): Number of image ids.

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
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token = image_token
        self.boi_token = boi_token
        self.eoi_token = eoi_token
        self.uncond_token = uncond_token
        self.image_token_offset = image_token_offset
        self.codebook_size = codebook_size
        self.image_token_id, self.boi_token_id, self.eoi_token_id, self.uncond_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in self._image_tokens
        )
        tokens = {token: self.encode(token) for token in self._image_tokens}
        if len(tokens) < len(self._image_tokens) or not all(is_one_token(tokenizer, token) for token in tokens):
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
            reference = ReferenceCheckpoint(pretrained_model_name_or_path, **kwargs)
            return build_processor(reference.config, reference.tokenizer)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: ImageInput | None = None,
        generation_mode: str = "text",
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        **kwargs: Unpack[LiquidProcessorKwargs],
    ) -> BatchFeature:
        """Prepare prompts for drawing (`generation_mode="image"`) or for text about images and text (`"text"`).

        Args:
            text (`str` or `list[str]`): One prompt or a batch. In text mode `<image>` marks where an image goes.
            images (`ImageInput`, *optional*): Text mode only: the images of all marks in reading order, flat or one
                list per text.
            generation_mode (`str`, defaults to `"text"`): `"text"` or `"image"`.
            negative_prompt (`str` or `list[str]`, *optional*): Image mode only: what the picture should not show,
                one for all prompts or one each. Replaces the unconditional text of guidance, unless it is empty.
            height (`int`, *optional*): In pixels, of the picture to draw or of the input images. Defaults to the
                image processor's `size`.
            width (`int`, *optional*): In pixels, like `height`.
            kwargs: Further arguments of the tokenizer and of the image processor, such as `return_tensors`
                (defaults to `"pt"`) and `framing` of input images (defaults to `"pad"`).

        Returns:
            `BatchFeature` with, left-padded and for B texts:

            - **input_ids**, **attention_mask** -- int64 (B, T).
            - **pixel_values** -- text mode with images: float32 (N, 3, H, W) in [-1, 1] of all N images.
            - **negative_prompt_ids**, **negative_prompt_attention_mask** -- image mode: int64 (B, U).
            - **height**, **width** -- image mode: ints, if the size is not the default one.

        Raises:
            ValueError: If a text is empty or no string, contains a token that marks the inside of an image, the
                number of `<image>` marks differs from the number of images, or a size is not a positive multiple
                of the codec's factor.
        """
        check_generation_mode(generation_mode)
        if generation_mode == "image":
            if images is not None:
                raise ValueError("generation_mode='image' draws from text alone: leave out images.")
            prompts, negatives = self.image_prompts(text, negative_prompt, height, width)
            data = {}
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
                    raise ValueError(f"{name}={value!r} has no meaning for generation_mode='image': leave it out.")
            return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["height", "width"])

        if negative_prompt is not None:
            raise ValueError("negative_prompt needs generation_mode='image': text is generated without guidance.")
        if text is not None:
            text = self.check_texts(text, "text")
            text_kwargs = kwargs.get("text_kwargs", {})
            # Given here, not as class defaults: the tokenizer's own side would win over that.
            for name, value in (("padding_side", "left"), ("padding", len(text) > 1)):
                if name not in text_kwargs:
                    kwargs.setdefault(name, value)
        if not any(True for _ in flatten_images([] if images is None else images)):
            images = None  # lists without pictures
        if images is not None and (height is not None or width is not None):
            height, width = self.image_layout.size(self.image_layout.grid(height, width))  # plain integers
            kwargs.update(height=height, width=width)
        with _TOKENIZING:
            inputs = super().__call__(images=images, text=text, **kwargs)
        for sample, ids in zip(text or (), inputs.get("input_ids", ()), strict=False):
            self.image_layout.check_ids(self.tokenizer, np.asarray(ids).tolist(), marks=sample.count(IMAGE_MARK))
        return inputs

    # Prompts: lists of ids, matching the reference (FoundationVision/Liquid, liquid/train/train.py and
    # evaluation/app.py) token for token.

    def image_prompts(
        self,
        text: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        name: str = "text",
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts of a batch of pictures and what guidance leads away from, before they are padded.

        Args:
            text, negative_prompt, height, width: As in a call with `generation_mode="image"`.
            name (`str`, defaults to `"text"`): What an error calls `text`.

        Returns:
            Ids of the prompts as in `image_prompt_ids`; and, one for each, of the negative or unconditional prompts.

        Raises:
            ValueError: As in a call.
        """
        texts = self._check_prompts(text, name)
        ending = self._size_sentence(height, width) + TEXT_TO_IMAGE_INSTRUCTIONS[0]
        prompts = [self._image_prompt(prompt, ending) for prompt in texts]
        is_list = isinstance(negative_prompt, (list, tuple))
        negatives = negative_prompt if is_list else [negative_prompt or ""] * len(texts)
        if len(negatives) != len(texts):
            raise ValueError(f"Got {len(negatives)} negative prompts for {len(texts)} prompts: give one, or one each.")
        unconditional = self.unconditional_ids(height, width)
        return prompts, [
            # User interfaces send an empty one for none.
            unconditional
            if negative == ""
            else self._image_prompt(*self._check_prompts(negative, "negative_prompt"), ending)
            for negative in negatives
        ]

    def pad_left(self, sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts of one length, pads before them, and their masks."""
        length = max(map(len, sequences))
        ids = [[self.pad_token_id] * (length - len(sequence)) + sequence for sequence in sequences]
        mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
        return ids, mask

    def image_prompt_ids(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        instruction: str = TEXT_TO_IMAGE_INSTRUCTIONS[0],
        max_length: int | None = None,
    ) -> list[int]:
        """The prompt for a picture: `bos` prompt [size sentence] instruction `boi`.

        Args:
            prompt (`str`): What the picture shows.
            height (`int`, *optional*): In pixels. A size other than the default one is said in the prompt.
            width (`int`, *optional*): In pixels.
            instruction (`str`, *optional*): One of `TEXT_TO_IMAGE_INSTRUCTIONS`.
            max_length (`int`, *optional*): Longest list of ids. A description that is too long loses its end; what
                follows it stays.

        Raises:
            ValueError: If the prompt is empty or contains `<image>` or one of the processor's image tokens, or the
                size does not fit.
            TooLongError: If `max_length` leaves no room for the description; a `ValueError` too.
        """
        (prompt,) = self._check_prompts(prompt, "prompt")
        return self._image_prompt(prompt, self._size_sentence(height, width) + instruction, max_length)

    def _image_prompt(self, prompt: str, ending: str, max_length: int | None = None) -> list[int]:
        ids = [*self.bos_ids, *self.encode(prompt + ending), self.boi_token_id]
        if max_length is None or len(ids) <= max_length:
            return ids
        ending_ids = [*self.encode(ending), self.boi_token_id]
        room = max_length - len(self.bos_ids) - len(ending_ids)
        if room < 1:
            raise TooLongError(f"A prompt of {max_length} tokens has no room for text before {ending!r}.")
        return [*self.bos_ids, *self.encode(prompt)[:room], *ending_ids]

    def unconditional_ids(self, height: int | None = None, width: int | None = None) -> list[int]:
        """The prompt of the unconditional side of guidance: `bos` [size sentence] `<unconditional>` `boi`."""
        text = f"{self._size_sentence(height, width)} {self.uncond_token}".lstrip()
        return [*self.bos_ids, *self.encode(text), self.boi_token_id]

    def caption_ids(self, codes=None, height: int | None = None, width: int | None = None) -> list[int]:
        """The prompt for a caption: `bos` `boi` codes `eoi` `The caption of this image is:`.

        Args:
            codes (1-D or 2-D ints, *optional*): The image. Without it a placeholder stands for each code of an image
                of `height` x `width`.
            height (`int`, *optional*): In pixels.
            width (`int`, *optional*): In pixels.
        """
        image = [self.boi_token_id, *self._image_ids(codes, height, width), self.eoi_token_id]
        return [*self.bos_ids, *image, *self.encode(CAPTION_INSTRUCTION)]

    def question_ids(self, question: str, codes=None, height: int | None = None, width: int | None = None) -> list[int]:
        """The prompt for an answer about an image: one user turn of the chat template, the image before the question.

        Args:
            question (`str`): The question.
            codes (1-D or 2-D ints, *optional*): The image, as in `caption_ids`.
            height (`int`, *optional*): In pixels.
            width (`int`, *optional*): In pixels.
        """
        self.check_texts(question, "question")
        self.check_plain(question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self._marked_ids(prompt, iter([self._image_ids(codes, height, width)]), begins=True)

    def interleaved_ids(self, text: str, images: Sequence) -> list[int]:
        """A text with images in it: `bos` text `boi` codes `eoi` text ...

        Args:
            text (`str`): With one `<image>` mark per image.
            images (sequence of 1-D or 2-D ints): The codes of the images in reading order.

        Raises:
            ValueError: If marks and images differ in number, or the text contains one of the processor's image tokens.
        """
        self._check_marks([text], len(images))
        self.check_plain(text.replace(IMAGE_MARK, ""))
        return [*self.bos_ids, *self._marked_ids(text, map(self.codes_to_ids, images))]

    def conversation_ids(self, messages: Sequence[Mapping[str, Any]], images: Sequence) -> list[tuple[list[int], bool]]:
        """A conversation as the chat template writes it, in pieces: what is asked and what the assistant answers.

        Pieces are tokenized one by one, so that an answer begins as it does when the model generates it.

        Args:
            messages (sequence of mappings): With `role` and `content`: a string with `<image>` marks, or a list of
                parts `{"type": "image"}` and `{"type": "text", "text": ...}`. The first one is not the assistant's, the
                last one is.
            images (sequence of 1-D or 2-D ints): The codes of the images in reading order.

        Returns:
            Pairs of ids and whether they are an answer of the assistant, together the whole conversation.

        Raises:
            ValueError: If the messages are not as above, marks and images differ in number, or the template writes a
                turn in another way once others follow.
        """
        messages = list(messages)
        roles = [message.get("role") for message in messages]
        if not roles or roles[0] == "assistant" or roles[-1] != "assistant":
            raise ValueError(
                "A conversation must begin with a turn of another and must end with one of the assistant, got the "
                f"roles {roles}."
            )
        for content in (message.get("content") for message in messages):
            if not isinstance(content, str) and not is_column(content):
                raise ValueError(f"The content of a message must be a string or a list of parts, got {content!r}.")
            for part in content if not isinstance(content, str) else ():
                if part.get("type") == "text":
                    self.check_plain(part["text"])
            if isinstance(content, str):
                self.check_plain(content.replace(IMAGE_MARK, ""))
        texts, written = [], ""
        for turn in [turn for turn, role in enumerate(roles) if role == "assistant"]:
            prompt = self.apply_chat_template(messages[:turn], add_generation_prompt=True)
            answered = self.apply_chat_template(messages[: turn + 1])
            if not prompt.startswith(written) or not answered.startswith(prompt):
                raise ValueError(
                    f"The chat template writes what comes before message {turn} in another way once it follows, so "
                    "that its ids are no longer those of the prompt. Give the turns one by one, or change the template."
                )
            texts += [(prompt[len(written) :], False), (answered[len(prompt) :], True)]
            written = answered
        self._check_marks([written], len(images))
        image_ids = map(self.codes_to_ids, images)
        return [
            (self._marked_ids(text, image_ids, begins=index == 0), is_answer)
            for index, (text, is_answer) in enumerate(texts)
        ]

    @property
    def image_layout(self) -> ImageLayout:
        """Where the codes lie, and all arithmetic between pixels, codes and ids."""
        return ImageLayout(
            image_token_offset=self.image_token_offset,
            codebook_size=self.codebook_size,
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
            uncond_token_id=self.uncond_token_id,
            image_token_id=self.image_token_id,
            image_size=self.image_processor.size,
            downsample_factor=self.image_processor.downsample_factor,
        )

    def codes_to_ids(self, codes) -> list[int]:
        """Token ids of codes in reading order.

        Args:
            codes (list, `np.ndarray` or `torch.Tensor` of ints, 1-D or 2-D): Codes without offset.

        Raises:
            ValueError: If a code is outside the codebook, naming it and its position, or codes are no integers.
        """
        codes = as_integers(codes)
        if codes.ndim not in (1, 2) or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(
                f"codes must be integers in one or two dimensions, got shape {codes.shape} of type {codes.dtype}."
            )
        codes = torch.from_numpy(codes.reshape(-1).astype(np.int64))
        check_codes(codes, range(self.codebook_size))
        return self.image_layout.codes_to_ids(codes).tolist()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, without the tokens that the tokenizer adds around it unless asked for."""
        with _TOKENIZING:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @property
    def bos_ids(self) -> list[int]:
        """`[bos]`, or nothing if the tokenizer has none."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows. Pads are always masked, so that a tokenizer without one can use any id."""
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def _size_sentence(self, height: int | None, width: int | None) -> str:
        layout = self.image_layout
        height, width = layout.size(layout.grid(height, width))
        if height == width == layout.image_size:
            return ""
        return f"Image Size: Width is {width} Height is {height}."

    def _image_ids(self, codes, height: int | None = None, width: int | None = None) -> list[int]:
        """What stands between boi and eoi: an image's codes, or placeholders for them."""
        if codes is not None:
            return self.codes_to_ids(codes)
        return [self.image_token_id] * self.image_layout.num_codes(height, width)

    def _marked_ids(self, text: str, image_ids: Iterator[list[int]], begins: bool = False) -> list[int]:
        """Ids of a text with the next of `image_ids` in place of each mark, between boi and eoi.

        A text that begins a row gets what the tokenizer puts there, unless the chat template wrote it.
        """
        bos_token = self.tokenizer.bos_token
        has_bos = bos_token is not None and text.startswith(bos_token)
        text = text.replace(IMAGE_MARK, self.boi_token + self.image_token + self.eoi_token)
        ids, written = [], self.encode(text, add_special_tokens=begins and not has_bos)
        self.image_layout.check_ids(self.tokenizer, written, marks=text.count(self.image_token))
        for index in written:
            ids.extend(next(image_ids) if index == self.image_token_id else [index])
        return ids

    # Checks

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

    def check_texts(self, text: str | list[str], name: str) -> list[str]:
        """The texts as a list; raises a `ValueError` that calls them `name` unless they are strings with something in
        them."""
        text = text.tolist() if isinstance(text, np.ndarray) else text
        texts = list(text) if is_column(text) else [text]
        if not texts or not all(isinstance(sample, str) for sample in texts):
            raise ValueError(f"{name} must be a string or a list of strings, got {text!r}.")
        for index, sample in enumerate(texts):
            if not sample.strip():
                raise ValueError(f"{name} {index} is empty: write what it should say.")
        return texts

    def check_plain(self, text: str) -> None:
        """A text is text alone: no piece of an image, which is not there, and neither bos nor eos."""
        self._check_pieces(text)
        self.image_layout.check_ids(self.tokenizer, self.encode(text), ends=False)

    def _check_pieces(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"A text must be a string, got {text!r}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text {text!a} has half a character at position {error.start}: it was cut within one, or read "
                "in another encoding than its own."
            ) from error
        for token in (IMAGE_MARK, *self._image_tokens):
            if token in text:
                raise ValueError(f"The text {text!r} contains {token!r}, which is reserved for images: remove it.")

    def _check_prompts(self, text: str | list[str], name: str) -> list[str]:
        """As `check_texts`, for descriptions of pictures."""
        prompts = self.check_texts(text, name)
        bos_token = self.tokenizer.bos_token
        for prompt in prompts:
            if bos_token is not None and prompt.startswith(bos_token):
                raise ValueError(
                    f"The prompt begins with {bos_token!r}, which is added here: give a description alone."
                )
            self.check_plain(prompt)
        return prompts

    def _check_marks(self, texts: list[str], number: int, name: str = "The text") -> None:
        """Texts hold no pieces of images, but together one mark for each of `number` images."""
        for text in texts:
            self._check_pieces(text.replace(IMAGE_MARK, ""))
        if (marks := sum(text.count(IMAGE_MARK) for text in texts)) != number:
            raise ValueError(f"{name} has {marks} {IMAGE_MARK} marks for {number} images: write one mark per image.")

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
        """As in transformers, if what is saved can be loaded."""
        self.image_layout.check_vocabulary(self.tokenizer)
        return super().save_pretrained(save_directory, **kwargs)

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
            generated_outputs (`torch.Tensor`): Text mode: ids (B, T). Image mode: pixel values (B, 3, H, W) in
                [-1, 1], the result of `model.decode_image_tokens(ids)`.
            generation_mode (`str`, *optional*, defaults to `"text"`): `"text"` or `"image"`.
            output_type (`str`, defaults to `"pil"`): Image mode: `"pil"`, `"np"` or `"pt"`.
            kwargs: Text mode: arguments of the tokenizer's `batch_decode`; `skip_special_tokens` defaults to `True`.

        Returns:
            A list of `str`; or the images as the image processor's `postprocess` returns them.
        """
        if generation_mode is not None:
            check_generation_mode(generation_mode)
        if generation_mode == "image":
            return self.image_processor.postprocess(generated_outputs, output_type=output_type)
        return self.post_process_image_text_to_text(generated_outputs, **kwargs)

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
        **tokens,
    )
