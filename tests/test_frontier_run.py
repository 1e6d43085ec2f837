"""A run of `p3o frontier` is measured along its path, from its start to its end, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from frontier_plans import SMALL
from tiny import LLAMA, collate, equal, policy

from p3o_lightning import RewardModel
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.commands import frontier_run
from p3o_lightning.commands.frontier_plan import Evaluate, RunJob
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import completion_logps


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


def test_gold_may_be_a_reward_model_of_its_own(p3o):
    """As where people's comparisons are all that is known. It measures, and the run is the same run."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        RewardModel(LLAMA, tokenizer="bytes").export(p3o.folder / "rewards" / name)
    settings = {"model.reward_funcs": "rewards/first"}
    same, other = (
        job(p3o.folder / name, rollouts=1, settings=settings, evaluate={"gold": f"rewards/{name}"}) for name in ("first", "second")
    )
    for run in (same, other):
        frontier_run.train(run)
    for one, two in zip(lines_of(same), lines_of(other), strict=True):
        assert one["gold_each"] == one["learned_each"] == two["learned_each"] != two["gold_each"]
    with pytest.raises(InputError, match="rewards/third"):
        frontier_run.train(job(p3o.folder / "third", rollouts=1, settings=settings, evaluate={"gold": "rewards/third"}))


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
