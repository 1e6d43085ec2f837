"""Bad input to `p3o`: exit 2, one line that names field, value and fix, no traceback, nothing half-written."""

import gzip
import json
import pickle
import shutil

import pytest
import torch

DEBUG = "configs/debug/policy.yaml"


def fit(*more, config=DEBUG):
    return "fit", "--config", config, "--trainer.default_root_dir", "run", *more


@pytest.fixture
def refused(p3o):
    """Run a fit that must be refused, and leave no trace of itself; its message."""

    def run(*more, config=DEBUG):
        before = sorted(path for path in p3o.folder.rglob("*") if "__pycache__" not in path.parts)
        message = p3o(*fit(*more, config=config)).error
        assert sorted(path for path in p3o.folder.rglob("*") if "__pycache__" not in path.parts) == before
        return message

    return run


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        (["fitt"], ["'fitt' is no command", "fit, validate"]),
        (["fit"], ["fit needs a model and data", "--config FILE"]),
        (["fit", "--foo"], ["--foo is no option"]),
        (["fit", "--kl_coef", "0.1"], ["--kl_coef is no option", "Did you mean --model.kl_coef?"]),
        (["fit", "--config", DEBUG, "--trainer.max_step", "3"], ["--trainer.max_step is no option", "--trainer.max_steps?"]),
        (["fit", "--config", DEBUG, "--model.kl_coeff", "3"], ["model.kl_coeff is no key", "Did you mean model.kl_coef?"]),
        (["fit", "--config", DEBUG, "--model"], ["--model has no value"]),
        (["fit", "--config", DEBUG, "hello"], ["'hello' is not understood"]),
        (["fit", "--model", "PairwisePolicy", "--model.model", "x"], ["data.path is missing", "--data.path VALUE"]),
        (["fit", "--data.path", "x.jsonl"], ["model is missing"]),
        (["fit", "--model", "SupervisedPolicy", "--data.path", "x.jsonl"], ["model.model is missing"]),
        (["fit", "--config", DEBUG, "--model", "PairwisePolcy"], ["model.class_path is 'PairwisePolcy'", "Did you mean PairwisePolicy?"]),
        (["fit", "--config", DEBUG, "--model", "Foo"], ["model.class_path is 'Foo'", "SupervisedPolicy, RewardModel, PairwisePolicy"]),
        (["fit", "--config", DEBUG, "--model", "torch.nn.Linear"], ["'torch.nn.Linear', which is no Stage"]),
        (["fit", "--config", DEBUG, "--model", "no_such_file.Mine"], ["'no_such_file.Mine'", "No module named 'no_such_file'"]),
        (["fit", "--config", DEBUG, "--model", "json.Mine"], ["'json.Mine'", "json has no such class"]),
        (["fit", "--model.help", "Foo"], ["'Foo', which is no class known here"]),
        (["validate", "--config", DEBUG, "--ckpt_path", "last"], ["ckpt_path is 'last'", "does not exist"]),
        (["doctor", "--foo"], ["--foo"]),
    ],
)
def test_the_command_line(p3o, given, pieces):
    message = p3o(*given).error
    assert all(piece in message for piece in pieces), message
    assert not any(p3o.folder.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "pieces"),
    [
        ("trainer.max_steps", "abc", ["'abc'", "a whole number"]),
        ("trainer.precision", "foo", ["'foo'", "bf16-mixed"]),
        ("trainer.accelerator", "foo", ["accelerator", "cpu"]),
        ("trainer.callbacks", "Foo", ["'Foo'"]),
        ("trainer.val_check_interval", "5000", ["5000", "training batches"]),  # Lightning finds it when the run begins
        ("model.kl_coef", "abc", ["'abc'", "a number"]),
        ("model.kl_target", "abc", ["'abc'", "a number or null"]),
        ("model.clipping", "x", ["'x'", "joint or separate"]),
        ("model.kl_coef", "-1", ["-1.0", "0 or more"]),
        ("model.clip_range", "0", ["0.0", "above 0"]),
        ("model.num_generations", "1", ["1", "at least 2"]),
        ("model.temperature", "0", ["0.0", "above 0"]),
        ("model.lr", "0", ["0.0", "above 0"]),
        ("model.optimizer", "AdamX", ["AdamX", "Did you mean Adam?"]),
        ("data.batch_size", "2.5", ["'2.5'", "a whole number"]),
        ("data.columns", "1", ["'1'", "a mapping or null"]),
        ("data.val_fraction", "2", ["2.0", "[0, 1)"]),
        ("checkpoint.every_n_steps", "0", ["0", "at least 1"]),
        ("quiet", "maybe", ["'maybe'", "true or false"]),
        ("model.micro_batch_size", "3", ["3", "data.batch_size is 8", "divisor"]),
        ("data.batch_size", "3000", ["3000", "108 rows", "or less"]),
        ("trainer.accumulate_grad_batches", "3", ["3", "4 micro-batches", "divisor"]),
    ],
)
def test_a_value(refused, key, value, pieces):
    message = refused(f"--{key}={value}")
    assert key.split(".")[-1] in message and all(piece in message for piece in pieces), message


# ------------------------------------------------------------------------------------------------ config files


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (None, ["'bad.yaml'", "no such file"]),
        ("", ["'bad.yaml'", "empty"]),
        ("# nothing\n", ["'bad.yaml'", "empty"]),
        ("just text\n", ["'bad.yaml'", "no keys with values"]),
        ("model: [1, 2\n", ["'bad.yaml', line ", "no valid YAML"]),
        ("model:\n\t- x\n", ["'bad.yaml', line 2", "no valid YAML"]),
        ("modle: {class_path: RewardModel}\n", ["modle", "Did you mean model?"]),
        ("trainer: {max_step: 3}\n", ["trainer.max_step", "trainer.max_steps?"]),
        ("model: {init_args: {kl_coeff: 3}}\n", ["model.kl_coeff", "model.kl_coef?"]),
        ("model: {class_path: PairwisePolcy}\n", ["PairwisePolcy", "PairwisePolicy?"]),
        ("model: {init_args: {kl_coef: abc}}\n", ["model.kl_coef is 'abc'", "a number"]),
        ("trainer: {callbacks: [{class_path: LearningRateMonito}]}\n", ["'LearningRateMonito'", "LearningRateMonitor?"]),
        ("trainer: {callbacks: [{class_path: LearningRateMonitor, init_args: {foo: 1}}]}\n", ["trainer.callbacks.foo"]),
        (
            "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 1}}}}\n",
            ["model.optimizer.lrr", "optimizer.lr?"],
        ),
    ],
)
def test_a_config_file(p3o, refused, text, pieces):
    if text is not None:
        (p3o.folder / "bad.yaml").write_text(text)
    message = refused("--config", "bad.yaml")
    assert all(piece in message for piece in pieces), message


def test_a_config_file_that_is_no_text(p3o, refused):
    (p3o.folder / "bad.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "no text in UTF-8" in refused("--config", "bad.yaml")
    assert "no such file" in refused("--config", ".")


# ------------------------------------------------------------------------------------------------ data

GOOD = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("data.jsonl", None, ["'data.jsonl'", "does not exist"]),
        ("data.jsonl", "", ["'data.jsonl'", "no row"]),
        ("data.jsonl", [GOOD, {"prompt": "Why?", "chosen": " So."}], ["line 2", "rejected"]),
        ("data.jsonl", [GOOD, {**GOOD, "chosen": 3}], ["line 2", "chosen", "3"]),
        ("data.jsonl", [GOOD, {**GOOD, "prompt": None}], ["line 2", "prompt"]),
        ("data.jsonl", [{"question": "a", "answer": "b"}], ["question", "answer", "prompt"]),
        ("data.jsonl", [GOOD], ["one usable prompt"]),
        ("data.jsonl", "{'prompt': 1}\n", ["line 1", "JSON"]),
        ("data.jsonl", "[1, 2]\n", ["line 1"]),
        ("data.json", "{}", ["data.json"]),
        ("data.csv", "prompt,chosen,rejected\na,b\n", ["row 1", "rejected"]),
        ("data.txt", "text", ["data.txt", ".jsonl"]),
        ("data.parquet", "no parquet", ["data.parquet", "parquet"]),
        ("data.jsonl.gz", b"no gzip", ["data.jsonl.gz"]),
        ("data.jsonl.gz", gzip.compress(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 99, mtime=0)[:40], ["data.jsonl.gz"]),
        ("data.pkl", pickle.dumps([GOOD]), ["data.pkl", ".jsonl"]),
    ],
)
def test_data(p3o, refused, name, content, pieces):
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if content is not None:
        (p3o.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused("--data.path", name, config="configs/debug/reward.yaml")
    assert name in message and all(piece in message for piece in pieces), message


# ------------------------------------------------------------------------------------------------ models, rewards, checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two updates to take apart: sft and policy, with checkpoints and exports."""
    from p3o_lightning.commands import trainer

    root = tmp_path_factory.mktemp("trained")
    for stage in ("sft", "policy"):
        run = trainer.main(
            ["fit", f"--config=configs/debug/{stage}.yaml", f"--trainer.default_root_dir={root / stage}", "--trainer.max_steps=2"]
        )
        assert run.trainer.global_step == 2
    return root


def test_model_sources(p3o, refused, trained):
    for value in ("/no/such/folder", "./nowhere", "nothing.gguf", "nothing.ckpt"):
        message = refused("--model.model", value)
        assert message.startswith("model") and value in message, message
    shutil.copytree(trained / "sft/export", p3o.folder / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (p3o.folder / "bare" / name).unlink()
    message = refused("--model.model", "bare", "--model.tokenizer", "null")
    assert "tokenizer" in message and "'bare'" in message and "without tokenizer.json" in message
    shutil.copytree(trained / "sft/export", p3o.folder / "pickled")
    (p3o.folder / "pickled/model.safetensors").unlink()
    torch.save({}, p3o.folder / "pickled/pytorch_model.bin")
    assert "'pickled'" in refused("--model.model", "pickled")
    (p3o.folder / "pickled/model.safetensors").write_bytes(b"no safetensors")
    assert "'pickled'" in refused("--model.model", "pickled")
    assert "model_type" in refused("--model.model", "{hidden_size: 8}")
    assert "no_such_type" in refused("--model.model", "{model_type: no_such_type}")


def test_checkpoints(p3o, refused, trained):
    assert "leave --ckpt_path out" in refused("--ckpt_path", "last")
    assert "'no.ckpt'" in refused("--ckpt_path", "no.ckpt")
    whole = (trained / "policy/checkpoints/last.ckpt").read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"text", "pickle": pickle.dumps({"a": print})}.items():
        (p3o.folder / f"{name}.ckpt").write_bytes(content)
        message = refused("--ckpt_path", f"{name}.ckpt")
        assert f"{name}.ckpt" in message and "checkpoint" in message, message
    torch.save({"state_dict": {}}, p3o.folder / "other.ckpt")
    assert "not a checkpoint of p3o_lightning" in refused("--ckpt_path", "other.ckpt")
    message = refused("--ckpt_path", trained / "sft/checkpoints/last.ckpt")
    assert "holds a SupervisedPolicy, but model.class_path is PairwisePolicy" in message and "--model.model" in message


def test_a_pickle_is_not_run(p3o, refused):
    class Payload:
        def __reduce__(self):
            return exec, ("open('owned', 'w')",)

    (p3o.folder / "evil.pkl").write_bytes(pickle.dumps(Payload()))
    torch.save(Payload(), p3o.folder / "evil.ckpt")
    for given in (
        ("--ckpt_path", "evil.ckpt"),
        ("--model.model", "evil.ckpt"),
        ("--data.path", "evil.pkl"),
        ("--model.reward_funcs", "evil.ckpt"),
    ):
        refused(*given)
    assert not (p3o.folder / "owned").exists()


REWARDS = """
def too_few(completions, **_): return [0.0] * (len(completions) - 1)
def a_text(completions, **_): return "good"
def texts(completions, **_): return ["good"] * len(completions)
def nan(completions, **_): return [0.0] * (len(completions) - 1) + [float("nan")]
def nothing(completions, **_): return None
def no_such_argument(essays): return [0.0]
three = 3
"""


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("too_few", ["15 scores for 16 completions"]),
        ("a_text", ["str 'good'", "list of 16 numbers"]),
        ("texts", ["'good' at position 0"]),
        ("nan", ["nan at position 15", "finite"]),
        ("nothing", ["None", "list of 16 numbers"]),
        ("no_such_argument", ["no_such_argument", "cannot be called"]),
        ("three", ["'bad_rewards.three'", "int"]),
        ("missing", ["'bad_rewards.missing'", "has no missing"]),
    ],
)
def test_reward_functions(p3o, refused, name, pieces):
    (p3o.folder / "bad_rewards.py").write_text(REWARDS)
    message = refused("--model.reward_funcs", f"bad_rewards.{name}")
    assert "model.reward_funcs" in message and all(piece in message for piece in pieces), message


@pytest.mark.parametrize("value", ["no_module.f", "nothing", "./no/folder", "/no/folder", "no.ckpt"])
def test_reward_sources(refused, value):
    message = refused("--model.reward_funcs", value)
    assert value in message, message


def test_what_a_users_own_function_raises_is_theirs(p3o):
    (p3o.folder / "raising_rewards.py").write_text("def broken(completions, **_):\n    raise LookupError('mine')\n")
    with pytest.raises(LookupError, match="mine"):  # Python prints its traceback, and exits with 1
        p3o(*fit("--model.reward_funcs", "raising_rewards.broken"))
    assert not (p3o.folder / "run").exists()


def test_the_run_folder(p3o, refused):
    (p3o.folder / "file").write_text("mine")
    for root in ("file", "file/run"):
        assert "is a file" in refused("--trainer.default_root_dir", root)
    (p3o.folder / "run/export").mkdir(parents=True)
    (p3o.folder / "run/export/thesis.txt").write_text("mine")
    assert "export" in refused()
    assert (p3o.folder / "file").read_text() == (p3o.folder / "run/export/thesis.txt").read_text() == "mine"


def test_a_failure_after_training_began_keeps_what_was_saved(p3o):
    (p3o.folder / "late_rewards.py").write_text(
        "calls = []\ndef late(completions, **_):\n    calls.append(1)\n"
        "    return [0.0] * (len(completions) - (len(calls) > 4))\n"  # 2 to check validation, then one a rollout
    )
    assert "15 scores for 16 completions" in p3o(*fit("--model.reward_funcs", "late_rewards.late")).error
    assert sorted(path.name for path in (p3o.folder / "run").iterdir()) == ["checkpoints", "config.yaml", "logs"]
    mended = p3o(*fit("--ckpt_path", "last", "--trainer.max_steps", "9"))
    assert mended.code == 0 and "resumed from step 8" in mended.out
