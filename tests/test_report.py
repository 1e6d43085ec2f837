"""`p3o report` as a user sees it: figures against plain loops over the same files, what is written, and mistakes in one line.

The power of these tests, found by planting one error at a time:
    planted error                   first test that fails, without test_
    every pair a prompt of its own  one_model_against_a_loop_over_the_pairs
    scores in sorted order          one_model_against_a_loop_over_the_pairs
    EOS probe keeps EOS             one_model_against_a_loop_over_the_pairs
    held out: the others            only_what_a_fit_held_out
    events of two reports           what_it_writes
    names raw in Markdown           what_it_writes
"""

from __future__ import annotations

import json
import math
import statistics
import sys

import pytest
import torch
from running import scalars
from tiny import LETTERS, LLAMA, letters, policy, trainer

from p3o_lightning import PreferenceDataModule, RewardModel
from p3o_lightning.cli import HELP, main
from p3o_lightning.commands.report_pages import findings
from p3o_lightning.encoding import encode_prompt, encode_response
from p3o_lightning.forwards import sequence_scores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pairs from two sources, some prompts twice, and two reward models that learned a little of them."""
    folder = tmp_path_factory.mktemp("report")
    lines = []
    for row in range(40):
        prompt = LETTERS[row % 8] + LETTERS[(row // 2) % 8]
        good, bad = "a" * (1 + row % 3), "hgb"[row % 3] * (1 + row % 4)
        lines.append({"prompt": prompt, "chosen": bad if row % 5 == 0 else good, "rejected": good if row % 5 == 0 else bad,
                      "source": ["we|b", "bo[ok]"][row % 2]})  # fmt: skip
    lines.append({"prompt": "a", "chosen": "", "rejected": "b", "source": "we|b"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    letters().save_pretrained(folder / "tokenizer")
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = RewardModel(LLAMA, tokenizer=str(folder / "tokenizer"), lr=1e-2)
        trainer(folder, max_steps=2).fit(module, PreferenceDataModule(str(folder / "pairs.jsonl"), batch_size=8, val_fraction=0))
        module.export(folder / f"reward-{seed}" / "export")
        if seed == 1:
            run = trainer(folder, max_steps=0)
            run.strategy.connect(module)
            run.save_checkpoint(folder / "one.ckpt")
    return folder, lines[:-1]


def by_hand(folder, lines, seed=1, cut=False):
    """(chosen, rejected) scores of every pair, one row at a time."""
    module = RewardModel(str(folder / f"reward-{seed}" / "export")).eval()
    scores = []
    for line in lines:
        both = []
        for reply in (line["chosen"], line["rejected"]):
            ids = encode_response(module.tokenizer, reply)
            row = torch.tensor([encode_prompt(module.tokenizer, line["prompt"]) + (ids[:-1] if cut else ids)])
            with torch.no_grad():
                both.append(float(sequence_scores(module.model, row, torch.ones_like(row, dtype=torch.bool))))
        scores.append(both)
    return scores


def report(p3o, *arguments):
    ended = p3o("report", *arguments)
    assert ended.code == 0, ended.err
    return json.loads((p3o.folder / "runs/report/report.json").read_text()), ended.out


def test_one_model_against_a_loop_over_the_pairs(made, p3o):
    folder, lines = made
    got, out = report(p3o, "--model", folder / "reward-1/export", "--data", folder / "pairs.jsonl", "--batch_size", 7)
    assert (got["rows"], got["pairs"], got["dropped"]) == (41, 40, {"empty reply": 1})
    (card,) = got["models"].values()
    scores = by_hand(folder, lines)
    gaps = [one - other for one, other in scores]
    close = {"rel": 1e-4, "abs": 1e-5}
    assert card["accuracy"] == statistics.fmean(gap > 0 for gap in gaps) and card["ties"] == 0
    assert card["log_loss"] == pytest.approx(statistics.fmean(math.log1p(math.exp(-gap)) for gap in gaps), **close)
    assert card["margin"] == pytest.approx(statistics.fmean(gaps), **close)
    lengths = [(len(line["chosen"]) + 1, len(line["rejected"]) + 1) for line in lines]  # tokens, EOS included
    matched = [gap for gap, (one, other) in zip(gaps, lengths, strict=True) if abs(one - other) <= 0.1 * max(one, other)]
    assert 0 < len(matched) == card["length_matched_pairs"] < 40
    assert card["length_matched_accuracy"] == pytest.approx(statistics.fmean(gap > 0 for gap in matched))
    by_prompt = {}
    for line, both in zip(lines, scores, strict=True):
        by_prompt.setdefault(line["prompt"], []).extend(both)
    assert got["prompts"] == len(by_prompt) < 40
    assert card["prompt_mean_sd"] == pytest.approx(statistics.stdev(map(statistics.fmean, by_prompt.values())), **close)
    within = sum(sum((score - statistics.fmean(group)) ** 2 for score in group) for group in by_prompt.values()) / (80 - len(by_prompt))
    assert card["within_prompt_sd"] == pytest.approx(math.sqrt(within), **close)
    for number, name in enumerate(["we|b", "bo[ok]"]):
        assert card["sources"][name]["accuracy"] == statistics.fmean(gap > 0 for gap in gaps[number::2])
    cut = by_hand(folder, lines, cut=True)
    shifts = [with_eos - without for one, other in zip(scores, cut, strict=True) for with_eos, without in zip(one, other, strict=True)]
    assert card["eos_shift"] == pytest.approx(statistics.fmean(shifts), **close) and card["eos_pairs"] == 40
    assert card["eos_shift_sd"] == pytest.approx(statistics.stdev(shifts), **close)
    assert card["eos_accuracy_without"] == statistics.fmean(one > other for one, other in cut)
    for factor in (0.97, 1.03):
        loss = statistics.fmean(math.log1p(math.exp(-gap / (factor * card["temperature"]))) for gap in gaps)
        assert card["log_loss_at_temperature"] < loss
    assert f"{card['accuracy']:.3f} [" in out and "bo[ok]" in out and "empty reply 1" in out


def test_what_it_writes(made, p3o):
    folder, _ = made
    arguments = ["--model", folder / "reward-1/export", "--data", folder / "pairs.jsonl"]
    report(p3o, *arguments)
    got, out = report(p3o, *arguments)  # again into the same folder: one run's events, not two
    where = p3o.folder / "runs/report"
    page = (where / "report.md").read_text()
    assert "| ECE | 0." in page and "we&#124;b" in page and "report.png" in page and "## Reliability of reward&#45;1" in page
    for table in [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]:
        assert len({line.count("|") for line in table}) == 1, "rows of one width"
    assert (where / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    events = scalars(where / "tensorboard")
    card = got["models"]["reward-1"]
    assert events["report/reward-1/accuracy"] == [(0, pytest.approx(card["accuracy"]))] and "report/reward-1/ece" in events
    assert len(list((where / "tensorboard").glob("events*"))) == 1
    assert sum(one["pairs"] for one in card["curve"]) == 40 and "written to runs/report" in out


def test_without_matplotlib_it_reports_all_the_same(made, p3o, monkeypatch):
    folder, _ = made
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, out = report(p3o, "--model", folder / "reward-1/export", "--data", folder / "pairs.jsonl")
    assert "pip install matplotlib" in out and not (p3o.folder / "runs/report/report.png").exists()
    assert "report.png" not in (p3o.folder / "runs/report/report.md").read_text()


def test_several_models_are_an_ensemble(made, p3o):
    folder, lines = made
    got, out = report(p3o, "--model", folder / "reward-1/export", folder / "reward-2/export", "--data", folder / "pairs.jsonl", "--k", 2)
    assert list(got["models"]) == ["reward-1", "reward-2", "ensemble mean"]
    one, two = by_hand(folder, lines, 1), by_hand(folder, lines, 2)
    gaps = [(a[0] - a[1], b[0] - b[1]) for a, b in zip(one, two, strict=True)]
    about = got["ensemble"]
    assert about["split_rate"] == statistics.fmean((a > 0) != (b > 0) for a, b in gaps)
    assert about["gap_sd"] == pytest.approx(statistics.fmean(statistics.stdev(pair) for pair in gaps), rel=1e-3)
    assert about["mean"]["accuracy"] == got["models"]["ensemble mean"]["accuracy"] == statistics.fmean(a + b > 0 for a, b in gaps)
    least = [min(a[0], b[0]) > min(a[1], b[1]) for a, b in zip(one, two, strict=True)]
    assert about["min"]["accuracy"] == statistics.fmean(least)
    careful = [
        [statistics.fmean(pair) - 2 * statistics.pstdev(pair) for pair in zip(a, b, strict=True)] for a, b in zip(one, two, strict=True)
    ]
    assert about["mean_minus_sd"]["accuracy"] == statistics.fmean(a > b for a, b in careful)
    assert "mean less 2 sd" in out and "rank differently" in out


def test_only_what_a_fit_held_out(made, p3o):
    folder, _ = made
    data = PreferenceDataModule(str(folder / "pairs.jsonl"), letters(), "pairs", val_fraction=0.3, seed=5)
    data.setup("validate")
    got, _ = report(p3o, "--model", folder / "reward-1/export", "--data", folder / "pairs.jsonl", "--held_out", 0.3, "--seed", 5)
    assert 0 < got["pairs"] == data.report.val < 40
    fit = trainer(folder).validate(RewardModel(str(folder / "reward-1/export")), data, verbose=False)[0]
    (card,) = got["models"].values()
    assert (
        card["accuracy_low"] >= 0 and card["accuracy_low"] != fit["val/accuracy_low"]
    )  # prompts repeat, which validation does not look at
    for name in ("accuracy", "log_loss", "brier", "ece", "length_rule_accuracy", "margin"):
        assert card[name] == pytest.approx(fit[f"val/{name}"], abs=1e-5), "as the validation of that fit says"


def test_a_checkpoint_and_columns_of_other_names(made, p3o):
    folder, lines = made
    renamed = [{"question": line["prompt"], "chosen": line["chosen"], "rejected": line["rejected"]} for line in lines]
    (p3o.folder / "renamed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in renamed))
    got, _ = report(p3o, "--model", folder / "one.ckpt", "--data", "renamed.jsonl", "--columns", "prompt=question")
    whole, _ = report(p3o, "--model", folder / "reward-1/export", "--data", folder / "pairs.jsonl")
    (one,), (other,) = got["models"].values(), whole["models"].values()
    assert one["log_loss"] == pytest.approx(other["log_loss"], abs=1e-6) and "sources" not in one


def test_mistakes_in_one_line(made, p3o):
    folder, _ = made
    model, data = ["--model", folder / "reward-1/export"], ["--data", folder / "pairs.jsonl"]
    policy().export(p3o.folder / "policy/export")
    for arguments, *words in (
        ([*data], "--model"),
        (["--model", "absent", *data], "--model is 'absent'", "runs/reward/export"),
        (["--model", "policy/export", *data], "--model is 'policy/export'", "trained scalar head"),
        ([*model, "--data", "absent.jsonl"], "--data is 'absent.jsonl'"),
        ([*model, *data, "--columns", "prompt"], "--columns has 'prompt'", "OURS=THEIRS"),
        ([*model, *data, "--columns", "prompt=absent"], "--columns reads 'prompt' from 'absent'"),
        ([*model, *data, "--max_length", "2"], "none can be used", "over max_length"),
        ([*model, *data, "--held_out", "1"], "--held_out is 1.0"),
        ([*model, *data, "--k", "-1"], "--k is -1.0"),
        ([*model, *data, "--batch_size", "0"], "--batch_size is 0"),
        ([*model, *data, "--out", folder / "pairs.jsonl"], "--out is", "name another"),
        ([*model, *data, "--dtype", "float8"], "--dtype is 'float8'"),
    ):
        error = p3o("report", *arguments).error
        for word in words:
            assert word in error, (arguments, error)


def test_a_model_that_gives_no_numbers_is_told(made, p3o):
    folder, _ = made
    broken = RewardModel(str(folder / "reward-1/export"))
    broken.model.score.weight.data.fill_(math.nan)
    broken.export(p3o.folder / "broken/export")
    error = p3o("report", "--model", "broken/export", "--data", folder / "pairs.jsonl").error
    assert "--model broken: 40 of 40 pairs have a score that is NaN or infinite" in error


def test_findings_say_what_stands_out():
    fine = {"accuracy_low": 0.6, "length_rule_accuracy": 0.55, "length_matched_pairs": 50, "length_matched_low": 0.55, "temperature": 1.1,
            "shift_share": 0.2, "eos_shift_sd": 0.1, "within_prompt_sd": 1.0}  # fmt: skip
    assert findings(fine) == []
    for change, words in (
        ({"accuracy_low": 0.5}, "length rule"),
        ({"length_matched_low": 0.45}, "coin"),
        ({"temperature": 3.0}, "off scale by 3.00"),
        ({"temperature": math.inf}, "no better than a coin"),
        ({"temperature": 0.0}, "nothing of its scale"),
        ({"shift_share": 0.8}, "between prompts"),
        ({"eos_shift_sd": 0.8}, "EOS moves scores unevenly"),
    ):
        (found,) = findings({**fine, **change})
        assert words in found


def test_help_names_the_commands(capsys):
    assert "  report " in HELP and "  winrate " in HELP
    for command in ("report", "winrate"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0 and "--out" in capsys.readouterr().out
