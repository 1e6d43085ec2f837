"""Responses drawn by a vLLM server: a stand-in that speaks its protocol (tests/vllm_stand_in.py), and what a real one answered."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from processes import on_two
from tiny import LLAMA, PROMPTS, KeepAll, Recorder, collate, equal, letters, policy, prompts, trainer, weights
from vllm_stand_in import StandIn, serving

from p3o_lightning import InputError, PairwisePolicy, PreferenceDataModule, vllm_server
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.forwards import completion_logps
from p3o_lightning.generation import Sampling
from p3o_lightning.models import read_checkpoint
from p3o_lightning.sharding import FSDP2Strategy
from p3o_lightning.vllm_server import VLLMServer
from tests.tiny import preferences

EOS = letters().eos_token_id
ANSWERS = json.loads((Path(__file__).parent / "vllm_answers.json").read_text())


@pytest.fixture
def stand_in():
    return StandIn()


@pytest.fixture
def address(stand_in):
    with serving(stand_in) as where:
        yield where


def served(address, **settings):
    return policy(**{"generation": "vllm", "vllm_server": address, "vllm_timeout": 120.0, **settings})


def fit(module, root, *, ckpt_path=None, data=None, **flags):
    run = trainer(root, **{"max_steps": 4, **flags})
    run.fit(module, module.wrap_train_dataloader(data or prompts()), ckpt_path=ckpt_path)
    return module


# ---- a run


def test_a_policy_learns_the_known_answer_from_a_servers_responses(stand_in, address, tmp_path):
    """The best answer is nothing but "a"; every response that it learns from was drawn by the server, with weights that followed."""
    recorder = Recorder()
    module = served(address, num_generations=4, lr=3e-2, kl_coef=0.01, max_completion_length=4)
    fit(module, tmp_path, max_steps=24, logger=recorder, log_every_n_steps=1, max_epochs=-1)
    scores = [row["objective/scores"] for _, row in recorder.rows if "objective/scores" in row]
    assert sum(scores[:3]) / 3 < 0.5 and sum(scores[-3:]) / 3 > 0.9
    tokens, mask, _ = module.sample_with_logps(collate(PROMPTS[:4]), seed=1)
    assert (tokens[mask] == 0).float().mean() > 0.8


def test_the_server_holds_the_policys_weights_at_every_rollout(stand_in, address, tmp_path):
    """To the bit; handed over while it was paused, under a name of their own, and the folder is cleared away after.

    Catches: weights handed over once, or after the rollout; a server that goes on with former keys and values.
    """
    at_rollout = []

    class Watched(PairwisePolicy):
        """Keeps the weights that it has at each rollout."""

        def rollout_step(self, prompts):
            at_rollout.append({name.removeprefix("model."): value for name, value in weights(self).items()})
            return super().rollout_step(prompts)

    fit(served(address, owner=Watched, num_iterations=2), tmp_path, max_steps=6)
    assert len(at_rollout) == 3 and not equal(at_rollout[0], at_rollout[1])
    assert all(equal(held, ours) for held, ours in zip(stand_in.held, at_rollout, strict=True))
    paths = [path for path, _ in stand_in.asked]
    start = paths.index("/pause")
    assert paths[start : start + 4] == ["/pause", "/collective_rpc", "/update_weight_version", "/resume"]
    versions = [body["new_version"] for path, body in stand_in.asked if path == "/update_weight_version"]
    assert len(set(versions)) == 3
    assert list((tmp_path / "vllm_weights").iterdir()) == []


def test_averaged_weights_that_stand_in_for_validation_do_not_stay_on_the_server(stand_in, address, tmp_path):
    """Lightning's weight averaging swaps them in and out between two updates."""
    drawn_by = []

    class Watched(PairwisePolicy):
        """Keeps, at each rollout, its own weights and those that the server has drawn it with."""

        def rollout_step(self, prompts):
            experience = super().rollout_step(prompts)
            drawn_by.append((self.trainer.training, {k.removeprefix("model."): v for k, v in weights(self).items()}, stand_in.held[-1]))
            return experience

    module = served(address, owner=Watched, lr=0.1)
    averaging = EMAWeightAveraging(decay=0.5)
    run = trainer(tmp_path, max_steps=6, callbacks=[averaging], val_check_interval=1, limit_val_batches=1)
    run.fit(module, module.wrap_train_dataloader(prompts()), prompts(4))
    assert {training for training, *_ in drawn_by} == {True, False}
    assert all(equal(ours, held) for _, ours, held in drawn_by)


def test_adapters_are_merged_for_the_server(stand_in, address, tmp_path):
    module = served(address, peft_config={"r": 2, "lora_alpha": 8}, lr=0.1)
    fit(module, tmp_path, max_steps=2)
    whole = copy.deepcopy(module.model).merge_and_unload().state_dict()
    assert stand_in.held[0].keys() == whole.keys() and not equal(stand_in.held[0], stand_in.held[1])
    batch = collate(PROMPTS[:4])
    tokens, mask, told = module.sample_with_logps(batch, seed=5)
    ours = completion_logps(module.model, batch.tokens, batch.attention_mask, tokens, mask)
    torch.testing.assert_close(told, ours.detach(), rtol=0, atol=2e-5)


def test_weights_travel_only_where_they_changed(stand_in, address, tmp_path):
    """One hand-over for all batches of a validation; one more for the next, since weights may be loaded before it."""
    module = served(address)
    for _ in range(2):
        trainer(tmp_path).validate(module, prompts(4), verbose=False)
    assert len(stand_in.held) == 2
    assert sum(path == "/v1/completions" for path, _ in stand_in.asked) == 24
    trainer(tmp_path).predict(module, prompts(4))
    assert len(stand_in.held) == 3


def test_the_weights_folder_may_be_given(stand_in, address, tmp_path):
    fit(served(address, vllm_weights=str(tmp_path / "shared")), tmp_path / "run", max_steps=1)
    (folder,) = [body["kwargs"]["weights_path"] for path, body in stand_in.asked if path == "/collective_rpc"]
    assert folder == str(tmp_path / "shared" / "step-0")


# ---- what is asked, what comes back


def test_responses_are_those_of_the_server_with_their_log_probabilities(stand_in, address):
    """Token ids, masks with the sampled EOS, nats; rows of unequal prompts apart; as a forward of the policy says.

    Catches: a prompt's padding sent along, responses in the order of arrival, EOS cut off, nats on padding.
    """
    module = served(address, num_generations=3)
    batch = collate(["a", "defg"])
    tokens, mask, told = module.sample_with_logps(batch, seed=3)
    assert tokens.shape == mask.shape == told.shape and tokens.shape[:2] == (2, 3)
    ours = completion_logps(module.model, batch.tokens, batch.attention_mask, tokens, mask)
    torch.testing.assert_close(told, ours.detach(), rtol=0, atol=2e-5)
    for row, kept in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True):
        length = int(kept.sum())
        assert kept[:length].all() and (row[length - 1] == EOS or length == 5) and EOS not in row[: length - 1]
    assert (tokens == EOS).any() and (mask.sum(-1) == 5).any()  # both kinds are there
    sent = sorted(body["prompt"] for path, body in stand_in.asked if path == "/v1/completions")
    assert sent == [[0], [3, 4, 5, 6]]
    generator = torch.Generator()
    for path, body in stand_in.asked:
        if path == "/v1/completions":
            row = [[0], [3, 4, 5, 6]].index(body["prompt"])
            for number in range(3):
                drawn, _ = stand_in.draw(body["prompt"], 5, 1.0, [EOS], generator.manual_seed(body["seed"] + number))
                assert tokens[row, number][mask[row, number]].tolist() == drawn


def test_every_request_asks_for_the_models_own_distribution(stand_in, address):
    module = served(address, temperature=0.7, max_completion_length=3)
    module.sample(collate(PROMPTS[:3]), seed=9)
    requests = [body for path, body in stand_in.asked if path == "/v1/completions"]
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    ends = {
        "ignore_eos": True,
        "stop_token_ids": [EOS],
        "max_tokens": 3,
        "n": 2,
        "temperature": 0.7,
        "logprobs": 0,
        "return_token_ids": True,
    }
    assert all((neutral | ends).items() <= body.items() for body in requests)
    assert len({body["seed"] for body in requests}) == 3  # equal prompts must not get equal responses


def test_seeds_are_a_function_of_seed_rollout_and_prompt(stand_in, address):
    module = served(address)

    def seeds(seed):
        stand_in.asked.clear()
        module.sample(collate(["a", "a", "bc"]), seed=seed)
        return sorted(body["seed"] for path, body in stand_in.asked if path == "/v1/completions")

    first = seeds(1)
    assert first == seeds(1) and not set(first) & set(seeds(2)) and len(set(first)) == 3
    assert all(0 <= seed < 2**53 for seed in first)  # beyond, JSON readers differ


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_half_precision_on_the_server_is_corrected_for(temperature, tmp_path):
    recorder, batches = Recorder(), []

    class Watched(PairwisePolicy):
        """Keeps its micro-batches."""

        def training_step(self, batch, batch_idx):
            batches.append(batch)
            return super().training_step(batch, batch_idx)

    with serving(StandIn(dtype=torch.bfloat16)) as address:
        settings = {"num_iterations": 2, "temperature": temperature}
        fit(served(address, owner=Watched, **settings), tmp_path, logger=recorder, log_every_n_steps=1)
        off = fit(served(address, sampler_correction=None, **settings), tmp_path)
        on = fit(served(address, **settings), tmp_path)
    gaps = [float((batch.old_token_logps - batch.sampler_token_logps).abs().max()) for batch in batches]
    assert all(1e-4 < gap < 0.3 for gap in gaps)
    assert not equal(weights(on), weights(off))
    assert all(row.get("sampling/importance_sampling_ratio/max", 2.0) > 1 for _, row in recorder.rows)


def test_a_server_at_another_temperature_is_weighed_back(tmp_path):
    """It samples hotter than it was asked to, and says so in its log-probabilities: weighed, the mean score is the policy's own.

    Without weights the mean of a share of "a" is that of the hotter distribution.
    """
    batch = collate(PROMPTS[:2])
    with serving(StandIn(temperature=2.0)) as address:
        module = served(address, num_generations=100, max_completion_length=2)
        torch.manual_seed(3)
        for parameter in module.model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        tokens, mask, told = module.sample_with_logps(batch, seed=1)
    old = completion_logps(module.model, batch.tokens, batch.attention_mask, tokens, mask).detach()
    weight = (old - told).sum(-1).exp()
    firsts = (tokens[..., 0] == 0).float()
    logits = [module.model(row[kept].unsqueeze(0)).logits[0, -1] for row, kept in zip(batch.tokens, batch.attention_mask, strict=True)]
    exact = torch.stack(logits).softmax(-1)[:, 0].detach()
    hotter = (torch.stack(logits) / 2).softmax(-1)[:, 0].detach()
    error = (weight * firsts).std(1) / 10
    assert (((weight * firsts).mean(1) - exact).abs() < 4 * error).all()
    assert ((firsts.mean(1) - hotter).abs() < 4 * firsts.std(1).clamp(min=0.05) / 10).all()
    assert ((exact - hotter).abs() > 0.01).any()


# ---- resuming


def test_every_checkpoint_resumes_to_the_bit_with_a_rollout_pending(stand_in, address, tmp_path):
    def run(ckpt_path=None, callbacks=()):
        module = served(address, num_iterations=2, micro_batch_size=2)
        recorder = Recorder()
        fit(module, tmp_path, ckpt_path=ckpt_path, max_steps=7, data=prompts(shuffle=True), logger=recorder, callbacks=list(callbacks))
        return module, recorder

    keeper = KeepAll(tmp_path / "kept")
    whole, logged = run(callbacks=[keeper])
    pending = 0
    for checkpoint in keeper.kept:
        state = read_checkpoint(checkpoint)["p3o_experience"]
        pending += state["pending"][0] is not None and state["pending"][0]["sampler_token_logps"] is not None
        again, relogged = run(checkpoint)
        assert equal(weights(again), weights(whole)), checkpoint.name
        assert relogged.rollouts() == logged.rollouts()[state["rollouts"] :], checkpoint.name
    assert pending >= 4


def test_a_server_that_goes_down_stops_the_run_in_one_line_and_it_goes_on_to_the_bit(tmp_path):
    """What was trained is saved, though no save was due."""

    def run(address, ckpt_path=None):
        module = served(address, num_iterations=2)
        return fit(module, tmp_path, ckpt_path=ckpt_path, max_steps=6, callbacks=[LastCheckpoint(every_n_steps=100)])

    with serving(StandIn()) as address:
        whole = weights(run(address))
    last = tmp_path / "checkpoints/last.ckpt"
    last.unlink()
    failing = StandIn()
    failing.answers["/v1/completions"] = lambda me, body: me.complete(body) if len(me.held) < 3 else (500, {"error": {"message": "Dead."}})
    with serving(failing) as address, pytest.raises(InputError, match=r"^model.vllm_server is 'http.*/v1/completions with 500: Dead\.$"):
        run(address)
    assert read_checkpoint(last)["global_step"] == 4
    with serving(StandIn()) as address:
        assert equal(weights(run(address, last)), whole)


def test_the_settings_are_saved_and_a_checkpoint_without_them_loads(stand_in, address, tmp_path):
    fit(served(address), tmp_path, max_steps=1, callbacks=[LastCheckpoint()])
    path = tmp_path / "checkpoints/last.ckpt"
    saved = read_checkpoint(path)["hyper_parameters"]
    assert saved["generation"] == "vllm" and saved["vllm_server"] == address
    assert PairwisePolicy.load_from_checkpoint(path, generation="local").vllm is None
    experience = read_checkpoint(path)["p3o_experience"]
    for former in [row for row in experience["pending"] if row]:
        del former["sampler_token_logps"]
    policy().state.load(experience)


# ---- several processes


def on_each(folder, address, strategy):
    torch.manual_seed(0)
    module = served(address, model={**LLAMA, "num_hidden_layers": 2})
    run = trainer(folder, strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, devices=2, max_steps=3)
    data = PreferenceDataModule(str(preferences(folder, 24)), batch_size=2, val_fraction=0.0, length_grouped=False)
    failed = ""
    try:
        run.fit(module, data)
    except InputError as error:
        failed = str(error)
    return run.global_step, failed


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_hand_over_once_and_ask_for_their_own_prompts(strategy, tmp_path):
    stand_in = StandIn()
    with serving(stand_in) as address:
        answers = on_two(tmp_path, on_each, tmp_path, address, strategy)
    assert answers == [(3, ""), (3, "")]
    assert len(stand_in.held) == 3 and not equal(stand_in.held[0], stand_in.held[1])
    seeds = [body["seed"] for path, body in stand_in.asked if path == "/v1/completions"]
    assert len(seeds) == len(set(seeds)) == 12


def test_an_error_on_one_process_ends_both(tmp_path):
    stand_in = StandIn()
    asked = []

    def once(me, body):
        asked.append(body)
        return (400, {"error": {"message": "Too much."}}) if len(asked) == 6 else me.complete(body)

    stand_in.answers["/v1/completions"] = once
    with serving(stand_in) as address:
        (step, ours), (_, theirs) = on_two(tmp_path, on_each, tmp_path, address, "ddp", seconds=60)
    assert step == 1 and ours == theirs and ours.endswith("/v1/completions with 400: Too much.")


# ---- what goes wrong


def answering(path, answer):
    stand_in = StandIn()
    stand_in.answers[path] = answer
    return stand_in


def changed(**fields):
    """A server whose choices have these fields."""

    def complete(me, body):
        code, answer = me.complete(body)
        return code, {**answer, "choices": [{**choice, **fields} for choice in answer["choices"]]}

    return answering("/v1/completions", complete)


def cut(me, body):
    return me.complete({**body, "max_tokens": 1, "stop_token_ids": []})


FAULTS = {
    "not vllm": (
        answering("/v1/models", lambda me, body: (200, b"<html>")),
        {},
        r"answered /v1/models with what is not JSON: is it vLLM\?",
    ),
    "no model": (
        answering("/v1/models", lambda me, body: (200, {"data": []})),
        {},
        r"/v1/models names no model: is it vLLM\? Start it with VLLM_",
    ),
    "key": (
        answering("/v1/models", lambda me, body: (401, {"error": "Unauthorized"})),
        {},
        r"answered /v1/models with 401: .*Unauthorized",
    ),
    "not in dev mode": (
        StandIn(dev=False),
        {},
        r"takes no weights \(no /collective_rpc\): start it with VLLM_SERVER_DEV_MODE=1 vllm serve",
    ),
    "folder not seen": (
        answering("/collective_rpc", lambda me, body: me.collective_rpc({**body, "kwargs": {"weights_path": "/elsewhere"}})),
        {},
        r"/collective_rpc with 500: it could not take the weights in '.*step-0'.*model\.vllm_weights.*Repo id must be in the form",
    ),
    "raw log-probabilities": (
        StandIn(logprobs_mode="raw_logprobs"),
        {"temperature": 0.5},
        r"log-probabilities are raw_logprobs.*model.temperature is 0.5: start it with --logprobs-mode processed_logprobs",
    ),
    "too short": (
        StandIn(max_model_len=6),
        {"max_completion_length": 5},
        r"model.max_completion_length is 5 and a prompt has 4 tokens, but model.vllm_server takes 6 in all: start it with a greater",
    ),
    "no log-probabilities": (changed(logprobs=None), {}, r"gave no finite log-probability for each token \(None for \d tokens\)"),
    "a log-probability short": (changed(logprobs={"token_logprobs": [-1.0] * 9}), {}, r"no finite log-probability for each token"),
    "no token ids": (changed(token_ids=None), {}, r"gave no token ids \(return_token_ids\): it needs vLLM 0\.10\.2 or later"),
    "foreign tokens": (
        changed(token_ids=[77] * 5, logprobs={"token_logprobs": [-1.0] * 5}),
        {},
        r"drew token 77, but the policy has 10: it serves another model",
    ),
    "another end": (
        answering("/v1/completions", cut),
        {},
        r"ended a response at 1 of model.max_completion_length 5 tokens with token \d, not with EOS",
    ),
    "fewer": (
        answering("/v1/completions", lambda me, body: (200, {"choices": []})),
        {},
        r"gave 0 responses where model.num_generations is 2",
    ),
    "restarted": (
        answering("/weight_info", lambda me, body: (200, {"weight_version": "default"})),
        {},
        r"holds the weights 'default' where it was given '.*-0': it was started again, or another run uses it\. Resume with",
    ),
    "another model": (
        answering("/collective_rpc", lambda me, body: (200, {"results": [None]})),
        {},
        r"start-up proof: the sampler's log-probabilities differ from the policy's by .* it serves another model than model.model",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server_is_one_line_that_names_it_and_the_fix(fault, tmp_path):
    stand_in, settings, message = FAULTS[fault]
    if fault == "another model":
        torch.manual_seed(99)
        stand_in.model = policy(model={**LLAMA, "initializer_range": 1.0}).model
    with serving(stand_in) as address:
        module = served(address, **settings)
        with pytest.raises(InputError, match=message) as caught:
            fit(module, tmp_path, max_steps=1)
    assert "\n" not in str(caught.value) and (address in str(caught.value) or fault in ("too short", "another model"))
    assert not any((tmp_path / "vllm_weights").glob("*"))


def test_raw_log_probabilities_at_another_temperature_do_not_pass_in_silence_where_the_server_does_not_say(tmp_path):
    """An older server has no /server_info: the start-up proof sees it."""
    stand_in = StandIn(logprobs_mode="raw_logprobs")
    stand_in.answers["/server_info"] = lambda me, body: (404, {"detail": "Not Found"})
    with serving(stand_in) as address, pytest.raises(InputError, match=r"start-up proof: .*processed_logprobs for model\.temperature"):
        fit(served(address, temperature=0.3), tmp_path, max_steps=1)


@pytest.mark.parametrize("path", ["/update_weight_version", "/weight_info", "/server_info"])
def test_an_older_server_that_names_no_versions_is_served(path, tmp_path):
    with serving(answering(path, lambda me, body: (404, {"detail": "Not Found"}))) as address:
        module = served(address)
        if path == "/update_weight_version":  # the two came together
            module.vllm.server.weights_version = lambda: None
        fit(module, tmp_path, max_steps=2)


def test_nothing_at_the_address(tmp_path):
    with serving(StandIn()) as address:
        pass
    with pytest.raises(InputError, match=rf"model.vllm_server is '{address}', where nothing answers /v1/models .*or correct the address"):
        fit(served(address), tmp_path, max_steps=1)
    assert not (tmp_path / "checkpoints").exists()


def test_an_answer_that_takes_too_long(tmp_path):
    stand_in = answering("/v1/completions", lambda me, body: time.sleep(0.5) or (200, {}))
    with (
        serving(stand_in) as address,
        pytest.raises(InputError, match=r"did not answer /v1/completions in model.vllm_timeout, 0.2 seconds"),
    ):
        fit(served(address, vllm_timeout=0.2, num_generations=2), tmp_path, max_steps=1, data=prompts(1))


def test_a_connection_that_breaks_is_tried_again_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(vllm_server, "_PAUSE", 0.0)
    broken = []

    def breaks(times):
        def complete(me, body):
            broken.append(body)
            return (0, None) if len(broken) <= times else me.complete(body)

        return complete

    stand_in = answering("/v1/completions", breaks(2))
    stand_in.model = policy().model
    with serving(stand_in) as address:
        server = VLLMServer(address, 20.0)
        assert len(server.respond("tiny", [0, 1], Sampling(2, 3), EOS, 7)) == 2 and len(broken) == 3
        broken.clear()
        stand_in.answers["/v1/completions"] = breaks(9)
        with pytest.raises(InputError, match="where nothing answers /v1/completions"):
            server.respond("tiny", [0, 1], Sampling(2, 3), EOS, 7)
        assert len(broken) == 3 and broken[0] == broken[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_server": "localhost"}, r"model.vllm_server is 'localhost': give an address such as http://127.0.0.1:8000"),
        ({"vllm_server": "ftp://host"}, r"model.vllm_server is 'ftp://host'"),
        ({"generation": "sglang"}, r"model.generation is 'sglang': choose local or vllm"),
        ({"vllm_timeout": 0}, r"model.vllm_timeout is 0: choose a number of seconds above 0"),
        ({"top_p": 0.9}, r"model.top_p is 0.9: choose 1 with generation: vllm"),
        ({"top_k": 20}, r"model.top_k is 20: choose 0 with generation: vllm"),
        ({"objective": "rloo"}, r"model.sampler_correction is 'truncate', but objective rloo does not weigh .*: set it to null"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        policy(**{"generation": "vllm", **settings})


def test_another_objective_takes_a_servers_responses_without_weights(stand_in, address, tmp_path):
    module = served(address, objective="rloo", sampler_correction=None)
    start = weights(module)
    fit(module, tmp_path, max_steps=2)
    assert len(stand_in.held) == 2 and not equal(weights(module), start)


def test_fsdp1_is_refused_before_anything_is_split(tmp_path):
    from lightning.pytorch.strategies import FSDPStrategy

    module = served("http://127.0.0.1:9")
    module._trainer = type("Run", (), {"strategy": FSDPStrategy()})()
    with pytest.raises(InputError, match=r"trainer\.strategy is FSDPStrategy, which model.generation: vllm does not serve: use fsdp2"):
        module.vllm.begin(module)


def test_weights_that_cannot_be_written(stand_in, address, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"model.vllm_weights is '.*file', where the weights cannot be written"):
        fit(served(address, vllm_weights=str(tmp_path / "file")), tmp_path / "run", max_steps=1)


# ---- the protocol is vLLM's


@pytest.mark.parametrize("address", ["http://host:8000", "http://host:8000/", "http://host:8000/v1"])
def test_an_address_may_be_written_as_for_other_clients(address):
    assert VLLMServer(address, 1.0).address == "http://host:8000"


def test_what_a_real_server_answered_is_read(monkeypatch):
    """Recorded answers: the client finds in them what it looks for."""
    stand_in = StandIn()
    for path in (
        "/v1/models",
        "/v1/completions",
        "/server_info",
        "/pause",
        "/collective_rpc",
        "/update_weight_version",
        "/resume",
        "/weight_info",
    ):
        stand_in.answers[path] = lambda me, body, path=path: (200, ANSWERS[path])
    monkeypatch.setenv("VLLM_API_KEY", "key")
    with serving(stand_in) as address:
        server = VLLMServer(address, 5.0)
        assert server.served() == ("tiny", 64, "raw_logprobs")  # vLLM's default; at temperature 1 both are the same
        server.load_weights(Path("/somewhere"), "1-2")
        assert server.weights_version() == "1-2"
        responses = server.respond("tiny", [0, 3, 4, 1], Sampling(2, 4), EOS, 7)
        long = ANSWERS["/v1/completions, prompt too long"]
        stand_in.answers["/v1/completions"] = lambda me, body: (long["code"], long["body"])
        with pytest.raises(InputError, match=r"/v1/completions with 400: This model's maximum context length is 64 tokens"):
            server.respond("tiny", [0] * 70, Sampling(2, 4), EOS, 7)
    recorded = ANSWERS["/v1/completions"]["choices"]
    assert [response.tokens for response in responses] == [choice["token_ids"] for choice in recorded]
    assert [response.logps for response in responses] == [choice["logprobs"]["token_logprobs"] for choice in recorded]


def test_the_stand_in_answers_with_the_fields_of_a_real_server(tmp_path):
    """So that what is tested against it is tested against vLLM's protocol."""
    stand_in = StandIn()
    stand_in.model = policy().model
    body = {"model": "tiny", "prompt": [0, 3], "n": 2, "max_tokens": 4, "temperature": 1.0, "seed": 7, "logprobs": 0}
    _, answer = stand_in.complete({**body, "return_token_ids": True, "stop_token_ids": [EOS]})
    real = ANSWERS["/v1/completions"]
    assert answer.keys() <= real.keys()
    for ours, theirs in zip(answer["choices"], real["choices"], strict=True):
        assert ours.keys() <= theirs.keys() and ours["logprobs"].keys() == theirs["logprobs"].keys()
        assert all(type(ours[name]) is type(theirs[name]) for name in ("index", "token_ids", "finish_reason"))
        assert len(theirs["token_ids"]) == len(theirs["logprobs"]["token_logprobs"])
    for path in ("/pause", "/resume", "/server_info", "/weight_info"):
        code, own = stand_in.answer(path, {})
        assert code == 200 and own.keys() == ANSWERS[path].keys(), path
    assert stand_in.answer("/nothing", {})[0] == ANSWERS["/nothing"]["code"] == 404


# ---- the command


def test_the_overlay_runs_from_the_command_line(p3o):
    with serving(StandIn(max_model_len=512)) as address:
        flags = ["--model.vllm_server", address, "--trainer.max_steps", "4"]
        assert p3o("fit", "--config", "configs/debug/policy.yaml", "--config", "configs/vllm.yaml", *flags).code == 0
    run = p3o("fit", "--config", "configs/debug/policy.yaml", "--config", "configs/vllm.yaml", *flags)
    assert run.error.startswith(f"model.vllm_server is '{address}', where nothing answers")


def test_callbacks_see_which_responses_were_drawn_elsewhere(stand_in, address, tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.sampler_logps)

    fit(served(address), tmp_path, max_steps=1, callbacks=[Look()])
    assert seen[0].shape == (4, 2)
    seen.clear()
    fit(policy(), tmp_path, max_steps=1, callbacks=[Look()])
    assert seen == [None]
