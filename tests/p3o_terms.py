"""P3O's loss on the enumerated policy of tabular.py, its gradient in expectation, and rows as if drawn by any policy."""

from __future__ import annotations

import torch
from tabular import PAIRS, World, coefficients, expected_gradient

from p3o_lightning.objectives import p3o_loss


def loss_of(world: World, draws=PAIRS, **settings):
    """The loss as a function of the current log-probabilities, one row for each draw."""
    settings = {"kl_coef": 0.0, **settings}
    if "gaps" not in settings:
        settings.setdefault("scores", world.rewards[draws])
    return lambda logps: p3o_loss(logps, world.old_logps[draws], world.ref_logps[draws], **settings)


def coefs_of(world: World, draws=PAIRS, **settings):
    return coefficients(loss_of(world, draws, **settings), world.logps[draws])


def gradient_of(world: World, draws=PAIRS, **settings):
    """Expected gradient of the loss over draws from the policy that sampled."""
    return expected_gradient(coefs_of(world, draws, **settings), draws, world.old_logps, world.score_functions)


def random_rows(rows: int, count: int, seed: int = 1, spread: float = 1.0):
    """logps, old_logps, ref_logps, scores of the shape (rows, count), as if drawn by any policy."""
    generator = torch.Generator().manual_seed(seed)
    old, ref, drift, scores = (torch.randn(rows, count, dtype=torch.float64, generator=generator) for _ in range(4))
    return old - 20 + spread * drift, old - 20, ref - 20, scores


def box(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
