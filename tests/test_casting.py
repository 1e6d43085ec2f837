"""Weights cast once for a rollout give to the bit what autocast makes of them at every forward; a model cast for good keeps its buffers."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from p3o_lightning import prepacked
from p3o_lightning.casting import STEPS, buffers_kept, cast_once, laid_out
from p3o_lightning.forwards import completion_logps, sequence_scores
from p3o_lightning.generation import Sampling, sample_with_logps
from p3o_lightning.models import attach_adapter
from p3o_lightning.scoring import allows, grouped_completion_logps
from tests.families import EOS, PAD, causal, left_padded
from tests.test_scoring import batch, classifier


def model_of(kind):
    model = causal("llama")
    return attach_adapter(model, {"r": 2, "init_lora_weights": False}) if kind == "adapter" else model


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@torch.no_grad()
def test_log_probabilities_are_the_same_to_the_bit(kind):
    model = model_of(kind)
    for logps in (completion_logps, grouped_completion_logps):
        with torch.autocast("cpu", torch.bfloat16):
            allows(model)
            one = logps(model, *batch())
            with cast_once(model):
                assert torch.equal(logps(model, *batch()), one)


@pytest.fixture(params=["transposed", "in blocks"])
def layout(request, monkeypatch):
    """Of small and of large weights."""
    monkeypatch.setattr(prepacked, "LARGE", 1 if request.param == "in blocks" else prepacked.LARGE)


@pytest.mark.parametrize("kind", ["whole", "adapter", "biased"])
@torch.no_grad()
def test_weights_laid_out_for_decoding_draw_the_same_responses(kind, layout):
    model = causal("qwen2") if kind == "biased" else model_of(kind)
    _, tokens, mask = left_padded([3, 6])
    answers = []
    for plain in (False, True):  # layers that have a forward of their own already are left as they are
        with as_they_are(model) if plain else nullcontext():
            answers.append(sample_with_logps(model, tokens, mask, Sampling(3, STEPS), eos_token_id=EOS, pad_token_id=PAD, seed=3))
    (drawn, kept, logps), (plainly, mask_plainly, plain_logps) = answers
    assert torch.equal(drawn, plainly) and torch.equal(kept, mask_plainly)
    torch.testing.assert_close(logps, plain_logps, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "given", [{}, {"lora_alpha": 8}, {"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj"]}, {"lora_dropout": 0.5}]
)
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_adapters_of_every_kind_draw_the_same_responses(given, autocast, layout):
    """And switched off inside, they are; a layer in training keeps its dropout."""
    model = attach_adapter(causal("llama"), {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **given}).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, without = model(tokens).logits, off(model, tokens)
        with laid_out(model, STEPS):
            torch.testing.assert_close(model(tokens).logits, plain, rtol=0, atol=0 if autocast else 1e-4)
            inside = off(model, tokens)
            torch.testing.assert_close(inside, without, rtol=0, atol=0 if autocast else 1e-4)
            assert (inside - plain).abs().max() > 0.01
            assert torch.equal(model(tokens).logits, model(tokens).logits)
            model.train()
            drops = not torch.equal(model(tokens).logits, model(tokens).logits)
            assert drops == ("lora_dropout" in given)
            model.eval()
    assert not any("forward" in vars(module) for module in model.modules() if module is not model.get_base_model())


def off(model, tokens):
    with model.disable_adapter():
        return model(tokens).logits


def test_two_adapters_at_once_are_left_to_peft():
    model = attach_adapter(causal("llama"), {"r": 2, "init_lora_weights": False})
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    layers = [module for module in model.modules() if type(module).__name__ == "Linear" and hasattr(module, "lora_A")]
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), laid_out(model, STEPS):
            assert layers and not any("forward" in vars(layer) for layer in layers)


@torch.no_grad()
def test_an_adapter_is_added_to_the_weights_in_float32_alone():
    model, steps = attach_adapter(causal("llama"), {"r": 2, "init_lora_weights": False}).eval(), []
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["default"].register_forward_hook(lambda *_: steps.append(1))
    with laid_out(model, STEPS):
        model(torch.tensor([[5, 6]]))
    assert not steps
    with torch.autocast("cpu", torch.bfloat16), laid_out(model, STEPS):
        model(torch.tensor([[5, 6]]))
    assert len(steps) == 2 * 7


@contextmanager
def as_they_are(model):
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.forward = partial(nn.Linear.forward, layer)
    yield
    for layer in layers:
        del layer.forward


@pytest.mark.parametrize(
    ("dtype", "autocast", "steps", "replaced"),
    [
        ("float32", False, STEPS, True),
        ("float32", False, STEPS - 1, False),
        ("float32", True, 1, True),
        ("bfloat16", False, STEPS, False),
        ("float64", False, STEPS, False),
    ],
)
def test_which_layers_are_laid_out(dtype, autocast, steps, replaced):
    layer = nn.Sequential(nn.Linear(5, 3, bias=True)).to(getattr(torch, dtype))
    rows = torch.randn(2, 1, 5, dtype=layer[0].weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer(rows)
        with laid_out(layer, steps):
            assert ("forward" in vars(layer[0])) == replaced
            torch.testing.assert_close(layer(rows), expected, rtol=2e-2 if expected.dtype == torch.bfloat16 else 1e-6, atol=1e-2)
    assert "forward" not in vars(layer[0])
    with laid_out(layer, steps):
        assert "forward" not in vars(layer[0])  # a gradient is to flow


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@torch.no_grad()
def test_a_model_that_is_first_met_within_it_is_found_to_read_texts_without_padding(kind):
    model = model_of(kind)
    with torch.autocast("cpu", torch.bfloat16), cast_once(model):
        assert allows(model)  # tried out in float32, with autocast off


@torch.no_grad()
def test_a_rewards_head_stays_in_float32():
    model = classifier("llama")
    texts, mask = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        one = sequence_scores(model, texts, mask)
        with cast_once(model):
            other = sequence_scores(model, texts, mask)
    assert one.dtype == torch.float32 and torch.equal(one, other)


class Casts(torch.overrides.TorchFunctionMode):
    """Counts what is handed to linear layers in float32: autocast casts it."""

    def __init__(self):
        super().__init__()
        self.wide = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            self.wide += args[1].dtype == torch.float32
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_weight_is_cast_again():
    model, tokens = causal("llama"), torch.tensor([[5, 6]])
    with torch.autocast("cpu", torch.bfloat16), cast_once(model), Casts() as casts:
        model(tokens)
    assert casts.wide == 0
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        model(tokens)
    assert casts.wide == 2 * 7 + 1


def test_the_layers_are_as_they_were_after_it_and_nothing_happens_without_autocast_or_with_gradient():
    model = causal("llama")
    for enabled, grad in ((True, False), (False, False), (True, True)):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=enabled), cast_once(model):
            assert ("forward" in vars(model.lm_head)) == (enabled and not grad)
        assert not any("forward" in vars(module) for module in model.modules())


# ---- for good


def buffered() -> nn.Module:
    """A weight, and inside: frequencies that no checkpoint holds, a statistic that one does, and places, which are whole numbers."""
    inner = nn.Module()
    inner.register_buffer("frequencies", torch.tensor([1 / 3]), persistent=False)
    inner.register_buffer("statistic", torch.tensor([1 / 3]))
    inner.register_buffer("places", torch.tensor([7]), persistent=False)
    return nn.ModuleDict({"weight": nn.Linear(1, 1), "inner": inner})


def test_a_model_that_is_rounded_keeps_the_buffers_that_are_made_anew_of_whatever_is_loaded():
    model = buffered()
    with buffers_kept(model):
        model.to(torch.bfloat16)
    inner = model["inner"]
    assert model["weight"].weight.dtype == inner.statistic.dtype == torch.bfloat16
    assert torch.equal(inner.frequencies, torch.tensor([1 / 3])) and torch.equal(inner.places, torch.tensor([7]))


def test_a_model_made_more_precise_has_its_buffers_made_so_too():
    model = buffered()
    with buffers_kept(model):
        model.to(torch.float64)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float64, torch.int64}


def test_a_buffer_that_is_kept_moves_with_its_model():
    model = buffered()
    with buffers_kept(model):
        model.to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"} and model["inner"].frequencies.dtype == torch.float32
