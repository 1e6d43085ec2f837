"""The report of `p3o frontier` says what the rows say: statistics by hand, pairings, figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from frontier_plans import plan_file

from p3o_lightning.commands import frontier_figures
from p3o_lightning.commands.frontier_plan import read_plan
from p3o_lightning.commands.frontier_points import Points, compute_statistics, head_to_head
from p3o_lightning.commands.frontier_report import markdown


def row(variant: str, seed: int, updates: int, kl: float, learned: float, gold: float) -> dict[str, Any]:
    each = {"learned_each": [[learned] * 2], "gold_each": [[gold] * 2]}
    rates = {"win_rate_learned": 0.5, "win_rate_gold": 0.5 + gold / 4}
    return {"variant": variant, "seed": seed, "updates": updates, "kl": kl, "learned": learned, "gold": gold, **rates, **each} | {
        "length": 10.0 + kl,
        "distinct_2": 0.5,
    }


def two_variants() -> list[dict[str, Any]]:
    """A gains 1 per nat up to 2 nats (plus its seed's own offset), B half of that; A's gold falls after 1 nat."""
    rows = []
    for seed, offset in ((0, 0.0), (1, 5.0)):
        for variant, slope in (("A", 1.0 + seed / 10), ("B", 0.5)):
            rows.append(row(variant, seed, 0, 0.0, offset, 0.0))
            rows.append(row(variant, seed, 4, 1.0, offset + slope, 0.4))
            rows.append(row(variant, seed, 8, 2.0, offset + 2 * slope, 0.2 if variant == "A" else 0.6))
    return rows


def reported(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Any, Points, dict[Any, Any]]:
    plan = read_plan(str(plan_file(tmp_path, variants={"A": {}, "B": {}}, seeds=[0, 1], **changes)))
    points = Points(rows, plan)
    return plan, points, {(item.variant, item.quantity, item.against): item for item in compute_statistics(plan, points)}


def test_statistics_by_hand(tmp_path):
    plan, points, found = reported(tmp_path, two_variants(), baseline="A", budgets=[1.5])
    assert points.kl_range == 2.0  # what all variants reach at all seeds
    assert found["A", "area_learned", ""].mean == pytest.approx((1.0 + 1.1) / 2)  # a line from 0 to 2 slope has the mean slope
    assert found["B", "area_learned", ""].mean == pytest.approx(0.5)
    assert found["B", "area_learned", "A"].mean == pytest.approx(-0.55)
    assert found["B", "area_learned", "A"].p_sign_flip == 0.5 and found["B", "area_learned", "A"].seeds == 2
    # A's line has no vertex at 1 nat: from start to end, gold 0 to 0.2 at either seed; B's likewise, 0 to 0.6
    assert found["A", "gold@1.5", ""].mean == pytest.approx(0.15)
    assert found["B", "gold@1.5", ""].mean == pytest.approx(0.45)
    assert found["B", "length@1.5", ""].mean == pytest.approx(11.5)
    assert found["A", "win_rate_gold@1.5", ""].mean == pytest.approx(0.5 + 0.15 / 4)
    # mixtures 1/4 start + 3/4 end: B's gold 0.6 beats all of A's, B's 0 ties with A's 0 and loses to 0.2
    assert found["B", "wins_gold@1.5", "A"].mean == pytest.approx(0.75 + 0.25 * 0.25 * 0.5)
    # runs end at 2 nats, at A's lowest gold since the start, whatever was had on the way; two of three evaluations are in the range
    assert found["A", "gold@end", ""].mean == pytest.approx(0.2) and found["B", "learned@end", ""].mean == pytest.approx(1.0)
    assert found["A", "kl@end", ""].mean == 2.0 and found["A", "evaluations", ""].mean == 2.0
    assert "| B | learned | -0.550" in markdown(plan, points, list(found.values()), [], [])


def test_each_variant_can_be_paired_with_the_first_of_its_series(tmp_path):
    rows = two_variants() + [
        {**row, "variant": "A2", "learned": row["learned"] + row["kl"]} for row in two_variants()[:3] + two_variants()[6:9]
    ]
    variants = {"A": {"series": "a"}, "A2": {"series": "a"}, "B": {"series": "b"}}
    plan = read_plan(str(plan_file(tmp_path, variants=variants, seeds=[0, 1], baseline="series")))
    found = {(item.variant, item.quantity): item for item in compute_statistics(plan, Points(rows, plan)) if item.against}
    assert found["A2", "area_learned"].against == "A" and found["A2", "area_learned"].mean == pytest.approx(1.0)
    assert ("B", "area_learned") not in found  # the first of its own
    assert "## Paired with the first of its series" in markdown(
        plan, Points(rows, plan), compute_statistics(plan, Points(rows, plan)), [], []
    )


def test_areas_are_drawn_by_size_whatever_comes_first_in_the_plan(tmp_path, monkeypatch):
    """The first of a series is its baseline, which need not be the smallest."""
    drawn = []
    monkeypatch.setattr(frontier_figures, "_save", lambda figure, *_, **__: drawn.append(figure) or "areas.png")
    variants = {"A": {"series": "a", "x": 2}, "B": {"series": "a", "x": 0.5}, "C": {"series": "a", "x": "none"}}
    slopes = {"A": 1.0, "B": 0.5, "C": 0.1}
    rows = [row(name, 0, epoch, epoch / 4, slope * epoch / 4, 0.1) for name, slope in slopes.items() for epoch in (0, 8)]
    plan = read_plan(str(plan_file(tmp_path, variants=variants, seeds=[0], baseline="series", kl_range=2)))
    points = Points(rows, plan)
    frontier_figures.draw_areas(plan, points, compute_statistics(plan, points), tmp_path)
    axis = drawn[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "2", "none"]
    line = axis.containers[0].lines[0]
    assert list(line.get_xdata()) == pytest.approx([0, 1, 2]) and list(line.get_ydata()) == pytest.approx([0.5, 1.0, 0.1])


def test_a_mixture_wins_as_its_parts_do():
    ours = [row("A", 0, 0, 0.0, 0.0, 0.0), row("A", 0, 4, 2.0, 2.0, 1.0)]
    assert head_to_head(ours, ours, "gold", 0.0) == 0.5
    assert head_to_head(ours, ours, "gold", 1.0) == 0.5  # both are half and half
    assert head_to_head(ours, ours[:1], "gold", 1.0) == pytest.approx(0.75)


def test_without_gold_there_is_one_reward(tmp_path):
    rows = [{name: value for name, value in row.items() if "gold" not in name} for row in two_variants()]
    plan, points, found = reported(tmp_path, rows)
    assert points.rewards == ["learned"] and not any("gold" in quantity for _, quantity, _ in found)
    assert "gold" not in markdown(plan, points, list(found.values()), [], []).split("`rows.csv`")[1]


def test_numbers_of_the_report_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = two_variants()
    _, _, one = reported(tmp_path, rows)
    _, _, other = reported(tmp_path, rows[::-1])
    for key, item in one.items():
        assert [value for value in item[3:] if not math.isnan(value)] == pytest.approx(
            [value for value in other[key][3:] if not math.isnan(value)]
        )
