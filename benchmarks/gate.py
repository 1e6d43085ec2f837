"""One iteration at a time, when the other sides rest: each waits for a line, works, and answers with what it did and what that cost."""

from __future__ import annotations

import functools
import json
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def peak_mib(gpu: bool = False) -> float:
    """The most memory that the process has held until now, or its tensors of the GPU.

    On Linux `ru_maxrss` would count that of the process that started it too.
    """
    if gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def wall_of_gpu() -> float:
    """Seconds of the wall, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Gate:
    """Begin an iteration with `wait`, end it with `report`; in between, say what phase it is in and what work was done.

    Seconds are of the process's CPU with one thread, of the wall with more (threads that wait for each other burn CPU) and on a GPU.

    Args:
        packages: whose versions are told.
        idle_mib: peak of memory once the libraries are imported, before any model is.
        settings: of this side, to be told.
        gpu: the work is done on a GPU.
    """

    def __init__(self, packages: list[str], idle_mib: float, settings: dict[str, Any], gpu: bool = False) -> None:
        self._gpu, self._of_cpu = gpu, not gpu and int(os.environ.get("OMP_NUM_THREADS", "1")) == 1
        self._clock = time.process_time if self._of_cpu else wall_of_gpu if gpu else time.perf_counter
        self._spent: Counter[str] = Counter()
        self._work: Counter[str] = Counter()
        self._phases, self._since = ["other"], self._clock()
        versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        print("\n" + json.dumps({"about": {"versions": versions, "idle_mib": round(idle_mib, 1), "settings": settings}}), flush=True)

    def wait(self) -> None:
        """Until the one who measures says so."""
        if not sys.stdin.readline():
            sys.exit(0)
        self._spent.clear()
        self._work.clear()
        self._since = self._clock()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def report(self) -> None:
        """What happened since `wait`, and the peak of memory until now."""
        self._charge()
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        row = {
            "seconds": round(cpu if self._of_cpu else wall, 5),
            "cpu": round(cpu, 5),
            "wall": round(wall, 5),
            "phases": {phase: round(seconds, 5) for phase, seconds in self._spent.items()},
            "work": dict(self._work),
            "peak_mib": round(peak_mib(self._gpu), 1),
        }
        print("\n" + json.dumps({"iteration": row}), flush=True)

    # ---- phases: of two that are nested, time counts for the inner one

    @property
    def phase(self) -> str:
        """The phase at this moment."""
        return self._phases[-1]

    def enter(self, phase: str) -> None:
        """Until `leave`, time is that phase's."""
        self._charge()
        self._phases.append(phase)

    def leave(self) -> None:
        """Back to the phase around it."""
        self._charge()
        self._phases.pop()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The body in a phase."""
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def watch(self, owner: Any, method: str, phase: str, count: Callable[..., dict[str, int]] | None = None) -> None:
        """Time a method of one object as a phase; `count(result, *arguments)` says what work a call did."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.within(phase):
                result = function(*arguments, **options)
            if count is not None:
                self.did(**count(result, *arguments))
            return result

        setattr(owner, method, timed)

    def did(self, **amounts: int) -> None:
        """Work that was done."""
        self._work.update({name: int(amount) for name, amount in amounts.items()})

    def _charge(self) -> None:
        now = self._clock()
        self._spent[self.phase] += now - self._since  # type: ignore[assignment]
        self._since = now
