"""The README keeps its promises: its Python lines run as they stand, its paths and make targets exist, its commands parse."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_lines_run_exactly_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(lines, "README.md", "exec"), names)

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").config.model_type == "llama"
    assert len([line for line in lines.splitlines() if line.strip()]) <= 16


def test_every_path_in_the_tree_and_in_links_exists() -> None:
    (tree,) = blocks("text")[-1:]
    named = [line.split()[0] for line in tree.splitlines() if line.strip()]
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [path for path in named + links if not (ROOT / path).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", README, re.M)) <= targets


def test_configs_in_commands_exist() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("p3o ")]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[1] in ("fit", "validate", "test", "predict", "demo", "doctor", "report", "winrate"), command
        for flag, value in pairwise(words):
            if flag == "--config" and value.startswith("configs/"):
                assert (ROOT / value).is_file(), command
