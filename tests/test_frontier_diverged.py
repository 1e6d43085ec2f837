"""A run that diverges stops no study: it is named and counted, its variant is told of without that seed, and nothing vanishes.

The power of these tests, found by planting one error at a time:
    planted error                          first test that fails, without test_
    null counts as a number                an_evaluation_that_is_not_finite_is_named_and_its_seed_left_out
    what is left out counts all the same   an_evaluation_that_is_not_finite_is_named_and_its_seed_left_out
    no word of it at the report's head     an_evaluation_that_is_not_finite_is_named_and_its_seed_left_out
    all seeds told in the table            an_evaluation_that_is_not_finite_is_named_and_its_seed_left_out
    a missing run's seed not marked        a_run_that_is_missing_takes_its_seed_out_in_the_same_way
    figures drawn of nothing               a_study_of_which_every_run_diverged_has_a_report_that_says_so
    told as ended early, too               a_run_that_the_guard_stopped_diverged_and_one_that_spent_its_budget_did_not
    the guard's stop is like any other     the_whole_command_with_a_learning_rate_that_blows_up
    not counted on the terminal            the_whole_command_with_a_learning_rate_that_blows_up
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from p3o_lightning.commands import frontier
from p3o_lightning.commands.frontier_plan import Plan, read_plan
from p3o_lightning.commands.frontier_points import Points, compute_statistics
from p3o_lightning.commands.frontier_report import Failed, write_report
from p3o_lightning.errors import InputError

SLOPES = {"A": 1.0, "B": 2.0, "C": 3.0}


def plan_of(folder: Path) -> Plan:
    path = folder / "plan.yaml"
    variants = {name: {"settings": {"model.lr": slope}} for name, slope in SLOPES.items()}
    content = {"config": "configs/debug/policy.yaml", "variants": variants, "seeds": [0, 1, 2], "kl_range": 2, "budgets": [1]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_plan(str(path))


def reported(folder: Path, broken: dict[tuple[str, int], Any], outcomes: dict[tuple[str, int], str] | None = None) -> tuple[str, list[Any]]:
    """The report of runs that gain their variant's slope (and a tenth of the seed) a nat; `broken` ones have that KL after 4 updates."""
    plan = plan_of(folder)
    cells = plan.cells(folder)
    for cell in cells:
        place, run = (cell.variant, cell.job.seed), Path(cell.job.folder)
        run.mkdir(parents=True, exist_ok=True)
        lines = []
        for updates, kl in ((0, 0.0), (4, 1.0), (8, 2.0)):
            gain = kl * (SLOPES[cell.variant] + cell.job.seed / 10)
            line = {"updates": updates, "kl": broken.get(place, kl) if updates == 4 else kl, "learned": gain, "win_rate_learned": 0.5}
            lines.append({**line, "length": 9.0, "distinct_2": 0.5, "learned_each": [[gain, gain]]})
        (run / "path.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "done.json").write_text(json.dumps({"outcome": (outcomes or {}).get(place, "finished")}))
    diverged = write_report(plan, cells, [], folder / "out")
    return (folder / "out/report.md").read_text(), diverged


def statistics_of(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "out/statistics.csv").open() as file:
        return {(row["variant"], row["quantity"] + ("~" if row["against"] else "")): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_an_evaluation_that_is_not_finite_is_named_and_its_seed_left_out(tmp_path, value):
    report, diverged = reported(tmp_path, {("B", 1): value})
    assert [(item.cell.variant, item.cell.job.seed, item.why) for item in diverged] == [("B", 1, "kl not finite after 4 updates")]
    assert "**Runs that diverged: 1.**" in report and "B, 1 of 3." in report
    assert "- B, seed 1, {}: kl not finite after 4 updates" in report.partition("## Diverged")[2]
    found = statistics_of(tmp_path)
    assert float(found["B", "area_learned"]["mean"]) == pytest.approx((2.0 + 2.2) / 2)  # over KL from 0 to 2, seeds 0 and 2
    assert float(found["A", "area_learned"]["mean"]) == pytest.approx(1.1) and found["A", "area_learned"]["seeds"] == "3"
    assert float(found["B", "area_learned~"]["mean"]) == pytest.approx(1.0) and found["B", "area_learned~"]["seeds"] == "2"
    assert "| B | 2 | 2.100 " in report and "| A | 3 | 1.100 " in report


def test_its_evaluations_stay_in_rows_csv_and_are_marked(tmp_path):
    reported(tmp_path, {("B", 1): math.nan})
    with (tmp_path / "out/rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 3
    assert {(row["variant"], row["seed"]) for row in rows if row["left_out"] == "a run diverged"} == {("B", "1")}
    assert {row["left_out"] for row in rows} == {"", "a run diverged"} and sum(row["kl"] == "nan" for row in rows) == 1

    # so the statistics follow from the files here too
    words = ("variant", "run", "left_out", "against", "against_run")
    wins = list(csv.DictReader((tmp_path / "out/wins.csv").open()))
    one, two = ([{name: text if name in words else float(text) for name, text in row.items()} for row in read] for read in (rows, wins))
    plan = plan_of(tmp_path)
    found = statistics_of(tmp_path)
    for item in compute_statistics(plan, Points(one, plan), two):
        told = found[item.variant, item.quantity + ("~" if item.against else "")]
        assert item.mean == pytest.approx(float(told["mean"]), rel=1e-5) and item.seeds == int(told["seeds"])


def test_a_run_that_is_missing_takes_its_seed_out_in_the_same_way(tmp_path):
    reported(tmp_path, {})
    plan = plan_of(tmp_path)
    gone, *there = plan.cells(tmp_path)
    assert write_report(plan, there, [Failed(gone._replace(variant="B"), "not run")], tmp_path / "out") == []
    with (tmp_path / "out/rows.csv").open() as file:
        marked = {(row["variant"], row["seed"]): row["left_out"] for row in csv.DictReader(file)}
    assert {place for place, why in marked.items() if why} == {("B", "0")} and marked["B", "0"] == "a run is missing"
    assert statistics_of(tmp_path)["B", "area_learned"]["seeds"] == "2"


def test_without_divergence_nothing_is_said_of_it(tmp_path):
    report, diverged = reported(tmp_path, {})
    assert diverged == [] and "iverged" not in report and "left_out" not in (tmp_path / "out/rows.csv").read_text()


def test_a_variant_that_always_diverges_is_counted_though_it_has_no_figures(tmp_path):
    report, _ = reported(tmp_path, {("C", seed): math.nan for seed in (0, 1, 2)})
    assert "**Runs that diverged: 3.**" in report and "C, 3 of 3." in report
    assert not any(variant == "C" for variant, _ in statistics_of(tmp_path)) and "| B | 3 |" in report


def test_a_baseline_that_always_diverges_leaves_the_others_their_own_figures(tmp_path):
    report, _ = reported(tmp_path, {("A", seed): math.nan for seed in (0, 1, 2)})
    assert "A, 3 of 3." in report and "| B | 3 |" in report and "## Paired" not in report
    assert list(csv.DictReader((tmp_path / "out/wins.csv").open())) == []


def test_a_study_of_which_every_run_diverged_has_a_report_that_says_so(tmp_path):
    report, diverged = reported(tmp_path, {(name, seed): math.nan for name in SLOPES for seed in (0, 1, 2)})
    assert len(diverged) == 9 and "**Runs that diverged: 9.**" in report and "A, 3 of 3; B, 3 of 3; C, 3 of 3." in report


def test_a_run_that_the_guard_stopped_diverged_and_one_that_spent_its_budget_did_not(tmp_path):
    outcomes = {("A", 0): "diverged: step 3: loss is nan", ("B", 0): "kl_budget.max_kl is 1.0, and KL is 2.0"}
    report, diverged = reported(tmp_path, {}, outcomes)
    assert [(item.cell.variant, item.why) for item in diverged] == [("A", "step 3: loss is nan")]
    early = report.partition("## Ended early")[2].partition("## ")[0]
    assert "- B, seed 0" in early and "- A" not in early
    assert statistics_of(tmp_path)["A", "area_learned"]["seeds"] == "2" and statistics_of(tmp_path)["B", "area_learned"]["seeds"] == "3"


def test_the_whole_command_with_a_learning_rate_that_blows_up(p3o, monkeypatch):
    def one_by_one(work, jobs, workers):  # in the test's own process, where the libraries are imported already
        for job in jobs:
            try:
                work(job)
                yield job, None
            except InputError as error:
                yield job, str(error)

    monkeypatch.setattr(frontier, "run_jobs", one_by_one)
    content = {
        "config": "configs/debug/policy.yaml",
        "rollouts": 2,
        "settings": {"trainer.logger": False, "data.val_fraction": 0.2, "trainer.limit_val_batches": 0},
        "evaluate": {"times": 2, "prompts": 4, "responses": 2},
        "variants": {"tame": {}, "wild": {"settings": {"model.lr": 1e30}}},
        "seeds": [0, 1],
    }
    (p3o.folder / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    ended = p3o("frontier", "plan.yaml", "--out", "out")
    assert ended.code == 0 and "4 of 4 runs, of which 2 diverged" in ended.out, ended
    report = (p3o.folder / "out/plan/report.md").read_text()
    assert "wild, 2 of 2." in report and "| tame | 2 |" in report and "Not there" not in report
    named = report.partition("## Diverged")[2]
    assert "- wild, seed 0, {}: step " in named and " nan " in named
    again = p3o("frontier", "plan.yaml", "--out", "out", "--report")
    assert again.code == 0 and (p3o.folder / "out/plan/report.md").read_text() == report
