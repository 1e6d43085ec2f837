"""The dashboard, read back from the event file: what each observer writes is what happened, and a resumed run writes the same."""

from __future__ import annotations

import csv
import html
import io
import re
import struct
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from running import scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny import PROMPTS, Recorder, equal, letters, policy, prompts, share_of_a, trainer, weights

from p3o_lightning import InputError, callbacks
from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.callbacks import Dashboard, FrontierPath, Reliability, RewardGap, SampleTable, observers
from p3o_lightning.metrics import PairReport

EVERYTHING = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}
DEBUG = {stage: f"configs/debug/{stage}.yaml" for stage in ("sft", "reward", "policy", "direct")}


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance=EVERYTHING)
    found.Reload()
    return found


def fit(root, *attached, logger=None, **settings):
    flags = {name: settings.pop(name) for name in ("max_steps", "log_every_n_steps", "ckpt_path") if name in settings}
    path = flags.pop("ckpt_path", None)
    board = TensorBoardLogger(root, name="logs", version=0, default_hp_metric=False) if logger is None else logger
    module = policy(**settings)
    run = trainer(root, callbacks=list(attached), logger=board, **{"max_steps": 6, "log_every_n_steps": 1, **flags})
    run.fit(module, module.wrap_train_dataloader(prompts()), ckpt_path=path)
    return module, events(root / "logs/version_0") if (root / "logs/version_0").is_dir() else None


def texts(found: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors(f"{tag}/text_summary")]


def cells(table: str) -> list[list[str]]:
    """The rows below the heading, as read by a person: the prompt, then text, reward, KL, and what else there is, of both responses."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()[2:]]
    shown = []
    for prompt, *responses in rows:
        parts = [re.fullmatch(r"(.*)<br>\*\*reward (\S+), KL ([^,*]+)(?:, (.*))?\*\*", cell).groups() for cell in responses]
        shown.append([html.unescape(value) for value in (prompt, *(value for part in parts for value in part if value is not None))])
    return shown


# ------------------------------------------------------------------------------------------------ samples


def test_samples_show_what_was_drawn_with_its_reward_and_kl(tmp_path):
    _, found = fit(tmp_path, SampleTable(every_n_steps=3, rows=4))
    tables = texts(found, "samples")
    assert [step for step, _ in tables] == [0, 3]  # one update a rollout
    logged = {event.step: event.value for event in found.Scalars("objective/kl")}
    for step, table in tables:
        rows = cells(table)
        assert len(rows) == 4 and {row[0] for row in rows} <= set(PROMPTS)
        for _, best, best_reward, _, worst, worst_reward, _ in rows:
            for text, reward in ((best, best_reward), (worst, worst_reward)):
                assert float(reward) == pytest.approx(share_of_a(completions=[text])[0], abs=1e-3)
            assert float(best_reward) >= float(worst_reward)
        kls = [float(row[place]) for row in rows for place in (3, 6)]  # all prompts, both responses: the rollout's mean
        assert sum(kls) / len(kls) == pytest.approx(logged[step], abs=0.006)
    assert all(row[3] == row[6] == "0.00" for row in cells(tables[0][1])) and logged[3] != 0


def experience(scores=None, gaps=None, count=3):
    """Prompts "ab" and "c"; responses of single letters a, b, c, ... in their order, 1, 2, 3, ... nats from the reference."""
    tokens = torch.arange(count).view(1, count, 1).expand(2, -1, -1)
    logps = torch.arange(1.0, count + 1).view(1, count, 1).expand(2, -1, -1)
    mask = torch.ones(2, count, 1, dtype=torch.bool)
    prompt = torch.zeros(2, 1, dtype=torch.long)
    return Experience(prompt, prompt.bool(), tokens, mask, logps, torch.zeros_like(logps), scores, gaps)


def table_of(experience, given=("ab", "c"), tokenizer=None, **settings):
    return cells(SampleTable(**settings).table(tokenizer or letters(), PromptBatch(None, None, list(given), {}), experience))


def test_of_many_responses_the_best_and_the_worst_are_shown():
    shown = table_of(experience(scores=torch.tensor([[0.5, -2.0, 1.25], [3.0, 3.0, 3.0]])))
    assert shown == [["ab", "c", "1.250", "3.00", "b", "-2.000", "2.00"], ["c", "a", "3.000", "1.00", "c", "3.000", "3.00"]]


def test_what_a_reward_function_notes_is_a_column_more():
    extra = {"why": ["a1", "b1", "c|1", "a2", "b2", "c2"]}  # prompt by prompt
    table = SampleTable().table(
        letters(), PromptBatch(None, None, ["ab", "c"], {}), experience(scores=torch.tensor([[0.0, 1, 2], [2, 1, 0]])), extra
    )
    assert [(row[4], row[8]) for row in cells(table)] == [("why c|1", "why a1"), ("why a2", "why c2")]


def test_the_policy_hands_them_over(tmp_path):
    def noting(completions, log_extra, **_):
        log_extra("length", [len(text) for text in completions])
        return [0.0] * len(completions)

    _, found = fit(tmp_path, SampleTable(), reward_funcs=noting, max_steps=1)
    assert all((row[4], row[8]) == (f"length {len(row[1])}", f"length {len(row[5])}") for row in cells(texts(found, "samples")[0][1]))


def test_a_judge_that_compares_is_shown_by_its_mean_gap():
    gaps = torch.tensor([[[0.0, 3.0, -1.5], [-3.0, 0.0, 0.0], [1.5, 0.0, 0.0]]]).expand(2, -1, -1)
    assert table_of(experience(gaps=gaps))[0] == ["ab", "a", "0.500", "1.00", "b", "-1.000", "2.00"]


def test_messages_are_shown_after_their_roles_and_long_texts_are_cut():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x" * 50}]
    (row, _) = table_of(experience(scores=torch.zeros(2, 3)), [messages, "c"], max_characters=30)
    assert row[0] == "system: Be brief.<br>user: xxxxxx... (44 more characters)"


HOSTILE = "<script>document.title='x'</script> | [a](javascript:alert(1)) <img src=x onerror=alert(1)>\n\x1b[31m **b** `c`"


def test_a_hostile_response_stays_in_its_cell():
    class Hostile:
        def decode(self, *_, **__):
            return HOSTILE

    table = SampleTable().table(Hostile(), PromptBatch(None, None, [HOSTILE, "c"], {}), experience(scores=torch.zeros(2, 3)))
    assert all(len(line.strip("|").split("|")) == 3 for line in table.splitlines())
    rest = re.sub(r"\*\*reward \S+, KL \S+\*\*", "", "\n".join(table.splitlines()[2:]))
    assert not re.search(r"<(?!br>)|\[|\*|`|\x1b", rest)


# ------------------------------------------------------------------------------------------------ histograms


def spread(found: EventAccumulator, tag: str):
    return [(event.step, event.histogram_value) for event in found.Histograms(tag)]


def test_histograms_are_of_all_pairs_responses_and_updates_of_a_rollout(tmp_path):
    settings = {"num_generations": 3, "num_iterations": 2, "micro_batch_size": 2, "max_steps": 8, "kl_coef": 0.3}
    _, found = fit(tmp_path, RewardGap(every_n_steps=4), **settings)  # 4 prompts, 4 updates a rollout
    q, ratio, length = (spread(found, f"histograms/{name}") for name in ("q", "ratio", "length"))
    assert [step for step, _ in q] == [step for step, _ in length] == [0, 4] and [step for step, _ in ratio] == [3, 7]
    for place in (0, 1):
        assert q[place][1].num == 4 * 3 and length[place][1].num == 4 * 3 and ratio[place][1].num == 2 * 4 * 3
    mean_length = {event.step: event.value for event in found.Scalars("completions/mean_length")}
    assert [value.sum / value.num for _, value in length] == pytest.approx([mean_length[0], mean_length[4]])
    assert length[0][1].max == {event.step: event.value for event in found.Scalars("completions/max_length")}[0]
    first = found.Scalars("val/ratio")  # mean over a micro-batch, each of as many responses
    means = [sum(event.value for event in first[place : place + 4]) / 4 for place in (0, 4)]
    assert [value.sum / value.num for _, value in ratio] == pytest.approx(means, rel=1e-5)
    assert ratio[0][1].max > 1.001


def test_q_has_kl_in_it_as_the_loss_has(tmp_path):
    """On-policy, the loss's own mean of q, and of its square by the histogram's."""
    _, found = fit(tmp_path, RewardGap(every_n_steps=1), kl_coef=0.3)  # one update a rollout, on all of it
    logged = {event.step: event.value for event in found.Scalars("p3o/q_mean")}
    size = {event.step: event.value for event in found.Scalars("p3o/q_abs")}
    shown = spread(found, "histograms/q")
    assert len(shown) == 6
    for step, value in shown:
        assert value.sum / value.num == pytest.approx(logged[step], abs=1e-5)
        assert value.sum_squares / value.num >= size[step] ** 2 - 1e-6
    assert max(abs(value) for value in logged.values()) > 1e-3


def test_without_scores_and_gaps_there_is_no_q():
    assert callbacks.gaps.shaped_gaps(experience(), 0.1) is None
    gaps = torch.tensor([[[0.0, 3.0], [-3.0, 0.0]], [[0.0, 1.0], [-1.0, 0.0]]])
    assert callbacks.gaps.shaped_gaps(experience(gaps=gaps, count=2), 0.5).tolist() == [3.5, 1.5]  # KL 1 and 2 nats: 3 - 0.5 (1 - 2)


# ------------------------------------------------------------------------------------------------ the path, reliability


def pixels(event) -> bytes:
    assert event.encoded_image_string[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", event.encoded_image_string[16:24])
    assert (width, height) == (event.width, event.height) and width >= 400
    return event.encoded_image_string


def test_the_path_is_that_of_the_scalars(tmp_path):
    path = FrontierPath(every_n_steps=2)
    _, found = fit(tmp_path, path)
    kl, reward = ([event.value for event in found.Scalars(f"objective/{name}")] for name in ("kl", "scores"))
    assert torch.tensor(path.path).flatten().tolist() == pytest.approx([value for dot in zip(kl, reward, strict=True) for value in dot])
    images = found.Images("kl_reward_path")
    assert [image.step for image in images] == [2, 4, 6] and len({pixels(image) for image in images}) == 3
    dots = path.draw().axes[0].collections[0].get_offsets()
    assert [tuple(dot) for dot in dots.tolist()] == path.path


def test_one_rollout_is_no_path(tmp_path):
    _, found = fit(tmp_path, FrontierPath(), max_steps=1)
    assert found.Tags()["images"] == []


def test_reliability_is_how_often_it_is_right_where_it_is_so_sure():
    report = PairReport()
    gaps = torch.tensor([3.0, 3.0, 3.0, -3.0, 0.5, -0.5])  # sigmoid(3) = 0.953, right 3 of 4; sigmoid(0.5) = 0.622, right 1 of 2
    report.update(torch.stack([gaps, torch.zeros(6)], 1), torch.ones(6, 2, dtype=torch.long))
    axes = Reliability().draw(report).axes[0]
    dots = axes.collections[-1].get_offsets()
    assert dots.tolist() == [pytest.approx([0.6225, 0.5], abs=1e-4), pytest.approx([0.9526, 0.75], abs=1e-4)]


def test_a_reward_model_is_drawn_after_every_validation(p3o):
    run = p3o("fit", "--config", DEBUG["reward"], "--trainer.default_root_dir", "run", "--trainer.val_check_interval", "5")
    assert run.code == 0, run
    found = events(p3o.folder / "run/logs/version_0")
    assert [image.step for image in found.Images("reliability")] == [event.step for event in found.Scalars("val/ece")] != []
    pixels(found.Images("reliability")[0])


# ------------------------------------------------------------------------------------------------ layout, hyperparameters


def run_stage(p3o, stage, *more):
    short = ["--trainer.max_steps", "8", "--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "1"]
    given = ["--trainer.default_root_dir", "run", "--finite.action", "skip", *short, *more]
    ended = p3o("fit", "--config", DEBUG[stage], *given)
    assert ended.code == 0, ended
    return events(p3o.folder / "run/logs/version_0")


@pytest.mark.parametrize("stage", DEBUG)
def test_every_chart_has_its_tags(p3o, stage):
    found = run_stage(p3o, stage)
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [group.title for group in layout.category] == [
        "1. Is it learning?",
        "2. Is it safe?",
        "3. Is it consistent?",
        "4. Is it fast?",
    ]
    logged = found.Tags()["scalars"]
    for group in layout.category:
        for chart in group.chart:
            margins = [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
            assert not set(margins) - set(logged), chart.title
            assert all(any(re.match(tag, name) for name in logged) for tag in chart.multiline.tag), chart.title
            assert not any(re.match(tag, "some/" + name) for tag in chart.multiline.tag for name in logged), "a tag within another's name"


def session(found: EventAccumulator, which: str):
    content = found.SummaryMetadata(f"_hparams_/{which}").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_runs_compare_by_settings_and_latest_results(p3o):
    sources = "[p3o_lightning.rewards.share_of_letter_e, watched_reward.gold]"
    (p3o.folder / "watched_reward.py").write_text(
        "def gold(prompts, completions, **_):\n    return [float(len(text)) for text in completions]\n"
    )
    found = run_stage(p3o, "policy", "--model.reward_funcs", sources, "--model.reward_weights", "[1, 0]", "--model.kl_coef", "0.25")
    settings = session(found, "session_start_info").session_start_info.hparams
    assert settings["model/kl_coef"].number_value == 0.25 and settings["model/clipping"].string_value == "joint"
    assert settings["trainer/max_steps"].number_value == 8 and settings["data/batch_size"].number_value == 8
    columns = session(found, "experiment").experiment
    shown_first = {item.name for item in columns.hparam_infos if item.differs}
    assert shown_first >= {"model/kl_coef", "model/lr", "model/reward_funcs"} and "model/temperature" not in shown_first
    assert not [name for name in settings if name.startswith(("model/_", "data/_"))]
    shown = [item.name.tag for item in columns.metric_infos][:5]  # those that TensorBoard shows unasked
    assert shown[:4] == ["objective/scores", "objective/kl", "rewards/share_of_letter_e/mean", "rewards/gold/mean"]
    results = {item.name.tag for item in columns.metric_infos}
    assert results >= {"objective/scores", "objective/kl", "val/scores", "val/kl", "rewards/gold/mean"}
    assert results <= set(found.Tags()["scalars"])  # the tab shows the latest value of each
    assert not any(event.value == 0 and event.step == 0 for event in found.Scalars("rewards/gold/mean"))  # no made-up first value
    assert session(found, "session_end_info").session_end_info.status == 1  # success


def test_the_learning_rate_is_that_of_the_update(tmp_path):
    schedule = {"lr": 0.1, "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}
    _, found = fit(tmp_path, Dashboard(), **schedule)
    assert [event.value for event in found.Scalars("lr")] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


# ------------------------------------------------------------------------------------------------ `p3o fit`, and any logger


def everything(folder) -> dict[str, list]:
    """All that the dashboard shows, in plain values."""
    found = events(folder)
    tags = found.Tags()
    shown: dict[str, list] = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags["scalars"]}
    shown |= {tag: [(event.step, str(event.histogram_value)) for event in found.Histograms(tag)] for tag in tags["histograms"]}
    shown |= {tag: [(event.step, event.encoded_image_string) for event in found.Images(tag)] for tag in tags["images"]}
    shown["samples"] = texts(found, "samples")
    return shown


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


@pytest.mark.parametrize("stop", [4, 10])  # at the end of a rollout, and within one
def test_a_resumed_run_shows_what_the_uninterrupted_one_does(p3o, monkeypatch, stop):
    monkeypatch.setattr(callbacks, "observers", lambda: [Dashboard(), SampleTable(4, rows=2), RewardGap(6), FrontierPath(5)])
    monkeypatch.setattr("p3o_lightning.commands.trainer.observers", callbacks.observers)

    def run(root, end, *more):
        given = ["fit", "--config", DEBUG["policy"], "--trainer.default_root_dir", root, "--trainer.max_steps", end, *more]
        assert p3o(*given).code == 0

    run("whole", 16)
    run("cut", stop)
    for file in (p3o.folder / "cut/logs/version_0").glob("events.*"):  # a dashboard reads by name, which begins with the second
        file.rename(file.with_name(file.name.replace("tfevents.1", "tfevents.0", 1)))
    run("cut", 16, "--ckpt_path", "last")
    whole, cut = (everything(p3o.folder / name / "logs/version_0") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and len(whole["samples"]) == 4 and len(whole["histograms/ratio"]) == 2
    assert not [tag for tag in whole if whole[tag] != cut[tag]]
    whole_rows, cut_rows = (rows_of(p3o.folder / name / "logs/version_0/metrics.csv") for name in ("whole", "cut"))
    assert cut_rows == whole_rows and [int(row["step"]) for row in whole_rows] == list(range(16))


def test_csv_has_the_scalars(p3o):
    assert p3o("fit", "--config", DEBUG["policy"], "--trainer.default_root_dir", "run", "--trainer.max_steps", "8").code == 0
    rows, shown = rows_of(p3o.folder / "run/logs/version_0/metrics.csv"), scalars(p3o.folder / "run/logs/version_0", clock=True)
    columns = set().union(*rows) - {"step"}
    assert columns == shown.keys()
    for tag in columns:
        assert [(int(row["step"]), pytest.approx(float(row[tag]), rel=1e-6)) for row in rows if tag in row] == shown[tag], tag


def test_rows_after_the_checkpoint_of_a_killed_run_are_dropped_and_so_is_half_a_row(p3o):
    given = ["fit", "--config", DEBUG["sft"], "--trainer.default_root_dir", "run", "--trainer.log_every_n_steps", "1"]
    assert p3o(*given, "--trainer.max_steps", "3").code == 0
    path = p3o.folder / "run/logs/version_0/metrics.csv"
    header, *rows = path.read_text().splitlines()
    later = dict(zip(header.split(","), rows[-1].split(","), strict=True), step="3", loss="99")
    path.write_text("\n".join([header, *rows, ",".join(later.values()), "1,2."]))
    assert p3o(*given, "--trainer.max_steps", "5", "--ckpt_path", "last").code == 0
    assert [row["step"] for row in rows_of(path)] == ["0", "1", "2", "3", "4"]
    assert all(float(row["loss"]) < 99 for row in rows_of(path))


def test_a_fit_has_the_observers_and_takes_its_own_instead(p3o):
    more = ["--trainer.max_steps", "8", "--trainer.callbacks+=SampleTable", "--trainer.callbacks.every_n_steps=1"]
    more += ["--trainer.callbacks.rows=1", "--trainer.callbacks+=BestAtKL", "--trainer.callbacks.max_kl=10"]
    run = p3o.built("fit", "--config", DEBUG["policy"], "--trainer.default_root_dir", "run", *more)
    kinds = [type(item).__name__ for item in run.trainer.callbacks]
    assert all(kinds.count(type(item).__name__) == 1 for item in observers()) and "BestAtKL" in kinds
    tables = texts(events(p3o.folder / "run/logs/version_0"), "samples")
    assert [step for step, _ in tables] == [0, 4] and all(len(cells(table)) == 1 for _, table in tables)


@pytest.mark.parametrize("logger", ["none", "csv", "other", "two"])
def test_any_logger_will_do_and_training_is_the_same(logger, tmp_path):
    given = {
        "none": False,
        "csv": CSVLogger(tmp_path),
        "other": Recorder(),
        "two": [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="logs", version=0)],
    }[logger]
    watched, found = fit(tmp_path, *observers(), SampleTableEvery(), logger=given, num_iterations=2)
    alone, _ = fit(tmp_path / "alone", logger=False, num_iterations=2)
    assert equal(weights(watched), weights(alone))
    assert (found is not None) == (logger == "two") and (found is None or "samples/text_summary" in found.Tags()["tensors"])


class SampleTableEvery(SampleTable):
    """At every rollout; another class than the default one, so that both may be attached."""

    def __init__(self):
        super().__init__(every_n_steps=1)


def test_without_matplotlib_all_but_the_figures_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.pictures, "can_draw", lambda: False)
    _, found = fit(tmp_path, *observers())
    assert found.Tags()["images"] == [] and found.Tags()["histograms"] != []


def test_an_observer_of_the_users_own_sees_every_rollout(tmp_path):
    seen = []

    class Mine(L.Callback):
        def on_rollout_end(self, trainer, pl_module, prompts, experience):
            assert len(prompts.prompts) == len(experience.scores) == 4
            seen.append((trainer.global_step, pl_module.state.rollouts))

    fit(tmp_path, Mine(), logger=False, num_iterations=2)
    assert [step for step, _ in seen] == [0, 2, 4]


@pytest.mark.parametrize("owner", [SampleTable, RewardGap, FrontierPath])
def test_an_interval_below_one_is_refused(owner):
    with pytest.raises(InputError, match=rf"{owner.__name__}.every_n_steps is 0: choose at least 1 update"):
        owner(every_n_steps=0)


def test_reading_a_picture_needs_no_screen(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    path = FrontierPath()
    path.path = [(0.0, 1.0), (0.5, 2.0)]
    kept = io.BytesIO()
    path.draw().savefig(kept)
    assert kept.getvalue()[:4] == b"\x89PNG"
