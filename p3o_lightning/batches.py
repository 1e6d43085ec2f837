"""What travels between data, rollout and loss: one NamedTuple each, moved to a device and pinned as it is.

Axes:  row, pair, prompt = rows of the batch;  2 = (chosen, rejected);  response = the K responses drawn for one prompt;
       token = positions, padded;  prompt_token = positions of the prompt, padded on the left.
Masks are True on real tokens. No code infers a mask from token ids: the padding id may equal a needed EOS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class DemonstrationBatch(NamedTuple):
    """Prompt and response in one row, padded on the right."""

    tokens: Int[Tensor, "row token"]
    attention_mask: Bool[Tensor, "row token"]
    response_mask: Bool[Tensor, "row token"]  # True on response tokens, EOS included: they carry the loss


class PairBatch(NamedTuple):
    """Two responses to one prompt, each after the prompt, padded on the right. Index 0 is the chosen one, 1 the rejected."""

    tokens: Int[Tensor, "pair 2 token"]
    attention_mask: Bool[Tensor, "pair 2 token"]
    response_lengths: Int[Tensor, "pair 2"]  # tokens of the response alone, EOS included
    margin: Float[Tensor, " pair"] | None  # how much better the chosen one is, in reward units; None: the data does not say


class PromptBatch(NamedTuple):
    """Prompts to answer, padded on the left so that every response starts in the same column."""

    tokens: Int[Tensor, "prompt prompt_token"]
    attention_mask: Bool[Tensor, "prompt prompt_token"]
    prompts: list[Any]  # as in the data: a string, or a list of {"role", "content"} messages
    columns: dict[str, list[Any]]  # the data's other columns, handed to reward functions by name


class Experience(NamedTuple):
    """One rollout, or a micro-batch of it. All K responses of a prompt stay in one row: a pair is never split."""

    prompt_tokens: Int[Tensor, "prompt prompt_token"]
    prompt_mask: Bool[Tensor, "prompt prompt_token"]
    completion_tokens: Int[Tensor, "prompt response token"]  # as sampled, padded on the right
    completion_mask: Bool[Tensor, "prompt response token"]  # True on sampled tokens, EOS included
    old_token_logps: Float[Tensor, "prompt response token"]  # nats under the policy that sampled; 0 outside the mask
    ref_token_logps: Float[Tensor, "prompt response token"]  # nats under the reference; 0 outside the mask
    scores: Float[Tensor, "prompt response"] | None = None  # reward units, KL not included
    gaps: Float[Tensor, "prompt response response"] | None = None  # a judge's antisymmetric gaps; where given, the loss reads them alone
    values: Float[Tensor, "prompt response token"] | None = None  # ppo: the critic's before each token, reward units; 0 outside the mask
    sampler_token_logps: Float[Tensor, "prompt response token"] | None = None  # nats under what drew them, where that is not the policy

    @property
    def old_logps(self) -> Float[Tensor, "prompt response"]:
        """Nats of the whole response under the policy that sampled it."""
        return self.old_token_logps.sum(-1)

    @property
    def sampler_logps(self) -> Float[Tensor, "prompt response"] | None:
        """Nats of the whole response under what drew it, where that is not the policy."""
        return None if self.sampler_token_logps is None else self.sampler_token_logps.sum(-1)

    @property
    def ref_logps(self) -> Float[Tensor, "prompt response"]:
        """Nats of the whole response under the reference."""
        return self.ref_token_logps.sum(-1)

    def select(self, rows: Tensor) -> Experience:
        """The given prompts with all their responses, in the given order."""
        return self._replace(**{name: value[rows] for name, value in self._asdict().items() if value is not None})

    def to(self, device: torch.device | str) -> Experience:
        """On another device, without gradients."""
        return self._replace(**{name: value.detach().to(device) for name, value in self._asdict().items() if value is not None})
