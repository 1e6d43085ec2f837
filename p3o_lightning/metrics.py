"""How good a reward model is, accumulated pair by pair over a whole evaluation set (torchmetrics, so it also reduces over ranks)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

_SUMS = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs have no float64


class PairReport(Metric):
    """Accuracy (ties count one half), margin, log-loss, Brier score, calibration error and the length rule, each weighted by pair.

    `length_rule_accuracy` is what a reward without a model reaches: that of "the shorter response is better" or of "the longer is
    better", whichever is higher on these pairs. A reward model has to beat it.

    The model's probability that the chosen response is better is sigmoid(chosen - rejected). A pair has no natural order, so
    calibration is measured on the folded confidence max(p, 1 - p), in ten equal bins of [0.5, 1].

    Three pairs: one right, one tie, one wrong. The chosen response is always the shorter one.

    >>> report = PairReport()
    >>> report.update(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([[3, 5], [2, 4], [1, 2]]))
    >>> figures = report.compute()
    >>> round(figures["accuracy"].item(), 4), round(figures["length_rule_accuracy"].item(), 4)
    (0.5, 1.0)
    """

    full_state_update = False
    bins = 10
    pairs: Tensor
    correct: Tensor
    margin_sum: Tensor
    log_loss_sum: Tensor
    brier_sum: Tensor
    shorter_wins: Tensor
    bin_pairs: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("pairs", "correct", "margin_sum", "log_loss_sum", "brier_sum", "shorter_wins"):
            self.add_state(name, torch.zeros((), dtype=_SUMS), dist_reduce_fx="sum")
        for name in ("bin_pairs", "bin_confidence", "bin_correct"):
            self.add_state(name, torch.zeros(self.bins, dtype=_SUMS), dist_reduce_fx="sum")

    def update(self, scores: Float[Tensor, "pair 2"], response_lengths: Int[Tensor, "pair 2"]) -> None:
        """Add pairs. `scores`: reward of (chosen, rejected); `response_lengths`: their tokens."""
        gap = scores[:, 0].to(_SUMS) - scores[:, 1].to(_SUMS)
        right = (gap > 0).to(_SUMS) + 0.5 * (gap == 0)
        probability = gap.sigmoid()
        self.pairs += len(gap)
        self.correct += right.sum()
        self.margin_sum += gap.sum()
        self.log_loss_sum += torch.nn.functional.softplus(-gap).sum()
        self.brier_sum += (1 - probability).square().sum()
        shorter = response_lengths[:, 0] - response_lengths[:, 1]
        self.shorter_wins += ((shorter < 0).to(_SUMS) + 0.5 * (shorter == 0)).sum()
        confidence = torch.maximum(probability, 1 - probability)
        index = ((confidence - 0.5) * 2 * self.bins).long().clamp(0, self.bins - 1)  # 0: a NaN gap, which the other figures show
        for bins, values in ((self.bin_pairs, torch.ones_like(gap)), (self.bin_confidence, confidence), (self.bin_correct, right)):
            bins.index_add_(0, index, values.to(bins.dtype))  # FSDP1 rounds the states

    def compute(self) -> dict[str, Tensor]:
        """The figures by name; `accuracy_low` and `accuracy_high` are the 95 % Wilson interval, of independent pairs."""
        low, high = wilson_interval(self.correct, self.pairs)
        return {
            "accuracy": self.correct / self.pairs,
            "accuracy_low": low,
            "accuracy_high": high,
            "margin": self.margin_sum / self.pairs,
            "log_loss": self.log_loss_sum / self.pairs,
            "brier": self.brier_sum / self.pairs,
            "ece": (self.bin_confidence - self.bin_correct).abs().sum() / self.pairs,
            "length_rule_accuracy": torch.maximum(self.shorter_wins, self.pairs - self.shorter_wins) / self.pairs,
        }


def wilson_interval(wins: Tensor, trials: Tensor, z: float = 1.959964) -> tuple[Tensor, Tensor]:
    """95 % interval of a share (Wilson 1927), sound for small counts and shares near 0 or 1; a tie counts half a win."""
    share = wins / trials
    centre = share + z * z / (2 * trials)
    half = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)).sqrt()
    return (centre - half) / (1 + z * z / trials), (centre + half) / (1 + z * z / trials)
