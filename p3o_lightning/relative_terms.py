"""What the relatives of P3O are built from: a batch made ready, the clipped surrogate, k3 of each token, and what they all report.

Axes, units and symbols as in baselines.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p3o_lightning.batches import Experience
from p3o_lightning.errors import InputError
from p3o_lightning.objectives import _LOSS_NATS, _METRIC_NATS, Number, _clip, _pairs, _precise, kl_estimates


class RelativeTerms(NamedTuple):
    """The loss and what to watch beside it. All but the loss are detached; those of the ratio are over whole responses, as in P3OTerms."""

    loss: Float[Tensor, ""]  # to minimise; carries the gradient
    clip_fraction: Float[Tensor, ""]  # share in [0, 1] of responses (or tokens, where they are clipped) whose gradient the clip removed
    advantage_abs: Float[Tensor, ""]  # mean size of the factor before grad log pi, clip aside: of responses, tokens (ppo) or pairs
    gap_logratio: Float[Tensor, ""]  # mean over pairs of |D - D_old|, nats
    ratio_mean: Float[Tensor, ""]  # mean over responses of w, no unit; 1 in expectation; each cut at exp(20)
    ratio_var: Float[Tensor, ""]  # population variance over responses of w; each cut at exp(20)
    approx_kl: Float[Tensor, ""]  # mean over responses of w - 1 - log w >= 0, nats
    tie_rate: Float[Tensor, ""]  # share in [0, 1] of pairs with exactly equal scores
    policy_loss: Float[Tensor, ""] | None = None  # ppo: the share of the loss that moves the policy
    value_loss: Float[Tensor, ""] | None = None  # ppo: the critic's squared error, before vf_coef
    value_clip_fraction: Float[Tensor, ""] | None = None  # ppo: share of tokens whose value's gradient the clip removed


class Prepared(NamedTuple):
    """A batch in float32 or wider, 0 outside the mask; only `now` carries a gradient."""

    now: Float[Tensor, "prompt response token"]  # log pi
    old: Float[Tensor, "prompt response token"]  # log pi_old
    ref: Float[Tensor, "prompt response token"]  # log pi_ref
    mask: Bool[Tensor, "prompt response token"]
    scores: Float[Tensor, "prompt response"]
    gaps: Float[Tensor, "prompt pair"]

    @property
    def drift(self) -> Float[Tensor, "prompt response token"]:
        """log w of every token."""
        return self.now - self.old

    def odds(self, token_logps: Float[Tensor, "prompt response token"]) -> Float[Tensor, "prompt pair"]:
        """Difference of the whole responses' nats, for each pair."""
        i, j = _pairs(token_logps)
        logps = token_logps.sum(-1)
        return logps[:, i] - logps[:, j]


def prepare(token_logps: Float[Tensor, "prompt response token"], experience: Experience) -> Prepared:
    """The batch with its padding at 0; errors of shape, and of an experience without scores."""
    mask = experience.completion_mask
    if token_logps.shape != mask.shape:
        raise InputError(f"token_logps has shape {tuple(token_logps.shape)}, but the experience's responses have {tuple(mask.shape)}.")
    now = _precise(token_logps).masked_fill(~mask, 0)
    old, ref = (
        _precise(values).detach().to(now.dtype).masked_fill(~mask, 0) for values in (experience.old_token_logps, experience.ref_token_logps)
    )
    i, j = _pairs(mask)
    if experience.gaps is not None:
        table = _precise(experience.gaps).detach().to(now.dtype)
        return Prepared(now, old, ref, mask, table.mean(-1), table[:, i, j])
    if experience.scores is None:
        raise InputError("the experience has neither scores nor gaps: score the responses in rollout_step.")
    scores = _precise(experience.scores).detach().to(now.dtype)
    return Prepared(now, old, ref, mask, scores, scores[:, i] - scores[:, j])


def clipped_gain(ratio: Tensor, advantage: Tensor, clip_range: Number, clip_range_high: Number | None = None) -> tuple[Tensor, Tensor]:
    """min(w A, clip(w, 1 - low, 1 + high) A), and 1 where the clip removed the gradient (Schulman et al. 2017, arXiv 1707.06347)."""
    high = clip_range if clip_range_high is None else clip_range_high
    for name, value in (("clip_range", clip_range), ("clip_range_high", high)):
        if not value > 0:
            raise InputError(f"{name} is {value}, but the box it spans must not be empty: choose a value above 0.")
    free, boxed = ratio * advantage, _clip(ratio, 1 - clip_range, 1 + high) * advantage
    return torch.minimum(free, boxed), (boxed < free).to(free.dtype)


def ratio_of(logratio: Tensor) -> Tensor:
    """w, finite however far away the policy is."""
    return logratio.clamp(max=_LOSS_NATS).exp()


def k3_of(batch: Prepared) -> Float[Tensor, "prompt response token"]:
    """k3 of `kl_estimates`, token by token; 0 outside the mask."""
    flat = (1, -1, 1)
    tokens = kl_estimates(batch.now.reshape(flat), batch.ref.reshape(flat), batch.mask.reshape(flat)).k3
    return tokens.view(batch.now.shape)


def masked_mean(values: Tensor, mask: Tensor) -> Float[Tensor, ""]:
    """Mean over the tokens of all responses together."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def drift_figures(batch: Prepared) -> dict[str, Tensor]:
    """What every relative reports of how far the policy has moved, over whole responses and pairs."""
    logratio = batch.drift.sum(-1).clamp(max=_METRIC_NATS)
    ratio = logratio.exp()
    return {
        "gap_logratio": batch.odds(batch.drift).abs().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_var": ratio.var(correction=0),
        "approx_kl": (torch.expm1(logratio) - logratio).mean(),
        "tie_rate": (batch.gaps == 0).to(ratio.dtype).mean(),
    }


def terms_of(loss: Tensor, clip_fraction: Tensor, advantage_abs: Tensor, batch: Prepared, **more: Tensor) -> RelativeTerms:
    """The loss with what every relative reports."""
    return RelativeTerms(loss, clip_fraction.detach(), advantage_abs.detach(), **drift_figures(batch), **more)
