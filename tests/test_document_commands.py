"""Every command line, option, setting and YAML block of the documents is taken by what it is written for.

A line of a shell may begin only with a program that has a check here. Lines that other tests run as printed: those of tutorial.md
(test_documents.py) and of evaluation.md (test_evaluation_page.py), whose YAML trains there too.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import yaml
from documents import DOCUMENTS, EVERY, ROOT, SHELLS, blocks, code_in_sentences, commands, lines_of_shells
from packaging.requirements import Requirement
from tensorboard import default, program
from torch.distributed.run import get_args_parser

from p3o_lightning import DirectPreferencePolicy, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy, callbacks, cli
from p3o_lightning.commands import frontier_plan, plan_page, trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEBUG = "configs/debug/policy.yaml"
# Programs that no environment of ours has: their options, from their manuals.
ELSEWHERE = {
    "srun": {"--kill-on-bad-exit"},
    "vllm": {"--logprobs-mode", "--generation-config", "--max-model-len", "--dtype", "--model"},
}


def options_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


# ---- programs, each with what it was given


def make(*given: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in given:
        name, value, _ = word.partition("=")
        known = re.findall(r"\$\(([A-Z]+)\)", text) if value else re.findall(r"^([a-z][a-z0-9-]*):", text, re.M)
        assert name in known, word


def pip(action: str, *packages: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {Requirement(line).name for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines}
    assert action == "install" and packages and {*packages} <= declared


def conda(*given: str) -> None:
    assert given[:3] == ("env", "create", "-f") and "dependencies" in yaml.safe_load((ROOT / given[3]).read_text(encoding="utf-8"))


def tensorboard_flags(*given: str) -> argparse.Namespace:
    board = program.TensorBoard(default.get_plugins())
    board.configure(argv=["tensorboard", *given])
    return board.flags


def tensorboard(*given: str) -> None:
    """It has the options, and its folder is one that a recipe writes to."""
    flags = tensorboard_flags(*given)
    written = {yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer", {}).get("default_root_dir") for path in recipes()}
    assert flags.logdir in written


def torchrun(*given: str) -> None:
    """It starts as many processes as the Trainer waits for."""
    taken = get_args_parser().parse_args(given)
    assert find_spec(taken.training_script)
    assert counted(taken.training_script_args) == {"--trainer.num_nodes": taken.nnodes, "--trainer.devices": taken.nproc_per_node}


def srun(*given: str) -> None:
    assert options_of([*given[: given.index("p3o")]]) <= ELSEWHERE["srun"]


def vllm(action: str, *given: str) -> None:
    assert action == "serve" and options_of([*given]) <= ELSEWHERE["vllm"]


def python(flag: str, module: str, *given: str) -> None:
    assert flag == "-m"
    if not module.startswith("vllm."):
        assert find_spec(module)
    else:
        assert options_of([*given]) <= ELSEWHERE["vllm"]


def pytest_of_the_environment(file: str, flag: str, part: str) -> None:
    assert flag == "-k" and re.search(rf"^def test_\w*{part}", (ROOT / file).read_text(encoding="utf-8"), re.M)


def pre_commit(*given: str) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert given == ("install",) and hook["entry"] == "make check"


def git(*given: str) -> None:
    assert given[:3] == ("-c", "core.symlinks=true", "clone")


def source(script: str) -> None:
    assert script == ".venv/bin/activate" and "-m venv .venv\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def export(variable: str) -> None:
    assert variable == "OMP_NUM_THREADS=8"


CHECKS: dict[str, Callable[..., None]] = {
    **{check.__name__: check for check in (make, pip, conda, tensorboard, torchrun, srun, vllm, python, git, source, export)},
    "pre-commit": pre_commit,
    ".venv/bin/pytest": pytest_of_the_environment,
    "p3o": lambda *given: None,  # below
}


def recipes() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


def counted(words: list[str]) -> dict[str, str]:
    """How many nodes and devices the Trainer of a command waits for."""
    return {flag: words[words.index(flag) + 1] for flag in ("--trainer.num_nodes", "--trainer.devices")}


def typed(document: Path) -> Iterator[list[str]]:
    """Every command line, with its program in front: those of shells, and those that stand in a sentence."""
    inline = [shlex.split(code) for code in code_in_sentences(document) if code.partition(" ")[0] in CHECKS and " " in code]
    for words in [*lines_of_shells(document), *inline]:
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # the environment of one command
            words = words[1:]
        yield words


@EVERY
def test_every_line_is_taken_by_its_program(document):
    for program_of, *given in typed(document):
        assert program_of in CHECKS, f"no check of {program_of} in tests/test_document_commands.py"
        CHECKS[program_of](*given)


@EVERY
def test_files_of_ours_that_a_line_names_are_there(document):
    for words in typed(document):
        for word in words:
            if re.match(r"(configs|callbacks|tests|docs|benchmarks|p3o_lightning)/", word) and "<stage>" not in word:
                assert (ROOT / word).exists(), words


def test_a_batch_script_starts_as_many_processes_as_the_trainer_waits_for():
    (script,) = [block.text for block in blocks(ROOT / "docs/distributed.md") if "#SBATCH" in block.text]
    asked = dict(re.findall(r" --([\w-]+)=(\d+)", re.findall(r"^#SBATCH(.*)", script, re.M)[0]))
    (words,) = commands(script)
    assert counted(words) == {"--trainer.num_nodes": asked["nodes"], "--trainer.devices": asked["ntasks-per-node"]}
    assert asked["gpus-per-node"] == asked["ntasks-per-node"] and f"OMP_NUM_THREADS={asked['cpus-per-task']}\n" in script


# ---- p3o


def commands_of(document: Path) -> list[list[str]]:
    """Those of its blocks, and those that stand in a sentence."""
    inline = [code for code in code_in_sentences(document) if code.startswith("p3o ")]
    shells = [block.text for block in blocks(document) if block.language in SHELLS]
    return [words for text in [*shells, *inline] for words in commands(text)]


@cache
def helped(*words: str) -> frozenset[str]:
    """The options that a `p3o` command explains."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return frozenset(re.findall(r"--[\w.-]+", out.getvalue()))


def fit(*options: str) -> None:
    """Parsed as by `p3o fit`, every config read, every value checked; nothing is built."""
    trainer.main(["fit", *options], plan_page.Planned)


@EVERY
def test_commands_parse(document, p3o, monkeypatch, tmp_path):
    """Every config exists and every flag is known, with its value. A config of the reader's own, a name alone, stands for any."""
    monkeypatch.setenv("P3O_DATA", str(tmp_path))
    own = yaml.safe_load((ROOT / DEBUG).read_text())
    for words in commands_of(document):
        command, options = words[0], [word for word in words[1:] if word != "..."]
        if command == "--version":
            assert p3o(command).code == 0
            continue
        assert command in (*cli.COMMANDS, *cli.TRAINER_COMMANDS), words
        for place, word in enumerate(options):
            if options[place - 1] in ("--config", "--plan") and ("/" not in word or word == "FILE"):
                (tmp_path / word).write_text(yaml.safe_dump(own))
        if not options or options == ["--plan"]:  # a name
            continue
        if command in cli.TRAINER_COMMANDS:
            if not {"--help", "--print_config"} & {*options}:
                trainer.main([command, *options], plan_page.Planned)
        elif "--plan" in options:
            assert p3o(command, *options).code in (0, 2), words  # 2: a model that is not here
        else:
            assert options_of(options) <= helped(command), words


@EVERY
def test_options_that_stand_alone_are_options(document, p3o):
    """With a value they are parsed by `p3o fit`; without one, or where they are another program's, they are known."""
    known = {f"--{name}" for name in vars(tensorboard_flags("--logdir", "runs"))}.union(*ELSEWHERE.values(), *map(helped, cli.COMMANDS))
    known |= set(re.findall(r'add_argument\("(--\w+)"', (ROOT / "benchmarks/run.py").read_text(encoding="utf-8")))
    fits = helped("fit").union(helped("fit", "--model", "PairwisePolicy"), helped("fit", "--data", "PreferenceDataModule"))
    for words in (shlex.split(code) for code in code_in_sentences(document) if code.startswith("--")):
        if options_of(words) <= fits and len(words) > 1:
            fit("--config", DEBUG, *words)
        else:
            assert options_of(words) <= known | fits, words


# ---- settings and YAML

STAGES = (SupervisedPolicy, RewardModel, PairwisePolicy, DirectPreferencePolicy)
OWNERS = {
    "model": STAGES,
    "data": (PreferenceDataModule,),
    "trainer": (L.Trainer,),
    "checkpoint": (callbacks.LastCheckpoint,),
    "export": (callbacks.Export,),
    "finite": (callbacks.FiniteGuard,),
    "kl_budget": (callbacks.KLBudget,),
    "collapse": (callbacks.CollapseAlarm,),
    "evaluate": (frontier_plan.Evaluate,),
}


def arguments(owner: type) -> set[str]:
    return {*inspect.signature(owner).parameters}


@EVERY
def test_settings_are_arguments(document):
    """`model.kl_coef`, which may also be an attribute, and `kl_coef: 0.1`, which is a setting of anything that a config builds."""
    strategies = {"inference_mode"}  # of Lightning's own, which has it in **kwargs
    every = set().union(*map(arguments, [owner for owners in OWNERS.values() for owner in owners]), strategies)
    for code in code_in_sentences(document):
        if dotted := re.fullmatch(r"(\w+)\.(\w+)", code):
            prefix, name = dotted.groups()
            assert prefix not in OWNERS or any(name in arguments(owner) or hasattr(owner, name) for owner in OWNERS[prefix]), code
        elif (setting := re.match(r"([\w.]+): \S", code)) and setting[1] not in OWNERS:
            yaml.safe_load(code)
            prefix, _, name = setting[1].rpartition(".")
            assert name in (set().union(*map(arguments, OWNERS[prefix])) if prefix else every), code


YAML = [
    (document, block.text)
    for document in DOCUMENTS
    for block in blocks(document)
    if block.language == "yaml" and document.name != "evaluation.md"
]


@pytest.mark.parametrize(("document", "text"), YAML, ids=[document.name for document, _ in YAML])
def test_yaml_is_read_by_what_it_is_for(document, text, p3o):
    """A plan, which has variants, by `p3o frontier`; all else is a config that is laid over another."""
    content = yaml.safe_load(text)
    (p3o.folder / "page.yaml").write_text(text)
    if "variants" not in content:
        made = p3o.built("fit", "--config", DEBUG, "--config", "page.yaml", "--trainer.max_steps", "1").trainer
        for given in content.get("trainer", {}).get("callbacks", []):
            (built,) = [item for item in made.callbacks if type(item).__name__ == given["class_path"]]
            assert {name: getattr(built, name) for name in given["init_args"]} == given["init_args"]
        return
    assert content.keys() == set(frontier_plan._KEYS.split()), "the page shows every key"
    (p3o.folder / content["from"]).write_text("settings: {model.lr: 0.5}\n")
    for cell in frontier_plan.read_plan("page.yaml").cells(p3o.folder):
        assert cell.job.settings["model.lr"] == 0.5 and cell.job.settings["model.kl_target"] is None
        if cell.job.seed == 0:
            settings = {key: "null" if value is None else value for key, value in cell.job.settings.items()}
            fit("--config", content["config"], *(f"--{key}={value}" for key, value in settings.items()))
