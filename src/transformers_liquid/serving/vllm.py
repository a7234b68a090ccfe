"""Stock vLLM draws the pictures of a model that `export_base_model` wrote: a logits processor and a scheduler, by flags.

    python -m vllm.entrypoints.openai.api_server --model EXPORTED \\
        --logits-processors transformers_liquid.serving.vllm:LiquidLogitsProcessor \\
        --scheduler-cls transformers_liquid.serving.vllm.PairScheduler

A picture with guidance is two requests ([`picture_requests`]). The scheduler lets both begin in one step, the processor gives
both the same ids. Tested with vLLM 0.32, whose interface for schedulers is not public.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor

from .pair_requests import PREFIX, PairDrawer, PairedPicture


# How long, in seconds, half a picture waits for the other.
PATIENCE = 10.0


class LiquidLogitsProcessor(LogitsProcessor, SecondLogitsProcessor):
    """Draws codes for both of vLLM's model runners; beside models without codes it does nothing.

    The first runner makes it with device and pinning and tells by `update_state` which rows there are; the second one
    makes it with the states of its requests, and tells by `add_request` and the context of `apply`.
    """

    def __init__(self, vllm_config: Any, *others: Any) -> None:
        layout = getattr(vllm_config.model_config.hf_config, "liquid_layout", None)
        self.drawer = None if layout is None else PairDrawer(layout)
        self.states = others[0] if len(others) == 1 else None
        self.rows: dict[int, tuple[PairedPicture, list[int]]] = {}  # of the first runner: and the ids so far
        self.slots: dict[int, tuple[PairedPicture, int]] = {}  # of the second runner: and the length of the prompt

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses what cannot be drawn, before the request is taken."""
        if PairedPicture.check(sampling_params.extra_args) is not None and sampling_params.n > 1:
            raise ValueError("n must be 1: each picture is a request, or a pair of them, of its own.")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        for index in batch_update.removed if batch_update else ():
            self.rows.pop(index, None)
        for index, params, prompt_ids, output_ids in batch_update.added if batch_update else ():
            self.rows.pop(index, None)
            if self._draws(params):
                self.rows[index] = PairedPicture(params.extra_args, prompt_ids), output_ids
        for first, second, direction in batch_update.moved if batch_update else ():
            one, other = self.rows.pop(first, None), self.rows.pop(second, None)
            self.rows |= {} if one is None else {second: one}
            self.rows |= {} if other is None or direction != MoveDirectionality.SWAP else {first: other}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.slots.pop(req_idx, None)
        if self._draws(sampling_params):
            length = int(self.states.prompt_len.np[req_idx])
            ids = self.states.all_token_ids.gpu[req_idx, :length].tolist()
            self.slots[req_idx] = PairedPicture(sampling_params.extra_args, ids), length
        return req_idx in self.slots

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        if context is None:
            found = {row: (picture, len(ids)) for row, (picture, ids) in self.rows.items() if row < len(logits)}
        else:
            lengths = zip(context.idx_mapping_np.tolist(), context.seq_lens_upper_bound_np.tolist(), strict=True)
            of_rows = [
                (row, *self.slots[slot], length) for row, (slot, length) in enumerate(lengths) if slot in self.slots
            ]
            found = {row: (one, length - prompt) for row, one, prompt, length in of_rows if length >= prompt}
        if found:
            self.drawer(logits, found)
        return logits

    def _draws(self, sampling_params: Any) -> bool:
        return self.drawer is not None and PairedPicture.check(sampling_params.extra_args) is not None


def pair_of(request: Any) -> str | None:
    """The name of the picture of which a request is a half."""
    arguments = getattr(request.sampling_params, "extra_args", None) or {}
    return arguments.get(f"{PREFIX}picture") if arguments.get(f"{PREFIX}guidance_scale", 1) > 1 else None


class _Pairs:
    """Lets both halves of a picture begin in the same step, and takes neither out of the batch before the other.

    An idle engine would begin the first half before the second one comes. A half waits for its partner, a pair for two
    places, tokens for both prompts, and memory for both whole sequences.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.policy.value != "fcfs":
            raise ValueError("Pairs of requests are scheduled first come, first served: leave out --scheduling-policy.")
        self.halves: dict[str, tuple[Any, float]] = {}
        self.pairs: deque[tuple[Any, Any]] = deque()

    def add_request(self, request: Any) -> None:
        if (name := pair_of(request)) is None:
            super().add_request(request)
        elif name in self.halves:
            self.pairs.append((self.halves.pop(name)[0], request))
        else:
            self.halves[name] = request, time.monotonic()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        for name, (half, since) in list(self.halves.items()):
            if time.monotonic() - since > PATIENCE:  # it begins alone, and the processor ends it
                del self.halves[name]
                super().add_request(half)
        released: list[Any] = []
        while self.pairs and self._has_room(self.pairs[0], released):
            released += self.pairs.popleft()
        for request in released:
            super().add_request(request)
        self.waiting.remove_requests(released)
        for request in reversed(released):
            self.waiting.prepend_request(request)
        # The last one is preempted where memory ends: no picture, as long as there is a text.
        self.running.sort(key=lambda request: pair_of(request) is None)
        return super().schedule(*args, **kwargs)

    def _has_room(self, pair: tuple[Any, Any], released: list[Any]) -> bool:
        if any(request.is_prefill_chunk for request in self.running):
            return False
        busy = len(self.running) + self.num_waiting_for_streaming_input + len(self.kv_holding_waiting)
        tokens = self.max_num_scheduled_tokens - len(self.running)
        new = [*released, *pair]
        if busy + len(new) > self.max_num_active_reqs or sum(request.num_tokens for request in new) > tokens:
            return False
        drawing = [request for request in self.running if pair_of(request) is not None]
        blocks = [-(-(one.num_prompt_tokens + one.max_tokens) // self.block_size) for one in [*drawing, *new]]
        held = sum(-(-one.num_computed_tokens // self.block_size) for one in drawing)
        return sum(blocks) - held <= self.kv_cache_manager.block_pool.get_num_free_blocks()

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + 2 * len(self.pairs) + len(self.halves)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        ids = {request_ids} if isinstance(request_ids, str) else request_ids
        held = [half for half, _ in self.halves.values()] + [one for pair in self.pairs for one in pair]
        gone = {pair_of(one) for one in held if ids is None or one.request_id in ids}
        for request in held:
            if pair_of(request) in gone:
                super().add_request(request)  # the partner draws alone, which ends it
        self.halves = {name: half for name, half in self.halves.items() if name not in gone}
        self.pairs = deque(pair for pair in self.pairs if pair_of(pair[0]) not in gone)
        return super().finish_requests(request_ids, finished_status)


class PairScheduler(_Pairs, Scheduler):
    """vLLM's scheduler, for pictures of two requests."""


class AsyncPairScheduler(_Pairs, AsyncScheduler):
    """The same for asynchronous scheduling."""
