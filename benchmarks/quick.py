"""`make bench-quick`: seconds of CPU, one thread, of an iteration of ours and of TRL's, in turn. The last line has the ratios.

15 M parameters, float32, 16 prompts of 32 tokens x 2 responses of exactly 64, one update.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import work

HERE = Path(__file__).resolve().parent
WARM_UP, ROUNDS = 1, 5


class Side:
    """A process that does one iteration when told."""

    def __init__(self, name: str, command: list[str], folder: str) -> None:
        self.name, self.rows = name, list[dict[str, float]]()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.log = Path(folder) / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=HERE, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def iterate(self) -> dict[str, float]:
        """What the iteration cost."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"iteration"'):
                return dict(json.loads(line)["iteration"])
        raise SystemExit(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")


def main() -> None:
    """Measure, print a table, then the ratios."""
    peer = str(HERE.parent / ".venv-trl/bin/python")
    with tempfile.TemporaryDirectory() as folder:
        work.write(Path(folder), "15m")
        sides = [
            Side("p3o_lightning", [sys.executable, "ours.py", folder], folder),
            Side("TRL as it comes", [peer, "trl_side.py", folder, "default"], folder),
            Side("TRL tuned", [peer, "trl_side.py", folder, "tuned"], folder),
        ]
        try:
            for round in range(WARM_UP + ROUNDS):
                for side in sides:
                    row = side.iterate()
                    if round >= WARM_UP:
                        side.rows.append(row)
        finally:
            for side in sides:
                side.process.kill()
    print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}; one thread, {ROUNDS} rounds in turn")
    print(f"{'':<18}{'CPU s, median':>14}{'min':>8}{'max':>8}{'peak MiB':>10}")
    middle = {}
    for side in sides:
        seconds = [row["cpu"] for row in side.rows]
        middle[side.name] = statistics.median(seconds)
        peak = max(row["peak_mib"] for row in side.rows)
        print(f"{side.name:<18}{middle[side.name]:>14.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}{peak:>10.0f}")
    ours = middle["p3o_lightning"]
    print(f"ratio_default={middle['TRL as it comes'] / ours:.2f} ratio_tuned={middle['TRL tuned'] / ours:.2f}")


if __name__ == "__main__":
    main()
