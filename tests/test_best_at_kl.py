"""best.ckpt: the highest validation reward within the KL bound; what it compares survives a resume; files are whole."""

import shutil

import pytest
import torch

from p3o_lightning import InputError, PairwisePolicy
from p3o_lightning.callbacks import BestAtKL, LastCheckpoint
from p3o_lightning.models import read_checkpoint
from tests.tiny import equal, policy, prompts, trainer, weights

# (reward, KL) of the validations after updates 1, 2, 3, ...: rises, then is bought with KL, then comes back lower and once higher
COURSE = [(0.1, 0.0), (0.4, 1.0), (0.9, 2.5), (0.3, 0.5), (0.5, 2.0), (float("nan"), 0.1)]


class Given(PairwisePolicy):
    """Validates as its course says."""

    course = COURSE

    def validation_step(self, batch, batch_idx):
        reward, kl = self.course[self.trainer.global_step - 1]
        self.log_dict({"val/scores": reward, "val/kl": kl}, batch_size=4)


def fit(root, *attached, ckpt_path=None, owner=Given, steps=6, **flags):
    module = policy(owner, num_iterations=2)
    options = {"max_steps": steps, "val_check_interval": 1, "limit_val_batches": 1, **flags}
    run = trainer(root, callbacks=list(attached), **options)
    run.fit(module, module.wrap_train_dataloader(prompts()), prompts(), ckpt_path=ckpt_path)
    return module, run


@pytest.mark.parametrize(("bound", "step", "reward"), [(2.0, 5, 0.5), (1.9, 2, 0.4), (3.0, 3, 0.9), (0.2, 1, 0.1)])
def test_it_keeps_the_highest_reward_within_the_bound(bound, step, reward, tmp_path):
    best = BestAtKL(max_kl=bound)
    fit(tmp_path, best, LastCheckpoint())
    kept = read_checkpoint(tmp_path / "checkpoints/best.ckpt")
    assert kept["global_step"] == step and best.best["reward"] == pytest.approx(reward) and best.best["step"] == step
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    then, _ = fit(tmp_path / "then", steps=step)
    assert equal(weights(PairwisePolicy(tmp_path / "checkpoints/best.ckpt")), weights(then)) or step == 1


def test_nothing_within_the_bound_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Given, "course", [(0.1, 5.0), (0.4, 6.0)])
    best = BestAtKL(max_kl=1.0)
    fit(tmp_path, best, LastCheckpoint(), steps=2)
    assert best.best == {} and not (tmp_path / "checkpoints/best.ckpt").exists()


class Keeper(LastCheckpoint):
    """Keeps every last.ckpt."""

    def __init__(self, folder):
        super().__init__(every_n_steps=1)
        self.kept = []
        self.folder = folder
        folder.mkdir()

    def save(self, trainer):
        super().save(trainer)
        self.kept.append(shutil.copy(self.path(trainer), self.folder / f"{trainer.global_step}.ckpt"))


def test_a_resumed_run_compares_with_what_it_has_kept(tmp_path):
    keeper = Keeper(tmp_path / "kept")
    fit(tmp_path, BestAtKL(max_kl=2.0), keeper)
    assert len(keeper.kept) >= 6
    for path in keeper.kept:
        best = BestAtKL(max_kl=2.0)
        fit(tmp_path / path.stem, best, LastCheckpoint(), ckpt_path=path)
        assert best.best["step"] == 5, path


def test_the_best_is_a_checkpoint_to_go_on_from(tmp_path):
    fit(tmp_path, BestAtKL(max_kl=1.0), LastCheckpoint())
    best = BestAtKL(max_kl=1.0)
    resumed, run = fit(tmp_path / "on", best, ckpt_path=tmp_path / "checkpoints/best.ckpt")
    whole, _ = fit(tmp_path / "whole")
    assert run.global_step == len(COURSE) and equal(weights(resumed), weights(whole)) and best.best["step"] == 2


def test_a_crash_within_a_save_leaves_the_former_best(tmp_path, monkeypatch):
    genuine = torch.save

    def crash(content, file, *rest, **named):
        if content.get("global_step") == 5:
            file.write(b"half a check")
            raise OSError(28, "No space left on device")
        return genuine(content, file, *rest, **named)

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(InputError, match=r"BestAtKL.dirpath is .*No space left on device.*make room there"):
        fit(tmp_path, BestAtKL(max_kl=2.0))
    assert read_checkpoint(tmp_path / "checkpoints/best.ckpt")["global_step"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.ckpt"]


def test_a_policy_logs_what_it_looks_for_and_others_are_told(tmp_path):
    best = BestAtKL(max_kl=100.0)
    fit(tmp_path, best, owner=PairwisePolicy, steps=2)
    assert {"step", "reward", "kl"} == best.best.keys() and (tmp_path / "checkpoints/best.ckpt").exists()
    with pytest.raises(InputError, match="BestAtKL looks for 'val/gold', which this stage does not log"):
        fit(tmp_path, BestAtKL(max_kl=100.0, monitor="val/gold"), owner=PairwisePolicy, steps=2)
    with pytest.raises(InputError, match=r"BestAtKL.max_kl is 0: choose a number of nats above 0"):
        BestAtKL(max_kl=0)


def test_a_rehearsal_keeps_nothing(tmp_path):
    fit(tmp_path, BestAtKL(max_kl=2.0), fast_dev_run=2)
    assert not (tmp_path / "checkpoints").exists()
