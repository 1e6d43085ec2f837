"""The `p3o` command: quick to answer, readable, resumable, with users' own classes; what it refuses is in test_bad_input.py."""

import inspect
import json
import logging
import signal
import subprocess
import sys
import time

import pytest
import yaml
from running import python, scalars
from safetensors.torch import load_file

import p3o_lightning
from p3o_lightning.commands import arguments, terminal, trainer

DEBUG = {stage: f"configs/debug/{stage}.yaml" for stage in ("sft", "reward", "policy")}
COMMAND = [sys.executable, "-m", "p3o_lightning.cli"]


def fit(stage="policy", root="run", *more):
    return "fit", "--config", DEBUG[stage], "--trainer.default_root_dir", root, *more


# ------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("given", [["--help"], [], ["--version"]])
def test_the_first_help_imports_nothing_heavy(given):
    heavy = {"torch", "transformers", "lightning", "jsonargparse", "numpy", "datasets", "yaml"}
    done = python(f"import sys, p3o_lightning.cli as cli; cli.main({given}); print('heavy:', {heavy} & set(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: set()\n")


def test_help_names_every_command(p3o):
    out = p3o("--help").out
    assert all(f"\n  {command} " in out for command in ("fit", "validate", "test", "predict", "demo", "doctor"))
    assert p3o("--version").out.strip() == p3o_lightning.__version__


def test_only_the_asked_subcommand_is_built(p3o, monkeypatch):
    built = []
    make = trainer.LightningCLI._prepare_subcommand_parser
    monkeypatch.setattr(
        trainer.LightningCLI,
        "_prepare_subcommand_parser",
        lambda self, klass, name, **rest: built.append(name) or make(self, klass, name, **rest),
    )
    assert p3o("fit", "--help").code == 0
    assert built == ["fit"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_begins_with_how_to_choose_the_class(p3o, command):
    shown = p3o(command, "--help")
    assert shown.code == 0
    top = "\n".join(shown.out.splitlines()[:16])
    assert all(f"\n  {stage.__name__} " in top for stage in arguments.STAGES)
    assert f"p3o {command} --model PairwisePolicy --help" in top
    assert "known subclasses" not in shown.out and ":class:" not in shown.out
    sections = [shown.out.index(f"\n{section}: ") for section in ("model", "data", "checkpoint", "export", "trainer")]
    assert sections == sorted(sections)


@pytest.mark.parametrize(
    "given", [["--model", "PairwisePolicy", "--help"], ["--model=PairwisePolicy", "-h"], ["--model.help", "PairwisePolicy"]]
)
def test_help_of_a_class(p3o, given):
    shown = p3o("fit", *given)
    assert shown.code == 0
    assert "--model.kl_coef" in shown.out and "price of leaving the reference" in shown.out
    assert "known subclasses" not in shown.out


@pytest.mark.parametrize("owner", [*arguments.STAGES, p3o_lightning.PreferenceDataModule])
def test_every_argument_of_a_class_is_documented(p3o, owner):
    key = "data" if owner is p3o_lightning.PreferenceDataModule else "model"
    shown = p3o("fit", f"--{key}", owner.__name__, "--help").out
    for name in inspect.signature(owner).parameters:
        assert f"--{key}.{name}" in shown
        assert f"\n    {name}: " in inspect.getdoc(owner), name


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("stage", DEBUG)
def test_print_config_feeds_back(p3o, stage):
    first = p3o("fit", "--config", DEBUG[stage], "--print_config")
    assert first.code == 0
    printed = yaml.safe_load(first.out)
    shipped = yaml.safe_load((p3o_lightning.shipped.shipped(DEBUG[stage])).read_text())
    assert printed["model"]["init_args"]["model"] == shipped["model"]["init_args"]["model"]  # a mapping, not its text
    (p3o.folder / "printed.yaml").write_text(first.out)
    assert p3o("fit", "--config", "printed.yaml", "--print_config").out == first.out


def test_overlays_and_flags(p3o):
    (p3o.folder / "one.yaml").write_text("model: {init_args: {kl_coef: 0.2, lr: 0.1}}\ntrainer: {max_steps: 3}\n")
    (p3o.folder / "two.yaml").write_text("model: {init_args: {kl_coef: 0.3}}\n")
    (p3o.folder / "list.yaml").write_text("model: {init_args: {reward_funcs: [a.b, c.d], reward_weights: [1, 2], peft_config: {r: 4}}}\n")
    layers = ["--config", DEBUG["policy"], "--config", "one.yaml", "-c", "two.yaml", "-c", "list.yaml"]
    printed = yaml.safe_load(p3o("fit", *layers, "--model.clip_range", "0.5", "--print_config").out)
    model = printed["model"]["init_args"]
    assert (model["kl_coef"], model["lr"], model["clip_range"], model["num_iterations"]) == (0.3, 0.1, 0.5, 2)
    assert (model["reward_funcs"], model["reward_weights"], model["peft_config"]) == (["a.b", "c.d"], [1.0, 2.0], {"r": 4})
    assert printed["trainer"]["max_steps"] == 3
    later = yaml.safe_load(p3o("fit", "--config", DEBUG["policy"], "--model.kl_coef", "0.1", "--print_config").out)
    assert later["model"]["init_args"]["kl_coef"] == 0.1


def test_no_config_is_needed(p3o):
    tiny = (
        "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1}"
    )
    run = p3o(
        *("fit", "--model", "SupervisedPolicy", "--model.model", tiny, "--model.tokenizer", "bytes"),
        *("--data.path", "configs/debug/preferences.jsonl", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"),
    )
    assert run.code == 0, run
    assert (p3o.folder / "runs" / "export" / "model.safetensors").is_file()


def test_classes_and_rewards_of_the_working_folder(p3o):
    (p3o.folder / "my_policy_file.py").write_text(
        "from p3o_lightning import PairwisePolicy\n\n"
        "class Mine(PairwisePolicy):\n"
        "    '''Mine.\n\n    Args:\n        twice: mine.\n    '''\n"
        "    def __init__(self, *args, twice: int = 1, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.twice = twice\n\n"
        "    def score(self, prompts, tokens, mask):\n"
        "        return self.twice * super().score(prompts, tokens, mask)\n"
    )
    (p3o.folder / "my_reward_file.py").write_text(
        "def length(prompts, completions, completion_ids, **columns):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    (p3o.folder / "mine.yaml").write_text(
        "model: {class_path: my_policy_file.Mine, init_args: {twice: 2, reward_funcs: my_reward_file.length}}\n"
    )
    run = p3o.built(*fit("policy", "run", "--config", "mine.yaml", "--trainer.max_steps", "2"))
    assert type(run.model).__name__ == "Mine" and run.model.twice == 2
    assert "rewards/length/mean" in scalars(p3o.folder / "run/logs/version_0")
    again = p3o("fit", "--config", "run/config.yaml", "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert again.code == 0 and "resumed from step 2" in again.out


def test_running_again_makes_a_new_version(p3o):
    assert p3o(*fit("sft", "run", "--trainer.max_steps", "2")).code == 0
    first = (p3o.folder / "run/export/model.safetensors").read_bytes()
    assert p3o("fit", "--config", "run/config.yaml").code == 0  # what it saved feeds back
    assert sorted(path.name for path in (p3o.folder / "run/logs").iterdir()) == ["version_0", "version_1"]
    assert (p3o.folder / "run/export/model.safetensors").read_bytes() == first
    assert sorted(path.name for path in (p3o.folder / "run").iterdir()) == ["checkpoints", "config.yaml", "export", "logs"]


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(("stage", "stop", "end"), [("sft", 5, 16), ("reward", 5, 16), ("policy", 6, 12)])
def test_a_resumed_run_equals_the_uninterrupted_one(p3o, stage, stop, end):
    whole = p3o(*fit(stage, "whole", "--trainer.max_steps", end, "--trainer.log_every_n_steps", 1))
    assert whole.code == 0, whole
    assert p3o(*fit(stage, "cut", "--trainer.max_steps", stop, "--trainer.log_every_n_steps", 1)).code == 0
    for events in (p3o.folder / "cut/logs/version_0").glob("events.*"):  # a dashboard reads by name, which begins with the second
        events.rename(events.with_name(events.name.replace("tfevents.1", "tfevents.0", 1)))
    resumed = p3o(*fit(stage, "cut", "--trainer.max_steps", end, "--trainer.log_every_n_steps", 1, "--ckpt_path", "last"))
    assert resumed.code == 0, resumed
    assert resumed.out.splitlines() == [f"resumed from step {stop} (cut/checkpoints/last.ckpt)"]
    weights, again = (load_file(p3o.folder / name / "export/model.safetensors") for name in ("whole", "cut"))
    assert weights.keys() == again.keys() and all(value.equal(again[name]) for name, value in weights.items())
    assert [path.name for path in (p3o.folder / "cut/logs").iterdir()] == ["version_0"]
    expected, logged = scalars(p3o.folder / "whole/logs/version_0"), scalars(p3o.folder / "cut/logs/version_0")
    assert logged == expected and len(expected["loss"]) == end
    assert yaml.safe_load((p3o.folder / "cut/config.yaml").read_text())["ckpt_path"] is None


def test_a_resumed_run_finds_its_own_logs(p3o):
    assert p3o(*fit("sft", "run", "--trainer.max_steps", "2")).code == 0
    (p3o.folder / "run/logs/version_1").mkdir()  # of a run that was killed before its first checkpoint
    assert p3o(*fit("sft", "run", "--trainer.max_steps", "3", "--ckpt_path", "last")).code == 0
    assert not any((p3o.folder / "run/logs/version_1").iterdir())


def test_flags_win_over_the_checkpoint(p3o):
    assert p3o(*fit("policy", "run", "--trainer.max_steps", "4")).code == 0
    more = ["--ckpt_path", "last", "--trainer.max_steps", "5", "--model.kl_coef", "0.5", "--model.clip_range", "0.1", "--model.lr", "0.25"]
    p3o.capsys.readouterr()
    run = p3o.built(*fit("policy", "run", *more, "--model.seed", "7"))
    assert run.model.state.kl_coef == 0.5 and run.model.clip_range == 0.1 and run.model.seed == 7
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    said = p3o.capsys.readouterr().out.splitlines()[1]
    assert said == "changed on resume: model.clip_range None -> 0.1, model.kl_coef 0.001 -> 0.5, model.seed 0 -> 7, model.lr 0.003 -> 0.25"


def test_a_changed_learning_rate_keeps_its_schedule(p3o):
    (p3o.folder / "schedule.yaml").write_text(
        "model:\n  init_args:\n    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.5}}\n"
        "    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 2, gamma: 0.1}}\n"
    )
    given = fit("sft", "run", "--config", "schedule.yaml")
    assert p3o(*given, "--trainer.max_steps", "3").code == 0
    changed = ["--model.optimizer.lr", "0.5", "--model.optimizer.momentum", "0.9"]
    run = p3o.built(*given, "--trainer.max_steps", "5", "--ckpt_path", "last", *changed)
    group = run.trainer.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(0.5 * 0.1**2) and group["momentum"] == 0.9


def test_what_a_resumed_run_cannot_use_is_refused(p3o):
    assert p3o(*fit("policy", "run", "--trainer.max_steps", "6")).code == 0  # a rollout makes 4 updates: inside one
    more = "--ckpt_path", "last", "--trainer.max_steps", "8"
    assert "stopped inside a rollout that was begun with 2" in p3o(*fit("policy", "run", *more, "--model.num_iterations", "1")).error
    assert "data.batch_size is 16" in p3o(*fit("policy", "run", *more, "--data.batch_size", "16")).error
    shape = "--model.model", "{model_type: llama, hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}"
    refused = p3o(*fit("policy", "run", *more, *shape)).error
    assert "model.reference differs" in refused or "do not fit this config's model" in refused


def test_an_adaptive_price_of_kl_is_state(p3o):
    adaptive = "--model.kl_target", "0.1", "--model.kl_horizon", "100"
    first = p3o.built(*fit("policy", "run", "--trainer.max_steps", "8", *adaptive))
    price = first.model.state.kl_coef
    assert price != 0.001
    more = "--ckpt_path", "last", "--trainer.max_steps", "9"
    assert "model.kl_coef is 0.5, but with model.kl_target" in p3o(*fit("policy", "run", *adaptive, *more, "--model.kl_coef", "0.5")).error
    fixed = p3o.built(*fit("policy", "run", *more, "--model.kl_coef", "0.5"))
    assert fixed.model.state.kl_coef == 0.5


# ------------------------------------------------------------------------------------------------ the other commands


def test_validate_and_test_print_figures(p3o):
    assert p3o(*fit("reward", "run", "--trainer.max_steps", "2")).code == 0
    shown = p3o("validate", "--config", "run/config.yaml", "--ckpt_path", "last")
    assert shown.code == 0 and {line.split()[0] for line in shown.out.splitlines()} >= {"val/accuracy", "val/log_loss", "val/ece"}
    tested = p3o("test", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt")
    assert tested.out.split() == shown.out.replace("val/", "test/").split()
    assert sorted(path.name for path in (p3o.folder / "run").iterdir()) == ["checkpoints", "config.yaml", "export", "logs"]


@pytest.mark.parametrize("stage", ["sft", "policy"])
def test_predict(p3o, stage):
    assert p3o(*fit(stage, "run", "--trainer.max_steps", "2")).code == 0
    (p3o.folder / "questions.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "Where?"}\n')
    given = "predict", "--config", "run/config.yaml", "--data.predict_path", "questions.jsonl"
    assert p3o(*given, "--ckpt_path", "last").code == 0
    rows = [json.loads(line) for line in (p3o.folder / "run/predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Why?", "Where?"]
    assert all(len(row["responses"]) == {"sft": 1, "policy": 2}[stage] for row in rows)
    plain = p3o(*given, "--model.model", "run/export", "--model.tokenizer", "null", "--trainer.default_root_dir", "other")  # no checkpoint
    assert plain.code == 0
    assert [json.loads(line) for line in (p3o.folder / "other/predictions.jsonl").read_text().splitlines()] == rows


def test_a_reward_model_predicts_nothing(p3o):
    refused = p3o("predict", "--config", DEBUG["reward"], "--trainer.default_root_dir", "run")
    assert "model.class_path is RewardModel, which samples no responses" in refused.error
    assert not (p3o.folder / "run").exists()


# ------------------------------------------------------------------------------------------------ the terminal


def test_a_run_says_little_where_no_one_watches(p3o):
    spoken = p3o(*fit("policy", "run", "--trainer.max_steps", "2"))
    assert spoken.out == ""
    assert spoken.err.splitlines() == [
        "data: 120 rows, 120 usable, 108 for training, 12 for validation",
        f"exported to {p3o.folder / 'run/export'}",
    ]
    for quiet in (["--quiet"], ["--quiet", "true"], ["--quiet=true"]):
        silent = p3o(*fit("policy", "run", "--trainer.max_steps", "2", *quiet))
        assert (silent.code, silent.out, silent.err) == (0, "", "")


def test_only_news_of_loading_is_told():
    def record(text):
        return logging.LogRecord("transformers", logging.WARNING, "", 0, text, (), None)

    report = "X LOAD REPORT from: y\nKey | Status | \n----+----+-\n{} | {} |\n"
    assert not terminal._is_load_news(record(report.format("score.weight", "MISSING")))
    assert terminal._is_load_news(record(report.format("model.layers.0.mlp.up_proj.weight", "MISSING")))
    assert terminal._is_load_news(record("something else"))


# ------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow)],
)
def test_a_stopped_run_can_be_resumed(p3o, number, code, word):
    last = p3o.folder / "run/checkpoints/last.ckpt"
    process = subprocess.Popen(
        [*COMMAND, *fit("policy", "run", "--trainer.max_steps", "100000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=p3o.folder,
    )
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err and out == ""
    final = err.splitlines()[-1]
    assert final.startswith(f"p3o: {word} at step ") and "--ckpt_path last goes on from step " in final
    step = int(final.split()[-1])
    assert not (p3o.folder / "run/export").exists()
    resumed = p3o(*fit("policy", "run", "--trainer.max_steps", step + 2, "--ckpt_path", "last"))
    assert resumed.code == 0 and resumed.out.startswith(f"resumed from step {step} ")


def test_ctrl_c_before_training_is_one_line(p3o, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "StageCLI", pressed)
    monkeypatch.setattr(trainer.main, "__defaults__", (pressed,))
    stopped = p3o(*fit())
    assert (stopped.code, stopped.err) == (130, "p3o: interrupted\n")
    assert not (p3o.folder / "run").exists()
