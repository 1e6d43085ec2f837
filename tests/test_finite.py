"""FiniteGuard: what is not finite is named and saved, and no update is made of it; where all is finite, training is the same."""

from __future__ import annotations

import copy
import json
import math
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from running import p3o, scalars  # noqa: F401
from tiny import GPT2, LLAMA, Recorder, equal, letters, policy, preferences, prompts, trainer, weights
from torch.optim import AdamW

from p3o_lightning import PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.batches import Experience
from p3o_lightning.callbacks import FiniteGuard, LastCheckpoint, search
from p3o_lightning.callbacks import finite as guards
from p3o_lightning.errors import InputError, Stopped
from p3o_lightning.packing import set_attention

LAYER = "model.model.layers.0.mlp.down_proj"
DECAYING = lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.1)  # noqa: E731  (a skipped update must not decay either)


class Plant(L.Callback):
    """Spoils something at the given updates. It goes by the step, not by a count of calls, so that a batch run again is spoilt again."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_fit_start(self, trainer, pl_module):
        self.now = lambda: torch.is_grad_enabled() and trainer.global_step in self.steps
        if hasattr(pl_module, "rows_apart"):
            set_attention(pl_module.model, "eager")  # as `fit` below
        self.plant(pl_module)

    def plant(self, pl_module):
        raise NotImplementedError


class InOutput(Plant):
    """A value in one row (of a policy: one response, two a prompt) of a layer's output, in training_step."""

    def __init__(self, *steps, row=2, value=math.nan, name=LAYER):
        super().__init__(*steps)
        self.row, self.value, self.name = row, value, name

    def plant(self, pl_module):
        def spoil(module, given, output):
            if not self.now():
                return output
            spoilt = output.clone()
            spoilt[self.row] = self.value
            return spoilt

        pl_module.get_submodule(self.name).register_forward_hook(spoil)


class InOutputGradient(Plant):
    """NaN in one row of the gradient of a layer's output."""

    def plant(self, pl_module):
        def spoil(gradient):
            spoilt = gradient.clone()
            spoilt[2] = math.nan
            return spoilt

        def watch(module, given, output):
            if self.now():
                output.register_hook(spoil)

        pl_module.get_submodule(LAYER).register_forward_hook(watch)


class InWeightGradient(Plant):
    """NaN in the gradient of one weight."""

    def plant(self, pl_module):
        weight = pl_module.get_submodule("model.model.layers.0.self_attn.q_proj").weight
        weight.register_hook(lambda gradient: gradient * math.nan if pl_module.global_step in self.steps else gradient)


class InReference(Plant):
    """A weight of the frozen reference turns NaN after an update, for one rollout or for good."""

    def __init__(self, *steps, again=False):
        super().__init__(*steps)
        self.again = again

    def plant(self, pl_module):
        pass

    def on_train_batch_end(self, trainer, pl_module, *_):
        weight = pl_module.reference.get_submodule(LAYER.removeprefix("model.")).weight
        if trainer.global_step in self.steps:
            self.former = weight.data[0, 0].clone()
            weight.data[0, 0] = math.nan
        elif self.again and hasattr(self, "former"):
            weight.data[0, 0] = self.former


class Watch(L.Callback):
    """Weights and optimizer state after every batch."""

    def on_fit_start(self, trainer, pl_module):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.seen.append((weights(pl_module), {f"{i}.{name}": value for i, slots in state.items() for name, value in slots.items()}))

    def moved(self):
        """Whether each batch after the first moved (weights, optimizer state)."""
        return [(not equal(former[0], now[0]), not equal(former[1], now[1])) for former, now in zip(self.seen, self.seen[1:], strict=False)]


def fit(root, *callbacks, module=None, ckpt_path=None, settings=None, attention="eager", **flags):
    """Two updates a rollout, of two prompts (four responses) each; "eager" attention is not packed, so that they are four rows."""
    module = module or policy(micro_batch_size=2, **(settings or {}))
    set_attention(module.model, attention)
    run = trainer(root, callbacks=list(callbacks), **{"max_steps": 6, **flags})
    run.fit(module, module.wrap_train_dataloader(prompts()), ckpt_path=ckpt_path)
    return module, run


def stops(root, *callbacks, **settings):
    """The message of a run that stops, the saved batch, and the module as it was left."""
    module = settings.pop("module", None) or policy(micro_batch_size=2, **settings.pop("settings", {}))
    with pytest.raises(Stopped) as stop:
        fit(root, *callbacks, FiniteGuard(), module=module, **settings)
    message = str(stop.value)
    assert "\n" not in message and not stop.value.save
    (path,) = (Path(root) / "nonfinite").iterdir()
    assert message.endswith(f"The batch is in {path}")
    return message, torch.load(path, weights_only=True), module


def texts(saved):
    batch = Experience(**saved["batch"])
    return [letters().decode(batch.prompt_tokens[row][batch.prompt_mask[row]]) for row in saved["rows"]]


def loss_of(module, saved):
    """The training_step of the saved batch."""
    module.log = module.log_dict = lambda *_, **__: None
    module.micro_batch = None
    return module.training_step(Experience(**saved["batch"]), saved["batch_idx"])


# ---- what is found, and how it is named


def test_a_log_probability_of_the_policy(tmp_path):
    message, saved, module = stops(tmp_path, InOutput(3))
    assert saved["quantity"] == "policy log-probability" and saved["rows"] == [1] and saved["module"] == LAYER
    assert (saved["step"], saved["batch_idx"], saved["rank"]) == (3, 3, 0)
    (prompt,) = texts(saved)
    assert message.startswith(
        f"step 3, batch 3: policy log-probability is nan in row 1 (prompt {prompt!r}), first in module {LAYER}; no update was made of it. "
        "Lower model.lr, set trainer.gradient_clip_val to 1"
    )
    assert loss_of(module, saved).isnan()  # the file reproduces it
    assert equal(weights(module), weights(fit(tmp_path / "before", max_steps=3)[0]))


class InEmbedding(L.Callback):
    """The embedding of one letter turns NaN in an update."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            self.letter = int(batch.prompt_tokens[1][batch.prompt_mask[1]][-1])
            pl_module.model.get_input_embeddings().weight.data[self.letter] = math.nan


def test_texts_that_are_packed_are_told_apart(tmp_path):
    plant = InEmbedding()
    _, saved, module = stops(tmp_path, plant, attention="sdpa")
    batch = Experience(**saved["batch"])
    tokens = torch.cat([batch.prompt_tokens.unsqueeze(1).expand(-1, 2, -1), batch.completion_tokens[..., :-1]], -1)
    mask = torch.cat([batch.prompt_mask.unsqueeze(1).expand(-1, 2, -1), batch.completion_mask[..., 1:]], -1)  # the last is not read
    spoilt = ((tokens == plant.letter) & mask).any(-1).any(-1)
    assert saved["rows"] == spoilt.nonzero().flatten().tolist() and 1 in saved["rows"]
    assert saved["module"] == "model.model.embed_tokens" and module.model.config._attn_implementation == "p3o_packed"


def test_a_rollout_is_looked_at_before_the_start_up_proofs_stumble_over_it(tmp_path):
    class InReferenceOutput(InOutput):
        """A row of what a layer of the reference gives, from the start."""

        def plant(self, pl_module):
            pl_module.reference.model.layers[0].mlp.down_proj.register_forward_hook(self.spoil)

        def spoil(self, module, given, output):
            return output.index_fill(0, torch.tensor([2]), math.nan)

    _, saved, _ = stops(tmp_path, InReferenceOutput())
    assert (saved["step"], saved["quantity"], saved["rows"]) == (0, "reference log-probability", [1])
    assert saved["module"] == "reference.model.layers.0.mlp.down_proj"


class InSampling(Plant):
    """A layer's output turns NaN in the last row while a rollout is drawn and scored."""

    def plant(self, pl_module):
        def spoil(module, given, output):
            if torch.is_grad_enabled() or pl_module.global_step not in self.steps or output.shape[0] == 1:
                return output
            spoilt = output.clone()
            spoilt[-1] = math.nan
            return spoilt

        pl_module.get_submodule(LAYER).register_forward_hook(spoil)


def test_a_policy_that_gives_no_numbers_while_it_samples(tmp_path):
    message, saved, _ = stops(tmp_path, InSampling(2))
    assert saved["quantity"] == "policy log-probability" and saved["module"] == LAYER
    assert message.startswith("step 2, batch 2: ") and 1 in saved["rows"]


def test_without_a_guard_sampling_stops_by_itself(tmp_path):
    with pytest.raises(InputError, match="model gives logits that are not finite"):
        fit(tmp_path, InSampling(2))


def test_an_infinity_is_told_from_nan(tmp_path):
    _, saved, _ = stops(tmp_path, InOutput(1, row=0, value=-math.inf, name="model.model.embed_tokens"))
    assert saved["module"] == "model.model.embed_tokens" and saved["rows"] == [0]


def test_a_log_probability_of_the_reference(tmp_path):
    message, saved, module = stops(tmp_path, InReference(2))
    assert saved["quantity"] == "reference log-probability" and saved["rows"] == [0, 1] and saved["step"] == 2
    assert saved["module"] == "reference.model.layers.0.mlp.down_proj"
    assert "in rows 0, 1 (prompt " in message and "model.reference" in message
    assert Experience(**saved["batch"]).ref_token_logps.isnan().any() and loss_of(module, saved).isnan()
    assert equal(weights(module), weights(fit(tmp_path / "before", max_steps=2)[0]))


def judge():
    """A reward model that cannot judge a text with an "h"."""
    torch.manual_seed(1)
    model = RewardModel(LLAMA, tokenizer=letters())
    model.model.get_input_embeddings().weight.data[letters().convert_tokens_to_ids("h")] = math.nan
    return model


def test_a_reward_of_a_network(tmp_path):
    with pytest.warns(UserWarning, match=r"reward 'RewardModel' gave \d of 8 responses a score that is NaN"):
        message, saved, module = stops(tmp_path, settings={"reward_funcs": [judge(), lambda completions, **_: [1.0] * len(completions)]})
    batch = Experience(**saved["batch"])
    h = letters().convert_tokens_to_ids("h")
    spoilt = ((batch.prompt_tokens == h) & batch.prompt_mask).any(1) | ((batch.completion_tokens == h) & batch.completion_mask).any((1, 2))
    assert saved["quantity"] == "reward" and saved["source"] == "RewardModel" and saved["module"] == "reward.model.embed_tokens"
    assert saved["rows"] == spoilt.nonzero().flatten().tolist() == batch.scores.isnan().any(1).nonzero().flatten().tolist()
    assert "reward 'RewardModel' is nan in row" in message and "model.reward_funcs" in message
    assert loss_of(module, saved).isnan()


def test_a_loss(tmp_path):
    class Spoilt(PairwisePolicy):
        """Its loss is infinite at update 2, from finite log-probabilities."""

        def loss(self, token_logps, batch):
            terms = super().loss(token_logps, batch)
            return terms._replace(loss=terms.loss + (math.inf if self.trainer.global_step == 2 else 0))

    message, saved, _ = stops(tmp_path, module=policy(Spoilt, micro_batch_size=2))
    assert (saved["quantity"], saved["value"], saved["rows"]) == ("loss", "inf", [])
    assert "batch 2: loss is inf, first in module none: every module's output is finite, the loss itself is not" in message


@pytest.mark.parametrize(
    ("plant", "value", "rows", "module"),
    [(InOutputGradient(3), "nan", [1], LAYER), (InWeightGradient(3), "nan", [], "model.model.layers.0.self_attn.q_proj")],
    ids=["output", "weight"],
)
def test_a_gradient(plant, value, rows, module, tmp_path):
    message, saved, left = stops(tmp_path, plant)
    assert (saved["quantity"], saved["value"], saved["rows"], saved["module"]) == ("gradient", value, rows, module)
    assert f"gradient is {value}" in message
    assert loss_of(left, saved).isfinite()
    assert equal(weights(left), weights(fit(tmp_path / "before", max_steps=3)[0]))


class InFirst(Plant):
    """NaN in a layer's output, or in the gradient of its weight, in the first micro-batch of an accumulated update."""

    def __init__(self, step, gradient):
        super().__init__(step)
        self.gradient, self.first = gradient, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.first = pl_module.micro_batch if batch_idx % 2 == 0 else self.first

    def plant(self, pl_module):
        def factor():
            return math.nan if pl_module.global_step in self.steps and pl_module.micro_batch is self.first else 1.0

        layer = pl_module.get_submodule(LAYER)
        if self.gradient:
            layer.weight.register_hook(lambda gradient: gradient * factor())
        else:
            layer.register_forward_hook(lambda module, given, output: output * factor() if torch.is_grad_enabled() else output)


@pytest.mark.parametrize(("gradient", "quantity"), [(False, "policy log-probability"), (True, "gradient")])
def test_one_micro_batch_of_an_accumulated_update(gradient, quantity, tmp_path):
    _, saved, module = stops(tmp_path, InFirst(1, gradient), accumulate_grad_batches=2)
    assert (saved["batch_idx"], saved["quantity"], saved["module"]) == (2, quantity, LAYER)
    assert equal(weights(module), weights(fit(tmp_path / "before", max_steps=1, accumulate_grad_batches=2)[0]))


def data(folder):
    return PreferenceDataModule(path=str(preferences(folder)), batch_size=4)


@pytest.mark.parametrize(
    ("stage", "row", "found"), [(SupervisedPolicy, 1, 1), (RewardModel, 3, 1)], ids=["supervised", "reward model: two texts a row"]
)
def test_the_other_stages(stage, row, found, tmp_path):
    torch.manual_seed(0)
    module = stage(LLAMA, tokenizer=letters(), lr=1e-2)
    with pytest.raises(Stopped) as stop:
        trainer(tmp_path, callbacks=[InOutput(2, row=row), FiniteGuard()], max_steps=4).fit(module, data(tmp_path))
    saved = torch.load(tmp_path / "nonfinite" / "step-2-rank-0.pt", weights_only=True)
    assert (saved["quantity"], saved["rows"], saved["module"]) == ("loss", [found], LAYER)
    batch = saved["batch"]
    tokens = batch["tokens"][found].view(-1, batch["tokens"].shape[-1])[0]
    assert f"in row {found} (prompt {letters().decode(tokens[:2])!r})" in str(stop.value)  # every prompt has two letters


class Plain(L.LightningModule):
    """A user's own module."""

    def __init__(self, automatic=True):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
        self.automatic_optimization = automatic

    def training_step(self, batch, index):
        loss = self.norm(self.layer(batch[0])).square().mean()
        if self.global_step == 2:
            loss = loss * math.nan
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


def rows():
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), batch_size=4)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_module_of_the_users_own(automatic, tmp_path):
    torch.manual_seed(0)
    module = Plain(automatic)
    with pytest.raises(Stopped, match=r"batch 2: loss is nan, " + ("first in module none" if automatic else "module unknown")):
        trainer(tmp_path, callbacks=[FiniteGuard()], max_steps=4).fit(module, rows())
    saved = torch.load(tmp_path / "nonfinite" / "step-2-rank-0.pt", weights_only=True)
    assert saved["batch"][0].shape == (4, 4)
    torch.manual_seed(0)
    other = Plain(automatic)
    watch = Watch()
    trainer(tmp_path, callbacks=[watch, FiniteGuard("skip")], max_steps=4).fit(other, rows())
    still = {name for name in watch.seen[1][0] if torch.equal(watch.seen[1][0][name], watch.seen[2][0][name])}
    assert {"layer.weight", "layer.bias", "norm.weight", "norm.bias"} <= still
    assert int(watch.seen[2][0]["norm.num_batches_tracked"]) == 3  # its statistics saw the batch once, though it was run again
    assert watch.moved()[2] == (True, True)


def test_a_step_that_cannot_be_repeated_is_still_told(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(search.Trace, "watching", fails)
    message, saved, _ = stops(tmp_path, InWeightGradient(1))
    assert saved["module"] == "model.model.layers.0.self_attn.q_proj" and "gradient is nan" in message  # from the gradients alone
    message, saved, _ = stops(tmp_path / "forward", InOutput(1))
    assert saved["module"] is None and "loss is nan, module unknown" in message


# ---- skipping


@pytest.mark.parametrize("plant", [InOutput(3), InOutputGradient(3), InWeightGradient(3)], ids=lambda plant: type(plant).__name__)
def test_a_skipped_update_moves_neither_weights_nor_optimizer_state(plant, tmp_path):
    watch, guard, board = Watch(), FiniteGuard("skip"), TensorBoardLogger(tmp_path, name="logs", version=0)
    with pytest.warns(UserWarning, match=r"update skipped: step 3, batch 3"):
        fit(tmp_path, plant, guard, watch, settings={"optimizer": DECAYING}, logger=board, log_every_n_steps=1, gradient_clip_val=1.0)
    assert watch.moved() == [(True, True), (True, True), (False, False), (True, True), (True, True)]
    assert guard.skipped == 1 and guard.in_a_row == 0
    assert [value for _, value in scalars(tmp_path / "logs/version_0")["finite/skipped"]] == [0, 0, 0, 1, 1, 1]  # the dashboard's own file


def test_a_reward_that_is_nan_costs_only_the_micro_batches_that_have_it(tmp_path):
    watch, guard = Watch(), FiniteGuard("skip", max_consecutive=10)
    spoilt = []

    class Note(L.Callback):
        """Which micro-batches have a NaN reward."""

        def on_train_batch_start(self, trainer, pl_module, *_):
            spoilt.append(bool(pl_module.micro_batch.scores.isnan().any()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, guard, watch, Note(), settings={"reward_funcs": judge(), "kl_coef": 0.0, "max_completion_length": 2}, max_steps=12)
    assert True in spoilt and False in spoilt
    assert watch.moved() == [(not bad, not bad) for bad in spoilt[1:]] and guard.skipped == sum(spoilt)
    assert len(list((tmp_path / "nonfinite").iterdir())) == guard.skipped


def test_an_accumulated_update_is_left_out_whole(tmp_path):
    watch = Watch()

    class OnlyFirst(InOutput):
        """Spoils the first micro-batch of the second update."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.steps = (1,) if batch_idx == 2 else ()

    with pytest.warns(UserWarning, match=r"update skipped: step 1, batch \d"):
        fit(tmp_path, OnlyFirst(), FiniteGuard("skip"), watch, settings={"optimizer": DECAYING}, accumulate_grad_batches=2, max_steps=3)
    assert watch.moved() == [(True, True), (False, False), (False, False), (False, False), (True, True)]


@pytest.mark.parametrize(("steps", "stopped_at"), [((1, 2, 4, 5), None), ((1, 3, 4, 5), 5)])
def test_three_in_a_row_stop(steps, stopped_at, tmp_path):
    guard = FiniteGuard("skip")
    module = policy(micro_batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if stopped_at is None:
            fit(tmp_path, InOutput(*steps), guard, module=module, max_steps=7)
        else:
            with pytest.raises(Stopped, match=r"^3 updates in a row were not finite \(finite.max_consecutive 3\). step 5, batch 5: "):
                fit(tmp_path, InOutput(*steps), guard, module=module, max_steps=7)
    assert guard.skipped == 4 and guard.in_a_row == (0 if stopped_at is None else 3)


def test_a_resumed_run_goes_on_counting(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, InOutput(1, 2, 3), FiniteGuard("skip"), LastCheckpoint(), max_steps=3)  # two in a row, then saved
        guard = FiniteGuard("skip")
        with pytest.raises(Stopped, match="3 updates in a row"):
            fit(tmp_path, InOutput(3), guard, ckpt_path=checkpoint)
        assert guard.skipped == 3
        resumed, _ = fit(tmp_path, InOutput(4), FiniteGuard("skip"), ckpt_path=checkpoint)
        whole, _ = fit(tmp_path / "whole", InOutput(1, 2, 4), FiniteGuard("skip"))
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("stage", [SupervisedPolicy, PairwisePolicy])
def test_the_search_disturbs_nothing(stage, tmp_path, monkeypatch):
    """With dropout: the batch run again draws, and logs, as if it had not been."""

    def run(root):
        root.mkdir()
        recorder, plant = Recorder(), InOutput(3, row=1, name="model.transformer.h.0.mlp.c_proj")
        torch.manual_seed(0)
        if stage is SupervisedPolicy:
            module = stage(GPT2, tokenizer=letters(), lr=1e-2)
        else:
            module = policy(model=GPT2, micro_batch_size=2, disable_dropout=False, start_up_proofs=False)
        with pytest.warns(UserWarning, match="update skipped"):
            run = trainer(root, callbacks=[plant, FiniteGuard("skip")], max_steps=6, logger=recorder, log_every_n_steps=1)
            run.fit(module, data(root))
        return weights(module), [(step, repr(row)) for step, row in recorder.rows], module.training

    searched = run(tmp_path / "one")
    monkeypatch.setattr(guards.Rounds, "training_step", lambda self, seen: search.Trace(0))
    plain = run(tmp_path / "other")
    assert equal(searched[0], plain[0]) and searched[1:] == plain[1:]


def test_the_batch_run_again_draws_the_same_dropout(tmp_path):
    losses = []

    class Noting(PairwisePolicy):
        """Notes its losses at update 3."""

        def loss(self, token_logps, batch):
            terms = super().loss(token_logps, batch)
            losses.extend([float(terms.q_abs), token_logps.sum().item()] if self.trainer.global_step == 3 else [])
            return terms

    module = policy(Noting, model=GPT2, micro_batch_size=2, disable_dropout=False, start_up_proofs=False)

    class Spoil(Plant):
        """The gradient of one weight."""

        def plant(self, pl_module):
            pl_module.model.transformer.h[0].mlp.c_proj.bias.register_hook(lambda g: g * math.nan if pl_module.global_step == 3 else g)

    stops(tmp_path, Spoil(3), module=module)
    assert len(losses) == 4 and losses[:2] == losses[2:]


# ---- where all is finite


@pytest.mark.parametrize("stage", [SupervisedPolicy, RewardModel, PairwisePolicy])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_training_is_the_same_to_the_bit(stage, action, tmp_path):
    def run(root, *callbacks):
        root.mkdir()
        recorder = Recorder()
        torch.manual_seed(0)
        settings = {"tokenizer": letters(), "lr": 1e-2}
        module = policy(micro_batch_size=2) if stage is PairwisePolicy else stage(LLAMA, **settings)
        flags = {"max_steps": 4, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "logger": recorder, "log_every_n_steps": 1}
        trainer(root, callbacks=list(callbacks), **flags).fit(module, data(root))
        logged = [(step, {name: value for name, value in row.items() if name != "finite/skipped"}) for step, row in recorder.rows]
        return weights(module), json.dumps(logged)

    (with_guard, logged), (without, logged_without) = run(tmp_path / "on", FiniteGuard(action)), run(tmp_path / "off")
    assert equal(with_guard, without) and logged == logged_without
    assert not (tmp_path / "on" / "nonfinite").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_infinities_are_left_to_the_gradient_scaler(fused, tmp_path):
    """A scale of 2^19 overflows: the scaler leaves updates out, and halves it, until it fits."""

    def run(root, *callbacks):
        torch.manual_seed(0)
        module = SupervisedPolicy(LLAMA, tokenizer=letters(), optimizer=lambda parameters: AdamW(parameters, lr=1e-2, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        root.mkdir()
        watch = Watch()
        trainer(root, callbacks=[*callbacks, watch], plugins=[precision], max_steps=8).fit(module, data(root))
        return weights(module), watch.moved(), scaler.get_scale()

    try:
        plain = run(tmp_path / "off")
    except (RuntimeError, OverflowError) as error:
        pytest.skip(f"no fp16 on this CPU: {error}")
    guarded = run(tmp_path / "on", FiniteGuard())
    assert equal(plain[0], guarded[0]) and plain[1:] == guarded[1:]
    assert (False, False) in plain[1] and (True, True) in plain[1]
    skipping, guard = Watch(), FiniteGuard("skip")
    torch.manual_seed(0)
    module = SupervisedPolicy(LLAMA, tokenizer=letters(), optimizer=lambda parameters: AdamW(parameters, lr=1e-2, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.warns(UserWarning, match="loss is nan"):
        trainer(
            tmp_path,
            callbacks=[InOutput(3, row=1), guard, skipping],
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
            max_steps=5,
        ).fit(module, data(tmp_path))
    assert skipping.moved()[2:] == [(False, False), (True, True)] and guard.skipped == 1


@pytest.mark.parametrize(("gradient", "finite"), [(1e30, True), (math.inf, False), (math.nan, False), (0.0, True)])
def test_huge_gradients_are_finite_though_their_norm_is_not(gradient, finite):
    gradients = [torch.zeros(0), torch.ones(2, dtype=torch.bfloat16), torch.tensor([1.0, gradient])]
    assert guards._finite([torch.tensor(1.0)], gradients, False) is finite


# ---- several processes


class OnRankOne(InOutput):
    """On one of two processes."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.now = lambda: torch.is_grad_enabled() and trainer.global_step in self.steps and trainer.global_rank == 1


class Telling(FiniteGuard):
    """Leaves what each process told in a file."""

    def _report(self, trainer, pl_module):
        told = super()._report(trainer, pl_module)
        seen = {"told": told, "step": trainer.global_step}
        (Path(trainer.default_root_dir) / f"{trainer.global_rank}.json").write_text(json.dumps(seen))
        trainer.strategy.barrier()  # the first to end would end the other
        return told


class Moved(Watch):
    """Leaves what each process saw in a file."""

    def on_train_end(self, trainer, pl_module):
        seen = {"step": trainer.global_step, "moved": [weights and state for weights, state in self.moved()]}
        (Path(trainer.default_root_dir) / f"{trainer.global_rank}.json").write_text(json.dumps(seen))


def two(folder, *callbacks, **settings):
    """What two processes left."""
    folder.mkdir()
    module = policy(micro_batch_size=2, **settings)
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))  # where one waits for the other in vain, it fails
    run = trainer(folder, callbacks=list(callbacks), max_steps=5, devices=2, strategy=strategy)
    try:
        run.fit(module, module.wrap_train_dataloader(prompts()))
    except torch.multiprocessing.ProcessRaisedException as error:
        assert "errors.Diverged: " in str(error)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_leave_an_update_out_together(tmp_path):
    assert two(tmp_path / "run", OnRankOne(2), FiniteGuard("skip"), Moved()) == [{"step": 5, "moved": [True, False, True, True]}] * 2
    assert [path.name for path in (tmp_path / "run" / "nonfinite").iterdir()] == ["step-2-rank-1.pt"]


def test_two_processes_decide_together_where_the_gradients_show_nothing(tmp_path):
    class Spoilt(PairwisePolicy):
        """Adds NaN to the loss of one process, which leaves every gradient as it is."""

        def loss(self, token_logps, batch):
            terms = super().loss(token_logps, batch)
            return terms._replace(loss=terms.loss + (math.nan if self.global_step == 2 and self.global_rank == 1 else 0))

    assert two(tmp_path / "run", FiniteGuard("skip"), Moved(), owner=Spoilt) == [{"step": 5, "moved": [True, False, True, True]}] * 2


def test_two_processes_stop_together_and_tell_the_same(tmp_path):
    one, other = two(tmp_path / "loss", OnRankOne(1), Telling())
    assert one == other and "step 1, batch 1, rank 1: policy log-probability is nan in row 1 (prompt '" in one["told"]
    assert LAYER in one["told"]
    one, other = two(tmp_path / "reward", Telling(), reward_funcs=judge())
    assert one == other and ": reward 'RewardModel' is nan in row" in one["told"]


# ---- settings, and the command


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"action": "ignore"}, "finite.action is 'ignore': choose stop or skip"), ({"max_consecutive": 0}, "finite.max_consecutive is 0")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FiniteGuard(**settings)


def test_the_command_stops_with_one_line_and_a_batch(p3o):  # noqa: F811
    given = ("fit", "--config", "configs/debug/sft.yaml", "--trainer.default_root_dir", "run", "--model.lr", "1e36")
    error = p3o(*given).error
    assert error.startswith("step 1, batch 1: loss is nan in row") and error.endswith("run/nonfinite/step-1-rank-0.pt")
    assert torch.load("run/nonfinite/step-1-rank-0.pt", weights_only=True)["quantity"] == "loss"
    skipped = p3o(*given, "--finite.action", "skip", "--finite.max_consecutive", "2", "--finite.dirpath", "elsewhere")
    assert skipped.error.startswith("2 updates in a row were not finite (finite.max_consecutive 2). step 2, batch 2: loss is nan")
    assert sorted(path.name for path in Path("elsewhere").iterdir()) == ["step-1-rank-0.pt", "step-2-rank-0.pt"]
