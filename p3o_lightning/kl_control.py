"""The price of leaving the reference: how an adaptive one follows its target."""

from __future__ import annotations

import math


def adapted_kl_coef(kl_coef: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """The adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2): up if KL is above its target, down if below.

    Args:
        kl_coef: price of KL at the rollout, reward units per nat.
        kl: of the rollout, nats.
        target: nats.
        responses: of the rollout.
        horizon: responses over which the price changes by a factor of 1.2 at most; one rollout never counts as more.

    Twice the target raises the price by a fifth over a horizon; here a tenth of one has passed.

    >>> round(adapted_kl_coef(0.1, kl=4.0, target=2.0, responses=100, horizon=1000), 4)
    0.102
    """
    if not math.isfinite(kl):  # such a rollout is left out, and must not spoil the price for good
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(responses / horizon, 1))
