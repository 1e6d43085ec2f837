"""The critic of PPO: a scalar head on the policy's own hidden states, which says what a response is worth before each of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from p3o_lightning.forwards import precise, unwrapped


class Critic(nn.Module):
    """A linear head on the policy's last hidden states. It lies beside the model: checkpoints have it, exports do not.

    It starts at 0, so that it draws no random numbers, and the first update moves the policy as without a critic.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        width = unwrapped(model).get_output_embeddings().weight.shape[-1]
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        hidden: Float[Tensor, "row position width"],
        prompt_width: int,
        completion_mask: Bool[Tensor, "prompt response token"],
    ) -> Float[Tensor, "prompt response token"]:
        """V before every token of the responses, in float32 at least; 0 outside the mask.

        Args:
            hidden: of rows that are a prompt with one of its responses, or with all of them in turn.
            prompt_width: columns of the prompts, padding included.
            completion_mask: of the responses.
        """
        hidden = precise(hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # squared errors of returns: the head runs in float32
            values = nn.functional.linear(hidden, self.head.weight.to(hidden.dtype), self.head.bias.to(hidden.dtype)).squeeze(-1)
        prompts, responses, length = completion_mask.shape
        if values.shape == (prompts * responses, prompt_width + length):
            before = values[:, prompt_width - 1 : -1].view(completion_mask.shape)
        elif values.shape == (prompts, prompt_width + responses * length):
            first = values[:, prompt_width - 1, None, None].expand(-1, responses, -1)
            rest = values[:, prompt_width:].unflatten(1, (responses, length))[:, :, :-1]
            before = torch.cat([first, rest], -1)
        else:
            raise RuntimeError(f"hidden states of shape {tuple(values.shape)} do not fit responses of shape {tuple(completion_mask.shape)}")
        return before.masked_fill(~completion_mask, 0.0)


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden states, "row position width", of every forward of the model that is made inside."""
    base = unwrapped(model)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0])

    hook = getattr(base, base.base_model_prefix).register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
