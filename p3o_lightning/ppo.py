"""PPO with a critic, as it was used against P3O: a ratio and a clip for each token, generalised advantages, a clipped value loss.

Sources: Schulman et al. 2017, arXiv 1707.06347 (the clip); Schulman et al. 2016, arXiv 1506.02438 (the advantages); Ziegler et al. 2019,
arXiv 1909.08593 (the KL in the reward of each token, the clipped value loss); settings as in the PPO script beside the authors' P3O code,
github.com/thwu1/trlx: gamma 1, lambda 0.95, vf_coef 1, both clip ranges 0.2, advantages whitened. TRL's PPOTrainer, until its removal
before 1.16, had the same loss with vf_coef 0.1. Axes and symbols as in baselines.py; V(t) is the critic's value before token t is chosen.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p3o_lightning.batches import Experience
from p3o_lightning.errors import InputError
from p3o_lightning.objectives import Number, _precise
from p3o_lightning.relative_terms import RelativeTerms, clipped_gain, masked_mean, prepare, ratio_of, terms_of


def ppo(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    values: Float[Tensor, "prompt response token"],
    kl_coef: Number = 0.05,
    clip_range: Number = 0.2,
    value_clip_range: Number = 0.2,
    vf_coef: Number = 1.0,
    gamma: Number = 1.0,
    gae_lambda: Number = 0.95,
    whiten_advantages: bool = True,
    divisor: Number | None = None,
) -> RelativeTerms:
    """Proximal policy optimization, a bandit made sequential: the score arrives at a response's last token, the KL's price at every one.

        r_t = -kl_coef log pi_old/pi_ref(t) + [t is the last token] score;   A = generalized_advantages(r, V_old);   R = A + V_old
        L_policy = -mean_t min(w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t)
        L_value = 1/2 mean_t max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2);   L = L_policy + vf_coef L_value
    The means are over all tokens of the batch together. A shift of a prompt's scores changes the update, unless the critic knows it.

    Args:
        token_logps: nats of each sampled token under the policy being trained; carries a gradient.
        experience: with `values`, the critic's at the rollout.
        values: the critic's at present, reward units; carries a gradient.
        kl_coef: price of leaving the reference, reward units per nat.
        clip_range: eps.
        value_clip_range: eps_v, reward units: how far an update may move a value.
        vf_coef: weight of the value loss.
        gamma: discount for each token.
        gae_lambda: 1 trusts the sampled return alone, 0 the critic's next value alone.
        whiten_advantages: subtract the mean of the batch's advantages and divide by their standard deviation; R keeps them as they are.
        divisor: divide the sum over a response's tokens by this, then take the mean over responses; None divides the sum over all tokens
            by their number.
    """
    _check(value_clip_range, vf_coef, gamma, gae_lambda)
    batch = prepare(token_logps, experience)
    mask = batch.mask
    if experience.values is None:
        raise InputError("the experience has no values: PPO needs the critic's at the rollout; PairwisePolicy(objective='ppo') keeps them.")
    old_values = _precise(experience.values).detach().to(batch.now.dtype).masked_fill(~mask, 0)
    values = _precise(values).masked_fill(~mask, 0)

    rewards = token_rewards(batch.scores, batch.old, batch.ref, mask, kl_coef)
    advantages = generalized_advantages(rewards, old_values, mask, gamma=gamma, gae_lambda=gae_lambda)
    returns = advantages + old_values
    if whiten_advantages:
        advantages = _whitened(advantages, mask)

    gain, removed = clipped_gain(ratio_of(batch.drift), advantages, clip_range)
    boxed = torch.maximum(torch.minimum(values, old_values + value_clip_range), old_values - value_clip_range)
    free_error, boxed_error = (values - returns).square(), (boxed - returns).square()
    policy_loss, value_loss = -_mean(gain, mask, divisor), _mean(torch.maximum(free_error, boxed_error), mask, divisor) / 2
    return terms_of(
        policy_loss + vf_coef * value_loss,
        masked_mean(removed, mask),
        masked_mean(advantages.abs(), mask),
        batch,
        policy_loss=policy_loss.detach(),
        value_loss=value_loss.detach(),
        value_clip_fraction=masked_mean((boxed_error > free_error).to(gain.dtype), mask).detach(),
    )


def token_rewards(
    scores: Float[Tensor, "prompt response"],
    old_token_logps: Float[Tensor, "prompt response token"],
    ref_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
    kl_coef: Number,
) -> Float[Tensor, "prompt response token"]:
    """r_t: minus the price of each token's log pi_old/pi_ref, and the score at the last one; 0 outside the mask."""
    rewards = (-kl_coef * (old_token_logps - ref_token_logps)).masked_fill(~mask, 0)
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    return rewards.scatter_add(-1, last, scores.unsqueeze(-1).to(rewards.dtype))


def generalized_advantages(
    rewards: Float[Tensor, "prompt response token"],
    values: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
    *,
    gamma: Number = 1.0,
    gae_lambda: Number = 0.95,
) -> Float[Tensor, "prompt response token"]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438); nothing is worth anything after a response's end.

        A_t = delta_t + gamma gae_lambda A_{t+1},   delta_t = r_t + gamma V(t+1) - V(t)

    Args:
        rewards: r_t, reward units, 0 outside the mask.
        values: V(t), reward units, before the token is chosen; 0 outside the mask.
        mask: True on the response's tokens, which come first.
        gamma: discount for each token.
        gae_lambda: 1 gives return minus value, 0 the one-step error.
    """
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    errors = rewards + gamma * after - values
    advantage, columns = torch.zeros_like(errors[..., 0]), []
    for step in reversed(range(errors.shape[-1])):
        advantage = errors[..., step] + gamma * gae_lambda * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], -1).masked_fill(~mask, 0)


def _whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the batch; one token alone is only centred."""
    centred = values - masked_mean(values, mask)
    variance = masked_mean(centred.square(), mask)
    return (centred / (variance + 1e-8).sqrt()).masked_fill(~mask, 0)


def _mean(values: Tensor, mask: Tensor, divisor: Number | None) -> Tensor:
    return masked_mean(values, mask) if divisor is None else ((values * mask).sum(-1) / divisor).mean()


def _check(value_clip_range: Number, vf_coef: Number, gamma: Number, gae_lambda: Number) -> None:
    for name, value, valid, wanted in (
        ("value_clip_range", value_clip_range, value_clip_range > 0, "a number of reward units above 0, e.g. 0.2"),
        ("vf_coef", vf_coef, vf_coef >= 0, "0 or a weight above it, e.g. 1"),
        ("gamma", gamma, 0 < gamma <= 1, "a discount in (0, 1]; 1 is none"),
        ("gae_lambda", gae_lambda, 0 <= gae_lambda <= 1, "a value in [0, 1], e.g. 0.95"),
    ):
        if not valid:
            raise InputError(f"{name} is {value}: choose {wanted}.")
