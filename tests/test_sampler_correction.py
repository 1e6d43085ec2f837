"""Responses drawn by another distribution than the policy: what the weights promise, by exact enumeration (tests/tabular.py).

The sampler mu is the old policy with other logits; expectations are sums over all 225 pairs that mu may draw, in float64.
"""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from p3o_terms import coefs_of
from tabular import (
    BETA,
    FORMS,
    MASK,
    PAIRS,
    UNCLIPPED,
    all_draws,
    close,
    coefficients,
    each_distance,
    each_form,
    expected_gradient,
    expected_reward,
    gradient,
    kl_objective,
    make_world,
    off_policy,
    pair_form,
    sequence_logps,
    token_logps,
)
from tiny import Recorder, equal, policy, prompts, trainer, weights

from p3o_lightning import InputError, PairwisePolicy
from p3o_lightning.batches import Experience
from p3o_lightning.generation import sample_with_logps
from p3o_lightning.objectives import p3o_loss, p3o_token_loss
from p3o_lightning.proofs import prove_sampler_is_policy
from p3o_lightning.sampler_correction import sampler_weights

UNCAPPED = {"sampler_cap": math.inf}


def sampler_of(world, step=0.4):
    """Logits of the sampler."""
    generator = torch.Generator().manual_seed(7)
    return world.old_logits + step * torch.randn(world.old_logits.shape, dtype=torch.float64, generator=generator)


def gradient_from(world, drawn_from, draws=PAIRS, **settings):
    """Expected gradient of the loss over draws from these logits."""
    settings = {"kl_coef": BETA, **settings}
    rows = (world.old_logps[draws], world.ref_logps[draws], world.rewards[draws])
    coefs = coefficients(lambda logps: p3o_loss(logps, *rows, **settings), world.logps[draws])
    return expected_gradient(coefs, draws, sequence_logps(drawn_from), world.score_functions)


# ---- unbiased


@each_distance
@each_form
def test_k1_k2_unclipped_gradient_from_the_samplers_draws_is_that_of_the_objective(world, form):
    """K1: a pair's weight is rho_i rho_j. K2: where a term has its own ratio alone, so is its weight."""
    mu = sampler_of(world)
    corrected = gradient_from(world, mu, sampler_logps=sequence_logps(mu)[PAIRS], **UNCLIPPED, **UNCAPPED, **form)
    close(corrected, -gradient(kl_objective(world), world.logits))
    uncorrected = gradient_from(world, mu, **UNCLIPPED, **form)
    assert (uncorrected - corrected).norm() > 0.02 * corrected.norm()  # what the weights are for


@pytest.mark.parametrize("count", [2, 3])
@each_form
def test_k1_k2_hold_for_all_pairs_of_more_responses(form, count):
    world, draws = make_world(0.3), all_draws(count)
    mu = sampler_of(world)
    corrected = gradient_from(world, mu, draws, sampler_logps=sequence_logps(mu)[draws], **UNCLIPPED, **UNCAPPED, **form)
    close(corrected, -gradient(kl_objective(world), world.logits))


@each_distance
@pair_form
def test_k1_a_pairs_weight_gives_the_clipped_losses_expectation_too(world, form):
    """Whatever the loss of a pair is: weighed from mu, it is what the old policy's own draws would give."""
    mu = sampler_of(world)
    corrected = gradient_from(world, mu, sampler_logps=sequence_logps(mu)[PAIRS], **UNCAPPED, **form)
    close(corrected, gradient_from(world, world.old_logits, **form))


def test_k2_clipped_at_the_old_policy_own_weights_give_its_gradient():
    world = make_world(0.0)
    mu, form = sampler_of(world), FORMS["separate own ratio"]
    corrected = gradient_from(world, mu, sampler_logps=sequence_logps(mu)[PAIRS], **UNCAPPED, **form)
    close(corrected, gradient_from(world, world.old_logits, **form))


def test_own_weights_vary_half_as_much():
    """The reason for them: the log-weight of a pair has twice the variance of a response's."""
    world = make_world(0.3)
    mu = sequence_logps(sampler_of(world))
    nats, probability = world.old_logps - mu, mu.exp()
    variance = (probability * nats.square()).sum() - (probability * nats).sum() ** 2
    chance = probability[PAIRS].prod(-1)
    of_pairs = (chance * nats[PAIRS].sum(-1).square()).sum() - (chance * nats[PAIRS].sum(-1)).sum() ** 2
    close(of_pairs, 2 * variance)


@each_distance
def test_the_token_clip_is_corrected_by_pairs_of_whole_responses(world):
    mu = sampler_of(world)
    given = [token_logps(logits)[PAIRS] for logits in (world.logits, world.old_logits)]

    def expected(drawn_from, **settings):
        rows = (given[1], MASK[PAIRS], world.ref_logps[PAIRS], world.rewards[PAIRS])
        leaf = given[0].clone().requires_grad_()
        chance = sequence_logps(drawn_from).exp()[PAIRS].prod(-1)
        total = torch.zeros_like(leaf)
        for row in range(len(PAIRS)):
            one = [values[row : row + 1] for values in (leaf, *rows)]
            more = {name: value[row : row + 1] if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
            (slope,) = torch.autograd.grad(p3o_token_loss(*one, **more).loss, leaf)
            total += chance[row] * slope
        return torch.zeros(len(MASK), 3, dtype=torch.float64).index_add(0, PAIRS.flatten(), total.flatten(0, 1))

    close(expected(mu, sampler_token_logps=token_logps(mu)[PAIRS], **UNCAPPED), expected(world.old_logits))


def test_k1_pair_correction_is_unbiased_and_no_correction_is_not():
    """gap rho_i rho_j, rho = pi_old / mu, corrects for the sampler mu while the clip stays around pi_old."""
    world = make_world(0.0)
    mu = sequence_logps(sampler_of(world))
    rho = (world.old_logps - mu).exp()[PAIRS]
    rewards = world.rewards[PAIRS]
    gaps = (rewards[:, :, None] - rewards[:, None, :]) * (rho[:, :, None] * rho[:, None, :])
    wanted = -gradient(expected_reward(world), world.logits)
    for form in FORMS.values():
        close(expected_gradient(coefs_of(world, gaps=gaps, **form), PAIRS, mu, world.score_functions), wanted, 1e-13)
        biased = expected_gradient(coefs_of(world, **form), PAIRS, mu, world.score_functions)
        assert (biased - wanted).norm() > 1e-3


@each_form
@off_policy
def test_k1_k2_weights_against_the_sampler_are_unbiased_in_pair_and_own_form(form, world):
    """w_i rho_i = pi / mu: handing the sampler's log-probabilities in as the old ones corrects both forms."""
    mu = sequence_logps(sampler_of(world))
    loss = lambda logps: p3o_loss(logps, mu[PAIRS], world.ref_logps[PAIRS], world.rewards[PAIRS], kl_coef=BETA, **form, **UNCLIPPED)  # noqa: E731
    coefs = coefficients(loss, world.logps[PAIRS])
    wanted = -gradient(kl_objective(world), world.logits)
    close(expected_gradient(coefs, PAIRS, mu, world.score_functions), wanted, 1e-13)


# ---- to the bit, caps, masks


def random_rows(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, dtype=dtype, generator=generator) - 20 for _ in range(4)]


@each_form
@pytest.mark.parametrize("correction", ["truncate", "mask", None])
def test_where_the_sampler_is_the_policy_nothing_changes_to_the_bit(form, correction):
    logps, old, ref, scores = random_rows()
    plain, corrected = (
        p3o_loss(leaf := logps.clone().requires_grad_(), old, ref, scores, **form, **given)._replace(tie_rate=leaf)
        for given in ({}, {"sampler_logps": old, "sampler_correction": correction, "sampler_cap": 1.0})
    )
    gradients = [torch.autograd.grad(terms.loss, terms.tie_rate)[0] for terms in (plain, corrected)]
    assert torch.equal(plain.loss, corrected.loss) and torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_where_the_sampler_is_the_policy_the_token_loss_does_not_change_to_the_bit():
    logps, old = (torch.stack([values] * 3, -1) / 3 for values in random_rows()[:2])
    _, _, ref, scores = random_rows()
    given = (logps, old, torch.ones(5, 4, 3, dtype=torch.bool), ref, scores)
    assert torch.equal(p3o_token_loss(*given).loss, p3o_token_loss(*given, sampler_token_logps=old).loss)


def test_weights_by_hand():
    old = torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    nats = torch.tensor([0.25, 1.0, 2.0, 4.0], dtype=torch.float64).log()  # the weights that the old policy has over the sampler
    assert sampler_weights(old, -nats, "truncate", 2.0).tolist() == pytest.approx([0.25, 1, 2, 2])
    assert sampler_weights(old, -nats, "mask", 3.0).tolist() == pytest.approx([0.25, 1, 2, 0])
    assert sampler_weights(old, -nats, None, 2.0).tolist() == [1, 1, 1, 1]
    assert sampler_weights(old, -1e4 * torch.ones(4, dtype=torch.float64), "truncate", math.inf).isfinite().all()


def test_what_is_masked_stays_in_the_mean():
    """Of two prompts, one is far from the sampler: the loss is half of the other's, not all of it. A pair is masked as one."""
    logps, old, ref, scores = (values[:2, :2].double() for values in random_rows())
    sampler = old.clone()
    sampler[1, 0] -= math.log(5)
    masked = p3o_loss(logps, old, ref, scores, sampler_logps=sampler, sampler_correction="mask").loss
    alone = p3o_loss(*(values[:1] for values in (logps, old, ref, scores))).loss
    close(masked, alone / 2, 1e-12)
    truncated = p3o_loss(logps, old, ref, scores, sampler_logps=sampler).loss
    other = p3o_loss(*(values[1:] for values in (logps, old, ref, scores))).loss
    close(truncated, (alone + 3 * other) / 2, 1e-12)


def test_own_weights_are_capped_one_by_one():
    """Weights 2 and 4 make a pair's 8; alone, the cap of 3 leaves the 2 and cuts the 4."""
    logps, old, ref, scores = (values[:1, :2].double() for values in random_rows())
    sampler = old - torch.tensor([[2.0, 4.0]], dtype=torch.float64).log()
    leaf = logps.clone().requires_grad_()
    form = {**FORMS["separate own ratio"], **UNCLIPPED, "kl_coef": 0.0}
    (plain,) = torch.autograd.grad(p3o_loss(leaf, old, ref, scores, **form).loss, leaf)
    (own,) = torch.autograd.grad(p3o_loss(leaf, old, ref, scores, sampler_logps=sampler, **form).loss, leaf)
    close(own, plain * torch.tensor([[2.0, 3.0]], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler_correction": "clip"}, r"sampler_correction is 'clip'.*truncate or mask"),
        ({"sampler_cap": 0.5}, r"sampler_cap is 0.5.*at least 1"),
    ],
)
def test_settings_that_are_none_are_refused(settings, message):
    logps, old, ref, scores = random_rows()
    with pytest.raises(InputError, match=message):
        p3o_loss(logps, old, ref, scores, sampler_logps=old, **settings)
    with pytest.raises(InputError, match="model." + message[:13]):
        policy(**settings)


def test_the_samplers_log_probabilities_have_the_shape_of_the_policys():
    logps, old, ref, scores = random_rows()
    with pytest.raises(InputError, match=r"sampler_logps has shape \(5, 3\)"):
        inspect.unwrap(p3o_loss)(logps, old, ref, scores, sampler_logps=old[:, :3])


# ---- in a run: a policy that samples with half-precision weights of its own


class HalfPrecisionSampler(PairwisePolicy):
    """Samples with bfloat16 weights and trains float32 ones."""

    sampler_differs = True

    def sample_with_logps(self, prompts, seed=None):
        ids = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        half = copy.deepcopy(self.model).to(torch.bfloat16).eval()
        return sample_with_logps(half, prompts.tokens, prompts.attention_mask, self.sampling, seed=self.rollout_seed, **ids)


class Same(HalfPrecisionSampler):
    """Says that the sampler differs, but it is the policy."""

    def sample_with_logps(self, prompts, seed=None):
        return PairwisePolicy.sample_with_logps(self, prompts, seed)

    def rollout_step(self, prompts):
        experience = super().rollout_step(prompts)
        return experience._replace(sampler_token_logps=experience.old_token_logps)


class Plain(PairwisePolicy):
    """Overrides a part, so that the old log-probabilities are computed as in the others."""

    def policy_logps(self, *given):
        return super().policy_logps(*given)


def run(owner, root, batches=None, **settings):
    class Watched(owner):
        """Keeps its micro-batches."""

        def training_step(self, batch, batch_idx):
            if batches is not None:
                batches.append(batch)
            return super().training_step(batch, batch_idx)

    recorder = Recorder()
    module = policy(Watched, **{"num_iterations": 2, "micro_batch_size": 2, **settings})
    flags = {"max_steps": 8, "logger": recorder, "log_every_n_steps": 1}
    trainer(root, **flags).fit(module, module.wrap_train_dataloader(prompts()))
    return module, recorder


@pytest.mark.parametrize("settings", [{}, {"clipping": "separate", "cross_weight": False}, {"clip_level": "token"}], ids=str)
def test_a_run_whose_sampler_is_the_policy_is_the_same_to_the_bit(settings, tmp_path):
    corrected, _ = run(Same, tmp_path, **settings)
    plain, _ = run(Plain, tmp_path, **settings)
    assert equal(weights(corrected), weights(plain))


def test_a_half_precision_sampler_is_corrected_for(tmp_path):
    batches: list[Experience] = []
    _, recorder = run(HalfPrecisionSampler, tmp_path, batches)
    assert all(batch.sampler_token_logps is not None for batch in batches)
    gaps = [(batch.old_token_logps - batch.sampler_token_logps).abs().max() for batch in batches]
    assert min(gaps) > 1e-4 and max(gaps) < 0.3  # another dtype, not another model
    logged = [row for _, row in recorder.rows if "sampling/importance_sampling_ratio/mean" in row]
    assert len(logged) == 8 and all(0 < row["sampling/sampling_logp_difference/mean"] < 0.3 for row in logged)
    ratios = [[row[f"sampling/importance_sampling_ratio/{kind}"] for kind in ("min", "mean", "max")] for row in logged]
    assert all(least <= mean <= most for least, mean, most in ratios)


@pytest.mark.parametrize("settings", [{}, {"clipping": "separate", "cross_weight": False}, {"clip_level": "token"}], ids=str)
def test_every_loss_is_given_the_correction(settings, tmp_path):
    """The weights are near 1 here, and are told by more than the last bits."""
    corrected, without = (run(HalfPrecisionSampler, tmp_path, sampler_correction=how, **settings)[0] for how in ("truncate", None))
    apart = [(weights(corrected)[name] - value).abs().max() for name, value in weights(without).items()]
    assert max(apart) > 1e-4


def test_the_correction_enters_where_the_training_forward_gives_the_old_log_probabilities(tmp_path):
    """One update a rollout: old_token_logps are made in the update, and weigh against the sampler's there."""
    one_update = {"num_iterations": 1, "micro_batch_size": 4}
    corrected, recorder = run(HalfPrecisionSampler, tmp_path, **one_update)
    without, _ = run(HalfPrecisionSampler, tmp_path, sampler_correction=None, **one_update)
    assert not equal(weights(corrected), weights(without))
    differences = [
        row["sampling/sampling_logp_difference/max"] for _, row in recorder.rows if "sampling/sampling_logp_difference/max" in row
    ]
    assert len(differences) == 8 and min(differences) > 0


def test_a_sampler_that_is_another_model_stops_at_the_start(tmp_path):
    class Other(HalfPrecisionSampler):
        """Samples from noise."""

        def sample_with_logps(self, prompts, seed=None):
            tokens, mask, logps = super().sample_with_logps(prompts, seed)
            return tokens, mask, torch.where(mask, logps - 0.5, logps)

    with pytest.raises(InputError, match=r"start-up proof: the sampler's log-probabilities differ from the policy's by 0\.[45]\d* nats"):
        run(Other, tmp_path)
    run(Other, tmp_path, start_up_proofs=False)


def test_the_proof_takes_what_another_dtype_does_and_reads_no_padding():
    mask = torch.tensor([[[True, True, False]]])
    old, sampler = torch.tensor([[[-1.0, -2.0, 0.0]]]), torch.tensor([[[-1.1, -1.9, 50.0]]])
    prove_sampler_is_policy(sampler, old, mask)
    with pytest.raises(InputError, match="start-up proof"):
        prove_sampler_is_policy(torch.full_like(old, torch.nan), old, mask)
