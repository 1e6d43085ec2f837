"""Under autocast (trainer.precision bf16-mixed, 16-mixed): weights cast to half precision once, not at every forward of a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers work with copies of their weights in autocast's dtype: to the bit what it would make of them each time.

    For forwards without gradient, which autocast does not keep the cast weights of if they do not train. Nothing happens without autocast,
    and to layers whose weights are split over processes.
    """
    kind = next(model.parameters()).device.type
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    layers = [module for module in model.modules() if type(module) is nn.Linear and _casts(module, dtype)]
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        layer.forward = partial(_linear, layer, kind, layer.weight.to(dtype), bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _casts(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether the layer is its own class's, with a whole weight of a wider floating dtype."""
    weight = layer.weight
    return "forward" not in vars(layer) and type(weight) is nn.Parameter and weight.dtype == torch.float32 and dtype.itemsize < 4


def _linear(layer: nn.Linear, kind: str, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(kind):  # it was switched off further in, as by the try-out in scoring.py
        return nn.Linear.forward(layer, hidden)
    return nn.functional.linear(hidden, weight, bias)
