"""Casting weights: for good, buffers left as they are; once for many forwards without gradient; or laid out for decoding on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from p3o_lightning.compiling import is_compiled
from p3o_lightning.prepacked import prepacked

Forward = Callable[[Tensor], Tensor]

STEPS = 32  # copies of all weights cost what they save in about half as many tokens


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
    """Inside, linear layers work with copies of their weights in autocast's dtype: to the bit what it would make of them each time. On a
    CPU they are laid out beforehand too (prepacked.py says where that is to the bit).

    For forwards without gradient, which autocast does not keep the cast weights of if they do not train. Nothing happens without autocast,
    to layers whose weights are split over processes, and to compiled ones, which would compile anew for every copy.
    """
    kind = _kind(model)
    dtype = torch.get_autocast_dtype(kind)
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(kind) or dtype.itemsize == 4 or is_compiled(model):
        yield
        return
    with _replaced(model, lambda layer: _cast(layer, kind, dtype) if _is_own(layer, torch.float32) else _uncast(layer, kind, dtype)):
        yield


@contextmanager
def laid_out(model: nn.Module, steps: int) -> Iterator[None]:
    """As `cast_once`; and in float32 on a CPU linear layers work with copies of their weights that are laid out for it (prepacked.py), with
    LoRA's adapters added.

    The sums are the same ones, added up in another order. In half precision adding would round adapters away that are small beside the
    weights; and a model whose weights are held in it is left as it is, for it was to be small.

    Args:
        steps: of decoding; only if there are enough of them do the copies pay.
    """
    kind = _kind(model)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(kind) or kind != "cpu" or steps < STEPS:
        with cast_once(model):
            yield
        return
    merged = {layer: made for layer in model.modules() if (made := _merged(layer)) is not None}
    inner = {part for layer in merged for part in layer.modules()} - merged.keys()
    plain = {
        layer: prepacked(layer.weight, layer.bias)  # type: ignore[arg-type]
        for layer in model.modules()
        if layer not in inner and _is_own(layer, torch.float32)
    }
    with _replaced(model, {**plain, **merged}.get):
        yield


@contextmanager
def _replaced(model: nn.Module, forward: Callable[[nn.Module], Forward | None]) -> Iterator[None]:
    """Inside, each layer runs what `forward` gives for it, if anything."""
    layers = {module: made for module in model.modules() if (made := forward(module)) is not None}
    for layer, made in layers.items():
        layer.forward = made
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _kind(model: nn.Module) -> str:
    """Of device."""
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _is_own(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is a linear layer that does what its class does, with a whole weight of this dtype."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and type(layer.weight) is nn.Parameter and layer.weight.dtype == dtype


def _cast(layer: Any, kind: str, dtype: torch.dtype) -> Forward:
    weight, bias = layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    product = prepacked(weight, bias)

    def forward(hidden: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(kind):  # it was switched off further in, as by the try-out in scoring.py
            return nn.Linear.forward(layer, hidden)
        return product(hidden.to(dtype))

    return forward


# ---- layers with an adapter


def _adapter(layer: Any) -> tuple[Any, Any, Any, float] | None:
    """Weights, A, B and scale of a linear layer under one plain LoRA adapter of PEFT's; None of any other layer."""
    if (type(layer).__module__, type(layer).__name__) != ("peft.tuners.lora.layer", "Linear") or "forward" in vars(layer):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    return layer.get_base_layer(), layer.lora_A[active[0]], layer.lora_B[active[0]], layer.scaling[active[0]]


def _uncast(layer: Any, kind: str, dtype: torch.dtype) -> Forward | None:
    """To the bit what PEFT computes, which casts its input to the adapter's dtype; autocast casts it back, for each product anew."""
    if (found := _adapter(layer)) is None:
        return None
    base, down, up, scale = found
    exact = abs(math.frexp(scale)[0]) == 0.5  # a power of two: it can be multiplied by while adding, with the same rounding

    def forward(hidden: Tensor) -> Tensor:
        if layer.disable_adapters or layer.training or not torch.is_autocast_enabled(kind):
            return type(layer).forward(layer, hidden)
        hidden = hidden.to(dtype)
        made = up(down(hidden))
        return torch.add(base(hidden), made, alpha=scale) if exact else base(hidden) + made * scale

    return forward


def _merged(layer: Any) -> Forward | None:
    """One product with weights that the adapter is added to."""
    found = _adapter(layer)
    if found is None or layer.disable_adapters or not all(_is_own(part, torch.float32) for part in found[:3]):
        return None
    base, down, up, scale = found
    if down.bias is not None or up.bias is not None:
        return None
    whole = prepacked(torch.addmm(base.weight, up.weight, down.weight, alpha=scale), base.bias)
    return lambda hidden: type(layer).forward(layer, hidden) if layer.disable_adapters or layer.training else whole(hidden)
