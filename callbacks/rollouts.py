"""Looking at a policy's rollouts: when, and what they carry."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.errors import InputError


def rollout_state(pl_module: Any) -> Any:
    """The experience state of a stage that makes rollouts; None elsewhere."""
    state = getattr(pl_module, "state", None)
    return state if hasattr(state, "figures") and hasattr(state, "rollouts") else None


def just_made(trainer: L.Trainer) -> int:
    """The step of the update that has ended, as Lightning counts in logs. A run that is resumed after it has no reason to show it again."""
    return max(trainer.global_step - 1, 0)


class RolloutObserver(L.Callback):
    """Looks at a rollout every few updates. When next travels in checkpoints: a resumed run writes what the uninterrupted one would.

    Args:
        every_n_steps: optimizer updates between two looks, at least; the first rollout is always looked at.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"{type(self).__name__}.every_n_steps is {every_n_steps}: choose at least 1 update.")
        self.every_n_steps = every_n_steps
        self.next_step = 0

    def on_rollout_end(self, trainer: L.Trainer, pl_module: Any, prompts: PromptBatch, experience: Experience) -> None:
        """Called by ExperienceLoader after every rollout, on every rank, before any update on it; the experience is this rank's."""
        if trainer.global_step >= self.next_step:
            self.next_step = trainer.global_step + self.every_n_steps
            self.observe(trainer, pl_module, prompts, experience)

    def observe(self, trainer: L.Trainer, pl_module: Any, prompts: PromptBatch, experience: Experience) -> None:
        """Look at the rollout."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """When to look next."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as before."""
        self.next_step = state_dict["next_step"]


def pair_gaps(experience: Experience) -> Any:
    """Reward gaps of all pairs, r_i - r_j at [prompt, i, j], KL not included; None where nothing was scored."""
    if experience.gaps is not None:
        return experience.gaps
    return None if experience.scores is None else experience.scores.unsqueeze(2) - experience.scores.unsqueeze(1)
