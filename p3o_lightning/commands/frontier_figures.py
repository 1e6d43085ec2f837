"""The figures of a frontier report: reward against KL, and area under the frontier against what was varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from p3o_lightning.commands.frontier_plan import Plan, Variant
from p3o_lightning.commands.frontier_points import Points, Statistic, at_budget
from p3o_lightning.frontier import bootstrap_interval

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's palette, which colour-blind readers can tell apart, and a line style with each.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--"]
NAMES = {"learned": "learned reward (optimised)", "gold": "gold score (not optimised)"}


def draw_frontiers(plan: Plan, points: Points, folder: Path) -> str:
    """Gain against KL: a row of panels for the learned reward and one for gold, a column for each series."""
    shown = [variant for variant in plan.variants if variant.name in points.by and (not plan.show or variant.name in plan.show)]
    series = list(dict.fromkeys(variant.series for variant in shown))
    rewards, grid = points.rewards, np.linspace(0, points.kl_range, 41)
    one = len(series) == 1  # then the rewards stand side by side
    rows, columns = (1, len(rewards)) if one else (len(rewards), len(series))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, sharex=True, sharey=False if one else "row"
    )
    for number, (reward, name) in enumerate([(reward, name) for reward in rewards for name in series]):
        axis = axes.flat[number]
        members = [variant for variant in shown if variant.series == name]
        for place, variant in enumerate(members):
            curves = [[at_budget(rows_, reward, k, gain=True) for k in grid] for rows_ in points.by[variant.name].values()]
            _band(axis, grid, np.array(curves), place, _label(variant))
        axis.set_title(NAMES[reward] if one else f"{name}: {reward}", fontsize=10)
        axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
        if number % columns == 0 or one:
            axis.set_ylabel("gain over the start")
        if number >= columns * (rows - 1):
            axis.set_xlabel("KL to the reference, nats")
        if number < columns and (number == 0 or not one):
            axis.legend(fontsize=8, frameon=False)
    return _save(figure, plan, folder / "frontier")


def _label(variant: Variant) -> str:
    return variant.name if variant.x is None or variant.series is None else str(variant.x)


def _band(axis: Any, x: Any, curves: Any, place: int, label: str) -> None:
    """Mean over seeds with its 95 % interval."""
    colour, style = COLOURS[place % len(COLOURS)], STYLES[place % len(STYLES)]
    intervals = [bootstrap_interval(column) for column in curves.T]
    axis.plot(x, [item.mean for item in intervals], color=colour, linestyle=style, linewidth=1.6, label=label)
    if len(curves) > 1:
        low, high = [item.low for item in intervals], [item.high for item in intervals]
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_areas(plan: Plan, points: Points, statistics: list[Statistic], folder: Path) -> str:
    """Area under the frontier against `x`, a line for each series, a panel for each reward."""
    named = {(item.variant, item.quantity): item for item in statistics if not item.against}
    series = list(dict.fromkeys(variant.series for variant in plan.variants if variant.x is not None))
    ticks = _in_order([variant.x for variant in plan.variants if variant.x is not None])
    figure, axes = pyplot.subplots(1, len(points.rewards), figsize=(4.2 * len(points.rewards), 3.6), squeeze=False)
    for axis, reward in zip(axes[0], points.rewards, strict=True):
        for place, name in enumerate(series):
            members = [item for item in plan.variants if item.series == name and item.x is not None and item.name in points.by]
            found = [(ticks.index(item.x), named[item.name, f"area_{reward}"]) for item in members if item.x is not None]
            found.sort(key=lambda place_and_area: place_and_area[0])
            x = [position + 0.06 * (place - (len(series) - 1) / 2) for position, _ in found]  # side by side, so that bars can be seen
            mean = [item.mean for _, item in found]
            errors = [[item.mean - item.low for _, item in found], [item.high - item.mean for _, item in found]]
            style = {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place % len(STYLES)], "marker": "o", "markersize": 3.5}
            if any(isinstance(tick, str) for tick in ticks):
                style["linestyle"] = "none"  # a line from one word to the next would mean nothing
            axis.errorbar(x, mean, None if np.isnan(errors).any() else errors, capsize=2, linewidth=1.4, label=name, **style)
        labels = [str(tick) for tick in ticks]
        axis.set_xticks(range(len(ticks)), labels, rotation=30 if len(ticks) > 5 or len("".join(labels)) > 36 else 0)
        axis.set_xlabel(plan.x_label or "")
        axis.set_title(NAMES[reward], fontsize=10)
        axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes[0][0].set_ylabel(f"mean gain, KL 0 to {points.kl_range:.3g} nats")
    named_lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*named_lines, loc="lower center", ncols=len(series), fontsize=8, frameon=False)
    return _save(figure, plan, folder / "areas", bottom=0.07)


def _in_order(ticks: list[float | str]) -> list[float | str]:
    """Each once: numbers by size, then words as they were given."""
    numbers = {tick for tick in ticks if not isinstance(tick, str)}
    return [*sorted(numbers), *dict.fromkeys(tick for tick in ticks if isinstance(tick, str))]


def _save(figure: Any, plan: Plan, path: Path, bottom: float = 0.0) -> str:
    """As PNG and SVG, the same bytes for the same figures. `bottom`: the share of the height that is left for a legend."""
    figure.suptitle(plan.title, fontsize=11)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=110)
    with pyplot.rc_context({"svg.hashsalt": "p3o"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
    return path.with_suffix(".png").name
