"""Loading from every kind of source, and what is refused and why.

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
from families import config, word_tokenizer
from saved_models import BYTES, IDS, TINY, checkpoint, disturb, refuses, saved
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig

from p3o_lightning import PairwisePolicy, RewardModel, SupervisedPolicy
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import eval_mode
from p3o_lightning.models import attach_adapter, load_policy, load_reward_backbone, read_checkpoint
from p3o_lightning.tokenizers import load_tokenizer

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
