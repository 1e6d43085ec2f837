"""A policy at work: it samples responses, knows their log-probabilities under itself and its reference, and has them scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.casting import cast_once
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import eval_mode
from p3o_lightning.generation import Sampling, decode_completions, prediction_rows, sample_completions, sample_with_logps
from p3o_lightning.phases import phase
from p3o_lightning.reference import ReferencedPolicy
from p3o_lightning.responses import Responses
from p3o_lightning.reward_log import RewardLog, TrainerState
from p3o_lightning.rewards import RewardSum
from p3o_lightning.scoring import allows, grouped_completion_logps
from p3o_lightning.seeds import mix
from p3o_lightning.vllm_sampling import VLLMSampler


class SamplingPolicy(ReferencedPolicy):
    """The parts that a rollout is made of, and evaluation by the same parts; a subclass sets what is declared here in its constructor."""

    sampling: Sampling
    rewards: RewardSum | None
    micro_batch_size: int | None  # prompts in one forward
    missing_eos_penalty: float | None
    seed: int
    vllm: VLLMSampler | None  # what draws the responses, if not this process
    rollout_seed: int  # set anew before every rollout, a function of (seed, rollout)
    rollout_rewards: dict[str, Tensor]  # each reward source's own scores of the latest rollout
    rollout_judged: dict[str, Tensor]  # the judges' figures of it, by tag
    rollout_log: RewardLog | None  # what reward functions logged in it

    def rollout_step(self, prompts: PromptBatch) -> Experience:
        """Responses to the prompts, and what training on them needs to know."""
        raise NotImplementedError

    # ---- the parts of a rollout

    @property
    def share(self) -> tuple[int, int]:
        """Which rows of a batch this process holds: (rank, number of processes)."""
        return (0, 1) if self._trainer is None else (self.global_rank, self.trainer.world_size)

    def sample(
        self, prompts: PromptBatch, seed: int | None = None
    ) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"]]:
        """K responses for each prompt and their mask, sampled EOS included; dropout off."""
        return self.sample_with_logps(prompts, seed)[:2]

    @phase("generation")
    def sample_with_logps(
        self, prompts: PromptBatch, seed: int | None = None
    ) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"], Float[Tensor, "prompt response token"]]:
        """As `sample`, and the nats of every token under the distribution that it was drawn from."""
        if self.vllm is not None:
            return self.vllm.sample_with_logps(self, prompts, self.rollout_seed if seed is None else seed)
        with torch.no_grad(), eval_mode(self.model), self.whole_weights(), float32_by_default():
            return sample_with_logps(
                self.model,
                prompts.tokens,
                prompts.attention_mask,
                self.sampling,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                seed=self.rollout_seed if seed is None else seed,
                share=self.share,
                refuse_nonfinite=not self.guarded,
            )

    @property
    def sampler_differs(self) -> bool:
        """Whether `sample_with_logps` draws from another distribution than the policy's, so that the loss must weigh by its probabilities.

        True for another engine. A subclass that samples in another way, with half-precision weights say, says so by overriding this.
        """
        return self.vllm is not None and type(self).sample is SamplingPolicy.sample

    @property
    def guarded(self) -> bool:
        """Whether a callback deals with rollouts that are not finite, as FiniteGuard does: it names row and module, and may go on."""
        if self._trainer is None or not self.trainer.training:
            return False
        return any(getattr(item, "takes_nonfinite", False) for item in self.trainer.callbacks)  # type: ignore[attr-defined]

    @phase("scoring")
    @torch.no_grad()
    def policy_logps(self, *tokens_and_masks: Tensor) -> Float[Tensor, "prompt response token"]:
        """Nats of every token under the policy, computed as `training_step` computes them: same dtype, same micro-batch shape."""
        with eval_mode(self.model), self.whole_weights(), cast_once(self.model):
            return self._in_micro_batches(self.model, *tokens_and_masks)

    @phase("scoring")
    @torch.no_grad()
    def reference_logps(self, *tokens_and_masks: Tensor) -> Float[Tensor, "prompt response token"]:
        """Nats of every token under the reference."""
        if self.adapter_is_policy:
            with self.model.disable_adapter():
                return self.policy_logps(*tokens_and_masks)
        with eval_mode(self.model), cast_once(self.reference):
            return self._in_micro_batches(self.reference, *tokens_and_masks)

    def _in_micro_batches(self, model: nn.Module, *tokens_and_masks: Tensor) -> Tensor:
        temperature = self.sampling.temperature
        return self.by_micro_batches(
            lambda *part: grouped_completion_logps(model, *part, temperature),  # type: ignore[call-arg]
            *tokens_and_masks[:4],
        )

    def by_micro_batches(self, function: Callable[..., Tensor], *tokens_and_masks: Tensor) -> Tensor:
        """What `function` gives for the prompts of one micro-batch after the other; in the order of the prompts."""
        order = self.in_order(torch.arange(len(tokens_and_masks[0])), tokens_and_masks[1], tokens_and_masks[3])
        parts = order.to(tokens_and_masks[0].device).split(self.micro_batch_size or len(order))
        return torch.cat([function(*(tensor[part] for tensor in tokens_and_masks)) for part in parts])[order.argsort()]

    def in_order(self, order: Int[Tensor, " prompt"], prompt_mask: Tensor, completion_mask: Tensor) -> Int[Tensor, " prompt"]:
        """The order in which prompts are cut into micro-batches: the one given; or, for a model that needs padding, those of an update from
        short to long, so that texts of like length are padded together.
        """
        micro_batch = self.micro_batch_size or len(order)
        if micro_batch >= len(order) or allows(self.model):
            return order
        training = self._trainer is not None and self.trainer.training
        update = micro_batch * self.trainer.accumulate_grad_batches if training else len(order)
        lengths = (prompt_mask.sum(-1) + completion_mask.sum(-1).amax(-1)).cpu()
        return torch.cat([part[lengths[part].argsort(stable=True)] for part in order.split(update)])

    @phase("scoring")
    def score(self, prompts: PromptBatch, tokens: Tensor, mask: Tensor) -> Float[Tensor, "prompt response"]:
        """Reward units, KL not included: the weighted sum of the reward sources, less the penalty for a missing EOS."""
        if self.rewards is None:
            raise InputError("model.reward_funcs is missing: give a reward model (folder or checkpoint) or a Python function.")
        texts = decode_completions(self.tokenizer, tokens, mask)
        self.rollout_log = RewardLog(sum(map(len, texts)))
        with float32_by_default():
            scores, self.rollout_rewards = self.rewards(Responses(prompts, tokens, mask, texts, self.trainer_state, self.rollout_log))
        scores = scores.to(tokens.device)
        if self.missing_eos_penalty is not None:
            scores = scores - self.missing_eos_penalty * (~self.ended(tokens, mask)).float()
        return scores

    @phase("scoring")
    def compare(
        self, prompts: PromptBatch, tokens: Tensor, mask: Tensor, scores: Float[Tensor, "prompt response"]
    ) -> Float[Tensor, "prompt response response"] | None:
        """Where a judge is among the reward sources: gaps between all responses of a prompt, the judge's and those of `scores`."""
        if self.rewards is None or not self.rewards.judged:
            return None
        texts = decode_completions(self.tokenizer, tokens, mask)
        with float32_by_default():
            gaps, self.rollout_judged = self.rewards.gaps(Responses(prompts, tokens, mask, texts))
        return scores.unsqueeze(2) - scores.unsqueeze(1) + gaps.to(scores.device)

    @property
    def trainer_state(self) -> TrainerState:
        """Where the run stands, for reward functions."""
        if self._trainer is None:
            return TrainerState()
        trainer = self.trainer
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        return TrainerState(trainer.global_step, trainer.max_steps, float(trainer.current_epoch), epochs, trainer.is_global_zero)

    def ended(self, tokens: Tensor, mask: Tensor) -> Bool[Tensor, "prompt response"]:
        """Which responses end with EOS; the others were cut off."""
        return ((tokens == self.tokenizer.eos_token_id) & mask).any(-1)

    # ---- frozen models beside the module

    def setup(self, stage: str) -> None:
        """As in ReferencedPolicy; a fit needs rewards."""
        if stage == "fit" and self.rewards is None:
            raise InputError("model.reward_funcs is missing: give a reward model (folder or checkpoint) or a Python function.")
        if self.vllm is not None:
            self.vllm.begin(self)
        allows(self.model)  # tried out while it is whole: the loader of a resumed run asks before any forward; and all stages attend alike
        super().setup(stage)

    @property
    def frozen_models(self) -> list[nn.Module]:
        """Reference and reward models."""
        return [*super().frozen_models, *(self.rewards.networks if self.rewards else [])]

    # ---- evaluation

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample from the held-out prompts, the same draws every time: `val/scores`, `val/scores_std`, `val/kl`, `val/length`, ..."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """`test/...`, as in validation."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: PromptBatch, batch_idx: int, stage: str) -> None:
        self.rollout_seed = mix(self.seed, batch_idx, 1)
        experience = self.rollout_step(batch)
        mask = experience.completion_mask
        figures = {
            f"{stage}/kl": (experience.old_logps - experience.ref_logps).mean(),
            f"{stage}/length": mask.sum(-1).float().mean(),
            f"{stage}/ended": self.ended(experience.completion_tokens, mask).float().mean(),
        }
        if experience.scores is not None:
            figures[f"{stage}/scores"] = experience.scores.mean()
            figures[f"{stage}/scores_std"] = experience.scores.std()  # within the batch: the scale to read a rise on
        if experience.gaps is not None:
            figures[f"{stage}/scores_margin"] = experience.gaps.amax((-2, -1)).mean()
        self.log_dict(figures, batch_size=len(batch.tokens), sync_dist=True)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """K sampled responses for each prompt: rows {"prompt", "responses"}."""
        tokens, mask = self.sample(batch, seed=mix(self.seed, batch_idx, 2))
        return prediction_rows(self.tokenizer, batch, tokens, mask)


def answers(stage: Any, batch: PromptBatch, sampling: Sampling, seed: int) -> list[dict[str, Any]]:
    """Sampled responses of a stage's policy: rows {"prompt", "responses"}; dropout off."""
    with eval_mode(stage.model), stage.whole_weights():
        tokens, mask = sample_completions(
            stage.model,
            batch.tokens,
            batch.attention_mask,
            sampling,
            eos_token_id=stage.tokenizer.eos_token_id,
            pad_token_id=stage.tokenizer.pad_token_id,
            seed=seed,
            share=(stage.global_rank, stage.trainer.world_size),
        )
    return prediction_rows(stage.tokenizer, batch, tokens, mask)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Numbers that are made inside, draws and rewards, are float32: under `precision: bf16-true` Lightning makes bfloat16 the default."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(former, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(former)
