"""Where a number that is not finite came from: a batch is run again, with hooks, and nothing of the run is disturbed by it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from p3o_lightning.batches import Experience

# What a rollout brings with it: field -> how it is called, in the order in which `rollout_step` makes them.
CARRIED = {
    "old_token_logps": "policy log-probability",
    "ref_token_logps": "reference log-probability",
    "scores": "reward",
    "gaps": "reward",
}


class Seen(NamedTuple):
    """A batch that the coming update sums over."""

    batch_idx: int
    batch: Any  # as training_step gets it
    made: Experience | None  # as the loader made it: on the CPU, unrounded
    random: dict[str, Tensor]  # states of the generators before training_step


class Trace:
    """Hooks on every module: the first whose output is not finite, and the first whose gradient is not."""

    LOSS = "none: every module's output is finite, the loss itself is not"

    def __init__(self, rows: int, prefix: str = "") -> None:
        self.count, self.prefix = rows, prefix
        self.forward: str | None = None
        self.rows: list[int] = []
        self.logps_rows: list[int] = []  # where the policy's log-probabilities of the batch are not finite
        self.backward: str | None = None
        self.backward_value, self.backward_rows = "", list[int]()

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Inside, all of `root` is watched."""
        with ExitStack() as hooks:
            for name, module in root.named_modules():
                name = self.prefix + name if name else self.prefix.rstrip(".") or type(root).__name__
                hooks.callback(module.register_forward_hook(self._forward_hook(name), with_kwargs=False).remove)
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad:
                        hooks.callback(parameter.register_hook(self._backward_hook(name, 0)).remove)
            yield

    def _forward_hook(self, name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if not tensor.is_floating_point() or isinstance(tensor, DTensor):  # to look at a share is collective
                    continue
                if self.forward is None and not_finite(tensor):
                    self.forward, self.rows = name, bad_rows(tensor, self.count)
                if tensor.requires_grad:
                    tensor.register_hook(self._backward_hook(name, self.count))

        return look

    def _backward_hook(self, name: str, rows: int) -> Any:
        def look(gradient: Tensor) -> None:
            if self.backward is None and (value := not_finite(gradient)):
                self.backward, self.backward_value, self.backward_rows = name, value, bad_rows(gradient, rows)

        return look


class Rounds:
    """Runs a batch again where that disturbs nothing: forward and backward where each process has a whole model, forward under FSDP2.

    Whatever goes wrong in it, what was seen until then is the answer: the module is unknown at worst.
    """

    def __init__(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        strategy = trainer.strategy
        self.whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        self.split = isinstance(strategy, ModelParallelStrategy)

    def training_step(self, seen: Seen) -> Trace:
        """Forward and backward of `training_step`, with the numbers that it drew."""
        module = self.pl_module
        trace = Trace(len(next(tensors_in(seen.batch), ())))
        if not (self.whole or self.split) or not module.automatic_optimization:  # in manual optimization it would make an update
            return trace
        with suppress(Exception), self._undisturbed(seen, trace), trace.watching(module), torch.set_grad_enabled(self.whole):
            with self.trainer.precision_plugin.train_step_context():
                loss = module.training_step(*[seen.batch, seen.batch_idx][: len(inspect.signature(module.training_step).parameters)])
            loss = loss["loss"] if isinstance(loss, dict) else loss
            if trace.forward is None and not bool(loss.isfinite().all()):
                trace.forward = Trace.LOSS
            if self.whole:
                trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
                torch.autograd.grad(loss, trained, allow_unused=True)  # not backward(): .grad and the hooks of DDP stay as they are
        for part in module.modules() if self.split else ():
            if isinstance(part, FSDPModule):
                part.reshard()  # no backward has done it
        return trace

    def rollout(self, seen: Seen, field: str) -> tuple[str, str | None]:
        """(name of the reward source or "", module) for a field of CARRIED that is not finite: what made it is run again."""
        made, module = seen.made, self.pl_module
        assert made is not None
        scored = getattr(module, "rollout_rewards", {})
        sources = [name for name, scores in scored.items() if not_finite(scores)] if CARRIED[field] == "reward" else []
        if not self.whole:
            return ", ".join(sources), None
        batch = made.to(module.device)
        given = (batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask)
        names = {"old_token_logps": "", "ref_token_logps": "reference."}
        trace = Trace(len(batch.prompt_tokens), names.get(field, "reward."))
        with suppress(Exception), self._undisturbed(seen, trace), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            if field == "old_token_logps":
                with trace.watching(module):
                    module.policy_logps(*given)
            elif field == "ref_token_logps":
                with trace.watching(module.reference):
                    module.reference_logps(*given)
            else:
                for source in module.rewards.models:
                    if not sources or source.name in sources:
                        with trace.watching(source.network):
                            source(_responses(module.tokenizer, batch))
        return ", ".join(sources), trace.forward

    @contextmanager
    def _undisturbed(self, seen: Seen, trace: Trace) -> Iterator[None]:
        """Random numbers as they were before the step; logs nothing; random states, buffers and metrics are put back after."""
        module = self.pl_module
        buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        metrics = [(metric, dict(vars(metric)), metric._copy_state_dict()) for metric in module.modules() if isinstance(metric, Metric)]
        instead: dict[str, Any] = {"log": _nothing, "log_dict": _nothing}
        if seen.made is not None and hasattr(module, "loss"):
            instead |= {"micro_batch": seen.made, "loss": _spied(module.loss, trace)}
        before = {name: vars(module).get(name, _nothing) for name in instead}
        with isolate_rng(), getattr(module, "rows_apart", nullcontext)():
            torch.set_rng_state(seen.random["cpu"])
            if "cuda" in seen.random:
                torch.cuda.set_rng_state(seen.random["cuda"], module.device)
            vars(module).update(instead)
            try:
                yield
            finally:
                for name, value in before.items():
                    vars(module).pop(name)
                    if value is not _nothing:
                        vars(module)[name] = value
                for metric, attributes, states in metrics:
                    vars(metric).update(attributes | states)
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of `log` while a batch is run again."""


def _spied(loss: Any, trace: Trace) -> Any:
    """The policy's `loss`, noting in which rows the log-probabilities that it is given are not finite."""

    def spied(token_logps: Tensor, *given: Any, **named: Any) -> Any:
        trace.logps_rows = bad_rows(token_logps, len(token_logps))
        return loss(token_logps, *given, **named)

    return spied


def _responses(tokenizer: Any, batch: Experience) -> Any:
    """What a reward source reads, from what a micro-batch carries: prompts as text, whatever they were in the data."""

    def texts(tokens: Tensor, masks: Tensor) -> list[str]:
        return [str(tokenizer.decode(row[kept], skip_special_tokens=True)) for row, kept in zip(tokens, masks, strict=True)]

    prompts = SimpleNamespace(
        tokens=batch.prompt_tokens, attention_mask=batch.prompt_mask, prompts=texts(batch.prompt_tokens, batch.prompt_mask), columns={}
    )
    completions = [texts(tokens, masks) for tokens, masks in zip(batch.completion_tokens, batch.completion_mask, strict=True)]
    return SimpleNamespace(prompts=prompts, tokens=batch.completion_tokens, mask=batch.completion_mask, texts=completions)


def random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def not_finite(tensor: Tensor) -> str:
    """ "nan" or "inf", whichever is there; "" where all is finite."""
    return "nan" if bool(tensor.isnan().any()) else "inf" if bool(tensor.isinf().any()) else ""


def bad_rows(tensor: Tensor, rows: int) -> list[int]:
    """The rows of a batch of `rows` that a tensor is not finite in, if its first axis is a multiple of them."""
    if tensor.ndim == 0 or rows == 0 or len(tensor) % rows:
        return []
    return (~tensor.detach().isfinite()).reshape(rows, -1).any(1).nonzero().flatten().tolist()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of a batch or of a module's output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
