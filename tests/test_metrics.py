"""The reward model's report card against an independent computation, pair by pair.

The power of these tests, found by planting one error at a time in metrics.py:
    planted error                 first test that fails, without test_
    ties count as wrong           figures_are_those_of_an_independent_computation
    confidence not folded         figures_are_those_of_an_independent_computation
    five bins                     figures_are_those_of_an_independent_computation
    length rule of shorter alone  figures_are_those_of_an_independent_computation
    Wald interval                 wilson_intervals_of_the_literature
    mean of batch means           figures_are_those_of_an_independent_computation
    sums in float32               figures_are_those_of_an_independent_computation
    NaN breaks the bins           scores_that_are_not_finite_show_and_do_not_stop_the_run
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from p3o_lightning.metrics import PairReport, wilson_interval


def pairs(count: int = 57, seed: int = 0):
    generator = np.random.default_rng(seed)
    scores = generator.normal(0, 2, (count, 2)).round(1)  # rounded: ties happen
    scores[:3] = [[1, 1], [40, -40], [-30, 30]]  # a tie, and gaps whose sigmoid is 1 or nearly 0
    return scores, generator.integers(1, 6, (count, 2))


def by_hand(scores: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """One pair after the other, in plain Python."""
    rows = []
    for (chosen, rejected), (length, other) in zip(scores.tolist(), lengths.tolist(), strict=True):
        gap = chosen - rejected
        p = 1 / (1 + math.exp(-gap))
        right = 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        loss = math.log1p(math.exp(-gap)) if gap > -30 else -gap
        shorter = 1.0 if length < other else 0.5 if length == other else 0.0
        rows.append((right, gap, loss, (1 - p) ** 2, max(p, 1 - p), shorter))
    right, gap, loss, brier, confidence, shorter = map(np.array, zip(*rows, strict=True))
    ece = 0.0
    for low in np.arange(10) / 20 + 0.5:
        inside = (confidence >= low - 1e-12) & ((confidence < low + 0.05 - 1e-12) | (low > 0.94))
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return {
        "accuracy": right.mean(),
        "margin": gap.mean(),
        "log_loss": loss.mean(),
        "brier": brier.mean(),
        "ece": ece,
        "length_rule_accuracy": max(shorter.mean(), 1 - shorter.mean()),
    }


def report(scores, lengths, batches=1) -> dict[str, float]:
    metric = PairReport()
    for part in np.array_split(np.arange(len(scores)), batches):
        metric.update(torch.tensor(scores[part]), torch.tensor(lengths[part]))
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_an_independent_computation(seed):
    scores, lengths = pairs(seed=seed)
    got = report(scores, lengths)
    for name, value in by_hand(scores, lengths).items():
        assert got[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_by_hand_of_four_pairs():
    # gaps ln 3, -ln 3, 0, 0: p = 3/4, 1/4, 1/2, 1/2; right 1, 0, 1/2, 1/2
    got = report(np.array([[math.log(3), 0], [0, math.log(3)], [1, 1], [-2, -2]]), np.array([[1, 2], [1, 2], [1, 2], [3, 3]]))
    assert got["accuracy"] == 0.5
    assert got["margin"] == pytest.approx(0)
    assert got["log_loss"] == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4) + 2 * math.log(1 / 2)) / 4)
    assert got["brier"] == pytest.approx((1 / 16 + 9 / 16 + 1 / 4 + 1 / 4) / 4)
    assert got["ece"] == pytest.approx(0.5 * abs(3 / 4 - 1 / 2) + 0.5 * 0)
    assert got["length_rule_accuracy"] == 3.5 / 4


def test_batches_of_any_size_give_the_same_figures():
    scores, lengths = pairs()
    whole = report(scores, lengths)
    for batches in (2, 5, 57):
        assert report(scores, lengths, batches) == pytest.approx(whole, rel=1e-12)


def test_the_length_rule_is_the_better_of_shorter_and_longer():
    scores = np.zeros((10, 2))
    lengths = np.array([[1, 2]] * 7 + [[2, 1]] * 3)
    assert report(scores, lengths)["length_rule_accuracy"] == pytest.approx(0.7)
    assert report(scores, lengths[:, ::-1].copy())["length_rule_accuracy"] == pytest.approx(0.7)


def test_a_reset_report_forgets():
    metric, (scores, lengths) = PairReport(), pairs()
    metric.update(torch.tensor(scores), torch.tensor(lengths))
    metric.reset()
    metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 2]]))
    assert metric.compute()["accuracy"] == 1 and metric.compute()["log_loss"] == pytest.approx(math.log1p(math.exp(-1)))


def test_float32_scores_are_compared_and_summed_in_float64():
    # at 1e4 float32 has steps of 0.001; a mean over 20,000 pairs must not lose their margin of 0.5
    scores = torch.tensor([[10_000.5, 10_000.0]]).expand(20_000, 2)
    metric = PairReport()
    metric.update(scores, torch.ones(20_000, 2, dtype=torch.long))
    assert float(metric.compute()["margin"]) == 0.5
    assert float(metric.compute()["log_loss"]) == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-12)


def test_scores_that_are_not_finite_show_and_do_not_stop_the_run():
    metric = PairReport()
    metric.update(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.ones(2, 2, dtype=torch.long))
    figures = metric.compute()
    assert figures["accuracy"] == 0.5 and figures["log_loss"].isnan() and figures["margin"].isnan()


@pytest.mark.parametrize(
    ("wins", "trials", "low", "high"),
    [
        # (p + z2/2n +- z sqrt(p q / n + z2/4n2)) / (1 + z2/n) with z = 1.959964; 0 of n: 0 to z2 / (n + z2)
        (50, 100, 0.403832, 0.596168),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1, 1, 0.206549, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 0.2553 to 0.3662
    ],
)
def test_wilson_intervals_of_the_literature(wins, trials, low, high):
    got = wilson_interval(torch.tensor(float(wins), dtype=torch.float64), torch.tensor(float(trials), dtype=torch.float64))
    assert [float(value) for value in got] == pytest.approx([low, high], abs=5e-4 if trials == 263 else 1e-6)
