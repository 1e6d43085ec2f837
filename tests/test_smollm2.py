"""The SmolLM2 recipe on the real model and the real preferences: two updates of each stage, then the exports load and answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p3o_lightning.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the converted model where the recipe looks for it."""
    from p3o_lightning.commands import smollm2
    from p3o_lightning.errors import InputError

    data = Path(os.environ.get("P3O_DATA", ""))
    if not os.environ.get("P3O_DATA") or not (data / "hh-rlhf" / "harmless-base-test.jsonl.gz").is_file():
        pytest.skip("P3O_DATA does not name a folder with hh-rlhf/harmless-base-test.jsonl.gz")
    try:
        smollm2.find_gguf()
    except InputError as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.convert(folder / "models" / "smollm2-135m-instruct")
    return folder


def test_two_updates_of_every_stage(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.chdir(workplace)
    small = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--data.max_length=128"]
    for stage, batch in (("sft", 2), ("reward", 2), ("policy", 4)):
        # what two updates on a few texts teach is chance: at a small rate, so that the model still knows what it is asked
        extra = ["--model.lr=1e-6", *(["--model.micro_batch_size=2", "--model.max_completion_length=8"] if stage == "policy" else [])]
        monkeypatch.setattr("sys.argv", ["p3o"])
        main(["fit", "--config", f"configs/smollm2-hh/{stage}.yaml", *small, f"--data.batch_size={batch}", *extra])
        assert (Path("runs/smollm2-hh") / stage / "checkpoints" / "last.ckpt").is_file()

    policy = AutoModelForCausalLM.from_pretrained("runs/smollm2-hh/policy/export")
    tokenizer = AutoTokenizer.from_pretrained("runs/smollm2-hh/policy/export")
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = policy.generate(**question, max_new_tokens=12, do_sample=False)[0, question["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert AutoModelForSequenceClassification.from_pretrained("runs/smollm2-hh/reward/export").config.num_labels == 1
