"""A reference that is moved: the mixture is right, and a run resumed at any step repeats the uninterrupted one to the bit."""

import copy

import pytest
import torch

from p3o_lightning import InputError, PairwisePolicy
from p3o_lightning.callbacks import LastCheckpoint, ReferenceSync
from p3o_lightning.sharding import blend, whole_state_dict
from tests.processes import on_two
from tests.tiny import LLAMA, KeepAll, Recorder, equal, policy, prompts, trainer, weights

SETTINGS = {"num_iterations": 2, "micro_batch_size": 2, "kl_coef": 0.1}


def fit(root, *attached, ckpt_path=None, module=None, settings=SETTINGS, **flags):
    module = module or policy(**settings)
    record = Recorder()
    run = trainer(root, callbacks=list(attached), logger=record, **{"max_steps": 12, "log_every_n_steps": 1, **flags})
    run.fit(module, module.wrap_train_dataloader(prompts()), ckpt_path=ckpt_path)
    return module, record


class Trace(ReferenceSync):
    """Keeps policy and reference of before and after every move."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.moves = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        before = copy.deepcopy(weights(pl_module.reference))
        super().on_train_batch_end(trainer, pl_module, *rest)
        if not equal(before, weights(pl_module.reference)):
            self.moves.append((trainer.global_step, before, weights(pl_module.model), weights(pl_module.reference)))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [3, 6, 9, 12]), (2, [3, 6])])
def test_the_reference_moves_a_share_of_the_way_every_few_updates(accumulate, steps, tmp_path):
    trace = Trace(ref_model_mixup_alpha=0.25, ref_model_sync_steps=3)
    fit(tmp_path, trace, max_steps=12 // accumulate, accumulate_grad_batches=accumulate)
    assert [step for step, *_ in trace.moves] == steps
    for _, before, now, after in trace.moves:
        for name in after:
            wanted = 0.25 * now[name].double() + 0.75 * before[name].double()
            torch.testing.assert_close(after[name].double(), wanted, rtol=0, atol=1.2e-7)  # a rounding at 1


def test_kl_is_then_measured_from_where_it_moved(tmp_path):
    replaced, _ = fit(tmp_path, ReferenceSync(ref_model_mixup_alpha=1.0, ref_model_sync_steps=4))
    assert equal(weights(replaced.model), weights(replaced.reference))
    _, record = fit(tmp_path, ReferenceSync(ref_model_mixup_alpha=1.0, ref_model_sync_steps=4))  # 4 updates a rollout
    kls = {step: row["objective/kl_k2"] for step, row in record.rows if "objective/kl_k2" in row}
    assert kls == {0: 0.0, 4: pytest.approx(0, abs=1e-9), 8: pytest.approx(0, abs=1e-9)}
    _, record = fit(tmp_path)
    kls = {step: row["objective/kl_k2"] for step, row in record.rows if "objective/kl_k2" in row}
    assert kls[4] > 1e-6 and kls[8] > 1e-6


def test_mixing_half_precision_is_rounded_once():
    one, other = torch.nn.Linear(3, 2).bfloat16(), torch.nn.Linear(3, 2).bfloat16()
    wanted = (0.3 * other.weight.double() + 0.7 * one.weight.double()).bfloat16()
    blend(one, other, 0.3)
    assert torch.equal(one.weight, wanted) and not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("own", [False, True])
def test_resumed_at_any_step_it_repeats_the_uninterrupted_run(own, tmp_path):
    settings = {**SETTINGS, "reference": policy(model={**LLAMA, "initializer_range": 0.3}).model} if own else SETTINGS
    keeper = KeepAll(tmp_path / "kept")
    whole, record = fit(tmp_path, ReferenceSync(0.5, 3), keeper, settings=settings)
    expected = record.rollouts()
    assert len(keeper.kept) >= 12
    for path in keeper.kept:
        again, later = fit(tmp_path / "again", ReferenceSync(0.5, 3), ckpt_path=path, settings=settings)
        assert equal(weights(again.model), weights(whole.model)) and equal(weights(again.reference), weights(whole.reference)), path
        assert later.rollouts() == expected[len(expected) - len(later.rollouts()) :], path


def test_a_checkpoint_alone_has_the_moved_reference(tmp_path):
    whole, _ = fit(tmp_path, ReferenceSync(0.5, 3), KeepAll(tmp_path / "kept"))
    path = tmp_path / "checkpoints/last.ckpt"
    loaded = PairwisePolicy.load_from_checkpoint(path, reward_funcs=whole.rewards.sources[0].function)  # made from scratch
    saved: dict = {}
    loaded.on_save_checkpoint(saved)  # before the reference was asked for
    assert equal(saved["p3o_reference_weights"], weights(whole.reference))
    assert equal(weights(loaded.reference), weights(whole.reference))


def test_a_reference_that_stays_is_not_saved(tmp_path):
    fit(tmp_path, ReferenceSync(0.5, 100), KeepAll(tmp_path / "kept"), max_steps=2)
    assert "p3o_reference_weights" not in torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)


def test_a_module_whose_reference_has_moved_cannot_go_back(tmp_path):
    keeper = KeepAll(tmp_path / "kept")
    module, _ = fit(tmp_path, ReferenceSync(0.5, 3), keeper)
    with pytest.raises(InputError, match="of before the reference was moved"):
        fit(tmp_path, module=module, ckpt_path=keeper.kept[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha is 0.0: choose a share in"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps is 0: choose at least 1 update"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        ReferenceSync(**settings)


def test_with_adapters_or_another_shape_it_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="with LoRA the reference is the model under the adapter"):
        fit(tmp_path, ReferenceSync(), settings={"peft_config": {"r": 2}})
    with pytest.raises(InputError, match="of another shape than the policy"):
        fit(tmp_path, ReferenceSync(), settings={"reference": {**LLAMA, "num_hidden_layers": 2}})


# ---- several processes


def train(folder, strategy, batch_size, devices, ckpt_path=None, max_steps=6):
    module = policy(kl_coef=0.1)
    attached = [ReferenceSync(0.5, 2), LastCheckpoint()]
    run = trainer(folder, strategy=strategy, devices=devices, max_steps=max_steps, callbacks=attached)
    run.fit(module, module.wrap_train_dataloader(prompts(batch_size=batch_size)), ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in whole_state_dict(module.reference).items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_move_it_as_one_does_and_resume(strategy, tmp_path):
    for name in ("one", "two", "cut"):
        (tmp_path / name).mkdir()
    alone = train(tmp_path / "one", "auto", 4, 1)
    both = on_two(tmp_path, train, tmp_path / "two", strategy, 2, 2)[0]
    assert max(float((alone[name] - both[name]).abs().max()) for name in alone) < 1e-5
    on_two(tmp_path, train, tmp_path / "cut", strategy, 2, 2, None, 3)
    resumed = on_two(tmp_path, train, tmp_path / "cut", strategy, 2, 2, tmp_path / "cut/checkpoints/last.ckpt")[0]
    assert equal(resumed, both)
