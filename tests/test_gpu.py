"""On a GPU: what the other tests say of a CPU holds there as well, and what only a GPU has. Without one they skip.

The measure is the same calculation on the CPU in float64 where it can be, else the same run on the CPU.
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from running import p3o, scalars  # noqa: F401
from torch.testing import assert_close

from p3o_lightning import DirectPreferencePolicy, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.callbacks import FiniteGuard, LastCheckpoint, Throughput
from p3o_lightning.commands import plan, plan_page
from p3o_lightning.commands.trainer import main
from p3o_lightning.errors import Stopped
from p3o_lightning.forwards import completion_logps, sequence_scores
from p3o_lightning.generation import Sampling, sample_with_logps
from p3o_lightning.models import read_checkpoint
from p3o_lightning.scoring import allows, grouped_completion_logps, grouped_scores, rows_apart
from p3o_lightning.sharding import FSDP2Strategy
from tests.families import CAUSAL, EOS, PAD, VOCABULARY, causal, left_padded
from tests.tiny import LLAMA, Recorder, equal, letters, policy, preferences, trainer, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

TWO_LAYERS = {**LLAMA, "num_hidden_layers": 2}
HEADS_OF_64 = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
STAGES = {"supervised": SupervisedPolicy, "reward": RewardModel, "policy": PairwisePolicy, "direct": DirectPreferencePolicy}
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # -> relative error of a gradient
RECURRENT, FLOAT32_ONLY = ("mamba", "jamba"), ("gemma2", "bloom", "mixtral", "jamba")  # these mix in tensors of float32


def measure_of(family, **overrides):
    """The model that others are held to."""
    model = causal(family, **overrides)
    return model if family in FLOAT32_ONLY else model.double()


# ---- sampling


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in RECURRENT])
@pytest.mark.parametrize("cut", [{}, {"top_k": 7, "top_p": 0.9}])
def test_the_tokens_drawn_are_those_of_the_cpu(family, cut):
    model, sampling = measure_of(family), Sampling(3, 12, 1.3, **cut)
    _, tokens, mask = left_padded([3, 7, 1])
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 5}
    expected = sample_with_logps(model, tokens, mask, sampling, **options)
    drawn = sample_with_logps(model.cuda(), tokens.cuda(), mask.cuda(), sampling, **options)
    assert all(item.is_cuda for item in drawn)
    for one, other in zip(expected, drawn, strict=True):  # norms and the angles of positions are float32 in all of them
        assert_close(other.cpu(), one, rtol=1e-5, atol=1e-4 if family in FLOAT32_ONLY else 1e-5)


def test_they_are_so_under_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, sampling = causal("llama").double().cuda(), Sampling(3, 12, 1.3, top_p=0.9)
    _, tokens, mask = left_padded([3, 7, 1])
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 5}
    expected = sample_with_logps(model, tokens.cuda(), mask.cuda(), sampling, **options)
    torch.use_deterministic_algorithms(True)
    try:
        drawn = sample_with_logps(model, tokens.cuda(), mask.cuda(), sampling, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(expected, drawn, strict=True))


# ---- log-probabilities, scores and their gradients, by the kernels that a GPU chooses


def batch(lengths=(3, 8, 1), count=3, length=4):
    generator = torch.Generator().manual_seed(5)
    _, tokens, mask = left_padded(list(lengths))
    responses = torch.randint(3, VOCABULARY, (len(lengths), count, length), generator=generator)
    ends = torch.randint(1, length + 1, (len(lengths), count, 1), generator=generator)
    return tokens, mask, responses, torch.arange(length) < ends


def read(model, function, given, weigh, dtype=None):
    """What the function gives, and the gradients of a weighted sum of it, as one vector; in float64 on the CPU."""
    model.zero_grad()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        values = function(model, *(item.to(device) for item in given))
    (values * weigh.to(values)).sum().backward()
    gradients = [item.grad.flatten() for item in model.parameters() if item.grad is not None]
    return values.detach().cpu().double(), torch.cat(gradients).cpu().double()


def far(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("apart", [False, True])
def test_log_probabilities_and_gradients_are_those_of_the_cpu(family, apart):
    given, on_gpu = batch(), causal(family).cuda()
    weigh = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
    logps, gradient = read(measure_of(family), completion_logps, given, weigh)
    assert allows(on_gpu) == allows(causal(family))
    if apart:
        with rows_apart():
            got, theirs = read(on_gpu, grouped_completion_logps, given, weigh)
    else:
        got, theirs = read(on_gpu, grouped_completion_logps, given, weigh)
    assert_close(got, logps, rtol=1e-4, atol=1e-4)
    assert far(theirs, gradient) < 1e-3


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("lengths", [(100, 210, 1), (128, 128, 128)])
def test_half_precision_is_the_cpus_float64_but_for_rounding(dtype, how, apart, lengths):
    """With long and short prompts side by side, whole rows of attention are masked: where a kernel made NaN of them, all would be NaN."""
    model, given = causal("llama", **{**HEADS_OF_64, "initializer_range": 0.05}), batch(lengths, 4, 70)
    weigh = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
    logps, gradient = read(copy.deepcopy(model).double(), completion_logps, given, weigh)
    on_gpu = model.cuda().to(dtype if how == "weights" else torch.float32)
    autocast = dtype if how == "autocast" else None
    if apart:
        with rows_apart():
            got, theirs = read(on_gpu, grouped_completion_logps, given, weigh, autocast)
    else:
        assert allows(on_gpu)
        got, theirs = read(on_gpu, grouped_completion_logps, given, weigh, autocast)
    assert got.isfinite().all() and theirs.isfinite().all()
    assert far(got, logps) < 0.02
    assert far(theirs, gradient) < HALF[dtype]


@pytest.mark.parametrize("lengths", [(100, 210, 1), (128, 128, 128)])
def test_float32_is_the_cpus_float64_on_long_texts(lengths):
    model, given = causal("llama", **{**HEADS_OF_64, "initializer_range": 0.05}), batch(lengths, 4, 70)
    weigh = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
    logps, gradient = read(copy.deepcopy(model).double(), completion_logps, given, weigh)
    got, theirs = read(model.cuda(), grouped_completion_logps, given, weigh)
    assert_close(got, logps, rtol=1e-5, atol=1e-5)
    assert far(theirs, gradient) < 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scores_are_those_of_the_cpu(dtype):
    stage = RewardModel({"model_type": "llama", **HEADS_OF_64}, tokenizer=letters())
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(8, (6, 90), generator=draw)
    mask = torch.arange(90) < torch.randint(3, 91, (6, 1), generator=draw)
    tokens[1::2, :40] = tokens[::2, :40]
    model, weigh = stage.model, torch.randn(6, generator=draw)
    scores, gradient = read(copy.deepcopy(model).double(), sequence_scores, (tokens, mask), weigh)
    got, theirs = read(model.cuda(), lambda *given: grouped_scores(*given, 2), (tokens, mask), weigh, dtype)
    assert far(got, scores) < (1e-5 if dtype is None else 0.03)
    assert far(theirs, gradient) < (1e-5 if dtype is None else 0.05)


# ---- training


def stage_of(kind, **settings):
    torch.manual_seed(0)
    given = {"model": TWO_LAYERS, **settings}
    if kind == "policy":
        judge = RewardModel(TWO_LAYERS, tokenizer=letters())
        return policy(**{"reward_funcs": judge, "num_iterations": 2, "micro_batch_size": 2, **given})
    return STAGES[kind](given.pop("model"), tokenizer=letters(), **{"lr": 1e-2, **given})


def rows(folder):
    return PreferenceDataModule(str(preferences(folder, 24)), batch_size=4, val_fraction=0.25, length_grouped=False)


class Devices(L.Callback):
    """Where everything is at the end of training; Lightning takes it back to the CPU after that."""

    def on_train_end(self, trainer, pl_module):
        frozen = [pl_module.reference, *pl_module.rewards.networks] if hasattr(pl_module, "rewards") else []
        self.found = {item.device.type for model in [pl_module, *frozen] if model is not None for item in model.parameters()}


def train(folder, kind, settings=None, ckpt_path=None, **options):
    Path(folder).mkdir(parents=True, exist_ok=True)
    stage = stage_of(kind, **(settings or {}))
    run = trainer(folder, **{"accelerator": "gpu", "max_steps": 8, **options})
    run.fit(stage, rows(folder), ckpt_path=ckpt_path)
    return stage, {name: float(value) for name, value in run.callback_metrics.items()}


def distance(one, other):
    return sum(float((one[name].cpu().double() - other[name].cpu().double()).square().sum()) for name in one) ** 0.5


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 4}}], ids=["whole", "adapter"])
@pytest.mark.parametrize("kind", STAGES)
def test_a_run_is_that_of_the_cpu(kind, settings, tmp_path):
    devices = Devices()
    stage, figures = train(tmp_path, kind, settings, callbacks=[devices])
    assert devices.found == {"cuda"}, "the policy, its reference and its reward model"
    other, expected = train(tmp_path, kind, settings, accelerator="cpu")
    assert distance(weights(stage), weights(other)) < 1e-2 * distance(weights(stage_of(kind, **settings)), weights(other))
    assert figures.keys() == expected.keys()
    assert figures == pytest.approx(expected, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 4}}], ids=["whole", "adapter"])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("kind", STAGES)
def test_half_precision_trains(kind, precision, settings, tmp_path):
    stage, figures = train(tmp_path, kind, settings, precision=precision)
    assert distance(weights(stage_of(kind, **settings)), weights(stage)) > 1e-3
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values()), figures
    assert all(value.isfinite().all() for value in weights(stage).values())


@pytest.mark.parametrize("objective", ["ppo", "rloo", "grpo", "gspo", "online_dpo", "rebel"])
def test_the_relatives_train(objective, tmp_path):
    stage, figures = train(tmp_path, "policy", {"objective": objective}, precision="bf16-mixed")
    assert distance(weights(stage_of("policy", objective=objective)), weights(stage)) > 1e-3
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values()), figures


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["supervised", "policy"])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(kind, precision, tmp_path):
    """Where Lightning is asked for deterministic kernels. The tenth update is within a rollout."""
    options = {"precision": precision, "deterministic": True, "max_steps": 16}
    settings = {"kl_target": 0.5, "max_completion_length": 24} if kind == "policy" else {}  # so many that steps are recorded
    whole, figures = train(tmp_path / "whole", kind, settings, **options)
    train(tmp_path / "cut", kind, settings, **{**options, "max_steps": 10}, callbacks=[LastCheckpoint(every_n_steps=10)])
    again, theirs = train(tmp_path / "cut", kind, settings, str(tmp_path / "cut/checkpoints/last.ckpt"), **options)
    assert equal(weights(whole), weights(again))
    assert figures == theirs


def test_a_checkpoint_made_on_a_gpu_is_read_on_a_cpu(tmp_path):
    stage, _ = train(tmp_path, "policy", callbacks=[LastCheckpoint(every_n_steps=8)])
    path = tmp_path / "checkpoints/last.ckpt"
    assert all(value.device.type == "cpu" for value in read_checkpoint(path)["state_dict"].values())
    again = PairwisePolicy.load_from_checkpoint(path, map_location="cpu")
    assert distance(weights(again), weights(stage)) == 0


def test_reference_and_reward_leave_the_gpu_with_the_policy(tmp_path):
    stage, _ = train(tmp_path, "policy")
    frozen = [stage.reference, *stage.rewards.networks]
    assert {item.device.type for model in frozen for item in model.parameters()} == {next(stage.model.parameters()).device.type}


def test_compiled_layers_train_alike(tmp_path):
    plain, _ = train(tmp_path, "policy", max_steps=4)
    torch._dynamo.reset()
    compiled, _ = train(tmp_path, "policy", {"torch_compile": True}, max_steps=4)
    assert distance(weights(plain), weights(compiled)) < 1e-2 * distance(weights(stage_of("policy")), weights(plain))


# ---- what Lightning makes of one GPU: process groups over NCCL


def strategies(folder):
    """Weights and figures by each strategy."""
    kinds = {
        "alone": lambda: "auto",
        "ddp": lambda: "ddp",
        "fsdp2": lambda: FSDP2Strategy(),
        "fsdp2 sharded": lambda: FSDP2Strategy(save_distributed_checkpoint=True),
        "fsdp1": lambda: FSDPStrategy(state_dict_type="full"),
    }
    found = {}
    for name, make in kinds.items():
        for kind in ("policy", "reward"):
            try:
                options = {"inference_mode": False, "callbacks": [LastCheckpoint(every_n_steps=8)]}
                _, figures = train(Path(folder) / name / kind, kind, strategy=make(), **options)
                loaded = STAGES[kind].load_from_checkpoint(Path(folder) / name / kind / "checkpoints/last.ckpt", map_location="cpu")
                found[name, kind] = (weights(loaded), figures)
            except BaseException:
                found[name, kind] = traceback.format_exc()
    return found


def _answer(folder, function):
    result = globals()[function](folder)
    torch.save(result, Path(folder) / "answer.pt")
    os._exit(0)


def in_a_process_of_its_own(folder, function):
    process = multiprocessing.get_context("spawn").Process(target=_answer, args=(str(folder), function.__name__))
    process.start()
    process.join(180)
    assert not process.is_alive() or process.kill(), "it hangs"
    return torch.load(folder / "answer.pt", weights_only=False)


def test_the_strategies_train_alike_over_nccl(tmp_path):
    found = in_a_process_of_its_own(tmp_path, strategies)
    failed = {name: told for name, told in found.items() if isinstance(told, str)}
    assert not failed, "\n".join(f"{name}: {told}" for name, told in failed.items())
    for (name, kind), (one, figures) in found.items():
        expected, theirs = found["alone", kind]
        assert distance(one, expected) < 1e-2 * distance(weights(stage_of(kind)), expected), name
        assert figures == pytest.approx(theirs, rel=1e-2, abs=1e-3), name


# ---- what a person sees


def test_the_command_trains_on_it_and_tells_its_memory(p3o):  # noqa: F811
    ended = p3o(
        "fit",
        "--config",
        "configs/debug/policy.yaml",
        "--trainer.accelerator",
        "auto",
        "--trainer.max_steps",
        "8",
        "--trainer.default_root_dir",
        "run",
    )
    assert ended.code == 0, ended
    found = scalars(p3o.folder / "run/logs/version_0", clock=True)
    peaks = [value for _, value in found["throughput/peak_memory_mib"]]
    assert 1 < peaks[-1] < 200, "of the GPU's tensors, not of the process"


def test_the_doctor_names_it(p3o):  # noqa: F811
    assert torch.cuda.get_device_name(0) in p3o("doctor").out


class Spoil(L.Callback):
    """A NaN in one layer's output at the third update."""

    def on_fit_start(self, trainer, pl_module):
        def spoil(module, given, output):
            return output * float("nan") if torch.is_grad_enabled() and trainer.global_step == 2 else output

        pl_module.model.get_submodule("model.layers.1.mlp").register_forward_hook(spoil)


def test_what_is_not_finite_is_named(tmp_path):
    with pytest.raises(Stopped, match=r"layers\.1\.mlp"):
        train(tmp_path, "policy", callbacks=[Spoil(), FiniteGuard()], max_steps=8)


# ---- memory


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_estimate_of_memory_is_near_what_is_taken(precision, p3o):  # noqa: F811
    """A policy of 19 million parameters, prompts of 250 bytes. The estimate counts a copy of the prompt for each of its responses."""
    lines = [json.dumps({"prompt": f"{row:03d} " + "good book " * 25, "chosen": "a", "rejected": "b"}) for row in range(64)]
    Path("rows.jsonl").write_text("\n".join(lines))
    shape = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "max_position_embeddings": 1024}
    settings = {"model": shape, "tokenizer": "bytes", "micro_batch_size": 8, "max_completion_length": 64, "num_iterations": 1, "lr": 1e-6}
    config = {
        "model": {"init_args": settings},
        "data": {"init_args": {"path": "rows.jsonl", "batch_size": 16, "max_length": 512, "max_prompt_length": 256}},
        "trainer": {"accelerator": "gpu", "max_steps": 4, "precision": precision, "default_root_dir": "run", "limit_val_batches": 0},
    }
    Path("large.yaml").write_text(yaml.safe_dump(config))
    configs = ["--config=configs/debug/policy.yaml", "--config=large.yaml"]
    estimate = plan.Plan(main(["fit", *configs], plan_page.Planned).settings).estimate
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert p3o("fit", *configs).code == 0
    taken = torch.cuda.max_memory_allocated() - before
    print(f"memory {precision}: estimate {estimate.phases}, taken {taken}, ratio {taken / estimate.peak:.3f}", file=sys.__stderr__)
    assert 0.5 * estimate.peak < taken < 1.1 * estimate.peak


def test_throughput_counts_the_gpu(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    recorder = Recorder()
    train(tmp_path, "policy", logger=recorder, callbacks=[Throughput()], log_every_n_steps=1)
    row = next(row for _, row in recorder.rows if "throughput/peak_memory_mib" in row)
    assert 0 < row["throughput/peak_memory_mib"] <= torch.cuda.max_memory_allocated() / 2**20
