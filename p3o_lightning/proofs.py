"""Start-up proofs: what must hold before the first update is checked there, so that a run that would go wrong in silence stops instead.

Each proof is a function that returns nothing, and raises InputError with the reason and the fix. A run whose experience is made in another
way on purpose (an overridden `rollout_step` with samples of another policy, say) switches them off: model.start_up_proofs: false.

Axes as in batches.py. Log-probabilities in nats. `dtype` is the one that the forwards computed in: it decides what counts as equal.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from p3o_lightning.batches import PromptBatch
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import unwrapped
from p3o_lightning.function_reward import FunctionReward
from p3o_lightning.model_reward import ModelReward
from p3o_lightning.responses import Responses
from p3o_lightning.scoring import allows
from p3o_lightning.sharding import named_weights

SWITCH_OFF = "If it is meant so, set model.start_up_proofs to false."

# Nats by which one token's log-probability may differ between two forwards of equal weights and shapes, on kernels that are not
# deterministic. On a CPU the difference is 0.
_NOISE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

# Nats a token, root mean square, by which another engine may differ: bfloat16 against float32 is some 0.05, another model above 1.
_SAMPLER_NOISE = 0.3


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the model's forward computes in here: autocast's choice, or that of its weights."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def prove_ratio_is_one(
    token_logps: Float[Tensor, "prompt response token"],
    old_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
    dtype: torch.dtype,
) -> None:
    """The first update's policy is the one that sampled, so pi / pi_old = 1: else the clip removes gradients at random."""
    drift = _worst_drift(token_logps.detach(), old_token_logps, mask, dtype)
    if drift is not None:
        raise InputError(
            f"start-up proof: before the first update a response's log-probability differs by {drift:.3g} nats between rollout and "
            "training_step, so its ratio is not 1: something acts in training only. Keep dropout off (model.disable_dropout: true), and "
            f"let rollout_step take old_token_logps from policy_logps. {SWITCH_OFF}"
        )


def prove_kl_is_zero(
    old_token_logps: Float[Tensor, "prompt response token"],
    ref_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
    dtype: torch.dtype,
) -> None:
    """Without a reference of its own, the run starts at its reference: KL = 0."""
    drift = _worst_drift(old_token_logps, ref_token_logps, mask, dtype)
    if drift is not None:
        raise InputError(
            f"start-up proof: before the first update policy and reference differ by {drift:.3g} nats on a response, though the reference "
            "is the policy as it starts: something changed one of them after setup, or an adapter does not start at zero "
            f"(peft_config.init_lora_weights). Give model.reference if another one is meant. {SWITCH_OFF}"
        )


def prove_sampler_is_policy(
    sampler_token_logps: Float[Tensor, "prompt response token"],
    old_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
) -> None:
    """What draws the responses holds the policy's weights: else the correction weighs by chance, and training learns from another model."""
    gap = (sampler_token_logps.double() - old_token_logps.double()).masked_fill(~mask, 0)
    rms = float((gap.square().sum() / mask.sum().clamp(min=1)).sqrt())
    if not rms <= _SAMPLER_NOISE:
        raise InputError(
            f"start-up proof: the sampler's log-probabilities differ from the policy's by {rms:.3g} nats a token (root mean square; up to "
            f"{_SAMPLER_NOISE} is taken for another engine or dtype): it serves another model than model.model, its weights are "
            f"quantised, or it needs --logprobs-mode processed_logprobs for model.temperature. {SWITCH_OFF}"
        )


def prove_nothing_is_clipped(clip_fraction: Float[Tensor, ""]) -> None:
    """At ratio 1 nothing can have left the clip range."""
    if float(clip_fraction) != 0:
        raise InputError(
            f"start-up proof: before the first update {float(clip_fraction):.1%} of the gradient is clipped already, so model.clip_range "
            f"is smaller than the noise of the arithmetic: widen it, use model.clip_level: token, or a wider dtype. {SWITCH_OFF}"
        )


def prove_reference_is_policy(policy: nn.Module, reference: nn.Module) -> None:
    """The reference was copied from the policy: every weight is equal."""
    ours, theirs = named_weights(policy), named_weights(reference)
    different = sorted(ours.keys() ^ theirs.keys()) or [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    if different:
        raise InputError(
            f"start-up proof: the reference differs from the policy it was copied from, in {different[0]!r} and {len(different) - 1} more: "
            f"change weights before the policy is built, or give model.reference. {SWITCH_OFF}"
        )


def prove_only_adapters_train(policy: nn.Module) -> None:
    """The reference is the policy with its adapter off: it stays what it is only if nothing outside the adapter is trained."""
    marks = (getattr(policy.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens_")
    others = [name for name, value in policy.named_parameters() if value.requires_grad and not any(mark in name for mark in marks)]
    if others:
        raise InputError(
            f"start-up proof: {others[0]!r} is trained but is no part of the adapter, so switching the adapter off would not give the "
            f"reference back: set peft_config.bias to 'none', or give model.reference. {SWITCH_OFF}"
        )


def prove_mask_keeps_eos(
    tokens: Int[Tensor, "prompt response token"], mask: Bool[Tensor, "prompt response token"], eos_token_id: int, limit: int
) -> None:
    """A response is what its mask says, never told from ids: it has no hole, and ends with EOS unless it was cut off at `limit` tokens."""
    lengths = mask.sum(-1)
    whole = (mask == (torch.arange(mask.shape[-1], device=mask.device) < lengths.unsqueeze(-1))).all(-1) & (lengths > 0)
    last = tokens.gather(-1, (lengths - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    right = whole & ((last == eos_token_id) | (lengths >= limit))
    if not right.all():
        raise InputError(
            f"start-up proof: {int((~right).sum())} of {right.numel()} responses are shorter than model.max_completion_length ({limit}) "
            "and yet do not end with EOS, or have holes in their mask: EOS must be inside completion_mask, also where it has the id of "
            f"padding. {SWITCH_OFF}"
        )


def prove_reward_reads_eos(
    source: FunctionReward | ModelReward, prompts: PromptBatch, reply: Int[Tensor, " token"], policy_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A reward model reads text that ends as its training text ended: EOS after a response that ended, none after one that was cut off.

    It is shown one reply to the first prompt in both ways, and what reaches its network is recorded. Functions read text: nothing to prove.
    """
    if not isinstance(source, ModelReward):
        return
    eos = policy_tokenizer.eos_token_id
    body = reply[reply != eos].tolist() or [next(id for id in range(len(policy_tokenizer)) if id not in policy_tokenizer.all_special_ids)]
    tokens = torch.tensor([[[*body, eos], [*body, eos]]], device=prompts.tokens.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 1, -1] = False
    first = PromptBatch(
        prompts.tokens[:1], prompts.attention_mask[:1], prompts.prompts[:1], {name: row[:1] for name, row in prompts.columns.items()}
    )
    text = str(policy_tokenizer.decode(body, skip_special_tokens=True))
    seen = _what_reaches(source, Responses(first, tokens, mask, [[text, text]]))
    ends = [int(row[-1]) for row in seen if len(row)]
    if len(ends) != 2 or ends.count(int(source.tokenizer.eos_token_id)) != 1:
        raise InputError(
            f"start-up proof: reward {source.name!r} was shown a response that ended and one that was cut off, and read "
            f"{ends.count(int(source.tokenizer.eos_token_id))} of {len(ends)} with EOS ({source.tokenizer.eos_token!r}) at the end: it "
            "was trained to judge text that ends with EOS. Give the reward model its own tokenizer, and keep EOS in what it reads. "
            f"{SWITCH_OFF}"
        )


def _what_reaches(source: ModelReward, responses: Responses) -> list[Tensor]:
    """The rows of token ids that the source's network is called with, without padding."""
    rows: list[Tensor] = []

    def record(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else positional[0]
        packing = named.get("packing")
        masks = named["attention_mask"]
        rows.extend(packing.texts(ids) if packing else [row[kept.bool()] for row, kept in zip(ids, masks, strict=True)])

    allows(source.network)  # tries the model out: now, not in front of the hook
    hook = unwrapped(source.network).base_model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        source(responses)
    finally:
        hook.remove()
    return rows


def _worst_drift(one: Tensor, other: Tensor, mask: Tensor, dtype: torch.dtype) -> float | None:
    """The largest difference of a response's log-probability, where one is larger than the arithmetic explains."""
    drift = (one.double() - other.double()).masked_fill(~mask, 0).sum(-1).abs()
    allowed = _NOISE.get(dtype, 1e-3) * mask.sum(-1).clamp(min=1).double().sqrt()  # errors of tokens are independent
    return None if bool((drift <= allowed).all()) else float(drift.nan_to_num(torch.inf).max())
