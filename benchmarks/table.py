"""`python benchmarks/table.py`: results/*.json as tables and plots, into README.md between its markers, and in short into the project's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import record
from cases import CASES, GPU, GROWTH, Case

README = Path(__file__).resolve().parent / "README.md"
FRONT = README.parent.parent / "README.md"
OTHERS = {  # results on other processors: folder -> what it is
    "epyc-zen5": "a Zen 5 EPYC",
    "epyc-zen4": "a Zen 4 EPYC",
    "epyc-zen3": "a Zen 3 EPYC, without AVX-512",
}
SIDES = {"ours": "p3o_lightning", "compiled": "compiled", "default": "TRL as it comes", "tuned": "TRL tuned"}
PHASES = ("generation", "scoring", "update")
GOALS: dict[str, dict[str, list[float]]] = {  # set before anything was built: ratios to reach, and then to aim at
    "15m-fixed-float32": {"default": [1.8, 2.3], "tuned": [1.5, 1.8]},
    "15m-fixed-bf16": {"default": [2.5, 3.8], "tuned": [2.2, 3.2]},
    "15m-uneven-float32": {"default": [2.6, 3.3], "tuned": [2.0, 2.5]},
    "15m-uneven-bf16": {"default": [2.8, 4.0], "tuned": [2.3, 3.0]},
    **{
        f"reward-15m-{lengths}-{dtype}": {"default": [1.3], "tuned": [1.0]}
        for lengths in ("fixed", "uneven")
        for dtype in ("float32", "bf16")
    },
    "smollm2-fixed-float32": {"default": [1.7, 2.0]},
    "smollm2-fixed-bf16": {"default": [2.3, 2.8]},
}
IN_SHORT = {  # what the project's README calls a pair of cases, of fixed and of uneven length
    "1m": "1 M parameters",
    "15m": "15 M parameters",
    "smollm2": "135 M parameters",
    "gpu-smollm2": "135 M parameters, on a GPU",
    "reward-15m": "reward model, 15 M parameters",
}
AXIS = {"responses": "responses a prompt", "length": "tokens of a response", "batch": "prompts of a rollout", "size": "parameters"}
Results = dict[str, dict[str, Any]]
Elsewhere = dict[str, Results]  # by the name of the folder


def read(results: Path = record.RESULTS) -> Results:
    """By the name of the file."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}


def read_others() -> Elsewhere:
    """Those of the other processors."""
    return {folder: read(record.RESULTS / folder) for folder in OTHERS}


def lines_of(rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first row is its head."""
    return ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]


def spread(summary: dict[str, Any]) -> str:
    """Median, and least to greatest."""
    digits = 2 if summary["median"] < 20 else 1
    return f"{summary['median']:.{digits}f} ({summary['min']:.{digits}f}–{summary['max']:.{digits}f})"


def in_order(results: Results, gpu: bool = False) -> dict[str, dict[str, Any]]:
    """Those of cases against TRL, as the table of cases has them, one thread before several."""
    places = {name: place for place, name in enumerate(GPU if gpu else CASES)}
    against = {name: result for name, result in results.items() if "ratios" in result and result["case"].get("gpu", False) == gpu}
    return dict(sorted(against.items(), key=lambda item: (places.get(item[1]["name"], len(places)), item[1]["threads"])))


# ---- against TRL


def comparison(results: Results, gpu: bool = False) -> list[str]:
    """Seconds of an iteration, ratios, tokens a second, peak memory."""
    head = ["case", *SIDES.values(), "ratio to TRL as it comes", "ratio to TRL tuned", "tokens", "tokens/s", "peak MiB", "rounds", "commit"]
    rows = [head]
    for name, result in in_order(results, gpu).items():
        summaries = {side: result["sides"][side]["summary"] for side in SIDES if side in result["sides"]}
        rows.append(
            [
                f"{name} (wall)" if result["threads"] > 1 and not gpu else name,
                *(spread(summaries[side]) if side in summaries else "" for side in SIDES),
                *(ratio(result, side) for side in ("default", "tuned")),
                " / ".join(f"{result['work']['tokens'][side]:.0f}" for side in summaries),
                " / ".join(f"{summary['tokens_per_second']:.0f}" for summary in summaries.values()),
                " / ".join(f"{summary['peak_mib']:.0f}" for summary in summaries.values()),
                str(result["rounds"]),
                result["commit"],
            ]
        )
    return lines_of(rows) if len(rows) > 1 else ["Nothing yet."]


def ratio(result: dict[str, Any], side: str) -> str:
    """Of ours, and of ours compiled."""
    compiled = result.get("ratios_compiled")
    return f"**{result['ratios'][side]:.2f}**" + (f", {compiled[side]:.2f} compiled" if compiled else "")


def goals(results: Results) -> list[str]:
    """Which of the goals are reached, by ours as it comes and compiled."""
    rows = [["case", "against", "to reach", "to aim at", "p3o_lightning", "compiled"]]
    for name, of_case in GOALS.items():
        if name not in results:
            continue
        for side, wanted in of_case.items():
            found = [results[name]["ratios"][side], results[name].get("ratios_compiled", {}).get(side)]
            told = [
                ""
                if ratio is None
                else f"{ratio:.2f}" + (", aim" if ratio >= wanted[-1] and len(wanted) > 1 else ", not reached" * (ratio < wanted[0]))
                for ratio in found
            ]
            rows.append([name, SIDES[side], f"{wanted[0]:.1f}", f"{wanted[1]:.1f}" if len(wanted) > 1 else "", *told])
    return lines_of(rows) if len(rows) > 1 else ["Nothing yet."]


def in_short(results: Results, others: Elsewhere) -> list[str]:
    """Ratios alone, of one epoch and one thread: fixed / uneven lengths."""
    rows = [["", *(f"against {SIDES[side]}" for side in ("default", "tuned"))]]
    for of, where in ((results, ""), *((other, f", on {OTHERS[folder]}") for folder, other in others.items())):
        for start, title in IN_SHORT.items():
            for dtype in ("float32", "bf16"):
                pair = [of.get(f"{start}-{lengths}-{dtype}") for lengths in ("fixed", "uneven")]
                if any(pair):
                    told = [
                        [f"{result['ratios'][side]:.2f}" if result else "not measured" for result in pair] for side in ("default", "tuned")
                    ]
                    rows.append([f"{title}{where}, {dtype}", *map(" / ".join, told)])
    return lines_of(rows)


def phases(results: Results, gpu: bool = False) -> list[str]:
    """Where an iteration's time goes, median of each phase, and the micro-batch that TRL tuned chose."""
    rows = [["case", "side", *PHASES, "the rest", "micro-batch"]]
    for name, result in in_order(results, gpu).items():
        if result["case"]["kind"] != "policy":
            continue
        for side, title in SIDES.items():
            if side not in result["sides"]:
                continue
            about, spent = result["sides"][side], result["sides"][side]["summary"]["phases"]
            rest = sum(seconds for phase, seconds in spent.items() if phase not in PHASES)
            settings = about["about"]["settings"]
            rows_a_forward = settings.get("per_device_train_batch_size") or settings["micro_batch_size"] * result["case"]["responses"]
            rows.append([name, title, *(f"{spent.get(phase, 0.0):.2f}" for phase in PHASES), f"{rest:.2f}", f"{rows_a_forward} rows"])
    return lines_of(rows) if len(rows) > 1 else ["Nothing yet."]


def against_us(results: Results, others: Elsewhere | None = None) -> list[str]:
    """Cases where TRL is faster, or holds less memory, at its better setting of the two."""
    found = []
    there = {f"{name}, on {OTHERS[folder]}": result for folder, other in (others or {}).items() for name, result in in_order(other).items()}
    for name, result in (in_order(results) | in_order(results, gpu=True) | there).items():
        found += [f"* {name}: {SIDES[side]} is faster, {ratio:.2f}." for side, ratio in result["ratios"].items() if ratio < 1]
        ours, least = (result["sides"][side]["summary"]["peak_mib"] for side in ("ours", "tuned"))
        if ours > least:
            found.append(f"* {name}: ours holds {ours:.0f} MiB, TRL tuned {least:.0f} MiB.")
    return found or ["* No row of the tables is slower than TRL, or holds more memory than TRL tuned."]


def missing(
    results: Results, cases: dict[str, Case] = CASES, threads: tuple[int, ...] = (1, 2), others: Elsewhere | None = None
) -> list[str]:
    """The rows of the table that have no result, and those that have one on another processor alone."""
    there = {row for other in (others or {}).values() for row in other}
    rows = [record.path_of(name, count).stem for name in cases for count in threads]
    lacking = [row for row in rows if row not in results]
    elsewhere = [f"`{row}`" for row in lacking if row in there]
    nowhere = [f"`{row}`" for row in lacking if row not in there]
    told = ["Measured on another processor alone, below: " + ", ".join(elsewhere) + "."] if elsewhere else []
    told += ["Not measured: " + ", ".join(nowhere) + "."] if nowhere else []
    return told or ["Every row of the table is measured."]


# ---- growth


def size_of(what: str, case: Case) -> float:
    """Where a point stands on its axis."""
    if what == "size":
        import arithmetic

        return arithmetic.parameters(case.size)
    return {"responses": case.responses, "length": case.new_tokens, "batch": case.prompts}[what]


def exponent(xs: list[float], ys: list[float]) -> float:
    """Slope of log y over log x, by least squares: y grows as x to that power."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    return sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True)) / sum((x - mx) ** 2 for x in lx)


def points(what: str, results: Results) -> list[tuple[float, dict[str, Any]]]:
    """(place on the axis, result) of the points that were measured."""
    return [(size_of(what, case), results[name]) for name, case in GROWTH[what].items() if name in results]


def growth(results: Results) -> list[str]:
    """A table a sweep: time beside operations, memory beside its formula, and how each grows."""
    lines: list[str] = []
    for what in GROWTH:
        measured = points(what, results)
        if not measured:
            continue
        rows = [[AXIS[what], "s (min–max)", "GFLOP", "GFLOP/s", "peak MiB", "MiB by arithmetic"]]
        for place, result in measured:
            summary, operations = result["sides"]["ours"]["summary"], sum(result["gigaflop"].values())
            rows.append(
                [
                    f"{place:,.0f}",
                    spread(summary),
                    f"{operations:.1f}",
                    f"{operations / summary['median']:.0f}",
                    f"{summary['peak_mib']:.0f}",
                    f"{result['memory_mib']:.0f}",
                ]
            )
        lines += [*lines_of(rows), ""]
        if len(measured) > 1:
            xs = [place for place, _ in measured]
            summaries = [result["sides"]["ours"]["summary"] for _, result in measured]
            time = exponent(xs, [summary["median"] for summary in summaries])
            operations = exponent(xs, [sum(result["gigaflop"].values()) for _, result in measured])
            lines += [f"Time grows with exponent {time:.2f}, operations with {operations:.2f}.", ""]
    return lines or ["Nothing yet."]


def overhead(results: Results) -> list[str]:
    """What is not computing: loading and logging in a step, and the start."""
    lines = []
    if "overhead" in results:
        summary = results["overhead"]["sides"]["ours"]["summary"]
        rest = sum(seconds for phase, seconds in summary["phases"].items() if phase not in PHASES)
        lines.append(
            f"* Loader, collation and logging (to TensorBoard, every update): {rest / summary['median']:.1%} of an iteration of "
            f"{summary['median']:.2f} s (15 M parameters, fixed length, float32)."
        )
    if "startup" in results:
        median = results["startup"]["median"]
        lines.append(
            f"* `p3o fit --config configs/debug/policy.yaml`: {median['rest']:.2f} s of CPU before the first rollout, "
            f"beside {median['imports']:.2f} s of imports."
        )
    return lines or ["Nothing yet."]


# ---- plots


def draw(results: Results, folder: Path) -> None:
    """Pictures of what there is, as PNG and SVG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    plt.rcParams["svg.hashsalt"] = "p3o"  # the same picture gives the same file

    def save(name: str) -> None:
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            plt.savefig(folder / f"{name}.{kind}", bbox_inches="tight", dpi=120, metadata=metadata)
        plt.close()

    if against := in_order(results):
        _, axes = plt.subplots(figsize=(8, 1 + 0.4 * len(against)))
        for offset, side, colour in ((-0.2, "default", "#9db4c0"), (0.2, "tuned", "#253237")):
            places = [place + offset for place in range(len(against))]
            axes.barh(places, [result["ratios"][side] for result in against.values()], 0.38, label=SIDES[side], color=colour)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(against)), list(against))
        axes.invert_yaxis()
        axes.set_xlabel("TRL's seconds / ours, an iteration: to the right of 1 ours is faster")
        axes.legend()
        save("ratios")
    sweeps = {what: found for what in GROWTH if len(found := points(what, results)) > 1}
    if sweeps:
        _, grid = plt.subplots(2, len(sweeps), figsize=(3.4 * len(sweeps), 6), squeeze=False)
        for (what, measured), (time, memory) in zip(sweeps.items(), grid.T, strict=True):
            xs = [place for place, _ in measured]
            seconds = [result["sides"]["ours"]["summary"]["median"] for _, result in measured]
            operations = [sum(result["gigaflop"].values()) for _, result in measured]
            time.loglog(xs, seconds, "o-", color="#253237", label="seconds")
            time.loglog(xs, [seconds[0] * item / operations[0] for item in operations], "--", color="#9db4c0", label="by operations")
            memory.loglog(
                xs, [result["sides"]["ours"]["summary"]["peak_mib"] for _, result in measured], "o-", color="#253237", label="peak MiB"
            )
            memory.loglog(xs, [result["memory_mib"] for _, result in measured], "--", color="#9db4c0", label="by arithmetic")
            memory.set_xlabel(AXIS[what])
            for axes in (time, memory):
                axes.set_xticks(xs, [f"{place:g}" if place < 1e4 else f"{place / 1e6:.0f}M" for place in xs], fontsize=8)
                axes.minorticks_off()
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
        for axes in grid[:, 0]:
            axes.legend()
        plt.tight_layout()
        save("growth")


def picture(name: str) -> list[str]:
    """Markdown that shows it, if it is there."""
    return ["", f"![{name}](results/{name}.png)"] if (record.RESULTS / f"{name}.png").exists() else []


# ---- the README


def share_of_a_core(result: dict[str, Any]) -> float:
    """CPU by wall over all rounds: 1 on a machine that did nothing else."""
    rounds = [row for side in result["sides"].values() for row in side["rounds"]]
    return sum(row["cpu"] for row in rounds) / sum(row["wall"] for row in rounds)


def quiet(results: Results) -> list[str]:
    """How busy the machine was with other work, which takes cache and memory bandwidth from whoever is measured."""
    shares = [share_of_a_core(result) for result in in_order(results).values() if result["threads"] == 1]
    if not shares:
        return []
    return [f"* While these were measured a side that computed had {min(shares):.0%} to {max(shares):.0%} of its core."]


def machines(results: Results) -> list[str]:
    """On what, and with which versions, these figures were measured."""
    told = set()
    for result in results.values():
        about = result["machine"]
        versions: dict[str, str] = {}
        for side in result.get("sides", {}).values():
            versions |= side["about"]["versions"]
        listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        if listed:
            gpu = f"{about['gpu']}, one; " if "gpu" in about else ""
            host = f"{about['processor']} ({', '.join(about['instructions'])}), {about['cores']} cores, {about['memory_gib']} GiB"
            told.add(f"* {gpu}{host}; {listed}.")
    return sorted(told)


def on_another(other: Results) -> list[str]:
    """All that is told of another processor."""
    set_before = [*goals(other), ""] if GOALS.keys() & other.keys() else []
    return [*comparison(other), "", *machines(other), *quiet(other), "", *set_before, *phases(other)]


def sections(results: Results, others: Elsewhere) -> dict[str, list[str]]:
    """Marker -> what stands there, of these results and of those on other processors."""
    on_gpu = in_order(results, gpu=True)
    results = {name: result for name, result in results.items() if name not in on_gpu}
    return {
        "comparison": [
            *comparison(results),
            "",
            *missing(results, others=others),
            "",
            *machines(results),
            *quiet(results),
            *picture("ratios"),
        ],
        **{folder: on_another(other) for folder, other in others.items()},
        "gpu": [
            *comparison(on_gpu, gpu=True),
            "",
            *missing(on_gpu, GPU, threads=(1,)),
            "",
            *machines(on_gpu),
            "",
            *phases(on_gpu, gpu=True),
        ],
        "goals": goals(results),
        "phases": phases(results),
        "against us": against_us(results | on_gpu, others),
        "growth": [*growth(results), *picture("growth")],
        "overhead": overhead(results),
    }


def fill(text: str, parts: dict[str, list[str]]) -> str:
    """The text with each part between `<!-- name -->` and `<!-- end of name -->`."""
    for name, lines in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"README.md has no place for {name!r}: put {begin} and {end} there.")
        content = f"{begin}\n" + "\n".join(lines).strip() + f"\n{end}"
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, new=content: new, text, flags=re.S)
    return text


def main() -> None:
    results, others = read(), read_others()
    draw(results, record.RESULTS)
    README.write_text(fill(README.read_text(), sections(results, others)))
    FRONT.write_text(fill(FRONT.read_text(), {"speed": in_short(results, others)}))
    print(f"{README}: {len(in_order(results))} cases against TRL, {len(results)} results in all")


if __name__ == "__main__":
    main()
