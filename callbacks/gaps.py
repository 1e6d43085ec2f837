"""How a rollout's rewards, weights and lengths are spread, of which the scalars show the mean alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from jaxtyping import Float
from torch import Tensor

from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.callbacks.dashboard import writers
from p3o_lightning.callbacks.rollouts import RolloutObserver, just_made, pair_gaps, rollout_state


class RewardGap(RolloutObserver):
    """Histograms of a rollout: `histograms/q`, `histograms/ratio`, `histograms/length`.

    How to read them:
    `histograms/q`: the reward gap q of every pair, KL included, reward units; its sign is the order of sampling, so it is symmetric. A
        spike at 0: the responses of a prompt are alike to the reward, and nothing is learned from them. Two far humps: a 0/1 reward.
        Single pairs far out: they dominate the update; `model.gap_scale: rms` does not change that, a better reward does.
    `histograms/ratio`: the importance weight w = pi/pi_old of every response in every update on the rollout, cut at exp(20). 1 at the first
        update; a right tail that grows says that `num_iterations` or the learning rate is too high.
    `histograms/length`: tokens of every response, EOS included. A spike at `max_completion_length`: responses are cut off.

    They are of the first rank's share of the rollout.

    Args:
        every_n_steps: optimizer updates between two rollouts that are looked at, at least.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        super().__init__(every_n_steps)
        self.ratios: list[Tensor] | None = None  # of the updates so far on the rollout that is looked at

    def observe(self, trainer: L.Trainer, pl_module: Any, prompts: PromptBatch, experience: Experience) -> None:
        """Write gaps and lengths; the ratios follow when the rollout has been trained on."""
        self.ratios = []
        for writer in writers(trainer):
            writer.add_histogram("histograms/length", experience.completion_mask.sum(-1), trainer.global_step)
            gaps = shaped_gaps(experience, rollout_state(pl_module).kl_coef)
            if gaps is not None and bool(gaps.isfinite().all()):
                writer.add_histogram("histograms/q", gaps, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Collect the ratios of an update; after the rollout's last one, write them."""
        state, log_ratio = rollout_state(pl_module), getattr(pl_module, "latest_log_ratio", None)
        if self.ratios is None or state is None or log_ratio is None:
            return
        self.ratios.append(log_ratio.float().cpu().clamp(max=20.0).exp())
        if state.pending is not None:
            return
        ratios, self.ratios = torch.cat([part.flatten() for part in self.ratios]), None
        for writer in writers(trainer) if bool(ratios.isfinite().all()) else []:
            writer.add_histogram("histograms/ratio", ratios, just_made(trainer))

    def state_dict(self) -> dict[str, Any]:
        """As in RolloutObserver; the ratios so far."""
        return {**super().state_dict(), "ratios": self.ratios}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as before."""
        super().load_state_dict(state_dict)
        self.ratios = state_dict["ratios"]


def shaped_gaps(experience: Experience, kl_coef: float) -> Float[Tensor, " pair"] | None:
    """q of every pair i < j of every prompt as sampled: r_i - r_j - kl_coef (KL_i - KL_j), reward units; None where nothing was scored."""
    gaps = pair_gaps(experience)
    if gaps is None:
        return None
    kls = (experience.old_logps - experience.ref_logps).to(gaps.dtype)
    first, second = torch.triu_indices(gaps.shape[1], gaps.shape[1], 1, device=gaps.device)
    return (gaps[:, first, second] - kl_coef * (kls[:, first] - kls[:, second])).flatten()
