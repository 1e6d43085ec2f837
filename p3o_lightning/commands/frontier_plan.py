"""The plan of `p3o frontier`: which variants, coefficients and seeds, read from YAML and unfolded into single runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from p3o_lightning.commands.arguments import check_config
from p3o_lightning.errors import InputError
from p3o_lightning.shipped import shipped

SERIES = "series"  # as a baseline: each variant is paired with the first of its series
Settings = dict[str, Any]  # dotted keys as `p3o fit` takes them -> values


class Stage(NamedTuple):
    """A `p3o fit` that all runs of a seed build on: SFT, the reward model."""

    name: str
    configs: list[str]
    settings: Settings


class TaskJob(NamedTuple):
    """What the runs of one seed share; made once, in `folder`."""

    folder: str
    seed: int
    task: str | None  # dotted function (folder, seed) that writes data
    stages: list[Stage]


class Evaluate(NamedTuple):
    """How a run is measured along its path, on held-out prompts with the same draws every time."""

    times: int = 6  # besides the start
    prompts: int = 64
    responses: int = 4  # a prompt
    gold: str | None = None  # reward that is measured and never optimised: a dotted function, or a reward model's folder


class RunJob(NamedTuple):
    """One run: one variant with one choice of the grid at one seed."""

    folder: str
    seed: int
    configs: list[str]
    settings: Settings
    rollouts: int | None
    evaluate: Evaluate
    task_folder: str


class Cell(NamedTuple):
    """A run's place in a plan; two plans may share a run."""

    variant: str
    choice: Settings  # of the grid
    job: RunJob


@dataclass(frozen=True)
class Variant:
    """A line of the figure: settings over those of the plan, and a grid."""

    name: str
    settings: Settings
    grid: dict[str, list[Any]]
    series: str | None = None  # for a figure of area against `x`: the line that it belongs to
    x: float | str | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison. See docs/frontier.md for every key."""

    name: str
    title: str
    configs: list[str]
    variants: list[Variant]
    seeds: list[int]
    settings: Settings = field(default_factory=dict)
    rollouts: int | None = None
    task: str | None = None
    stages: list[Stage] = field(default_factory=list)
    evaluate: Evaluate = field(default_factory=Evaluate)
    baseline: str = ""
    kl_range: float | None = None
    budgets: list[float] = field(default_factory=list)
    x_label: str | None = None
    show: list[str] = field(default_factory=list)  # variants in the figure of frontiers; all if empty

    def baseline_of(self, variant: str) -> str:
        """What a variant is paired with: the plan's baseline, or with `baseline: series` the first variant of its series."""
        if self.baseline != SERIES:
            return self.baseline
        series = {item.name: item.series for item in self.variants}
        return next(item.name for item in self.variants if item.series == series[variant])

    def tasks(self, out: Path) -> dict[int, TaskJob]:
        """Seed -> what its runs share. The folder is named by what makes it, so that plans share it."""
        stages = [(stage.name, _contents(stage.configs), stage.settings) for stage in self.stages]
        jobs = {}
        for seed in self.seeds:
            folder = out / "tasks" / f"seed-{seed}-{_digest(self.task, stages)}"
            filled = [stage._replace(settings=_filled(stage.settings, seed, folder)) for stage in self.stages]
            jobs[seed] = TaskJob(str(folder), seed, self.task, filled)
        return jobs

    def cells(self, out: Path) -> list[Cell]:
        """Every run, seed by seed, so that a stopped command leaves whole seeds. Equal runs have one folder, named by what makes them."""
        cells, tasks, contents = [], self.tasks(out), _contents(self.configs)
        for seed, variant in itertools.product(self.seeds, self.variants):
            task = Path(tasks[seed].folder)
            for values in itertools.product(*variant.grid.values()):
                choice = dict(zip(variant.grid, values, strict=True))
                settings = {**self.settings, **variant.settings, **choice}
                digest = _digest(contents, sorted(settings.items()), seed, self.rollouts, self.evaluate, task.name)
                folder, filled = str(out / "runs" / digest), _filled(settings, seed, task)
                evaluate = Evaluate(**_filled(self.evaluate._asdict(), seed, task))
                job = RunJob(folder, seed, self.configs, filled, self.rollouts, evaluate, str(task))
                cells.append(Cell(variant.name, choice, job))
        return cells


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _contents(configs: list[str]) -> list[Any]:
    return [check_config(shipped(config), config) for config in configs]


def _filled(settings: Settings, seed: int, task: Path) -> Settings:
    """`{seed}` and `{task}` in texts replaced."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{seed}", str(seed)).replace("{task}", str(task))
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {key: fill(value) for key, value in settings.items()}


# ---- reading

_KEYS = "from title config settings variants grid seeds rollouts task stages evaluate baseline kl_range budgets x_label show"


def read_plan(given: str) -> Plan:
    """The plan in a YAML file, every key checked; InputError names file, key, value and fix."""
    path = shipped(given)
    content, check = check_config(path, given), _Check(given)
    check.keys("", content, _KEYS)
    if (base := content.pop("from", None)) is not None:
        common = check_config(path.parent / str(base), str(path.parent / str(base)))
        check.keys(f"{base}: ", common, _KEYS)
        merged = {**check.mapping("settings", common.get("settings") or {}), **check.mapping("settings", content.get("settings") or {})}
        content = {**common, **content, "settings": merged}
    named = content.get("config")
    configs: list[str] = [named] if isinstance(named, str) else named or []
    check(isinstance(configs, list) and configs and all(isinstance(item, str) for item in configs), "config", named, "a p3o fit config")
    for content_of in _contents(configs):
        kind = str((content_of.get("model") or {}).get("class_path")).rpartition(".")[2]
        check(kind not in ("RewardModel", "SupervisedPolicy"), "config", configs, f"the config of a PairwisePolicy, not of a {kind}")
    grid = check.grid("grid", content.get("grid") or {})
    variants = [_variant(check, name, body, grid) for name, body in check.mapping("variants", content.get("variants")).items()]
    check(variants, "variants", content.get("variants"), "one variant at least, e.g. {P3O: {}}")
    seeds = content.get("seeds", [0])
    check(isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds), "seeds", seeds, "a list of whole numbers")
    rollouts = content.get("rollouts")
    check(rollouts is None or (type(rollouts) is int and rollouts > 0), "rollouts", rollouts, "a whole number above 0")
    evaluate = check.mapping("evaluate", content.get("evaluate") or {})
    check.keys("evaluate.", evaluate, " ".join(Evaluate._fields))
    for name in ("times", "prompts", "responses"):
        value = evaluate.get(name, 1)
        check(type(value) is int and value > 0, f"evaluate.{name}", value, "a whole number above 0")
    baseline, names = content.get("baseline", variants[0].name), [variant.name for variant in variants]
    check(baseline in (*names, SERIES), "baseline", baseline, f"one of the variants ({', '.join(names)}), or {SERIES}")
    show = content.get("show") or []
    check(isinstance(show, list) and set(show) <= set(names), "show", show, f"a list of variants, of {', '.join(names)}")
    kl_range, budgets = content.get("kl_range"), content.get("budgets") or []
    check(kl_range is None or _is_positive(kl_range), "kl_range", kl_range, "a number of nats above 0")
    check(isinstance(budgets, list) and all(map(_is_positive, budgets)), "budgets", budgets, "a list of nats above 0")
    return Plan(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        configs=configs,
        variants=variants,
        seeds=list(dict.fromkeys(seeds)),
        settings=check.mapping("settings", content.get("settings") or {}),
        rollouts=rollouts,
        task=content.get("task"),
        stages=[_stage(check, name, body) for name, body in check.mapping("stages", content.get("stages") or {}).items()],
        evaluate=Evaluate(**evaluate),
        baseline=baseline,
        kl_range=None if kl_range is None else float(kl_range),
        budgets=[float(value) for value in budgets],
        x_label=content.get("x_label"),
        show=show,
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


class _Check:
    """Refusals that name the plan's file and key."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, valid: Any, key: str, value: Any, wanted: str) -> None:
        if not valid:
            raise InputError(f"{self.file}: {key} is {value!r}: give {wanted}.")

    def keys(self, prefix: str, given: dict[str, Any], known: str) -> None:
        for key in given:
            self(key in known.split(), f"{prefix}{key}", given[key], f"only these keys there: {', '.join(known.split())}")

    def mapping(self, key: str, value: Any) -> dict[str, Any]:
        self(isinstance(value, dict) and all(isinstance(name, str) for name in value), key, value, "a mapping")
        return dict(value)

    def grid(self, key: str, value: Any) -> dict[str, list[Any]]:
        grid = self.mapping(key, value)
        for name, values in grid.items():
            self(isinstance(values, list) and values, f"{key}.{name}", values, "a list of values to try")
        return grid


def _variant(check: _Check, name: str, body: Any, grid: dict[str, list[Any]]) -> Variant:
    key = f"variants.{name}"
    body = check.mapping(key, body or {})
    check.keys(f"{key}.", body, "settings grid series x")
    own = check.grid(f"{key}.grid", body["grid"] or {}) if "grid" in body else grid
    return Variant(name, check.mapping(f"{key}.settings", body.get("settings") or {}), own, body.get("series"), body.get("x"))


def _stage(check: _Check, name: str, body: Any) -> Stage:
    key = f"stages.{name}"
    body = check.mapping(key, body)
    check.keys(f"{key}.", body, "config settings")
    check(isinstance(body.get("config"), str), f"{key}.config", body.get("config"), "a p3o fit config")
    return Stage(name, [body["config"]], check.mapping(f"{key}.settings", body.get("settings") or {}))
