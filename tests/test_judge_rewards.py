"""A judge as the reward: gaps without any scalar, from the question put to the judge to the trained policy.

The power of these tests, found by planting one error at a time:
    planted error                    first test that fails, without test_
    judges' weights not read         scores_beside_a_judge_and_the_missing_eos_penalty_enter_the_gaps
    scores beside a judge forgotten  scores_beside_a_judge_and_the_missing_eos_penalty_enter_the_gaps
    score differences turned around  scores_beside_a_judge_and_the_missing_eos_penalty_enter_the_gaps
    judges' figures not logged       what_is_logged_of_a_judged_run
    any objective takes a judge      an_objective_that_reads_scores_refuses_a_judge
"""

from __future__ import annotations

import math

import pytest
import torch
from tabular import RESPONSES, all_draws, coefficients, expected_gradient, gradient, make_world, sequence_logps
from test_policy import experience
from tiny import PROMPTS, KeepAll, Recorder, collate, equal, policy, prompts, share_of_a, trainer, weights
from torch.testing import assert_close

from p3o_lightning.batches import PromptBatch
from p3o_lightning.errors import InputError
from p3o_lightning.judges import FunctionJudge, Judge, group_gaps
from p3o_lightning.objectives import p3o_loss
from p3o_lightning.rewards import reward_sources
from p3o_lightning.tokenizers import byte_tokenizer


@FunctionJudge
def more_a(prompts, first, second, **_):
    """What share_of_a says, as comparisons: the share of "a" decides."""
    one, other = share_of_a(first), share_of_a(second)
    return [0.5 if a == b else float(a > b) for a, b in zip(one, other, strict=True)]


# ---- exact: rock, paper, scissors


def test_the_gradient_of_an_intransitive_judge_is_the_enumerated_one():
    """A random tournament between 15 responses, asked with noise of its own in each order; expected gradient of self-play by a sum."""
    world, words = make_world(0.0), [" ".join(map(str, response)) for response in RESPONSES]
    first_place = torch.rand(
        15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )  # P(row beats column | row shown first)

    @FunctionJudge
    def tournament(prompts, first, second, **_):
        return [float(first_place[words.index(a), words.index(b)]) for a, b in zip(first, second, strict=True)]

    beats = (first_place + 1 - first_place.T) / 2  # P(row beats column), both orders averaged; a response ties with itself
    beats.fill_diagonal_(0.5)
    draws = all_draws(2)
    gaps, _ = group_gaps(tournament, ["x"] * len(draws), [[words[i] for i in draw] for draw in draws])
    assert_close(gaps.double(), (beats - beats.T)[draws[:, :, None], draws[:, None, :]], rtol=0, atol=1e-6)
    logps = world.logps[draws]
    coefs = coefficients(lambda leaf: p3o_loss(leaf, logps, world.ref_logps[draws], gaps=gaps, kl_coef=0), logps)
    got = expected_gradient(coefs, draws, world.old_logps, world.score_functions)
    opponent = world.old_logps.exp()
    wanted = -2 * gradient(lambda logits: sequence_logps(logits).exp() @ beats @ opponent, world.logits)  # gap = 2 P - 1
    assert_close(got, wanted, rtol=0, atol=1e-7)
    assert (wanted.abs() > 1e-3).any()


def rock_paper_scissors(kl_coef: float, steps: int, start: float) -> torch.Tensor:
    """Probabilities of the three along natural-gradient steps of 0.05 on P3O's expected gradient, the reference being even."""
    beats = {("r", "s"), ("s", "p"), ("p", "r")}
    judge = FunctionJudge(lambda first, second, **_: [float(pair in beats) for pair in zip(first, second, strict=True)])
    draws = all_draws(1).new_tensor([[i, j] for i in range(3) for j in range(3)])
    gaps, _ = group_gaps(judge, ["x"] * 9, [["rps"[i] for i in draw] for draw in draws])
    logits, even = start * torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), torch.full((9, 2), 1 / 3, dtype=torch.float64).log()
    path = []
    for _ in range(steps):
        logps = logits.log_softmax(0)
        path.append(logps.exp())
        coefs = coefficients(lambda leaf, at=logps: p3o_loss(leaf, at[draws], even, gaps=gaps, kl_coef=kl_coef), logps[draws])
        weighted = coefs * logps[draws].sum(1, keepdim=True).exp()
        logits = logits - 0.05 * torch.zeros(3, dtype=torch.float64).index_add(0, draws.flatten(), weighted.flatten()) / logps.exp()
    return torch.stack(path)


def test_rock_paper_scissors_goes_round_without_a_price_of_kl():
    """Replicator dynamics of a zero-sum game: sum_i log p_i is kept, and near even odds a turn takes 2 pi sqrt(3) units of time, which
    are 218 steps (Hofbauer and Sigmund 1998, section 7.7: eigenvalues +- i / sqrt(3))."""
    path = rock_paper_scissors(kl_coef=0.0, steps=437, start=0.1)
    across = torch.stack([path[:, 0] - path[:, 1], (path[:, 0] + path[:, 1] - 2 * path[:, 2]) / 3**0.5])  # orthogonal axes
    turns = torch.diff(torch.atan2(across[1], across[0]))
    turned = ((turns + torch.pi).remainder(2 * torch.pi) - torch.pi).sum().abs() / (2 * torch.pi)
    assert float(turned) == pytest.approx(2, abs=0.02)
    far = rock_paper_scissors(kl_coef=0.0, steps=300, start=1.0).log().sum(1)
    even = 3 * math.log(1 / 3)
    # a step of h adds -(3/2) h^2 Var_p(gap) to it, about 0.0004: the path of finite steps drifts outwards by 0.11, never inwards
    assert far[0] < even - 0.5 and 0 < float(far[0] - far[-1]) < 0.15 and bool((torch.diff(far) < 0).all())


def test_rock_paper_scissors_settles_at_even_odds_with_a_price_of_kl():
    settled = rock_paper_scissors(kl_coef=0.3, steps=600, start=1.0)[-1]
    assert_close(settled, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-3)


# ---- in a policy


def test_a_judge_alone_teaches_the_known_best_answer(tmp_path):
    module = policy(reward_funcs=more_a, kl_coef=0.001, lr=2e-2, num_generations=4)
    trainer(tmp_path, max_steps=40).fit(module, module.wrap_train_dataloader(prompts(6)))
    module.rollout_seed = 10**6
    after = module.rollout_step(collate(PROMPTS * 8))
    assert after.scores is None and after.gaps is not None
    texts = [
        module.tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(after.completion_tokens.flatten(0, 1), after.completion_mask.flatten(0, 1), strict=True)
    ]
    assert sum(share_of_a(texts)) / len(texts) > 0.9


def test_the_judge_is_shown_prompts_texts_and_columns():
    asked = []

    @FunctionJudge
    def judge(prompts, first, second, number):
        asked.extend(zip(prompts, first, second, number, strict=True))
        return [0.5] * len(first)

    module = policy(reward_funcs=judge, num_generations=3)
    batch = experience(module)
    assert {prompt for prompt, *_ in asked} == set(PROMPTS[:4]) and all(number == len(prompt) for prompt, _, _, number in asked)
    assert all(set(first + second) <= set("abcdefgh") for _, first, second, _ in asked), "no special tokens"
    assert batch.gaps.shape == (4, 3, 3) and not batch.gaps.any()


def test_scores_beside_a_judge_and_the_missing_eos_penalty_enter_the_gaps():
    def length(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    settings = {"num_generations": 3, "missing_eos_penalty": 5.0}
    both = experience(policy(reward_funcs=[length, more_a], reward_weights=[0.1, 2.0], **settings))
    scored = experience(policy(reward_funcs=[length], reward_weights=[0.1], **settings)).scores
    judged = experience(policy(reward_funcs=more_a, num_generations=3)).gaps
    assert_close(both.gaps, scored.unsqueeze(2) - scored.unsqueeze(1) + 2 * judged)
    assert torch.equal(both.gaps, -both.gaps.mT) and both.scores is None


def test_what_is_logged_of_a_judged_run(tmp_path):
    recorder = Recorder()
    biased = FunctionJudge(lambda first, second, **_: [min(1.0, a.count("a") / 5 + 0.3) for a in first])
    biased.name = "biased"
    module = policy(reward_funcs=[biased, share_of_a], num_generations=3)
    run = trainer(tmp_path, max_steps=2, logger=recorder, log_every_n_steps=1)
    run.fit(module, module.wrap_train_dataloader(prompts()), prompts())
    rollout = next(row for _, row in recorder.rows if "objective/kl" in row)
    assert {"judges/biased/tie_rate", "judges/biased/contradiction_rate", "judges/biased/position_bias", "judges/biased/no_verdict"} <= set(
        rollout
    )
    assert rollout["judges/biased/position_bias"] < 0, "it underrates the first place, as it was made to"
    assert rollout["objective/scores_margin"] > 0 and "rewards/share_of_a/mean" in rollout
    assert "objective/scores" not in rollout and "objective/rlhf_reward" not in rollout and "rewards/biased/mean" not in rollout
    (validated,) = run.validate(module, prompts(), verbose=False)
    assert validated["val/scores_margin"] > 0 and "val/scores" not in validated
    assert run.validate(module, prompts(), verbose=False) == [validated]


def test_every_checkpoint_of_a_judged_run_resumes_to_the_bit(tmp_path):
    def run(**flags):
        module, recorder = policy(reward_funcs=[more_a, share_of_a], num_iterations=2, micro_batch_size=2, kl_target=0.01), Recorder()
        callbacks = [flags.pop("keeper")] if "keeper" in flags else []
        fit = trainer(tmp_path, max_steps=8, logger=recorder, log_every_n_steps=1, callbacks=callbacks)
        fit.fit(module, module.wrap_train_dataloader(prompts(shuffle=True)), **flags)
        return module, recorder

    keeper = KeepAll(tmp_path / "kept")
    whole, logged = run(keeper=keeper)
    assert len(keeper.kept) >= 8 and not equal(weights(whole), weights(policy()))
    for checkpoint in keeper.kept:
        again, relogged = run(ckpt_path=checkpoint)
        assert equal(weights(again), weights(whole)) and again.state.kl_coef == whole.state.kl_coef, checkpoint.name
        assert relogged.rollouts() == logged.rollouts()[len(logged.rollouts()) - len(relogged.rollouts()) :]


def test_a_judge_by_its_dotted_name_and_by_its_class(p3o):
    (p3o.folder / "mine.py").write_text(
        "from p3o_lightning.judges import FunctionJudge, Judge\n\n\n"
        "@FunctionJudge\ndef shorter(first, second, **_):\n    return [0.5] * len(first)\n\n\n"
        "class Letter(Judge):\n"
        "    name = 'letter'\n\n"
        "    def __init__(self, letter: str) -> None:\n        self.letter = letter\n\n"
        "    def __call__(self, prompts, first, second, **columns):\n"
        "        return [0.5 if a.count(self.letter) == b.count(self.letter) else float(a.count(self.letter) > b.count(self.letter))\n"
        "                for a, b in zip(first, second)]\n"
    )
    debug = ["fit", "--config", "configs/debug/policy.yaml", "--trainer.max_steps=4"]
    named = p3o.built(*debug, "--model.reward_funcs=mine.shorter", "--trainer.default_root_dir=named")
    assert named.model.rewards.sources[0].name == "shorter" and named.trainer.callback_metrics["judges/shorter/tie_rate"] == 1
    made = p3o.built(*debug, "--model.reward_funcs=mine.Letter", "--model.reward_funcs.letter=e", "--trainer.default_root_dir=made")
    assert made.model.rewards.sources[0].judge.letter == "e" and "judges/letter/position_bias" in made.trainer.callback_metrics
    ended = p3o(*debug[:-1], "--model.reward_funcs=mine.Letter", "--model.reward_funcs.letter=e", "--trainer.default_root_dir=made",
                "--ckpt_path=last", "--trainer.max_steps=8")  # fmt: skip
    assert ended.code == 0 and "resumed from step 4" in ended.out


def test_a_server_judge_in_a_config_and_what_is_wrong_with_it_in_one_line(p3o, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    debug = ["fit", "--config", "configs/debug/policy.yaml", "--model.reward_funcs=ServerJudge", "--model.reward_funcs.model=m"]
    assert "judge url is 'somewhere'" in p3o(*debug, "--model.reward_funcs.url=somewhere").error
    down = p3o(*debug, "--model.reward_funcs.url=http://127.0.0.1:9", "--model.reward_funcs.retries=0").error
    assert "judge http://127.0.0.1:9/v1/chat/completions (model 'm') gave no verdict: no connection" in down


def test_a_judges_wrong_answer_stops_with_one_line(tmp_path):
    module = policy(reward_funcs=FunctionJudge(lambda first, **_: [2.0] * len(first)))
    with pytest.raises(InputError, match=r"judge <lambda> returned 2\.0 at position 0"):
        trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts()))


@pytest.mark.parametrize("objective", ["ppo", "reinforce"])
def test_an_objective_that_reads_scores_refuses_a_judge(objective):
    with pytest.raises(
        InputError, match=rf"model\.objective is '{objective}', which reads a score .* a judge, which only compares: choose p3o"
    ):
        policy(reward_funcs=[share_of_a, more_a], objective=objective)


@pytest.mark.parametrize("objective", ["rloo", "online_dpo"])
def test_a_relative_that_reads_differences_takes_a_judge(objective, tmp_path):
    module = policy(reward_funcs=more_a, objective=objective, num_generations=3)
    trainer(tmp_path, max_steps=2).fit(module, module.wrap_train_dataloader(prompts()))
    assert not equal(weights(module), weights(policy()))


def test_names_of_judges_are_distinct_and_weights_count():
    class Same(Judge):
        name = "same"

        def __call__(self, prompts, first, second, **columns):
            return [1.0] * len(first)

    sources = reward_sources([Same(), Same()], [1.0, 0.5], byte_tokenizer(), "float32")
    assert [source.name for source in sources.sources] == ["same", "same_2"] and sources.judged and sources.models == []
    assert isinstance(collate(["a"]), PromptBatch)
