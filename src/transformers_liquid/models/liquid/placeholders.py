"""Pictures in the inputs of a model: encoded, and put where their placeholders are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PlacesPictures:
    """What [`LiquidModel`] does with pictures before its language model runs."""

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
        """Turns pictures into image token ids.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)` or a list of N tensors `(3, H, W)`): In [-1, 1].

        Returns:
            N tensors of ids `(n,)`, one for each code, row by row; of codes `(K, n)` with K codes a position.

        Raises:
            ValueError: If the codec was rounded, or something is NaN or infinite.
        """
        if self.vq_model.dtype != torch.float32:
            raise ValueError(
                f"The codec is in {self.vq_model.dtype}, in which it gives other codes: load the model with "
                "`from_pretrained`, which keeps it in float32 whatever the `dtype`."
            )
        if isinstance(pixel_values, torch.Tensor):
            codes = self.vq_model.encode_codes(pixel_values)
            return list(self.config.image_layout.codes_to_ids(codes).flatten(-2))
        return [self.encode_images(picture[None])[0] for picture in pixel_values]

    def fill_image_placeholders(
        self, input_ids: torch.LongTensor, pixel_values: torch.Tensor | list[torch.Tensor]
    ) -> torch.LongTensor:
        """Replaces every run of placeholders with the ids of the next picture.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): With one run of `image_token_id` per picture.
            pixel_values: The pictures in reading order, as in [`~LiquidModel.encode_images`].

        Raises:
            ValueError: If the runs and the pictures do not match, saying which and where.
        """
        if input_ids is None:
            raise ValueError("pixel_values need input_ids or inputs_embeds: placeholders say where the images go.")
        pictures = self.encode_images(pixel_values)
        is_placeholder = self._check_placeholders(input_ids, pictures)
        if not pictures:
            return input_ids
        return input_ids.masked_scatter(is_placeholder, torch.cat(pictures).to(input_ids))

    def embed_pictures(
        self, input_ids: torch.LongTensor, image_codes: torch.LongTensor | list[torch.LongTensor]
    ) -> torch.Tensor:
        """Embeddings `(B, L, hidden)` of ids, in which each run of placeholders is the next picture of several codes a
        position; pictures `(N, K, n)`, or a list of N of different sizes `(K, n)`. Raises as
        [`~LiquidModel.fill_image_placeholders`]."""
        embeds = self.get_input_embeddings()(input_ids.clamp(min=0))
        is_placeholder = self._check_placeholders(input_ids, image_codes)
        if not len(image_codes):  # as in `CodeHead.loss`
            return embeds + 0 * self.code_embedder(input_ids.new_zeros(1, self.config.num_codebooks, 1)).sum()
        batches = [image_codes] if isinstance(image_codes, torch.Tensor) else [one[None] for one in image_codes]
        embedded = [self.code_embedder(one.to(embeds.device)).flatten(0, 1) for one in batches]
        return embeds.masked_scatter(is_placeholder[..., None], torch.cat(embedded).to(embeds))

    def _check_placeholders(self, input_ids: torch.LongTensor, pictures: Any) -> torch.BoolTensor:
        """Where placeholders are; raises a `ValueError` unless each run of them is as long as the next picture."""
        is_placeholder = input_ids == self.config.image_token_id
        edges = nn.functional.pad(is_placeholder.int(), (1, 1)).diff(dim=1)
        starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
        if len(starts) != len(pictures):
            raise ValueError(f"The prompts have room for {len(starts)} images, but {len(pictures)} were given.")
        for index, ((sequence, start), (_, end), picture) in enumerate(zip(starts, ends, pictures, strict=True)):
            if picture.shape[:-1] != self.config.image_layout.of_position:
                raise ValueError(
                    f"Image {index} has codes of shape {tuple(picture.shape)}, but the model has "
                    f"{self.config.num_codebooks} a position."
                )
            if end - start != picture.shape[-1]:
                raise ValueError(
                    f"Image {index} has {picture.shape[-1]} codes, but its place in sequence {sequence} from position "
                    f"{start} on has {end - start} placeholders. Prepare text and images with one call of the processor."
                )
        return is_placeholder

    def fill_image_embeds(
        self, inputs_embeds: torch.Tensor, pixel_values: torch.Tensor | list[torch.Tensor]
    ) -> torch.Tensor:
        """As [`~LiquidModel.fill_image_placeholders`], where placeholders are known by their embedding, `(B, L, hidden)`."""
        embed = self.get_input_embeddings()
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        is_placeholder = (inputs_embeds == embed(placeholder)).all(-1)
        ids = torch.where(is_placeholder, placeholder, -1)
        if self.code_embedder is None:
            filled = embed(self.fill_image_placeholders(ids, pixel_values).clamp(min=0))
        else:
            filled = self.embed_pictures(ids, self.encode_images(pixel_values))
        return torch.where(is_placeholder[..., None], filled, inputs_embeds)

    def _text_inputs(self, input_ids, pixel_values, inputs_embeds, cache, image_codes) -> dict[str, Any]:
        """What the base model is given in place of ids, pictures and a cache."""
        if image_codes is not None:
            if self.code_embedder is None or pixel_values is not None or input_ids is None:
                raise ValueError(
                    "image_codes stand beside input_ids for codecs of several codes a position, in place of pixel_values."
                )
            input_ids, inputs_embeds = None, self.embed_pictures(input_ids, image_codes)
        elif pixel_values is not None and inputs_embeds is not None and input_ids is None:
            inputs_embeds = self.fill_image_embeds(inputs_embeds, pixel_values)
        elif pixel_values is not None and self.code_embedder is not None:
            input_ids, inputs_embeds = None, self.embed_pictures(input_ids, self.encode_images(pixel_values))
        elif pixel_values is not None:
            input_ids = self.fill_image_placeholders(input_ids, pixel_values)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if cache is not None:
            inputs[self._cache_argument] = cache
        return inputs
