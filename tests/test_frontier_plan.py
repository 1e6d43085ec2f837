"""A plan of `p3o frontier` becomes runs, and one that is of no use is refused by the key at fault."""

from __future__ import annotations

import itertools

import pytest
import yaml
from frontier_plans import SMALL, plan_file

from p3o_lightning.commands.frontier_plan import read_plan


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
    settings, evaluate = {"model.model": "{task}/sft/export"}, {"gold": "{task}/gold/export"}
    plan = read_plan(str(plan_file(tmp_path, settings=settings, evaluate=evaluate, stages=stages, seeds=[3])))
    task = plan.tasks(tmp_path)[3]
    assert task.stages[0].settings["data.path"] == f"{task.folder}/data-3.jsonl"
    assert plan.cells(tmp_path)[0].job.settings["model.model"] == f"{task.folder}/sft/export"
    assert plan.cells(tmp_path)[0].job.evaluate.gold == f"{task.folder}/gold/export"


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
