"""The reward model's loss, against hand-made answers, an enumerated likelihood and what the paper's Lemma 1 says of it.

The power of these tests, found by planting one error at a time in objectives.py:
    planted error                     first test that fails, without test_ (cases that fail)
    chosen and rejected swapped       by_hand (7)
    margin added                      margin_by_hand (1)
    smoothing on the wrong side       by_hand (7)
    smoothing without its complement  label_smoothing_by_hand_and_its_optimum (1)
    sum, not mean                     by_hand (3)
    centring on the difference        centring_by_hand (3)
    centring without the square       centring_by_hand (3)
    ties count as right               by_hand (1)
    accuracy after the margin         margin_by_hand (1)
    half precision kept               half_precision_rewards_are_compared_in_float32 (1)
    log of sigmoid                    finite_at_extremes (2)
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from p3o_lightning.errors import InputError
from p3o_lightning.objectives import bradley_terry_loss


def rewards(pairs: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pairs, dtype=torch.float64, generator=generator) for _ in range(2)]


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    # sigmoid(ln 3) = 3/4 and sigmoid(0) = 1/2: -(ln 3/4 + ln 1/2) / 2 = ln(8/3) / 2; one pair is right, one tied
    terms = bradley_terry_loss(float64(math.log(3), 2.0), float64(0.0, 2.0))
    assert_close(terms.loss, torch.tensor(math.log(8 / 3) / 2, dtype=torch.float64), rtol=1e-14, atol=0)
    assert terms.accuracy == 0.75
    assert_close(terms.margin, torch.tensor(math.log(3) / 2, dtype=torch.float64), rtol=1e-14, atol=0)


def test_margin_by_hand():
    # a lead of ln 6 where ln 2 is required leaves ln 3; the reported lead and accuracy are those of the rewards
    terms = bradley_terry_loss(float64(math.log(6)), float64(0.0), margin=float64(math.log(2)))
    assert terms.loss.item() == pytest.approx(math.log(4 / 3), rel=1e-14)
    assert terms.margin.item() == pytest.approx(math.log(6), rel=1e-14)
    assert bradley_terry_loss(float64(1.0), float64(0.0), margin=float64(2.0)).accuracy == 1


def test_label_smoothing_by_hand_and_its_optimum():
    # sigmoid(ln 3) = 3/4: -(0.9 ln 3/4 + 0.1 ln 1/4)
    terms = bradley_terry_loss(float64(math.log(3)), float64(0.0), label_smoothing=0.1)
    assert terms.loss.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25), rel=1e-14)
    # a tenth of wrong labels is best met by sigmoid = 0.9, a lead of ln 9
    lead = float64(math.log(9)).requires_grad_()
    (slope,) = torch.autograd.grad(bradley_terry_loss(lead, float64(0.0), label_smoothing=0.1).loss, lead)
    assert abs(slope.item()) < 1e-15


def test_centring_by_hand():
    # (1 + 3)^2 and (2 - 2)^2, mean 8, times 0.5
    chosen, rejected = float64(1.0, 2.0), float64(3.0, -2.0)
    extra = bradley_terry_loss(chosen, rejected, center_coef=0.5).loss - bradley_terry_loss(chosen, rejected).loss
    assert extra.item() == pytest.approx(4.0, rel=1e-14)


def test_it_is_the_negative_log_likelihood_of_the_model():
    """P(chosen > rejected) = exp(chosen) / (exp(chosen) + exp(rejected))."""
    chosen, rejected = rewards()
    likelihood = (chosen.exp() / (chosen.exp() + rejected.exp())).prod()
    assert_close(bradley_terry_loss(chosen, rejected).loss, -likelihood.log() / 6, rtol=1e-13, atol=1e-13)


def test_gradient_is_the_probability_of_the_other_order():
    chosen, rejected = (reward.requires_grad_() for reward in rewards())
    up, down = torch.autograd.grad(bradley_terry_loss(chosen, rejected).loss, (chosen, rejected))
    wrong = rejected.exp() / (chosen.exp() + rejected.exp())
    assert_close(up, -wrong.detach() / 6, rtol=1e-13, atol=1e-13)
    assert_close(down, wrong.detach() / 6, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"margin": torch.linspace(0, 1, 6, dtype=torch.float64)}])
def test_lemma_1_a_shift_of_a_prompts_rewards_changes_nothing(settings):
    chosen, rejected = rewards()
    shift = 10 * torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = bradley_terry_loss(chosen + shift, rejected + shift, **settings)
    for value, wanted in zip(moved, bradley_terry_loss(chosen, rejected, **settings), strict=True):
        assert_close(value, wanted, rtol=1e-12, atol=1e-13)


def test_centring_gives_lemma_1_up_on_purpose():
    chosen, rejected = rewards()
    plain, moved = (bradley_terry_loss(chosen + shift, rejected + shift, center_coef=0.1).loss for shift in (0.0, 1.0))
    assert moved > plain + 0.1


def test_enumerated_preferences_are_recovered():
    """Expected loss over Bradley-Terry labels has zero gradient at the true rewards: every ordered pair, weighed by its probability."""
    truth = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model = truth.clone().requires_grad_()
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        total = total + (truth[a] - truth[b]).sigmoid() * bradley_terry_loss(model[a : a + 1], model[b : b + 1]).loss
    (slope,) = torch.autograd.grad(total, model)
    assert slope.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extremes(dtype):
    chosen = torch.tensor([-1e4, 0.0, 1e4], dtype=dtype).requires_grad_()
    terms = bradley_terry_loss(chosen, torch.zeros(3, dtype=dtype), label_smoothing=0.1)
    assert all(value.isfinite() for value in terms)
    assert torch.autograd.grad(terms.loss, chosen)[0].isfinite().all()


def test_half_precision_rewards_are_compared_in_float32():
    # 100 and 100.5 are bfloat16 numbers; their sum 200.5 is not (its neighbours are 200 and 201)
    chosen, rejected = torch.tensor([100.5], dtype=torch.bfloat16), torch.tensor([100.0], dtype=torch.bfloat16)
    terms = bradley_terry_loss(chosen, rejected, center_coef=1.0)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(200.5**2 + math.log1p(math.exp(-0.5)), rel=1e-6)
    wide = bradley_terry_loss(chosen.float(), rejected.float(), margin=torch.tensor([0.0]))
    assert wide.margin == terms.margin == 0.5


def test_only_the_loss_carries_a_gradient():
    chosen, rejected = (reward.requires_grad_() for reward in rewards())
    terms = bradley_terry_loss(chosen, rejected)
    assert [value.requires_grad for value in terms] == [True, False, False]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing": 0.5}, r"label_smoothing is 0\.5, .* choose a value in \[0, 0\.5\), e\.g\. 0\.1"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
        ({"center_coef": -1.0}, r"center_coef is -1\.0, .* choose 0 \(off\) or e\.g\. 0\.01"),
    ],
)
def test_errors_name_the_field_the_value_and_the_fix(settings, message):
    with pytest.raises(InputError, match=message):
        bradley_terry_loss(*rewards(), **settings)


def test_errors_of_shape():
    """Called without the shape annotations' own check, which tests switch on and which would speak first."""
    loss = inspect.unwrap(bradley_terry_loss)
    with pytest.raises(InputError, match=r"chosen has shape \(2, 1\), .* reshape it to \(pair,\)"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(InputError, match=r"rejected has shape \(3,\), but \(2,\) is needed"):
        loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match=r"margin has shape \(1,\), but \(2,\) is needed"):
        loss(torch.zeros(2), torch.zeros(2), margin=torch.zeros(1))
