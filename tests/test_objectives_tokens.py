"""The token form of P3O's loss, G6 and G7, and how it relates to the joint one.

The power of these tests, found by planting one error at a time in objectives.py:
    planted error                        first test that fails, without test_ (cases that fail)
    missing 1/2 (token)                  g6_token_loss_starts_with_the_gradient_of_the_joint_loss_and_value_0 (5)
    weight not detached (token)          token_loss_dead_zone_and_the_gradient_outside_it (2)
    q not detached (token)               token_loss_dead_zone_and_the_gradient_outside_it (2)
    wrong clip side (token)              token_loss_dead_zone_and_the_gradient_outside_it (2)
    kl_source swapped (token)            token_loss_without_a_clip_is_the_joint_loss_without_a_clip (4)
    mask ignored                         g6_token_loss_starts_with_the_gradient_of_the_joint_loss_and_value_0 (6)
"""

from __future__ import annotations

import math

import pytest
import torch
from p3o_terms import box, coefs_of, loss_of
from tabular import BETA, LENGTHS, MASK, PAIRS, World, all_draws, close, coefficients, make_world, off_policy, token_logps
from torch.testing import assert_close

from p3o_lightning.objectives import kl_estimates, p3o_token_loss


def token_batch(world: World, draws):
    return token_logps(world.logits)[draws], token_logps(world.old_logits)[draws], MASK[draws]


def test_g6_token_loss_starts_with_the_gradient_of_the_joint_loss_and_value_0():
    world = make_world(0.0)
    new, old, mask = token_batch(world, PAIRS)
    coefs = coefficients(lambda leaf: p3o_token_loss(leaf, old, mask, world.ref_logps[PAIRS], world.rewards[PAIRS], kl_coef=BETA), new)
    close(coefs, coefs_of(world, kl_coef=BETA)[..., None] * mask, 1e-13)
    assert p3o_token_loss(new, old, mask, world.ref_logps[PAIRS], world.rewards[PAIRS], kl_coef=BETA).loss.abs() <= 1e-15


@off_policy
def test_token_loss_without_a_clip_is_the_joint_loss_without_a_clip(world):
    draws = all_draws(3)[::7]
    new, old, mask = token_batch(world, draws)
    for source in ("current", "rollout"):
        settings = {"kl_coef": BETA, "kl_source": source, "clip_range": math.inf}
        token = p3o_token_loss(new, old, mask, world.ref_logps[draws], world.rewards[draws], **settings)
        whole = loss_of(world, draws, **settings)(world.logps[draws])
        for field, value in token._asdict().items():
            close(value, getattr(whole, field), 1e-12)


@off_policy
def test_token_loss_dead_zone_and_the_gradient_outside_it(world):
    new, old, mask = token_batch(world, PAIRS)
    ranges = torch.tensor([[0.2, 0.3]], dtype=torch.float64).expand(225, 2)
    settings = {"kl_coef": BETA, "clip_range": ranges}
    loss = lambda leaf: p3o_token_loss(leaf, old, mask, world.ref_logps[PAIRS], world.rewards[PAIRS], **settings)  # noqa: E731
    coefs = coefficients(loss, new)
    shaped, logratio = world.rewards - BETA * (world.logps - world.ref_logps), world.logps - world.old_logps
    dead = tokens = 0
    value = 0.0
    for row, pair in enumerate(PAIRS.tolist()):
        weight = box(math.exp(logratio[pair[0]] + logratio[pair[1]]), 1 / 10, 10)
        for own, eps in ((0, 0.2), (1, 0.3)):
            q = (shaped[pair[own]] - shaped[pair[1 - own]]).item()
            for t in range(int(LENGTHS[pair[own]])):
                drift, coef = (new[row, own, t] - old[row, own, t]).item(), coefs[row, own, t].item()
                tokens += 1
                value -= weight / 2 * min(q * drift, q * box(drift, -eps, eps)) / 225
                if (q > 0 and drift > eps) or (q < 0 and drift < -eps):
                    assert coef == 0.0
                    dead += 1
                else:
                    close(coef, -weight * q / 2, 1e-13)
    assert (coefs[~mask] == 0).all()
    assert 20 < dead < tokens - 20
    assert loss(new).clip_fraction.item() == pytest.approx(dead / tokens)
    close(loss(new).loss, value, 1e-13)


@pytest.mark.parametrize("filler", [7.0, math.inf, math.nan])
def test_g7_what_padding_holds_and_how_much_there_is_of_it_changes_nothing(filler):
    world = make_world(0.3)
    draws = all_draws(2)[::5]
    new, old, mask = token_batch(world, draws)
    rest = (world.ref_logps[draws], world.rewards[draws])
    padding = torch.full((*mask.shape[:2], 4), filler, dtype=torch.float64)

    def padded(tokens):
        return torch.cat([tokens.masked_fill(~mask, filler), padding], -1)

    long_mask = torch.cat([mask, torch.zeros_like(padding, dtype=torch.bool)], -1)
    plain = p3o_token_loss(new, old, mask, *rest)
    assert_close(p3o_token_loss(padded(new), padded(old), long_mask, *rest), plain, rtol=1e-14, atol=1e-14)
    coefs = coefficients(lambda leaf: p3o_token_loss(leaf, old, mask, *rest), new)
    long_coefs = coefficients(lambda leaf: p3o_token_loss(leaf, padded(old), long_mask, *rest), padded(new))
    assert_close(long_coefs[..., :3], coefs, rtol=1e-14, atol=1e-14)
    assert (long_coefs[..., 3:] == 0).all()
    assert_close(kl_estimates(padded(new), padded(old), long_mask), kl_estimates(new, old, mask), rtol=1e-14, atol=1e-14)


def test_token_loss_takes_gaps():
    world = make_world(0.3)
    draws = all_draws(3)[::29]
    new, old, mask = token_batch(world, draws)
    scores = world.rewards[draws]
    gaps = scores[:, :, None] - scores[:, None, :]
    by_gaps = p3o_token_loss(new, old, mask, world.ref_logps[draws], gaps=gaps, gap_scale="rms")
    assert_close(by_gaps, p3o_token_loss(new, old, mask, world.ref_logps[draws], scores, gap_scale="rms"))
