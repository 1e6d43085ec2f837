"""Reward sources: what functions and models are shown, what they may answer, and that a mistake is told in one line.

The power of these tests, found by planting one error at a time in function_reward.py, model_reward.py and rewards.py:
    planted error                                 first test that fails, without test_
    columns not repeated                          a_function_sees_what_trl_shows_it
    padding among completion_ids                  a_function_sees_what_trl_shows_it
    texts for conversations                       conversations_are_answered_by_one_assistant_message
    a new loop for every call                     an_async_function_is_waited_for_also_within_a_notebooks_loop
    None scores 0 alone                           none_takes_the_prompt_out
    NaN accepted                                  a_wrong_answer_is_told_with_function_value_and_fix
    length not checked                            a_wrong_answer_is_told_with_function_value_and_fix
    weights ignored                               several_sources_are_added_with_their_weights
    weights not counted                           a_wrong_number_of_weights_is_told
    names not distinct                            every_source_has_a_name_of_its_own
    user's model not copied                       a_reward_model_is_frozen_and_the_users_own_is_left_alone
    not frozen                                    a_reward_model_is_frozen_and_the_users_own_is_left_alone
    scores in sorted order                        object_checkpoint_and_export_give_equal_scores
    EOS for cut responses too                     with_another_tokenizer_it_reads_the_text_in_its_own_tokens
    EOS for none                                  with_another_tokenizer_it_reads_the_text_in_its_own_tokens
    end of turn is EOS alone                      conversations_go_through_its_own_chat_template
    ids of another tokenizer passed on            with_another_tokenizer_it_reads_the_text_in_its_own_tokens
    same ids, other template: policy's rendering  the_same_tokens_under_another_template_are_rendered_anew
    sampled ids encoded anew                      with_the_policys_tokenizer_it_reads_the_very_tokens_that_were_sampled
    no warning of unknown words                   text_that_its_tokenizer_cannot_write_is_warned_of_once
    warning every time                            text_that_its_tokenizer_cannot_write_is_warned_of_once
    padding counts in comparing tokenizers        tokenizers_are_told_apart
    vocabulary not compared                       tokenizers_are_told_apart
    fresh heads judge                             a_model_without_a_trained_scalar_head_is_no_reward
    a space doubled before a templated reply      conversations_go_through_its_own_chat_template
    train mode as found                           a_reward_model_is_frozen_and_the_users_own_is_left_alone
"""

from __future__ import annotations

import asyncio
import copy
import functools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from families import word_tokenizer
from saved_models import BYTES, TINY, checkpoint, disturb, refuses, saved
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from p3o_lightning import RewardModel, SupervisedPolicy
from p3o_lightning.batches import PromptBatch
from p3o_lightning.data_formats import Row
from p3o_lightning.encoding import Encoder, encode_prompt, encode_response
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import sequence_scores
from p3o_lightning.function_reward import FunctionReward
from p3o_lightning.generation import decode_completions
from p3o_lightning.model_reward import ModelReward, same_tokenizer
from p3o_lightning.models import load_policy, load_reward_backbone
from p3o_lightning.responses import Responses
from p3o_lightning.rewards import reward_sources, share_of_letter_e
from p3o_lightning.scoring import allows
from p3o_lightning.sequences import pad_left, pad_right
from p3o_lightning.tokenizers import byte_tokenizer, distinct_pad_token

PROMPTS = ["Say hi: ", "Q", "What is it?\n\nA:"]
TEXTS = [["hi", "hello there"], ["é", ""], ["a b", "cut of"]]
ENDED = [[True, True], [True, True], [True, False]]
CHAT = [[{"role": "user", "content": text}] for text in PROMPTS]


def responses(prompts=PROMPTS, texts=TEXTS, ended=ENDED, tokenizer=BYTES, columns=None) -> Responses:
    """As a rollout makes them: prompts padded on the left, responses on the right, both with the EOS id, which is told by no id."""
    eos = tokenizer.eos_token_id
    tokens, mask = pad_left([encode_prompt(tokenizer, prompt) for prompt in prompts], eos)
    rows = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], *([eos] if end else [])]
        for group, ends in zip(texts, ended, strict=True)
        for text, end in zip(group, ends, strict=True)
    ]
    replies, reply_mask = pad_right(rows, eos)
    shape = (len(prompts), len(texts[0]), -1)
    batch = PromptBatch(tokens, mask, list(prompts), columns or {})
    replies, reply_mask = replies.view(shape), reply_mask.view(shape)
    return Responses(batch, replies, reply_mask, decode_completions(tokenizer, replies, reply_mask))


def scored(function, given=None):
    return FunctionReward(function)(responses() if given is None else given)


def lengths(prompts, completions, completion_ids, **columns):
    return [len(ids) for ids in completion_ids]


# ---- functions


def test_a_function_sees_what_trl_shows_it():
    seen = {}

    def function(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return range(6)

    scores = scored(function, responses(columns={"answer": ["x", "y", "z"], "level": [1, None, 3]}))
    assert seen["prompts"] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    assert seen["completions"] == ["hi", "hello there", "é", "", "a b", "cut of"]
    eos = BYTES.eos_token_id
    assert seen["completion_ids"][0] == [*BYTES("hi")["input_ids"], eos]
    assert seen["completion_ids"][3] == [eos]
    assert seen["completion_ids"][5] == BYTES("cut of")["input_ids"], "cut off: no EOS, no padding"
    beside = {"trainer_state", "log_metric", "log_extra"}
    assert seen["columns"].keys() == {"answer", "level"} | beside and seen["columns"]["answer"] == ["x", "x", "y", "y", "z", "z"]
    assert seen["columns"]["level"] == [1, 1, None, None, 3, 3]
    assert scores.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert scores.dtype == torch.float32


def test_conversations_are_answered_by_one_assistant_message():
    seen = []
    scored(lambda prompts, completions, **_: seen.extend(zip(prompts, completions, strict=True)) or [0.0] * 6, responses(CHAT))
    assert seen[1] == (CHAT[0], [{"role": "assistant", "content": "hello there"}])
    assert_close(scored(share_of_letter_e, responses(CHAT)), scored(share_of_letter_e))


def test_our_own_arguments_win_over_columns_of_the_same_name():
    scores = scored(lengths, responses(columns={"completion_ids": [[], [], []], "prompts": ["x"] * 3}))
    assert scores[0].tolist() == [3, 12]


def test_an_async_function_is_waited_for_also_within_a_notebooks_loop():
    loops = []

    async def function(completions, **_):
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    async def notebook():
        return scored(function)

    assert scored(function).tolist() == asyncio.run(notebook()).tolist() == [[2, 11], [1, 0], [3, 6]]
    assert loops[0] is loops[1], "a client keeps its connections from call to call"


def test_none_takes_the_prompt_out():
    scores = scored(lambda **_: [1.0, 2.0, None, 3.0, None, None])
    assert scores.tolist() == [[1, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "answer", [[1, 2, 3, 4, 5, 6], (1.0, 2, 3, 4, 5, 6), np.arange(1, 7), torch.arange(1, 7), [torch.tensor(float(i)) for i in range(1, 7)]]
)
def test_numbers_of_any_kind(answer):
    assert scored(lambda **_: answer).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert scored(lambda **_: torch.arange(1.0, 7).requires_grad_()).requires_grad is False


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([0.0] * 5, ["returned 5 scores for 6 completions", "one for each, in order"]),
        ([], ["returned 0 scores"]),
        (None, ["returned NoneType None", "a list of 6 numbers"]),
        (1.0, ["returned float 1.0"]),
        ("great", ["returned str 'great'"]),
        ({"score": 1}, ["returned dict"]),
        ((value for value in [1.0] * 6), ["returned generator"]),
        ([0.0, "1", 0, 0, 0, 0], ["returned '1' at position 1", "return a float, or None"]),
        ([0.0, 0, True, 0, 0, 0], ["returned True at position 2"]),
        ([[0.0]] * 6, ["returned [0.0] at position 0"]),
        (torch.zeros(6, 1), ["returned [0.0] at position 0"]),
        ([0.0, 0, 0, math.nan, 0, 0], ["returned nan at position 3", "a finite number, or None"]),
        ([0.0, 0, 0, 0, 0, -math.inf], ["returned -inf at position 5"]),
        ([0.0, 0, 0, 0, 0, torch.zeros(40, 40)], ["returned"]),
    ],
)
def test_a_wrong_answer_is_told_with_function_value_and_fix(answer, words):
    def politeness(**_):
        return answer

    refuses(lambda: scored(politeness), "model.reward_funcs: politeness", *words)


def test_a_function_that_takes_other_arguments_is_told_how_to_take_ours():
    def narrow(completions, prompts):
        return [0.0] * 6

    refuses(lambda: scored(narrow), "model.reward_funcs: narrow(completions, prompts) cannot be called", "completion_ids", "**columns")
    scored(lambda completions, **_: [0.0] * 6)


def test_an_error_of_the_users_own_keeps_its_type_and_place():
    def broken(**_):
        raise KeyError("mine")

    async def broken_later(**_):
        raise KeyError("mine")

    for function in (broken, broken_later):
        with pytest.raises(KeyError, match="mine") as caught:
            scored(function)
        assert caught.traceback[-1].name == function.__name__


# ---- several, names, weights


def test_several_sources_are_added_with_their_weights():
    sources = reward_sources([lengths, share_of_letter_e], [0.5, -2.0], BYTES, "float32")
    total, each = sources(responses())
    assert list(each) == ["lengths", "share_of_letter_e"]
    assert_close(total, 0.5 * scored(lengths) - 2 * scored(share_of_letter_e))
    alone, _ = reward_sources(lengths, None, BYTES, "float32")(responses())
    assert_close(alone, scored(lengths))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []])
def test_a_wrong_number_of_weights_is_told(weights):
    refuses(
        lambda: reward_sources([lengths, share_of_letter_e], weights, BYTES, "float32"), f"has {len(weights)} values for 2 reward_funcs"
    )


def test_weights_are_finite_and_there_is_a_source():
    refuses(lambda: reward_sources([lengths], [math.nan], BYTES, "float32"), "model.reward_weights has nan")
    refuses(lambda: reward_sources([], None, BYTES, "float32"), "model.reward_funcs is empty")


def test_every_source_has_a_name_of_its_own():
    class Judge:
        def __call__(self, **_):
            return [0.0] * 6

    def lengths_2(**_):
        return [1.0] * 6

    given = [lengths, lengths_2, lengths, functools.partial(lengths), Judge(), lambda **_: [0.0] * 6]
    sources = reward_sources(given, None, BYTES, "float32")
    names = [source.name for source in sources.sources]
    assert names == ["lengths", "lengths_2", "lengths_3", "lengths_4", "Judge", "<lambda>"]
    total, each = sources(responses())
    assert list(each) == names and torch.equal(total, sum(each.values()))


# ---- dotted names


def test_a_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def good(**_): return [1.0] * 6\nnumber = 3\nclass Judge: pass\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)

    def load(name):
        return lambda: reward_sources(name, None, BYTES, "float32")

    assert load("my_rewards.good")()(responses())[0].tolist() == [[1, 1]] * 3
    for name, *words in (
        ("my_rewards.bad", "my_rewards has no bad"),
        ("my_rewards.number", "which is a int"),
        ("my_rewards.Judge", "which is a type"),
        ("absent_rewards.good", "could not be imported (No module named 'absent_rewards')"),
        ("needs_more.good", "not_installed_at_all"),
        ("good", "neither an existing path nor a dotted name"),
        (".good", "neither an existing path nor a dotted name"),
        ("my rewards.good", "neither an existing path nor a dotted name"),
        ("", "neither an existing path nor a dotted name"),
    ):
        refuses(load(name), f"model.reward_funcs is {name!r}", "my_rewards.politeness", *words)
    with pytest.raises(ZeroDivisionError):
        load("faulty.good")()
    for name in ("my_rewards", "needs_more", "faulty"):
        sys.modules.pop(name, None)


# ---- reward models


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return disturb(RewardModel({**TINY, "max_position_embeddings": 256, "attention_dropout": 0.5}, tokenizer=BYTES))


def by_hand(module: RewardModel, given: Responses, tokenizer=None) -> torch.Tensor:
    """One row at a time: prompt and response as the reward model's training data has them."""
    tokenizer = tokenizer or module.tokenizer
    scores = []
    for prompt, texts, ends in zip(given.prompts.prompts, TEXTS, ENDED, strict=True):
        for text, end in zip(texts, ends, strict=True):
            reply = encode_response(tokenizer, text)
            row = torch.tensor([[*encode_prompt(tokenizer, prompt), *(reply if end else reply[:-1])]])
            with torch.no_grad():
                module.model.eval()
                scores.append(sequence_scores(module.model, row, torch.ones_like(row, dtype=torch.bool)))
    return torch.cat(scores).view(3, 2)


def source_of(given, tokenizer=BYTES, dtype="float32"):
    (source,) = reward_sources(given, None, tokenizer, dtype).sources
    assert isinstance(source, ModelReward)
    return source


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_object_checkpoint_and_export_give_equal_scores(adapter, tmp_path):
    torch.manual_seed(0)
    module = disturb(RewardModel(TINY, tokenizer=BYTES, peft_config=adapter))
    path = tmp_path / "reward" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    checkpoint(module, path)
    folder = module.export(tmp_path / "reward" / "export")
    sources = [source_of(given) for given in (module, path, str(path), folder, str(folder))]
    expected = by_hand(module, responses())
    for source in sources:
        assert_close(source(responses()), expected, rtol=0, atol=1e-5)
        assert not hasattr(source.network, "peft_config")
    assert [source.name for source in sources] == ["RewardModel", "reward", "reward", "reward", "reward"]
    model = load_reward_backbone(folder, BYTES)
    assert_close(source_of(model)(responses()), expected, rtol=0, atol=1e-5)  # its tokenizer is beside its files


def test_a_relative_path_has_a_name(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(trained, tmp_path / "last.ckpt")
    assert source_of("last.ckpt").name == "last"
    trained.export("good-one")
    assert source_of("./good-one").name == "good-one"


def test_a_reward_model_is_frozen_and_the_users_own_is_left_alone(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.train()
    source = source_of(trained)
    assert not any(parameter.requires_grad for parameter in source.network.parameters())
    assert not source.network.training
    scores = source(responses())
    assert not scores.requires_grad and not source.network.training
    source.network.train()  # as Lightning or a user may do to it
    assert torch.equal(source(responses()), scores)
    assert trained.training and all(parameter.requires_grad for parameter in trained.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    for own, copied in zip(trained.model.parameters(), source.network.parameters(), strict=True):
        assert own.data_ptr() != copied.data_ptr()


def what_it_reads(source: ModelReward, given: Responses) -> list[list[int]]:
    """The texts that reach the network."""
    rows: list[list[int]] = []

    def record(_, args, kwargs):
        rows.extend(ids.tolist() for ids in kwargs["packing"].texts(kwargs["input_ids"]))

    assert allows(source.network)  # which tries it out
    hook = source.network.model.register_forward_pre_hook(record, with_kwargs=True)
    source(given)
    hook.remove()
    return rows


def test_with_the_policys_tokenizer_it_reads_the_very_tokens_that_were_sampled(trained):
    source, given = source_of(trained), responses()
    expected = [
        [*prompt[kept].tolist(), *ids[mask].tolist()]
        for prompt, kept, group, masks in zip(given.prompts.tokens, given.prompts.attention_mask, given.tokens, given.mask, strict=True)
        for ids, mask in zip(group, masks, strict=True)
    ]
    assert sorted(what_it_reads(source, given)) == sorted(expected)
    eos = BYTES.eos_token_id
    assert [row[-1] == eos for row in expected] == [True] * 5 + [False]
    assert_close(source(given), by_hand(trained, given), rtol=0, atol=1e-5)
    # sampled tokens need not be those that the text would be encoded to: nothing is encoded anew
    odd = given._replace(texts=[["nonsense"] * 2] * 3)
    assert torch.equal(source(odd), source(given))


@pytest.mark.parametrize("rows", [1, 8, 16, 100])
def test_scores_do_not_depend_on_the_rows_of_a_batch(trained, rows, monkeypatch):
    source = source_of(trained)
    expected = source(responses())
    monkeypatch.setattr(source, "batch_rows", rows)
    assert_close(source(responses()), expected, rtol=2e-6, atol=1e-6)  # kernels add up in an order that depends on the batch
    assert expected.flatten().unique().numel() == 6


@pytest.mark.parametrize("longest", [[1], [5, 5, 6], [3, 3, 3, 40, 200], [900, 1000]])
def test_a_gpu_is_given_as_many_tokens_as_are_allowed_and_a_prompt_at_least(trained, longest, monkeypatch):
    """Padded to the longest of those that are read together; one long text leaves the short ones their batches."""
    source, start, sizes = source_of(trained), 0, []
    monkeypatch.setattr(source, "batch_tokens", 64)
    while start < len(longest):
        sizes.append(source._prompts_at_once(longest[start:], 4, "cuda"))
        start += sizes[-1]
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    for size, end in zip(sizes, ends, strict=True):
        assert size == 1 or size * 4 * longest[end - 1] <= 64
        assert end == len(longest) or (size + 1) * 4 * longest[end] > 64, "one more would not have fitted"
    assert ends[-1] == len(longest)


def test_dtype_is_that_of_the_files_loaded_and_scores_are_float32(trained, tmp_path):
    folder = trained.export(tmp_path / "export")
    half = source_of(folder, dtype="bfloat16")
    assert next(half.network.parameters()).dtype == torch.bfloat16
    assert half(responses()).dtype == torch.float32
    assert_close(half(responses()), source_of(folder)(responses()), rtol=0, atol=0.3)


# ---- another tokenizer than the policy's

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}|end|\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def shifted_bytes(template=None):
    """The byte tokenizer with other ids: nothing may be passed on as ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<eos>": 0, "<pad>": 1, **{char: i + 2 for i, char in enumerate(alphabet)}}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


def test_with_another_tokenizer_it_reads_the_text_in_its_own_tokens():
    torch.manual_seed(0)
    module = disturb(RewardModel(TINY, tokenizer=shifted_bytes()))
    source, given = source_of(module), responses()
    assert not source.same_tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(source(given), by_hand(module, given), rtol=0, atol=1e-5)
    ends = [row[-1] == 0 for row in what_it_reads(source, given)]
    assert ends.count(True) == 5
    assert max(max(row) for row in what_it_reads(source, given)) < 258


def test_conversations_go_through_its_own_chat_template():
    own = shifted_bytes(TEMPLATE)
    torch.manual_seed(0)
    source = source_of(disturb(RewardModel({**TINY, "max_position_embeddings": 256}, tokenizer=own)))
    # a transcript policy begins its responses with a space, which the template does not want
    texts = [[f" {text}" for text in group] for group in TEXTS]
    given = responses(CHAT, texts)
    read = what_it_reads(source, given)
    expected = []
    for prompt, group, ends in zip(CHAT, TEXTS, ENDED, strict=True):
        for text, end in zip(group, ends, strict=True):
            # as the training data of a RewardModel is encoded
            row = next(Encoder(own, "pairs", 10_000)([Row(prompt, ([{"role": "assistant", "content": text}],), None, {})]))
            ids = [*row.prompt.tolist(), *row.replies[0].tolist()]
            assert own.decode(ids) == f"[user]{prompt[0]['content']}[assistant]{text}|end|\n<eos>"
            expected.append(ids if end else ids[: -len("|end|\n") - 1])
    assert sorted(read) == sorted(expected)
    assert own.decode(expected[-1]).endswith("[assistant]cut of")


def test_the_same_tokens_under_another_template_are_rendered_anew():
    own = byte_tokenizer()
    own.chat_template = TEMPLATE
    source = source_of(disturb(RewardModel({**TINY, "max_position_embeddings": 256}, tokenizer=own)))
    assert source.same_tokens and not source.same_template
    assert all(own.decode(row).startswith("[user]") for row in what_it_reads(source, responses(CHAT)))
    assert not any(own.decode(row).startswith("[user]") for row in what_it_reads(source, responses())), "texts need no template"


def test_a_template_that_rewrites_replies_does_not_stop_the_run():
    own = shifted_bytes("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}")
    source = source_of(disturb(RewardModel(TINY, tokenizer=own)))
    read = [own.decode(row) for row in what_it_reads(source, responses(CHAT))]
    assert "Q?é<eos>" in read and any(text.endswith("A:?cut of") for text in read)


def test_text_that_its_tokenizer_cannot_write_is_warned_of_once():
    words = word_tokenizer(["hi", "hello", "there", "Say", "a", "b", "of"])
    torch.manual_seed(0)
    source = source_of(disturb(RewardModel(TINY, tokenizer=words)))
    with pytest.warns(UserWarning, match=r"'RewardModel' has another tokenizer .* cannot reproduce 33% of the responses") as caught:
        source(responses())  # é and "cut"
        source(responses())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # case and spacing are not lost text
        fine = source_of(RewardModel(TINY, tokenizer=word_tokenizer(["hi", "a", "b"])))
        fine(responses(PROMPTS, [["hi", " hi  a"], ["", "b"], ["a b", "a"]]))


def test_tokenizers_are_told_apart():
    assert same_tokenizer(BYTES, BYTES) and same_tokenizer(BYTES, byte_tokenizer())
    assert not same_tokenizer(BYTES, shifted_bytes())
    words = [f"w{i}" for i in range(5)]
    policy = word_tokenizer(words)
    policy.pad_token = policy.eos_token
    assert same_tokenizer(policy, distinct_pad_token(policy)), "the reward model's pads with <unk>, the policy's with EOS"
    bare = byte_tokenizer()
    bare.pad_token = bare.eos_token
    assert len(distinct_pad_token(bare)) == len(bare) + 1
    assert same_tokenizer(bare, distinct_pad_token(bare)), "the reward model's has one token more, for padding"
    assert not same_tokenizer(policy, word_tokenizer([*words, "more"]))
    assert not same_tokenizer(policy, word_tokenizer(words[::-1]))
    other_end = word_tokenizer(words)
    other_end.eos_token = "w0"
    assert not same_tokenizer(word_tokenizer(words), other_end)


# ---- what cannot judge


def test_a_model_without_a_trained_scalar_head_is_no_reward(tmp_path):
    policy = load_policy(TINY, BYTES)
    folder = saved(tmp_path / "policy", policy)
    stage = SupervisedPolicy(folder)
    for given in (folder, checkpoint(stage, tmp_path / "sft.ckpt"), policy, stage):
        refuses(lambda given=given: reward_sources(given, None, BYTES, "float32"), "trained")


def test_a_model_without_a_tokenizer_needs_the_policys_to_fit(tmp_path):
    model = load_reward_backbone(TINY, BYTES)
    assert source_of(model).same_tokens
    larger = word_tokenizer([f"w{i}" for i in range(300)])
    refuses(lambda: source_of(model, larger), "LlamaForSequenceClassification without a tokenizer", "RewardModel(model, tokenizer=...)")
    bare = saved(tmp_path / "bare", model, tokenizer=None)
    refuses(lambda: reward_sources(bare, None, BYTES, "float32"), "a folder without tokenizer.json")


@pytest.mark.parametrize("name", ["absent/folder", "absent.ckpt", "/absent/last.ckpt", "./absent"])
def test_a_path_that_is_not_there(name):
    refuses(lambda: reward_sources(name, None, BYTES, "float32"), name)


def test_an_encoder_may_judge():
    words = word_tokenizer(["hi", "a", "b"])
    made = BertConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    model = BertForSequenceClassification(made)
    module = RewardModel(model, tokenizer=words)
    scores = source_of(module)(responses(PROMPTS, [["hi", "a"], ["b", "a b"], ["hi a", "b"]]))
    assert scores.isfinite().all() and scores.unique().numel() == 6


def test_a_users_own_module_is_a_function():
    class Judge(nn.Module):
        def forward(self, prompts, completions, completion_ids, **columns):
            return [float(len(text)) for text in completions]

    (source,) = reward_sources(Judge(), None, BYTES, "float32").sources
    assert isinstance(source, FunctionReward) and source.name == "Judge"
    assert source(responses())[0].tolist() == [2, 11]


def test_frozen_networks_are_those_of_models(trained):
    sources = reward_sources([trained, lengths, copy.copy(trained)], None, BYTES, "float32")
    assert [type(network).__name__ for network in sources.networks] == ["LlamaForSequenceClassification"] * 2
    assert [source.name for source in sources.sources] == ["RewardModel", "lengths", "RewardModel_2"]
    with pytest.raises(InputError):
        reward_sources([trained, lengths], [1.0], BYTES, "float32")
