"""docs/evaluation.md keeps its promises: its commands run, its configs train, its Python prints what it says, its figures are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_server_judge import FakeServer, longer
from tiny import LETTERS, LLAMA, letters, policy

from p3o_lightning import RewardModel

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line]


@pytest.fixture
def place(p3o, monkeypatch):
    """A folder with everything that the page names."""
    monkeypatch.setenv("no_proxy", "*")
    rows = [{"prompt": LETTERS[i % 8] + LETTERS[i // 8], "chosen": "a" * (1 + i % 3), "rejected": "hg"[i % 2]} for i in range(24)]
    for name in ("held-out.jsonl", "preferences.jsonl", "prompts.jsonl"):
        (p3o.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("policy.jsonl", "sft.jsonl"):
        (p3o.folder / name).write_text("".join(json.dumps({"prompt": row["prompt"], "responses": [name]}) + "\n" for row in rows))
    (p3o.folder / "my_rewards.py").write_text("def gold_score(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    for number, name in enumerate(("reward", "reward-0", "reward-1", "reward-2")):
        torch.manual_seed(number)
        RewardModel(LLAMA, tokenizer=letters()).export(f"runs/{name}/export")
    for name in ("policy", "sft"):
        policy().export(f"runs/{name}/export")
    return p3o


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_printed(place, command):
    words = shlex.split(command)
    assert words[0] == "p3o"
    if "http://localhost:8000/v1" in words:
        server = FakeServer()
        server.answer = longer
        words[words.index("http://localhost:8000/v1")] = server.url
    ended = place(*words[1:])
    assert ended.code == 0, ended.err


def test_every_figure_of_the_tables_is_shown(place):
    shown = place(*shlex.split(COMMANDS[0])[1:]).out + place(*shlex.split(COMMANDS[-1])[1:]).out
    shown += place(*shlex.split(COMMANDS[2])[1:]).out
    report = (
        "accuracy (a tie/length rule/lengths within 10 %/log-loss/Brier score/ECE/temperature/shift between prompts/spread within a prompt"
    )
    report += "/share of the shift/EOS: score with it/EOS: the better one, cut off, still wins"
    ensemble = "/accuracy of the mean/accuracy of the minimum/gap: sd over members/members rank differently/accuracy where all agree"
    rates = "/A beats B/the longer response wins/responses that ended/without a verdict"
    for words in (report + ensemble + rates).split("/"):
        assert words in " ".join(shown.split()), words


@pytest.mark.parametrize("number", [0, 1], ids=["judge", "ensemble"])
def test_a_config_trains_as_printed(place, number):
    block = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[number]
    if number == 1:  # the page shows the key alone
        block = "model:\n  class_path: PairwisePolicy\n  init_args:\n" + block
    server = FakeServer()
    server.answer = longer
    (place.folder / "page.yaml").write_text(block.replace("http://localhost:8000/v1", server.url))
    letters().save_pretrained("tokenizer")
    (place.folder / "run.yaml").write_text(
        f"model:\n  class_path: PairwisePolicy\n  init_args: {{model: {LLAMA}, tokenizer: tokenizer, max_completion_length: 3}}\n"
        "data:\n  class_path: PreferenceDataModule\n  init_args: {path: prompts.jsonl, batch_size: 4}\n"
        "trainer: {default_root_dir: run, accelerator: cpu, max_steps: 2, limit_val_batches: 0}\n"
    )
    figures = place.built("fit", "--config", "run.yaml", "--config", "page.yaml").trainer.callback_metrics
    wanted = ["rewards/reward-2/mean", "rewards/ensemble/sd"] if number else ["judges/judge/position_bias", "judges/judge/no_verdict"]
    assert set(wanted) <= set(figures) and ("objective/scores" in figures) == bool(number)
    assert server.requests if number == 0 else not server.requests


def test_the_python_lines_print_what_they_say(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(code, "evaluation.md", "exec"), {})
    printed = capsys.readouterr().out
    for words in re.findall(r"print\(.*?\)  # (\S+?), \.\.\.", code):
        assert words in printed
    assert printed.startswith("WinRate(win_rate=0.5, ")
