"""Weighted sums of adapters with the rows of the vocabulary that they train, which PEFT leaves as the base has them."""

from __future__ import annotations

import functools
from typing import Any


def combine_rows_too() -> None:
    """Has PEFT's `add_weighted_adapter` combine trained rows by their weights, whatever it does to the LoRA layers."""
    from peft import LoraModel
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    add = LoraModel.add_weighted_adapter
    if hasattr(add, "__wrapped__"):
        return

    @functools.wraps(add)
    def add_weighted_adapter(self, adapters, weights, adapter_name, *args: Any, **kwargs: Any) -> None:
        layers = [layer for layer in self.modules() if isinstance(layer, TrainableTokensLayer)]
        layers = [layer for layer in layers if not layer.tied_adapter]
        known = [name for name in adapters if name in self.peft_config]
        indices = [[layer.token_indices.get(name) for layer in layers] for name in known]
        if any(of_one != indices[0] for of_one in indices):
            raise ValueError(f"{', '.join(adapters)} train different rows of the vocabulary: they cannot be combined.")
        is_new = adapter_name not in self.peft_config
        add(self, adapters, weights, adapter_name, *args, **kwargs)
        for layer, trained in zip(layers, indices[0], strict=True):
            if is_new and trained is not None:
                rows, before = layer.trainable_tokens_delta, layer.trainable_tokens_original[adapter_name]
                moved = (weight * (rows[name] - before) for name, weight in zip(adapters, weights, strict=True))
                rows[adapter_name].data = before + sum(moved).detach()

    LoraModel.add_weighted_adapter = add_weighted_adapter
