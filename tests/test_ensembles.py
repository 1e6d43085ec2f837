"""Reward ensembles: numbers by hand, and reward models trained apart as one reward of a policy.

The power of these tests, found by planting one error at a time:
    planted error                  first test that fails, without test_
    maximum for minimum            by_hand
    k not read                     by_hand
    weights not normalised         by_hand
    variance for sd                by_hand
    members' networks left behind  reward_models_as_one_reward_and_what_is_logged
    members' names not distinct    reward_models_as_one_reward_and_what_is_logged
"""

from __future__ import annotations

import math

import pytest
import torch
from test_policy import experience
from tiny import LLAMA, Recorder, equal, letters, policy, preferences, prompts, share_of_a, trainer, weights
from torch.testing import assert_close

from p3o_lightning import InputError, PreferenceDataModule, RewardModel
from p3o_lightning.ensembles import Ensemble
from p3o_lightning.judges import FunctionJudge

SCORES = torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]], [[5.0, -4.0]]])  # three members, one prompt, two responses


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [3.0, 0.0]),
        ({"aggregate": "min"}, [1.0, -4.0]),
        # deviations (-2, 0, 2) and (2, 2, -4): population variances 8/3 and 8
        ({"aggregate": "mean_minus_sd"}, [3 - math.sqrt(8 / 3), -math.sqrt(8)]),
        ({"aggregate": "mean_minus_sd", "k": 0.5}, [3 - math.sqrt(8 / 3) / 2, -math.sqrt(8) / 2]),
        ({"aggregate": "mean_minus_sd", "k": 0}, [3.0, 0.0]),
        ({"weights": [2.0, 1.0, 1.0]}, [2.5, 0.5]),
        # weights 1/2, 1/4, 1/4: variances 2.25/2 + .25/4 + 6.25/4 = 2.75 and 2.25/2 + 2.25/4 + 20.25/4 = 6.75
        ({"weights": [4, 2, 2], "aggregate": "mean_minus_sd"}, [2.5 - math.sqrt(2.75), 0.5 - math.sqrt(6.75)]),
    ],
    ids=str,
)
def test_by_hand(settings, expected):
    ensemble = Ensemble(["a", "b", "c"], **settings)
    ensemble.check()
    assert_close(ensemble.combine(SCORES), torch.tensor([expected]), rtol=0, atol=1e-6)


def test_members_that_agree_are_any_one_of_them():
    for aggregate in ("mean", "min", "mean_minus_sd"):
        assert_close(Ensemble(["a", "b"], aggregate).combine(SCORES[:1].repeat(2, 1, 1)), SCORES[0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"members": ["a"]}, r"ensemble\.members"),
        ({"aggregate": "median"}, r"ensemble\.aggregate is 'median': choose mean, min or mean_minus_sd"),
        ({"k": -1}, r"ensemble\.k is -1"),
        ({"k": math.nan}, r"ensemble\.k is nan"),
        ({"weights": [1.0]}, r"ensemble\.weights is \[1\.0\] for 2 members"),
        ({"weights": [1.0, 0.0]}, r"ensemble\.weights"),
        ({"weights": [1.0, 1.0], "aggregate": "min"}, r"ensemble\.weights is given with ensemble\.aggregate min"),
        ({"members": [share_of_a, FunctionJudge(lambda **_: [])]}, r"ensemble\.members has a judge"),
        ({"members": [share_of_a, Ensemble([share_of_a, share_of_a])]}, r"ensemble\.members has a judge or an ensemble"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),  # objects would be named by their address
)
def test_a_setting_out_of_range_is_named(given, words):
    with pytest.raises(InputError, match=words):
        policy(reward_funcs=Ensemble(**{"members": [share_of_a, share_of_a], **given}))


def reward_model(seed: int) -> RewardModel:
    torch.manual_seed(seed)
    module = RewardModel(LLAMA, tokenizer=letters())
    torch.nn.init.normal_(module.model.score.weight)
    return module


def test_reward_models_as_one_reward_and_what_is_logged(tmp_path):
    members, recorder = [reward_model(1), reward_model(2), share_of_a], Recorder()
    module = policy(reward_funcs=Ensemble(members, "mean_minus_sd", k=2.0), num_generations=3)
    assert len(module.rewards.networks) == 2 and not any(name.startswith("rewards") for name in module.state_dict())
    batch = experience(module)
    each = torch.stack([experience(policy(reward_funcs=member, num_generations=3)).scores for member in members])
    mean, sd = each.mean(0), each.std(0, correction=0)
    assert_close(batch.scores, mean - 2 * sd, rtol=0, atol=1e-5)
    run = trainer(tmp_path, max_steps=2, logger=recorder, log_every_n_steps=1)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    first = next(row for _, row in recorder.rows if "objective/kl" in row)
    named = {name for name in first if name.startswith("rewards/")}
    assert named == {
        f"rewards/{name}" for name in ("RewardModel/mean", "RewardModel_2/mean", "share_of_a/mean", "ensemble/mean", "ensemble/sd")
    }
    assert first["rewards/ensemble/mean"] == first["objective/scores"]
    members_mean = (first["rewards/RewardModel/mean"] + first["rewards/RewardModel_2/mean"] + first["rewards/share_of_a/mean"]) / 3
    assert first["rewards/ensemble/sd"] == pytest.approx((members_mean - first["rewards/ensemble/mean"]) / 2, abs=1e-5)


def test_beside_another_source_it_has_one_weight(tmp_path):
    zero = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
    module = policy(reward_funcs=[Ensemble([share_of_a, zero]), share_of_a], reward_weights=[2.0, 10.0])
    assert_close(experience(module).scores, 11 * experience(policy(reward_funcs=share_of_a)).scores)
    assert [source.name for source in module.rewards.sources] == ["ensemble", "share_of_a_2"]


@pytest.mark.parametrize("apart_by", ["seeds", "splits"])
def test_from_reward_models_trained_apart_to_a_policy_by_one_yaml(p3o, tmp_path, apart_by):
    """Two members, then the policy on their minimum; the run resumes, and the config is a config."""
    data = preferences(tmp_path, 32)
    letters().save_pretrained(tmp_path / "tokenizer")
    for seed in (1, 2):
        torch.manual_seed(seed if apart_by == "seeds" else 0)
        module = RewardModel(LLAMA, tokenizer=str(tmp_path / "tokenizer"), lr=1e-2, center_coef=0.01)
        part = data
        if apart_by == "splits":
            part = tmp_path / f"part-{seed}.jsonl"
            part.write_text("".join(data.read_text().splitlines(keepends=True)[seed - 1 :: 2]))
        rows = PreferenceDataModule(str(part), batch_size=8, val_fraction=0, seed=seed)
        trainer(tmp_path, max_steps=10).fit(module, rows)
        module.export(tmp_path / f"reward-{seed}" / "export")
    (tmp_path / "run.yaml").write_text(
        "model:\n  class_path: PairwisePolicy\n  init_args:\n"
        f"    model: {LLAMA}\n    tokenizer: tokenizer\n    max_completion_length: 4\n    lr: 1.0e-3\n    kl_coef: 0.01\n"
        "    reward_funcs:\n      class_path: Ensemble\n"
        "      init_args: {members: [reward-1/export, reward-2/export], aggregate: min}\n"
        f"data:\n  class_path: PreferenceDataModule\n  init_args: {{path: {data.name}, batch_size: 4}}\n"
        "trainer: {default_root_dir: run, accelerator: cpu, max_steps: 4, log_every_n_steps: 1}\n"
    )
    fit = p3o.built("fit", "--config", "run.yaml")
    assert {"rewards/reward-1/mean", "rewards/reward-2/mean", "rewards/ensemble/sd"} <= set(fit.trainer.callback_metrics)
    figures = fit.trainer.callback_metrics
    assert figures["objective/scores"] <= min(figures["rewards/reward-1/mean"], figures["rewards/reward-2/mean"])
    again = p3o("fit", "--config", "run.yaml", "--ckpt_path=last", "--trainer.max_steps=6")
    assert again.code == 0 and "resumed from step 4" in again.out
    assert not equal(weights(fit.model), weights(policy()))
    planned = p3o("doctor", "--plan", "run.yaml")
    assert planned.code == 0 and "not counted" not in planned.out
