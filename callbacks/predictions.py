"""What `p3o predict` writes: one JSON line for each prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from p3o_lightning.text import json_line, visible


class PredictionWriter(BasePredictionWriter):
    """Writes rows {"prompt", "responses"} as JSONL while predicting; the file appears, whole, when all are there.

    Args:
        path: the file; None is <default_root_dir>/predictions.jsonl. Several processes write one file each, with the rank in its name.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self.target: Path | None = None
        self.aside: Path | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with an empty file beside the target."""
        target = Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")
        if trainer.world_size > 1:
            target = target.with_name(f"{target.stem}.{trainer.global_rank}{target.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.target, self.aside = target, target.with_name(target.name + ".partial")
        self.aside.write_text("", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the batch's rows."""
        assert self.aside is not None
        with self.aside.open("a", encoding="utf-8") as file:
            file.writelines(json_line(row) + "\n" for row in prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the file in its place, and say where that is."""
        assert self.target is not None and self.aside is not None
        os.replace(self.aside, self.target)
        rank_zero_info(f"predictions in {visible(str(self.target))}")
