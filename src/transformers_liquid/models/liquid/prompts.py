"""All prompts of the package, as lists of ids, for inference and for training alike.

They match the reference (FoundationVision/Liquid, liquid/train/train.py and evaluation/app.py) token for token.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...codecs.vq_model import check_codes
from ...generation.image_generation import pad_left
from .image_processing_liquid import is_column
from .vocabulary import IMAGE_MARK, as_integers


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
TOKENIZING = threading.RLock()


class TooLongError(ValueError):
    """What may not be cut is longer than `max_length`."""


def negative_texts(negative_prompt: Any) -> str | list[str]:
    """A negative prompt for all, or one each, empty for none; raises a `ValueError` for what is neither."""
    texts = negative_prompt.tolist() if isinstance(negative_prompt, np.ndarray) else negative_prompt
    texts = "" if texts is None else texts
    if is_column(texts):
        texts = ["" if text is None or text != text else text for text in texts]  # tables have NaN for none
    if not all(isinstance(text, str) for text in (texts if isinstance(texts, list) else [texts])):
        raise ValueError(f"negative_prompt must be a string or a list of strings, got {negative_prompt!r}.")
    return texts


def with_marks(text: str, number: int) -> str:
    """A text with marks for pictures in front, unless it says itself where they stand."""
    return text if IMAGE_MARK in text else f"{IMAGE_MARK} " * number + text


def images_in(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images that messages hold, in reading order; raises a `ValueError` for one that is not there."""
    images = []
    for message in messages:
        for part in () if isinstance(message["content"], str) else message["content"]:
            given = [part[name] for name in ("image", "url", "path", "base64") if part.get(name) is not None]
            if part["type"] == "image" and len(given) != 1:
                raise ValueError(f"An image is given as 'image', 'url', 'path' or 'base64', got the part {part!r}.")
            images += given
    return images


def parts_of(message: Any) -> list[dict[str, Any]]:
    """The texts and pictures of a message; raises a `ValueError` unless it has a role, which is a word, and these alone."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not re.fullmatch(r"\w+", role):
        raise ValueError(f"A message must have a 'role', such as user, and a 'content', got {message!r}.")
    content = message.get("content")
    if not isinstance(content, str) and not is_column(content):
        raise ValueError(f"The content of a message must be a string or a list of parts, got {content!r}.")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise ValueError(f"A part of a message must be of type text or image, got {part!r}.")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"A text must be a string, got {part.get('text')!r}.")
    return [dict(part) for part in parts]


class LiquidPrompts:
    """What [`LiquidProcessor`] knows of prompts: of its tokenizer, its four image tokens and its layout."""

    def image_prompts(
        self,
        text: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        name: str = "text",
        images: Sequence[list[int]] = (),
        instruction: str = TEXT_TO_IMAGE_INSTRUCTIONS[0],
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts of a batch of pictures and what guidance leads away from, before they are padded.

        Args:
            text, negative_prompt, height, width: As in a call with `generation_mode="image"`.
            name (`str`, defaults to `"text"`): What an error calls `text`.
            images (list of lists of `int`): Ids of the images of all marks in reading order, or placeholders.
            instruction (`str`, *optional*): One of `TEXT_TO_IMAGE_INSTRUCTIONS`.

        Returns:
            Ids of the prompts as in `image_prompt_ids`; and, one for each, of the negative or unconditional prompts.

        Raises:
            ValueError: As in a call.
        """
        texts, images = self._check_prompts(text, name, marks=len(images)), list(images)
        ending = self._size_sentence(height, width) + instruction
        own = [[images.pop(0) for _ in range(prompt.count(IMAGE_MARK))] for prompt in texts]
        prompts = [self._image_prompt(*pair, ending) for pair in zip(texts, own, strict=True)]
        return prompts, self._negative_prompts(negative_prompt, own, ending, height, width)

    def _negative_prompts(
        self, negative_prompt, own: list[list[list[int]]], ending: str, height: int | None, width: int | None
    ) -> list[list[int]]:
        """What guidance leads away from, for each prompt and the images that it has of its `own`."""
        negatives = negative_texts(negative_prompt)
        negatives = [negatives] * len(own) if isinstance(negatives, str) else negatives
        if len(negatives) != len(own):
            raise ValueError(f"Got {len(negatives)} negative prompts for {len(own)} prompts: give one, or one each.")
        found = []
        for negative, images in zip(negatives, own, strict=True):
            if negative == "":  # user interfaces send an empty one for none
                found.append(self.unconditional_ids(height, width))
                continue
            marks = len(images) if IMAGE_MARK in negative else 0
            self._check_prompts(negative, "negative_prompt", marks)
            found.append(self._image_prompt(negative, images, ending))
        return found

    def _texts_to_follow(self, text, images) -> tuple[list[str], Any]:
        """Texts or conversations, checked, as texts with marks; and their images, unless given those in the messages."""
        if isinstance(text, (list, tuple)) and text and not isinstance(text[0], str):
            conversations = [text] if isinstance(text[0], Mapping) else text
            for one in conversations:
                self.check_messages(one)
            images = [images_in(one) for one in conversations] if images is None else images
            text = [self.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
        else:
            bos = self.tokenizer.bos_token or ""
            for one in self.check_texts(text, "text"):
                self.check_plain(one.removeprefix(bos).replace(IMAGE_MARK, ""))
        texts = self.check_texts(text, "text")
        self.validate_inputs([] if images is None else images, texts)
        return texts, images

    def _interleaved_prompts(
        self, texts: list[str], image_ids: list[list[int]], negative_prompt, height: int | None, width: int | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """As `image_prompts`, of texts that pictures and texts are to follow."""
        left = list(image_ids)
        own = [[left.pop(0) for _ in range(one.count(IMAGE_MARK))] for one in texts]
        prompts = [self._marked_ids(one, iter(ids), begins=True) for one, ids in zip(texts, own, strict=True)]
        ending = self._size_sentence(height, width) + TEXT_TO_IMAGE_INSTRUCTIONS[0]
        return prompts, self._negative_prompts(negative_prompt, own, ending, height, width)

    def pad_left(self, sequences: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts of one length, pads before them, and their masks."""
        ids, mask = pad_left(sequences, "cpu", self.pad_token_id)
        return ids.tolist(), mask.tolist()

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
        return self._image_prompt(prompt, (), self._size_sentence(height, width) + instruction, max_length)

    def _image_prompt(
        self, prompt: str, images: Sequence[list[int]], ending: str, max_length: int | None = None
    ) -> list[int]:
        ids = [*self.bos_ids, *self._marked_ids(prompt + ending, iter(images)), self.boi_token_id]
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
        return self.turn_ids(content, iter([self._image_ids(codes, height, width)]))

    def turn_ids(self, content: str | list[dict[str, Any]], images: Iterator[list[int]]) -> list[int]:
        """The prompt for an answer to one turn.

        Args:
            content (`str` or list of `dict`): A text with `<image>` marks, or parts as in `conversation_ids`.
            images (iterator of lists of `int`): Ids for the marks, of which this takes as many as it has.
        """
        prompt = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self._marked_ids(prompt, images, begins=True)

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
        self.check_messages(messages)
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

    def codes_to_ids(self, codes) -> list[int]:
        """Token ids of codes in reading order.

        Args:
            codes (list, `np.ndarray` or `torch.Tensor` of ints, 1-D or 2-D): Codes without offset; with K codes a
                position after a first dimension of K. A placeholder then stands for those of each position.

        Raises:
            ValueError: If a code is outside the codebook, naming it and its position, or codes are no integers.
        """
        codes = as_integers(codes)
        of_position = self.image_layout.of_position
        is_shape = codes.ndim - len(of_position) in (1, 2) and codes.shape[: len(of_position)] == of_position
        if not is_shape or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            several = f" after {self.num_codebooks} codes a position" if of_position else ""
            raise ValueError(
                f"codes must be integers in one or two dimensions{several}, got shape {codes.shape} of type {codes.dtype}."
            )
        codes = torch.from_numpy(codes.reshape(*of_position, -1).astype(np.int64))
        check_codes(codes, range(self.codebook_size))
        return self.image_layout.sequence_ids(codes).tolist()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, without the tokens that the tokenizer adds around it unless asked for."""
        with TOKENIZING:
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

    def check_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises a `ValueError` unless messages have a role, which is a word, and text and pictures as content."""
        if not len(messages):
            raise ValueError("A conversation needs at least one message, got none.")
        for message in messages:
            for part in parts_of(message):
                if part["type"] == "text":
                    has_marks = isinstance(message["content"], str)
                    self.check_plain(part["text"].replace(IMAGE_MARK, "") if has_marks else part["text"])

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

    def _check_prompts(self, text: str | list[str], name: str, marks: int = 0) -> list[str]:
        """As `check_texts`, for descriptions of pictures that have so many marks of images together."""
        prompts = self.check_texts(text, name)
        bos_token = self.tokenizer.bos_token
        for prompt in prompts:
            if bos_token is not None and prompt.startswith(bos_token):
                raise ValueError(
                    f"The prompt begins with {bos_token!r}, which is added here: give a description alone."
                )
            self.check_plain(prompt.replace(IMAGE_MARK, "") if marks else prompt)
        if marks:
            self._check_marks(prompts, marks, name)
        return prompts

    def _check_marks(self, texts: list[str], number: int, name: str = "The text") -> None:
        """Texts hold no pieces of images, but together one mark for each of `number` images."""
        for text in texts:
            self._check_pieces(text.replace(IMAGE_MARK, ""))
        if (marks := sum(text.count(IMAGE_MARK) for text in texts)) != number:
            raise ValueError(f"{name} has {marks} {IMAGE_MARK} marks for {number} images: write one mark per image.")
