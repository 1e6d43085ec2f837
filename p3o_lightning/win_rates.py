"""Win rate: the share of comparisons that one policy wins against another, a tie counting half, with intervals. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p3o_lightning.metrics import wilson_interval


class WinRate(NamedTuple):
    """Shares in [0, 1] of the comparisons with a verdict. NaN where there is none."""

    win_rate: float  # a tie counts one half
    low: float  # 95 %, as share_interval
    high: float
    wins: int
    ties: int
    losses: int
    no_verdict: int  # comparisons that the judge could not decide: they count nowhere above
    prompts: int  # with a verdict


def win_rate(
    outcomes: Float[Tensor, " comparison"], prompts: Int[Tensor, " comparison"] | None = None, *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """The win rate and its 95 % interval.

    Args:
        outcomes: 1 won, 0.5 tie, 0 lost, NaN no verdict: `Verdicts.outcome`.
        prompts: a number for each comparison's prompt. Comparisons of one prompt are not independent; None: each has its own.
        resamples: draws of the bootstrap.
        seed: of the bootstrap.
    """
    judged = ~outcomes.isnan()
    results = outcomes[judged].double()
    groups = (torch.arange(len(outcomes)) if prompts is None else prompts)[judged].unique(return_inverse=True)[1]
    count = int(groups.max()) + 1 if len(groups) else 0
    low, high = share_interval(results, groups, resamples=resamples, seed=seed)
    return WinRate(
        win_rate=float(results.mean()),
        low=float(low),
        high=float(high),
        wins=int((results > 0.5).sum()),
        ties=int((results == 0.5).sum()),
        losses=int((results < 0.5).sum()),
        no_verdict=int((~judged).sum()),
        prompts=count,
    )


def share_interval(
    values: Float[Tensor, " value"], groups: Int[Tensor, " value"], *, resamples: int = 2000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """95 % interval of a mean of values in [0, 1], of which those of a group (a prompt) are not independent.

    Wilson where every group has one value, else the bootstrap over groups. Where that would collapse, because all groups have the same mean
    or are fewer than 5, Wilson as if each group were one value.

    Args:
        values: what is averaged.
        groups: 0 ... n - 1: which values belong together.
        resamples: draws of the bootstrap.
        seed: of the bootstrap.
    """
    values, count = values.double(), int(groups.max()) + 1 if len(groups) else 0
    trials = torch.tensor(float(count), dtype=torch.float64)
    if count < len(values):
        sizes = torch.bincount(groups, minlength=count).double()
        means = torch.zeros(count, dtype=torch.float64).index_add(0, groups, values) / sizes
        if count >= 5 and bool((means != means[0]).any()):
            return bootstrap_interval(values, groups, resamples=resamples, seed=seed)
    return wilson_interval(values.mean() * trials, trials)


def bootstrap_interval(
    values: Float[Tensor, " value"], groups: Int[Tensor, " value"], *, resamples: int = 2000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """95 % percentile interval of the mean, by drawing whole groups with replacement (Efron 1979; the cluster bootstrap).

    Args:
        values: what is averaged.
        groups: 0 ... n - 1: which values belong together, e.g. to one prompt.
        resamples: draws.
        seed: of the draws.
    """
    count = int(groups.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, groups, values.double())
    sizes = torch.bincount(groups, minlength=count).double()
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return low, high
