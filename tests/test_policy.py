"""PairwisePolicy: known answers, what holds at the first update, and what must not depend on how a batch is cut.

Proved by planting faults: dropout left on, training at temperature 1, a reference that is trained along, saved, or left in another
precision, log-probabilities rounded by bf16-true, a controller or a penalty of the wrong sign, or judged gaps that are ignored, each fails
a test here.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tiny import GPT2, LLAMA, PROMPTS, Recorder, collate, equal, letters, policy, prompts, share_of_a, trainer, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from p3o_lightning import InputError, PairwisePolicy, RewardModel, SupervisedPolicy, packing
from p3o_lightning.batches import Experience
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.figures import duplicate_rate
from p3o_lightning.kl_control import adapted_kl_coef
from p3o_lightning.packing import attention
from p3o_lightning.reference import fingerprint
from p3o_lightning.scoring import grouped_completion_logps


def experience(module: PairwisePolicy, seed: int = 0) -> Experience:
    module.rollout_seed = seed
    return module.rollout_step(collate(PROMPTS[:4]))


def logps_of(module: PairwisePolicy, batch: Experience) -> torch.Tensor:
    return grouped_completion_logps(
        module.model, batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask, module.sampling.temperature
    )


# ---- known answer: the reward is the share of "a"


@pytest.mark.parametrize(
    "settings",
    [
        {"clipping": "joint"},
        {"clipping": "separate"},
        {"clipping": "joint", "num_generations": 4},
        {"clipping": "separate", "num_generations": 4, "cross_weight": False},
        {"clipping": "joint", "num_iterations": 3},
        {"clip_level": "token", "num_iterations": 3},
        {"clip_reference_length": 3, "num_iterations": 2, "gap_scale": "rms"},
        {"temperature": 0.7, "kl_source": "rollout", "num_iterations": 2},
        {"model": GPT2, "num_iterations": 2},
    ],
    ids=str,
)
def test_the_best_answer_is_found(settings, tmp_path):
    module = policy(kl_coef=0.001, **{"lr": 2e-2, **settings})
    start = policy(**settings)
    trainer(tmp_path, max_steps=40).fit(module, module.wrap_train_dataloader(prompts(6)))
    module.rollout_seed = 10**6
    after = module.rollout_step(collate(PROMPTS * 8))
    assert after.scores is not None and after.scores.mean() > 0.9
    assert equal(weights(module.reference), weights(start.model))
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())


def test_a_high_price_of_kl_keeps_the_policy_at_its_reference(tmp_path):
    kls = {}
    for price in (0.001, 1.0):
        module = policy(kl_coef=price)
        trainer(tmp_path, max_steps=40).fit(module, module.wrap_train_dataloader(prompts(6)))
        batch = module.rollout_step(collate(PROMPTS * 8))
        kls[price] = float((batch.old_logps - batch.ref_logps).mean())
    assert 0 <= kls[1.0] < kls[0.001] / 4


# ---- the first update


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2 with dropout 0.1"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_has_ratio_one_and_kl_zero(model, temperature):
    module = policy(model=model, temperature=temperature, micro_batch_size=2, num_generations=3)
    assert module.model.training
    batch = experience(module)
    assert torch.equal(batch.old_token_logps, batch.ref_token_logps)
    for rows in torch.arange(4).split(2):
        part = batch.select(rows)
        terms = module.loss(logps_of(module, part), part)
        assert float(terms.gap_logratio) == 0 and float(terms.ratio_var) == 0 and float(terms.ratio_mean) == 1
        assert float(terms.clip_fraction) == 0 and float(terms.loss) == 0
        assert float(terms.q_abs) > 0  # there is something to learn


def test_dropout_left_on_moves_the_ratio():
    module = policy(model=GPT2, disable_dropout=False)
    batch = experience(module)
    assert float(module.loss(logps_of(module, batch), batch).gap_logratio) > 1e-3


@pytest.mark.parametrize("num_generations", [2, 4])
@pytest.mark.parametrize("clipping", ["joint", "separate", "token"])
def test_the_first_gradient_is_the_pairwise_policy_gradient(num_generations, clipping):
    """grad = -1/2 mean over prompts and pairs of (r_i - r_j) (grad log p_i - grad log p_j), by plain forwards in float64."""
    clip = {"clip_level": "token"} if clipping == "token" else {"clipping": clipping}
    module = policy(
        num_generations=num_generations, reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions], **clip
    )
    batch = experience(module)
    module.loss(logps_of(module, batch), batch).loss.backward()

    double = copy.deepcopy(module.model).double()
    double.zero_grad()
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for prompt, real, answers, masks in zip(
        batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask, strict=True
    ):
        words, logps, rewards = prompt[real], [], []
        for answer, kept in zip(answers, masks, strict=True):
            ids = torch.cat([words, answer[kept]])
            table = double(ids[None]).logits[0].log_softmax(-1)
            logps.append(table[len(words) - 1 : -1].gather(1, answer[kept][:, None]).sum())
            rewards.append(float((answer[kept] == 0).sum()))
        for i in range(num_generations):
            for j in range(i + 1, num_generations):
                total = total - (rewards[i] - rewards[j]) * (logps[i] - logps[j]) / 2
                pairs += 1
    (total / pairs).backward()
    for (name, ours), theirs in zip(module.model.named_parameters(), double.parameters(), strict=True):
        assert theirs.grad.abs().max() > 1e-4, name
        assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


# ---- what must not matter


def trained(tmp_path, *, flags=None, batch_size=4, steps=6, **settings):
    module = policy(**settings)
    trainer(tmp_path, max_steps=steps, **(flags or {})).fit(module, module.wrap_train_dataloader(prompts(batch_size)))
    return weights(module)


@pytest.mark.parametrize("settings", [{}, {"clipping": "separate"}, {"clip_level": "token"}], ids=str)
def test_accumulated_micro_batches_are_one_batch(settings, tmp_path):
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.5), "num_iterations": 2, **settings}
    whole = trained(tmp_path, **sgd)
    pieces = trained(tmp_path, flags={"accumulate_grad_batches": 2}, micro_batch_size=2, **sgd)
    start = policy().state_dict()
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-3
    for name in whole:
        assert_close(pieces[name], whole[name], rtol=0, atol=1e-6)


def test_a_constant_added_to_a_prompts_rewards_changes_no_weight(tmp_path):
    def count_a(completions, **_):
        return [float(text.count("a")) for text in completions]

    def shifted(completions, number, **_):
        return [float(text.count("a") + 64 * length) for text, length in zip(completions, number, strict=True)]

    assert equal(trained(tmp_path, reward_funcs=count_a), trained(tmp_path, reward_funcs=shifted))


def test_precision_of_the_trainer_leaves_the_first_ratio_at_one(tmp_path):
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        recorder = Recorder()
        module = policy(model=GPT2, micro_batch_size=2, num_iterations=2)
        run = trainer(tmp_path, max_steps=4, precision=precision, logger=recorder, log_every_n_steps=1)
        run.fit(module, module.wrap_train_dataloader(prompts()))
        first, *later = [row for _, row in recorder.rows if "p3o/gap_logratio" in row]
        assert first["p3o/gap_logratio"] == 0 and first["policy/clipfrac_avg"] == 0, precision
        assert any(row["p3o/gap_logratio"] > 0 for row in later), precision
        rollout = next(row for _, row in recorder.rows if "objective/kl" in row)
        assert rollout["objective/kl"] == 0, precision


def test_rewards_and_draws_are_float32_under_bf16_true(tmp_path):
    recorder = Recorder()
    module = policy(reward_funcs=lambda completions, **_: torch.tensor([1 / 3] * len(completions)))
    run = trainer(tmp_path, max_steps=1, precision="bf16-true", logger=recorder)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    assert recorder.rows[0][1]["objective/scores"] == pytest.approx(1 / 3, abs=1e-6)
    exact, draws = policy().bfloat16(), []
    torch.set_default_dtype(torch.bfloat16)
    try:
        draws.append(exact.sample(collate(PROMPTS * 8), seed=1)[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(draws[0], exact.sample(collate(PROMPTS * 8), seed=1)[0])


def test_bf16_true_rounds_weights_and_not_the_rotary_frequencies(tmp_path):
    """They are made anew, exact, of every export; trained with rounded ones the policy would be another model than what leaves."""
    exact = dict(policy().model.named_buffers())
    assert exact
    module = policy()
    trainer(tmp_path, max_steps=1, precision="bf16-true").fit(module, module.wrap_train_dataloader(prompts()))
    for model in (module.model, module.reference):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert equal(dict(model.named_buffers()), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_of_either_precision_train_save_and_resume(dtype, tmp_path):
    module = policy(dtype=dtype, num_iterations=2)
    trainer(tmp_path, max_steps=3, callbacks=[LastCheckpoint()]).fit(module, module.wrap_train_dataloader(prompts()))
    again = policy(dtype=dtype, num_iterations=2)
    run = trainer(tmp_path, max_steps=4)
    run.fit(again, again.wrap_train_dataloader(prompts()), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert run.global_step == 4 and next(again.model.parameters()).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"gradient_clip_val": 0.1, "max_steps": 3}, 3),
        ({"fast_dev_run": 2}, 2),
        ({"overfit_batches": 2, "max_epochs": 2}, 4),
        ({"limit_train_batches": 2, "max_epochs": 3}, 6),
        ({"limit_train_batches": 0.5, "max_epochs": 1}, 6),
    ],
    ids=str,
)
def test_trainer_flags_work(flags, steps, tmp_path):
    module = policy(num_iterations=4)
    run = trainer(tmp_path, **flags)
    run.fit(module, module.wrap_train_dataloader(prompts(shuffle=True)))
    assert run.global_step == steps and not equal(weights(module), weights(policy()))


def test_gradient_clipping_clips(tmp_path):
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, 1.0)}
    start = weights(policy())
    after = trained(tmp_path, flags={"gradient_clip_val": 1e-3}, steps=1, **sgd)
    assert sum(float((after[name] - start[name]).square().sum()) for name in start) ** 0.5 == pytest.approx(1e-3, rel=1e-2)


# ---- sampling and scoring


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_sampled_eos_is_in_the_mask_and_truncation_is_kept(pad):
    module = policy(tokenizer=letters(pad), num_generations=32, missing_eos_penalty=10.0)
    batch = experience(module)
    lengths = batch.completion_mask.sum(-1)
    last = batch.completion_tokens.gather(-1, (lengths - 1).unsqueeze(-1)).squeeze(-1)
    ended = last == 8
    assert 0 < ended.float().mean() < 1
    assert (lengths[~ended] == 5).all()  # cut off at max_completion_length
    assert torch.equal(ended, module.ended(batch.completion_tokens, batch.completion_mask))
    assert ((batch.completion_tokens == 8) & batch.completion_mask).sum() == ended.sum()  # one EOS, at the end
    assert torch.equal(batch.scores < -5, ~ended)  # the penalty
    assert (batch.old_token_logps[~batch.completion_mask] == 0).all()
    assert (batch.old_token_logps[batch.completion_mask] < 0).all()


def test_without_a_penalty_truncated_responses_are_scored_as_they_are():
    batch = experience(policy(num_generations=16))
    assert batch.scores is not None and batch.scores.min() >= 0


# ---- LoRA


def lora(**settings):
    module = policy(peft_config={"r": 2, "lora_alpha": 16}, **settings)
    return module


def test_lora_reference_is_the_adapter_switched_off(tmp_path):
    module = lora(num_iterations=2)
    assert module.adapter_is_policy and module.reference is module.model
    batch = experience(module)
    assert torch.equal(batch.old_token_logps, batch.ref_token_logps)
    base = {name: value for name, value in weights(module).items() if "lora_" not in name}
    run = trainer(tmp_path, max_steps=20)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    after = weights(module)
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert any(not torch.equal(value, torch.zeros_like(value)) for name, value in after.items() if "lora_B" in name)
    adapters = {id(value) for name, value in module.named_parameters() if "lora_" in name}
    assert {id(value) for group in run.optimizers[0].param_groups for value in group["params"]} == adapters
    later = experience(module)
    assert torch.equal(logps_of(lora(), later), later.ref_token_logps)  # the policy as it started
    assert not torch.equal(later.old_token_logps, later.ref_token_logps)


def test_lora_checkpoint_is_complete(tmp_path):
    module = lora()
    trainer(tmp_path, max_steps=5, callbacks=[LastCheckpoint()]).fit(module, module.wrap_train_dataloader(prompts()))
    again = PairwisePolicy.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", reward_funcs=share_of_a)
    assert again.adapter_is_policy and equal(weights(again), weights(module))
    one, other = experience(module), experience(again)
    assert torch.equal(one.ref_token_logps, other.ref_token_logps) and torch.equal(one.old_token_logps, other.old_token_logps)
    run = trainer(tmp_path, max_steps=6)
    run.fit(again, again.wrap_train_dataloader(prompts()), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert run.global_step == 6


# ---- reference and reward: beside the module


def test_reference_and_reward_are_neither_saved_nor_trained(tmp_path):
    from p3o_lightning import RewardModel

    torch.manual_seed(1)
    reward = RewardModel(LLAMA, tokenizer=letters())
    module = policy(reward_funcs=reward)
    frozen = weights(module.rewards.networks[0])
    run = trainer(tmp_path, max_steps=5)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    assert all(name.startswith("model.") for name in module.state_dict())
    optimised = {id(value) for group in run.optimizers[0].param_groups for value in group["params"]}
    assert optimised == {id(value) for value in module.model.parameters()}
    assert equal(weights(module.rewards.networks[0]), frozen) and equal(weights(module.reference), weights(policy().model))
    assert any(parameter.requires_grad for parameter in reward.parameters())  # the user's own object is left as it was


def saved(tmp_path, **settings):
    module = policy(num_iterations=2, **settings)
    trainer(tmp_path, max_steps=3, callbacks=[LastCheckpoint()]).fit(module, module.wrap_train_dataloader(prompts()))
    return module, tmp_path / "checkpoints" / "last.ckpt"


def test_reference_and_reward_go_where_the_policy_is_moved(tmp_path):
    """Outside a Trainer too. "meta" stands for a GPU."""
    stage = policy(reward_funcs=RewardModel(LLAMA, tokenizer=letters()))
    before, reward = stage.reference, stage.rewards.networks[0]
    stage.to("meta")
    assert {item.device.type for model in (before, reward) for item in model.parameters()} == {"meta"}
    late = policy(reference=LLAMA)
    late._apply = lambda fn, recurse=True: late  # the policy's own weights stay: only what is made after the move is looked at
    late.to("meta")
    assert next(late.reference.parameters()).device.type == "meta"


def test_a_checkpoint_is_loaded_onto_a_device(tmp_path):
    stage = policy()
    trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint(every_n_steps=1)]).fit(stage, stage.wrap_train_dataloader(prompts()))
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert PairwisePolicy.load_from_checkpoint(path).device.type == "cpu"
    assert PairwisePolicy.load_from_checkpoint(path, map_location="meta").device.type == "meta"


def test_another_reference_than_the_checkpoints_is_refused(tmp_path):
    module, path = saved(tmp_path)
    torch.manual_seed(7)
    other = PairwisePolicy(LLAMA, share_of_a, tokenizer=letters(), num_iterations=2)
    with pytest.raises(InputError, match=r"model.reference differs from the one"):
        trainer(tmp_path, max_steps=4).fit(other, other.wrap_train_dataloader(prompts()), ckpt_path=path)
    loaded = PairwisePolicy.load_from_checkpoint(path, reward_funcs=share_of_a, reference=other.model)
    with pytest.raises(InputError, match=r"model.reference differs from the one"):
        experience(loaded)
    loaded = PairwisePolicy.load_from_checkpoint(path, reward_funcs=share_of_a, reference=policy().model)
    assert torch.equal(experience(loaded).ref_token_logps, experience(module).ref_token_logps)


def test_a_policy_loaded_without_its_reference_is_not_its_own_reference(tmp_path):
    """The run started from an object, which no checkpoint names: KL = 0 against itself would be a lie."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=10))
    module, path = saved(tmp_path, model=copy.deepcopy(model))
    loaded = PairwisePolicy.load_from_checkpoint(path, reward_funcs=share_of_a)
    assert equal(weights(loaded), weights(module))
    with pytest.raises(InputError, match=r"model.reference differs"):
        experience(loaded)
    loaded = PairwisePolicy.load_from_checkpoint(path, reward_funcs=share_of_a, reference=model)
    assert torch.equal(experience(loaded).ref_token_logps, experience(module).ref_token_logps)
    assert loaded.state.rollouts == module.state.rollouts


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    torch.manual_seed(0)
    demonstrations = SupervisedPolicy(LLAMA, tokenizer=letters())
    run = trainer(tmp_path)
    run.strategy.connect(demonstrations)
    run.save_checkpoint(tmp_path / "sft.ckpt")
    module = policy()
    with pytest.raises(InputError, match=r"ckpt_path is a checkpoint of SupervisedPolicy.*give it as model.model"):
        trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts()), ckpt_path=tmp_path / "sft.ckpt")


def test_fingerprint_tells_any_change_of_any_dtype():
    module = torch.nn.Module()
    module.register_buffer("scalar", torch.tensor(1.0, dtype=torch.bfloat16))
    module.register_buffer("empty", torch.zeros(0))
    module.register_buffer("flags", torch.tensor([True, False]))
    module.weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16).T)
    before = fingerprint(module)
    assert fingerprint(copy.deepcopy(module)) == before
    module.scalar.add_(1)
    assert fingerprint(module) != before


def test_the_reference_is_hashed_once(tmp_path, monkeypatch):
    import p3o_lightning.reference as home

    calls = []
    monkeypatch.setattr(home, "fingerprint", lambda model: calls.append(1) or fingerprint(model))
    saved(tmp_path)
    assert len(calls) == 1


# ---- adaptive price of KL


def test_adapted_kl_coef_by_hand():
    assert adapted_kl_coef(0.1, 12.0, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # too high, cut to +20 %
    assert adapted_kl_coef(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.1, 6.0, 6.0, 100, 1000) == 0.1
    assert adapted_kl_coef(0.1, 0.0, 6.0, 100, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert adapted_kl_coef(0.1, 0.0, 6.0, 10**6, 10) == pytest.approx(0.08)  # one rollout never counts as more than the horizon
    assert adapted_kl_coef(0.1, math.nan, 6.0, 100, 1000) == 0.1  # a rollout that is left out


def test_the_price_rises_when_kl_is_above_its_target_and_falls_below(tmp_path):
    for target, up in ((1e-6, True), (1e3, False)):
        module = policy(kl_target=target, kl_horizon=50)
        prices = []
        recorder = Recorder()
        trainer(tmp_path, max_steps=9, logger=recorder).fit(module, module.wrap_train_dataloader(prompts()))
        prices = [row["objective/kl_coef"] for _, row in recorder.rows if "objective/kl_coef" in row][1:]
        assert prices == sorted(prices, reverse=not up) and len(set(prices)) == len(prices)
        assert type(module.state.kl_coef) is float


# ---- a rollout of one's own


class Judged(PairwisePolicy):
    """A judge compares: gaps, no scores. It likes "a"."""

    def rollout_step(self, prompts):
        drawn = super().rollout_step(prompts)
        return drawn._replace(scores=None, gaps=drawn.scores.unsqueeze(2) - drawn.scores.unsqueeze(1))


def test_gaps_in_place_of_scores_train_alike(tmp_path):
    recorder = Recorder()
    module = policy(Judged, num_generations=3)
    fit = trainer(tmp_path, max_steps=6, logger=recorder, log_every_n_steps=1, callbacks=[LastCheckpoint()])
    fit.fit(module, module.wrap_train_dataloader(prompts()), prompts())
    ours, theirs = weights(module), trained(tmp_path, num_generations=3)
    for name in ours:
        assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    figures = next(row for _, row in recorder.rows if "objective/kl" in row)
    assert "objective/scores" not in figures and figures["objective/scores_margin"] > 0
    again = policy(Judged, num_generations=3)
    trainer(tmp_path, max_steps=7).fit(again, again.wrap_train_dataloader(prompts()), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert "# Judged" in again.model_card() and "A judge compares" in again.model_card()


def test_a_subclass_without_docstring_has_a_model_card():
    class Mine(PairwisePolicy):
        pass

    assert "A policy trained by P3O" in policy(Mine).model_card()


def test_an_overridden_rollout_step_is_used(tmp_path):
    class Constant(PairwisePolicy):
        """Answers "ab" and "b" to everything."""

        def sample(self, prompts, seed=None):
            tokens = torch.tensor([[0, 1, 8], [1, 8, 9]]).expand(len(prompts.tokens), 2, 3)
            mask = torch.tensor([[True, True, True], [True, True, False]]).expand(len(prompts.tokens), 2, 3)
            return tokens, mask

    module = policy(Constant)
    before = experience(module)
    assert before.scores is not None and before.scores.tolist() == [[0.5, 0.0]] * 4
    trainer(tmp_path, max_steps=10).fit(module, module.wrap_train_dataloader(prompts()))
    after = experience(module)
    gap = (after.old_logps - before.old_logps) @ torch.tensor([1.0, -1.0])
    assert (gap > 0).all()  # the better answer gained on the worse


# ---- validation, test, predict, figures


FIGURES = {"val/scores", "val/scores_std", "val/kl", "val/length", "val/ended"}


def test_validation_and_test_sample_the_same_every_time(tmp_path):
    module = policy()
    run = trainer(tmp_path)
    (one,) = run.validate(module, prompts(5), verbose=False)
    (two,) = run.validate(module, prompts(5), verbose=False)
    assert one == two and set(one) == FIGURES and one["val/kl"] == 0
    (tested,) = run.test(module, prompts(5), verbose=False)
    assert tested["test/scores"] == one["val/scores"]


def test_predict_needs_neither_reference_nor_reward(tmp_path):
    module = policy(reward_funcs=None)
    batches = trainer(tmp_path).predict(module, prompts(5))
    rows = [row for batch in batches for row in batch]
    assert [row["prompt"] for row in rows] == PROMPTS and all(len(row["responses"]) == 2 for row in rows)
    assert json.dumps(rows) and not module._reference


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
def test_what_samples_attends_alike_in_every_stage(tmp_path, stage):
    module, attending = policy(), []
    sample = module.sample_with_logps
    module.sample_with_logps = lambda *given, **options: attending.append(attention(module.model)) or sample(*given, **options)
    data = prompts(5) if stage != "fit" else module.wrap_train_dataloader(prompts())
    getattr(trainer(tmp_path, max_steps=1), stage)(module, data)
    assert set(attending) == {packing.NAME}


def test_what_is_logged(tmp_path):
    recorder = Recorder()
    module = policy(num_iterations=2)
    run = trainer(tmp_path, max_steps=4, logger=recorder, log_every_n_steps=1)
    run.fit(module, module.wrap_train_dataloader(prompts()), prompts())
    rollouts = [(step, row) for step, row in recorder.rows if "objective/kl" in row]
    updates = [(step, row) for step, row in recorder.rows if "loss" in row]
    assert [step for step, _ in rollouts] == [0, 2] and [step for step, _ in updates] == [0, 1, 2, 3]
    for name in ("kl", "kl_k1", "kl_k2", "kl_k3", "entropy", "scores", "scores_margin", "rlhf_reward", "kl_coef"):
        assert f"objective/{name}" in rollouts[0][1]
    for name in ("completions/mean_length", "completions/min_length", "completions/max_length", "val/contain_eos_token"):
        assert name in rollouts[0][1]
    assert rollouts[0][1]["rewards/share_of_a/mean"] == rollouts[0][1]["objective/scores"]
    for name in ("q_mean", "q_abs", "gap_logratio", "joint_weight_max", "pair_clipfrac", "tie_rate"):
        assert f"p3o/{name}" in updates[0][1]
    for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio", "val/ratio_var"):
        assert name in updates[0][1]
    assert run.callback_metrics["objective/scores"] == rollouts[-1][1]["objective/scores"]  # so that callbacks can monitor it


def test_duplicate_rate_by_hand():
    tokens = torch.tensor([[[1, 2], [1, 3], [1, 2]], [[1, 2], [1, 2], [1, 2]]])
    mask = torch.tensor([[[True, False], [True, False], [True, True]], [[True, True]] * 3])
    assert float(duplicate_rate(tokens, mask)) == pytest.approx((1 / 3 + 1) / 2)


# ---- bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "model.num_generations is 1: choose at least 2"),
        ({"num_iterations": 0}, "model.num_iterations is 0"),
        ({"micro_batch_size": 0}, "model.micro_batch_size is 0"),
        ({"clip_range": 0.0}, "model.clip_range is 0.0: choose a number above 0"),
        ({"clip_range": float("nan")}, "model.clip_range is nan"),
        ({"weight_cap": 0.5}, "model.weight_cap is 0.5"),
        ({"kl_coef": -1}, "model.kl_coef is -1: choose 0 or more"),
        ({"kl_target": 0.0}, "model.kl_target is 0.0"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "model.kl_coef is 0.0: choose a price above 0 for kl_target"),
        ({"kl_horizon": 0}, "model.kl_horizon is 0"),
        ({"clip_reference_length": 0}, "model.clip_reference_length is 0"),
        ({"missing_eos_penalty": -1.0}, "model.missing_eos_penalty is -1.0"),
        ({"objective": "sppo"}, "model.objective is 'sppo': choose one of p3o, rloo, grpo"),
        ({"clipping": "both"}, "model.clipping is 'both': choose joint or separate"),
        ({"clip_level": "token", "clip_reference_length": 9}, "model.clip_reference_length is 9: choose null with clip_level: token"),
        ({"cross_weight": False}, "model.cross_weight is False: choose true with clipping: joint"),
        ({"clip_level": "word"}, "model.clip_level is 'word'"),
        ({"clip_level": "token", "clipping": "separate"}, "model.clip_level is 'token': choose sequence with clipping: separate"),
        ({"kl_source": "now"}, "model.kl_source is 'now'"),
        ({"gap_scale": "std"}, "model.gap_scale is 'std'"),
        ({"temperature": 0.0}, "model.temperature is 0.0"),
        ({"lr": 0.0}, "model.lr is 0.0"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        policy(**settings)


def test_missing_rewards_are_named(tmp_path):
    module = policy(reward_funcs=None)
    with pytest.raises(InputError, match=r"model.reward_funcs is missing"):
        trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts()))


def test_export_of_a_trained_policy_loads_in_transformers(tmp_path):
    module, _ = saved(tmp_path)
    folder = module.export(tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(ids).logits, module.model.eval()(ids).logits)
