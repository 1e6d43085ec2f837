"""The run's way through the plane of KL and reward."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L

from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.callbacks import pictures
from p3o_lightning.callbacks.dashboard import writers
from p3o_lightning.callbacks.rollouts import RolloutObserver, rollout_state


class FrontierPath(RolloutObserver):
    """`kl_reward_path` in the IMAGES tab: mean reward over KL to the reference, a dot a rollout, from dark (first) to bright (latest).

    How to read it: of two runs the better one reaches a reward at less KL; the same reward further right was bought by drifting away.
    A path that turns right while the reward stays is the moment to stop, or to raise `kl_coef`. This reward is the one that is
    optimised: a path that rises for ever says nothing of what was meant. Compare it with a source of weight 0 in `rewards/<name>/mean`.

    It is drawn every few updates and at the end. It needs matplotlib: pip install matplotlib.

    Args:
        every_n_steps: optimizer updates between two drawings, at least.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        super().__init__(every_n_steps)
        self.next_step = every_n_steps  # one dot is no path
        self.path: list[tuple[float, float]] = []  # (KL in nats, mean reward) of every rollout

    def on_rollout_end(self, trainer: L.Trainer, pl_module: Any, prompts: PromptBatch, experience: Experience) -> None:
        """Add the rollout's figures, which are means over all ranks."""
        figures = rollout_state(pl_module).figures
        dot = figures.get("objective/kl", math.nan), figures.get("objective/scores", math.nan)
        if all(map(math.isfinite, dot)):
            self.path.append(dot)
        super().on_rollout_end(trainer, pl_module, prompts, experience)

    def observe(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Draw it."""
        targets = writers(trainer)
        if len(self.path) > 1 and targets and pictures.can_draw():
            pictures.show(targets, "kl_reward_path", self.draw(), trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw all of it."""
        if rollout_state(pl_module) is not None:
            self.observe(trainer, pl_module)

    def draw(self) -> Any:
        """The path as a matplotlib figure."""
        figure, axes = pictures.blank("KL-reward path", "KL to the reference, nats", "mean reward")
        kl, reward = zip(*self.path, strict=True)
        axes.plot(kl, reward, color="0.8", linewidth=1, zorder=1)
        dots = axes.scatter(kl, reward, c=range(len(kl)), cmap="viridis", s=18, zorder=2)
        figure.colorbar(dots, label="rollout")
        return figure

    def state_dict(self) -> dict[str, Any]:
        """As in RolloutObserver; the path."""
        return {**super().state_dict(), "path": [list(dot) for dot in self.path]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        super().load_state_dict(state_dict)
        self.path = [(kl, reward) for kl, reward in state_dict["path"]]
