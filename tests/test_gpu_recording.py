"""On a GPU: decoding steps that are recorded draw what those as written draw. test_cuda_graphs.py has what a CPU can show of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from p3o_lightning import cuda_graphs
from p3o_lightning.cuda_graphs import Graphed
from p3o_lightning.generation import Sampling, sample_with_logps
from p3o_lightning.scoring import allows, grouped_completion_logps
from tests.families import CAUSAL, EOS, PAD, causal, left_padded
from tests.test_gpu import FLOAT32_ONLY, HEADS_OF_64, RECURRENT, measure_of, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def watched(monkeypatch):
    """How many steps of sampling Python took, and how many a recording."""
    counts = {"written": 0, "replayed": 0}
    step, read = Graphed._step, Graphed.read

    def counted(self):
        counts["written"] += 1
        return step(self)

    def replayed(self, drawn):
        counts["replayed"] += self._graph is not None
        return read(self, drawn)

    monkeypatch.setattr(Graphed, "_step", counted)
    monkeypatch.setattr(Graphed, "read", replayed)
    return counts


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in RECURRENT])
def test_a_recorded_step_draws_what_the_step_as_written_draws(family, monkeypatch):
    """Rows leave by halves: what is left is recorded anew."""
    model, sampling = measure_of(family), Sampling(4, 40, 1.3)
    _, tokens, mask = left_padded([3, 7, 1, 4, 2])
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 5}
    expected = sample_with_logps(model, tokens, mask, sampling, **options)
    monkeypatch.setattr(cuda_graphs, "STEPS", 4)
    monkeypatch.setattr(cuda_graphs, "ROWS", 2)
    counts = watched(monkeypatch)
    drawn = sample_with_logps(model.cuda(), tokens.cuda(), mask.cuda(), sampling, **options)
    for one, other in zip(expected, drawn, strict=True):
        assert_close(other.cpu(), one, rtol=1e-5, atol=1e-4 if family in FLOAT32_ONLY else 1e-5)
    if allows(model) and family != "mixtral":
        assert counts["replayed"] > 10 and counts["written"] <= 2 * 5 + 1


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast", "adapter"])
def test_a_recorded_step_is_what_scoring_says_in_half_precision(how, monkeypatch):
    model = causal("llama", **{**HEADS_OF_64, "initializer_range": 0.05})
    if how == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).eval()
    model = model.cuda().to(torch.bfloat16 if how == "bfloat16 weights" else torch.float32)
    _, tokens, mask = left_padded([30, 70, 10])
    counts = watched(monkeypatch)
    with torch.autocast("cuda", torch.bfloat16, enabled=how != "bfloat16 weights"):
        given = tokens.cuda(), mask.cuda()
        drawn, kept, logps = sample_with_logps(model, *given, Sampling(4, 60), eos_token_id=-1, pad_token_id=PAD, seed=5)
        with torch.no_grad():
            expected = grouped_completion_logps(model, *given, drawn, kept)
    assert counts == {"written": 2, "replayed": 58}
    assert_close(logps, expected, rtol=0, atol=0.05)
    assert float((logps - expected).mean().abs()) < 2e-3


def rollouts(model, lengths, new=40):
    for length in lengths:
        _, tokens, mask = left_padded([length, 3])
        sample_with_logps(model, tokens.cuda(), mask.cuda(), Sampling(4, new), eos_token_id=EOS, pad_token_id=PAD, seed=length)


def test_rollouts_after_a_validation_are_recorded_too(monkeypatch):
    """Lightning validates in inference mode, where the first recording of a process may be made."""
    model, counts = causal("llama", max_position_embeddings=512).cuda(), watched(monkeypatch)
    with torch.inference_mode():
        rollouts(model, [5])
    seen = counts["replayed"]
    rollouts(model, [5])
    assert counts["replayed"] == 2 * seen > 0 and model not in cuda_graphs._REFUSED


def test_more_rollouts_reserve_no_more_memory(monkeypatch):
    model, counts = causal("llama", max_position_embeddings=1024).cuda(), watched(monkeypatch)
    rollouts(model, [7, 200, 30], new=300)  # over two blocks of columns
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    rollouts(model, [7, 200, 30, 100, 50] * 4, new=300)
    assert counts["replayed"] > 500 and torch.cuda.memory_reserved() <= before + 2**22


def test_a_model_that_waits_for_the_gpu_is_read_as_written_and_leaves_it_sound(monkeypatch):
    model, counts = causal("llama").cuda(), watched(monkeypatch)
    _, tokens, mask = left_padded([3, 7])
    options = {"eos_token_id": EOS, "pad_token_id": PAD, "seed": 5}
    expected = sample_with_logps(model, tokens.cuda(), mask.cuda(), Sampling(3, 40), **options)
    assert counts["replayed"] > 0
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: forward(hidden) * float(hidden.abs().amax().item() >= 0)
    counts["replayed"] = 0
    drawn = sample_with_logps(model, tokens.cuda(), mask.cuda(), Sampling(3, 40), **options)
    assert counts["replayed"] == 0 and model in cuda_graphs._REFUSED
    assert torch.equal(drawn[0], expected[0])
    assert torch.rand(3, device="cuda").isfinite().all()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 4}}, {"torch_compile": True}], ids=["whole", "adapter", "compiled"])
def test_rollouts_of_a_run_are_recorded(settings, monkeypatch, tmp_path):
    """And give what rollouts as written give."""
    options = {"max_completion_length": 24, "lr": 1e-4, **settings}
    counts = watched(monkeypatch)
    _, figures = train(tmp_path / "recorded", "policy", options, max_steps=4)
    assert counts["replayed"] > counts["written"] > 0
    torch._dynamo.reset()
    monkeypatch.setattr(cuda_graphs, "STEPS", 1000)
    _, expected = train(tmp_path / "written", "policy", options, max_steps=4)
    assert figures == pytest.approx(expected, rel=1e-2, abs=1e-3)
