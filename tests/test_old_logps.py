"""Where there is one update a rollout, no forward is made for the old log-probabilities, and training is the same to the bit."""

import pytest
import torch

from p3o_lightning import PairwisePolicy
from p3o_lightning.forwards import completion_logps
from p3o_lightning.generation import Sampling, sample_with_logps
from tests.families import EOS, PAD, causal, left_padded
from tests.tiny import Recorder, equal, policy, prompts, trainer, weights


class WithForward(PairwisePolicy):
    """Overrides a part of the rollout, so that the old log-probabilities are computed."""

    def policy_logps(self, *given):
        return super().policy_logps(*given)


def run(root, owner=PairwisePolicy, accumulate=2, **settings):
    forwards, recorder = [], Recorder()
    module = policy(owner, **{"micro_batch_size": 2, **settings})
    kept = module.policy_logps
    module.policy_logps = lambda *given: forwards.append(module.trainer.global_step) or kept(*given)
    flags = {"accumulate_grad_batches": accumulate, "max_steps": 9, "log_every_n_steps": 1, "logger": recorder}
    trainer(root, **flags).fit(module, module.wrap_train_dataloader(prompts(shuffle=True)))
    return weights(module), forwards, recorder


@pytest.mark.parametrize(
    "settings", [{}, {"kl_source": "rollout"}, {"clipping": "separate"}, {"clip_level": "token"}, {"dtype": "bfloat16"}]
)
def test_training_is_the_same_to_the_bit(settings, tmp_path):
    skipped, forwards, _ = run(tmp_path, **settings)
    computed, all_forwards, _ = run(tmp_path, WithForward, **settings)
    assert forwards == [0]  # for the start-up proofs
    assert len(all_forwards) == 9
    assert equal(skipped, computed)


def test_the_figures_are_those_of_the_policy(tmp_path):
    """KL and entropy then come from the sampler: in float32 they differ by rounding alone."""
    _, _, skipped = run(tmp_path)
    _, _, computed = run(tmp_path, WithForward)
    for (_, one), (_, other) in zip(skipped.rows, computed.rows, strict=True):
        assert one == pytest.approx(other, abs=2e-6)


@pytest.mark.parametrize(
    ("settings", "accumulate"),
    [({}, 1), ({"num_iterations": 2}, 2), ({"top_p": 0.9}, 2), ({"top_k": 3}, 2), ({"disable_dropout": False}, 2)],
    ids=repr,
)
def test_it_is_computed_where_more_is_made_of_a_rollout_or_the_sampler_is_another(settings, accumulate, tmp_path):
    _, forwards, _ = run(tmp_path, accumulate=accumulate, **settings)
    assert len(forwards) > 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mamba"])
def test_the_samplers_log_probabilities_are_those_of_a_forward(family, temperature):
    model = causal(family)
    _, tokens, mask = left_padded([3, 6])
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 3}
    drawn, kept, logps = sample_with_logps(model, tokens, mask, Sampling(3, 6, temperature), **options)
    with torch.no_grad():
        again = completion_logps(model, tokens, mask, drawn, kept, temperature)
    torch.testing.assert_close(logps.masked_fill(~kept, 0), again, rtol=0, atol=2e-5)
    assert not logps[~kept].any()
