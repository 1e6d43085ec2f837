"""Pure token arithmetic: padding and masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

TokenRow = Sequence[int] | np.ndarray | Tensor


def pad_right(rows: Sequence[TokenRow], value: int) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Rows of token ids with `value` appended up to the longest, and the mask that is True on the given ids."""
    return _pad(rows, value, on_the_left=False)


def pad_left(rows: Sequence[TokenRow], value: int) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Rows of token ids with `value` prepended up to the longest, and the mask that is True on the given ids."""
    return _pad(rows, value, on_the_left=True)


def _pad(rows: Sequence[TokenRow], value: int, on_the_left: bool) -> tuple[Tensor, Tensor]:
    width = max((len(row) for row in rows), default=0)
    tokens = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if on_the_left else slice(0, len(row))
        tokens[index, place] = torch.as_tensor(row, dtype=torch.long)
        mask[index, place] = True
    return tokens, mask
