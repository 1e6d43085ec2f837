"""The figures of a reward model's report: known answers, and plain loops over pairs.

The power of these tests, found by planting one error at a time:
    planted error                   first test that fails, without test_
    confidence not folded           a_model_that_is_as_often_right_as_it_says_has_no_calibration_error
    bisection the wrong way         a_model_that_is_as_often_right_as_it_says_has_no_calibration_error
    inverse temperature             the_temperature_of_scaled_scores_is_the_scale
    tolerance of the shorter        length_matched_accuracy_by_hand
    noise of prompt means left in   shifts_by_hand
    responses a prompt: plain mean  shifts_of_prompts_with_unequally_many_responses_by_hand
    split where none agree          disagreement_by_hand
    EOS effect turned around        the_eos_effect_by_hand
"""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from p3o_lightning.reliability import (
    accuracy,
    disagreement,
    eos_effect,
    fitted_temperature,
    length_matched,
    log_loss,
    prompt_shifts,
    reliability_curve,
    report_card,
)


def judged_pairs(count: int, scale: float, seed: int = 0) -> torch.Tensor:
    """Gaps whose winner was drawn with probability sigmoid(gap), then multiplied by `scale`: the right temperature is `scale`."""
    rng = random.Random(seed)
    gaps = []
    for _ in range(count):
        gap = rng.gauss(0, 2)
        wins = rng.random() < 1 / (1 + math.exp(-gap))
        gaps.append(gap if wins else -gap)
    return scale * torch.tensor(gaps, dtype=torch.float64)


# ---- calibration


def test_a_model_that_is_as_often_right_as_it_says_has_no_calibration_error():
    """Exactly: at p = 0.55, 0.65, ... 0.95 of 100 pairs, 55, 65, ... 95 are ranked right."""
    gaps = []
    for percent in range(55, 100, 10):
        gap = math.log(percent / (100 - percent))
        gaps += [gap] * percent + [-gap] * (100 - percent)
    curve = reliability_curve(torch.tensor(gaps, dtype=torch.float64))
    assert sum(one.pairs for one in curve) == 500
    for one in curve:
        assert one.pairs == 0 or one.confidence == pytest.approx(one.accuracy, abs=1e-12)
    card = report_card(torch.stack([torch.tensor(gaps), torch.zeros(500)], 1), torch.ones(500, 2, dtype=torch.long), torch.arange(500))
    assert card["ece"] == pytest.approx(0, abs=1e-6) and card["temperature"] == pytest.approx(1, abs=1e-6)


def test_the_curve_by_a_loop_over_pairs():
    gaps = judged_pairs(400, 1.7)
    rows = [[] for _ in range(10)]
    for gap in gaps.tolist():
        p = 1 / (1 + math.exp(-abs(gap)))
        rows[min(int((p - 0.5) / 0.05), 9)].append((p, gap > 0))
    curve = reliability_curve(gaps)
    assert [(round(one.low, 9), round(one.high, 9)) for one in curve] == [
        (round(0.5 + i / 20, 9), round(0.55 + i / 20, 9)) for i in range(10)
    ]
    ece = 0.0
    for one, inside in zip(curve, rows, strict=True):
        assert one.pairs == len(inside)
        if inside:
            assert one.confidence == pytest.approx(statistics.fmean(p for p, _ in inside))
            assert one.accuracy == pytest.approx(statistics.fmean(right for _, right in inside))
            assert one.accuracy_low < one.accuracy < one.accuracy_high or one.accuracy in (0, 1)
            ece += len(inside) / 400 * abs(one.confidence - one.accuracy)
    card = report_card(torch.stack([gaps, torch.zeros_like(gaps)], 1), torch.ones(400, 2, dtype=torch.long), torch.arange(400))
    assert card["ece"] == pytest.approx(ece, rel=1e-9), "the curve is the calibration error's"


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_the_temperature_of_scaled_scores_is_the_scale(scale):
    """Scores times s have s times the temperature, exactly; and for winners drawn by sigmoid(gap) it is 1 but for the sample."""
    one = fitted_temperature(judged_pairs(20_000, 1.0))
    assert one == pytest.approx(1, abs=0.05)
    assert fitted_temperature(judged_pairs(20_000, scale)) == pytest.approx(scale * one, rel=1e-9)


def test_no_other_temperature_has_less_log_loss():
    gaps = judged_pairs(300, 3.0, seed=1)
    best = fitted_temperature(gaps)
    losses = {t: log_loss(gaps, t) for t in (best, 0.99 * best, 1.01 * best, 1.0, 0.1, 10.0, math.inf)}
    assert min(losses, key=losses.get) == best
    assert losses[1.0] == pytest.approx(statistics.fmean(math.log1p(math.exp(-gap)) for gap in gaps.tolist()))


def test_temperatures_at_the_edge():
    assert fitted_temperature(torch.tensor([-1.0, -2.0, 0.5])) == math.inf and log_loss(torch.tensor([-1.0]), math.inf) == math.log(2)
    assert fitted_temperature(torch.tensor([1.0, 2.0])) == 0 and log_loss(torch.tensor([1.0, 2.0]), 0.0) == 0
    assert math.isnan(fitted_temperature(torch.tensor([1.0, math.nan]))) and math.isnan(fitted_temperature(torch.tensor([])))
    # 3 of 4 right at gaps of 1: sigmoid(1 / T) = 3/4, T = 1 / ln 3
    assert fitted_temperature(torch.tensor([1.0, 1, 1, -1])) == pytest.approx(1 / math.log(3), rel=1e-9)


# ---- length


def test_length_matched_accuracy_by_hand():
    lengths = torch.tensor([[10, 10], [10, 9], [10, 8], [100, 91], [91, 100], [1, 2], [50, 5]])
    gaps = torch.tensor([1.0, -1, 9, 0, 2, 9, 9])  # matched: the first two, 9 of 100 twice: right 1, 0, 1/2, 1
    got = length_matched(gaps, lengths)
    assert got.pairs == 4 and got.accuracy == 2.5 / 4
    assert got.low < got.accuracy < got.high
    assert length_matched(gaps, lengths, tolerance=0.0).pairs == 1
    assert math.isnan(length_matched(gaps[5:], lengths[5:]).accuracy)


def test_a_model_that_knows_length_alone_is_a_coin_on_length_matched_pairs():
    rng = random.Random(0)
    lengths = torch.tensor([[rng.randint(20, 60), rng.randint(1, 40)] for _ in range(4000)])
    gaps = (lengths[:, 0] - lengths[:, 1]).double()
    card = report_card(lengths.double(), lengths, torch.arange(4000))
    assert card["accuracy"] == pytest.approx(max(card["length_rule_accuracy"], 1 - card["length_rule_accuracy"]))
    near = [gap for gap, (a, b) in zip(gaps.tolist(), lengths.tolist(), strict=True) if abs(a - b) <= 0.1 * max(a, b)]
    assert card["length_matched_pairs"] == len(near)
    assert abs(card["length_matched_accuracy"] - 0.5) < 0.1


def test_accuracy_has_wilsons_interval():
    got = accuracy(torch.tensor([1.0] * 45 + [0.0] * 10 + [-1.0] * 45))  # 50 of 100
    assert (got.accuracy, got.low, got.high) == pytest.approx((0.5, 0.403832, 0.596168), abs=1e-6)


def test_pairs_of_one_prompt_count_as_one_where_they_are_alike():
    """Ten prompts, ten equal pairs each, seven prompts ranked rightly: as uncertain as ten pairs, not as a hundred."""
    prompts = torch.arange(10).repeat_interleave(10)
    gaps = torch.where(prompts < 7, 1.0, -1.0)
    card = report_card(torch.stack([gaps, torch.zeros(100)], 1), torch.full((100, 2), 5), prompts)
    ten, hundred = accuracy(gaps[::10]), accuracy(gaps)
    for name in ("accuracy", "length_matched"):
        assert card[f"{name}_high"] - card[f"{name}_low"] == pytest.approx(ten.high - ten.low, rel=0.25)
    assert hundred.high - hundred.low < 0.4 * (ten.high - ten.low)


# ---- shifts


def test_shifts_by_hand():
    # prompt means 2 and 12; within: (1 + 1 + 4 + 4) / (4 - 2) = 5; between: 2 (25 + 25) / 1 = 100; shift variance (100 - 5) / 2
    got = prompt_shifts(torch.tensor([1.0, 3, 10, 14]), torch.tensor([7, 7, 3, 3]))
    assert got.prompt_mean_sd == pytest.approx(math.sqrt(50)) and got.within_prompt_sd == pytest.approx(math.sqrt(5))
    assert got.shift_sd == pytest.approx(math.sqrt(47.5)) and got.shift_share == pytest.approx(47.5 / 52.5)


def test_shifts_of_prompts_with_unequally_many_responses_by_hand():
    # means 0 and 4, of all 3; within (4 + 0 + 4) / 2 = 4; between 9 + 3 = 12; responses a prompt (4 - (1 + 9) / 4) / 1 = 1.5
    got = prompt_shifts(torch.tensor([0.0, 2, 4, 6]), torch.tensor([0, 1, 1, 1]))
    assert got.within_prompt_sd == 2 and got.shift_sd == pytest.approx(math.sqrt((12 - 4) / 1.5))


@pytest.mark.parametrize(("shift", "share"), [(0.0, 0.0), (3.0, 0.9)])
def test_the_shift_that_was_put_in_is_found(shift, share):
    """Within-prompt standard deviation 1, shifts of the given one, two to five responses a prompt."""
    rng = random.Random(0)
    scores, prompts = [], []
    for prompt in range(3000):
        delta = rng.gauss(0, shift) if shift else 0.0
        for _ in range(rng.randint(2, 5)):
            scores.append(delta + rng.gauss(0, 1))
            prompts.append(prompt)
    got = prompt_shifts(torch.tensor(scores), torch.tensor(prompts))
    assert got.within_prompt_sd == pytest.approx(1, rel=0.03)
    assert got.shift_sd == pytest.approx(shift, rel=0.05, abs=0.15) and got.shift_share == pytest.approx(share, abs=0.02)
    assert got.prompt_mean_sd > 0.5, "which the noise of a few responses alone gives: why it is no measure of the shift"


def test_gaps_know_nothing_of_shifts():
    scores, lengths = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double(), torch.ones(50, 2, dtype=torch.long)
    one = report_card(scores, lengths, torch.arange(50))
    other = report_card(scores + 100 * torch.arange(50)[:, None], lengths, torch.arange(50))
    for name in ("accuracy", "log_loss", "brier", "ece", "temperature", "within_prompt_sd"):
        assert one[name] == pytest.approx(other[name], abs=1e-9), name
    assert other["shift_share"] > 0.99 > one["shift_share"]


def test_one_prompt_or_one_response_each_says_nothing_of_shifts():
    for prompts in (torch.zeros(4), torch.arange(4)):
        assert all(math.isnan(value) for value in prompt_shifts(torch.randn(4), prompts.long()))


# ---- ensembles, EOS, sources


def test_disagreement_by_hand():
    got = disagreement(torch.tensor([[1.0, 2, -1, 3], [3.0, -1, -1, 3]]))
    # sd sqrt 2, 3 / sqrt 2, 0, 0; means 2, 0.5, -1, 3; the second splits them, and its mean is right
    assert got.gap_sd == pytest.approx((math.sqrt(2) + 3 / math.sqrt(2)) / 4) and got.mean_gap == pytest.approx(6.5 / 4)
    assert got.split_rate == 0.25 and got.accuracy_unanimous == pytest.approx(2 / 3) and got.accuracy_split == 1


def test_the_eos_effect_by_hand():
    ended, cut = torch.tensor([[2.0, 1], [0, 3], [5, 4]]), torch.tensor([[1.0, 1.5], [-1, 2], [4.5, 3]])
    got = eos_effect(ended, cut)
    shifts = [1, -0.5, 1, 1, 0.5, 1]
    assert got.shift == pytest.approx(statistics.fmean(shifts)) and got.shift_sd == pytest.approx(statistics.stdev(shifts))
    assert got.flip_rate == pytest.approx(1 / 3), "the first pair alone"
    assert got.accuracy_without == pytest.approx(1 / 3)
    assert got.turn_rate == 0, "cut off, 1 is not below 1, 2 not below 0, 4.5 not below 4"
    assert eos_effect(ended, cut - 1).turn_rate == pytest.approx(2 / 3), "0 is below 1, and 3.5 below 4"


def test_each_source_is_reported_on_its_own_pairs():
    scores = torch.tensor([[1.0, 0], [0, 1], [1, 0], [2, 0]])
    card = report_card(scores, torch.tensor([[1, 2]] * 4), torch.arange(4), ["web", "book", "web", "book"])
    assert list(card["sources"]) == ["book", "web"] and card["accuracy"] == 0.75
    assert card["sources"]["web"]["accuracy"] == 1 and card["sources"]["book"]["accuracy"] == 0.5
    assert card["sources"]["web"]["pairs"] == 2 and card["sources"]["book"]["length_rule_accuracy"] == 1
