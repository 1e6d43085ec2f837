"""`p3o report`: how far a reward model can be trusted, on pairs that people ranked; several models are an ensemble.

It prints a table and writes report.md, report.json, report.png and TensorBoard events into one folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from p3o_lightning.cli import OneLineParser
from p3o_lightning.commands.report_pages import Pages
from p3o_lightning.commands.terminal import quiet_libraries
from p3o_lightning.ensembles import AGGREGATES, Ensemble
from p3o_lightning.errors import InputError
from p3o_lightning.model_reward import ModelReward
from p3o_lightning.pair_scores import RankedPairs, read_pairs, score_pairs, without_eos
from p3o_lightning.reliability import accuracy, disagreement, eos_effect, report_card
from p3o_lightning.rewards import reward_sources
from p3o_lightning.tokenizers import byte_tokenizer

PROBED = 512  # pairs that the EOS probe scores once more


def main(arguments: list[str]) -> None:
    """Score the pairs, and report."""
    given = parsed(arguments)
    quiet_libraries()
    out = output_folder(given.out)
    models = load_models(given.model, given.dtype)
    with flags_named():
        pairs = read_pairs(
            given.data,
            [model.tokenizer for model in models],
            max_length=given.max_length,
            columns=named_columns(given.columns),
            chat=given.chat,
            split=given.split,
            held_out=given.held_out,
            seed=given.seed,
            field="--data",
        )
    print(f"data: {pairs.total:,} rows, {len(pairs.prompts):,} pairs, {len(pairs.prompts.unique()):,} prompts", end="")
    print(f"; left out: {', '.join(f'{reason} {rows:,}' for reason, rows in pairs.dropped.items())}" if pairs.dropped else "", flush=True)
    report = {
        "data": given.data,
        "held_out": given.held_out,
        "pairs": len(pairs.prompts),
        "prompts": len(pairs.prompts.unique()),
        "rows": pairs.total,
        "dropped": pairs.dropped,
        **measured(models, pairs, given.batch_size, given.k),
    }
    Pages(report).write(out)


def parsed(arguments: list[str]) -> Any:
    """The command line."""
    parser = OneLineParser(
        prog="p3o report",
        allow_abbrev=False,
        description="How far a reward model can be trusted: accuracy, calibration, length, shifts, EOS, on pairs that people ranked.",
        epilog="Give pairs that the model was not trained on: another file, or --held_out with the data.val_fraction and seed of its fit.",
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="MODEL", help="reward model: folder, checkpoint or hub name; several: an ensemble")
    add("--data", required=True, metavar="PATH", help="pairs (chosen, rejected), any format that p3o fit reads")
    add("--out", default="runs/report", help="folder to write (default: runs/report)")
    add("--held_out", type=float, default=0.0, metavar="SHARE", help="only prompts that a fit with this data.val_fraction held out")
    add("--seed", type=int, default=0, help="data.seed of that fit (default: 0)")
    add("--max_length", type=int, default=512, help="tokens of prompt and longer reply; longer pairs are left out (default: 512)")
    add("--batch_size", type=int, default=32, help="pairs in one forward (default: 32)")
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="columns of other names, e.g. prompt=question")
    add("--chat", action="store_true", help="parse transcripts into messages, as data.chat does")
    add("--split", default="train", help="which split of a saved or hub data set (default: train)")
    add("--k", type=float, default=1.0, help="standard deviations in an ensemble's mean_minus_sd (default: 1)")
    add("--dtype", default="float32", help="weights: float32, bfloat16, float16 or auto (default: float32)")
    given = parser.parse_args(arguments)
    for name in ("max_length", "batch_size"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name} is {getattr(given, name)}: choose 1 or more.")
    if not 0 <= given.held_out < 1:
        raise InputError(f"--held_out is {given.held_out}: choose the data.val_fraction of the fit, in [0, 1), e.g. 0.1.")
    if not 0 <= given.k < float("inf"):
        raise InputError(f"--k is {given.k}: choose a number of standard deviations, 0 or more.")
    return given


def named_columns(given: list[str]) -> dict[str, str] | None:
    """`--columns OURS=THEIRS ...` as data.columns."""
    for text in given:
        if not all(text.partition("=")):
            raise InputError(f"--columns has {text!r}: write OURS=THEIRS, e.g. prompt=question.")
    return {ours: theirs for ours, _, theirs in (text.partition("=") for text in given)} or None


@contextmanager
def flags_named(source: str = "--model") -> Iterator[None]:
    """What errors inside call model.dtype or data.max_length is --dtype or --max_length here, and a model is what `source` gave."""

    def flag(found: re.Match[str]) -> str:
        return source if found[1] in ("model.reward_funcs", "model", "tokenizer") else "--data" if found[2] == "path" else f"--{found[2]}"

    try:
        yield
    except InputError as error:
        raise InputError(
            re.sub(r"^(model\.reward_funcs|(?:model|data)\.(\w+)|model|tokenizer)\b(?= is | has | reads )", flag, str(error))
        ) from error


def check_source(flag: str, name: str, example: str) -> None:
    """Stop early at a folder or checkpoint that is not there; what may be a hub name is looked up."""
    local = "/" not in name or name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith(".ckpt")
    if local and not Path(name).expanduser().exists():
        raise InputError(f"{flag} is {name!r}: no such folder or checkpoint. Give one, e.g. {example}.")


def output_folder(given: str) -> Path:
    """The folder, made and writable."""
    out = Path(given).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--out is {given!r}, which is no folder to write to ({error.strerror}): name another.") from error
    return out


def load_models(given: list[str], dtype: str) -> list[ModelReward]:
    """The reward models with their tokenizers, on the best device."""
    for name in given:
        check_source("--model", name, "runs/reward/export")
    with flags_named():
        models = reward_sources(given, None, byte_tokenizer(), dtype).models
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in models:
        model.network.to(device)
    return models


def measured(models: list[ModelReward], pairs: RankedPairs, batch_size: int, k: float) -> dict[str, Any]:
    """The card of every model, and of their ensemble."""
    from rich.progress import track

    cards: dict[str, Any] = {}
    everyone = []
    picked = torch.linspace(0, len(pairs.prompts) - 1, min(PROBED, len(pairs.prompts))).long().unique().tolist()
    for model, rows in zip(models, pairs.rows, strict=True):

        def shown(batches: Any, name: str = model.name) -> Any:
            return track(batches, description=name, transient=True, disable=not sys.stdout.isatty())

        scores = score_pairs(model.network, model.tokenizer, rows, batch_size=batch_size, track=shown)
        if not bool(scores.isfinite().all()):
            broken = int((~scores.isfinite()).any(1).sum())
            raise InputError(
                f"--model {model.name}: {broken} of {len(scores)} pairs have a score that is NaN or infinite: the model is broken, or "
                "needs a wider --dtype."
            )
        cut = score_pairs(model.network, model.tokenizer, without_eos([rows[index] for index in picked]), batch_size=batch_size)
        eos = {f"eos_{name}": value for name, value in eos_effect(scores[picked], cut)._asdict().items()}
        cards[model.name] = {**report_card(scores, pairs.lengths, pairs.prompts, pairs.sources), **eos, "eos_pairs": len(picked)}
        everyone.append(scores)
    if len(models) == 1:
        return {"models": cards}
    each = torch.stack(everyone)
    together: dict[str, Any] = {"members": list(cards), "k": k}
    for aggregate in AGGREGATES:
        scores = Ensemble(list(cards), aggregate, k).combine(each)
        together[aggregate] = accuracy(scores[:, 0] - scores[:, 1], pairs.prompts)._asdict()
    cards["ensemble mean"] = report_card(each.mean(0), pairs.lengths, pairs.prompts, pairs.sources)
    return {"models": cards, "ensemble": {**together, **disagreement(each[..., 0] - each[..., 1])._asdict()}}
