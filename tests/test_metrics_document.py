"""docs/metrics.md names every tag that is logged, and none that is not. A new tag: add its row, and to RUNS a run that logs it."""

import re
from itertools import product
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DOCUMENT = Path(__file__).parent.parent / "docs/metrics.md"
SHORT = ["--trainer.max_steps=6", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1", "--finite.action=skip"]
RUNS = {
    "sft": ["--config", "configs/debug/sft.yaml"],
    "reward": ["--config", "configs/debug/reward.yaml"],
    "p3o": ["--config", "configs/debug/policy.yaml"],
    "ppo": ["--config", "configs/debug/policy.yaml", "--model.objective=ppo"],
    "direct": ["--config", "configs/debug/direct.yaml"],
    "ensemble": [
        "--config",
        "configs/debug/policy.yaml",
        "--model.reward_funcs=Ensemble",
        "--model.reward_funcs.members=[tags_rewards.short, tags_rewards.long]",
    ],
    "judge": ["--config", "configs/debug/policy.yaml", "--model.reward_funcs=tags_rewards.judge"],
}
MINE = """
from p3o_lightning.judges import FunctionJudge

def short(completions, **_):
    return [-float(len(text)) for text in completions]

def long(completions, **_):
    return [float(len(text)) for text in completions]

judge = FunctionJudge(lambda prompts, first, second, **_: [1.0 if len(a) < len(b) else 0.5 for a, b in zip(first, second)])
"""
# what needs more than a short run here -> the test that sees it logged
ELSEWHERE = {"sampling/": "test_sampler_correction.py"}

# the names that dashboards of other trainers have too
FIELD = [
    *(f"objective/{name}" for name in ("kl", "kl_k1", "kl_k2", "kl_k3", "entropy", "scores", "scores_margin", "rlhf_reward")),
    *("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio", "val/ratio_var", "val/contain_eos_token"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "rewards/share_of_letter_e/mean"),
    *(
        f"p3o/{name}"
        for name in ("q_mean", "q_abs", "gap_logratio", "joint_weight_max", "pair_clipfrac", "tie_rate", "duplicate_pair_rate")
    ),
]


def expanded(name: str) -> list[str]:
    """`a/{b,c}`: a/b and a/c."""
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{.*?\})", name)]
    return ["".join(choice) for choice in product(*parts)]


def documented() -> set[str]:
    """What stands in backticks in the first column of a table."""
    cells = [line.split("|")[1] for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return {name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in expanded(code)}


def text_of(test: str) -> str:
    return (Path(__file__).parent / test).read_text(encoding="utf-8")


def plain(tag: str) -> str:
    """A tag as the document has it: any name is <name>, and what the text plugin adds is left out."""
    tag = re.sub("^(rewards|judges)/[^/]+/", r"\1/<name>/", tag.removesuffix("/text_summary"))
    return tag.replace("<name>/sd", "<ensemble>/sd")


@pytest.fixture
def logged(p3o) -> dict[str, set[str]]:
    """The tags of every run, by its name."""
    (p3o.folder / "tags_rewards.py").write_text(MINE)
    tags = {}
    for name, given in RUNS.items():
        run = p3o("fit", *given, "--trainer.default_root_dir", name, *SHORT)
        assert run.code == 0, (name, run)
        events = EventAccumulator(str(p3o.folder / name / "logs/version_0"))
        events.Reload()
        found = [tag for kind in ("scalars", "tensors", "histograms", "images") for tag in events.Tags()[kind]]
        tags[name] = {tag for tag in found if not tag.startswith(("custom_scalars", "_hparams_"))}
        p3o.capsys.readouterr()
        tested = p3o.built("test", *given, "--trainer.default_root_dir", name, "--trainer.limit_test_batches=1")
        tags[f"{name}, test"] = {tag for tag in tested.trainer.callback_metrics if tag.startswith("test/")}
    return tags


def test_every_tag_is_documented_and_every_documented_tag_is_logged(logged):
    everything = {plain(tag) for tags in logged.values() for tag in tags}
    elsewhere = {
        tag
        for tag in documented()
        for start, test in ELSEWHERE.items()
        if tag.startswith(start) and tag.rpartition("/")[0] in text_of(test)
    }
    assert sorted(everything - documented()) == [], "without a row in docs/metrics.md"
    assert sorted(documented() - everything - elsewhere) == [], "in docs/metrics.md, but logged by no run here"
    assert not set(FIELD) - logged["p3o"]


def test_the_document_is_read_as_it_is_meant():
    assert expanded("{val,test}/{a,b}_c") == ["val/a_c", "val/b_c", "test/a_c", "test/b_c"]
    assert (
        plain("rewards/a/mean") == "rewards/<name>/mean"
        and plain("judges/a/tie_rate") == "judges/<name>/tie_rate"
        and plain("samples/text_summary") == "samples"
    )
    assert len(documented()) > 60
