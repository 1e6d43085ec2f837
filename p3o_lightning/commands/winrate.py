"""`p3o winrate A B`: how often the responses of A beat those of B, by a judge that is asked in both orders.

A and B are policies to sample from, or files that `p3o predict` wrote. It prints a table and writes winrate.json, winrate.md and
comparisons.jsonl into one folder.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from p3o_lightning.cli import OneLineParser
from p3o_lightning.commands.report import check_source, flags_named, named_columns, output_folder
from p3o_lightning.commands.terminal import quiet_libraries
from p3o_lightning.data import PreferenceDataModule
from p3o_lightning.data_files import read_records
from p3o_lightning.data_formats import Text
from p3o_lightning.errors import InputError
from p3o_lightning.generation import decode_completions
from p3o_lightning.judges import Judge, Verdicts, compare
from p3o_lightning.policy import PairwisePolicy
from p3o_lightning.reward_judge import judge_of, move_to
from p3o_lightning.seeds import mix
from p3o_lightning.server_judge import KEY, ServerJudge
from p3o_lightning.text import escaped, json_line
from p3o_lightning.win_rates import WinRate, win_rate

NUMBERS = ("judge_max_tokens", "judge_timeout", "judge_retries", "judge_concurrency")  # flags that ServerJudge has without their first word


class Answers(NamedTuple):
    """One side's responses, by prompt."""

    prompts: dict[str, Text]  # key -> the prompt as in the data
    responses: dict[str, list[str]]  # key -> its responses
    columns: dict[str, dict[str, Any]]  # key -> the data's other columns
    ended: float | None  # share that ended with EOS; None: a file does not say


def main(arguments: list[str]) -> None:
    """Sample or read, judge, report."""
    given = parsed(arguments)
    quiet_libraries()
    out = output_folder(given.out)
    judge = the_judge(given)
    sides = [answers(side, name, given) for side, name in (("A", given.a), ("B", given.b))]
    keys = [key for key in sides[0].responses if key in sides[1].responses]
    if not keys:
        raise InputError(f"A is {given.a!r} and B is {given.b!r}, which have no prompt in common: give files of the same prompts.")
    rows = [
        (key, one, other)
        for key in keys
        for one, other in zip(sides[0].responses[key], sides[1].responses[key], strict=False)  # as many as both have
    ]
    names = {name for key in keys for name in sides[0].columns[key]}
    columns = {name: [sides[0].columns[key].get(name) for key, _, _ in rows] for name in names}
    prompts = [sides[0].prompts[key] for key, _, _ in rows]
    verdicts = compare(judge, prompts, [one for _, one, _ in rows], [other for _, _, other in rows], **columns)
    numbers = {key: number for number, key in enumerate(keys)}
    result = win_rate(verdicts.outcome, torch.tensor([numbers[key] for key, _, _ in rows]), seed=given.seed)
    summary = summarised(given, judge, sides, rows, verdicts, result)
    (out / "winrate.json").write_text(json_line(summary) + "\n", encoding="utf-8")
    (out / "winrate.md").write_text(markdown(summary), encoding="utf-8")
    lines = zip(prompts, rows, verdicts.for_a.tolist(), verdicts.for_b.tolist(), verdicts.outcome.tolist(), strict=True)
    with (out / "comparisons.jsonl").open("w", encoding="utf-8") as file:
        for prompt, (_, one, other), for_a, for_b, outcome in lines:
            file.write(json_line({"prompt": prompt, "a": one, "b": other, "for_a": for_a, "for_b": for_b, "outcome": outcome}) + "\n")
    show(summary)
    print(f"written to {out}: winrate.md, winrate.json, comparisons.jsonl")


def parsed(arguments: list[str]) -> Any:
    """The command line."""
    parser = OneLineParser(
        prog="p3o winrate",
        allow_abbrev=False,
        description="How often the responses of A beat those of B. Every pair is judged in both orders; where they disagree, it is a tie.",
        epilog=f"A server's key, if it wants one, is read from the environment: {KEY}.",
    )
    add = parser.add_argument
    add("a", metavar="A", help="policy to sample from (folder, checkpoint, hub name), or a .jsonl that p3o predict wrote")
    add("b", metavar="B", help="the other, e.g. the policy before training")
    add(
        "--judge",
        required=True,
        help="reward model (folder, checkpoint), dotted name of a reward function or judge, or http://HOST:PORT/v1",
    )
    add("--judge_model", help="with a server: the model's name there")
    add("--judge_instructions", metavar="FILE", help='with a server: text file with the system prompt, which asks for "1", "2" or "tie"')
    add("--judge_max_tokens", type=int, help="with a server: tokens of a reply; a model that thinks first needs hundreds (default: 16)")
    add("--judge_timeout", type=float, help="with a server: seconds that a request may take (default: 60)")
    add("--judge_retries", type=int, help="with a server: further tries where it is busy or not reached (default: 3)")
    add("--judge_concurrency", type=int, help="with a server: requests under way at a time (default: 8)")
    add(
        "--judge_options",
        metavar="JSON",
        help="with a server: further fields of a request, e.g. '{\"temperature\": 0.7}' (default: 0 there)",
    )
    add("--data", metavar="PATH", help="prompts to answer, any format that p3o fit reads; two files of predictions need none")
    add("--out", default="runs/winrate", help="folder to write (default: runs/winrate)")
    add("--max_prompts", type=int, help="the first so many prompts (default: all)")
    add("--num_generations", type=int, default=1, help="responses to each prompt (default: 1)")
    add("--max_completion_length", type=int, default=128, help="tokens of a response (default: 128)")
    add("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    add("--max_length", type=int, default=512, help="tokens of a prompt; longer ones are left out (default: 512)")
    add("--batch_size", type=int, default=16, help="prompts sampled at a time (default: 16)")
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="columns of other names, e.g. prompt=question")
    add("--chat", action="store_true", help="parse transcripts into messages, as data.chat does")
    add("--seed", type=int, default=0, help="of sampling and bootstrap (default: 0)")
    add("--dtype", default="float32", help="weights: float32, bfloat16, float16 or auto (default: float32)")
    given = parser.parse_args(arguments)
    for name in ("num_generations", "max_completion_length", "batch_size", "max_length", "max_prompts"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}: choose 1 or more.")
    return given


def the_judge(given: Any) -> Judge:
    """The judge that --judge names."""
    if given.judge.startswith(("http://", "https://")):
        return the_server(given)
    for name in ("judge_model", "judge_instructions", "judge_options", *NUMBERS):
        if (value := getattr(given, name)) is not None:
            raise InputError(
                f"--{name} is {value!r}, but --judge is {given.judge!r}, which is no server: leave it out, or give http://HOST:PORT/v1."
            )
    if "/" in given.judge:
        check_source("--judge", given.judge, "runs/reward/export, or the dotted name of a reward function or judge")
    with flags_named("--judge"):
        judge = judge_of(given.judge, given.dtype)
    move_to(judge, "cuda" if torch.cuda.is_available() else "cpu")
    return judge


def the_server(given: Any) -> ServerJudge:
    """The judge behind the URL that --judge gives; what is not said is as ServerJudge has it."""
    if not given.judge_model:
        raise InputError(f"--judge is the server {given.judge!r}, but --judge_model is missing: give the model's name there.")
    settings = {name.removeprefix("judge_"): value for name in NUMBERS if (value := getattr(given, name)) is not None}
    if (path := given.judge_instructions) is not None:
        try:
            settings["instructions"] = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--judge_instructions is {path!r}, which cannot be read ({error}): give a text file in UTF-8.") from error
    if given.judge_options is not None:
        try:
            settings["options"] = json.loads(given.judge_options)
        except (ValueError, RecursionError):
            settings["options"] = None
        if not isinstance(settings["options"], dict):
            raise InputError(f"--judge_options is {given.judge_options!r}: give a JSON object, e.g. '{{\"temperature\": 0.7}}'.")
    server = ServerJudge(given.judge, given.judge_model, **settings)
    try:
        server.check()
    except InputError as error:  # of "judge timeout is 0" the flag is --judge_timeout
        raise InputError(
            re.sub(r"^judge (\w+)(?= is )", lambda found: "--judge" + f"_{found[1]}" * (found[1] != "url"), str(error))
        ) from error
    return server


def answers(side: str, name: str, given: Any) -> Answers:
    """Responses of one side: read from predictions, or sampled."""
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _predictions(name, given.max_prompts)
    if given.data is None:
        raise InputError(f"--data is missing: give the prompts that {name!r} is to answer, or two .jsonl files that p3o predict wrote.")
    check_source(side, name, "runs/policy/export")
    with flags_named(side):
        return _sampled(name, given)


def _predictions(path: str, limit: int | None) -> Answers:
    """Rows {"prompt", "responses"}."""
    read = Answers({}, {}, {}, None)
    for record in read_records(path, field="predictions"):
        prompt, responses = record.values.get("prompt"), record.values.get("responses")
        texts = isinstance(responses, list) and responses and all(isinstance(text, str) for text in responses)
        if not isinstance(prompt, str | list) or not texts:
            raise InputError(f"{record.where}: a prediction needs prompt and responses, a list of texts: write it by p3o predict.")
        if limit is not None and len(read.prompts) == limit:
            break
        _add(read, prompt, list(responses or []), {})
    return read


def _sampled(name: str, given: Any) -> Answers:
    """Responses drawn from a policy; the same seed for both sides, so that equal policies give equal responses."""
    from rich.progress import track

    policy = PairwisePolicy(
        name,
        max_completion_length=given.max_completion_length,
        temperature=given.temperature,
        dtype=given.dtype,
    ).eval()
    policy.sampling = replace(policy.sampling, num_generations=given.num_generations)  # one is enough here, unlike in training
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    data = PreferenceDataModule(
        given.data,
        policy.tokenizer,
        val_batch_size=given.batch_size,
        max_length=given.max_length,
        columns=named_columns(given.columns),
        chat=given.chat,
    )
    data.prepare_data()
    data.setup("predict")
    sampled, ended, total = Answers({}, {}, {}, None), 0.0, 0
    batches: Iterable[Any] = data.predict_dataloader()
    for number, batch in enumerate(track(batches, description=f"sampling {name}", transient=True, disable=not sys.stdout.isatty())):
        moved = batch._replace(tokens=batch.tokens.to(policy.device), attention_mask=batch.attention_mask.to(policy.device))
        tokens, mask = policy.sample(moved, seed=mix(given.seed, number, 2))
        ended, total = ended + float(policy.ended(tokens, mask).sum()), total + mask[..., 0].numel()
        for row, texts in enumerate(decode_completions(policy.tokenizer, tokens, mask)):
            _add(sampled, batch.prompts[row], texts, {name: values[row] for name, values in batch.columns.items()})
        if given.max_prompts is not None and len(sampled.prompts) >= given.max_prompts:
            break
    for key in list(sampled.prompts)[given.max_prompts :] if given.max_prompts is not None else []:
        del sampled.prompts[key], sampled.responses[key], sampled.columns[key]
    return sampled._replace(ended=ended / max(total, 1))


def _add(side: Answers, prompt: Text, responses: list[str], columns: dict[str, Any]) -> None:
    key = json.dumps(prompt, sort_keys=True, default=str)
    side.prompts.setdefault(key, prompt)
    side.responses.setdefault(key, []).extend(responses)
    side.columns.setdefault(key, columns)


def summarised(
    given: Any, judge: Judge, sides: list[Answers], rows: list[tuple[str, str, str]], verdicts: Verdicts, result: WinRate
) -> dict[str, Any]:
    """Every figure by name."""
    lengths = torch.tensor([[len(one), len(other)] for _, one, other in rows]).double()
    decided = (verdicts.outcome != 0.5) & ~verdicts.outcome.isnan() & (lengths[:, 0] != lengths[:, 1])
    longer = ((lengths[:, 0] > lengths[:, 1]) == (verdicts.outcome > 0.5))[decided]
    return {
        "a": given.a,
        "b": given.b,
        "judge": judge.name,
        "judge_settings": {name: getattr(judge, name) for name in ("model", "instructions", "max_tokens", "options")}
        if isinstance(judge, ServerJudge)
        else None,
        **result._asdict(),
        "comparisons": len(rows),
        "longer_wins": float(longer.double().mean()),
        "characters_a": float(lengths[:, 0].mean()),
        "characters_b": float(lengths[:, 1].mean()),
        "ended_a": sides[0].ended,
        "ended_b": sides[1].ended,
        "both_orders": not judge.symmetric,
        **{name: float(value) for name, value in verdicts.figures().items() if name in ("contradiction_rate", "position_bias")},
        "failures": getattr(judge, "failures", {}),
    }


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table says, line by line."""
    few = "Wilson" if summary["prompts"] == summary["wins"] + summary["ties"] + summary["losses"] else "bootstrap over prompts"
    rows = [
        (f"A beats B, a tie 1/2 [95 %, {few}]", f"{summary['win_rate']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}]"),
        ("wins, ties, losses of A", f"{summary['wins']:,}, {summary['ties']:,}, {summary['losses']:,}"),
        ("comparisons without a verdict", f"{summary['no_verdict']:,} of {summary['comparisons']:,}"),
        ("prompts", f"{summary['prompts']:,}"),
        ("the longer response wins, of those decided", "none" if math.isnan(summary["longer_wins"]) else f"{summary['longer_wins']:.3f}"),
        ("characters a response, A and B", f"{summary['characters_a']:.0f}, {summary['characters_b']:.0f}"),
    ]
    if None not in (summary["ended_a"], summary["ended_b"]):
        rows.append(("responses that ended, A and B", f"{summary['ended_a']:.2f}, {summary['ended_b']:.2f}"))
    if summary["both_orders"]:
        rows.append(("the two orders contradict each other", f"{summary['contradiction_rate']:.3f}"))
        rows.append(("position bias (0: fair, 0.5: always the first)", f"{summary['position_bias']:+.3f}"))
    rows += [(f"no verdict: {reason.replace('|', '/')}", f"{count:,} answers") for reason, count in summary["failures"].items()]
    return rows


def show(summary: dict[str, Any]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"A = {summary['a']}, B = {summary['b']}, judge {summary['judge']}"), title_justify="left", show_header=False
    )
    for what, value in table_rows(summary):
        table.add_row(escape(what), escape(value))
    Console(width=None if Console().is_terminal else 120).print(table)


def markdown(summary: dict[str, Any]) -> str:
    """The same as a page."""
    lines = [f"| {what} | {value} |" for what, value in table_rows(summary)]
    head = f"# Win rate\n\nA: {escaped(summary['a'])}\n\nB: {escaped(summary['b'])}\n\nJudge: {escaped(summary['judge'])}\n\n"
    return head + "\n".join(["| | |", "|---|---|", *lines]) + "\n"
