"""`make bench`: ours, TRL as it comes and TRL tuned in turn on every case. What was measured at this commit on this machine is skipped.

python benchmarks/run.py [--cases PATTERN ...] [--growth | --gpu] [--rounds N] [--threads N] [--minutes N] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arithmetic
import equal
import record
import sides
from cases import CASES, GPU, GROWTH, OVERHEAD, Case, select
from equal import Work
from sides import Side

GROWN = {name: case for points in GROWTH.values() for name, case in points.items()} | OVERHEAD
PER_VISIT = 2  # iterations of a side that is started anew every time


def take_turns(
    contestants: dict[str, Side], rounds: int, resident: bool, check: Callable[[dict[str, list[Work]]], Any]
) -> dict[str, list[dict[str, Any]]]:
    """Iterations of each side, after one that does not count whenever it has started. `check` sees the work after every turn."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    each = 1 if resident else PER_VISIT
    if resident:
        cold = [side for side in contestants.values() if not side.running]
        for side in cold:
            side.start()
        for side in cold:
            side.iterate()
    for _ in range(math.ceil(rounds / each)):
        for name, side in contestants.items():
            if not side.running:
                side.iterate()
            rows[name] += [side.iterate() for _ in range(each)]
            if not resident:
                side.stop()
            check(works(rows))
    return rows


def works(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[Work]]:
    """What each side did in each of its rounds, of the sides that had one."""
    return {name: [row["work"] for row in each] for name, each in rows.items() if each}


def best(candidates: dict[int, Side], resident: bool = True) -> tuple[int, dict[int, float]]:
    """The micro-batch that is faster in the better of two iterations, and the seconds of each; the others are stopped, or all of them."""
    if len(candidates) == 1:
        return next(iter(candidates)), {}
    tried = {}
    for micro_batch, side in candidates.items():
        tried[micro_batch] = min(side.iterate()["seconds"] for _ in range(2))
        if not resident:
            side.stop()
    winner = min(tried, key=tried.__getitem__)
    for micro_batch, side in candidates.items():
        if micro_batch != winner:
            side.stop()
    return winner, tried


def measure(case: Case, rounds: int, threads: int, folder: Path, alone: bool = False) -> dict[str, Any]:
    """The result of a case but for its circumstances. `alone`: ours only."""
    import work

    work.write(folder, case)
    contestants = {"ours": sides.ours(case, folder, threads)}
    tuned: dict[int, Side] = {}
    settings: dict[str, Any] = {}
    if not alone:
        contestants["default"] = sides.trl(case, folder, threads, 0)
        if case.compiled:
            contestants["compiled"] = sides.ours(case, folder, threads, compiled=True)
        tuned = {micro_batch: sides.trl(case, folder, threads, micro_batch) for micro_batch in case.micro_batches}
    try:
        if tuned:
            micro_batch, tried = best(tuned, case.resident)
            contestants["tuned"] = tuned[micro_batch]
            settings["tuned"] = {"micro_batch": micro_batch, "seconds_tried": tried}
        rows = take_turns(contestants, rounds, case.resident, partial(equal.check, case))
    finally:
        for side in [*contestants.values(), *tuned.values()]:
            side.stop()
    measured = {
        name: {"about": side.about, **settings.get(name, {}), "summary": record.summary(rows[name]), "rounds": rows[name]}
        for name, side in contestants.items()
    }
    done = equal.check(case, works(rows))
    result = {"case": case.to_json(), "threads": threads, "rounds": len(rows["ours"]), "work": done, "sides": measured}
    if case.kind == "policy":
        result["gigaflop"] = arithmetic.gigaflop(case)
    if alone:
        about = measured["ours"]["about"]
        result["memory_mib"] = about["idle_mib"] + arithmetic.memory_mib(case, about["settings"]["micro_batch_size"])
    else:
        result["ratios"] = record.ratios(measured)
        if case.compiled:
            result["ratios_compiled"] = record.ratios(measured, "compiled")
    return result


def run(chosen: dict[str, Case], rounds: int, threads: int, minutes: float, results: Path, measure: Callable[..., Any] = measure) -> None:
    """Measure what is missing, one file a case; none is begun after `minutes`."""
    commit, begun = record.code(), time.monotonic()
    for name, case in chosen.items():
        file = record.path_of(name, threads, results)
        if record.is_measured(file, case, commit, rounds):
            print(f"{name}: measured at {commit} on this machine already", flush=True)
            continue
        if time.monotonic() - begun > 60 * minutes:
            print(f"{name}: left out, {minutes:g} minutes are over", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = measure(case, rounds, threads, Path(folder), alone=name in GROWN)
        record.write(file, {"name": name, **record.circumstances(commit, case.gpu), **result})
        told = ", ".join(f"{side} {about['summary']['median']:.2f} s" for side, about in result["sides"].items())
        print(f"{name}: {told}; " + ", ".join(f"{side} {ratio:.2f}x" for side, ratio in result.get("ratios", {}).items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="measure the cases whose name matches one (default: all)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--growth", action="store_true", help="the sweeps of ours alone, in place of the cases against TRL")
    other.add_argument("--gpu", action="store_true", help="the cases on a GPU, against TRL")
    parser.add_argument("--rounds", type=int, help="iterations of each side after the warm-up (default: 5, of a sweep 3)")
    parser.add_argument("--threads", type=int, default=1, help="of each side; seconds are CPU with 1, wall with more (default: 1)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so long (default: no limit)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="where to keep them (default: results)")
    given = parser.parse_args()
    rounds = given.rounds or (3 if given.growth else 5)
    run(select(given.cases, GROWN if given.growth else GPU if given.gpu else CASES), rounds, given.threads, given.minutes, given.results)


if __name__ == "__main__":
    main()
