"""Attention of one new token, on its two ways, against transformers' own in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from p3o_lightning import packing, token_attention
from p3o_lightning.generation import Sampling, sample_with_logps
from p3o_lightning.packing import packed_attention
from p3o_lightning.scoring import allows
from p3o_lightning.token_attention import attend_by_groups, attend_in_float32
from tests.families import EOS, PAD, causal, left_padded

GROUPED = torch.nn.Module()
GROUPED.num_key_value_groups = 3


def states(dtype: torch.dtype, length: int = 1) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value of three rows and six heads that share two groups of keys, the first 9 of 12 columns of a cache; a mask."""
    draw = torch.Generator().manual_seed(0)
    query, *cached = (
        torch.randn(3, heads, tokens, 8, generator=draw, dtype=torch.float64) for heads, tokens in ((6, length), (2, 12), (2, 12))
    )
    mask = torch.rand(3, 1, length, 9, generator=draw) < 0.7
    mask[..., 0] = True
    return [query.to(dtype), *(given[:, :, :9].to(dtype) for given in cached)], mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_heads_of_a_group_as_queries_are_the_heads_repeated(scaling, masked):
    given, mask = states(torch.float64)
    seen = mask if masked else None
    expected, _ = sdpa_attention_forward(GROUPED, *given, seen, scaling=scaling)
    assert_close(attend_by_groups(*given, seen, scaling), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_float32_only_the_result_is_rounded(dtype, masked, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(token_attention, "KEYS", rows_at_a_time * 2 * 9 * 8 * 4)
    given, mask = states(dtype)
    seen = mask if masked else None
    exact, _ = sdpa_attention_forward(GROUPED, *(each.double() for each in given), seen, scaling=0.3)
    with torch.autocast("cpu", torch.bfloat16):  # which would round what goes in
        found = attend_in_float32(*given, seen, 0.3)
    assert found.dtype == dtype
    assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6)


@pytest.mark.parametrize("slow", [True, False])
def test_a_cpu_goes_by_float32_where_half_precision_is_slow(slow, monkeypatch):
    """One new token with a mask a row: whatever else there is, transformers' own way is right."""
    monkeypatch.setattr(token_attention, "half_attention_is_slow", lambda: slow)
    went = []
    monkeypatch.setattr(token_attention, "attend_in_float32", lambda *given: went.append(1) or attend_in_float32(*given))

    def goes(dtype=torch.bfloat16, length=1, masks=lambda mask: mask, **options):
        went.clear()
        given, mask = states(dtype, length)
        shown = masks(mask)
        found, _ = packed_attention(GROUPED, *given, shown, **options)
        expected, _ = sdpa_attention_forward(GROUPED, *(each.double() for each in given), None if shown is None else mask, **options)
        assert_close(found.double(), expected, rtol=0.02, atol=0.02)
        return bool(went)

    assert goes() == goes(torch.float16) == slow
    assert not goes(torch.float32) and not goes(torch.float64)
    assert goes(masks=lambda mask: None) == slow and not goes(length=2) and not goes(length=2, masks=lambda mask: None)
    assert not goes(masks=lambda mask: torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -torch.inf))
    assert not goes(masks=lambda mask: mask.expand(-1, 6, -1, -1))


def test_what_is_more_than_a_softmax_of_products_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(token_attention, "half_attention_is_slow", lambda: True)
    left: list[dict[str, object]] = []
    monkeypatch.setattr(packing, "sdpa_attention_forward", lambda *_, **given: left.append(given) or (torch.zeros(3, 1, 6, 8), None))
    given, mask = states(torch.bfloat16)
    for term in ({"position_bias": torch.zeros(1)}, {"softcap": 30.0}, {"s_aux": torch.zeros(6)}, {"dropout": 0.5}):
        packed_attention(GROUPED, *given, mask, **term)
        assert left.pop().items() >= term.items()
    packed_attention(GROUPED, *given, mask)
    assert not left


def test_sampling_in_bf16_attends_so_and_draws_nearly_the_same(monkeypatch):
    """Log-probabilities of the first tokens, which no earlier draw can have changed, by both ways."""
    model, went = causal("llama"), []
    assert allows(model)
    _, tokens, mask = left_padded([3, 7, 1, 4, 2])

    def sampled(slow):
        monkeypatch.setattr(token_attention, "half_attention_is_slow", lambda: slow)
        with torch.autocast("cpu", torch.bfloat16):
            return sample_with_logps(model, tokens, mask, Sampling(4, 12), eos_token_id=EOS, pad_token_id=PAD, seed=5)

    monkeypatch.setattr(token_attention, "attend_in_float32", lambda *given: went.append(len(given[0])) or attend_in_float32(*given))
    plain = sampled(False)
    assert not went
    ours = sampled(True)
    assert went and set(went) <= {20, 16, 8}  # rows: finished ones leave
    same = (plain[0] == ours[0]).long().cumprod(-1).bool() & plain[1] & ours[1]
    assert same.sum() > 0.5 * plain[1].sum()
    assert (ours[2] - plain[2])[same].abs().mean() < 0.03
