"""What `p3o report` shows and writes: a table on the terminal, Markdown, JSON, a figure, TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from p3o_lightning.text import escaped, json_line


class Line(NamedTuple):
    """One row of the report."""

    what: str
    value: Callable[[dict[str, Any]], str]
    reading: str  # how to read it


def _number(value: float, digits: int = 3) -> str:
    return "none" if isinstance(value, float) and math.isnan(value) else f"{value:.{digits}f}"


def _plain(name: str, digits: int = 3) -> Callable[[dict[str, Any]], str]:
    return lambda card: _number(card[name], digits) if name in card else ""


def _interval(card: dict[str, Any], name: str = "accuracy", prefix: str = "accuracy_") -> str:
    return f"{_number(card[name])} [{_number(card[f'{prefix}low'])}, {_number(card[f'{prefix}high'])}]"


def _matched(card: dict[str, Any]) -> str:
    return f"{_interval(card, 'length_matched_accuracy', 'length_matched_')} of {card['length_matched_pairs']:,}"


def _eos_shift(card: dict[str, Any]) -> str:
    return f"{_number(card['eos_shift'], 2)}, sd {_number(card['eos_shift_sd'], 2)}" if "eos_shift" in card else ""


def _cut_off_wins(card: dict[str, Any]) -> str:
    return _number(1 - card["eos_turn_rate"]) if "eos_turn_rate" in card else ""


LINES = [
    Line("accuracy (a tie 1/2) [95 %]", _interval, "above the length rule; people agree on 0.65 to 0.75"),
    Line("length rule", _plain("length_rule_accuracy"), "the better of longer wins and shorter wins"),
    Line("accuracy, lengths within 10 % [95 %]", _matched, "what is left when length says nothing; 0.5 is a coin"),
    Line("log-loss, nats a pair", _plain("log_loss"), "below 0.693, a coin's"),
    Line("Brier score", _plain("brier"), "below 0.25, a coin's"),
    Line("ECE", _plain("ece"), "0: as often right as it says"),
    Line("temperature", _plain("temperature", 2), "1: on scale; above, too sure of itself; below, not sure enough"),
    Line("log-loss at that temperature", _plain("log_loss_at_temperature"), "fitted on these pairs, by one number"),
    Line("ties", lambda card: f"{card['ties']:,}", "equal scores teach a policy nothing"),
    Line("shift between prompts, sd", _plain("shift_sd", 2), "of delta(x): P3O does not see it, a batch of PPO does"),
    Line("spread within a prompt, sd", _plain("within_prompt_sd", 2), "what a policy can learn from"),
    Line("share of the shift in the variance", _plain("shift_share", 2), "near 1: scores of two prompts cannot be compared"),
    Line("EOS: score with it less without", _eos_shift, "a constant is harmless; an sd near the spread is not"),
    Line("EOS: pairs whose order its loss turns", _plain("eos_flip_rate"), "0: the verdict does not hang on it"),
    Line("EOS: the better one, cut off, still wins", _cut_off_wins, "high: being cut off costs nothing; see missing_eos_penalty"),
]


def findings(card: dict[str, Any]) -> list[str]:
    """What stands out, in words: what a reader should know before training a policy on this reward."""
    found = []
    if card["accuracy_low"] <= card["length_rule_accuracy"]:
        found.append("its accuracy is not surely above what the length rule alone reaches")
    if card["length_matched_pairs"] and card["length_matched_low"] <= 0.5:
        found.append("on pairs of like length it is not surely better than a coin")
    if card["temperature"] == math.inf:
        found.append("it ranks no better than a coin at any scale")
    elif card["temperature"] == 0:
        found.append("it ranks all of these pairs as people did: that says nothing of its scale")
    elif card["temperature"] > 1.5 or card["temperature"] < 1 / 1.5:
        found.append(f"its scores are off scale by {card['temperature']:.2f}: divide them by it to read them as log-odds")
    if card["shift_share"] > 0.5:
        found.append("most of its variance lies between prompts: compare scores within a prompt only")
    if card.get("eos_shift_sd", 0.0) > 0.5 * card["within_prompt_sd"]:
        found.append("EOS moves scores unevenly: truncated responses are judged by another measure")
    return found


class Pages:
    """The report, to be shown and written.

    Args:
        report: what `p3o report` measured, as plain values.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        self.report, self.cards = report, report["models"]

    def write(self, out: Path) -> None:
        """Print the table; write report.json, report.md, report.png and tensorboard/."""
        self._print()
        (out / "report.json").write_text(json.dumps(json.loads(json_line(_finite(self.report))), indent=2) + "\n", encoding="utf-8")
        figure = self._figure()
        written = ["report.md", "report.json"]
        if figure is not None:
            figure.savefig(out / "report.png", dpi=120)
            written.append("report.png")
        (out / "report.md").write_text(self.markdown(figure is not None), encoding="utf-8")
        self._events(out / "tensorboard", figure)
        print(f"written to {out}: {', '.join(written)}; dashboard: tensorboard --logdir {out}")
        if figure is None:
            print("no figure, since matplotlib is not installed: pip install matplotlib")

    # ---- words

    def _rows(self) -> list[list[str]]:
        return [[line.what, *(line.value(card) for card in self.cards.values()), line.reading] for line in LINES]

    def _ensemble_rows(self) -> list[list[str]]:
        about = self.report.get("ensemble")
        if about is None:
            return []
        names = {"mean": "mean", "min": "minimum", "mean_minus_sd": f"mean less {about['k']:g} sd"}
        rows = [[f"accuracy of the {what}", _interval(about[name], prefix="")] for name, what in names.items()]
        rows.append(["gap: sd over members, mean size of it", f"{about['gap_sd']:.2f} of {about['mean_gap']:.2f}"])
        rows.append(["share of pairs that the members rank differently", _number(about["split_rate"])])
        rows.append(
            ["accuracy where all agree, where they do not", f"{_number(about['accuracy_unanimous'])}, {_number(about['accuracy_split'])}"]
        )
        return rows

    def _source_rows(self) -> list[list[str]]:
        rows = []
        for model, card in self.cards.items():
            for name, figures in card.get("sources", {}).items():
                shares = [_interval(figures), _number(figures["length_rule_accuracy"]), _number(figures["log_loss"])]
                rows.append([model, name, f"{figures['pairs']:,}", *shares])
        return rows

    def _notes(self) -> list[tuple[str, str]]:
        return [(name, note) for name, card in self.cards.items() for note in findings(card)]

    _SOURCE_HEAD = ("model", "source", "pairs", "accuracy [95 %]", "length rule", "log-loss")

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, headings, rows) of every table."""
        held = " held out" if self.report["held_out"] else ""
        title = f"reward model on {self.report['pairs']:,}{held} pairs of {self.report['prompts']:,} prompts"
        tables = [(title, ["", *self.cards, "how to read it"], self._rows())]
        if rows := self._ensemble_rows():
            tables.append(("ensemble", ["", "value"], rows))
        if rows := self._source_rows():
            tables.append(("by source", list(self._SOURCE_HEAD), rows))
        return tables

    def _print(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(width=None if Console().is_terminal else 140)
        for title, heads, rows in self._tables():
            table = Table(title=title, title_justify="left")
            for number, head in enumerate(heads):
                words = number == 0 or head == "how to read it"
                table.add_column(escape(head), justify="left" if words else "right", no_wrap=not words)
            for row in rows:
                table.add_row(*map(escape, row))
            console.print(table)
        for name, note in self._notes():
            console.print(f"note: {escape(name)}: {note}", soft_wrap=True, highlight=False)

    def markdown(self, figure: bool) -> str:
        """The report as a page."""
        strange = {*self.cards, *(name for card in self.cards.values() for name in card.get("sources", {}))}  # words that are not ours

        def row(cells: Iterable[str]) -> str:
            return f"| {' | '.join(escaped(cell) if cell in strange else cell for cell in cells)} |"

        parts = ["# Reward model report", f"Pairs: {escaped(self.report['data'])}"]
        if dropped := self.report["dropped"]:
            parts.append("Left out: " + escaped(", ".join(f"{reason} {rows}" for reason, rows in dropped.items())))
        for title, heads, rows in self._tables():
            parts += [f"## {title}", "\n".join([row(heads), "|" + "---|" * len(heads), *map(row, rows)])]
        if notes := self._notes():
            parts += ["## What stands out", "\n".join(f"- {escaped(name)}: {note}" for name, note in notes)]
        for name, card in self.cards.items():
            curve = ["| confidence | pairs | mean confidence | accuracy [95 %] |", "|---|---|---|---|"]
            for one in card["curve"]:
                right = _interval(one) if one["pairs"] else ""
                mean = _number(one["confidence"]) if one["pairs"] else ""
                curve.append(f"| {one['low']:.2f} to {one['high']:.2f} | {one['pairs']} | {mean} | {right} |")
            parts += [f"## Reliability of {escaped(name)}", "\n".join(curve)]
        if figure:
            parts.append("![reliability curve](report.png)")
        return "\n\n".join(parts) + "\n"

    # ---- pictures

    def _figure(self) -> Any:
        """Reliability curves; None without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        curve, counts = figure.subplots(1, 2)
        curve.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="as often right as it says")
        for name, card in self.cards.items():
            bins = [one for one in card["curve"] if one["pairs"]]
            x, y = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
            error = [[abs(one["accuracy"] - one[end]) for one in bins] for end in ("accuracy_low", "accuracy_high")]
            curve.errorbar(x, y, yerr=error, marker="o", capsize=2, label=_label(f"{name}, ECE {card['ece']:.3f}"))
            counts.stairs(
                [one["pairs"] for one in card["curve"]], [0.5 + i / 20 for i in range(len(card["curve"]) + 1)], label=_label(name)
            )
        curve.set(xlabel="confidence max(p, 1 - p)", ylabel="accuracy, 95 % Wilson interval", title="reliability", xlim=(0.48, 1.02))
        counts.set(xlabel="confidence max(p, 1 - p)", ylabel="pairs", title="how sure it is")
        for axes in (curve, counts):
            axes.legend(fontsize="small")
        return figure

    def _events(self, folder: Path, figure: Any) -> None:
        """Scalars `report/<model>/<figure>` and the figure, at step 0; an earlier report's events are replaced."""
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(folder) as writer:
            for name, card in self.cards.items():
                for tag, value in card.items():
                    if isinstance(value, int | float) and math.isfinite(value):
                        writer.add_scalar(f"report/{name}/{tag}", value, 0)
            for tag, value in self.report.get("ensemble", {}).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    writer.add_scalar(f"report/ensemble/{tag}", value, 0)
            writer.add_text("report", self.markdown(False), 0)
            if figure is not None:
                writer.add_figure("report/reliability", figure, 0, close=False)


def _label(text: str) -> str:
    """Text of a user's in a figure: a dollar would begin a formula, an underscore in front hide the line."""
    return text.replace("$", r"\$").lstrip("_") or "model"


def _finite(value: Any) -> Any:
    """NaN and infinity as null and text: JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else str(value) if value in (math.inf, -math.inf) else value
