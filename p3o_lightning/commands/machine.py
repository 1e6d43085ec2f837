"""What this machine has."""

from __future__ import annotations

from pathlib import Path


def memory_here() -> tuple[int, int] | None:
    """Bytes in all, and free for use; None where it is not known."""
    try:
        pages = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line}
        return pages["MemTotal"], pages["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None
