"""Several reward models as one reward: their mean, their minimum, or their mean less k standard deviations.

An over-optimised policy finds what one reward model gets wrong; members that were trained on other seeds or splits are wrong elsewhere, and
disagree there (Coste, Anwar, Kirk, Krueger 2024, arXiv 2310.02743).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from p3o_lightning.errors import InputError

AGGREGATES = ("mean", "min", "mean_minus_sd")


class Ensemble:
    """Several reward models (or functions) as one of `reward_funcs`.

    Args:
        members: reward sources as in reward_funcs, two or more, e.g. folders of reward models trained on different seeds or splits.
        aggregate: "mean"; "min", the least of the members' scores; or "mean_minus_sd", the mean less k standard deviations. The last two
            compare the members' zero points, which a Bradley-Terry loss leaves free: train members with center_coef.
        k: standard deviations subtracted by mean_minus_sd, 0 or more.
        weights: of the members in mean and standard deviation, above 0, scaled to sum 1; None: equal. Not for "min".
        name: in the tags of the dashboard.
    """

    def __init__(
        self, members: list[Any], aggregate: str = "mean", k: float = 1.0, weights: list[float] | None = None, name: str = "ensemble"
    ) -> None:
        self.members, self.aggregate, self.k, self.name = members, aggregate, k, name
        self.weights = weights

    def check(self) -> None:
        """Stop at a setting out of range. Not in the constructor: where YAML makes the object, its message would be lost."""
        members, weights = self.members, self.weights
        if len(members) < 2:
            raise InputError("ensemble.members: give two reward models or more, e.g. [runs/reward-0/export, runs/reward-1/export].")
        if self.aggregate not in AGGREGATES:
            raise InputError(f"ensemble.aggregate is {self.aggregate!r}: choose {', '.join(AGGREGATES[:-1])} or {AGGREGATES[-1]}.")
        if not (self.k >= 0 and math.isfinite(self.k)):
            raise InputError(f"ensemble.k is {self.k}: choose a number of standard deviations, 0 or more, e.g. 1.")
        if weights is not None and (len(weights) != len(members) or not all(math.isfinite(weight) and weight > 0 for weight in weights)):
            raise InputError(f"ensemble.weights is {weights} for {len(members)} members: give one number above 0 for each.")
        if weights is not None and self.aggregate == "min":
            raise InputError("ensemble.weights is given with ensemble.aggregate min, which reads none: leave it out.")

    def combine(self, scores: Float[Tensor, "member prompt response"]) -> Float[Tensor, "prompt response"]:
        """The reward that the members' scores make together, in their units."""
        if self.aggregate == "min":
            return scores.amin(0)
        mean = self._mean(scores)
        return mean - self.k * self.spread(scores) if self.aggregate == "mean_minus_sd" else mean

    def spread(self, scores: Float[Tensor, "member prompt response"]) -> Float[Tensor, "prompt response"]:
        """The (population) standard deviation over members."""
        return self._mean((scores - self._mean(scores)).square()).sqrt()

    def _mean(self, scores: Tensor) -> Tensor:
        weights = scores.new_tensor(self.weights or [1.0] * len(scores))
        return torch.einsum("m,m...->...", weights / weights.sum(), scores)


class EnsembleReward:
    """An ensemble whose members are loaded, as a reward source.

    Args:
        members: the sources, in the order of `settings.members`.
        settings: how their scores are combined.
    """

    def __init__(self, members: Sequence[Any], settings: Ensemble) -> None:
        self.members, self.settings, self.name = list(members), settings, settings.name

    def parts(self, responses: Any) -> dict[str, Float[Tensor, "prompt response"]]:
        """Every member's own scores by name, and under the ensemble's name what they make together."""
        each = {member.name: member(responses) for member in self.members}
        return {**each, self.name: self.settings.combine(torch.stack(list(each.values())))}

    def __call__(self, responses: Any) -> Float[Tensor, "prompt response"]:
        """The combined scores."""
        return self.parts(responses)[self.name]

    def figures(self, each: dict[str, Tensor]) -> dict[str, Tensor]:
        """`rewards/<ensemble>/sd`: mean over responses of the standard deviation over members, reward units."""
        if self.name not in each:  # a rollout_step of the user's own scored in its own way
            return {}
        scores = torch.stack([each[member.name] for member in self.members])
        return {f"rewards/{self.name}/sd": self.settings.spread(scores).mean()}
