"""`last.ckpt`: always a whole checkpoint, saved only where a resumed run repeats the uninterrupted one to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from p3o_lightning.errors import InputError


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few updates, at the end of every epoch and of the run, and on the first Ctrl-C.

    It saves at the end of an update only: in the middle of an accumulation window the gradients would be missing. The file is
    written aside, flushed to disk and renamed, so that a killed run leaves the former one, never half of a new one. A fast_dev_run
    saves nothing.

    Args:
        every_n_steps: optimizer updates between two saves.
        dirpath: folder of `last.ckpt`; None is <default_root_dir>/checkpoints.
    """

    def __init__(self, every_n_steps: int = 100, dirpath: str | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"checkpoint.every_n_steps is {every_n_steps}: choose at least 1 update.")
        self.every_n_steps, self.dirpath = every_n_steps, dirpath
        self.saved_step = 0
        self.seen_step = 0  # updates at the end of the latest batch
        self.updated = False  # whether that batch ended an update
        self.interrupted = False
        self._former_handler: Any = None

    def path(self, trainer: L.Trainer) -> Path:
        """Where the checkpoint lies."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for Ctrl-C, and count saves from the step that the run starts or resumes at."""
        self.saved_step = self.seen_step = trainer.global_step
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where it is due and an update has just ended."""
        step = trainer.global_step
        self.updated, self.seen_step = step != self.seen_step, step
        if not self.updated:
            return
        interrupted = self.interrupted or trainer.received_sigterm
        if trainer.world_size > 1:  # the signal does not reach all ranks in the same step, and saving is collective
            interrupted = trainer.strategy.reduce_boolean_decision(interrupted, all=False)
        over = trainer.is_last_batch or trainer.should_stop or step == trainer.max_steps
        if over or interrupted or step % self.every_n_steps == 0:
            self.save(trainer)
        if interrupted:
            raise KeyboardInterrupt

    def save(self, trainer: L.Trainer) -> None:
        """Write aside, flush, rename. Collective: every rank calls it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self.path(trainer)
        aside = path.with_name(".last.partial")
        trainer.save_checkpoint(aside, weights_only=False)  # False: optimizer and progress too
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            _flush(aside)
            if path.is_dir():  # a folder (sharded checkpoint) cannot be renamed over another
                shutil.rmtree(path)
            os.replace(aside, path)
            _flush(path.parent)
        trainer.strategy.barrier()
        self.saved_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what came after the last save, where an EarlyStopping ended the run say; give Ctrl-C back."""
        if self.updated and self.saved_step != trainer.global_step:
            self.save(trainer)
        self._restore_handler()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._restore_handler()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._restore_handler()  # a second Ctrl-C stops at once
        rank_zero_info("interrupted: saving a checkpoint after this update (Ctrl-C again stops at once)")

    def _restore_handler(self) -> None:
        if self._former_handler is not None:
            signal.signal(signal.SIGINT, self._former_handler)
            self._former_handler = None


def _flush(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
