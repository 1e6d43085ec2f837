"""`best.ckpt`: of the policies that stayed near their reference, the one with the highest reward on held-out prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from p3o_lightning.callbacks.checkpoint import discard, put, write_aside
from p3o_lightning.errors import InputError


class BestAtKL(L.Callback):
    """Keeps `best.ckpt`, the checkpoint with the highest reward in validation among those with KL up to a bound.

    Without the bound the best is nearly always the last, since KL is what reward is bought with. Use it as `last.ckpt`: as a model source
    (`model.model: .../best.ckpt`) or in `p3o predict --ckpt_path`. What it compares is logged anyway: `val/scores` and `val/kl`. It looks
    after every validation, so it needs held-out prompts (`data.val_fraction`) and a `trainer.val_check_interval` or
    `check_val_every_n_epoch` that validates often enough.

    Args:
        max_kl: nats per response, mean over the held-out prompts, that the policy may be away from its reference.
        monitor: the figure of a validation to be highest.
        kl: the figure of a validation to be at most max_kl.
        dirpath: folder of `best.ckpt`; None is <default_root_dir>/checkpoints.
    """

    def __init__(self, max_kl: float, monitor: str = "val/scores", kl: str = "val/kl", dirpath: str | None = None) -> None:
        super().__init__()
        if not max_kl > 0:
            raise InputError(f"BestAtKL.max_kl is {max_kl}: choose a number of nats above 0, e.g. 10.")
        self.max_kl, self.monitor, self.kl, self.dirpath = max_kl, monitor, kl, dirpath
        self.best: dict[str, float] = {}  # step, and both figures, of what is kept

    def path(self, trainer: L.Trainer) -> Path:
        """Where the checkpoint lies."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints") / "best.ckpt"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the policy if it is the best so far. The figures are means over all ranks: they decide together."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        missing = [name for name in (self.monitor, self.kl) if name not in trainer.callback_metrics]
        if missing:
            raise InputError(f"BestAtKL looks for {missing[0]!r}, which this stage does not log in validation: name one that it does.")
        reward, kl = (float(trainer.callback_metrics[name]) for name in (self.monitor, self.kl))
        if not math.isfinite(reward) or not kl <= self.max_kl or reward <= self.best.get("reward", -math.inf):
            return
        self.best = {"step": float(trainer.global_step), "reward": reward, "kl": kl}  # before the checkpoint, which holds it
        self._save(trainer)
        rank_zero_info(f"best.ckpt: step {trainer.global_step}, {self.monitor} {reward:.4g} at {self.kl} {kl:.4g}")

    def _save(self, trainer: L.Trainer) -> None:
        path = self.path(trainer)
        aside = path.with_name(".best.partial")
        try:
            write_aside(trainer, aside)
            if trainer.is_global_zero:
                put(aside, path, trainer.global_step, prefix="best-")
        except OSError as error:
            discard(aside)
            raise InputError(
                f"BestAtKL.dirpath is {str(path.parent)!r}, where no checkpoint can be written ({error.strerror or error}): make room "
                "there."
            ) from error
        trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        """What is kept."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with it."""
        self.best = dict(state_dict["best"])
