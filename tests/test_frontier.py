"""`p3o frontier`: a plan becomes runs, runs are measured along their path and resume, and the report says what the rows say."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import collate, equal, policy

from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.commands import frontier, frontier_figures, frontier_run
from p3o_lightning.commands.frontier_plan import Evaluate, RunJob, read_plan
from p3o_lightning.commands.frontier_points import Points, compute_statistics, head_to_head
from p3o_lightning.commands.frontier_report import markdown
from p3o_lightning.commands.worker_pool import run_jobs
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import completion_logps

SMALL: dict[str, Any] = {
    "config": "configs/debug/policy.yaml",
    "rollouts": 2,
    "settings": {"trainer.logger": False, "data.val_fraction": 0.2, "trainer.limit_val_batches": 0},
    "evaluate": {"times": 2, "prompts": 4, "responses": 2, "gold": "p3o_lightning.rewards.share_of_letter_e"},
    "variants": {"P3O": {}, "RLOO": {"settings": {"model.objective": "rloo"}}},
    "grid": {"model.kl_coef": [0.001, 0.1]},
    "seeds": [0, 1],
}


def plan_file(folder: Path, name: str = "plan.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.fixture
def here(p3o, monkeypatch):
    """Jobs run in the test's own process: the libraries are imported already."""

    def one_by_one(work, jobs, workers):
        for job in jobs:
            try:
                work(job)
                yield job, None
            except InputError as error:
                yield job, str(error)

    monkeypatch.setattr(frontier, "run_jobs", one_by_one)
    return p3o


# ---- the plan


def test_a_plan_unfolds_into_every_run_seed_by_seed(tmp_path):
    cells = read_plan(str(plan_file(tmp_path))).cells(tmp_path)
    assert [(cell.job.seed, cell.variant, cell.choice["model.kl_coef"]) for cell in cells] == [
        (seed, variant, coef) for seed, variant, coef in itertools.product([0, 1], ["P3O", "RLOO"], [0.001, 0.1])
    ]
    assert cells[2].job.settings["model.objective"] == "rloo" and cells[2].job.settings["trainer.logger"] is False
    assert len({cell.job.folder for cell in cells}) == 8


def test_equal_runs_of_two_plans_share_a_folder_and_others_do_not(tmp_path):
    one = read_plan(str(plan_file(tmp_path))).cells(tmp_path)
    other = {"same": {"settings": {"model.kl_coef": 0.1}, "grid": {}}, "longer": {"grid": {"model.lr": [0.1]}}}
    two = read_plan(str(plan_file(tmp_path, "two.yaml", variants=other))).cells(tmp_path)
    assert two[0].job.folder == one[1].job.folder  # the name of a variant does not count, nor where the value stands
    assert two[1].job.folder not in {cell.job.folder for cell in one}
    moved = read_plan(str(plan_file(tmp_path, "three.yaml", rollouts=3))).cells(tmp_path)
    assert not {cell.job.folder for cell in moved} & {cell.job.folder for cell in one}


def test_a_plan_takes_over_what_another_says(tmp_path):
    plan_file(tmp_path, "common.yaml")
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"from": "common.yaml", "settings": {"model.lr": 0.1}, "seeds": [7]}))
    plan = read_plan(str(more))
    assert plan.seeds == [7] and plan.name == "more" and len(plan.variants) == 2
    assert plan.settings == {**SMALL["settings"], "model.lr": 0.1}


def test_seed_and_task_are_filled_in(tmp_path):
    stages = {"sft": {"config": "configs/debug/sft.yaml", "settings": {"data.path": "{task}/data-{seed}.jsonl"}}}
    plan = read_plan(str(plan_file(tmp_path, settings={"model.model": "{task}/sft/export"}, stages=stages, seeds=[3])))
    task = plan.tasks(tmp_path)[3]
    assert task.stages[0].settings["data.path"] == f"{task.folder}/data-3.jsonl"
    assert plan.cells(tmp_path)[0].job.settings["model.model"] == f"{task.folder}/sft/export"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": {}}, "variant"),
        ({"variants": {}}, "variants"),
        ({"variants": {"a": {"setting": {}}}}, "variants.a.setting"),
        ({"grid": {"model.lr": 0.1}}, "grid.model.lr"),
        ({"seeds": ["x"]}, "seeds"),
        ({"rollouts": 0}, "rollouts"),
        ({"evaluate": {"time": 2}}, "evaluate.time"),
        ({"evaluate": {"times": 0}}, "evaluate.times"),
        ({"baseline": "SFT"}, "baseline"),
        ({"show": ["SFT"]}, "show"),
        ({"kl_range": -1}, "kl_range"),
        ({"budgets": 3}, "budgets"),
        ({"config": None}, "config"),
        ({"stages": {"sft": {}}}, "stages.sft.config"),
    ],
)
def test_a_plan_of_no_use_is_refused_by_key(p3o, change, said):
    error = p3o("frontier", plan_file(p3o.folder, **change)).error
    assert said in error and "plan.yaml" in error


@pytest.mark.parametrize(
    ("arguments", "said"), [(["none.yaml"], "none.yaml"), (["--workers", "0"], "--workers"), (["--out", __file__], "--out"), ([], "PLAN")]
)
def test_bad_arguments_take_one_line(p3o, arguments, said):
    path = plan_file(p3o.folder)
    assert said in p3o("frontier", *([path] if arguments and arguments[0].startswith("--") else []), *arguments).error


# ---- a run


def job(folder: Path, **changes: Any) -> RunJob:
    evaluate = Evaluate(**{**SMALL["evaluate"], **changes.pop("evaluate", {})})
    settings = {**SMALL["settings"], "checkpoint.every_n_steps": 1, **changes.pop("settings", {})}
    folder.mkdir(parents=True, exist_ok=True)
    return RunJob(str(folder), 0, ["configs/debug/policy.yaml"], settings, changes.pop("rollouts", 3), evaluate, "")


def lines_of(run: RunJob) -> list[dict[str, Any]]:
    return frontier_run.read_lines(Path(run.folder) / frontier_run.PATH)


def test_a_run_is_measured_from_its_start_to_its_end(p3o):
    run = job(p3o.folder / "run")
    assert frontier_run.train(run) == "finished"
    lines = lines_of(run)
    assert [line["updates"] for line in lines] == [0, 3, 12]  # 3 rollouts x 4 updates; a quarter of the way, and the end
    assert [line["responses"] for line in lines] == [0, 16, 48]  # 8 prompts x 2 responses a rollout
    start, end = lines[0], lines[-1]
    assert start["kl"] == 0 and start["win_rate_gold"] == 0.5
    assert end["kl"] > 0
    for line in lines:
        assert line["gold"] == line["learned"]  # one function serves as both here
        each = torch.tensor(line["learned_each"])
        assert each.shape == (4, 2) and line["learned"] == pytest.approx(each.mean().item(), abs=1e-4)
    assert not (p3o.folder / "run" / "export").exists()


def test_runs_of_a_seed_start_from_the_same_draws(p3o):
    runs = [job(p3o.folder / name, rollouts=1, settings=settings) for name, settings in (("a", {}), ("b", {"model.kl_coef": 0.5}))]
    for run in runs:
        frontier_run.train(run)
    (a, *_), (b, *_) = map(lines_of, runs)
    assert {**a, "kl_coef": 0} == {**b, "kl_coef": 0}


def test_measuring_changes_nothing_of_the_run(p3o):
    """However often it is measured, and on however many responses: the weights in the end are the same."""
    often = job(p3o.folder / "often", evaluate={"times": 4, "responses": 3})
    seldom = job(p3o.folder / "seldom", evaluate={"times": 1, "responses": 2})
    for run in (often, seldom):
        frontier_run.train(run)
    assert len(lines_of(often)) == 5 and len(lines_of(seldom)) == 2
    ends = [torch.load(Path(run.folder) / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (often, seldom)]
    assert equal(*ends)


def test_the_shift_of_a_second_source_and_the_weight_of_the_first_are_not_in_what_is_measured(p3o):
    plain = job(p3o.folder / "plain", rollouts=1)
    sources = ["p3o_lightning.rewards.share_of_letter_e", "p3o_lightning.commands.demo_task.prompt_shift"]
    shifted = job(p3o.folder / "shifted", rollouts=1, settings={"model.reward_funcs": sources, "model.reward_weights": [10.0, 3.0]})
    for run in (plain, shifted):
        frontier_run.train(run)
    assert lines_of(plain)[0] == lines_of(shifted)[0]


def test_of_an_ensemble_the_whole_is_measured_and_not_its_first_member(p3o, monkeypatch):
    """What was optimised: here the mean of a length and three times it."""
    (p3o.folder / "lengths.py").write_text(
        "def once(completion_ids, **_):\n    return [float(len(ids)) for ids in completion_ids]\n\n\n"
        "def thrice(completion_ids, **_):\n    return [3.0 * len(ids) for ids in completion_ids]\n"
    )
    monkeypatch.syspath_prepend(str(p3o.folder))
    ensemble = "{class_path: Ensemble, init_args: {members: [lengths.once, lengths.thrice]}}"
    run = job(p3o.folder / "run", rollouts=1, settings={"model.reward_funcs": ensemble}, evaluate={"gold": "lengths.once"})
    frontier_run.train(run)
    for line in lines_of(run):
        assert line["learned"] == pytest.approx(2 * line["gold"]) and line["gold"] > 0


def test_a_judge_alone_has_no_scores_to_measure(p3o, monkeypatch):
    monkeypatch.syspath_prepend(str(p3o.folder))
    (p3o.folder / "even.py").write_text(
        "from p3o_lightning.judges import FunctionJudge\n\n\n"
        "@FunctionJudge\ndef judge(first, second, **_):\n    return [0.5] * len(first)\n"
    )
    with pytest.raises(InputError, match=r"model.reward_funcs begins with a judge, .* put a reward first"):
        frontier_run.train(job(p3o.folder / "run", rollouts=1, settings={"model.reward_funcs": "even.judge"}))


def test_an_interrupted_run_goes_on_where_it_stopped(p3o, monkeypatch):
    whole, broken = job(p3o.folder / "whole"), job(p3o.folder / "broken")
    frontier_run.train(whole)

    class Stop(Exception):
        pass

    save = LastCheckpoint.save

    def save_then_stop(self, trainer):
        save(self, trainer)
        if self.saved_step == 6:
            raise Stop

    monkeypatch.setattr(LastCheckpoint, "save", save_then_stop)
    with pytest.raises(Stop):
        frontier_run.train(broken)
    monkeypatch.setattr(LastCheckpoint, "save", save)
    path = Path(broken.folder) / frontier_run.PATH
    ahead = {**lines_of(broken)[-1], "updates": 9}  # it went on after the checkpoint, and was killed while it wrote
    path.write_text(path.read_text() + json.dumps(ahead) + '\n{"updates": 11, "kl')
    frontier_run.train(broken)
    assert lines_of(broken) == lines_of(whole)


def test_a_run_that_ends_itself_is_measured_up_to_there(p3o):
    run = job(p3o.folder / "run", rollouts=12, settings={"kl_budget.max_kl": 1e-5}, evaluate={"times": 24})
    said = frontier_run.train(run)
    assert "kl_budget.max_kl" in said and 1 < len(lines_of(run)) < 25


def test_a_config_of_another_stage_is_refused(p3o):
    assert "RewardModel" in p3o("frontier", plan_file(p3o.folder, config="configs/debug/reward.yaml")).error


def test_expected_kl_is_the_kl_by_enumeration():
    """Over all responses of up to two tokens: the mean of the estimate is sum p log p/p_ref, whatever the noise of one response."""
    torch.manual_seed(1)
    stage = policy(max_completion_length=2, reference=policy().model.double(), temperature=0.8)
    stage.model.double()
    with torch.no_grad():
        for weight in stage.model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    eos, vocabulary = 8, range(10)
    responses = [(eos, None), *((first, second) for first in vocabulary if first != eos for second in vocabulary)]
    batch = collate(["bad"])
    tokens = torch.tensor([[[first, 9 if second is None else second] for first, second in responses]])
    mask = torch.tensor([[[True, second is not None] for _, second in responses]])
    with torch.no_grad():
        estimate = frontier_run.expected_kl(stage, batch, tokens, mask)
        now, reference = (
            completion_logps(model, batch.tokens, batch.attention_mask, tokens, mask, 0.8).sum(-1)
            for model in (stage.model, stage.reference)
        )
    assert now.exp().sum().item() == pytest.approx(1, abs=1e-9)
    exact = (now.exp() * (now - reference)).sum().item()
    assert (now.exp() * estimate).sum().item() == pytest.approx(exact, abs=1e-9) and exact > 0.1
    assert (estimate >= 0).all()
    spread = [(now.exp() * (values - exact).square()).sum().item() for values in (estimate, now - reference)]
    assert spread[0] < spread[1] / 2


# ---- the command


def test_the_whole_command(here):
    path = plan_file(here.folder, title="Tiny", kl_range=0.5)
    ended = here("frontier", path, "--out", "out")
    assert ended.code == 0 and "8 of 8 runs" in ended.out, ended
    folder = here.folder / "out" / "plan"
    assert sorted(item.name for item in folder.iterdir()) == ["frontier.png", "frontier.svg", "report.md", "rows.csv", "statistics.csv"]
    rows = list(csv.DictReader((folder / "rows.csv").open()))
    assert len(rows) == 8 * 3 and {row["variant"] for row in rows} == {"P3O", "RLOO"}
    assert {row["model.kl_coef"] for row in rows} == {"0.001", "0.1"}
    report = (folder / "report.md").read_text()
    assert report.startswith("# Tiny\n") and "Not there" not in report
    figures = {(row["variant"], row["quantity"], row["against"]): row for row in csv.DictReader((folder / "statistics.csv").open())}
    assert f"{float(figures['RLOO', 'area_learned', '']['mean']):.3f}" in report

    # nothing is run again, and what is reported is the same
    stamps = {done: done.stat().st_mtime_ns for done in here.folder.glob("out/runs/*/done.json")}
    before = (folder / "statistics.csv").read_text()
    assert here("frontier", path, "--out", "out").code == 0
    assert stamps == {done: done.stat().st_mtime_ns for done in here.folder.glob("out/runs/*/done.json")}
    assert before == (folder / "statistics.csv").read_text()

    # a run that is lost is made again, equal
    shutil.rmtree(next(iter(stamps)).parent)
    assert here("frontier", path, "--out", "out", "--report").code == 0
    assert "not run" in (folder / "report.md").read_text()
    assert here("frontier", path, "--out", "out").code == 0
    assert before == (folder / "statistics.csv").read_text()


def test_a_run_that_fails_is_named_and_the_others_go_on(here):
    variants = {"P3O": {}, "bad": {"settings": {"model.clip_range": -1.0}}}
    ended = here("frontier", plan_file(here.folder, variants=variants, grid={}, seeds=[0]), "--out", "out")
    assert ended.code == 2 and "1 of 2 jobs failed" in ended.err
    assert "model.clip_range is -1.0" in ended.err and "1 of 2 runs" in ended.out
    report = (here.folder / "out/plan/report.md").read_text()
    assert "## Not there" in report and "model.clip_range is -1.0" in report


def test_runs_that_ended_themselves_are_told_and_so_is_that_seeds_are_few(here):
    variants = {"P3O": {}, "strays": {"settings": {"kl_budget.max_kl": 1e-5}}}
    ended = here("frontier", plan_file(here.folder, variants=variants, grid={}, seeds=[0, 1], rollouts=4), "--out", "out")
    assert ended.code == 0
    report = (here.folder / "out/plan/report.md").read_text()
    early = report.partition("## Ended early")[2]
    assert "- strays, seed 0, {}: " in early and "kl_budget.max_kl" in early and "P3O" not in early
    assert "Of fewer than five seeds" in report


def test_stages_are_trained_once_a_seed(here):
    stages = {
        "sft": {"config": "configs/debug/sft.yaml", "settings": {"trainer.max_steps": 2, "trainer.logger": False}},
        "reward": {"config": "configs/debug/reward.yaml", "settings": {"model.model": "{task}/sft/export", "trainer.max_steps": 2}},
    }
    settings = {**SMALL["settings"], "model.model": "{task}/sft/export", "model.reward_funcs": "{task}/reward/export"}
    path = plan_file(here.folder, stages=stages, settings=settings, rollouts=1, seeds=[4], grid={})
    assert here("frontier", path, "--out", "out").code == 0
    tasks = list(here.folder.glob("out/tasks/*"))
    assert len(tasks) == 1 and tasks[0].name.startswith("seed-4-")
    learned = [lines[0]["learned"] for lines in map(frontier_run.read_lines, here.folder.glob("out/runs/*/path.jsonl"))]
    assert len(learned) == 2 and learned[0] == learned[1] != 0


def test_a_task_that_fails_takes_its_runs_along(here):
    path = plan_file(here.folder, task="p3o_lightning.none.such", seeds=[0])
    ended = here("frontier", path, "--out", "out")
    assert ended.code == 2 and "p3o_lightning.none.such" in ended.err and not list(here.folder.glob("out/runs/*"))


# ---- workers


def odd_jobs(job: tuple[str, str]) -> None:
    """In a worker: fail, die, or leave a mark."""
    kind, path = job
    if kind == "fail":
        raise ValueError("two\nlines")
    if kind == "refuse":
        raise InputError("model.x is 1")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    Path(path).write_text(str(os.getpid()))
    if kind == "stay":
        time.sleep(120)


def test_a_job_that_fails_or_dies_takes_no_other_along(tmp_path):
    jobs = [("mark", str(tmp_path / "a")), ("fail", ""), ("die", ""), ("refuse", ""), ("mark", str(tmp_path / "b"))]
    ended = dict(run_jobs(odd_jobs, jobs, 1))
    assert ended[jobs[0]] is None and ended[jobs[4]] is None and (tmp_path / "b").exists()
    assert ended[jobs[1]] == "ValueError: two lines"
    assert "-9" in str(ended[jobs[2]])
    assert ended[jobs[3]] == "model.x is 1"
    assert int((tmp_path / "a").read_text()) != os.getpid()


def test_a_consumer_that_stops_early_leaves_no_worker(tmp_path):
    running = run_jobs(odd_jobs, [("mark", str(tmp_path / name)) for name in "abc"], 1)
    assert next(running)[1] is None
    running.close()
    assert not (tmp_path / "c").exists()
    worker = int((tmp_path / "a").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    mark = tmp_path / "a"
    code = f"from tests.test_frontier import odd_jobs, run_jobs\nlist(run_jobs(odd_jobs, [('stay', {str(mark)!r})], 1))"
    (tmp_path / "pool.py").write_text("if __name__ == '__main__':\n    " + code.replace("\n", "\n    "))
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], env={**os.environ, "PYTHONPATH": paths})
    while not (mark.exists() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    worker = int(mark.read_text())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    for _ in range(300):  # it ends at once; what is waited for is a busy machine
        time.sleep(0.1)
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker went on alone")


# ---- the report


def row(variant: str, seed: int, updates: int, kl: float, learned: float, gold: float) -> dict[str, Any]:
    each = {"learned_each": [[learned] * 2], "gold_each": [[gold] * 2]}
    rates = {"win_rate_learned": 0.5, "win_rate_gold": 0.5 + gold / 4}
    return {"variant": variant, "seed": seed, "updates": updates, "kl": kl, "learned": learned, "gold": gold, **rates, **each} | {
        "length": 10.0 + kl,
        "distinct_2": 0.5,
    }


def two_variants() -> list[dict[str, Any]]:
    """A gains 1 per nat up to 2 nats (plus its seed's own offset), B half of that; A's gold falls after 1 nat."""
    rows = []
    for seed, offset in ((0, 0.0), (1, 5.0)):
        for variant, slope in (("A", 1.0 + seed / 10), ("B", 0.5)):
            rows.append(row(variant, seed, 0, 0.0, offset, 0.0))
            rows.append(row(variant, seed, 4, 1.0, offset + slope, 0.4))
            rows.append(row(variant, seed, 8, 2.0, offset + 2 * slope, 0.2 if variant == "A" else 0.6))
    return rows


def reported(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Any, Points, dict[Any, Any]]:
    plan = read_plan(str(plan_file(tmp_path, variants={"A": {}, "B": {}}, seeds=[0, 1], **changes)))
    points = Points(rows, plan)
    return plan, points, {(item.variant, item.quantity, item.against): item for item in compute_statistics(plan, points)}


def test_statistics_by_hand(tmp_path):
    plan, points, found = reported(tmp_path, two_variants(), baseline="A", budgets=[1.5])
    assert points.kl_range == 2.0  # what all variants reach at all seeds
    assert found["A", "area_learned", ""].mean == pytest.approx((1.0 + 1.1) / 2)  # a line from 0 to 2 slope has the mean slope
    assert found["B", "area_learned", ""].mean == pytest.approx(0.5)
    assert found["B", "area_learned", "A"].mean == pytest.approx(-0.55)
    assert found["B", "area_learned", "A"].p_sign_flip == 0.5 and found["B", "area_learned", "A"].seeds == 2
    # A's line has no vertex at 1 nat: from start to end, gold 0 to 0.2 at either seed; B's likewise, 0 to 0.6
    assert found["A", "gold@1.5", ""].mean == pytest.approx(0.15)
    assert found["B", "gold@1.5", ""].mean == pytest.approx(0.45)
    assert found["B", "length@1.5", ""].mean == pytest.approx(11.5)
    assert found["A", "win_rate_gold@1.5", ""].mean == pytest.approx(0.5 + 0.15 / 4)
    # mixtures 1/4 start + 3/4 end: B's gold 0.6 beats all of A's, B's 0 ties with A's 0 and loses to 0.2
    assert found["B", "wins_gold@1.5", "A"].mean == pytest.approx(0.75 + 0.25 * 0.25 * 0.5)
    # runs end at 2 nats, at A's lowest gold since the start, whatever was had on the way; two of three evaluations are in the range
    assert found["A", "gold@end", ""].mean == pytest.approx(0.2) and found["B", "learned@end", ""].mean == pytest.approx(1.0)
    assert found["A", "kl@end", ""].mean == 2.0 and found["A", "evaluations", ""].mean == 2.0
    assert "| B | learned | -0.550" in markdown(plan, points, list(found.values()), [], [])


def test_each_variant_can_be_paired_with_the_first_of_its_series(tmp_path):
    rows = two_variants() + [
        {**row, "variant": "A2", "learned": row["learned"] + row["kl"]} for row in two_variants()[:3] + two_variants()[6:9]
    ]
    variants = {"A": {"series": "a"}, "A2": {"series": "a"}, "B": {"series": "b"}}
    plan = read_plan(str(plan_file(tmp_path, variants=variants, seeds=[0, 1], baseline="series")))
    found = {(item.variant, item.quantity): item for item in compute_statistics(plan, Points(rows, plan)) if item.against}
    assert found["A2", "area_learned"].against == "A" and found["A2", "area_learned"].mean == pytest.approx(1.0)
    assert ("B", "area_learned") not in found  # the first of its own
    assert "## Paired with the first of its series" in markdown(
        plan, Points(rows, plan), compute_statistics(plan, Points(rows, plan)), [], []
    )


def test_areas_are_drawn_by_size_whatever_comes_first_in_the_plan(tmp_path, monkeypatch):
    """The first of a series is its baseline, which need not be the smallest."""
    drawn = []
    monkeypatch.setattr(frontier_figures, "_save", lambda figure, *_, **__: drawn.append(figure) or "areas.png")
    variants = {"A": {"series": "a", "x": 2}, "B": {"series": "a", "x": 0.5}, "C": {"series": "a", "x": "none"}}
    slopes = {"A": 1.0, "B": 0.5, "C": 0.1}
    rows = [row(name, 0, epoch, epoch / 4, slope * epoch / 4, 0.1) for name, slope in slopes.items() for epoch in (0, 8)]
    plan = read_plan(str(plan_file(tmp_path, variants=variants, seeds=[0], baseline="series", kl_range=2)))
    points = Points(rows, plan)
    frontier_figures.draw_areas(plan, points, compute_statistics(plan, points), tmp_path)
    axis = drawn[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "2", "none"]
    line = axis.containers[0].lines[0]
    assert list(line.get_xdata()) == pytest.approx([0, 1, 2]) and list(line.get_ydata()) == pytest.approx([0.5, 1.0, 0.1])


def test_a_mixture_wins_as_its_parts_do():
    ours = [row("A", 0, 0, 0.0, 0.0, 0.0), row("A", 0, 4, 2.0, 2.0, 1.0)]
    assert head_to_head(ours, ours, "gold", 0.0) == 0.5
    assert head_to_head(ours, ours, "gold", 1.0) == 0.5  # both are half and half
    assert head_to_head(ours, ours[:1], "gold", 1.0) == pytest.approx(0.75)


def test_without_gold_there_is_one_reward(tmp_path):
    rows = [{name: value for name, value in row.items() if "gold" not in name} for row in two_variants()]
    plan, points, found = reported(tmp_path, rows)
    assert points.rewards == ["learned"] and not any("gold" in quantity for _, quantity, _ in found)
    assert "gold" not in markdown(plan, points, list(found.values()), [], []).split("`rows.csv`")[1]


def test_numbers_of_the_report_do_not_depend_on_the_order_of_rows(tmp_path):
    rows = two_variants()
    _, _, one = reported(tmp_path, rows)
    _, _, other = reported(tmp_path, rows[::-1])
    for key, item in one.items():
        assert [value for value in item[3:] if not math.isnan(value)] == pytest.approx(
            [value for value in other[key][3:] if not math.isnan(value)]
        )


def test_gold_of_the_demo_has_the_signature_of_a_reward():
    from p3o_lightning.commands import demo_task

    assert demo_task.gold(completions=["the room was great ."], prompts=["p"]) == [0.3]
    shifts = demo_task.prompt_shift(prompts=["a", "a", "b"], completions=["x", "y", "z"])
    assert shifts[0] == shifts[1] != shifts[2]
    many = torch.tensor(demo_task.prompt_shift(prompts=[str(number) for number in range(2000)]))
    assert many.mean().abs() < 0.1 and (many.std() - 1).abs() < 0.1
