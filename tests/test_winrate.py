"""`p3o winrate A B` as a user sees it: policies or files of predictions, judged by a reward model, a function, a judge or a server.

The power of these tests, found by planting one error at a time:
    planted error                 first test that fails, without test_
    the worse response preferred  two_files_by_hand
    sides drawn by other seeds    sampled_responses_are_those_of_the_policy
    prompts not matched           mistakes_in_one_line
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from dataclasses import replace

import pytest
import torch
from test_server_judge import FakeServer, longer
from tiny import LLAMA, collate, letters, policy, prompts, share_of_a, trainer

from p3o_lightning import PairwisePolicy, RewardModel
from p3o_lightning.encoding import encode_prompt, encode_response
from p3o_lightning.ensembles import Ensemble
from p3o_lightning.forwards import sequence_scores
from p3o_lightning.generation import decode_completions
from p3o_lightning.judges import compare
from p3o_lightning.reward_judge import RewardJudge, judge_of
from p3o_lightning.seeds import mix
from p3o_lightning.server_judge import KEY

WORDS = ["a", "bc", "defg", "hh", "bad", "c", "fed", "gag"]
MINE = """
from p3o_lightning.ensembles import Ensemble
from p3o_lightning.judges import FunctionJudge


def share_of_a(completions, **_):
    return [text.count("a") / max(len(text), 1) for text in completions]


def wanted(completions, answer, **_):
    return [float(text == right) for text, right in zip(completions, answer)]


@FunctionJudge
def first(prompts, first, second, **_):
    return [1.0] * len(first)


both = Ensemble([share_of_a, share_of_a])
"""


@pytest.fixture
def files(p3o):
    (p3o.folder / "mine.py").write_text(MINE)
    (p3o.folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    return p3o


def write(path, rows):
    path.write_text("".join(json.dumps({"prompt": prompt, "responses": responses}) + "\n" for prompt, responses in rows))
    return path


def rated(p3o, *arguments):
    ended = p3o("winrate", *arguments)
    assert ended.code == 0, ended.err
    return json.loads((p3o.folder / "runs/winrate/winrate.json").read_text()), ended.out


def test_two_files_by_hand(files):
    write(files.folder / "a.jsonl", [("p", ["aa", "b"]), ("q", ["ab", "aaaa"]), ("only here", ["a", "a"])])
    write(files.folder / "b.jsonl", [("q", ["ab", "b"]), ("p", ["c", "a", "never read"])])
    got, out = rated(files, "a.jsonl", "b.jsonl", "--judge", "mine.share_of_a")
    # p: 1 against 0, 0 against 1; q: a tie, 1 against 0
    assert (got["wins"], got["ties"], got["losses"], got["no_verdict"], got["prompts"]) == (2, 1, 1, 0, 2)
    assert got["win_rate"] == 2.5 / 4 and got["characters_a"] == (2 + 1 + 2 + 4) / 4 and got["longer_wins"] == 2 / 2
    assert not got["both_orders"] and "position bias" not in out and "0.625 [" in out
    lines = [json.loads(line) for line in (files.folder / "runs/winrate/comparisons.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["a"], line["b"], line["outcome"]) for line in lines] == [
        ("p", "aa", "c", 1), ("p", "b", "a", 0), ("q", "ab", "ab", 0.5), ("q", "aaaa", "b", 1)]  # fmt: skip
    assert "| wins, ties, losses of A | 2, 1, 1 |" in (files.folder / "runs/winrate/winrate.md").read_text()


def test_a_trained_policy_beats_its_reference(files, tmp_path):
    module = policy(kl_coef=0.001, lr=2e-2)
    module.export("before/export")
    trainer(tmp_path, max_steps=30).fit(module, module.wrap_train_dataloader(prompts(6)))
    module.export("after/export")
    settings = ["--data", "prompts.jsonl", "--judge", "mine.share_of_a", "--num_generations", 4, "--max_completion_length", 5]
    got, out = rated(files, "after/export", "before/export", *settings, "--batch_size", 3)
    assert got["low"] > 0.6 and got["comparisons"] == 32 and got["prompts"] == 8 and "bootstrap over prompts" in out
    back, _ = rated(files, "before/export", "after/export", *settings, "--batch_size", 3)
    assert back["win_rate"] == pytest.approx(1 - got["win_rate"]) and 0 <= got["ended_a"] <= 1
    same, _ = rated(files, "after/export", "after/export", *settings)
    assert same["win_rate"] == 0.5 and same["ties"] == 32, "the same policy, the same draws"
    few, _ = rated(files, "after/export", "before/export", *settings, "--max_prompts", 2)
    assert few["prompts"] == 2
    mixed, _ = rated(files, "after/export", write(files.folder / "b.jsonl", [("a", ["h"] * 4)]), *settings)
    assert mixed["prompts"] == 1 and mixed["ended_b"] is None


def test_sampled_responses_are_those_of_the_policy(files):
    policy().export("one/export")
    rated(
        files,
        "one/export",
        "one/export",
        "--data",
        "prompts.jsonl",
        "--judge",
        "mine.first",
        "--max_completion_length",
        5,
        "--batch_size",
        8,
    )
    rows = [json.loads(line) for line in (files.folder / "runs/winrate/comparisons.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == WORDS
    module = PairwisePolicy("one/export", max_completion_length=5).eval()
    module.sampling = replace(module.sampling, num_generations=1)
    tokens, mask = module.sample(collate(WORDS), seed=mix(0, 0, 2))
    assert [row["a"] for row in rows] == [texts[0] for texts in decode_completions(module.tokenizer, tokens, mask)]


def test_columns_of_the_data_reach_the_judge(files):
    (files.folder / "data.jsonl").write_text("".join(json.dumps({"prompt": w, "answer": "x"}) + "\n" for w in WORDS))
    policy().export("one/export")
    got, _ = rated(files, "one/export", "one/export", "--data", "data.jsonl", "--judge", "mine.wanted", "--max_completion_length", 3)
    assert got["ties"] == 8


def test_a_judge_that_favours_a_place_is_shown_as_such(files):
    write(files.folder / "a.jsonl", [(word, ["a"]) for word in WORDS])
    write(files.folder / "b.jsonl", [(word, ["b"]) for word in WORDS])
    got, out = rated(files, "a.jsonl", "b.jsonl", "--judge", "mine.first")
    assert (got["win_rate"], got["position_bias"], got["contradiction_rate"]) == (0.5, 0.5, 1) and "+0.500" in out


def test_a_server_judges(files, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv(KEY, "sk-secret")
    server = FakeServer()
    server.answer = lambda request, number: "no idea" if "hh" in request["messages"][1]["content"] else longer(request, number)
    write(files.folder / "a.jsonl", [(word, ["aaa"]) for word in WORDS])
    write(files.folder / "b.jsonl", [(word, ["b" if word < "d" else "bbbbb"]) for word in WORDS])
    got, out = rated(files, "a.jsonl", "b.jsonl", "--judge", server.url, "--judge_model", "org/m")
    wins = sum(word < "d" for word in WORDS)
    assert (got["wins"], got["losses"], got["no_verdict"]) == (wins, 7 - wins, 1) and got["longer_wins"] == 1
    assert got["failures"] == {"no verdict in the reply": 2} and "no verdict in the reply" in out
    written = "".join(path.read_text() for path in (files.folder / "runs/winrate").iterdir())
    assert "sk-secret" not in written + out and len(server.requests) == 16
    server.server.shutdown()


def test_settings_of_a_server_reach_its_requests(files, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(KEY, raising=False)
    server, at_once, most = FakeServer(), [0], [0]
    lock = threading.Lock()

    def slow(request, number):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1
        return longer(request, number)

    server.answer = slow
    write(files.folder / "a.jsonl", [(word, ["aaa"]) for word in WORDS])
    write(files.folder / "b.jsonl", [(word, ["b"]) for word in WORDS])
    (files.folder / "kindest.txt").write_text('Which is kinder? Say "1", "2" or "tie".')
    numbers = ["--judge_max_tokens", 500, "--judge_concurrency", 2]
    options = ["--judge_options", '{"temperature": 0.6, "seed": 7, "max_tokens": null, "max_completion_tokens": 500}']
    ask = ["a.jsonl", "b.jsonl", "--judge", server.url, "--judge_model", "org/m", "--judge_instructions", "kindest.txt"]
    got, _ = rated(files, *ask, *numbers)
    assert got["win_rate"] == 1 and most[0] == 2
    body = server.requests[0]["body"]
    assert (body["messages"][0]["content"], body["max_tokens"], body["temperature"]) == ('Which is kinder? Say "1", "2" or "tie".', 500, 0)
    got, _ = rated(files, *ask, *numbers, *options)
    body = server.requests[-1]["body"]
    assert (body["temperature"], body["seed"], body["max_completion_tokens"]) == (0.6, 7, 500) and "max_tokens" not in body
    assert got["judge_settings"]["instructions"].startswith("Which is kinder?") and got["judge_settings"]["options"]["seed"] == 7
    assert got["judge_settings"]["model"] == "org/m"
    server.server.shutdown()


def test_time_outs_and_retries_of_a_server(files, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(KEY, raising=False)
    server, release = FakeServer(), threading.Event()
    server.answer = lambda request, number: (release.wait(10), "1")[1]
    write(files.folder / "a.jsonl", [("p", ["aaa"])])
    write(files.folder / "b.jsonl", [("p", ["b"])])
    ask = ["winrate", "a.jsonl", "b.jsonl", "--judge", server.url, "--judge_model", "m"]
    assert "no reply in 0.2 s" in files(*ask, "--judge_timeout", 0.2, "--judge_retries", 0).error
    once = len(server.requests)
    assert "no reply in 0.2 s" in files(*ask, "--judge_timeout", 0.2, "--judge_retries", 1).error
    assert len(server.requests) == once + 2 * once
    release.set()
    server.server.shutdown()


# ---- the reward model as a judge


def test_a_reward_model_judges_as_it_scores(files):
    torch.manual_seed(1)
    module = RewardModel(LLAMA, tokenizer=letters())
    torch.nn.init.normal_(module.model.score.weight)
    module.export("reward/export")
    pairs = [("bad", "aa", "h"), ("c", "hgf", "e"), ("da", "b", "b")]

    def score(prompt, reply):
        row = torch.tensor([encode_prompt(module.tokenizer, prompt) + encode_response(module.tokenizer, reply)])
        with torch.no_grad():
            return float(sequence_scores(module.model, row, torch.ones_like(row, dtype=torch.bool)))

    expected = [1 / (1 + torch.exp(torch.tensor(score(p, b) - score(p, a)))).item() for p, a, b in pairs]
    for judge in (RewardJudge(module), judge_of("reward/export"), RewardJudge(Ensemble([module, module]))):
        verdicts = compare(judge, *(list(part) for part in zip(*pairs, strict=True)))
        assert verdicts.preference.tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[2] == 0.5 and judge_of("reward/export").name == "reward"


def test_an_ensemble_and_a_function_by_dotted_name(files):
    write(files.folder / "a.jsonl", [("p", ["aa"])])
    write(files.folder / "b.jsonl", [("p", ["b"])])
    for name in ("mine.both", "mine.share_of_a"):
        assert rated(files, "a.jsonl", "b.jsonl", "--judge", name)[0]["win_rate"] == 1
    assert statistics.fmean(share_of_a(["ab"])) == 0.5


def test_mistakes_in_one_line(files):
    a = write(files.folder / "a.jsonl", [("p", ["a"])])
    b = write(files.folder / "b.jsonl", [("q", ["b"])])
    (files.folder / "bad.jsonl").write_text('{"prompt": "p", "responses": "a"}\n')
    policy().export("one/export")
    judge, server = ["--judge", "mine.first"], ["--judge", "http://127.0.0.1:9", "--judge_model", "m"]
    for arguments, *words in (
        ([a, a], "--judge"),
        ([a, b, *judge], "no prompt in common"),
        ([a, "bad.jsonl", *judge], "bad.jsonl, line 1", "a list of texts"),
        ([a, "absent.jsonl", *judge], "'absent.jsonl'", "does not exist"),
        (["one/export", a, *judge], "--data is missing", "'one/export'"),
        (["absent", a, *judge, "--data", "prompts.jsonl"], "A is 'absent'", "runs/policy/export"),
        ([a, "one/export", *judge, "--data", "absent.jsonl"], "--data is 'absent.jsonl'"),
        ([a, "one/export", *judge, "--data", "prompts.jsonl", "--temperature", "0"], "--temperature is 0.0"),
        ([a, a, "--judge", "absent"], "--judge is 'absent'"),
        ([a, a, "--judge", "mine.absent"], "--judge is 'mine.absent'"),
        ([a, a, "--judge", "runs/absent/export"], "--judge is 'runs/absent/export'"),
        ([a, a, "--judge", "one/export"], "--judge is 'one/export'", "trained scalar head"),
        ([a, a, "--judge", "http://127.0.0.1:9"], "--judge_model is missing"),
        ([a, a, *server, "--judge_timeout", "0"], "--judge_timeout is 0.0"),
        ([a, a, *server, "--judge_retries", "-1"], "--judge_retries is -1"),
        ([a, a, *server, "--judge_concurrency", "0"], "--judge_concurrency is 0"),
        ([a, a, *server, "--judge_max_tokens", "0"], "--judge_max_tokens is 0"),
        ([a, a, *server, "--judge_options", "[1]"], "--judge_options is '[1]'", "JSON object"),
        ([a, a, *server, "--judge_options", "seed=1"], "--judge_options is 'seed=1'", "JSON object"),
        ([a, a, *server, "--judge_instructions", "absent.txt"], "--judge_instructions is 'absent.txt'", "text file"),
        ([a, a, "--judge", "http:///v1", "--judge_model", "m"], "--judge is 'http:///v1'"),
        ([a, a, *judge, "--judge_retries", "5"], "--judge_retries is 5", "'mine.first'", "no server"),
        ([a, a, *judge, "--judge_model", "m"], "--judge_model is 'm'", "no server"),
        ([a, a, *judge, "--max_prompts", "0"], "--max_prompts is 0"),
        ([a, a, *judge, "--out", "mine.py"], "--out is 'mine.py'"),
    ):
        error = files("winrate", *arguments).error
        for word in words:
            assert word in error, (arguments, error)
