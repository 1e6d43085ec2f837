"""Casting weights: for good, buffers left as they are; once for many forwards without gradient; or transposed for decoding on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from p3o_lightning.compiling import is_compiled

Forward = Callable[[Tensor], Tensor]

STEPS = 32  # transposed copies of all weights cost what they save in about half as many tokens


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Inside, a module may be cast to half precision; buffers that no checkpoint holds come out as they were, on its device.

    Rotary frequencies are such: transformers makes them anew, exact, of whatever is exported. Rounded ones are off by
    a radian for a distant token.
    """
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name in owner._non_persistent_buffers_set and buffer.is_floating_point()
    ]
    yield
    for owner, name, buffer in kept:
        now = getattr(owner, name)
        if now.dtype.itemsize < min(buffer.dtype.itemsize, 4):
            setattr(owner, name, buffer.to(now.device))


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers work with copies of their weights in autocast's dtype: to the bit what it would make of them each time.

    For forwards without gradient, which autocast does not keep the cast weights of if they do not train. Nothing happens without autocast,
    to layers whose weights are split over processes, and to compiled ones, which would compile anew for every copy.
    """
    kind = _kind(model)
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(kind) or is_compiled(model):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    with _replaced(model, lambda layer: _cast(layer, kind, dtype) if dtype.itemsize < 4 and _is_own(layer, torch.float32) else None):
        yield


@contextmanager
def laid_out(model: nn.Module, steps: int) -> Iterator[None]:
    """As `cast_once`; and in float32 on a CPU linear layers hold transposed copies of their weights meanwhile.

    A CPU multiplies the few rows of a decoding step by those in four fifths of the time. The sums are the same ones, added up in another
    order. In half precision nothing is gained.

    Args:
        steps: of decoding; only if there are enough of them do the copies pay.
    """
    kind = _kind(model)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(kind) or kind != "cpu" or steps < STEPS:
        with cast_once(model):
            yield
        return
    with _replaced(model, lambda layer: _transposed(layer) if _is_own(layer, torch.float32) else None):
        yield


@contextmanager
def _replaced(model: nn.Module, forward: Callable[[nn.Linear], Forward | None]) -> Iterator[None]:
    """Inside, each linear layer runs what `forward` gives for it, if anything."""
    layers = {module: made for module in model.modules() if type(module) is nn.Linear and (made := forward(module)) is not None}
    for layer, made in layers.items():
        layer.forward = made  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _kind(model: nn.Module) -> str:
    """Of device."""
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _is_own(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether the layer does what its class does, with a whole weight of this dtype."""
    return "forward" not in vars(layer) and type(layer.weight) is nn.Parameter and layer.weight.dtype == dtype


def _cast(layer: nn.Linear, kind: str, dtype: torch.dtype) -> Forward:
    weight, bias = layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)

    def forward(hidden: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(kind):  # it was switched off further in, as by the try-out in scoring.py
            return nn.Linear.forward(layer, hidden)
        return nn.functional.linear(hidden, weight, bias)

    return forward


def _transposed(layer: nn.Linear) -> Forward:
    weight, bias = layer.weight.t().contiguous(), layer.bias

    def forward(hidden: Tensor) -> Tensor:
        made = torch.matmul(hidden, weight)
        return made if bias is None else made.add_(bias)

    return forward
