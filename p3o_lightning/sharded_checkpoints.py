"""Checkpoints that several processes wrote, each its share, into one folder: read without running anything in it, and made whole.

torch's reader (torch.distributed.checkpoint) unpickles the folder's index and whatever is no tensor. Here the index may name nothing but
the classes that an index is made of, and the rest is read as `weights_only`.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, metadata
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from p3o_lightning.errors import InputError

INDEX, REST = ".metadata", "meta.pt"  # of torch, and of Lightning: all that is neither weights nor optimizer state
_FIX = "give one from <default_root_dir>/checkpoints"


def is_sharded(path: Path) -> bool:
    """Whether the path is such a folder."""
    return path.is_dir() and (path / INDEX).is_file() and (path / REST).is_file()


def read_rest(folder: Path) -> dict[str, Any]:
    """What the checkpoint holds beside weights and optimizer state. Raises InputError if there is more in it than plain values."""
    if not is_sharded(folder):
        raise InputError(f"{str(folder)!r} is a folder, but no sharded checkpoint ({INDEX} or {REST} is missing): {_FIX}.")
    try:
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{str(folder / REST)!r} holds more than tensors and plain values, and loading that could run code: {_FIX}."
        ) from error
    except Exception as error:  # torch raises many types here
        raise InputError(f"{str(folder / REST)!r} cannot be read ({type(error).__name__}): {_FIX}.") from error
    return dict(rest)


def read_whole(folder: Path) -> dict[str, Any]:
    """The checkpoint as one process would have saved it; its optimizer states name their parameters. It has to fit in memory."""
    rest, shares = read_rest(folder), dict[str, Any]()
    with plain_values_only(folder):
        try:
            _load_state_dict(shares, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        except CheckpointException as error:  # of one process, this one
            cause = next(iter(error.failures.values()))[0]
            raise InputError(f"{str(folder)!r} is a sharded checkpoint that cannot be read ({_said(cause)}): {_FIX}.") from error
    numbered = sorted((key for key in shares if re.fullmatch(r"optimizer_\d+", key)), key=lambda key: int(key.split("_")[1]))
    weights = shares["state_dict"] if "state_dict" in shares else shares["model"]  # of FSDP2, of FSDP1
    return {**rest, "state_dict": weights, "optimizer_states": [by_number(shares[key]) for key in numbered]}


def _said(cause: BaseException) -> str:
    """What a failed read means. torch's own words say how to load it nevertheless."""
    if isinstance(cause, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, and loading that could run code"
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with numbers in place of its parameters' names, as `Optimizer.load_state_dict` has it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number_of = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [number_of[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number_of[name]: values for name, values in state["state"].items()}, "param_groups": groups}


class WholeCheckpointIO(TorchCheckpointIO):
    """`Trainer(plugins=WholeCheckpointIO())`: resume from a sharded checkpoint where the strategy does not split the model."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, made whole if it is a folder."""
        if is_sharded(Path(path)):
            return read_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


@contextmanager
def plain_values_only(folder: Path) -> Iterator[None]:
    """Inside, torch's reader of this folder can load tensors and plain values only; an index that names anything else is refused."""
    try:
        with (folder / INDEX).open("rb") as file:
            _Index(file).load()
    except pickle.UnpicklingError as error:
        raise InputError(f"{str(folder / INDEX)!r} holds more than an index ({error}), and loading that could run code: {_FIX}.") from error
    except Exception as error:  # whatever a broken pickle raises
        raise InputError(f"{str(folder / INDEX)!r} is no index of a sharded checkpoint ({type(error).__name__}): {_FIX}.") from error
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # the reader asks for the opposite where it meets a plain value
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if former is not None:
            os.environ[name] = former


class _Index(pickle.Unpickler):
    """Builds nothing but the classes that an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        parts_of_an_index = (
            (module == "torch.distributed.checkpoint.metadata" and getattr(getattr(metadata, name, None), "__module__", None) == module)
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module, name)
            in (
                ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
                ("torch.serialization", "_get_layout"),
                ("pathlib", "PosixPath"),
                ("pathlib", "WindowsPath"),
                ("pathlib._local", "PosixPath"),
                ("pathlib._local", "WindowsPath"),
                ("collections", "OrderedDict"),
            )
        )
        if not parts_of_an_index:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)
