"""How far a reward model can be trusted: calibration, temperature, length-matched accuracy, per-prompt shifts, disagreement, EOS.

Pure functions on scores of pairs, each in float64, independent of any model.

Axes:   pair = comparisons;  2 = (chosen, rejected);  model = members of an ensemble.
Units:  scores and gaps in reward units; gap = score(chosen) - score(rejected); P(chosen is better) = sigmoid(gap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from p3o_lightning.metrics import PairReport, wilson_interval
from p3o_lightning.win_rates import share_interval

LENGTH_TOLERANCE = 0.1  # share of the longer one by which two lengths may differ and still match


class Bin(NamedTuple):
    """One bin of the reliability curve, over folded confidence max(p, 1 - p): a pair has no natural order."""

    low: float
    high: float
    pairs: int
    confidence: float  # mean of the bin; NaN if it is empty
    accuracy: float  # share of its pairs that are ranked as people did, a tie 1/2
    accuracy_low: float  # 95 % Wilson interval
    accuracy_high: float


def reliability_curve(gaps: Float[Tensor, " pair"], bins: int = 10) -> list[Bin]:
    """Confidence against accuracy in equal bins of [0.5, 1]; on the diagonal, the model is as often right as it says.

    The expected calibration error of `PairReport` is the mean of |confidence - accuracy| over these bins, weighted by pair.
    """
    gaps = gaps.double()
    confidence, right = gaps.abs().sigmoid(), correct(gaps)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    curve = []
    for number in range(bins):
        inside = index == number
        count = inside.sum().double()
        share = [*wilson_interval(right[inside].sum(), count)]
        figures = [confidence[inside].mean(), right[inside].mean(), *share]
        curve.append(Bin(0.5 + number / (2 * bins), 0.5 + (number + 1) / (2 * bins), int(count), *map(float, figures)))
    return curve


def correct(gaps: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """1 where chosen scores higher, 0 where lower, 1/2 for a tie."""
    return (gaps > 0).double() + 0.5 * (gaps == 0).double()


def log_loss(gaps: Float[Tensor, " pair"], temperature: float = 1.0) -> float:
    """Mean of -log sigmoid(gap / temperature), nats a pair."""
    if temperature == math.inf:
        return math.log(2)
    if temperature == 0:
        return 0.0 if bool((gaps > 0).all()) else math.inf
    return float(softplus(-gaps.double() / temperature).mean())


def fitted_temperature(gaps: Float[Tensor, " pair"]) -> float:
    """The temperature T that minimises the log-loss of sigmoid(gap / T) on these pairs (Guo et al. 2017, arXiv 1706.04599).

    Above 1 the model is too sure of itself, below 1 not sure enough. inf where no scale of the scores beats a coin; 0 where every pair is
    ranked as people did, so that more confidence is always better.
    """
    gaps = gaps.double()
    if not bool(gaps.isfinite().all()) or len(gaps) == 0:
        return math.nan
    if float(gaps.mean()) <= 0:  # the slope of the loss at 1/T = 0 is -mean(gap) / 2, and the loss is convex in 1/T
        return math.inf
    if bool((gaps >= 0).all()):
        return 0.0

    def slope(inverse: float) -> float:
        return float(-(gaps * (-inverse * gaps).sigmoid()).mean())

    low, high = 0.0, 1.0 / float(gaps.abs().mean())
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


class Share(NamedTuple):
    """An accuracy over some of the pairs. NaN where there is none."""

    pairs: int
    accuracy: float
    low: float  # 95 %: Wilson where every prompt has one pair, else the bootstrap over prompts
    high: float


def accuracy(gaps: Float[Tensor, " pair"], prompts: Int[Tensor, " pair"] | None = None) -> Share:
    """The share of pairs ranked as people did. Pairs of one prompt are not independent; `prompts` None: each has its own."""
    right = correct(gaps)
    groups = torch.arange(len(right)) if prompts is None else prompts.unique(return_inverse=True)[1]
    low, high = share_interval(right, groups)
    return Share(len(right), float(right.mean()), float(low), float(high))


def length_matched(
    gaps: Float[Tensor, " pair"],
    lengths: Int[Tensor, "pair 2"],
    tolerance: float = LENGTH_TOLERANCE,
    prompts: Int[Tensor, " pair"] | None = None,
) -> Share:
    """Accuracy on the pairs whose lengths differ by at most `tolerance` of the longer one: what is left when length says nothing."""
    longer, shorter = lengths.amax(1), lengths.amin(1)
    near = (longer - shorter) <= tolerance * longer
    return accuracy(gaps[near], None if prompts is None else prompts[near])


class Shifts(NamedTuple):
    """Where the variance of a reward lies. P3O reads only differences within a prompt; PPO's update on a batch sees the rest too."""

    prompt_mean_sd: float  # standard deviation over prompts of the prompt's mean reward
    within_prompt_sd: float  # pooled standard deviation of rewards around their prompt's mean: what can be learned from
    shift_sd: float  # of the per-prompt shift delta(x) itself: the noise of the prompt means is taken out; 0 if it explains them
    shift_share: float  # shift variance / (shift variance + within-prompt variance), in [0, 1]: the intraclass correlation


def prompt_shifts(scores: Float[Tensor, " response"], prompts: Int[Tensor, " response"]) -> Shifts:
    """The one-way random-effects analysis of variance of rewards by prompt (Searle, Casella, McCulloch 1992, section 3.6).

    Args:
        scores: of any responses, two or more for most prompts.
        prompts: a number for each response's prompt.
    """
    scores = scores.double()
    groups = prompts.unique(return_inverse=True)[1]
    count, total = int(groups.max()) + 1, len(scores)
    sizes = torch.bincount(groups, minlength=count).double()
    means = torch.zeros(count, dtype=torch.float64).index_add(0, groups, scores) / sizes
    if count < 2 or total <= count:
        return Shifts(math.nan, math.nan, math.nan, math.nan)
    within = float((scores - means[groups]).square().sum() / (total - count))
    between = float((sizes * (means - scores.mean()).square()).sum() / (count - 1))
    size = (total - float(sizes.square().sum()) / total) / (count - 1)  # responses a prompt, were they equally many
    shift = max((between - within) / size, 0.0)
    share = shift / (shift + within) if shift + within > 0 else math.nan
    return Shifts(float(means.std()), math.sqrt(within), math.sqrt(shift), share)


class Disagreement(NamedTuple):
    """How far the members of an ensemble differ on the same pairs. Only gaps are compared: a member's zero point is its own."""

    gap_sd: float  # mean over pairs of the standard deviation over members of the gap, reward units
    mean_gap: float  # mean over pairs of |mean gap|, reward units: the scale to read gap_sd on
    split_rate: float  # share of pairs that not all members rank alike
    accuracy_unanimous: float  # accuracy on the pairs that all rank alike; NaN if there is none
    accuracy_split: float  # of the ensemble's mean, on the others


def disagreement(gaps: Float[Tensor, "model pair"]) -> Disagreement:
    """Of two or more members on the same pairs."""
    gaps = gaps.double()
    mean, unanimous = gaps.mean(0), (gaps.sign() == gaps[0].sign()).all(0)
    return Disagreement(
        gap_sd=float(gaps.std(0).mean()),
        mean_gap=float(mean.abs().mean()),
        split_rate=float((~unanimous).double().mean()),
        accuracy_unanimous=accuracy(mean[unanimous]).accuracy,
        accuracy_split=accuracy(mean[~unanimous]).accuracy,
    )


class EosEffect(NamedTuple):
    """What the final EOS does to a reward: a response that is cut off has none."""

    shift: float  # mean of score with EOS - score without, reward units
    shift_sd: float  # its standard deviation over responses: read it beside the within-prompt spread; a constant shift does no harm
    flip_rate: float  # share of pairs whose order changes when both lose their EOS
    accuracy_without: float  # accuracy where both have lost it
    turn_rate: float  # share of pairs whose better response loses when it alone is cut off


def eos_effect(ended: Float[Tensor, "pair 2"], cut: Float[Tensor, "pair 2"]) -> EosEffect:
    """From scores of the same responses with EOS (`ended`) and without it (`cut`)."""
    ended, cut = ended.double(), cut.double()
    shift = (ended - cut).flatten()
    before, after = ended[:, 0] - ended[:, 1], cut[:, 0] - cut[:, 1]
    rows, best = torch.arange(len(ended)), ended.argmax(1)
    turned = cut[rows, best] < ended[rows, 1 - best]
    return EosEffect(
        shift=float(shift.mean()),
        shift_sd=float(shift.std()),
        flip_rate=float((before.sign() != after.sign()).double().mean()),
        accuracy_without=accuracy(after).accuracy,
        turn_rate=float(turned.double().mean()),
    )


def report_card(
    scores: Float[Tensor, "pair 2"], lengths: Int[Tensor, "pair 2"], prompts: Int[Tensor, " pair"], sources: Sequence[str] | None = None
) -> dict[str, Any]:
    """Every figure of one reward model on pairs that people ranked, as plain values by name.

    Args:
        scores: of (chosen, rejected).
        lengths: their tokens.
        prompts: a number for each pair's prompt.
        sources: where each pair comes from; None: the data does not say.
    """
    gaps = scores[:, 0].double() - scores[:, 1].double()
    temperature = fitted_temperature(gaps)
    matched = length_matched(gaps, lengths, prompts=prompts)
    card: dict[str, Any] = {
        "pairs": len(gaps),
        "ties": int((gaps == 0).sum()),
        **_summary(scores, lengths, prompts),
        "temperature": temperature,
        "log_loss_at_temperature": log_loss(gaps, temperature) if not math.isnan(temperature) else math.nan,
        "length_matched_pairs": matched.pairs,
        "length_matched_accuracy": matched.accuracy,
        "length_matched_low": matched.low,
        "length_matched_high": matched.high,
        **prompt_shifts(scores.flatten(), prompts.repeat_interleave(2))._asdict(),
        "curve": [one._asdict() for one in reliability_curve(gaps)],
    }
    if sources is not None:
        card["sources"] = {}
        for name in sorted(set(sources)):
            rows = torch.tensor([source == name for source in sources])
            card["sources"][name] = {"pairs": int(rows.sum()), **_summary(scores[rows], lengths[rows], prompts[rows])}
    return card


def _summary(scores: Tensor, lengths: Tensor, prompts: Tensor) -> dict[str, float]:
    report = PairReport()
    report.update(scores, lengths)
    share = accuracy(scores[:, 0].double() - scores[:, 1].double(), prompts)
    return {**{name: float(value) for name, value in report.compute().items()}, "accuracy_low": share.low, "accuracy_high": share.high}
