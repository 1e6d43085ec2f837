"""The figures of a frontier report, from the evaluations of its runs: seed by seed, then over seeds and paired with the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from p3o_lightning.commands.frontier_plan import Plan
from p3o_lightning.frontier import (
    Difference,
    Interval,
    area_under,
    bootstrap_interval,
    height_at,
    holm,
    mixture_at,
    paired_difference,
    score_win_rate,
)

Row = dict[str, Any]  # an evaluation: its variant, seed and means


class Statistic(NamedTuple):
    """One figure over seeds. `against` names the variant that it is a paired difference to; empty: none."""

    variant: str
    quantity: str  # area_learned, area_gold, FIGURE@NATS, FIGURE@end, or evaluations
    against: str
    mean: float
    low: float
    high: float
    p_student: float
    p_holm: float
    p_sign_flip: float
    seeds: int


class Points:
    """The evaluations by variant and seed, and the KL range that the variants are compared over."""

    def __init__(self, rows: list[Row], plan: Plan) -> None:
        self.by: dict[str, dict[int, list[Row]]] = {}
        for row in rows:
            self.by.setdefault(row["variant"], {}).setdefault(row["seed"], []).append(row)
        self.by = {variant.name: self.by[variant.name] for variant in plan.variants if variant.name in self.by}
        self.has_gold = bool(rows) and all("gold" in row for row in rows)
        reached = [max(float(row["kl"]) for row in points) for seeds in self.by.values() for points in seeds.values()]
        self.kl_range = plan.kl_range or max(min(reached, default=1.0), 1e-3)
        self.budgets = plan.budgets or [round(self.kl_range * share, 2) for share in (0.25, 0.5, 1.0)]

    @property
    def rewards(self) -> list[str]:
        """The rewards that are shown."""
        return ["learned", "gold"] if self.has_gold else ["learned"]

    def has_each(self, reward: str) -> bool:
        """Whether every response's own score is there, as it is beside the runs and not in rows.csv."""
        return all(f"{reward}_each" in row for seeds in self.by.values() for points in seeds.values() for row in points)

    def over_seeds(self, variant: str, value: Callable[[list[Row]], float]) -> dict[int, float]:
        """Seed -> a figure of its points."""
        return {seed: value(points) for seed, points in sorted(self.by.get(variant, {}).items())}


def column(points: list[Row], name: str) -> list[float]:
    """A figure of every point."""
    return [float(point[name]) for point in points]


def gain_area(points: list[Row], reward: str, kl_range: float) -> float:
    """Mean gain of `reward` over the start, along the frontier of the learned reward, over KL in [0, kl_range]."""
    start = _start(points, reward)
    return area_under(column(points, "kl"), column(points, "learned"), kl_range, of=column(points, reward)) - start


def _start(points: list[Row], name: str) -> float:
    return next(float(point[name]) for point in points if int(point["updates"]) == 0)


def at_budget(points: list[Row], name: str, budget: float, gain: bool = False) -> float:
    """A figure on the frontier of the learned reward at a KL of `budget`; with `gain`, less what it is at the start."""
    value = height_at(column(points, "kl"), column(points, "learned"), budget, of=column(points, name))
    return value - _start(points, name) if gain else value


def at_end(points: list[Row], name: str, gain: bool = False) -> float:
    """A figure at the end of the runs, whatever it was on the way; of several runs the mean. With `gain`, less what it is at the start."""
    last: dict[str, Row] = {}
    for point in points:
        run = str(point.get("run", ""))
        if run not in last or int(point["updates"]) > int(last[run]["updates"]):
            last[run] = point
    value = sum(float(point[name]) for point in last.values()) / len(last)
    return value - _start(points, name) if gain else value


def evaluations(points: list[Row], kl_range: float) -> float:
    """How many evaluations lie beyond the start and in the KL range: a frontier of few is lower for that alone."""
    return float(sum(0 < float(point["kl"]) <= kl_range for point in points))


def head_to_head(ours: list[Row], theirs: list[Row], reward: str, budget: float) -> float:
    """Win rate of one variant's frontier over another's at a KL of `budget`, on the same prompts; of mixtures, as they are mixed."""
    sides = []
    for points in (ours, theirs):
        weights = mixture_at(column(points, "kl"), column(points, "learned"), budget)
        sides.append([(weight, point) for weight, point in zip(weights, points, strict=True) if weight > 0])
    pairs = [(a * b, one, other) for a, one in sides[0] for b, other in sides[1]]
    return sum(weight * score_win_rate(one[f"{reward}_each"], other[f"{reward}_each"]) for weight, one, other in pairs)


def compute_statistics(plan: Plan, points: Points) -> list[Statistic]:
    """Every figure of the report: means over seeds with intervals, and paired differences to the baseline."""
    quantities: dict[str, Callable[[list[Row]], float]] = {}
    for reward in points.rewards:
        quantities[f"area_{reward}"] = lambda rows, reward=reward: gain_area(rows, reward, points.kl_range)  # type: ignore[misc]
    for budget in points.budgets:
        for name in points.rewards:
            quantities[f"{name}@{budget:g}"] = lambda rows, n=name, b=budget: at_budget(rows, n, b, gain=True)  # type: ignore[misc]
        for name in (*(f"win_rate_{reward}" for reward in points.rewards), "length", "distinct_2"):
            quantities[f"{name}@{budget:g}"] = lambda rows, n=name, b=budget: at_budget(rows, n, b)  # type: ignore[misc]
    for name in points.rewards:
        quantities[f"{name}@end"] = lambda rows, n=name: at_end(rows, n, gain=True)  # type: ignore[misc]
    quantities["kl@end"] = lambda rows: at_end(rows, "kl")
    quantities["evaluations"] = lambda rows: evaluations(rows, points.kl_range)
    values = {quantity: {variant: points.over_seeds(variant, value) for variant in points.by} for quantity, value in quantities.items()}
    statistics = []
    for quantity, by_variant in values.items():
        for variant, seeds in by_variant.items():
            statistics.append(_alone(variant, quantity, bootstrap_interval(list(seeds.values())), len(seeds)))
        statistics += _paired(quantity, by_variant, plan)
    best = points.rewards[-1]
    for budget in points.budgets if points.has_each(best) else []:
        for variant in points.by:
            baseline = plan.baseline_of(variant)
            ours, theirs = points.by[variant], points.by.get(baseline, {})
            shared = [seed for seed in ours if seed in theirs]
            if variant != baseline and shared:
                wins = [head_to_head(ours[seed], theirs[seed], best, budget) for seed in shared]
                item = _alone(variant, f"wins_{best}@{budget:g}", bootstrap_interval(wins), len(shared))
                statistics.append(item._replace(against=baseline))
    return statistics


def _alone(variant: str, quantity: str, interval: Interval, seeds: int) -> Statistic:
    return Statistic(variant, quantity, "", *interval, math.nan, math.nan, math.nan, seeds)


def _paired(quantity: str, by_variant: dict[str, dict[int, float]], plan: Plan) -> list[Statistic]:
    """Differences to the baseline on the seeds that both have; p values adjusted for the number of variants."""
    found: list[tuple[str, str, Difference, int]] = []
    for variant, seeds in by_variant.items():
        baseline = plan.baseline_of(variant)
        theirs = by_variant.get(baseline, {})
        shared = [seed for seed in seeds if seed in theirs]
        if variant != baseline and shared:
            difference = paired_difference([seeds[seed] for seed in shared], [theirs[seed] for seed in shared])
            found.append((variant, baseline, difference, len(shared)))
    adjusted = holm([difference.p_student for *_, difference, _ in found])
    return [
        Statistic(variant, quantity, baseline, *difference[:3], difference.p_student, p, difference.p_sign_flip, seeds)
        for (variant, baseline, difference, seeds), p in zip(found, adjusted, strict=True)
    ]
