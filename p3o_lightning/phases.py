"""The parts of a rollout by name: for the Trainer's profiler, and for observers that tell where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def phase(name: str) -> Callable[[Callable[Concatenate[Any, Given], Answer]], Callable[Concatenate[Any, Given], Answer]]:
    """A method of a LightningModule is `rollout/<name>` in the Trainer's profiler; its seconds are added to `phase_seconds[name]`.

    Seconds of the clock. A phase inside another belongs to that one.
    """

    def decorate(method: Callable[Concatenate[Any, Given], Answer]) -> Callable[Concatenate[Any, Given], Answer]:
        @wraps(method)
        def timed(self: Any, *given: Given.args, **named: Given.kwargs) -> Answer:
            seconds: dict[str, float] = vars(self).setdefault("phase_seconds", {})
            if vars(self).get("phase_now"):
                return method(self, *given, **named)
            vars(self)["phase_now"] = name
            began = time.perf_counter()
            try:
                with nullcontext() if self._trainer is None else self.trainer.profiler.profile(f"rollout/{name}"):
                    return method(self, *given, **named)
            finally:
                vars(self)["phase_now"] = None
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

        return timed

    return decorate
