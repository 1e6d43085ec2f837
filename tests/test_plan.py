"""`p3o doctor --plan`: the memory of a run from its config alone, without weights, data or folders; and docs/distributed.md's commands."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from running import python
from tiny import LLAMA, letters, policy, prompts, trainer

from p3o_lightning import DirectPreferencePolicy, PairwisePolicy, RewardModel
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.casting import STEPS
from p3o_lightning.commands import plan, plan_page
from p3o_lightning.commands.trainer import main
from p3o_lightning.errors import InputError

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
DEBUG = "configs/debug/policy.yaml"


def planned(p3o, *configs, **overlay):
    """The plan of configs, with one more laid over them."""
    if overlay:
        (p3o.folder / "over.yaml").write_text(yaml.safe_dump(overlay))
        configs += ("over.yaml",)
    return plan.Plan(main(["fit", *(f"--config={config}" for config in configs)], plan_page.Planned).settings)


def of_model(**settings):
    return {"model": {"init_args": settings}}


# ---- what it prints


def test_a_config_of_each_stage(p3o):
    parts = {
        "sft": ["SupervisedPolicy", "backward", "20 updates x 8 rows = 160 rows"],
        "reward": ["RewardModel", "backward", "20 updates x 8 pairs = 160 pairs"],
        "direct": ["DirectPreferencePolicy", "backward", "scoring", "reference", "20 updates x 8 pairs = 160 pairs"],
        "policy": [
            "PairwisePolicy, training 66,576 of 66,576 parameters",
            "sampling",
            "scoring",
            "a rollout: 8 prompts x 2 responses, 4 updates; 48 updates = 12 rollouts = 192 responses",
            "experience",
        ],
    }
    for stage, pieces in parts.items():
        shown = p3o("doctor", "--plan", f"configs/debug/{stage}.yaml")
        assert shown.code == 0 and shown.err == "", shown
        for piece in [*pieces, "part", "formula", "peak", "checkpoint", "this machine has", "it fits"]:
            assert piece in shown.out, (piece, shown.out)
        peak = re.search(r"peak ([\d.]+ .iB): (.*)", shown.out)
        assert f"backward {peak.group(1)}" in peak.group(2)
    assert not any(p3o.folder.iterdir())


def test_overlays_say_how_many_processes_there_are(p3o):
    (p3o.folder / "eight.yaml").write_text("trainer: {devices: 8, num_nodes: 8}\n")
    shown = p3o("doctor", "--plan", DEBUG, "--plan", "configs/fsdp2.yaml", "--plan", "eight.yaml")
    assert shown.code == 0 and "bytes on each of 64 processes, split" in shown.out
    assert "/ 64 processes" in shown.out and "gathered policy" in shown.out
    assert "a rollout: 512 prompts x 2 responses" in shown.out
    alone, ddp = planned(p3o, DEBUG), planned(p3o, DEBUG, "configs/ddp.yaml", "eight.yaml")
    split = planned(p3o, DEBUG, "configs/fsdp2.yaml", "eight.yaml")
    assert split.estimate.size("policy") == alone.estimate.size("policy") // 64
    assert ddp.estimate.size("policy") == alone.estimate.size("policy") and ddp.estimate.size("buckets") > 0
    by_class = {"class_path": "p3o_lightning.sharding.FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}
    assert planned(p3o, DEBUG, "eight.yaml", trainer={"strategy": by_class}).work.split


# ---- the sizes are those of the run


def test_the_sizes_are_those_of_the_model_that_fit_builds(p3o):
    for settings in ({}, {"peft_config": {"r": 4}}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "peft_config": {"r": 4}}):
        made = planned(p3o, DEBUG, **of_model(**settings))
        given = made.given
        real = PairwisePolicy(given["model"], given["reward_funcs"], tokenizer="bytes", **settings)
        parameters = list(real.model.parameters())
        assert made.estimate.size("policy") == sum(item.numel() * item.element_size() for item in parameters)
        assert made.estimate.size("gradients") == sum(item.numel() * item.element_size() for item in parameters if item.requires_grad)
        assert made.estimate.size("reference") == (0 if "peft_config" in settings else made.estimate.size("policy"))
        assert (made.work.rows, made.work.prompt_tokens, made.work.completion_tokens) == (8, 256, 12)


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 4}}, {"dtype": "bfloat16"}], ids=str)
def test_the_sizes_of_pairs_and_their_reference_are_those_of_the_run(p3o, settings):
    made = planned(p3o, "configs/debug/direct.yaml", **of_model(**settings))
    real = DirectPreferencePolicy(made.given["model"], tokenizer="bytes", **settings)
    parameters = list(real.model.parameters())
    beside = 0 if real.reference is real.model else sum(item.numel() * item.element_size() for item in real.reference.parameters())
    assert made.estimate.size("policy") == sum(item.numel() * item.element_size() for item in parameters)
    assert made.estimate.size("gradients") == sum(item.numel() * item.element_size() for item in parameters if item.requires_grad)
    assert made.estimate.size("reference") == beside and (beside > 0) == ("peft_config" not in settings)
    assert (made.work.rows, made.work.tokens) == (16, 256)


def test_a_critic_is_part_of_what_trains(p3o):
    plain, made = planned(p3o, DEBUG), planned(p3o, DEBUG, **of_model(objective="ppo"))
    real = PairwisePolicy(made.given["model"], made.given["reward_funcs"], tokenizer="bytes", objective="ppo")
    size = sum(item.numel() * item.element_size() for item in real.parameters())
    assert made.estimate.size("policy") == made.estimate.size("gradients") == made.estimate.size("optimizer") / 2 == size
    assert made.estimate.size("reference") == plain.estimate.size("reference") == plain.estimate.size("policy") < size
    assert made.estimate.size("values") > plain.estimate.size("values") == 0
    assert made.estimate.host - plain.estimate.host == 4 * 8 * 2 * 12  # a value for each token of 8 x 2 responses


def test_a_server_samples_instead_of_the_run(p3o):
    local, made = planned(p3o, DEBUG), planned(p3o, DEBUG, "configs/vllm.yaml")
    for name in ("key-value cache", "drawing"):
        assert local.estimate.size(name) > made.estimate.size(name) == 0
    assert made.estimate.host - local.estimate.host == 4 * 8 * 2 * 12  # each token's log-probability under the server


def test_weights_laid_out_to_sample_are_counted_on_a_cpu(p3o, monkeypatch):
    long = {"max_completion_length": STEPS}
    made = planned(p3o, DEBUG, **of_model(**long))
    real = PairwisePolicy(made.given["model"], made.given["reward_funcs"], tokenizer="bytes")
    linear = [item.weight for item in real.model.modules() if isinstance(item, torch.nn.Linear)]
    size = 4 * sum(weight.numel() for weight in linear)
    assert made.estimate.size("copied weights") == size > 0
    for settings in ({}, {**long, "dtype": "bfloat16"}, {**long, "generation": "vllm"}):
        assert planned(p3o, DEBUG, **of_model(**settings)).estimate.size("copied weights") == 0
    mixed = {"trainer": {"precision": "bf16-mixed"}}
    assert planned(p3o, DEBUG, **mixed).estimate.size("copied weights") == size / 2
    rounded = planned(p3o, DEBUG, **of_model(**long), trainer={"precision": "bf16-true"})
    assert rounded.estimate.size("copied weights") == 0
    assert planned(p3o, DEBUG, **of_model(**long, torch_compile=True)).estimate.size("copied weights") == size  # it samples as written
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert planned(p3o, DEBUG, **of_model(**long), trainer={"accelerator": "auto"}).estimate.size("copied weights") == 0


def test_the_trainers_precision_changes_weights_or_activations(p3o):
    full, half, mixed = (planned(p3o, DEBUG, trainer={"precision": name}) for name in ("32-true", "bf16-true", "bf16-mixed"))
    assert half.estimate.size("policy") == full.estimate.size("policy") / 2
    assert mixed.estimate.size("policy") == full.estimate.size("policy")
    assert mixed.estimate.size("activations") < 0.8 * full.estimate.size("activations")
    assert mixed.estimate.size("half-precision copies") > full.estimate.size("half-precision copies") == 0


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, 0),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}, 1),
        ({"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}, 2),
    ],
)
def test_the_optimizer_is_the_one_given(p3o, optimizer, moments):
    made = planned(p3o, DEBUG, **of_model(optimizer=optimizer))
    assert made.estimate.size("optimizer") == moments * made.estimate.size("gradients")
    assert bool(made.estimate.size("update")) == (optimizer is not None)  # the default one's step needs no copy of the weights


def test_a_folder_needs_no_weights_and_the_data_need_not_be_there(p3o):
    stage = RewardModel(LLAMA, tokenizer=letters())
    stage.model.config.save_pretrained(p3o.folder / "reward")
    stage.tokenizer.save_pretrained(p3o.folder / "reward")
    (p3o.folder / "base").mkdir()
    config = {key: value for key, value in LLAMA.items() if key != "initializer_range"} | {
        "vocab_size": 10,
        "architectures": ["LlamaForCausalLM"],
    }
    (p3o.folder / "base/config.json").write_text(json.dumps(config))
    letters().save_pretrained(p3o.folder / "base")
    over = of_model(model="base", tokenizer="base", reward_funcs="./reward")
    made = planned(p3o, DEBUG, **over, data={"init_args": {"path": "${NOT_SET}/nowhere.jsonl"}})
    assert made.model.parameters == sum(item.numel() for item in policy().model.parameters())
    assert made.estimate.size("reward") == 4 * sum(item.numel() for item in stage.model.parameters())
    assert not made.notes


def test_a_checkpoint_is_a_source(p3o):
    stage = policy(peft_config={"r": 2})
    trainer(p3o.folder, max_steps=1, callbacks=[LastCheckpoint()]).fit(stage, stage.wrap_train_dataloader(prompts()))
    checkpoint = str(p3o.folder / "checkpoints/last.ckpt")
    made = planned(p3o, DEBUG, **of_model(model=checkpoint, tokenizer=None))
    assert made.model.parameters == sum(item.numel() for item in policy().model.parameters())  # the adapter is merged


def test_what_is_assumed_is_said(p3o):
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    (p3o.folder / "over.yaml").write_text(
        yaml.safe_dump(of_model(model=gpt2, reward_funcs="runs/reward/export", optimizer={"class_path": "torch.optim.Adagrad"}))
    )
    shown = p3o("doctor", "--plan", DEBUG, "--plan", "over.yaml")
    for piece in ("those of gpt2 may differ", "'runs/reward/export' is not there yet", "Adagrad is counted as AdamW"):
        assert piece in shown.out, shown


# ---- what cannot be planned


@pytest.mark.parametrize(
    ("overlay", "pieces"),
    [
        ({"model": {"init_args": {"kl_coeff": 1}}}, ["model.kl_coeff is no key"]),
        (of_model(num_generations=1), ["model.num_generations is 1"]),
        (of_model(micro_batch_size=3), ["model.micro_batch_size is 3", "data.batch_size is 8"]),
        (of_model(model="nobody/nothing-of-the-kind", tokenizer="bytes"), ["'nobody/nothing-of-the-kind'", "local cache"]),
        (of_model(model="./nowhere"), ["'./nowhere'", "no such folder", "Run the stage that makes it"]),
        (of_model(model="nowhere.ckpt"), ["'nowhere.ckpt'", "no such file"]),
        (of_model(model={"model_type": "llama", "hidden_sise": 8}), ["hidden_sise", "hidden_size"]),
        (of_model(peft_config={"rank": 4}), ["model.peft_config", "rank"]),
        ({"data": {"init_args": {"batch_size": 0}}}, ["data.batch_size is 0"]),
        ({"trainer": {"devices": 0}}, ["trainer.devices is 0"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_takes_one_line(p3o, overlay, pieces):
    (p3o.folder / "over.yaml").write_text(yaml.safe_dump(overlay))
    error = p3o("doctor", "--plan", DEBUG, "--plan", "over.yaml").error
    assert all(piece in error for piece in pieces), error
    assert [path.name for path in p3o.folder.iterdir()] == ["over.yaml"]


def test_a_hub_name_is_looked_up_in_the_local_cache_alone(p3o, monkeypatch):
    class Hub:
        @staticmethod
        def from_pretrained(name, **options):
            assert options == {"trust_remote_code": False, "local_files_only": True}
            raise OSError("not there")

    monkeypatch.setattr(plan, "AutoConfig", Hub)
    with pytest.raises(InputError, match="'a/b', no folder here and not in the hub's local cache"):
        planned(p3o, DEBUG, **of_model(model="a/b"))


def test_bad_arguments_take_one_line(p3o):
    assert "no such file" in p3o("doctor", "--plan", "nowhere.yaml").error
    assert "not allowed with" in p3o("doctor", "--plan", DEBUG, "--config", DEBUG).error


def test_nothing_is_imported_for_it_where_a_package_is_missing():
    done = python(
        "import sys\nfrom p3o_lightning import cli\nfrom p3o_lightning.commands import doctor\n"
        "doctor._version = lambda name: '2.6.2' if name == 'lightning' else '9'\n"
        f"try: cli.main(['doctor', '--plan', '{DEBUG}'])\n"
        "except SystemExit as stop: print('exit', stop.code, {'torch', 'lightning'} & set(sys.modules))"
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "exit 2 set()" and all(line.startswith("problem") for line in lines[:-1]), done


# ---- whether it fits


@pytest.mark.parametrize(
    ("overlay", "advice"),
    [
        ({}, "lower model.micro_batch_size"),
        (
            of_model(micro_batch_size=1, max_completion_length=1) | {"data": {"init_args": {"max_length": 8, "batch_size": 1}}},
            "train adapters",
        ),
        ({"data": {"init_args": {"batch_size": 4096}}}, "lower data.batch_size"),
        (of_model(micro_batch_size=1) | {"data": {"init_args": {"batch_size": 1}}}, "lower data.max_length or model.max_completion_length"),
    ],
)
def test_where_it_does_not_fit_one_thing_is_advised(p3o, monkeypatch, overlay, advice):
    monkeypatch.setattr(plan, "memory_here", lambda: (2**21, 2**10))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (p3o.folder / "over.yaml").write_text(yaml.safe_dump(overlay))
    shown = p3o("doctor", "--plan", DEBUG, "--plan", "over.yaml")
    assert shown.code == 0, shown
    assert f"it does not fit: {advice}" in shown.out.splitlines()[-1], shown.out
    assert "this machine has 2.0 MiB, 1.0 KiB free for 1 process" in shown.out


def test_a_policy_that_is_gathered_is_not_made_smaller_by_more_processes(p3o):
    tall = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 200, "num_attention_heads": 1}
    short = {"init_args": {"max_length": 2, "batch_size": 1}}
    over = of_model(model=tall, micro_batch_size=1, max_completion_length=1, dtype="bfloat16", peft_config={"r": 1})
    made = planned(p3o, DEBUG, "configs/fsdp2.yaml", **over, data=short, trainer={"devices": 64})
    assert "however many there are" in made.advice()


# ---- the document


def test_the_documents_commands_can_be_run(p3o):
    text = "\n".join(re.findall(r"```bash\n(.*?)```", DOCUMENT, re.S)).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in text.splitlines() if re.search(r"\bp3o |p3o_lightning.cli ", line)]
    assert {words[1] for words in found if words[0] == "p3o"} == {"fit", "doctor"} and len(found) >= 6
    (p3o.folder / "policy.yaml").write_bytes((ROOT / DEBUG).read_bytes())  # the reader's own
    for words in found:
        at = words.index("p3o_lightning.cli" if "p3o_lightning.cli" in words else "p3o")
        command, *arguments = words[at + 1 :]
        assert all((ROOT / value).is_file() for flag, value in pairwise(arguments) if flag == "--config" and "/" in value), words
        if command == "doctor":
            assert p3o(command, *arguments).code == 0
        elif "configs/smollm2-hh/policy.yaml" not in arguments:  # its models are made by its earlier stages
            plan.Plan(main([command, *arguments], plan_page.Planned).settings)


def test_the_documents_links_lead_somewhere():
    assert all((ROOT / "docs" / path).exists() for path in re.findall(r"\]\(([^)#:]+)\)", DOCUMENT))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", DOCUMENT)
    assert named and all(f"def {name}(" in tests for name in named)
    assert all((ROOT / path).is_file() for path in re.findall(r"`((?:tests|p3o_lightning|configs)/[\w./]+)`", DOCUMENT))
