"""Win rates over the baseline can be had from two files: the means of evaluations, and what two evaluations won against each other.

The power of these tests, found by planting one error at a time:
    planted error                       first test that fails, without test_
    a tie counts as a win               counts_by_hand
    losses and wins the wrong way round counts_by_hand
    one budget's evaluations alone      every_two_evaluations_that_a_budget_mixes_are_there_once
    scores used though wins are given   the_files_alone_give_the_win_rates
    weights of mixtures left out        the_files_alone_give_the_win_rates
    0 where a frontier begins later     a_frontier_that_begins_later_wins_nothing_and_loses_nothing
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from p3o_lightning.commands.frontier_plan import Plan, Variant
from p3o_lightning.commands.frontier_points import Points, compute_statistics, head_to_head, rows_of_wins
from p3o_lightning.commands.frontier_report import write_rows
from p3o_lightning.frontier import score_counts, score_win_rate, win_share

PLAN = Plan("plan", "", [], [Variant(name, {}, {}) for name in ("A", "B")], [0, 1], baseline="A", kl_range=2.0, budgets=[0.25, 1.5, 2.0])


def evaluation(variant: str, seed: int, updates: int, kl: float, learned: float, gold: list[float]) -> dict[str, Any]:
    """One prompt, a response for each of `gold`."""
    means = {"kl": kl, "learned": learned, "gold": sum(gold) / len(gold), "win_rate_learned": 0.5, "win_rate_gold": 0.5}
    each = {"learned_each": [[learned] * len(gold)], "gold_each": [gold]}
    return {
        "variant": variant,
        "seed": seed,
        "run": f"{variant}{seed}",
        "updates": updates,
        **means,
        "length": 9.0,
        "distinct_2": 0.5,
        **each,
    }


def rows() -> list[dict[str, Any]]:
    """Concave paths, so that every evaluation spans its frontier; B at seed 1 wins more."""
    found = []
    for seed in (0, 1):
        found += [evaluation("A", seed, place, place, gain, [gain, 0.0]) for place, gain in ((0, 0.0), (1, 1.0), (2, 1.5))]
        found += [evaluation("B", seed, place, place, gain, [gain, seed * gain]) for place, gain in ((0, 0.0), (1, 2.0), (2, 2.5))]
    return found


def test_counts_by_hand():
    # 2 beats 1 and 1, and ties with no one; 1 ties with both; the second prompt: 0 loses to 3 twice, 4 beats it twice
    assert score_counts([[2.0, 1.0], [0.0, 4.0]], [[1.0, 1.0], [3.0, 3.0]]) == (4, 2, 2)
    assert score_win_rate([[2.0, 1.0], [0.0, 4.0]], [[1.0, 1.0], [3.0, 3.0]]) == 5 / 8
    assert math.isnan(win_share(0, 0, 0))


def test_every_two_evaluations_that_a_budget_mixes_are_there_once():
    wins = rows_of_wins(PLAN, Points(rows(), PLAN))
    met = [(row["seed"], row["updates"], row["against_updates"]) for row in wins]
    # at 1/4 nat the first two of either side, at 1.5 the last two, at 2 the last
    some = {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    assert sorted(met) == sorted((seed, *pair) for seed in (0, 1) for pair in some)
    assert {(row["variant"], row["against"]) for row in wins} == {("B", "A")}
    (last,) = [row for row in wins if (row["seed"], row["updates"], row["against_updates"]) == (1, 2, 2)]
    assert (last["wins_gold"], last["ties_gold"], last["losses_gold"]) == (4, 0, 0)  # 2.5, 2.5 against 1.5, 0
    assert last["run"] == "B1" and last["against_run"] == "A1"


def test_the_files_alone_give_the_win_rates(tmp_path: Path):
    points = Points(rows(), PLAN)
    write_rows(tmp_path / "rows.csv", rows())
    write_rows(tmp_path / "wins.csv", rows_of_wins(PLAN, points))

    def read(name: str) -> list[dict[str, Any]]:
        words = ("variant", "against", "run", "against_run")
        with (tmp_path / name).open() as file:
            return [{name: text if name in words else float(text) for name, text in row.items()} for row in csv.DictReader(file)]

    statistics = compute_statistics(PLAN, Points(read("rows.csv"), PLAN), read("wins.csv"))
    again = {item.quantity: item for item in statistics if item.against}
    # at 1/4 nat either side is 3/4 its start, where all gold is 0, and 1/4 its next evaluation, where A's is 1 and 0, B's 2 and seed * 2
    by_hand = [
        9 / 16 * 0.5 + 3 / 16 * 0.25 + 3 / 16 * 0.75 + 1 / 16 * 2.5 / 4,
        9 / 16 * 0.5 + 3 / 16 * 0.25 + 3 / 16 * 1.0 + 1 / 16 * 1.0,
    ]
    assert again["wins_gold@0.25"].mean == pytest.approx(sum(by_hand) / 2) and again["wins_gold@0.25"].seeds == 2
    for item in compute_statistics(PLAN, points):
        if item.quantity.startswith("wins_"):
            assert again[item.quantity][3:6] == pytest.approx(item[3:6])


def test_scores_are_not_looked_at_where_wins_are_given():
    points = Points(rows(), PLAN)
    wins = [{**row, "wins_gold": 0, "ties_gold": 0, "losses_gold": 4} for row in rows_of_wins(PLAN, points)]
    means = [item.mean for item in compute_statistics(PLAN, points, wins) if item.quantity.startswith("wins_")]
    assert means == [0.0, 0.0, 0.0]


def test_a_frontier_that_begins_later_wins_nothing_and_loses_nothing():
    ours = [evaluation("B", 0, 0, 1.0, 1.0, [1.0])]
    assert math.isnan(head_to_head(ours, rows()[:3], "gold", 0.5)) and math.isnan(head_to_head(rows()[:3], ours, "gold", 0.5))
    assert head_to_head(ours, ours, "gold", 1.0) == 0.5
