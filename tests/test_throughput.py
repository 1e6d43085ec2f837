"""What `Throughput` logs, read back from the event file, and the phases in Lightning's own profiler."""

import time

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from running import scalars

from p3o_lightning import PairwisePolicy, PreferenceDataModule, SupervisedPolicy
from p3o_lightning.callbacks import Throughput
from p3o_lightning.callbacks.throughput import peak_memory
from tests.tiny import LLAMA, Recorder, collate, equal, letters, policy, preferences, prompts, trainer, weights

PARTS = ["generation", "scoring", "update", "other"]


class Clock:
    """Time passes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def run(root, module, **flags):
    recorder = Recorder()
    trainer(root, callbacks=[Throughput()], logger=recorder, log_every_n_steps=1, **flags).fit(
        module, module.wrap_train_dataloader(prompts())
    )
    rows = [(step, row) for step, row in recorder.rows if "throughput/tokens_per_second" in row]
    made = [(step, row) for step, row in recorder.rows if "completions/mean_length" in row]
    return rows, made


def test_the_parts_of_a_rollout_by_a_clock_of_our_own(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    class Slow(PairwisePolicy):
        """Five seconds of an update."""

        def training_step(self, *given):
            clock.now += 5
            return super().training_step(*given)

    def reward(completions, **_):
        clock.now += 3
        return [float(len(text)) for text in completions]

    class Between(L.Callback):
        """Seven seconds between updates."""

        def on_train_batch_start(self, trainer, pl_module, *_):
            clock.now += 7

    module = policy(Slow, reward_funcs=reward, num_iterations=2)
    flags = {"logger": TensorBoardLogger(tmp_path, name="logs", version=0), "log_every_n_steps": 1, "max_steps": 6}
    trainer(tmp_path, callbacks=[Between(), Throughput()], **flags).fit(module, module.wrap_train_dataloader(prompts()))
    shown = scalars(tmp_path / "logs/version_0", clock=True)
    steps = [1, 3, 5]  # two updates a rollout
    for part, seconds in zip(PARTS, [0, 3, 10, 14], strict=True):
        assert shown[f"throughput/{part}_seconds"] == [(step, seconds) for step in steps], part
    lengths = [length for _, length in shown["completions/mean_length"]]
    speeds = [pytest.approx(8 * length / 27) for length in lengths]
    assert shown["throughput/tokens_per_second"] == list(zip(steps, speeds, strict=True)) and len(set(lengths)) > 1
    assert [step for step, mib in shown["throughput/peak_memory_mib"] if mib > 50] == steps


def test_what_is_sampled_and_scored_within_an_update_is_counted_once(tmp_path, monkeypatch):
    """By the start-up proofs, or by a callback: the parts still add up, and none is below 0."""
    clock = Clock(monkeypatch)

    def reward(completions, **_):
        clock.now += 3
        return [float(len(text)) for text in completions]

    class Looks(L.Callback):
        """Scores a rollout of its own at the end of every batch."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clock.now += 1
            pl_module.score(collate(["a", "bc"]), batch.completion_tokens[:2], batch.completion_mask[:2])

    module, recorder = policy(reward_funcs=reward), Recorder()
    flags = {"logger": recorder, "log_every_n_steps": 1, "max_steps": 2}
    trainer(tmp_path, callbacks=[Looks(), Throughput()], **flags).fit(module, module.wrap_train_dataloader(prompts()))
    rows = [row for _, row in recorder.rows if "throughput/tokens_per_second" in row]
    assert [[row[f"throughput/{part}_seconds"] for part in PARTS] for row in rows] == [[0, 6, 1, 0]] * 2


def test_sampling_and_log_probabilities_are_told_apart(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    module = policy(num_iterations=2)

    class Ticks(L.Callback):
        """A second for every forward of the policy and of the reference."""

        def on_fit_start(self, trainer, pl_module):
            for model in (pl_module.model, pl_module.reference):
                model.register_forward_pre_hook(self.tick)

        def tick(self, *_):
            clock.now += 1

    recorder = Recorder()
    run = trainer(tmp_path, callbacks=[Ticks(), Throughput()], logger=recorder, max_steps=4)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    _, row = [row for _, row in recorder.rows if "throughput/tokens_per_second" in row]
    lengths = [row["completions/max_length"] for _, row in recorder.rows if "completions/max_length" in row]
    assert row["throughput/generation_seconds"] == lengths[1]  # the prompt, then every token but the last
    assert row["throughput/scoring_seconds"] == 2  # old and reference
    assert row["throughput/update_seconds"] == 2 and row["throughput/other_seconds"] == 0


def test_it_changes_nothing_and_other_stages_have_it_too(tmp_path):
    one, other = policy(), policy()
    rows, _ = run(tmp_path / "one", one, max_steps=4)
    trainer(tmp_path / "other", max_steps=4).fit(other, other.wrap_train_dataloader(prompts()))
    assert equal(weights(one), weights(other)) and [step for step, _ in rows] == [0, 1, 2, 3]
    recorder = Recorder()
    module = SupervisedPolicy(LLAMA, tokenizer=letters())
    flags = {"logger": recorder, "log_every_n_steps": 2, "max_steps": 6}
    data = PreferenceDataModule(path=str(preferences(tmp_path)), batch_size=4)
    trainer(tmp_path / "sft", callbacks=[Throughput()], **flags).fit(module, data)
    rows = [(step, row) for step, row in recorder.rows if "throughput/tokens_per_second" in row]
    assert [step for step, _ in rows] == [1, 3, 5]
    assert "throughput/generation_seconds" not in rows[0][1] and rows[0][1]["throughput/tokens_per_second"] > 0


def test_lightnings_profiler_has_the_phases(tmp_path):
    profiler = SimpleProfiler()
    module = policy()
    trainer(tmp_path, max_steps=2, profiler=profiler).fit(module, module.wrap_train_dataloader(prompts()))
    assert len(profiler.recorded_durations["rollout/generation"]) == 2
    assert len(profiler.recorded_durations["rollout/scoring"]) >= 4


def test_the_peak_is_that_of_the_process():
    before = peak_memory(policy().device)
    assert before is None or 100 < before < 100_000
