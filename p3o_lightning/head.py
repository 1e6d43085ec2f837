"""Log-probabilities of given tokens from a model's last hidden states: the block of logits exists only a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from p3o_lightning.forwards import unwrapped

CHUNK = 128  # positions whose logits exist at a time: with a vocabulary of 8,192 that is 4 MiB, about what a core's cache holds
BLOCK = 2**28  # bytes of them elsewhere: a GPU waits for whoever gives it little to do
KEPT = 2**27  # bytes of softmax numerators that are kept for the backward; above it they are computed again


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The layer that makes logits, if it can be left out of a forward: not split over processes, adapted, or watched by a hook."""
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or isinstance(base, FSDPModule):
        return None
    watched = head._forward_hooks or head._forward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks
    return None if watched else head


@contextmanager
def left_out(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, the layer gives back what it is given; the list holds the latest."""
    given: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        given[:] = [hidden]
        return hidden

    former = vars(head).get("forward")  # that of casting.py, or none of its own
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield given
    finally:
        del head.forward
        if former is not None:
            head.forward = former  # type: ignore[method-assign]


def head_logps(
    hidden: Float[Tensor, "position channel"], head: nn.Linear, tokens: Int[Tensor, " position"], temperature: float = 1.0
) -> Float[Tensor, " position"]:
    """log softmax(head(hidden) / temperature)[token], in nats, in float32 at least."""
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    count, missing = len(tokens), -len(tokens) % (CHUNK if hidden.dtype.itemsize < 4 else 1)
    if missing:  # as in packing.py: kernels for few different shapes
        hidden, tokens = nn.functional.pad(hidden, (0, 0, 0, missing)), nn.functional.pad(tokens, (0, missing))
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLogps.apply(hidden, weight, bias, tokens, temperature, torch.is_grad_enabled())[:count]


class _HeadLogps(torch.autograd.Function):
    """Keeps exp(logits - max) for the backward, which then passes over the vocabulary in two matrix products only.

    At the token itself it is exp(logit - max) less the sum, which over the sum is p - 1: subtracted before anything is rounded to half
    precision, where of a confident token hardly a digit would be left of the difference.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, learns: bool) -> Tensor:
        size = len(tokens) * len(weight) * hidden.element_size()
        keep = learns and any(ctx.needs_input_grad) and size <= KEPT
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logps, sums, tops = (torch.empty(len(tokens), dtype=precise, device=hidden.device) for _ in range(3))
        numerators = torch.empty(len(tokens), len(weight), dtype=hidden.dtype, device=hidden.device) if keep else None
        chunk = _positions_at_a_time(weight)
        for start in range(0, len(tokens), chunk):
            part = slice(start, start + chunk)
            into = numerators[part] if numerators is not None and precise == hidden.dtype else None
            logits = _logits(hidden[part], weight, bias, temperature, into)
            tops[part] = logits.amax(-1)
            chosen = logits.gather(1, tokens[part].unsqueeze(1)).squeeze(1) - tops[part]
            logits.sub_(tops[part].unsqueeze(1)).exp_()
            torch.sum(logits, 1, out=sums[part])
            torch.sub(chosen, sums[part].log(), out=logps[part])
            if numerators is not None:
                _take_off(logits, tokens[part], sums[part], hidden.dtype)
                if into is None:
                    numerators[part] = logits
        ctx.save_for_backward(hidden, weight, bias, tokens, sums, tops, numerators)
        ctx.temperature = temperature
        return logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, bias, tokens, sums, tops, numerators = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        share = (-gradient / ctx.temperature / sums).to(hidden.dtype).unsqueeze(1)
        of_hidden = torch.empty_like(hidden) if for_hidden else None
        of_weight: Tensor | None = None
        of_bias = torch.zeros_like(bias) if for_bias else None
        step = len(tokens) if numerators is not None else _positions_at_a_time(weight)
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            if numerators is None:
                made = _logits(hidden[part], weight, bias, ctx.temperature, None)
                made = made.sub_(tops[part].unsqueeze(1)).exp_()
                made = _take_off(made, tokens[part], sums[part], hidden.dtype).to(hidden.dtype)
            else:
                made = numerators[part]
            if of_hidden is not None:
                torch.mm(made, weight, out=of_hidden[part])
                of_hidden[part] *= share[part]
            if for_weight:
                shared = hidden[part] * share[part]
                of_weight = torch.mm(made.t(), shared) if of_weight is None else of_weight.addmm_(made.t(), shared)
            if of_bias is not None:
                of_bias.addmv_(made.t(), share[part].squeeze(1))
        return of_hidden, of_weight, of_bias, None, None, None


def _positions_at_a_time(weight: Tensor) -> int:
    return CHUNK if weight.is_cpu else max(CHUNK, BLOCK // (4 * len(weight)) // CHUNK * CHUNK)


def _take_off(numerators: Tensor, tokens: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each position off its token's numerator, in place; no less than the least number of `dtype` (float16's is -65,504)."""
    own = numerators.gather(1, tokens.unsqueeze(1)) - sums.unsqueeze(1)
    return numerators.scatter_(1, tokens.unsqueeze(1), own.clamp_(min=torch.finfo(dtype).min))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, into: Tensor | None) -> Tensor:
    """Divided by the temperature, in float32 at least. In half precision they are rounded first, as the model's own are."""
    logits = torch.mm(hidden, weight.t(), out=into)
    if bias is not None:
        logits += bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)
