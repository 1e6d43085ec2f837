"""A script written for TRL keeps its data sets and reward functions; docs/from-trl.md says what becomes of its arguments and metrics."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path

import datasets
import pytest
import torch
from test_rewards import responses
from tiny import LLAMA, Recorder, letters, policy, preferences, prompts, share_of_a, trainer

from p3o_lightning import InputError, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.function_reward import FunctionReward
from p3o_lightning.reward_log import RewardLog, TrainerState
from p3o_lightning.rewards import reward_sources

# ---- data sets, in memory as TRL takes them

ASK = [{"role": "user", "content": "bad"}]
SAYS = {letter: [{"role": "assistant", "content": letter * 3}] for letter in "abch"}
TRLS_FORMATS = {
    "language modelling": ("demonstrations", [{"text": "bad cab"}] * 2, "", "bad cab"),
    "language modelling, conversational": (
        "demonstrations",
        [{"messages": [*ASK, *SAYS["a"]]}] * 2,
        "\n\nHuman: bad\n\nAssistant:",
        " aaa",
    ),
    "prompt only": ("prompts", [{"prompt": "bad"}] * 2, "bad", None),
    "prompt only, conversational": ("prompts", [{"prompt": ASK}] * 2, "\n\nHuman: bad\n\nAssistant:", None),
    "prompt-completion": ("demonstrations", [{"prompt": "bad", "completion": "aa"}] * 2, "bad", "aa"),
    "prompt-completion, conversational": (
        "demonstrations",
        [{"prompt": ASK, "completion": SAYS["b"]}] * 2,
        "\n\nHuman: bad\n\nAssistant:",
        " bbb",
    ),
    "preference, explicit prompt": ("pairs", [{"prompt": "bad", "chosen": "a", "rejected": "h"}] * 2, "bad", "a"),
    "preference, implicit prompt": ("pairs", [{"chosen": "bad a", "rejected": "bad h"}] * 2, "bad", " a"),
    "preference, conversational": (
        "pairs",
        [{"chosen": [*ASK, *SAYS["a"]], "rejected": [*ASK, *SAYS["h"]]}] * 2,
        "\n\nHuman: bad\n\nAssistant:",
        " aaa",
    ),
}


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list], ids=["Dataset", "list"])
@pytest.mark.parametrize("name", TRLS_FORMATS)
def test_trls_formats_are_read_from_memory(name, kind):
    """What is tokenised, said by hand: the prompt and the reply that is to be learned, byte by byte."""
    view, rows, prompt, reply = TRLS_FORMATS[name]
    data = PreferenceDataModule(kind(rows), "bytes", view, batch_size=1, val_fraction=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    first = batch.tokens[0] if view != "pairs" else batch.tokens[0, 0]
    mask = batch.attention_mask[0] if view != "pairs" else batch.attention_mask[0, 0]
    read = data._encoder.tokenizer.decode(first[mask], skip_special_tokens=False)
    assert read == (prompt if reply is None else f"{prompt}{reply}<eos>")
    assert "path" not in data.hparams, "objects stay out of checkpoints"


def test_a_trl_script_in_our_words(tmp_path):
    """The three trainers of a script, on its own data sets: train_dataset, eval_dataset, reward_funcs, reward_weights."""
    rows = datasets.load_dataset("json", data_files=str(preferences(tmp_path)), split="train")
    split = rows.train_test_split(test_size=4, seed=0)
    data = PreferenceDataModule(split["train"], batch_size=4, max_length=16, val_path=split["test"])
    torch.manual_seed(0)
    sft = SupervisedPolicy(LLAMA, tokenizer=letters(), lr=1e-2)
    trainer(tmp_path, max_steps=2).fit(sft, data)
    reward = RewardModel(LLAMA, tokenizer=letters(), center_coef=0.01)
    trainer(tmp_path, max_steps=2).fit(reward, data)
    aligned = PairwisePolicy(sft.model, [reward, share_of_a], [1.0, 0.5], tokenizer=letters(), max_completion_length=5)
    trainer(tmp_path, max_steps=2).fit(aligned, data)
    assert data.report is not None and (data.report.train, data.report.val) == (12, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a"}])}),
            r"is a DatasetDict of \['train'\]: give one of them",
        ),
        (datasets.Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset(), "is a IterableDataset: give a file"),
        (7, "is a int: give a file"),
    ],
    ids=["dict", "stream", "number"],
)
def test_what_is_no_rows_is_told(given, words):
    with pytest.raises(InputError, match=f"data.path {words}"):
        PreferenceDataModule(given, "bytes", "prompts")


def test_rows_in_memory_are_named_by_their_place():
    data = PreferenceDataModule([{"prompt": "a"}, {"prompt": 3}], "bytes", "prompts", batch_size=1)
    with pytest.raises(InputError, match=r"data.path, row 2, column 'prompt': 3 is no text"):
        data.setup()
    with pytest.raises(InputError, match=r"data.streaming is true, but data.path is a list, which is in memory already"):
        PreferenceDataModule([{"prompt": "a"}], "bytes", "pairs", streaming=True)


# ---- reward functions, as TRL's documents write them


def accuracy_reward(prompts, completions, answer, log_extra=None, log_metric=None, **kwargs):
    """With the names that TRL documents."""
    hits = [float(completion == wanted) for completion, wanted in zip(completions, answer, strict=True)]
    if log_extra:
        log_extra("golden_answer", list(answer))
    if log_metric:
        log_metric("accuracy", sum(hits) / len(hits))
    return hits


def test_log_metric_and_log_extra_of_a_function():
    log = RewardLog(6)
    given = responses(columns={"answer": ["hi", "é", "cut of"]})._replace(log=log)
    scores = FunctionReward(accuracy_reward)(given)
    assert scores.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert log.means() == {"accuracy": 0.5}
    assert log.extra == {"golden_answer": ["hi", "hi", "é", "é", "cut of", "cut of"]}
    log.log_metric("accuracy", 1.0)
    assert log.means() == {"accuracy": 0.75}, "the mean of what was logged"


def test_names_are_also_in_kwargs_and_none_is_forced_on_a_function_that_does_not_take_it():
    seen = {}

    def in_kwargs(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    def neither(prompts, completions, completion_ids):
        return [0.0] * len(completions)

    FunctionReward(in_kwargs)(responses()._replace(state=TrainerState(global_step=7)))
    assert seen["trainer_state"].global_step == 7 and callable(seen["log_metric"]) and callable(seen["log_extra"])
    assert FunctionReward(neither)(responses()).shape == (3, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda log: log.log_metric("m", "high"), r"log_metric\('m', 'high'\) is no number: give a float"),
        (lambda log: log.log_extra("c", [1]), r"log_extra\('c'\) has 1 values for 6 completions: give one each"),
    ],
)
def test_a_wrong_log_is_told(call, words):
    with pytest.raises(InputError, match=words):
        call(RewardLog(6))


def test_async_functions_wait_at_the_same_time():
    """Each waits until the other has been called: one after the other, they would wait for ever."""
    called = {"one": asyncio.Event(), "other": asyncio.Event()}

    def waiting(mine, others):
        async def function(completions, **kwargs):
            called[mine].set()
            await asyncio.wait_for(called[others].wait(), 20)
            return [1.0] * len(completions)

        function.__name__ = mine
        return function

    total, each = reward_sources([waiting("one", "other"), waiting("other", "one")], None, letters(), "float32")(responses())
    assert total.tolist() == [[2.0, 2.0]] * 3 and each.keys() == {"one", "other"}
    assert threading.current_thread() is threading.main_thread()


def test_a_run_shows_what_its_functions_log_and_tells_them_where_it_stands(tmp_path):
    """By hand: a rollout at steps 0, 2 and 4 logs its step; no function can write over a figure of ours."""
    steps, log = [], Recorder()

    def function(completions, trainer_state, log_metric, log_extra, **kwargs):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("step_squared", trainer_state.global_step**2)
        log_metric("objective/kl", 1e9)
        log_extra("text", completions)
        return share_of_a(completions)

    module = policy(reward_funcs=function, num_iterations=2, lr=1e-3)
    run = trainer(tmp_path, max_steps=6, logger=log, log_every_n_steps=1)
    run.fit(module, module.wrap_train_dataloader(prompts()))
    assert steps == [(0, 6), (2, 6), (4, 6)]
    assert [row["step_squared"] for _, row in log.rows if "step_squared" in row] == [0, 4, 16]
    assert all(abs(row["objective/kl"]) < 10 for _, row in log.rows if "objective/kl" in row)
    assert run.callback_metrics["step_squared"] == 16, "a callback can monitor it"
    assert len(module.rollout_log.extra["text"]) == 8


# ---- the table


ROOT = Path(__file__).parent.parent
NAMES = json.loads((ROOT / "tests/trl_names.json").read_text())
PAGE = (ROOT / "docs/from-trl.md").read_text()


def rows_of(section: str) -> list[tuple[set[str], str]]:
    """(TRL's names, what is said of ours) for every row of the table in a section."""
    text = re.split(r"^## ", PAGE, flags=re.M)
    (body,) = [part for part in text if part.startswith(section + "\n")]
    lines = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")][2:]
    return [(set(re.findall(r"`([^`]+)`", cells[0])), " ".join(cells[1:])) for cells in lines]


SECTIONS = {
    "Arguments of the trainers": set().union(*NAMES["trainers"].values()),
    "RLOOConfig and GRPOConfig": {*NAMES["configs"]["RLOOConfig"], *NAMES["configs"]["GRPOConfig"]},
    "RewardConfig": set(NAMES["configs"]["RewardConfig"]),
    "SFTConfig": set(NAMES["configs"]["SFTConfig"]),
    "DPOConfig": set(NAMES["configs"]["DPOConfig"]),
    "TrainingArguments": set(NAMES["TrainingArguments"]),
    "ModelConfig and ScriptArguments": {*NAMES["ModelConfig"], *NAMES["ScriptArguments"]} - {"trust_remote_code"},
    "Metrics": set().union(*NAMES["metrics"].values()),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_name_of_trl_is_explained_once(section):
    explained = [name for names, _ in rows_of(section) for name in names]
    assert sorted(explained) == sorted(SECTIONS[section])
    assert all(said.strip() for _, said in rows_of(section))


def test_the_list_is_of_the_peer_that_is_measured_against():
    assert f"trl=={NAMES['trl']}" in (ROOT / "Makefile").read_text() and f"TRL {NAMES['trl'].rsplit('.', 1)[0]}" in PAGE


def test_our_metrics_are_tags_that_there_are():
    metrics = (ROOT / "docs/metrics.md").read_text()
    for _, said in rows_of("Metrics"):
        for tag in re.findall(r"`([a-z0-9_<>]+/[a-z0-9_/<>]+)`", said):
            assert tag in metrics or tag.rpartition("/")[2] in metrics, tag
