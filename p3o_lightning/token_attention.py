"""Attention of one new token over a cache, as in a decoding step, where the way torch would go is slow."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from p3o_lightning.processor import half_attention_is_slow

KEYS = 2**21  # bytes of keys that are in float32 at a time: with as many of values they stay in a core's caches


def one_token_attention(
    query: Float[Tensor, "row head token channel"],
    key: Float[Tensor, "row group cached channel"],
    value: Float[Tensor, "row group cached channel"],
    mask: Tensor | None,
    scaling: float | None,
) -> Float[Tensor, "row 1 head channel"] | None:
    """What scaled dot-product attention gives, as transformers returns it; None where torch's own way is the one to go."""
    plain = mask is None or (mask.dtype == torch.bool and mask.shape[:3] == (len(query), 1, 1))
    if query.shape[2] != 1 or not plain:
        return None
    if query.is_cpu and key.dtype.itemsize < 4 and half_attention_is_slow():
        return attend_in_float32(query, key, value, mask, scaling)
    if query.is_cuda and key.shape[1] < query.shape[1] and mask is not None:
        return attend_by_groups(query, key, value, mask, scaling)
    return None


def attend_in_float32(
    query: Float[Tensor, "row head 1 channel"],
    key: Float[Tensor, "row group cached channel"],
    value: Float[Tensor, "row group cached channel"],
    mask: Bool[Tensor, "row 1 1 cached"] | None,
    scaling: float | None,
) -> Float[Tensor, "row 1 head channel"]:
    """Some rows at a time, rounded to the dtype of `query` in the end."""
    rows = max(1, KEYS // (4 * key[0].numel()))
    seen = []
    with torch.autocast("cpu", enabled=False):
        for start in range(0, len(query), rows):
            part = slice(start, start + rows)
            shown = None if mask is None else mask[part]
            seen.append(attend_by_groups(query[part].float(), key[part].float(), value[part].float(), shown, scaling))
    return torch.cat(seen).to(query.dtype)


def attend_by_groups(
    query: Float[Tensor, "row head 1 channel"],
    key: Float[Tensor, "row group cached channel"],
    value: Float[Tensor, "row group cached channel"],
    mask: Bool[Tensor, "row 1 1 cached"] | None,
    scaling: float | None,
) -> Float[Tensor, "row 1 head channel"]:
    """Where heads share keys and values by groups: the heads of a group are its queries.

    transformers before 5.23 repeats the whole cache for every head instead, at every step.
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    seen = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return seen.reshape(query.shape[0], 1, query.shape[1], value.shape[-1])
