"""Files of a stranger carry payloads, each of which would make a folder if it ran. None runs, and the refusal is one line.

Also planted elsewhere: a pickle in a checkpoint's state (test_models, test_bad_input), in a sharded checkpoint's index, `evil.py` beside
a config.json (test_models), pytorch_model.bin (test_models), a .pkl as data (test_bad_input). Here the payloads are live.
"""

import io
import json
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tiny import LLAMA, preferences

from p3o_lightning import PairwisePolicy, PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.errors import InputError
from p3o_lightning.models import CHECKPOINT_KEY, attach_adapter, load_policy, load_reward_backbone, read_checkpoint
from p3o_lightning.tokenizers import byte_tokenizer, load_tokenizer

BYTES = byte_tokenizer()
CONFIG = {**LLAMA, "max_position_embeddings": 512}
BREAK_OUT = (
    "{{ cycler.__init__.__globals__.os.mkdir(RAN) }}",
    "{{ lipsum.__globals__['os'].mkdir(RAN) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir(RAN) }}",
    "{{ strftime_now.__globals__['__builtins__']['eval']('__import__(\"os\").mkdir(RAN)') }}",
    "{% set x = messages.append({'role': 'user', 'content': 'more'}) %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ ('' | attr('__class__')).__mro__ }}",
    "{{ self._TemplateReference__context.environment.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir(RAN) }}",
    "{{ 1 / 0 }}",
    "{{ range(10 ** 12) | list }}",
    "{{ nothing.at.all }}",
    "{% for",
)


class Evil:
    """Makes the folder `ran` when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.ran),)


@pytest.fixture
def ran(tmp_path):
    """The folder that a payload would make. It is checked at the end that none did, and before that the payload works."""
    folder = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(folder)))
    folder.rmdir()
    yield folder
    assert not folder.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A good model folder, to copy and tamper with."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    load_policy(CONFIG, BYTES).save_pretrained(folder)
    BYTES.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What a good checkpoint of a policy holds."""
    folder = tmp_path_factory.mktemp("checkpoint")
    import lightning.pytorch as L

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=0)
    trainer.strategy.connect(module := SupervisedPolicy(CONFIG, tokenizer="bytes"))
    trainer.save_checkpoint(folder / "good.ckpt")
    assert isinstance(module, SupervisedPolicy)
    return read_checkpoint(folder / "good.ckpt")


def refusal(action: Any) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    return str(caught.value)


def copied(model: Path, folder: Path, **config: Any) -> Path:
    """The good folder once more, its config.json changed."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("where", ["at the top", "in the weights", "in the hyperparameters", "alone", "as bare pickle", "in a tar"])
def test_a_pickle_in_a_checkpoint_does_not_run_wherever_the_checkpoint_is_given(p3o, checkpoint, ran, where):
    path, evil = p3o.folder / "evil.ckpt", Evil(ran)
    content = {
        "at the top": {**checkpoint, "extra": evil},
        "in the weights": {**checkpoint, "state_dict": {**checkpoint["state_dict"], "model.x": evil}},
        "in the hyperparameters": {**checkpoint, "hyper_parameters": {"lr": evil}},
    }.get(where, evil)
    if where == "as bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "in a tar")
    debug = ("fit", "--config", "configs/debug/policy.yaml", "--trainer.default_root_dir", "run")
    for flags in (
        ["--ckpt_path", path],
        ["--ckpt_path", path, "--weights_only", "false"],
        ["--model.model", path],
        ["--model.tokenizer", path],
        ["--model.reward_funcs", path],
        ["--data.tokenizer", path],
    ):
        message = p3o(*debug, *flags).error
        assert "evil.ckpt" in message and ("could run code" in message or "no checkpoint" in message), message
    for load in (SupervisedPolicy, RewardModel, PairwisePolicy):
        refusal(lambda load=load: load.load_from_checkpoint(path))
    assert not (p3o.folder / "run").exists()


def test_a_checkpoint_that_was_tampered_with_is_refused_and_writes_nowhere_else(checkpoint, tmp_path, ran):
    path, about = tmp_path / "tampered.ckpt", checkpoint[CHECKPOINT_KEY]
    files, peft = about["tokenizer"], {"r": 1, "target_modules": ["q_proj"]}
    for name in ("../../escaped", "/escaped", str(tmp_path / "escaped"), "..", ".", "", "a/../../escaped"):
        torch.save({**checkpoint, CHECKPOINT_KEY: {**about, "tokenizer": {**files, name: "x"}}}, path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
            (tmp_path / "temporary").mkdir(exist_ok=True)
            try:
                load_tokenizer(path)
            except InputError as error:
                assert "whose tokenizer could not be loaded" in str(error)
            assert not any((tmp_path / "temporary").iterdir())
        assert not (tmp_path / "escaped").exists() and not Path("/escaped").exists()
    for wrong in (
        {"tokenizer": 3},
        {"tokenizer": {"tokenizer.json": 3}},
        {"tokenizer": {3: "x"}},
        {"tokenizer": {}},
        {"tokenizer": {"tokenizer.json": "{}"}},
        {
            "tokenizer": {
                **files,
                "evil.py": f"import os\nos.mkdir({str(ran)!r})\n",
                "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}),
            }
        },
    ):
        torch.save({**checkpoint, CHECKPOINT_KEY: {**about, **wrong}}, path)
        assert "tampered.ckpt" in refusal(lambda: load_tokenizer(path))
    for wrong in (
        {"config": 3},
        {"config": "no JSON"},
        {"config": "[]"},
        {"config": "{}"},
        {"config": json.dumps({"model_type": "unheard-of"})},
        {"config": about["config"].replace('"hidden_size": 16', '"hidden_size": 24')},
        {"config": about["config"].replace('"hidden_size": 16', '"hidden_size": "sixteen"')},
        {"classifier": "x"},
        {"peft": 3},
        {"peft": {"no": "such field"}},
        {"peft": {**peft, "megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "evil_megatron"}},
    ):
        torch.save({**checkpoint, CHECKPOINT_KEY: {**about, **wrong}}, path)
        refusal(lambda: load_policy(path, BYTES))
    for wrong in (3, [], {}, {"config": about["config"]}, None):
        torch.save({**checkpoint, CHECKPOINT_KEY: wrong}, path)
        assert "not a checkpoint of p3o_lightning" in refusal(lambda: load_policy(path, BYTES))
    for wrong in (3, {}, {"model.x": torch.ones(1)}, {3: 4}):
        torch.save({**checkpoint, "state_dict": wrong}, path)
        assert "tampered.ckpt" in refusal(lambda: load_policy(path, BYTES))


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_pickle_in_a_sharded_checkpoint_does_not_run(p3o, checkpoint, ran, name):
    folder = p3o.folder / "sharded.ckpt"
    folder.mkdir()
    torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, folder / "meta.pt")
    (folder / name).write_bytes(pickle.dumps(Evil(ran)))
    debug = ("fit", "--config", "configs/debug/sft.yaml", "--trainer.default_root_dir", "run")
    for flag in ("--ckpt_path", "--model.model"):
        assert "sharded.ckpt" in p3o(*debug, flag, folder).error


def test_an_adapters_config_names_no_module_to_import(tmp_path, ran, monkeypatch):
    (tmp_path / "evil_megatron.py").write_text(f"import os\nos.mkdir({str(ran)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"target_modules": ["q_proj"], "megatron_config": {"x": 1}, "megatron_core": "evil_megatron"}
    assert "megatron_config" in refusal(lambda: attach_adapter(load_policy(CONFIG, BYTES), config))


# ------------------------------------------------------------------------------------------------ model folders


def loads(source: Path) -> list[Any]:
    """Every way in which a model folder is read."""
    return [
        lambda: load_policy(source, BYTES),
        lambda: load_reward_backbone(source, BYTES),
        lambda: load_reward_backbone(source, BYTES, trained=True),
        lambda: RewardModel(source, tokenizer="bytes"),
        lambda: PairwisePolicy(CONFIG, tokenizer="bytes", reward_funcs=str(source)),
    ]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt.index", "tf_model.h5", "flax_model.msgpack", "adapter_model.bin"])
def test_weights_that_could_run_code_are_not_read(model, tmp_path, ran, name):
    folder = copied(model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    for content in (load_policy(model, BYTES).state_dict(), {"weight": Evil(ran)}):  # all is refused, be it good or not
        torch.save(content, folder / name)
        for load in loads(folder):
            assert "pickled" in refusal(load)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    for file in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (folder / file).write_text(json.dumps(index))
        for load in loads(folder):
            assert "pickled" in refusal(load)
    torch.save({"weight": Evil(ran)}, folder / "model.safetensors")  # by another name
    for load in loads(folder):
        assert "pickled" in refusal(load)


@pytest.mark.parametrize("directory", ["absolute", "above"])
def test_an_index_of_weights_leads_nowhere_good(model, tmp_path, ran, directory):
    folder = copied(model, tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(ran)}, tmp_path / "elsewhere.bin")
    target = str(tmp_path / "elsewhere.bin") if directory == "absolute" else "../elsewhere.bin"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": target}}))
    for load in loads(folder):
        refusal(load)


def test_an_adapter_beside_a_model_is_no_way_in(model, tmp_path, ran):
    folder = copied(model, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base", "r": 1}))
    torch.save({"weight": Evil(ran)}, folder / "adapter_model.bin")
    for load in loads(folder)[:2]:
        refusal(load)


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_does_not_run(model, tmp_path, ran, known):
    auto = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")}
    folder = copied(model, tmp_path / "code", auto_map=auto, **({} if known else {"model_type": "evil"}))
    payload = f"import os\nos.mkdir({str(ran)!r})\n"
    for name in (
        "evil.py",
        "modeling_evil.py",
        "configuration_evil.py",
        "setup.py",
        "conftest.py",
        "custom_generate/generate.py",
        "sitecustomize.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(payload)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    if known:  # transformers has a class of its own for this kind, and takes it
        assert load_policy(folder, BYTES).generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=1).shape == (1, 2)
    else:
        for load in loads(folder):
            assert "code" in refusal(load)
    try:
        load_tokenizer(folder)
    except InputError as error:
        assert "code" in str(error)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "evil"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": 3},
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": -1},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"vocab_size": -5},
        {"rope_scaling": {"rope_type": "evil"}},
        {"rope_parameters": 3},
        {"architectures": 3},
        {"architectures": ["EvilForSequenceClassification"], "id2label": 3},
        {"hidden_act": "__import__('os').system('x')"},
        {"hidden_act": "no such function"},
        {"model_type": 3},
        {"model_type": None},
        {"model_type": "../evil"},
        {"dtype": "no such type"},
        {"torch_dtype": "__class__"},
        {"auto_map": 3},
        {"transformers_version": 3},
        {"pad_token_id": "x"},
        {"base_model_pp_plan": 3},
    ],
    ids=str,
)
def test_a_config_of_nonsense_ends_in_one_line(model, tmp_path, wrong):
    folder = copied(model, tmp_path / "nonsense", **wrong)
    for load in (load_policy, load_reward_backbone):
        try:
            load(folder, BYTES)
        except InputError as error:
            assert "nonsense" in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"x"', "\0", "\ufeff{}", "{}", "[" * 100_000, '{"a":' * 50_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_of_nonsense_in_a_model_folder_end_in_one_line(model, tmp_path, name, content):
    folder = copied(model, tmp_path / "nonsense")
    (folder / name).write_text(content)
    for load in (lambda: load_policy(folder, BYTES), lambda: load_reward_backbone(folder, BYTES), lambda: load_tokenizer(folder)):
        try:
            load()
        except InputError as error:
            assert "nonsense" in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("template", BREAK_OUT)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "checkpoint"])
def test_a_chat_template_does_not_break_out(model, tmp_path, checkpoint, ran, template, place):
    source = tmp_path / "model"
    template = template.replace("RAN", repr(str(ran)))
    folder = copied(model, source)
    if place == "tokenizer_config.json":
        values = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps({**values, "chat_template": template}))
    elif place == "chat_template.jinja":
        (folder / place).write_text(template)
    else:
        about = checkpoint[CHECKPOINT_KEY]
        source = tmp_path / "model.ckpt"
        torch.save({**checkpoint, CHECKPOINT_KEY: {**about, "tokenizer": {**about["tokenizer"], "chat_template.jinja": template}}}, source)
    data = PreferenceDataModule(str(preferences(tmp_path)), str(source), "pairs", chat=True)
    assert data.path and load_tokenizer(source).chat_template == template
    message = refusal(data.setup)
    assert "the chat template" in message and "none can be used" in message


# ------------------------------------------------------------------------------------------------ GGUF


def gguf_strings(*pairs: tuple[str, bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(name)) + name.encode() + value for name, value in pairs)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        b"GGUF" + b"\0" * 100,
        b"GGUF" + b"\xff" * 100,
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_strings(("general.architecture", struct.pack("<I", 99))),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60) + b"x",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_strings(("general.architecture", struct.pack("<IQ", 8, 4) + b"evil")),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_strings(("a", struct.pack("<I", 9) * 40)),
        b"\x80\x04N.",
        b"",
    ],
    ids=range(12),
)
def test_a_gguf_of_nonsense_ends_in_one_line(tmp_path, content):
    pytest.importorskip("gguf")
    path = tmp_path / "nonsense.gguf"
    path.write_bytes(content)
    for load in (lambda: load_policy(path, BYTES), lambda: load_tokenizer(path)):
        assert "nonsense.gguf" in refusal(load)


# ------------------------------------------------------------------------------------------------ data


def setup(path: Path | str) -> PreferenceDataModule:
    data = PreferenceDataModule(str(path), "bytes", "pairs", batch_size=1)
    data.setup()
    return data


def test_pickles_in_data_are_not_read(tmp_path, ran):
    evil = Evil(ran)
    objects = io.BytesIO()
    np.save(objects, np.array([evil], dtype=object), allow_pickle=True)
    torch_bytes = io.BytesIO()
    torch.save(evil, torch_bytes)
    for ending in (
        "pkl",
        "pickle",
        "pt",
        "pth",
        "bin",
        "npy",
        "npz",
        "joblib",
        "dill",
        "jsonl",
        "json",
        "csv",
        "parquet",
        "jsonl.gz",
        "arrow",
    ):
        for content in (pickle.dumps(evil), pickle.dumps(evil, 0), objects.getvalue(), torch_bytes.getvalue()):
            path = tmp_path / f"evil.{ending}"
            path.write_bytes(content)
            assert f"evil.{ending}" in refusal(lambda path=path: setup(path))


def test_a_script_in_a_data_folder_does_not_run(tmp_path, ran, monkeypatch):
    folder = tmp_path / "owner" / "evil"
    folder.mkdir(parents=True)
    payload = f"import os\nos.mkdir({str(ran)!r})\n"
    for name in ("evil.py", "__init__.py", "dataset.py", "conftest.py"):
        (folder / name).write_text(payload)
    assert "a folder without data" in refusal(lambda: setup(folder))
    preferences(folder)
    (folder / "README.md").write_text("---\nconfigs: [{config_name: evil, data_files: evil.py}]\n---\n")
    monkeypatch.chdir(tmp_path)
    for name in ("owner/evil", "./owner/evil", folder):  # not taken for the hub's either
        assert setup(name).report.usable == 16
    with pytest.raises(InputError, match="cannot load"):  # the hub's own: `datasets` runs no script any more
        monkeypatch.chdir(folder)
        setup("evil/none")


def saved(folder: Path, features: dict[str, Any] | None = None, **state: Any) -> Path:
    """A dataset saved by `datasets`, then tampered with."""
    rows = [{"prompt": f"Why {number}?", "chosen": " So.", "rejected": " No."} for number in range(8)]
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    for name, values in (("state.json", state), ("dataset_info.json", {"features": features} if features is not None else {})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}))
    return folder


@pytest.mark.parametrize(
    "features",
    [
        {"prompt": {"_type": "Pickle"}},
        {"prompt": {"_type": "os.system"}},
        {"prompt": {"_type": "Value", "dtype": "__import__('os').mkdir('ran')"}},
        {"prompt": {"_type": "Value", "dtype": "object"}},
        {"prompt": {"_type": "Audio"}, "chosen": {"_type": "Value", "dtype": "string"}},
        {"prompt": {"_type": "Array2D", "shape": [10**9, 10**9], "dtype": "int64"}},
        {"prompt": {"_type": "ClassLabel", "names_file": "/etc/passwd"}},
        {"prompt": 3},
        {"x": "y"},
        3,
        [],
    ],
    ids=str,
)
def test_features_of_a_saved_dataset_run_nothing(tmp_path, ran, features):
    assert "saved" in refusal(lambda: setup(saved(tmp_path / "saved", features)))


@pytest.mark.parametrize(
    "state",
    [
        {"_data_files": [{"filename": "../evil.pkl"}]},
        {"_data_files": [{"filename": "/dev/zero"}]},
        {"_data_files": []},
        {"_data_files": 3},
        {"_data_files": None},
        {"_format_type": "evil"},
        {"_format_type": "torch", "_format_kwargs": {"evil": 1}},
        {"_format_columns": ["evil"]},
        {"_indices_data_files": [{"filename": "../evil.pkl"}]},
        {"_fingerprint": 3},
        {"_split": {"evil": 1}},
        {"_output_all_columns": "x"},
    ],
    ids=str,
)
def test_the_state_of_a_saved_dataset_runs_nothing(tmp_path, ran, state):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(ran)))
    folder = saved(tmp_path / "saved", **state)
    try:
        assert setup(folder).report.usable == 8
    except InputError as error:
        assert "saved" in str(error) and len(str(error).splitlines()) == 1


def test_an_arrow_file_with_wrong_offsets_is_refused(tmp_path):
    """It is mapped into memory as it is: offsets that lead out of it would be followed, and the process would crash."""
    folder = tmp_path / "saved"
    texts = [f"Why number {number}?" for number in range(50)]
    datasets.Dataset.from_dict({"prompt": texts, "chosen": texts, "rejected": texts}).save_to_disk(folder)
    file = next(folder.glob("*.arrow"))
    content = file.read_bytes()
    ends = np.cumsum([len(text) for text in texts])[:9].astype("<i4").tobytes()
    assert content.count(ends) == 3
    file.write_bytes(content.replace(ends, np.full(9, 2**31 - 1, dtype="<i4").tobytes()))
    assert "cannot load" in refusal(lambda: setup(folder))


def test_pictures_in_data_are_not_opened(tmp_path, monkeypatch):
    """Decoding one runs a decoder on a stranger's bytes, and opens whatever file or address a row names."""
    opened = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda self, value, **_: opened.append(value))
    rows = [
        {"prompt": f"Why {number}?", "chosen": "a", "rejected": "b", "x": {"path": None, "bytes": b"no picture"}} for number in range(4)
    ]
    pictures = datasets.Dataset.from_list(rows).cast_column("x", datasets.Image(decode=True))
    pictures.save_to_disk(tmp_path / "saved")
    assert setup(tmp_path / "saved").report.usable == 4
    for streaming in (False, True):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, split, streaming: pictures.to_iterable_dataset() if streaming else pictures
        )
        from p3o_lightning.data_files import read_records

        assert len(list(read_records("owner/pictures", streaming=streaming))) == 4
    assert not opened


def test_pickles_in_the_metadata_of_parquet_and_arrow_do_not_run(tmp_path, ran):
    payload = pickle.dumps(Evil(ran))
    fields = [
        pa.field(name, pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload})
        for name in ("prompt", "chosen", "rejected")
    ]
    schema = pa.schema(fields, metadata={"pandas": payload, "huggingface": payload})
    table = pa.table({name: [f"{name} {number}" for number in range(4)] for name in ("prompt", "chosen", "rejected")}, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "evil.parquet")
    assert setup(tmp_path / "evil.parquet").report.usable == 4
    folder = saved(tmp_path / "saved")
    with pa.ipc.new_stream(next(folder.glob("*.arrow")), schema) as writer:
        writer.write_table(table)
    try:
        setup(folder)
    except InputError as error:
        assert "saved" in str(error)


def test_nothing_of_a_strangers_is_imported(tmp_path, ran, monkeypatch):
    """A dataset or model folder is never put where Python looks for modules."""
    folder = tmp_path / "data"
    folder.mkdir()
    preferences(folder)
    for name in ("json.py", "torch.py", "datasets.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(ran)!r})")
    before = [*sys.path]
    setup(folder)
    assert sys.path == before and isinstance(json, types.ModuleType)
