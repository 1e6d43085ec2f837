"""Several processes: they compute what one does, none waits for ever, frozen models are split too, checkpoints go from any number to any.

Two processes with half the batch each stand against one with the whole batch. What differs is the order in which float32 sums are taken:
TOLERANCE is on weights of size 0.2 after 12 updates of size 0.01.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from p3o_lightning import PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.callbacks import Export, LastCheckpoint
from p3o_lightning.errors import InputError
from p3o_lightning.models import read_checkpoint, read_description
from p3o_lightning.sharded_checkpoints import WholeCheckpointIO, is_sharded
from p3o_lightning.sharding import FSDP2Strategy, layers_of, whole_state_dict
from tests.processes import FSDP1OnCPU, on_two
from tests.tiny import LLAMA, letters, policy, preferences, trainer, weights

TOLERANCE = 1e-5
TWO_LAYERS = {**LLAMA, "num_hidden_layers": 2}
STAGES = {"supervised": SupervisedPolicy, "reward": RewardModel, "policy": PairwisePolicy}
STRATEGIES = {
    "fsdp2 sharded": lambda: FSDP2Strategy(save_distributed_checkpoint=True),
    "fsdp1": lambda: FSDP1OnCPU(state_dict_type="sharded"),
}  # beside those that the Trainer knows by name


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def stage_of(kind, **settings):
    torch.manual_seed(0)
    given = {"model": TWO_LAYERS, **settings}
    return policy(**given) if kind == "policy" else STAGES[kind](given.pop("model"), tokenizer=letters(), lr=1e-2, **given)


def rows(folder, batch_size):
    return PreferenceDataModule(str(preferences(folder, 24)), batch_size=batch_size, val_fraction=0.25, length_grouped=False)


def weights_of(run, stage):
    root = run.strategy.model
    return weights(stage) if root is stage and not any(isinstance(item, FSDPModule) for item in stage.modules()) else whole_state_dict(root)


def train(folder, kind, strategy="auto", devices=1, batch_size=4, settings=None, **options):
    """Weights (on rank 0) and figures of a run."""
    ckpt_path, stage = options.pop("ckpt_path", None), stage_of(kind, **(settings or {}))
    run = trainer(folder, strategy=STRATEGIES.get(strategy, lambda: strategy)(), devices=devices, **{"max_epochs": 3, **options})
    run.fit(stage, rows(folder, batch_size), ckpt_path=ckpt_path)
    figures = {name: float(value) for name, value in run.callback_metrics.items() if name != "val/scores_std"}  # it is of a batch
    return {name: value.detach().clone() for name, value in weights_of(run, stage).items()}, figures


def train_all(folder, strategy, devices, batch_size, variants):
    return [train(folder, kind, strategy, devices, batch_size, settings, **options) for kind, settings, options in variants]


def far_apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


# ---- the mathematics


def variants_of(devices):
    """Stages with options; a micro-batch of prompts is shared out, too."""
    clipped = {"gradient_clip_val": 0.05}
    accumulated = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    return [
        ("supervised", {}, clipped),
        ("reward", {}, {"accumulate_grad_batches": 2}),
        ("policy", {"kl_target": 1.0}, {}),
        ("policy", {"micro_batch_size": 2 // devices, "num_iterations": 2}, accumulated),
    ]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", slow("fsdp1")])
def test_two_processes_with_half_the_batch_train_as_one(name, tmp_path):
    alone = train_all(tmp_path, "auto", 1, 4, variants_of(1)[:3])
    first, second = on_two(tmp_path, train_all, tmp_path, name, 2, 2, variants_of(2)[:3])
    for (one, figures), (two, theirs), (_, others) in zip(alone, first, second, strict=True):
        assert far_apart(one, two) < TOLERANCE
        assert figures.keys() == theirs.keys()
        assert theirs == pytest.approx(figures, abs=1e-5)
        assert theirs == pytest.approx(others, abs=1e-6)


def test_two_processes_accumulate_and_clip_in_several_passes_alike(tmp_path):
    """DDP against FSDP2; a second pass is shuffled on each process by itself, so one process is no measure here."""
    both = [on_two(tmp_path, train_all, tmp_path, name, 2, 2, variants_of(2)[3:])[0] for name in ("ddp", "fsdp2")]
    for (one, figures), (two, theirs) in zip(*both, strict=True):
        assert far_apart(one, two) < TOLERANCE
        assert theirs == pytest.approx(figures, abs=1e-5)


def test_a_clip_on_two_processes_is_on_the_norm_of_all_gradients(tmp_path):
    assert on_two(tmp_path, held_back, tmp_path)[0] == pytest.approx(0.01, rel=1e-4)


def held_back(folder):
    """The norm of the gradient of the first update, after clipping at 0.01."""
    norms, clip = [], SupervisedPolicy.configure_gradient_clipping

    def clip_and_measure(stage, optimizer, **how):
        clip(stage, optimizer, **how)
        gradients = [parameter.grad.full_tensor() for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(float(sum((gradient.square().sum() for gradient in gradients), torch.zeros(())).sqrt()))

    SupervisedPolicy.configure_gradient_clipping = clip_and_measure  # in this process, which ends with the function
    train(folder, "supervised", "fsdp2", 2, 2, gradient_clip_val=0.01, max_epochs=1)
    return norms[0]


# ---- what is split


def unequal(folder):
    """What each process holds and draws, with a reward network and a reference beside the policy."""
    judge = RewardModel(TWO_LAYERS, tokenizer=letters())
    stage = stage_of("policy", reward_funcs=judge, max_completion_length=24)
    lengths = []

    class Lengths(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            lengths.append(batch.completion_tokens.shape[-1])

    run = trainer(folder, strategy="fsdp2", devices=2, max_epochs=3, callbacks=[Lengths(), LastCheckpoint(every_n_steps=2)])
    run.fit(stage, rows(folder, 2))
    models = {"policy": stage.model, "reference": stage.reference, "reward": stage.rewards.networks[0]}
    held = {name: sum(item.to_local().numel() for item in model.parameters()) for name, model in models.items()}
    whole = {name: sum(item.numel() for item in model.parameters()) for name, model in models.items()}
    return lengths, held, whole


def test_processes_may_draw_responses_of_unequal_length_from_models_that_are_all_split(tmp_path):
    (ours, held, whole), (theirs, _, _) = on_two(tmp_path, unequal, tmp_path)
    assert ours != theirs and len(ours) == len(theirs)
    for name in ("policy", "reference", "reward"):
        assert held[name] <= 0.6 * whole[name], name
    saved = read_checkpoint(tmp_path / "checkpoints/last.ckpt")["state_dict"]
    assert saved.keys() == weights(stage_of("policy")).keys()  # nothing of reference and reward


SPLIT = {
    "adapter": {"peft_config": {"r": 4, "lora_alpha": 8}},
    "tied": {"model": {**TWO_LAYERS, "tie_word_embeddings": True}},
}


@pytest.mark.parametrize("name", ["adapter", slow("tied")])
def test_adapters_and_tied_embeddings_train_split_as_they_do_whole(name, tmp_path):
    variants = [(kind, SPLIT[name], {}) for kind in STAGES]
    alone = train_all(tmp_path, "auto", 1, 4, variants)
    for (one, figures), (two, theirs) in zip(alone, on_two(tmp_path, train_all, tmp_path, "fsdp2", 2, 2, variants)[0], strict=True):
        assert far_apart(one, two) < TOLERANCE
        assert theirs == pytest.approx(figures, abs=1e-5)


@pytest.mark.parametrize("precision", [slow("bf16-mixed"), slow("bf16-true")])
def test_half_precision_trains_split(precision, tmp_path):
    """Rounding makes two runs drift apart: after two updates, by far less than they have learned."""
    variants = [(kind, {}, {"precision": precision, "max_steps": 2}) for kind in STAGES]
    alone = train_all(tmp_path, "auto", 1, 4, variants)
    split = on_two(tmp_path, train_all, tmp_path, "fsdp2", 2, 2, variants)[0]
    for kind, (one, _), (two, figures) in zip(STAGES, alone, split, strict=True):
        assert distance(one, two) < 0.3 * distance(weights(stage_of(kind)), two)
        assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())


def distance(one, other):
    return sum(float((one[name].float() - other[name].float()).square().sum()) for name in one) ** 0.5


def test_the_blocks_of_a_model_are_found_by_name_or_by_being_many():
    stage = stage_of("policy")
    assert [type(layer).__name__ for layer in layers_of(stage.model)] == ["LlamaDecoderLayer"] * 2

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.blocks = (
                torch.nn.ModuleList([torch.nn.Linear(1, 1)]),
                torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3)),
            )

    assert layers_of(plain := Plain()) == list(plain.blocks)


# ---- checkpoints


KINDS = [("fsdp2 sharded", True), ("fsdp2", False)]
KINDS += [slow(name, adapter) for name in ("ddp", "fsdp2", "fsdp2 sharded") for adapter in (False, True) if (name, adapter) not in KINDS]


class KeepOne(LastCheckpoint):
    """Keeps what is saved at one step under a name of its own."""

    def __init__(self, step):
        super().__init__(every_n_steps=step)
        self.kept = step

    def save(self, trainer):
        due = self.written == self.kept
        super().save(trainer)
        if due and trainer.is_global_zero:
            path = self.path(trainer)
            os.replace(path.resolve(), path.with_name("kept.ckpt"))
            if path.is_symlink():
                path.unlink()


def keep_and_train(folder, kind, strategy, devices, batch_size, settings, step):
    return train(folder, kind, strategy, devices, batch_size, settings, callbacks=[KeepOne(step)], max_steps=16)


def resumed(folder, kind, strategy, devices, batch_size, settings):
    return train(folder, kind, strategy, devices, batch_size, settings, max_steps=16, ckpt_path=str(folder / "checkpoints/kept.ckpt"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fsdp2 sharded", "policy"),
        ("fsdp2", "supervised"),
        *(slow(name, "policy") for name in ("ddp", "fsdp2", "fsdp1")),
        *(slow(name, "supervised") for name in ("ddp", "fsdp2 sharded", "fsdp1")),
    ],
)
def test_a_resumed_run_of_two_processes_repeats_the_uninterrupted_one_to_the_bit(name, kind, tmp_path):
    settings = {"micro_batch_size": 1, "num_iterations": 2, "kl_target": 0.5} if kind == "policy" else {}
    step = 6 if kind == "policy" else 5  # inside a rollout of four updates; inside an epoch
    whole = on_two(tmp_path, keep_and_train, tmp_path, kind, name, 2, 2, settings, step)
    kept = tmp_path / "checkpoints/kept.ckpt"
    assert is_sharded(kept) == (name in STRATEGIES)
    assert read_description(kept)["global_step"] == step
    again = on_two(tmp_path, resumed, tmp_path, kind, name, 2, 2, settings)
    for (one, figures), (two, theirs) in zip(whole, again, strict=True):
        assert far_apart(one, two) == 0 if one else one == two == {}
        assert figures == theirs


@pytest.mark.parametrize(("name", "adapter"), KINDS)
def test_a_checkpoint_of_two_processes_goes_on_in_one(name, adapter, tmp_path):
    settings = {"peft_config": {"r": 4}} if adapter else {}
    uninterrupted, _ = train(tmp_path, "policy", settings=settings, max_steps=16)
    on_two(tmp_path, keep_and_train, tmp_path, "policy", name, 2, 2, settings, 6)
    plugins = {"plugins": WholeCheckpointIO()}
    path = str(tmp_path / "checkpoints/kept.ckpt")
    alone, _ = train(tmp_path, "policy", settings=settings, ckpt_path=path, max_steps=16, **plugins)
    assert far_apart(uninterrupted, alone) < TOLERANCE


@pytest.mark.parametrize(("name", "adapter"), KINDS)
def test_a_checkpoint_of_one_process_goes_on_in_two(name, adapter, tmp_path):
    settings = {"peft_config": {"r": 4}} if adapter else {}
    uninterrupted, _ = keep_and_train(tmp_path, "policy", "auto", 1, 4, settings, 6)
    two, _ = on_two(tmp_path, resumed, tmp_path, "policy", name, 2, 2, settings)[0]
    assert far_apart(uninterrupted, two) < TOLERANCE


def test_a_rollout_that_another_number_of_processes_began_is_made_again(tmp_path):
    settings = {"micro_batch_size": 1, "num_iterations": 2}
    on_two(tmp_path, keep_and_train, tmp_path, "policy", "ddp", 2, 2, settings, 6)
    saved = read_description(tmp_path / "checkpoints/kept.ckpt")
    assert len(saved["p3o_experience"]["pending"]) == 2 and None not in saved["p3o_experience"]["pending"]
    _, figures = resumed(tmp_path, "policy", "auto", 1, 2, settings)
    assert figures["val/ratio"] > 0  # it got to its end


# ---- sharded checkpoints as files


@pytest.fixture
def shards(tmp_path):
    """A checkpoint folder of a policy after 12 updates, and its whole weights."""
    trained, _ = on_two(tmp_path, keep_and_train, tmp_path, "policy", "fsdp2 sharded", 2, 2, {}, 12)[0]
    return tmp_path / "checkpoints/kept.ckpt", trained


def test_a_sharded_checkpoint_is_a_model_source_and_loads_as_a_stage(shards):
    folder, trained = shards
    stage = PairwisePolicy.load_from_checkpoint(folder)
    assert far_apart(weights(stage), trained) == 0
    again = SupervisedPolicy(str(folder))
    assert far_apart(weights(again), trained) == 0


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


@pytest.mark.parametrize("file", [".metadata", "meta.pt", "__0_0.distcp"])
def test_a_payload_in_a_sharded_checkpoint_does_not_run(file, shards, tmp_path, monkeypatch):
    folder, _ = shards
    monkeypatch.chdir(tmp_path)
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(Payload()))
    elif file == "meta.pt":
        torch.save(Payload(), folder / file)
    else:
        plant(folder)
    with pytest.raises(InputError, match=r"could run code|cannot be read"):
        PairwisePolicy.load_from_checkpoint(folder)
    assert not (tmp_path / "payload-ran").exists()


def plant(folder):
    """Point the index's first plain value at a payload at the end of its file."""
    with (folder / ".metadata").open("rb") as file:
        index = pickle.load(file)
    entry = next(item for key, item in index.storage_data.items() if type(index.state_dict_metadata[key.fqn]).__name__.startswith("Bytes"))
    path = folder / entry.relative_path
    entry.offset = path.stat().st_size
    with path.open("ab") as file:
        torch.save(Payload(), file)
    entry.length = path.stat().st_size - entry.offset
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(index, file)


@pytest.mark.parametrize("missing", [".metadata", "meta.pt", "__1_0.distcp"])
def test_a_part_of_a_sharded_checkpoint_is_refused(missing, shards):
    folder, _ = shards
    (folder / missing).unlink()
    with pytest.raises(InputError, match=r"missing|cannot be read"):
        PairwisePolicy.load_from_checkpoint(folder)


def test_a_name_with_a_dot_does_not_reach_through_the_index_into_other_modules(shards):
    folder, _ = shards
    code = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.getcwd\x93)R."
    (folder / ".metadata").write_bytes(code)
    with pytest.raises(InputError, match="could run code"):
        PairwisePolicy.load_from_checkpoint(folder)


def test_the_link_to_the_shards_is_replaced_in_one_step_and_leftovers_go(tmp_path):
    def run():
        (tmp_path / "checkpoints/step-3.shards").mkdir(parents=True, exist_ok=True)  # of a run that was killed
        seen = []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                path = tmp_path / "checkpoints/last.ckpt"
                seen.append(read_description(path)["global_step"] if path.exists() else 0)

        train(tmp_path, "supervised", "fsdp2 sharded", 2, 2, callbacks=[LastCheckpoint(every_n_steps=1), Watch()])
        return seen

    steps = on_two(tmp_path, run)[0]
    assert steps == sorted(steps) and steps[-1] >= 10
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-12.shards"]
    assert (tmp_path / "checkpoints/last.ckpt").is_symlink() and is_sharded(tmp_path / "checkpoints/last.ckpt")


# ---- export


def exported(folder, kind, strategy, settings):
    return train(folder, kind, strategy, 2, 2, settings, callbacks=[Export()], max_steps=2)[0]


@pytest.mark.parametrize("name", [slow("ddp"), "fsdp2", slow("fsdp1")])
@pytest.mark.parametrize(("kind", "adapter"), [("policy", False), ("reward", False), ("supervised", True)])
def test_the_export_is_one_whole_transformers_folder(kind, adapter, name, tmp_path):
    if name == "fsdp1" and adapter:
        pytest.skip("adapters are served by fsdp2")
    settings = {"peft_config": {"r": 4}} if adapter else {}
    trained = on_two(tmp_path, exported, tmp_path, kind, name, settings)[0]
    config = json.loads((tmp_path / "export/config.json").read_text())
    head = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    assert config["architectures"] == ["LlamaForSequenceClassification" if kind == "reward" else "LlamaForCausalLM"]
    loaded = head.from_pretrained(tmp_path / "export").state_dict()
    if not adapter:
        assert far_apart({f"model.{key}": value for key, value in loaded.items()}, trained) == 0
    else:
        plain = {key.removeprefix("model.base_model.model."): value for key, value in trained.items()}
        name = "model.layers.0.self_attn.q_proj"
        up, down = plain[f"{name}.lora_B.default.weight"], plain[f"{name}.lora_A.default.weight"]
        merged = plain[f"{name}.base_layer.weight"] + up @ down * (8 / 4)
        assert torch.allclose(loaded[f"{name}.weight"], merged, atol=1e-6)


def exported_with_adapter(folder, kind, base):
    settings = {"model": base, "peft_config": {"r": 2, "lora_alpha": 8}}
    return train(folder, kind, "fsdp2", 2, 2, settings, callbacks=[Export(adapter=True)], max_steps=2)[0]


@pytest.mark.parametrize("kind", ["policy", slow("supervised"), slow("reward")])
def test_the_adapter_of_a_split_model_alone_on_its_base_is_the_merged_model(kind, tmp_path):
    """As on one process: PEFT finds the base by the name in the adapter's config, and the adapter is as it was trained."""
    from peft import PeftModel

    base = str(stage_of("supervised").export(tmp_path / "base"))
    trained = on_two(tmp_path, exported_with_adapter, tmp_path, kind, base)[0]
    folder = tmp_path / "export/adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base

    head = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    again = PeftModel.from_pretrained(head.from_pretrained(base, **({"num_labels": 1} if kind == "reward" else {})), folder).eval()
    ups = {f"model.{name}": value for name, value in again.state_dict().items() if "lora_B" in name}
    assert ups and far_apart(ups, {name: trained[name] for name in ups}) == 0
    tokens = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])
    merged = head.from_pretrained(tmp_path / "export")
    again.config.pad_token_id = merged.config.pad_token_id
    assert torch.allclose(again(tokens).logits, merged(tokens).logits, atol=1e-5)
    with again.disable_adapter():
        assert (again(tokens).logits - merged(tokens).logits).abs().max() > 1e-3


# ---- the command


REWARD = """
import os
calls = 0
def down(completions, **_):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("LOCAL_RANK", "0") == os.environ["FAILING"]:
        raise ConnectionError("the reward service is down")
    return [float(len(text)) for text in completions]
"""


def command(folder, *arguments, **variables):
    """`p3o ARGUMENTS`, which starts its second process itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    given = [sys.executable, "-m", "p3o_lightning.cli", *map(str, arguments)]
    return subprocess.run(given, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_run_and_its_error_is_the_one_that_is_read(rank, tmp_path):
    (tmp_path / "service.py").write_text(REWARD)
    overlays = ["--config", "configs/debug/policy.yaml", "--config", "configs/ddp.yaml", "--trainer.devices", 2]
    ended = command(tmp_path, "fit", *overlays, "--model.reward_funcs", "service.down", FAILING=str(rank))
    assert ended.returncode == 1
    assert ended.stderr.count("ConnectionError: the reward service is down") == 1
    assert "/gloo/" not in ended.stderr  # what the other process saw of it
    last = [line for line in ended.stderr.splitlines() if line.strip()][-2:]
    assert any("the reward service is down" in line for line in last)


@pytest.mark.slow
def test_the_command_trains_split_and_resumes_in_one_process(tmp_path):
    split = ["--config", "configs/fsdp2.yaml", "--trainer.devices", 2]
    debug = ["fit", "--config", "configs/debug/policy.yaml"]
    strategy = ["--trainer.strategy", "p3o_lightning.sharding.FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"]
    first = command(tmp_path, *debug, *split, *strategy, "--trainer.max_steps", 8)
    assert first.returncode == 0, first.stderr
    last = tmp_path / "runs/debug/policy/checkpoints/last.ckpt"
    assert is_sharded(last) and last.is_symlink()
    again = command(tmp_path, *debug, "--trainer.max_steps", 16, "--ckpt_path", "last")
    assert again.returncode == 0, again.stderr
    assert "resumed from step 8" in again.stdout
    assert read_checkpoint(last)["global_step"] == 16 and not last.is_symlink()
    assert not list(last.parent.glob("*.shards"))
