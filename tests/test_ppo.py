"""The parts of PPO: rewards of tokens, generalised advantages, whitening, the clips of policy and value."""

from __future__ import annotations

import math

import torch
from baseline_batches import experience, gradients, ragged
from tabular import close

from p3o_lightning.ppo import generalized_advantages, ppo, token_rewards


def test_generalised_advantages_by_hand():
    """r = (0, 1), V = (1/2, 1/4), gamma 1, lambda 1/2: errors (-1/4, 3/4), so A = (-1/4 + 3/8, 3/4). A response of one token: r - V."""
    rewards = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]], dtype=torch.float64)
    values = torch.tensor([[[0.5, 0.25], [0.5, 0.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True], [True, False]]])
    close(generalized_advantages(rewards, values, mask, gae_lambda=0.5), [[[0.125, 0.75], [1.5, 0.0]]], 1e-15)
    # gamma 1/2: errors (1/8 - 1/2, 3/4), and the later one counts 1/2 x 1/2
    close(generalized_advantages(rewards, values, mask, gamma=0.5, gae_lambda=0.5), [[[-0.1875, 0.75], [1.5, 0.0]]], 1e-15)


def test_with_lambda_1_advantages_are_returns_less_values_and_with_0_one_step_errors():
    _, batch, values = ragged()
    rewards = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * batch.completion_mask
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    close(generalized_advantages(rewards, values, batch.completion_mask, gae_lambda=1.0), (to_go - values) * batch.completion_mask, 1e-13)
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    close(
        generalized_advantages(rewards, values, batch.completion_mask, gae_lambda=0.0),
        (rewards + after - values) * batch.completion_mask,
        1e-13,
    )


def test_the_score_is_paid_at_the_last_token_and_the_kl_at_every_one():
    old, ref = torch.tensor([[[-1.0, -2.0, 0.0]]]).double(), torch.tensor([[[-1.5, -1.0, 0.0]]]).double()
    mask = torch.tensor([[[True, True, False]]])
    close(token_rewards(torch.tensor([[3.0]]).double(), old, ref, mask, 0.1), [[[-0.05, 0.1 + 3.0, 0.0]]], 1e-15)


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    """Seen through the gradient on-policy: minus the advantage over the number of tokens."""
    new, batch, values = ragged(spread=0.0)
    advantage = -gradients("ppo", new, batch, values)[batch.completion_mask] * batch.completion_mask.sum()
    close(advantage.mean(), 0.0, 1e-13)
    close(advantage.var(correction=0), 1.0, 1e-6)


def test_ppo_by_hand():
    """One response of one token and its twin, w = 2: A = 1 - 0; gain min(2, 1.2); V = 1 may move 0.2 from 0, so (0.2 - 1)^2 counts."""
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 2, 1, dtype=torch.float64)
    batch = experience(zeros, zeros, mask, torch.ones(1, 2, dtype=torch.float64), values=zeros)
    terms = ppo(zeros + math.log(2), batch, values=zeros + 1, kl_coef=0.0, whiten_advantages=False)
    close(terms.policy_loss, -1.2, 1e-15)
    close(terms.value_loss, 0.32, 1e-15)
    close(terms.loss, -1.2 + 0.32, 1e-15)
    assert terms.clip_fraction == 1 and terms.value_clip_fraction == 1
