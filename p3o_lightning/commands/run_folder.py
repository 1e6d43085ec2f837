"""The folder of a run: whether it can be written to, the resolved config in it, and nothing left of a run that did not begin."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from p3o_lightning.errors import InputError
from p3o_lightning.text import fenced

LOG_VERSION_KEY = "p3o_log_version"


class SaveConfig(SaveConfigCallback):
    """The resolved config, as <default_root_dir>/config.yaml and as text on the dashboard. Running again overwrites it.

    It is written when the first batch is there: bad input leaves no folder behind. The checkpoint keeps the number of the log folder,
    so that a resumed run goes on in its own.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Write both, once, from rank 0."""
        if self.already_saved:
            return
        self.already_saved = True
        if not trainer.is_global_zero:
            return
        config = self.config.clone()
        config["ckpt_path"] = None  # the config is that of the run, however often it was resumed
        text = self.parser.dump(config, skip_unset=False)
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", fenced(text, "yaml"), 0)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where the run writes its scalars."""
        if isinstance(trainer.logger, TensorBoardLogger):
            checkpoint[LOG_VERSION_KEY] = trainer.logger.version


def check_folder(folder: str | Path) -> None:
    """Refuse a run folder that cannot be written to."""
    wanted = Path(folder).absolute()
    there = next(place for place in (wanted, *wanted.parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"trainer.default_root_dir is {str(folder)!r}, but {there} is a file: name a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"trainer.default_root_dir is {str(folder)!r}, but {there} is not writable: name another folder.")


def sweep(fresh: list[Path], logs: Path | None) -> None:
    """Remove the log folder and the empty folders that a run has made which did not get to train."""
    if logs in fresh:
        shutil.rmtree(logs, ignore_errors=True)
    for folder in fresh:
        with suppress(OSError):  # not empty, or not there; another rank may have been here
            folder.rmdir()
