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
        adapter: with LoRA, write the adapter alone too, into adapter/ of the folder, for PEFT.
        push_to_hub: repository on the Hugging Face hub, user/model, to send the folder to. Counts on the command line, never in a config
            file; the token is taken from the environment (HF_TOKEN).
        hub_private: whether that repository, if it is new, is private.
    """

    def __init__(self, dirpath: str | None = None, adapter: bool = False, push_to_hub: str | None = None, hub_private: bool = True) -> None:
        super().__init__()
        self.dirpath, self.adapter, self.push_to_hub, self.hub_private = dirpath, adapter, push_to_hub, hub_private

    def folder(self, trainer: L.Trainer) -> Path:
        """Where the export goes."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "export")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be written now, not after hours of training: a folder of other files, a repository of someone else's."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.check_export_folder(self.folder(trainer))  # type: ignore[operator]
        if self.adapter:
            pl_module.check_adapter()  # type: ignore[operator]
        if self.push_to_hub is not None and trainer.is_global_zero:
            pl_module.prepare_repository(self.push_to_hub, self.hub_private)  # type: ignore[operator]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export, every process together since a split model is gathered; not after a fast_dev_run, which trains nothing worth keeping."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = pl_module.export(self.folder(trainer), adapter=self.adapter)  # type: ignore[operator]
        rank_zero_info(f"exported to {folder}")
        if self.push_to_hub is not None and trainer.is_global_zero:
            rank_zero_info(f"sent to {pl_module.push_to_hub(folder, self.push_to_hub, private=self.hub_private)}")  # type: ignore[operator]
