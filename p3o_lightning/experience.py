"""Prompts → rollout → shuffled micro-batches: the loader that lets Lightning's automatic optimisation train on fresh experience.

One item is one micro-batch is one `training_step`; a rollout yields `num_iterations x micro_batches` items. It resumes to the
bit, because nothing about its position is kept here: the position is Lightning's own, the pending experience travels in the
module's checkpoint hooks, and every seed is a function of (seed, rollout, item, rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

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
    figures: dict[str, float] = field(default_factory=dict)  # of the latest rollout, for what monitors them

    def save(self) -> dict[str, Any]:
        """Plain values and tensors, so that `weights_only=True` reads them; every rank's pending experience is gathered."""
        pending = None if self.pending is None else self.pending._asdict()
        everyone = [pending]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, pending)
        return {"kl_coef": self.kl_coef, "rollouts": self.rollouts, "pending": everyone, "figures": self.figures}

    def load(self, saved: dict[str, Any]) -> None:
        """Take this rank's share; after a change of world size the pending rollout is made again."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        everyone = saved["pending"]
        mine = everyone[rank] if len(everyone) == world else None
        self.kl_coef, self.rollouts, self.figures = saved["kl_coef"], saved["rollouts"], dict(saved.get("figures", {}))
        self.pending = None if mine is None else Experience(**mine)


class ExperienceLoader:
    """A sized iterable of experience micro-batches; Lightning treats it as any training loader.

    Every rollout has the same number of prompts: a last, partial batch of prompts is left out. The order of a plain DataLoader is
    taken over, shuffled or not, as a function of (seed, epoch), so that it repeats after a resume, and its prompts are shared out
    among the devices. A sampler of the user's own is used as it is: it must take its order from `set_epoch`, or from torch's global
    seed, which is set before every pass.

    Args:
        prompts: a DataLoader of PromptBatch, or another sized iterable of them with a `batch_size`.
        policy: the module whose `rollout_step` makes the experience.
    """

    def __init__(self, prompts: Any, policy: PairwisePolicy) -> None:
        self.prompts, self.policy = prompts, policy
        batch_size = getattr(prompts, "batch_size", None)
        if not isinstance(batch_size, int) or isinstance(getattr(prompts, "dataset", None), IterableDataset):
            raise InputError(
                f"the prompts come from a {type(prompts).__name__} that does not say how many there are: use a DataLoader over a sized "
                "dataset with batch_size=..., the prompts of one rollout."
            )
        self.batch_size: int = batch_size
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
        prompts = self._ordered_prompts()
        rollouts = len(prompts.sampler) // self.batch_size if isinstance(prompts, DataLoader) else len(prompts)  # type: ignore[arg-type]
        if rollouts == 0:
            raise InputError(f"data.batch_size is {self.batch_size} prompts a rollout, but there are fewer on each device: lower it.")
        return rollouts * self.items_per_rollout

    def __iter__(self) -> Iterator[Experience]:
        """Runs at the first next(), after every restore: a generator."""
        policy, trainer, state = self.policy, self.policy.trainer, self.policy.state
        self._check_accumulation(trainer.accumulate_grad_batches)
        policy.one_update = self.items_per_rollout == trainer.accumulate_grad_batches
        item = trainer.fit_loop.batch_idx + 1  # 0, or where the checkpoint stopped inside this epoch
        # Lightning runs one batch too many after resuming at an epoch's end: stop at its own count
        items = min(len(self), trainer.num_training_batches)
        if item >= items:
            return
        begun = item % self.items_per_rollout
        if begun == 0 or (state.pending is not None and len(state.pending.prompt_tokens) != self.batch_size):
            state.pending = None
        if begun and state.pending is None:  # resumed on another number of ranks: this rollout is made again
            item -= begun
            state.rollouts -= 1
        prompts = self._ordered_prompts()
        if hasattr(getattr(prompts, "sampler", None), "set_epoch"):
            prompts.sampler.set_epoch(trainer.current_epoch)  # Lightning cannot reach it
        torch.manual_seed(mix(policy.seed, trainer.current_epoch, trainer.global_rank))
        batches = iter(prompts)
        for _ in range(-(-item // self.items_per_rollout)):
            next(batches)
        while item < items:
            self._settle()
            if state.pending is None:
                state.pending = self._rollout(next(batches), state.rollouts)
                state.rollouts += 1
            position = item % self.items_per_rollout
            batch = state.pending.select(self._rows(state, position))
            torch.manual_seed(mix(policy.seed, state.rollouts, position, trainer.global_rank))  # dropout, if any
            item += 1
            if item % self.items_per_rollout == 0:
                state.pending = None
            policy.micro_batch = batch
            yield batch

    def _ordered_prompts(self) -> Any:
        """The loader of prompts; in place of a plain DataLoader, one with the sampler that Lightning would have given it."""
        given = self.prompts
        shuffled = isinstance(sampler := getattr(given, "sampler", None), RandomSampler) and not sampler.replacement
        if type(given) is not DataLoader or not (shuffled or isinstance(sampler, SequentialSampler)):
            return given
        trainer = self.policy._trainer
        replicas = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        order: DistributedSampler[Any] = DistributedSampler(
            given.dataset,
            num_replicas=replicas["num_replicas"],
            rank=replicas["rank"],
            shuffle=shuffled and not getattr(trainer, "overfit_batches", 0),
            seed=self.policy.seed,
            drop_last=True,
        )
        return DataLoader(
            given.dataset,
            batch_size=self.batch_size,
            sampler=order,
            drop_last=True,
            num_workers=given.num_workers,
            collate_fn=given.collate_fn,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            prefetch_factor=given.prefetch_factor,
        )

    def _rows(self, state: ExperienceState, position: int) -> torch.Tensor:
        """Which prompts form this micro-batch: on the first pass those that the rollout scored together, so that its first ratio is 1
        in any precision; then a fresh permutation every pass.
        """
        assert state.pending is not None
        iteration, micro_batch = divmod(position, self.micro_batches)
        order = torch.arange(self.batch_size)
        if iteration:
            generator = torch.Generator().manual_seed(mix(self.policy.seed, state.rollouts, iteration))
            order = torch.randperm(self.batch_size, generator=generator)
        order = self.policy.in_order(order, state.pending.prompt_mask, state.pending.completion_mask)
        return order[micro_batch * self.micro_batch_size :][: self.micro_batch_size]

    def _settle(self) -> None:
        """Tell the callbacks that ask for it, as LastCheckpoint does, that the latest update is over, before the next rollout begins."""
        for callback in self.policy.trainer.callbacks:  # type: ignore[attr-defined]
            if on_update_settled := getattr(callback, "on_update_settled", None):
                on_update_settled(self.policy.trainer, self.policy)

    def _rollout(self, prompts: Any, number: int) -> Experience:
        policy, trainer = self.policy, self.policy.trainer
        prompts = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(prompts))
        policy.rollout_seed = mix(policy.seed, number)
        policy.rollout_rewards, policy.rollout_judged = {}, {}
        torch.manual_seed(mix(policy.seed, number, trainer.global_rank))  # for a rollout_step of the user's own
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            experience = policy.rollout_step(prompts)
        if len(experience.prompt_tokens) != self.batch_size:
            raise InputError(
                f"rollout_step returned experience of {len(experience.prompt_tokens)} prompts for {self.batch_size}: return as many as it "
                "was given, since every update must see as many pairs."
            )
        policy.after_rollout(prompts, experience)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if on_rollout_end := getattr(callback, "on_rollout_end", None):
                on_rollout_end(trainer, policy, prompts, experience)
        return experience.to("cpu")

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
