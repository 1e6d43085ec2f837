"""Sampling: token for token what a plain loop over the model gives, for every kind of cache; and draws that follow the distribution.

The power of these tests, found by planting one error at a time in generation.py:
    planted error                                  first test that fails, without test_
    positions of the padded row                    sampling_is_a_plain_loop_over_the_model
    prompt positions from the left edge            sampling_is_a_plain_loop_over_the_model
    cache rows not dropped with the batch's        sampling_is_a_plain_loop_over_the_model
    cache repeated in another order                sampling_is_a_plain_loop_over_the_model
    recurrent layers trusted with DynamicCache     sampling_is_a_plain_loop_over_the_model
    EOS outside the mask                           sampling_is_a_plain_loop_over_the_model
    finished rows go on                            sampling_is_a_plain_loop_over_the_model
    padding id taken for EOS                       sampling_is_a_plain_loop_over_the_model
    temperature not applied                        sampling_is_a_plain_loop_over_the_model
    temperature multiplies                         sampling_is_a_plain_loop_over_the_model
    uniforms of the batch row, not the response's  sampling_is_a_plain_loop_over_the_model
    seed ignored                                   sampling_is_a_plain_loop_over_the_model
    searchsorted on the left side                  top_k_keeps_k_of_equal_logits
    cumulative sum in float32                      float64_logits_are_not_rounded
    top_p drops the token that crosses it          top_k_and_top_p_restrict_the_support
    top_k off by one                               top_k_and_top_p_restrict_the_support
    top_k keeps all ties                           top_k_keeps_k_of_equal_logits
    logits in float32 always                       float64_logits_are_not_rounded
    NaN not noticed                                logits_that_are_not_finite_stop_with_the_reason
    spaces cleaned up in texts                     texts_are_without_padding_and_special_tokens_and_otherwise_as_sampled
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from families import CAUSAL, EOS, PAD, causal, left_padded, word_tokenizer
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig

from p3o_lightning import decoding, generate_fallback
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import completion_logps
from p3o_lightning.generation import Sampling, decode_completions, draw, draw_with_logps, sample_completions, sample_with_logps

LENGTHS, STEPS = [3, 7, 1], 12


def sampled(model, sampling, seed=5, lengths=LENGTHS, pad=PAD):
    rows, tokens, mask = left_padded(lengths, value=pad)
    return rows, *sample_completions(model, tokens, mask, sampling, eos_token_id=EOS, pad_token_id=pad, seed=seed)


@torch.no_grad()
def plain_loop(model, rows, sampling, seed):
    """One row at a time, no cache, no padding, a sum over a Python list: what sampling means."""
    count, steps = sampling.num_generations, sampling.max_completion_length
    uniforms = torch.rand(len(rows) * count, steps, generator=torch.Generator().manual_seed(seed))
    answers = []
    for i in range(len(rows) * count):
        ids, answer = rows[i // count].tolist(), []
        for u in uniforms[i].tolist():
            weights = (model(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / sampling.temperature).softmax(-1).tolist()
            below, token = 0.0, 0
            while below + weights[token] <= u * math.fsum(weights):
                below, token = below + weights[token], token + 1
            ids.append(token)
            answer.append(token)
            if token == EOS:
                break
        answers.append(answer)
    return answers


@pytest.mark.parametrize("family", CAUSAL)
def test_sampling_is_a_plain_loop_over_the_model(family, monkeypatch):
    monkeypatch.setattr(decoding, "ROWS", 2)  # of nine
    model, sampling = causal(family), Sampling(3, STEPS, temperature=1.3)
    rows, tokens, mask = sampled(model, sampling)
    expected = plain_loop(model, rows, sampling, 5)
    got = [ids[kept].tolist() for ids, kept in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)]
    assert got == expected
    assert tokens.shape[-1] == max(map(len, expected))


def test_the_families_end_at_different_steps():
    lengths = [sampled(causal(family), Sampling(3, STEPS, 1.3))[2].sum(-1).flatten().tolist() for family in ("llama", "gpt2", "mistral")]
    assert all(len(set(row)) > 2 and min(row) < STEPS for row in lengths), "else the test above would not see rows leave the batch"


def test_finished_rows_leave_so_many_at_a_time(monkeypatch):
    monkeypatch.setattr(decoding, "ROWS", 4)
    model, held = causal("llama"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: held.append(len(kwargs["input_ids"])), with_kwargs=True)
    _, _, mask = sampled(model, Sampling(8, STEPS, 1.3))
    going = mask.flatten(0, 1).sum(0).tolist()  # at every step, EOS included
    expected, now = [], 24
    for step in range(1, mask.shape[-1]):
        if going[step] <= now - 4:
            now = -(-going[step] // 4) * 4
        expected.append(now)
    assert held == [3, *expected] and len(set(expected)) > 2


def test_the_padding_id_is_of_no_account():
    model, sampling = causal("llama"), Sampling(3, STEPS, 1.3)
    (_, tokens, mask), (_, others, other_mask) = sampled(model, sampling), sampled(model, sampling, pad=EOS)
    assert torch.equal(mask, other_mask)
    assert torch.equal(tokens[mask], others[mask])
    assert (tokens[~mask] == PAD).all()
    assert (others[~mask] == EOS).all()


def test_eos_is_inside_the_mask_and_only_a_cut_response_has_none():
    _, tokens, mask = sampled(causal("llama"), Sampling(8, STEPS, 1.3))
    rows = [ids[kept].tolist() for ids, kept in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)]
    cut = [row for row in rows if row[-1] != EOS]
    assert all(row.count(EOS) == (row[-1] == EOS) for row in rows)
    assert cut and all(len(row) == STEPS for row in cut)
    assert len(cut) < len(rows)
    assert (mask == (torch.arange(mask.shape[-1]) < mask.sum(-1, keepdim=True))).all(), "no holes"


def test_a_seed_fixes_the_rollout():
    model, sampling = causal("llama"), Sampling(2, STEPS)
    assert torch.equal(sampled(model, sampling, seed=1)[1], sampled(model, sampling, seed=1)[1])
    drawn = {tuple(sampled(model, sampling, seed=seed)[1].flatten().tolist()) for seed in range(5)}
    assert len(drawn) == 5
    state = torch.get_rng_state()
    sampled(model, sampling)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone"


def test_responses_of_one_prompt_differ():
    _, tokens, _ = sampled(causal("llama"), Sampling(4, STEPS), lengths=[3])
    assert len({tuple(row) for row in tokens[0].tolist()}) == 4


# ---- draws


class Table(nn.Module):
    """A model whose next token has the given logits, whatever was before; it knows of no cache."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)
        self.config = SimpleNamespace()
        self.calls = []

    def forward(self, input_ids, attention_mask=None, **unread):
        self.calls.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def shares(sampling, logits, rows=40_000):
    tokens, mask = torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    drawn, _ = sample_completions(Table(logits), tokens, mask, sampling, eos_token_id=-1, pad_token_id=0, seed=0)
    return torch.bincount(drawn.flatten(), minlength=len(logits)) / rows


LOGITS = [0.3, -1.0, 2.0, 0.0, -4.0, 1.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_models_distribution(temperature):
    rows = 40_000
    expected = (torch.tensor(LOGITS) / temperature).softmax(-1)
    observed = shares(Sampling(rows, 1, temperature), LOGITS)
    chi_square = (rows * (observed - expected).square() / expected).sum()
    assert chi_square < 20.5  # the 0.999 quantile at 5 degrees of freedom; the seed is fixed


def test_top_k_and_top_p_restrict_the_support():
    probabilities = torch.tensor(LOGITS).softmax(-1)

    def kept(sampling, support):
        observed, expected = shares(sampling, LOGITS), torch.zeros(6)
        expected[support] = probabilities[support] / probabilities[support].sum()
        assert observed.nonzero().flatten().tolist() == support
        assert_close(observed, expected, rtol=0, atol=0.01)

    kept(Sampling(40_000, 1, top_k=1), [2])
    kept(Sampling(40_000, 1, top_k=3), [0, 2, 5])
    kept(Sampling(40_000, 1, top_k=99), [0, 1, 2, 3, 4, 5])
    # in order: 2 (0.577), 5 (0.212), 0 (0.105), 3 (0.078), 1, 4; a token stays if the mass ahead of it is below top_p
    kept(Sampling(40_000, 1, top_p=0.5), [2])
    kept(Sampling(40_000, 1, top_p=0.6), [2, 5])
    kept(Sampling(40_000, 1, top_p=0.85), [0, 2, 5])
    kept(Sampling(40_000, 1, top_p=1e-9), [2])
    # of the three that top_k leaves, 2 and 5 have 0.88 of the mass: top_p counts what is left
    kept(Sampling(40_000, 1, top_k=3, top_p=0.85), [2, 5])


def test_top_k_keeps_k_of_equal_logits():
    drawn = draw(torch.zeros(4000, 10), torch.linspace(0, 0.9999, 4000), Sampling(top_k=3))
    assert len(set(drawn.tolist())) == 3


def test_the_temperature_applies_before_top_p():
    # at temperature 10 the mass is spread: 0.9 of it needs all six tokens
    assert shares(Sampling(40_000, 1, 10.0, top_p=0.9), LOGITS).count_nonzero() == 6


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_no_draw_leaves_the_vocabulary_or_the_support(u):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 50_000, generator=generator)
    logits[:, ::2] = -torch.inf
    for sampling in (Sampling(), Sampling(top_k=50), Sampling(top_p=0.9)):
        drawn = draw(logits, torch.full((64,), u), sampling)
        assert logits.gather(1, drawn.unsqueeze(1)).isfinite().all()


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    # 100,000 tokens of 1e-8 each, together 0.001, behind one of 0.999: summed in float32 they would vanish, or count for too much
    logits = torch.cat([torch.tensor([0.999]), torch.full((100_000,), 1e-8)]).log().expand(100, -1)
    uniforms = 0.999 + 0.001 * (torch.arange(100) + 0.5) / 100
    drawn = draw(logits, uniforms, Sampling())
    assert_close(drawn.double().mean().item(), 50_000.0, rtol=0.01, atol=0)


def test_float64_logits_are_not_rounded():
    logits = torch.tensor([[0.0, 1e-9]], dtype=torch.float64)
    edge = float(logits.softmax(-1)[0, 0])
    uniforms = torch.tensor([edge - 1e-12, edge + 1e-12], dtype=torch.float64)
    assert draw(logits.expand(2, -1), uniforms, Sampling()).tolist() == [0, 1]


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 128, 1000])
def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_it(vocabulary):
    """Whether or not the vocabulary is a whole number of blocks: by sums over a Python list."""
    logits = 3 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(20, generator=torch.Generator().manual_seed(2))
    drawn, logps = draw_with_logps(logits, uniforms, Sampling(temperature=0.7))
    for row, u, token, logp in zip(logits.double() / 0.7, uniforms.tolist(), drawn.tolist(), logps.tolist(), strict=True):
        chances = row.softmax(0).tolist()
        below = list(itertools.accumulate(chances))
        assert token == next(place for place, mass in enumerate(below) if mass > u * below[-1])
        assert logp == pytest.approx(math.log(chances[token]), abs=1e-5)


@pytest.mark.parametrize("vocabulary", [3, 128])
def test_of_logits_that_are_not_finite_the_last_token_is_drawn_where_they_are_not_refused(vocabulary):
    logits = torch.zeros(2, vocabulary)
    logits[1, 0] = math.nan
    drawn, logps = draw_with_logps(logits, torch.tensor([0.0, 0.0]), Sampling(), refuse_nonfinite=False)
    assert drawn.tolist() == [0, vocabulary - 1] and logps.isnan().tolist() == [False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_with_the_reason(bad):
    with pytest.raises(InputError, match="model gives logits that are not finite"):
        draw(torch.tensor([[0.0, bad, 1.0]]), torch.tensor([0.5]), Sampling())


# ---- caches


def test_a_model_without_a_cache_reads_the_text_again_and_says_so_once():
    decoding._say_slow.cache_clear()
    model = Table(LOGITS)
    tokens, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    with pytest.warns(UserWarning, match="Table has no plain key-value cache") as caught:
        sample_completions(model, tokens, mask, Sampling(2, 4), eos_token_id=-1, pad_token_id=0, seed=0)
    assert len(caught) == 1
    assert model.calls == [(2, 3), (4, 4), (4, 5), (4, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_completions(model, tokens, mask, Sampling(2, 4), eos_token_id=-1, pad_token_id=0, seed=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_attention_families_use_their_cache(family, monkeypatch):
    widths, model = [], causal(family)
    model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    sampled(model, Sampling(2, 5))
    assert widths[0] == max(LENGTHS) and set(widths[1:]) == {1}


def test_a_cache_by_its_former_and_its_present_name(monkeypatch):
    """transformers 5.24 calls it `cache`; models whose code comes with their weights go on with `past_key_values`."""
    model, widths = causal("llama"), []
    forward, own = model.forward, decoding.cache_argument(model)
    expected = sampled(model, Sampling(3, STEPS, 1.3))[1]

    def former(input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        widths.append(input_ids.shape[1])
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, own: past_key_values}
        return forward(input_ids, logits_to_keep=logits_to_keep, **options)

    def present(input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, logits_to_keep=0):
        return former(input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep)

    for named in (former, present):
        monkeypatch.setattr(model, "forward", named)
        assert torch.equal(sampled(model, Sampling(3, STEPS, 1.3))[1], expected)
        assert widths[0] == max(LENGTHS) and set(widths[1:]) == {1}
        widths.clear()


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_a_model_that_holds_more_than_keys_and_values_draws_within_generate(family, caplog):
    """Which reads the prompts once, then a token a step; the line that says so comes once; its log-probabilities are those of scoring."""
    model, widths = causal(family), []
    with caplog.at_level(logging.INFO):
        assert generate_fallback.generates(model) and generate_fallback.generates(model)
    assert caplog.text.count("responses are drawn within transformers' generate") == 1
    model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    _, tokens, mask = left_padded(LENGTHS)
    drawn, kept, logps = sample_with_logps(model, tokens, mask, Sampling(3, STEPS, 1.3), eos_token_id=EOS, pad_token_id=PAD, seed=5)
    assert widths[0] == max(LENGTHS) and set(widths[1:]) == {1}
    assert_close(logps, completion_logps(model, tokens, mask, drawn, kept, 1.3), rtol=0, atol=1e-4)
    assert (drawn[~kept] == PAD).all() and kept.sum(-1).min() < STEPS


def test_what_a_models_own_generation_config_bans_is_drawn_all_the_same():
    model = causal("mamba")
    one = sampled(model, Sampling(3, STEPS, 1.3))[1]
    model.generation_config = own = GenerationConfig(
        suppress_tokens=[int(one[0, 0, 0])], repetition_penalty=5.0, max_new_tokens=1, do_sample=True
    )
    assert torch.equal(sampled(model, Sampling(3, STEPS, 1.3))[1], one)
    assert model.generation_config is own


@pytest.mark.parametrize("wrong", ["logits", "error"])
def test_a_model_whose_generate_gives_other_logits_is_read_again(wrong, monkeypatch):
    expected = sampled(causal("mamba"), Sampling(3, STEPS, 1.3))[1]
    model = causal("mamba")
    forward = model.forward

    name = next(name for name in ("cache", "cache_params") if name in inspect.signature(forward).parameters)

    @functools.wraps(forward)  # generate asks for the arguments' names
    def forgetful(input_ids, **options):
        state = options.pop(name, None)
        if wrong == "error" and state is not None:
            raise ValueError("no state for me")
        return forward(input_ids, **options) if input_ids.shape[1] == 1 else forward(input_ids, **{name: state}, **options)

    monkeypatch.setattr(model, "forward", forgetful)
    assert not generate_fallback.generates(model)
    assert torch.equal(sampled(model, Sampling(3, STEPS, 1.3))[1], expected)


def test_a_model_that_leaves_the_cache_empty_is_read_again(monkeypatch):
    model = causal("llama")
    forward = model.forward

    def forgetful(input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)

    expected = sampled(model, Sampling(3, STEPS, 1.3))[1]
    monkeypatch.setattr(model, "forward", forgetful)
    assert torch.equal(sampled(model, Sampling(3, STEPS, 1.3))[1], expected)


def test_a_response_that_would_outgrow_learned_positions_is_refused():
    with pytest.raises(InputError, match=r"model.max_completion_length is 58 and a prompt has 7 tokens, but .* 64 positions"):
        sampled(causal("gpt2"), Sampling(2, 58))
    sampled(causal("gpt2"), Sampling(2, 57))
    with pytest.raises(InputError, match="64 positions"):
        sampled(causal("opt"), Sampling(2, 58))


# ---- settings, text


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_generations", 0),
        ("max_completion_length", 0),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(InputError, match=rf"model\.{setting} is {value}: choose"):
        Sampling(**{setting: value})


def test_texts_are_without_padding_and_special_tokens_and_otherwise_as_sampled():
    tokenizer = word_tokenizer(["do", "n't", ".", "stop"])
    do, nt, dot, stop = (tokenizer.convert_tokens_to_ids(word) for word in ("do", "n't", ".", "stop"))
    tokens = torch.tensor([[[do, nt, stop, dot, tokenizer.eos_token_id], [stop, 0, do, do, do]]])
    mask = torch.tensor([[[True] * 5, [True, False, False, False, False]]])
    tokenizer.clean_up_tokenization_spaces = True  # would turn "do n't stop ." into "don't stop."
    assert decode_completions(tokenizer, tokens, mask) == [["do n't stop .", "stop"]]
