"""DirectPreferencePolicy: the loss of its equation, the reference where it belongs, and a preference with a known answer that is learnt."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from processes import on_two
from tiny import GPT2, LLAMA, KeepAll, Recorder, equal, letters, preferences, trainer, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from p3o_lightning import DirectPreferencePolicy, InputError, PairwisePolicy, PreferenceDataModule
from p3o_lightning.baselines import direct_preference_loss
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.direct import pair_logps
from p3o_lightning.models import load_policy, read_checkpoint


def policy(**settings) -> DirectPreferencePolicy:
    torch.manual_seed(0)
    return DirectPreferencePolicy(**{"model": LLAMA, "tokenizer": letters(), "lr": 1e-2, **settings})


def data(folder, batch_size=4, **options) -> PreferenceDataModule:
    options = {"val_fraction": 0.25, "length_grouped": False, **options}
    return PreferenceDataModule(str(preferences(folder, 24)), batch_size=batch_size, **options)


def batches(folder, **options):
    module = data(folder, tokenizer=letters(), view="pairs", **options)
    module.setup("fit")
    return list(module.train_dataloader())


# ---- the loss


def by_hand(model, batch, loss_type, beta, smoothing, reference):
    """Every response read alone behind its prompt, in float64; each pair's loss written out."""
    total = 0.0
    for tokens, attention, lengths in zip(batch.tokens, batch.attention_mask, batch.response_lengths, strict=True):
        gained = []
        for row, real, length in zip(tokens, attention, lengths.tolist(), strict=True):
            ids = row[real]
            sums = []
            for judge in (model, reference):
                table = judge(ids[None]).logits[0].log_softmax(-1)
                sums.append(sum(table[place - 1, ids[place]] for place in range(len(ids) - length, len(ids))))
            gained.append((sums[0] - sums[1].detach(), length))
        (better, of_better), (worse, of_worse) = gained
        if loss_type == "ipo":
            total = total + (better / of_better - worse / of_worse - 1 / (2 * beta)) ** 2
        else:
            belief = 1 / (1 + torch.exp(-beta * (better - worse)))
            total = total - (1 - smoothing) * torch.log(belief) - smoothing * torch.log(1 - belief)
    return total / len(batch.tokens)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"loss_type": "ipo"}, {"beta": 0.7}, {"model": GPT2}], ids=str)
def test_loss_and_gradient_are_those_of_the_equation(settings, tmp_path):
    module = policy(**settings)
    reference = copy.deepcopy(module.reference).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in module.model.parameters():
            value += 0.05 * torch.randn_like(value)
    batch = batches(tmp_path)[0]
    assert len(set(batch.response_lengths.flatten().tolist())) > 2  # of several lengths, so padded
    double = copy.deepcopy(module.model).double()
    wanted = by_hand(double, batch, module.loss_type, module.beta, module.label_smoothing, reference)
    wanted.backward()
    found = module.loss(batch).loss
    found.backward()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for (name, ours), theirs in zip(module.model.named_parameters(), double.parameters(), strict=True):
        assert theirs.grad.abs().max() > 1e-6, name
        assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)


def test_by_numbers():
    """u = (2, -1) nats, beta 1/2: z = 3/2. Averaged over 2 and 1 tokens: 1 + 1 - 1 / (2 / 2) = 1."""
    logps, ref = torch.tensor([[1.0, -3.0]]).double(), torch.tensor([[-1.0, -2.0]]).double()
    lengths = torch.tensor([[2, 1]])
    terms = direct_preference_loss(logps, ref, lengths, beta=0.5)
    assert float(terms.loss) == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert [float(value) for value in terms[1:]] == [1.0, -0.5, 1.0, 1.5]
    smoothed = direct_preference_loss(logps, ref, lengths, beta=0.5, label_smoothing=0.25)
    assert float(smoothed.loss) == pytest.approx(0.75 * math.log(1 + math.exp(-1.5)) + 0.25 * math.log(1 + math.exp(1.5)))
    assert float(direct_preference_loss(logps, ref, lengths, beta=0.5, loss_type="ipo").loss) == pytest.approx(1.0)
    assert float(direct_preference_loss(ref, ref, lengths).accuracy) == 0.5  # a tie
    with pytest.raises(InputError, match="loss_type is 'hinge'"):
        direct_preference_loss(logps, ref, lengths, loss_type="hinge")


def test_the_gradient_of_a_pair_pushes_both_responses_apart_by_one_factor():
    """-beta sigmoid(-beta h) (s_1 - s_2), by finite differences."""
    logps, ref = torch.tensor([[0.3, -0.9], [2.0, 1.0]]).double(), torch.tensor([[-0.5, 0.4], [1.0, 2.5]]).double()
    lengths, step = torch.ones(2, 2, dtype=torch.long), 1e-6
    for pair in range(2):
        for side, sign in ((0, 1), (1, -1)):
            ends = []
            for move in (step, -step):
                moved = logps.clone()
                moved[pair, side] += move
                ends.append(float(direct_preference_loss(moved, ref, lengths, beta=0.7).loss) * 2)
            lead = float((logps - ref)[pair] @ torch.tensor([1.0, -1.0]).double())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(-sign * 0.7 / (1 + math.exp(0.7 * lead)), rel=1e-6)


def test_before_the_first_step_policy_and_reference_are_equal(tmp_path):
    for settings in ({}, {"model": GPT2}, {"peft_config": {"r": 2, "lora_dropout": 0.1}}):
        module = policy(**settings)
        assert module.model.training
        terms = module.loss(batches(tmp_path)[0])
        assert float(terms.loss) == pytest.approx(math.log(2), rel=1e-6)
        assert float(terms.margin) == 0 and float(terms.accuracy) == 0.5, settings


# ---- training: "a" is preferred


@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "ipo"}, {"label_smoothing": 0.1}, {"peft_config": {"r": 4, "lora_alpha": 16}}], ids=str
)
def test_the_preferred_letter_is_learnt(settings, tmp_path):
    module, recorder = policy(**settings), Recorder()
    frozen = weights(policy(**settings).reference)
    run = trainer(tmp_path, max_steps=60, logger=recorder, log_every_n_steps=1)
    run.fit(module, data(tmp_path))
    first, last = recorder.rows[0][1], {name: float(value) for name, value in run.callback_metrics.items()}
    assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    assert names | {f"val/{name}" for name in names} <= last.keys()
    assert last["val/rewards/accuracies"] == 1 and last["val/rewards/margins"] > 0.1  # prompts that were not trained on
    assert last["val/rewards/margins"] == pytest.approx(last["val/rewards/chosen"] - last["val/rewards/rejected"], abs=1e-5)
    if not settings.get("peft_config"):
        assert equal(weights(module.reference), frozen)
        shares = [answers_with_a(stage, tmp_path) for stage in (policy(**settings), module)]
        assert shares[0] < 0.1 and shares[1] > (0.25 if settings else 0.6), shares  # the others settle at a smaller lead


def answers_with_a(module, folder) -> float:
    """Share of the sampled responses that begin with "a"."""
    texts = [row["responses"][0] for batch in trainer(folder).predict(module, data(folder)) for row in batch]
    return sum(text.startswith("a") for text in texts) / len(texts)


def test_validation_and_test_count_every_pair_once(tmp_path):
    module = policy()
    with torch.no_grad():
        module.reference.lm_head.weight += 0.1 * torch.randn_like(module.reference.lm_head.weight)
    whole, parts = (
        trainer(tmp_path).validate(module, data(tmp_path, batch_size=size), verbose=False)[0] for size in (6, 4)
    )  # 6 pairs: one batch, or 4 and 2
    assert whole == pytest.approx(parts, rel=1e-5) and whole["val/rewards/margins"] != 0
    with torch.no_grad():
        module.model.lm_head.weight += 0.1 * torch.randn_like(module.model.lm_head.weight)
    held_out = data(tmp_path, batch_size=6, tokenizer=letters(), view="pairs")
    (again,) = trainer(tmp_path).validate(module, held_out, verbose=False)
    (batch,) = held_out.val_dataloader()
    assert again["val/rewards/margins"] == pytest.approx(float(module.loss(batch).margin), rel=1e-5)  # nothing is left of the first time
    (tested,) = trainer(tmp_path).test(module, data(tmp_path), verbose=False)
    assert {name.replace("val/", "test/") for name in whole} == tested.keys()


# ---- checkpoints, export, several processes


@pytest.mark.parametrize("settings", [{}, {"peft_config": {"r": 2}}], ids=str)
def test_every_checkpoint_resumes_to_the_bit(settings, tmp_path):
    def run(ckpt_path=None, callbacks=()):
        module = policy(**settings)
        torch.manual_seed(5)
        trainer(tmp_path, max_epochs=2, callbacks=list(callbacks)).fit(module, data(tmp_path), ckpt_path=ckpt_path)
        return module

    keeper = KeepAll(tmp_path / "kept")
    whole = run(callbacks=[keeper])
    assert len(keeper.kept) >= 8 and not equal(weights(whole), weights(policy(**settings)))
    for checkpoint in keeper.kept:
        again = run(checkpoint)
        assert equal(weights(again), weights(whole)), checkpoint.name
        assert equal(weights(again.reference), weights(whole.reference))


def saved(tmp_path, **settings):
    module = policy(**settings)
    trainer(tmp_path, max_steps=3, callbacks=[LastCheckpoint()]).fit(module, data(tmp_path))
    return module, tmp_path / "checkpoints" / "last.ckpt"


def test_checkpoint_and_export_are_the_policy(tmp_path):
    module, path = saved(tmp_path)
    assert all(name.startswith("model.") for name in read_checkpoint(path)["state_dict"])
    loaded = DirectPreferencePolicy.load_from_checkpoint(path, reference=policy().model)
    assert equal(weights(loaded), weights(module))
    batch = batches(tmp_path)[0]
    assert torch.equal(loaded.loss(batch).loss, module.loss(batch).loss)
    folder = module.export(tmp_path / "export")
    assert "AutoModelForCausalLM" in (folder / "README.md").read_text()
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert equal(exported.state_dict(), module.model.state_dict())
    assert equal(load_policy(str(path), letters()).state_dict(), module.model.state_dict())
    PairwisePolicy(str(path), tokenizer=letters())  # a stage of its own may follow


def test_another_reference_than_the_checkpoints_is_refused(tmp_path):
    _, path = saved(tmp_path)
    torch.manual_seed(7)
    other = DirectPreferencePolicy(LLAMA, tokenizer=letters())
    with pytest.raises(InputError, match=r"model.reference differs from the one"):
        trainer(tmp_path, max_steps=4).fit(other, data(tmp_path), ckpt_path=path)


def test_a_reference_of_its_own_is_used(tmp_path):
    torch.manual_seed(3)
    other = DirectPreferencePolicy(LLAMA, tokenizer=letters()).model
    module, batch = policy(reference=other), batches(tmp_path)[0]
    wanted = direct_preference_loss(pair_logps(module.model, batch), pair_logps(other, batch), batch.response_lengths)
    assert_close(module.loss(batch).loss, wanted.loss)
    assert float(wanted.margin) != 0


def train_on_two(root, strategy, devices, batch_size):
    module = policy(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.3), model={**LLAMA, "num_hidden_layers": 2})
    run = trainer(root, strategy=strategy, devices=devices, max_epochs=2, callbacks=[LastCheckpoint()])
    run.fit(module, data(root, batch_size=batch_size))
    figures = {name: float(value) for name, value in run.callback_metrics.items()}
    return read_checkpoint(root / "checkpoints" / "last.ckpt")["state_dict"], figures


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(strategy, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone, figures = train_on_two(tmp_path / "one", "auto", 1, 4)
    together, theirs = on_two(tmp_path, train_on_two, tmp_path / "two", strategy, 2, 2)[0]
    for name, value in alone.items():
        assert_close(together[name], value, rtol=0, atol=1e-5)
    assert theirs == pytest.approx(figures, abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_starts_at_margin_zero_and_stays_finite(precision, tmp_path):
    recorder = Recorder()
    module = policy()
    trainer(tmp_path, max_steps=4, precision=precision, logger=recorder, log_every_n_steps=1).fit(module, data(tmp_path))
    updates = [row for _, row in recorder.rows if "loss" in row]
    assert updates[0]["rewards/margins"] == 0 and updates[-1]["rewards/margins"] != 0
    assert all(math.isfinite(value) for row in updates for value in row.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge"}, "model.loss_type is 'hinge': choose sigmoid or ipo"),
        ({"beta": 0.0}, "model.beta is 0.0: choose a price above 0"),
        ({"label_smoothing": 0.5}, "model.label_smoothing is 0.5: choose the share of wrong labels"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "model.label_smoothing is 0.1: choose 0, since ipo reads none"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        policy(**settings)
