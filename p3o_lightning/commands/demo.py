"""`p3o demo`: the whole pipeline on a generated task whose right answer is known; no download, about two minutes on two CPU cores.

It writes the task's files, runs `p3o fit` on configs/demo/{sft,reward,policy}.yaml as a user would, and measures both policies on
held-out prompts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p3o_lightning.cli import OneLineParser
from p3o_lightning.commands.demo_task import gold_score, write_task
from p3o_lightning.data import PreferenceDataModule
from p3o_lightning.errors import InputError
from p3o_lightning.generation import decode_completions
from p3o_lightning.policy import PairwisePolicy
from p3o_lightning.seeds import mix
from p3o_lightning.win_rates import share_interval


class Measured(NamedTuple):
    """One policy's responses to the held-out prompts."""

    texts: list[str]
    gold: list[float]  # what was meant
    reward: Tensor  # what was learned
    kl: float  # nats to the SFT policy, of whole responses
    distinct_2: float  # different word pairs over all word pairs
    length: float  # words


def main(arguments: list[str]) -> None:
    """Run the three stages and print the table."""
    parser = OneLineParser(prog="p3o demo", allow_abbrev=False, description="The whole pipeline on a tiny generated task; no download.")
    parser.add_argument("--out", default="runs/demo", help="output folder (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the task, the models and the rollouts (default: 0)")
    given = parser.parse_args(arguments)
    out = Path(given.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out is {given.out!r}, which is a file: name a folder.")
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it brings
    started = time.monotonic()
    write_task(out, given.seed)
    fit("sft", out, given.seed, tokenizer=out / "tokenizer", path=out / "demonstrations.jsonl")
    accuracy = fit("reward", out, given.seed, model=out / "sft" / "export", path=out / "preferences.jsonl")["val/accuracy"]
    rewards = json.dumps([str(out / "reward" / "export"), "p3o_lightning.commands.demo_task.gold"])  # the second weighs 0: it is watched
    fit("policy", out, given.seed, model=out / "sft" / "export", reward_funcs=rewards, path=out / "prompts.jsonl")

    before, after, prompts = measure(out, given.seed)
    wins = [1.0 if new > old else 0.5 if new == old else 0.0 for new, old in zip(after.gold, before.gold, strict=True)]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(str, prompts)))}  # responses to one are not independent
    low, high = share_interval(torch.tensor(wins), torch.tensor([numbers[str(prompt)] for prompt in prompts]))
    summary = {
        "gold_before": sum(before.gold) / len(before.gold),
        "gold_after": sum(after.gold) / len(after.gold),
        "learned_before": float(before.reward.mean()),
        "learned_after": float(after.reward.mean()),
        "kl": after.kl,
        "reward_model_accuracy": accuracy,
        "win_rate": sum(wins) / len(wins),
        "win_rate_low": float(low),
        "win_rate_high": float(high),
        "distinct_2_before": before.distinct_2,
        "distinct_2_after": after.distinct_2,
        "length_before": before.length,
        "length_after": after.length,
        "seconds": time.monotonic() - started,
        "seed": given.seed,
    }
    summary = {name: round(value, 4) for name, value in summary.items()}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(out, summary, before, after, prompts)


def fit(stage: str, out: Path, seed: int, path: Path, **model: Path | str) -> dict[str, float]:
    """`p3o fit --config configs/demo/STAGE.yaml` with the paths below `out`; returns the last validation's figures."""
    from p3o_lightning.commands import trainer

    titles = {"sft": "1/3  supervised fine-tuning", "reward": "2/3  reward model", "policy": "3/3  P3O"}
    print(f"\n{titles[stage]}", flush=True)
    arguments = ["fit", "--config", f"configs/demo/{stage}.yaml", f"--seed_everything={seed}", f"--data.path={path}", f"--data.seed={seed}"]
    arguments += [f"--trainer.default_root_dir={out / stage}", *(f"--model.{name}={value}" for name, value in model.items())]
    if stage == "policy":
        arguments.append(f"--model.seed={seed}")
    figures = trainer.main(arguments).trainer.callback_metrics
    return {name: float(value) for name, value in figures.items()}


def measure(out: Path, seed: int, samples: int = 16) -> tuple[Measured, Measured, list[Any]]:
    """Both policies on the prompts that P3O did not train on, `samples` responses each."""
    reports = []
    for name in ("sft", "policy"):
        policy = PairwisePolicy(
            str(out / name / "export"),
            str(out / "reward" / "export"),
            reference=str(out / "sft" / "export"),
            num_generations=samples,
            max_completion_length=40,
        ).eval()
        data = PreferenceDataModule(
            str(out / "prompts.jsonl"), policy.tokenizer, "prompts", max_length=64, val_fraction=0.2, seed=seed, val_batch_size=1000
        )
        data.setup("validate")
        prompts = next(iter(data.val_dataloader()))
        policy.rollout_seed = mix(seed, 3)
        experience = policy.rollout_step(prompts)
        assert experience.scores is not None  # a reward model scores; only a judge gives gaps alone
        rows = decode_completions(policy.tokenizer, experience.completion_tokens, experience.completion_mask)
        texts = [text for row in rows for text in row]
        reports.append(
            Measured(
                texts,
                [gold_score(text) for text in texts],
                experience.scores,
                float((experience.old_logps - experience.ref_logps).mean()),
                distinct_2(texts),
                sum(len(text.split()) for text in texts) / len(texts),
            )
        )
    return reports[0], reports[1], [prompt for prompt in prompts.prompts for _ in range(samples)]


def distinct_2(texts: list[str]) -> float:
    """Different pairs of neighbouring words, over all of them (Li et al. 2016, arXiv 1510.03055)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)


def show(out: Path, summary: dict[str, float], before: Measured, after: Measured, prompts: list[Any]) -> None:
    """The table, three prompts side by side, and where everything is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title=f"P3O demo, seed {summary['seed']}: {len(before.texts)} responses to held-out prompts", title_justify="left")
    for heading, side in (("", "left"), ("SFT policy", "right"), ("after P3O", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    table.add_row("gold reward (what was meant; at most 1.2)", f"{summary['gold_before']:.2f}", f"{summary['gold_after']:.2f}")
    table.add_row("learned reward (what was optimised)", f"{summary['learned_before']:.2f}", f"{summary['learned_after']:.2f}")
    table.add_row("KL to the SFT policy, nats", "0.00", f"{summary['kl']:.2f}")
    win = f"{summary['win_rate']:.2f}  [{summary['win_rate_low']:.2f}, {summary['win_rate_high']:.2f}]"
    table.add_row("win rate by gold, 95 % interval", "", win)
    table.add_row("distinct-2", f"{summary['distinct_2_before']:.3f}", f"{summary['distinct_2_after']:.3f}")
    table.add_row("length, words", f"{summary['length_before']:.1f}", f"{summary['length_after']:.1f}")
    table.add_row("reward model accuracy, held out", "", f"{summary['reward_model_accuracy']:.3f}")
    console.print()
    console.print(table)
    samples = Table(show_lines=True)
    for heading in ("prompt", "SFT policy", "after P3O"):
        samples.add_column(heading)
    for i in (0, len(prompts) // 2, len(prompts) - 1):
        samples.add_row(
            escape(str(prompts[i])), f"{escape(before.texts[i])} ({before.gold[i]:.1f})", f"{escape(after.texts[i])} ({after.gold[i]:.1f})"
        )
    console.print(samples)
    console.print(
        f"{summary['seconds']:.0f} seconds; summary in {out / 'summary.json'}; dashboard: tensorboard --logdir {out}", soft_wrap=True
    )
