"""At the end of a fit: the trained model as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info


class Export(L.Callback):
    """Writes `export/`: safetensors, tokenizer, chat template, generation config, model card. It appears whole or not at all.

    An earlier export is replaced; a folder with anything else in it stops the run before it begins.

    Args:
        dirpath: the folder; None is <default_root_dir>/export.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__()
        self.dirpath = dirpath

    def folder(self, trainer: L.Trainer) -> Path:
        """Where the export goes."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "export")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a folder of the user's other files now, not after hours of training."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            pl_module.check_export_folder(self.folder(trainer))  # type: ignore[operator]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export, every process together since a split model is gathered; not after a fast_dev_run, which trains nothing worth keeping."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = pl_module.export(self.folder(trainer))  # type: ignore[operator]
        rank_zero_info(f"exported to {folder}")
