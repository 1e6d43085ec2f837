"""Weights for responses that another distribution drew than the policy they are scored under: an inference engine, a narrower dtype.

The sampler mu is meant to be the policy pi_old, and never quite is: other kernels, another dtype, another batch. With
    rho_i = pi_old(y_i|x) / mu(y_i|x),
an expectation over pi_old is one over mu, weighed: rho_i rho_j before a loss that reads both responses of a pair, rho_i alone before a
term that the policy's own ratio leads and that the other response enters as a baseline only. Both are unbiased; the own form has half
the variance of the log-weight. One weight far above 1 can drown a batch, so weights have a cap, which trades that for a bias.

Axes and units as in objectives.py.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from p3o_lightning.errors import InputError

CORRECTIONS = ("truncate", "mask")

# exp() of more nats than this is no longer information, only a way to inf * 0 = nan in float32 (which ends at 88 nats).
_NATS = 60.0


def sampler_weights(
    old_logps: Float[Tensor, "*axes"], sampler_logps: Float[Tensor, "*axes"], correction: str | None, cap: float
) -> Float[Tensor, "*axes"]:
    """rho = pi_old / mu under the cap; without gradient. Give the sums of a pair's two log-probabilities for the pair's weight.

    What is masked weighs 0 and stays among what a mean is taken over: a rollout with more of it takes smaller steps, not noisier ones.

    Args:
        old_logps: nats under the policy at the rollout, as the training forward computes them.
        sampler_logps: nats under what drew the responses.
        correction: "truncate" makes weights above the cap the cap; "mask" makes them 0; None weighs everything 1.
        cap: no unit, at least 1; inf is none.
    """
    check_correction(correction, cap)
    weights = (old_logps - sampler_logps).detach().clamp(-_NATS, _NATS).exp()
    if correction is None:
        return weights.new_ones(weights.shape)
    return weights.clamp(max=cap) if correction == "truncate" else weights.masked_fill(weights > cap, 0.0)


def check_correction(correction: str | None, cap: float) -> None:
    """Stop at a setting that is none, naming it as the losses do."""
    if correction is not None and correction not in CORRECTIONS:
        raise InputError(f"sampler_correction is {correction!r}, which is not a choice: write {' or '.join(CORRECTIONS)}, or None.")
    if not cap >= 1:
        raise InputError(f"sampler_cap is {cap}, but a sampler that is the policy weighs 1: choose a value of at least 1, e.g. 3.")
