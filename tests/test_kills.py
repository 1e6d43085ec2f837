"""Exact resume: a run that was killed, stopped, crashed or short of disk goes on as if nothing had happened, to the bit.

"As if nothing had happened" is the export byte for byte, every value of last.ckpt, and every scalar of the dashboard at its step, once.
The processes are real `p3o fit` commands where the test needs to kill one, and otherwise the same command within this process.

Proved by planting faults, each of which fails a test here: the pending experience or the price of KL not restored; last.ckpt written in
place, renamed before its update is logged or validated, or not written again after a validation; loggers not flushed before the rename;
no purge_step; a rollout begun before the former update is settled; Ctrl-C that leaves before its update is logged; a half-written file
left behind; the errors of a full disk passed on as they are.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from running import scalars

from p3o_lightning.models import read_checkpoint

COMMAND = [sys.executable, "-m", "p3o_lightning.cli"]
LIMIT = 600  # seconds that a process may take

SCHEDULE = "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 7, gamma: 0.9}}"
DROPOUT = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}  # 0.1 everywhere
OVERLAYS = {
    "sft": f"model: {{init_args: {{model: {json.dumps(DROPOUT)}, {SCHEDULE}}}}}\ntrainer: {{val_check_interval: 5}}\n",
    "reward": f"model: {{init_args: {{{SCHEDULE}}}}}\n",  # validation at the end of an epoch
    "policy": "model: {init_args: {kl_target: 0.05, kl_horizon: 200}}\ntrainer: {val_check_interval: 13}\n",
}
EVERY = {"sft": 4, "reward": 3, "policy": 3}  # updates between two saves; a rollout makes 4
EPOCH = {"sft": 13, "reward": 13, "policy": 52}
"""Updates of an epoch: 108 rows, 8 of them a batch; 13 rollouts."""


def arguments(stage: str, root: str, steps: int, *more: object) -> list[str]:
    """Of a fit with all that a resume could spoil: validation, a schedule, dropout or an adaptive price of KL, epoch ends."""
    return [
        *("fit", "--config", f"configs/debug/{stage}.yaml", "--config", f"{stage}.yaml", "--trainer.default_root_dir", root),
        *("--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", str(EVERY[stage])),
        *map(str, more),
    ]


def overlays(folder: Path) -> None:
    for stage, text in OVERLAYS.items():
        (folder / f"{stage}.yaml").write_text(text)


def last(run: Path) -> Path:
    return run / "checkpoints/last.ckpt"


def step_of(run: Path) -> int:
    return read_checkpoint(last(run))["global_step"]


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested values differ; tensors to the bit."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [place for key in one for place in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        return [place for index, pair in enumerate(zip(one, other, strict=True)) for place in differences(*pair, f"{path}/{index}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [path]


def assert_same(whole: Path, again: Path, about: object = "") -> None:
    """The uninterrupted run and the resumed one."""
    assert (again / "export/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes(), about
    ours, theirs = read_checkpoint(last(again)), read_checkpoint(last(whole))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "p3o_experience"):
        assert (key in ours) == (key in theirs), about
        assert not differences(ours.get(key), theirs.get(key)), (key, differences(ours.get(key), theirs.get(key)), about)
    logged, expected = scalars(again / "logs/version_0"), scalars(whole / "logs/version_0")
    assert logged.keys() == expected.keys(), about
    for tag, rows in expected.items():
        assert logged[tag] == rows, (tag, sorted(set(logged[tag]) ^ set(rows))[:8], len(logged[tag]), len(rows), about)
    assert [path.name for path in (again / "logs").iterdir()] == ["version_0"], about


# ------------------------------------------------------------------------------------------------ stopped from within

STOPPING = '''
import os, signal
import lightning.pytorch as L


class Stop(L.Callback):
    """Signals itself in the middle of an update."""

    def __init__(self, number: int, update: int):
        self.number, self.update = number, update

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.update - 1:
            os.kill(os.getpid(), self.number)
'''


@pytest.fixture
def signals():
    """Lightning ignores Ctrl-C for good once it has seen one: give it back to the tests that follow."""
    yield signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stopping(number: int, update: int) -> list[str]:
    return ["--trainer.callbacks+=stopping.Stop", f"--trainer.callbacks.number={int(number)}", f"--trainer.callbacks.update={update}"]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The uninterrupted run of a stage, made when asked for."""
    made: dict[str, Path] = {}

    def whole(p3o, stage: str) -> Path:
        if stage not in made:
            root = tmp_path_factory.mktemp("whole") / "run"
            assert p3o(*arguments(stage, str(root), STEPS)).code == 0
            made[stage] = root
        return made[stage]

    return whole


def resumed(p3o, stage: str, saved: int, *more: object, root: str = "run") -> None:
    """To the end, from that step."""
    for events in (p3o.folder / root / "logs").glob("*/events.*"):  # a dashboard reads by name, which begins with the second
        events.rename(events.with_name(events.name.replace("tfevents.1", "tfevents.0", 1)))
    again = p3o(*arguments(stage, root, STEPS, *more, "--ckpt_path", "last"))
    assert again.code == 0 and again.out.startswith(f"resumed from step {saved} "), again


STOPS = {
    "sft": {"in an epoch": 7, "before a validation": 10, "at the end of an epoch": 13, "where it saves": 8},
    "reward": {"in an epoch": 7, "at the end of an epoch": 13, "where it saves": 9},
    "policy": {"in a rollout": 6, "before a rollout": 8, "before a validation": 13, "where it saves": 9},
}
STEPS = 18
QUICK = [
    (signal.SIGINT, "policy", "in a rollout"),
    (signal.SIGINT, "sft", "at the end of an epoch"),
    (signal.SIGTERM, "policy", "before a validation"),
    (signal.SIGTERM, "reward", "in an epoch"),
    (signal.SIGTERM, "sft", "where it saves"),
]


@pytest.mark.parametrize(
    ("number", "stage", "where"),
    [
        pytest.param(number, stage, where, marks=[] if (number, stage, where) in QUICK else pytest.mark.slow)
        for number in (signal.SIGINT, signal.SIGTERM)
        for stage in STOPS
        for where in STOPS[stage]
    ],
)
def test_a_run_that_was_told_to_stop(p3o, wholes, signals, number, stage, where):
    overlays(p3o.folder)
    (p3o.folder / "stopping.py").write_text(STOPPING)
    update = saved = STOPS[stage][where]
    stopped = p3o(*arguments(stage, "run", STEPS, *stopping(number, update)))
    assert stopped.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], stopped
    if number == signal.SIGTERM and (where == "before a validation" or (stage, where) == ("reward", "at the end of an epoch")):
        saved = (update - 1) // EVERY[stage] * EVERY[stage]  # Lightning breaks the validation off: the update is not over
    assert step_of(p3o.folder / "run") == saved
    assert stopped.err.splitlines()[-1].endswith(f"--ckpt_path last goes on from step {saved}")
    resumed(p3o, stage, saved)
    assert_same(wholes(p3o, stage), p3o.folder / "run")


def test_what_other_callbacks_keep_of_a_validation(p3o, signals):
    overlays(p3o.folder)
    (p3o.folder / "stopping.py").write_text(STOPPING)
    patient = [f"--trainer.callbacks{key}" for key in ("+=EarlyStopping", ".monitor=val/loss", ".mode=max", ".patience=9")]
    assert p3o(*arguments("sft", "whole", STEPS, *patient)).code == 0
    assert p3o(*arguments("sft", "run", STEPS, *patient, *stopping(signal.SIGINT, 10))).code == 130  # the second of three validations
    resumed(p3o, "sft", 10, *patient)
    kept, expected = (
        {name: state for name, state in read_checkpoint(last(p3o.folder / root))["callbacks"].items() if name.startswith("EarlyStopping")}
        for root in ("run", "whole")
    )
    assert not differences(kept, expected) and next(iter(expected.values()))["wait_count"] == 2, (kept, expected)


CRASHING = '''
import os
calls = []


def letter_e(completions, **_):
    """Fails at one call, as a service that cannot be reached would."""
    calls.append(1)
    if len(calls) == int(os.environ.get("FAILING_CALL", 0)):
        raise ConnectionError("mine")
    return [text.count("e") / max(len(text), 1) for text in completions]
'''


@pytest.mark.parametrize(
    ("call", "saved"),
    [(5, 8), (7, 12)],  # 2 check the validation, then one a rollout, at updates 0, 4, 8 and 12; the next one validates after 13
    ids=["in a rollout", "in a validation"],
)
def test_a_reward_function_that_raises(p3o, monkeypatch, tmp_path_factory, call, saved):
    overlays(p3o.folder)
    (p3o.folder / "crashing.py").write_text(CRASHING)
    mine = "--model.reward_funcs", "crashing.letter_e", "--checkpoint.every_n_steps", 1
    assert p3o(*arguments("policy", "whole", STEPS, *mine)).code == 0
    monkeypatch.delitem(sys.modules, "crashing")
    monkeypatch.setenv("FAILING_CALL", str(call))
    with pytest.raises(ConnectionError, match="mine"):
        p3o(*arguments("policy", "run", STEPS, *mine))
    monkeypatch.delenv("FAILING_CALL")
    resumed(p3o, "policy", saved, *mine)
    assert_same(p3o.folder / "whole", p3o.folder / "run")


@pytest.mark.parametrize(("stage", "end"), [("policy", "rollout"), ("sft", "epoch"), ("reward", "step")])
def test_a_run_that_was_over_and_goes_on(p3o, wholes, stage, end):
    """A higher max_steps than the run had."""
    overlays(p3o.folder)
    steps = {"epoch": 13, "rollout": 16, "step": 10}[end]
    assert p3o(*arguments(stage, "run", steps)).code == 0
    resumed(p3o, stage, steps)
    assert_same(wholes(p3o, stage), p3o.folder / "run")


# ------------------------------------------------------------------------------------------------ a save that fails

FAILING = '''
import os, resource, signal
import lightning.pytorch as L
import torch


class Full(L.Callback):
    """From an update on no file may grow beyond `room` bytes: what a full disk or a quota does."""

    def __init__(self, update: int, room: int):
        self.update, self.room = update, room

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.update - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Filled(L.Callback):
    """Fills the disk within an update, to the last byte but `room`."""

    def __init__(self, update: int, room: int):
        self.update, self.room = update, room

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.update - 1:
            disk = os.statvfs(trainer.default_root_dir)
            with open(os.path.join(trainer.default_root_dir, "filler"), "wb") as file:
                file.write(bytes(disk.f_bavail * disk.f_frsize - self.room))


class Killed(L.Callback):
    """Kills its own process at a place in the save that follows an update."""

    def __init__(self, update: int, place: str):
        self.update, self.place = update, place

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step != self.update - 1:
            return

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        def half(checkpoint, file):
            save(checkpoint, file)
            file.truncate(file.tell() // 2)
            die()

        save = torch.save
        if self.place == "within the file":
            torch.save = half
        elif self.place == "before the flush":
            os.fsync = die
        elif self.place == "before the rename":
            os.replace = die
        else:  # after it
            replace = os.replace
            os.replace = lambda *names: (replace(*names), die())
'''


@pytest.fixture
def room():
    """Files may grow again after the test."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def failing(name: str, update: int, **settings: Any) -> list[str]:
    given = {"update": update, **settings}
    return [f"--trainer.callbacks+=failing.{name}", *(f"--trainer.callbacks.{key}={value}" for key, value in given.items())]


@pytest.mark.parametrize(
    ("stage", "size", "key"),
    [
        ("sft", 400_000, "checkpoint.dirpath is 'run/checkpoints'"),  # torch and the closing of the file say it differently
        ("policy", 300_000, "checkpoint.dirpath is 'run/checkpoints'"),
        ("reward", 100, "trainer.default_root_dir is 'run'"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # a traceback, of the dashboard's thread
def test_a_quota_that_is_used_up(p3o, wholes, room, stage, size, key):
    overlays(p3o.folder)
    (p3o.folder / "failing.py").write_text(FAILING)
    update = 2 * EVERY[stage] - (size == 100)  # where it saves; the dashboard is written at every update
    message = p3o(*arguments(stage, "run", STEPS, *failing("Full", update, room=size))).error
    assert key in message and "File too large" in message and "make room" in message and "--ckpt_path last goes on" in message, message
    assert [path.name for path in (p3o.folder / "run/checkpoints").iterdir()] == ["last.ckpt"]
    room()
    resumed(p3o, stage, EVERY[stage])
    assert_same(wholes(p3o, stage), p3o.folder / "run")


@pytest.mark.parametrize("left", [100_000, 0])
def test_a_disk_that_is_full(p3o, wholes, small_disk, left):
    overlays(p3o.folder)
    (p3o.folder / "failing.py").write_text(FAILING)
    message = p3o(*arguments("policy", "disk/run", STEPS, *failing("Filled", 6, room=left))).error
    assert "'disk/run" in message and "No space left on device" in message and "make room" in message, message
    assert [path.name for path in (small_disk / "run/checkpoints").iterdir()] == ["last.ckpt"]
    (small_disk / "run/filler").unlink()
    resumed(p3o, "policy", 3, root="disk/run")
    assert_same(wholes(p3o, "policy"), small_disk / "run")


def test_no_checkpoint_yet_on_a_full_disk(p3o, room):
    overlays(p3o.folder)
    (p3o.folder / "failing.py").write_text(FAILING)
    message = p3o(*arguments("sft", "run", STEPS, *failing("Full", 2, room=400_000))).error
    assert message.endswith("nothing was saved yet.")
    room()
    assert "leave --ckpt_path out" in p3o(*arguments("sft", "run", STEPS, "--ckpt_path", "last")).error


@pytest.mark.parametrize("stage", ["policy", "reward"])
def test_an_export_that_does_not_fit(p3o, wholes, small_disk, stage):
    overlays(p3o.folder)
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 150_000))
    message = p3o(*arguments(stage, "run", STEPS, "--export.dirpath", "disk/export")).error
    assert "export.dirpath is " in message and "No space left on device" in message and "make room" in message, message
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    again = p3o(*arguments(stage, "run", STEPS, "--export.dirpath", "disk/export", "--ckpt_path", "last"))
    assert again.code == 0, again
    assert (small_disk / "export/model.safetensors").read_bytes() == (wholes(p3o, stage) / "export/model.safetensors").read_bytes()


def test_what_was_logged_is_written_before_the_checkpoint_counts(p3o, monkeypatch):
    """Some loggers hold it in memory; rollouts are logged at once, whatever log_every_n_steps."""
    overlays(p3o.folder)
    order: list[str] = []

    def noting(owner, name, word, counts=lambda *_: True):
        does = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: (counts(*given) and order.append(word), does(*given, **named))[1])

    noting(TensorBoardLogger, "log_metrics", "logged")
    noting(TensorBoardLogger, "save", "written")
    noting(os, "replace", "renamed", lambda *names: Path(names[-1]).name == "last.ckpt")
    assert p3o(*arguments("policy", "run", 9, "--trainer.log_every_n_steps", 50)).code == 0
    before = [list(taken) for renamed, taken in itertools.groupby(order, lambda word: word == "renamed") if not renamed][:3]
    assert order.count("renamed") == 3 and all(words[-1] == "written" for words in before), order
    assert any("logged" in words and words.count("written") == 1 for words in before), order  # not by Lightning, which writes what it logs


@pytest.mark.slow
@pytest.mark.parametrize("place", ["within the file", "before the flush", "before the rename", "after the rename"])
def test_a_kill_within_a_save(p3o, wholes, place):
    overlays(p3o.folder)
    (p3o.folder / "failing.py").write_text(FAILING)
    given = arguments("policy", "run", STEPS, *failing("Killed", 6, place=place))
    done = subprocess.run([*COMMAND, *given], cwd=p3o.folder, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == -signal.SIGKILL, done
    partial = p3o.folder / "run/checkpoints/.last.partial"
    assert partial.exists() == (place != "after the rename")
    resumed(p3o, "policy", 6 if place == "after the rename" else 3)
    assert not partial.exists()
    assert_same(wholes(p3o, "policy"), p3o.folder / "run")


@pytest.mark.parametrize("content", ["half", "zeros"])
def test_a_checkpoint_that_is_not_whole_is_refused(p3o, content):
    overlays(p3o.folder)
    assert p3o(*arguments("sft", "run", 4)).code == 0
    whole = last(p3o.folder / "run").read_bytes()
    last(p3o.folder / "run").write_bytes(whole[: len(whole) // 2] + (b"" if content == "half" else bytes(len(whole) - len(whole) // 2)))
    message = p3o(*arguments("sft", "run", 8, "--ckpt_path", "last")).error
    assert "'run/checkpoints/last.ckpt'" in message and "only a part" in message, message


# ------------------------------------------------------------------------------------------------ killed from without

PHASES = '''
import os
import lightning.pytorch as L
from p3o_lightning.rewards import share_of_letter_e


class Phases(L.Callback):
    """Notes in a file what the process is doing, so that a test can tell where it was killed."""

    def __init__(self):
        self.file = os.open("phase", os.O_RDWR | os.O_CREAT)

    def note(self, trainer, phase):
        os.pwrite(self.file, f"{trainer.global_step:>6} {phase:<12}".encode(), 0)

    def on_train_batch_start(self, trainer, *_):
        self.note(trainer, "update")

    def on_train_batch_end(self, trainer, *_):
        self.note(trainer, "between")

    def on_save_checkpoint(self, trainer, *_):
        self.note(trainer, "save")

    def on_update_settled(self, trainer, *_):
        self.note(trainer, "rollout" if trainer.global_step % 4 == 0 else "between")

    def on_validation_start(self, trainer, *_):
        self.note(trainer, "validation")

    def on_validation_end(self, trainer, *_):
        self.note(trainer, "between")

    def on_train_end(self, trainer, *_):
        self.note(trainer, "end")
'''


class Kill(NamedTuple):
    """Where a process was killed, and what the next one goes on from."""

    step: int
    phase: str
    saved: int
    partial: bool


class Killing:
    """Runs of one stage in folders of their own, killed and resumed."""

    seconds: float  # that an update takes, with its share of rollouts, validations and saves

    def __init__(self, folder: Path, stage: str, steps: int) -> None:
        self.folder, self.stage, self.steps = folder, stage, steps
        self.numbers = itertools.count()
        overlays(folder)
        (folder / "phases.py").write_text(PHASES)

    def start(self, root: str, *more: str) -> subprocess.Popen[str]:
        given = arguments(self.stage, root, self.steps, "--trainer.callbacks+=phases.Phases", *more)
        return subprocess.Popen(
            [*COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder, env={**os.environ}
        )

    @property
    def doing(self) -> tuple[int, str]:
        """Updates that the process has made, and what it is at."""
        step, phase = (self.folder / "phase").read_text().split()
        return int(step), phase

    def whole(self) -> Path:
        """The uninterrupted run."""
        process = self.start("whole")
        begun = wait_for(process, last(self.folder / "whole").exists)
        over = wait_for(process, lambda: self.doing[0] >= self.steps)
        said, _ = process.communicate(timeout=LIMIT)
        assert 0 < begun < over and process.returncode == 0, said
        self.seconds = (over - begun) / self.steps
        return self.folder / "whole"

    def chain(self, moments: list[tuple[int, float]]) -> tuple[Path, list[Kill]]:
        """One run, killed so many seconds after these updates, and resumed each time; at last to its end."""
        root = f"cut{next(self.numbers)}"
        run, kills = self.folder / root, []
        for update, delay in [*moments, (self.steps + 1, 0.0)]:
            (self.folder / "phase").write_text("0 start")
            process = self.start(root, *(("--ckpt_path", "last") if kills else ()))
            if wait_for(process, lambda update=update: last(run).exists() and self.doing[0] >= update):
                time.sleep(delay)
                process.kill()
            said, _ = process.communicate(timeout=LIMIT)
            if kills:
                assert said.splitlines()[0].startswith(f"resumed from step {kills[-1].saved} ("), said
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, said
            kills.append(Kill(*self.doing, step_of(run), (run / "checkpoints/.last.partial").exists()))
        return run, kills


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> float:
    """When it was ready; 0 if the process ended before."""
    while process.poll() is None:
        if ready():
            return time.monotonic()
        time.sleep(0.002)
    return 0.0


def kill_matrix(folder: Path, stage: str, steps: int, kills: int, a_chain: int, seed: int) -> list[Kill]:
    """As many random kills, spread over all of the run; every chain of them ends as the uninterrupted run did."""
    killing, draw, landed = Killing(folder, stage, steps), random.Random(seed), []
    whole = killing.whole()
    while len(landed) < kills:
        updates = sorted(draw.randint(EVERY[stage], steps - 8) for _ in range(a_chain))
        run, made = killing.chain([(update, draw.uniform(0, 6 * killing.seconds)) for update in updates])
        landed += made
        assert_same(whole, run, made)
    print(f"\n{stage}: {len(landed)} kills in a run of {steps} updates, {1000 * killing.seconds:.0f} ms each")
    for kill in landed:
        print(f"  at {kill.step:>4} {kill.phase:<10} resumed from {kill.saved:>4}{', beside a half-written one' * kill.partial}")
    assert all(0 < kill.saved <= kill.step for kill in landed)
    return landed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_that_were_told_to_stop(tmp_path, number):
    """By a signal to both, as a cluster or a terminal sends it: it finds them at different places, and they agree on where to stop."""
    overlays(tmp_path)
    over = {signal.SIGINT: 130, signal.SIGTERM: 143}[number]

    def start(root: str, steps: int, *more: str) -> subprocess.Popen[str]:
        given = arguments("policy", root, steps, "--trainer.strategy", "ddp", "--trainer.devices", 2, *more)
        return subprocess.Popen(
            [*COMMAND, *given], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    process = start("run", 100_000)
    assert wait_for(process, last(tmp_path / "run").exists)
    time.sleep(1)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    saved = step_of(tmp_path / "run")
    assert process.returncode == over and f"--ckpt_path last goes on from step {saved}" in said, said
    for root, more in (("run", ["--ckpt_path", "last"]), ("whole", [])):
        process = start(root, saved + 6, *more)
        said, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, said
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_random_kills(tmp_path):
    kill_matrix(tmp_path, "policy", steps=58, kills=3, a_chain=3, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize(("stage", "steps", "seed"), [("sft", 600, 1), ("reward", 600, 2), ("policy", 282, 3)])
def test_random_kills_of_every_stage(tmp_path, stage, steps, seed):
    landed = kill_matrix(tmp_path, stage, steps, kills=12, a_chain=4, seed=seed)
    assert len({kill.step for kill in landed}) >= 6  # they are spread out
