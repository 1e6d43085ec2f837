"""What a policy's rollouts say of the run: a KL budget that ends it, and an alarm where the policy collapses."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from p3o_lightning.batches import Experience
from p3o_lightning.callbacks.checkpoint import LastCheckpoint
from p3o_lightning.callbacks.rollouts import pair_gaps, rollout_state
from p3o_lightning.errors import InputError, Stopped


class KLBudget(L.Callback):
    """Ends the run at the first rollout whose `objective/kl` is beyond the budget, before any update is made on it.

    The checkpoint that `LastCheckpoint` then saves is that of before the rollout: resumed with a higher budget, the run repeats the one
    that had this budget from the start, to the bit.

    Args:
        max_kl: nats per response that the policy may be away from its reference, mean over a rollout; None is no limit.
    """

    def __init__(self, max_kl: float | None = None) -> None:
        super().__init__()
        if max_kl is not None and not max_kl > 0:
            raise InputError(f"kl_budget.max_kl is {max_kl}: choose a number of nats above 0, e.g. 10, or null for no limit.")
        self.max_kl = max_kl
        self._before: Any = None  # the experience state at the end of the latest batch

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Remember the state that a rollout starts from."""
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Remember the state that a rollout starts from."""
        if self.max_kl is not None:
            self._before = copy.copy(rollout_state(pl_module))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Hold the rollout that the batch is of to the budget. Its figures are means over all ranks: they stop together."""
        state = rollout_state(pl_module)
        kl = 0.0 if state is None else state.figures.get("objective/kl", 0.0)
        if self.max_kl is None or not kl > self.max_kl:
            return
        pl_module.state = self._before  # the rollout was not made: a resumed run makes it again
        savers = [item for item in trainer.callbacks if isinstance(item, LastCheckpoint)]  # type: ignore[attr-defined]
        saves = savers and trainer.global_step and not trainer.fast_dev_run  # type: ignore[attr-defined]
        saved = f"{savers[0].path(trainer).name} of step {trainer.global_step} is whole: " if saves else ""
        raise Stopped(
            f"objective/kl is {kl:.4g} nats, beyond kl_budget.max_kl {self.max_kl:g}: stopped before an update on that rollout. "
            f"{saved}resume with a higher kl_budget.max_kl, or raise model.kl_coef, set model.kl_target, or lower model.lr.",
            save=True,
        )


class CollapseAlarm(L.Callback):
    """Warns where, rollout after rollout, nearly all pairs are two equal responses or two equal rewards: they teach nothing.

    It warns once, and again only after the policy has recovered.

    Args:
        threshold: share of such pairs, in (0, 1], from which on a rollout counts.
        patience: rollouts in a row.
    """

    def __init__(self, threshold: float = 0.9, patience: int = 3) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise InputError(f"collapse.threshold is {threshold}: choose a share of pairs in (0, 1], e.g. 0.9.")
        if patience < 1:
            raise InputError(f"collapse.patience is {patience}: choose at least 1 rollout.")
        self.threshold, self.patience = threshold, patience
        self.counted = 0  # the latest rollout that was looked at, by number
        self.in_a_row = 0  # collapsed rollouts up to it

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look at every rollout once, at its first micro-batch."""
        state = rollout_state(pl_module)
        if state is None or state.rollouts == self.counted:
            return
        self.counted = state.rollouts
        duplicates = state.figures.get("p3o/duplicate_pair_rate", 0.0)
        # without a pending rollout, the micro-batch is all of it
        ties = tie_rate(state.pending or pl_module.micro_batch or batch)
        self.in_a_row = self.in_a_row + 1 if max(duplicates, ties) >= self.threshold else 0
        if self.in_a_row != self.patience:
            return
        if duplicates >= self.threshold:
            why = (
                f"{duplicates:.0%} of the pairs are two equal responses (p3o/duplicate_pair_rate): the policy has collapsed onto one "
                "answer, and nothing more is learned. Start again from an earlier checkpoint with a higher model.temperature or "
                "model.kl_coef, or a lower model.lr."
            )
        else:
            why = (
                f"{ties:.0%} of the pairs have equal rewards (p3o/tie_rate), though the responses differ: there is nothing to learn from "
                "them. Give model.reward_funcs that tell responses apart (a graded reward, or several), raise model.num_generations, or "
                "model.temperature or model.kl_coef if the responses have become alike."
            )
        rank_zero_warn(f"step {trainer.global_step}: in {self.patience} rollouts in a row, now {why}")

    def state_dict(self) -> dict[str, Any]:
        """The count of rollouts."""
        return {"counted": self.counted, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.counted, self.in_a_row = state_dict["counted"], state_dict["in_a_row"]


def tie_rate(experience: Experience) -> float:
    """Share of the pairs whose rewards are exactly equal."""
    gaps = pair_gaps(experience)
    if gaps is None:
        return 0.0
    first, second = torch.triu_indices(gaps.shape[1], gaps.shape[1], 1)
    return float((gaps[:, first, second] == 0).float().mean())
