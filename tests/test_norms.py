"""RMSNorm as one function: what autograd makes of the formula in float64, and whose norms it is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from p3o_lightning.models import load_policy, load_reward_backbone
from p3o_lightning.norms import quicken_norms
from tests.families import config, word_tokenizer
from tests.tiny import LLAMA

TOKENIZER = word_tokenizer(["one", "two"])
QUICK = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "mixtral")
NOT = ("gpt2", "gemma", "gemma3_text", "olmo", "cohere", "bloom")  # LayerNorms, 1 + weight, no weight


def quick(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def norm(channels: int = 12, epsilon: float = 1e-6) -> nn.Module:
    module = LlamaRMSNorm(channels, epsilon)
    quicken_norms(module)
    assert "forward" in vars(module)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1, 2, channels))
    return module


def by_formula(module, hidden, gradient):
    """Value and gradients in float64, by autograd."""
    x, w = (value.detach().double().requires_grad_() for value in (hidden, module.weight))
    made = w * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    made.backward(gradient.double())
    return made, x.grad, w.grad


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])  # the first is of epsilon's own order
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 2, 3, 12)])
def test_value_and_gradients_are_those_of_the_formula(shape, scale):
    module = norm(epsilon=1e-8)
    hidden = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale + scale).requires_grad_()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = module(hidden)
    made.backward(gradient)
    assert_same((made, hidden.grad, module.weight.grad), by_formula(module, hidden, gradient))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_what_it_gives_is_transformers_to_the_bit(scale):
    module, hidden = norm(), torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * scale
    made = module(hidden)
    assert "_RMSNorm" in type(made.grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(made, LlamaRMSNorm.forward(module, hidden)) and torch.equal(made, module(hidden))


def test_what_is_not_contiguous_is_read_alike():
    module = norm()
    hidden = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).t()
    made = module(hidden.t())
    made.backward(gradient)
    assert_same((made, hidden.grad.t(), module.weight.grad), by_formula(module, hidden.t(), gradient))


def test_a_backward_under_autocast_loses_no_digits():
    module = norm()
    hidden = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        made = module(hidden)
        made.backward(gradient)
    assert_same((made, hidden.grad, module.weight.grad), by_formula(module, hidden, gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes_it_is_as_written(dtype):
    module = norm().to(dtype)
    hidden = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(module(hidden), LlamaRMSNorm.forward(module, hidden))


def test_a_frozen_weight_gets_no_gradient():
    module = norm()
    module.weight.requires_grad_(False)
    hidden = torch.randn(5, 12, requires_grad=True)
    module(hidden).sum().backward()
    assert module.weight.grad is None and hidden.grad.abs().sum() > 0


def test_a_second_derivative_is_refused_not_wrong():
    module, hidden = norm(), torch.randn(5, 12, requires_grad=True)
    (first,) = torch.autograd.grad(module(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_copy_has_its_own_weight():
    module = norm()
    twin, hidden = copy.deepcopy(module), torch.randn(5, 12)
    with torch.no_grad():
        module.weight.zero_()
    assert module(hidden).abs().sum() == 0 and twin(hidden).abs().sum() > 0


def test_it_can_be_pickled():
    module, hidden = norm(), torch.randn(5, 12)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(hidden), module(hidden))


def test_hooks_see_it():
    module, seen = norm(), []
    module.register_forward_hook(lambda *given: seen.append(given[2]))
    made = module(torch.randn(5, 12))
    assert seen[0] is made


def test_a_forward_of_somebodys_own_stays():
    module = LlamaRMSNorm(12)
    module.forward = lambda hidden: hidden
    quicken_norms(module)
    hidden = torch.randn(5, 12)
    assert module(hidden) is hidden


@pytest.mark.parametrize("family", QUICK)
def test_families_with_a_plain_rms_norm_have_it_quick(family):
    model = load_policy(config(family), TOKENIZER)
    assert quick(model) == [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")] != []


@pytest.mark.parametrize("family", NOT)
def test_other_norms_stay_as_they_are(family):
    assert quick(load_policy(config(family), TOKENIZER)) == []


def test_so_with_reward_models():
    assert "model.norm" in quick(load_reward_backbone(LLAMA, TOKENIZER))


def test_the_weights_keep_their_names():
    model = load_policy(config("llama"), TOKENIZER)
    assert set(model.state_dict()) == set(type(model)(model.config).state_dict())
