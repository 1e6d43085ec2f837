"""The documents tell the truth: what they name is there, Python runs, and the tutorial works from end to end."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from pathlib import Path

import pytest
from documents import DOCUMENTS, EVERY, ROOT, SHELLS, blocks, commands
from test_chat import chat_tokenizer
from test_metrics_document import documented
from tiny import LLAMA

from p3o_lightning import SupervisedPolicy


def names_in(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M))


@EVERY
def test_the_tests_that_a_document_names_are_there(document):
    """`test_file.py::test_name`, `::test_name` after it, or `test_name` alone; `...` stands for a part of a name."""
    text = document.read_text(encoding="utf-8")
    files = {path.name: names_in(path) for path in (ROOT / "tests").glob("test_*.py")}
    every = set().union(*files.values())
    assert set(re.findall(r"`(?:tests/)?(test_\w+\.py)", text)) <= files.keys()
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::(test_\w+)`", text):
        assert name in files[file], (file, name)
    for name in re.findall(r"`(?:::)?(test_\w+)(?:\[\w+\])?`", text):
        assert name in every or f"{name}.py" in files, name
    for part in re.findall(r"`\.\.\.(_\w+)`", text):
        assert any(part in name for name in every), part


@EVERY
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(?:#([^)]*))?\)", text):
        there = (document.parent / link) if link else document
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (link, anchor)


@EVERY
def test_paths_of_the_repository_exist(document):
    """What is set as code and begins with a folder of ours; `runs/` is written by runs, and `*` stands for some files."""
    for path in re.findall(r"`((?:configs|callbacks|tests|docs|benchmarks|p3o_lightning)/[\w./*-]*)", document.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists(), path


def test_every_answer_of_the_faq_ends_with_where_to_see_it():
    """A figure that is logged, words that the package prints, or what is held elsewhere: a test (above), a command, an option or a setting
    (test_document_commands.py)."""
    printed = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "p3o_lightning").rglob("*.py"))
    answers = [part for part in (ROOT / "docs/faq.md").read_text(encoding="utf-8").split("\n\n") if part.startswith("**")]
    for answer in answers:
        _, *seen = " ".join(answer.split()).split(" See: ")
        assert len(seen) == 1, answer
        named = re.findall(r"`([^`]+)`", seen[0])
        assert named, answer
        for name in named:
            elsewhere = re.match(r"test_\w+$|p3o |make |--|[a-z_]+\.[a-z_]+$", name)
            assert elsewhere or name in documented() or name.rstrip("/") in printed, name
    assert len(answers) > 30


def run_python(text: str, document: Path, names: dict[str, object]) -> None:
    exec(compile(text, str(document.relative_to(ROOT)), "exec"), names)


@pytest.mark.parametrize(
    "document",
    [
        path
        for path in DOCUMENTS
        if path.name not in ("tutorial.md", "README.md") and any(block.language == "python" for block in blocks(path))
    ],
    ids=lambda path: path.name,
)
def test_python_runs_as_printed(document, tmp_path, monkeypatch):
    """The blocks of a page in a row, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": document.stem}
    for block in blocks(document):
        if block.language == "python":
            run_python(block.text, document, names)


# ---- the tutorial, line by line


def test_the_tutorial_works_from_the_file_to_the_model_that_answers(p3o):
    """Its own lines, in its order, with a tiny chat model in the place of the one that `make smollm2` fetches, and two updates a stage."""
    SupervisedPolicy({**LLAMA, "max_position_embeddings": 256}, tokenizer=chat_tokenizer()).export("models/smollm2-135m-instruct")
    document: Path = ROOT / "docs/tutorial.md"
    names: dict[str, object] = {}
    ended, lines = [], []
    for language, text in blocks(document):
        if language == "python":
            run_python(text, document, names)
        elif language == "json":
            assert json.loads(text).keys() == {"prompt", "chosen", "rejected"}
        for words in commands(text) if language in SHELLS else ():
            short = {
                "fit": ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"],
                "validate": ["--trainer.limit_val_batches", "1"],
                "predict": ["--trainer.limit_predict_batches", "1"],
            }
            lines.append(words)
            longer = ["--data.max_length", "256", "--data.max_prompt_length", "null"] if words[0] in short else []  # its tokens are bytes
            ended.append(p3o(*words, *short.get(words[0], []), *longer))
            assert ended[-1].code == 0, (words, ended[-1])
    assert [words[0] for words in lines] == [*["doctor"] * 2, *["fit"] * 3, *["validate"] * 3, "predict"]
    assert "160 rows, 160 usable, 144 for training, 16 for validation" in ended[2].err
    rows = [json.loads(line) for line in Path("runs/tutorial/policy/predictions.jsonl").read_text().splitlines()]
    assert rows and all(isinstance(text, str) for row in rows for text in row["responses"])
    assert p3o.capsys.readouterr().out.strip(), "the pipeline answered"
    card = Path("runs/tutorial/policy/export/README.md").read_text()
    assert "val/scores" in card.replace("&#45;", "-").replace("&#47;", "/") and "2 updates" in card


def test_the_functions_of_the_algorithm_are_there():
    """Each formula of docs/algorithm.md names the function that computes it."""
    page = (ROOT / "docs/algorithm.md").read_text(encoding="utf-8").split("## Formulas")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("|")][2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", row[2])}
    known = {name for module in ("objectives", "kl_control") for name in vars(import_module(f"p3o_lightning.{module}"))}
    assert named <= known and {"p3o_loss", "bradley_terry_loss", "adapted_kl_coef"} <= named


def test_the_properties_of_the_algorithm_are_held():
    """Each id on docs/algorithm.md, such as A2 or B8c, is in the name of a test where the page says."""
    page = (ROOT / "docs/algorithm.md").read_text(encoding="utf-8")
    files = ["objectives_p3o", "objectives_clip", "objectives_tokens", "sampler_correction", "baselines_against_p3o", "score_shift"]
    held = {part for file in files for name in names_in(ROOT / f"tests/test_{file}.py") for part in name.split("_")}
    named = set(re.findall(r"\b[A-K][0-9]+[a-z]?\b", page))
    assert len(named) > 30 and {name for name in named if name.lower() not in held} == set()


# ---- the README


README = ROOT / "README.md"


def test_fifteen_lines_are_enough(tmp_path, monkeypatch):
    """What the README's Python leaves is a model that transformers loads."""
    from transformers import AutoModelForCausalLM

    (lines,) = [block.text for block in blocks(README) if block.language == "python"]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(tmp_path)
    run_python(lines, README, {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "aligned").config.model_type == "llama"


def test_the_tree_is_the_repositorys():
    """Every path in it exists, and every module, document, callback folder and recipe folder is in it."""
    tree = [block.text for block in blocks(README) if block.language == "text"][-1]
    named = {word for line in tree.splitlines() if line.strip() for word in [line.split()[0]]}
    assert [path for path in named if not (ROOT / path).exists()] == []
    modules = {path.name for path in (ROOT / "p3o_lightning").glob("*.py")} - {"__init__.py"}
    missing = {module for module in modules if module not in tree}
    assert missing == set(), "new modules are placed in README's tree"


def test_the_documents_are_listed():
    text = README.read_text(encoding="utf-8")
    assert [path.name for path in ROOT.glob("docs/*.md") if f"(docs/{path.name})" not in text] == []


# ---- docstrings


def test_examples_in_docstrings_are_true():
    """Doctests of every module that has one, run here so that `make test` runs them."""
    import doctest

    tried = 0
    for path in sorted((ROOT / "p3o_lightning").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
            assert result.failed == 0, path
            tried += result.attempted
    assert tried >= 20
    assert os.environ["OMP_NUM_THREADS"] == "1"
