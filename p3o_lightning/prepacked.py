"""Products of rows with a weight that a CPU has laid out beforehand, the way it multiplies by it.

Otherwise it lays the weight out at every product, which in a decoding step of 32 rows takes a tenth to a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from p3o_lightning.processor import bfloat16_is_emulated

Product = Callable[[Tensor], Tensor]  # (*row, channel in) to (*row, channel out)

LARGE = 2**19  # numbers in a float32 weight from which on blocks pay, 2 MiB: what a core's own cache holds


def prepacked(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> Product:
    """`nn.functional.linear` with this weight and bias, which stay as they are, without gradient; on a CPU, and elsewhere as ever.

    In bfloat16 products of contiguous rows are the same to the bit (on an x86 processor with units for it), in float32 they are added up in
    another order.
    """
    blocks = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if weight.is_cpu and weight.dtype == torch.float32:
        return _in_blocks(weight, bias) if blocks and weight.numel() >= LARGE else _transposed(weight, bias)
    if weight.is_cpu and weight.dtype == torch.bfloat16 and blocks and not bfloat16_is_emulated():
        return _in_blocks(weight, bias)
    return lambda rows: nn.functional.linear(rows, weight, bias)


def _in_blocks(weight: Tensor, bias: Tensor | None) -> Product:
    """By oneDNN, with operators that `torch.compile` puts into frozen models; they take any number of rows."""
    product = torch.ops.mkldnn._linear_pointwise.default
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda rows: product(rows, packed, bias, "none", [], "")


def _transposed(weight: Tensor, bias: Tensor | None) -> Product:
    turned = weight.t().contiguous()

    def product(rows: Tensor) -> Tensor:
        made = torch.matmul(rows, turned)
        return made if bias is None else made.add_(bias)

    return product
