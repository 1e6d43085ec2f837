"""Pure token arithmetic: padding and masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

TokenRow = Sequence[int] | np.ndarray | Tensor


def pad_right(rows: Sequence[TokenRow], value: int) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Rows of token ids with `value` appended up to the longest, and the mask that is True on the given ids.

    >>> tokens, mask = pad_right([[5], [6, 7]], value=0)
    >>> tokens.tolist(), mask.tolist()
    ([[5, 0], [6, 7]], [[True, False], [True, True]])
    """
    return _pad(rows, value, on_the_left=False)


def pad_left(rows: Sequence[TokenRow], value: int) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Rows of token ids with `value` prepended up to the longest, and the mask that is True on the given ids.

    >>> tokens, mask = pad_left([[5], [6, 7]], value=0)
    >>> tokens.tolist(), mask.tolist()
    ([[0, 5], [6, 7]], [[False, True], [True, True]])
    """
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
