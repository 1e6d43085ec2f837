"""The two forwards that everything rests on, log-probabilities and scores, and the modes in which a model runs them.

The power of these tests, found by planting one error at a time in forwards.py:
    planted error                          first test that fails, without test_
    dropout read from configs left on      dropout_off_makes_train_mode_deterministic
    dropout of float attributes left on    dropout_off_makes_train_mode_deterministic
    dropout modules left on                dropout_off_makes_train_mode_deterministic
    dropout off in the exported config     dropout_off_makes_train_mode_deterministic
    log-probabilities one position late    log_probabilities_are_those_of_single_unpadded_sequences
    temperature not in log-probabilities   log_probabilities_are_those_of_single_unpadded_sequences
    positions count padding                log_probabilities_are_those_of_single_unpadded_sequences
    mask not handed to the model           log_probabilities_are_those_of_single_unpadded_sequences
    log-probabilities in half precision    log_probabilities_of_a_half_precision_model_are_float32
    float64 rounded                        log_probabilities_are_those_of_single_unpadded_sequences
    pooled before the last token           scores_of_a_padded_batch_equal_those_of_each_row_alone
    pooled by padding id                   scores_of_a_padded_batch_equal_those_of_each_row_alone
    pooled at the right edge               scores_of_a_padded_batch_equal_those_of_each_row_alone
"""

from __future__ import annotations

import copy

import pytest
import torch
from families import BOS, CAUSAL, EOS, PAD, VOCABULARY, causal, config, left_padded, word_tokenizer
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig

from p3o_lightning.forwards import completion_logps, eval_mode, sequence_scores, turn_dropout_off, unwrapped
from p3o_lightning.models import attach_adapter, load_reward_backbone

# ---- log-probabilities


def batch_of_responses(responses: int = 2, steps: int = 5):
    """Prompts of unequal lengths, padded on the left, and responses of unequal lengths, padded on the right with EOS."""
    rows, prompt_tokens, prompt_mask = left_padded([3, 7, 1])
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([[5, 1], [2, 4], [3, 5]])[:, :responses]
    mask = torch.arange(steps) < lengths.unsqueeze(-1)
    tokens = torch.randint(3, VOCABULARY, mask.shape, generator=generator).masked_fill(~mask, EOS)
    tokens[0, 1, 0] = EOS  # a response that is EOS alone
    return rows, prompt_tokens, prompt_mask, tokens, mask


@torch.no_grad()
def one_at_a_time(model, rows, tokens, mask, temperature):
    """The definition: log softmax over the whole vocabulary, of one unpadded sequence, one token after the other."""
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for i, j in ((i, j) for i in range(len(rows)) for j in range(tokens.shape[1])):
        reply = tokens[i, j][mask[i, j]]
        logits = model(torch.cat([rows[i], reply]).unsqueeze(0), use_cache=False).logits[0]
        logps = (logits.double() / temperature).log_softmax(-1)
        for t, token in enumerate(reply):
            expected[i, j, t] = logps[len(rows[i]) - 1 + t, token]
    return expected


# the others compute a part in float32 whatever their weights are (softmax, rotation, recurrent state)
FLOAT64 = {"llama", "gpt2", "gpt_neox", "qwen2", "gemma", "mistral", "olmo", "opt", "falcon"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", CAUSAL)
def test_log_probabilities_are_those_of_single_unpadded_sequences(family, temperature):
    rows, prompt_tokens, prompt_mask, tokens, mask = batch_of_responses()
    model = causal(family, initializer_range=0.2)
    logps = completion_logps(model, prompt_tokens, prompt_mask, tokens, mask, temperature)
    assert logps.dtype == torch.float32 and logps.requires_grad
    assert (logps[~mask] == 0).all()
    assert_close(logps.double().detach(), one_at_a_time(model, rows, tokens, mask, temperature), rtol=0, atol=1e-5)
    if family in FLOAT64:
        model = model.double()
        logps = completion_logps(model, prompt_tokens, prompt_mask, tokens, mask, temperature)
        assert logps.dtype == torch.float64
        assert_close(logps.detach(), one_at_a_time(model, rows, tokens, mask, temperature), rtol=0, atol=1e-10)


def test_log_probabilities_of_a_half_precision_model_are_float32():
    _, *batch = batch_of_responses()
    logps = completion_logps(causal("llama").to(torch.bfloat16), *batch)
    assert logps.dtype == torch.float32
    coarse = logps[batch[3]].to(torch.bfloat16).float()
    assert not torch.equal(coarse, logps[batch[3]]), "else they were rounded to bfloat16 on the way"


def test_log_probabilities_do_not_read_the_padding():
    _, prompt_tokens, prompt_mask, tokens, mask = batch_of_responses()
    for family in ("llama", "gpt2", "mistral"):
        model = causal(family)
        one = completion_logps(model, prompt_tokens, prompt_mask, tokens, mask)
        other = completion_logps(model, prompt_tokens.masked_fill(~prompt_mask, BOS), prompt_mask, tokens.masked_fill(~mask, PAD), mask)
        assert torch.equal(one, other)


def test_log_probabilities_of_all_tokens_sum_to_one():
    model, prompt = causal("llama").double(), torch.tensor([[5, 6, 7]])
    every = torch.arange(VOCABULARY).view(1, -1, 1)
    logps = completion_logps(model, prompt, torch.ones_like(prompt, dtype=torch.bool), every, torch.ones_like(every, dtype=torch.bool), 1.7)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_log_probabilities_through_an_adapter():
    rows, *batch = batch_of_responses()
    model = attach_adapter(causal("llama"), {"r": 2}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert_close(completion_logps(model, *batch).double(), one_at_a_time(model, rows, batch[2], batch[3], 1.0), rtol=0, atol=2e-5)


# ---- scores


CLASSIFIERS = ["llama", "gpt2", "gpt_neox", "qwen2", "gemma2", "mistral", "opt", "bloom", "falcon", "mixtral"]


def classifier(family: str, pad: int = EOS):
    tokenizer = word_tokenizer([f"w{i}" for i in range(VOCABULARY - 3)])
    torch.manual_seed(0)
    model = load_reward_backbone(config(family), tokenizer).eval()
    model.config.pad_token_id = pad
    return model


def right_padded(value: int, lengths=(4, 9, 1, 6)):
    generator = torch.Generator().manual_seed(4)
    rows = [torch.cat([torch.randint(3, VOCABULARY, (length,), generator=generator), torch.tensor([EOS])]) for length in lengths]
    tokens, mask = torch.full((len(rows), max(lengths) + 1), value), torch.zeros(len(rows), max(lengths) + 1, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return rows, tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_a_padded_batch_equal_those_of_each_row_alone(family):
    model = classifier(family)
    rows, tokens, mask = right_padded(EOS)
    alone = torch.cat([sequence_scores(model, row.unsqueeze(0), torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    assert_close(sequence_scores(model, tokens, mask), alone, rtol=0, atol=1e-5)
    # by hand: the head on the hidden state of the row's last token
    hand = torch.cat([model.score(getattr(model, model.base_model_prefix)(row.unsqueeze(0)).last_hidden_state[0, -1]) for row in rows])
    assert_close(alone, hand, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_final_eos_changes_the_score_even_where_it_is_the_padding_id(family):
    model = classifier(family, pad=EOS)
    tokens = torch.tensor([[5, 6, 7, EOS], [5, 6, 7, EOS]])
    with_eos, without = sequence_scores(model, tokens, torch.tensor([[True] * 4, [True, True, True, False]]))
    assert abs(float(with_eos - without)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_equal_transformers_own_where_the_padding_id_is_distinct(family):
    model = classifier(family, pad=PAD)
    _, tokens, mask = right_padded(PAD)
    assert_close(sequence_scores(model, tokens, mask), model(tokens, attention_mask=mask.long()).logits[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_scores_of_an_encoder_are_its_own():
    made = BertConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(made).eval()
    _, tokens, mask = right_padded(PAD)
    assert_close(sequence_scores(model, tokens, mask), model(tokens, attention_mask=mask.long()).logits[:, 0])


@torch.no_grad()
def test_scores_are_float32_at_least_and_keep_float64():
    _, tokens, mask = right_padded(PAD)
    model = classifier("llama")
    half = copy.deepcopy(model).to(torch.bfloat16)
    scores = sequence_scores(half, tokens, mask)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.to(torch.bfloat16).float()), "the head computed in float32"
    exact = sequence_scores(copy.deepcopy(model).double(), tokens, mask)
    assert exact.dtype == torch.float64
    assert_close(sequence_scores(model, tokens, mask).double(), exact, rtol=0, atol=1e-4)


def test_a_trained_head_gets_its_gradient_through_an_adapter():
    model = attach_adapter(classifier("llama"), {"r": 2})
    _, tokens, mask = right_padded(PAD)
    sequence_scores(model, tokens, mask).sum().backward()
    head = unwrapped(model).score.modules_to_save["default"].weight
    assert head.grad is not None and head.grad.abs().sum() > 0


# ---- dropout


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5},
    "falcon": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "gptj": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "bloom": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.5, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_off_makes_train_mode_deterministic(family):
    model = causal(family, **DROPOUT[family]).train()
    tokens = torch.randint(3, VOCABULARY, (4, 12))

    def drift() -> float:
        return float((model(tokens).logits - model(tokens).logits).detach().abs().max())

    assert drift() > 1e-3
    before = model.config.to_dict()
    turn_dropout_off(model)
    assert drift() == 0
    assert torch.equal(model(tokens).logits, model.eval()(tokens).logits)
    assert model.config.to_dict() == before, "the exported config keeps the model's own settings"


def test_dropout_off_reaches_adapters():
    model = attach_adapter(causal("llama"), {"r": 2, "lora_dropout": 0.5}).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    tokens = torch.randint(3, VOCABULARY, (4, 12))
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    turn_dropout_off(model)
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_eval_mode_restores_each_submodules_own_mode():
    model = causal("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes
