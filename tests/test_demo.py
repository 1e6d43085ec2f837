"""`p3o demo`: the generated task has the answer that it claims, and the pipeline finds it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from p3o_lightning.cli import main
from p3o_lightning.commands import demo_task
from p3o_lightning.commands.demo import distinct_2


def test_gold_by_hand() -> None:
    assert demo_task.gold_score(" the room was great and the food was lovely .") == pytest.approx(0.6)  # two good words
    assert demo_task.gold_score(" the room was great and the food was great .") == pytest.approx(0.0)  # one, said again: 0.3 - 0.3
    assert demo_task.gold_score(" the room was awful .") == pytest.approx(-0.3)
    many = " ".join(f"the room was {word} ," for word in demo_task.GOOD[:6])
    assert demo_task.gold_score(many) == pytest.approx(demo_task.CEILING)


def test_gold_of_the_demo_has_the_signature_of_a_reward() -> None:
    assert demo_task.gold(completions=["the room was great ."], prompts=["p"]) == [0.3]
    shifts = demo_task.prompt_shift(prompts=["a", "a", "b"], completions=["x", "y", "z"])
    assert shifts[0] == shifts[1] != shifts[2]
    many = torch.tensor(demo_task.prompt_shift(prompts=[str(number) for number in range(2000)]))
    assert many.mean().abs() < 0.1 and (many.std() - 1).abs() < 0.1


def test_the_corpus_scores_far_below_the_best_text() -> None:
    rng = random.Random(0)
    scores = [demo_task.gold_score(demo_task.review(rng)) for _ in range(2000)]
    assert 0.0 < sum(scores) / len(scores) < 0.3


def test_choices_are_noisy_but_follow_the_gold() -> None:
    pairs = demo_task.preferences(3000, random.Random(0))
    gaps = [demo_task.gold_score(pair.chosen) - demo_task.gold_score(pair.rejected) for pair in pairs]
    decided = [gap for gap in gaps if gap != 0]
    assert 0.80 < sum(gap > 0 for gap in decided) / len(decided) < 0.97


def test_every_word_of_the_task_is_one_token(tmp_path: Path) -> None:
    from p3o_lightning.tokenizers import load_tokenizer

    demo_task.write_task(tmp_path, 0, demonstrations=50, pairs=50)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for name in ("demonstrations", "preferences", "prompts"):
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                ids = tokenizer(text)["input_ids"]
                assert len(ids) == len(text.split()) and tokenizer.unk_token_id not in ids


def test_the_task_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo_task.write_task(tmp_path / name, seed, 20, 20)
    a, b, c = ((tmp_path / name / "preferences.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_distinct_2_by_hand() -> None:
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)  # ab, ba, ab | ab


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_finds_the_right_answer(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["p3o"])
    main(["demo", "--out", str(tmp_path / "demo"), "--seed", str(seed)])
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["gold_after"] - summary["gold_before"] >= 0.45  # 0.51 to 0.61 here; another processor draws other numbers
    assert summary["win_rate_low"] > 0.5
    assert summary["kl"] < 8
    assert summary["distinct_2_after"] >= summary["distinct_2_before"] / 2
    assert summary["seed"] == seed
    for stage in ("sft", "reward", "policy"):
        assert (tmp_path / "demo" / stage / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(("flag", "said"), [(["--seed", "abc"], "--seed"), (["--sed", "1"], "--sed"), (["--out", __file__], "--out")])
def test_bad_arguments_take_one_line(flag: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *flag])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1 and said in printed
