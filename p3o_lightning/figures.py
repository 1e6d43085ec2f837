"""What the dashboard shows of a rollout and of an update; docs/metrics.md has the unit and healthy range of each figure."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from p3o_lightning.batches import Experience
from p3o_lightning.objectives import P3OTerms, kl_estimates
from p3o_lightning.relative_terms import RelativeTerms


def rollout_figures(
    experience: Experience, ended: Bool[Tensor, "prompt response"], kl_coef: float, rewards: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Means over the responses of a rollout. Without scores, where a judge gave `gaps`, the figures that need scores are left out.

    Args:
        experience: the rollout.
        ended: which responses ended with EOS.
        kl_coef: its price of KL, reward units per nat.
        rewards: each reward source's own scores, by name.
    """
    mask = experience.completion_mask
    kl = kl_estimates(experience.old_token_logps, experience.ref_token_logps, mask)
    lengths = mask.sum(-1).float()
    figures = {
        "objective/kl": kl.k1.mean(),
        "objective/kl_k1": kl.k1.mean(),
        "objective/kl_k2": kl.k2.mean(),
        "objective/kl_k3": kl.k3.mean(),
        "objective/entropy": -experience.old_logps.mean(),
        "objective/kl_coef": lengths.new_tensor(kl_coef),
        "val/contain_eos_token": ended.float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "p3o/duplicate_pair_rate": duplicate_rate(experience.completion_tokens, mask),
    }
    if experience.gaps is not None:
        figures["objective/scores_margin"] = experience.gaps.amax((-2, -1)).mean()
    if experience.scores is not None:
        scores = experience.scores
        figures["objective/scores"] = scores.mean()
        figures["objective/scores_margin"] = (scores.amax(-1) - scores.amin(-1)).mean()
        figures["objective/rlhf_reward"] = (scores - kl_coef * kl.k1).mean()
    return figures | {f"rewards/{name}/mean": scores.mean() for name, scores in rewards.items()}


def update_figures(terms: P3OTerms | RelativeTerms) -> dict[str, Tensor]:
    """What one micro-batch's loss says of the update it belongs to."""
    figures = {
        "policy/clipfrac_avg": terms.clip_fraction,
        "policy/approxkl_avg": terms.approx_kl,
        "val/ratio": terms.ratio_mean,
        "val/ratio_var": terms.ratio_var,
        "p3o/gap_logratio": terms.gap_logratio,
        "p3o/tie_rate": terms.tie_rate,
    }
    if isinstance(terms, P3OTerms):
        return figures | {
            "p3o/q_mean": terms.q_mean,
            "p3o/q_abs": terms.q_abs,
            "p3o/joint_weight_max": terms.joint_weight_max,
            "p3o/pair_clipfrac": terms.clip_fraction,
        }
    of_critic = {"loss/policy_avg": terms.policy_loss, "loss/value_avg": terms.value_loss, "val/clipfrac_avg": terms.value_clip_fraction}
    figures["policy/advantage_abs"] = terms.advantage_abs
    return figures | {name: value for name, value in of_critic.items() if value is not None}


def sampler_figures(
    old_token_logps: Float[Tensor, "prompt response token"],
    sampler_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
) -> dict[str, Tensor]:
    """How far what drew the responses is from the policy: by token in nats, and by response as the weight before any cap."""
    gap = (old_token_logps - sampler_token_logps).masked_fill(~mask, 0)
    weight = gap.sum(-1).clamp(-20, 20).exp()  # no more nats than that: these are averaged
    return {
        "sampling/sampling_logp_difference/mean": gap.abs().sum() / mask.sum().clamp(min=1),
        "sampling/sampling_logp_difference/max": gap.abs().max(),
        "sampling/importance_sampling_ratio/min": weight.min(),
        "sampling/importance_sampling_ratio/mean": weight.mean(),
        "sampling/importance_sampling_ratio/max": weight.max(),
    }


def duplicate_rate(tokens: Int[Tensor, "prompt response token"], mask: Bool[Tensor, "prompt response token"]) -> Float[Tensor, ""]:
    """Share of pairs of one prompt whose two responses are the same tokens: they teach nothing."""
    rows = tokens.masked_fill(~mask, -1)
    same = (rows.unsqueeze(1) == rows.unsqueeze(2)).all(-1).float()
    count = rows.shape[1]
    return (same.sum((1, 2)) - count).mean() / max(count * (count - 1), 1)
