"""One iteration at a time, when the other side rests: each waits for a line, works, and answers with what it cost."""

from __future__ import annotations

import json
import resource
import sys
import time


class Gate:
    """Begin an iteration with `wait`, end it with `report`."""

    def wait(self) -> None:
        """Until the one who measures says so."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def report(self, **also: float) -> None:
        """Seconds of CPU and of the clock since `wait`, and the peak of memory until now."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall, "peak_mib": peak, **also}
        print("\n" + json.dumps({"iteration": row}), flush=True)
