"""What a reward source is given."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from p3o_lightning.batches import PromptBatch
from p3o_lightning.reward_log import RewardLog, TrainerState


class Responses(NamedTuple):
    """What a reward source sees: prompts as in the data, and what was sampled for each."""

    prompts: PromptBatch
    tokens: Int[Tensor, "prompt response token"]
    mask: Bool[Tensor, "prompt response token"]
    texts: list[list[str]]  # without special tokens
    state: TrainerState = TrainerState()
    log: RewardLog | None = None  # None: what functions log goes nowhere
