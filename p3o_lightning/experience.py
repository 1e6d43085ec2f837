"""Prompts → rollout → shuffled micro-batches: the loader that lets Lightning's automatic optimisation train on fresh experience.

One item is one micro-batch is one `training_step`; a rollout yields `num_iterations x micro_batches` items. It resumes to the
bit, because nothing about its position is kept here: the position is Lightning's own, the pending experience travels in the
module's checkpoint hooks, and every seed is a function of (seed, rollout, item, rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from p3o_lightning.batches import Experience
from p3o_lightning.errors import InputError
from p3o_lightning.seeds import mix

if TYPE_CHECKING:
    from p3o_lightning.policy import PairwisePolicy


@dataclass
class ExperienceState:
    """What a resumed run needs: rollouts made so far, the experience still to be trained on, and the price of KL."""

    kl_coef: float  # a Python float: as a buffer it would become bfloat16 under bf16-true
    rollouts: int = 0
    pending: Experience | None = None

    def save(self) -> dict[str, Any]:
        """Plain values and tensors, so that `weights_only=True` reads them; every rank's pending experience is gathered."""
        pending = None if self.pending is None else self.pending._asdict()
        everyone = [pending]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, pending)
        return {"kl_coef": self.kl_coef, "rollouts": self.rollouts, "pending": everyone}

    def load(self, saved: dict[str, Any]) -> None:
        """Take this rank's share; after a change of world size the pending rollout is made again."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        everyone = saved["pending"]
        mine = everyone[rank] if len(everyone) == world else None
        self.kl_coef, self.rollouts = saved["kl_coef"], saved["rollouts"]
        self.pending = None if mine is None else Experience(**mine)


class ExperienceLoader:
    """A sized iterable of experience micro-batches; Lightning treats it as any training loader.

    Args:
        prompts: loader of PromptBatch; its `sampler.set_epoch` is called here, since Lightning cannot reach it.
        policy: the module whose `rollout_step` makes the experience.
    """

    def __init__(self, prompts: Any, policy: PairwisePolicy) -> None:
        self.prompts, self.policy = prompts, policy
        batch_size = prompts.batch_size
        self.micro_batch_size = policy.micro_batch_size or batch_size
        if batch_size % self.micro_batch_size:
            raise InputError(
                f"model.micro_batch_size is {self.micro_batch_size}, but data.batch_size is {batch_size} prompts a rollout: "
                "choose a divisor of it, so that every update sees as many pairs."
            )
        self.micro_batches = batch_size // self.micro_batch_size
        self.items_per_rollout = policy.num_iterations * self.micro_batches

    def __len__(self) -> int:
        """Items of an epoch. Without a length Lightning prefetches, and the next rollout is drawn one update too early."""
        return len(self.prompts) * self.items_per_rollout

    def __iter__(self) -> Iterator[Experience]:
        """Runs at the first next(), after every restore: a generator."""
        trainer, state = self.policy.trainer, self.policy.state
        self._check_accumulation(trainer.accumulate_grad_batches)
        item = trainer.fit_loop.batch_idx + 1  # 0, or where the checkpoint stopped inside this epoch
        if item % self.items_per_rollout == 0:
            state.pending = None
        elif state.pending is None:  # resumed on another number of ranks: this rollout is made again
            item -= item % self.items_per_rollout
        sampler: Any = getattr(self.prompts, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(trainer.current_epoch)
        batches = iter(self.prompts)
        for _ in range(-(-item // self.items_per_rollout)):
            next(batches)
        # Lightning runs one batch too many after resuming at an epoch's end: stop at its own count
        while item < min(len(self), trainer.num_training_batches):
            if state.pending is None:
                state.pending = self._rollout(next(batches), state.rollouts)
                state.rollouts += 1
            position = item % self.items_per_rollout
            batch = state.pending.select(self._rows(state, position))
            torch.manual_seed(mix(self.policy.seed, state.rollouts, position, trainer.global_rank))  # dropout, if any
            item += 1
            if item % self.items_per_rollout == 0:
                state.pending = None
            yield batch

    def _rows(self, state: ExperienceState, position: int) -> torch.Tensor:
        """Which prompts form this micro-batch: a fresh permutation every pass over the rollout."""
        assert state.pending is not None
        iteration, micro_batch = divmod(position, self.micro_batches)
        generator = torch.Generator().manual_seed(mix(self.policy.seed, state.rollouts, iteration))
        order = torch.randperm(len(state.pending.prompt_tokens), generator=generator)
        return order[micro_batch * self.micro_batch_size :][: self.micro_batch_size]

    def _rollout(self, prompts: Any, number: int) -> Experience:
        policy, trainer = self.policy, self.policy.trainer
        prompts = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(prompts))
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            policy.rollout_seed = mix(policy.seed, number, trainer.global_rank)
            experience = policy.rollout_step(prompts)
        policy.after_rollout(experience)
        return experience.cpu()

    def _check_accumulation(self, accumulate: int) -> None:
        if self.items_per_rollout % accumulate:
            raise InputError(
                f"trainer.accumulate_grad_batches is {accumulate}, but a rollout has {self.items_per_rollout} micro-batches "
                f"(num_iterations x batch_size / micro_batch_size): choose a divisor, so that no update mixes two rollouts."
            )

    # Lightning asks every loader for its state; ours lives in the module's checkpoint hooks, and saying so here silences
    # its warning that the loader cannot resume.
    def state_dict(self) -> dict[str, Any]:
        """Nothing: see the module docstring."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
