"""`p3o fit|validate|test|predict`: LightningCLI with our classes by short name, a run folder, resuming, and errors of one line."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils.logging import disable_progress_bar

import p3o_lightning.callbacks  # noqa: F401  (short names in YAML)
from p3o_lightning.callbacks import Export, LastCheckpoint, PredictionWriter
from p3o_lightning.cli import fail
from p3o_lightning.data import PreferenceDataModule
from p3o_lightning.errors import InputError
from p3o_lightning.models import read_checkpoint
from p3o_lightning.policy import PairwisePolicy
from p3o_lightning.reward_model import RewardModel
from p3o_lightning.shipped import shipped
from p3o_lightning.stage import Stage
from p3o_lightning.supervised import SupervisedPolicy

STAGES = (SupervisedPolicy, RewardModel, PairwisePolicy)  # imported so that YAML can name them without their module


class Parser(LightningArgumentParser):
    """The argument parser, with errors of one line that name the key and the nearest right one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit 2 with one line."""
        cause: BaseException | None = ex
        while cause is not None:  # a message of ours, raised while a class was built, says it best
            if isinstance(cause, InputError):
                message = str(cause)
                break
            cause = cause.__cause__ or cause.__context__
        text = re.sub(r"\s+", " ", message)
        text = re.sub(r" ?Problem with given class_path '[\w.]+': ?", " ", text)
        fail(text[:600].strip() + self._nearest(text))
        raise AssertionError  # fail() exits

    def _nearest(self, message: str) -> str:
        unknown = re.search(r"(?:Key|key|option|arguments:|Option) '?-*([\w.]+)'? ?(?:is not expected|)", message)
        if unknown is None or ("not expected" not in message and "nrecognized" not in message):
            return ""
        word = unknown.group(1).split(".")[-1]
        known = {name.split(".")[-1] for name in self._known_names()}
        close = difflib.get_close_matches(word, known, 1)
        return f" Did you mean {close[0]!r}?" if close else " (p3o fit --help lists the keys.)"

    @staticmethod
    def _known_names() -> list[str]:
        import inspect

        classes = (*STAGES, PreferenceDataModule, L.Trainer, LastCheckpoint, Export)
        return [name for owner in classes for name in inspect.signature(owner.__init__).parameters]


class SaveConfig(SaveConfigCallback):
    """The resolved config, as <default_root_dir>/config.yaml and as text on the dashboard. Running again overwrites it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both, from rank 0."""
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        text = self.parser.dump(self.config, skip_none=False)
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", f"```yaml\n{text}\n```", 0)


class StageCLI(LightningCLI):
    """One command for the three stages."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            Stage,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs"},
            args=arguments,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Our parser."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=_config_action(), help="a config file; several overlay, later ones win")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`checkpoint:` and `export:` sections; `quiet`."""
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Export, "export")
        parser.add_argument("--quiet", type=bool, default=False, help="no progress bar, no messages but warnings and errors")

    @property
    def settings(self) -> Any:
        """The parsed values of the command."""
        return self.config.get(str(self.subcommand), self.config)

    def _parse_ckpt_path(self) -> None:
        """Lightning would replace the user's config by the checkpoint's hyperparameters here, without a word. The command line wins."""

    def before_instantiate_classes(self) -> None:
        """Resolve `--ckpt_path last`, before anything slow is built."""
        settings = self.settings
        if settings.quiet:
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if not settings.get("ckpt_path"):
            return
        path = Path(settings.ckpt_path)
        if str(path) == "last":
            path = Path(settings.checkpoint.dirpath or Path(settings.trainer.default_root_dir) / "checkpoints") / "last.ckpt"
        if not path.exists():
            raise InputError(f"ckpt_path is {settings.ckpt_path!r}, but {path} does not exist: leave --ckpt_path out to start afresh.")
        settings.ckpt_path = str(path)
        self.resumed_step = None if path.is_dir() else int(read_checkpoint(path)["global_step"])
        if self.subcommand == "fit" and self.resumed_step is not None:
            print(f"resumed from step {self.resumed_step} ({path})", flush=True)

    resumed_step: int | None = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer, with our logger and progress bar where the config names none."""
        trainer = self._get(self.config_init, "trainer")
        root = Path(trainer.default_root_dir)
        if trainer.logger in (None, True):
            kwargs["logger"] = self._logger(root) if self.subcommand == "fit" and not trainer.fast_dev_run else False
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks] if trainer.callbacks else []
        callbacks = list(callbacks)
        wants_bar = trainer.enable_progress_bar is not False and not self.settings.quiet and sys.stdout.isatty()
        kwargs["enable_progress_bar"] = wants_bar
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RichProgressBar())
        if self.subcommand == "predict" and not any(isinstance(callback, PredictionWriter) for callback in callbacks):
            callbacks.append(PredictionWriter())
        if trainer.enable_model_summary is None:
            kwargs["enable_model_summary"] = wants_bar
        # the callbacks of the `checkpoint` and `export` sections belong to a fit that keeps checkpoints
        mine = [self._get(self.config_init, name) for name in self._parser(self.subcommand).callback_keys]
        if self.subcommand == "fit":
            callbacks += [item for item in mine if not (isinstance(item, LastCheckpoint) and trainer.enable_checkpointing is False)]
        kwargs["callbacks"] = callbacks
        config = {**trainer, **kwargs}
        if self.subcommand == "fit" and self.save_config_callback and not trainer.fast_dev_run:
            config["callbacks"].append(
                self.save_config_callback(
                    self._parser(self.subcommand), self.config.get(str(self.subcommand), self.config), **self.save_config_kwargs
                )
            )
        return self.trainer_class(**config)

    def _logger(self, root: Path) -> TensorBoardLogger:
        """A fresh version for a fresh run; a resumed one goes on in the latest, with the steps that it repeats purged."""
        if self.resumed_step is None:
            return TensorBoardLogger(root, name="logs", default_hp_metric=False)
        versions = sorted(int(path.name.removeprefix("version_")) for path in (root / "logs").glob("version_*") if path.name[8:].isdigit())
        version = versions[-1] if versions else 0
        return TensorBoardLogger(root, name="logs", version=version, default_hp_metric=False, purge_step=self.resumed_step)


def _config_action() -> Any:
    from jsonargparse import ActionConfigFile

    class ShippedConfig(ActionConfigFile):
        """A config file; `configs/...` that is not in the working directory is looked up among the shipped ones."""

        def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
            path = shipped(str(value))
            if not path.is_file():
                raise InputError(
                    f"config is {str(value)!r}: no such file. Give a YAML file, or a shipped one, e.g. configs/debug/policy.yaml."
                )
            super().__call__(parser, namespace, str(path), option_string)

    return ShippedConfig


def quiet_lightning() -> None:
    """Drop Lightning's advertising and what a user can do nothing about; its other messages stay."""
    noise = ("litlogger", "litmodels", "GPU available", "TPU available", "HPU available", "`Trainer.fit` stopped", "Seed set to")
    disable_progress_bar()  # of loading and saving weights: a line each
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "lightning.fabric"):
        logging.getLogger(name).addFilter(lambda record: not any(word in record.getMessage() for word in noise))
    for handler in (*logging.getLogger("lightning.pytorch").handlers, *logging.getLogger("lightning.fabric").handlers):
        handler.addFilter(lambda record: not any(word in record.getMessage() for word in noise))
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*no `val_dataloader`.*",
        ".*log_every_n_steps.*",
        ".*eval mode.*",
        ".*args parameter is intended.*",
    ):
        warnings.filterwarnings("ignore", message)


def main(arguments: list[str]) -> StageCLI:
    """Run `p3o fit|validate|test|predict ...`; returns the command with its trainer, model and data."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    try:
        return StageCLI(arguments)
    except SystemExit as stop:
        if stop.code == 1 and isinstance(stop.__context__, KeyboardInterrupt):  # how Lightning leaves after Ctrl-C
            raise KeyboardInterrupt from None
        raise
