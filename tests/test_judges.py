"""Judges, asked in both orders, and the win rate that comes of them.

The power of these tests, found by planting one error at a time:
    planted error                        first test that fails, without test_
    one order asked twice                both_orders_are_asked_and_averaged
    second order not read                both_orders_are_asked_and_averaged
    columns once for both orders         both_orders_are_asked_and_averaged
    contradictions decided by the surer  orders_that_disagree_are_a_tie_however_sure_one_of_them_is
    no verdict counts as a tie           without_a_verdict_in_both_orders_there_is_none
    no verdict makes a NaN gap           exchanging_the_two_policies_mirrors_every_figure
    no verdict is counted                exchanging_the_two_policies_mirrors_every_figure
    position bias is the lead            a_judge_with_a_favourite_place_gives_ties_and_shows_its_bias
    equal responses are asked about      equal_responses_tie_unasked_and_a_symmetric_judge_is_asked_once
    any number is a preference           a_wrong_answer_names_judge_value_and_fix
    gaps symmetric                       gaps_of_all_pairs_are_antisymmetric_and_may_be_a_cycle
    Wilson though prompts repeat         comparisons_of_one_prompt_are_no_independent_evidence
    bootstrap of prompt means            the_bootstrap_draws_whole_prompts_whatever_their_size
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.testing import assert_close

from p3o_lightning.errors import InputError
from p3o_lightning.judges import FunctionJudge, Judge, compare, group_gaps
from p3o_lightning.win_rates import bootstrap_interval, win_rate


@FunctionJudge
def longer(prompts, first, second, **_):
    return [1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0 for a, b in zip(first, second, strict=True)]


@FunctionJudge
def always_the_first(prompts, first, second, **_):
    return [True] * len(first)


def test_both_orders_are_asked_and_averaged():
    asked = []

    @FunctionJudge
    def judge(prompts, first, second, level):
        asked.extend(zip(prompts, first, second, level, strict=True))
        return [0.9, 0.2, 0.4, 0.6]  # of the second two, response b stands first

    verdicts = compare(judge, ["p", "q"], ["a1", "a2"], ["b1", "b2"], level=[1, 2])
    assert asked == [("p", "a1", "b1", 1), ("q", "a2", "b2", 2), ("p", "b1", "a1", 1), ("q", "b2", "a2", 2)]
    assert verdicts.preference.tolist() == pytest.approx([(0.9 + 0.6) / 2, (0.2 + 0.4) / 2])
    assert verdicts.outcome.tolist() == [1, 0]
    assert verdicts.gap.tolist() == pytest.approx([0.5, -0.4])
    assert judge.name == judge.__name__ == "judge", "a decorated function keeps its name"


def test_a_judge_with_a_favourite_place_gives_ties_and_shows_its_bias():
    verdicts = compare(always_the_first, ["p"] * 4, ["a"] * 4, ["b"] * 4)
    assert verdicts.outcome.tolist() == [0.5] * 4 and verdicts.gap.tolist() == [0] * 4
    figures = {name: float(value) for name, value in verdicts.figures().items()}
    assert figures == {"tie_rate": 1, "contradiction_rate": 1, "position_bias": 0.5, "no_verdict": 0}
    fair = compare(longer, ["p"] * 3, ["aaa", "a", "bb"], ["b", "bbb", "cc"])
    assert fair.outcome.tolist() == [1, 0, 0.5]
    assert {name: round(float(value), 6) for name, value in fair.figures().items()} == {
        "tie_rate": round(1 / 3, 6),
        "contradiction_rate": 0,
        "position_bias": 0,
        "no_verdict": 0,
    }


def test_orders_that_disagree_are_a_tie_however_sure_one_of_them_is():
    judge = FunctionJudge(lambda first, **_: [0.99 if text == "a" else 0.6 for text in first])
    verdicts = compare(judge, ["p"], ["a"], ["b"])  # 0.99 for a in the first place, 0.4 for it in the second
    assert float(verdicts.preference) > 0.5 and verdicts.outcome.tolist() == [0.5]


def test_exchanging_the_two_policies_mirrors_every_figure():
    rng = random.Random(0)
    table = {}

    @FunctionJudge
    def noisy(first, second, **_):
        return [table.setdefault(pair, rng.choice([None, rng.random(), 0.5, 1, 0])) for pair in zip(first, second, strict=True)]

    a, b = [f"a{i}" for i in range(50)], [f"b{i}" for i in range(50)]
    one, other = compare(noisy, ["p"] * 50, a, b), compare(noisy, ["p"] * 50, b, a)
    assert_close(one.gap, -other.gap, rtol=0, atol=0)
    assert_close(one.outcome, 1 - other.outcome, equal_nan=True)
    assert win_rate(one.outcome).win_rate == pytest.approx(1 - win_rate(other.outcome).win_rate)
    assert one.figures()["position_bias"] == pytest.approx(float(other.figures()["position_bias"]))


def test_without_a_verdict_in_both_orders_there_is_none():
    judge = FunctionJudge(lambda first, **_: [None if text == "a" else 0.0 for text in first])
    verdicts = compare(judge, ["p", "p"], ["a", "c"], ["b", "d"])
    assert math.isnan(verdicts.preference[0]) and math.isnan(verdicts.outcome[0]) and verdicts.gap[0] == 0
    assert float(verdicts.figures()["no_verdict"]) == 0.5 and float(verdicts.figures()["tie_rate"]) == 1
    assert win_rate(verdicts.outcome)[3:] == (0, 1, 0, 1, 1)


def test_equal_responses_tie_unasked_and_a_symmetric_judge_is_asked_once():
    calls = []

    def count(first, **_):
        calls.append(len(first))
        return [1.0] * len(first)

    assert compare(FunctionJudge(count, symmetric=True), ["p", "p"], ["a", "same"], ["b", "same"]).outcome.tolist() == [1, 0.5]
    compare(FunctionJudge(count), ["p", "p"], ["a", "same"], ["b", "same"])
    compare(FunctionJudge(count), ["p"], ["same"], ["same"])
    assert calls == [1, 2]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([0.5], "returned 1 preferences for 2 comparisons"),
        (None, "returned NoneType"),
        ("ab", "returned str"),
        ([0.5, 1.5], "returned 1.5 at position 1"),
        ([math.nan, 0.5], "returned nan at position 0"),
        (["1", 0.5], "returned '1' at position 0"),
    ],
)
def test_a_wrong_answer_names_judge_value_and_fix(answer, words):
    with pytest.raises(InputError, match="judge picky") as caught:
        compare(type("Picky", (Judge,), {"name": "picky", "__call__": lambda self, *a, **k: answer})(), ["p"], ["a"], ["b"])
    assert words in str(caught.value)


def test_gaps_of_all_pairs_are_antisymmetric_and_may_be_a_cycle():
    beats = {("r", "s"), ("s", "p"), ("p", "r")}
    judge = FunctionJudge(lambda first, second, **_: [float(pair in beats) for pair in zip(first, second, strict=True)])
    gaps, figures = group_gaps(judge, ["x", "y"], [["r", "s", "p"], ["p", "p", "r"]])
    assert gaps[0].tolist() == [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    assert gaps[1].tolist() == [[0, 0, 1], [0, 0, 1], [-1, -1, 0]]
    assert torch.equal(gaps, -gaps.mT)
    assert float(figures["tie_rate"]) == pytest.approx(1 / 6)


# ---- win rate


def test_ties_count_half_and_the_interval_is_wilsons():
    outcomes = torch.tensor([1.0] * 45 + [0.5] * 10 + [0.0] * 45 + [math.nan] * 3)
    got = win_rate(outcomes)
    assert got[:1] == (0.5,) and (got.low, got.high) == pytest.approx((0.403832, 0.596168), abs=1e-6)  # of 50 in 100
    assert got[3:] == (45, 10, 45, 3, 100)


def test_comparisons_of_one_prompt_are_no_independent_evidence():
    """20 prompts, each decided for good, seen ten times: as wide as 20 comparisons, not 200."""
    decided = torch.tensor([1.0] * 12 + [0.0] * 8)
    many, prompts = decided.repeat_interleave(10), torch.arange(20).repeat_interleave(10)
    clustered, naive = win_rate(many, prompts), win_rate(many)
    assert clustered.win_rate == naive.win_rate == pytest.approx(0.6) and clustered.prompts == 20
    # the standard error of a mean of 20: sqrt(0.6 x 0.4 / 20) = 0.1095
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * 0.1095, rel=0.1)
    assert naive.high - naive.low == pytest.approx(2 * 1.96 * 0.1095 / math.sqrt(10), rel=0.1)


def test_the_bootstrap_draws_whole_prompts_whatever_their_size():
    # two prompts, of sizes 1 and 3: means of the four draws (0,0), (0,1), (1,0), (1,1) are 1, 1/4, 1/4, 0
    low, high = bootstrap_interval(torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1, 1, 1]))
    assert (float(low), float(high)) == (0, 1)
    # five prompts won once, one lost five times: of six drawn, n are the lost one, n >= 3 in 6 % and n >= 4 in 1 % of the draws, and the
    # mean is (6 - n) / (6 - n + 5 n): 1/6 at n = 3
    values, groups = torch.tensor([1.0] * 5 + [0.0] * 5), torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5, 5])
    low, high = bootstrap_interval(values, groups)
    assert (float(low), float(high)) == (pytest.approx(1 / 6), 1)
    assert bootstrap_interval(values, groups) == (low, high), "a function of its seed"


@pytest.mark.parametrize(("outcomes", "prompts", "trials"), [([1.0] * 40, 10, 10), ([1.0, 0.0] * 4, 2, 2), ([1.0, 1.0, 0.0], 1, 1)])
def test_few_prompts_and_prompts_that_are_all_alike_leave_room_for_doubt(outcomes, prompts, trials):
    """The bootstrap would give an interval of no width: as wide as if each prompt had been asked once."""
    groups = torch.arange(prompts).repeat_interleave(len(outcomes) // prompts)
    got = win_rate(torch.tensor(outcomes), groups)
    wide = 1.959964**2 / trials  # Wilson's interval of a share p of n trials, by its formula
    centre, half = got.win_rate + wide / 2, math.sqrt(wide * got.win_rate * (1 - got.win_rate) + wide**2 / 4)
    assert (got.low, got.high) == pytest.approx(((centre - half) / (1 + wide), (centre + half) / (1 + wide)), abs=1e-6)
    assert got.low < got.win_rate - 0.1 or got.win_rate == 0


def test_no_comparison_at_all_is_no_number():
    got = win_rate(torch.tensor([math.nan, math.nan]))
    assert math.isnan(got.win_rate) and math.isnan(got.low) and got.no_verdict == 2 and got.prompts == 0
