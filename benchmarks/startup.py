"""Seconds of CPU that `p3o fit --config configs/debug/policy.yaml` spends before its first rollout, imports aside.

Each run is a process of its own. Imports are timed where Python begins each of them (`importlib._bootstrap._find_and_load`), the outermost
alone, so those made late count as imports too.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import record

RUNS = 5
CONFIG = "configs/debug/policy.yaml"


class Imports:
    """Adds up the CPU of imports from now on."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0
        self._machinery: Any = importlib._bootstrap  # type: ignore[attr-defined]
        self._plain = self._machinery._find_and_load
        self._machinery._find_and_load = self._timed

    def _timed(self, *arguments: Any) -> Any:
        begun = time.process_time()
        self._depth += 1
        try:
            return self._plain(*arguments)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds += time.process_time() - begun


def until_first_rollout(folder: str) -> None:
    """Print what was spent when the rollout begins, and end there."""
    begun, imports = time.process_time(), Imports()
    from p3o_lightning import PairwisePolicy, cli

    def rollout_step(policy: Any, prompts: Any) -> None:
        total = time.process_time() - begun
        print("\n" + json.dumps({"total": total, "imports": imports.seconds, "rest": total - imports.seconds}), flush=True)
        os._exit(0)

    PairwisePolicy.rollout_step = rollout_step  # type: ignore[assignment, method-assign]
    cli.main(["fit", "--config", CONFIG, "--trainer.default_root_dir", folder])


def main() -> None:
    """Measure, and write results/startup.json."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(record.ROOT)}
    runs = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            child = [sys.executable, __file__, folder]
            told = subprocess.run(child, cwd=record.ROOT, env=environment, capture_output=True, text=True)
        lines = [line for line in told.stdout.splitlines() if line.startswith('{"total"')]
        if not lines:
            raise SystemExit(f"no rollout was reached:\n{told.stdout[-2000:]}{told.stderr[-2000:]}")
        runs.append(json.loads(lines[-1]))
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    record.write(
        record.RESULTS / "startup.json", {"name": "startup", **record.circumstances(record.code()), "runs": runs, "median": medians}
    )
    print(f"before the first rollout: {medians['rest']:.2f} s of CPU beside {medians['imports']:.2f} s of imports")


if __name__ == "__main__":
    until_first_rollout(sys.argv[1]) if len(sys.argv) > 1 else main()
