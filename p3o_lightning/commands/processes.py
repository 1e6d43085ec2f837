"""When one of several processes fails: its error is the one that is read, and the others end at once rather than wait for it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import lightning.pytorch as L
import torch.distributed

PATIENCE = 2.0  # seconds for the others to notice by themselves


def end_together(trainer: L.Trainer, error: BaseException) -> None:
    """End the processes that this one has started; end this one, in one line, if the error is only that another one is gone."""
    if trainer.world_size == 1:
        return
    started = getattr(trainer.strategy.launcher, "procs", [])
    codes = [_ended(process) for process in started]
    if _says_that_another_is_gone(error):
        print(f"p3o: process {trainer.global_rank} ends, because another one did: its error is above", file=sys.stderr, flush=True)
        os._exit(next((code for code in codes if code > 0), 1))  # leaving the group in order would wait for the one that is gone


def _ended(process: subprocess.Popen[Any]) -> int:
    """The exit status of a process, which is killed if it does not end soon."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _says_that_another_is_gone(error: BaseException) -> bool:
    """Errors of torch's communication, which tell nothing of why. gloo's have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
