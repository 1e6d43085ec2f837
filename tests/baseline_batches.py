"""What the tests of P3O's relatives share: an Experience of the enumerated policy or of ragged rows, and gradients on it."""

from __future__ import annotations

import torch
from tabular import BETA, MASK, PAIRS, RESPONSES, World, close, coefficients, gradient, token_logps

from p3o_lightning.baselines import OBJECTIVES
from p3o_lightning.batches import Experience
from p3o_lightning.objectives import p3o_loss

INVARIANT = [name for name in OBJECTIVES if name not in ("ppo", "reinforce")]  # by a shift of a prompt's scores


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


def gradients(objective, new, batch, values=None, **settings):
    leaf = new.clone().requires_grad_()
    return torch.autograd.grad(run(objective, leaf, batch, values, **settings).loss, leaf)[0]
