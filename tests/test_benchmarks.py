"""The benchmark suite's own logic: equal work, turns, phases, resuming, arithmetic, tables. TRL is not needed."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import arithmetic  # noqa: E402
import equal  # noqa: E402
import gate  # noqa: E402
import record  # noqa: E402
import run  # noqa: E402
import sides  # noqa: E402
import table  # noqa: E402
import work  # noqa: E402
from cases import CASES, GROWTH, SHAPES, Case, select  # noqa: E402

SMALL = Case(size="1m", prompts=2, new_tokens=4, prompt_tokens=3)


# ---- equal work


def done(case: Case, **changed: int) -> dict[str, int]:
    """What a side reports after an iteration of the case; `changed` counts are off."""
    work = {"tokens": round(equal.length_law(case.new_tokens)[0] * case.rows), **equal.expected(case)}
    return work | changed


def test_an_iteration_of_a_policy_is_counted_out():
    case = Case(epochs=4)
    assert equal.expected(case) == {
        "rows": 32,
        "reference_rows": 32,
        "reward_rows": 32,
        "trained_rows": 128,
        "steps": 4,
        "prompt_tokens": 1024,
        "tokens": 2048,
    }


@pytest.mark.parametrize("name", sorted(equal.expected(Case())))
def test_a_side_that_did_other_work_is_refused_by_name_and_count(name):
    case = Case()
    right, wrong = done(case), done(case, **{name: done(case)[name] + 1})
    equal.check(case, {"ours": [right, right], "default": [right, right]})
    with pytest.raises(equal.UnequalWork, match=rf"default, round 2: {name} is {wrong[name]}, but the case has {right[name]}"):
        equal.check(case, {"ours": [right, right], "default": [right, wrong]})


def test_a_side_that_does_not_count_is_refused():
    work = done(Case())
    del work["reference_rows"]
    with pytest.raises(equal.UnequalWork, match="reference_rows is None"):
        equal.check(Case(), {"ours": [work]})


def test_uneven_lengths_may_differ_by_chance_alone():
    case = Case(lengths="uneven")
    mean, deviation = equal.length_law(64)
    stay = 31 / 32
    assert mean == pytest.approx((1 - stay**64) * 32)  # the sum of P(length >= n)
    likely, unlikely = (round(32 * mean + k * deviation * 32**0.5) for k in (3, 5))
    equal.check(case, {"ours": [done(case, tokens=likely)]})
    with pytest.raises(equal.UnequalWork, match="ours: responses have"):
        equal.check(case, {"ours": [done(case, tokens=unlikely)]})


def test_a_pass_over_pairs_has_the_same_tokens_on_every_side():
    case = replace(CASES["reward-15m-uneven-float32"], prompts=2)
    equal.check(case, {"ours": [done(case, tokens=500)], "default": [done(case, tokens=500)]})
    with pytest.raises(equal.UnequalWork, match="tokens of a pass"):
        equal.check(case, {"ours": [done(case, tokens=500)], "default": [done(case, tokens=501)]})


# ---- the work


@pytest.mark.parametrize("size", ["1m", "deep"])
@pytest.mark.parametrize("lengths", ["fixed", "uneven"])
def test_how_long_responses_are(tmp_path, monkeypatch, lengths, size):
    """Of few layers, and of SmolLM2's thirty with the head tied to the embeddings."""
    monkeypatch.setitem(SHAPES, "deep", SHAPES["smollm2"] | {"vocab_size": 1024, "intermediate_size": 64})
    case = replace(SMALL, size=size, lengths=lengths, prompt_tokens=32)
    work.write(tmp_path, case)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    ids = tokenizer(prompts, return_tensors="pt").input_ids
    assert len(prompts) == work.ROLLOUTS * case.prompts and ids.shape[1] == 32
    assert not torch.isin(ids, torch.arange(4)).any()  # no prompt has a special or an unknown token
    model = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        ends = model(input_ids=ids).logits.softmax(-1)[..., work.EOS]
    if lengths == "fixed":
        assert ends.max() < 1e-9
    else:
        assert ends.mean() == pytest.approx(1 / 32, rel=0.05) and ends.std() < 0.2 / 32


@pytest.mark.parametrize("lengths", ["fixed", "uneven"])
def test_pairs_have_the_tokens_they_should(tmp_path, lengths):
    case = replace(CASES[f"reward-15m-{lengths}-float32"], size="1m")
    work.write(tmp_path, case)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    replies = [
        len(tokenizer(row["prompt"] + row[side] + tokenizer.eos_token).input_ids) - 32 for row in rows for side in row if side != "prompt"
    ]
    assert {min(replies), max(replies)} == {224} if lengths == "fixed" else 16 <= min(replies) < 60 < 180 < max(replies) <= 224


@pytest.mark.parametrize(
    "case", [replace(SMALL, epochs=2, lengths="uneven"), replace(SMALL, kind="reward", updates=2)], ids=lambda case: case.kind
)
def test_our_side_does_the_work_of_the_case(tmp_path, case):
    work.write(tmp_path, case)
    side = sides.ours(case, tmp_path, threads=1)
    try:
        rows = [side.iterate() for _ in range(3)][1:]
    finally:
        side.stop()
    if case.kind == "policy":
        equal.check(replace(case, lengths="uneven"), {"ours": [row["work"] for row in rows]})
        assert all(row["phases"][phase] > 0 for row in rows for phase in ("generation", "scoring", "update", "logging"))
    else:
        equal.check(case, {"ours": [row["work"] for row in rows]})
    assert all(sum(row["phases"].values()) == pytest.approx(row["seconds"], abs=1e-3) for row in rows)
    assert side.about["settings"]["precision"] == "32-true" and side.about["idle_mib"] < rows[0]["peak_mib"]


# ---- measuring


def test_time_in_nested_phases_counts_for_the_inner_one(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(gate.time, "process_time", lambda: now[0])
    monkeypatch.setattr(gate.sys, "stdin", Lines("go\n"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    side = gate.Gate([], 0.0, {})
    with side.within("update"):  # before the iteration: counts for nothing
        now[0] = 100
    side.did(rows=100)
    side.wait()
    now[0] += 1
    side.enter("update")
    now[0] += 2
    with side.within("logging"):
        now[0] += 4
    now[0] += 8
    side.leave()
    side.did(rows=3)
    side.did(rows=4)
    side.report()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["iteration"]
    assert row["phases"] == {"other": 1, "update": 10, "logging": 4} and row["seconds"] == 15 and row["work"] == {"rows": 7}


class Lines:
    """A standard input of these lines."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def readline(self) -> str:
        return self.lines.pop(0) if self.lines else ""


class Recorded:
    """A side that writes down when it is asked."""

    def __init__(self, name: str, log: list[str], seconds: float = 1.0) -> None:
        self.name, self.log, self.seconds, self.running, self.warm = name, log, seconds, False, False

    def start(self) -> None:
        self.log.append(f"{self.name}+")
        self.running = True

    def iterate(self) -> dict[str, float]:
        self.log.append(self.name if self.warm else f"{self.name}*")
        self.running = self.warm = True
        return {"seconds": self.seconds, "work": {"rows": 1}}

    def stop(self) -> None:
        self.running = self.warm = False


def test_sides_take_turns_after_a_warm_up():
    log: list[str] = []
    rows = run.take_turns({name: Recorded(name, log) for name in "abc"}, 3, True, lambda _: None)
    assert "".join(log) == "a+b+c+" + "a*b*c*" + "abc" * 3, "they load side by side"
    assert {name: len(each) for name, each in rows.items()} == dict.fromkeys("abc", 3)


def test_sides_that_do_not_fit_together_are_started_anew():
    log: list[str] = []
    rows = run.take_turns({name: Recorded(name, log) for name in "ab"}, 4, False, lambda _: None)
    assert "".join(log) == "a*aab*bb" * 2 and len(rows["a"]) == len(rows["b"]) == 4


def test_unequal_work_is_found_at_the_first_turn():
    log: list[str] = []
    with pytest.raises(equal.UnequalWork, match="a, round 1"):
        run.take_turns({name: Recorded(name, log) for name in "ab"}, 4, False, partial(equal.check, Case()))
    assert "".join(log) == "a*aa", "before another side has its turn"


def test_the_faster_micro_batch_goes_on():
    for resident in (True, False):
        candidates = {8: Recorded("8", [], 3.0), 32: Recorded("32", [], 2.0)}
        assert run.best(candidates, resident) == (32, {8: 3.0, 32: 2.0})
        assert candidates[32].running == resident and not candidates[8].running


def test_ratios_are_of_medians():
    def side(*seconds: float) -> dict[str, object]:
        rounds = [{"seconds": value, "phases": {"update": value / 2}, "work": {"tokens": 10}, "peak_mib": value} for value in seconds]
        return {"summary": record.summary(rounds)}

    measured = {"ours": side(1, 2, 9), "default": side(4, 5, 6), "tuned": side(1, 1, 1)}
    assert record.ratios(measured) == {"default": 2.5, "tuned": 0.5}
    assert record.ratios({**measured, "compiled": side(1, 1, 2)}, "compiled") == {"default": 5, "tuned": 1}
    assert measured["ours"]["summary"] == {
        "median": 2,
        "min": 1,
        "max": 9,
        "tokens_per_second": 30 / 12,
        "peak_mib": 9,
        "phases": {"update": 1},
    }


# ---- resuming


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_package(tmp_path):
    """Committing a result does not make the next one stale; changing the package does."""
    package = tmp_path / "p3o_lightning"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "code")
    before = record.code(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "result")
    assert record.code(tmp_path) == before and len(before) == 10
    (package / "a.py").write_text("2\n")
    assert record.code(tmp_path) == before + "+"
    git(tmp_path, "commit", "-qam", "more code")
    assert record.code(tmp_path) not in (before, before + "+")


def test_a_measured_case_is_skipped_until_something_changed(tmp_path, monkeypatch, capsys):
    measured: list[str] = []
    commit, processor, instructions = ["one"], ["abacus"], ["carry"]
    monkeypatch.setattr(record, "code", lambda: commit[0])
    monkeypatch.setattr(record, "machine", lambda gpu=False: {"processor": processor[0], "instructions": [*instructions], "cores": 1})

    def measure(case: Case, rounds: int, threads: int, folder: Path, alone: bool) -> dict[str, object]:
        measured.append(case.size)
        sides = {"ours": {"summary": {"median": 1.0}}}
        return {"case": case.to_json(), "rounds": rounds, "threads": threads, "sides": sides}

    def go(case: Case = SMALL, rounds: int = 5, threads: int = 1, minutes: float = 9.0) -> int:
        measured.clear()
        run.run({"a": case}, rounds, threads, minutes, tmp_path, measure)
        return len(measured)

    assert (go(), go(), go(rounds=3)) == (1, 0, 0)
    assert "measured at one on this machine already" in capsys.readouterr().out
    assert (go(rounds=6), go(rounds=6)) == (1, 0)
    assert (go(replace(SMALL, epochs=2)), go()) == (1, 1)  # another case of that name
    assert (go(threads=2), go(threads=2)) == (1, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-2threads.json", "a.json"]
    processor[0] = "slide rule"  # another's result is not this machine's
    assert (go(), go()) == (1, 0)
    instructions.append("borrow")  # two generations may have one name
    assert (go(), go()) == (1, 0)
    commit[0] = "two"
    assert (go(), go()) == (1, 0)
    commit[0] = "two+"  # code that is not committed: nobody knows whether it is the same
    assert (go(), go()) == (1, 1)
    assert go(minutes=-1) == 0
    assert "a: left out" in capsys.readouterr().out


def test_cases_are_chosen_by_what_their_name_holds():
    assert list(select(["^15m-.*-float32$"], CASES)) == ["15m-fixed-float32", "15m-uneven-float32"]
    assert select([], CASES) == CASES and not select(["nothing"], CASES)
    growing = [name for points in GROWTH.values() for name in points]
    assert len(growing) == len(set(growing)) and not set(growing) & CASES.keys()


# ---- arithmetic


def test_operations_are_those_that_torch_counts():
    """A forward of one response a prompt. Torch counts eager attention in full, where a causal one reads half."""
    case = replace(SMALL, responses=1, prompt_tokens=5, new_tokens=7)
    shape = SHAPES["1m"]
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 12, dtype=torch.long), logits_to_keep=7)
    half_of_attention = 4 * shape["hidden_size"] * shape["num_hidden_layers"] * 2 * 12 * 12 / 2
    update = arithmetic.gigaflop(case)["update"] * 1e9
    assert update / 3 == pytest.approx(counter.get_total_flops() - half_of_attention, rel=2e-5)  # some versions count the rotary angles


def test_responses_share_the_reading_of_their_prompt():
    one, two = (arithmetic.gigaflop(Case(responses=k, new_tokens=1, prompt_tokens=1000)) for k in (1, 2))
    assert two["scoring"] < 1.01 * one["scoring"]
    four = arithmetic.gigaflop(Case(epochs=4))
    assert four["update"] == 4 * arithmetic.gigaflop(Case())["update"] and four["scoring"] == arithmetic.gigaflop(Case())["scoring"]


def test_sizes_are_what_their_names_say():
    sizes = {name: arithmetic.parameters(name) for name in SHAPES}
    assert sizes["smollm2"] == 134_515_008  # the published model's
    assert {name: round(count / 1e6) for name, count in sizes.items()} == {"1m": 1, "5m": 5, "15m": 15, "55m": 55, "smollm2": 135}


# ---- tables


def result(
    name: str, ours: float, default: float, tuned: float, ours_mib: float = 1.0, tuned_mib: float = 2.0, compiled: float = 0.0
) -> dict[str, object]:
    def side(seconds: float, mib: float) -> dict[str, object]:
        settings = {"micro_batch_size": 4} if seconds in (ours, compiled) else {"per_device_train_batch_size": 8}
        summary = {"median": seconds, "min": seconds - 1, "max": seconds + 1, "tokens_per_second": 100 / seconds, "peak_mib": mib}
        phases = {"generation": seconds / 2, "scoring": seconds / 4, "update": seconds / 8, "other": seconds / 16, "logging": seconds / 16}
        about = {"settings": settings, "versions": {"torch": "9"}}
        return {"about": about, "summary": {**summary, "phases": phases}, "rounds": [{"cpu": seconds, "wall": 2 * seconds}]}

    measured = {"ours": side(ours, ours_mib), "default": side(default, 9.0), "tuned": side(tuned, tuned_mib)}
    machine = {"processor": "abacus", "instructions": [], "cores": 1, "memory_gib": 1}
    told = {
        "work": {"tokens": {"ours": 7, "default": 8, "tuned": 9}},
        "name": name,
        "commit": "c0ffee",
        "rounds": 5,
        "threads": 1,
        "machine": machine,
        "case": CASES[name].to_json(),
    }
    found = {**told, "sides": measured, "ratios": {"default": default / ours, "tuned": tuned / ours}}
    if compiled:
        measured["compiled"] = side(compiled, ours_mib)
        told["work"]["tokens"]["compiled"] = 7
        found["ratios_compiled"] = {"default": default / compiled, "tuned": tuned / compiled}
    return found


def test_the_table_says_what_the_files_say():
    results = {name: result(name, 4.0, 10.0, 6.0, compiled=3.0) for name in ("reward-15m-fixed-float32", "15m-fixed-float32")}
    results["1m-fixed-float32"] = result("1m-fixed-float32", 4.0, 10.0, 6.0)
    text = "\n".join(table.comparison(results))
    row = (
        "| 15m-fixed-float32 | 4.00 (3.00–5.00) | 3.00 (2.00–4.00) | 10.00 (9.00–11.00) | 6.00 (5.00–7.00) "
        "| **2.50**, 3.33 compiled | **1.50**, 2.00 compiled | 7 / 7 / 8 / 9 | 25 / 33 / 10 / 17 |"
    )
    assert "| 1m-fixed-float32 | 4.00 (3.00–5.00) |  | 10.00 (9.00–11.00) | 6.00 (5.00–7.00) | **2.50** | **1.50** |" in text
    assert row in text and text.index(row) < text.index("reward-15m")  # in the order of the cases
    lines = [line for line in table.phases(results) if "p3o_lightning" in line]  # a policy's alone
    assert len(lines) == 2 and "| 15m-fixed-float32 | compiled | 1.50 | 0.75 | 0.38 | 0.38 | 8 rows |" in table.phases(results)
    assert lines[0] == "| 15m-fixed-float32 | p3o_lightning | 2.00 | 1.00 | 0.50 | 0.50 | 8 rows |"
    (left,) = table.missing(results)
    assert "`15m-uneven-bf16`" in left and "`15m-fixed-float32`" not in left
    assert "`15m-fixed-float32-2threads`" in left
    every = {name + threads: {} for name in CASES for threads in ("", "-2threads")}
    assert table.missing(every) == ["Every row of the table is measured."]
    there = {name: every.pop(name) for name in ("1m-fixed-bf16", "1m-fixed-bf16-2threads")}
    del there["1m-fixed-bf16-2threads"]
    assert table.missing(every, others={"epyc-zen4": there}) == [
        "Measured on another processor alone, below: `1m-fixed-bf16`.",
        "Not measured: `1m-fixed-bf16-2threads`.",
    ]


def test_in_short_a_row_has_both_lengths():
    results = {name: result(name, 4.0, 10.0, 6.0) for name in ("15m-fixed-float32", "15m-uneven-float32")}
    results["15m-uneven-float32"]["ratios"] = {"default": 3.0, "tuned": 2.0}
    results["smollm2-fixed-bf16"] = result("smollm2-fixed-bf16", 4.0, 5.0, 4.0)
    there = {"15m-fixed-bf16": results["15m-uneven-float32"]}
    assert table.in_short(results, {"epyc-zen4": there})[2:] == [
        "| 15 M parameters, float32 | 2.50 / 3.00 | 1.50 / 2.00 |",
        "| 135 M parameters, bf16 | 1.25 / not measured | 1.00 / not measured |",
        "| 15 M parameters, on a Zen 4 EPYC, bf16 | 3.00 / not measured | 2.00 / not measured |",
    ]


def test_goals_are_said_to_be_reached_or_not():
    lines = table.goals({"15m-fixed-float32": result("15m-fixed-float32", 4.0, 10.0, 5.8, compiled=3.0)})
    assert lines[2:] == [
        "| 15m-fixed-float32 | TRL as it comes | 1.8 | 2.3 | 2.50, aim | 3.33, aim |",
        "| 15m-fixed-float32 | TRL tuned | 1.5 | 1.8 | 1.45, not reached | 1.93, aim |",
    ]
    (line,) = table.goals({"smollm2-fixed-bf16": result("smollm2-fixed-bf16", 4.0, 10.0, 5.8)})[2:]
    assert line == "| smollm2-fixed-bf16 | TRL as it comes | 2.3 | 2.8 | 2.50 |  |"
    assert table.goals({}) == ["Nothing yet."] and set(table.GOALS) <= set(CASES)


def test_how_busy_the_machine_was_is_told():
    (line,) = table.quiet({"a": result("15m-fixed-float32", 4.0, 10.0, 6.0)})
    assert "had 50% to 50% of its core" in line and table.quiet({}) == []


def test_what_is_against_us_is_told():
    name = "15m-fixed-float32"
    assert "No row" in table.against_us({name: result(name, 4.0, 10.0, 6.0)})[0]
    slower = table.against_us({name: result(name, 4.0, 10.0, 3.0, ours_mib=3.0)})
    assert slower == [f"* {name}: TRL tuned is faster, 0.75.", f"* {name}: ours holds 3 MiB, TRL tuned 2 MiB."]
    (elsewhere,) = table.against_us({}, {"epyc-zen4": {name: result(name, 4.0, 10.0, 3.0)}})
    assert elsewhere == f"* {name}, on a Zen 4 EPYC: TRL tuned is faster, 0.75."


def test_growth_is_a_slope_beside_that_of_the_operations():
    assert table.exponent([2, 4, 8], [6, 24, 96]) == pytest.approx(2)
    results = {}
    for name, case in GROWTH["responses"].items():
        summary = {"median": case.responses / 2, "min": 0, "max": 9, "peak_mib": 7}
        results[name] = {"sides": {"ours": {"summary": summary}}, "gigaflop": {"update": case.responses**2}, "memory_mib": 8}
    text = "\n".join(table.growth(results))
    assert "| 16 | 8.00 (0.00–9.00) | 256.0 | 32 | 7 | 8 |" in text
    assert "Time grows with exponent 1.00, operations with 2.00." in text


def test_parts_go_between_their_markers():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    once = table.fill(text, {"x": ["new \\1"]})
    assert once == "a\n<!-- x -->\nnew \\1\n<!-- end of x -->\nb\n" == table.fill(once, {"x": ["new \\1"]})
    with pytest.raises(SystemExit, match="no place for 'y'"):
        table.fill(text, {"y": []})


def test_the_document_holds_what_was_measured():
    """Figures in benchmarks/README.md and README.md come from the results that are there: `python benchmarks/table.py` writes them."""
    results, others = table.read(), table.read_others()
    text, front = table.README.read_text(), table.FRONT.read_text()
    assert table.fill(text, table.sections(results, others)) == text
    assert table.fill(front, {"speed": table.in_short(results, others)}) == front
