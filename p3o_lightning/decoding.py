"""A model that reads one more token of every running response, and gives the logits of the next: with its cache, or without."""

from __future__ import annotations

from functools import cache as once
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import DynamicCache

from p3o_lightning.forwards import accepts, positions_of, unwrapped
from p3o_lightning.kv_cache import attends_only, roomy_cache

ROWS = 8  # finished rows leave the batch so many at a time


@runtime_checkable
class Decoder(Protocol):
    """The running responses, a row each."""

    def read(self, drawn: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        """Take the next token of every row in; the logits of the one after it. They hold until the next call."""

    def worth(self, left: int, rows: int, steps: int) -> int:
        """How many of the rows to go on with, where `left` have not ended and `steps` tokens may be read yet."""

    def keep(self, kept: Int[Tensor, " kept"]) -> None:
        """Only these rows, ascending."""


class Growing:
    """With a cache, one column longer at every step."""

    def __init__(self, model: nn.Module, cache: DynamicCache, mask: Bool[Tensor, "row token"]) -> None:
        self.model, self.cache, self.mask = model, cache, mask

    def read(self, drawn: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        self.mask = nn.functional.pad(self.mask, (0, 1), value=True)
        return last_logits(self.model, drawn.unsqueeze(1), self.mask.long(), self.mask.sum(1, keepdim=True) - 1, self.cache)

    def worth(self, left: int, rows: int, steps: int) -> int:
        """Not one by one: each time the cache is copied, and a CPU's kernels are made for a size."""
        return -(-left // ROWS) * ROWS if left <= rows - ROWS else rows

    def keep(self, kept: Int[Tensor, " kept"]) -> None:
        self.mask = self.mask[kept]
        self.cache.batch_select_indices(kept)


class Rereading:
    """Without a cache: the whole text at every step."""

    worth = Growing.worth

    def __init__(self, model: nn.Module, tokens: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> None:
        self.model, self.tokens, self.mask = model, tokens, mask

    def read(self, drawn: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        self.tokens = torch.cat([self.tokens, drawn.unsqueeze(1)], 1)
        self.mask = nn.functional.pad(self.mask, (0, 1), value=True)
        return last_logits(self.model, self.tokens, self.mask.long(), positions_of(self.mask), None)

    def keep(self, kept: Int[Tensor, " kept"]) -> None:
        self.tokens, self.mask = self.tokens[kept], self.mask[kept]


def new_cache(model: nn.Module, capacity: int) -> DynamicCache | None:
    """An empty cache, or None for a model whose state cannot be repeated for K responses and freed of finished rows."""
    base = unwrapped(model)
    if cache_argument(model) and attends_only(base):
        config: Any = base.config
        return roomy_cache(config.get_text_config(decoder=True), capacity)
    _say_slow(type(base).__name__)
    return None


def cache_argument(model: nn.Module) -> str | None:
    """What the model's forward calls its cache: `past_key_values`, `cache` since transformers 5.24; None for one that takes none."""
    return next((name for name in ("cache", "past_key_values") if accepts(model, name)), None)


@once
def _say_slow(name: str) -> None:
    rank_zero_warn(f"{name} has no plain key-value cache: sampling reads the whole text again for every token, which is slow.")


def last_logits(model: nn.Module, tokens: Tensor, attention_mask: Tensor, positions: Tensor, cache: DynamicCache | None) -> Tensor:
    """Logits of the last position; the cache, if any, grows by the tokens."""
    options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": cache is not None}
    if cache is not None:
        options[cache_argument(model) or "cache"] = cache
    if accepts(model, "position_ids"):
        options["position_ids"] = positions
    if accepts(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    return model(input_ids=tokens, **options).logits[:, -1]
