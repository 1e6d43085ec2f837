"""The critic of PPO: a scalar head on the policy's own hidden states, which says what a response is worth before each of its tokens."""

from __future__ import annotations

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
        self, hidden: Float[Tensor, "prompt response token width"], completion_mask: Bool[Tensor, "prompt response token"]
    ) -> Float[Tensor, "prompt response token"]:
        """V before every token of the responses, in float32 at least; 0 outside the mask.

        Args:
            hidden: the last hidden state that each token is predicted from.
            completion_mask: True on the responses' tokens.
        """
        hidden = precise(hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # squared errors of returns: the head runs in float32
            values = nn.functional.linear(hidden, self.head.weight.to(hidden.dtype), self.head.bias.to(hidden.dtype)).squeeze(-1)
        return values.masked_fill(~completion_mask, 0.0)
