"""The step that a GPU records: on a CPU it runs as written, with the same shapes and places in memory. test_gpu.py has the recording."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from p3o_lightning import cuda_graphs, generation
from p3o_lightning.cuda_graphs import Graphed, can_be_graphed
from p3o_lightning.decoding import new_cache
from p3o_lightning.generation import Sampling, sample_with_logps
from p3o_lightning.packing import attend_by_groups
from p3o_lightning.scoring import allows
from tests.families import CAUSAL, EOS, PAD, causal, left_padded


def sampled(model, length=50):
    _, tokens, mask = left_padded([3, 7, 1, 4, 2])
    return sample_with_logps(model, tokens, mask, Sampling(4, length, 1.3), eos_token_id=EOS, pad_token_id=PAD, seed=5)


def graphed(monkeypatch, only=allows):
    """Sampling by fixed shapes, wherever a GPU would; how many rows each step had."""
    rows, read = [], Graphed.read
    monkeypatch.setattr(generation, "can_be_graphed", lambda model, *_: only(model))
    monkeypatch.setattr(cuda_graphs, "STEPS", 2)
    monkeypatch.setattr(cuda_graphs, "ROWS", 2)
    monkeypatch.setattr(Graphed, "read", lambda self, drawn: rows.append(len(drawn)) or read(self, drawn))
    return rows


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in ("mamba", "jamba")])
def test_fixed_shapes_give_what_growing_ones_give(family, monkeypatch):
    model = causal(family).double()
    if not allows(model):
        pytest.skip("a GPU would not record it")
    expected = sampled(model)
    rows = graphed(monkeypatch)
    for one, other in zip(sampled(model), expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-9)
    sizes = sorted(set(rows), reverse=True)
    assert sizes[0] == 20 and len(sizes) > 1 and all(2 * fewer <= more for more, fewer in pairwise(sizes)), "finished rows leave by halves"


def test_what_lies_in_unfilled_columns_is_not_read(monkeypatch):
    model = causal("llama")
    expected = sampled(model)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: torch.full(shape, math.nan, dtype=self.dtype))
    graphed(monkeypatch)
    assert torch.equal(sampled(model)[0], expected[0])


def test_a_step_leaves_everything_where_it_was(monkeypatch):
    """What a recording writes and reads has to be there when it is replayed."""
    model, places = causal("llama"), set()
    graphed(monkeypatch)
    step = Graphed._step

    def watched(self):
        held = [self._tokens, self._seen, self._positions, self._column, *(item for layer in self.cache.layers for item in layer._buffers)]
        places.add(tuple(item.data_ptr() for item in held))
        logits = step(self)
        places.add(tuple(item.data_ptr() for item in held))
        return logits

    monkeypatch.setattr(Graphed, "_step", watched)
    monkeypatch.setattr(Graphed, "worth", lambda self, left, rows, steps: rows)
    sampled(model)
    assert len(places) == 1


def test_a_cpu_records_nothing():
    model = causal("llama")
    assert not can_be_graphed(model, new_cache(model, 30), 29)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_heads_of_a_group_as_queries_are_the_heads_repeated(scaling):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, length, 8, generator=draw, dtype=torch.float64) for heads, length in ((6, 1), (2, 9), (2, 9))
    )
    mask = torch.rand(3, 1, 1, 9, generator=draw) < 0.7
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    assert_close(attend_by_groups(query, key, value, mask, scaling), expected, rtol=0, atol=1e-12)
