"""docs/study.md, number by number: statistics from the evaluations, tables from the statistics, prose from the tables."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from p3o_lightning.commands.frontier_plan import read_plan
from p3o_lightning.commands.frontier_points import Points, compute_statistics

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/study")]
import hh_parts  # noqa: E402
import study_figures  # noqa: E402
import study_tables  # noqa: E402

PLANS = sorted(path for path in (ROOT / "benchmarks/study").glob("*.yaml") if path.stem != "common")
RESULTS = sorted((ROOT / "benchmarks/results/study").iterdir())
TEXT = (ROOT / "docs/study.md").read_text(encoding="utf-8")
TABLE = re.compile(r"<!-- (\w+): ([^>]*) -->\n((?:\|.*\n)+)")
P_VALUES = {"p": "p_student", "holm": "p_holm", "flip": "p_sign_flip"}


def plan_of(name: str) -> str:
    """The plan that gave the results of this name, from the root."""
    return f"benchmarks/study/{name}.yaml"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The CSV's rows, numbers as numbers."""

    def value(name: str, text: str) -> Any:
        if name.endswith("run"):  # a name of hexadecimal digits, of which some could be read as a number
            return text
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(encoding="utf-8") as file:
        return [{name: value(name, text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_is_whole(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(str(path))
    assert plan.variants and plan.evaluate.gold and plan.kl_range == 2
    assert not set(plan.seeds) & {100, 101} or path.stem == "tuning"
    assert len(plan.seeds) >= (3 if path.stem == "smollm2_gold" else 5) or path.stem == "tuning"


def test_every_plan_is_made_by_make():
    recipe = (ROOT / "Makefile").read_text()
    named = re.search(r"^STUDY := (.*)$", recipe, re.M)
    assert named and set(named.group(1).split()) == {path.stem for path in PLANS} - {"tuning", "smollm2_gold"}
    assert "frontier benchmarks/study/smollm2_gold.yaml" in recipe


def test_tuning_spends_as_much_on_ppo_as_on_p3o(monkeypatch):
    monkeypatch.chdir(ROOT)
    counts: dict[Any, int] = {}
    for variant in read_plan("benchmarks/study/tuning.yaml").variants:
        counts[variant.series] = counts.get(variant.series, 0) + 1
    assert counts["PPO"] == counts["P3O V1"] == counts["P3O V2"] >= counts["RLOO"] == counts["GRPO"] == counts["online DPO"]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_statistics_are_those_of_the_evaluations(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(plan_of(folder.name))
    wins = rows_of(folder / "wins.csv")
    points = Points(rows_of(folder / "rows.csv"), plan)
    again = {(item.variant, item.quantity, item.against): item for item in compute_statistics(plan, points, wins)}
    found = {(row["variant"], row["quantity"], row.get("against", "")): row for row in rows_of(folder / "statistics.csv")}
    assert again.keys() == found.keys()
    for key, item in again.items():
        for name in ("mean", "low", "high", "p_student", "p_holm", "p_sign_flip", "seeds"):
            assert getattr(item, name) == pytest.approx(found[key].get(name, math.nan), rel=1e-5, abs=1e-9, nan_ok=True), (key, name)


Evaluation = dict[str, Any]


def best_mixture(points: list[Evaluation], budget: float) -> list[tuple[float, Evaluation]]:
    """The two evaluations, and their weights, whose mixture has the greatest learned reward for a KL of `budget`, by trying all of them."""
    best: tuple[float, list[tuple[float, Evaluation]]] = (-math.inf, [])
    for one, other in itertools.combinations_with_replacement(sorted(points, key=lambda point: max(point["kl"], 0.0)), 2):
        low, high = max(one["kl"], 0.0), max(other["kl"], 0.0)
        shares = [share for share in (0.0, 1.0, *([(budget - low) / (high - low)] if high > low else [])) if 0 <= share <= 1]
        for share in shares:
            reward = (1 - share) * one["learned"] + share * other["learned"]
            if (1 - share) * low + share * high <= budget + 1e-12 and reward > best[0] + 1e-12:
                best = reward, [(1 - share, one), (share, other)]
    return [(weight, point) for weight, point in best[1] if weight > 1e-12]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_wins_over_the_baseline_are_those_of_the_two_best_mixtures(folder, monkeypatch):
    """Without the project's own code: every mixture of two evaluations is tried, and the two that are best meet, part by part."""
    monkeypatch.chdir(ROOT)
    plan, by_seed = read_plan(plan_of(folder.name)), dict[Any, list[Evaluation]]()
    for row in rows_of(folder / "rows.csv"):
        by_seed.setdefault((row["variant"], row["seed"]), []).append(row)
    met = {
        (row["run"], row["updates"], row["against_run"], row["against_updates"]): (row["wins_gold"], row["ties_gold"], row["losses_gold"])
        for row in rows_of(folder / "wins.csv")
    }
    told = [row for row in rows_of(folder / "statistics.csv") if row["quantity"].startswith("wins_gold@")]
    assert len(told) == len(plan.budgets or (0.5, 1, 2)) * sum(variant.name != plan.baseline_of(variant.name) for variant in plan.variants)
    for row in told:
        shares, budget = [], float(row["quantity"].partition("@")[2])
        for seed in plan.seeds:
            ours, theirs = (best_mixture(by_seed[name, seed], budget) for name in (row["variant"], row["against"]))
            share = 0.0
            for (a, one), (b, other) in itertools.product(ours, theirs):
                wins, ties, losses = met[one["run"], one["updates"], other["run"], other["updates"]]
                share += a * b * (2 * wins + ties) / 2 / (wins + ties + losses)
            shares.append(share)
        assert row["mean"] == pytest.approx(sum(shares) / len(shares), abs=2e-6), row


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_wins_over_a_start_are_those_that_the_evaluation_itself_has(folder):
    """Runs of a seed that start from the same draws have these win rates in rows.csv already, from another count."""
    rows = rows_of(folder / "rows.csv")
    rates = {(row["run"], row["updates"]): row["win_rate_gold"] for row in rows}
    starts = {row["run"]: (row["learned"], row["gold"], row["length"]) for row in rows if row["updates"] == 0}
    seen = 0
    for row in rows_of(folder / "wins.csv"):
        comparisons = row["wins_gold"] + row["ties_gold"] + row["losses_gold"]
        assert comparisons == (24 if folder.name == "smollm2_gold" else 64) * 4 * 4  # prompts x each response with each
        share = (row["wins_gold"] + row["ties_gold"] / 2) / comparisons
        if starts[row["run"]] != starts[row["against_run"]]:
            continue  # other batches of prompts, so other draws
        if row["against_updates"] == 0:
            assert share == pytest.approx(rates[row["run"], row["updates"]], abs=1e-6)
        elif row["updates"] == 0:
            assert share == pytest.approx(1 - rates[row["against_run"], row["against_updates"]], abs=1e-6)
        seen += row["against_updates"] == 0 or row["updates"] == 0
    # responses: baselines differ in their batches from all that is compared with them; smollm2_gold: no mixture has a start
    assert seen or folder.name in ("responses", "smollm2_gold")


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_no_run_is_missing_diverged_or_ended_early(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, rows = read_plan(plan_of(folder.name)), rows_of(folder / "rows.csv")
    reached: dict[tuple[Any, ...], float] = {}
    for row in rows:
        place = (row["variant"], row["seed"], *(row[name] for name in plan.variants[0].grid))
        reached[place] = max(reached.get(place, 0.0), row["responses"])
        assert "left_out" not in row and all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    cells = {(cell.variant, cell.job.seed, *cell.choice.values()) for cell in plan.cells(Path("out"))}
    assert reached == dict.fromkeys(cells, 320.0 if folder.name == "smollm2_gold" else 2048.0)  # responses drawn by the end
    assert "No run failed or ended early" in TEXT


def cells() -> list[tuple[str, str, str, str]]:
    """(plan, variant, item, text) of every cell of every table."""
    found = []
    for plan, items, table in TABLE.findall(TEXT):
        wanted = [item.strip() for item in items.split(",")]
        for line in table.splitlines()[2:]:
            variant, *texts = [text.strip() for text in line.strip("|").split("|")]
            assert len(texts) == len(wanted), line
            found += [(plan, variant, item, text) for item, text in zip(wanted, texts, strict=True)]
    return found


def test_every_cell_is_in_the_csv():
    assert len(cells()) > 100
    for plan, variant, item, text in cells():
        quantity, paired, kind = item.partition("~")
        rows = rows_of(ROOT / "benchmarks/results/study" / plan / "statistics.csv")
        (row,) = [
            row for row in rows if row["variant"] == variant and row["quantity"] == quantity and bool(row.get("against")) == bool(paired)
        ] or [None]
        if row is None:
            assert text == "" and paired, (plan, variant, item)
            continue
        numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]
        names = [P_VALUES[kind]] if kind else ["mean"] if quantity == "evaluations" else ["mean", "low", "high"]
        digits = 0.051 if quantity == "evaluations" else 5.1e-4
        assert numbers == pytest.approx([row[name] for name in names], abs=digits), (plan, variant, item, text)


def test_every_table_has_every_variant_of_its_plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    for plan, _, table in TABLE.findall(TEXT):
        named = [line.strip("|").split("|")[0].strip() for line in table.splitlines()[2:]]
        assert named == [variant.name for variant in read_plan(plan_of(plan)).variants]


SETTINGS = {"0.02", "0.05", "0.1", "0.2", "0.5"}  # that a plan varies, which the prose names


@pytest.mark.parametrize("section", re.split(r"^### ", TEXT.partition("## What was seen")[2], flags=re.M)[1:], ids=lambda text: text[:3])
def test_numbers_in_the_text_stand_in_a_table_beside_it(section):
    """Every number with a decimal point that is told as a result is one of the section's own tables, to the digits that it is told with."""
    section = section.partition("\n## ")[0]
    tables = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    known = {number.lstrip("+-") for number in re.findall(r"[-+]?\d+\.\d+", tables)}
    prose = re.sub(r"`[^`]*`", "", "\n".join(line for line in section.splitlines() if not line.startswith(("|", "<!--", "!["))))
    assert known
    for number in re.findall(r"(?<![\w.])\d+\.\d+", prose):
        digits = len(number.partition(".")[2])
        assert number in SETTINGS or any(f"{float(value):.{digits}f}" == number for value in known), number


def test_the_runs_that_are_told_are_those_that_were_made():
    """Equal runs of several plans are one."""
    made = set()
    for folder in RESULTS:
        if folder.name not in ("smollm2_gold", "tuning", "scaling"):  # the last were made anew, on a later day
            with (folder / "rows.csv").open(encoding="utf-8") as file:
                made |= {row["run"] for row in csv.DictReader(file)}
    assert f"{len(made)} runs" in TEXT
    for name, told in (("tuning", "54 for tuning"), ("scaling", "75 runs of a later day")):
        runs = {row["run"] for row in rows_of(ROOT / f"benchmarks/results/study/{name}/rows.csv")}
        assert told.startswith(f"{len(runs)} ") and told in TEXT


def test_both_runs_stand_beside_each_other():
    """Row by row from the two CSVs, found again by what the row says of them."""
    table = re.search(r"<!-- both runs -->\n(?:\|.*\n){2}((?:\|.*\n)+)", TEXT)
    assert table and len(study_tables.BOTH) == table.group(1).count("\n")
    for line, (plan, variant, former, title) in zip(table.group(1).splitlines(), study_tables.BOTH, strict=True):
        named, *told = [text.strip() for text in line.strip("|").split("|")]
        assert named == title
        first = ROOT / "benchmarks/results/study_first" / ("clipping.csv" if plan == "weights" else f"{plan}.csv")
        for text, path, name in zip(
            told, (first, ROOT / f"benchmarks/results/study/{plan}/statistics.csv"), (former or variant, variant), strict=True
        ):
            (row,) = [row for row in rows_of(path) if (row["variant"], row["quantity"]) == (name, "area_learned") and row.get("against")]
            numbers = [float(number) for number in re.findall(r"[-+]\d+\.\d+", text)]
            assert numbers == pytest.approx([row["mean"], row["low"], row["high"]], abs=5.1e-4), line


def table_of(name: str) -> list[list[str]]:
    """The cells of a table that is no plan's, row by row."""
    table = re.search(rf"<!-- {name} -->\n(?:\|.*\n){{2}}((?:\|.*\n)+)", TEXT)
    assert table, name
    return [[text.strip() for text in line.strip("|").split("|")] for line in table.group(1).splitlines()]


def test_what_each_seed_gave_on_the_real_model():
    """Without the project's own code: heights of the best of all mixtures, and their mean over a fine grid of budgets."""
    by_seed = dict[Any, list[Evaluation]]()
    for row in rows_of(ROOT / "benchmarks/results/study/smollm2_gold/rows.csv"):
        by_seed.setdefault((row["variant"], row["seed"]), []).append(row)
    rows = table_of("seed by seed")
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for seed, *told in rows:
        expected = []
        for variant in ("P3O V2", "PPO"):
            points = by_seed[variant, float(seed)]
            (start,) = {point["learned"] for point in points if point["updates"] == 0}
            gains = [sum(share * point["learned"] for share, point in best_mixture(points, 2 * step / 200)) - start for step in range(201)]
            expected += [(sum(gains) - (gains[0] + gains[-1]) / 2) / 200, gains[-1]]
        assert [float(text) for text in told] == pytest.approx(expected, abs=1.5e-3), seed
    assert all(float(row[3]) > float(row[1]) for row in rows) and "at every one of three seeds" in TEXT


def test_how_good_the_reward_models_of_the_real_model_are():
    learned, gold, rule = rows_of(ROOT / "benchmarks/results/study/smollm2_gold/reward_models.csv")
    told = [f"{100 * row['value']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" for row in (learned, gold)]
    assert f"{told[0]} and {told[1]}, the rule {100 * rule['value']:.0f} %" in TEXT


def test_where_the_runs_on_the_real_model_ended():
    runs = dict[str, list[Evaluation]]()
    for row in rows_of(ROOT / "benchmarks/results/study/smollm2_gold/rows.csv"):
        runs.setdefault(row["run"], []).append(row)
    told = {(variant, float(lr), float(seed)): [float(text) for text in rest] for variant, lr, seed, *rest in table_of("ends")}
    assert len(told) == len(runs) == 12
    lengths: dict[float, list[float]] = {1e-4: [], 4e-4: []}
    for rows in runs.values():
        first, last = (pick(rows, key=lambda row: row["updates"]) for pick in (min, max))
        key = (last["variant"], last["model.lr"], last["seed"])
        expected = [last["kl"], last["learned"] - first["learned"], last["gold"] - first["gold"], last["length"], last["distinct_2"]]
        units = (0.1, 0.01, 0.01, 0.1, 0.01)
        assert told[key] == [pytest.approx(value, abs=unit / 2 + 1e-6) for value, unit in zip(expected, units, strict=True)]
        assert 20 < first["length"] < 21.5 and 0.875 < first["distinct_2"] < 0.925
        if key[::2] != ("P3O V2", 0):
            lengths[last["model.lr"]].append(last["length"])
    assert {lr: (round(min(found)), round(max(found))) for lr, found in lengths.items()} == {1e-4: (9, 19), 4e-4: (3, 8)}
    assert "9 to 19 at the smaller\nlearning rate and to 3 to 8 at the larger one" in TEXT
    assert f"up to {max(row[0] for row in told.values())} nats away" in TEXT


@pytest.mark.skipif("P3O_DATA" not in os.environ, reason="P3O_DATA is not set")
def test_the_parts_are_as_large_as_is_told(tmp_path):
    hh_parts.main(f"{os.environ['P3O_DATA']}/hh-rlhf/harmless-base-test.jsonl.gz", str(tmp_path))
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    counts = {name: len(found) for name, found in rows.items()}
    for number in (
        f"{sum(counts.values()):,} comparisons",
        f"{counts['reward']} for",
        f"{counts['gold']} for",
        f"{counts['held_out']} held out",
    ):
        assert number in TEXT


def test_the_figures_are_those_of_the_csvs(tmp_path, monkeypatch):
    """Pixel by pixel where the same matplotlib draws them; another one, as Python 3.10 has, sets the same page a little differently."""
    monkeypatch.chdir(ROOT)
    drawn = study_figures.draw(tmp_path)
    shown = set(re.findall(r"!\[[^\]]*\]\(figures/([\w-]+\.png)\)", TEXT))
    assert set(drawn) == shown == {path.name for path in (ROOT / "docs/figures").glob("*.png")}
    for name in drawn:
        one, other = (Image.open(folder / name) for folder in (tmp_path, ROOT / "docs/figures"))
        assert one.size == other.size, name
        if one.info["Software"] == other.info["Software"]:
            assert max(ImageStat.Stat(ImageChops.difference(one, other)).mean) < 0.25, name  # of 255


def test_the_parts_of_hh_rlhf_share_no_prompt(tmp_path):
    """One prompt has two comparisons, which stay together; every line is in one part."""
    asked = [f"\n\nHuman: q{row // 2}\n\nAssistant:" for row in range(60)]
    rows = [{"chosen": f"{prompt} yes", "rejected": f"{prompt} no"} for prompt in asked]
    rows.append({"chosen": "\n\nHuman: same\n\nAssistant: text", "rejected": "\n\nHuman: same\n\nAssistant: text"})
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({**row, "number": number}) + "\n" for number, row in enumerate(rows)))
    hh_parts.main(str(tmp_path / "rows.jsonl.gz"), str(tmp_path / "parts"))
    parts = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in (tmp_path / "parts").iterdir()}
    assert sorted(row["number"] for part in parts.values() for row in part) == list(range(61))
    prompts = {name: {row["chosen"].split("\n\nAssistant:")[0] for row in part} for name, part in parts.items()}
    assert not any(prompts[one] & prompts[two] for one, two in itertools.combinations(prompts, 2))
    assert {name: len(found) for name, found in prompts.items()} == {"reward": 12, "gold": 13, "held_out": 6}
