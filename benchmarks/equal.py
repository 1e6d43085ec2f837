"""Equal work: what an iteration of a case must do, on every side, and whether it did."""

from __future__ import annotations

import math
from typing import Any

from cases import MEAN_LENGTH, Case

Work = dict[str, int]


class UnequalWork(Exception):
    """A side did other work than the case says, so its time means nothing."""


def expected(case: Case) -> Work:
    """Counts that hold exactly, in every iteration.

    rows are responses drawn, each scored once by the reference and once by the reward model, and trained on once an epoch; steps are
    optimizer steps; tokens are those of the responses, or of whole pairs.
    """
    if case.kind == "reward":
        pairs = case.prompts * case.updates
        exact = {"pairs": pairs, "steps": case.updates}
        return exact | ({"tokens": pairs * 2 * (case.prompt_tokens + case.new_tokens)} if case.lengths == "fixed" else {})
    exact = dict.fromkeys(("rows", "reference_rows", "reward_rows"), case.rows)
    exact |= {"trained_rows": case.rows * case.epochs, "steps": case.epochs, "prompt_tokens": case.rows * case.prompt_tokens}
    return exact | ({"tokens": case.rows * case.new_tokens} if case.lengths == "fixed" else {})


def length_law(limit: int) -> tuple[float, float]:
    """Mean and standard deviation of the tokens of an uneven response: it ends with chance 1 / MEAN_LENGTH after each, or at the limit."""
    stay = 1 - 1 / MEAN_LENGTH
    chances = {n: stay ** (n - 1) / MEAN_LENGTH for n in range(1, limit)} | {limit: stay ** (limit - 1)}
    mean = sum(n * chance for n, chance in chances.items())
    return mean, math.sqrt(sum((n - mean) ** 2 * chance for n, chance in chances.items()))


def check(case: Case, sides: dict[str, list[Work]]) -> dict[str, Any]:
    """The counts of an iteration, for the record; UnequalWork names side, count, and what it was.

    Responses of uneven length are drawn anew by each side: their number of tokens may differ by chance, four standard errors at most.
    """
    exact = expected(case)
    for side, rounds in sides.items():
        for number, work in enumerate(rounds, 1):
            for name, amount in exact.items():
                if work.get(name) != amount:
                    raise UnequalWork(f"{side}, round {number}: {name} is {work.get(name)}, but the case has {amount}.")
    tokens = {side: [work["tokens"] for work in rounds] for side, rounds in sides.items()}
    if case.kind == "reward" and len({count for counts in tokens.values() for count in counts}) > 1:
        raise UnequalWork(f"tokens of a pass over the same pairs differ: {tokens}.")
    if case.kind == "policy" and case.lengths == "uneven":
        mean, deviation = length_law(case.new_tokens)
        for side, counts in tokens.items():
            drawn = len(counts) * case.rows
            error = deviation / math.sqrt(drawn)
            if abs(sum(counts) / drawn - mean) > 4 * error:
                raise UnequalWork(f"{side}: responses have {sum(counts) / drawn:.1f} tokens on average, expected {mean:.1f} ± {error:.1f}.")
    return {**exact, "tokens": {side: sum(counts) / len(counts) for side, counts in tokens.items()}}
