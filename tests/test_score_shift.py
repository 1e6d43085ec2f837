"""A constant added to all scores of a prompt (B6, B7): invisible to what compares responses; PPO and REINFORCE feel it."""

from __future__ import annotations

import math

import pytest
import torch
from baseline_batches import INVARIANT, expected_gradient, gradients, of_world, ragged
from tabular import (
    BETA,
    CONTEXT_OF_TOKEN,
    MASK,
    PAIRS,
    close,
    coefficients,
    each_distance,
    gradient,
    kl_objective,
    make_world,
    token_logps,
)

from p3o_lightning.baselines import ppo, reinforce
from p3o_lightning.batches import Experience


def shifted(batch: Experience, seed: int = 5) -> tuple[Experience, torch.Tensor]:
    """A constant of size 10 for each prompt, added to all its scores."""
    shift = 10 * torch.randn(len(batch.scores), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return batch._replace(scores=batch.scores + shift), shift


@pytest.mark.parametrize("objective", INVARIANT)
@pytest.mark.parametrize("spread", [0.0, 0.4], ids=["on-policy", "off-policy"])
def test_b6_a_shift_of_a_prompts_scores_changes_nothing(objective, spread):
    new, batch, _ = ragged(spread=spread)
    other, _ = shifted(batch)
    close(gradients(objective, new, other), gradients(objective, new, batch), 1e-12)


@pytest.mark.parametrize("objective", ["ppo", "reinforce"])
@pytest.mark.parametrize("spread", [0.0, 0.4], ids=["on-policy", "off-policy"])
def test_b6_but_of_ppo_and_reinforce_it_changes_the_update_of_a_batch(objective, spread):
    new, batch, _ = ragged(spread=spread)
    other, _ = shifted(batch)
    plain, moved = gradients(objective, new, batch), gradients(objective, new, other)
    cosine = torch.nn.functional.cosine_similarity(plain.flatten(), moved.flatten(), dim=0)
    assert cosine < 0.9, cosine  # not a factor: another direction


def test_b6_a_critic_that_knows_the_shift_makes_ppo_invariant():
    new, batch, values = ragged()
    other, shift = shifted(batch)
    knows = other._replace(values=(batch.values + shift.unsqueeze(-1)) * batch.completion_mask)
    close(gradients("ppo", new, knows, values), gradients("ppo", new, batch, values), 1e-12)


UNBIASED = {"gae_lambda": 1.0, "whiten_advantages": False, "divisor": 1.0, "clip_range": math.inf}  # what B7 needs


def critic_of(draws, seed=9):
    """A critic that knows nothing: any value for each of the 7 contexts."""
    table = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (table[CONTEXT_OF_TOKEN] * MASK)[draws]


def expected_ppo(world, shift=0.0, **settings):
    values = critic_of(PAIRS)

    def function(leaf, batch):
        return ppo(leaf, batch, values=batch.values, kl_coef=BETA, **{**UNBIASED, **settings})

    return expected_gradient(function, world, scores=world.rewards[PAIRS] + shift, values=values)


@each_distance
def test_ppo_with_any_critic_has_the_policy_gradient_on_policy(world):
    if torch.equal(world.logits, world.old_logits):
        close(expected_ppo(world), -gradient(kl_objective(world), world.logits), 1e-13)
    else:  # a product of the ratios of all tokens up to t would be needed: one token's ratio is PPO's approximation
        assert (expected_ppo(world) + gradient(kl_objective(world), world.logits)).norm() > 1e-3


@each_distance
def test_b7_unclipped_ppo_is_invariant_in_expectation_though_its_critic_is_fixed(world):
    plain = expected_ppo(world)
    assert plain.norm() > 0.05
    close(expected_ppo(world, shift=10.0), plain, 1e-12)


def test_b7_on_policy_reinforce_is_invariant_in_expectation():
    world = make_world(0.0)

    def function(leaf, batch):
        return reinforce(leaf, batch, kl_coef=BETA)

    close(
        expected_gradient(function, world, scores=world.rewards[PAIRS] + 10.0),
        expected_gradient(function, world),
        1e-12,
    )


@pytest.mark.parametrize("usual", [{"gae_lambda": 0.95}, {"clip_range": 0.2}], ids=str)
def test_b7_with_lambda_below_1_or_a_clip_ppo_is_not_even_invariant_in_expectation(usual):
    world = make_world(0.3)
    assert (expected_ppo(world, shift=10.0, **usual) - expected_ppo(world, **usual)).norm() > 1e-2


def test_b7_nor_with_a_mean_over_the_tokens_of_a_batch():
    """The paper's PPO divides by the batch's own tokens, which are fewer where responses are short: one prompt of two responses a batch."""
    world = make_world(0.0)
    found = []
    for shift in (0.0, 10.0):
        total = 0.0
        for row, chance in zip(PAIRS, world.old_logps.exp()[PAIRS].prod(-1), strict=True):
            new, batch = of_world(world, row[None], scores=world.rewards[row[None]] + shift, values=critic_of(row[None]))
            options = {**UNBIASED, "divisor": None}
            coefs = coefficients(lambda leaf, b=batch, o=options: ppo(leaf, b, values=b.values, kl_coef=0.0, **o), new)
            total = total + chance * torch.zeros(15, 3, dtype=torch.float64).index_add(0, row, coefs[0])
        found.append(gradient(lambda logits, t=total: (token_logps(logits) * t).sum(), world.logits))
    assert (found[0] - found[1]).norm() > 1e-2
