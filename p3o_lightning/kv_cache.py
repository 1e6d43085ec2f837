"""A key-value cache with room for every token to come: a decoding step writes one column, and copies nothing."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One attention layer's keys and values, in buffers of `capacity` columns of which the first `length` are filled.

    transformers' own layer copies all it holds at every step, to make it one column longer.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length, self.width = capacity, 0, capacity
        self._column: Tensor | None = None
        self._buffers: list[Tensor] = []  # keys and values: row, head, column, channel

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new columns in; all that are filled, as views. In autocast's dtype, to which attention would cast all at each step."""
        if torch.is_autocast_enabled(key_states.device.type):
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._buffers = [states.new_empty(*states.shape[:2], self.capacity, states.shape[-1]) for states in (key_states, value_states)]
        if self._column is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self._column, states.to(buffer.dtype))
            keys, values = (buffer[:, :, : self.width] for buffer in self._buffers)
            return keys, values
        end = self.length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        return self._show()

    def fix(self, column: Int[Tensor, " 1"]) -> None:
        """From now on `update` writes one column, the one that `column` says at that time, and gives the first `width`, filled or not."""
        self._column = column
        for buffer in self._buffers:
            buffer[:, :, self.length :] = 0  # what a mask leaves out is weighed with 0, and 0 times NaN is NaN
        self.length = self.capacity

    def get_seq_length(self) -> int:
        """Columns filled."""
        return self.length

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times; what is not filled is not copied."""
        self._rebuild([buffer[:, :, : self.length].repeat_interleave(repeats, 0) for buffer in self._buffers])

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows only. `indices` ascend, so that rows can move up in place."""
        kept = len(indices)
        for place, buffer in enumerate(self._buffers):
            buffer[:kept, :, : self.length] = buffer[indices, :, : self.length]
            self._buffers[place] = buffer[:kept]
        self._show()

    def _rebuild(self, filled: list[Tensor]) -> None:
        self._buffers = [states.new_empty(*states.shape[:2], self.capacity, states.shape[-1]) for states in filled]
        for buffer, states in zip(self._buffers, filled, strict=True):
            buffer[:, :, : self.length] = states
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        """Where transformers looks for them."""
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self._buffers)
        return self.keys, self.values


def attends_only(model: Any) -> bool:
    """Whether its layers keep keys and values alone: recurrent ones and convolutions mix what lies side by side in a row."""
    takes_it = getattr(model, "_supports_default_dynamic_cache", lambda: True)
    return takes_it() and roomy_cache(model.config.get_text_config(decoder=True), 1) is not None


def roomy_cache(config: Any, capacity: int) -> DynamicCache | None:
    """An empty cache for `capacity` tokens; None for a model with a layer whose state cannot be repeated and freed of rows.

    Layers with a sliding window keep transformers' own, which hold no more than the window.
    """
    cache = DynamicCache(config=config)
    # recurrent layers have no method for it, or inherit attention's, which leaves their own state as it is
    if not all(type(layer).__name__.startswith(("Dynamic", "Dummy")) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
