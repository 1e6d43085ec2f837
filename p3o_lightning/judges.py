"""Judges: which of two responses to a prompt is better. They measure a policy (win rate), and train one where no scalar reward exists.

A judge is asked in both orders, since language models favour a place; what the two answers say together is a Verdicts.

Units: a preference is a probability in [0, 1] that one response is better; 0.5 is a tie, NaN no verdict.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p3o_lightning.data_formats import Text
from p3o_lightning.errors import InputError


class Judge(ABC):
    """Says how probable it is that the first of two responses is the better one. Extend it, or wrap a function in FunctionJudge.

    `symmetric`: whether the answer cannot depend on the order; such a judge is asked once.
    """

    name: str = "judge"
    symmetric: bool = False

    @abstractmethod
    def __call__(self, prompts: list[Text], first: list[str], second: list[str], **columns: list[Any]) -> Sequence[float | None]:
        """One preference in [0, 1] for the first response of every comparison; None where there is no verdict.

        Args:
            prompts: as in the data: texts, or lists of {"role", "content"} messages.
            first: the responses shown in the first place.
            second: those in the second place.
            **columns: the data's other columns, one value for every comparison.
        """

    def check(self) -> None:  # noqa: B027  (nothing to check by default)
        """Stop with InputError at a setting out of range. Not in the constructor, whose message is lost where YAML makes the object."""


class FunctionJudge(Judge):
    """A Python function `f(prompts, first, second, **columns) -> list[float | None]` as a judge; also as a decorator, `@FunctionJudge`.

    Args:
        function: returns the preference for the first response of every comparison, in [0, 1]; True and False are 1 and 0.
        symmetric: promise that the order of the two cannot matter, so that it is asked once.
    """

    def __init__(self, function: Callable[..., Any], symmetric: bool = False) -> None:
        update_wrapper(self, function)
        self.function, self.symmetric = function, symmetric
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: list[Text], first: list[str], second: list[str], **columns: list[Any]) -> Any:
        """The function's own answer."""
        return self.function(prompts=prompts, first=first, second=second, **columns)


class Verdicts(NamedTuple):
    """What a judge says of pairs of responses (a, b), one entry a comparison. NaN: no verdict."""

    for_a: Float[Tensor, " comparison"]  # preference for a, when a was shown first
    for_b: Float[Tensor, " comparison"]  # preference for b, when b was shown first

    @property
    def preference(self) -> Float[Tensor, " comparison"]:
        """Probability that a is better, the mean of both orders; NaN unless both gave a verdict."""
        return (1 + self.for_a - self.for_b) / 2

    @property
    def contradicts(self) -> Bool[Tensor, " comparison"]:
        """Where the two orders prefer different responses."""
        return (self.for_a - 0.5) * (self.for_b - 0.5) > 0

    @property
    def outcome(self) -> Float[Tensor, " comparison"]:
        """1 where a wins, 0 where it loses; 0.5 for a tie, which a contradiction between the orders is too; NaN without a verdict."""
        lead = self.for_a - self.for_b
        won = lead.sign().masked_fill(self.contradicts, 0)
        return ((1 + won) / 2).masked_fill(lead.isnan(), math.nan)

    @property
    def gap(self) -> Float[Tensor, " comparison"]:
        """P(a beats b) - P(b beats a), in [-1, 1]: the preference as a reward gap. 0 without a verdict: it then teaches nothing.

        Its sign turns, to the bit, when a and b change places.
        """
        return (self.for_a - self.for_b).nan_to_num(0.0)

    def figures(self) -> dict[str, Tensor]:
        """How the judge behaves: shares over the comparisons.

        `tie_rate`, `contradiction_rate` (the orders disagree) and `position_bias` (mean preference for the first place, less 0.5: 0 for
        a fair judge, 0.5 for one that always takes the first) are over those with a verdict, `no_verdict` over all.
        """
        judged = ~self.preference.isnan()
        count = judged.sum().clamp(min=1)
        return {
            "tie_rate": (self.outcome == 0.5).sum() / count,
            "contradiction_rate": self.contradicts.sum() / count,
            "position_bias": ((self.for_a + self.for_b - 1) / 2)[judged].sum() / count,
            "no_verdict": (~judged).sum() / max(len(judged), 1),
        }


def compare(judge: Judge, prompts: list[Text], a: list[str], b: list[str], **columns: list[Any]) -> Verdicts:
    """Ask a judge about every pair (a, b) in both orders, in one call. Two equal responses are a tie, and are not asked about."""
    asked = [index for index, (one, other) in enumerate(zip(a, b, strict=True)) if one != other]
    verdicts = Verdicts(*torch.full((2, len(a)), 0.5, dtype=torch.float64))
    if not asked:
        return verdicts
    orders = 1 if judge.symmetric else 2
    one, other = [a[index] for index in asked], [b[index] for index in asked]
    about = [prompts[index] for index in asked]
    others = {name: [values[index] for index in asked] * orders for name, values in columns.items()}
    shown = (one, other) if judge.symmetric else (one + other, other + one)
    answer = _checked(judge, judge(about * orders, *shown, **others), len(shown[0]))
    verdicts.for_a[asked] = answer[: len(asked)]
    verdicts.for_b[asked] = 1 - answer if judge.symmetric else answer[len(asked) :]
    return verdicts


def group_gaps(
    judge: Judge, prompts: list[Text], texts: list[list[str]], **columns: list[Any]
) -> tuple[Float[Tensor, "prompt response response"], dict[str, Tensor]]:
    """Gaps between all responses of every prompt, and the judge's figures.

    gaps[x, i, j] = P(i beats j) - P(j beats i), antisymmetric to the bit. It need not come from a scalar: i may beat j, j k, and k i.

    Args:
        judge: asked about all K (K - 1) / 2 pairs of each prompt, in both orders.
        prompts: one for each group.
        texts: the K responses to each prompt.
        **columns: the data's other columns, one value for each prompt.
    """
    count = len(texts[0])
    pairs = [(row, i, j) for row in range(len(texts)) for i in range(count) for j in range(i + 1, count)]
    rows, firsts, seconds = (list(indices) for indices in zip(*pairs, strict=True))
    verdicts = compare(
        judge,
        [prompts[row] for row in rows],
        [texts[row][i] for row, i, _ in pairs],
        [texts[row][j] for row, _, j in pairs],
        **{name: [values[row] for row in rows] for name, values in columns.items()},
    )
    gaps = torch.zeros(len(texts), count, count, dtype=torch.float32)
    gap = verdicts.gap.float()
    gaps[rows, firsts, seconds], gaps[rows, seconds, firsts] = gap, -gap
    return gaps, verdicts.figures()


def _checked(judge: Judge, answer: Any, count: int) -> Float[Tensor, " comparison"]:
    """The preferences as float64, NaN for None."""
    field = f"judge {judge.name}"
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{field} returned {type(answer).__name__}: return a list of {count} preferences in [0, 1], one a comparison.")
    if len(values) != count:
        raise InputError(f"{field} returned {len(values)} preferences for {count} comparisons: return one for each, in order.")
    for index, value in enumerate(values):
        if value is not None and (isinstance(value, str) or not hasattr(value, "__float__") or not 0 <= float(value) <= 1):
            text = " ".join(repr(value).split())[:60]
            raise InputError(
                f"{field} returned {text} at position {index}: return the probability in [0, 1] that the first response is better, "
                "or None without a verdict."
            )
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)
