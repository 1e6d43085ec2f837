"""On a GPU, a decoding step is recorded once and then replayed: CUDA graphs.

A step of one token is so little work for a GPU that it waits for Python, which launches a thousand kernels for a model of thirty layers. A
graph launches them by itself. It needs shapes and places in memory that stay: attention reads the cache by whole blocks of columns, and a
mask leaves out those that are not filled yet. A recording holds for so many rows and columns of one rollout, whose weights may be copies of
its own (casting.py). The environment variable P3O_CUDA_GRAPHS=0 turns recording off.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import DynamicCache

from p3o_lightning.decoding import ROWS, last_logits
from p3o_lightning.forwards import unwrapped
from p3o_lightning.kv_cache import RoomyLayer
from p3o_lightning.scoring import allows

STEPS = 16  # a recording costs about three steps as they are written
COLUMNS = 256  # of the cache that attention reads at a time: few recordings, and not a cache for thousands of tokens at the first one

_REFUSED: WeakSet[nn.Module] = WeakSet()  # models whose step cannot be recorded
_LAST: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = {}  # the next recording takes over its memory


def can_be_graphed(model: nn.Module, cache: DynamicCache, steps: int) -> bool:
    """Whether a recorded step would do what the step as written does, and pay.

    Not where Python has a part in it: weights split over processes or devices or quantised, hooks, a cache that is not plain. A model whose
    forward waits for the GPU, as a mixture of experts may, is found out at its first step.
    """
    weights = list(model.parameters())
    return (
        os.environ.get("P3O_CUDA_GRAPHS") != "0"
        and steps >= STEPS
        and all(type(weight) is nn.Parameter and weight.is_cuda for weight in weights)
        and len({weight.device for weight in weights}) == 1
        and not (_global_forward_hooks or _global_forward_pre_hooks)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and all(type(layer) is RoomyLayer for layer in cache.layers)
        and allows(model)
    )


class Graphed:
    """With a cache whose columns have their places.

    Args:
        model: in eval mode.
        cache: filled with the prompts.
        mask: True on their real tokens.
        steps: tokens of each row to be read, at most; the cache has room for them.
    """

    def __init__(self, model: nn.Module, cache: DynamicCache, mask: Bool[Tensor, "row token"], steps: int) -> None:
        rows, self._filled = mask.shape
        self.model, self.cache = model, cache
        layers: list[Any] = cache.layers
        self._layers = layers
        self._column = torch.tensor([self._filled], device=mask.device)
        for layer in self._layers:
            layer.fix(self._column)
        self._seen = mask.view(rows, 1, 1, -1)  # what attention reads, of what there is
        self._positions = mask.sum(1, keepdim=True)
        self._tokens = self._positions.clone()
        self._records = mask.is_cuda and unwrapped(model) not in _REFUSED
        self._forget()

    def read(self, drawn: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        self._tokens.copy_(drawn.unsqueeze(1))
        if self._filled == self._seen.shape[-1]:
            self._widen()
        self._filled += 1
        if self._graph is not None:
            self._graph.replay()
            assert self._recorded is not None
            return self._recorded
        return self._step_and_record() if self._records else self._step()

    def worth(self, left: int, rows: int, steps: int) -> int:
        """A recording is for one number of rows: only half as many are worth another."""
        fewer = -(-left // ROWS) * ROWS
        return fewer if 2 * fewer <= rows and steps >= STEPS else rows

    def keep(self, kept: Int[Tensor, " kept"]) -> None:
        self._forget()
        self._seen, self._positions, self._tokens = self._seen[kept], self._positions[kept], self._tokens[kept]
        self.cache.batch_select_indices(kept)

    def _widen(self) -> None:
        """To the next block of columns."""
        self._forget()
        width = min((self._filled // COLUMNS + 1) * COLUMNS, self._layers[0].capacity)
        self._seen = nn.functional.pad(self._seen, (0, width - self._filled), value=False)
        for layer in self._layers:
            layer.width = width

    def _forget(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Tensor | None = None

    def _step(self) -> Tensor:
        """Everything in place, at an address that stays. Until the last two lines it may be done twice."""
        self._seen.index_fill_(3, self._column, True)
        logits = last_logits(self.model, self._tokens, self._seen, self._positions, self.cache)
        self._positions += 1
        self._column += 1
        return logits

    def _step_and_record(self) -> Tensor:
        """This step as it is written, and a recording for the next ones."""
        device, dtype = self._tokens.device, torch.get_autocast_dtype("cuda")
        # what autocast kept of a cast weight would lie in the recording's memory
        uncached = torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False)
        with torch.cuda.device(device), uncached:
            if device not in _LAST:
                torch.cuda.empty_cache()  # while it records, the allocator gives nothing back
            stream, last = _LAST.get(device) or (torch.cuda.Stream(), None)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                try:
                    with _waiting_refused():
                        logits = self._step().clone()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    self._refuse(error)
                    logits = self._step().clone()
            stream.synchronize()
            if self._records:
                self._record(stream, last)
        return logits

    def _record(self, stream: torch.cuda.Stream, last: torch.cuda.CUDAGraph | None) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                with torch.inference_mode(False):  # a generator's state is made here, and outlives a validation
                    # other threads may pin memory meanwhile
                    graph.capture_begin(pool=None if last is None else last.pool(), capture_error_mode="thread_local")
                try:
                    self._recorded = self._step()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:  # of this rollout alone
            self._records = False
        except RuntimeError as error:
            self._refuse(error)
        else:
            self._graph = graph
            _LAST[self._tokens.device] = stream, graph

    def _refuse(self, error: RuntimeError) -> None:
        """This model's steps run as they are written, from now on, with the same shapes."""
        self._records = False
        _REFUSED.add(unwrapped(self.model))
        reason = (str(error.__context__ or error).splitlines() or [type(error).__name__])[0]
        name = type(unwrapped(self.model)).__name__
        rank_zero_info(f"{name}: sampling runs as written, a step cannot be recorded ({reason}).")


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Inside, what waits for the GPU is an error: a recording that breaks off for it would leave the allocator astray."""
    former = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(former)
