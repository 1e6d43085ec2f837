"""Fill the tables of docs/study.md from benchmarks/results/study: `python benchmarks/study_tables.py`.

A table is named by the comment in front of it, `<!-- PLAN: QUANTITY, QUANTITY~, QUANTITY~p, ... -->`: an item a column after the variant's.
QUANTITY is the mean with its interval, QUANTITY~ the paired difference to the baseline, QUANTITY~p its p value (paired t test), ~holm that
after Holm's adjustment, ~flip that of the sign-flip test. `evaluations` is a mean alone.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "study.md", ROOT / "benchmarks" / "results" / "study"
TABLE = re.compile(r"<!-- (\w+): ([^>]*) -->\n((?:\|.*\n)+)")
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


def filled(match: re.Match[str]) -> str:
    """The table with its rows made anew; its heading stays."""
    plan, items, table = match.groups()
    rows = statistics(plan)
    head = "".join(table.splitlines(keepends=True)[:2])
    variants = dict.fromkeys(variant for variant, _, _ in rows)
    body = [[variant, *(cell(rows, variant, item.strip()) for item in items.split(","))] for variant in variants]
    return f"<!-- {plan}: {items} -->\n{head}" + "".join(f"| {' | '.join(line)} |\n" for line in body)


if __name__ == "__main__":
    DOCUMENT.write_text(TABLE.sub(filled, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
