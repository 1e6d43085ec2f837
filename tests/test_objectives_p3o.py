"""What P3O promises, checked by exact enumeration (tests/tabular.py) and by hand. Ids such as A2 number the properties; see the test names.

Clipping (E) is in test_objectives_clip.py, the token form (G) in test_objectives_tokens.py, samples of another engine (K) in
test_sampler_correction.py. The power of these tests (without D6, which trains), found by planting one error at a time in objectives.py:
    planted error                        first test that fails, without test_ (cases that fail, of all the files)
    missing 1/2                          a1_a3_on_policy_gradient_is_that_of_the_expected_reward_though_clipped (91)
    weight not detached (joint)          a2_a7_unclipped_gradient_is_that_of_the_expected_reward_from_old_samples (24)
    weight not detached (separate)       a1_a3_on_policy_gradient_is_that_of_the_expected_reward_though_clipped (34)
    q not detached                       a4_unclipped_forms_have_the_same_gradient_pair_by_pair (25)
    scores not detached                  only_the_loss_carries_a_gradient (1)
    own and other weight mixed up        a2_a7_unclipped_gradient_is_that_of_the_expected_reward_from_old_samples (22)
    joint weight w_i / w_j               a2_a7_unclipped_gradient_is_that_of_the_expected_reward_from_old_samples (27)
    wrong clip side (joint)              a9_joint_loss_has_the_gradient_of_the_authors_form (7)
    wrong clip side (separate)           c8_own_ratio_form_of_two_is_sequence_ppo_with_rloo_advantages (12)
    clamp without min (joint)            a9_joint_loss_has_the_gradient_of_the_authors_form (7)
    clamp without min (separate)         c8_own_ratio_form_of_two_is_sequence_ppo_with_rloo_advantages (10)
    no clip at all (joint)               a9_joint_loss_has_the_gradient_of_the_authors_form (5)
    box around 1 in nats (separate)      c8_own_ratio_form_of_two_is_sequence_ppo_with_rloo_advantages (5)
    KL sign                              a5_on_policy_gradient_of_each_pair (64)
    KL dropped                           a5_on_policy_gradient_of_each_pair (64)
    kl_source swapped                    a9_joint_loss_has_the_gradient_of_the_authors_form (38)
    cap removed                          a8_without_the_joint_weight_the_joint_gradient_is_biased (16)
    cap one-sided                        a9_joint_loss_has_the_gradient_of_the_authors_form (8)
    cross weight always on               c8_own_ratio_form_of_two_is_sequence_ppo_with_rloo_advantages (5)
    rms scales the reward alone          b4_scaling_reward_and_kl_price_scales_the_gradient (10)
    rms replaced by std                  rms_scale_by_hand (1)
    zero rms not guarded                 rms_scale_leaves_a_batch_of_ties_as_it_is (1)
    gaps transposed                      gaps_of_scores_are_scores (11)
    pairs with the diagonal              a1_a3_on_policy_gradient_is_that_of_the_expected_reward_though_clipped (97)
    half precision kept                  a_small_gap_at_a_large_offset_survives_half_precision (1)
    k3 of the inverse ratio              kl_estimates_k1_and_k3_are_unbiased_and_k2_nearly (2)

The first tests of many errors are off-policy ones: at pi = pi_old a weight that carries gradient (joint), mixed-up weights, the wrong clip
side and the source of the KL are invisible, so no test of the clip may be reduced to that case.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from p3o_terms import coefs_of, gradient_of, loss_of, random_rows
from tabular import (
    BETA,
    FORMS,
    MASK,
    PAIRS,
    RESPONSES,
    UNCLIPPED,
    close,
    coefficients,
    each_distance,
    each_form,
    expected_gradient,
    expected_reward,
    gradient,
    kl_objective,
    make_world,
    off_policy,
    pair_form,
    sequence_logps,
    token_logps,
)
from torch.testing import assert_close

from p3o_lightning.errors import InputError
from p3o_lightning.objectives import kl_estimates, p3o_loss, p3o_token_loss, sqrt_length_clip_range

# ---- A: the gradient is the policy gradient ---------------------------------------------------------------------------------------------


def test_the_enumerated_policy_is_a_distribution():
    world = make_world(1.0)
    assert len(RESPONSES) == 15
    close(world.logps.exp().sum(), 1.0, 1e-14)
    close(world.logps.exp() @ world.score_functions, torch.zeros(21), 1e-14)  # E[s] = 0


@each_form
def test_a1_a3_on_policy_gradient_is_that_of_the_expected_reward_though_clipped(form):
    world = make_world(0.0)
    close(gradient_of(world, **form), -gradient(expected_reward(world), world.logits), 1e-13)


@each_form
@off_policy
def test_a2_a7_unclipped_gradient_is_that_of_the_expected_reward_from_old_samples(form, world):
    close(gradient_of(world, **form, **UNCLIPPED), -gradient(expected_reward(world), world.logits), 1e-13)


@each_form
def test_a5_on_policy_gradient_of_each_pair(form):
    world = make_world(0.0)
    coefs = coefs_of(world, kl_coef=BETA, **form)
    shaped = world.rewards - BETA * (world.logps - world.ref_logps)
    for (first, second), coef in zip(PAIRS.tolist(), coefs, strict=True):
        q = shaped[first] - shaped[second]
        close(coef, [-q / 2, q / 2], 1e-13)


@off_policy
def test_a4_unclipped_forms_have_the_same_gradient_pair_by_pair(world):
    joint, separate = (coefs_of(world, kl_coef=BETA, **FORMS[form], **UNCLIPPED) for form in ("joint", "separate"))
    close(joint, separate, 1e-13)


@each_form
@pytest.mark.parametrize("count", [2, 4])
def test_a6_loss_is_zero_before_the_first_step(form, count):
    _, old, ref, scores = random_rows(7, count)
    assert abs(p3o_loss(old, old, ref, scores, **form).loss.item()) <= 1e-15


@off_policy
def test_a8_without_the_joint_weight_the_joint_gradient_is_biased(world):
    unweighted = gradient_of(world, clip_range=math.inf, weight_cap=1.0)
    assert (unweighted + gradient(expected_reward(world), world.logits)).norm() > 1e-3


@each_distance
def test_a9_joint_loss_has_the_gradient_of_the_authors_form(world):
    """Theirs clips log-odds relative to the reference, around the old ones, and takes the larger loss."""

    class Terms:
        def __init__(self, loss):
            self.loss = loss

    def authors(logps):
        relative, old_relative = logps - world.ref_logps[PAIRS], (world.old_logps - world.ref_logps)[PAIRS]
        odds, old_odds = relative[:, 0] - relative[:, 1], old_relative[:, 0] - old_relative[:, 1]
        q = (world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]] - BETA * odds).detach()
        weight = (relative - old_relative).sum(-1).exp().clamp(1 / 10, 10).detach()
        free, clipped = -q * weight * odds / 2, -q * weight * odds.clamp(old_odds - 0.2, old_odds + 0.2) / 2
        return Terms(torch.max(free, clipped).mean())

    close(coefs_of(world, kl_coef=BETA), coefficients(authors, world.logps[PAIRS]), 1e-14)


# ---- B: invariances ---------------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("gap_scale", [None, "rms"])
def test_b1_b2_b8c_a_shift_of_a_prompts_scores_or_reference_changes_nothing(form, gap_scale):
    logps, old, ref, scores = random_rows(9, 3, spread=0.3)
    shift = 10 * torch.randn(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    settings = {"kl_coef": BETA, "gap_scale": gap_scale, **form}
    plain = p3o_loss(logps, old, ref, scores, **settings)
    gradients = coefficients(lambda leaf: p3o_loss(leaf, old, ref, scores, **settings), logps)
    assert 0 < plain.clip_fraction < 1
    for moved_ref, moved_scores in ((ref, scores + shift), (ref + shift, scores)):
        moved = p3o_loss(logps, old, moved_ref, moved_scores, **settings)
        for value, wanted in zip(moved, plain, strict=True):
            assert_close(value, wanted, rtol=1e-12, atol=1e-13)
        again = coefficients(lambda leaf, r=moved_ref, s=moved_scores: p3o_loss(leaf, old, r, s, **settings), logps)
        assert_close(again, gradients, rtol=1e-12, atol=1e-13)


@each_form
@each_distance
def test_b3_swapping_a_pair_changes_nothing(form, world):
    swapped = PAIRS.flip(-1)
    plain, other = loss_of(world, kl_coef=BETA, **form), loss_of(world, swapped, kl_coef=BETA, **form)
    close(other(world.logps[swapped]).loss, plain(world.logps[PAIRS]).loss, 1e-13)
    close(other(world.logps[swapped]).q_mean, -plain(world.logps[PAIRS]).q_mean, 1e-13)
    close(coefficients(other, world.logps[swapped]).flip(-1), coefficients(plain, world.logps[PAIRS]), 1e-13)


@each_form
def test_b3_the_order_of_many_responses_changes_nothing(form):
    logps, old, ref, _ = random_rows(6, 4)
    gaps = torch.randn(6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gaps = gaps - gaps.mT
    order = torch.tensor([2, 0, 3, 1])
    plain = coefficients(lambda leaf: p3o_loss(leaf, old, ref, gaps=gaps, **form), logps)
    shuffled_gaps = gaps[:, order][:, :, order]
    shuffled = coefficients(lambda leaf: p3o_loss(leaf, old[:, order], ref[:, order], gaps=shuffled_gaps, **form), logps[:, order])
    close(shuffled, plain[:, order], 1e-13)


@each_form
@each_distance
def test_b4_scaling_reward_and_kl_price_scales_the_gradient(form, world):
    scaled = coefs_of(world, scores=3.5 * world.rewards[PAIRS], kl_coef=3.5 * BETA, **form)
    assert_close(scaled, 3.5 * coefs_of(world, kl_coef=BETA, **form), rtol=1e-12, atol=1e-14)
    rms_scaled = coefs_of(world, scores=3.5 * world.rewards[PAIRS], kl_coef=3.5 * BETA, gap_scale="rms", **form)
    assert_close(rms_scaled, coefs_of(world, kl_coef=BETA, gap_scale="rms", **form), rtol=1e-12, atol=1e-14)


def test_rms_scale_by_hand():
    # gaps 3 and -4: RMS sqrt(12.5). KL part of the first pair: 0.5 * (1 - 0) = 0.5, of the second 0. q = (2.5, -4) / sqrt(12.5).
    old = torch.zeros(2, 2)
    ref = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
    terms = p3o_loss(old, old, ref, torch.tensor([[3.0, 0.0], [0.0, 4.0]]), kl_coef=0.5, gap_scale="rms")
    assert terms.q_mean.item() == pytest.approx(-0.75 / math.sqrt(12.5), rel=1e-6)
    assert terms.q_abs.item() == pytest.approx(3.25 / math.sqrt(12.5), rel=1e-6)


def test_rms_scale_leaves_a_batch_of_ties_as_it_is():
    logps, old, ref, _ = random_rows(3, 2)
    ties = torch.ones_like(logps)
    assert_close(p3o_loss(logps, old, ref, ties, gap_scale="rms"), p3o_loss(logps, old, ref, ties))


# ---- C: relatives -----------------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_c1_c2_c4_c5_on_policy_it_is_rloo_and_dr_grpo_times_k_over_k_minus_1(form, count):
    _, old, ref, scores = random_rows(5, count)
    coefs = coefficients(lambda leaf: p3o_loss(leaf, old, ref, scores, kl_coef=BETA, **form), old)
    rewards = scores - BETA * (old - ref)
    rloo, dr_grpo = torch.empty_like(rewards), torch.empty_like(rewards)
    for row, own in enumerate(rewards.tolist()):
        for k, reward in enumerate(own):
            others = own[:k] + own[k + 1 :]
            rloo[row, k] = reward - sum(others) / len(others)
            dr_grpo[row, k] = reward - sum(own) / count
    close(coefs, -rloo / count, 1e-13)
    close(coefs, -(count / (count - 1)) * dr_grpo / count, 1e-13)


@pair_form
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_c6_off_policy_it_is_a_leave_one_out_weighted_baseline(form, count):
    """Unclipped: 1/(K(K-1)) w_i W_i (r_i - b_i), with W_i the others' total weight and b_i their weighted mean reward: O(K)."""
    logps, old, ref, scores = random_rows(5, count)
    coefs = coefficients(lambda leaf: p3o_loss(leaf, old, ref, scores, kl_coef=0.0, **form, **UNCLIPPED), logps)
    weight = (logps - old).exp()
    others = weight.sum(-1, keepdim=True) - weight
    baseline = ((weight * scores).sum(-1, keepdim=True) - weight * scores) / others
    wanted = -weight * others * (scores - baseline) / (count * (count - 1))
    assert_close(coefs, wanted, rtol=1e-13, atol=1e-13 * wanted.abs().max().item())


def test_c7_off_policy_it_is_not_importance_weighted_rloo():
    logps, old, ref, scores = random_rows(5, 3)
    coefs = coefficients(lambda leaf: p3o_loss(leaf, old, ref, scores, kl_coef=0.0, **UNCLIPPED), logps)
    rloo = -(logps - old).exp() * (scores - scores.mean(-1, keepdim=True)) / 2
    assert (coefs - rloo).abs().max() > 1e-2


@each_distance
def test_c8_own_ratio_form_of_two_is_sequence_ppo_with_rloo_advantages(world):
    class Terms:
        def __init__(self, loss):
            self.loss = loss

    advantage = world.rewards[PAIRS] - world.rewards[PAIRS.flip(-1)]  # r - mean of the others

    def ppo(logps):
        ratio = (logps - world.old_logps[PAIRS]).exp()
        return Terms(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean())

    own = loss_of(world, **FORMS["separate own ratio"])
    close(own(world.logps[PAIRS]).loss, ppo(world.logps[PAIRS]).loss, 1e-14)
    close(coefficients(own, world.logps[PAIRS]), coefficients(ppo, world.logps[PAIRS]), 1e-14)


@pair_form
def test_loss_of_many_responses_is_the_mean_of_its_pairs(form):
    logps, old, ref, scores = random_rows(4, 4)
    pairs = [p3o_loss(*(t[:, [i, j]] for t in (logps, old, ref, scores)), **form) for i in range(4) for j in range(i + 1, 4)]
    whole = p3o_loss(logps, old, ref, scores, **form)
    for field in ("loss", "clip_fraction", "q_mean", "q_abs", "gap_logratio", "tie_rate"):
        close(getattr(whole, field), sum(getattr(pair, field) for pair in pairs) / 6, 1e-13)
    close(whole.joint_weight_max, max(pair.joint_weight_max for pair in pairs), 1e-13)


# ---- gaps in place of scores ------------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("gap_scale", [None, "rms"])
def test_gaps_of_scores_are_scores(form, gap_scale):
    logps, old, ref, scores = random_rows(4, 3)
    gaps = scores[:, :, None] - scores[:, None, :]
    settings = {"gap_scale": gap_scale, **form}
    assert_close(p3o_loss(logps, old, ref, gaps=gaps, **settings), p3o_loss(logps, old, ref, scores, **settings))


@each_form
def test_intransitive_gaps_follow_self_play(form):
    """The expected gradient is that of the mean gap to an opponent who is a frozen copy, though no scalar reward has these gaps."""
    world = make_world(0.0)
    table = torch.randn(15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    table = table - table.mT
    assert (table[0, 1] + table[1, 2] + table[2, 0]).abs() > 0.1  # a cycle
    gaps = table[PAIRS[:, :, None], PAIRS[:, None, :]]
    opponent = world.old_logps.exp()
    wanted = gradient(lambda logits: sequence_logps(logits).exp() @ table @ opponent, world.logits)
    close(gradient_of(world, gaps=gaps, **form), -wanted, 1e-13)


# ---- D: the KL term ---------------------------------------------------------------------------------------------------------------------


@each_form
@each_distance
@pytest.mark.parametrize("source", ["current", "rollout"])
def test_d1_d2_unclipped_gradient_is_that_of_the_kl_objective(form, world, source):
    wanted = gradient(kl_objective(world, source), world.logits)
    close(gradient_of(world, kl_coef=BETA, kl_source=source, **form, **UNCLIPPED), -wanted, 1e-13)


@each_form
def test_d3_on_policy_both_sources_are_the_kl_gradient_though_clipped(form):
    world = make_world(0.0)
    wanted = gradient(kl_objective(world), world.logits)
    for source in ("current", "rollout"):
        close(gradient_of(world, kl_coef=BETA, kl_source=source, **form), -wanted, 1e-13)


@each_form
def test_d4_at_the_optimum_every_pair_is_silent(form):
    world = make_world(0.5)
    best = (world.ref_logps + world.rewards / BETA).log_softmax(-1)  # pi* ~ pi_ref exp(r / beta)
    terms = loss_of(world, kl_coef=BETA, **form)(best[PAIRS])
    assert terms.q_abs < 1e-13
    close(coefficients(loss_of(world, kl_coef=BETA, **form), best[PAIRS]), torch.zeros(225, 2), 1e-13)
    assert loss_of(world, kl_coef=BETA, kl_source="rollout", **form)(best[PAIRS]).q_abs > 0.1


@pytest.mark.parametrize("source", ["current", "rollout"])
@pair_form
def test_d6_clipped_training_converges_to_the_optimum(form, source):
    """beta = 2 keeps every response likely; a response of probability 1e-7 would stall exact gradient ascent as well."""
    world, beta = make_world(0.0), 2.0
    best = (world.ref_logps + world.rewards / beta).log_softmax(-1)
    logits = world.ref_logits.clone().requires_grad_()
    clipped = 0.0
    for step in range(300):
        logps = sequence_logps(logits)
        if step % 3 == 0:  # a new rollout, then three updates on it
            world = world._replace(old_logits=logits.detach().clone())
            old_logps = world.old_logps
        loss = loss_of(world, kl_coef=beta, kl_source=source, clip_range=0.1, **form)
        clipped += loss(logps[PAIRS].detach()).clip_fraction.item()
        coefs = coefficients(loss, logps[PAIRS]) * old_logps.exp()[PAIRS].prod(-1, keepdim=True)
        (direction,) = torch.autograd.grad((logps[PAIRS] * coefs).sum(), logits)
        with torch.no_grad():
            logits -= 0.5 * direction  # at 1.0 "current" still converges; "rollout", which pulls back only at the next rollout, does not
    final = sequence_logps(logits.detach())
    assert clipped > 0
    assert (final.exp() * (final - best)).sum() < 1e-6


# ---- F: ties ----------------------------------------------------------------------------------------------------------------------------


@each_form
def test_f1_f4_ties_and_identical_responses_add_nothing(form):
    logps, old, ref, scores = random_rows(6, 2, spread=0.3)
    tied = coefficients(lambda leaf: p3o_loss(leaf, old, ref, torch.ones_like(scores), kl_coef=0.0, **form), logps)
    assert (tied == 0).all()
    assert p3o_loss(logps, old, ref, torch.ones_like(scores), kl_coef=0.0, **form).tie_rate == 1
    same = [t[:, [0, 0]] for t in (logps, old, ref, scores)]
    identical = coefficients(lambda leaf: p3o_loss(leaf, *same[1:], kl_coef=BETA, **form), same[0])
    assert (identical.sum(-1) == 0).all()  # q = 0, so both parts vanish
    assert p3o_loss(*same, kl_coef=BETA, **form).q_abs == 0


@each_form
@off_policy
def test_f3_with_ties_in_the_mean_the_gradient_stays_exact_and_dropping_them_does_not(form, world):
    world = world._replace(rewards=(world.rewards > 0).double())  # right or wrong: many ties
    wanted = -gradient(kl_objective(world), world.logits)
    settings = {"kl_coef": BETA, **form, **UNCLIPPED}
    coefs = coefs_of(world, **settings)
    close(expected_gradient(coefs, PAIRS, world.old_logps, world.score_functions), wanted, 1e-13)
    kept = world.rewards[PAIRS[:, 0]] != world.rewards[PAIRS[:, 1]]
    dropped = expected_gradient(coefs * kept[:, None], PAIRS, world.old_logps, world.score_functions)
    assert torch.cosine_similarity(dropped, wanted, dim=0) < 0.999  # no rescaling repairs it


# ---- by hand ----------------------------------------------------------------------------------------------------------------------------


def by_hand(ratios, scores, **settings):
    zeros = torch.zeros(1, len(ratios), dtype=torch.float64)
    logps = torch.tensor([ratios], dtype=torch.float64).log()
    loss = lambda leaf: p3o_loss(leaf, zeros, zeros, torch.tensor([scores], dtype=torch.float64), **{"kl_coef": 0.0, **settings})  # noqa: E731
    return loss(logps), coefficients(loss, logps)[0]


def test_joint_by_hand():
    # w = (2, 1), q = 1: D - D_old = ln 2 > 0.2, so -1/2 * 2 * 0.2 and no gradient
    terms, coefs = by_hand([2.0, 1.0], [1.0, 0.0])
    close(terms.loss, -0.2, 1e-14)
    close(coefs, [0.0, 0.0], 0.0)
    # q = -1: the drift went the wrong way and is not clipped: -1/2 * 2 * (-ln 2), slope -1/2 * 2 * -1
    terms, coefs = by_hand([2.0, 1.0], [0.0, 1.0])
    close(terms.loss, math.log(2), 1e-14)
    close(coefs, [1.0, -1.0], 1e-14)
    # the KL price: log pi/pi_ref = (ln 2, 0), so q = 1 - 2 ln 2 = -0.386 and the sign has turned: -1/2 * 2 * q ln 2
    terms, _ = by_hand([2.0, 1.0], [1.0, 0.0], kl_coef=2.0)
    close(terms.loss, (2 * math.log(2) - 1) * math.log(2), 1e-14)
    close(terms.q_mean, 1 - 2 * math.log(2), 1e-14)


def test_separate_by_hand():
    # w = (2, 1), q = 1: -1/2 [1 * min(2, 1.2) + 2 * min(-1, -1)] = 0.4; response 1 is dead, response 2 has slope -1/2 * 2 * -1
    terms, coefs = by_hand([2.0, 1.0], [1.0, 0.0], clipping="separate")
    close(terms.loss, 0.4, 1e-14)
    close(coefs, [0.0, 1.0], 1e-14)
    # the cap 1.5 on the other's weight: -1/2 [1.2 - 1.5]; no cross weight: -1/2 [1.2 - 1]
    close(by_hand([2.0, 1.0], [1.0, 0.0], clipping="separate", weight_cap=1.5)[0].loss, 0.15, 1e-14)
    close(by_hand([2.0, 1.0], [1.0, 0.0], clipping="separate", cross_weight=False)[0].loss, -0.1, 1e-14)


def test_metrics_by_hand():
    # w = (2, 1, 1/2), r = (1, 0, 0). Pairs 12, 13, 23: q = 1, 1, 0; |D - D_old| = ln 2, 2 ln 2, ln 2; w w = 2, 1, 1/2.
    terms, _ = by_hand([2.0, 1.0, 0.5], [1.0, 0.0, 0.0])
    close(terms.q_mean, 2 / 3, 1e-14)
    close(terms.q_abs, 2 / 3, 1e-14)
    close(terms.clip_fraction, 2 / 3, 1e-14)  # both pairs with a gap have drifted beyond 0.2 the way it pulls
    close(terms.gap_logratio, 4 / 3 * math.log(2), 1e-14)
    close(terms.joint_weight_max, 2.0, 1e-14)
    close(terms.ratio_mean, 3.5 / 3, 1e-14)
    close(terms.ratio_var, 5.25 / 3 - (3.5 / 3) ** 2, 1e-14)  # mean of squares less squared mean
    close(terms.approx_kl, 3.5 / 3 - 1, 1e-14)  # the logarithms cancel
    close(terms.tie_rate, 1 / 3, 1e-14)
    # |q| of 12 and 21 is the same, its mean is 0
    both, _ = by_hand([1.0, 1.0], [3.0, 1.0])
    assert (both.q_mean, both.q_abs) == (2, 2)


def test_only_the_loss_carries_a_gradient():
    logps, old, ref, scores = (t.requires_grad_() for t in random_rows(4, 2))
    for form in FORMS.values():
        terms = p3o_loss(logps, old, ref, scores, **form)
        assert terms.loss.requires_grad and not any(value.requires_grad for value in terms[1:])
        others = torch.autograd.grad(terms.loss, (old, ref, scores), allow_unused=True)
        assert others == (None, None, None)


@each_distance
def test_approx_kl_has_the_right_expectation(world):
    old = world.old_logps
    estimate = 0.0
    for y in range(15):  # the metric of a response alone, drawn twice, weighed by its exact probability
        new, same = world.logps[y].expand(1, 2), old[y].expand(1, 2)
        estimate += old[y].exp() * p3o_loss(new, same, same, same).approx_kl
    close(estimate, (old.exp() * (old - world.logps)).sum(), 1e-12)


# ---- precision --------------------------------------------------------------------------------------------------------------------------


def test_a_small_gap_at_a_large_offset_survives_half_precision():
    scores = torch.tensor([[100.25, 100.0]])
    assert (scores.bfloat16()[:, 0] - scores.bfloat16()[:, 1]).item() == 0.0  # what must not happen
    logps = torch.full((1, 2), -40.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for terms in (p3o_loss(logps, logps, logps, scores), p3o_token_loss(logps[..., None], logps[..., None], mask, logps, scores)):
            assert terms.q_mean.item() == 0.25
            assert terms.loss.dtype == torch.float32


@each_form
def test_float32_agrees_with_float64(form):
    rows = random_rows(16, 3, spread=0.3)
    wide, narrow = p3o_loss(*rows, **form), p3o_loss(*(t.float() for t in rows), **form)
    for value, wanted in zip(narrow, wide, strict=True):
        assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)  # atol: inputs near -20 carry 1e-6 nats


# ---- KL estimators ----------------------------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    # tokens with pi = (1/2, 1/2, 1), pi_ref = (1/4, 1, 1/8); the third is padding
    new, ref = torch.tensor([[[0.5, 0.5, 1.0]]]).double().log(), torch.tensor([[[0.25, 1.0, 0.125]]]).double().log()
    estimates = kl_estimates(new, ref, torch.tensor([[[True, True, False]]]))
    close(estimates.k1, [[0.0]], 1e-15)  # ln 2 - ln 2
    close(estimates.k2, [[math.log(2) ** 2]], 1e-14)  # twice (ln 2)^2 / 2
    close(estimates.k3, [[(0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2))]], 1e-14)


@pytest.mark.parametrize("step", [0.05, 1.0])
def test_kl_estimates_k1_and_k3_are_unbiased_and_k2_nearly(step):
    world = make_world(step)
    new, ref = token_logps(world.logits)[:, None], token_logps(world.old_logits)[:, None]
    estimates = kl_estimates(new, ref, MASK[:, None])
    probability = world.logps.exp()
    exact = (probability * (world.logps - world.old_logps)).sum()
    expected = [(probability * k[:, 0]).sum() for k in estimates]
    close(expected[0], exact, 1e-13)
    close(expected[2], exact, 1e-13)
    assert (estimates.k2 >= 0).all() and (estimates.k3 >= 0).all()
    assert abs(expected[1] / exact - 1) < (0.1 if step == 0.05 else 1.0)  # right to second order in the step


def test_kl_estimates_are_finite_far_away():
    far = torch.tensor([[[60.0, -60.0]]])
    mask = torch.ones(1, 1, 2, dtype=torch.bool)
    assert all(k.isfinite().all() for k in kl_estimates(torch.zeros_like(far), far, mask))


# ---- errors -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clipping": "both"}, r'clipping is \'both\', .* write "joint" or "separate"'),
        ({"kl_source": "old"}, r'kl_source is \'old\', .* write "current" or "rollout"'),
        ({"gap_scale": "std"}, r'gap_scale is \'std\', .* write None or "rms"'),
        ({"clip_range": 0.0}, r"clip_range is 0\.0, .* choose a value above 0, e\.g\. 0\.2"),
        ({"clip_range": math.nan}, r"clip_range is nan"),
        ({"weight_cap": 0.5}, r"weight_cap is 0\.5, .* at least 1, e\.g\. 10"),
        ({"kl_coef": -0.1}, r"kl_coef is -0\.1, .* choose 0 \(no KL\) or above, e\.g\. 0\.05"),
        ({"scores": None}, r"scores and gaps are neither given, .* pass scores"),
        ({"gaps": torch.zeros(3, 2, 2)}, r"scores and gaps are both given, .* pass scores"),
    ],
)
def test_errors_name_the_field_the_value_and_the_fix(settings, message):
    zeros = torch.zeros(3, 2)
    with pytest.raises(InputError, match=message):
        p3o_loss(zeros, zeros, zeros, **{"scores": zeros, **settings})
    if "clipping" not in settings:
        mask = torch.ones(3, 2, 4, dtype=torch.bool)
        with pytest.raises(InputError, match=message):
            p3o_token_loss(torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), mask, zeros, **{"scores": zeros, **settings})


def test_errors_of_shape():
    """Called without the shape annotations' own check, which tests switch on and which would speak first."""
    loss, token_loss = inspect.unwrap(p3o_loss), inspect.unwrap(p3o_token_loss)
    zeros, tokens = torch.zeros(3, 2), torch.zeros(3, 2, 4)
    mask = tokens == 0
    with pytest.raises(InputError, match=r"logps has 1 response\(s\) .* draw at least 2"):
        loss(*[torch.zeros(3, 1)] * 4)
    with pytest.raises(InputError, match=r"logps has shape \(3,\), but needs the axes \(prompt, response\)"):
        loss(*[torch.zeros(3)] * 4)
    with pytest.raises(InputError, match=r"ref_logps has shape \(3, 3\), but \(3, 2\) is needed"):
        loss(zeros, zeros, torch.zeros(3, 3), zeros)
    with pytest.raises(InputError, match=r"scores has shape \(3,\), but \(3, 2\) is needed"):
        loss(zeros, zeros, zeros, torch.zeros(3))
    with pytest.raises(InputError, match=r"gaps has shape \(3, 2\), but \(3, 2, 2\) is needed"):
        loss(zeros, zeros, zeros, gaps=zeros)
    with pytest.raises(InputError, match=r"clip_range has shape \(2,\), but \(3, 2\) is needed"):
        loss(zeros, zeros, zeros, zeros, clip_range=torch.ones(2))
    with pytest.raises(InputError, match=r"token_logps has shape \(3, 2\), but needs the axes \(prompt, response, token\)"):
        token_loss(zeros, zeros, mask, zeros, zeros)
    with pytest.raises(InputError, match=r"mask has shape \(3, 2, 3\), but \(3, 2, 4\) is needed"):
        token_loss(tokens, tokens, mask[..., :3], zeros, zeros)
    with pytest.raises(InputError, match=r"old_token_logps has shape \(3, 2\)"):
        token_loss(tokens, zeros, mask, zeros, zeros)
    with pytest.raises(InputError, match=r"ref_token_logps has shape \(3, 2\)"):
        inspect.unwrap(kl_estimates)(tokens, zeros, mask)


def test_errors_of_the_length_range():
    with pytest.raises(InputError, match=r"clip_range is -1, .* choose a value above 0"):
        sqrt_length_clip_range(-1, torch.ones(1, 2, dtype=torch.long), 64)
    with pytest.raises(InputError, match=r"reference_length is 0, .* e\.g\. 128"):
        sqrt_length_clip_range(0.2, torch.ones(1, 2, dtype=torch.long), 0)
