"""Next-token loss over a vocabulary that is too large for its logits to exist all at once.

Only positions with a label count, in chunks: the logits of a chunk are made, turned into their gradient and dropped. The
base's own head path runs (soft-capping, scaling, biases, adapters), and every weight that it reads gets its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .views import StandIn, is_plain_linear, shallow_copy


if TYPE_CHECKING:
    from ..models.liquid.configuration_liquid import LiquidConfig


IGNORE_INDEX = -100

# Logits that exist at once. In fp32 they take 256 MiB, and about three such tensors live at the peak.
MAX_CHUNK_LOGITS = 2**26


@dataclass
class LiquidCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As in transformers, and what the loss is made of.

    Args:
        token_stats (`torch.FloatTensor` of shape `(2, 3)`, *optional*): Rows: text, image. Columns: sum of the
            cross-entropies in nats, number of labels that were the most probable id, number of labels. Images are
            their codes, the eoi after them and the eos after that.
    """

    token_stats: torch.FloatTensor | None = None


@torch.compiler.disable
def chunked_causal_lm_loss(
    text_model: PreTrainedModel,
    outputs: ModelOutput,
    targets: torch.LongTensor,
    is_image: torch.BoolTensor,
    max_z_loss_coef: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Mean cross-entropy plus `max_z_loss_coef` times the mean of the squared greatest logit.

    The second term keeps logits from growing; it is Baichuan 2's max-z loss (arXiv 2309.10305, section 2.5, with
    2e-4 there). The gradients are computed along with the loss, so that each chunk's logits are made once.

    Args:
        text_model (`PreTrainedModel`): The base causal language model: its head, and what it does to logits.
        outputs (`ModelOutput`): What its body returned, with `last_hidden_state` of shape `(B, L, hidden)`.
        targets (`torch.LongTensor` of shape `(B, L)`): The id that each position has to predict, -100 for none.
        is_image (`torch.BoolTensor` of shape `(B, L)`): Which targets count as image in the statistics.
        max_z_loss_coef (`float`, defaults to 0.0): Weight of the second term.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): What the sums are divided by; defaults to the number
            of targets here. The Trainer passes that of the whole accumulated batch.

    Returns:
        The loss, a scalar in fp32, and the statistics of [`LiquidCausalLMOutputWithPast`].

    Raises:
        ValueError: If no position has a target.
    """
    labelled = targets != IGNORE_INDEX
    hidden_states, targets, is_image = outputs.last_hidden_state[labelled], targets[labelled], is_image[labelled]
    if not len(targets):
        raise ValueError(
            f"All labels of this batch ({tuple(labelled.shape)} positions) are {IGNORE_INDEX}: there is nothing to learn. "
            "Check the records, and that max_length leaves room for what follows the prompts."
        )
    num_items = len(targets) if num_items_in_batch is None else num_items_in_batch
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(hidden_states.device)

    head = text_model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        # Once, not around each call: the processes may have different numbers of chunks.
        head.unshard()
    # Heads with adapters, hooks or quantized weights run as they are.
    is_plain = is_plain_linear(head, unsharded=True)
    # The base's own forward with its body left out, and with its head left out too where that runs apart.
    view = shallow_copy(text_model)
    view._modules[text_model.base_model_prefix] = _Given(type(outputs))
    if is_plain:
        view.set_output_embeddings(StandIn(head, lambda logits: logits))
    elif isinstance(head, FSDPModule):
        view.set_output_embeddings(StandIn(head, head.forward))

    def logits_of(given: torch.Tensor) -> torch.Tensor:
        """Logits `(N, vocabulary)` of hidden states, or of a plain head's output."""
        return view(inputs_embeds=given[None], use_cache=False).logits[0]

    parameters = []
    if torch.is_grad_enabled() and is_plain:
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    elif torch.is_grad_enabled():
        # Adapters of a tied head may be registered elsewhere, so one position is asked what it depends on.
        parameters = _leaves(logits_of(hidden_states[:1].detach()))
    chunk_loss = _ChunkLoss(
        logits_of, head if is_plain else None, num_items, max_z_loss_coef, with_gradients=torch.is_grad_enabled()
    )
    chunk_size = max(1, MAX_CHUNK_LOGITS // text_model.config.vocab_size)
    return _ChunkedLoss.apply(hidden_states, targets, is_image, chunk_loss, chunk_size, *parameters)


class _ChunkedLoss(torch.autograd.Function):
    """Sums over chunks, with the gradients of the sum kept for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_states, targets, is_image, chunk_loss, chunk_size, *parameters):
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        token_stats = hidden_states.new_zeros(2, 3, dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden_states) if chunk_loss.with_gradients else None
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            of_chunk, stats, gradient = chunk_loss(hidden_states[part], targets[part], parameters, gradients)
            loss += of_chunk
            token_stats.index_add_(0, is_image[part].long(), stats)
            if chunk_loss.with_gradients:
                hidden_gradient[part] = gradient
        if chunk_loss.with_gradients:
            ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.mark_non_differentiable(token_stats)
        return loss, token_stats

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss in chunks has no second derivatives (create_graph=True): pass `skip_logits=False` to the model."
            )
        # In place, unless they are asked for again: a second copy of the head's gradient may not fit.
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
        multiply = torch.Tensor.mul_ if is_last else torch.mul
        gradients = [multiply(gradient, grad_loss.to(gradient.dtype)) for gradient in ctx.saved_tensors]
        return gradients[0], *[None] * 4, *gradients[1:]


@dataclass
class _ChunkLoss:
    """The loss of some positions.

    Args:
        logits_of: What the base does from hidden states (or, with a plain head, from the head's output) to logits.
        plain_head (`nn.Linear`, *optional*): A head whose gradient is added up in place, without a copy per chunk.
        num_items (`int` or `torch.Tensor`): What the sum is divided by.
        max_z_loss_coef (`float`): Weight of the max-z loss.
        with_gradients (`bool`): Whether to add the gradients of the parameters to `gradients`.
    """

    logits_of: Callable[[torch.Tensor], torch.Tensor]
    plain_head: nn.Linear | None
    num_items: torch.Tensor | int
    max_z_loss_coef: float
    with_gradients: bool

    def __call__(self, hidden_states, targets, parameters, gradients):
        """The loss, statistics of each position, and the gradient of the hidden states."""
        with torch.set_grad_enabled(self.with_gradients):
            hidden_states = hidden_states.detach().requires_grad_(self.with_gradients)
            source, wanted = hidden_states, [hidden_states, *parameters]
            if self.plain_head is not None:
                with torch.no_grad():
                    source = self.plain_head.forward(hidden_states)
                wanted = [source.requires_grad_(self.with_gradients)]
            logits = self.logits_of(source).float()
            cross_entropies = nn.functional.cross_entropy(logits, targets, reduction="none")
            best = logits.detach().argmax(-1)
            loss = cross_entropies.sum()
            if self.max_z_loss_coef:
                loss = loss + self.max_z_loss_coef * logits.gather(1, best[:, None]).square().sum()
            loss = loss / self.num_items
            gradient, *of_parameters = torch.autograd.grad(loss, wanted) if self.with_gradients else [None]
        if self.with_gradients and self.plain_head is not None:
            gradient = self._through_plain_head(gradient, hidden_states.detach(), parameters, gradients)
        else:
            for total, of_parameter in zip(gradients, of_parameters, strict=True):
                total += of_parameter
        cross_entropies = cross_entropies.detach()
        return (
            loss.detach(),
            torch.stack([cross_entropies, best == targets, torch.ones_like(cross_entropies)], 1),
            gradient,
        )

    def _through_plain_head(self, of_output, hidden_states, parameters, gradients) -> torch.Tensor:
        weight = self.plain_head.weight
        for parameter, total in zip(parameters, gradients, strict=True):
            if parameter is not weight:
                total += of_output.sum(0)
            elif total.dtype == of_output.dtype == hidden_states.dtype:
                total.addmm_(of_output.T, hidden_states)
            else:
                total += of_output.T @ hidden_states.to(of_output.dtype)
        return (of_output @ weight.to(of_output.dtype)).to(hidden_states.dtype)


def max_z_loss(logits, labels, shift_labels=None, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """The mean squared greatest logit of all logits `(B, L, vocabulary)` that have a target, as in the loss in chunks."""
    labelled = (next_labels(labels) if shift_labels is None else shift_labels).to(logits.device) != IGNORE_INDEX
    best = logits[labelled].float().amax(-1)
    return best.square().sum() / (len(best) if num_items_in_batch is None else num_items_in_batch)


def image_targets(config: LiquidConfig, targets: torch.LongTensor) -> torch.BoolTensor:
    """Which targets `(B, L)` belong to an image: codes, the eoi after them, and the eos after that."""
    codes = config.image_layout.is_picture(targets)
    eoi = targets == config.eoi_token_id
    eos = config.get_text_config().eos_token_id
    eos = torch.as_tensor([] if eos is None else eos, device=targets.device, dtype=targets.dtype)
    return codes | eoi | (torch.isin(targets, eos) & nn.functional.pad(eoi, (1, 0))[:, :-1])


def next_labels(labels: torch.LongTensor) -> torch.LongTensor:
    """The target `(B, L)` of each position: the label of the next one."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


class _Given(nn.Module):
    """In place of a body: what it is given is what it returns."""

    def __init__(self, output_class: type[ModelOutput]):
        super().__init__()
        self.output_class = output_class

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs) -> ModelOutput:
        return self.output_class(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _Given:
        """OPT asks the decoder within its body."""
        return self


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a gradient would arrive at, each once."""
    leaves, seen, nodes = [], set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves
