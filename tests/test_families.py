"""The families of models that people train, each through all three stages with tiny random weights, and out again into transformers."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from families import FAMILIES
from tiny import letters, preferences, share_of_a, trainer, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from p3o_lightning import PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.forwards import completion_logps
from p3o_lightning.generation import Sampling, sample_completions
from p3o_lightning.models import load_policy
from p3o_lightning.scoring import allows
from p3o_lightning.tokenizers import load_tokenizer

IDS = torch.tensor([[0, 1, 2, 8], [3, 4, 5, 6]])
# Whether it reads a prompt once for its responses; the others have a window that is shorter than the prompts here, and read copies.
PEOPLE_TRAIN = {
    "llama": True,
    "qwen2": True,
    "qwen3": True,
    "gemma": True,
    "gemma2": False,
    "gemma3_text": False,
    "gpt_neox": True,
    "gpt2": True,
    "mistral": False,
    "olmo": True,
    "olmo2": True,
}


def source(family: str, **changes: object) -> dict[str, object]:
    settings = {name: value for name, value in FAMILIES[family].items() if name != "attn_implementation"}
    return {"model_type": family, "initializer_range": 0.2, **settings, **changes}


def export_gives(module, folder, auto):
    """The export's logits are the module's own."""
    # asked for: transformers before 5.21 reads Gemma 2 with an attention that leaves out its cap
    loaded = auto.from_pretrained(folder, attn_implementation="eager" if "gemma2" in type(module.model).__module__ else None)
    assert type(loaded) is type(module.model) and loaded.config.model_type == module.model.config.model_type
    assert_close(loaded(IDS).logits, module.model.eval()(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:AutoTokenizer reads text otherwise")  # qwen2: below
@pytest.mark.parametrize("family", PEOPLE_TRAIN)
def test_three_stages_one_after_the_other(family, tmp_path):
    """The start-up proofs stop a family whose masks, positions or windows are wrong: ratio 1 and KL 0 before the first update."""
    data = PreferenceDataModule(str(preferences(tmp_path)), batch_size=4, max_length=16)
    torch.manual_seed(0)
    sft = SupervisedPolicy(source(family), tokenizer=letters(), lr=1e-2)
    trainer(tmp_path, max_steps=2).fit(sft, data)
    export_gives(sft, sft.export(tmp_path / "sft"), AutoModelForCausalLM)
    reward = RewardModel(source(family), tokenizer=letters(), lr=1e-2)
    trainer(tmp_path, max_steps=2).fit(reward, data)
    export_gives(reward, reward.export(tmp_path / "reward"), AutoModelForSequenceClassification)

    policy = PairwisePolicy(
        str(tmp_path / "sft"), [str(tmp_path / "reward"), share_of_a], num_iterations=2, max_completion_length=9, lr=1e-2
    )
    before = weights(policy.model)
    run = trainer(tmp_path, max_steps=2)
    run.fit(policy, data)
    assert run.callback_metrics["val/ratio_var"] > 0 or run.callback_metrics["policy/approxkl_avg"] != 0, "the second pass is off-policy"
    after = weights(policy.model)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert_close(weights(policy.reference), before, rtol=0, atol=0)
    assert allows(policy.model) is PEOPLE_TRAIN[family]
    export_gives(policy, policy.export(tmp_path / "policy"), AutoModelForCausalLM)


def test_the_final_softcap_bounds_what_a_policy_can_say():
    """Gemma 2. By hand: logits within [-c, c] over V tokens leave no log-probability below -2 c - log V; without the cap, some are."""
    tokens, mask = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    responses = torch.arange(8).repeat(1, 1, 1)
    least = {}
    for cap in (0.5, None):
        torch.manual_seed(0)
        model = load_policy(source("gemma2", final_logit_softcapping=cap, initializer_range=1.0), letters()).eval()
        least[cap] = completion_logps(model, tokens, mask, responses, torch.ones_like(responses).bool()).min().item()
    floor = -2 * 0.5 - torch.tensor(10.0).log().item()
    assert floor <= least[0.5] < 0 and least[None] < 2 * floor


def test_the_attention_softcap_is_heeded():
    """Gemma 2: scaled-dot-product attention knows no cap, so the model must not be run with it."""
    model = load_policy(source("gemma2", initializer_range=1.0, attn_logit_softcapping=0.1), letters()).eval()
    capped = model(IDS).logits
    assert model.config._attn_implementation == "eager"
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 1e6
    assert (model(IDS).logits - capped).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "sees"), [("mistral", False), ("gemma3_text", False), ("llama", True)])
def test_a_window_hides_what_lies_before_it(family, sees):
    """One layer with a window of 5 tokens: the first of 8 prompt tokens cannot change any token of the response, drawn or scored."""
    changes: dict[str, object] = {"num_hidden_layers": 1, "sliding_window": 5}
    if family == "gemma3_text":
        changes["layer_types"] = ["sliding_attention"]
    torch.manual_seed(0)
    model = load_policy(source(family, **({} if sees else changes), initializer_range=1.0), letters()).eval()
    one = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    other = torch.tensor([[6, 1, 2, 3, 4, 5, 6, 7]])
    mask, results = torch.ones_like(one).bool(), []
    for prompt in (one, other):
        ids = {"eos_token_id": 8, "pad_token_id": 9, "seed": 0}
        drawn, kept = sample_completions(model, prompt, mask, Sampling(4, 6), **ids)
        fixed = torch.tensor([[[1, 2, 3, 4, 5, 6]]])
        results.append((drawn[kept], completion_logps(model, prompt, mask, fixed, torch.ones_like(fixed).bool())))
    (drawn, logps), (other_drawn, other_logps) = results
    assert (torch.equal(drawn, other_drawn) and torch.allclose(logps, other_logps, atol=1e-6)) is not sees


def test_a_tokenizer_that_autotokenizer_would_change_is_told_and_read_back_as_it_was(tmp_path):
    """Beside a Qwen2 model AutoTokenizer takes Qwen2Tokenizer whatever was saved (so for distilled models of other families)."""
    tokenizer, text = letters(), "don't bad 12"
    module = SupervisedPolicy(source("qwen2"), tokenizer=tokenizer)
    module.model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    if AutoTokenizer.from_pretrained(tmp_path / "plain")(text)["input_ids"] == tokenizer(text)["input_ids"]:
        pytest.skip(f"AutoTokenizer of transformers {transformers.__version__} takes the class that was saved")
    with pytest.warns(UserWarning, match="AutoTokenizer reads text otherwise than this run did.*transformers.PreTrainedTokenizerFast"):
        folder = module.export(tmp_path / "export")
    assert load_tokenizer(str(folder))(text)["input_ids"] == tokenizer(text)["input_ids"]
    card = (folder / "README.md").read_text()
    assert 'PreTrainedTokenizerFast.from_pretrained("this folder")' in card and "AutoTokenizer" not in card
    assert PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SupervisedPolicy(source("llama"), tokenizer=tokenizer).export(tmp_path / "llama")
