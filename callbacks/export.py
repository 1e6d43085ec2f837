"""At the end of a fit: the trained model as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info


class Export(L.Callback):
    """Writes `export/`: safetensors, tokenizer, chat template, generation config, model card. It appears whole or not at all.

    Args:
        dirpath: the folder; None is <default_root_dir>/export.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__()
        self.dirpath = dirpath

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export once, from rank 0; not after a fast_dev_run, which trains nothing worth keeping."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        folder = pl_module.export(self.dirpath or Path(trainer.default_root_dir) / "export")  # type: ignore[operator]
        rank_zero_info(f"exported to {folder}")
