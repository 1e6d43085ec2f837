"""Stage 3: a policy improved by comparing its responses: P3O, Pairwise Proximal Policy Optimization (arXiv 2310.00212), or a relative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from p3o_lightning import proofs
from p3o_lightning.baselines import OBJECTIVES as RELATIVES
from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.critic import Critic
from p3o_lightning.errors import InputError
from p3o_lightning.experience import ExperienceLoader, ExperienceState
from p3o_lightning.figures import rollout_figures, sampler_figures, update_figures
from p3o_lightning.forwards import eval_mode, turn_dropout_off
from p3o_lightning.generation import Sampling
from p3o_lightning.kl_control import adapted_kl_coef
from p3o_lightning.models import ModelSource, load_policy
from p3o_lightning.objectives import P3OTerms, p3o_loss, p3o_token_loss, sqrt_length_clip_range
from p3o_lightning.policy_settings import check_feedback, check_settings, clip_range_of, settings_of_relative
from p3o_lightning.relative_terms import RelativeTerms
from p3o_lightning.rewards import RewardInput, reward_sources
from p3o_lightning.rollouts import SamplingPolicy
from p3o_lightning.scoring import grouped_completion_logps, grouped_logps_and_hidden
from p3o_lightning.sharding import prepare_split, whole_weights
from p3o_lightning.vllm_sampling import VLLMSampler
from p3o_lightning.vllm_server import VLLMServer


class PairwisePolicy(SamplingPolicy):
    """A policy trained by P3O: draw K responses a prompt, score them, and push apart the log-probabilities of every pair by its reward gap.

    The reference is a frozen copy of the policy as it starts (with LoRA: the policy with its adapter switched off). Reference and
    reward models are kept out of the module's parameters: not trained, not saved.

    Args:
        model: hub name, transformers folder, GGUF file, checkpoint of ours, or a from-scratch config such as {model_type: llama, ...}.
        reward_funcs: a RewardModel, its checkpoint or folder, a function f(prompts, completions, completion_ids, **columns) or its
            dotted name, an Ensemble, or a Judge, which compares instead of scoring; or a list of these.
        reward_weights: one factor for each of reward_funcs; None is 1 each.
        reference: model source of the reference; None copies the policy as it is when it is first fitted or evaluated.
        objective: "p3o", or a relative of it, as its own paper has it: rloo, grpo, dr_grpo, gspo, reinforce, ppo (with a critic),
            online_dpo, online_ipo, rebel, copg. docs/algorithm.md says what each computes, and what kl_coef is the price of in it.
        objective_settings: what a relative has of its own, e.g. {gae_lambda: 0.95, vf_coef: 1.0} of ppo, {eta: 1.0} of rebel: the arguments
            of the function of its name in p3o_lightning.baselines. Settings whose help names p3o are not read by the relatives.
        num_generations: K, responses drawn for each prompt; the loss takes all pairs.
        num_iterations: passes over the experience of one rollout.
        micro_batch_size: prompts (with all their responses) in one forward and backward; None is data.batch_size.
        max_completion_length: tokens a response may have, EOS included.
        temperature: divides the logits when sampling and when scoring alike.
        top_p: nucleus sampling; 1 = off. Below 1 the sampler is no longer the policy that is scored.
        top_k: sample among this many tokens; 0 = off. As top_p.
        clipping: p3o: "joint" boxes the pair's log-odds (P3O-V2), "separate" each ratio (P3O-V1).
        clip_range: half-width of the box: nats (joint), or ratio around 1 (others). None: 0.2, as in the authors' code; gspo 0.0003.
        clip_level: p3o: "sequence" boxes whole responses, "token" each token's log-probability (with joint clipping).
        clip_reference_length: p3o: tokens at which clip_range holds; it then grows with sqrt(length). None: the same at every length.
        weight_cap: p3o: importance weights are cut to [1/cap, cap]; 10 in the authors' code.
        cross_weight: p3o, "separate" only: weigh each response by the other's ratio, as the authors do.
        kl_coef: price of leaving the reference, in reward units per nat; 0.05 in the authors' code.
        kl_target: nats of KL that an adaptive kl_coef, which then must start above 0, steers to; None keeps kl_coef fixed.
        kl_horizon: responses over which the adaptive kl_coef may change by a factor of about 1.2.
        kl_source: p3o: "current" takes the KL part at the policy being trained, "rollout" at the one that sampled.
        gap_scale: p3o: "rms" divides each pair's gap by the micro-batch's root mean square reward gap; None leaves it.
        missing_eos_penalty: subtracted from the score of a response that was cut off, in reward units.
        disable_dropout: keep dropout off in training too, so that the first update sees the ratio 1.
        generation: "local" samples in this process, "vllm" has a vLLM server draw the responses: docs/distributed.md.
        vllm_server: its address. It is given the policy's weights before every rollout.
        vllm_weights: folder to hand weights over, seen by both under the same path; None is vllm_weights in the run's folder.
        vllm_timeout: seconds that the server may take for the responses to one prompt, or to read the weights.
        sampler_correction: where responses are not drawn by the policy itself, as with vllm: weigh them by policy over sampler, and
            "truncate" weights above sampler_cap to it, or "mask" them to 0 (they stay in the mean); None weighs all 1.
        sampler_cap: of a pair's weight, or of a response's with clipping: separate and no cross_weight; inf is none.
        start_up_proofs: check before the first update what would make a run go wrong in silence: see p3o_lightning.proofs.
        seed: of sampling and of micro-batch order.
        tokenizer: folder, hub name, object, or "bytes"; None takes the model's.
        peft_config: fields of peft.LoraConfig, e.g. {r: 16, lora_alpha: 32}; None trains all weights.
        dtype: weights of policy, reference and reward models: float32, bfloat16, float16, or auto (as stored).
        torch_compile: compile the layers when fitting, for training and scoring: pays in long runs.
        lr: learning rate of the default AdamW.
        optimizer: factory called with the trainable parameters; None is AdamW(lr, betas=(0.9, 0.95)).
        lr_scheduler: factory called with the optimizer; stepped once an update.
    """

    view = "prompts"

    def __init__(
        self,
        model: ModelSource,
        reward_funcs: Sequence[RewardInput] | RewardInput | None = None,
        reward_weights: list[float] | None = None,
        *,
        reference: ModelSource | None = None,
        objective: Literal[
            "p3o", "rloo", "grpo", "dr_grpo", "gspo", "reinforce", "ppo", "online_dpo", "online_ipo", "rebel", "copg"
        ] = "p3o",
        objective_settings: dict[str, Any] | None = None,
        num_generations: int = 2,
        num_iterations: int = 1,
        micro_batch_size: int | None = None,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        clipping: Literal["joint", "separate"] = "joint",
        clip_range: float | None = None,
        clip_level: Literal["sequence", "token"] = "sequence",
        clip_reference_length: int | None = None,
        weight_cap: float = 10.0,
        cross_weight: bool = True,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        kl_source: Literal["current", "rollout"] = "current",
        gap_scale: Literal["rms"] | None = None,
        missing_eos_penalty: float | None = None,
        disable_dropout: bool = True,
        generation: Literal["local", "vllm"] = "local",
        vllm_server: str = "http://127.0.0.1:8000",
        vllm_weights: str | None = None,
        vllm_timeout: float = 600.0,
        sampler_correction: Literal["truncate", "mask"] | None = "truncate",
        sampler_cap: float = 3.0,
        start_up_proofs: bool = True,
        seed: int = 0,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: dict[str, Any] | Any | None = None,
        dtype: str = "float32",
        torch_compile: bool = False,
        lr: float = 1e-6,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_settings(arguments)
        clip_range = clip_range_of(arguments)
        super().__init__(
            model,
            load_policy,
            tokenizer=tokenizer,
            peft_config=peft_config,
            dtype=dtype,
            torch_compile=torch_compile,
            lr=lr,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            arguments=arguments,
        )
        self.keep_reference(reference, dtype)
        self.disable_dropout = disable_dropout
        if disable_dropout:
            turn_dropout_off(self.model)
        self.sampling = Sampling(num_generations, max_completion_length, temperature, top_p, top_k)
        self.vllm = VLLMSampler(VLLMServer(vllm_server, vllm_timeout), vllm_weights) if generation == "vllm" else None
        self.num_iterations, self.micro_batch_size, self.seed = num_iterations, micro_batch_size, seed
        self.objective, self.objective_settings = objective, settings_of_relative({**arguments, "clip_range": clip_range})
        self.critic = Critic(self.model) if objective == "ppo" else None
        self.loss_settings: dict[str, Any] = {"weight_cap": weight_cap, "kl_source": kl_source, "gap_scale": gap_scale}
        self.loss_settings |= {"sampler_correction": sampler_correction, "sampler_cap": sampler_cap}
        self.clipping, self.clip_range, self.clip_level = clipping, clip_range, clip_level
        self.clip_reference_length, self.cross_weight = clip_reference_length, cross_weight
        self.kl_target, self.kl_horizon, self.missing_eos_penalty = kl_target, kl_horizon, missing_eos_penalty
        self.state = ExperienceState(kl_coef=kl_coef)
        self.rollout_seed = seed  # set anew before every rollout, a function of (seed, rollout)
        self.rollout_rewards: dict[str, Tensor] = {}  # each reward source's own scores of the latest rollout
        self.rollout_judged: dict[str, Tensor] = {}  # the judges' figures of it, by tag
        self.rollout_log = None
        self.micro_batch: Experience | None = None  # as the loader yielded it, latest
        self.latest_log_ratio: Tensor | None = None  # log pi/pi_old of the latest micro-batch's responses, nats, for who looks at it
        self.one_update = False  # whether a rollout is trained on by one update: the loader knows
        self.start_up_proofs, self.fresh = start_up_proofs, False
        self.rewards = None if reward_funcs is None else reward_sources(reward_funcs, reward_weights, self.tokenizer, dtype)
        check_feedback(objective, self.rewards is not None and self.rewards.judged)

    # ---- the algorithm

    def rollout_step(self, prompts: PromptBatch) -> Experience:
        """Draw K responses for every prompt; score them under policy, reference and reward. Override it to make experience differently."""
        sampler_token_logps = None
        if self.old_is_current or self.sampler_differs:
            tokens, mask, sampler_token_logps = self.sample_with_logps(prompts)
        else:
            tokens, mask = self.sample(prompts)
        if self.old_is_current:
            assert sampler_token_logps is not None
            old_token_logps = sampler_token_logps
        else:
            old_token_logps = self.policy_logps(prompts.tokens, prompts.attention_mask, tokens, mask)
        values = None
        if self.critic is not None and self.needs_values:
            values = self.policy_values(prompts.tokens, prompts.attention_mask, tokens, mask)
        scores = self.score(prompts, tokens, mask)
        gaps = self.compare(prompts, tokens, mask, scores)
        return Experience(
            prompt_tokens=prompts.tokens,
            prompt_mask=prompts.attention_mask,
            completion_tokens=tokens,
            completion_mask=mask,
            old_token_logps=old_token_logps,
            ref_token_logps=self.reference_logps(prompts.tokens, prompts.attention_mask, tokens, mask),
            scores=scores if gaps is None else None,
            gaps=gaps,
            values=values,
            sampler_token_logps=sampler_token_logps if self.sampler_differs else None,
        )

    def training_step(self, batch: Experience, batch_idx: int) -> STEP_OUTPUT:
        """The loss of one micro-batch of whole groups of responses."""
        if not isinstance(batch, Experience):
            raise InputError(
                "the training loader yields prompts, not experience: use trainer.fit(policy, policy.wrap_train_dataloader(loader)), "
                "or a PreferenceDataModule, which does it."
            )
        batch = self.unrounded(batch)
        token_logps, values = self.logps_and_values(batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask)
        if self.old_is_current:
            batch = batch._replace(old_token_logps=token_logps.detach(), values=None if values is None else values.detach())
        self.latest_log_ratio = (token_logps.detach() - batch.old_token_logps).sum(-1)
        terms = self.loss(token_logps, batch) if values is None else self.loss(token_logps, batch, values)
        self.prove_start(token_logps, batch, terms)
        self.log_update(terms)
        if batch.sampler_token_logps is not None:
            self.log_dict(self.over_processes(sampler_figures(batch.old_token_logps, batch.sampler_token_logps, batch.completion_mask)))
        return terms.loss

    def loss(
        self,
        token_logps: Float[Tensor, "prompt response token"],
        batch: Experience,
        values: Float[Tensor, "prompt response token"] | None = None,
    ) -> P3OTerms | RelativeTerms:
        """P3O: clipped pairwise loss on whole responses, or with each token's log-probability clipped. Or the loss of the relative."""
        if self.objective != "p3o":
            of_critic = {} if values is None else {"values": values}
            return RELATIVES[self.objective](token_logps, batch, kl_coef=self.state.kl_coef, **self.objective_settings, **of_critic)
        clip_range: Any = self.clip_range
        if self.clip_reference_length is not None:
            clip_range = sqrt_length_clip_range(clip_range, batch.completion_mask.sum(-1), self.clip_reference_length)
        settings = {**self.loss_settings, "clip_range": clip_range, "kl_coef": self.state.kl_coef, "gaps": batch.gaps}
        scores = batch.scores if batch.gaps is None else None
        if self.clip_level == "token":
            settings["sampler_token_logps"] = batch.sampler_token_logps
            return p3o_token_loss(token_logps, batch.old_token_logps, batch.completion_mask, batch.ref_logps, scores, **settings)
        return p3o_loss(
            token_logps.sum(-1),
            batch.old_logps,
            batch.ref_logps,
            scores,
            clipping=self.clipping,
            cross_weight=self.cross_weight,
            sampler_logps=batch.sampler_logps,
            **settings,
        )

    @property
    def old_is_current(self) -> bool:
        """Whether the policy that samples is the one that every micro-batch of the rollout is trained on: there is one update a rollout.

        The training forward then gives the old log-probabilities and values too, exact in any precision, and no forward is made for them;
        the sampler's serve the figures. Not before the first update, where the start-up proofs compare both, nor with dropout, nor where
        the rollout is of the user's own, or the sampler is cut by top_p or top_k.
        """
        return (
            self.one_update
            and self.disable_dropout
            and not self.proving
            and self.trainer.training
            and self.sampling.top_p == 1
            and self.sampling.top_k == 0
            and all(getattr(type(self), name) is getattr(PairwisePolicy, name) for name in ("rollout_step", "sample", "policy_logps"))
        )

    # ---- the critic of PPO

    def logps_and_values(
        self, prompt_tokens: Tensor, prompt_mask: Tensor, completion_tokens: Tensor, completion_mask: Tensor
    ) -> tuple[Float[Tensor, "prompt response token"], Float[Tensor, "prompt response token"] | None]:
        """One forward of the policy: nats of every token, and the critic's value before it where there is a critic."""
        given = (self.model, prompt_tokens, prompt_mask, completion_tokens, completion_mask, self.sampling.temperature)
        if self.critic is None:
            return grouped_completion_logps(*given), None
        logps, hidden = grouped_logps_and_hidden(*given)
        return logps, self.critic(hidden, completion_mask)

    @torch.no_grad()
    def policy_values(self, *tokens_and_masks: Tensor) -> Float[Tensor, "prompt response token"]:
        """The critic's values before every token, computed as `training_step` computes them; reward units."""
        with eval_mode(self.model), self.whole_weights():
            return self.by_micro_batches(lambda *part: self.logps_and_values(*part)[1], *tokens_and_masks)  # type: ignore[arg-type]

    @property
    def needs_values(self) -> bool:
        """Whether a rollout is to be trained on by more than one update, or by the user's own hand; evaluation needs no values."""
        return self._trainer is None or (self.trainer.training and not self.old_is_current)

    def configure_model(self) -> None:
        """As in SamplingPolicy; the critic is split where the policy is."""
        super().configure_model()
        if self.critic is not None:
            prepare_split(self.trainer.strategy, self.critic)

    def load_state_dict(self, state_dict: Mapping[str, Any], *given: Any, **options: Any) -> Any:
        """As torch's; a critic cannot be made up, nor left out."""
        saved = any(name.startswith("critic.") for name in state_dict)
        if saved != (self.critic is not None):
            raise InputError(
                f"the checkpoint was trained with{'' if saved else 'out'} a critic, but model.objective is {self.objective!r}: "
                f"{'choose ppo' if saved else 'choose the objective that it was trained with'}, or give the checkpoint as model.model to "
                "start a new run from its policy."
            )
        return super().load_state_dict(state_dict, *given, **options)

    # ---- experience

    def wrap_train_dataloader(self, prompts: Any) -> ExperienceLoader:
        """The loader to train on, from a loader of prompts: `trainer.fit(policy, policy.wrap_train_dataloader(loader))`."""
        return prompts if isinstance(prompts, ExperienceLoader) else ExperienceLoader(prompts, self)

    def unrounded(self, batch: Experience) -> Experience:
        """The micro-batch as it was made: `precision: bf16-true` rounds log-probabilities and scores on the way to training_step."""
        made = self.micro_batch
        if made is None or batch.old_token_logps.dtype == made.old_token_logps.dtype:
            return batch
        return made.to(self.device)

    # ---- start-up proofs: before the first update of a run that was not resumed

    @property
    def proving(self) -> bool:
        """Whether the run is at its very beginning, and is to prove it."""
        return self.start_up_proofs and self.fresh and self.trainer.global_step == 0

    def on_train_start(self) -> None:
        """Prove the reference."""
        self.fresh = self.trainer.global_step == 0 and self.state.rollouts == 0
        if self.proving and not self.own_reference:
            if self.adapter_is_policy:
                proofs.prove_only_adapters_train(self.model)
            else:
                with self.whole_weights(), whole_weights(self.reference):
                    proofs.prove_reference_is_policy(self.model, self.reference)

    def prove_rewards(self, prompts: PromptBatch, experience: Experience) -> None:
        """Prove, at the first rollout, that reward models read EOS where a response ended."""
        if self.proving and self.rewards is not None:
            reply = experience.completion_tokens[0, 0][experience.completion_mask[0, 0]]
            for source in self.rewards.models:
                proofs.prove_reward_reads_eos(source, prompts, reply, self.tokenizer)

    def prove_start(self, token_logps: Tensor, batch: Experience, terms: P3OTerms | RelativeTerms) -> None:
        """Prove masks, KL = 0, ratio = 1 and clip fraction = 0 on the micro-batches of the first update."""
        if not self.proving:
            return
        mask, dtype = batch.completion_mask, proofs.compute_dtype(self.model)
        proofs.prove_mask_keeps_eos(batch.completion_tokens, mask, self.tokenizer.eos_token_id, self.sampling.max_completion_length)
        if not self.own_reference:
            proofs.prove_kl_is_zero(batch.old_token_logps, batch.ref_token_logps, mask, dtype)
        proofs.prove_ratio_is_one(token_logps, batch.old_token_logps, mask, dtype)
        if batch.sampler_token_logps is not None:
            proofs.prove_sampler_is_policy(batch.sampler_token_logps, batch.old_token_logps, mask)
        proofs.prove_nothing_is_clipped(terms.clip_fraction)

    # ---- KL control, metrics

    def after_rollout(self, prompts: PromptBatch, experience: Experience) -> None:
        """Log the rollout's figures at the step it was made, then let the adaptive controller move kl_coef."""
        self.prove_rewards(prompts, experience)
        ended = self.ended(experience.completion_tokens, experience.completion_mask)
        logged = {} if self.rollout_log is None else {name: torch.tensor(mean) for name, mean in self.rollout_log.means().items()}
        figures = logged | rollout_figures(experience, ended, self.state.kl_coef, self.rollout_rewards)  # no function's word for our own
        if self.rewards is not None:
            figures |= self.rollout_judged | self.rewards.figures(self.rollout_rewards)
        figures = {name: value.float().to(self.device) for name, value in figures.items()}  # those of rewards are on the CPU
        values = torch.stack([value.float() for value in self.over_processes(figures).values()])
        self.state.figures = dict(zip(figures, values.tolist(), strict=True))
        for logger in self.trainer.loggers:  # not self.log: it would repeat the value at every later step of the rollout
            logger.log_metrics(self.state.figures, step=self.trainer.global_step)
        if self.kl_target is not None:
            responses = experience.completion_mask[..., 0].numel() * self.trainer.world_size
            kl = self.state.figures["objective/kl"]
            self.state.kl_coef = adapted_kl_coef(self.state.kl_coef, kl, self.kl_target, responses, self.kl_horizon)

    def log_update(self, terms: P3OTerms | RelativeTerms) -> None:
        """Log the figures of an update; those of its rollout are handed to the progress bar and to what monitors them."""
        self.log_dict(self.over_processes({"loss": terms.loss, **update_figures(terms)}))
        for short, name in (("score", "objective/scores"), ("margin", "objective/scores_margin"), ("kl", "objective/kl")):
            if name in self.state.figures:
                self.log(short, self.state.figures[name], prog_bar=True, logger=False)
        self.log_dict(self.state.figures, logger=False)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside weights: the pending experience of every rank, the rollout counter, the KL price, and which reference it was."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["p3o_experience"] = self.state.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the experience state, and hold the reference to the checkpoint's."""
        super().on_load_checkpoint(checkpoint)
        kl_coef = self.state.kl_coef
        self.state.load(checkpoint["p3o_experience"])
        if self.kl_target is None:
            self.state.kl_coef = kl_coef  # a fixed price is a setting, which may be changed on resume; an adaptive one is state
