"""The relatives of P3O: each against a loop of its own equation, by hand, and what holds of all of them. In float64, on- and off-policy.

How they relate to P3O is in test_baselines_against_p3o.py, a shift of the scores in test_score_shift.py, PPO's parts in test_ppo.py.

The power of these four files: each of these errors, planted alone, fails at least one test. Most fall to the loops of the equations first.
    rloo: own reward in the baseline, KL of the wrong sign, KL at the current policy
    grpo: biased or unguarded standard deviation, mean over the batch's tokens, KL of the wrong sign
    dr_grpo: standard deviation kept, divisor ignored;  gspo: whole ratio, KL not over the length
    reinforce: a ratio for the log-probability
    pairs: labels swapped, beta in the soft label, 1/tau for 1/(2 tau), eta on the wrong side, KL left out of rebel, half left out of copg,
        log-odds to the old policy for those to the reference
    clip: without min, none, wrong side, upper range ignored;  k3 inverted, k1 for k3;  mask ignored;  old, scores or values not detached
    gaps: summed, transposed
    ppo: lambda or gamma left out, V of the wrong sign, score at the first token, KL of the wrong sign, returns of whitened advantages,
        whitening without centring, least for greatest error, value clip around the present value, half, vf_coef or divisor left out
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from baseline_batches import INVARIANT, experience, gradients, per_response, ragged, run
from tabular import BETA, close
from torch.testing import assert_close

from p3o_lightning.baselines import OBJECTIVES, STD_FLOOR, grpo, online_dpo, ppo, rebel, reinforce, rloo
from p3o_lightning.errors import InputError
from p3o_lightning.objectives import p3o_loss

# ---- each equation, one response and one token at a time --------------------------------------------------------------------------------


def clipped(ratio, advantage, low, high=None):
    box = torch.tensor([1 - low, 1 + (low if high is None else high)], dtype=torch.float64)
    return torch.stack([ratio * advantage, torch.stack([torch.stack([ratio, box[0]]).max(), box[1]]).min() * advantage]).min()


def loop(objective, new, batch, values=None, *, kl_coef, clip_range=0.2, **options):
    """The loss by plain sums over lists; each line is the paper's, none is the package's."""
    responses = []  # per prompt: lists of (new, old, ref, old value, new value) of every token
    for p, rows in enumerate(batch.completion_mask.tolist()):
        group = []
        for k, kept in enumerate(rows):
            steps = range(sum(kept))
            columns = (new, batch.old_token_logps, batch.ref_token_logps, batch.values, new if values is None else values)
            group.append([[column[p, k, t] for column in columns] for t in steps])
        responses.append(group)
    total, count = torch.zeros((), dtype=torch.float64), 0
    if objective == "ppo":
        return loop_ppo(responses, batch.scores, kl_coef, clip_range, **options)
    for group, scores in zip(responses, batch.scores.tolist(), strict=True):
        size = len(group)
        sums = [[sum(token[column] for token in tokens) for column in range(3)] for tokens in group]
        kl_rewards = [score - kl_coef * float(old - ref) for score, (_, old, ref) in zip(scores, sums, strict=True)]
        mean = sum(scores) / size
        deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (size - 1))
        if objective in ("online_dpo", "online_ipo", "rebel", "copg"):
            for i in range(size):
                for j in range(i + 1, size):
                    lead = (sums[i][0] - sums[i][2]) - (sums[j][0] - sums[j][2])
                    gained = (sums[i][0] - sums[i][1]) - (sums[j][0] - sums[j][1])
                    gap, winner = scores[i] - scores[j], 1 if scores[i] > scores[j] else -1
                    if objective == "online_dpo":
                        total = total + torch.log1p(torch.exp(-kl_coef * winner * lead))
                    elif objective == "online_ipo":
                        total = total + (winner * lead - 1 / (2 * kl_coef)) ** 2
                    elif objective == "rebel":
                        total = total + (gained / options.get("eta", 1.0) - (kl_rewards[i] - kl_rewards[j])) ** 2
                    else:
                        total = total - (gap * lead - kl_coef * lead**2 / 2)
                    count += 1
            continue
        for k, tokens in enumerate(group):
            count += 1
            others = [reward for other, reward in enumerate(kl_rewards) if other != k]
            if objective == "reinforce":
                total = total - kl_rewards[k] * sums[k][0]
            elif objective == "rloo":
                total = total - clipped((sums[k][0] - sums[k][1]).exp(), kl_rewards[k] - sum(others) / len(others), clip_range)
            else:
                advantage = scores[k] - mean
                if objective != "dr_grpo":
                    advantage = advantage / (deviation + 1e-4)
                share = options.get("divisor", 1.0) if objective == "dr_grpo" else len(tokens)
                mean_drift = (sums[k][0] - sums[k][1]) / len(tokens)
                for now, old, ref, *_ in tokens:
                    ratio = (mean_drift if objective == "gspo" else now - old).exp()
                    k3 = (ref - now).exp() - 1 - (ref - now)
                    gain = clipped(ratio, advantage, clip_range, options.get("clip_range_high"))
                    total = total + (-gain + kl_coef * k3) / share
    return total / count


def loop_ppo(
    responses,
    scores,
    kl_coef,
    clip_range,
    value_clip_range=0.2,
    vf_coef=1.0,
    gamma=1.0,
    gae_lambda=0.95,
    whiten_advantages=True,
    divisor=None,
):
    """Generalised advantages by their definition, a double sum over the one-step errors."""
    rows, advantages = [], []
    for group, own in zip(responses, scores.tolist(), strict=True):
        for tokens, score in zip(group, own, strict=True):
            length = len(tokens)
            reward = [-kl_coef * float(old - ref) for _, old, ref, _, _ in tokens]
            reward[-1] += score
            value = [float(token[3]) for token in tokens] + [0.0]
            error = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
            for t, token in enumerate(tokens):
                advantage = sum((gamma * gae_lambda) ** (later - t) * error[later] for later in range(t, length))
                advantages.append(advantage)
                rows.append((token, advantage + value[t], length))
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages) + 1e-8)
    total = torch.zeros((), dtype=torch.float64)
    for ((now, old, _, old_value, value), wanted, _), advantage in zip(rows, advantages, strict=True):
        if whiten_advantages:
            advantage = (advantage - mean) / deviation
        gain = clipped((now - old).exp(), advantage, clip_range)
        boxed = old_value + (value - old_value).clamp(-value_clip_range, value_clip_range)
        error = torch.stack([(value - wanted) ** 2, (boxed - wanted) ** 2]).max()
        total = total - gain + vf_coef * error / 2
    responses_in_all = sum(len(group) for group in responses)
    return total / (len(rows) if divisor is None else divisor * responses_in_all)


LOOPED = [
    ("rloo", {}),
    ("grpo", {}),
    ("grpo", {"clip_range": 0.1, "clip_range_high": 0.4}),
    ("dr_grpo", {}),
    ("dr_grpo", {"divisor": 5.0, "clip_range_high": 0.3}),
    ("gspo", {"clip_range": 0.05}),
    ("gspo", {"clip_range": 0.03, "clip_range_high": 0.1}),
    ("reinforce", {}),
    ("online_dpo", {}),
    ("online_ipo", {}),
    ("rebel", {"eta": 2.5}),
    ("copg", {}),
    ("ppo", {}),
    ("ppo", {"whiten_advantages": False, "gae_lambda": 0.6, "gamma": 0.9, "vf_coef": 0.1, "value_clip_range": 0.1}),
    ("ppo", {"divisor": 5.0, "whiten_advantages": False, "clip_range": 0.05}),
]


@pytest.mark.parametrize(("objective", "settings"), LOOPED, ids=str)
@pytest.mark.parametrize("kl_coef", [BETA, 0.05])
def test_loss_and_gradients_are_those_of_the_equation(objective, settings, kl_coef):
    new, batch, values = ragged()
    found = []
    for function in (run, loop):
        leaf, critic = new.clone().requires_grad_(), values.clone().requires_grad_()
        answer = function(objective, leaf, batch, critic, kl_coef=kl_coef, **settings)
        loss = answer if function is loop else answer.loss
        found.append((loss.detach(), *torch.autograd.grad(loss, [leaf, critic], allow_unused=True)))
    (loss, by_policy, by_critic), (wanted, wanted_by_policy, wanted_by_critic) = found
    close(loss, wanted, 1e-12)
    close(by_policy, wanted_by_policy, 1e-12)
    if objective == "ppo":
        close(by_critic, wanted_by_critic, 1e-12)


@pytest.mark.parametrize("objective", ["rloo", "grpo", "dr_grpo", "gspo", "ppo"])
def test_the_clip_acts_in_these_loops(objective):
    """The comparison above would prove little of a clip that never acts, or always does."""
    new, batch, values = ragged()
    clip = 0.05 if objective == "gspo" else 0.2
    terms = run(objective, new, batch, values, clip_range=clip)
    assert 0.1 < terms.clip_fraction < 0.9
    if objective == "ppo":
        assert 0.1 < terms.value_clip_fraction < 0.9


def test_grpo_by_hand():
    """Scores (1, 0): mean 1/2, standard deviation sqrt(1/2); w = (2, 1/2) on one token each, clipped to 1.2; the other is not clipped."""
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 2, 1, dtype=torch.float64)
    batch = experience(zeros, zeros, mask, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    new = torch.tensor([[[math.log(2)], [math.log(0.5)]]], dtype=torch.float64)
    advantage = 0.5 / (math.sqrt(0.5) + STD_FLOOR)
    terms = grpo(new, batch, kl_coef=0.0)
    close(terms.loss, -(1.2 * advantage - 0.8 * advantage) / 2, 1e-14)  # of the worse one the clip lets no more than 0.2 be gained
    assert terms.clip_fraction == 1
    with_kl = grpo(new, batch, kl_coef=0.1).loss - terms.loss  # k3 = 1/w - 1 + log w
    close(with_kl, 0.1 * ((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2))) / 2, 1e-14)


# ---- what holds of all ------------------------------------------------------------------------------------------------------------------


each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


@each_objective
def test_only_the_loss_carries_a_gradient_and_only_to_the_policy_and_the_critic(objective):
    new, batch, values = ragged()
    names = ("old_token_logps", "ref_token_logps", "scores", "values")
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    leaf = new.clone().requires_grad_()
    terms = run(objective, leaf, batch._replace(**leaves), values)
    assert all(not value.requires_grad for name, value in terms._asdict().items() if name != "loss" and value is not None)
    terms.loss.backward()
    assert leaf.grad.any() and all(value.grad is None for value in leaves.values())


@each_objective
@pytest.mark.parametrize("filler", [7.0, -math.inf, math.nan])
def test_what_padding_holds_and_how_much_there_is_of_it_changes_nothing(objective, filler):
    new, batch, values = ragged()
    plain = run(objective, new, batch, values)
    wide = torch.nn.functional.pad(batch.completion_mask, (0, 2))

    def filled(tensor):
        return torch.nn.functional.pad(tensor, (0, 2)).masked_fill(~wide, filler)

    names = ("old_token_logps", "ref_token_logps", "values")
    other = batch._replace(completion_mask=wide, **{name: filled(getattr(batch, name)) for name in names})
    for name, value in run(objective, filled(new), other, filled(values))._asdict().items():
        if value is not None:
            close(value, getattr(plain, name), 1e-13)


@each_objective
def test_the_figures_of_the_drift_are_those_of_p3o(objective):
    new, batch, values = ragged()
    batch = batch._replace(scores=batch.scores.round())  # some ties
    ours = p3o_loss(new.sum(-1), batch.old_logps, batch.ref_logps, batch.scores)
    theirs = run(objective, new, batch, values)
    for name in ("gap_logratio", "ratio_mean", "ratio_var", "approx_kl", "tie_rate"):
        close(getattr(theirs, name), getattr(ours, name), 1e-13)
    assert 0 < theirs.tie_rate < 1


@each_objective
def test_before_the_first_step_nothing_is_clipped_and_nothing_has_drifted(objective):
    new, batch, values = ragged(spread=0.0)
    terms = run(objective, new, batch, values)
    assert terms.clip_fraction == 0 and terms.ratio_mean == 1 and terms.ratio_var == 0 and terms.gap_logratio == 0 and terms.approx_kl == 0
    assert terms.advantage_abs > 0


@pytest.mark.parametrize("objective", ["rloo", "grpo", "dr_grpo", "gspo"])
def test_clip_fraction_counts_the_gradients_that_are_gone(objective):
    new, batch, _ = ragged()
    clip = 0.05 if objective == "gspo" else 0.2
    leaf = new.clone().requires_grad_()
    terms = run(objective, leaf, batch, clip_range=clip, kl_coef=0.0)
    (found,) = torch.autograd.grad(terms.loss, leaf)
    gone = (found == 0) & batch.completion_mask
    share = gone.any(-1).double().mean() if objective in ("rloo", "gspo") else gone.sum() / batch.completion_mask.sum()
    close(terms.clip_fraction, float(share), 1e-7)


@each_objective
def test_float32_agrees_with_float64_and_half_precision_is_computed_in_float32(objective):
    new, batch, values = ragged(spread=0.1)
    names = ("old_token_logps", "ref_token_logps", "scores", "values")
    for dtype in (torch.float32, torch.bfloat16):
        low = batch._replace(**{name: getattr(batch, name).to(dtype) for name in names})
        high = batch._replace(**{name: getattr(low, name).double() for name in names})
        narrow = run(objective, new.to(dtype), low, values.to(dtype))
        wide = run(objective, new.to(dtype).double(), high, values.to(dtype).double())
        assert narrow.loss.dtype == torch.float32
        assert_close(narrow.loss.double(), wide.loss, rtol=2e-5, atol=2e-5)


@each_objective
@pytest.mark.parametrize("nats", [60.0, -60.0, 300.0])
def test_loss_and_gradient_are_finite_however_far_away(objective, nats):
    new, batch, values = ragged()
    batch = batch._replace(**{name: getattr(batch, name).float() for name in ("old_token_logps", "ref_token_logps", "scores", "values")})
    away = (new.float() + nats * torch.tensor([1.0, -1.0, 0.0])[:, None] * batch.completion_mask).requires_grad_()
    terms = run(objective, away, batch, values.float())
    (found,) = torch.autograd.grad(terms.loss, away)
    assert found.isfinite().all() and all(value.isfinite() for value in terms if value is not None)


@pytest.mark.parametrize("objective", INVARIANT)
def test_gaps_of_scores_are_scores(objective):
    new, batch, _ = ragged()
    judged = batch._replace(scores=None, gaps=batch.scores.unsqueeze(2) - batch.scores.unsqueeze(1))
    close(gradients(objective, new, judged), gradients(objective, new, batch), 1e-12)


@pytest.mark.parametrize("objective", ["online_dpo", "online_ipo"])
def test_a_tie_pulls_a_pair_to_the_references_odds(objective):
    """TRL would call the first response the better one: a preference that nobody has."""
    new, batch, _ = ragged(prompts=1, count=2)
    tied = batch._replace(scores=torch.zeros_like(batch.scores))
    lead = float((new - batch.ref_token_logps).sum(-1) @ torch.tensor([1.0, -1.0], dtype=torch.float64))
    found = per_response(gradients(objective, new, tied), batch.completion_mask)[0]
    assert abs(lead) > 0.1 and math.copysign(1, float(found[0])) == math.copysign(1, lead)
    close(found.sum(), 0.0, 1e-13)
    level = batch.ref_token_logps + 0.0
    assert not gradients(objective, level, tied).abs().max() > 1e-13


def test_reinforce_may_subtract_the_batchs_mean():
    new, batch, _ = ragged()
    reward = batch.scores - BETA * (batch.old_logps - batch.ref_logps)
    found = per_response(gradients("reinforce", new, batch, baseline="batch"), batch.completion_mask)
    close(found, -(reward - reward.mean()) / reward.numel(), 1e-13)


# ---- bad input --------------------------------------------------------------------------------------------------------------------------


def test_errors_name_the_field_the_value_and_the_fix():
    new, batch, values = ragged()
    for call, message in (
        (lambda: rloo(new, batch._replace(scores=None)), "neither scores nor gaps: score the responses in rollout_step"),
        (lambda: rloo(new[:, :, :4], batch), r"token_logps has shape \(4, 3, 4\), but the experience's responses have \(4, 3, 5\)"),
        (lambda: ppo(new, batch._replace(values=None), values=values), "the experience has no values"),
        (lambda: ppo(new, batch, values=values, gae_lambda=-0.1), "gae_lambda is -0.1: choose a value in"),
        (lambda: grpo(new, batch, clip_range=0.0), "clip_range is 0.0"),
        (lambda: grpo(new, batch, clip_range_high=0.0), "clip_range_high is 0.0"),
        (lambda: rebel(new, batch, eta=0.0), "eta is 0.0, but is a step size"),
        (lambda: reinforce(new, batch, baseline="mean"), "baseline is 'mean', which is not a choice: write None or \"batch\""),
        (lambda: online_dpo(new, batch, kl_coef=0.0), "kl_coef is 0.0, but it is online_dpo's temperature: choose a value above 0"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_every_relative_takes_a_price_of_kl_and_says_where_it_is_from():
    for name, function in OBJECTIVES.items():
        assert "kl_coef" in inspect.signature(function).parameters, name
        said = inspect.getdoc(function) if name != "ppo" else inspect.getdoc(inspect.getmodule(function))
        assert "Source" in said and ("arXiv" in said), name
