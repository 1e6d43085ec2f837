"""Models spread over several processes: what FSDP2 and FSDP split, how generation sees whole weights, and how a whole model is saved.

`trainer.strategy: fsdp2` is the supported path: FSDP2 (`fully_shard`) over Lightning's ModelParallelStrategy. `FSDPStrategy` (FSDP1)
is served through the same functions; the frozen models beside the policy are split by FSDP2 under either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from p3o_lightning.forwards import pooled_scores, unwrapped
from p3o_lightning.sharded_checkpoints import is_sharded, plain_values_only


class FSDP2Strategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`: weights, gradients and optimizer state split over all processes (FSDP2).

    Lightning's own default for the sizes would split nothing and let every process read the same data.

    Args:
        save_distributed_checkpoint: False gathers a checkpoint into one file, which any number of processes can resume from; True lets
            every process write its share into a folder, for models whose weights and optimizer state do not fit the memory of one host.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **options)

    def setup_environment(self) -> None:
        """All processes are data-parallel."""
        self._tensor_parallel_size, self._data_parallel_size = 1, self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer state of a file or folder, whatever number of processes wrote it; returns the rest of it.

        Lightning's own reader numbers the parameters of an optimizer among all of the module's, which is wrong where only adapters train.
        """
        path = Path(self.broadcast(checkpoint_path))
        if is_sharded(path):
            with plain_values_only(path):
                return super().load_checkpoint(path, weights_only=True)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        assert self.model is not None
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=whole)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            ours = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, named(state, ours), options=whole)
        return checkpoint


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 (fully_shard) of p3o_lightning")


def named(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state with its parameters' names in place of their numbers. `names` is in the optimizer's order."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, names, strict=True))
    groups = [{**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {name_of[number]: values for number, values in state["state"].items()}, "param_groups": groups}


# ---- splitting


def splits(strategy: Strategy | str) -> bool:
    """Whether it splits a model over the processes, rather than giving each a whole one."""
    return strategy.startswith("fsdp") if isinstance(strategy, str) else isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def prepare_split(strategy: Strategy, model: nn.Module) -> None:
    """Split the trained model as `strategy` would have it; nothing where each process holds a whole one."""
    if isinstance(strategy, ModelParallelStrategy):
        split(model, strategy.device_mesh["data_parallel"])
    elif isinstance(strategy, FSDPStrategy) and "auto_wrap_policy" not in strategy.kwargs:
        strategy.kwargs["auto_wrap_policy"] = ModuleWrapPolicy({type(layer) for layer in layers_of(unwrapped(model))})


def place_frozen(strategy: Strategy, model: nn.Module) -> None:
    """Split a frozen model beside the trained one over the processes, or put it on the device."""
    if isinstance(strategy, ModelParallelStrategy):
        split(model, strategy.device_mesh["data_parallel"])
    elif isinstance(strategy, FSDPStrategy):
        split(model, init_device_mesh(strategy.root_device.type, (strategy.world_size,)))
    else:
        model.to(strategy.root_device)


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 on every layer, then on the rest: the transformers model is its own root, so that it can be called as it is.

    With LoRA it is the base model that is split, which PEFT's wrapper calls. Splitting again does nothing.
    """
    root = unwrapped(model)
    if isinstance(root, FSDPModule):
        return
    for layer in layers_of(root):
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh, reshard_after_forward=not _trained(root))
    if hasattr(root, "score"):  # a reward model is not called by its forward: FSDP must know the method that is
        root.pooled_scores = MethodType(pooled_scores, root)
        register_fsdp_forward_method(root, "pooled_scores")


def _trained(model: nn.Module) -> bool:
    """Whether a backward follows a forward: what belongs to no layer then stays gathered between the two, since both need it at once."""
    return any(parameter.requires_grad for parameter in model.parameters())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: those that transformers names as not to be cut, or the longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    if layers := [module for module in model.modules() if type(module).__name__ in names]:
        return layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


# ---- whole weights


@contextmanager
def whole_weights(model: nn.Module, root: nn.Module | None = None) -> Iterator[None]:
    """Inside, every process holds the whole model: gathered once, given back at the end. Nothing happens to a model that is not split.

    `generate` and other loops of unequal length on the processes run without a collective in here, so none waits for another.

    Args:
        model: the transformers model.
        root: what the strategy trains; FSDP1 keeps in it what belongs to no layer.
    """
    if isinstance(root, FullyShardedDataParallel):
        running = root.training_state is not TrainingState.IDLE  # a validation step runs as the root's forward, which has gathered its own
        wrapped = [module for module in root.modules() if isinstance(module, FullyShardedDataParallel) and module is not root]
        with ExitStack() as stack:
            for module in wrapped if running else [root]:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(module, writeback=False))
            stack.enter_context(_without_wrappers())
            yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not units[0] or not _trained(model), recurse=False)
            unit.reshard()


@contextmanager
def _without_wrappers() -> Iterator[None]:
    """A layer wrapped by FSDP1 runs as it is: the wrapper would give its weights back after every forward, and gather them again."""
    former = FullyShardedDataParallel.forward
    FullyShardedDataParallel.forward = lambda self, *inputs, **named: self.module(*inputs, **named)  # type: ignore[method-assign]
    try:
        yield
    finally:
        FullyShardedDataParallel.forward = former  # type: ignore[method-assign]


def is_split(model: nn.Module, root: nn.Module | None = None) -> bool:
    """Whether a process holds only its share of the model."""
    return isinstance(root, FullyShardedDataParallel) or any(isinstance(module, FSDPModule) for module in model.modules())


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0, under their own names; empty on the others. Collective: every process calls it."""
    if isinstance(module, FullyShardedDataParallel):  # its own state_dict reads freed memory where the device is the CPU
        with FullyShardedDataParallel.summon_full_params(module, writeback=False):
            first = torch.distributed.get_rank() == 0
            return {name: value.detach().cpu().clone() for name, value in named_weights(module).items()} if first else {}
    return dict(get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))  # type: ignore[arg-type]


def load_whole(module: nn.Module, weights: dict[str, Any]) -> None:
    """Put whole weights, which every process has, into a model that is whole or split by FSDP2."""
    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))


@torch.no_grad()
def blend(target: nn.Module, source: nn.Module, share: float) -> None:
    """Make every weight of `target` share x source + (1 - share) x target, computed in float32 or wider. Both are split alike, or whole."""
    theirs = dict(source.named_parameters())
    for name, weight in target.named_parameters():
        ours, given = (value.to_local() if isinstance(value, DTensor) else value for value in (weight, theirs[name]))
        wide = torch.promote_types(ours.dtype, torch.float32)
        ours.copy_(torch.lerp(ours.to(wide), given.to(wide), share))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a state_dict holds, by the names that it has without the wrappers of FSDP1."""
    wrapper = "_fsdp_wrapped_module"
    named: dict[str, Tensor] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        prefix = "".join(f"{part}." for part in path.split(".") if part not in (wrapper, ""))
        named |= {prefix + name: value for name, value in owner._parameters.items() if value is not None}
        kept = owner._buffers.keys() - owner._non_persistent_buffers_set
        named |= {prefix + name: value for name, value in owner._buffers.items() if value is not None and name in kept}
    return named
