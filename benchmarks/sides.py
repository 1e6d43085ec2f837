"""The processes that are measured: one a side, which does an iteration when told and rests in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import Case

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-trl/bin/python"


class Side:
    """A process that does one iteration when told; it starts when first asked, and again after `stop`."""

    def __init__(self, name: str, command: list[str], log: Path, threads: int, gpu: bool = False) -> None:
        self.name, self.command, self.log = name, command, log
        self.about: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]} if gpu else {}  # TRL would take all
        self._environment = {**os.environ, **quiet, **first, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}

    @property
    def running(self) -> bool:
        """Whether it has started and not been stopped."""
        return self._process is not None

    def iterate(self) -> dict[str, Any]:
        """What one iteration did and cost."""
        self.start()
        assert self._process is not None and self._process.stdin
        self.about = self.about or self._answer("about")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer("iteration")

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def start(self) -> None:
        """It loads its libraries and models, and waits to be told to begin."""
        if self._process is not None:
            return
        self.about = {}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, cwd=HERE, env=self._environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def _answer(self, kind: str) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout
        for line in self._process.stdout:
            if line.startswith(f'{{"{kind}"'):
                return dict(json.loads(line)[kind])
        raise SystemExit(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")


def ours(case: Case, folder: Path, threads: int, compiled: bool = False) -> Side:
    """p3o_lightning, or with its layers compiled."""
    command = [sys.executable, "ours.py", str(folder), json.dumps(case.to_json()), *(["compiled"] if compiled else [])]
    return Side("p3o_lightning" + " compiled" * compiled, command, folder / f"ours{'-compiled' * compiled}.log", threads, case.gpu)


def trl(case: Case, folder: Path, threads: int, micro_batch: int) -> Side:
    """TRL as it comes (`micro_batch` 0), or tuned."""
    if not PEER.exists():
        raise SystemExit(f"{PEER} is not there: make .venv-trl/.set-up")
    command = [str(PEER), "trl_side.py", str(folder), json.dumps(case.to_json()), str(micro_batch)]
    return Side(f"TRL, micro-batch {micro_batch or 'as it comes'}", command, folder / f"trl{micro_batch}.log", threads, case.gpu)
