"""`p3o doctor`: what it reports, what it calls a problem, and that it leaves nothing behind."""

import pytest
import torch
from running import python

from p3o_lightning import PairwisePolicy
from p3o_lightning.commands import doctor


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def versions(**changed):
    """Those installed, with changes."""
    return lambda name: changed.get(name, doctor._version(name))


def test_a_good_environment(p3o):
    shown = p3o("doctor")
    assert shown.code == 0, shown
    assert shown.err == ""
    assert all(line.startswith(("ok ", "note ")) for line in shown.out.splitlines())
    for piece in ("python 3.", "torch 2.", "lightning 2.", "transformers ", "datasets ", "jsonargparse ", "CPU cores", "OMP_NUM_THREADS 1"):
        assert piece in shown.out, piece
    for piece in ("ratio is 1", "KL is 0", "clip fraction is 0", "reference equals the policy", "weights, and they are finite"):
        assert any(line.startswith("ok       proof: ") and piece in line for line in shown.out.splitlines()), piece
    assert not any(p3o.folder.iterdir())


def test_a_good_config(p3o):
    (p3o.folder / "more.yaml").write_text("data: {init_args: {batch_size: 4}}\n")
    shown = p3o("doctor", "--config", "configs/debug/policy.yaml", "--config", "more.yaml", "--config", "more.yaml")
    assert shown.code == 0, shown
    assert "ok       config configs/debug/policy.yaml + more.yaml + more.yaml: PairwisePolicy of 66,576 parameters gets to" in shown.out
    assert [path.name for path in p3o.folder.iterdir()] == ["more.yaml"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("model: {init_args: {kl_coeff: 1}}\n", ["model.kl_coeff is no key", "model.kl_coef?"]),
        ("model: {init_args: {kl_coef: -1}}\n", ["model.kl_coef is -1.0"]),
        ("data: {init_args: {path: nowhere.jsonl}}\n", ["data.path is 'nowhere.jsonl'"]),
        ("model: {init_args: {reward_funcs: nowhere.f}}\n", ["model.reward_funcs", "'nowhere.f'"]),
        ("trainer: {accumulate_grad_batches: 3}\n", ["trainer.accumulate_grad_batches is 3"]),
        ("model: {init_args: {reward_funcs: operator.length_hint}}\n", ["model.reward_funcs"]),
    ],
)
def test_what_would_stop_a_config(p3o, text, pieces):
    (p3o.folder / "bad.yaml").write_text(text)
    report = doctor.Report()
    doctor.check_config(report, ["configs/debug/policy.yaml", "bad.yaml"])
    found = [line for line in lines(p3o.capsys) if line.startswith("problem")]
    assert report.problems == len(found) == 1
    assert all(piece in found[0] for piece in ("bad.yaml", *pieces)), found
    assert [path.name for path in p3o.folder.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malware_is_named_and_not_imported(capsys, version):
    report = doctor.Report()
    assert not doctor.check_packages(report, versions(lightning=version))
    found = [line for line in lines(capsys) if line.startswith("problem")]
    assert report.problems == len(found) == 1 and f"lightning {version} is malware" in found[0]


def test_nothing_heavy_is_imported_before_the_versions_are_known():
    done = python(
        "import sys\nfrom p3o_lightning import cli\nfrom p3o_lightning.commands import doctor\n"
        "doctor._version = lambda name: '2.6.2' if name == 'lightning' else '9'\n"
        "try: cli.main(['doctor'])\nexcept SystemExit as stop: print('exit', stop.code, {'torch', 'lightning'} & set(sys.modules))"
    )
    assert done.stdout.splitlines()[-1] == "exit 2 set()", done


def test_missing_and_old_packages(capsys):
    report = doctor.Report()
    assert not doctor.check_packages(report, versions(datasets=None, transformers="4.57.0", peft=None))
    shown = lines(capsys)
    assert any(line.startswith("problem  datasets is not installed: pip install 'datasets") for line in shown)
    assert any(line.startswith("problem  transformers 4.57.0 does not satisfy") for line in shown)
    assert any(line.startswith("note     peft is not installed (LoRA): pip install peft") for line in shown)
    assert report.problems == 2


def test_a_full_disk_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    report = doctor.Report()
    doctor.check_machine(report)
    assert report.problems == 1 and any("disk: 1 MiB free" in line for line in lines(capsys))


class Drifting(PairwisePolicy):
    """Its log-probabilities in training are not those of the rollout."""

    def policy_logps(self, *tokens_and_masks):
        return super().policy_logps(*tokens_and_masks) - 0.5


class Diverging(PairwisePolicy):
    """An update makes its weights infinite."""

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            next(self.model.parameters()).fill_(float("inf"))


class Failing(PairwisePolicy):
    """Does not run at all."""

    def rollout_step(self, prompts):
        raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("owner", "piece"), [(Drifting, "start-up proof: before the first update"), (Diverging, "not finite"), (Failing, "no kernel for this")]
)
def test_a_broken_proof_is_a_problem(p3o, monkeypatch, owner, piece):
    monkeypatch.setattr("p3o_lightning.policy.PairwisePolicy", owner)
    report = doctor.Report()
    doctor.check_proofs(report, doctor.tiny_policy())
    found = [line for line in lines(p3o.capsys) if line.startswith("problem")]
    assert report.problems and piece in "".join(found), found


def test_a_problem_exits_with_2(p3o, monkeypatch):
    monkeypatch.setattr(doctor, "check_proofs", lambda report: report.problem("proof: broken"))
    shown = p3o("doctor")
    assert shown.code == 2 and shown.out.splitlines()[-1] == "1 problem: see above"
