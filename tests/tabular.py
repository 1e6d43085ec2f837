"""A language model small enough to enumerate, so that an expectation is a sum and a gradient has no noise.

Vocabulary {EOS, a, b}, at most three tokens: a response ends with EOS or is cut after the third token, which makes 1 + 2 + 4 + 8 = 15
responses and 7 contexts to speak in. The policy is a table of logits "context vocabulary"; all numbers are float64.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

EOS, MAX_LENGTH = 0, 3
CONTEXTS = [prefix for length in range(MAX_LENGTH) for prefix in product((1, 2), repeat=length)]
RESPONSES = [(*context, EOS) for context in CONTEXTS] + list(product((1, 2), repeat=MAX_LENGTH))
LENGTHS = torch.tensor([len(response) for response in RESPONSES])
MASK = torch.arange(MAX_LENGTH) < LENGTHS[:, None]  # "response token"

_TOKEN = torch.tensor([list(y) + [0] * (MAX_LENGTH - len(y)) for y in RESPONSES])
CONTEXT_OF_TOKEN = torch.tensor([[CONTEXTS.index(y[:t]) if t < len(y) else 0 for t in range(MAX_LENGTH)] for y in RESPONSES])


def token_logps(logits: Tensor) -> Tensor:
    """log pi of every token of the 15 responses, "response token", 0 after the end."""
    return (logits.log_softmax(-1)[CONTEXT_OF_TOKEN, _TOKEN] * MASK).clone()


def sequence_logps(logits: Tensor) -> Tensor:
    """log pi of the 15 responses."""
    return token_logps(logits).sum(-1)


class World(NamedTuple):
    """A prompt: the policy being trained, the one that sampled, the reference, and the reward of each response."""

    logits: Tensor
    old_logits: Tensor
    ref_logits: Tensor
    rewards: Tensor

    @property
    def logps(self) -> Tensor:
        return sequence_logps(self.logits)

    @property
    def old_logps(self) -> Tensor:
        return sequence_logps(self.old_logits)

    @property
    def ref_logps(self) -> Tensor:
        return sequence_logps(self.ref_logits)

    @property
    def score_functions(self) -> Tensor:
        """s_i = gradient of log pi(y_i) in the logits, "response parameter"."""
        jacobian = torch.autograd.functional.jacobian(sequence_logps, self.logits)
        return jacobian.flatten(1)


# How far the policy has moved from the one that sampled, in standard deviations of a logit.
STEPS = {"on-policy": 0.0, "off-policy": 0.3, "far off-policy": 2.0}


def make_world(step: float, seed: int = 0) -> World:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(len(CONTEXTS), 3, dtype=torch.float64, generator=generator) for _ in range(3)]
    rewards = torch.randn(len(RESPONSES), dtype=torch.float64, generator=generator)
    ref_logits = 0.5 * noise[0]
    old_logits = ref_logits + 0.5 * noise[1]
    return World(old_logits + step * noise[2], old_logits, ref_logits, rewards)


def all_draws(count: int) -> Tensor:
    """Every way to draw `count` responses in order, "draw response": 225 rows for a pair."""
    return torch.cartesian_prod(*[torch.arange(len(RESPONSES))] * count)


PAIRS = all_draws(2)
BETA = 0.7  # price of KL: large, so that an error in that part cannot hide
UNCLIPPED = {"clip_range": math.inf, "weight_cap": math.inf}
FORMS = {
    "joint": {"clipping": "joint"},
    "separate": {"clipping": "separate"},
    "separate own ratio": {"clipping": "separate", "cross_weight": False},
}
DISTANCES = {name: make_world(step) for name, step in STEPS.items()}

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
pair_form = pytest.mark.parametrize("form", [FORMS["joint"], FORMS["separate"]], ids=["joint", "separate"])
each_distance = pytest.mark.parametrize("world", DISTANCES.values(), ids=DISTANCES.keys())
off_policy = pytest.mark.parametrize("world", list(DISTANCES.values())[1:], ids=list(DISTANCES)[1:])


def close(actual, expected, tolerance: float = 1e-13) -> None:
    """Of tensors both in float64: what was computed in float32 must fail."""
    actual = actual if isinstance(actual, Tensor) else torch.tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def coefficients(loss, logps: Tensor) -> Tensor:
    """d loss / d logps of each row on its own, "prompt response". `loss` maps logps to terms, a mean over rows."""
    leaf = logps.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).loss, leaf)
    return gradient * len(logps)


def expected_gradient(coefs: Tensor, draws: Tensor, sampler_logps: Tensor, score_functions: Tensor) -> Tensor:
    """E over independent draws from the sampler of sum_k coef_k s_k, exactly."""
    probability = sampler_logps.exp()[draws].prod(-1, keepdim=True)
    per_response = torch.zeros(len(RESPONSES), dtype=torch.float64).index_add(0, draws.flatten(), (probability * coefs).flatten())
    return per_response @ score_functions


def gradient(function, logits: Tensor) -> Tensor:
    """Gradient of a scalar function of the logits, flat."""
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0].flatten()


def expected_reward(world: World):
    """E r, as a function of the logits."""
    return lambda logits: (sequence_logps(logits).exp() * world.rewards).sum()


def kl_objective(world: World, source: str = "current"):
    """E r - beta E log(pi/pi_ref), with the current or the frozen sampling policy inside the logarithm."""

    def objective(logits):
        logps = sequence_logps(logits)
        inside = logps if source == "current" else world.old_logps
        return (logps.exp() * (world.rewards - BETA * (inside - world.ref_logps))).sum()

    return objective
