"""Callbacks: a killed, crashed or interrupted run leaves whole files; training is the same without them."""

from __future__ import annotations

import json
import os
import signal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from tiny import PROMPTS, equal, policy, prompts, trainer, weights
from transformers import AutoModelForCausalLM

from p3o_lightning import InputError
from p3o_lightning.callbacks import Export, LastCheckpoint, PredictionWriter
from p3o_lightning.models import read_checkpoint


def fit(root, callbacks=(), ckpt_path=None, validation=None, settings=None, **flags):
    module = policy(num_iterations=2, micro_batch_size=2, **(settings or {}))
    run = trainer(root, callbacks=list(callbacks), **flags)
    run.fit(module, module.wrap_train_dataloader(prompts()), validation, ckpt_path=ckpt_path)
    return module, run


def step_of(path) -> int:
    return read_checkpoint(path)["global_step"]


class Noting(LastCheckpoint):
    """Notes when it saves."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.steps = []

    def save(self, trainer):
        super().save(trainer)
        if self.path(trainer).exists():
            assert step_of(self.path(trainer)) == trainer.global_step
            self.steps.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))


@pytest.mark.parametrize(
    ("flags", "every", "steps"),
    [
        ({"max_steps": 10}, 4, [4, 8, 10]),
        ({"max_epochs": 2, "limit_train_batches": 5}, 100, [5, 10]),
        ({"max_epochs": 2, "limit_train_batches": 5}, 3, [3, 5, 6, 9, 10]),
        ({"max_steps": 5, "accumulate_grad_batches": 2}, 2, [2, 4, 5]),
        ({"fast_dev_run": 3}, 1, []),
    ],
    ids=str,
)
def test_it_saves_where_it_is_due(flags, every, steps, tmp_path):
    saver = Noting(every_n_steps=every)
    module, _ = fit(tmp_path, [saver], **flags)
    assert [step for step, _ in saver.steps] == steps
    accumulate = flags.get("accumulate_grad_batches", 1)
    assert all(batches % accumulate == 0 for _, batches in saver.steps)  # never within a window
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() == bool(steps)
    alone, _ = fit(tmp_path / "alone", **flags)
    assert equal(weights(module), weights(alone))


def test_a_run_that_was_stopped_early_is_saved_whole(tmp_path):
    class Stop(EarlyStopping):
        """Stops at the second validation."""

        def _run_early_stopping_check(self, trainer):
            trainer.should_stop = trainer.global_step >= 6

    saver = Noting(every_n_steps=100)
    fit(tmp_path, [Stop("val/scores"), saver], validation=prompts(), max_steps=50, val_check_interval=3, limit_val_batches=1)
    assert [step for step, _ in saver.steps] == [6]


def test_a_crash_within_a_save_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    genuine = L.Trainer.save_checkpoint

    def crash(self, path, *given, **named):
        if self.global_step < 4:
            return genuine(self, path, *given, **named)
        path.write_bytes(b"half a check")
        raise OSError("No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", crash)
    with pytest.raises(InputError, match=r"checkpoints.*No space left on device"):
        fit(tmp_path, [LastCheckpoint(every_n_steps=2)], max_steps=6)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert step_of(path) == 2
    monkeypatch.undo()
    resumed, _ = fit(tmp_path, [LastCheckpoint(every_n_steps=2)], ckpt_path=path, max_steps=6)
    whole, _ = fit(tmp_path / "whole", max_steps=6)
    assert equal(weights(resumed), weights(whole))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


class PressCtrlC(L.Callback):
    """As a user would, in the middle of a step."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def signals():
    """Lightning ignores Ctrl-C for good once it has seen one: give it back to the tests that follow."""
    yield signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("accumulate", "batch", "saved"), [(1, 4, 5), (2, 4, 3), (2, 5, 3)])
def test_ctrl_c_saves_at_the_end_of_the_update_and_resumes_to_the_bit(accumulate, batch, saved, tmp_path, signals):
    saver = Noting(every_n_steps=100)
    flags = {"accumulate_grad_batches": accumulate, "max_steps": 6}
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, [PressCtrlC(batch), saver], **flags)
    assert [step for step, _ in saver.steps] == [saved]
    resumed, run = fit(tmp_path, [LastCheckpoint()], ckpt_path=tmp_path / "checkpoints" / "last.ckpt", **flags)
    whole, _ = fit(tmp_path / "whole", **flags)
    assert run.global_step == 6 and equal(weights(resumed), weights(whole))


def test_a_second_ctrl_c_stops_at_once(tmp_path, signals):
    saver = Noting(every_n_steps=100)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, [PressCtrlC(1), PressCtrlC(1), saver], max_steps=4)
    assert saver.steps == []


def test_an_interrupted_callback_serves_again_and_the_handler_is_given_back(tmp_path, signals):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    saver = LastCheckpoint()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, [PressCtrlC(1), saver], max_steps=4)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _, run = fit(tmp_path, [saver], max_steps=4)
    assert run.global_step == 4 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [saver, Failing()], max_steps=4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Failing(L.Callback):
    """Crashes."""

    def on_train_batch_start(self, *_):
        raise ZeroDivisionError

    on_predict_batch_end = on_train_batch_start


def test_every_n_steps_below_one_is_refused():
    with pytest.raises(InputError, match=r"checkpoint.every_n_steps is 0: choose at least 1 update"):
        LastCheckpoint(every_n_steps=0)


def test_dirpath_is_where_it_lies(tmp_path):
    fit(tmp_path, [LastCheckpoint(dirpath=str(tmp_path / "elsewhere"))], max_steps=1)
    assert step_of(tmp_path / "elsewhere" / "last.ckpt") == 1


# ---- Export


def test_a_fit_ends_with_an_export(tmp_path):
    module, _ = fit(tmp_path, [Export()], max_steps=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert equal(loaded.state_dict(), weights(module.model)) and "2 updates" in (tmp_path / "export" / "README.md").read_text()
    fit(tmp_path, [Export()], max_steps=1)  # again, into the same folder


@pytest.mark.parametrize(
    "flags", [{"fast_dev_run": True}, {"callbacks": [Export(), Failing()], "max_steps": 2}], ids=["fast_dev_run", "crash"]
)
def test_no_export_of_what_is_not_finished(flags, tmp_path):
    flags = {"callbacks": [Export()], **flags}
    if "max_steps" in flags:
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, **flags)
    else:
        fit(tmp_path, **flags)
    assert not (tmp_path / "export").exists()


def test_a_folder_of_other_files_stops_the_run_before_it_begins(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    started = []

    class Started(L.Callback):
        """Notes that training began."""

        def on_train_batch_start(self, *_):
            started.append(1)

    with pytest.raises(InputError, match=r"export.dirpath is .* which is no earlier export"):
        fit(tmp_path, [Export(str(tmp_path / "work")), Started()], max_steps=2)
    assert not started and (tmp_path / "work" / "notes.txt").read_text() == "mine"


# ---- PredictionWriter


def test_predictions_are_one_json_line_a_prompt(tmp_path):
    trainer(tmp_path, callbacks=[PredictionWriter()]).predict(policy(), prompts(5), return_predictions=False)
    path = tmp_path / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS and all(len(row["responses"]) == 2 for row in rows)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_predictions_appear_when_all_are_there(tmp_path):
    path = tmp_path / "answers" / "mine.jsonl"
    path.parent.mkdir()
    path.write_text("former\n")
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callbacks=[PredictionWriter(str(path)), Failing()]).predict(policy(), prompts(5), return_predictions=False)
    assert path.read_text() == "former\n"
    torch.manual_seed(0)
    trainer(tmp_path, callbacks=[PredictionWriter(str(path))]).predict(policy(), prompts(5), return_predictions=False)
    assert len(path.read_text().splitlines()) == len(PROMPTS)
