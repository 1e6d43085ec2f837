"""Chat models: system prompts and many turns, the whole way from data to rollout, reward, export, prediction and transformers' pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, trainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from p3o_lightning import InputError, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Gemma has it: no system role, and the assistant is called model
GEMMAS = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "You are kind."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How are you?"},
]


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Bytes, with the special tokens of a chat; a turn ends with EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<start>", special=True)], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def conversations(tmp_path) -> Path:
    """Comparisons of the last turn of conversations, as people keep them: the history is in both."""
    rows = []
    for number in range(12):
        history = [SYSTEM, *TURNS[:-1], {"role": "user", "content": f"And {number}?"}]
        good, bad = ({"role": "assistant", "content": text} for text in ("e" * (1 + number % 3), "No."))
        rows.append({"chosen": [*history, good], "rejected": [*history, bad], "topic": f"t{number}"})
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rendered(messages, reply=None, tokenizer=None) -> list[int]:
    """The template's own rendering, tokenised by itself."""
    tokenizer = tokenizer or chat_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + (reply or ""), add_special_tokens=False)["input_ids"]


def test_the_whole_way_with_a_system_prompt_and_many_turns(conversations, tmp_path):
    tokenizer, seen = chat_tokenizer(), {}

    def kindness(prompts, completions, completion_ids, topic, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, topic=topic)
        return [text[-1]["content"].count("e") - 0.01 * len(text[-1]["content"]) for text in completions]

    # data -> encode: every view has the prompt that the template renders, and the reply ends with EOS
    data = PreferenceDataModule(str(conversations), batch_size=4, val_fraction=0, length_grouped=False)
    source = {**LLAMA, "max_position_embeddings": 256}
    torch.manual_seed(0)
    sft = SupervisedPolicy(source, tokenizer=tokenizer, lr=1e-2)
    trainer(tmp_path, max_steps=3).fit(sft, data)
    shown = PreferenceDataModule(str(conversations), tokenizer, "demonstrations", batch_size=4, val_fraction=0)
    shown.setup()
    batch = next(iter(shown.train_dataloader()))
    row = batch.tokens[0][batch.attention_mask[0]].tolist()
    heads = [rendered([SYSTEM, *TURNS[:-1], {"role": "user", "content": f"And {number}?"}]) for number in range(12)]
    (number,) = [i for i, head in enumerate(heads) if row[: len(head)] == head]
    reply = [*tokenizer("e" * (1 + number % 3))["input_ids"], tokenizer.eos_token_id]
    assert row == heads[number] + reply and batch.tokens[0][batch.response_mask[0]].tolist() == reply

    reward = RewardModel(source, tokenizer=tokenizer, lr=1e-2)
    trainer(tmp_path, max_steps=3).fit(reward, data)

    # rollout -> reward: the function sees the messages, the model reads the tokens
    policy = PairwisePolicy(sft.model, [reward, kindness], tokenizer=tokenizer, max_completion_length=6, lr=1e-2)
    run = trainer(tmp_path, max_steps=2)
    run.fit(policy, data)
    prompt, answer = seen["prompts"][0], seen["completions"][0]
    assert prompt[:3] == [SYSTEM, *TURNS[:-1]] and prompt[3]["content"] == f"And {seen['topic'][0][1:]}?"
    assert answer == [{"role": "assistant", "content": tokenizer.decode(seen["ids"][0], skip_special_tokens=True)}]
    assert {"rewards/RewardModel/mean", "rewards/kindness/mean"} <= run.callback_metrics.keys()

    # export -> transformers: template and EOS travel, the pipeline answers in a conversation
    folder = policy.export(tmp_path / "export")
    again = AutoTokenizer.from_pretrained(folder)
    assert again.apply_chat_template([SYSTEM, *TURNS], add_generation_prompt=True)["input_ids"] == rendered([SYSTEM, *TURNS])
    chat = pipeline("text-generation", model=str(folder))
    out = chat([SYSTEM, *TURNS], max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert out[:4] == [SYSTEM, *TURNS] and out[4]["role"] == "assistant"
    with torch.no_grad():
        logits = policy.model.eval()(torch.tensor([rendered([SYSTEM, *TURNS])])).logits[0, -1]
    first = tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)
    assert out[4]["content"].startswith(first), "greedy: the pipeline's prompt is ours"


def test_predict_answers_conversations_and_keeps_them(p3o, conversations, tmp_path):
    module = SupervisedPolicy({**LLAMA, "max_position_embeddings": 256}, tokenizer=chat_tokenizer())
    module.export(tmp_path / "base")
    ended = p3o(
        *("predict", "--model", "SupervisedPolicy", "--model.model", "base", "--data.path", conversations),
        *("--model.max_completion_length", "4", "--trainer.accelerator", "cpu"),
    )
    assert ended.code == 0, ended
    rows = [json.loads(line) for line in Path("runs/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[0]["prompt"][0] == SYSTEM and rows[0]["prompt"][-1]["content"] == "And 0?"
    assert all(len(row["responses"]) == 1 and isinstance(row["responses"][0], str) for row in rows)


def test_a_template_without_a_system_role_drops_such_rows_with_the_reason(conversations):
    tokenizer = chat_tokenizer(GEMMAS)
    data = PreferenceDataModule(str(conversations), tokenizer, "pairs")
    with pytest.raises(InputError, match=r"none can be used \(refused by the chat template 12\): choose a data.tokenizer with another"):
        data.setup()
    rows = [
        {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "Well."}], "rejected": [{"role": "assistant", "content": "Bad"}]}
    ] * 2
    data = PreferenceDataModule(rows, tokenizer, "pairs", batch_size=1, val_fraction=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    chosen = batch.tokens[0, 0][batch.attention_mask[0, 0]].tolist()
    assert chosen == rendered(TURNS, "Well.<|im_end|>", tokenizer) and chosen.count(tokenizer.bos_token_id) == 1


def test_the_reward_of_a_conversation_is_the_same_in_training_and_in_rollouts(conversations, tmp_path):
    """One RewardModel, one text: as a pair of the data, and as a response that was sampled."""
    from p3o_lightning.batches import PromptBatch
    from p3o_lightning.encoding import encode_prompt, encode_response
    from p3o_lightning.generation import decode_completions
    from p3o_lightning.responses import Responses
    from p3o_lightning.rewards import reward_sources
    from p3o_lightning.sequences import pad_left, pad_right

    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    reward = RewardModel({**LLAMA, "max_position_embeddings": 256}, tokenizer=tokenizer).eval()
    data = PreferenceDataModule(str(conversations), tokenizer, "pairs", batch_size=1, val_fraction=0)
    data.setup()
    pair = next(iter(data.train_dataloader()))
    trained = reward(pair)[0]
    text = tokenizer.decode(pair.tokens[0, 0][pair.attention_mask[0, 0]])
    number = text.rpartition("And ")[2].partition("?")[0]
    messages = [SYSTEM, *TURNS[:-1], {"role": "user", "content": f"And {number}?"}]
    tokens, mask = pad_left([encode_prompt(tokenizer, messages)], 0)
    replies, kept = pad_right([encode_response(tokenizer, said) for said in ("e" * (1 + int(number) % 3), "No.")], 0)
    replies, kept = replies[None], kept[None]
    given = Responses(PromptBatch(tokens, mask, [messages], {}), replies, kept, decode_completions(tokenizer, replies, kept))
    scores, _ = reward_sources(reward, None, tokenizer, "float32")(given)
    torch.testing.assert_close(scores[0], trained.detach(), rtol=0, atol=1e-6)
