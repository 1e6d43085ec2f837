"""Reading without padding, and what texts begin with in common once, changes no number; models that cannot be read so are found out."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GPTJPreTrainedModel

from p3o_lightning import head, scoring
from p3o_lightning.forwards import completion_logits, completion_logps, eval_mode, sequence_scores, text_logps, turn_dropout_off
from p3o_lightning.head import head_logps, plain_head
from p3o_lightning.models import attach_adapter
from p3o_lightning.packing import NAME, Packing, multiple_for
from p3o_lightning.scoring import (
    allows,
    fits,
    grouped_completion_logps,
    grouped_logits,
    grouped_scores,
    leaves_out_its_head,
    packed_logps,
    packed_scores,
    packed_text_logps,
    unpadded_text_logps,
)
from tests.families import VOCABULARY, causal, config, left_padded
from tests.tiny import policy, prompts, trainer

PACKING = ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "opt"]
NOT_PACKING = ["gemma2", "gemma3_text", "mistral", "bloom", "mamba", "jamba"]  # short windows, ALiBi, recurrent layers
(PACKING if GPTJPreTrainedModel._supports_attention_backend else NOT_PACKING).append("gptj")  # attention of its own till transformers 5.23


def batch(count=3, length=4, lengths=(3, 8, 1), seed=5):
    """Prompts of unequal length, padded on the left; responses of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    _, tokens, mask = left_padded(list(lengths))
    responses = torch.randint(3, VOCABULARY, (len(lengths), count, length), generator=generator)
    ends = torch.randint(1, length + 1, (len(lengths), count, 1), generator=generator)
    return tokens, mask, responses, torch.arange(length) < ends


def even(count=2):
    """Without any padding."""
    tokens, mask, responses, kept = batch(count, lengths=(4, 4, 4))
    return tokens, mask, responses, torch.ones_like(kept)


def classifier(family):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config(family, num_labels=1)).eval()


# ---- log-probabilities


@pytest.mark.parametrize("given", [batch(), batch(2), batch(4), batch(1), batch(2, length=1), batch(2, lengths=(5, 5)), even(), even(4)])
@pytest.mark.parametrize("family", PACKING)
def test_the_numbers_are_those_of_one_padded_row_a_response(family, given):
    model = causal(family).double()
    assert allows(model)
    torch.testing.assert_close(packed_logps(model, *given, 0.7), completion_logps(model, *given, 0.7), rtol=0, atol=1e-10)


def gradients(logps, model, given, temperature=0.7):
    model.zero_grad()
    weight = torch.linspace(-1, 1, given[2].numel()).view(given[2].shape)
    (logps(model, *given, temperature) * weight).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("given", [batch(), batch(2), batch(4, length=9), even()])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_so_are_the_gradients(family, given):
    model = causal(family)
    assert allows(model)
    packed, plain = gradients(packed_logps, model, given), gradients(completion_logps, model, given)
    assert (packed - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_so_are_those_of_an_adapter_and_with_gradient_checkpointing(family):
    model = attach_adapter(causal(family), {"r": 2, "init_lora_weights": False})
    turn_dropout_off(model)
    given, plain = batch(), gradients(completion_logps, model, batch())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    calls = []
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    for mode in (True, False):
        model.train(mode)
        packed = gradients(grouped_completion_logps, model, given)
        assert (packed - plain).norm() <= 1e-5 * plain.norm()
    assert allows(model) and calls


def test_adapters_switched_off_are_read_so_too():
    model = attach_adapter(causal("llama"), {"r": 2, "init_lora_weights": False})
    assert allows(model)
    with eval_mode(model), model.disable_adapter():
        off = packed_logps(model, *batch())
        torch.testing.assert_close(off, completion_logps(model, *batch()), rtol=0, atol=2e-5)
    assert not torch.allclose(packed_logps(model, *batch()), off, atol=1e-3)


def test_one_response_alone_does_not_see_the_others():
    """The known answer: with the other responses replaced, the numbers of the first stay."""
    model = causal("llama")
    assert allows(model)
    tokens, mask, responses, kept = batch()
    other = responses.clone()
    other[:, 1:] = (other[:, 1:] + 7) % (VOCABULARY - 3) + 3
    one, two = (packed_logps(model, tokens, mask, given, kept)[:, 0] for given in (responses, other))
    assert torch.equal(one, two)


def test_what_is_padding_does_not_matter():
    model = causal("llama")
    assert allows(model)
    tokens, mask, responses, kept = batch()
    other = packed_logps(model, tokens.masked_fill(~mask, 9), mask, responses.masked_fill(~kept, 9), kept)
    assert torch.equal(packed_logps(model, tokens, mask, responses, kept), other)


def test_padding_is_not_read():
    """By hand: 12 tokens of prompts, and of 3 x 3 responses all real tokens but the last one each."""
    model, read = causal("llama"), []
    allows(model)
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape)))
    tokens, mask, responses, kept = batch()
    grouped_completion_logps(model, tokens, mask, responses, kept)
    assert read == [(1, 12 + int(kept.sum()) - 9)]


def test_a_policy_reads_its_prompts_once(tmp_path):
    rows = []
    module = policy()
    module.model.register_forward_pre_hook(lambda _, given, named: rows.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    trainer(tmp_path, max_steps=1).fit(module, module.wrap_train_dataloader(prompts()))
    assert rows[-1][0] == 1  # the forward that is trained on
    assert rows[-1][1] <= 4 * 4 + 8 * 4  # four prompts of at most 4 tokens, eight responses of at most 5, whose last is not read


@pytest.mark.parametrize("given", [batch(), batch(2, length=1), even()])
def test_a_row_that_is_filled_up_gives_the_same(given, monkeypatch):
    monkeypatch.setattr(scoring, "multiple_for", lambda _: 16)
    model, read = causal("llama").double(), []
    assert allows(model)
    plain = gradients(completion_logps, model, given)
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))
    torch.testing.assert_close(packed_logps(model, *given, 0.7), completion_logps(model, *given, 0.7), rtol=0, atol=1e-10)
    assert read[0] % 16 == 0
    filled = gradients(packed_logps, model, given)
    assert (filled - plain).norm() <= 1e-6 * plain.norm()
    reward = classifier("llama").double()
    texts, mask = torch.arange(3, 15).view(2, 6), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert allows(reward)
    torch.testing.assert_close(packed_scores(reward, texts, mask, 2), sequence_scores(reward, texts, mask), rtol=0, atol=1e-10)


def test_rows_are_filled_up_in_half_precision_only():
    model = causal("llama")
    assert multiple_for(model) == 1 and multiple_for(causal("llama").bfloat16()) == 64
    with torch.autocast("cpu", torch.bfloat16):
        assert multiple_for(model) == 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere", "mistral"])
def test_the_logits_are_those_of_padded_rows(family):
    model, given = causal(family).double(), batch()
    expected = completion_logits(model, *given, 0.7)[given[-1]]
    torch.testing.assert_close(grouped_logits(model, *given, 0.7), expected, rtol=0, atol=1e-10)


# ---- whole texts


def texts(lengths=(7, 2, 5)):
    """Padded on the right; of each, the last tokens are scored, or some with a gap, as of a conversation."""
    tokens = torch.randint(3, VOCABULARY, (len(lengths), 8), generator=torch.Generator().manual_seed(4))
    real = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
    scored = real & (torch.arange(8) > 0)
    scored[0, 2:4] = False
    return tokens, real, scored


@pytest.mark.parametrize("family", [*PACKING, "mistral", "gemma2"])
def test_the_log_probabilities_of_texts_are_those_of_each_alone(family):
    model = causal(family) if family == "gemma2" else causal(family).double()
    assert allows(model) == (family in PACKING)
    tokens, real, scored = texts()
    alone = []
    for row, kept, marked in zip(tokens, real, scored, strict=True):
        table = model(row[kept].unsqueeze(0), use_cache=False).logits[0].double().log_softmax(-1)
        alone += [table[place - 1, row[place]] for place in marked.nonzero().squeeze(1)]
    for read in (unpadded_text_logps, text_logps):
        got = read(model, tokens, real, scored)
        torch.testing.assert_close(got.double(), torch.stack(alone), rtol=0, atol=1e-5 if family == "gemma2" else 1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_so_are_the_gradients_of_texts(family):
    model, made = causal(family), []
    assert allows(model)
    for read in (packed_text_logps, text_logps):
        model.zero_grad()
        (read(model, *texts()) * torch.linspace(-1, 1, int(texts()[2].sum()))).sum().backward()
        made.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    assert (made[0] - made[1]).norm() <= 1e-5 * made[1].norm()


# ---- scores


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_scores_are_those_of_padded_rows(family, group):
    model = classifier(family).double()
    assert allows(model)
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(3, VOCABULARY, (6, 7), generator=generator)
    texts[:3, :4], texts[3:6, :2] = texts[0, :4], texts[3, :2]  # some begin alike
    texts[1] = texts[0]  # one twice
    mask = torch.arange(7) < torch.tensor([7, 4, 5, 3, 7, 1]).unsqueeze(1)
    torch.testing.assert_close(packed_scores(model, texts, mask, group), sequence_scores(model, texts, mask), rtol=0, atol=1e-10)


def test_what_a_pair_begins_with_is_read_once():
    model, read = classifier("llama"), []
    texts = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 4, 0, 0]])
    mask = torch.tensor([[True] * 5 + [False], [True] * 4 + [False] * 2])
    allows(model)
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: read.append(given[0].tolist()))
    grouped_scores(model, texts, mask, 2).sum().backward()
    assert read == [[[5, 6, 7, 8, 9, 4]]]
    packed = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    sequence_scores(model, texts, mask).sum().backward()
    plain = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (packed - plain).norm() <= 1e-5 * plain.norm()


# ---- the head


@pytest.mark.parametrize("kept", [2**30, 0], ids=["kept", "computed again"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_the_heads_log_probabilities_and_gradients(bias, temperature, kept, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 4)
    monkeypatch.setattr(head, "KEPT", kept)
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 13, bias=bias).double()
    hidden, tokens = torch.randn(10, 5, dtype=torch.float64, requires_grad=True), torch.randint(13, (10,))
    assert torch.autograd.gradcheck(lambda given, *_: head_logps(given, layer, tokens, temperature), (hidden, *layer.parameters()))
    expected = (layer(hidden) / temperature).log_softmax(-1)[torch.arange(10), tokens]
    torch.testing.assert_close(head_logps(hidden, layer, tokens, temperature), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
def test_in_half_precision_they_are_those_of_the_models_own_logits(dtype):
    model = causal("llama")
    if dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    assert leaves_out_its_head(model) and allows(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        packed = packed_logps(model, *batch())
        plain = completion_logps(model, *batch())
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, plain, rtol=0, atol=0.3)  # logits of some 10, to three digits
    packed.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_in_half_precision_the_gradients_are_those_of_float32_but_for_rounding():
    torch.manual_seed(0)
    layer, hidden, tokens = torch.nn.Linear(16, 40), torch.randn(10, 16), torch.randint(40, (10,))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        given, layer.weight.grad = hidden.detach().to(dtype).clone().requires_grad_(), None
        (head_logps(given, layer, tokens) * torch.linspace(-1, 1, 10)).sum().backward()
        found.append(torch.cat([given.grad.float().flatten(), layer.weight.grad.float().flatten()]))
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


@pytest.mark.parametrize("kept", [2**30, 0], ids=["kept", "computed again"])
def test_in_half_precision_the_gradients_of_confident_tokens_are_as_good_as_autograds(kept, monkeypatch):
    """Of a token with probability 0.999 next to nothing is left of 1 - p, if both are rounded before they are subtracted."""
    monkeypatch.setattr(head, "KEPT", kept)
    torch.manual_seed(0)
    tokens, weight = torch.randint(40, (300,)), 4 * torch.nn.functional.normalize(torch.randn(40, 16))
    hidden = 1.5 * weight[tokens] + 0.05 * torch.randn(300, 16)
    assert (hidden @ weight.t()).softmax(-1)[torch.arange(300), tokens].median() > 0.999
    outer = torch.linspace(0.5, 1, 300)

    def gradients(dtype, logps):
        layer = torch.nn.Linear(16, 40, bias=False)
        layer.weight.data = weight.to(torch.bfloat16).to(dtype)
        given = hidden.to(torch.bfloat16).to(dtype).requires_grad_()
        (logps(given, layer) * outer.to(dtype)).sum().backward()
        return given.grad.double(), layer.weight.grad.double()

    def plain(given, layer):
        return layer(given).to(torch.promote_types(given.dtype, torch.float32)).log_softmax(-1)[torch.arange(300), tokens]

    exact, usual = gradients(torch.float64, plain), gradients(torch.bfloat16, plain)
    ours = gradients(torch.bfloat16, lambda given, layer: head_logps(given, layer, tokens))
    for right, theirs, own in zip(exact, usual, ours, strict=True):
        assert (own - right).norm() <= 1.2 * (theirs - right).norm() < 0.2 * right.norm()


def test_nothing_is_kept_where_no_backward_comes(monkeypatch):
    layer, sizes = torch.nn.Linear(4, 50), []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **given: sizes.append(shape) or real(*shape, **given))
    with torch.no_grad():
        head_logps(torch.randn(10, 4), layer, torch.arange(10))
    assert sizes and (10, 50) not in sizes


def test_a_head_whose_output_is_scaled_or_watched_is_not_left_out():
    assert not leaves_out_its_head(causal("gemma2"))  # softcapped
    assert not leaves_out_its_head(causal("cohere"))
    model = causal("llama")
    assert leaves_out_its_head(model)
    model.lm_head.register_forward_hook(lambda *_: None)
    assert plain_head(model) is None and allows(model)
    torch.testing.assert_close(packed_logps(model, *batch()), completion_logps(model, *batch()), rtol=0, atol=2e-5)


def test_a_scaled_models_numbers_are_right():
    model = causal("cohere").double()
    torch.testing.assert_close(grouped_completion_logps(model, *batch()), completion_logps(model, *batch()), rtol=0, atol=1e-10)


# ---- what cannot be read so


@pytest.mark.parametrize("family", NOT_PACKING)
def test_models_that_read_in_another_way_are_found_out_and_read_as_before(family, caplog):
    model = causal(family)
    before = model.config._attn_implementation
    with caplog.at_level(logging.INFO):
        first = grouped_completion_logps(model, *batch())
        again = grouped_completion_logps(model, *batch())
    assert torch.equal(first, completion_logps(model, *batch())) and torch.equal(first, again)
    assert sum("cannot be read without padding" in line for line in caplog.messages) == 1
    assert model.config._attn_implementation == before


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
HYBRIDS = {  # layers that mix what lies side by side
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "jamba": {**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_layer_that_mixes_neighbours_is_known_while_weights_are_too_small_to_show_it(family):
    """As they are before training: packed, texts would leak into each other as soon as they have grown."""
    torch.manual_seed(0)
    given = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**HYBRIDS[family], **given})).eval()
    assert not allows(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
        torch.testing.assert_close(grouped_completion_logps(model, *batch()), completion_logps(model, *batch()), rtol=0, atol=1e-6)


def test_under_a_head_of_zeros_nothing_can_be_seen_so_nothing_is_packed():
    model = classifier("llama")
    torch.nn.init.zeros_(model.score.weight)
    assert not allows(model)


def test_an_attention_chosen_afterwards_reaches_modules_with_configs_of_their_own():
    """As they have them where dropout was turned off."""
    model = causal("llama", attention_dropout=0.1)
    turn_dropout_off(model)
    assert allows(model)
    model.set_attn_implementation("eager")
    assert not allows(model)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}


def test_a_window_longer_than_the_try_out_is_known_from_the_config():
    model = causal("mistral", sliding_window=12)
    assert allows(model) and fits(model, 12) and not fits(model, 13)
    for lengths in ((3, 8, 1), (3, 12, 1)):
        given = batch(2, lengths=lengths)
        torch.testing.assert_close(grouped_completion_logps(model, *given), completion_logps(model, *given), rtol=0, atol=2e-5)


def test_columns_of_padding_alone_are_not_read():
    model, read = causal("bloom"), []
    tokens, mask, responses, kept = batch(2, length=9)
    mask[:, :2], kept[..., 3:] = False, False
    model.register_forward_pre_hook(lambda _, given, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    logps = grouped_completion_logps(model, tokens, mask, responses, kept)
    assert read == [(6, 6 + 3)]
    torch.testing.assert_close(logps, completion_logps(model, tokens, mask, responses, kept), rtol=0, atol=2e-5)


def test_the_model_generates_and_saves_as_before(tmp_path):
    model = causal("llama")
    tokens, mask, *_ = batch()
    given = {"input_ids": tokens, "attention_mask": mask.long(), "do_sample": False, "max_new_tokens": 5}
    before, logits = model.generate(**given), model(tokens, attention_mask=mask.long()).logits
    assert allows(model) and model.config._attn_implementation == NAME
    assert torch.equal(model.generate(**given), before)
    assert torch.equal(model(tokens, attention_mask=mask.long()).logits, logits)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_places_by_hand():
    """Two prompts of 2 and 1 tokens, two responses each: a b | c | d e | f | g | (none)."""
    packing = Packing(
        torch.tensor([[True, True], [False, True]]), torch.tensor([[[True, True], [True, False]], [[True, False], [False, False]]])
    )
    row = packing.tokens(torch.tensor([[1, 2], [0, 3]]), torch.tensor([[[4, 5], [6, 0]], [[7, 0], [0, 0]]]))
    assert row.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert [text.tolist() for text in packing.texts(row)] == [[1, 2, 4, 5], [1, 2, 6], [3, 7], [3]]
    assert packing.positions().tolist() == [[0, 1, 0, 2, 3, 2, 1]]
    assert packing.trunk_ends().tolist() == [1, 2]
    assert packing.branch_places()[packing.branch_mask].tolist() == [3, 4, 5, 6]


def test_it_is_tried_out_once(monkeypatch):
    tried = []
    real = scoring._gives_the_same
    monkeypatch.setattr(scoring, "_gives_the_same", lambda model: tried.append(model) or real(model))
    model = causal("llama")
    grouped_completion_logps(model, *batch())
    grouped_completion_logps(model, *batch())
    assert tried == [model]


def test_an_attention_chosen_afterwards_is_obeyed():
    """By who wants to look at attention weights, say: such a model is read with padding, where a packed row would fail."""
    model, given = causal("llama"), batch()
    assert allows(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(grouped_completion_logps(model, *given), completion_logps(model, *given), rtol=0, atol=0)
    assert model.config._attn_implementation == "eager"


def test_a_row_given_to_a_model_that_was_not_tried_out_fails():
    """Rather than letting responses see each other."""
    with pytest.raises(RuntimeError):
        packed_logps(causal("llama"), *batch())


def test_autocast_does_not_hide_that_a_model_allows_it():
    """The try-out is made in the weights' own precision. A state that all texts share makes bfloat16 round by as much as a prompt does."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0  # fifty times the others
    with torch.autocast("cpu", torch.bfloat16):
        assert allows(model)
