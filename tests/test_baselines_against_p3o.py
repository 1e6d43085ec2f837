"""How the relatives of P3O relate to it, exactly: what is P3O (C) and what is P3O with another gap, weight or factor (H)."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from baseline_batches import coefs_of, expected_gradient, of_world, p3o_coefs, per_response
from tabular import (
    BETA,
    MASK,
    PAIRS,
    World,
    close,
    coefficients,
    each_distance,
    gradient,
    kl_objective,
    make_world,
    off_policy,
    sequence_logps,
    token_logps,
)

from p3o_lightning.baselines import copg, dr_grpo, grpo, gspo, online_dpo, online_ipo, rebel, reinforce, rloo
from p3o_lightning.objectives import p3o_loss

FREE = {"clip_range": math.inf}
PLAIN = {"clip_range": math.inf, "weight_cap": 1.0}  # P3O's pairwise form, neither weighted nor clipped


# ---- C: what is P3O ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_c1_c4_on_policy_rloo_is_p3o(count):
    world, draws = make_world(0.0), torch.randint(15, (40, count), generator=torch.Generator().manual_seed(count))
    close(coefs_of(rloo, world, draws, kl_coef=BETA), p3o_coefs(world, draws, kl_coef=BETA), 1e-13)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_c2_c5_on_policy_dr_grpo_is_k_minus_1_over_k_of_p3o(count):
    world, draws = make_world(0.0), torch.randint(15, (40, count), generator=torch.Generator().manual_seed(count))
    ours = p3o_coefs(world, draws, kl_coef=0.0)
    close(coefs_of(dr_grpo, world, draws, kl_coef=0.0), (count - 1) / count * ours, 1e-13)
    close(coefs_of(dr_grpo, world, draws, kl_coef=0.0, divisor=7), (count - 1) / count * ours / 7, 1e-13)


def test_c3_a_batchs_mean_with_the_response_itself_in_it_shortens_the_gradient_of_reinforce():
    """One prompt of two responses a batch: (N - 1) / N of it is a half."""
    world, total = make_world(0.0), torch.zeros(15, 3, dtype=torch.float64)
    for row, chance in zip(PAIRS, world.old_logps.exp()[PAIRS].prod(-1), strict=True):
        new, batch = of_world(world, row[None])
        coefs = coefficients(lambda leaf, b=batch: reinforce(leaf, b, kl_coef=BETA, baseline="batch"), new)
        total = total.index_add(0, row, chance * coefs[0])
    found = gradient(lambda logits: (token_logps(logits) * total).sum(), world.logits)
    close(found, -gradient(kl_objective(world), world.logits) / 2, 1e-13)


@pytest.mark.parametrize("function", [rloo, reinforce])
def test_c3_on_policy_the_expected_gradient_is_that_of_reward_less_kl(function):
    world = make_world(0.0)
    found = expected_gradient(lambda leaf, batch: function(leaf, batch, kl_coef=BETA), world)
    close(found, -gradient(kl_objective(world), world.logits), 1e-13)


@off_policy
def test_c7_off_policy_rloo_is_not_p3o(world):
    for form in ({"clipping": "joint"}, {"clipping": "separate"}):
        ours = p3o_coefs(world, kl_coef=0.0, clip_range=math.inf, weight_cap=math.inf, **form)
        assert (coefs_of(rloo, world, kl_coef=0.0, **FREE) - ours).abs().max() > 1e-2


@each_distance
def test_c8_rloo_of_two_is_p3o_with_separate_clips_of_the_own_ratio(world):
    settings = {"clipping": "separate", "cross_weight": False, "kl_source": "rollout", "kl_coef": BETA}
    new, batch = of_world(world)
    ours = p3o_loss(new.sum(-1), batch.old_logps, batch.ref_logps, batch.scores, **settings)
    theirs = rloo(new, batch, kl_coef=BETA)
    close(theirs.loss, ours.loss, 1e-13)
    close(coefs_of(rloo, world, kl_coef=BETA), p3o_coefs(world, **settings), 1e-13)
    close(theirs.clip_fraction, ours.clip_fraction, 1e-13)


@off_policy
@pytest.mark.parametrize("count", [3, 4])
def test_c8_rloo_of_more_is_that_too_where_nothing_is_clipped(world, count):
    draws = torch.randint(15, (40, count), generator=torch.Generator().manual_seed(count))
    settings = {"clipping": "separate", "cross_weight": False, "kl_source": "rollout", "kl_coef": BETA}
    close(coefs_of(rloo, world, draws, kl_coef=BETA, **FREE), p3o_coefs(world, draws, **settings, **FREE), 1e-13)
    clipped_apart = coefs_of(rloo, world, draws, kl_coef=BETA) - p3o_coefs(world, draws, **settings)
    assert clipped_apart.abs().max() > 1e-3  # a pair's term leaves the minimum, not the response's sum of them


# ---- H: what is related to P3O ----------------------------------------------------------------------------------------------------------


def test_h1_grpo_of_two_keeps_the_sign_of_the_gap_alone():
    """On-policy, K = 2: -sign(r1 - r2) (s1 - s2) / (2 sqrt 2), each s over its own length; the size of the gap is lost."""
    world = make_world(0.0)
    new, batch = of_world(world, scores=1e9 * world.rewards[PAIRS])  # so that 1e-4 beside the standard deviation is nothing
    coefs = coefficients(lambda leaf: grpo(leaf, batch, kl_coef=0.0), new)
    sign = (world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]).sign()
    wanted = -sign[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64) / (2 * math.sqrt(2))
    close(coefs * MASK[PAIRS].sum(-1, keepdim=True), wanted[..., None] * MASK[PAIRS], 1e-11)


def test_h2_gspo_of_two_is_that_over_each_length_also_where_it_clips_nothing_far_away():
    """On-policy as H1. GSPO's ratio is one number a response: off-policy its tokens share one coefficient, GRPO's do not."""
    world = make_world(0.0)
    new, batch = of_world(world, scores=1e9 * world.rewards[PAIRS])
    lengths = MASK[PAIRS].sum(-1)
    sign = (world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]).sign()
    wanted = -sign[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64) / (2 * math.sqrt(2)) / lengths
    close(per_response(coefficients(lambda leaf: gspo(leaf, batch, kl_coef=0.0), new), MASK[PAIRS]), wanted, 1e-11)
    away, batch = of_world(make_world(0.3), scores=1e9 * world.rewards[PAIRS])
    ratio = ((away - batch.old_token_logps).sum(-1) / lengths).exp()
    close(per_response(coefficients(lambda leaf: gspo(leaf, batch, kl_coef=0.0, **FREE), away), MASK[PAIRS]), wanted * ratio, 1e-11)
    token = coefficients(lambda leaf: grpo(leaf, batch, kl_coef=0.0, **FREE), away)
    assert (token - token[..., :1] * MASK[PAIRS]).abs().max() > 1e-2


@each_distance
def test_h3_rebel_is_4_over_eta_of_p3o_with_the_kl_to_the_old_policy(world):
    eta = 2.5
    shaped = world.rewards - BETA * (world.old_logps - world.ref_logps)
    old, scores = world.old_logps[PAIRS], shaped[PAIRS]
    ours = coefficients(lambda leaf: p3o_loss(leaf, old, old, scores, kl_coef=1 / eta, **PLAIN), world.logps[PAIRS])
    close(coefs_of(rebel, world, kl_coef=BETA, eta=eta), 4 / eta * ours, 1e-12)


def test_h3_the_first_step_of_rebel_is_4_over_eta_of_p3o_as_it_is():
    world = make_world(0.0)
    close(coefs_of(rebel, world, kl_coef=BETA, eta=2.5), 4 / 2.5 * p3o_coefs(world, kl_coef=BETA), 1e-13)


@each_distance
def test_h4_copg_is_twice_p3o_without_weight_and_clip_and_a_regression_of_the_gap(world):
    coefs = coefs_of(copg, world, kl_coef=BETA)
    close(coefs, 2 * p3o_coefs(world, kl_coef=BETA, **PLAIN), 1e-13)

    class Terms:
        def __init__(self, loss):
            self.loss = loss

    def regression(logps):
        lead = logps - world.ref_logps[PAIRS]
        gap = world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]
        return Terms((gap - BETA * (lead[:, 0] - lead[:, 1])).square().mean())

    close(coefs, coefficients(regression, world.logps[PAIRS]) / (2 * BETA), 1e-12)


def test_h4_at_the_optimum_copg_is_silent_whoever_sampled():
    world = make_world(2.0)
    fitting = BETA * (world.logps - world.ref_logps) + 3.0  # rewards whose optimum is the present policy
    new, batch = of_world(world, scores=fitting[PAIRS])
    close(coefficients(lambda leaf: copg(leaf, batch, kl_coef=BETA), new), torch.zeros_like(new), 1e-12)


def odds(world: World):
    """D log pi/pi_ref of each pair, and its gap."""
    lead = (world.logps - world.ref_logps)[PAIRS]
    return lead[:, 0] - lead[:, 1], world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]


def as_gaps(q):
    """A gap for each pair as the table that p3o_loss takes."""
    return torch.stack([torch.stack([0 * q, q], -1), torch.stack([-q, 0 * q], -1)], -2)


@each_distance
def test_h5_online_dpo_is_p3o_with_a_gap_that_saturates(world):
    """q = 2 beta (label - sigmoid(beta h)): 2 beta sigmoid(-beta h) for the better response; the size of the reward gap is lost."""
    lead, gap = odds(world)
    winner = gap.sign()
    q = winner * 2 * BETA / (1 + (BETA * winner * lead).exp())
    close(coefs_of(online_dpo, world, kl_coef=BETA), p3o_coefs(world, kl_coef=0.0, gaps=as_gaps(q), **PLAIN), 1e-12)
    louder = world._replace(rewards=7 * world.rewards)
    close(coefs_of(online_dpo, louder, kl_coef=BETA), coefs_of(online_dpo, world, kl_coef=BETA), 1e-13)


@each_distance
def test_h6_soft_labels_are_p3o_with_the_difference_of_two_beliefs(world):
    lead, gap = odds(world)
    q = 2 * BETA * (1 / (1 + (-gap).exp()) - 1 / (1 + (-BETA * lead).exp()))
    close(coefs_of(online_dpo, world, kl_coef=BETA, soft_labels=True), p3o_coefs(world, kl_coef=0.0, gaps=as_gaps(q), **PLAIN), 1e-12)


@each_distance
def test_h7_online_ipo_is_4_over_tau_of_p3o_with_a_gap_of_one_half(world):
    _, gap = odds(world)
    ours = p3o_coefs(world, kl_coef=BETA, gaps=as_gaps(gap.sign() / 2), **PLAIN)
    close(coefs_of(online_ipo, world, kl_coef=BETA), 4 / BETA * ours, 1e-12)


def preferences(seed: int = 3, transitive: bool = False):
    """P(y > y') of any kind: a table whose log-odds are antisymmetric."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(15, 15, dtype=torch.float64, generator=draw)
    if transitive:
        table = table[:, :1] - table[:, :1].mT
    return (table - table.mT).sigmoid()


@pytest.mark.parametrize("transitive", [True, False], ids=["h8 transitive", "h9 intransitive"])
def test_h8_h9_with_a_preference_for_a_gap_p3o_is_twice_nash_self_play(transitive):
    """E[(P(y > y') - 1/2) s(y)], y' from the policy itself (Nash-MD's mixture 0)."""
    world, table = make_world(0.0), preferences(transitive=transitive)
    if not transitive:
        assert any(table[i, j] > 0.5 and table[j, k] > 0.5 and table[k, i] > 0.5 for i, j, k in permutations(range(15), 3))  # a cycle
    opponent = world.old_logps.exp()
    nash = gradient(lambda logits: sequence_logps(logits).exp() @ (table - 0.5) @ opponent, world.logits)

    def ours(leaf, batch):
        gaps = as_gaps(2 * table[PAIRS[:, 0], PAIRS[:, 1]] - 1)
        return p3o_loss(leaf.sum(-1), batch.old_logps, batch.ref_logps, gaps=gaps, kl_coef=0.0)

    close(expected_gradient(ours, world), -2 * nash, 1e-13)


def test_h10_the_first_step_of_sppo_is_2_eta_of_p3o_and_later_ones_are_not_contrastive():
    """SPPO with one opponent: the sum over both responses of (log pi/pi_old - eta (P - 1/2))^2."""
    eta, table = 1.7, preferences()
    chance = table[PAIRS[:, 0], PAIRS[:, 1]]

    class Terms:
        def __init__(self, loss):
            self.loss = loss

    def sppo_of(world):
        def sppo(logps):
            gained = logps - world.old_logps[PAIRS]
            wanted = eta * (torch.stack([chance, 1 - chance], -1) - 0.5)
            return Terms((gained - wanted).square().sum(-1).mean())

        return coefficients(sppo, world.logps[PAIRS])

    world = make_world(0.0)
    close(sppo_of(world), 2 * eta * p3o_coefs(world, kl_coef=0.0, gaps=as_gaps(2 * chance - 1)), 1e-13)
    assert sppo_of(make_world(0.3)).sum(-1).abs().max() > 1e-2
