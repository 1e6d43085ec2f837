"""P3O's clips and the cap of its weights, E1 to E9: where a pair has no gradient, and what it is elsewhere.

The power of these tests, found by planting one error at a time in objectives.py:
    planted error                        first test that fails, without test_ (cases that fail)
    cap not in log space                 e7_everything_is_finite_at_60_nats (18)
    pair range: mean, not RMS            each_response_may_have_its_own_range (1)
    length, not its root                 sqrt_length_clip_range (1)
    approx_kl of the inverse ratio       e7_everything_is_finite_at_60_nats (20)
    clip_fraction counts the other side  e1_e3_joint_dead_zone_and_the_gradient_outside_it (8)
"""

from __future__ import annotations

import math

import pytest
import torch
from p3o_terms import box, coefs_of, loss_of, random_rows
from tabular import BETA, PAIRS, close, coefficients, each_distance, each_form, off_policy
from torch.testing import assert_close

from p3o_lightning.objectives import p3o_loss, p3o_token_loss, sqrt_length_clip_range
from p3o_lightning.relative_terms import clipped_gain


@off_policy
def test_e1_e3_joint_dead_zone_and_the_gradient_outside_it(world):
    coefs = coefs_of(world, kl_coef=BETA)
    shaped, logratio = world.rewards - BETA * (world.logps - world.ref_logps), world.logps - world.old_logps
    dead = wrong_way = 0
    for (first, second), coef in zip(PAIRS.tolist(), coefs.tolist(), strict=True):
        q, drift = (shaped[first] - shaped[second]).item(), (logratio[first] - logratio[second]).item()
        if (q > 0 and drift > 0.2) or (q < 0 and drift < -0.2):
            assert coef == [0.0, 0.0]
            dead += 1
        else:
            wrong_way += abs(drift) > 0.2  # beyond the box, on the side that the reward pulls back from
            weight = box(math.exp(logratio[first] + logratio[second]), 1 / 10, 10)
            close(coef, [-weight * q / 2, weight * q / 2], 1e-13)
    assert dead > 20 and wrong_way > 20
    assert loss_of(world, kl_coef=BETA)(world.logps[PAIRS]).clip_fraction.item() == pytest.approx(dead / 225)


@off_policy
@pytest.mark.parametrize("cross_weight", [True, False])
def test_e2_separate_dead_zones_and_the_gradient_outside_them(world, cross_weight):
    settings = {"clipping": "separate", "cross_weight": cross_weight, "kl_coef": BETA}
    coefs = coefs_of(world, **settings)
    shaped, ratio = world.rewards - BETA * (world.logps - world.ref_logps), (world.logps - world.old_logps).exp()
    dead = wrong_way = 0
    for pair, coef in zip(PAIRS.tolist(), coefs.tolist(), strict=True):
        for own in (0, 1):
            w, other = ratio[pair[own]].item(), ratio[pair[1 - own]].item()
            q = (shaped[pair[own]] - shaped[pair[1 - own]]).item()  # from the own side: > 0 if this response should gain
            if (q > 0 and w > 1.2) or (q < 0 and w < 0.8):
                assert coef[own] == 0.0
                dead += 1
            else:
                wrong_way += not 0.8 < w < 1.2
                close(coef[own], -(box(other, 1 / 10, 10) if cross_weight else 1.0) * q * w / 2, 1e-13)
    assert dead > 20 and wrong_way > 20
    assert loss_of(world, **settings)(world.logps[PAIRS]).clip_fraction.item() == pytest.approx(dead / 450)


@each_distance
def test_e4_e5_joint_coefficients_of_a_pair_cancel_and_separate_ones_need_not(world):
    close(coefs_of(world, kl_coef=BETA).sum(-1), torch.zeros(225), 1e-14)
    if not torch.equal(world.logits, world.old_logits):
        assert coefs_of(world, kl_coef=BETA, clipping="separate").sum(-1).abs().max() > 0.1


@each_form
@off_policy
def test_e6_clipping_only_lowers_the_objective_of_each_pair(form, world):
    for pair in PAIRS[::4]:
        draws = pair[None]
        clipped, free = (loss_of(world, draws, kl_coef=BETA, clip_range=e, **form)(world.logps[draws]).loss for e in (0.2, math.inf))
        assert clipped >= free - 1e-15


@pytest.mark.parametrize("nats, weight", [(60.0, 10.0), (-60.0, 0.1)])
def test_e7_the_cap_scales_by_exactly_c_or_its_inverse(nats, weight):
    old = torch.zeros(1, 2, dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    # joint: both drift by `nats`, so D - D_old = 0 is inside the box and the weight is the cap: -+ c q / 2
    joint = coefficients(lambda leaf: p3o_loss(leaf, old, old, scores, kl_coef=0.0), old + nats)
    close(joint, [[-weight / 2, weight / 2]], 1e-13)
    # separate: only the second drifts; the first is at ratio 1 and is weighed by the second's cap
    separate = coefficients(
        lambda leaf: p3o_loss(leaf, old, old, scores, kl_coef=0.0, clipping="separate"),
        old + torch.tensor([0.0, nats], dtype=torch.float64),
    )
    close(separate[0, 0], -weight / 2, 1e-13)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [(3.0, -2.0), (-2.0, 3.0), (1.0, 1.0)])
def test_e7_everything_is_finite_at_60_nats(form, dtype, scores):
    corners = [(a, b) for a in (-60.0, 0.0, 60.0) for b in (-60.0, 0.0, 60.0)]
    old = torch.zeros(len(corners), 2, dtype=dtype)
    logps = torch.tensor(corners, dtype=dtype).requires_grad_()
    rewards = torch.tensor([scores] * len(corners))
    lone = p3o_token_loss(logps[..., None], old[..., None], torch.ones(len(corners), 2, 1, dtype=torch.bool), old, rewards)
    wide = {"clip_range": math.inf, "weight_cap": 1e6}
    for terms in (p3o_loss(logps, old, old, rewards, **form), p3o_loss(logps, old, old, rewards, **wide, **form), lone):
        assert all(value.isfinite() for value in terms)
        assert torch.autograd.grad(terms.loss, logps, retain_graph=True)[0].isfinite().all()


def test_e8_the_joint_box_does_not_see_common_drift():
    old, scores = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert p3o_loss(old + math.log(20), old, old, scores).clip_fraction == 0
    assert p3o_loss(old + math.log(20), old, old, scores, clipping="separate").clip_fraction == 0.5


@each_form
def test_e9_exactly_at_the_edge_the_gradient_stays(form):
    old, scores = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    edge = torch.tensor([[0.5 if form["clipping"] == "joint" else math.log(1.5), 0.0]], dtype=torch.float64)
    coefs = coefficients(lambda leaf: p3o_loss(leaf, old, old, scores, kl_coef=0.0, clip_range=0.5, **form), edge)
    close(coefs[0, 0], -edge[0, 0].exp() / 2, 1e-13)


@pytest.mark.parametrize("side", [1, -1])
def test_e9_so_does_that_of_tokens_and_of_ppos_ratios(side):
    edge = torch.tensor([[[0.5 * side], [0.0]]], dtype=torch.float64, requires_grad=True)
    mask, scores, old = torch.ones(1, 2, 1, dtype=torch.bool), torch.tensor([[side, 0.0]]), torch.zeros(1, 2, 1)
    loss = p3o_token_loss(edge, old, mask, torch.zeros(1, 2), scores, kl_coef=0.0, clip_range=0.5, weight_cap=1).loss
    assert torch.autograd.grad(loss, edge)[0].flatten().tolist() == [-side / 2, side / 2]
    ratio = torch.tensor(1 + 0.5 * side, requires_grad=True)
    assert torch.autograd.grad(clipped_gain(ratio, torch.tensor(float(side)), 0.5)[0], ratio)[0] == side


def test_each_response_may_have_its_own_range():
    # separate: w = (1.3, 0.7), q = 1: response 1 is dead beyond 1 + e_1, response 2 below 1 - e_2
    old, scores = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    logps = torch.tensor([[1.3, 0.7]]).log()
    for ranges, alive in (((0.2, 0.4), [False, True]), ((0.4, 0.2), [True, False])):
        own = torch.tensor([ranges])
        coefs = coefficients(lambda leaf, e=own: p3o_loss(leaf, old, old, scores, kl_coef=0.0, clipping="separate", clip_range=e), logps)
        assert (coefs != 0)[0].tolist() == alive
    # joint: ranges 3 and 4 make sqrt((9 + 16) / 2) = 3.5355 for the pair
    for drift, dead in ((3.53, 0), (3.54, 1)):
        moved = torch.tensor([[drift, 0.0]])
        assert p3o_loss(moved, old, old, scores, kl_coef=0.0, clip_range=torch.tensor([[3.0, 4.0]])).clip_fraction == dead


@each_form
def test_equal_ranges_are_one_range(form):
    logps, old, ref, scores = random_rows(8, 3)
    assert_close(
        p3o_loss(logps, old, ref, scores, clip_range=torch.full_like(old, 0.3), **form),
        p3o_loss(logps, old, ref, scores, clip_range=0.3, **form),
    )


def test_sqrt_length_clip_range():
    ranges = sqrt_length_clip_range(0.2, torch.tensor([[64, 256], [16, 0]]), 64)
    assert_close(ranges, torch.tensor([[0.2, 0.4], [0.1, 0.2 / 8]]))  # an empty response counts as one token
    logps, old, ref, scores = random_rows(2, 2)
    assert p3o_loss(logps, old, ref, scores, clip_range=ranges).loss.dtype == torch.float64
