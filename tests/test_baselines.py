"""The relatives of P3O: each against a loop of its own equation, and how it relates to P3O. Ids such as C8 or H3 number the statements.

Enumeration is that of tests/tabular.py; everything is float64, on- and off-policy.

The power of these tests: each of these errors, planted alone, fails at least one. Most fall to the loops of the equations first.
    rloo: own reward in the baseline, KL of the wrong sign, KL at the current policy
    grpo: biased or unguarded standard deviation, mean over the batch's tokens, KL of the wrong sign
    dr_grpo: standard deviation kept, divisor ignored;  gspo: whole ratio, KL not over the length
    reinforce: a ratio for the log-probability
    pairs: labels swapped, beta in the soft label, 1/tau for 1/(2 tau), eta on the wrong side, KL left out of rebel, half left out of copg,
        log-odds to the old policy for those to the reference
    clip: without min, none, wrong side, upper range ignored;  k3 inverted, k1 for k3;  mask ignored;  old, scores or values not detached
    gaps: summed, transposed
    ppo: lambda or gamma left out, V of the wrong sign, score at the first token, KL of the wrong sign, returns of whitened advantages,
        whitening without centring, least for greatest error, value clip around the present value, half, vf_coef or divisor left out
"""

from __future__ import annotations

import inspect
import math
from itertools import permutations

import pytest
import torch
from tabular import (
    CONTEXT_OF_TOKEN,
    MASK,
    RESPONSES,
    STEPS,
    World,
    all_draws,
    coefficients,
    gradient,
    make_world,
    sequence_logps,
    token_logps,
)
from torch.testing import assert_close

from p3o_lightning.baselines import OBJECTIVES, STD_FLOOR, copg, dr_grpo, grpo, gspo, online_dpo, online_ipo, ppo, rebel, reinforce, rloo
from p3o_lightning.batches import Experience
from p3o_lightning.errors import InputError
from p3o_lightning.objectives import p3o_loss
from p3o_lightning.ppo import generalized_advantages, token_rewards

PAIRS = all_draws(2)
BETA = 0.7  # large, so that an error in the KL part cannot hide
FREE = {"clip_range": math.inf}
PLAIN = {"clip_range": math.inf, "weight_cap": 1.0}  # P3O's pairwise form, neither weighted nor clipped
DISTANCES = {name: make_world(step) for name, step in STEPS.items()}

each_distance = pytest.mark.parametrize("world", DISTANCES.values(), ids=DISTANCES.keys())
off_policy = pytest.mark.parametrize("world", list(DISTANCES.values())[1:], ids=list(DISTANCES)[1:])


def close(actual, expected, tolerance):
    assert actual.dtype == torch.float64
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


def experience(old, ref, mask, scores=None, **more) -> Experience:
    rows = len(mask)
    return Experience(
        prompt_tokens=torch.zeros(rows, 1, dtype=torch.long),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        completion_tokens=torch.zeros(mask.shape, dtype=torch.long),
        completion_mask=mask,
        old_token_logps=old,
        ref_token_logps=ref,
        scores=scores,
        **more,
    )


def of_world(world: World, draws=PAIRS, scores=None, **more) -> tuple[torch.Tensor, Experience]:
    """Current log-probabilities of the drawn responses' tokens, and what a rollout by the old policy made of them."""
    new, old, ref = (token_logps(logits)[draws] for logits in (world.logits, world.old_logits, world.ref_logits))
    given = {"scores": world.rewards[draws] if scores is None else scores} if "gaps" not in more else {}
    return new, experience(old, ref, MASK[draws], **given, **more)


def ragged(prompts: int = 4, count: int = 3, spread: float = 0.4, seed: int = 1) -> tuple[torch.Tensor, Experience, torch.Tensor]:
    """Responses of one to five tokens, sampled by any policy, with the critic's values at the rollout; and its values at present."""
    draw = torch.Generator().manual_seed(seed)
    shape = (prompts, count, 5)
    old, drift, ref, values, now = (torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(5))
    mask = torch.arange(5) < torch.randint(1, 6, shape[:2], generator=draw).unsqueeze(-1)
    scores = torch.randn(shape[:2], dtype=torch.float64, generator=draw)
    old = (old - 2) * mask
    return old + spread * drift * mask, experience(old, (ref - 2) * mask, mask, scores, values=values * mask), (values + 0.3 * now) * mask


def run(objective: str, token_logps, batch: Experience, values=None, **settings):
    """The objective on a batch; of PPO with values that do not move unless they are given."""
    of_critic = {"values": batch.values if values is None else values} if objective == "ppo" else {}
    return OBJECTIVES[objective](token_logps, batch, **{"kl_coef": BETA, **settings}, **of_critic)


def per_response(coefs, mask):
    """The coefficient of a whole response: that of each of its tokens, which must be one."""
    first = coefs[..., :1]
    close(coefs, first * mask, 1e-13)
    return first.squeeze(-1)


def coefs_of(function, world: World, draws=PAIRS, **settings):
    """d loss / d log pi(y) of every drawn response."""
    new, batch = of_world(world, draws)
    return per_response(coefficients(lambda leaf: function(leaf, batch, **settings), new), batch.completion_mask)


def p3o_coefs(world: World, draws=PAIRS, **settings):
    gaps = settings.get("gaps")
    scores = world.rewards[draws] if gaps is None else None
    return coefficients(lambda leaf: p3o_loss(leaf, world.old_logps[draws], world.ref_logps[draws], scores, **settings), world.logps[draws])


def expected_gradient(function, world: World, draws=PAIRS, **given):
    """E over independent draws from the policy that sampled of the loss's gradient in the logits, exactly; token by token."""
    new, batch = of_world(world, draws, **given)
    coefs = coefficients(lambda leaf: function(leaf, batch), new)
    probability = world.old_logps.exp()[draws].prod(-1)
    summed = torch.zeros(len(RESPONSES), 3, dtype=torch.float64)
    summed = summed.index_add(0, draws.flatten(), (probability[:, None, None] * coefs).flatten(0, 1))
    return gradient(lambda logits: (token_logps(logits) * summed).sum(), world.logits)


# ---- each equation, one response and one token at a time --------------------------------------------------------------------------------


def clipped(ratio, advantage, low, high=None):
    box = torch.tensor([1 - low, 1 + (low if high is None else high)], dtype=torch.float64)
    return torch.stack([ratio * advantage, torch.stack([torch.stack([ratio, box[0]]).max(), box[1]]).min() * advantage]).min()


def loop(objective, new, batch, values=None, *, kl_coef, clip_range=0.2, **options):
    """The loss by plain sums over lists; each line is the paper's, none is the package's."""
    responses = []  # per prompt: lists of (new, old, ref, old value, new value) of every token
    for p, rows in enumerate(batch.completion_mask.tolist()):
        group = []
        for k, kept in enumerate(rows):
            steps = range(sum(kept))
            columns = (new, batch.old_token_logps, batch.ref_token_logps, batch.values, new if values is None else values)
            group.append([[column[p, k, t] for column in columns] for t in steps])
        responses.append(group)
    total, count = torch.zeros((), dtype=torch.float64), 0
    if objective == "ppo":
        return loop_ppo(responses, batch.scores, kl_coef, clip_range, **options)
    for group, scores in zip(responses, batch.scores.tolist(), strict=True):
        size = len(group)
        sums = [[sum(token[column] for token in tokens) for column in range(3)] for tokens in group]
        kl_rewards = [score - kl_coef * float(old - ref) for score, (_, old, ref) in zip(scores, sums, strict=True)]
        mean = sum(scores) / size
        deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (size - 1))
        if objective in ("online_dpo", "online_ipo", "rebel", "copg"):
            for i in range(size):
                for j in range(i + 1, size):
                    lead = (sums[i][0] - sums[i][2]) - (sums[j][0] - sums[j][2])
                    gained = (sums[i][0] - sums[i][1]) - (sums[j][0] - sums[j][1])
                    gap, winner = scores[i] - scores[j], 1 if scores[i] > scores[j] else -1
                    if objective == "online_dpo":
                        total = total + torch.log1p(torch.exp(-kl_coef * winner * lead))
                    elif objective == "online_ipo":
                        total = total + (winner * lead - 1 / (2 * kl_coef)) ** 2
                    elif objective == "rebel":
                        total = total + (gained / options.get("eta", 1.0) - (kl_rewards[i] - kl_rewards[j])) ** 2
                    else:
                        total = total - (gap * lead - kl_coef * lead**2 / 2)
                    count += 1
            continue
        for k, tokens in enumerate(group):
            count += 1
            others = [reward for other, reward in enumerate(kl_rewards) if other != k]
            if objective == "reinforce":
                total = total - kl_rewards[k] * sums[k][0]
            elif objective == "rloo":
                total = total - clipped((sums[k][0] - sums[k][1]).exp(), kl_rewards[k] - sum(others) / len(others), clip_range)
            else:
                advantage = scores[k] - mean
                if objective != "dr_grpo":
                    advantage = advantage / (deviation + 1e-4)
                share = options.get("divisor", 1.0) if objective == "dr_grpo" else len(tokens)
                mean_drift = (sums[k][0] - sums[k][1]) / len(tokens)
                for now, old, ref, *_ in tokens:
                    ratio = (mean_drift if objective == "gspo" else now - old).exp()
                    k3 = (ref - now).exp() - 1 - (ref - now)
                    gain = clipped(ratio, advantage, clip_range, options.get("clip_range_high"))
                    total = total + (-gain + kl_coef * k3) / share
    return total / count


def loop_ppo(
    responses,
    scores,
    kl_coef,
    clip_range,
    value_clip_range=0.2,
    vf_coef=1.0,
    gamma=1.0,
    gae_lambda=0.95,
    whiten_advantages=True,
    divisor=None,
):
    """Generalised advantages by their definition, a double sum over the one-step errors."""
    rows, advantages = [], []
    for group, own in zip(responses, scores.tolist(), strict=True):
        for tokens, score in zip(group, own, strict=True):
            length = len(tokens)
            reward = [-kl_coef * float(old - ref) for _, old, ref, _, _ in tokens]
            reward[-1] += score
            value = [float(token[3]) for token in tokens] + [0.0]
            error = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
            for t, token in enumerate(tokens):
                advantage = sum((gamma * gae_lambda) ** (later - t) * error[later] for later in range(t, length))
                advantages.append(advantage)
                rows.append((token, advantage + value[t], length))
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages) + 1e-8)
    total = torch.zeros((), dtype=torch.float64)
    for ((now, old, _, old_value, value), wanted, _), advantage in zip(rows, advantages, strict=True):
        if whiten_advantages:
            advantage = (advantage - mean) / deviation
        gain = clipped((now - old).exp(), advantage, clip_range)
        boxed = old_value + (value - old_value).clamp(-value_clip_range, value_clip_range)
        error = torch.stack([(value - wanted) ** 2, (boxed - wanted) ** 2]).max()
        total = total - gain + vf_coef * error / 2
    responses_in_all = sum(len(group) for group in responses)
    return total / (len(rows) if divisor is None else divisor * responses_in_all)


LOOPED = [
    ("rloo", {}),
    ("grpo", {}),
    ("grpo", {"clip_range": 0.1, "clip_range_high": 0.4}),
    ("dr_grpo", {}),
    ("dr_grpo", {"divisor": 5.0, "clip_range_high": 0.3}),
    ("gspo", {"clip_range": 0.05}),
    ("gspo", {"clip_range": 0.03, "clip_range_high": 0.1}),
    ("reinforce", {}),
    ("online_dpo", {}),
    ("online_ipo", {}),
    ("rebel", {"eta": 2.5}),
    ("copg", {}),
    ("ppo", {}),
    ("ppo", {"whiten_advantages": False, "gae_lambda": 0.6, "gamma": 0.9, "vf_coef": 0.1, "value_clip_range": 0.1}),
    ("ppo", {"divisor": 5.0, "whiten_advantages": False, "clip_range": 0.05}),
]


@pytest.mark.parametrize(("objective", "settings"), LOOPED, ids=str)
@pytest.mark.parametrize("kl_coef", [BETA, 0.05])
def test_loss_and_gradients_are_those_of_the_equation(objective, settings, kl_coef):
    new, batch, values = ragged()
    found = []
    for function in (run, loop):
        leaf, critic = new.clone().requires_grad_(), values.clone().requires_grad_()
        answer = function(objective, leaf, batch, critic, kl_coef=kl_coef, **settings)
        loss = answer if function is loop else answer.loss
        found.append((loss.detach(), *torch.autograd.grad(loss, [leaf, critic], allow_unused=True)))
    (loss, by_policy, by_critic), (wanted, wanted_by_policy, wanted_by_critic) = found
    close(loss, wanted, 1e-12)
    close(by_policy, wanted_by_policy, 1e-12)
    if objective == "ppo":
        close(by_critic, wanted_by_critic, 1e-12)


@pytest.mark.parametrize("objective", ["rloo", "grpo", "dr_grpo", "gspo", "ppo"])
def test_the_clip_acts_in_these_loops(objective):
    """The comparison above would prove little of a clip that never acts, or always does."""
    new, batch, values = ragged()
    clip = 0.05 if objective == "gspo" else 0.2
    terms = run(objective, new, batch, values, clip_range=clip)
    assert 0.1 < terms.clip_fraction < 0.9
    if objective == "ppo":
        assert 0.1 < terms.value_clip_fraction < 0.9


# ---- C: what is P3O -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_c1_c4_on_policy_rloo_is_p3o(count):
    world, draws = make_world(0.0), torch.randint(15, (40, count), generator=torch.Generator().manual_seed(count))
    close(coefs_of(rloo, world, draws, kl_coef=BETA), p3o_coefs(world, draws, kl_coef=BETA), 1e-13)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_c2_c5_on_policy_dr_grpo_is_k_minus_1_over_k_of_p3o(count):
    world, draws = make_world(0.0), torch.randint(15, (40, count), generator=torch.Generator().manual_seed(count))
    ours = p3o_coefs(world, draws, kl_coef=0.0)
    close(coefs_of(dr_grpo, world, draws, kl_coef=0.0), (count - 1) / count * ours, 1e-13)
    close(coefs_of(dr_grpo, world, draws, kl_coef=0.0, divisor=7), (count - 1) / count * ours / 7, 1e-13)


def kl_objective(world: World):
    def value(logits):
        logps = sequence_logps(logits)
        return (logps.exp() * (world.rewards - BETA * (logps - world.ref_logps))).sum()

    return value


def test_c3_a_batchs_mean_with_the_response_itself_in_it_shortens_the_gradient_of_reinforce():
    """One prompt of two responses a batch: (N - 1) / N of it is a half."""
    world, total = make_world(0.0), torch.zeros(15, 3, dtype=torch.float64)
    for row, chance in zip(PAIRS, world.old_logps.exp()[PAIRS].prod(-1), strict=True):
        new, batch = of_world(world, row[None])
        coefs = coefficients(lambda leaf, b=batch: reinforce(leaf, b, kl_coef=BETA, baseline="batch"), new)
        total = total.index_add(0, row, chance * coefs[0])
    found = gradient(lambda logits: (token_logps(logits) * total).sum(), world.logits)
    close(found, -gradient(kl_objective(world), world.logits) / 2, 1e-13)


@pytest.mark.parametrize("function", [rloo, reinforce])
def test_c3_on_policy_the_expected_gradient_is_that_of_reward_less_kl(function):
    world = make_world(0.0)
    found = expected_gradient(lambda leaf, batch: function(leaf, batch, kl_coef=BETA), world)
    close(found, -gradient(kl_objective(world), world.logits), 1e-13)


@off_policy
def test_c7_off_policy_rloo_is_not_p3o(world):
    for form in ({"clipping": "joint"}, {"clipping": "separate"}):
        ours = p3o_coefs(world, kl_coef=0.0, clip_range=math.inf, weight_cap=math.inf, **form)
        assert (coefs_of(rloo, world, kl_coef=0.0, **FREE) - ours).abs().max() > 1e-2


@each_distance
def test_c8_rloo_of_two_is_p3o_with_separate_clips_of_the_own_ratio(world):
    settings = {"clipping": "separate", "cross_weight": False, "kl_source": "rollout", "kl_coef": BETA}
    new, batch = of_world(world)
    ours = p3o_loss(new.sum(-1), batch.old_logps, batch.ref_logps, batch.scores, **settings)
    theirs = rloo(new, batch, kl_coef=BETA)
    close(theirs.loss, ours.loss, 1e-13)
    close(coefs_of(rloo, world, kl_coef=BETA), p3o_coefs(world, **settings), 1e-13)
    close(theirs.clip_fraction, ours.clip_fraction, 1e-13)


@off_policy
@pytest.mark.parametrize("count", [3, 4])
def test_c8_rloo_of_more_is_that_too_where_nothing_is_clipped(world, count):
    draws = torch.randint(15, (40, count), generator=torch.Generator().manual_seed(count))
    settings = {"clipping": "separate", "cross_weight": False, "kl_source": "rollout", "kl_coef": BETA}
    close(coefs_of(rloo, world, draws, kl_coef=BETA, **FREE), p3o_coefs(world, draws, **settings, **FREE), 1e-13)
    clipped_apart = coefs_of(rloo, world, draws, kl_coef=BETA) - p3o_coefs(world, draws, **settings)
    assert clipped_apart.abs().max() > 1e-3  # a pair's term leaves the minimum, not the response's sum of them


# ---- H: what is related to P3O ----------------------------------------------------------------------------------------------------------


def test_h1_grpo_of_two_keeps_the_sign_of_the_gap_alone():
    """On-policy, K = 2: -sign(r1 - r2) (s1 - s2) / (2 sqrt 2), each s over its own length; the size of the gap is lost."""
    world = make_world(0.0)
    new, batch = of_world(world, scores=1e9 * world.rewards[PAIRS])  # so that 1e-4 beside the standard deviation is nothing
    coefs = coefficients(lambda leaf: grpo(leaf, batch, kl_coef=0.0), new)
    sign = (world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]).sign()
    wanted = -sign[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64) / (2 * math.sqrt(2))
    close(coefs * MASK[PAIRS].sum(-1, keepdim=True), wanted[..., None] * MASK[PAIRS], 1e-11)


def test_h2_gspo_of_two_is_that_over_each_length_also_where_it_clips_nothing_far_away():
    """On-policy as H1. GSPO's ratio is one number a response: off-policy its tokens share one coefficient, GRPO's do not."""
    world = make_world(0.0)
    new, batch = of_world(world, scores=1e9 * world.rewards[PAIRS])
    lengths = MASK[PAIRS].sum(-1)
    sign = (world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]).sign()
    wanted = -sign[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64) / (2 * math.sqrt(2)) / lengths
    close(per_response(coefficients(lambda leaf: gspo(leaf, batch, kl_coef=0.0), new), MASK[PAIRS]), wanted, 1e-11)
    away, batch = of_world(make_world(0.3), scores=1e9 * world.rewards[PAIRS])
    ratio = ((away - batch.old_token_logps).sum(-1) / lengths).exp()
    close(per_response(coefficients(lambda leaf: gspo(leaf, batch, kl_coef=0.0, **FREE), away), MASK[PAIRS]), wanted * ratio, 1e-11)
    token = coefficients(lambda leaf: grpo(leaf, batch, kl_coef=0.0, **FREE), away)
    assert (token - token[..., :1] * MASK[PAIRS]).abs().max() > 1e-2


@each_distance
def test_h3_rebel_is_4_over_eta_of_p3o_with_the_kl_to_the_old_policy(world):
    eta = 2.5
    shaped = world.rewards - BETA * (world.old_logps - world.ref_logps)
    old, scores = world.old_logps[PAIRS], shaped[PAIRS]
    ours = coefficients(lambda leaf: p3o_loss(leaf, old, old, scores, kl_coef=1 / eta, **PLAIN), world.logps[PAIRS])
    close(coefs_of(rebel, world, kl_coef=BETA, eta=eta), 4 / eta * ours, 1e-12)


def test_h3_the_first_step_of_rebel_is_4_over_eta_of_p3o_as_it_is():
    world = make_world(0.0)
    close(coefs_of(rebel, world, kl_coef=BETA, eta=2.5), 4 / 2.5 * p3o_coefs(world, kl_coef=BETA), 1e-13)


@each_distance
def test_h4_copg_is_twice_p3o_without_weight_and_clip_and_a_regression_of_the_gap(world):
    coefs = coefs_of(copg, world, kl_coef=BETA)
    close(coefs, 2 * p3o_coefs(world, kl_coef=BETA, **PLAIN), 1e-13)

    class Terms:
        def __init__(self, loss):
            self.loss = loss

    def regression(logps):
        lead = logps - world.ref_logps[PAIRS]
        gap = world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]
        return Terms((gap - BETA * (lead[:, 0] - lead[:, 1])).square().mean())

    close(coefs, coefficients(regression, world.logps[PAIRS]) / (2 * BETA), 1e-12)


def test_h4_at_the_optimum_copg_is_silent_whoever_sampled():
    world = make_world(2.0)
    fitting = BETA * (world.logps - world.ref_logps) + 3.0  # rewards whose optimum is the present policy
    new, batch = of_world(world, scores=fitting[PAIRS])
    close(coefficients(lambda leaf: copg(leaf, batch, kl_coef=BETA), new), torch.zeros_like(new), 1e-12)


def odds(world: World):
    """D log pi/pi_ref of each pair, and its gap."""
    lead = (world.logps - world.ref_logps)[PAIRS]
    return lead[:, 0] - lead[:, 1], world.rewards[PAIRS[:, 0]] - world.rewards[PAIRS[:, 1]]


def as_gaps(q):
    """A gap for each pair as the table that p3o_loss takes."""
    return torch.stack([torch.stack([0 * q, q], -1), torch.stack([-q, 0 * q], -1)], -2)


@each_distance
def test_h5_online_dpo_is_p3o_with_a_gap_that_saturates(world):
    """q = 2 beta (label - sigmoid(beta h)): 2 beta sigmoid(-beta h) for the better response; the size of the reward gap is lost."""
    lead, gap = odds(world)
    winner = gap.sign()
    q = winner * 2 * BETA / (1 + (BETA * winner * lead).exp())
    close(coefs_of(online_dpo, world, kl_coef=BETA), p3o_coefs(world, kl_coef=0.0, gaps=as_gaps(q), **PLAIN), 1e-12)
    louder = world._replace(rewards=7 * world.rewards)
    close(coefs_of(online_dpo, louder, kl_coef=BETA), coefs_of(online_dpo, world, kl_coef=BETA), 1e-13)


@each_distance
def test_h6_soft_labels_are_p3o_with_the_difference_of_two_beliefs(world):
    lead, gap = odds(world)
    q = 2 * BETA * (1 / (1 + (-gap).exp()) - 1 / (1 + (-BETA * lead).exp()))
    close(coefs_of(online_dpo, world, kl_coef=BETA, soft_labels=True), p3o_coefs(world, kl_coef=0.0, gaps=as_gaps(q), **PLAIN), 1e-12)


@each_distance
def test_h7_online_ipo_is_4_over_tau_of_p3o_with_a_gap_of_one_half(world):
    _, gap = odds(world)
    ours = p3o_coefs(world, kl_coef=BETA, gaps=as_gaps(gap.sign() / 2), **PLAIN)
    close(coefs_of(online_ipo, world, kl_coef=BETA), 4 / BETA * ours, 1e-12)


def preferences(seed: int = 3, transitive: bool = False):
    """P(y > y') of any kind: a table whose log-odds are antisymmetric."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(15, 15, dtype=torch.float64, generator=draw)
    if transitive:
        table = table[:, :1] - table[:, :1].mT
    return (table - table.mT).sigmoid()


@pytest.mark.parametrize("transitive", [True, False], ids=["h8 transitive", "h9 intransitive"])
def test_h8_h9_with_a_preference_for_a_gap_p3o_is_twice_nash_self_play(transitive):
    """E[(P(y > y') - 1/2) s(y)], y' from the policy itself (Nash-MD's mixture 0)."""
    world, table = make_world(0.0), preferences(transitive=transitive)
    if not transitive:
        assert any(table[i, j] > 0.5 and table[j, k] > 0.5 and table[k, i] > 0.5 for i, j, k in permutations(range(15), 3))  # a cycle
    opponent = world.old_logps.exp()
    nash = gradient(lambda logits: sequence_logps(logits).exp() @ (table - 0.5) @ opponent, world.logits)

    def ours(leaf, batch):
        gaps = as_gaps(2 * table[PAIRS[:, 0], PAIRS[:, 1]] - 1)
        return p3o_loss(leaf.sum(-1), batch.old_logps, batch.ref_logps, gaps=gaps, kl_coef=0.0)

    close(expected_gradient(ours, world), -2 * nash, 1e-13)


def test_h10_the_first_step_of_sppo_is_2_eta_of_p3o_and_later_ones_are_not_contrastive():
    """SPPO with one opponent: the sum over both responses of (log pi/pi_old - eta (P - 1/2))^2."""
    eta, table = 1.7, preferences()
    chance = table[PAIRS[:, 0], PAIRS[:, 1]]

    class Terms:
        def __init__(self, loss):
            self.loss = loss

    def sppo_of(world):
        def sppo(logps):
            gained = logps - world.old_logps[PAIRS]
            wanted = eta * (torch.stack([chance, 1 - chance], -1) - 0.5)
            return Terms((gained - wanted).square().sum(-1).mean())

        return coefficients(sppo, world.logps[PAIRS])

    world = make_world(0.0)
    close(sppo_of(world), 2 * eta * p3o_coefs(world, kl_coef=0.0, gaps=as_gaps(2 * chance - 1)), 1e-13)
    assert sppo_of(make_world(0.3)).sum(-1).abs().max() > 1e-2


# ---- B: a shift of the scores -----------------------------------------------------------------------------------------------------------

INVARIANT = [name for name in OBJECTIVES if name not in ("ppo", "reinforce")]


def shifted(batch: Experience, seed: int = 5) -> tuple[Experience, torch.Tensor]:
    """A constant of size 10 for each prompt, added to all its scores."""
    shift = 10 * torch.randn(len(batch.scores), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return batch._replace(scores=batch.scores + shift), shift


def gradients(objective, new, batch, values=None, **settings):
    leaf = new.clone().requires_grad_()
    return torch.autograd.grad(run(objective, leaf, batch, values, **settings).loss, leaf)[0]


@pytest.mark.parametrize("objective", INVARIANT)
@pytest.mark.parametrize("spread", [0.0, 0.4], ids=["on-policy", "off-policy"])
def test_b6_a_shift_of_a_prompts_scores_changes_nothing(objective, spread):
    new, batch, _ = ragged(spread=spread)
    other, _ = shifted(batch)
    close(gradients(objective, new, other), gradients(objective, new, batch), 1e-12)


@pytest.mark.parametrize("objective", ["ppo", "reinforce"])
@pytest.mark.parametrize("spread", [0.0, 0.4], ids=["on-policy", "off-policy"])
def test_b6_but_of_ppo_and_reinforce_it_changes_the_update_of_a_batch(objective, spread):
    new, batch, _ = ragged(spread=spread)
    other, _ = shifted(batch)
    plain, moved = gradients(objective, new, batch), gradients(objective, new, other)
    cosine = torch.nn.functional.cosine_similarity(plain.flatten(), moved.flatten(), dim=0)
    assert cosine < 0.9, cosine  # not a factor: another direction


def test_b6_a_critic_that_knows_the_shift_makes_ppo_invariant():
    new, batch, values = ragged()
    other, shift = shifted(batch)
    knows = other._replace(values=(batch.values + shift.unsqueeze(-1)) * batch.completion_mask)
    close(gradients("ppo", new, knows, values), gradients("ppo", new, batch, values), 1e-12)


UNBIASED = {"gae_lambda": 1.0, "whiten_advantages": False, "divisor": 1.0, **FREE}  # what B7 needs


def critic_of(draws, seed=9):
    """A critic that knows nothing: any value for each of the 7 contexts."""
    table = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (table[CONTEXT_OF_TOKEN] * MASK)[draws]


def expected_ppo(world, shift=0.0, **settings):
    values = critic_of(PAIRS)

    def function(leaf, batch):
        return ppo(leaf, batch, values=batch.values, kl_coef=BETA, **{**UNBIASED, **settings})

    return expected_gradient(function, world, scores=world.rewards[PAIRS] + shift, values=values)


@each_distance
def test_b7_unclipped_ppo_is_invariant_in_expectation_though_its_critic_is_fixed(world):
    plain = expected_ppo(world)
    assert plain.norm() > 0.05
    close(expected_ppo(world, shift=10.0), plain, 1e-12)


def test_b7_on_policy_reinforce_is_invariant_in_expectation():
    world = make_world(0.0)

    def function(leaf, batch):
        return reinforce(leaf, batch, kl_coef=BETA)

    close(
        expected_gradient(function, world, scores=world.rewards[PAIRS] + 10.0),
        expected_gradient(function, world),
        1e-12,
    )


@pytest.mark.parametrize("usual", [{"gae_lambda": 0.95}, {"clip_range": 0.2}], ids=str)
def test_b7_with_lambda_below_1_or_a_clip_ppo_is_not_even_invariant_in_expectation(usual):
    world = make_world(0.3)
    assert (expected_ppo(world, shift=10.0, **usual) - expected_ppo(world, **usual)).norm() > 1e-2


def test_b7_nor_with_a_mean_over_the_tokens_of_a_batch():
    """The paper's PPO divides by the batch's own tokens, which are fewer where responses are short: one prompt of two responses a batch."""
    world = make_world(0.0)
    found = []
    for shift in (0.0, 10.0):
        total = 0.0
        for row, chance in zip(PAIRS, world.old_logps.exp()[PAIRS].prod(-1), strict=True):
            new, batch = of_world(world, row[None], scores=world.rewards[row[None]] + shift, values=critic_of(row[None]))
            options = {**UNBIASED, "divisor": None}
            coefs = coefficients(lambda leaf, b=batch, o=options: ppo(leaf, b, values=b.values, kl_coef=0.0, **o), new)
            total = total + chance * torch.zeros(15, 3, dtype=torch.float64).index_add(0, row, coefs[0])
        found.append(gradient(lambda logits, t=total: (token_logps(logits) * t).sum(), world.logits))
    assert (found[0] - found[1]).norm() > 1e-2


# ---- PPO's parts ------------------------------------------------------------------------------------------------------------------------


def test_generalised_advantages_by_hand():
    """r = (0, 1), V = (1/2, 1/4), gamma 1, lambda 1/2: errors (-1/4, 3/4), so A = (-1/4 + 3/8, 3/4). A response of one token: r - V."""
    rewards = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]], dtype=torch.float64)
    values = torch.tensor([[[0.5, 0.25], [0.5, 0.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True], [True, False]]])
    close(generalized_advantages(rewards, values, mask, gae_lambda=0.5), [[[0.125, 0.75], [1.5, 0.0]]], 1e-15)
    # gamma 1/2: errors (1/8 - 1/2, 3/4), and the later one counts 1/2 x 1/2
    close(generalized_advantages(rewards, values, mask, gamma=0.5, gae_lambda=0.5), [[[-0.1875, 0.75], [1.5, 0.0]]], 1e-15)


def test_with_lambda_1_advantages_are_returns_less_values_and_with_0_one_step_errors():
    _, batch, values = ragged()
    rewards = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * batch.completion_mask
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    close(generalized_advantages(rewards, values, batch.completion_mask, gae_lambda=1.0), (to_go - values) * batch.completion_mask, 1e-13)
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    close(
        generalized_advantages(rewards, values, batch.completion_mask, gae_lambda=0.0),
        (rewards + after - values) * batch.completion_mask,
        1e-13,
    )


def test_the_score_is_paid_at_the_last_token_and_the_kl_at_every_one():
    old, ref = torch.tensor([[[-1.0, -2.0, 0.0]]]).double(), torch.tensor([[[-1.5, -1.0, 0.0]]]).double()
    mask = torch.tensor([[[True, True, False]]])
    close(token_rewards(torch.tensor([[3.0]]).double(), old, ref, mask, 0.1), [[[-0.05, 0.1 + 3.0, 0.0]]], 1e-15)


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    """Seen through the gradient on-policy: minus the advantage over the number of tokens."""
    new, batch, values = ragged(spread=0.0)
    advantage = -gradients("ppo", new, batch, values)[batch.completion_mask] * batch.completion_mask.sum()
    close(advantage.mean(), 0.0, 1e-13)
    close(advantage.var(correction=0), 1.0, 1e-6)


@each_distance
def test_ppo_with_any_critic_has_the_policy_gradient_on_policy(world):
    if torch.equal(world.logits, world.old_logits):
        close(expected_ppo(world), -gradient(kl_objective(world), world.logits), 1e-13)
    else:  # a product of the ratios of all tokens up to t would be needed: one token's ratio is PPO's approximation
        assert (expected_ppo(world) + gradient(kl_objective(world), world.logits)).norm() > 1e-3


def test_ppo_by_hand():
    """One response of one token and its twin, w = 2: A = 1 - 0; gain min(2, 1.2); V = 1 may move 0.2 from 0, so (0.2 - 1)^2 counts."""
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 2, 1, dtype=torch.float64)
    batch = experience(zeros, zeros, mask, torch.ones(1, 2, dtype=torch.float64), values=zeros)
    terms = ppo(zeros + math.log(2), batch, values=zeros + 1, kl_coef=0.0, whiten_advantages=False)
    close(terms.policy_loss, -1.2, 1e-15)
    close(terms.value_loss, 0.32, 1e-15)
    close(terms.loss, -1.2 + 0.32, 1e-15)
    assert terms.clip_fraction == 1 and terms.value_clip_fraction == 1


def test_grpo_by_hand():
    """Scores (1, 0): mean 1/2, standard deviation sqrt(1/2); w = (2, 1/2) on one token each, clipped to 1.2; the other is not clipped."""
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 2, 1, dtype=torch.float64)
    batch = experience(zeros, zeros, mask, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    new = torch.tensor([[[math.log(2)], [math.log(0.5)]]], dtype=torch.float64)
    advantage = 0.5 / (math.sqrt(0.5) + STD_FLOOR)
    terms = grpo(new, batch, kl_coef=0.0)
    close(terms.loss, -(1.2 * advantage - 0.8 * advantage) / 2, 1e-14)  # of the worse one the clip lets no more than 0.2 be gained
    assert terms.clip_fraction == 1
    with_kl = grpo(new, batch, kl_coef=0.1).loss - terms.loss  # k3 = 1/w - 1 + log w
    close(with_kl, 0.1 * ((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2))) / 2, 1e-14)


# ---- what holds of all ------------------------------------------------------------------------------------------------------------------

each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


@each_objective
def test_only_the_loss_carries_a_gradient_and_only_to_the_policy_and_the_critic(objective):
    new, batch, values = ragged()
    names = ("old_token_logps", "ref_token_logps", "scores", "values")
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in names}
    leaf = new.clone().requires_grad_()
    terms = run(objective, leaf, batch._replace(**leaves), values)
    assert all(not value.requires_grad for name, value in terms._asdict().items() if name != "loss" and value is not None)
    terms.loss.backward()
    assert leaf.grad.any() and all(value.grad is None for value in leaves.values())


@each_objective
@pytest.mark.parametrize("filler", [7.0, -math.inf, math.nan])
def test_what_padding_holds_and_how_much_there_is_of_it_changes_nothing(objective, filler):
    new, batch, values = ragged()
    plain = run(objective, new, batch, values)
    wide = torch.nn.functional.pad(batch.completion_mask, (0, 2))

    def filled(tensor):
        return torch.nn.functional.pad(tensor, (0, 2)).masked_fill(~wide, filler)

    names = ("old_token_logps", "ref_token_logps", "values")
    other = batch._replace(completion_mask=wide, **{name: filled(getattr(batch, name)) for name in names})
    for name, value in run(objective, filled(new), other, filled(values))._asdict().items():
        if value is not None:
            close(value, getattr(plain, name), 1e-13)


@each_objective
def test_the_figures_of_the_drift_are_those_of_p3o(objective):
    new, batch, values = ragged()
    batch = batch._replace(scores=batch.scores.round())  # some ties
    ours = p3o_loss(new.sum(-1), batch.old_logps, batch.ref_logps, batch.scores)
    theirs = run(objective, new, batch, values)
    for name in ("gap_logratio", "ratio_mean", "ratio_var", "approx_kl", "tie_rate"):
        close(getattr(theirs, name), getattr(ours, name), 1e-13)
    assert 0 < theirs.tie_rate < 1


@each_objective
def test_before_the_first_step_nothing_is_clipped_and_nothing_has_drifted(objective):
    new, batch, values = ragged(spread=0.0)
    terms = run(objective, new, batch, values)
    assert terms.clip_fraction == 0 and terms.ratio_mean == 1 and terms.ratio_var == 0 and terms.gap_logratio == 0 and terms.approx_kl == 0
    assert terms.advantage_abs > 0


@pytest.mark.parametrize("objective", ["rloo", "grpo", "dr_grpo", "gspo"])
def test_clip_fraction_counts_the_gradients_that_are_gone(objective):
    new, batch, _ = ragged()
    clip = 0.05 if objective == "gspo" else 0.2
    leaf = new.clone().requires_grad_()
    terms = run(objective, leaf, batch, clip_range=clip, kl_coef=0.0)
    (found,) = torch.autograd.grad(terms.loss, leaf)
    gone = (found == 0) & batch.completion_mask
    share = gone.any(-1).double().mean() if objective in ("rloo", "gspo") else gone.sum() / batch.completion_mask.sum()
    close(terms.clip_fraction, float(share), 1e-7)


@each_objective
def test_float32_agrees_with_float64_and_half_precision_is_computed_in_float32(objective):
    new, batch, values = ragged(spread=0.1)
    names = ("old_token_logps", "ref_token_logps", "scores", "values")
    for dtype in (torch.float32, torch.bfloat16):
        low = batch._replace(**{name: getattr(batch, name).to(dtype) for name in names})
        high = batch._replace(**{name: getattr(low, name).double() for name in names})
        narrow = run(objective, new.to(dtype), low, values.to(dtype))
        wide = run(objective, new.to(dtype).double(), high, values.to(dtype).double())
        assert narrow.loss.dtype == torch.float32
        assert_close(narrow.loss.double(), wide.loss, rtol=2e-5, atol=2e-5)


@each_objective
@pytest.mark.parametrize("nats", [60.0, -60.0, 300.0])
def test_loss_and_gradient_are_finite_however_far_away(objective, nats):
    new, batch, values = ragged()
    batch = batch._replace(**{name: getattr(batch, name).float() for name in ("old_token_logps", "ref_token_logps", "scores", "values")})
    away = (new.float() + nats * torch.tensor([1.0, -1.0, 0.0])[:, None] * batch.completion_mask).requires_grad_()
    terms = run(objective, away, batch, values.float())
    (found,) = torch.autograd.grad(terms.loss, away)
    assert found.isfinite().all() and all(value.isfinite() for value in terms if value is not None)


@pytest.mark.parametrize("objective", INVARIANT)
def test_gaps_of_scores_are_scores(objective):
    new, batch, _ = ragged()
    judged = batch._replace(scores=None, gaps=batch.scores.unsqueeze(2) - batch.scores.unsqueeze(1))
    close(gradients(objective, new, judged), gradients(objective, new, batch), 1e-12)


@pytest.mark.parametrize("objective", ["online_dpo", "online_ipo"])
def test_a_tie_pulls_a_pair_to_the_references_odds(objective):
    """TRL would call the first response the better one: a preference that nobody has."""
    new, batch, _ = ragged(prompts=1, count=2)
    tied = batch._replace(scores=torch.zeros_like(batch.scores))
    lead = float((new - batch.ref_token_logps).sum(-1) @ torch.tensor([1.0, -1.0], dtype=torch.float64))
    found = per_response(gradients(objective, new, tied), batch.completion_mask)[0]
    assert abs(lead) > 0.1 and math.copysign(1, float(found[0])) == math.copysign(1, lead)
    close(found.sum(), 0.0, 1e-13)
    level = batch.ref_token_logps + 0.0
    assert not gradients(objective, level, tied).abs().max() > 1e-13


def test_reinforce_may_subtract_the_batchs_mean():
    new, batch, _ = ragged()
    reward = batch.scores - BETA * (batch.old_logps - batch.ref_logps)
    found = per_response(gradients("reinforce", new, batch, baseline="batch"), batch.completion_mask)
    close(found, -(reward - reward.mean()) / reward.numel(), 1e-13)


# ---- bad input --------------------------------------------------------------------------------------------------------------------------


def test_errors_name_the_field_the_value_and_the_fix():
    new, batch, values = ragged()
    for call, message in (
        (lambda: rloo(new, batch._replace(scores=None)), "neither scores nor gaps: score the responses in rollout_step"),
        (lambda: rloo(new[:, :, :4], batch), r"token_logps has shape \(4, 3, 4\), but the experience's responses have \(4, 3, 5\)"),
        (lambda: ppo(new, batch._replace(values=None), values=values), "the experience has no values"),
        (lambda: ppo(new, batch, values=values, gae_lambda=-0.1), "gae_lambda is -0.1: choose a value in"),
        (lambda: grpo(new, batch, clip_range=0.0), "clip_range is 0.0"),
        (lambda: grpo(new, batch, clip_range_high=0.0), "clip_range_high is 0.0"),
        (lambda: rebel(new, batch, eta=0.0), "eta is 0.0, but is a step size"),
        (lambda: reinforce(new, batch, baseline="mean"), "baseline is 'mean', which is not a choice: write None or \"batch\""),
        (lambda: online_dpo(new, batch, kl_coef=0.0), "kl_coef is 0.0, but it is online_dpo's temperature: choose a value above 0"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_every_relative_takes_a_price_of_kl_and_says_where_it_is_from():
    for name, function in OBJECTIVES.items():
        assert "kl_coef" in inspect.signature(function).parameters, name
        said = inspect.getdoc(function) if name != "ppo" else inspect.getdoc(inspect.getmodule(function))
        assert "Source" in said and ("arXiv" in said), name
