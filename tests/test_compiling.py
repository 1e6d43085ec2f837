"""`torch_compile: true`: the same training, by compiled layers; sampling as it is written; checkpoints without a trace of it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch._dynamo.utils import counters
from torch.testing import assert_close

from p3o_lightning import DirectPreferencePolicy, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.casting import cast_once
from p3o_lightning.compiling import as_written, compile_layers, is_compiled
from p3o_lightning.errors import InputError
from p3o_lightning.sharding import FSDP2Strategy
from tests.families import causal
from tests.tiny import LLAMA, letters, policy, preferences, trainer, weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")

TWO_LAYERS = {**LLAMA, "num_hidden_layers": 2}
STAGES = {"supervised": SupervisedPolicy, "reward": RewardModel, "policy": PairwisePolicy, "direct": DirectPreferencePolicy}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def stage_of(kind, **settings):
    torch.manual_seed(0)
    if kind == "policy":
        return policy(model=TWO_LAYERS, **settings)
    return STAGES[kind](TWO_LAYERS, tokenizer=letters(), lr=1e-2, **settings)


def fitted(kind, folder, precision="32-true", max_steps=4, **settings):
    stage = stage_of(kind, **settings)
    data = PreferenceDataModule(str(preferences(folder, 24)), batch_size=4, val_fraction=0.25, length_grouped=False)
    run = trainer(folder, max_steps=max_steps, precision=precision)
    run.fit(stage, data)
    return stage, run


@pytest.mark.parametrize(
    ("kind", "precision", "settings", "noise"),
    [
        ("policy", "32-true", {}, 1e-5),
        slow("policy", "32-true", {"num_iterations": 2, "micro_batch_size": 2}, 1e-5),
        slow("policy", "32-true", {"peft_config": {"r": 2, "target_modules": "all-linear"}}, 1e-5),
        slow("policy", "bf16-mixed", {}, 2e-3),
        slow("reward", "32-true", {}, 1e-5),
        slow("supervised", "32-true", {}, 1e-5),
        slow("direct", "32-true", {}, 1e-5),
    ],
)
def test_training_is_the_same_and_leaves_no_trace_in_a_checkpoint(kind, precision, settings, noise, tmp_path):
    max_steps = 4 if precision == "32-true" else 1  # after an update that differs in a bit of bfloat16 other responses are drawn
    plain, _ = fitted(kind, tmp_path, precision, max_steps, **settings)
    torch._dynamo.reset()  # another test may have compiled this layer
    counters.clear()
    compiled, run = fitted(kind, tmp_path, precision, max_steps, torch_compile=True, **settings)
    assert counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert not counters["frames"].get("total", 0) > counters["frames"].get("ok", 0) + 10  # and little given up on
    for model in (compiled.model, *compiled.frozen_models):
        assert is_compiled(model) and not is_compiled(plain.model)
    before, after = weights(plain), weights(compiled)
    assert before.keys() == after.keys()
    for name, value in before.items():  # updates are of size 0.01
        assert float((after[name] - value).abs().mean()) < noise, name
    run.save_checkpoint(tmp_path / "compiled.ckpt")
    again = type(compiled).load_from_checkpoint(tmp_path / "compiled.ckpt", torch_compile=False)
    assert all(torch.equal(value, weights(again)[name]) for name, value in after.items())


def test_layers_are_compiled_once_and_run_as_written_where_that_is_asked_for():
    model = causal("llama")
    torch._dynamo.reset()
    compile_layers(model)
    compile_layers(model)
    tokens = torch.tensor([[5, 6, 7]])
    counters.clear()
    with torch.no_grad(), as_written(model):
        assert not is_compiled(model)
        with torch.autocast("cpu", torch.bfloat16), cast_once(model):
            calls = [module for module in model.modules() if "forward" in vars(module)]
        expected = model(tokens).logits
    assert calls and counters["stats"]["unique_graphs"] == 0
    assert is_compiled(model)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), cast_once(model):
            assert not any("forward" in vars(module) for module in model.modules())  # each would be compiled for
        assert_close(model(tokens).logits, expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_a_machine_without_a_compiler_is_told_before_training(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"model.torch_compile is true, but there is no C\+\+ compiler: install g\+\+"):
        fitted("supervised", tmp_path, torch_compile=True)


def test_a_model_that_is_split_over_processes_is_refused():
    stage = stage_of("supervised", torch_compile=True)
    stage._trainer = SimpleNamespace(strategy=FSDP2Strategy(), precision_plugin=Precision())
    with pytest.raises(InputError, match=r"model.torch_compile is true, but the strategy splits"):
        stage.on_fit_start()
