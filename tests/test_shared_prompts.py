"""Reading a prompt once for all its responses changes no number, and models that cannot read so are found out."""

import logging

import pytest
import torch

from p3o_lightning.forwards import completion_logps, eval_mode
from p3o_lightning.models import attach_adapter
from p3o_lightning.shared_prompts import allows, grouped_completion_logps, pays, shared_prompt_logps
from tests.families import VOCABULARY, causal, left_padded
from tests.tiny import policy, prompts, trainer

SHARING = ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "opt", "falcon", "gptj"]
NOT_SHARING = ["gemma2", "gemma3_text", "mistral", "bloom", "mamba", "jamba"]  # windows shorter than the try-out, ALiBi, recurrent layers


def batch(count=3, length=4, lengths=(3, 8, 1)):
    """Prompts of unequal length, responses of unequal length."""
    generator = torch.Generator().manual_seed(5)
    _, tokens, mask = left_padded(list(lengths))
    responses = torch.randint(3, VOCABULARY, (len(lengths), count, length), generator=generator)
    ends = torch.randint(1, length + 1, (len(lengths), count, 1), generator=generator)
    return tokens, mask, responses, torch.arange(length) < ends


@pytest.mark.parametrize("family", SHARING)
def test_the_numbers_are_those_of_one_row_a_response(family):
    model = causal(family).double()
    assert allows(model)
    torch.testing.assert_close(shared_prompt_logps(model, *batch(), 0.7), completion_logps(model, *batch(), 0.7), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_so_are_the_gradients(family):
    gradients = []
    for logps in (shared_prompt_logps, completion_logps):
        model = causal(family)
        weight = torch.linspace(-1, 1, 36).view(3, 3, 4)
        (logps(model, *batch()) * weight).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_one_response_alone_does_not_see_the_others():
    """The known answer: with the other responses replaced, the numbers of the first stay to the bit."""
    model = causal("llama")
    tokens, mask, responses, kept = batch()
    other = responses.clone()
    other[:, 1:] = (other[:, 1:] + 7) % (VOCABULARY - 3) + 3
    one, two = (shared_prompt_logps(model, tokens, mask, given, kept)[:, 0] for given in (responses, other))
    assert torch.equal(one, two)


def test_what_is_padding_does_not_matter():
    model = causal("llama")
    tokens, mask, responses, kept = batch()
    other = shared_prompt_logps(model, tokens.masked_fill(~mask, 9), mask, responses.masked_fill(~kept, 9), kept)
    assert torch.equal(shared_prompt_logps(model, tokens, mask, responses, kept), other)


@pytest.mark.parametrize("family", NOT_SHARING)
def test_models_that_read_in_another_way_are_found_out_and_read_as_before(family, caplog):
    model = causal(family)
    with caplog.at_level(logging.INFO):
        first = grouped_completion_logps(model, *batch())
        again = grouped_completion_logps(model, *batch())
    assert torch.equal(first, completion_logps(model, *batch())) and torch.equal(first, again)
    assert sum("does not take a prompt shared" in line for line in caplog.messages) <= 1


def test_a_window_longer_than_the_try_out_is_known_from_the_config():
    model = causal("mistral", sliding_window=12)
    assert pays(model, 8, 2, 4) and not pays(model, 8, 2, 5)
    torch.testing.assert_close(grouped_completion_logps(model, *batch(2)), completion_logps(model, *batch(2)), rtol=0, atol=2e-5)


def test_it_is_left_where_attention_between_responses_would_cost_more():
    """By hand for hidden size 32: 12 * 32 * 8 = 3,072 saved; (8 + 2 * 4)^2 - 2 * (8 + 4)^2 < 0, (8 + 2 * 64)^2 - 2 * (8 + 64)^2 = 8,128."""
    model = causal("llama")
    assert pays(model, 8, 2, 4)
    assert not pays(model, 8, 2, 64)


def test_adapters_switched_off_are_read_so_too():
    model = attach_adapter(causal("llama"), {"r": 2, "init_lora_weights": False})
    with eval_mode(model), model.disable_adapter():
        torch.testing.assert_close(shared_prompt_logps(model, *batch()), completion_logps(model, *batch()), rtol=0, atol=2e-5)
    assert not torch.allclose(shared_prompt_logps(model, *batch()), completion_logps(model, *batch()) + 1e-3)


def test_a_policy_reads_its_prompts_so(tmp_path, monkeypatch):
    rows = []
    module = policy(model={**causal_config(), "vocab_size": 10})
    module.model.register_forward_pre_hook(lambda _, given, named: rows.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts()))
    assert (4, 14) in rows  # prompts of 4 tokens, each with two responses of 5
    assert not any(shape[0] == 8 and shape[1] > 4 for shape in rows)


def causal_config():
    from tests.tiny import LLAMA

    return {**LLAMA, "hidden_size": 64}
