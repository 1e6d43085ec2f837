"""A language model small enough to enumerate, so that an expectation is a sum and a gradient has no noise.

Vocabulary {EOS, a, b}, at most three tokens: a response ends with EOS or is cut after the third token, which makes 1 + 2 + 4 + 8 = 15
responses and 7 contexts to speak in. The policy is a table of logits "context vocabulary"; all numbers are float64.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

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
