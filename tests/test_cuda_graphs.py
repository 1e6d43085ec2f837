"""The step that a GPU records, here as written, with the same shapes and places in memory. test_gpu_recording.py has the recording."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from p3o_lightning import cuda_graphs, generation
from p3o_lightning.cuda_graphs import Graphed, can_be_graphed
from p3o_lightning.decoding import new_cache
from p3o_lightning.generation import Sampling, sample_with_logps
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
    monkeypatch.setattr(cuda_graphs, "COLUMNS", 16)
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
    monkeypatch.setattr(cuda_graphs, "COLUMNS", 64)
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


def test_attention_reads_no_more_than_the_block_of_columns_that_is_being_filled(monkeypatch):
    model, widths = causal("llama"), []
    graphed(monkeypatch)
    step = Graphed._step
    monkeypatch.setattr(Graphed, "_step", lambda self: widths.append((self._filled, self._seen.shape[-1])) or step(self))
    sampled(model)
    assert all(width == min(-(-filled // 16) * 16, 7 + 49) for filled, width in widths)
    assert {width for _, width in widths} == {16, 32, 48, 56}


def test_a_cpu_records_nothing():
    model = causal("llama")
    assert not can_be_graphed(model, new_cache(model, 30), 29)


# ---- recording, with something that stands in for a graph

BROKEN = "operation failed due to a previous error during capture"


class Graph:
    """Tells whose memory it was given. What breaks off is told by the end of the recording, as by CUDA."""

    begun: ClassVar[list] = []
    broken = False

    def capture_begin(self, pool, capture_error_mode):
        assert not torch.is_inference_mode_enabled()
        self.begun.append((self, pool))

    def capture_end(self):
        if self.broken:
            raise RuntimeError(BROKEN)

    def pool(self):
        return self


@pytest.fixture
def fake(monkeypatch):
    """A GPU that computes nothing; what began to be recorded, and into whose memory."""
    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    for name, value in {
        "current_stream": lambda: None,
        "device": lambda _: nullcontext(),
        "empty_cache": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
        "Stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graphs, "_LAST", {})
    monkeypatch.setattr(Graph, "begun", [])
    return Graph.begun


def decoder(model):
    _, tokens, mask = left_padded([3, 5])
    cache = new_cache(model, tokens.shape[1] + 9)
    generation.last_logits(model, tokens, mask.long(), generation.positions_of(mask), cache)
    made = Graphed(model, cache, mask, 9)
    made._widen()
    return made


def first_step(made, drawn):
    made._records = True
    made._tokens.copy_(drawn.unsqueeze(1))
    return made._step_and_record()


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("validating", [True, False])
def test_a_recording_takes_over_the_memory_of_the_last(fake, validating):
    """Else every rollout would leave its own behind, until none is left."""
    model = causal("llama")
    with torch.inference_mode(validating), torch.no_grad():
        for _ in range(3):
            first_step(decoder(model), torch.tensor([4, 7]))
    graphs, pools = zip(*fake, strict=True)
    assert pools == (None, graphs[0], graphs[1]) and len(set(graphs)) == 3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("when", ["before", "while it records"])
def test_what_cannot_be_recorded_goes_on_as_written(fake, monkeypatch, caplog, when):
    """A forward that waits for the GPU is found out before; what was done of its step by then is done again."""
    model, modes, waits = causal("llama"), [0], "called a synchronizing CUDA operation"
    expected = decoder(model)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(Graph, "broken", when != "before")
    last_logits = cuda_graphs.last_logits

    def waiting(*given):
        logits = last_logits(*given)
        if (modes[-1] == "error") if when == "before" else fake:
            raise RuntimeError(waits + "\nmore")
        return logits

    monkeypatch.setattr(cuda_graphs, "last_logits", waiting)
    made, drawn = decoder(model), torch.tensor([4, 7])
    with caplog.at_level("INFO"):
        got = [first_step(made, drawn)]
    fake.clear()
    got.append(made.read(drawn))
    monkeypatch.setattr(cuda_graphs, "last_logits", last_logits)
    for logits in got:
        assert torch.equal(logits, expected.read(drawn))
    assert f"LlamaForCausalLM: sampling runs as written, a step cannot be recorded ({waits})." in caplog.text
    assert model in cuda_graphs._REFUSED and not cuda_graphs._LAST and modes[-1] == 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_recording_that_runs_out_of_memory_is_tried_again_in_the_next_rollout(fake, monkeypatch):
    model, step = causal("llama"), Graphed._step

    def full(self):
        if fake:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(Graphed, "_step", full)
    made = decoder(model)
    first_step(made, torch.tensor([4, 7]))
    assert not made._records and made._graph is None and model not in cuda_graphs._REFUSED and not cuda_graphs._LAST
