"""The gold score of `p3o frontier` may be a reward model of its own, as where people's comparisons are all that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import p3o  # noqa: F401

from p3o_lightning import RewardModel
from p3o_lightning.commands import frontier_run
from p3o_lightning.commands.frontier_plan import Evaluate, RunJob, read_plan
from p3o_lightning.errors import InputError

MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def lines(folder: Path, gold: str) -> list[dict]:
    folder.mkdir()
    settings = {"model.reward_funcs": "rewards/first", "data.val_fraction": 0.2, "trainer.logger": False, "trainer.limit_val_batches": 0}
    job = RunJob(str(folder), 0, ["configs/debug/policy.yaml"], settings, 2, Evaluate(2, 4, 2, gold), "")
    frontier_run.train(job)
    return frontier_run.read_lines(folder / frontier_run.PATH)


@pytest.fixture
def rewards(p3o):  # noqa: F811
    """Two reward models of different weights."""
    import torch

    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        RewardModel({**MODEL, "num_key_value_heads": 1}, tokenizer="bytes").export(p3o.folder / "rewards" / name)
    return p3o


def test_a_reward_model_measures_and_is_not_optimised(rewards):
    same = lines(rewards.folder / "same", "rewards/first")
    other = lines(rewards.folder / "other", "rewards/second")
    assert all(line["gold_each"] == line["learned_each"] for line in same)
    assert all(line["gold_each"] != line["learned_each"] for line in other)
    told = ("updates", "kl", "learned", "length")
    assert [[line[name] for name in told] for line in same] == [[line[name] for name in told] for line in other], "the runs are one run"


def test_the_folder_may_be_of_a_stage_of_the_plan(tmp_path):
    stages = {"gold": {"config": "configs/debug/reward.yaml"}}
    plan = {"config": "configs/debug/policy.yaml", "variants": {"P3O": {}}, "stages": stages, "evaluate": {"gold": "{task}/gold/export"}}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    read = read_plan(str(tmp_path / "plan.yaml"))
    assert read.cells(tmp_path)[0].job.evaluate.gold == f"{read.tasks(tmp_path)[0].folder}/gold/export"


def test_a_folder_that_is_not_there_is_named(rewards):
    with pytest.raises(InputError, match="rewards/third"):
        lines(rewards.folder / "run", "rewards/third")
