"""The documents as tests read them: their fenced blocks, their code in sentences, and the commands of both."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
)
EVERY = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
SHELLS = ("bash", "sh", "console")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    return [Block(*found) for found in FENCED.findall(document.read_text(encoding="utf-8"))]


def code_in_sentences(document: Path) -> list[str]:
    """What stands between backticks, which may begin in one line and end in the next."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", document.read_text(encoding="utf-8")))]


def lines_of_shells(document: Path) -> Iterator[list[str]]:
    """The words of every line that is typed: those of its blocks, and those that are indented by four; a backslash joins lines."""
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    indented = "".join(re.findall(r"^    (?=\w)(.*\n)", text, re.M))
    shells = [block.text for block in blocks(document) if block.language in SHELLS]
    for line in "".join([indented, *shells]).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `p3o` command in lines of a shell, whoever starts it; a backslash joins lines."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("<stage>", "policy"), comments=True)
        starts = [place for place, word in enumerate(words) if word == "p3o_lightning.cli"]
        starts += [place for place, word in enumerate(words) if word in ("p3o", ".venv/bin/p3o")]
        if starts:
            yield words[starts[0] + 1 :]
