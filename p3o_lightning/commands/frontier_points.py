"""The figures of a frontier report, from the evaluations of its runs: seed by seed, then over seeds and paired with the baseline."""

from __future__ import annotations

import itertools
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
    score_counts,
    score_win_rate,
    win_share,
)

Row = dict[str, Any]  # an evaluation: its variant, seed and means
Rate = Callable[[Row, Row, str], float]  # win rate by a reward of one evaluation's responses over another's


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
    """The evaluations by variant and seed, and the KL range that the variants are compared over.

    A row that says why it is `left_out` counts nowhere.
    """

    def __init__(self, rows: list[Row], plan: Plan) -> None:
        self.by: dict[str, dict[int, list[Row]]] = {}
        rows = [row for row in rows if not row.get("left_out")]
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


def mixed(points: list[Row], budget: float) -> list[tuple[float, Row]]:
    """The evaluations that make up the frontier at a KL of `budget`, each with its weight."""
    weights = mixture_at(column(points, "kl"), column(points, "learned"), budget)
    return [(float(weight), point) for weight, point in zip(weights, points, strict=True) if weight > 0]


def rate_by_scores(one: Row, other: Row, reward: str) -> float:
    """A `Rate` from every response's own score."""
    return score_win_rate(one[f"{reward}_each"], other[f"{reward}_each"])


def head_to_head(ours: list[Row], theirs: list[Row], reward: str, budget: float, rate: Rate = rate_by_scores) -> float:
    """Win rate of one variant's frontier over another's at a KL of `budget`, on the same prompts; of mixtures, as they are mixed.

    NaN where a frontier begins at more KL than `budget`.
    """
    pairs = list(itertools.product(mixed(ours, budget), mixed(theirs, budget)))
    return sum(a * b * rate(one, other, reward) for (a, one), (b, other) in pairs) if pairs else math.nan


def rows_of_wins(plan: Plan, points: Points) -> list[Row]:
    """wins.csv: what the responses of one evaluation won against those of another, by gold if there is any.

    A row for every two evaluations, one of a variant and one of its baseline, that the two frontiers consist of at some budget. With the
    evaluations' means this is all that a win rate over the baseline is made of, so that every response's score need not be kept.
    """
    reward = points.rewards[-1]
    found: dict[tuple[Any, ...], Row] = {}
    for variant, baseline, seeds in _pairings(plan, points.by) if points.has_each(reward) else []:
        for seed, budget in itertools.product(seeds, points.budgets):
            sides = (mixed(points.by[name][seed], budget) for name in (variant, baseline))
            for (_, one), (_, other) in itertools.product(*sides):
                counts = score_counts(one[f"{reward}_each"], other[f"{reward}_each"])
                named = zip((*_MET, *(f"{name}_{reward}" for name in _COUNTED)), (*_met(one, other), *counts), strict=True)
                found[_met(one, other)] = dict(named)  # several budgets may need the same two
    return list(found.values())


_COUNTED = ("wins", "ties", "losses")
_MET = ("variant", "seed", "run", "updates", "against", "against_run", "against_updates")  # the columns that tell two evaluations


def _met(one: Row, other: Row) -> tuple[Any, ...]:
    return (*(one.get(name, "") for name in _MET[:4]), *(other.get(name, "") for name in ("variant", "run", "updates")))


def _pairings(plan: Plan, by_variant: dict[str, dict[int, Any]]) -> list[tuple[str, str, list[int]]]:
    """Each variant, its baseline, and the seeds that both have."""
    pairs = [(variant, plan.baseline_of(variant)) for variant in by_variant]
    shared = [(one, other, [seed for seed in by_variant[one] if seed in by_variant.get(other, {})]) for one, other in pairs if one != other]
    return [pairing for pairing in shared if pairing[2]]


def compute_statistics(plan: Plan, points: Points, wins: list[Row] | None = None) -> list[Statistic]:
    """Every figure of the report: means over seeds with intervals, and paired differences to the baseline.

    Args:
        plan: what was compared.
        points: its evaluations.
        wins: the rows of wins.csv; None: `rows_of_wins`, from every response's score, which rows.csv does not have.
    """
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
    rows = rows_of_wins(plan, points) if wins is None else wins
    rates = {tuple(row[name] for name in _MET): win_share(*(row[f"{name}_{best}"] for name in _COUNTED)) for row in rows}
    for budget in points.budgets if rates else []:
        for variant, baseline, shared in _pairings(plan, points.by):
            sides = [(points.by[variant][seed], points.by[baseline][seed]) for seed in shared]
            shares = [head_to_head(ours, theirs, best, budget, lambda one, other, _: rates[_met(one, other)]) for ours, theirs in sides]
            item = _alone(variant, f"wins_{best}@{budget:g}", bootstrap_interval(shares), len(shared))
            statistics.append(item._replace(against=baseline))
    return statistics


def _alone(variant: str, quantity: str, interval: Interval, seeds: int) -> Statistic:
    return Statistic(variant, quantity, "", *interval, math.nan, math.nan, math.nan, seeds)


def _paired(quantity: str, by_variant: dict[str, dict[int, float]], plan: Plan) -> list[Statistic]:
    """Differences to the baseline on the seeds that both have; p values adjusted for the number of variants."""
    found: list[tuple[str, str, Difference, int]] = []
    for variant, baseline, seeds in _pairings(plan, by_variant):
        ours, theirs = by_variant[variant], by_variant[baseline]
        found.append((variant, baseline, paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]), len(seeds)))
    adjusted = holm([difference.p_student for *_, difference, _ in found])
    return [
        Statistic(variant, quantity, baseline, *difference[:3], difference.p_student, p, difference.p_sign_flip, seeds)
        for (variant, baseline, difference, seeds), p in zip(found, adjusted, strict=True)
    ]
