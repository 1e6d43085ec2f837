"""Prompts → rollout → micro-batches, through a real Trainer; above all: a killed run goes on to the bit.

Proved by planting faults: losing the pending experience, the price of KL or the number of rollouts, leaving dropout unseeded, starting an
epoch's prompts from the first, or going on after Lightning's own count, each fails test_every_checkpoint_resumes_to_the_bit.
"""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from tiny import GPT2, LLAMA, PROMPTS, KeepAll, Recorder, collate, equal, letters, policy, prompts, share_of_a, trainer, weights
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import AutoConfig, AutoModelForCausalLM

from p3o_lightning import InputError, PairwisePolicy
from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.experience import ExperienceLoader
from p3o_lightning.models import read_checkpoint
from p3o_lightning.scoring import allows

RUNS = {
    "epochs": ({"max_epochs": 2}, {}, {}),
    "steps": ({"max_steps": 10}, {}, {"shuffle": True}),
    "limited": ({"max_steps": 12, "limit_train_batches": 5}, {}, {}),  # an epoch ends within a rollout
    "accumulated": ({"max_epochs": 2, "accumulate_grad_batches": 2}, {"clipping": "separate"}, {"shuffle": True}),
    "one update a rollout": ({"max_steps": 8, "accumulate_grad_batches": 4}, {}, {"shuffle": True}),
    "validated": ({"max_epochs": 2, "val_check_interval": 3, "limit_val_batches": 1}, {"num_generations": 3}, {}),
    "dropout": ({"max_epochs": 1}, {"model": GPT2, "disable_dropout": False, "start_up_proofs": False}, {"shuffle": True}),
    "lora": ({"max_epochs": 1}, {"peft_config": {"r": 2, "lora_dropout": 0.1}}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_resumes_to_the_bit(name, tmp_path):
    flags, settings, order = RUNS[name]
    validation = prompts(2) if "val_check_interval" in flags else None

    def run(ckpt_path=None, callbacks=()):
        module = policy(num_iterations=2, micro_batch_size=2, kl_target=0.01, kl_horizon=20, **settings)
        recorder = Recorder()
        torch.manual_seed(123 if ckpt_path else 321)  # nothing may depend on it
        fit = trainer(tmp_path, logger=recorder, callbacks=list(callbacks), **flags)
        fit.fit(module, module.wrap_train_dataloader(prompts(4, count=8, **order)), validation, ckpt_path=ckpt_path)
        return module, recorder, fit

    keeper = KeepAll(tmp_path / "kept")
    whole, logged, fit = run(callbacks=[keeper])
    start = policy(**settings)
    assert fit.global_step >= 6 and len(keeper.kept) >= fit.global_step
    assert not equal(weights(whole), weights(start)) and whole.state.kl_coef != 0.05
    for checkpoint in keeper.kept:
        again, relogged, _ = run(ckpt_path=checkpoint)
        about = f"{name}: {checkpoint.name}"
        assert equal(weights(again), weights(whole)), about
        assert again.state.kl_coef == whole.state.kl_coef and again.state.rollouts == whole.state.rollouts, about
        made = read_checkpoint(checkpoint)["p3o_experience"]["rollouts"]
        assert relogged.rollouts() == logged.rollouts()[made:], about
        assert again.state.figures == whole.state.figures, about


def test_checkpoints_hold_plain_values_only(tmp_path):
    module = policy(num_iterations=2, kl_target=0.01)
    trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint()]).fit(module, module.wrap_train_dataloader(prompts()))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert type(checkpoint["p3o_experience"]["kl_coef"]) is float
    assert checkpoint["p3o_experience"]["pending"][0]["old_token_logps"].dtype == torch.float32
    assert not any("reference" in name or "reward" in name for name in checkpoint["state_dict"])


def test_one_rollout_serves_iterations_times_micro_batches(tmp_path):
    seen = []

    class Watched(PairwisePolicy):
        """Notes when it rolls out and when it trains."""

        def rollout_step(self, prompts):
            seen.append("R")
            return super().rollout_step(prompts)

        def training_step(self, batch, batch_idx):
            seen.append("u")
            return super().training_step(batch, batch_idx)

    module = policy(Watched, num_iterations=2, micro_batch_size=2)
    loader = module.wrap_train_dataloader(prompts(4))
    trainer(tmp_path, max_epochs=1).fit(module, loader)
    assert "".join(seen) == "Ruuuu" * 3 and len(loader) == 12


def test_the_first_pass_is_in_the_order_that_was_scored_and_every_other_takes_every_prompt_once(tmp_path):
    drawn, batches = [], []

    class Watched(PairwisePolicy):
        """Keeps its rollouts and micro-batches."""

        def rollout_step(self, prompts):
            drawn.append(super().rollout_step(prompts))
            return drawn[-1]

        def training_step(self, batch, batch_idx):
            batches.append(batch)
            return super().training_step(batch, batch_idx)

    module = policy(Watched, num_iterations=3, micro_batch_size=2, lr=1e-9)
    trainer(tmp_path, limit_train_batches=6, max_epochs=1).fit(module, module.wrap_train_dataloader(prompts(4)))
    passes = [torch.cat([batch.old_logps for batch in batches[i : i + 2]]) for i in (0, 2, 4)]
    assert torch.equal(passes[0], drawn[0].old_logps)  # the micro-batches that were scored together: ratio 1 in any precision
    assert not torch.equal(passes[1], passes[2])  # shuffled
    for rows in passes[1:]:
        assert torch.equal(rows.sort(0).values, passes[0].sort(0).values)


def test_the_devices_share_the_prompts():
    """Lightning gives no sampler of its own to a loader that is no DataLoader."""
    shares = []
    for rank in (0, 1):
        module = SimpleNamespace(num_iterations=1, micro_batch_size=None, seed=0)
        module._trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank}, overfit_batches=0)
        loader = ExperienceLoader(prompts(3, shuffle=True), module)
        assert len(loader) == 2
        shares.append([prompt for batch in loader._ordered_prompts() for prompt in batch.prompts])
    assert sorted(shares[0] + shares[1]) == sorted(PROMPTS)


def test_a_partial_last_batch_is_left_out(tmp_path):
    module = policy(micro_batch_size=1)
    loader = module.wrap_train_dataloader(prompts(5))  # 12 prompts
    assert len(loader) == 10
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader)
    assert run.global_step == 10 and module.state.rollouts == 2


def test_a_shuffled_loader_has_another_order_every_epoch_and_the_same_every_run(tmp_path):
    def run(state):
        orders = []

        class Watched(PairwisePolicy):
            """Notes its prompts."""

            def rollout_step(self, prompts):
                orders.append(tuple(prompts.prompts))
                return super().rollout_step(prompts)

        module = policy(Watched)
        torch.manual_seed(state)  # nothing may depend on it
        trainer(tmp_path, max_epochs=2).fit(module, module.wrap_train_dataloader(prompts(4, shuffle=True)))
        return orders

    one = run(1)
    assert one == run(2)
    assert one[:3] != one[3:] and sorted(sum(one[:3], ())) == sorted(PROMPTS) == sorted(sum(one[3:], ()))


def test_a_sampler_of_the_users_own_repeats_if_it_draws_from_torch(tmp_path):
    class Drawn(Sampler):
        def __len__(self):
            return len(PROMPTS)

        def __iter__(self):
            return iter(torch.randint(len(PROMPTS), (len(PROMPTS),)).tolist())

    def run(state):
        module = policy()
        torch.manual_seed(state)
        loader = DataLoader(PROMPTS, batch_size=4, sampler=Drawn(), collate_fn=collate)
        trainer(tmp_path, max_epochs=1).fit(module, module.wrap_train_dataloader(loader))
        return weights(module)

    one = run(1)
    assert equal(one, run(2))


def test_experience_of_another_size_in_a_checkpoint_is_made_again(tmp_path):
    module = policy(num_iterations=2)
    trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint()]).fit(module, module.wrap_train_dataloader(prompts(2)))
    module = policy(num_iterations=2)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, module.wrap_train_dataloader(prompts(4)), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert run.global_step == 4 and all(value.isfinite().all() for value in weights(module).values())


class Endless(IterableDataset):
    def __iter__(self):
        yield from PROMPTS


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Endless(), batch_size=4, collate_fn=collate), "does not say how many there are"),
        (lambda: [collate(PROMPTS[:4])], "a list that does not say how many"),
        (lambda: prompts(6), r"model.micro_batch_size is 4, but data.batch_size is 6"),
    ],
)
def test_a_loader_that_cannot_serve_is_refused(loader, message):
    with pytest.raises(InputError, match=message):
        policy(micro_batch_size=4).wrap_train_dataloader(loader())


def test_fewer_prompts_than_a_rollout_are_refused(tmp_path):
    module = policy()
    with pytest.raises(InputError, match=r"data.batch_size is 16 prompts a rollout, but there are fewer"):
        trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts(16)))


def test_accumulation_over_two_rollouts_is_refused(tmp_path):
    module = policy(micro_batch_size=2)
    with pytest.raises(InputError, match=r"trainer.accumulate_grad_batches is 3, but a rollout has 2 micro-batches"):
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=3).fit(module, module.wrap_train_dataloader(prompts()))


def test_a_bare_prompt_loader_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"use trainer.fit\(policy, policy.wrap_train_dataloader\(loader\)\)"):
        trainer(tmp_path, max_steps=1).fit(policy(), prompts())


def test_wrapping_twice_is_wrapping_once():
    module = policy()
    loader = module.wrap_train_dataloader(prompts())
    assert module.wrap_train_dataloader(loader) is loader


def test_a_rollout_of_fewer_prompts_is_refused(tmp_path):
    class Choosy(PairwisePolicy):
        """Drops a prompt."""

        def rollout_step(self, prompts: PromptBatch) -> Experience:
            return super().rollout_step(prompts).select(torch.arange(3))

    module = policy(Choosy)
    with pytest.raises(InputError, match=r"rollout_step returned experience of 3 prompts for 4"):
        trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts()))


# ---- a model that needs padding


def padding_policy(**settings):
    """Of a model whose attention cannot leave padding out, with responses of many lengths."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**LLAMA, vocab_size=10)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return policy(model=model, max_completion_length=12, **settings)


def trained_on(module, folder, size, **flags):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((batch.prompt_tokens, batch.prompt_mask.sum(-1) + batch.completion_mask.sum(-1).amax(-1)))

    fit = trainer(folder, callbacks=[Watch()], **flags)
    fit.fit(module, module.wrap_train_dataloader(prompts(size)))
    return seen


def test_texts_of_like_length_are_padded_together_and_updates_keep_their_prompts(tmp_path):
    settings = {"num_iterations": 2, "lr": 1e-9}
    flags = {"accumulate_grad_batches": 3, "max_steps": 4}
    module = padding_policy(micro_batch_size=2, **settings)
    assert not allows(module.model)
    padded = trained_on(module, tmp_path, 12, **flags)
    packed = trained_on(policy(max_completion_length=12, micro_batch_size=2, **settings), tmp_path, 12, **flags)
    assert len(padded) == len(packed) == 12
    for update in range(4):
        ours, others = padded[3 * update :][:3], packed[3 * update :][:3]
        lengths = torch.cat([found for _, found in ours])
        assert lengths.equal(lengths.sort().values) and len(set(lengths.tolist())) > 2
        tokens = [sorted(row.tolist() for part, _ in update for row in part) for update in (ours, others)]
        assert tokens[0] == tokens[1]  # the same prompts make an update, in another order


def test_what_is_scored_in_the_order_of_lengths_comes_back_in_the_order_of_prompts(tmp_path):
    """The start-up proofs hold on it, and one update is that of a whole batch."""
    after = []
    for micro_batch_size in (2, None):
        module = padding_policy(micro_batch_size=micro_batch_size, kl_coef=0.3)
        trained_on(module, tmp_path, 12, max_steps=1, accumulate_grad_batches=6 if micro_batch_size else 1)
        batch = collate(PROMPTS)
        tokens, mask = module.sample(batch)
        after.append((weights(module), module.policy_logps(batch.tokens, batch.attention_mask, tokens, mask)))
    (one, logps), (other, whole_logps) = after
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
    torch.testing.assert_close(logps, whole_logps, rtol=0, atol=1e-4)


def test_letters_round_trip():
    tokenizer = letters()
    assert tokenizer.decode(tokenizer("badcafe")["input_ids"]) == "badcafe" and share_of_a(["ab", "aa"]) == [0.5, 1.0]
