"""RMSNorm on a CPU with a backward of four passes over the hidden states, where autograd takes each of its six operations back.

With 4,096 tokens of 320 channels that is 2 ms instead of 12, and nearly every language model has two RMSNorms in a layer. What they give is
transformers' to the bit. On other devices, in other dtypes and in compiled layers all is as it is written.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def quicken_norms(model: nn.Module) -> None:
    """The RMSNorms of a model, from the next forward on; told by what they compute, not by their name."""
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = MethodType(forward, module)


def forward(module: Any, hidden_states: Tensor) -> Tensor:
    """In place of an RMSNorm's own. (A pickle holds a method by its name, so it is called as what it stands for.)"""
    weight = module.weight
    plain = hidden_states.dtype == weight.dtype == torch.float32 and hidden_states.is_cpu and type(weight) in (nn.Parameter, Tensor)
    if torch.is_grad_enabled() and plain and not torch.compiler.is_compiling():
        return _RMSNorm.apply(hidden_states, weight, _epsilon(module))
    return type(module).forward(module, hidden_states)


class _RMSNorm(torch.autograd.Function):
    """y = w x / r with r = sqrt(mean(x^2) + epsilon), over the last axis.

    The backward is LayerNorm's, which is one kernel, given a mean of 0 and 1 / r: it subtracts the derivative of a mean that is not there,
    which is added again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "*rows channel"], weight: Float[Tensor, " channel"], epsilon: float
    ) -> Float[Tensor, "*rows channel"]:
        inverse = _inverse(hidden, epsilon)
        ctx.save_for_backward(hidden, weight, inverse)
        return (hidden * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        gradient, channels = gradient.contiguous(), hidden.shape[-1]
        of_hidden, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, hidden, [channels], torch.zeros_like(inverse), inverse, weight, None, [True, ctx.needs_input_grad[1], False]
        )
        with torch.autocast("cpu", enabled=False):
            means = torch.matmul(gradient, weight).div_(channels).unsqueeze(-1)
        return of_hidden.add_(means.mul_(inverse)), of_weight, None


def _inverse(hidden: Tensor, epsilon: float) -> Tensor:
    """1 / r of each row, as transformers adds it up."""
    return hidden.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()


def _epsilon(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it has a scale in float32 and nothing else, and gives to the bit what the formula gives."""
    epsilon, weight = _epsilon(module), getattr(module, "weight", None)
    if epsilon is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.dtype != torch.float32 or not weight.is_cpu:
        return False
    if len([*module.parameters(), *module.buffers(), *module.children()]) > 1 or "forward" in vars(module):  # somebody's own, or ours
        return False
    hidden = torch.linspace(-1, 2, 3 * len(weight)).view(3, -1) * torch.tensor([[1e-3], [1.0], [1e3]])
    try:
        given = module(hidden)
    except (TypeError, ValueError, RuntimeError):  # it takes other things, or more of them
        return False
    return isinstance(given, Tensor) and torch.equal(given, hidden * _inverse(hidden, epsilon) * weight)
