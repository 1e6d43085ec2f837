"""Every recipe is a file that runs: its command stands on top, its classes are built, and its stages train in a row on stand-ins."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from running import scalars
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from p3o_lightning import DirectPreferencePolicy, PairwisePolicy, RewardModel, SupervisedPolicy
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.commands.demo_task import write_task
from p3o_lightning.models import load_policy
from p3o_lightning.seeds import mix
from p3o_lightning.tokenizers import byte_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(path.relative_to(CONFIGS.parent).as_posix() for path in CONFIGS.rglob("*.yaml"))
RECIPES = [name for name in FILES if "class_path" in yaml.safe_load((CONFIGS.parent / name).read_text()).get("model", {})]
STAGES = ("sft", "reward", "policy")
FAMILIES = sorted({Path(name).parent.as_posix() for name in RECIPES})
CLASSES = {"sft": SupervisedPolicy, "reward": RewardModel, "policy": PairwisePolicy, "direct": DirectPreferencePolicy}
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of what a recipe needs from elsewhere: the demo's task, a small chat model, the real data."""
    write_task(folder / "runs/demo", seed=0, demonstrations=200, pairs=200)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = load_policy({"model_type": "llama", "max_position_embeddings": 512, **TINY}, tokenizer)
    for name in ("models/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M"):  # the second in place of the hub's
        for writer in (model, tokenizer):
            writer.save_pretrained(folder / name)
    rows = []
    for number in range(1200):
        question = f"\n\nHuman: What is {mix(number) % 10_000} good for?\n\nAssistant:"
        rows.append({"chosen": question + " Counting.", "rejected": question + " No idea, and I would rather not say."})
    data = folder / "data/hh-rlhf/harmless-base-test.jsonl.gz"
    data.parent.mkdir(parents=True)
    data.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.setenv("P3O_DATA", str(folder / "data"))
    posts = [f"SUBREDDIT: r/AskReddit\n\nTITLE: Day {number}\n\nPOST: It rained.\n\nTL;DR:" for number in range(120)]
    summaries = {"completion": " Rain.", "chosen": " It rained.", "rejected": " I do not know."}
    for name, columns in (("tldr", ["completion"]), ("tldr-preference", ["chosen", "rejected"])):  # in place of the hub's
        path = folder / "trl-lib" / name / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"prompt": post, **{key: summaries[key] for key in columns}}) + "\n" for post in posts))


def holds(printed, given):
    """Whether all that is given is printed; what is printed may have more, such as the defaults of a schedule."""
    if isinstance(given, dict):
        return all(name in printed and holds(printed[name], value) for name, value in given.items())
    return printed == given


def test_the_recipes_are_found():
    assert {"configs/debug", "configs/demo"} <= set(FAMILIES)
    assert all(f"{family}/{stage}.yaml" in RECIPES for family in FAMILIES for stage in STAGES)


@pytest.mark.parametrize("name", FILES)
def test_its_command_stands_on_top_and_parses(p3o, name):
    top = [line for line in (CONFIGS.parent / name).read_text().splitlines()[:6] if line.startswith("#")]
    assert top, "a recipe begins with what it does, and its command"
    commands = [line.lstrip("# ").split("  #")[0].split() for line in top if "p3o fit " in line]
    assert any(name in command for command in commands), f"its own command is not on top of {name}"
    command = next(command for command in commands if name in command)
    shown = p3o(*command[1:], "--print_config")
    assert shown.code == 0, shown
    printed = yaml.safe_load(shown.out)
    given = yaml.safe_load((CONFIGS.parent / name).read_text())
    if name in RECIPES:
        stage = Path(name).stem
        assert printed["model"]["class_path"] == f"p3o_lightning.{CLASSES[stage].__name__}"
        assert printed["trainer"]["default_root_dir"] == f"runs/{Path(name).parent.name.removeprefix('configs/')}/{stage}"
        assert holds(printed["model"]["init_args"], given["model"]["init_args"])


@pytest.mark.parametrize("family", FAMILIES)
def test_its_stages_train_in_a_row(p3o, family, monkeypatch):
    """Each from what the one before left: two updates a stage, with every class, path and setting of the recipe."""
    stand_ins(p3o.folder, monkeypatch)
    for stage in STAGES:
        config = f"{family}/{stage}.yaml"
        short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
        run = p3o("fit", "--config", config, *short)
        assert run.code == 0, (config, run)
        root = p3o.folder / yaml.safe_load((CONFIGS.parent / config).read_text())["trainer"]["default_root_dir"]
        assert sorted(path.name for path in root.iterdir()) == ["checkpoints", "config.yaml", "export", "logs"]
        head = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        head.from_pretrained(root / "export")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_counts_to_its_validation_over_the_ends_of_epochs(name):
    """Else Lightning refuses an interval longer than an epoch, which the reader's own file may well be."""
    trainer = yaml.safe_load((CONFIGS.parent / name).read_text())["trainer"]
    assert "val_check_interval" not in trainer or trainer.get("check_val_every_n_epoch", 1) is None


def test_a_recipe_runs_on_a_small_file_of_the_readers_own(p3o, monkeypatch):
    """40 rows make epochs of four batches; the recipe's own interval gives one validation, at the end."""
    stand_ins(p3o.folder, monkeypatch)
    rows = [{"prompt": f"What is {number}?", "chosen": "A number.", "rejected": "No idea."} for number in range(40)]
    (p3o.folder / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage, figure in (("sft", "val/loss"), ("reward", "val/accuracy"), ("policy", "val/scores")):
        name = f"configs/smollm2-hh/{stage}.yaml"
        short = ["--model.max_completion_length", 4] if stage == "policy" else []
        run = p3o("fit", "--config", name, "--data.path", "small.jsonl", "--trainer.accelerator", "cpu", *short)
        assert run.code == 0, run
        trainer = yaml.safe_load((CONFIGS.parent / name).read_text())["trainer"]
        (logs,) = (p3o.folder / trainer["default_root_dir"] / "logs").iterdir()
        assert [step + 1 for step, _ in scalars(logs)[figure]] == [trainer["max_steps"]]  # Lightning counts updates from 0


def test_the_recipe_of_summaries_runs_on_local_files_of_the_same_columns(p3o, monkeypatch):
    stand_ins(p3o.folder, monkeypatch)
    posts = [f"SUBREDDIT: r/tea\nTITLE: Number {number}\nPOST: I have {number} cups.\nTL;DR:" for number in range(48)]
    files = {
        "summaries": [{"prompt": post, "completion": " Many cups."} for post in posts],
        "comparisons": [{"prompt": post, "chosen": " Many cups.", "rejected": " Tea."} for post in posts],
    }
    for name, rows in files.items():
        (p3o.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage, name in (("sft", "summaries"), ("reward", "comparisons"), ("policy", "summaries")):
        short = ["--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--data.val_path", "null", "--data.val_fraction", 0.25]
        if stage == "policy":
            short += ["--model.max_completion_length", 4]
        run = p3o("fit", "--config", f"configs/tldr/{stage}.yaml", "--data.path", f"{name}.jsonl", *short)
        assert run.code == 0, (stage, run)
        assert "48 rows, 48 usable" in run.err, run


@pytest.mark.parametrize("stage", CLASSES)
def test_a_debug_recipe_runs_to_its_end(p3o, stage, monkeypatch):
    """The export gives the outputs of the checkpoint's model; the policy saves after every rollout."""
    saved = []
    save = LastCheckpoint.save
    monkeypatch.setattr(LastCheckpoint, "save", lambda self, trainer: saved.append(trainer.global_step) or save(self, trainer))
    config = yaml.safe_load((CONFIGS / f"debug/{stage}.yaml").read_text())
    assert p3o("fit", "--config", f"configs/debug/{stage}.yaml").code == 0
    root = p3o.folder / config["trainer"]["default_root_dir"]
    steps = config["trainer"]["max_steps"]
    assert saved[-1] == steps
    if stage == "policy":
        settings, prompts = config["model"]["init_args"], config["data"]["init_args"]["batch_size"]
        rollout = settings["num_iterations"] * prompts // settings["micro_batch_size"]
        assert steps >= 40 and set(range(rollout, steps + 1, rollout)) <= set(saved)

    kept = CLASSES[stage].load_from_checkpoint(root / "checkpoints/last.ckpt").model.eval()
    head = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    exported, tokenizer = head.from_pretrained(root / "export").eval(), AutoTokenizer.from_pretrained(root / "export")
    batch = tokenizer(["Why?", "Tell me about tea."], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(exported(**batch).logits, kept(**batch).logits)
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in exported.state_dict().items())
