"""`p3o frontier` as a user sees it: what it writes, what it does not make again, and what it says of runs that fail."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from frontier_plans import SMALL, plan_file

from p3o_lightning.commands import frontier, frontier_run
from p3o_lightning.errors import InputError


@pytest.fixture
def here(p3o, monkeypatch):
    """Jobs run in the test's own process: the libraries are imported already."""

    def one_by_one(work, jobs, workers):
        for job in jobs:
            try:
                work(job)
                yield job, None
            except InputError as error:
                yield job, str(error)

    monkeypatch.setattr(frontier, "run_jobs", one_by_one)
    return p3o


@pytest.mark.parametrize(
    ("arguments", "said"), [(["none.yaml"], "none.yaml"), (["--workers", "0"], "--workers"), (["--out", __file__], "--out"), ([], "PLAN")]
)
def test_bad_arguments_take_one_line(p3o, arguments, said):
    path = plan_file(p3o.folder)
    assert said in p3o("frontier", *([path] if arguments and arguments[0].startswith("--") else []), *arguments).error


def test_a_config_of_another_stage_is_refused(p3o):
    assert "RewardModel" in p3o("frontier", plan_file(p3o.folder, config="configs/debug/reward.yaml")).error


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_of_runs_is_shown_on_a_terminal(here, monkeypatch, capsys, terminal):
    tasks = [SimpleNamespace(folder=f"task-{seed}") for seed in range(2)]
    runs = [SimpleNamespace(folder=f"run-{number}", task_folder="task-0") for number in range(5)]
    monkeypatch.setattr(frontier, "is_done", lambda job: job.folder in ("task-0", "task-1", "run-0", "run-1"))
    monkeypatch.setattr(frontier, "work", lambda job: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert frontier.run_all(tasks, runs, 2) == {}
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    if not terminal:
        assert shown.strip() == ""  # rich before 14.3 ends a line
        return
    last = [line for line in shown.replace("\r", "\n").splitlines() if line.startswith("runs")][-1]
    assert "tasks" in shown and "2/2" in shown and "2/5" in shown and "5/5" in last


def test_the_whole_command(here):
    path = plan_file(here.folder, title="Tiny", kl_range=0.5)
    ended = here("frontier", path, "--out", "out")
    assert ended.code == 0 and "8 of 8 runs" in ended.out, ended
    folder = here.folder / "out" / "plan"
    written = ["frontier.png", "frontier.svg", "report.md", "rows.csv", "statistics.csv", "wins.csv"]
    assert sorted(item.name for item in folder.iterdir()) == written
    rows = list(csv.DictReader((folder / "rows.csv").open()))
    assert len(rows) == 8 * 3 and {row["variant"] for row in rows} == {"P3O", "RLOO"}
    assert {row["model.kl_coef"] for row in rows} == {"0.001", "0.1"}
    report = (folder / "report.md").read_text()
    assert report.startswith("# Tiny\n") and "Not there" not in report
    figures = {(row["variant"], row["quantity"], row["against"]): row for row in csv.DictReader((folder / "statistics.csv").open())}
    assert f"{float(figures['RLOO', 'area_learned', '']['mean']):.3f}" in report

    # nothing is run again, and what is reported is the same
    stamps = {done: done.stat().st_mtime_ns for done in here.folder.glob("out/runs/*/done.json")}
    before = (folder / "statistics.csv").read_text()
    assert here("frontier", path, "--out", "out").code == 0
    assert stamps == {done: done.stat().st_mtime_ns for done in here.folder.glob("out/runs/*/done.json")}
    assert before == (folder / "statistics.csv").read_text()

    # a run that is lost is made again, equal
    shutil.rmtree(next(iter(stamps)).parent)
    assert here("frontier", path, "--out", "out", "--report").code == 0
    assert "not run" in (folder / "report.md").read_text()
    assert here("frontier", path, "--out", "out").code == 0
    assert before == (folder / "statistics.csv").read_text()


def test_a_run_that_fails_is_named_and_the_others_go_on(here):
    variants = {"P3O": {}, "bad": {"settings": {"model.clip_range": -1.0}}}
    ended = here("frontier", plan_file(here.folder, variants=variants, grid={}, seeds=[0]), "--out", "out")
    assert ended.code == 2 and "1 of 2 jobs failed" in ended.err
    assert "model.clip_range is -1.0" in ended.err and "1 of 2 runs" in ended.out
    report = (here.folder / "out/plan/report.md").read_text()
    assert "## Not there" in report and "model.clip_range is -1.0" in report


def test_runs_that_ended_themselves_are_told_and_so_is_that_seeds_are_few(here):
    variants = {"P3O": {}, "strays": {"settings": {"kl_budget.max_kl": 1e-5}}}
    ended = here("frontier", plan_file(here.folder, variants=variants, grid={}, seeds=[0, 1], rollouts=4), "--out", "out")
    assert ended.code == 0
    report = (here.folder / "out/plan/report.md").read_text()
    early = report.partition("## Ended early")[2]
    assert "- strays, seed 0, {}: " in early and "kl_budget.max_kl" in early and "P3O" not in early
    assert "Of fewer than five seeds" in report


def test_stages_are_trained_once_a_seed(here):
    stages = {
        "sft": {"config": "configs/debug/sft.yaml", "settings": {"trainer.max_steps": 2, "trainer.logger": False}},
        "reward": {"config": "configs/debug/reward.yaml", "settings": {"model.model": "{task}/sft/export", "trainer.max_steps": 2}},
    }
    settings = {**SMALL["settings"], "model.model": "{task}/sft/export", "model.reward_funcs": "{task}/reward/export"}
    path = plan_file(here.folder, stages=stages, settings=settings, rollouts=1, seeds=[4], grid={})
    assert here("frontier", path, "--out", "out").code == 0
    tasks = list(here.folder.glob("out/tasks/*"))
    assert len(tasks) == 1 and tasks[0].name.startswith("seed-4-")
    learned = [lines[0]["learned"] for lines in map(frontier_run.read_lines, here.folder.glob("out/runs/*/path.jsonl"))]
    assert len(learned) == 2 and learned[0] == learned[1] != 0


def test_a_task_that_fails_takes_its_runs_along(here):
    path = plan_file(here.folder, task="p3o_lightning.none.such", seeds=[0])
    ended = here("frontier", path, "--out", "out")
    assert ended.code == 2 and "p3o_lightning.none.such" in ended.err and not list(here.folder.glob("out/runs/*"))
