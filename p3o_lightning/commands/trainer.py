"""`p3o fit|validate|test|predict`: LightningCLI with our classes by short name, a run folder, resuming, and errors of one line."""

from __future__ import annotations

import errno
import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

import p3o_lightning.callbacks  # noqa: F401  (short names in YAML)
from p3o_lightning import __version__
from p3o_lightning.callbacks import CollapseAlarm, Export, FiniteGuard, KLBudget, LastCheckpoint, PredictionWriter, observers
from p3o_lightning.commands.arguments import Parser, ShippedConfig, causes, overview
from p3o_lightning.commands.logs import run_loggers
from p3o_lightning.commands.processes import end_together
from p3o_lightning.commands.progress import Progress
from p3o_lightning.commands.resuming import CommandLineWins, changed_settings, check_changes, optimizers_of
from p3o_lightning.commands.run_folder import LOG_VERSION_KEY, SaveConfig, check_folder, sweep
from p3o_lightning.commands.terminal import quiet_libraries
from p3o_lightning.commands.writing import FLAG, check_writing
from p3o_lightning.errors import InputError
from p3o_lightning.models import CHECKPOINT_KEY, read_description
from p3o_lightning.sharded_checkpoints import WholeCheckpointIO, is_sharded
from p3o_lightning.sharding import splits
from p3o_lightning.stage import Stage

say = rank_zero_only(print)


class StageCLI(LightningCLI):
    """One command for the three stages."""

    resumed_step: int | None = None
    resumed_version: int | None = None

    def __init__(self, arguments: list[str]) -> None:
        self.command, self.arguments = arguments[0], arguments
        usage = f"p3o {self.command} --config FILE [--KEY VALUE ...]"
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
            parser_class=Parser,
            parser_kwargs={self.command: {"description": overview(self.command), "usage": usage}},
            args=arguments,
        )

    # ---- arguments

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method there
        """The asked one alone: the parsers of the four cost as much time as everything else here."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Our parser."""
        parser = self.parser_class(dump_header=[f"p3o_lightning {__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=ShippedConfig, help="a config file; several overlay, later ones win")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What users set most comes first: the stage and its data."""
        parser.add_argument("--quiet", nargs="?", const=True, type=bool, default=False, help="no progress bar, no messages but warnings")
        outside = "let the config write out of trainer.default_root_dir; counts on the command line, never in a config file"
        parser.add_argument(f"--{FLAG}", nargs="?", const=True, type=bool, default=False, help=outside)
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
        parser.set_defaults({"data": {"class_path": "p3o_lightning.PreferenceDataModule"}})
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(FiniteGuard, "finite")
        parser.add_lightning_class_args(KLBudget, "kl_budget")
        parser.add_lightning_class_args(CollapseAlarm, "collapse")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Headings that say what the sections are."""
        for group, title in (
            ("model", "model: the stage"),
            ("data", "data: what it is trained on"),
            ("checkpoint", "checkpoint: last.ckpt, which --ckpt_path last resumes from"),
            ("export", "export: the trained model as a transformers folder, at the end"),
            ("finite", "finite: what a NaN or an infinity does"),
            ("kl_budget", "kl_budget: how far the policy may leave its reference"),
            ("collapse", "collapse: when a policy that repeats itself is warned of"),
            ("trainer", "trainer: Lightning's Trainer"),
        ):
            (parser.groups or {})[group].title = title

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Our words for what Lightning's method takes."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                does = "go on from" if subcommand == "fit" else "use the weights of"
                action.help = f"{does} this checkpoint; last: <default_root_dir>/checkpoints/last.ckpt. Flags win over its settings."
            elif action.dest == "weights_only":
                action.help = "how the checkpoint is loaded; ours need no pickle (default: as safe as torch.load)"
            elif action.dest == "verbose":
                action.help = "print the figures"
        return parser

    @property
    def settings(self) -> Any:
        """The parsed values of the command."""
        return self.config.get(str(self.subcommand), self.config)

    # ---- before anything slow is built

    def _parse_ckpt_path(self) -> None:
        """Lightning would replace the user's config by the checkpoint's hyperparameters here, without a word. The command line wins."""

    def before_instantiate_classes(self) -> None:
        """Check the folder to write to and the checkpoint to start from."""
        settings = self.settings
        quiet_libraries(settings.quiet, trains=self.subcommand == "fit")
        callbacks = self._parser(self.subcommand).callback_keys if self.subcommand == "fit" else []  # no other command builds them
        check_writing(settings, self.arguments, ["trainer", *callbacks])
        if self.subcommand in ("fit", "predict"):
            check_folder(settings.trainer.default_root_dir)
        if settings.get("ckpt_path"):
            settings.ckpt_path = str(self._checkpoint(settings))

    def _checkpoint(self, settings: Any) -> Path:
        """The checkpoint that `--ckpt_path` names, after its checks."""
        path = Path(settings.ckpt_path)
        if str(path) == "last":
            path = Path(settings.checkpoint.dirpath or Path(settings.trainer.default_root_dir) / "checkpoints") / "last.ckpt"
        if not path.exists():
            raise InputError(f"ckpt_path is {settings.ckpt_path!r}, but {path} does not exist: leave --ckpt_path out to start afresh.")
        checkpoint = read_description(path)
        stage, now = checkpoint[CHECKPOINT_KEY]["stage"], _class_of(settings.model.class_path)
        if stage != now.__name__:
            raise InputError(
                f"ckpt_path is {settings.ckpt_path!r}, which holds a {stage}, but model.class_path is {now.__name__}: give a checkpoint of "
                f"that class, or start from its weights by --model.model {path}."
            )
        if self.subcommand == "fit":
            self.resumed_step = int(checkpoint["global_step"])
            self.resumed_version = checkpoint.get(LOG_VERSION_KEY)
            changed = changed_settings(checkpoint, settings)
            check_changes(checkpoint, changed, settings)
            say(f"resumed from step {self.resumed_step} ({path})", flush=True)
            if changed:
                say("changed on resume: " + ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items()), flush=True)
        return path

    # ---- building

    def instantiate_classes(self) -> None:
        """Build all of it; what our classes refuse is reported in their own words, not in jsonargparse's."""
        try:
            super().instantiate_classes()
        except Exception as error:
            for cause in causes(error):
                if isinstance(cause, InputError):
                    raise cause from None
            raise
        if self.subcommand == "predict" and not is_overridden("predict_step", self.model):
            raise InputError(
                f"model.class_path is {type(self.model).__name__}, which samples no responses: predict with a policy, e.g. a "
                "PairwisePolicy; p3o validate measures a RewardModel."
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer, with our logger and progress bar where the config names none."""
        given = self._get(self.config_init, "trainer")
        root = Path(given.default_root_dir)
        fits = self.subcommand == "fit"
        if "logger" not in kwargs and given.logger in (None, True):
            kwargs["logger"] = run_loggers(root, self.resumed_version, self.resumed_step) if fits and not given.fast_dev_run else False
        callbacks = list(given.callbacks) if isinstance(given.callbacks, list) else [given.callbacks] if given.callbacks else []
        wants_bar = given.enable_progress_bar is not False and not self.settings.quiet and sys.stdout.isatty()
        kwargs["enable_progress_bar"] = wants_bar
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(Progress(self._memory))
        if self.subcommand == "predict" and not any(isinstance(callback, PredictionWriter) for callback in callbacks):
            callbacks.append(PredictionWriter())
        if given.enable_model_summary is None:
            kwargs["enable_model_summary"] = False
        if fits:  # the callbacks that have a section; `checkpoint` only where checkpoints are kept
            mine = [self._get(self.config_init, name) for name in self._parser(self.subcommand).callback_keys]
            mine += observers()
            mine = [item for item in mine if type(item) not in map(type, callbacks)]  # trainer.callbacks has one of its own
            callbacks += [item for item in mine if not (isinstance(item, LastCheckpoint) and given.enable_checkpointing is False)]
            if self.resumed_step is not None:
                callbacks.append(CommandLineWins(optimizers_of(self.model.configure_optimizers())))
            if self.save_config_callback and not given.fast_dev_run:
                callbacks.append(self.save_config_callback(self._parser(self.subcommand), self.settings, **self.save_config_kwargs))
        if self.settings.get("ckpt_path") and is_sharded(Path(self.settings.ckpt_path)) and not splits(given.strategy):
            kwargs["plugins"] = [*(given.plugins or []), WholeCheckpointIO()]
        try:
            return self.trainer_class(**{**given, **kwargs, "callbacks": callbacks})
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"the trainer section cannot be used: {_first_line(error)}") from error

    def _memory(self) -> str | None:
        """The estimate of `p3o doctor --plan`, in a line; None of a stage that it does not know."""
        from p3o_lightning.commands.plan import Plan

        with suppress(Exception):  # no run stops for want of an estimate
            return Plan(self.settings).in_a_line()
        return None

    # ---- running

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; after Ctrl-C or SIGTERM, one line, and the exit status that shells give to a process that was stopped so."""
        said, threading.excepthook = threading.excepthook, _said_by_the_main_thread
        try:
            self._run_together(subcommand)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if isinstance(error.__context__, InputError):  # of the checkpoint, which says more
                raise error.__context__ from None
            raise InputError(
                f"trainer.default_root_dir is {self.trainer.default_root_dir!r}, where a file cannot be written ({error.strerror}): make "
                "room there. A checkpoint that was saved is whole: --ckpt_path last goes on from it."
            ) from error
        except SystemExit as stop:
            terminated = self.trainer.received_sigterm
            if not terminated and not (stop.code == 1 and isinstance(stop.__context__, KeyboardInterrupt)):  # Lightning's way to leave
                raise
            saved = [item for item in self.trainer.callbacks if isinstance(item, LastCheckpoint) and item.path(self.trainer).exists()]  # type: ignore[attr-defined]
            then = f"; --ckpt_path last goes on from step {saved[0].saved_step}" if subcommand == "fit" and saved else ""
            how = "terminated" if terminated else "interrupted"
            print(f"p3o: {how} at step {self.trainer.global_step}{then}", file=sys.stderr)
            raise SystemExit(143 if terminated else 130) from None
        finally:
            threading.excepthook = said

    def _run_together(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            end_together(self.trainer, error)
            raise

    def fit(self, **arguments: Any) -> None:
        """Train. What stops the run before its first update leaves no folder behind."""
        root = Path(self.trainer.default_root_dir).absolute()
        logger = self.trainer.logger
        logs = Path(logger.log_dir) if isinstance(logger, TensorBoardLogger) else None
        fresh = [folder for folder in (logs, root / "logs", root, *root.parents) if folder is not None and not folder.exists()]
        try:
            self.trainer.fit(**arguments)
        except BaseException:
            if self.trainer.global_step == (self.resumed_step or 0):
                sweep(fresh, logs)
            raise

    def validate(self, verbose: bool = True, **arguments: Any) -> None:
        """Evaluate on the validation rows, and print the figures."""
        _show(self.trainer.validate(verbose=False, **arguments), verbose)

    def test(self, verbose: bool = True, **arguments: Any) -> None:
        """Evaluate on the test rows, and print the figures."""
        _show(self.trainer.test(verbose=False, **arguments), verbose)


class Rehearsal(StageCLI):
    """A fit up to its first batch, for `p3o doctor`: no update, nothing written."""

    class FirstBatch(Exception):
        """It is there."""

    class StopThere(L.Callback):
        """Ends the run before the first update."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            """Here."""
            raise Rehearsal.FirstBatch

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The config's, without a logger, and stopped."""
        trainer = super().instantiate_trainer(**{**kwargs, "logger": False})
        trainer.callbacks.insert(0, self.StopThere())  # type: ignore[attr-defined]
        return trainer

    def fit(self, **arguments: Any) -> None:
        """Up to the first batch."""
        with suppress(self.FirstBatch):
            super().fit(**arguments)


def _show(results: Any, verbose: bool) -> None:
    """The figures of an evaluation, one a line."""
    if verbose:
        for figures in results:
            for name, value in sorted(figures.items()):
                say(f"{name:<30} {value:.4f}")


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _said_by_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer is a thread. What stops it is raised again where something is logged next."""
    if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in NO_ROOM):
        threading.__excepthook__(failure)


def _class_of(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning itself raised it, about the Trainer's flags; not code of ours or of the user's that it called."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(L.__file__).parents[1])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def rehearse(arguments: list[str]) -> StageCLI:
    """`p3o fit ...` up to its first batch; raises what would stop it."""
    return main(arguments, Rehearsal)


def main(arguments: list[str], run: type[StageCLI] = StageCLI) -> StageCLI:
    """Run `p3o fit|validate|test|predict ...`; returns the command with its trainer, model and data."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    given = class_help(arguments)
    if len(given) == 1:
        raise InputError(f"{given[0]} needs a model and data: give --config FILE, e.g. configs/debug/policy.yaml (p3o {given[0]} --help).")
    try:
        return run(given)
    except (MisconfigurationException, ValueError) as error:
        if isinstance(error, InputError) or not _is_lightnings(error):
            raise
        raise InputError(f"the trainer section cannot be used: {_first_line(error)}") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        where = next((line.strip() for line in str(error).splitlines()[1:]), "")
        raise InputError(
            f"ckpt_path names weights that do not fit the model of this config ({where}): give the config of that run."
        ) from error


def class_help(arguments: list[str]) -> list[str]:
    """`fit --model CLASS --help` means the help of that class, which is `fit --model.help CLASS` to jsonargparse."""
    if not {"-h", "--help"} & set(arguments):
        return arguments
    for key in ("--model", "--data"):
        for place, argument in enumerate(arguments):
            if argument.startswith(f"{key}="):
                return [arguments[0], f"{key}.help={argument.partition('=')[2]}"]
            if argument == key and place + 1 < len(arguments) and not arguments[place + 1].startswith("-"):
                return [arguments[0], f"{key}.help={arguments[place + 1]}"]
    return arguments
