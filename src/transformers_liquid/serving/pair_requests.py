"""A picture as a pair of requests to an engine that knows none, and how both get the code that guidance draws."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from ..generation.guidance import GuidanceLogitsProcessor
from ..generation.sampling import draw_codes, gumbel_noise
from ..generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG, ImageGenerationConfig
from ..models.liquid.processing_liquid import LiquidProcessor


# What a request says of a picture begins so, among arguments of other plug-ins.
PREFIX = "liquid_"
OWN = ("picture", "seed", "unconditional")
# vLLM's HTTP server makes numbers of these.
SWITCHES = ("do_sample", "renormalize_logits", "remove_invalid_values")
# What a request does not say is left out.
_DRAWN = dict.fromkeys(DEFAULT_IMAGE_GENERATION_CONFIG) | {"do_sample": True}
_NO_DEFAULTS = GenerationConfig(image_generation_config=_DRAWN)
# An engine forwards one position of two sequences at a time.
NOT_HERE = ("speculative", "height", "width", "guidance_context", "image_guidance_scale", "num_return_sequences")


def picture_requests(
    processor: LiquidProcessor,
    prompt: str,
    seed: int,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    generation_config: GenerationConfig | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """The requests of one picture: of its prompt, and with guidance of what guidance leads away from.

    Args:
        processor ([`LiquidProcessor`]): The model's.
        prompt (`str`): What the picture shows.
        seed (`int`): Of the picture: the same as `pipe(prompt, seed=seed)`.
        negative_prompt (`str`, *optional*): What it should not show.
        height, width (`int`, *optional*): In pixels; by default the model's.
        generation_config (`GenerationConfig`, *optional*): The model's, whose settings of pictures count.
        settings: Others than these, as in [`LiquidForCausalLM.generate`]: `guidance_scale`, `temperature`, ...

    Returns:
        One or two mappings with `prompt_token_ids` and `sampling_params`, the arguments of vLLM's `SamplingParams`; its
        HTTP server calls `extra_args` `vllm_xargs`. Each answers with all ids of the picture, which are the same, or, if
        it failed, with fewer.

    Raises:
        ValueError: If the prompt, the size or a setting cannot be met.
    """
    (ids,), (negative,) = processor.image_prompts([prompt], negative_prompt, height=height, width=width)
    layout = processor.image_layout
    settings = ImageGenerationConfig.from_call(generation_config, None, settings)[0].to_dict()
    settings.pop("caption_first", None)  # a prompt alone has no pictures in its context
    settings |= {"seed": seed, "picture": uuid.uuid4().hex, "unconditional": negative}
    arguments = {PREFIX + name: one for name, one in settings.items() if one is not None}
    prompts = [ids, negative] if PairedPicture.check(arguments).guidance_scale > 1 else [ids]
    params = {
        "temperature": 0.0,  # the engine takes the one id that is left to it
        "ignore_eos": True,
        "max_tokens": layout.num_codes(height, width),
        "stop_token_ids": [layout.eoi_token_id],
        "detokenize": False,
        "extra_args": arguments,
    }
    return [{"prompt_token_ids": one, "sampling_params": params} for one in prompts]


@dataclass
class PairedPicture:
    """A sequence of a picture, and where it stands.

    Args:
        arguments (`Mapping`): The request's `extra_args`.
        prompt_ids (sequence of `int`): Of the sequence: those of `liquid_unconditional` make it the unconditional one.
    """

    arguments: Mapping[str, Any]
    prompt_ids: Sequence[int]

    def __post_init__(self) -> None:
        self.settings = self.check(self.arguments)
        self.name = self.arguments.get(f"{PREFIX}picture", id(self))
        self.is_unconditional = list(self.arguments.get(f"{PREFIX}unconditional", [])) == list(self.prompt_ids)
        self.is_guided = self.settings.guidance_scale > 1
        self.generator, self.drawn = None, 0

    @staticmethod
    def check(arguments: Mapping[str, Any] | None) -> ImageGenerationConfig | None:
        """The settings of a picture; `None` of a request for something else.

        Raises:
            ValueError: If one is unknown or impossible, or a pair lacks what makes it one.
        """
        given = {name.removeprefix(PREFIX): one for name, one in (arguments or {}).items() if name.startswith(PREFIX)}
        if not given:
            return None
        if found := [name for name in NOT_HERE if given.get(name) is not None]:
            raise ValueError(f"{', '.join(found)} cannot be set for a picture that an engine draws.")
        seed = given.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"{PREFIX}seed must be a whole number, got {seed!r}.")
        told = {name: one for name, one in given.items() if name not in OWN}
        told |= {name: bool(told[name]) for name in SWITCHES if told.get(name) in (0, 1)}
        settings, others = ImageGenerationConfig.from_call(_NO_DEFAULTS, None, told)
        if others:
            raise ValueError(f"{', '.join(sorted(PREFIX + name for name in others))} is no setting of a picture.")
        if settings.guidance_scale > 1 and not (given.get("picture") and given.get("unconditional")):
            raise ValueError(
                f"With guidance a picture is two requests of one {PREFIX}picture (its name) and {PREFIX}unconditional (the "
                "ids of the second one's prompt): `picture_requests` makes them."
            )
        return settings

    @cached_property
    def rules(self) -> tuple[GuidanceLogitsProcessor | None, LogitsProcessorList]:
        """Guidance, and the filters that `generate()` would use."""
        settings, guidance = self.settings, None
        if self.is_guided:
            guidance = GuidanceLogitsProcessor(settings.guidance_scale, settings.guidance_min_p)
        return guidance, GenerationMixin()._get_logits_processor(GenerationConfig(**settings.of_transformers))

    @cached_property
    def kind(self) -> str:
        """What pictures that are drawn side by side have in common."""
        return json.dumps(self.settings.to_dict(), sort_keys=True)

    def noise(self, position: int, size: int, device: torch.device) -> torch.Tensor | None:
        """Gumbel noise `(1, size)` of one position; after a preemption from the first on."""
        if not self.settings.of_transformers.get("do_sample"):
            return None
        if self.generator is None or self.drawn > position:
            self.generator, self.drawn = torch.Generator().manual_seed(self.arguments[f"{PREFIX}seed"]), 0
        while self.drawn <= position:
            noise = gumbel_noise([self.generator], 1, 1, size, device)[0]
            self.drawn += 1
        return noise


class PairDrawer:
    """Leaves to the sequences of pictures one id each, that of the next code; the same one to both of a pair.

    A sequence without its partner, or at another position than it, gets the id that ends pictures: the request ends
    too early, and so is known to have failed.

    Args:
        layout (`Mapping`): What an exported configuration says: `image_token_offset`, `codebook_size`, `eoi_token_id`.
    """

    def __init__(self, layout: Mapping[str, int]) -> None:
        self.eoi_token_id, first = layout["eoi_token_id"], layout["image_token_offset"]
        self.codes = slice(first, first + layout["codebook_size"])

    def __call__(self, logits: torch.Tensor, sequences: Mapping[int, tuple[PairedPicture, int]]) -> None:
        """Changes logits in place.

        Args:
            logits (`torch.Tensor` of shape `(R, vocabulary)`): Of the batch.
            sequences (mapping): Of some of its rows: the picture and the position of the next code.
        """
        sides: dict[tuple[Any, int], dict[bool, int]] = defaultdict(dict)
        for row, (picture, position) in sequences.items():
            sides[picture.name, position][picture.is_unconditional] = row
        rows, ids, of_kind = [], [], defaultdict(list)
        for pair in sides.values():
            picture = sequences[next(iter(pair.values()))][0]
            if picture.is_guided == (len(pair) == 2):
                of_kind[picture.kind].append([pair[side] for side in sorted(pair)])
            else:
                rows += pair.values()
                ids += [self.eoi_token_id] * len(pair)
        for pairs in of_kind.values():
            drawn = [sequences[pair[0]] for pair in pairs]
            own = [row for side in zip(*pairs, strict=True) for row in side]  # all conditional ones, then the others
            scores = logits[own, self.codes][:, None]
            noises = [one.noise(position, scores.shape[-1], logits.device) for one, position in drawn]
            noise = None if noises[0] is None else torch.stack(noises)
            codes, _ = draw_codes(scores, None, *drawn[0][0].rules, noise)
            rows += own
            found = [self.eoi_token_id if code < 0 else self.codes.start + code for code in codes[:, 0].tolist()]
            ids += found * (len(own) // len(found))
        logits[rows] = -torch.inf
        logits[rows, ids] = 0.0
