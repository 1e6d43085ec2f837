"""Frontiers and their statistics: answers by hand, properties for any points, coverage on data whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3o_lightning.errors import InputError
from p3o_lightning.frontier import (
    area_under,
    bootstrap_interval,
    frontier_vertices,
    height_at,
    holm,
    mixture_at,
    paired_difference,
    score_win_rate,
    student_p,
    student_quantile,
)

POINTS = st.lists(st.tuples(st.integers(0, 40), st.integers(-20, 20)), min_size=1, max_size=12)


def columns(points):
    return np.array([kl / 4 for kl, _ in points]), np.array([reward / 4 for _, reward in points])


# ---- the frontier


def test_by_hand():
    # (1, 0.4) lies below the line from (0, 0) to (2, 1); (4, 0.9) is beyond the peak at (3, 1.2); (3, 1.1) below it at equal KL
    kl, reward = [2, 0, 3, 1, 4, 3], [1.0, 0.0, 1.2, 0.4, 0.9, 1.1]
    assert frontier_vertices(kl, reward) == [1, 0, 2]
    assert height_at(kl, reward, 1) == pytest.approx(0.5)  # half of each of two policies
    assert height_at(kl, reward, 2.5) == pytest.approx(1.1)
    assert height_at(kl, reward, 100) == pytest.approx(1.2)
    # trapezia: 2 x 0.5 + 1 x 1.1 + 1 x 1.2 = 3.3 over 4 nats
    assert area_under(kl, reward, 4) == pytest.approx(3.3 / 4)
    assert area_under(kl, reward, 1) == pytest.approx(0.25)


def test_another_figure_is_read_where_the_learned_reward_puts_the_frontier():
    kl, learned, gold = [0, 2, 4], [0.0, 1.0, 1.5], [0.2, 0.8, 0.1]  # gold falls where the learned reward still rises
    assert height_at(kl, learned, 4, of=gold) == pytest.approx(0.1)
    assert height_at(kl, learned, 3, of=gold) == pytest.approx(0.45)
    assert area_under(kl, learned, 4, of=gold) == pytest.approx((2 * 0.5 + 2 * 0.45) / 4)


def test_a_kl_estimated_below_zero_counts_as_zero():
    assert height_at([-0.1, 2], [0.0, 1.0], 0) == 0
    assert area_under([-0.1, 2], [0.0, 1.0], 2) == pytest.approx(0.5)


def test_no_frontier_below_the_first_point():
    assert math.isnan(height_at([1, 2], [0, 1], 0.5))
    assert math.isnan(area_under([1, 2], [0, 1], 2))


@given(POINTS)
def test_it_is_the_best_mixture_of_two_points(points):
    """Against the definition: the greatest reward over all pairs of points mixed within the budget."""
    kl, reward = columns(points)
    for budget in (kl.min(), float(np.median(kl)) + 0.1, kl.max() + 1):
        best = max(reward[kl <= budget])
        for i, j in itertools.permutations(range(len(kl)), 2):
            if kl[i] <= budget < kl[j]:
                share = (budget - kl[i]) / (kl[j] - kl[i])
                best = max(best, (1 - share) * reward[i] + share * reward[j])
        assert height_at(kl, reward, budget) == pytest.approx(best, abs=1e-12)


@given(POINTS)
def test_it_rises_ever_less(points):
    kl, reward = columns(points)
    budgets = np.linspace(kl.min(), kl.max() + 1, 23)
    heights = np.array([height_at(kl, reward, budget) for budget in budgets])
    assert (np.diff(heights) >= -1e-12).all() and (np.diff(heights, 2) <= 1e-12).all()
    assert heights[-1] == reward.max()


@given(POINTS, st.tuples(st.integers(0, 40), st.integers(-20, 20)))
def test_a_further_point_never_lowers_it(points, more):
    kl, reward = columns(points)
    kl_2, reward_2 = columns([*points, more])
    for budget in np.linspace(kl.min(), 11, 7):
        assert height_at(kl_2, reward_2, budget) >= height_at(kl, reward, budget) - 1e-12


@given(POINTS, st.permutations(range(12)))
def test_order_does_not_matter(points, order):
    kl, reward = columns(points)
    shuffled = [i for i in order if i < len(kl)]
    assert area_under([0, *kl], [0, *reward], 5) == pytest.approx(area_under([0, *kl[shuffled]], [0, *reward[shuffled]], 5))


@given(POINTS)
def test_units_pass_through(points):
    """Another zero and scale of the reward, and of KL, choose the same mixture."""
    kl, reward = columns(points)
    for budget in (kl.min(), kl.mean(), kl.max()):
        weights = mixture_at(kl, reward, budget)
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all() and (weights > 0).sum() <= 2
        assert height_at(kl * 8, reward * 4 - 2, budget * 8) == pytest.approx(height_at(kl, reward, budget) * 4 - 2)
    assert area_under([0, *kl], [0, *reward * 4], 5) == pytest.approx(4 * area_under([0, *kl], [0, *reward], 5))


def test_a_rising_transformation_keeps_the_peak_but_not_the_rest():
    kl, reward = np.array([0.0, 1, 2, 3]), np.array([0.0, 0.5, 0.9, 0.7])
    assert frontier_vertices(kl, reward)[-1] == frontier_vertices(kl, np.exp(5 * reward))[-1] == 2
    assert frontier_vertices(kl, np.exp(5 * reward)) == [0, 2]  # mixing is linear: (1, 0.5) is no vertex any more


def test_area_is_the_mean_height():
    kl, reward = np.array([0.0, 0.7, 1.9, 3.2]), np.array([0.1, 0.9, 1.3, 1.4])
    grid = np.linspace(0, 5, 200_001)
    assert area_under(kl, reward, 5) == pytest.approx(np.interp(grid, kl, reward).mean(), abs=1e-5)


@pytest.mark.parametrize(("kl", "reward"), [([], []), ([1, 2], [1]), ([1, math.nan], [1, 2]), ([1, 2], [1, math.inf])])
def test_points_of_no_use_are_refused(kl, reward):
    with pytest.raises(InputError, match="kl"):
        frontier_vertices(kl, reward)


def test_win_rate_by_hand():
    assert score_win_rate([[1, 0]], [[0, 0]]) == pytest.approx(0.75)  # two wins, two ties
    assert score_win_rate([[1.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [1.0, 1.0]]) == pytest.approx((0.5 + 0) / 2)
    scores, others = np.random.default_rng(0).integers(0, 3, (2, 9, 4))
    assert score_win_rate(scores, others) + score_win_rate(others, scores) == pytest.approx(1)


# ---- seeds


@pytest.mark.parametrize(("dof", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)])
def test_student_by_the_printed_table(dof, t):
    assert student_quantile(0.95, dof) == pytest.approx(t, abs=5e-4)
    assert student_p(-t, dof) == pytest.approx(0.05, abs=1e-4)


def test_the_interval_enumerates_all_resamples():
    """Three seeds: 27 resamples. The expanded tail is Phi(-sqrt(3/2) 4.303) = 7e-8, below 1/27: the interval is the range."""
    assert bootstrap_interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, 1.0, 6.0))
    # at level 0.5 t is 0.816, and the tail Phi(-1.0) = 0.159: the 5th of the 27 sorted means from either side
    means = sorted(sum(resample) / 3 for resample in itertools.product([1.0, 2.0, 6.0], repeat=3))
    assert bootstrap_interval([1.0, 2.0, 6.0], level=0.5)[1:] == pytest.approx((means[4], means[-5]))


def test_many_seeds_give_students_interval():
    values = np.random.default_rng(1).normal(3, 2, 200)
    half = student_quantile(0.95, 199) * values.std(ddof=1) / math.sqrt(200)
    assert bootstrap_interval(values) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.03)


@pytest.mark.parametrize("seeds", [5, 6, 10])
def test_the_interval_covers_as_often_as_it_says(seeds):
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(600):
        _, low, high = bootstrap_interval(rng.normal(1.5, 0.7, seeds), draws=2000)
        hits += low <= 1.5 <= high
    assert 0.90 <= hits / 600 <= 0.99  # in 3,000 trials 0.92, 0.93 and 0.94; the plain percentile interval has 0.84, 0.85 and 0.90


def test_intervals_move_with_their_values():
    values = np.array([0.3, 0.9, 0.4, 0.7, 0.2])
    mean, low, high = bootstrap_interval(values)
    assert low <= mean <= high
    assert bootstrap_interval(10 - 2 * values) == pytest.approx((10 - 2 * mean, 10 - 2 * high, 10 - 2 * low))


def test_one_seed_has_no_interval():
    mean, low, high = bootstrap_interval([2.0])
    assert mean == 2 and math.isnan(low) and math.isnan(high)
    assert math.isnan(paired_difference([2.0], [1.0]).p_student)


def test_paired_by_hand():
    # gaps 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom: p = 0.0742
    got = paired_difference([5, 1, 9], [4, -1, 6])
    assert got.mean == 2 and got.p_student == pytest.approx(0.0742, abs=1e-4)
    assert got.p_sign_flip == pytest.approx(2 / 8)  # all signs as they are, or all flipped


def test_what_seeds_share_cancels():
    ours, theirs, shared = np.random.default_rng(3).normal(0, 1, (3, 6))
    assert paired_difference(ours + 100 * shared, theirs + 100 * shared) == pytest.approx(paired_difference(ours, theirs), abs=1e-9)
    assert paired_difference(theirs, ours).mean == pytest.approx(-paired_difference(ours, theirs).mean)


def test_p_values_of_nothing_are_uniform():
    rng = np.random.default_rng(11)
    results = [paired_difference(rng.normal(0, 1, 5), rng.normal(0, 1, 5)) for _ in range(800)]
    assert np.mean([result.p_student < 0.05 for result in results]) == pytest.approx(0.05, abs=0.02)
    assert min(result.p_sign_flip for result in results) == pytest.approx(2 / 32)


def test_equal_variants_do_not_differ():
    assert paired_difference([1, 2, 3], [1, 2, 3]) == (0, 0, 0, 1, 1)


def test_seeds_must_match():
    with pytest.raises(InputError, match="same seeds"):
        paired_difference([1, 2], [1, 2, 3])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1, 1])
    assert holm([0.01, math.nan])[0] == pytest.approx(0.01)
