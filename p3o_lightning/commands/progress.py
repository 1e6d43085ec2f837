"""What a run shows on a terminal: its plan, then one bar over all of its updates, with reward, margin, KL, speed and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text
from torch import Tensor

from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.experience import ExperienceLoader


class Progress(RichProgressBar):
    """Lightning's bar, over the updates of the whole run instead of the batches of an epoch; it ends before the run's last lines.

    Args:
        memory: asked for a line on the memory that the run will take; None is no such line.
    """

    def __init__(self, memory: Callable[[], str | None] = lambda: None) -> None:
        super().__init__(refresh_rate=10)
        self.memory = memory
        self.pace = Pace()

    # ---- the plan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what will be done, then begin."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.parameters()]
        trained, total = sum(size for size, wanted in sizes if wanted), sum(size for size, _ in sizes)
        self._stop_progress()  # of the trial validation
        print(course(trainer, pl_module))
        print(f"training {trained:,} of {total:,} parameters on {pl_module.device}, precision {trainer.precision}", flush=True)
        if line := self.memory():
            print(line, flush=True)
        super().on_train_start(trainer, pl_module)
        self.pace.begin(trainer.global_step)

    # ---- the bar

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Stage, bar, updates, time; figures follow."""
        bar = CustomBarColumn(complete_style="cyan", finished_style="green", pulse_style="cyan", bar_width=14)
        return [TextColumn("{task.description}"), bar, BatchesProcessedColumn(style=""), TimeLeft(self.pace)]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One bar for all epochs."""
        if self.is_enabled and self.progress is not None and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    def _initialize_train_progress_bar_id(self) -> None:
        name, step = type(self.trainer.lightning_module).__name__, self.trainer.global_step
        self.train_progress_bar_id = self._add_task(self.pace.all_updates(self.trainer), name)
        self._update(self.train_progress_bar_id, step)

    def on_rollout_end(self, trainer: L.Trainer, pl_module: Any, prompts: PromptBatch, experience: Experience) -> None:
        """Count a rollout's response tokens."""
        self.pace.count(experience.completion_mask.sum() * trainer.world_size)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move on, by updates."""
        if not isinstance(batch, Experience) and isinstance(mask := getattr(batch, "attention_mask", None), Tensor):
            self.pace.count(mask.sum() * trainer.world_size)
        self.pace.step = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What the stage logs with `prog_bar=True`, and the speed."""
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {**items, "tokens/s": f"{self.pace.tokens_a_second():,.0f}"} if trainer.training else items

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the line to the messages that follow."""
        super().on_train_end(trainer, pl_module)
        self._stop_progress()


class Pace:
    """Updates and tokens since the run began here, over the time that has passed: rollouts come in bursts, so that a moment says little."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, step: int) -> None:
        """Count from here."""
        self.began, self.first, self.step, self.total = time.monotonic(), step, step, float("inf")
        self.tokens: Tensor | int = 0

    def all_updates(self, trainer: L.Trainer) -> float:
        """Of the whole run; infinite where nothing ends it."""
        a_run = updates_of(trainer)
        self.total = float("inf") if a_run is None else a_run
        return self.total

    def count(self, tokens: Tensor) -> None:
        """Add tokens; what a GPU has counted is not waited for."""
        self.tokens = self.tokens + tokens

    def tokens_a_second(self) -> float:
        """Of all processes."""
        return float(self.tokens) / max(time.monotonic() - self.began, 1e-9)

    def passed_and_left(self) -> tuple[float, float | None]:
        """Seconds; None where what is left is not known yet."""
        passed, done, left = time.monotonic() - self.began, self.step - self.first, self.total - self.step
        return passed, passed * left / done if done and left < float("inf") else None


class TimeLeft(ProgressColumn):
    """0:01:20, 0:03:10 left."""

    max_refresh = 0.5

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def render(self, task: Task) -> Text:
        """By the pace of the run."""
        passed, left = self.pace.passed_and_left()
        shown = f"{_clock(passed)}, {_clock(left)} left" if left is not None else _clock(passed)
        return Text(shown, style="dim")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def updates_of(trainer: L.Trainer) -> int | None:
    """Optimizer updates of the whole run; None where it has no end."""
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != float("inf"):
        ends.append(trainer.max_epochs * _updates_an_epoch(trainer))
    return min(ends, default=None)


def _updates_an_epoch(trainer: L.Trainer) -> int:
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def course(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """The run in two lines: rows x responses x passes = updates, then how many updates in all."""
    name, loader, batches, a_run = type(pl_module).__name__, trainer.train_dataloader, trainer.num_training_batches, updates_of(trainer)
    in_all = "updates without end" if a_run is None else f"{a_run:,} updates in all"
    if batches == float("inf"):
        return f"{name}: a stream of rows; {in_all}"
    accumulate, processes, an_epoch = trainer.accumulate_grad_batches, trainer.world_size, _updates_an_epoch(trainer)
    epochs = "" if a_run is None else f", {a_run / an_epoch:.3g} epochs"
    if isinstance(loader, ExperienceLoader):
        passes, responses = loader.policy.num_iterations, loader.policy.sampling.num_generations
        rollout, an_update = loader.batch_size * processes, loader.micro_batch_size * accumulate * processes
        prompts = int(batches) // loader.items_per_rollout * rollout
        rows = f"{prompts:,} prompts x {responses} responses x {passes} pass{'es' * (passes > 1)} / {an_update:,} prompts an update"
        return f"{name}: {rows} = {an_epoch:,} updates an epoch\n{in_all}{epochs}; a rollout is {rollout:,} prompts"
    an_update, kind = _batch_size(loader) * accumulate * processes, "pairs" if _compares(pl_module) else "rows"
    return f"{name}: {an_epoch * an_update:,} {kind} / {an_update:,} {kind} an update = {an_epoch:,} updates an epoch\n{in_all}{epochs}"


def _batch_size(loader: Any) -> int:
    return getattr(getattr(loader, "inner", loader), "batch_size", None) or 1


def _compares(pl_module: Any) -> bool:
    return getattr(pl_module, "view", None) == "pairs"
