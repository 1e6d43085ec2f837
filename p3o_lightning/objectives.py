"""The pairwise losses of P3O and the Bradley-Terry loss of its reward model: pure functions, tensors in, tensors out.

Source: Wu, Zhu, Zhang, Wen, Ramchandran, Jiao, "Pairwise Proximal Policy Optimization", 2023, arXiv:2310.00212, and the authors' code:
github.com/thwu1/rlhf_sac (September 2023, separate clipping) and github.com/thwu1/trlx (October 2023, joint clipping; token options later).

Axes:   prompt = prompts of the micro-batch;  response = the K >= 2 responses drawn for one prompt;  token = positions, padded;
        pair (rows of the reward model's data, or inside a body the K (K - 1) / 2 pairs i < j of one prompt).
Units:  log-probabilities in nats, of the whole response (plain sum over its sampled tokens, EOS included) unless a name says token;
        scores, gaps and q in reward units; kl_coef in reward units per nat.
Notation in the formulas:
    w_i = pi(y_i|x) / pi_old(y_i|x)         importance weight of one response
    D   = log pi(y_i|x) - log pi(y_j|x)     log-odds of a pair; D_old under the policy that sampled
    q   = r_i - r_j - kl_coef (log pi/pi_ref (y_i) - log pi/pi_ref (y_j))     reward gap of a pair, never differentiated
    sg  = stop-gradient;  eps = clip_range;  c = weight_cap
Half precision is welcome as input; everything here is computed in float32 or wider, because differences of large numbers decide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from p3o_lightning.errors import InputError
from p3o_lightning.sampler_correction import check_correction, sampler_weights

Number = float | int  # the run-time type checker of the tests takes `float` literally and would refuse kl_coef=0

# exp() of more nats than this is no longer information, only a way to inf * 0 = nan in float32 (which ends at 88 nats).
_LOSS_NATS = 60.0
_METRIC_NATS = 20.0  # lower: metrics are squared and averaged


class P3OTerms(NamedTuple):
    """The loss and what to watch beside it. All but the loss are detached. "Mean over pairs": all prompts, all pairs i < j."""

    loss: Float[Tensor, ""]  # to minimise, reward units; carries the gradient; its value is 0 at pi = pi_old
    clip_fraction: Float[
        Tensor, ""
    ]  # share in [0, 1] whose gradient the clip removed; of pairs (joint), responses in pairs, or tokens in pairs
    q_mean: Float[Tensor, ""]  # mean over pairs of q_ij, reward units (RMS gaps if gap_scale); the sign is the order of sampling: ~ 0
    q_abs: Float[Tensor, ""]  # mean over pairs of |q_ij|, same unit: the size of the training signal
    gap_logratio: Float[Tensor, ""]  # mean over pairs of |D - D_old|, nats: compare with clip_range; 0 before the first step
    joint_weight_max: Float[Tensor, ""]  # largest w_i w_j over pairs before the cap, no unit; cut at exp(20)
    ratio_mean: Float[Tensor, ""]  # mean over responses of w_i, no unit; 1 in expectation; each cut at exp(20)
    ratio_var: Float[Tensor, ""]  # population variance over responses of w_i, no unit; each cut at exp(20)
    approx_kl: Float[Tensor, ""]  # mean over responses of w_i - 1 - log w_i >= 0, nats: estimates KL(pi_old || pi) from pi_old's samples
    tie_rate: Float[Tensor, ""]  # share in [0, 1] of pairs whose reward gap, KL not included, is exactly 0


class BradleyTerryTerms(NamedTuple):
    """The reward model's loss and two detached metrics."""

    loss: Float[Tensor, ""]  # to minimise, nats per pair; carries the gradient
    accuracy: Float[Tensor, ""]  # share in [0, 1] of pairs with chosen > rejected; a tie counts 1/2
    margin: Float[Tensor, ""]  # mean over pairs of chosen - rejected, reward units; the required margin is not subtracted


class KLEstimates(NamedTuple):
    """Schulman's estimators of KL(pi || pi_ref) from samples of pi: one per response, nats, summed over its tokens.

    For one token, with u = log pi_ref - log pi:  k1 = -u,  k2 = u^2 / 2,  k3 = exp(u) - 1 - u.
    """

    k1: Float[Tensor, "prompt response"]  # unbiased; noisy, either sign
    k2: Float[Tensor, "prompt response"]  # >= 0; biased, right to second order
    k3: Float[Tensor, "prompt response"]  # >= 0; unbiased if pi gives every token that pi_ref gives some probability


def p3o_loss(
    logps: Float[Tensor, "prompt response"],
    old_logps: Float[Tensor, "prompt response"],
    ref_logps: Float[Tensor, "prompt response"],
    scores: Float[Tensor, "prompt response"] | None = None,
    *,
    gaps: Float[Tensor, "prompt response response"] | None = None,
    clipping: str = "joint",
    clip_range: Number | Float[Tensor, "prompt response"] = 0.2,
    weight_cap: Number = 10.0,
    kl_coef: Number = 0.05,
    kl_source: str = "current",
    cross_weight: bool = True,
    gap_scale: str | None = None,
    sampler_logps: Float[Tensor, "prompt response"] | None = None,
    sampler_correction: str | None = "truncate",
    sampler_cap: Number = 3.0,
) -> P3OTerms:
    """Pairwise policy loss on whole responses, the mean over all pairs i < j of a prompt and over prompts.

    clipping="joint" (P3O-V2): one box for the pair's log-odds, additive in nats,
        L_ij = -1/2 sg clip(w_i w_j, 1/c, c) min( q (D - D_old),  q clip(D - D_old, -eps, eps) ).
    The authors' code clips D around D_old, both relative to the reference; this is the same gradient with value 0 at pi = pi_old.

    clipping="separate" (P3O-V1): one box for each ratio, with the other response's weight in front,
        L_ij = -1/2 [ min(  q v_j w_i,   q v_j clip(w_i, 1 - eps, 1 + eps) )
                    + min( -q v_i w_j,  -q v_i clip(w_j, 1 - eps, 1 + eps) ) ],   v = sg clip(w, 1/c, c), or 1 if not cross_weight.

    At pi = pi_old either gradient is -q/2 grad(log pi(y_i) - log pi(y_j)): the pairwise policy gradient (Theorem 1). A shift of all scores
    or reference log-probabilities of a prompt changes nothing. Dividing by the RMS gap keeps that, and divides kl_coef too.

    Args:
        logps: log pi(y|x), nats, under the policy being trained; carries the gradient.
        old_logps: Nats under the policy that sampled.
        ref_logps: Nats under the reference policy.
        scores: r(x, y), reward units, without KL. Give this or gaps.
        gaps: r_i - r_j at [prompt, i, j], from a judge that compares; may be intransitive. Must be antisymmetric: only i < j is read.
        clipping: "joint" or "separate".
        clip_range: eps: nats of the pair's log-odds (joint), or of the ratio around 1 (separate). A tensor gives each response its own;
            a pair's joint range is then sqrt((eps_i^2 + eps_j^2) / 2), as for two independent drifts. Tensor values are not checked.
        weight_cap: c, no unit, >= 1: importance weights stay in [1/c, c]. They only scale a pair, so the cap never flips one.
            1 means no weights; inf no cap, and then float32 can overflow when a policy is 60 nats away.
        kl_coef: Price of leaving the reference, reward units per nat.
        kl_source: Policy in q's KL part. "current" (authors' code) follows the policy within a rollout, "rollout" is the one that sampled.
        cross_weight: False drops v, for the own ratio alone: also unbiased off-policy. Read by "separate" only.
        gap_scale: "rms" divides q by the root mean square of this batch's within-prompt reward gaps (left as it is if that is 0).
        sampler_logps: Nats under what drew the responses, where that is not quite the policy of old_logps (another engine or dtype), with
            rho = exp(old_logps - sampler_logps). L_ij is then weighed by rho_i rho_j; of "separate" without cross_weight each of the two
            terms by its own rho. None: the policy of old_logps drew them.
        sampler_correction: "truncate" or "mask" weights above sampler_cap, or None for no weights: see sampler_correction.py.
        sampler_cap: no unit, >= 1.

    One prompt, two responses, the first better by 1: the loss is 0 before the first update, its gradient is not.

    >>> logps = torch.tensor([[-4.0, -6.0]], requires_grad=True)
    >>> terms = p3o_loss(logps, logps.detach(), logps.detach(), scores=torch.tensor([[1.0, 0.0]]), kl_coef=0.0)
    >>> abs(terms.loss.item())
    0.0
    >>> terms.loss.backward()
    >>> logps.grad
    tensor([[-0.5000,  0.5000]])
    """
    _check_word("clipping", clipping, "joint", "separate")
    _check_settings(clip_range, weight_cap, kl_coef, kl_source, gap_scale)
    check_correction(sampler_correction, sampler_cap)
    _check_responses("logps", logps, 2)
    _check_shapes(logps.shape, old_logps=old_logps, ref_logps=ref_logps, scores=scores, gaps=gaps, clip_range=clip_range)
    _check_shapes(logps.shape, sampler_logps=sampler_logps)

    logps, old_logps, ref_logps = _precise(logps), _precise(old_logps).detach(), _precise(ref_logps).detach()
    i, j = _pairs(logps)
    gap = _reward_gaps(scores, gaps, i, j).to(logps.dtype)
    q = _shaped_gaps(gap, (logps.detach() if kl_source == "current" else old_logps) - ref_logps, kl_coef, gap_scale, i, j)
    logratio = logps - old_logps  # log w
    correction = (sampler_correction, sampler_cap)

    if clipping == "joint":
        drift = logratio[:, i] - logratio[:, j]  # D - D_old
        box = _pair_ranges(clip_range, drift, i, j)
        free, clipped = q * drift, q * _clip(drift, -box, box)
        surrogate = _weight(logratio[:, i] + logratio[:, j], weight_cap) * torch.minimum(free, clipped)
        surrogate = surrogate * _pair_rho(old_logps, sampler_logps, *correction, i, j)
    else:
        ratio = logratio.clamp(max=_LOSS_NATS).exp()  # w
        eps = _ranges(clip_range, ratio)
        boxed = _clip(ratio, 1 - eps, 1 + eps)
        weight = _weight(logratio, weight_cap) if cross_weight else torch.ones_like(logratio)  # v
        q_i, q_j = q * weight[:, j], -q * weight[:, i]  # each response is led by its own ratio and weighed by the other's
        free = torch.stack([q_i * ratio[:, i], q_j * ratio[:, j]])
        clipped = torch.stack([q_i * boxed[:, i], q_j * boxed[:, j]])
        both = torch.minimum(free, clipped)
        if cross_weight or sampler_logps is None:
            surrogate = both.sum(0) * _pair_rho(old_logps, sampler_logps, *correction, i, j)
        else:  # the other response is a baseline of the term, which needs no weight of its own
            own = sampler_weights(old_logps, _precise(sampler_logps), *correction)
            surrogate = (both * torch.stack([own[:, i], own[:, j]])).sum(0)

    return _terms(-surrogate.mean() / 2, (clipped < free).to(q.dtype).mean(), gap, q, logratio, i, j)


def p3o_token_loss(
    token_logps: Float[Tensor, "prompt response token"],
    old_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
    ref_logps: Float[Tensor, "prompt response"],
    scores: Float[Tensor, "prompt response"] | None = None,
    *,
    gaps: Float[Tensor, "prompt response response"] | None = None,
    clip_range: Number | Float[Tensor, "prompt response"] = 0.2,
    weight_cap: Number = 10.0,
    kl_coef: Number = 0.05,
    kl_source: str = "current",
    gap_scale: str | None = None,
    sampler_token_logps: Float[Tensor, "prompt response token"] | None = None,
    sampler_correction: str | None = "truncate",
    sampler_cap: Number = 3.0,
) -> P3OTerms:
    """`p3o_loss` with its joint clip on tokens (clip_level="token"), for long responses: summed log-odds leave any one box by noise alone.

    With d_it the log-ratio pi/pi_old of token t of response i,
        L_ij = -1/2 sg clip(w_i w_j, 1/c, c) [ sum_t min(  q d_it,   q clip(d_it, -eps, eps) )
                                             + sum_t min( -q d_jt,  -q clip(d_jt, -eps, eps) ) ],
    the mean over pairs i < j and prompts. It is `clip_tokenwise` of the authors' later code (thwu1/trlx, November 2023; not in the paper)
    but for the scale: theirs divides by the response tokens of the batch, ours keeps the pair mean and the 1/2 of `p3o_loss`, so the two
    losses share learning rates: the gradient at pi = pi_old is that of clipping="joint".

    Args:
        token_logps: Nats of each sampled token under the policy being trained; carries the gradient.
        old_token_logps: Nats under the policy that sampled.
        mask: True on sampled tokens, EOS included; what lies elsewhere is never read.
        clip_range: eps, nats of one token. A tensor gives each response its own.
        sampler_token_logps: Nats of each token under what drew it. Whole responses are weighed, in pairs, as in `p3o_loss`.
    The others are those of `p3o_loss`; `ref_logps` is per response.
    """
    _check_settings(clip_range, weight_cap, kl_coef, kl_source, gap_scale)
    check_correction(sampler_correction, sampler_cap)
    _check_responses("token_logps", token_logps, 3)
    _check_shapes(token_logps.shape, old_token_logps=old_token_logps, mask=mask, sampler_token_logps=sampler_token_logps)
    _check_shapes(token_logps.shape[:2], ref_logps=ref_logps, scores=scores, gaps=gaps, clip_range=clip_range)

    token_logps = _precise(token_logps).masked_fill(~mask, 0)
    old_token_logps = _precise(old_token_logps).detach().masked_fill(~mask, 0)
    i, j = _pairs(token_logps)
    gap = _reward_gaps(scores, gaps, i, j).to(token_logps.dtype)
    kl_logps = (token_logps.detach() if kl_source == "current" else old_token_logps).sum(-1)
    q = _shaped_gaps(gap, kl_logps - _precise(ref_logps).detach(), kl_coef, gap_scale, i, j)

    drift = token_logps - old_token_logps  # d, 0 outside the mask
    logratio = drift.sum(-1)  # log w
    eps = _ranges(clip_range, logratio)[..., None]
    # min(q d, q clip(d)) is q min(d, eps) for q > 0 and q max(d, -eps) for q < 0: two sums for each response instead of one for each pair.
    above, below = drift > eps, drift < -eps
    rise, fall = torch.where(above, eps, drift).sum(-1), torch.where(below, -eps, drift).sum(-1)
    gain = torch.where(q > 0, rise[:, i] - fall[:, j], fall[:, i] - rise[:, j])
    surrogate = _weight(logratio[:, i] + logratio[:, j], weight_cap) * q * gain
    sampler_logps = None if sampler_token_logps is None else _precise(sampler_token_logps).masked_fill(~mask, 0).sum(-1)
    surrogate = surrogate * _pair_rho(old_token_logps.sum(-1), sampler_logps, sampler_correction, sampler_cap, i, j)

    high, low = above.sum(-1), below.sum(-1)
    removed = torch.where(q > 0, high[:, i] + low[:, j], low[:, i] + high[:, j]) * (q != 0)
    lengths = mask.sum(-1)
    clip_fraction = removed.sum() / (lengths[:, i] + lengths[:, j]).sum().clamp(min=1)
    return _terms(-surrogate.mean() / 2, clip_fraction.to(q.dtype), gap, q, logratio, i, j)


def sqrt_length_clip_range(
    clip_range: Number, lengths: Int[Tensor, "prompt response"], reference_length: Number
) -> Float[Tensor, "prompt response"]:
    """clip_range sqrt(length / reference_length) for each response, to be passed as `p3o_loss(clip_range=...)`.

    The log-ratio of T tokens that drift independently by sigma nats has standard deviation sigma sqrt(T): a box that grows the same way
    clips long and short responses equally often.

    Args:
        clip_range: The range of a response of reference_length tokens, in nats.
        lengths: Sampled tokens of each response, EOS included. Counted as 1 where 0, so that every range is positive.
        reference_length: Tokens.

    >>> sqrt_length_clip_range(0.2, torch.tensor([[16, 64]]), 64)
    tensor([[0.1000, 0.2000]])
    """
    _require(clip_range > 0, f"clip_range is {clip_range}, but the box it spans must not be empty: choose a value above 0, e.g. 0.2.")
    _require(
        reference_length > 0,
        f"reference_length is {reference_length}, but is a number of tokens: choose a usual response length, e.g. 128.",
    )
    return clip_range * (lengths.clamp(min=1) / reference_length).sqrt()


def kl_estimates(
    token_logps: Float[Tensor, "prompt response token"],
    ref_token_logps: Float[Tensor, "prompt response token"],
    mask: Bool[Tensor, "prompt response token"],
) -> KLEstimates:
    """KL(pi || pi_ref) of each response from its own tokens, three ways (Schulman 2020, "Approximating KL Divergence").

    Args:
        token_logps: log pi of each sampled token, nats; carries the gradient if there is one.
        ref_token_logps: log pi_ref of the same tokens, nats.
        mask: True on sampled tokens, EOS included; what lies elsewhere is never read.

    Two tokens, the first likelier than under the reference by one nat:

    >>> policy, reference = torch.tensor([[[0.0, -1.0]]]), torch.tensor([[[-1.0, -1.0]]])
    >>> kl = kl_estimates(policy, reference, torch.ones(1, 1, 2, dtype=torch.bool))
    >>> [round(value.item(), 4) for value in (kl.k1, kl.k2, kl.k3)]  # 1, 1/2, 1/e
    [1.0, 0.5, 0.3679]
    """
    _check_responses("token_logps", token_logps, 3, least=1)
    _check_shapes(token_logps.shape, ref_token_logps=ref_token_logps, mask=mask)
    u = _precise(ref_token_logps).masked_fill(~mask, 0) - _precise(token_logps).masked_fill(~mask, 0)
    return KLEstimates(k1=-u.sum(-1), k2=(u.square() / 2).sum(-1), k3=(torch.expm1(u.clamp(max=_LOSS_NATS)) - u).sum(-1))


def bradley_terry_loss(
    chosen: Float[Tensor, " pair"],
    rejected: Float[Tensor, " pair"],
    *,
    margin: Float[Tensor, " pair"] | None = None,
    label_smoothing: Number = 0.0,
    center_coef: Number = 0.0,
) -> BradleyTerryTerms:
    """Negative log-likelihood of the preferences under the Bradley-Terry model, the mean over pairs.

    With z = chosen - rejected - margin and e = label_smoothing,
        L = -(1 - e) log sigmoid(z) - e log sigmoid(-z) + center_coef (chosen + rejected)^2.
    Without the last term only differences enter, so the reward is learnt up to a constant per prompt (Lemma 1): P3O needs no more.

    Args:
        chosen: Reward of the preferred response.
        rejected: Reward of the other.
        margin: How far chosen should lead, reward units; None is 0.
        label_smoothing: Assumed share of wrong labels, in [0, 0.5).
        center_coef: Pull of rewards to zero, nats per squared reward unit; fixes the free constant, for people who read raw rewards.

    One pair ordered right by 1, one tie: (log(1 + 1/e) + log 2) / 2 nats.

    >>> terms = bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> round(terms.loss.item(), 4), terms.accuracy.item()
    (0.5032, 0.75)
    """
    _require(
        0 <= label_smoothing < 0.5,
        f"label_smoothing is {label_smoothing}, but is the share of labels taken to be wrong: choose a value in [0, 0.5), e.g. 0.1.",
    )
    _require(center_coef >= 0, f"center_coef is {center_coef}, but a negative one drives rewards away from 0: choose 0 (off) or e.g. 0.01.")
    _require(chosen.ndim == 1, f"chosen has shape {tuple(chosen.shape)}, but needs one reward for each pair: reshape it to (pair,).")
    _check_shapes(chosen.shape, rejected=rejected, margin=margin)

    chosen, rejected = _precise(chosen), _precise(rejected)
    lead = chosen - rejected
    z = lead if margin is None else lead - margin.to(lead.dtype)
    loss = -((1 - label_smoothing) * logsigmoid(z) + label_smoothing * logsigmoid(-z)).mean()
    loss = loss + center_coef * (chosen + rejected).square().mean()
    lead = lead.detach()
    return BradleyTerryTerms(loss, accuracy=((lead.sign() + 1) / 2).mean(), margin=lead.mean())


# ---- parts of the equations -------------------------------------------------------------------------------------------------------------


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Indices i < j of all pairs of responses, the second axis of `values`."""
    i, j = torch.triu_indices(values.shape[1], values.shape[1], offset=1, device=values.device)
    return i, j


def _reward_gaps(scores: Tensor | None, gaps: Tensor | None, i: Tensor, j: Tensor) -> Float[Tensor, "prompt pair"]:
    """r_i - r_j. The difference comes before any rounding: a gap of 0.25 between rewards near 100 is 0 in bfloat16."""
    if scores is not None:
        scores = _precise(scores).detach()
        return scores[:, i] - scores[:, j]
    assert gaps is not None  # _check_shapes saw to it
    return _precise(gaps).detach()[:, i, j]


def _shaped_gaps(
    gap: Float[Tensor, "prompt pair"],
    ref_logratio: Float[Tensor, "prompt response"],
    kl_coef: Number,
    gap_scale: str | None,
    i: Tensor,
    j: Tensor,
) -> Float[Tensor, "prompt pair"]:
    """q: the reward gap less the price of its log pi/pi_ref; gap_scale divides the whole, so that reward and KL keep their balance."""
    q = gap - kl_coef * (ref_logratio[:, i] - ref_logratio[:, j])
    if gap_scale == "rms":
        rms = gap.square().mean().sqrt()
        q = q / torch.where(rms > 0, rms, torch.ones_like(rms))
    return q


def _clip(values: Tensor, low: Number | Tensor, high: Number | Tensor) -> Tensor:
    """clip(values, low, high), with the gradient at its very edges, which torch.clamp keeps before torch 2.15 and drops from then on."""
    return torch.where(values < low, low, torch.where(values > high, high, values))


def _weight(logweight: Tensor, cap: Number) -> Tensor:
    """sg clip(w, 1/c, c), clipped as nats so that no exp overflows."""
    nats = min(math.log(cap), _LOSS_NATS)
    return logweight.detach().clamp(-nats, nats).exp()


def _pair_rho(
    old_logps: Float[Tensor, "prompt response"],
    sampler_logps: Float[Tensor, "prompt response"] | None,
    correction: str | None,
    cap: Number,
    i: Tensor,
    j: Tensor,
) -> Float[Tensor, "prompt pair"]:
    """rho_i rho_j under the cap; 1 where the policy itself drew the responses."""
    if sampler_logps is None:
        return torch.ones_like(old_logps[:, i])
    sampler_logps = _precise(sampler_logps)
    return sampler_weights(old_logps[:, i] + old_logps[:, j], sampler_logps[:, i] + sampler_logps[:, j], correction, cap)


def _ranges(clip_range: Number | Tensor, like: Tensor) -> Tensor:
    return clip_range.to(like.dtype) if isinstance(clip_range, Tensor) else torch.full_like(like, clip_range)


def _pair_ranges(clip_range: Number | Tensor, like: Tensor, i: Tensor, j: Tensor) -> Tensor:
    ranges = _ranges(clip_range, like)
    return ((ranges[:, i].square() + ranges[:, j].square()) / 2).sqrt() if isinstance(clip_range, Tensor) else ranges


@torch.no_grad()
def _metrics(gap: Tensor, q: Tensor, logratio: Tensor, i: Tensor, j: Tensor) -> dict[str, Tensor]:
    capped = logratio.clamp(max=_METRIC_NATS)
    ratio = capped.exp()
    return {
        "q_mean": q.mean(),
        "q_abs": q.abs().mean(),
        "gap_logratio": (logratio[:, i] - logratio[:, j]).abs().mean(),
        "joint_weight_max": (logratio[:, i] + logratio[:, j]).max().clamp(max=_METRIC_NATS).exp(),
        "ratio_mean": ratio.mean(),
        "ratio_var": ratio.var(correction=0),
        "approx_kl": (torch.expm1(capped) - capped).mean(),
        "tie_rate": (gap == 0).to(gap.dtype).mean(),
    }


def _terms(loss: Tensor, clip_fraction: Tensor, gap: Tensor, q: Tensor, logratio: Tensor, i: Tensor, j: Tensor) -> P3OTerms:
    return P3OTerms(loss=loss, clip_fraction=clip_fraction, **_metrics(gap, q, logratio, i, j))


# ---- checks of what the user typed ------------------------------------------------------------------------------------------------------


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _check_word(field: str, value: str, *words: str) -> None:
    choices = " or ".join(f'"{word}"' for word in words)
    _require(value in words, f"{field} is {value!r}, which is not a choice: write {choices}.")


def _check_settings(clip_range: Number | Tensor, weight_cap: Number, kl_coef: Number, kl_source: str, gap_scale: str | None) -> None:
    _require(  # the values of a tensor are not looked at: that would make the device wait at every step
        isinstance(clip_range, Tensor) or clip_range > 0,
        f"clip_range is {clip_range}, but the box it spans must not be empty: choose a value above 0, e.g. 0.2.",
    )
    _require(
        weight_cap >= 1,
        f"weight_cap is {weight_cap}, but weights are kept in [1 / weight_cap, weight_cap]: choose a value of at least 1, e.g. 10.",
    )
    _require(
        kl_coef >= 0, f"kl_coef is {kl_coef}, but a negative one pays for leaving the reference: choose 0 (no KL) or above, e.g. 0.05."
    )
    _check_word("kl_source", kl_source, "current", "rollout")
    _require(gap_scale in (None, "rms"), f'gap_scale is {gap_scale!r}, which is not a choice: write None or "rms".')


def _check_responses(field: str, values: Tensor, ndim: int, least: int = 2) -> None:
    axes = ("prompt", "response", "token")[:ndim]
    _require(
        values.ndim == ndim,
        f"{field} has shape {tuple(values.shape)}, but needs the axes ({', '.join(axes)}): keep a prompt's responses in one row.",
    )
    _require(
        values.shape[1] >= least,
        f"{field} has {values.shape[1]} response(s) for each prompt, but a pair needs two: draw at least 2, e.g. num_generations=2.",
    )


def _check_shapes(shape: torch.Size, **tensors: Tensor | Number | None) -> None:
    """Every tensor has the shape of the first argument; `gaps` a second response axis; and exactly one of scores and gaps is there."""
    if "gaps" in tensors:
        given = [field for field in ("scores", "gaps") if tensors[field] is not None]
        _require(
            len(given) == 1,
            f"scores and gaps are {'both' if given else 'neither'} given, but q needs one of them: "
            "pass scores (one reward for each response) or gaps (one for each pair).",
        )
    for field, values in tensors.items():
        if isinstance(values, Tensor):
            wanted = (*shape, shape[-1]) if field == "gaps" else tuple(shape)
            _require(
                tuple(values.shape) == wanted,
                f"{field} has shape {tuple(values.shape)}, but {wanted} is needed to match the first argument: one entry for each.",
            )
