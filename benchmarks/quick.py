"""`make bench-quick`: the case of 15 M parameters, fixed length, float32, once more and without a file. The last line has the ratios."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from cases import CASES
from record import machine
from run import measure

ROUNDS = 5


def main() -> None:
    """Measure, print a table, then the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(replace(CASES["15m-fixed-float32"], compiled=False), ROUNDS, 1, Path(folder))
    about = machine()
    print(f"{about['processor']} {' '.join(about['instructions'])}; one thread, {ROUNDS} rounds in turn")
    print(f"{'':<18}{'CPU s, median':>14}{'min':>8}{'max':>8}{'peak MiB':>10}")
    for name, title in (("ours", "p3o_lightning"), ("default", "TRL as it comes"), ("tuned", "TRL tuned")):
        row = result["sides"][name]["summary"]
        print(f"{title:<18}{row['median']:>14.2f}{row['min']:>8.2f}{row['max']:>8.2f}{row['peak_mib']:>10.0f}")
    print(f"ratio_default={result['ratios']['default']:.2f} ratio_tuned={result['ratios']['tuned']:.2f}")


if __name__ == "__main__":
    main()
