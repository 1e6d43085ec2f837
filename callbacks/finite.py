"""No NaN and no infinity reaches the weights: it is named, its batch is saved, and the run stops or leaves the update out.

An update is checked once, when its gradients are whole: one reduction over them, and one look at the losses it sums over. Only where
that finds something are the update's batches run again, with hooks, to name the module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as L
import torch
import torch.distributed
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from p3o_lightning.batches import DemonstrationBatch, Experience, PairBatch
from p3o_lightning.callbacks.search import CARRIED, Rounds, Seen, bad_rows, not_finite, random_states
from p3o_lightning.errors import Diverged, InputError

FIGURES = ("objective/kl", "objective/entropy", "objective/scores", "objective/scores_margin")  # finite if all of CARRIED is
_TRAINED = "Lower model.lr, set trainer.gradient_clip_val to 1, or use a wider dtype (model.dtype float32, trainer.precision bf16-mixed)"
FIXES = {
    "reward": "A source of model.reward_funcs cannot judge these texts: give another one, or a wider dtype (model.dtype float32)",
    "reference log-probability": "The frozen reference overflows: use a wider dtype (model.dtype float32), or another model.reference",
    "policy log-probability": _TRAINED,
    "loss": _TRAINED,
    "gradient": _TRAINED,
}


class Finding(NamedTuple):
    """What was first not finite, and where."""

    quantity: str  # a key of FIXES
    value: str  # "nan" or "inf"
    rows: list[int]  # of the batch; empty where they cannot be told
    module: str | None  # dotted name; None: unknown
    seen: Seen
    source: str = ""  # of a reward, its name


class FiniteGuard(L.Callback):
    """Stops, or leaves the update out, where a reward, a log-probability, a loss or a gradient is NaN or infinite.

    The message names the step, the batch, its rows and prompts, and the first module whose output (or, where only a gradient is not
    finite, whose gradient) is not. The batch is saved as <dirpath>/step-<step>-rank-<rank>.pt, for torch.load(weights_only=True).
    A skipped update moves neither weights nor the optimizer's state, and counts as a step of the schedule. With fp16 and a gradient
    scaler, infinities are the scaler's: it lowers its scale and leaves the update out itself.

    Args:
        action: "stop" ends the run before the update, "skip" leaves it out and goes on.
        max_consecutive: with "skip", this many updates left out in a row end the run.
        dirpath: folder of the saved batches; None is <default_root_dir>/nonfinite.
    """

    takes_nonfinite = True  # a policy then lets a rollout of NaN come to here, where the row and the module are found

    def __init__(self, action: Literal["stop", "skip"] = "stop", max_consecutive: int = 3, dirpath: str | None = None) -> None:
        super().__init__()
        if action not in ("stop", "skip"):
            raise InputError(f"finite.action is {action!r}: choose stop or skip.")
        if max_consecutive < 1:
            raise InputError(f"finite.max_consecutive is {max_consecutive}: choose at least 1 update.")
        self.action, self.max_consecutive, self.dirpath = action, max_consecutive, dirpath
        self.skipped = 0  # updates left out since the run began
        self.in_a_row = 0  # of these, since the latest update that was made
        self._begin()

    def _begin(self) -> None:
        self._window: list[Seen] = []
        self._losses: list[tuple[Seen, Tensor]] = []
        self._updated = False  # whether the window has been checked
        self._condemned = False  # whether a rollout brought something into it that is not finite

    def folder(self, trainer: L.Trainer) -> Path:
        """Where batches are saved."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "nonfinite")

    # ---- what is looked at

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an interrupted run left."""
        self._begin()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the batch until its update is checked. What a rollout brought is checked here, before start-up proofs and the forward."""
        if self._updated:
            self._begin()
        made = getattr(pl_module, "micro_batch", None)
        made = made if isinstance(made, Experience) else batch if isinstance(batch, Experience) else None
        self._window.append(Seen(batch_idx, batch, made, random_states(pl_module.device)))
        figures = getattr(getattr(pl_module, "state", None), "figures", None) or {}
        # equal on all ranks, so that they decide together, and only where there is something to decide
        if all(math.isfinite(figures.get(name, 0.0)) for name in FIGURES):
            return
        if _any_rank(trainer, made is not None and _carried(made) is not None):
            self._condemned = True
            if self.action == "stop":
                raise Diverged(self._report(trainer, pl_module))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss until its update is checked: a look at each would make the GPU wait."""
        if self._window:
            self._losses.append((self._window[-1], loss.detach()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Check the update; on all ranks alike."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        losses, gradients = [loss for _, loss in self._losses], [] if scaler is not None else _gradients(optimizer)
        self._updated = True
        if _any_rank(trainer, self._condemned or not _finite(losses, gradients, scaler is not None)):
            self._leave_out(trainer, pl_module, optimizer)
        else:
            self.in_a_row = 0
        self._losses = []
        if self.action == "skip":
            pl_module.log("finite/skipped", float(self.skipped), batch_size=1)

    def _leave_out(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        report = self._report(trainer, pl_module)
        if self.action == "stop" or isinstance(trainer.strategy, DeepSpeedStrategy):  # its engine keeps gradients of its own
            raise Diverged(report)
        scaled_inside = getattr(trainer.precision_plugin, "scaler", None) and getattr(optimizer, "_step_supports_amp_scaling", False)
        for parameter in _parameters(optimizer):
            if scaled_inside and parameter.grad is not None:
                parameter.grad.fill_(math.nan)  # a fused optimizer's: the scaler has yet to look at them, and leaves the update out
            else:
                parameter.grad = None  # the optimizer passes over it: weights and state stay as they are
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_consecutive:
            raise Diverged(f"{self.in_a_row} updates in a row were not finite (finite.max_consecutive {self.max_consecutive}). {report}")
        rank_zero_warn(f"update skipped: {report}")

    # ---- what is said and saved

    def _report(self, trainer: L.Trainer, pl_module: Any) -> str:
        """Find it, save its batch, and tell what the first rank that found something tells: the same on every rank."""
        for find in (self._find, self._in_gradients):
            finding = find(trainer, pl_module)
            mine = None if finding is None else self._told(trainer, pl_module, finding, self._save(trainer, finding))
            everyone = [mine]
            if trainer.world_size > 1:
                everyone = [None] * trainer.world_size
                torch.distributed.all_gather_object(everyone, mine)
            for told in everyone:
                if told is not None:
                    return told
        return f"step {trainer.global_step}: an update is not finite. {_TRAINED}"

    def _find(self, trainer: L.Trainer, pl_module: Any) -> Finding | None:
        """In what this process has seen."""
        rounds = Rounds(trainer, pl_module)
        for seen in self._window:
            if seen.made is not None and (found := _carried(seen.made)) is not None:
                field, value, rows = found
                source, module = rounds.rollout(seen, field)
                return Finding(CARRIED[field], value, rows, module, seen, source)
        if self._condemned:
            return None  # another rank's rollout
        bad = {id(seen): not_finite(loss) for seen, loss in self._losses if not_finite(loss)}
        traces = [(seen, rounds.training_step(seen)) for seen in self._window]  # all, on every rank: user code may communicate
        for seen, trace in traces:
            if id(seen) in bad:
                quantity = "policy log-probability" if trace.logps_rows else "loss"
                return Finding(quantity, bad[id(seen)], trace.logps_rows or trace.rows, trace.forward, seen)
        for seen, trace in traces:
            if trace.backward is not None:
                return Finding("gradient", trace.backward_value, trace.backward_rows, trace.backward, seen)
        return None  # another rank's, which the reduction has spread; or nothing that shows again

    def _in_gradients(self, trainer: L.Trainer, pl_module: Any) -> Finding | None:
        """In the gradients as they are: all that is left where no batch shows it again. The last module is the first of backward."""
        for name, parameter in reversed(list(pl_module.named_parameters())):
            if parameter.grad is not None and (value := not_finite(_local(parameter.grad))):
                return Finding("gradient", value, [], name.rpartition(".")[0], self._window[-1])
        return None

    def _told(self, trainer: L.Trainer, pl_module: Any, finding: Finding, path: Path) -> str:
        rank = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        rows = ""
        if finding.rows:
            shown = ", ".join(map(str, finding.rows[:8])) + (", ..." if len(finding.rows) > 8 else "")
            prompts = _prompts(pl_module, finding.seen, finding.rows[:3])
            rows = f" in row{'s' * (len(finding.rows) > 1)} {shown}" + (f" (prompt {', '.join(map(repr, prompts))})" if prompts else "")
        what = finding.quantity + (f" {finding.source!r}" if finding.source else "")
        where = f"first in module {finding.module}" if finding.module is not None else "module unknown"
        skip = "; finite.action skip leaves such updates out" if self.action == "stop" else ""
        return (
            f"step {trainer.global_step}, batch {finding.seen.batch_idx}{rank}: {what} is {finding.value}{rows}, {where}; "
            f"no update was made of it. {FIXES[finding.quantity]}{skip}. The batch is in {path}"
        )

    def _save(self, trainer: L.Trainer, finding: Finding) -> Path:
        """Written aside and renamed, as plain values and tensors."""
        path = self.folder(trainer) / f"step-{trainer.global_step}-rank-{trainer.global_rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        seen = finding.seen
        content = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "batch_idx": seen.batch_idx,
            "quantity": finding.quantity,
            "source": finding.source,
            "value": finding.value,
            "rows": finding.rows,
            "module": finding.module,
            "batch": _plain(seen.batch if seen.made is None else seen.made),
            "random_states": seen.random,
        }
        torch.save(content, aside)
        os.replace(aside, path)
        return path

    # ---- resuming

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


# ---- looking at numbers


def _finite(losses: list[Tensor], gradients: list[Tensor], scaled: bool) -> bool:
    """Whether all are finite, with one transfer from the device. A scaled loss may be infinite, which the scaler deals with."""
    good = [~loss.isnan().any() if scaled else loss.isfinite().all() for loss in losses]
    if gradients:
        good.append(torch.nn.utils.get_total_norm(gradients).isfinite())
    if not good or bool(torch.stack([value.to(good[0].device) for value in good]).all()):
        return True
    # the norm of huge, finite gradients overflows: look at each, which takes ten times as long
    return all(good[: len(losses)]) and not any(not_finite(gradient) for gradient in gradients)


def _any_rank(trainer: L.Trainer, found: bool) -> bool:
    """Whether any rank has found something. Collective."""
    return bool(trainer.strategy.reduce_boolean_decision(found, all=False)) if trainer.world_size > 1 else found


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """What this process holds of them."""
    return [_local(parameter.grad) for parameter in _parameters(optimizer) if parameter.grad is not None]


def _local(gradient: Any) -> Tensor:
    """The share of a sharded gradient that is here; the values of a sparse one."""
    gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return gradient.detach().coalesce().values() if gradient.is_sparse else gradient.detach()


def _carried(experience: Experience) -> tuple[str, str, list[int]] | None:
    """The first field that is not finite: its name, its value, its rows."""
    for field in CARRIED:
        values = getattr(experience, field)
        if values is not None and (value := not_finite(values)):
            return field, value, bad_rows(values, len(values))
    return None


def _prompts(pl_module: Any, seen: Seen, rows: list[int]) -> list[str]:
    """The text of these rows' prompts, shortened, where the batch carries it."""
    batch, tokenizer = seen.batch if seen.made is None else seen.made, getattr(pl_module, "tokenizer", None)
    texts = []
    with suppress(Exception):  # a message must not fail
        for row in rows:
            if isinstance(batch, Experience):
                ids = batch.prompt_tokens[row][batch.prompt_mask[row]]
            elif isinstance(batch, DemonstrationBatch):
                ids = batch.tokens[row][batch.attention_mask[row] & ~batch.response_mask[row]]
            elif isinstance(batch, PairBatch):
                ids = batch.tokens[row, 0][: batch.attention_mask[row, 0].sum() - batch.response_lengths[row, 0]]
            else:
                return []
            text = " ".join(str(tokenizer.decode(ids)).split())  # type: ignore[union-attr]
            texts.append(text if len(text) <= 40 else f"{text[:40]}...")
    return texts


def _plain(value: Any) -> Any:
    """What `weights_only=True` loads: tensors on the CPU, numbers, texts, and containers of them. A NamedTuple becomes a dict."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would be saved with all that it is a view of
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (str, int, float, bool) else repr(value)


# ---- running a batch again
