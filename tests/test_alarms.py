"""KLBudget and CollapseAlarm: a rollout too far from the reference ends the run before it is trained on; a collapse is told, once."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from running import p3o  # noqa: F401
from tiny import LLAMA, Recorder, equal, letters, policy, preferences, prompts, trainer, weights

from p3o_lightning import PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.batches import Experience
from p3o_lightning.callbacks import CollapseAlarm, KLBudget, LastCheckpoint
from p3o_lightning.callbacks.alarms import tie_rate
from p3o_lightning.errors import InputError, Stopped
from p3o_lightning.models import read_checkpoint


def fit(root, *callbacks, ckpt_path=None, validation=None, settings=None, **flags):
    """Four updates a rollout, three rollouts an epoch."""
    module = policy(num_iterations=2, micro_batch_size=2, **(settings or {}))
    run = trainer(root, callbacks=list(callbacks), **{"max_steps": 16, **flags})
    run.fit(module, module.wrap_train_dataloader(prompts()), validation, ckpt_path=ckpt_path)
    return module, run


class KLs(L.Callback):
    """KL of every rollout, by the step that it was made at."""

    def on_fit_start(self, trainer, pl_module):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step % 4 == 0:
            self.seen[trainer.global_step] = pl_module.state.figures["objective/kl"]


class SaveAsTold(L.Callback):
    """Saves where what stops the run says that it is worth it."""

    def on_exception(self, trainer, pl_module, exception):
        if exception.save:
            trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")


@pytest.fixture(scope="module")
def kls(tmp_path_factory):
    watch = KLs()
    fit(tmp_path_factory.mktemp("kls"), watch, max_steps=20)
    return watch.seen


# ---- KLBudget


@pytest.mark.parametrize(("step", "lr"), [(8, 3e-2), (12, 1e-2)], ids=["within an epoch", "at the start of one"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_stops_before_an_update_and_resumes_to_the_bit(step, lr, adaptive, tmp_path):
    settings = {"lr": lr, **({"kl_target": 0.01, "kl_coef": 0.1, "kl_horizon": 8} if adaptive else {})}
    watch = KLs()
    whole, _ = fit(tmp_path / "whole", watch, settings=settings)
    assert watch.seen[0] == 0
    budget = max(kl for at, kl in watch.seen.items() if at < step)
    assert watch.seen[step] > budget  # the run drifts away from its reference
    (tmp_path / "run").mkdir()
    with pytest.raises(Stopped) as stop:
        fit(tmp_path / "run", KLBudget(budget), SaveAsTold(), settings=settings)
    assert stop.value.save and "\n" not in str(stop.value)
    assert str(stop.value).startswith(
        f"objective/kl is {watch.seen[step]:.4g} nats, beyond kl_budget.max_kl {budget:g}: stopped before an update on that rollout. resume"
    )
    saved = read_checkpoint(tmp_path / "run" / "stopped.ckpt")
    before, _ = fit(tmp_path / "before", settings=settings, max_steps=step)
    assert saved["global_step"] == step and equal(saved["state_dict"], weights(before))
    resumed, run = fit(tmp_path / "again", KLBudget(1e9), ckpt_path=tmp_path / "run" / "stopped.ckpt", settings=settings)
    assert run.global_step == 16 and equal(weights(resumed), weights(whole))
    assert resumed.state.kl_coef == whole.state.kl_coef and resumed.state.rollouts == whole.state.rollouts


def test_a_rollout_begun_before_a_resume_is_held_to_the_budget_too(kls, tmp_path):
    fit(tmp_path, LastCheckpoint(), max_steps=10)  # within the rollout of step 8
    with pytest.raises(
        Stopped, match=rf"objective/kl is {kls[8]:.4g} nats, beyond kl_budget.max_kl .*last.ckpt of step 10 is whole"
    ) as stop:
        module = policy(num_iterations=2, micro_batch_size=2)
        run = trainer(tmp_path, callbacks=[KLBudget(kls[8] / 2), LastCheckpoint()], max_steps=16)
        run.fit(module, module.wrap_train_dataloader(prompts()), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert stop.value.save and run.global_step == 10
    assert module.state.rollouts == 3 and module.state.pending is not None  # as the checkpoint had them


@pytest.mark.parametrize("max_kl", [None, 1e9])
def test_within_the_budget_training_is_the_same(max_kl, tmp_path):
    with_budget, _ = fit(tmp_path / "on", KLBudget(max_kl), CollapseAlarm())
    without, _ = fit(tmp_path / "off")
    assert equal(weights(with_budget), weights(without))


def test_a_kl_that_is_not_a_number_is_no_matter_of_the_budget(tmp_path):
    class Spoil(L.Callback):
        """NaN among the figures."""

        def on_train_batch_start(self, trainer, pl_module, *_):
            pl_module.state.figures = pl_module.state.figures | {"objective/kl": math.nan}

    assert fit(tmp_path, Spoil(), KLBudget(1e-9), max_steps=2)[1].global_step == 2


def test_the_command_stops_with_one_line_and_the_weights_of_before(p3o):  # noqa: F811
    given = (
        "fit",
        "--config",
        "configs/debug/policy.yaml",
        "--model.kl_coef",
        "0",
        "--model.lr",
        "0.03",
        "--checkpoint.every_n_steps",
        "1",
    )
    error = p3o(*given, "--kl_budget.max_kl", "0.5", "--trainer.default_root_dir", "run").error
    assert error.startswith("objective/kl is ") and " nats, beyond kl_budget.max_kl 0.5: stopped before an update" in error
    saved = read_checkpoint(Path("run/checkpoints/last.ckpt"))
    step = saved["global_step"]
    assert 0 < step < 48 and step % 4 == 0 and f"last.ckpt of step {step} is whole: resume with a higher kl_budget.max_kl" in error
    assert p3o(*given, "--trainer.max_steps", step, "--trainer.default_root_dir", "before").code == 0
    assert equal(saved["state_dict"], read_checkpoint(Path("before/checkpoints/last.ckpt"))["state_dict"])
    resumed = p3o(
        *given,
        *("--kl_budget.max_kl", "1000", "--trainer.default_root_dir", "run", "--ckpt_path", "last"),
        *("--trainer.max_steps", step + 4),
    )
    assert resumed.code == 0 and read_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == step + 4


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_budget_of_nothing_is_refused(value):
    with pytest.raises(InputError, match=rf"kl_budget.max_kl is {value}: choose a number of nats above 0"):
        KLBudget(value)


# ---- CollapseAlarm


class Figures(L.Callback):
    """Puts a rollout's duplicates, and the scores of its micro-batches, as a test would have them."""

    def __init__(self, duplicates=(), ties=()):
        self.duplicates, self.ties = dict(enumerate(duplicates, 1)), dict(enumerate(ties, 1))

    def on_train_batch_start(self, trainer, pl_module, *_):
        state = pl_module.state
        state.figures = state.figures | {"p3o/duplicate_pair_rate": self.duplicates.get(state.rollouts, 0.0)}
        if state.pending is not None:
            scores = torch.tensor([[1.0, 1.0] if row < 4 * self.ties.get(state.rollouts, 0) else [0.0, 1.0] for row in range(4)])
            state.pending = state.pending._replace(scores=scores)


def alarms(root, *callbacks, **given):
    """Texts of the alarm, over four updates a rollout."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(root, *callbacks, **{"max_steps": 32, "max_epochs": 9, **given})
    return [str(item.message) for item in caught if "rollouts in a row" in str(item.message)]


def test_a_policy_that_repeats_itself_is_told_with_the_fix(tmp_path):
    (told,) = alarms(tmp_path, Figures([0.95] * 8), CollapseAlarm())
    assert told.startswith("step 8: in 3 rollouts in a row, now 95% of the pairs are two equal responses (p3o/duplicate_pair_rate)")
    assert all(word in told for word in ("higher model.temperature or model.kl_coef", "lower model.lr"))


def test_equal_rewards_are_told_with_the_fix(tmp_path):
    (told,) = alarms(tmp_path, Figures(ties=[1] * 8), CollapseAlarm())
    assert told.startswith("step 8: in 3 rollouts in a row, now 100% of the pairs have equal rewards (p3o/tie_rate)")
    assert "Give model.reward_funcs that tell responses apart" in told


@pytest.mark.parametrize(
    ("duplicates", "steps"),
    [
        ([0.95, 0.95, 0.5, 0.95, 0.95, 0.5, 0.95, 0.95], []),
        ([0.95, 0.95, 0.95, 0.95, 0.5, 0.95, 0.95, 0.95], [8, 28]),  # again after it has recovered
        ([0.9] * 8, [8]),
        ([0.89] * 8, []),
    ],
)
def test_it_warns_after_three_rollouts_in_a_row_and_once(duplicates, steps, tmp_path):
    told = alarms(tmp_path, Figures(duplicates), CollapseAlarm())
    assert [int(text.split(":")[0].removeprefix("step ")) for text in told] == steps


def test_threshold_and_patience_are_settings(tmp_path):
    told = alarms(tmp_path, Figures([0.5, 0.5, 0.4]), CollapseAlarm(threshold=0.5, patience=2), max_steps=12)
    assert [text.split(",")[0] for text in told] == ["step 4: in 2 rollouts in a row"]


def test_a_real_collapse_is_found_and_a_healthy_run_is_not(tmp_path):
    def constant(completions, **_):
        return [1.0] * len(completions)

    (told,) = alarms(tmp_path, CollapseAlarm(), settings={"reward_funcs": constant}, max_steps=12)
    assert "100% of the pairs have equal rewards" in told
    (told,) = alarms(tmp_path, CollapseAlarm(), settings={"temperature": 1e-4, "start_up_proofs": False}, max_steps=12)
    assert "100% of the pairs are two equal responses" in told
    assert alarms(tmp_path, CollapseAlarm(), max_steps=12) == []


def test_one_micro_batch_a_rollout_is_all_of_it(tmp_path):
    def run(reward):
        module = policy(reward_funcs=reward)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit = trainer(tmp_path, callbacks=[CollapseAlarm()], max_steps=4)
            fit.fit(module, module.wrap_train_dataloader(prompts()))
        return [str(item.message) for item in caught if "in a row" in str(item.message)]

    assert len(run(lambda completions, **_: [1.0] * len(completions))) == 1
    assert run(lambda completions, **_: list(range(len(completions)))) == []


def test_a_resumed_run_goes_on_counting(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert alarms(tmp_path, Figures([0.95] * 8), CollapseAlarm(), LastCheckpoint(), max_steps=6) == []  # within the second rollout
    (told,) = alarms(tmp_path, Figures([0.95] * 8), CollapseAlarm(), ckpt_path=checkpoint)
    assert told.startswith("step 8: ")  # the third: the second was not counted twice


def test_tie_rate_by_hand():
    def experience(**given):
        tokens, nats = torch.zeros(2, 3, 1, dtype=torch.long), torch.zeros(2, 3, 1)
        return Experience(tokens[:, 0], tokens[:, 0].bool(), tokens, tokens.bool(), nats, nats, **given)

    assert tie_rate(experience(scores=torch.tensor([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]]))) == pytest.approx(4 / 6)
    gaps = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 2.0], [0.0, -2.0, 0.0]]] * 2)
    assert tie_rate(experience(gaps=gaps)) == pytest.approx(1 / 3)
    assert tie_rate(experience()) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0}, "collapse.threshold is 0"),
        ({"threshold": 1.1}, "collapse.threshold is 1.1"),
        ({"patience": 0}, "collapse.patience"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CollapseAlarm(**settings)


# ---- both


@pytest.mark.parametrize("stage", [SupervisedPolicy, RewardModel, PairwisePolicy])
def test_every_stage_runs_the_same_with_them(stage, tmp_path):
    def run(*callbacks):
        recorder = Recorder()
        module = policy() if stage is PairwisePolicy else stage(LLAMA, tokenizer=letters(), lr=1e-2)
        data = PreferenceDataModule(path=str(preferences(tmp_path)), batch_size=4)
        trainer(tmp_path, callbacks=list(callbacks), max_steps=3, logger=recorder, log_every_n_steps=1).fit(module, data)
        return weights(module), repr(recorder.rows)

    torch.manual_seed(0)
    with_them = run(KLBudget(1e9), CollapseAlarm())
    torch.manual_seed(0)
    without = run()
    assert equal(with_them[0], without[0]) and with_them[1] == without[1]


def test_a_module_of_the_users_own_is_left_alone(tmp_path):
    class Plain(L.LightningModule):
        """Its `state` is something else."""

        def __init__(self):
            super().__init__()
            self.layer, self.state = torch.nn.Linear(2, 1), {"figures": 1}

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    run = trainer(tmp_path, callbacks=[KLBudget(1.0), CollapseAlarm()], max_steps=2)
    run.fit(Plain(), torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2))
    assert run.global_step == 2
