"""What the three stages share: checkpoints that are complete on their own, exports that transformers loads; and how they compose."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny import LETTERS, LLAMA, PROMPTS, collate, equal, letters, policy, preferences, prompts, share_of_a, trainer, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from p3o_lightning import InputError, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.forwards import is_adapted, sequence_scores

IDS = torch.tensor([[0, 1, 2, 8], [3, 4, 5, 6]])
LORA = {"r": 2, "lora_alpha": 8}


def stage(owner, **settings):
    torch.manual_seed(0)
    if owner is PairwisePolicy:
        settings = {"reward_funcs": share_of_a, "max_completion_length": 5, **settings}
    return owner(LLAMA, tokenizer=letters(), lr=1e-2, **settings)


def trained(owner, root, **settings):
    """A few updates, and the checkpoint that they left."""
    module = stage(owner, **settings)
    data = PreferenceDataModule(str(preferences(root)), batch_size=4, max_length=16)
    trainer(root, max_steps=3, callbacks=[LastCheckpoint()]).fit(module, data)
    return module, root / "checkpoints" / "last.ckpt"


STAGES = [SupervisedPolicy, RewardModel, PairwisePolicy]


@pytest.mark.parametrize("owner", STAGES)
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_checkpoint_loads_on_its_own(owner, peft_config, tmp_path):
    module, path = trained(owner, tmp_path, peft_config=peft_config)
    again = owner.load_from_checkpoint(path)
    assert equal(weights(again), weights(module)) and type(again) is owner
    assert is_adapted(again.model) == (peft_config is not None) and again.model.training
    assert again.tokenizer("bad")["input_ids"] == [1, 0, 3] and again.tokenizer.eos_token_id == 8
    assert again.lr == module.lr
    assert owner.load_from_checkpoint(path, lr=0.5).lr == 0.5
    for other in STAGES:
        if other is not owner:
            with pytest.raises(InputError, match=rf"holds a {owner.__name__}, not a {other.__name__}: use {owner.__name__}.load_from"):
                other.load_from_checkpoint(path)


@pytest.mark.parametrize("owner", STAGES)
def test_a_checkpoint_is_a_model_source(owner, tmp_path):
    module, path = trained(owner, tmp_path)
    settings = {} if owner is RewardModel else {"reward_funcs": share_of_a}
    again = (RewardModel if owner is RewardModel else PairwisePolicy)(str(path), **settings)
    assert equal(weights(again.model), weights(module.model))


def test_files_that_are_no_checkpoint_of_ours_are_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"text.ckpt"):
        SupervisedPolicy.load_from_checkpoint(tmp_path / "text.ckpt")
    with pytest.raises(InputError, match=r"is not a checkpoint of p3o_lightning"):
        SupervisedPolicy.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"missing.ckpt"):
        SupervisedPolicy.load_from_checkpoint(tmp_path / "missing.ckpt")


def test_another_codes_checkpoint_is_not_resumed(tmp_path):
    module = stage(SupervisedPolicy)
    with pytest.raises(InputError, match=r"ckpt_path is a checkpoint of other code, but SupervisedPolicy is to be resumed"):
        module.on_load_checkpoint({"state_dict": {}})


def test_objects_stay_out_of_the_hyperparameters(tmp_path):
    module = policy(reward_funcs=[share_of_a], optimizer=torch.optim.SGD, reference=stage(SupervisedPolicy).model)
    assert {"reward_funcs", "optimizer", "tokenizer", "reference"}.isdisjoint(module.hparams)
    assert module.hparams["kl_coef"] == 0.05 and module.hparams["model"] == LLAMA
    assert not any("reference" in name for name in module.state_dict())


# ---- export


@pytest.mark.parametrize("owner", STAGES)
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_an_export_gives_equal_outputs_in_transformers(owner, peft_config, tmp_path):
    module, _ = trained(owner, tmp_path, peft_config=peft_config)
    before, modes = weights(module), [part.training for part in module.modules()]
    folder = module.export(tmp_path / "export")
    assert equal(weights(module), before) and [part.training for part in module.modules()] == modes
    assert is_adapted(module.model) == (peft_config is not None)

    model, tolerance = module.model.eval(), 0 if peft_config is None else 1e-5
    if owner is RewardModel:
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        ours = sequence_scores(model, IDS, torch.ones_like(IDS).bool())
        assert_close(loaded(IDS).logits.squeeze(-1), ours, rtol=0, atol=1e-5)
        assert loaded.config.pad_token_id == 9
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=tolerance)
        generation = GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == 8 and generation.pad_token_id == 9
        reply = loaded.generate(torch.tensor([[0, 1]]), max_new_tokens=5, do_sample=False)
        assert reply.shape[1] <= 7
    assert AutoTokenizer.from_pretrained(folder)("bad")["input_ids"] == [1, 0, 3]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and f"# {owner.__name__} trained with p3o_lightning" in card
    assert "3 updates" in card and not any(path.suffix in (".bin", ".pt", ".partial") for path in tmp_path.rglob("export*/*"))


def test_the_generation_config_keeps_a_models_other_ends(tmp_path):
    module = stage(SupervisedPolicy)
    module.model.generation_config.eos_token_id = [7, 8]
    module.export(tmp_path / "export")
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == [7, 8]
    module.model.generation_config.eos_token_id, module.model.generation_config.pad_token_id = 7, None
    module.export(tmp_path / "export")
    config = GenerationConfig.from_pretrained(tmp_path / "export")
    assert config.eos_token_id == 8 and config.pad_token_id == 9
    assert module.model.generation_config.eos_token_id == 7


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    module = stage(SupervisedPolicy)
    folder = module.export(tmp_path / "deep" / "export")
    with torch.no_grad():
        module.model.lm_head.weight.add_(1)
    module.export(folder)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, module.model.lm_head.weight)
    mine = tmp_path / "thesis"
    mine.mkdir()
    module.export(mine)  # empty: nothing is lost
    other = tmp_path / "photos"
    other.mkdir()
    (other / "README.md").write_text("my photos")
    for taken in (other, other / "README.md", tmp_path):
        with pytest.raises(InputError, match=r"export.dirpath is .* which is no earlier export"):
            module.export(taken)
    assert (other / "README.md").read_text() == "my photos"


def test_an_export_that_fails_leaves_the_former_one_whole(tmp_path, monkeypatch):
    module = stage(SupervisedPolicy)
    folder = module.export(tmp_path / "export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_space(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.tokenizer, "save_pretrained", no_space)
    with torch.no_grad():
        module.model.lm_head.weight.add_(1)
    with pytest.raises(InputError, match=r"export.dirpath is .* \(No space left on device\): make room there"):
        module.export(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and [path.name for path in tmp_path.iterdir()] == [
        "export"
    ]


# ---- composition


def test_one_data_module_serves_the_three_stages_and_a_reward_object_serves_the_policy(tmp_path):
    def brevity(prompts, completions, completion_ids, **columns):
        assert len(prompts) == len(completions) == len(completion_ids)
        return [-0.1 * len(ids) for ids in completion_ids]

    data = PreferenceDataModule(str(preferences(tmp_path, rows=32)), batch_size=8, max_length=16)
    sft = stage(SupervisedPolicy)
    trainer(tmp_path, max_steps=5).fit(sft, data)
    reward = stage(RewardModel)
    trainer(tmp_path, max_steps=60).fit(reward, data)
    learned = weights(reward)
    module = PairwisePolicy(
        copy.deepcopy(sft.model),
        reward_funcs=[reward, brevity],
        reward_weights=[1.0, 0.5],
        tokenizer=sft.tokenizer,
        max_completion_length=5,
        kl_coef=0.01,
        lr=2e-2,
    )
    before = module.rollout_step(collate(PROMPTS * 4))
    assert_close(before.scores, module.rollout_rewards["RewardModel"] + 0.5 * module.rollout_rewards["brevity"])
    run = trainer(tmp_path, max_steps=40)
    run.fit(module, data)
    after = module.rollout_step(collate(PROMPTS * 4))
    assert after.scores.mean() > before.scores.mean() + 0.5
    assert {"rewards/RewardModel/mean", "rewards/brevity/mean"} <= run.callback_metrics.keys()
    assert equal(weights(reward), learned)
    trainer(tmp_path, max_steps=2).fit(stage(RewardModel), data)  # and back again
    assert data.report is not None and data.report.usable == 32


def test_a_users_own_module_of_prompts_in_the_users_own_trainer(tmp_path):
    """Without our data module: a list of texts, a tokenizer, a function."""
    module = policy(peft_config=LORA)
    trainer(tmp_path, max_steps=2).fit(module, train_dataloaders=module.wrap_train_dataloader(prompts(6, shuffle=True)))
    assert json.dumps(dict(module.hparams)) and set(LETTERS) >= set("".join(PROMPTS))


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 1e-3), ("16-mixed", 1e-3)])
@pytest.mark.parametrize("clip", [None, 1e-9])
def test_the_default_optimizer_is_adamw_and_its_gradients_are_clipped(clip, precision, tolerance, tmp_path):
    """As PyTorch's loop over the weights; clipped to less than Adam's epsilon of 1e-8, an update is a fraction of the learning rate."""

    def moved(**settings):
        module = stage(RewardModel, **settings)
        before = weights(module)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        flags = {"plugins": [MixedPrecision(precision, "cpu", scaler)]} if precision == "16-mixed" else {"precision": precision}
        run = trainer(tmp_path, max_steps=3, gradient_clip_val=clip, **flags)
        run.fit(module, PreferenceDataModule(str(preferences(tmp_path)), batch_size=4, max_length=16))
        return {name: value - before[name] for name, value in weights(module).items()}

    plain = moved(optimizer=lambda given: torch.optim.AdamW(given, 1e-2, betas=(0.9, 0.95), weight_decay=0.0, foreach=False, fused=False))
    default = moved()
    largest = max(float(value.abs().max()) for value in plain.values())
    assert 0 < largest < 5e-3 if clip else largest > 2e-2
    for name, value in plain.items():
        assert_close(default[name], value, rtol=0, atol=tolerance)
