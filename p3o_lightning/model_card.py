"""The README.md of an exported model: what it is, how it is loaded, what the run measured, how it was made."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from p3o_lightning.text import escaped, fenced, visible

HEAD = "---\nlibrary_name: transformers\ntags: [p3o_lightning, rlhf]\n"  # by which an export is told from a folder of the user's own
_HUB_MODEL = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# What a card shows of a run's figures, in this order; the rest is on the dashboard.
FIGURES = {
    "objective/scores": "mean reward in the last rollout, KL not included",
    "objective/kl": "KL to the reference in the last rollout, nats a response",
    "completions/mean_length": "length in the last rollout, tokens",
    "val/scores": "mean reward on held-out prompts",
    "val/kl": "KL to the reference on held-out prompts, nats a response",
    "val/length": "length on held-out prompts, tokens",
    "val/ended": "share of responses to held-out prompts that ended",
    "val/accuracy": "share of held-out pairs ordered as people did",
    "val/accuracy_low": "lower end of its 95 % interval",
    "val/accuracy_high": "upper end of its 95 % interval",
    "val/length_rule_accuracy": "what the better of two length rules gives on the same pairs",
    "val/log_loss": "log-loss on held-out pairs; a coin gives 0.693",
    "val/ece": "calibration error on held-out pairs",
    "val/loss": "nats a response token on held-out demonstrations",
    "accuracy": "share of pairs ordered right in the last batch of training",
    "margin": "chosen minus rejected in the last batch of training, reward units",
    "loss": "loss of the last update",
}


def model_card(
    *,
    title: str,
    summary: str,
    classes: tuple[str, str],
    task: str,
    updates: int,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any] | None = None,
    data: str | None = None,
) -> str:
    """The card's text. Whatever of it is a stranger's (names of columns, files, models) is shown, and does nothing.

    Args:
        title: what stands on top, one line.
        summary: one sentence.
        classes: of transformers, that load the model and its tokenizer.
        task: the hub's word, e.g. text-generation.
        updates: optimizer steps behind the weights.
        settings: the run's arguments, plain values.
        figures: what the run measured, by tag; those of FIGURES and each reward's mean are shown.
        data: one line on the rows that were used.
    """
    base = settings.get("model")
    named = f"base_model: {json.dumps(base)}\n" if isinstance(base, str) and _HUB_MODEL.fullmatch(base) else ""
    model, tokenizer = classes
    load = (
        f"from transformers import {', '.join(sorted(set(classes)))}\n\n"
        f'model = {model}.from_pretrained("this folder")\ntokenizer = {tokenizer}.from_pretrained("this folder")'
    )
    parts = [
        f"{HEAD}pipeline_tag: {task}\n{named}---\n# {visible(title)}",
        visible(summary),
        fenced_lines(load, "python"),
        f"## The run\n\n{updates:,} updates. {visible(data or '')}".rstrip(),
    ]
    if rows := [*_rows(figures or {})]:
        parts.append("\n".join(["| figure | value | |", "|---|---|---|", *rows]))
    parts.append(f"Settings:\n\n{fenced(json.dumps(dict(settings), indent=2, default=str, sort_keys=True), 'json')}")
    parts.append(f"Versions: {', '.join(f'{name} {number}' for name, number in versions().items())}.")
    return "\n\n".join(parts) + "\n"


def fenced_lines(text: str, language: str) -> str:
    """Our own code as a Markdown block."""
    return f"```{language}\n{text}\n```"


def _rows(figures: Mapping[str, Any]) -> Iterable[str]:
    means = sorted(name for name in figures if re.fullmatch(r"rewards/.*/mean", name, re.S))
    policy = "objective/kl" in figures  # whose own `margin` is that of a rollout, for the progress bar
    for name in [*FIGURES, *means]:
        if name in figures and not (policy and name == "margin"):
            yield f"| {escaped(name)} | {float(figures[name]):.4g} | {FIGURES.get(name, 'this reward alone, in the last rollout')} |"


def versions() -> dict[str, str]:
    """Of what makes the numbers."""
    from p3o_lightning import __version__

    found = {name: version(name) for name in ("torch", "lightning", "transformers")}
    return {"p3o_lightning": __version__, **found, "python": platform.python_version()}
