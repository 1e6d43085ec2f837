"""On a GPU, a decoding step is recorded once and then replayed: CUDA graphs.

A step of one token is so little work for a GPU that it waits for Python, which launches a thousand kernels for a model of thirty layers. A
graph launches them by itself. It needs shapes and places in memory that stay: the cache is read whole, and a mask leaves out the columns
that are not filled yet. A recording holds for one rollout, whose weights may be copies of its own (casting.py).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import DynamicCache

from p3o_lightning.decoding import ROWS, last_logits
from p3o_lightning.forwards import unwrapped
from p3o_lightning.kv_cache import RoomyLayer
from p3o_lightning.scoring import allows

STEPS = 16  # a recording costs about three steps as they are written

_REFUSED: WeakSet[nn.Module] = WeakSet()  # models whose step could not be recorded
_LAST: dict[int, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph | None]] = {}  # of each GPU: the next recording takes over its memory


def can_be_graphed(model: nn.Module, cache: DynamicCache, steps: int) -> bool:
    """Whether a recorded step would do what the step as written does, and pay.

    Not where Python has a part in it: weights split over processes or quantised, hooks, a cache that is not plain. Mixtures of experts
    look at their tokens on the host, which cannot be recorded: they are found out when it is tried.
    """
    base = unwrapped(model)
    return (
        steps >= STEPS
        and all(type(weight) is nn.Parameter and weight.is_cuda for weight in model.parameters())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and all(type(layer) is RoomyLayer for layer in cache.layers)
        and base not in _REFUSED
        and allows(model)
    )


class Graphed:
    """With a cache of fixed size.

    Args:
        model: in eval mode.
        cache: filled with the prompts.
        mask: True on their real tokens.
        steps: tokens of each row to be read, at most; the cache has room for them.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache, mask: Bool[Tensor, "row token"], steps: int) -> None:
        rows, column = mask.shape
        self.model, self.cache = model, cache
        self._column = torch.tensor([column], device=mask.device)
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.fix(self._column)
        self._seen = nn.functional.pad(mask, (0, layers[0].capacity - column), value=False).view(rows, 1, 1, -1)
        self._positions = mask.sum(1, keepdim=True)
        self._tokens = self._positions.clone()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Tensor | None = None

    def read(self, drawn: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        self._tokens.copy_(drawn.unsqueeze(1))
        if self._graph is not None:
            self._graph.replay()
            assert self._recorded is not None
            return self._recorded
        if not drawn.is_cuda or unwrapped(self.model) in _REFUSED:
            return self._step()
        return self._step_and_record()

    def worth(self, left: int, rows: int, steps: int) -> int:
        """A recording is for one number of rows: only half as many are worth another."""
        fewer = -(-left // ROWS) * ROWS
        return fewer if 2 * fewer <= rows and steps >= STEPS else rows

    def keep(self, kept: Int[Tensor, " kept"]) -> None:
        self._graph = self._recorded = None
        self._seen, self._positions, self._tokens = self._seen[kept], self._positions[kept], self._tokens[kept]
        self.cache.batch_select_indices(kept)

    def _step(self) -> Tensor:
        """Everything in place, at an address that stays."""
        self._seen.index_fill_(3, self._column, True)
        logits = last_logits(self.model, self._tokens, self._seen, self._positions, self.cache)
        self._positions += 1
        self._column += 1
        return logits

    def _step_and_record(self) -> Tensor:
        """This step as it is written, and a recording for the next ones."""
        dtype = torch.get_autocast_dtype("cuda")
        # what autocast kept of a cast weight would lie in the recording's memory
        with torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            device = torch.cuda.current_device()
            stream, last = _LAST.get(device) or (torch.cuda.Stream(), None)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logits = self._step().clone()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(stream):
                    pool = None if last is None else last.pool()
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may pin memory meanwhile
                    try:
                        self._recorded = self._step()
                    finally:
                        graph.capture_end()
            except RuntimeError as error:
                _REFUSED.add(unwrapped(self.model))
                name = type(unwrapped(self.model)).__name__
                rank_zero_info(f"{name}: sampling runs as written, a step cannot be recorded ({str(error).splitlines()[0]}).")
                return logits
            self._graph = graph
            _LAST[device] = stream, graph
        return logits
