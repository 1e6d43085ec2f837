"""`last.ckpt`: always a whole checkpoint, saved only where a resumed run repeats the uninterrupted one to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from p3o_lightning.errors import InputError, Stopped


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few updates, at the end of every epoch and of the run, and on the first Ctrl-C.

    It saves at the end of an update only: in the middle of an accumulation window the gradients would be missing. The file is
    written aside, flushed to disk and renamed, so that a killed run leaves the former one, never half of a new one. A sharded checkpoint
    is a folder; `last.ckpt` is then a link to it, renamed likewise. A fast_dev_run saves nothing.

    It is renamed once all that the update led to is logged, a validation included: a resumed run would not log it again.

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
        self.written: int | None = None  # updates in what lies aside
        self.interrupted = self.terminated = self.leaving = False
        self._former: dict[signal.Signals, Any] = {}  # handlers

    def path(self, trainer: L.Trainer) -> Path:
        """Where the checkpoint lies."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for Ctrl-C, and count saves from the step that the run starts or resumes at."""
        self.saved_step = self.seen_step = trainer.global_step
        self.written, self.interrupted, self.terminated, self.leaving = None, False, False, False
        if threading.current_thread() is not threading.main_thread():
            return
        self._former = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt)}
        if trainer.world_size > 1:
            self._former[signal.SIGTERM] = signal.signal(signal.SIGTERM, partial(self._on_terminate, trainer))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write aside where it is due and an update has just ended."""
        step = trainer.global_step
        self.updated, self.seen_step = step != self.seen_step, step
        if not self.updated:
            return
        interrupted, terminated = self.interrupted, self.terminated or trainer.received_sigterm
        if trainer.world_size > 1:  # the signal does not reach all ranks in the same step, and saving is collective
            interrupted, terminated = (trainer.strategy.reduce_boolean_decision(told, all=False) for told in (interrupted, terminated))
            trainer._signal_connector.received_sigterm = terminated  # Lightning then leaves on every rank, once the update is logged
        over = trainer.is_last_batch or trainer.should_stop or step == trainer.max_steps
        if over or interrupted or terminated or step % self.every_n_steps == 0:
            self.write(trainer)
        self.leaving = interrupted

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it again: a validation changes what other callbacks keep, the patience of an EarlyStopping say."""
        if self.written is not None:
            self.write(trainer)

    def on_update_settled(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The update is logged and validated, and nothing of the next one has begun: what lies aside becomes `last.ckpt`."""
        if self.written is not None:
            self.save(trainer)
        if self.leaving:
            self.leaving = False
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """At the latest here; an ExperienceLoader says so before the next rollout."""
        self.on_update_settled(trainer, pl_module)

    def write(self, trainer: L.Trainer) -> None:
        """Write aside. Collective: every rank calls it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            write_aside(trainer, self._aside(trainer))
        except OSError as error:
            raise self._unwritable(trainer, error) from error
        self.written = trainer.global_step

    def save(self, trainer: L.Trainer) -> None:
        """Make what lies aside `last.ckpt`. Collective: every rank calls it."""
        if self.written is None:
            return
        for logger in trainer.loggers:
            logger.save()  # what it holds in memory would be missing after a kill
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            try:
                put(self._aside(trainer), self.path(trainer), self.written)
            except OSError as error:
                raise self._unwritable(trainer, error) from error
        trainer.strategy.barrier()
        self.saved_step, self.written = self.written, None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what came after the last save, where an EarlyStopping ended the run say; give Ctrl-C back."""
        if self.updated and trainer.global_step not in (self.written, self.saved_step):
            self.write(trainer)
        self._restore_handlers()
        self.on_update_settled(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save where training was stopped on purpose and the update is settled; after another error it may not be. Give Ctrl-C back."""
        if isinstance(exception, Stopped) and exception.save and self.saved_step != trainer.global_step:
            self.write(trainer)
            self.save(trainer)
        elif isinstance(exception, SIGTERMException) and not trainer.validating:  # Lightning leaves at the end of an update
            self.save(trainer)
        self._restore_handlers()

    def _aside(self, trainer: L.Trainer) -> Path:
        return self.path(trainer).with_name(".last.partial")

    def _unwritable(self, trainer: L.Trainer, error: OSError) -> InputError:
        path = self.path(trainer)
        discard(self._aside(trainer))
        former = f"--ckpt_path last goes on from step {self.saved_step}" if path.exists() else "nothing was saved yet"
        return InputError(
            f"checkpoint.dirpath is {str(path.parent)!r}, where no checkpoint can be written ({error.strerror or error}): make room there; "
            f"{former}."
        )

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(number, self._former.pop(signal.SIGINT))  # a second Ctrl-C stops at once
        rank_zero_info("interrupted: saving a checkpoint after this update (Ctrl-C again stops at once)")

    def _on_terminate(self, trainer: L.Trainer, number: int, frame: FrameType | None) -> None:
        """In Lightning's place: its handler is itself a collective, begun wherever the signal finds the rank, and the others may hang."""
        if trainer.strategy.launcher is not None and not self.terminated:
            trainer.strategy.launcher.kill(number)  # as it does: tell the processes that this one started
        self.terminated = True  # on_train_batch_end lets all ranks agree

    def _restore_handlers(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())


def write_aside(trainer: L.Trainer, aside: Path) -> None:
    """A whole checkpoint beside the one that it is to replace, optimizer and progress included. Collective: every rank calls it."""
    given = trainer.strategy.checkpoint_io
    if trainer.is_global_zero:
        discard(aside)  # of a run that was killed
    trainer.strategy.barrier()
    if type(given) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = _ToTheFile()
    try:
        trainer.save_checkpoint(aside, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = given


def put(aside: Path, path: Path, step: int, prefix: str = "") -> None:
    """Let `path` be what lies aside: flushed to disk, then in one step, so that `path` is a whole checkpoint at every moment.

    A folder (sharded checkpoint) cannot be renamed over another: it gets a name of its own, which begins with `prefix`, and `path` is a
    link that is renamed.
    """
    former = path.parent / path.readlink() if path.is_symlink() else None
    if aside.is_dir():
        shards = path.with_name(f"{prefix}step-{step}.shards")
        if shards == former:  # saved twice at one step: the one there may not be touched before the link is
            shards = path.with_name(f"{prefix}step-{step}-again.shards")
        for file in aside.iterdir():
            _flush(file)
        _flush(aside)
        discard(shards)
        os.replace(aside, shards)
        os.symlink(shards.name, aside)
    else:
        shards = None
        _flush(aside)
    if path.is_dir() and not path.is_symlink():  # a folder that was put here by other means
        os.replace(path, path.with_name(f"{path.name}.former"))
    os.replace(aside, path)
    _flush(path.parent)
    for folder in path.parent.glob(f"{prefix}step-*.shards"):  # the former one, and what a killed run left
        if folder != shards:
            discard(folder)


class _ToTheFile(TorchCheckpointIO):
    """Writes to the file that it is given. Lightning's own goes by the system's folder of temporary files, where a kill leaves it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Not whole before it has returned: it lies aside until then."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def discard(aside: Path) -> None:
    """Remove the file, link or folder, if there is one."""
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
