"""What leaves a run: the adapter beside the merged model, the card with the run's figures, and the hub."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from tiny import LLAMA, letters, policy, preferences, share_of_a, trainer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from p3o_lightning import InputError, PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy, __version__
from p3o_lightning.callbacks import Export
from p3o_lightning.model_card import FIGURES, HEAD, model_card
from p3o_lightning.text import escaped

IDS = torch.tensor([[0, 1, 2, 8], [3, 4, 5, 6]])
LORA = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}  # far from the identity at once


# ---- adapters


@pytest.mark.parametrize("owner", [SupervisedPolicy, RewardModel, PairwisePolicy])
def test_the_adapter_alone_on_its_base_is_the_merged_model(owner, tmp_path):
    """The base is a folder of the user's own; PEFT finds it by the name in the adapter's config."""
    from peft import PeftModel

    torch.manual_seed(0)
    base = SupervisedPolicy(LLAMA, tokenizer=letters()).export(tmp_path / "base")
    module = owner(str(base), peft_config=LORA, **({"reward_funcs": share_of_a} if owner is PairwisePolicy else {}))
    folder = module.export(tmp_path / "export", adapter=True)
    assert {path.name for path in (folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    auto = AutoModelForSequenceClassification if owner is RewardModel else AutoModelForCausalLM
    plain = auto.from_pretrained(base, **({"num_labels": 1, "pad_token_id": 9} if owner is RewardModel else {}))
    again = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    merged = auto.from_pretrained(folder)
    assert_close(again(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)
    assert_close(again(IDS).logits, module.model.eval()(IDS).logits, rtol=0, atol=1e-5)
    with again.disable_adapter():
        assert (again(IDS).logits - merged(IDS).logits).abs().max() > 1e-3


def test_without_an_adapter_there_is_none_to_write_which_is_told_before_training(tmp_path):
    module = policy()
    with pytest.raises(InputError, match=r"export.adapter is true, but the model has no adapter: set model.peft_config"):
        module.export(tmp_path / "export", adapter=True)
    data = PreferenceDataModule(str(preferences(tmp_path)), batch_size=4, max_length=16)
    run = trainer(tmp_path, max_steps=1, callbacks=[Export(adapter=True)])
    with pytest.raises(InputError, match=r"export.adapter"):
        run.fit(module, data)
    assert run.global_step == 0


def test_the_command_writes_the_adapter(p3o):
    lora = '{"r": 2, "lora_alpha": 4}'
    ended = p3o(
        *("fit", "--config", "configs/debug/sft.yaml", "--trainer.max_steps", 1, "--model.peft_config", lora, "--export.adapter", "true")
    )
    assert ended.code == 0, ended
    assert Path("runs/debug/sft/export/adapter/adapter_model.safetensors").is_file()


# ---- cards


def table_of(card: str) -> dict[str, float]:
    """The figures in a card, by tag."""
    rows = re.findall(r"^\| (.+?) \| (\S+) \| .* \|$", card, re.M)
    return {re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), name): float(value) for name, value in rows if name != "figure"}


def test_a_card_says_what_the_run_measured(tmp_path):
    """Its figures are the run's last ones; its rows are those of the data's report."""
    data = PreferenceDataModule(str(preferences(tmp_path)), batch_size=4, max_length=16)
    run, module = trainer(tmp_path, max_steps=3, val_check_interval=3), policy(lr=1e-2)
    run.fit(module, data)
    card = (module.export(tmp_path / "export") / "README.md").read_text()
    figures = table_of(card)
    for name in ("objective/scores", "objective/kl", "val/scores", "val/kl", "rewards/share_of_a/mean"):
        assert figures[name] == pytest.approx(float(run.callback_metrics[name]), rel=1e-3, abs=1e-9), name
    assert "margin" not in figures, "of pairs, which this is not"
    assert "3 updates. data: 16 rows, 16 usable, 14 for training, 2 for validation" in card
    assert f"p3o_lightning {__version__}" in card and f"torch {torch.__version__.partition('+')[0]}" in card
    assert '"kl_coef": 0.05' in card
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "tags": ["p3o_lightning", "rlhf"], "pipeline_tag": "text-generation"}


def test_a_reward_models_card_has_its_accuracy_with_interval_and_length_rule(tmp_path):
    data = PreferenceDataModule(str(preferences(tmp_path)), batch_size=4, max_length=16)
    torch.manual_seed(0)
    module = RewardModel(LLAMA, tokenizer=letters(), lr=1e-2)
    trainer(tmp_path, max_steps=3, val_check_interval=3).fit(module, data)
    card = (module.export(tmp_path / "export") / "README.md").read_text()
    assert {"val/accuracy", "val/accuracy_low", "val/accuracy_high", "val/length_rule_accuracy", "val/log_loss"} <= table_of(card).keys()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification.from_pretrained" in card


def test_every_figure_of_a_card_is_a_tag_that_the_documents_explain():
    text = (Path(__file__).parent.parent / "docs/metrics.md").read_text()
    for name in FIGURES:
        assert name.rpartition("/")[2].removeprefix("mean_") in text, name


def test_a_strangers_words_do_nothing_in_a_card():
    """Names of rewards and models come from configs and data: no markup, no end of the fence or of the head, no escape."""
    evil = '</td><script>alert(1)</script> | x | [a](javascript:b) `c`\n---\n```\n# d\x1b[2J\u202e"'
    card = model_card(
        title=evil,
        summary=evil,
        classes=("AutoModelForCausalLM", "AutoTokenizer"),
        task="text-generation",
        updates=1,
        settings={"model": evil, "tokenizer": evil, evil: evil},
        figures={f"rewards/{evil}/mean": 1.0, "loss": float("nan")},
        data=evil,
    )
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", card)
    head, body = card.split("\n---\n")[0], card.partition("\n---\n")[2]
    assert yaml.safe_load(head.removeprefix("---\n")) == yaml.safe_load(HEAD.removeprefix("---\n")) | {"pipeline_tag": "text-generation"}
    assert "\n---\n" not in body and "\n# d" not in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert any(escaped(f"rewards/{evil}/mean") in row for row in rows)
    assert all(row.count(" | ") == 2 and "<script" not in row and "](" not in row for row in rows)
    settings = re.findall(r"^(`{4,})json\n(.*?)\n\1$", body, re.M | re.S)
    assert len(settings) == 1 and json.loads(settings[0][1])["model"] == evil


def test_a_base_model_is_named_where_it_is_one_of_the_hubs(tmp_path):
    settings = {"classes": ("AutoModelForCausalLM", "AutoTokenizer"), "title": "t", "summary": "s", "task": "text-generation", "updates": 0}
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M"' in model_card(settings={"model": "HuggingFaceTB/SmolLM2-135M"}, **settings)
    for other in ("/home/me/model", "runs/sft/export", {"model_type": "llama"}, "a/b\nlicense: mit"):
        assert "base_model" not in model_card(settings={"model": other}, **settings), other


# ---- the hub


class Hub(ThreadingHTTPServer):
    """What of the hub's interface an upload asks for. Keeps repositories, files, and the tokens that were shown."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses: dict[str, int] = {}  # part of a path -> status

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        there = any(f"/models/{name}" in self.path for name in self.server.repositories)
        self.answer(*(({"sha": "0" * 40, "siblings": [], "id": "me/model"}, 200) if there else ({"error": "none"}, 404)))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.headers.get("Content-Length") else self.chunks()
        self.server.tokens.add(self.headers.get("Authorization"))
        for part, status in self.server.refuses.items():
            if part in self.path:
                return self.answer({"error": "no"}, status)
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.server.repositories:
                return self.answer({"error": "there", "url": f"{self.server.url}/{name}"}, 409)
            private = asked["private"] if "private" in asked else asked["visibility"] == "private"  # as older clients write it, or newer
            self.server.repositories[name] = {**asked, "private": private}
            return self.answer({"url": f"{self.server.url}/{name}"})
        if "/preupload/" in self.path:
            files = [{"path": item["path"], "uploadMode": "regular", "shouldIgnore": False} for item in json.loads(body)["files"]]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.server.url}/me/model/commit/0", "commitOid": "0" * 40})
        return self.answer({})

    def chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        return whole

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and a token in the environment."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("p3o_lightning.hub.HfApi", lambda: huggingface_hub.HfApi(endpoint=server.url))
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_sends_its_export_to_a_private_repository(p3o, hub):
    ended = p3o("fit", "--config", "configs/debug/sft.yaml", "--trainer.max_steps", 1, "--export.push_to_hub", "me/model")
    assert ended.code == 0 and f"sent to {hub.url}/me/model" in ended.err, ended
    assert hub.repositories["me/model"]["private"] is True
    folder = Path("runs/debug/sft/export")
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.tokens == {"Bearer hf_secret123"}
    written = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert written and not any(b"hf_secret123" in path.read_bytes() for path in written) and "hf_secret123" not in ended.err + ended.out
    assert p3o("fit", "--config", "configs/debug/sft.yaml", "--trainer.max_steps", 1, "--export.push_to_hub", "me/model").code == 0, "again"


def test_a_public_repository_is_asked_for(tmp_path, hub):
    module = policy()
    address = module.push_to_hub(module.export(tmp_path / "export"), "me/open", private=False)
    assert address.startswith(hub.url) and hub.repositories["me/open"]["private"] is False


def test_a_config_file_cannot_send_anything(p3o, hub):
    Path("mine.yaml").write_text("export: {push_to_hub: them/model, hub_private: false}\n")
    fit = ("fit", "--config", "configs/debug/sft.yaml", "--config", "mine.yaml", "--trainer.max_steps", 1)
    assert re.match(
        r"export.push_to_hub is 'them/model' in a config file, which may send nothing out: type --export.push_to_hub them/model",
        p3o(*fit).error,
    )
    assert hub.repositories == {} and not Path("runs").exists()
    assert p3o(*fit, "--write_outside", "true").code == 0 and hub.repositories["them/model"]["private"] is False


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/", "me/mo del", "../model", "https://huggingface.co/me/model"])
def test_what_is_no_repository_is_told_before_training(p3o, hub, name):
    error = p3o("fit", "--config", "configs/debug/sft.yaml", "--export.push_to_hub", name).error
    assert error.startswith(f"export.push_to_hub is {name!r}, which is no name of a repository: give user/model.")
    assert hub.repositories == {} and not Path("runs").exists()


def test_without_a_token_or_without_the_right_to_write_nothing_is_trained(p3o, hub, monkeypatch):
    push = ("fit", "--config", "configs/debug/sft.yaml", "--export.push_to_hub", "me/model")
    hub.refuses["/repos/create"] = 403
    assert "'me/model', which cannot be written to (" in p3o(*push).error and not Path("runs").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("p3o_lightning.hub.get_token", lambda: None)
    assert p3o(*push).error == (
        "export.push_to_hub is 'me/model', but there is no token: set HF_TOKEN in the environment, or run hf auth login."
    )
    assert not Path("runs").exists()


def test_an_upload_that_fails_leaves_the_export_and_says_how_to_send_it(p3o, hub):
    hub.refuses["/commit/"] = 403
    error = p3o("fit", "--config", "configs/debug/sft.yaml", "--trainer.max_steps", 1, "--export.push_to_hub", "me/model").error
    folder = Path("runs/debug/sft/export").absolute()
    assert "where the export could not be sent (" in error and error.endswith(f"hf upload me/model {folder}")
    assert AutoModelForCausalLM.from_pretrained(folder) and "hf_secret123" not in error
