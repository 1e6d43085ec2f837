"""What `p3o frontier` writes of a plan: the raw rows and the statistics as CSV, a report in Markdown, and its figures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from p3o_lightning.commands.frontier_plan import SERIES, Cell, Plan
from p3o_lightning.commands.frontier_points import Points, Row, Statistic, compute_statistics, rows_of_wins
from p3o_lightning.commands.frontier_run import DIVERGED, DONE, PATH, read_lines
from p3o_lightning.errors import InputError

_MEANS = ("kl", "learned", "gold", "win_rate_learned", "win_rate_gold", "length", "distinct_2")  # of an evaluation


class Failed(NamedTuple):
    """A run that is not there, or that diverged, and why."""

    cell: Cell
    why: str


def write_report(plan: Plan, finished: list[Cell], missing: list[Failed], folder: Path) -> list[Failed]:
    """Write rows.csv, wins.csv, statistics.csv, report.md and the figures; returns the runs that diverged.

    A variant's seed counts with all of its runs or not at all: of half a grid the frontier would be lower for that alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(cell, run_rows(cell)) for cell in finished]
    diverged = [Failed(cell, why) for cell, rows in runs if (why := divergence(cell, rows))]
    left_out = {(item.cell.variant, item.cell.job.seed): "a run is missing" for item in missing}
    left_out |= {(item.cell.variant, item.cell.job.seed): "a run diverged" for item in diverged}
    rows = [row for _, evaluations in runs for row in evaluations]
    for row in rows:
        if (place := (row["variant"], row["seed"])) in left_out:
            row["left_out"] = left_out[place]  # rows.csv then has the column; where every row counts, it has not
    write_rows(folder / "rows.csv", rows)
    points = Points(rows, plan)
    wins = rows_of_wins(plan, points)
    write_rows(folder / "wins.csv", wins)
    statistics = compute_statistics(plan, points, wins)
    write_rows(folder / "statistics.csv", [item._asdict() for item in statistics])
    figures = draw(plan, points, statistics, folder) if points.by else []
    gone = [item.cell for item in diverged]
    early = [(cell, outcome) for cell in finished if (outcome := outcome_of(cell)) != "finished" and cell not in gone]
    (folder / "report.md").write_text(markdown(plan, points, statistics, missing, figures, early, diverged), encoding="utf-8")
    return diverged


def divergence(cell: Cell, rows: list[Row]) -> str:
    """Why a run counts as diverged: the guard of `p3o fit` stopped it, or an evaluation is not finite. Empty: it does not."""
    if (outcome := outcome_of(cell)).startswith(DIVERGED):
        return outcome.removeprefix(DIVERGED)
    for row in rows:
        if broken := [name for name in _MEANS if name in row and not _is_finite(row[name])]:
            return f"{', '.join(broken)} not finite after {row['updates']} updates"
    return ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)  # null is how some write NaN in JSON


def outcome_of(cell: Cell) -> str:
    """How the run ended: "finished", or the reason for which it ended itself."""
    return str(json.loads((Path(cell.job.folder) / DONE).read_text(encoding="utf-8"))["outcome"])


def run_rows(cell: Cell) -> list[Row]:
    """One row for every evaluation of the run: where it stands in the plan, and its means."""
    place = {"variant": cell.variant, "seed": cell.job.seed, **cell.choice, "run": Path(cell.job.folder).name}
    lines = read_lines(Path(cell.job.folder) / PATH)
    for line in lines[:1]:
        if _is_finite(line["kl"]) and abs(line["kl"]) < 1e-3:  # the start is the reference, but for rounding
            line["kl"] = 0.0
    return [place | {name: _rounded(value) for name, value in line.items()} for line in lines]


def _rounded(value: Any) -> Any:
    """As rows.csv has it, so that the statistics can be had from that file to the last digit."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A tidy CSV: a line for every row; lists, which are each response's scores, are left out."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list)))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items() if name in names})


# ---- the report

_FEW = (
    "**Of fewer than five seeds an interval is hardly more than their range**: 2, 3 and 4 cover 0.51, 0.75 and 0.88 of the time, not 0.95."
)


def markdown(
    plan: Plan,
    points: Points,
    statistics: list[Statistic],
    missing: list[Failed],
    figures: list[str],
    early: Sequence[tuple[Cell, str]] = (),
    diverged: Sequence[Failed] = (),
) -> str:
    """The report."""
    named = {(item.variant, item.quantity, item.against): item for item in statistics}
    count = len({seed for seeds in points.by.values() for seed in seeds})
    lines = [f"# {plan.title}", ""]
    lines += [f"![{Path(name).stem}]({name})" for name in figures] + ([""] if figures else [])
    lines += [
        f"{count} seeds; areas are mean gains over the start along the frontier, KL from 0 to {points.kl_range:.3g} nats; intervals are "
        "95 % bootstrap intervals over seeds. The frontier is that of the learned reward, which was optimised; gold, length and the rest "
        "are read at the policies that it picks. `rows.csv` has every evaluation, `wins.csv` what two of them won "
        "against each other, `statistics.csv` every figure.",
        "",
        *([_FEW, ""] if 1 < count < 5 else []),
        *([_without(plan, diverged), ""] if diverged else []),
        "## Area under the frontier",
        "",
    ]
    rewards = points.rewards
    lines += _table(
        ["variant", "seeds", *(f"{reward}, mean gain" for reward in rewards), "evaluations in the range"],
        [
            [
                variant,
                str(len(points.by[variant])),
                *(_interval(named[variant, f"area_{reward}", ""]) for reward in rewards),
                f"{named[variant, 'evaluations', ''].mean:.1f}",
            ]
            for variant in points.by
        ],
    )
    theirs = "the first of its series" if plan.baseline == SERIES else plan.baseline
    others = [variant for variant in points.by if (variant, "area_learned", plan.baseline_of(variant)) in named]
    if others:
        lines += [f"## Paired with {theirs}, seed by seed", ""]
        body = []
        for variant in others:
            for reward in rewards:
                item = named[variant, f"area_{reward}", plan.baseline_of(variant)]
                body.append([variant, reward, _interval(item, "+.3f"), _p(item.p_student), _p(item.p_holm), _p(item.p_sign_flip)])
        lines += _table(["variant", "reward", "difference of areas", "p (t)", "p (Holm)", "p (sign flips)"], body)
    lines += ["## At matched KL", ""]
    head = ["variant", "KL", *(f"{reward}, gain" for reward in rewards), f"win rate by {rewards[-1]}, over the start"]
    body = []
    for budget in points.budgets:
        for variant in points.by:
            names = [f"{name}@{budget:g}" for name in (*rewards, f"win_rate_{rewards[-1]}")]
            duel = named.get((variant, f"wins_{rewards[-1]}@{budget:g}", plan.baseline_of(variant)))
            body.append(
                [variant, f"{budget:g}", *(_interval(named[variant, name, ""]) for name in names)]
                + ["" if duel is None else _interval(duel)]
                + [f"{named[variant, f'{name}@{budget:g}', ''].mean:.3g}" for name in ("length", "distinct_2")]
            )
    lines += _table([*head, f"over {theirs}", "length", "distinct-2"], body)
    lines += ["## At the end of the runs", ""]
    lines += ["Where gold is lower than above, it was over-optimised on the way.", ""] if points.has_gold else []
    lines += _table(
        ["variant", "KL", *(f"{reward}, gain" for reward in rewards)],
        [[variant, *(_interval(named[variant, f"{name}@end", ""]) for name in ("kl", *rewards))] for variant in points.by],
    )
    if early:
        lines += ["## Ended early", "", "Measured up to there.", ""]
        lines += [f"- {cell.variant}, seed {cell.job.seed}, {cell.choice}: {outcome}" for cell, outcome in early] + [""]
    if diverged:
        lines += ["## Diverged", "", "A variant's seed is left out of all figures if one of its runs diverged.", ""]
        lines += [f"- {item.cell.variant}, seed {item.cell.job.seed}, {item.cell.choice}: {item.why}" for item in diverged] + [""]
    if missing:
        lines += ["## Not there", "", "A variant's seed is left out of all figures if one of its runs is missing.", ""]
        lines += [f"- {item.cell.variant}, seed {item.cell.job.seed}, {item.cell.choice}: {item.why}" for item in missing] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _without(plan: Plan, diverged: Sequence[Failed]) -> str:
    """What must be known before any mean is read."""
    seeds: dict[str, set[int]] = {}
    for item in diverged:
        seeds.setdefault(item.cell.variant, set()).add(item.cell.job.seed)
    told = "; ".join(f"{variant}, {len(gone)} of {len(plan.seeds)}" for variant, gone in seeds.items())
    return (
        f"**Runs that diverged: {len(diverged)}.** Seeds left out of every figure for that: {told}. What is told of these variants is told "
        'of the seeds that went well, which flatters them. The runs are named under "Diverged"; `rows.csv` keeps their evaluations, marked '
        "`left_out`."
    )


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)] + [""]


def _interval(item: Statistic, form: str = ".3f") -> str:
    limits = "" if math.isnan(item.low) else f" [{item.low:{form}}, {item.high:{form}}]"
    return f"{item.mean:{form}}{limits}"


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def draw(plan: Plan, points: Points, statistics: list[Statistic], folder: Path) -> list[str]:
    """The figures as PNG and SVG; returns the names of the PNGs."""
    try:
        from p3o_lightning.commands.frontier_figures import draw_areas, draw_frontiers
    except ImportError as error:
        raise InputError(f"the figures need matplotlib ({error}): pip install matplotlib, then the same command again.") from error
    drawn = [draw_frontiers(plan, points, folder)]
    if any(variant.x is not None for variant in plan.variants):
        drawn.append(draw_areas(plan, points, statistics, folder))
    return drawn
