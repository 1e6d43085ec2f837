"""What a run shows on a terminal: the plan that it then keeps, a bar with the figures that matter, no advertising; elsewhere nothing."""

import os
import pty
import re
import subprocess
import sys

import lightning.pytorch as L
import pytest
from _pytest.capture import CaptureIO

from p3o_lightning.commands import progress
from p3o_lightning.commands.plan import amount
from tests.tiny import policy, prompts, trainer

DEBUG = {stage: f"configs/debug/{stage}.yaml" for stage in ("sft", "reward", "policy")}
ADVERTISING = ("litlogger", "LitLogger", "litmodels", "Tip:", "GPU available", "TPU available", "`Trainer.fit` stopped", "Seed set")


def fit(stage, *more):
    return "fit", "--config", DEBUG[stage], "--trainer.default_root_dir", "run", *more


def plain(text: str) -> str:
    """Without what moves the cursor or sets a colour."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.fixture
def terminal(monkeypatch):
    """Standard output as on a terminal of 120 columns."""
    monkeypatch.setattr(CaptureIO, "isatty", lambda self: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("stage", "more", "plan"),
    [
        (
            "sft",
            ["--trainer.max_steps", "4"],
            ["SupervisedPolicy: 104 rows / 8 rows an update = 13 updates an epoch", "4 updates in all, 0.308 epochs"],
        ),
        (
            "reward",
            ["--trainer.max_steps=-1", "--trainer.max_epochs", "1", "--trainer.accumulate_grad_batches", "2"],
            ["RewardModel: 112 pairs / 16 pairs an update = 7 updates an epoch", "7 updates in all, 1 epochs"],
        ),
        (
            "policy",
            ["--trainer.max_steps=-1", "--trainer.max_epochs", "1", "--model.num_generations", "3", "--data.batch_size", "36"],
            [
                "PairwisePolicy: 108 prompts x 3 responses x 2 passes / 4 prompts an update = 54 updates an epoch",
                "54 updates in all, 1 epochs; a rollout is 36 prompts",
            ],
        ),
    ],
)
def test_the_plan_is_what_is_then_done(p3o, terminal, stage, more, plan):
    run = p3o.built(*fit(stage, *more))
    out, err = p3o.capsys.readouterr()
    lines = plain(out).splitlines()
    lines = lines[lines.index(plan[0]) :]  # before it, Lightning's trial of the validation
    assert lines[:2] == plan
    assert run.trainer.global_step == int(plan[1].split()[0].replace(",", ""))
    if run.trainer.max_steps < 0:
        assert run.trainer.global_step == int(re.search(r"= ([\d,]+) updates", plan[0])[1])
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    assert lines[2] == f"training {trained:,} of {trained:,} parameters on cpu, precision 32-true"
    from p3o_lightning.commands.plan import Plan

    assert lines[3].startswith(f"memory: about {amount(Plan(run.settings).estimate.peak)} of ")
    assert err.splitlines()[-1].startswith("exported to ")


FIGURES = {"sft": ["loss"], "reward": ["loss", "accuracy", "margin"], "policy": ["score", "margin", "kl"]}


@pytest.mark.parametrize("stage", DEBUG)
def test_the_bar_names_the_stage_and_shows_its_figures(p3o, terminal, stage):
    shown = p3o(*fit(stage, "--trainer.max_steps", "4"))
    assert shown.code == 0, shown
    bar = shown.out[shown.out.index("memory:") :].splitlines()[1:]
    text = " ".join(" ".join(bar).split())
    assert {"sft": "SupervisedPolicy", "reward": "RewardModel", "policy": "PairwisePolicy"}[stage] in text
    assert "4/4" in text and re.search(r"0:00:\d\d, 0:00:00 left", text)
    assert all(re.search(rf"{name}: -?\d", text) for name in FIGURES[stage])
    assert re.search(r"tokens/s: [1-9]", text)
    assert "v_num" not in text and not any(word in shown.out + shown.err for word in ADVERTISING)


def test_a_resumed_run_counts_on(p3o, terminal):
    assert p3o(*fit("sft", "--trainer.max_steps", "4")).code == 0
    shown = p3o(*fit("sft", "--trainer.max_steps", "6", "--ckpt_path", "last"))
    assert "6/6" in shown.out and "resumed from step 4" in shown.out


def test_quiet_on_a_terminal_is_quiet(p3o, terminal):
    assert p3o(*fit("policy", "--trainer.max_steps", "2", "--quiet")) == (0, "", "")
    assert p3o(*fit("policy", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false")).out == ""


def test_where_there_is_no_estimate_its_line_is_missing(p3o, terminal, monkeypatch):
    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr("p3o_lightning.commands.plan.Plan", fails)
    shown = p3o(*fit("sft", "--trainer.max_steps", "2"))
    assert shown.code == 0 and "memory" not in shown.out and "training 66,576" in shown.out


def test_a_real_terminal(tmp_path):
    """The whole command behind a pseudo-terminal, as a user has it."""
    ours, theirs = pty.openpty()
    given = [sys.executable, "-m", "p3o_lightning.cli", *fit("policy", "--trainer.max_steps", "8")]
    environment = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(given, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment, close_fds=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    text = plain(shown.decode())
    lines = [" ".join(line.split()) for line in re.split("[\r\n]+", text)]
    assert lines[0].startswith("data: 120 rows")
    assert any(line.startswith("PairwisePolicy: 104 prompts x 2 responses") for line in lines), lines
    assert any(re.match(r"PairwisePolicy \S+ 8/8 .* left score: .* margin: .* kl: .* tokens/s: \d", line) for line in lines), lines
    assert lines[-2].startswith("exported to ") or lines[-1].startswith("exported to ")
    assert not any(word in text for word in ADVERTISING)


# ---- speed and time left


def test_time_left_is_by_the_pace_of_this_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = progress.Pace()
    pace.begin(40)  # resumed there
    pace.total, pace.step, now[0] = 100, 40, 130.0
    assert pace.passed_and_left() == (30.0, None)  # nothing done yet
    pace.step = 50
    assert pace.passed_and_left() == (30.0, 150.0)  # 10 updates in 30 seconds, 50 to go
    pace.count(600)
    assert pace.tokens_a_second() == 20.0
    assert str(progress.TimeLeft(pace).render(None)) == "0:00:30, 0:02:30 left"
    pace.total = float("inf")
    assert str(progress.TimeLeft(pace).render(None)) == "0:00:30"


def test_tokens_of_a_policy_are_those_that_it_has_written(tmp_path):
    bar, written = progress.Progress(), []

    class Counting(L.Callback):
        def on_rollout_end(self, trainer, pl_module, prompts, experience):
            written.append(float(experience.completion_mask.sum()))
            bar.on_rollout_end(trainer, pl_module, prompts, experience)

    module = policy(num_iterations=3)
    run = trainer(tmp_path, callbacks=[Counting()], max_steps=6)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    assert len(written) == 2 and float(bar.pace.tokens) == sum(written)
