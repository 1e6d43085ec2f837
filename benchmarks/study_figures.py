"""Draw the figures of docs/study.md from benchmarks/results/study: `python benchmarks/study_figures.py`.

`python benchmarks/study_figures.py RUNS` draws, into the folder of `p3o frontier --out RUNS`, the one figure that it does not draw itself.
"""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from p3o_lightning.commands.frontier_figures import COLOURS, NAMES, STYLES, draw_areas, draw_frontiers
from p3o_lightning.commands.frontier_plan import read_plan
from p3o_lightning.commands.frontier_points import Points, compute_statistics

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks/results/study", ROOT / "docs/figures"
FRONTIERS = {"methods": "frontier", "smollm2_gold": "smollm2-hh-frontier"}  # plan -> its figure
AREAS = ("epochs", "invariance", "scaling", "clipping", "weights", "responses", "kl_source")
WORDS = ("variant", "run", "left_out")  # columns that are no numbers


def rows_of(plan: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The evaluations of a plan's runs."""
    with (results / plan / "rows.csv").open(encoding="utf-8") as file:
        return [
            {name: text if name in WORDS else float(text) for name, text in row.items() if text and name is not None}
            for row in csv.DictReader(file)
        ]


def draw(folder: Path) -> list[str]:
    """All of them, as PNG; their names."""
    drawn = []
    with tempfile.TemporaryDirectory() as aside:
        for name, figure in {**FRONTIERS, **{name: f"{name}-areas" for name in AREAS}}.items():
            plan = read_plan(f"benchmarks/study/{name}.yaml")
            points = Points(rows_of(name), plan)
            if name in FRONTIERS:
                made = draw_frontiers(plan, points, Path(aside))
            else:
                made = draw_areas(plan, points, compute_statistics(plan, points), Path(aside))
            shutil.copyfile(Path(aside) / made, folder / f"{figure}.png")
            drawn.append(f"{figure}.png")
    return [*drawn, draw_path(folder)]


def draw_path(folder: Path, results: Path = RESULTS, epochs: int = 8) -> str:
    """Means over seeds of both rewards' gains and of the KL, evaluation by evaluation, to the end of the runs of (b)."""
    panels = {"learned": NAMES["learned"], "gold": NAMES["gold"], "kl": "KL to the reference"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6))
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for place, method in enumerate(("P3O V1", "P3O V2", "RLOO", "PPO")):
            style = {"color": COLOURS[place], "linestyle": STYLES[place], "marker": "o", "markersize": 3, "linewidth": 1.4}
            axis.plot(*path_of(f"{method}, {epochs}", name, results), label=method, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("responses drawn")
        axis.set_ylabel("nats" if name == "kl" else "gain over the start")
        axis.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"To the end of the runs, {epochs} epochs a rollout, mean over seeds", fontsize=11)
    figure.tight_layout()
    figure.savefig(folder / "epochs-path.png", dpi=110)
    pyplot.close(figure)
    return "epochs-path.png"


def path_of(variant: str, name: str, results: Path) -> tuple[list[float], list[float]]:
    """Responses drawn, and the mean gain of a figure over seeds by then."""
    rows = [row for row in rows_of("epochs", results) if row["variant"] == variant]
    start = {row["seed"]: row[name] for row in rows if row["updates"] == 0}
    gains: dict[float, list[float]] = {}
    for row in rows:
        gains.setdefault(row["responses"], []).append(row[name] - start[row["seed"]])
    return sorted(gains), [sum(gains[drawn]) / len(gains[drawn]) for drawn in sorted(gains)]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        runs = Path(sys.argv[1])
        print(runs / "epochs" / draw_path(runs / "epochs", runs))
    else:
        print(f"{FIGURES}: {', '.join(draw(FIGURES))}")
