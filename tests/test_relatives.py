"""PairwisePolicy with the relatives of P3O as its objective: each learns a known answer and resumes to the bit."""

from __future__ import annotations

import pytest
import torch
from processes import on_two
from running import scalars
from tiny import GPT2, LLAMA, PROMPTS, KeepAll, Recorder, collate, equal, letters, policy, prompts, share_of_a, trainer, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from p3o_lightning import InputError, PairwisePolicy, SupervisedPolicy
from p3o_lightning.baselines import OBJECTIVES
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.models import load_policy, read_checkpoint
from p3o_lightning.scoring import allows, grouped_completion_logps, grouped_logps_and_hidden

SETTINGS = {  # a price at which the best answer is worth it
    "online_dpo": {"kl_coef": 0.1},
    "online_ipo": {"kl_coef": 0.02},
    "dr_grpo": {"objective_settings": {"divisor": 1.0}},
}


def of(objective: str, **settings) -> PairwisePolicy:
    return policy(**{"objective": objective, "kl_coef": 0.001, **SETTINGS.get(objective, {}), **settings})


# ---- known answer: the reward is the share of "a"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_finds_the_best_answer(objective, tmp_path):
    module = of(objective, lr=2e-2, num_generations=4)
    module.rollout_seed = 10**6
    before = module.rollout_step(collate(PROMPTS * 8)).scores.mean()
    trainer(tmp_path, max_steps=40).fit(module, module.wrap_train_dataloader(prompts(6)))
    module.rollout_seed = 10**6
    after = module.rollout_step(collate(PROMPTS * 8)).scores.mean()
    assert before < 0.3 and after > 0.9, (before, after)


@pytest.mark.parametrize("objective", ["rloo", "grpo", "ppo"])
def test_clipped_objectives_find_it_in_several_passes_over_a_rollout(objective, tmp_path):
    module = of(objective, lr=2e-2, num_iterations=3, num_generations=4)
    trainer(tmp_path, max_steps=60).fit(module, module.wrap_train_dataloader(prompts(6)))
    module.rollout_seed = 10**6
    assert module.rollout_step(collate(PROMPTS * 8)).scores.mean() > 0.9


def test_the_critic_learns_what_responses_are_worth(tmp_path):
    """All responses score 1 and the policy may not move: V is 1 before every token, on prompts that were not trained on too."""
    recorder = Recorder()
    alike = {"reward_funcs": lambda completions, **_: [1.0] * len(completions), "kl_coef": 0.0}
    module = of("ppo", **alike, lr=2e-2, objective_settings={"gae_lambda": 1.0})  # then returns are scores
    run = trainer(tmp_path, max_steps=60, logger=recorder, log_every_n_steps=1)
    run.fit(module, module.wrap_train_dataloader(prompts(6, count=6)))
    losses = [row["loss/value_avg"] for _, row in recorder.rows if "loss/value_avg" in row]
    assert losses[0] == pytest.approx(0.5) and losses[-1] < 0.01  # V starts at 0, so its error at 1/2
    batch = module.rollout_step(collate(PROMPTS[6:]))
    values = module.policy_values(batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask)
    assert_close(values[batch.completion_mask], torch.ones(int(batch.completion_mask.sum())), rtol=0, atol=0.25)


# ---- exact resume


RESUMED = {
    "rloo": {"objective": "rloo"},
    "grpo": {"objective": "grpo", "objective_settings": {"clip_range_high": 0.28}},
    "online_dpo": {"objective": "online_dpo"},
    "ppo": {"objective": "ppo"},
    "ppo lora": {"objective": "ppo", "peft_config": {"r": 2}},
    "ppo dropout": {"objective": "ppo", "model": GPT2, "disable_dropout": False, "start_up_proofs": False},
}


@pytest.mark.parametrize("name", RESUMED)
def test_every_checkpoint_resumes_to_the_bit(name, tmp_path):
    def run(ckpt_path=None, callbacks=()):
        module = policy(num_iterations=2, micro_batch_size=2, kl_target=0.01, kl_horizon=20, **RESUMED[name])
        recorder = Recorder()
        torch.manual_seed(123 if ckpt_path else 321)  # nothing may depend on it
        fit = trainer(tmp_path, logger=recorder, callbacks=list(callbacks), max_epochs=1)
        fit.fit(module, module.wrap_train_dataloader(prompts(4, count=8, shuffle=True)), ckpt_path=ckpt_path)
        return module, recorder

    keeper = KeepAll(tmp_path / "kept")
    whole, logged = run(callbacks=[keeper])
    assert len(keeper.kept) >= 8
    pending = [read_checkpoint(path)["p3o_experience"]["pending"][0] for path in keeper.kept]
    assert any(experience is not None for experience in pending)  # a checkpoint within a rollout
    if "ppo" in name:
        assert all(experience["values"] is not None for experience in pending if experience)
    for checkpoint in keeper.kept:
        again, relogged = run(ckpt_path=checkpoint)
        assert equal(weights(again), weights(whole)), checkpoint.name
        assert again.state.kl_coef == whole.state.kl_coef
        made = read_checkpoint(checkpoint)["p3o_experience"]["rollouts"]
        assert relogged.rollouts() == logged.rollouts()[made:]


# ---- one update a rollout


class WithForward(PairwisePolicy):
    """Overrides a part of the rollout, so that old log-probabilities and values are computed."""

    def policy_logps(self, *given):
        return super().policy_logps(*given)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_update_a_rollout_needs_no_forward_for_what_is_old_and_is_the_same_to_the_bit(objective, tmp_path):
    after, forwards = [], []
    for owner in (PairwisePolicy, WithForward):
        module = policy(owner, objective=objective, micro_batch_size=2, num_generations=3)
        for name in ("policy_logps", "policy_values"):
            kept = getattr(module, name)
            setattr(module, name, lambda *given, kept=kept, owner=owner: forwards.append(owner) or kept(*given))
        run = trainer(tmp_path, max_steps=6, accumulate_grad_batches=2)
        run.fit(module, module.wrap_train_dataloader(prompts(shuffle=True)))
        after.append(weights(module))
    assert equal(*after)
    critic = objective == "ppo"
    assert forwards.count(PairwisePolicy) == 1 + critic  # for the start-up proofs
    assert forwards.count(WithForward) == 6 * (1 + critic)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "ppo"])  # its means are over all tokens together
def test_accumulated_micro_batches_are_one_batch(objective, tmp_path):
    after = []
    for size, accumulate in ((4, 1), (2, 2)):
        sgd = lambda parameters: torch.optim.SGD(parameters, 0.02)  # noqa: E731
        module = of(objective, optimizer=sgd, kl_coef=0.5, micro_batch_size=size, num_iterations=2)
        run = trainer(tmp_path, max_steps=4, accumulate_grad_batches=accumulate)
        run.fit(module, module.wrap_train_dataloader(prompts()))
        after.append(weights(module))
    start = policy().state_dict()
    assert max(float((after[0][name] - start[name]).abs().max()) for name in start) > 1e-4
    for name in start:
        assert_close(after[1][name], after[0][name], rtol=0, atol=1e-5)


# ---- the critic


@pytest.mark.parametrize("peft_config", [None, {"r": 2, "init_lora_weights": False}], ids=["whole", "lora"])
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_values_are_read_before_each_token(packed, model, peft_config, monkeypatch):
    """Against a forward of every prefix by itself: V before token t sees the prompt and t tokens, at its last position."""
    module = of("ppo", model=model, peft_config=peft_config, num_generations=3)
    torch.nn.init.normal_(module.critic.head.weight)
    torch.nn.init.normal_(module.critic.head.bias)
    batch = module.rollout_step(collate(PROMPTS[:4]))
    given = (batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask)
    module.model.eval()
    assert allows(module.model)
    if not packed:
        monkeypatch.setattr("p3o_lightning.scoring.allows", lambda _: False)
    with torch.no_grad():
        logps, hidden = grouped_logps_and_hidden(module.model, *given)
    assert torch.equal(logps, grouped_completion_logps(module.model, *given))
    values = module.critic(hidden, batch.completion_mask)
    assert not values[~batch.completion_mask].any()
    for prompt, real, answers, masks, row in zip(*given, values, strict=True):
        for answer, kept, numbers in zip(answers, masks, row, strict=True):
            for step in range(int(kept.sum())):
                prefix = torch.cat([prompt[real], answer[:step]])
                with torch.no_grad():
                    state = module.model(prefix[None], output_hidden_states=True).hidden_states[-1][0, -1]
                    expected = state @ module.critic.head.weight[0] + module.critic.head.bias[0]
                assert float(numbers[step]) == pytest.approx(float(expected), abs=1e-4)
    assert_close(batch.values, values.detach(), rtol=0, atol=1e-5)  # as the rollout has them


def test_the_critic_is_trained_and_saved_but_not_exported(tmp_path):
    module = of("ppo")
    run = trainer(tmp_path, max_steps=3, callbacks=[LastCheckpoint()])
    run.fit(module, module.wrap_train_dataloader(prompts()))
    optimised = {id(value) for group in run.optimizers[0].param_groups for value in group["params"]}
    assert optimised == {id(value) for value in module.parameters()}
    assert all(value.any() for value in module.critic.state_dict().values())
    path = tmp_path / "checkpoints" / "last.ckpt"
    again = PairwisePolicy.load_from_checkpoint(path, reward_funcs=share_of_a)
    assert equal(weights(again), weights(module)) and again.objective == "ppo"

    folder = module.export(tmp_path / "export")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(ids).logits, module.model.eval()(ids).logits)
    for source in (path, folder):  # and both are sources of a policy
        assert equal(load_policy(str(source), letters()).state_dict(), module.model.state_dict())
    SupervisedPolicy(str(path), tokenizer=letters())


def test_a_critic_is_neither_made_up_nor_left_out(tmp_path):
    paths = {}
    for objective in ("ppo", "p3o"):
        module = policy(objective=objective, num_iterations=2)
        trainer(tmp_path / objective, max_steps=1, callbacks=[LastCheckpoint()]).fit(module, module.wrap_train_dataloader(prompts()))
        paths[objective] = tmp_path / objective / "checkpoints" / "last.ckpt"
    for saved, wanted, says in (("ppo", "p3o", "with a critic.*choose ppo"), ("p3o", "ppo", "without a critic.*that it was trained with")):
        module = policy(objective=wanted, num_iterations=2)
        with pytest.raises(InputError, match=says):
            trainer(tmp_path, max_steps=2).fit(module, module.wrap_train_dataloader(prompts()), ckpt_path=paths[saved])
        with pytest.raises(InputError, match=r"give the checkpoint as model.model"):
            PairwisePolicy.load_from_checkpoint(paths[saved], objective=wanted, reward_funcs=share_of_a)


def test_the_value_loss_reaches_the_trunk_by_its_share_alone(tmp_path):
    """vf_coef 0 trains as if there were no critic; another share moves the policy's weights elsewhere."""
    after = {}
    for share in (0.0, 1.0):
        module = of("ppo", objective_settings={"vf_coef": share})
        trainer(tmp_path, max_steps=4).fit(module, module.wrap_train_dataloader(prompts()))
        after[share] = weights(module)
    assert not after[0.0]["critic.head.weight"].any() and after[1.0]["critic.head.weight"].any()
    assert not torch.equal(after[0.0]["model.lm_head.weight"], after[1.0]["model.lm_head.weight"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("objective", ["ppo", "gspo", "rloo"])
def test_lower_precision_starts_at_ratio_one(objective, precision, tmp_path):
    recorder = Recorder()
    module = of(objective, num_iterations=2, micro_batch_size=2)
    run = trainer(tmp_path, max_steps=4, precision=precision, logger=recorder, log_every_n_steps=1)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    updates = [row for _, row in recorder.rows if "loss" in row]
    assert updates[0]["policy/clipfrac_avg"] == 0 and updates[0]["val/ratio_var"] == 0
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in updates)


def train_on_two(root, strategy, devices, batch_size):
    by_response = {"whiten_advantages": False, "divisor": 5}  # not over the tokens of a batch, which differ in number
    settings = {"model": {**LLAMA, "num_hidden_layers": 2}, "objective": "ppo", "objective_settings": by_response}
    module = policy(**settings, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.3))
    run = trainer(root, strategy=strategy, devices=devices, max_steps=4, callbacks=[LastCheckpoint()])
    run.fit(module, module.wrap_train_dataloader(prompts(batch_size)))
    return read_checkpoint(root / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_policy_and_critic_as_one_does(strategy, tmp_path):
    alone = train_on_two(tmp_path / "one", "auto", 1, 4)
    together, _ = on_two(tmp_path, train_on_two, tmp_path / "two", strategy, 2, 2)
    assert alone.keys() == together.keys() and alone["critic.head.weight"].abs().max() > 1e-3
    for name in alone:
        assert_close(together[name], alone[name], rtol=0, atol=1e-5)


# ---- figures and settings


def test_what_is_logged(tmp_path):
    shared = {"policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio", "val/ratio_var", "p3o/gap_logratio", "p3o/tie_rate"}
    for objective in ("rloo", "ppo"):
        recorder = Recorder()
        module = of(objective)
        run = trainer(tmp_path, max_steps=2, logger=recorder, log_every_n_steps=1)
        run.fit(module, module.wrap_train_dataloader(prompts()))
        row = next(row for _, row in recorder.rows if "loss" in row)
        of_critic = {"loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"} if objective == "ppo" else set()
        assert shared | of_critic | {"policy/advantage_abs", "loss"} == row.keys()


def test_evaluation_needs_no_critic(tmp_path):
    module = of("ppo")
    module.policy_values = lambda *_: pytest.fail("values in evaluation")
    trainer(tmp_path).validate(module, prompts(5), verbose=False)


class Judged(PairwisePolicy):
    """A judge compares: gaps, no scores."""

    def rollout_step(self, prompts):
        drawn = super().rollout_step(prompts)
        return drawn._replace(scores=None, gaps=drawn.scores.unsqueeze(2) - drawn.scores.unsqueeze(1))


@pytest.mark.parametrize("objective", ["rloo", "grpo", "online_dpo", "copg"])
def test_gaps_in_place_of_scores_train_alike(objective, tmp_path):
    after = []
    for owner in (PairwisePolicy, Judged):
        module = policy(owner, objective=objective, num_generations=3)
        trainer(tmp_path, max_steps=4).fit(module, module.wrap_train_dataloader(prompts()))
        after.append(weights(module))
    for name, value in after[0].items():
        assert_close(after[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "rloo", "clipping": "separate"}, "model.clipping is 'separate', which objective rloo does not read: remove it"),
        ({"objective": "ppo", "kl_source": "rollout"}, "model.kl_source is 'rollout', which objective ppo does not read"),
        ({"objective": "reinforce", "clip_range": 0.2}, "model.clip_range is 0.2, but objective reinforce clips nothing"),
        (
            {"objective": "ppo", "objective_settings": {"lam": 0.9}},
            "has 'lam', which objective ppo does not take: it takes value_",
        ),
        ({"objective": "rloo", "objective_settings": {"eta": 1.0}}, "has 'eta', which objective rloo does not take: it takes none"),
        ({"objective": "p3o", "objective_settings": {"eta": 1.0}}, "has 'eta', which objective p3o does not take: it takes none"),
        ({"objective": "ppo", "objective_settings": {"values": 1}}, "has 'values'"),
        ({"objective": "ppo", "objective_settings": {"gae_lambda": 1.5}}, "model.objective_settings.gae_lambda is 1.5: choose a value in"),
        ({"objective": "ppo", "objective_settings": {"gamma": 0.0}}, "model.objective_settings.gamma is 0.0"),
        ({"objective": "ppo", "objective_settings": {"vf_coef": -1.0}}, "model.objective_settings.vf_coef is -1.0"),
        ({"objective": "ppo", "objective_settings": {"value_clip_range": 0}}, "model.objective_settings.value_clip_range is 0"),
        ({"objective": "ppo", "objective_settings": {"vf_coef": "much"}}, "model.objective_settings is {'vf_coef': 'much'}"),
        ({"objective": "rebel", "objective_settings": {"eta": 0.0}}, "model.objective_settings.eta is 0.0"),
        ({"objective": "grpo", "objective_settings": {"clip_range_high": -0.1}}, "model.objective_settings.clip_range_high is -0.1"),
        ({"objective": "reinforce", "objective_settings": {"baseline": "mean"}}, "model.objective_settings.baseline is 'mean'"),
        ({"objective": "online_dpo", "kl_coef": 0.0}, "model.kl_coef is 0.0, but it is online_dpo's temperature"),
        ({"objective": "online_ipo", "kl_coef": 0.0}, "model.kl_coef is 0.0"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_the_objective_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        policy(**settings)


def test_settings_reach_their_function():
    module = policy(objective="dr_grpo", clip_range=0.1, objective_settings={"clip_range_high": 0.3})
    assert module.objective_settings == {"clip_range": 0.1, "clip_range_high": 0.3, "divisor": 5}  # TRL's: max_completion_length
    assert policy(objective="gspo").objective_settings == {"clip_range": 3e-4}  # its own
    assert [policy(objective=name).clip_range for name in ("p3o", "ppo", "gspo", "rebel")] == [0.2, 0.2, 3e-4, None]
    assert policy().hparams["clip_range"] is None  # as given: a resumed config is compared with it
    batch = policy(objective="rebel").rollout_step(collate(PROMPTS[:4]))
    moved = batch.old_token_logps + 0.1 * torch.arange(2).view(1, 2, 1)
    losses = [float(policy(objective="rebel", objective_settings={"eta": eta}).loss(moved, batch).loss) for eta in (1, 2)]
    assert losses[0] != losses[1]


# ---- the command


def test_the_command_trains_resumes_and_exports_with_a_critic(p3o):
    config = ["--config", "configs/debug/policy.yaml", "--model.objective", "ppo", "--model.objective_settings.gae_lambda", "0.9"]
    assert p3o("fit", *config, "--trainer.max_steps", "4").code == 0
    resumed = p3o("fit", *config, "--trainer.max_steps", "8", "--ckpt_path", "last")
    assert resumed.code == 0 and "resumed from step 4" in resumed.out + resumed.err
    root = p3o.folder / "runs/debug/policy"
    kept = PairwisePolicy.load_from_checkpoint(root / "checkpoints/last.ckpt")
    assert kept.objective_settings["gae_lambda"] == 0.9 and kept.critic is not None
    AutoModelForCausalLM.from_pretrained(root / "export")
    figures = scalars(next((root / "logs").rglob("events.*")).parent)
    assert [step for step, _ in figures["loss/value_avg"]] == list(range(8))  # of both runs
    assert p3o("predict", *config, "--ckpt_path", "last", "--trainer.limit_predict_batches", "1").code == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.objective", "dpo"], "model.objective"),
        (["--model.objective", "rloo", "--model.clipping", "separate"], "model.clipping is 'separate', which objective rloo does not read"),
        (["--model.objective", "ppo", "--model.objective_settings", "{lam: 1}"], "model.objective_settings has 'lam'"),
        (["--model.objective", "ppo", "--model.objective_settings.gamma", "2"], "model.objective_settings.gamma is 2: choose a discount"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(p3o, flags, says):
    assert says in p3o("fit", "--config", "configs/debug/policy.yaml", *flags).error
