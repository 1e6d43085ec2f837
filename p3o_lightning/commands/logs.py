"""Where `p3o fit` writes its figures: TensorBoard events, and the same scalars as CSV beside them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment


def run_loggers(root: Path, version: int | None, resumed_step: int | None) -> list[Logger]:
    """TensorBoard and CSV in one folder: a fresh version for a fresh run; a resumed one goes on in its own, without the steps it repeats.

    Args:
        root: the run's folder.
        version: of the run that is resumed.
        resumed_step: where it is resumed.
    """
    if version is None or not (root / "logs" / f"version_{version}").is_dir():
        version = resumed_step = None
    board = TensorBoardLogger(root, name="logs", version=version, default_hp_metric=False, purge_step=resumed_step)
    return [board, CSVBeside(board, resumed_step)]


class CSVBeside(CSVLogger):
    """`metrics.csv` in the folder of another logger: a row for each step at which something was logged, a column for each tag.

    Args:
        beside: the logger whose folder it is.
        resumed_step: rows from this step on are left out, since they are logged again; None begins afresh.
    """

    def __init__(self, beside: TensorBoardLogger, resumed_step: int | None = None) -> None:
        super().__init__(beside.save_dir, name=beside.name)
        self.beside, self.resumed_step = beside, resumed_step

    @property
    def log_dir(self) -> str:
        """The other's."""
        return self.beside.log_dir

    @property
    def version(self) -> int | str:
        """The other's."""
        return self.beside.version

    @property
    @rank_zero_experiment
    def experiment(self) -> Rows:
        """What collects the rows."""
        if self._experiment is None:
            self._experiment = Rows(self.log_dir, self.resumed_step)
        return self._experiment  # type: ignore[return-value]


class Rows(ExperimentWriter):
    """Lightning's collector, which would delete the file of the run that is resumed."""

    def __init__(self, log_dir: str, resumed_step: int | None) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if resumed_step is None or not path.is_file():
            path.unlink(missing_ok=True)
            return
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self.metrics_keys = list(reader.fieldnames or [])
            kept = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < resumed_step]
        aside = path.with_name(f".{path.name}.partial")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(aside, path)

    def _check_log_dir_exists(self) -> None:
        """The folder is another logger's, and holds its files."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Add to the row of the step, where it is still being collected: a rollout, its update and a callback log one after the other."""
        super().log_metrics(metrics_dict, step)
        new = self.metrics.pop()
        row = next((row for row in reversed(self.metrics) if row["step"] == new["step"]), None)
        if row is None:
            self.metrics.append(new)
        else:
            row.update(new)

    def save(self) -> None:
        """The rows alone: the other logger writes the hyperparameters."""
        self.metrics.sort(key=lambda row: row["step"])
        super(ExperimentWriter, self).save()
