"""Writing with vokens: runs that are whole, and the pieces of a reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

import torch
from transformers import LogitsProcessor


@dataclass
class VokenRunLogitsProcessor(LogitsProcessor):
    """After the first voken come the others in their order, and they come nowhere else.

    Where the next token follows from the last one alone, as it does here, batches, beams and caches of any kind need no
    care. Put it last, so that nothing penalizes or ends a run.

    Args:
        voken_token_ids (sequence of `int`): The vokens in their order.
        num_images (`int`, defaults to 0): At least so many runs: until then a picture is put in place of the end, and where
            there is just room for those that are missing.
        eos_token_ids (sequence of `int`, defaults to none): What ends a text.
        prompt_length (`int`, defaults to 0): Runs before this position do not count.
        max_new_tokens (`int`, *optional*): Room for text and runs together; needed for `num_images`.
    """

    voken_token_ids: Sequence[int]
    num_images: int = 0
    eos_token_ids: Sequence[int] = ()
    prompt_length: int = 0
    max_new_tokens: int = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        (first, *others), eos = self.voken_token_ids, list(self.eos_token_ids)
        scores = scores.clone()
        if self.num_images:
            new = input_ids[:, self.prompt_length :]
            missing = self.num_images - (new == first).sum(1)
            room = self.max_new_tokens - new.shape[1]
            ends = scores[:, [first, *eos]].amax(1)
            scores[:, first] = ends.where(missing > 0, scores[:, first])
            scores[:, eos] = scores[:, eos].masked_fill((missing > 0)[:, None], -torch.inf)
            is_last_chance = (missing > 0) & (missing * len(self.voken_token_ids) >= room)
            scores = self._only(scores, torch.full_like(missing, first), is_last_chance)
        scores[:, others] = -torch.inf
        if not others or not input_ids.shape[1]:
            return scores
        vokens = torch.tensor(self.voken_token_ids, device=scores.device)
        is_last = input_ids[:, -1:] == vokens[:-1]
        return self._only(scores, vokens[1:][is_last.int().argmax(1)], is_last.any(1))

    def _only(self, scores: torch.Tensor, ids: torch.LongTensor, where: torch.BoolTensor) -> torch.Tensor:
        """Leaves one token, with probability 1, to the sequences of `where`."""
        only = torch.full_like(scores, -torch.inf).scatter(1, ids[:, None], 0.0)
        return only.where(where[:, None], scores)


def finished(
    ids: Sequence[int], voken_token_ids: Sequence[int], eos_token_ids: Sequence[int], pad_token_id: int | None = None
) -> list[int]:
    """A reply without what ends and what fills it; a run that was cut off is completed, since its tokens are known."""
    ids = list(takewhile(lambda one: one not in eos_token_ids, ids))
    while ids and ids[-1] == pad_token_id:  # elsewhere it is a token like others
        ids.pop()
    if ids and ids[-1] in voken_token_ids:
        ids += voken_token_ids[voken_token_ids.index(ids[-1]) + 1 :]
    return ids


def segments(ids: Sequence[int], voken_token_ids: Sequence[int]) -> Iterator[list[int] | None]:
    """The pieces of a reply with whole runs, in order: ids of a text, `None` for a picture."""
    for is_voken, piece in groupby(ids, lambda one: one in voken_token_ids):
        if is_voken:
            yield from (None for one in piece if one == voken_token_ids[0])
        else:
            yield list(piece)
