"""The relatives of P3O as pure functions on an experience batch, each as its own paper or TRL 1.16 has it, so that a comparison is fair.

    f(token_logps, experience, *, kl_coef, clip_range, ...) -> RelativeTerms

`token_logps` are the nats of every sampled token under the policy being trained and carry the gradient; nothing else does. Methods that
clip nothing take no clip_range. PPO, the one with a critic, is in ppo.py. docs/algorithm.md, "The relatives", says how each relates to P3O.

Axes and units as in objectives.py. Notation in the formulas:
    w  = pi / pi_old, of a whole response or (w_t) of one token;  T = tokens of a response, EOS included
    A  = advantage: what the response's score is worth against the others of its prompt, never differentiated
    D, D_old, D_ref = log-odds of a pair i < j of one prompt under the policy being trained, the one that sampled, the reference
    K  = responses to one prompt;  gap = r_i - r_j
Where a judge gave `gaps` and no scores, a response's score is the mean of its gaps to all K: equal to the score up to a shift per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from p3o_lightning.batches import Experience
from p3o_lightning.errors import InputError
from p3o_lightning.objectives import Number, _precise
from p3o_lightning.ppo import generalized_advantages, ppo, token_rewards
from p3o_lightning.relative_terms import Prepared, RelativeTerms, clipped_gain, k3_of, masked_mean, prepare, ratio_of, terms_of

__all__ = [
    "OBJECTIVES",
    "DirectTerms",
    "RelativeTerms",
    "copg",
    "direct_preference_loss",
    "dr_grpo",
    "generalized_advantages",
    "grpo",
    "gspo",
    "online_dpo",
    "online_ipo",
    "ppo",
    "rebel",
    "reinforce",
    "rloo",
    "token_rewards",
]

STD_FLOOR = 1e-4  # added to a standard deviation before dividing by it, as TRL does


# ---- scores against the other responses to the prompt --------------------------------------------------------------------------------


def rloo(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    kl_coef: Number = 0.05,
    clip_range: Number = 0.2,
) -> RelativeTerms:
    """REINFORCE, leave one out: the baseline is the mean of the other responses; the ratio is the whole response's, clipped.

        R = r - kl_coef log pi_old/pi_ref;   A_i = R_i - mean_{j != i} R_j;   L = -mean_i min(w_i A_i, clip(w_i, 1 - eps, 1 + eps) A_i)
    Source: Ahmadian et al. 2024, arXiv 2402.14740; ratio and clip as TRL 1.16's RLOOTrainer, advantages not normalised, its default.
    """
    batch = prepare(token_logps, experience)
    reward = batch.scores - kl_coef * (batch.old - batch.ref).sum(-1)
    count = reward.shape[1]
    advantage = reward - (reward.sum(1, keepdim=True) - reward) / (count - 1)
    gain, removed = clipped_gain(ratio_of(batch.drift.sum(-1)), advantage, clip_range)
    return terms_of(-gain.mean(), removed.mean(), advantage.abs().mean(), batch)


def grpo(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    kl_coef: Number = 0.0,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
) -> RelativeTerms:
    """Group-relative policy optimization: advantages in standard deviations of the group, a ratio and a clip for each token.

        A_i = (r_i - mean r) / (std r + 1e-4);   L = -mean_i 1/T_i sum_t [ min(w_it A_i, clip(w_it) A_i) - kl_coef k3_it ]
    with the unbiased standard deviation, and k3 = pi_ref/pi - 1 - log pi_ref/pi of each token: a price per token, not per response.
    Source: Shao et al. 2024, arXiv 2402.03300, equations 3-4; TRL 1.16's GRPOTrainer with loss_type="grpo".

    Args:
        clip_range_high: how far above 1 a ratio may go, where that differs from clip_range (DAPO's clip-higher); None is clip_range.
    """
    batch = prepare(token_logps, experience)
    advantage = _standardised(batch.scores)
    gain, removed = clipped_gain(ratio_of(batch.drift), advantage.unsqueeze(-1), clip_range, clip_range_high)
    per_token = -gain * batch.mask + kl_coef * k3_of(batch)
    lengths = batch.mask.sum(-1).clamp(min=1)
    return terms_of((per_token.sum(-1) / lengths).mean(), masked_mean(removed, batch.mask), advantage.abs().mean(), batch)


def dr_grpo(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    kl_coef: Number = 0.0,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    divisor: Number = 1.0,
) -> RelativeTerms:
    """GRPO done right: without the standard deviation and the 1/T, which favour easy prompts and long wrong answers.

        A_i = r_i - mean r;   L = -mean_i 1/divisor sum_t [ min(w_it A_i, clip(w_it) A_i) - kl_coef k3_it ]
    Source: Liu et al. 2025, arXiv 2503.20783; TRL 1.16's GRPOTrainer with loss_type="dr_grpo" and scale_rewards="none".

    Args:
        clip_range_high: as in `grpo`.
        divisor: of the sum over tokens, the same for all responses: max_completion_length in TRL and in PairwisePolicy, 1 in the equation.
    """
    batch = prepare(token_logps, experience)
    advantage = batch.scores - batch.scores.mean(1, keepdim=True)
    gain, removed = clipped_gain(ratio_of(batch.drift), advantage.unsqueeze(-1), clip_range, clip_range_high)
    per_token = -gain * batch.mask + kl_coef * k3_of(batch)
    return terms_of((per_token.sum(-1) / divisor).mean(), masked_mean(removed, batch.mask), advantage.abs().mean(), batch)


def gspo(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    kl_coef: Number = 0.0,
    clip_range: Number = 3e-4,
    clip_range_high: Number | None = None,
) -> RelativeTerms:
    """Group sequence policy optimization: GRPO's advantage with one ratio a response, its geometric mean over the tokens.

        s_i = w_i^(1/T_i);   L = -mean_i [ min(s_i A_i, clip(s_i, 1 - eps, 1 + eps) A_i) - kl_coef 1/T_i sum_t k3_it ]
    Source: Zheng et al. 2025, arXiv 2507.18071, where eps is 3e-4 below and 4e-4 above, on another scale than a whole response's ratio;
    the KL term, which the paper does not have, as TRL 1.16's GRPOTrainer with importance_sampling_level="sequence" adds it.

    Args:
        clip_range_high: as in `grpo`.
    """
    batch = prepare(token_logps, experience)
    advantage, lengths = _standardised(batch.scores), batch.mask.sum(-1).clamp(min=1)
    gain, removed = clipped_gain(ratio_of(batch.drift.sum(-1) / lengths), advantage, clip_range, clip_range_high)
    loss = -gain + kl_coef * k3_of(batch).sum(-1) / lengths
    return terms_of(loss.mean(), removed.mean(), advantage.abs().mean(), batch)


def reinforce(
    token_logps: Float[Tensor, "prompt response token"], experience: Experience, *, kl_coef: Number = 0.05, baseline: str | None = None
) -> RelativeTerms:
    """The score-function estimator as it is: no ratio, no clip, on-policy only.

        L = -mean_i (r_i - kl_coef log pi_old/pi_ref (y_i) - b) log pi(y_i),   b = 0 or the batch's mean
    Source: Williams 1992; for language models Ahmadian et al. 2024, arXiv 2402.14740.

    Args:
        baseline: None, or "batch": subtract the mean over all responses of the micro-batch, its prompts together.
    """
    if baseline not in (None, "batch"):
        raise InputError(f'baseline is {baseline!r}, which is not a choice: write None or "batch".')
    batch = prepare(token_logps, experience)
    advantage = batch.scores - kl_coef * (batch.old - batch.ref).sum(-1)
    if baseline == "batch":
        advantage = advantage - advantage.mean()
    return terms_of(-(advantage * batch.now.sum(-1)).mean(), advantage.new_zeros(()), advantage.abs().mean(), batch)


# ---- losses of a pair: the mean over all pairs i < j of a prompt ----------------------------------------------------------------------


def online_dpo(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    kl_coef: Number = 0.1,
    soft_labels: bool = False,
) -> RelativeTerms:
    """Direct preference optimization on the policy's own pairs, labelled by their scores; kl_coef is DPO's beta.

        h = D - D_ref;   L = -p log sigmoid(kl_coef h) - (1 - p) log sigmoid(-kl_coef h)
    p is 1, 0, or 1/2 for a tie (where TRL calls the first response the better one).
    Source: Guo et al. 2024, arXiv 2402.04792; TRL 1.16's OnlineDPOTrainer with loss_type="sigmoid". Soft labels: github.com/thwu1/rlhf_sac.

    Args:
        soft_labels: p = sigmoid(gap), what a Bradley-Terry reward model believes, rather than the better one's name.
    """
    _require_price(kl_coef, "online_dpo")
    batch = prepare(token_logps, experience)
    lead, gap = kl_coef * _reference_odds(batch), batch.gaps
    label = gap.sigmoid() if soft_labels else (gap.sign() + 1) / 2
    loss = -(label * logsigmoid(lead) + (1 - label) * logsigmoid(-lead))
    return _pair_terms(loss.mean(), kl_coef * (label - lead.sigmoid()), batch)


def online_ipo(token_logps: Float[Tensor, "prompt response token"], experience: Experience, *, kl_coef: Number = 0.1) -> RelativeTerms:
    """Identity preference optimization on the policy's own pairs: regression of the log-odds to a fixed lead; kl_coef is IPO's tau.

        L = (D - D_ref - sign(gap) / (2 kl_coef))^2
    A tie's lead is 0. Log-probabilities are plain sums, as in TRL 1.16's OnlineDPOTrainer with loss_type="ipo".
    Source: Azar et al. 2023, arXiv 2310.12036, equation 17; Calandriello et al. 2024, arXiv 2403.08635 for the online form.
    """
    _require_price(kl_coef, "online_ipo")
    batch = prepare(token_logps, experience)
    miss = _reference_odds(batch) - batch.gaps.sign() / (2 * kl_coef)
    return _pair_terms(miss.square().mean(), 2 * miss, batch)


def rebel(
    token_logps: Float[Tensor, "prompt response token"],
    experience: Experience,
    *,
    kl_coef: Number = 0.05,
    eta: Number = 1.0,
) -> RelativeTerms:
    """Regression to relative rewards: the log-odds gained since the rollout are to be eta times the reward gap.

        L = ((D - D_old) / eta - q)^2,   q = gap - kl_coef (D_old - D_ref)
    Source: Gao et al. 2024, arXiv 2404.16767, equation 1; the KL is in the reward, at the policy that sampled.

    Args:
        eta: step size: log-odds in nats for each reward unit.
    """
    if not eta > 0:
        raise InputError(f"eta is {eta}, but is a step size: choose a value above 0, e.g. 1.")
    batch = prepare(token_logps, experience)
    target = batch.gaps - kl_coef * batch.odds(batch.old - batch.ref)
    miss = batch.odds(batch.drift) / eta - target
    return _pair_terms(miss.square().mean(), 2 / eta * miss, batch)


def copg(token_logps: Float[Tensor, "prompt response token"], experience: Experience, *, kl_coef: Number = 0.05) -> RelativeTerms:
    """Contrastive policy gradient: each response is the other's baseline; its optimum is the KL-regularised one, whoever sampled.

        h = D - D_ref;   L = -(gap - kl_coef/2 h) h,   of gradient -(gap - kl_coef h) grad D
    It equals (gap - kl_coef h)^2 / (2 kl_coef) up to a constant, and is the plain pairwise policy gradient at kl_coef = 0.
    Source: Flet-Berliac et al. 2024, arXiv 2406.19185.
    """
    batch = prepare(token_logps, experience)
    lead = _reference_odds(batch)
    loss = -(batch.gaps - kl_coef / 2 * lead) * lead
    return _pair_terms(loss.mean(), batch.gaps - kl_coef * lead, batch)


# ---- offline: comparisons that people made ------------------------------------------------------------------------------------------


class DirectTerms(NamedTuple):
    """The loss of comparisons and four detached figures of the rewards that it implies, beta log pi/pi_ref."""

    loss: Float[Tensor, ""]  # to minimise, the mean over pairs; carries the gradient
    chosen: Float[Tensor, ""]  # mean reward of the chosen responses
    rejected: Float[Tensor, ""]  # of the rejected
    accuracy: Float[Tensor, ""]  # share in [0, 1] of pairs with chosen > rejected; a tie counts 1/2
    margin: Float[Tensor, ""]  # mean of chosen - rejected


def direct_preference_loss(
    logps: Float[Tensor, "pair 2"],
    ref_logps: Float[Tensor, "pair 2"],
    lengths: Int[Tensor, "pair 2"],
    *,
    loss_type: str = "sigmoid",
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> DirectTerms:
    """DPO and IPO on comparisons, the better response first. With u = log pi/pi_ref of a response, T its tokens, e = label_smoothing,

        sigmoid:  L = -(1 - e) log sigmoid(beta (u_1 - u_2)) - e log sigmoid(-beta (u_1 - u_2))
        ipo:      L = (u_1 / T_1 - u_2 / T_2 - 1 / (2 beta))^2
    Sources: Rafailov et al. 2023, arXiv 2305.18290 (sigmoid); Azar et al. 2023, arXiv 2310.12036, equation 17, with log-probabilities
    averaged over tokens as in TRL 1.16's DPOTrainer, which says that its authors did so (ipo); Mitchell 2023, cDPO (label smoothing).

    Args:
        logps: log pi(y|x), nats of the whole response, under the policy being trained; carries the gradient.
        ref_logps: under the reference.
        lengths: tokens of each response, EOS included; read by ipo.
    """
    gained = _precise(logps) - _precise(ref_logps).detach()
    if loss_type == "ipo":
        per_token = gained / lengths.clamp(min=1)
        loss = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)).square()
    elif loss_type == "sigmoid":
        lead = beta * (gained[:, 0] - gained[:, 1])
        loss = -(1 - label_smoothing) * logsigmoid(lead) - label_smoothing * logsigmoid(-lead)
    else:
        raise InputError(f'loss_type is {loss_type!r}, which is not a choice: write "sigmoid" or "ipo".')
    rewards = beta * gained.detach()
    margin, (chosen, rejected) = rewards[:, 0] - rewards[:, 1], rewards.mean(0)
    return DirectTerms(loss.mean(), chosen, rejected, accuracy=((margin.sign() + 1) / 2).mean(), margin=margin.mean())


# ---- parts of the equations -----------------------------------------------------------------------------------------------------------


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + STD_FLOOR)


def _reference_odds(batch: Prepared) -> Float[Tensor, "prompt pair"]:
    """h = D - D_ref."""
    return batch.odds(batch.now - batch.ref)


def _require_price(kl_coef: Number, name: str) -> None:
    if not kl_coef > 0:
        raise InputError(f"kl_coef is {kl_coef}, but it is {name}'s temperature: choose a value above 0, e.g. 0.1.")


def _pair_terms(loss: Tensor, factor: Tensor, batch: Prepared) -> RelativeTerms:
    return terms_of(loss, loss.new_zeros(()), factor.abs().mean(), batch)


OBJECTIVES: dict[str, Callable[..., RelativeTerms]] = {
    function.__name__: function for function in (rloo, grpo, dr_grpo, gspo, reinforce, ppo, online_dpo, online_ipo, rebel, copg)
}
