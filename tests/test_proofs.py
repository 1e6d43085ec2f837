"""The start-up proofs: each holds on a sound run, and stops one that was broken on purpose, with the reason and the fix."""

from __future__ import annotations

import pytest
import torch
from tiny import GPT2, LLAMA, PROMPTS, collate, equal, letters, policy, prompts, trainer, weights

from p3o_lightning import InputError, PairwisePolicy, RewardModel, proofs
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.model_reward import ModelReward


def run(module: PairwisePolicy, root, **flags) -> PairwisePolicy:
    trainer(root, max_steps=1, **flags).fit(module, module.wrap_train_dataloader(prompts()))
    return module


def reward(pad: str = "<pad>") -> RewardModel:
    torch.manual_seed(1)
    return RewardModel(LLAMA, tokenizer=letters(pad))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": GPT2},  # dropout 0.1, switched off
        {"peft_config": {"r": 2, "lora_dropout": 0.1}},
        {"temperature": 0.7, "micro_batch_size": 2},
        {"tokenizer": letters("<eos>")},  # padded with EOS
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_sound_run_passes_all(settings, tmp_path, monkeypatch):
    called = []
    for name in [name for name in vars(proofs) if name.startswith("prove_")]:
        prove = getattr(proofs, name)
        monkeypatch.setattr(proofs, name, lambda *given, name=name, prove=prove: called.append(name) or prove(*given))
    run(policy(reward_funcs=reward(), **settings), tmp_path)
    of_reference = "prove_only_adapters_train" if "peft_config" in settings else "prove_reference_is_policy"
    always = {"prove_ratio_is_one", "prove_kl_is_zero", "prove_nothing_is_clipped", "prove_mask_keeps_eos", "prove_reward_reads_eos"}
    assert set(called) == always | {of_reference}


def test_the_proofs_change_no_weight(tmp_path):
    with_proofs = run(policy(reward_funcs=reward()), tmp_path)
    without = run(policy(reward_funcs=reward(), start_up_proofs=False), tmp_path)
    assert equal(weights(with_proofs), weights(without))


def test_dropout_left_on_stops_the_run(tmp_path):
    module = policy(model=GPT2, disable_dropout=False)
    start = weights(module)
    with pytest.raises(InputError, match=r"differs by .* nats between rollout and training_step.*model.disable_dropout: true"):
        run(module, tmp_path)
    assert equal(weights(module), start)
    run(policy(model=GPT2, disable_dropout=False, start_up_proofs=False), tmp_path)


def test_an_edited_reference_stops_the_run(tmp_path):
    module = policy()
    with torch.no_grad():
        module.reference.lm_head.weight[3] += 1e-3
    with pytest.raises(InputError, match=r"the reference differs from the policy it was copied from, in 'lm_head.weight'"):
        run(module, tmp_path)
    # one that was given may differ
    run(policy(reference=policy().model, lr=1e-3), tmp_path)
    other = policy(reference=module.reference)
    run(other, tmp_path)


def test_a_reference_that_changes_after_the_start_stops_the_run(tmp_path):
    class Edited(PairwisePolicy):
        """Reads another reference."""

        def reference_logps(self, *tokens_and_masks):
            return super().reference_logps(*tokens_and_masks) * 1.01

    with pytest.raises(InputError, match=r"policy and reference differ by"):
        run(policy(Edited), tmp_path)


def test_an_adapter_that_does_not_start_at_zero_stops_the_run(tmp_path):
    with pytest.raises(InputError, match=r"policy and reference differ by .*peft_config.init_lora_weights"):
        run(policy(peft_config={"r": 4, "lora_alpha": 64, "init_lora_weights": False}), tmp_path)


def test_training_beside_the_adapter_stops_the_run(tmp_path):
    module = policy(peft_config={"r": 2})
    module.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"norm.weight' is trained but is no part of the adapter.*peft_config.bias"):
        run(module, tmp_path)
    with pytest.raises(InputError, match=r"is no part of the adapter"):
        run(policy(model=GPT2, peft_config={"r": 2, "bias": "all"}), tmp_path)


def test_a_reward_source_that_strips_eos_stops_the_run(tmp_path):
    module = policy(reward_funcs=reward(), tokenizer=letters("<eos>"))

    class Stripping(ModelReward):
        """Tells padding by id, where padding is EOS."""

        def __call__(self, responses):
            return super().__call__(responses._replace(mask=responses.tokens != 8))

    module.rewards.sources[0].__class__ = Stripping
    with pytest.raises(InputError, match=r"reward 'RewardModel' was shown a response that ended .* read 0 of 2 with EOS"):
        run(module, tmp_path)


def test_a_reward_model_of_another_tokenizer_passes_and_its_rows_end_alike(tmp_path):
    torch.manual_seed(1)
    module = policy(reward_funcs=RewardModel(LLAMA, tokenizer="bytes"))
    assert not module.rewards.sources[0].same_tokens
    run(module, tmp_path)


def test_a_mask_that_drops_eos_stops_the_run(tmp_path):
    class Dropping(PairwisePolicy):
        """Takes a needed EOS for padding."""

        def sample(self, prompts, seed=None):
            tokens, mask = super().sample(prompts, seed)
            return tokens, mask & (tokens != self.tokenizer.pad_token_id)

    with pytest.raises(InputError, match=r"of 8 responses are shorter than model.max_completion_length \(5\) and yet do not end with EOS"):
        run(policy(Dropping, tokenizer=letters("<eos>")), tmp_path)


def test_a_clip_range_below_the_noise_stops_the_run():
    proofs.prove_nothing_is_clipped(torch.tensor(0.0))
    with pytest.raises(InputError, match=r"12.5% of the gradient is clipped already, so model.clip_range is smaller"):
        proofs.prove_nothing_is_clipped(torch.tensor(0.125))


def test_what_counts_as_equal_depends_on_the_dtype_and_grows_with_the_square_root_of_length():
    mask = torch.ones(1, 2, 100, dtype=torch.bool)
    old, far = torch.zeros(1, 2, 100), torch.full((1, 2, 100), 1e-3)  # 0.1 nats on the response
    proofs.prove_ratio_is_one(far, old, mask, torch.bfloat16)
    with pytest.raises(InputError, match=r"differs by 0.1 nats"):
        proofs.prove_ratio_is_one(far, old, mask, torch.float32)
    proofs.prove_ratio_is_one(far, old, mask & False, torch.float32)  # padding is not looked at
    with pytest.raises(InputError, match=r"differs by inf nats"):
        proofs.prove_ratio_is_one(far * torch.nan, old, mask, torch.bfloat16)
    with pytest.raises(InputError, match=r"policy and reference differ by 0.1 nats"):
        proofs.prove_kl_is_zero(far, old, mask, torch.float32)


@pytest.mark.parametrize(
    ("row", "kept", "right"),
    [
        ([0, 8, 9], [1, 1, 0], True),
        ([0, 1, 2], [1, 1, 1], True),  # cut off
        ([8, 9, 9], [1, 0, 0], True),
        ([0, 8, 9], [1, 0, 0], False),  # EOS outside
        ([0, 1, 9], [1, 1, 0], False),  # no EOS
        ([0, 8, 8], [1, 0, 1], False),  # a hole
        ([9, 0, 8], [0, 1, 1], False),  # padded on the left
        ([8, 9, 9], [0, 0, 0], False),  # empty
    ],
)
def test_masks_by_hand(row, kept, right):
    given = torch.tensor([[row]]), torch.tensor([[kept]]).bool(), 8, 3
    if right:
        proofs.prove_mask_keeps_eos(*given)
    else:
        with pytest.raises(InputError, match=r"1 of 1 responses"):
            proofs.prove_mask_keeps_eos(*given)


def test_the_compute_dtype_is_autocasts():
    module = policy()
    assert proofs.compute_dtype(module.model) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert proofs.compute_dtype(module.model) == torch.bfloat16


def test_a_resumed_or_continued_run_is_not_proved_again(tmp_path, monkeypatch):
    module = policy(num_iterations=2)
    run(module, tmp_path, callbacks=[LastCheckpoint()])
    for name in [name for name in vars(proofs) if name.startswith("prove_")]:
        monkeypatch.setattr(proofs, name, lambda *_: pytest.fail("proved again"))
    again = policy(num_iterations=2)
    trainer(tmp_path, max_steps=2).fit(again, again.wrap_train_dataloader(prompts()), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    run(module, tmp_path)


def test_a_reward_is_proved_on_an_empty_reply_too():
    module = policy(reward_funcs=reward())
    source = module.rewards.sources[0]
    proofs.prove_reward_reads_eos(source, collate(PROMPTS[:2]), torch.tensor([8]), module.tokenizer)
    proofs.prove_reward_reads_eos(policy().rewards.sources[0], collate(PROMPTS[:2]), torch.tensor([8]), module.tokenizer)
