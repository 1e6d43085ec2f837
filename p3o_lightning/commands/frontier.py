"""`p3o frontier`: variants x coefficients x seeds in one command, then their KL-reward frontiers as figure, table and report.

Every run has a folder named by what makes it. One that is finished is not run again, one that was interrupted goes on from its last
checkpoint or starts again, and plans that hold equal runs share them.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from p3o_lightning.cli import OneLineParser
from p3o_lightning.commands.frontier_plan import Plan, RunJob, TaskJob, read_plan
from p3o_lightning.commands.frontier_report import Failed, write_report
from p3o_lightning.commands.frontier_run import DONE, work
from p3o_lightning.commands.worker_pool import run_jobs
from p3o_lightning.errors import InputError

Job = TaskJob | RunJob


def main(arguments: list[str]) -> None:
    """Run what is not finished, then report every plan."""
    given = parse(arguments)
    out = Path(given.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out is {given.out!r}, which is a file: name a folder.")
    plans = [changed(read_plan(path), given) for path in given.plans]
    if repeated := {plan.name for plan in plans if sum(plan.name == other.name for other in plans) > 1}:
        raise InputError(f"two plans are named {sorted(repeated)[0]!r}, and would write the same report: rename a file.")
    cells = {plan.name: plan.cells(out) for plan in plans}
    tasks = {job.folder: job for plan in plans for job in plan.tasks(out).values() if job.task or job.stages}
    runs = {cell.job.folder: cell.job for plan in plans for cell in cells[plan.name]}
    failed: dict[str, str] = {}
    if not given.report:
        failed = run_all(list(tasks.values()), list(runs.values()), given.workers)
    for plan in plans:
        finished = [cell for cell in cells[plan.name] if is_done(cell.job)]
        missing = [Failed(cell, failed.get(cell.job.folder, "not run to its end")) for cell in cells[plan.name] if not is_done(cell.job)]
        if finished:
            diverged = write_report(plan, finished, missing, out / plan.name)
            told = f"{len(finished)} of {len(cells[plan.name])} runs{f', of which {len(diverged)} diverged' if diverged else ''}"
            print(f"{plan.name}: {told}; report in {out / plan.name / 'report.md'}", flush=True)
        else:
            print(f"{plan.name}: no run is finished, so there is nothing to report", flush=True)
    if failed:
        raise InputError(f"{len(failed)} of {len(tasks) + len(runs)} jobs failed, as said above; the same command tries them again.")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's arguments."""
    parser = OneLineParser(
        prog="p3o frontier",
        allow_abbrev=False,
        description="KL-reward frontiers of several objectives, coefficients and seeds, from a plan in YAML (docs/frontier.md).",
    )
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="a YAML file; several share equal runs")
    parser.add_argument("--out", default="runs/frontier", help="output folder (default: runs/frontier)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes, one thread each (default: the cores)")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the plans' seeds")
    parser.add_argument("--rollouts", type=int, help="in place of the plans' rollouts a run")
    parser.add_argument("--report", action="store_true", help="run nothing: report what is finished")
    given = parser.parse_args(arguments)
    for name in ("workers", "rollouts"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise InputError(f"--{name} is {getattr(given, name)}: give 1 or more.")
    return given


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def changed(plan: Plan, given: argparse.Namespace) -> Plan:
    """The plan with what the command line says in its place."""
    seeds = plan.seeds if given.seeds is None else list(dict.fromkeys(given.seeds))
    return replace(plan, seeds=seeds, rollouts=plan.rollouts if given.rollouts is None else given.rollouts)


def is_done(job: Job) -> bool:
    """Whether its folder says that it ended."""
    return (Path(job.folder) / DONE).exists()


def run_all(tasks: list[TaskJob], runs: list[RunJob], workers: int) -> dict[str, str]:
    """Run what is not finished; folder -> why it failed. A run whose task failed is not tried."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    failed: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        for title, jobs in (("tasks", tasks), ("runs", runs)):
            due = [job for job in jobs if not is_done(job) and not (isinstance(job, RunJob) and job.task_folder in failed)]
            bar = progress.add_task(title, total=len(jobs), completed=len(jobs) - len(due))
            for job, error in run_jobs(work, due, workers):
                progress.advance(bar)
                if error is not None:
                    failed[job.folder] = error
                    progress.console.print(f"failed: {job.folder}: {error}", markup=False, highlight=False, soft_wrap=True)
        for run in runs:
            if run.task_folder in failed:
                failed[run.folder] = f"its task failed: {failed[run.task_folder]}"
    return failed
