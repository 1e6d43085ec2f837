"""What TRL hands to a reward function beside texts and columns: where the run stands, and two ways to log."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed

from p3o_lightning.errors import InputError


class TrainerState(NamedTuple):
    """`trainer_state`: what reward functions read of it to change with the run, under transformers' names."""

    global_step: int = 0  # updates made
    max_steps: int = -1  # of the run; -1: not set
    epoch: float = 0.0
    num_train_epochs: int = -1  # of the run; -1: not set
    is_world_process_zero: bool = True


class RewardLog:
    """What the reward functions logged in one rollout.

    Attributes:
        extra: column -> one value a completion, in the order of the completions.
    """

    def __init__(self, completions: int) -> None:
        self.completions = completions
        self.extra: dict[str, list[Any]] = {}
        self._values: dict[str, list[float]] = defaultdict(list)

    def log_metric(self, name: str, value: float) -> None:
        """`log_metric`: a figure of this rollout, which is logged under its name; of several values, their mean."""
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.reward_funcs: log_metric({name!r}, {value!r:.60}) is no number: give a float.") from error
        self._values[str(name)].append(number)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """`log_extra`: a column beside the completions."""
        if len(values) != self.completions:
            raise InputError(
                f"model.reward_funcs: log_extra({column!r}) has {len(values)} values for {self.completions} completions: give one each."
            )
        self.extra[str(column)] = list(values)

    def means(self) -> dict[str, float]:
        """The mean of every metric over all values that every process logged. Where there are several, all of them call it."""
        sums = {name: (math.fsum(values), len(values)) for name, values in self._values.items()}
        everyone: list[Any] = [sums]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, sums)
        names = sorted({name for each in everyone for name in each})
        totals = {name: [each[name] for each in everyone if name in each] for name in names}
        return {name: sum(total for total, _ in parts) / sum(count for _, count in parts) for name, parts in totals.items()}
