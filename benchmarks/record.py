"""One JSON a case in results/: what was measured, of which code, on which machine; and whether that was done here already."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import Case

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def path_of(name: str, threads: int, results: Path = RESULTS) -> Path:
    """Where a case's result lies."""
    return results / (f"{name}.json" if threads == 1 else f"{name}-{threads}threads.json")


def code(root: Path = ROOT) -> str:
    """The last commit that changed the package; with "+" where files of it are changed beyond that."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "p3o_lightning")
    return git("log", "-1", "--format=%h", "--abbrev=10", "--", "p3o_lightning") + ("+" if changed else "")


def is_measured(file: Path, case: Case, commit: str, rounds: int) -> bool:
    """Whether the file holds this case at this commit, on this machine, with as many rounds. Changed code is measured every time."""
    if commit.endswith("+") or not file.is_file():
        return False
    result = json.loads(file.read_text())
    there, here = result["machine"], machine(case.gpu)
    same = all(there.get(part) == here.get(part) for part in ("processor", "instructions", "cores", "gpu"))
    return bool(same and result["commit"] == commit and result["case"] == case.to_json() and result["rounds"] >= rounds)


def write(file: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, file)


def circumstances(commit: str, gpu: bool = False) -> dict[str, Any]:
    """Commit, machine, command and date; how many processes wanted a core when the case was over."""
    return {
        "commit": commit,
        "machine": machine(gpu),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def machine(gpu: bool = False) -> dict[str, Any]:
    """Processor, what of its instructions matters for bfloat16, cores, memory; the GPU where one is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = fields.get("model name", platform.processor() or platform.machine())
    about = {"processor": name, "instructions": flags, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}
    if gpu:
        import torch

        about["gpu"] = torch.cuda.get_device_name()
    return about


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds (median, least, greatest), tokens a second, peak MiB, and the median of each phase."""
    seconds = [row["seconds"] for row in rounds]
    phases = {name: statistics.median(row["phases"].get(name, 0.0) for row in rounds) for row in rounds[:1] for name in row["phases"]}
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "tokens_per_second": sum(row["work"]["tokens"] for row in rounds) / sum(seconds),
        "peak_mib": max(row["peak_mib"] for row in rounds),
        "phases": phases,
    }


def ratios(sides: dict[str, dict[str, Any]], ours: str = "ours") -> dict[str, float]:
    """TRL's median time by that of one of our sides, for each of TRL's; above 1 ours is faster."""
    theirs = {name: side["summary"]["median"] for name, side in sides.items() if name not in ("ours", "compiled")}
    return {name: median / sides[ours]["summary"]["median"] for name, median in theirs.items()}
