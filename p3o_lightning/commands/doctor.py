"""`p3o doctor`: what is installed, what the machine has, whether the start-up proofs hold, and what would stop a config.

Each line says ok, note or problem; a problem comes with its fix. Nothing heavy is imported before the versions are known to be good.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from p3o_lightning.cli import OneLineParser
from p3o_lightning.commands.machine import memory_here
from p3o_lightning.errors import InputError

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "tensorboard", "jsonargparse", "safetensors")
OPTIONAL = {"peft": "LoRA", "gguf": "GGUF files as models", "matplotlib": "pictures on the dashboard"}
MALWARE = {("lightning", "2.6.2"), ("lightning", "2.6.3")}  # uploaded to PyPI with a stolen token
LEAST_DISK = 2**30  # bytes: a few checkpoints of a small model


class Report:
    """Prints findings, and remembers whether one was a problem."""

    def __init__(self) -> None:
        self.problems = 0

    def ok(self, line: str) -> None:
        print(f"ok       {line}", flush=True)

    def note(self, line: str) -> None:
        print(f"note     {line}", flush=True)

    def problem(self, line: str) -> None:
        self.problems += 1
        print(f"problem  {' '.join(line.split())}", flush=True)


class Problems(Report):
    """Says only what is wrong."""

    def ok(self, line: str) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""


def main(arguments: list[str]) -> None:
    """Print the report; exit 2 if there is a problem."""
    parser = OneLineParser(
        prog="p3o doctor",
        allow_abbrev=False,
        description="Report the environment, prove on a tiny model that training starts as it should, and find what would stop a config.",
    )
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--config", action="append", default=[], metavar="FILE", help="build it up to its first batch; several overlay")
    plan = "only print how much memory its run will take; several overlay"
    wanted.add_argument("--plan", action="append", default=[], metavar="FILE", help=plan)
    given = parser.parse_args(arguments)
    if given.plan:
        if check_packages(problems := Problems(), _version):
            import_module("p3o_lightning.commands.plan_page").show(given.plan)
        if problems.problems:
            sys.exit(2)
        return
    report = Report()
    report.ok(f"python {platform.python_version()} on {platform.platform(terse=True)}")
    if check_packages(report, _version):  # else importing them may fail, or do harm
        check_machine(report)
        check_proofs(report)
        if given.config:
            check_config(report, given.config)
    if report.problems:
        print(f"{report.problems} problem{'s' if report.problems > 1 else ''}: see above", flush=True)
        sys.exit(2)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(report: Report, version_of: Callable[[str], str | None]) -> bool:
    """Whether all that is needed is installed, new enough, and none of it known malware. Imports none of it."""
    before, bounds = report.problems, _bounds()
    for name in PACKAGES:
        version = version_of(name)
        if version is None:
            report.problem(f"{name} is not installed: pip install '{name}{bounds.get(name, '')}'")
        elif (name, version) in MALWARE:
            report.problem(
                f"{name} {version} is malware (its PyPI release was made with a stolen token): take this machine off the net, "
                f"revoke the tokens and keys on it, and install in a new environment with '{name}{bounds.get(name, '>=2.6.4')}'"
            )
        elif not _satisfies(version, bounds.get(name, "")):
            report.problem(f"{name} {version} does not satisfy {bounds[name]}: pip install '{name}{bounds[name]}'")
        else:
            report.ok(f"{name} {version}")
    for name, use in OPTIONAL.items():
        version = version_of(name)
        report.ok(f"{name} {version}") if version else report.note(f"{name} is not installed ({use}): pip install {name}")
    return report.problems == before


def _bounds() -> dict[str, str]:
    """The versions that p3o_lightning asks for, by package, from its own metadata."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires("p3o-lightning") or []]
    except metadata.PackageNotFoundError:  # run from a bare checkout
        return {}
    return {item.name: str(item.specifier) for item in required if item.marker is None}


def _satisfies(version: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(version, prereleases=True)


def check_machine(report: Report) -> None:
    """Cores, threads, memory, disk, accelerators."""
    import torch

    from p3o_lightning.processor import bfloat16_is_emulated

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    report.ok(f"{cores} CPU cores, {torch.get_num_threads()} torch threads (OMP_NUM_THREADS {'not set' if threads is None else threads})")
    if torch.get_num_threads() > cores:
        report.note(f"torch uses more threads than there are cores, which is slow: export OMP_NUM_THREADS={cores}")
    if memory := memory_here():
        report.ok(f"memory {memory[0] / 2**30:.1f} GiB, {memory[1] / 2**30:.1f} GiB of it free")
    free = shutil.disk_usage(Path.cwd()).free
    if free < LEAST_DISK:
        report.problem(f"disk: {free / 2**20:.0f} MiB free in {Path.cwd()}: free some, or set trainer.default_root_dir to another disk")
    else:
        report.ok(f"disk {free / 2**30:.1f} GiB free in the working folder")
    if not os.access(Path.cwd(), os.W_OK):
        report.note(f"{Path.cwd()} is not writable: set trainer.default_root_dir")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            report.ok(f"GPU {index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            report.ok("bfloat16 on the GPU")
        else:
            report.note("the GPU has no bfloat16: use model.dtype float32, or trainer.precision 16-mixed")
    elif torch.backends.mps.is_available():
        report.ok("Apple GPU (mps)")
    else:
        report.note("no GPU: runs on the CPU, which suits models of up to some 100 M parameters")
    if bfloat16_is_emulated():
        report.note("bfloat16 is emulated on this CPU, and slow: use float32 there")
    else:
        report.ok("bfloat16 on the CPU")


def tiny_policy(**settings: Any) -> Any:
    """A policy of a few thousand weights, with a Python reward: what the proofs are made on."""
    from p3o_lightning.policy import PairwisePolicy

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = {"model_type": "llama", "max_position_embeddings": 512, **shape}
    return PairwisePolicy(model, mean_byte, tokenizer="bytes", max_completion_length=8, micro_batch_size=4, lr=1e-3, **settings)


def mean_byte(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that two different responses hardly ever share, so that the first update has something to learn."""
    return [sum(ids) / (256 * len(ids)) for ids in completion_ids]


def check_proofs(report: Report, policy: Any = None) -> None:
    """One update of a tiny policy: before it, ratio 1, KL 0, clip fraction 0, reference equal to the policy; after it, finite weights."""
    try:
        import lightning.pytorch as L
        import torch

        from p3o_lightning.commands.terminal import quiet_libraries
        from p3o_lightning.data import PreferenceDataModule
        from p3o_lightning.reference import fingerprint
        from p3o_lightning.shipped import shipped

        quiet_libraries(quiet=True)
        torch.manual_seed(0)
        policy = tiny_policy() if policy is None else policy
        data = PreferenceDataModule(str(shipped("configs/debug/preferences.jsonl")), batch_size=4, max_length=256, val_fraction=0)
        start = fingerprint(policy.model)
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                default_root_dir=folder,
                accelerator="cpu",
                devices=1,
                max_steps=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(policy, data)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name, key, wanted in (("ratio", "val/ratio", 1.0), ("KL", "objective/kl", 0.0), ("clip fraction", "policy/clipfrac_avg", 0.0)):
            if abs(figures[key] - wanted) <= 1e-5:
                report.ok(f"proof: {name} is {wanted:.0f} before the first update")
            else:
                report.problem(f"proof: {name} is {figures[key]:.3g} before the first update, not {wanted:.0f}: {_REINSTALL}")
        if fingerprint(policy.reference) == start:
            report.ok("proof: the reference equals the policy as it started, and stays so")
        else:
            report.problem(f"proof: the reference is not the policy as it started: {_REINSTALL}")
        if fingerprint(policy.model) != start and all(bool(value.isfinite().all()) for value in policy.model.state_dict().values()):
            report.ok("proof: an update changes the weights, and they are finite")
        else:
            report.problem(f"proof: after one update the weights are as before, or not finite: {_REINSTALL}")
    except InputError as error:
        report.problem(f"proof: {error}")
    except Exception as error:  # a doctor reports what is broken, whatever it is
        report.problem(f"proof: one update of a tiny policy fails ({type(error).__name__}: {error}): {_REINSTALL}")


_REINSTALL = "install the pinned versions (requirements.lock) in a fresh environment, and report it if that does not help"


def check_config(report: Report, configs: list[str]) -> None:
    """Build the config's model, data and trainer, and make the first batch; no update, and nothing is written."""
    trainer = import_module("p3o_lightning.commands.trainer")
    name = " + ".join(configs)
    try:
        run = trainer.rehearse(["fit", *(f"--config={config}" for config in configs)])
    except InputError as error:
        report.problem(f"config {name}: {error}")
    except Exception as error:
        report.problem(f"config {name}: {type(error).__name__}: {error}: p3o fit shows where")
    else:
        size = sum(parameter.numel() for parameter in run.model.parameters())
        report.ok(f"config {name}: {type(run.model).__name__} of {size:,} parameters gets to its first batch on {run.model.device}")
