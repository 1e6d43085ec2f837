"""`p3o doctor --plan CONFIG`: how much memory the run of a config will take, part by part. The config is parsed as by `p3o fit`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from p3o_lightning import memory
from p3o_lightning.commands.plan import Plan, amount
from p3o_lightning.commands.terminal import quiet_libraries
from p3o_lightning.commands.trainer import StageCLI, main


class Planned(StageCLI):
    """A fit that is parsed, and nothing more."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """No folder is written to."""
        quiet_libraries(quiet=True)

    def instantiate_classes(self) -> None:
        """None."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Not at all."""


def show(configs: list[str]) -> None:
    """Print the estimate of a config."""
    plan = Plan(main(["fit", *(f"--config={config}" for config in configs)], Planned).settings)
    estimate, console = plan.estimate, Console(width=None if Console().is_terminal else 120)
    number = f"{plan.processes} process{'es' if plan.processes > 1 else ''}{', split' if plan.work.split else ''}"
    trained = f"{plan.model.trained:,} of {plan.model.parameters:,} parameters"
    table = Table(title=f"{plan.stage.__name__}, training {trained}; bytes on each of {number}", title_justify="left")
    for heading, side in (("part", "left"), ("formula", "left"), ("size", "right"), ("while", "left")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for part in estimate.parts:
        phases = "always" if part.phases == memory.PHASES else ", ".join(part.phases)
        table.add_row(part.name, part.formula, amount(part.size), phases)
    console.print(table)
    peaks = ", ".join(f"{name} {amount(size)}" for name, size in estimate.phases.items())
    free, machine = plan.available()
    lines = [f"peak {amount(estimate.peak)}: {peaks}", f"checkpoint {amount(estimate.checkpoint)} on disk, twice while it is written"]
    if estimate.host:
        lines.append(f"experience {amount(estimate.host)} on the host")
    lines += [plan.course(), machine, *dict.fromkeys(plan.notes)]
    if free:
        lines.append("it fits" if estimate.peak <= free else f"it does not fit: {plan.advice()}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
