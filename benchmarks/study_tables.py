"""Fill the tables of docs/study.md from benchmarks/results/study: `python benchmarks/study_tables.py`.

A table is named by the comment in front of it, `<!-- PLAN: QUANTITY, QUANTITY~, QUANTITY~p, ... -->`: an item a column after the variant's.
QUANTITY is the mean with its interval, QUANTITY~ the paired difference to the baseline, QUANTITY~p its p value (paired t test), ~holm that
after Holm's adjustment, ~flip that of the sign-flip test. `evaluations` is a mean alone.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from study_figures import rows_of

from p3o_lightning.commands.frontier_plan import read_plan
from p3o_lightning.commands.frontier_points import Points, at_budget, gain_area

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "study.md", ROOT / "benchmarks" / "results" / "study"
TABLE = re.compile(r"<!-- (\w+): ([^>]*) -->\n((?:\|.*\n)+)")
BOTH = [  # plan, variant, what the first run called it, what is compared
    ("methods", "P3O V1", "", "P3O V1 less P3O V2"),
    ("methods", "P3O V1, 1e-3", "", "P3O V1 at 1e-3 less P3O V2"),
    ("methods", "PPO", "", "PPO less P3O V2"),
    ("methods", "PPO, 1e-3", "", "PPO at 1e-3 less P3O V2"),
    ("methods", "RLOO", "", "RLOO less P3O V2"),
    ("methods", "GRPO", "", "GRPO less P3O V2"),
    ("methods", "online DPO", "", "online DPO less P3O V2"),
    ("epochs", "P3O V2, 2", "", "P3O V2, two epochs less one"),
    ("epochs", "P3O V2, 8", "", "P3O V2, eight epochs less one"),
    ("epochs", "RLOO, 8", "", "RLOO, eight epochs less one"),
    ("epochs", "PPO, 8", "", "PPO, eight epochs less one"),
    ("invariance", "P3O V2, shift 10", "", "P3O V2, a shift of 10"),
    ("invariance", "RLOO, shift 10", "", "RLOO, a shift of 10"),
    ("invariance", "PPO, shift 1", "", "PPO, a shift of 1"),
    ("invariance", "PPO, shift 3", "", "PPO, a shift of 3"),
    ("invariance", "PPO, shift 10", "", "PPO, a shift of 10"),
    ("invariance", "PPO, x 10", "", "PPO, rewards and price of KL ten times as large"),
    ("clipping", "V2, no clip", "no clip", "P3O V2, four epochs, without a clip"),
    ("weights", "clip 0.2, cap 1", "no weights", "P3O V2, four epochs, without weights"),
    ("responses", "P3O V2, 4", "", "P3O V2, four responses less two"),
    ("responses", "RLOO, 4", "", "RLOO, four responses less two"),
    ("kl_source", "0.02, rollout", "rollout", "P3O V2, KL of the policy that sampled"),
]
P_VALUES = {"p": "p_student", "holm": "p_holm", "flip": "p_sign_flip"}


def statistics(plan: str) -> dict[tuple[str, str, bool], dict[str, str]]:
    """(variant, quantity, whether paired) -> the row of statistics.csv."""
    with (RESULTS / plan / "statistics.csv").open(encoding="utf-8") as file:
        return {(row["variant"], row["quantity"], bool(row["against"])): row for row in csv.DictReader(file)}


def cell(rows: dict[tuple[str, str, bool], dict[str, str]], variant: str, item: str) -> str:
    """What stands in the table."""
    quantity, paired, kind = item.partition("~")
    row = rows.get((variant, quantity, bool(paired)))
    if row is None:  # the baseline has no difference to itself
        return ""
    if kind:
        return f"{float(row[P_VALUES[kind]]):.3f}"
    if quantity == "evaluations":
        return f"{float(row['mean']):.1f}"
    sign = "+" if paired and not quantity.startswith("wins") else ""
    low, high = (f"{float(row[name]):{sign}.3f}" for name in ("low", "high"))
    return f"{float(row['mean']):{sign}.3f} [{low}, {high}]"


def first_run(plan: str) -> dict[str, dict[str, str]]:
    """Variant -> its difference of the area of the learned reward in the first run."""
    with (RESULTS.parent / "study_first" / f"{'clipping' if plan == 'weights' else plan}.csv").open(encoding="utf-8") as file:
        return {row["variant"]: row for row in csv.DictReader(file) if row["quantity"] == "area_learned" and row["against"]}


def both_runs() -> str:
    """The table of what both runs have."""
    lines = ["| | first run | second run |", "|---|---|---|"]
    for plan, variant, former, title in BOTH:
        rows = first_run(plan)[former or variant], statistics(plan)[variant, "area_learned", True]
        told = [f"{float(row['mean']):+.3f} [{float(row['low']):+.3f}, {float(row['high']):+.3f}]" for row in rows]
        lines.append(f"| {title} | {' | '.join(told)} |")
    return "<!-- both runs -->\n" + "".join(f"{line}\n" for line in lines)


def seed_by_seed() -> str:
    """Of (g): what each seed gave."""
    plan = read_plan("benchmarks/study/smollm2_gold.yaml")
    points = Points(rows_of("smollm2_gold"), plan)
    names = [variant.name for variant in plan.variants]
    lines = ["| seed |" + "".join(f" {name}, area | {name}, gain at 2 nats |" for name in names), "|---|" + "---|---|" * len(names)]
    for seed in plan.seeds:
        told = ""
        for name in names:
            of_seed = points.by[name][seed]
            told += f" {gain_area(of_seed, 'learned', 2.0):.3f} | {at_budget(of_seed, 'learned', 2.0, gain=True):.3f} |"
        lines.append(f"| {seed} |{told}")
    return "<!-- seed by seed -->\n" + "".join(f"{line}\n" for line in lines)


def ends() -> str:
    """Of (g): where each run ended."""
    lines = [
        "| | learning rate | seed | nats | learned gain | gold gain | tokens | distinct bigrams |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("smollm2_gold"):
        runs.setdefault(row["run"], []).append(row)
    for rows in runs.values():
        first, *_, last = sorted(rows, key=lambda row: row["updates"])
        told = [last["kl"], *(last[name] - first[name] for name in ("learned", "gold")), last["length"], last["distinct_2"]]
        figures = " | ".join(f"{value:.{digits}f}" for value, digits in zip(told, (1, 2, 2, 1, 2), strict=True))
        lines.append(f"| {last['variant']} | {last['model.lr']:g} | {last['seed']:.0f} | {figures} |")
    return "<!-- ends -->\n" + "".join(f"{line}\n" for line in lines)


def filled(match: re.Match[str]) -> str:
    """The table with its rows made anew; its heading stays."""
    plan, items, table = match.groups()
    rows = statistics(plan)
    head = "".join(table.splitlines(keepends=True)[:2])
    variants = dict.fromkeys(variant for variant, _, _ in rows)
    body = [[variant, *(cell(rows, variant, item.strip()) for item in items.split(","))] for variant in variants]
    return f"<!-- {plan}: {items} -->\n{head}" + "".join(f"| {' | '.join(line)} |\n" for line in body)


OTHERS = {"both runs": both_runs, "seed by seed": seed_by_seed, "ends": ends}  # name of a table -> what makes it

if __name__ == "__main__":
    text = TABLE.sub(filled, DOCUMENT.read_text(encoding="utf-8"))
    for name, make in OTHERS.items():
        found = re.search(rf"<!-- {name} -->\n(?:\|.*\n)+", text)
        assert found, name
        text = text.replace(found.group(), make())
    DOCUMENT.write_text(text, encoding="utf-8")
