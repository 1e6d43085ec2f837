"""Running the `p3o` command inside the test's own process: the libraries are imported once, and a run takes under a second."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from p3o_lightning import cli


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that it ended with; there is no traceback, and nothing else that complains."""
        lines = self.err.splitlines()
        assert self.code == 2, self
        assert sum(line.startswith("p3o: error: ") for line in lines) == 1 and lines[-1].startswith("p3o: error: "), self
        assert "Traceback" not in self.err + self.out
        return lines[-1].removeprefix("p3o: error: ")


class Runner:
    """Runs commands in a folder of their own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *arguments: object) -> Ended:
        """The command's exit status, standard output and standard error."""
        importlib.invalidate_caches()  # files of the test's own were written just now
        self.capsys.readouterr()
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = self.capsys.readouterr()
        return Ended(code, out, err)

    def built(self, *arguments: object) -> Any:
        """A command that must succeed; its trainer, model and data."""
        from p3o_lightning.commands import trainer

        importlib.invalidate_caches()
        sys.path.insert(0, str(self.folder))  # as cli.main does
        return trainer.main([str(argument) for argument in arguments])


@pytest.fixture
def p3o(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Runner]:
    """A runner in an empty folder. What the command does to the process's logging and warnings ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the working folder in front
    monkeypatch.setattr(sys, "argv", ["p3o"])
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers.modeling_utils")]
    before = [(logger.level, logger.propagate, [*logger.handlers], [*logger.filters]) for logger in loggers]
    yield Runner(tmp_path, capsys)
    for logger, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers, logger.filters = propagate, handlers, filters


def scalars(folder: Path, clock: bool = False) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run's dashboard, by tag: (step, value). Those of the clock, which no run repeats, are left out unless asked for."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if clock or not tag.startswith("throughput/")
    }


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
