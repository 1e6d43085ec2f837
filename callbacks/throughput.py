"""Where the time goes: tokens a second, seconds of generation, scoring and update, and the peak of memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as L
import torch

from p3o_lightning.batches import Experience
from p3o_lightning.callbacks.rollouts import just_made, rollout_state


class Throughput(L.Callback):
    """Logs once a rollout, when its last update is made; other stages every `trainer.log_every_n_steps` updates. The first pays for what is
    made once.

    `throughput/tokens_per_second`: response tokens of all processes for a policy, all real tokens for other stages, over the whole time.
    `throughput/{generation,scoring,update,other}_seconds` add up to the time of a rollout and its updates; "other" is data, logging,
    checkpoints, validation and callbacks. `throughput/peak_memory_mib`: of this process's GPU, else of the process. Seconds are those of
    the clock on rank 0; a GPU's work counts where the CPU waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun, self._step, self._before = 0.0, 0, 0.0
        self._forget()

    def _forget(self) -> None:
        self._update, self._tokens, self._updates = 0.0, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begun, self._step = time.perf_counter(), trainer.global_step
        self._forget()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """An update begins."""
        self._now, self._before = time.perf_counter(), _in_phases(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """An update, or a part of one, is over."""
        now = time.perf_counter()
        self._update += now - self._now - (_in_phases(pl_module) - self._before)  # start-up proofs and callbacks may score and sample, too
        self._updates += 1
        state = rollout_state(pl_module)
        mask = batch.completion_mask if isinstance(batch, Experience) else getattr(batch, "attention_mask", None)
        if isinstance(mask, torch.Tensor) and (state is None or self._updates <= self._once(trainer, pl_module)):
            self._tokens += int(mask.sum())  # of a rollout that is passed over several times, once
        if state is not None:
            over = state.pending is None
        else:
            every = getattr(trainer, "log_every_n_steps", 0) or 50
            over, self._step = trainer.global_step // every > self._step // every, trainer.global_step
        if not over:
            return
        self._log(trainer, pl_module, now)
        vars(pl_module).get("phase_seconds", {}).clear()
        self._begun = now
        self._forget()

    @staticmethod
    def _once(trainer: L.Trainer, pl_module: Any) -> int:
        """Micro-batches of one pass over a rollout."""
        loader = trainer.train_dataloader
        return int(getattr(loader, "micro_batches", sys.maxsize))

    def _log(self, trainer: L.Trainer, pl_module: Any, now: float) -> None:
        seconds = {"generation": 0.0, "scoring": 0.0, **vars(pl_module).get("phase_seconds", {})} if rollout_state(pl_module) else {}
        seconds["update"] = self._update
        whole = now - self._begun
        seconds["other"] = whole - sum(seconds.values())
        figures = {f"throughput/{name}_seconds": value for name, value in seconds.items()}
        figures["throughput/tokens_per_second"] = self._tokens * trainer.world_size / whole
        if (peak := peak_memory(pl_module.device)) is not None:
            figures["throughput/peak_memory_mib"] = peak
        for logger in trainer.loggers:  # not self.log: it would average over updates
            logger.log_metrics(figures, step=just_made(trainer))


def _in_phases(pl_module: Any) -> float:
    """Seconds that the module has counted as generation and scoring."""
    return sum(vars(pl_module).get("phase_seconds", {}).values())


def peak_memory(device: torch.device) -> float | None:
    """MiB that were held at most: by tensors on a GPU, by the whole process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
