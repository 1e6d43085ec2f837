"""Loading from every kind of source, what is refused and why, and the two forwards that everything rests on: log-probabilities and scores.

The power of these tests, found by planting one error at a time in models.py:
    planted error                          first test that fails, without test_
    buffers cast with the weights          bfloat16_weights_leave_the_rotary_frequencies_alone
    dtype missing in the config            weights_are_not_rounded_on_the_way_through_a_checkpoint
    backbone of a causal model not copied  a_language_model_becomes_a_reward_backbone_with_its_own_weights
    missing weights accepted               a_language_model_is_no_trained_reward
    fresh head passes for a trained one    a_language_model_is_no_trained_reward
    labels not counted                     a_classifier_with_several_labels_is_refused
    pickles loaded                         a_pickle_in_a_checkpoint_is_refused_and_not_run
    weights in .bin accepted               weights_in_pickles_are_refused
    unknown config keys pass               bad_configs_are_told_apart
    adapter fields forgotten               a_checkpoint_of_every_stage_is_a_model_source_and_loads_again
    adapter without its task               an_adapter_trains_the_fresh_head_however_it_is_spelled
    dropout read from configs left on      dropout_off_makes_train_mode_deterministic
    dropout of float attributes left on    dropout_off_makes_train_mode_deterministic
    dropout modules left on                dropout_off_makes_train_mode_deterministic
    dropout off in the exported config     dropout_off_makes_train_mode_deterministic
    special tokens read from text          bytes_round_trip_the_awkward_ones_even_when_saved
    user's tokenizer changed               a_missing_padding_token_becomes_eos_in_a_copy
    pad == eos kept                        a_distinct_padding_token_is_the_unknown_one_or_a_new_one
    log-probabilities one position late    log_probabilities_are_those_of_single_unpadded_sequences
    temperature not in log-probabilities   log_probabilities_are_those_of_single_unpadded_sequences
    positions count padding                log_probabilities_are_those_of_single_unpadded_sequences
    mask not handed to the model           log_probabilities_are_those_of_single_unpadded_sequences
    log-probabilities in half precision    log_probabilities_of_a_half_precision_model_are_float32
    float64 rounded                        log_probabilities_are_those_of_single_unpadded_sequences
    pooled before the last token           scores_of_a_padded_batch_equal_those_of_each_row_alone
    pooled by padding id                   scores_of_a_padded_batch_equal_those_of_each_row_alone
    pooled at the right edge               scores_of_a_padded_batch_equal_those_of_each_row_alone
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from families import BOS, CAUSAL, EOS, PAD, VOCABULARY, causal, config, left_padded, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from p3o_lightning import PairwisePolicy, RewardModel, SupervisedPolicy
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import completion_logps, eval_mode, sequence_scores, turn_dropout_off, unwrapped
from p3o_lightning.models import attach_adapter, describe, load_policy, load_reward_backbone, read_checkpoint
from p3o_lightning.tokenizers import byte_tokenizer, distinct_pad_token, load_tokenizer, tokenizer_source

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
BYTES = byte_tokenizer()
IDS = torch.arange(10, 22).view(2, 6)


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


def refuses(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    text = one_line(caught)
    assert all(word in text for word in words), text


def saved(folder: Path, model, tokenizer=BYTES) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("policy"), load_policy(TINY, BYTES))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    torch.manual_seed(1)
    return saved(tmp_path_factory.mktemp("reward"), load_reward_backbone(TINY, BYTES))


def checkpoint(stage, path: Path) -> Path:
    """What Lightning would write, as far as loading reads it."""
    content = {"state_dict": stage.state_dict(), "hyper_parameters": dict(stage.hparams)}
    stage.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def disturb(stage):
    """As if trained: adapters start at zero, which would hide that they are not loaded."""
    generator = torch.Generator().manual_seed(3)
    for parameter in stage.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return stage


# ---- sources


def test_a_policy_from_every_source(policy_folder, tmp_path):
    expected = load_policy(str(policy_folder), BYTES)
    logits = expected(IDS).logits
    stage = SupervisedPolicy(str(policy_folder))
    assert torch.equal(stage.model(IDS).logits, logits), "the tokenizer comes from the folder too"
    path = checkpoint(stage, tmp_path / "sft.ckpt")
    for source in (policy_folder, str(policy_folder), expected, path, str(path)):
        assert torch.equal(load_policy(source, BYTES)(IDS).logits, logits)
    assert load_policy(expected, BYTES) is expected
    for source in (policy_folder, path):
        assert load_tokenizer(source).get_vocab() == BYTES.get_vocab()
    for source in (TINY, LlamaConfig(vocab_size=259, **{k: v for k, v in TINY.items() if k != "model_type"})):
        model = load_policy(source, BYTES)
        assert model.config.vocab_size == 259 and model.config.model_type == "llama"
    assert (model.config.pad_token_id, load_policy(TINY, BYTES).config.pad_token_id) == (None, BYTES.pad_token_id)
    assert load_policy(TINY, BYTES).config.eos_token_id == BYTES.eos_token_id
    assert load_policy({**TINY, "vocab_size": 300}, BYTES).config.vocab_size == 300, "the user's own value wins"


def test_a_home_folder_is_found(policy_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(policy_folder.parent))
    source = f"~/{policy_folder.name}"
    load_policy(source, load_tokenizer(source))


def test_a_reward_backbone_from_every_source(reward_folder, tmp_path):
    expected = load_reward_backbone(reward_folder, BYTES)
    logits = expected(IDS).logits
    assert logits.shape == (2, 1)
    path = checkpoint(RewardModel(reward_folder), tmp_path / "reward.ckpt")
    for source in (str(reward_folder), expected, path):
        assert torch.equal(load_reward_backbone(source, BYTES, trained=True)(IDS).logits, logits)
    assert load_reward_backbone(expected, BYTES) is expected
    for source in (TINY, LlamaConfig(vocab_size=259, **{k: v for k, v in TINY.items() if k != "model_type"})):
        model = load_reward_backbone(source, BYTES)
        assert (model.config.num_labels, model.config.pad_token_id) == (1, BYTES.pad_token_id)


def sources_of_a_language_model(folder: Path, tmp_path: Path):
    model = load_policy(folder, BYTES)
    return [folder, model, checkpoint(SupervisedPolicy(folder), tmp_path / "sft.ckpt")]


def test_a_language_model_becomes_a_reward_backbone_with_its_own_weights(policy_folder, tmp_path):
    weights = load_policy(policy_folder, BYTES).model.state_dict()
    for source in sources_of_a_language_model(policy_folder, tmp_path):
        reward = load_reward_backbone(source, BYTES)
        assert type(reward).__name__ == "LlamaForSequenceClassification" and reward.score.weight.shape == (1, 16)
        assert all(torch.equal(weights[name], value) for name, value in reward.model.state_dict().items())
        before = weights["layers.0.mlp.up_proj.weight"].clone()
        reward.model.layers[0].mlp.up_proj.weight.data.zero_()
        assert torch.equal(load_policy(policy_folder, BYTES).model.layers[0].mlp.up_proj.weight, before)
        if not isinstance(source, Path):
            assert torch.equal(source.model.layers[0].mlp.up_proj.weight, before), "the user's own model stays as it is"


def test_a_language_model_is_no_trained_reward(policy_folder, tmp_path):
    for source in sources_of_a_language_model(policy_folder, tmp_path):
        refuses(lambda source=source: load_reward_backbone(source, BYTES, trained=True), "trained", "head")


def test_a_classifier_is_no_policy(reward_folder, tmp_path):
    path = checkpoint(RewardModel(reward_folder), tmp_path / "reward.ckpt")
    for source in (path, load_reward_backbone(reward_folder, BYTES)):
        refuses(lambda source=source: load_policy(source, BYTES), "a policy needs a causal language model")
    refuses(lambda: load_policy(reward_folder, BYTES), "lack 1 weights", "lm_head.weight")
    headless = AutoModel.from_config(LlamaConfig(vocab_size=259, **{k: v for k, v in TINY.items() if k != "model_type"}))
    refuses(lambda: load_policy(headless, BYTES), "no language modelling head")


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    made = LlamaConfig(vocab_size=259, num_labels=3, pad_token_id=0, **{k: v for k, v in TINY.items() if k != "model_type"})
    model = AutoModelForSequenceClassification.from_config(made)
    folder = saved(tmp_path / "three", model)
    for source in (model, folder):
        refuses(lambda source=source: load_reward_backbone(source, BYTES), "num_labels=3", "num_labels=1")


STAGES = {
    "sft": (SupervisedPolicy, {}),
    "reward": (RewardModel, {}),
    "policy": (PairwisePolicy, {"reward_funcs": "p3o_lightning.rewards.share_of_letter_e"}),
}
ADAPTERS = {
    "all weights": None,
    "lora": {"r": 2},
    "lora with patterns": {"r": 2, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_every_stage_is_a_model_source_and_loads_again(stage, adapter, policy_folder, tmp_path):
    owner, options = STAGES[stage]
    torch.manual_seed(0)
    module = disturb(owner(str(policy_folder), peft_config=ADAPTERS[adapter], **options))
    path = checkpoint(module, tmp_path / "last.ckpt")
    torch.load(path, weights_only=True)
    with eval_mode(module.model):
        expected = module.model(input_ids=IDS).logits
    load = load_reward_backbone if stage == "reward" else load_policy
    torch.manual_seed(9)
    loaded = load(path, load_tokenizer(path)).eval()
    assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-5)  # merging an adapter rounds
    assert not hasattr(loaded, "peft_config")
    again = owner.load_from_checkpoint(path)
    with eval_mode(again.model):
        assert torch.equal(again.model(input_ids=IDS).logits, expected)
    assert again.model.training


def test_gpt2_with_an_adapter_loads_again(tmp_path):
    tokenizer = word_tokenizer([f"w{i}" for i in range(20)])
    module = disturb(RewardModel(config("gpt2"), tokenizer=tokenizer, peft_config={"r": 2}))
    path = checkpoint(module, tmp_path / "last.ckpt")
    with eval_mode(module.model):
        expected = module.model(input_ids=IDS).logits
    assert_close(load_reward_backbone(path, tokenizer).eval()(IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spelling", ["mapping", "object", "object without a task", "mapping with its own modules_to_save"])
def test_an_adapter_trains_the_fresh_head_however_it_is_spelled(spelling):
    from peft import LoraConfig

    given = {
        "mapping": {"r": 2},
        "object": LoraConfig(r=2, task_type="SEQ_CLS"),
        "object without a task": LoraConfig(r=2, target_modules="all-linear"),
        "mapping with its own modules_to_save": {"r": 2, "modules_to_save": ["embed_tokens"]},
    }[spelling]
    before = copy.deepcopy(given)
    model = attach_adapter(load_reward_backbone(TINY, BYTES), given)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert "base_model.model.score.modules_to_save.default.weight" in trained
    assert given == before, "the user's own config stays as it is"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 2}, ["unexpected keyword argument 'rank'", "peft.LoraConfig"]),
        ({"target_modules": ["nope"]}, ["nope"]),
        ({"r": 0}, ["`r` should be a positive integer"]),
        (3, ["is a int", "peft.LoraConfig"]),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(given, words):
    refuses(lambda: attach_adapter(load_policy(TINY, BYTES), given), "model.peft_config", *words)


def test_an_adapted_model_is_refused_with_the_fix():
    adapted = attach_adapter(load_policy(TINY, BYTES), {"r": 2})
    refuses(lambda: load_policy(adapted, BYTES), "merge_and_unload", "model.peft_config")
    refuses(lambda: load_policy(3, BYTES), "model is a int")  # type: ignore[arg-type]


# ---- what is refused


def test_bad_folders_and_names(policy_folder, tmp_path):
    def copied(name: str) -> Path:
        return Path(shutil.copytree(policy_folder, tmp_path / name))

    def loads(source):
        return lambda: load_policy(source, BYTES)

    refuses(loads("nobody/has-this"), "model is 'nobody/has-this'", "hub name")
    refuses(loads(tmp_path / "absent"), "no such folder", "Give a hub name")
    refuses(loads("./absent"), "no such folder")
    refuses(loads("a/b/c"), "no such folder")
    refuses(loads(""), "model is ''")
    refuses(loads(tmp_path / "absent.ckpt"), "no such file")
    refuses(loads(tmp_path / "absent.gguf"), "no such file")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refuses(loads(file), "a file of another kind", ".gguf")

    folder = copied("no config")
    (folder / "config.json").unlink()
    refuses(loads(folder), "a folder without config.json")
    (folder / "adapter_config.json").write_text("{}")
    refuses(loads(folder), "adapter alone", "merge")

    folder = copied("bad json")
    (folder / "config.json").write_text("{")
    refuses(loads(folder), "not a valid JSON")

    folder = copied("cut off")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    refuses(loads(folder), "could not be loaded")

    folder, values = copied("other shape"), json.loads((policy_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 48}))
    refuses(loads(folder), "other shapes than its config.json says")
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    refuses(loads(folder), "lack 9 weights", "model.layers.2.")
    refuses(lambda: load_reward_backbone(folder, BYTES), "lack 9 weights", "model.layers.2.")
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "unheard-of"}))
    refuses(loads(folder), "unheard-of")


def test_weights_in_pickles_are_refused(policy_folder, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(policy_folder / "config.json", folder)
    torch.save(load_policy(policy_folder, BYTES).state_dict(), folder / "pytorch_model.bin")
    refuses(lambda: load_policy(folder, BYTES), "no file named model.safetensors")
    refuses(lambda: load_reward_backbone(folder, BYTES), "no file named model.safetensors")


def test_code_that_comes_with_a_model_is_not_run(policy_folder, tmp_path):
    folder = Path(shutil.copytree(policy_folder, tmp_path / "code"))
    values = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refuses(lambda: load_policy(folder, BYTES), "could not be loaded")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto}))
    with suppress(InputError):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(policy_folder, tmp_path):
    path = checkpoint(SupervisedPolicy(policy_folder), tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    torch.save({**content, "extra": Evil(tmp_path / "ran")}, path)
    for load in (read_checkpoint, load_tokenizer, lambda path: load_policy(path, BYTES), SupervisedPolicy.load_from_checkpoint):
        refuses(lambda load=load: load(path), "could run code", "<default_root_dir>/checkpoints")
    assert not (tmp_path / "ran").exists()


def test_other_files_are_no_checkpoints(policy_folder, tmp_path):
    refuses(lambda: read_checkpoint(tmp_path / "absent.ckpt"), "no such file")
    refuses(lambda: read_checkpoint(tmp_path), "sharded")
    path = tmp_path / "text.ckpt"
    path.write_text("hello")
    refuses(lambda: read_checkpoint(path), "no checkpoint")
    whole = checkpoint(SupervisedPolicy(policy_folder), tmp_path / "last.ckpt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuses(lambda: read_checkpoint(path), "no checkpoint, or only a part")
    torch.save({"state_dict": {}}, path)
    refuses(lambda: read_checkpoint(path), "not a checkpoint of p3o_lightning")
    torch.save([1], path)
    refuses(lambda: read_checkpoint(path), "not a checkpoint of p3o_lightning")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"hidden_size": 16}, ["without model_type"]),
        ({**TINY, "model_type": "lama"}, ["lama"]),
        ({**TINY, "num_attention_heads": 3}, ["not a multiple"]),
        ({**TINY, "hidden_size": "wide"}, ["hidden_size"]),
        ({**TINY, "hiddensize": 3}, ["model.hiddensize is 3", "did you mean hidden_size?"]),
        ({**TINY, "zzz": 3}, ["model.zzz is 3", "remove it"]),
        ({"model_type": "t5"}, ["'t5'", "no causal language model"]),
        ({**TINY, "vocab_size": 200}, ["token ids up to 258", "200 tokens"]),
    ],
)
def test_bad_configs_are_told_apart(source, words):
    refuses(lambda: load_policy(source, BYTES), *words)


def test_a_family_without_a_classifier_makes_no_reward():
    refuses(lambda: load_reward_backbone({"model_type": "mamba", "hidden_size": 16}, BYTES), "'mamba'", "no sequence classifier")


def test_spellings_of_older_transformers_are_still_keys():
    assert load_policy({**TINY, "rope_theta": 500.0}, BYTES).config.rope_parameters["rope_theta"] == 500.0


def test_a_tokenizer_that_does_not_fit_is_refused(policy_folder, reward_folder):
    larger = word_tokenizer([f"w{i}" for i in range(300)])
    for load, folder in ((load_policy, policy_folder), (load_reward_backbone, reward_folder)):
        refuses(lambda load=load, folder=folder: load(folder, larger), "model.tokenizer", "up to 302", "embeds 259 tokens")


def test_dtype_is_checked():
    refuses(lambda: load_policy(TINY, BYTES, "bf16"), "model.dtype is 'bf16'", "bfloat16")


# ---- dtype


@pytest.mark.parametrize("load", [load_policy, load_reward_backbone])
def test_bfloat16_weights_leave_the_rotary_frequencies_alone(load, policy_folder, reward_folder, tmp_path):
    folder = policy_folder if load is load_policy else reward_folder
    tiny = LlamaConfig(vocab_size=259, **{k: v for k, v in TINY.items() if k != "model_type"})
    half = checkpoint(SupervisedPolicy(policy_folder, dtype="bfloat16"), tmp_path / "half.ckpt")
    for source in (TINY, tiny, folder, load(TINY, BYTES), load_policy(policy_folder, BYTES), half):
        if source is half and load is load_policy:
            assert load(source, BYTES, "auto").dtype == torch.bfloat16
        model = load(source, BYTES, "bfloat16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        buffers = dict(model.named_buffers())
        assert buffers and {buffer.dtype for buffer in buffers.values()} == {torch.float32}
        assert_close(buffers["model.rotary_emb.inv_freq"], load_policy(TINY, BYTES).model.rotary_emb.inv_freq, rtol=0, atol=0)


def test_weights_are_not_rounded_on_the_way_through_a_checkpoint(policy_folder, tmp_path):
    # a bfloat16 model trained in float32: its config must not say bfloat16, else the checkpoint would load rounded
    half = load_policy(policy_folder, BYTES, "bfloat16")
    module = disturb(SupervisedPolicy(half, tokenizer=BYTES, dtype="float32"))
    path = checkpoint(module, tmp_path / "last.ckpt")
    for dtype in ("float32", "auto"):
        loaded = load_policy(path, BYTES, dtype)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded(IDS).logits, module.model(IDS).logits)
    assert load_policy(policy_folder, BYTES, "auto").dtype == torch.float32


# ---- dropout


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5},
    "falcon": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "gptj": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "bloom": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.5, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_off_makes_train_mode_deterministic(family):
    model = causal(family, **DROPOUT[family]).train()
    tokens = torch.randint(3, VOCABULARY, (4, 12))

    def drift() -> float:
        return float((model(tokens).logits - model(tokens).logits).detach().abs().max())

    assert drift() > 1e-3
    before = model.config.to_dict()
    turn_dropout_off(model)
    assert drift() == 0
    assert torch.equal(model(tokens).logits, model.eval()(tokens).logits)
    assert model.config.to_dict() == before, "the exported config keeps the model's own settings"


def test_dropout_off_reaches_adapters():
    model = attach_adapter(causal("llama"), {"r": 2, "lora_dropout": 0.5}).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    tokens = torch.randint(3, VOCABULARY, (4, 12))
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    turn_dropout_off(model)
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_eval_mode_restores_each_submodules_own_mode():
    model = causal("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes


# ---- tokenizers


@given(st.text())
def test_bytes_round_trip_any_text(text):
    text = text.encode("utf-8", "replace").decode("utf-8")
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode("utf-8")) and max(ids, default=0) < 256
    assert BYTES.decode([*ids, BYTES.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<eos>", "a <pad> b<bos>", " \t\r\n  x ", "\x00\x7f", "don 't , stop .", "é中😀\ufffd"])
def test_bytes_round_trip_the_awkward_ones_even_when_saved(text, tmp_path):
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (BYTES, load_tokenizer("bytes"), load_tokenizer(tmp_path), copy.deepcopy(BYTES)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(tokenizer) == 259 and len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_bad_tokenizers(policy_folder, tmp_path):
    folder = Path(shutil.copytree(policy_folder, tmp_path / "none"))
    (folder / "tokenizer.json").unlink()
    refuses(lambda: load_tokenizer(folder), "a folder without tokenizer.json", "Save a tokenizer there")
    refuses(lambda: SupervisedPolicy(str(folder)), "a folder without tokenizer.json")
    (folder / "tokenizer.json").write_text("{")
    refuses(lambda: load_tokenizer(folder), "could not be loaded")
    refuses(lambda: load_tokenizer(tmp_path / "absent"), "no such folder")
    refuses(lambda: load_tokenizer("nobody/has-this"), "could not be loaded")
    refuses(lambda: load_tokenizer(tmp_path / "absent.ckpt"), "no such file")
    endless = byte_tokenizer()
    endless.eos_token = None
    refuses(lambda: load_tokenizer(endless), "has no EOS token", "tokenizer.eos_token")


def test_the_tokenizer_of_a_model_source(policy_folder):
    assert tokenizer_source("some/name") == "some/name"
    assert str(tokenizer_source(load_policy(policy_folder, BYTES))) == str(policy_folder)
    for source in (TINY, config("llama"), causal("llama")):
        refuses(lambda source=source: tokenizer_source(source), "model.tokenizer is missing", "'bytes'")


def test_a_missing_padding_token_becomes_eos_in_a_copy():
    own = word_tokenizer(["a"], pad=None)
    loaded = load_tokenizer(own)
    assert loaded.pad_token_id == loaded.eos_token_id == own.eos_token_id
    assert own.pad_token is None
    assert load_tokenizer(BYTES) is BYTES


@pytest.mark.parametrize("unk", ["<unk>", "<eos>", None])
def test_a_distinct_padding_token_is_the_unknown_one_or_a_new_one(unk):
    own = word_tokenizer(["a", "b"], unk=unk, pad=None)
    own.pad_token = own.eos_token
    size = len(own)
    distinct = distinct_pad_token(own)
    assert distinct.pad_token_id not in (None, distinct.eos_token_id)
    assert distinct.pad_token == ("<unk>" if unk == "<unk>" else "<|pad|>")
    assert own.pad_token_id == own.eos_token_id and len(own) == size, "the user's own tokenizer stays as it is"
    assert distinct.eos_token_id == own.eos_token_id and distinct("a b")["input_ids"] == own("a b")["input_ids"]
    model = load_reward_backbone(config("llama", vocab_size=size), distinct)
    assert model.get_input_embeddings().num_embeddings == len(distinct) == model.config.vocab_size
    assert model.config.pad_token_id == distinct.pad_token_id
    assert distinct_pad_token(distinct) is distinct


def test_a_tokenizer_with_a_binary_file_goes_through_a_checkpoint(policy_folder, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    save = tokenizer.save_pretrained

    def with_model(folder):
        save(folder)
        (Path(folder) / "tokenizer.model").write_bytes(b"\x80\xff\x00")

    monkeypatch.setattr(tokenizer, "save_pretrained", with_model)
    files = describe(load_policy(policy_folder, tokenizer), tokenizer)["tokenizer"]
    assert files["tokenizer.model"] == b"\x80\xff\x00" and isinstance(files["tokenizer.json"], str)
    path = checkpoint(SupervisedPolicy(policy_folder, tokenizer=tokenizer), tmp_path / "last.ckpt")
    assert load_tokenizer(path)("hé")["input_ids"] == BYTES("hé")["input_ids"]


# ---- log-probabilities


def batch_of_responses(responses: int = 2, steps: int = 5):
    """Prompts of unequal lengths, padded on the left, and responses of unequal lengths, padded on the right with EOS."""
    rows, prompt_tokens, prompt_mask = left_padded([3, 7, 1])
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([[5, 1], [2, 4], [3, 5]])[:, :responses]
    mask = torch.arange(steps) < lengths.unsqueeze(-1)
    tokens = torch.randint(3, VOCABULARY, mask.shape, generator=generator).masked_fill(~mask, EOS)
    tokens[0, 1, 0] = EOS  # a response that is EOS alone
    return rows, prompt_tokens, prompt_mask, tokens, mask


@torch.no_grad()
def one_at_a_time(model, rows, tokens, mask, temperature):
    """The definition: log softmax over the whole vocabulary, of one unpadded sequence, one token after the other."""
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for i, j in ((i, j) for i in range(len(rows)) for j in range(tokens.shape[1])):
        reply = tokens[i, j][mask[i, j]]
        logits = model(torch.cat([rows[i], reply]).unsqueeze(0), use_cache=False).logits[0]
        logps = (logits.double() / temperature).log_softmax(-1)
        for t, token in enumerate(reply):
            expected[i, j, t] = logps[len(rows[i]) - 1 + t, token]
    return expected


# the others compute a part in float32 whatever their weights are (softmax, rotation, recurrent state)
FLOAT64 = {"llama", "gpt2", "gpt_neox", "qwen2", "gemma", "mistral", "olmo", "opt", "falcon"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", CAUSAL)
def test_log_probabilities_are_those_of_single_unpadded_sequences(family, temperature):
    rows, prompt_tokens, prompt_mask, tokens, mask = batch_of_responses()
    model = causal(family, initializer_range=0.2)
    logps = completion_logps(model, prompt_tokens, prompt_mask, tokens, mask, temperature)
    assert logps.dtype == torch.float32 and logps.requires_grad
    assert (logps[~mask] == 0).all()
    assert_close(logps.double().detach(), one_at_a_time(model, rows, tokens, mask, temperature), rtol=0, atol=1e-5)
    if family in FLOAT64:
        model = model.double()
        logps = completion_logps(model, prompt_tokens, prompt_mask, tokens, mask, temperature)
        assert logps.dtype == torch.float64
        assert_close(logps.detach(), one_at_a_time(model, rows, tokens, mask, temperature), rtol=0, atol=1e-10)


def test_log_probabilities_of_a_half_precision_model_are_float32():
    _, *batch = batch_of_responses()
    logps = completion_logps(causal("llama").to(torch.bfloat16), *batch)
    assert logps.dtype == torch.float32
    coarse = logps[batch[3]].to(torch.bfloat16).float()
    assert not torch.equal(coarse, logps[batch[3]]), "else they were rounded to bfloat16 on the way"


def test_log_probabilities_do_not_read_the_padding():
    _, prompt_tokens, prompt_mask, tokens, mask = batch_of_responses()
    for family in ("llama", "gpt2", "mistral"):
        model = causal(family)
        one = completion_logps(model, prompt_tokens, prompt_mask, tokens, mask)
        other = completion_logps(model, prompt_tokens.masked_fill(~prompt_mask, BOS), prompt_mask, tokens.masked_fill(~mask, PAD), mask)
        assert torch.equal(one, other)


def test_log_probabilities_of_all_tokens_sum_to_one():
    model, prompt = causal("llama").double(), torch.tensor([[5, 6, 7]])
    every = torch.arange(VOCABULARY).view(1, -1, 1)
    logps = completion_logps(model, prompt, torch.ones_like(prompt, dtype=torch.bool), every, torch.ones_like(every, dtype=torch.bool), 1.7)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_log_probabilities_through_an_adapter():
    rows, *batch = batch_of_responses()
    model = attach_adapter(causal("llama"), {"r": 2}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert_close(completion_logps(model, *batch).double(), one_at_a_time(model, rows, batch[2], batch[3], 1.0), rtol=0, atol=2e-5)


# ---- scores


CLASSIFIERS = ["llama", "gpt2", "gpt_neox", "qwen2", "gemma2", "mistral", "opt", "bloom", "falcon", "mixtral"]


def classifier(family: str, pad: int = EOS):
    tokenizer = word_tokenizer([f"w{i}" for i in range(VOCABULARY - 3)])
    torch.manual_seed(0)
    model = load_reward_backbone(config(family), tokenizer).eval()
    model.config.pad_token_id = pad
    return model


def right_padded(value: int, lengths=(4, 9, 1, 6)):
    generator = torch.Generator().manual_seed(4)
    rows = [torch.cat([torch.randint(3, VOCABULARY, (length,), generator=generator), torch.tensor([EOS])]) for length in lengths]
    tokens, mask = torch.full((len(rows), max(lengths) + 1), value), torch.zeros(len(rows), max(lengths) + 1, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return rows, tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_a_padded_batch_equal_those_of_each_row_alone(family):
    model = classifier(family)
    rows, tokens, mask = right_padded(EOS)
    alone = torch.cat([sequence_scores(model, row.unsqueeze(0), torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    assert_close(sequence_scores(model, tokens, mask), alone, rtol=0, atol=1e-5)
    # by hand: the head on the hidden state of the row's last token
    hand = torch.cat([model.score(getattr(model, model.base_model_prefix)(row.unsqueeze(0)).last_hidden_state[0, -1]) for row in rows])
    assert_close(alone, hand, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_final_eos_changes_the_score_even_where_it_is_the_padding_id(family):
    model = classifier(family, pad=EOS)
    tokens = torch.tensor([[5, 6, 7, EOS], [5, 6, 7, EOS]])
    with_eos, without = sequence_scores(model, tokens, torch.tensor([[True] * 4, [True, True, True, False]]))
    assert abs(float(with_eos - without)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_equal_transformers_own_where_the_padding_id_is_distinct(family):
    model = classifier(family, pad=PAD)
    _, tokens, mask = right_padded(PAD)
    assert_close(sequence_scores(model, tokens, mask), model(tokens, attention_mask=mask.long()).logits[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_scores_of_an_encoder_are_its_own():
    made = BertConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(made).eval()
    _, tokens, mask = right_padded(PAD)
    assert_close(sequence_scores(model, tokens, mask), model(tokens, attention_mask=mask.long()).logits[:, 0])


@torch.no_grad()
def test_scores_are_float32_at_least_and_keep_float64():
    _, tokens, mask = right_padded(PAD)
    model = classifier("llama")
    half = copy.deepcopy(model).to(torch.bfloat16)
    scores = sequence_scores(half, tokens, mask)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.to(torch.bfloat16).float()), "the head computed in float32"
    exact = sequence_scores(copy.deepcopy(model).double(), tokens, mask)
    assert exact.dtype == torch.float64
    assert_close(sequence_scores(model, tokens, mask).double(), exact, rtol=0, atol=1e-4)


def test_a_trained_head_gets_its_gradient_through_an_adapter():
    model = attach_adapter(classifier("llama"), {"r": 2})
    _, tokens, mask = right_padded(PAD)
    sequence_scores(model, tokens, mask).sum().backward()
    head = unwrapped(model).score.modules_to_save["default"].weight
    assert head.grad is not None and head.grad.abs().sum() > 0
