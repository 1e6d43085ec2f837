"""`torch_compile: true`: a model's layers compiled by torch.compile, for training and scoring.

Layers, not the whole model: they are alike, so one is compiled and all run it, which takes seconds where a whole model takes minutes; and
attention over a packed row (packing.py) stays as it is between them. Nothing is wrapped, so weights keep their names in checkpoints.
Sampling runs as written: at one token a step, entering compiled code costs more than the code saves.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
import torch._dynamo
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import AttentionInterface

from p3o_lightning.errors import InputError
from p3o_lightning.forwards import unwrapped
from p3o_lightning.packing import NAME, packed_attention
from p3o_lightning.scoring import allows
from p3o_lightning.sharding import layers_of

VARIANTS = (
    64  # of one layer: each dtype, with and without gradient, in training and not, padded and packed, of policy, reference and reward
)

_COMPILED: WeakSet[nn.Module] = WeakSet()  # models whose forwards run compiled layers


def compile_layers(model: nn.Module) -> None:
    """From the next forward on; once for a model. Shapes are free, so that texts of another length compile nothing anew."""
    base = unwrapped(model)
    if base in _COMPILED:
        return
    allows(base)  # tried out on a few tokens before, not compiled for them
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    layers = layers_of(base)
    for layer in layers:
        layer.compile(dynamic=True)
    _COMPILED.add(base)
    rank_zero_info(f"{type(base).__name__}: {len(layers)} layers compile at their first forward, which takes a while.")


def check_compiler() -> None:
    """Stop where torch.compile would fail at the first forward: for a CPU it writes C++."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name]
    if not any(shutil.which(name) for name in names):
        raise InputError(
            "model.torch_compile is true, but there is no C++ compiler: install g++, or name yours in the environment variable CXX."
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether a forward here runs compiled layers."""
    return unwrapped(model) in _COMPILED


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers run as they are written."""
    base = unwrapped(model)
    if base not in _COMPILED:
        yield
        return
    _COMPILED.discard(base)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _COMPILED.add(base)
