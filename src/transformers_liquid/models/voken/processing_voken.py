"""The processor of a model with vokens: the base's own, with vokens kept out of what users write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import snapshot_download
from transformers import AutoProcessor, AutoTokenizer, BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin  # diffusers looks for it here
from transformers.utils import PROCESSOR_NAME

from ...utils.files import check_keys, read_json, write_json
from ...utils.hub import HUB_ARGUMENTS, hub_arguments, part_of
from ..liquid.chat_template import read_template
from ..liquid.image_processing_liquid import flatten_images, is_column, to_rgb
from ..liquid.prompts import parts_of


# With a dot, since diffusers takes names apart at it where it looks for variants of weights.
BASE_FOLDER = "base.processor"


class VokenProcessor(ProcessorMixin):
    r"""Builds the inputs of a [`VokenForConditionalGeneration`] with the base's own processor, and reads its outputs.

    A picture in a prompt, a user's or one that was drawn before, is read: in text it is the base's own placeholder. A
    picture to draw is a run of vokens, which is written as ids and never as text.

    Args:
        base (`ProcessorMixin` or `PreTrainedTokenizerBase`): The base's processor, or its tokenizer if it reads no
            pictures.
        voken_token_ids (list of `int`): The vokens in their order.
        chat_template (`str`, *optional*): Defaults to the base's; without one, messages are put one after the other.

    Example:

    ```python
    >>> inputs = processor(text="<image> What comes next?", images=picture)
    >>> messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Next?"}]}]
    >>> inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    >>> ids = model.generate(**inputs, max_new_tokens=64)
    ```
    """

    def __init__(self, base=None, voken_token_ids: list[int] | None = None, chat_template: str | None = None) -> None:
        super().__init__()
        self.base, self.voken_token_ids = base, list(voken_token_ids)
        self.tokenizer = getattr(base, "tokenizer", base)
        self.image_processor = getattr(base, "image_processor", None)
        token = getattr(base, "image_token", None)
        self.image_token = None if token is None else str(token)
        own = getattr(base, "chat_template", None) or self.tokenizer.chat_template
        # For bases without a template: what the messages say, and nothing around it.
        plain = read_template("plain", "voken").replace("IMAGE", repr(self.image_token or ""))
        self.chat_template = chat_template or own or plain
        tokens = self.tokenizer.convert_ids_to_tokens(self.voken_token_ids)
        if None in tokens or len({*tokens}) < len(tokens):
            raise ValueError(f"The tokenizer has no tokens for all vokens {self.voken_token_ids}: see `add_vokens`.")

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prepares prompts.

        Args:
            images (`ImageInput`, *optional*): The pictures of all placeholders in reading order, flat or one list per
                text.
            text (`str` or list of `str`): Prompts, with one placeholder of the base (`processor.image_token`) for each
                picture.
            kwargs: Of the base's processor. Prompts are padded on the left, and tensors are returned, by default.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` of shape `(B, T)`, and what the base's processor makes of
            pictures.

        Raises:
            ValueError: If there are more or fewer pictures than placeholders, the base reads none, or a text has vokens.
        """
        texts = [*text] if is_column(text) else [text]
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"Prompts are a text or a list of texts, got {text!r}.")
        images = [] if images is None else images
        is_nested = is_column(images) and any(map(is_column, images))
        of_each = [[to_rgb(one) for one in flatten_images(own)] for own in (images if is_nested else [images])]
        images, numbers = of_each if is_nested else of_each[0], [*map(len, of_each)]
        marks = [0 if self.image_token is None else one.count(self.image_token) for one in texts]
        if numbers != (marks if len(numbers) == len(texts) else [sum(marks)]):
            reads = f"one {self.image_token} in the text" if self.image_token else "a base that reads pictures"
            raise ValueError(f"Got {numbers} pictures for texts with {marks} places for them: each needs {reads}.")
        kwargs = {"return_tensors": "pt", "padding": len(texts) > 1, "padding_side": "left", **kwargs}
        if not sum(numbers):
            inputs = self.base(text=texts, **kwargs)
        elif getattr(self.base, "num_query_tokens", None):  # BLIP-2's puts pictures in front of every text
            expanded = self.image_token * self.base.num_query_tokens
            inputs = self.tokenizer([one.replace(self.image_token, expanded) for one in texts], **kwargs)
            inputs |= self.image_processor(list(flatten_images(images)), return_tensors="pt")
        else:
            inputs = self.base(images=images, text=texts, **kwargs)
        if self.base is self.tokenizer:
            inputs.pop("token_type_ids", None)
        ids = {int(one) for row in inputs["input_ids"] for one in row}
        if vokens := self.tokenizer.convert_ids_to_tokens(sorted(ids & {*self.voken_token_ids})):
            raise ValueError(f"A text has {', '.join(vokens)}, which only the model writes: remove it.")
        return BatchFeature(dict(inputs))

    def apply_chat_template(self, conversation: list[dict] | list[list[dict]], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; chat templates of bases that read no pictures get contents as plain texts, as they know them.

        Raises:
            ValueError: If there is a picture and the base reads none.
        """
        return super().apply_chat_template(self._known(conversation), *args, **kwargs)

    def _known(self, message: Any) -> Any:
        if isinstance(message, (list, tuple)):
            return [self._known(one) for one in message]
        parts = parts_of(message)
        if self.image_token is not None or isinstance(message["content"], str):
            return message
        if any(part["type"] != "text" for part in parts):
            raise ValueError("A message has a picture, which needs a base that reads pictures.")
        return {**message, "content": "".join(part["text"] for part in parts)}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the base's processor in a folder, and beside it which ids are vokens."""
        folder = Path(save_directory)
        self.base.save_pretrained(folder / BASE_FOLDER)
        config = {"processor_class": "VokenProcessor", "voken_token_ids": self.voken_token_ids}
        config |= {"chat_template": self.chat_template, "is_tokenizer": self.base is self.tokenizer}
        write_json(folder / PROCESSOR_NAME, config)
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> VokenProcessor:
        """Loads the processor that this class saved, or that of a pipeline's whole repository; `kwargs` are the base's."""
        where = hub_arguments(part_of(pretrained_model_name_or_path, "processor", kwargs))
        folder, root = where.pop("subfolder", ""), pretrained_model_name_or_path
        if not os.path.isdir(root):  # transformers finds no tokenizer in a folder within a folder of the Hub
            files = [f"{folder}/{name}".lstrip("/") for name in (PROCESSOR_NAME, "base*/*")]
            root = snapshot_download(root, allow_patterns=files, **where)
        folder = Path(root, folder)
        config = read_json(folder / PROCESSOR_NAME)
        check_keys(str(folder / PROCESSOR_NAME), config, ("voken_token_ids", "chat_template", "is_tokenizer"))
        kwargs = {name: one for name, one in kwargs.items() if name not in HUB_ARGUMENTS}
        base = max(folder.glob("base*"), default=folder / BASE_FOLDER)  # once, it was `base`
        base = (AutoTokenizer if config["is_tokenizer"] else AutoProcessor).from_pretrained(base, **kwargs)
        return cls(base, config["voken_token_ids"], config["chat_template"])

    # Outputs

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Text of each row of ids; see the tokenizer's `batch_decode`."""
        if skip_special_tokens:  # vokens may be tokens that the base reserved, not all of which are marked as special
            sequences = [[int(one) for one in row if one not in self.voken_token_ids] for row in sequences]
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs, generation_mode: str | None = None, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[Any]:
        """Texts of ids `(B, T)`, or for `generation_mode="image"` pictures of pixels `(B, 3, H, W)` in [0, 1]."""
        if generation_mode == "image":
            return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(generated_outputs.float()))
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
