"""Loading a model, safe by default; checkpoints that describe their own model; LoRA.

A model source is a hub name, a local transformers folder, a GGUF file, a checkpoint of ours, a `PreTrainedModel`, or a
from-scratch config: a `PretrainedConfig`, or a mapping such as `{model_type: llama, hidden_size: 64, ...}`.
Nothing here runs code that came with a model: `trust_remote_code` is off, weights are safetensors, checkpoints are
read with `weights_only=True`.
"""

from __future__ import annotations

import copy
import difflib
import json
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from p3o_lightning.errors import InputError
from p3o_lightning.forwards import is_adapted, unwrapped
from p3o_lightning.norms import quicken_norms
from p3o_lightning.sharded_checkpoints import read_rest, read_whole

ModelSource = dict[str, Any] | str | Path | PreTrainedConfig | PreTrainedModel  # in this order: saved configs write a mapping as one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_KEY = "p3o_lightning"  # where a checkpoint of ours describes its own model and tokenizer


# ------------------------------------------------------------------------------------------------ models


def load_policy(source: ModelSource, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model. `tokenizer` fills in the vocabulary size and special ids of a from-scratch config."""
    model = _prepared(_load(source, tokenizer, dtype, classifier=False))
    _check_vocabulary(tokenizer, _embedded(model))
    return model


def load_reward_backbone(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", *, trained: bool = False
) -> PreTrainedModel:
    """A sequence classifier with one scalar output. A causal model becomes one with a fresh head, unless it has to be `trained`.

    Its `pad_token_id` is set to the tokenizer's, which must differ from EOS where the exported model is to be used by
    plain transformers code (it finds the last token by id; ours never does): see `distinct_pad_token`.
    """
    model = _prepared(_load(source, tokenizer, dtype, classifier=True, trained=trained))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id == highest_token_id(tokenizer) == _embedded(model):  # the one token that `distinct_pad_token` adds
        model.resize_token_embeddings(_embedded(model) + 1, mean_resizing=False)
    _check_vocabulary(tokenizer, _embedded(model))
    return model


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    """What every model gets, from wherever it was loaded."""
    config: Any = model.config.get_text_config()
    # torch's fused attention knows no cap on its logits; transformers before 5.21 chose it for Gemma 2 all the same
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    quicken_norms(model)
    return model


def highest_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _embedded(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.num_embeddings


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedded: int) -> None:
    if highest_token_id(tokenizer) >= embedded:
        raise InputError(
            f"model.tokenizer {tokenizer.name_or_path!r} has token ids up to {highest_token_id(tokenizer)}, but the model embeds "
            f"{embedded} tokens: give the model's own tokenizer."
        )


def _load(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, dtype: str, *, classifier: bool, trained: bool = False
) -> PreTrainedModel:
    if dtype not in (*DTYPES, "auto"):
        raise InputError(f"model.dtype is {dtype!r}: choose one of {', '.join((*DTYPES, 'auto'))}.")
    if isinstance(source, PreTrainedModel):
        return _cast(_with_head(source, classifier, trained, f"a {type(source).__name__}"), dtype)
    if isinstance(source, PreTrainedConfig | Mapping):
        return _cast(_from_config(_scratch_config(source, tokenizer, classifier), classifier), dtype)
    if not isinstance(source, str | Path):
        fix = "merge its adapter first (merge_and_unload), then set model.peft_config" if is_adapted(source) else SOURCES
        raise InputError(f"model is a {type(source).__name__}: {fix}")
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        from p3o_lightning.gguf_files import load_gguf_model

        model = load_gguf_model(existing(path), None if dtype == "auto" else DTYPES[dtype])
        return _with_head(model, classifier, trained, repr(str(source)))
    if path.suffix == ".ckpt":
        checkpoint = read_checkpoint(path if path.is_dir() else existing(path))
        try:
            model = from_description(checkpoint)
        except InputError:
            raise
        except Exception as error:  # its description and its weights may be of any kind, and need not fit each other
            raise InputError(f"model is {str(source)!r}, whose model could not be built: {one_line(error)}. {SOURCES}") from error
        return _cast(_with_head(model, classifier, trained, repr(str(source))), dtype)
    return _from_folder_or_hub(source, dtype, classifier, trained)


def _from_folder_or_hub(source: str | Path, dtype: str, classifier: bool, trained: bool) -> PreTrainedModel:
    name = folder_or_hub_name(source, ("config.json",), "model", SOURCES)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        if classifier:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
                _check_labels(config, repr(str(source)))
            options["num_labels"] = 1
        loaded: Any = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_pretrained(name, **options)
    except InputError:
        raise
    except Exception as error:  # a config.json may say anything, and what it says decides which code fails over it
        shapes = "ignore_mismatched_sizes" in str(error)
        reason = "its weights have other shapes than its config.json says" if shapes else one_line(error)
        raise InputError(f"model is {str(source)!r}, which could not be loaded: {reason}. {SOURCES}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])  # transformers fills them with random numbers
    if classifier and not trained:
        missing = [weight for weight in missing if weight.startswith(f"{model.base_model_prefix}.") and ".pooler." not in weight]
    if missing:
        what = "a reward model with a trained scalar head" if trained else "a model of the kind that is needed here"
        raise InputError(f"model is {str(source)!r}, whose files lack {len(missing)} weights, the first is {missing[0]}: give {what}.")
    return model


def _from_config(config: PreTrainedConfig, classifier: bool) -> PreTrainedModel:
    """A model with random weights."""
    auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        return auto.from_config(config, trust_remote_code=False)
    except (ValueError, StrictDataclassError) as error:
        kind = "sequence classifier" if classifier else "causal language model"
        raise InputError(
            f"model has model_type {config.model_type!r}, of which transformers makes no {kind} ({one_line(error)[:120]}): choose another."
        ) from error


def _cast(model: PreTrainedModel, dtype: str | torch.dtype) -> PreTrainedModel:
    """Weights in `dtype`, buffers as they are: see `casting.buffers_kept`."""
    if dtype != "auto":
        kind = dtype if isinstance(dtype, torch.dtype) else DTYPES[dtype]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind)
        model.config.dtype = kind  # a model made from this config, as from a checkpoint, has these weights unrounded
    return model


SOURCES = "Give a hub name, a transformers folder with safetensors, a .gguf file, or a .ckpt of ours."


def _scratch_config(source: PreTrainedConfig | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, classifier: bool) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        config = copy.deepcopy(source)
        if classifier:
            config.num_labels = 1
        return config
    if "model_type" not in source:
        raise InputError(f"model is {dict(source)!r}, a config without model_type: add one, e.g. model_type: llama.")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    options = {"num_labels": 1} if classifier else {}
    try:
        config = AutoConfig.for_model(**{"vocab_size": highest_token_id(tokenizer) + 1, **ids, **options, **source})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model is {dict(source)!r}, which transformers refuses: {one_line(error)}.") from error
    _check_vocabulary(tokenizer, config.get_text_config().vocab_size)
    known = type(config)()  # transformers keeps any other key without a word
    for name in source:
        if not hasattr(known, name) and name not in ("rope_theta", "rope_scaling", "torch_dtype"):
            close = difflib.get_close_matches(name, vars(known), 1)
            fix = f"did you mean {close[0]}?" if close else "remove it."
            raise InputError(f"model.{name} is {source[name]!r}, but a {source['model_type']} config has no such key: {fix}")
    return config


def _with_head(model: PreTrainedModel, classifier: bool, trained: bool, what: str) -> PreTrainedModel:
    """The model itself if it is of the kind wanted; a causal model's backbone under a fresh scalar head."""
    if is_classifier(model):
        if not classifier:
            raise InputError(f"model is {what}, a sequence classifier: a policy needs a causal language model.")
        _check_labels(model.config, what)
        return model
    if not classifier:
        if model.can_generate():
            return model
        raise InputError(f"model is {what}, which has no language modelling head: load it with AutoModelForCausalLM.")
    if trained:
        raise InputError(f"model is {what}, a language model without a trained scalar head: give a trained reward model.")
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    fresh = _cast(_from_config(config, classifier=True), model.dtype)
    getattr(fresh, fresh.base_model_prefix).load_state_dict(model.base_model.state_dict())
    return fresh


def _check_labels(config: PreTrainedConfig, what: str) -> None:
    if config.num_labels != 1:
        raise InputError(f"model is {what} with num_labels={config.num_labels}: a reward model needs one scalar output, num_labels=1.")


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is one of transformers' sequence classifiers, by its naming convention (the class table would import them all)."""
    return type(model).__name__.endswith("ForSequenceClassification")


def existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"model is {str(path)!r}: no such file. {SOURCES}")
    return path


def folder_or_hub_name(source: str | Path, needed: tuple[str, ...], field: str, fix: str) -> str:
    """A local folder that holds one of the files `needed`, or a name to look up on the hub."""
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / file).is_file() for file in needed):
            return str(path)
        if (path / "adapter_config.json").is_file():
            fix = "It holds an adapter alone: merge it into its model (merge_and_unload) and save that."
        raise InputError(f"{field} is {name!r}, a folder without {needed[0]}. {fix}")
    if path.is_file():
        raise InputError(f"{field} is {name!r}, a file of another kind. {fix}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        first = "Run the stage that writes it first. " if path.name == "export" else ""
        raise InputError(f"{field} is {name!r}: no such folder. {first}{fix}")
    return name


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 240 else f"{text[:240]}...").rstrip(".")


# ------------------------------------------------------------------------------------------------ checkpoints of ours


def describe(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a checkpoint needs beside its weights to be a model on its own: plain values, so `weights_only=True` reads it."""
    base = unwrapped(model)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: _text_or_bytes(path) for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {
        "config": base.config.to_json_string(use_diff=False),
        "classifier": is_classifier(base),
        "tokenizer": files,
        "peft": _plain_peft_config(model) if is_adapted(model) else None,
    }


def _text_or_bytes(path: Path) -> str | bytes:
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # a sentencepiece model
        return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, loaded without running anything in it."""
    fix = "give one from <default_root_dir>/checkpoints"
    if path.is_dir():
        return _of_ours(path, read_whole(path))
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no checkpoint: no such file; {fix}.")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{str(path)!r} is no checkpoint, or only a part of one: {fix}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # torch's message says how to run it nevertheless
        raise InputError(f"{str(path)!r} holds more than tensors and plain values, and loading that could run code: {fix}.") from error
    except Exception as error:  # torch raises many types here; each of them means that the file cannot be used
        raise InputError(f"{str(path)!r} is a checkpoint that cannot be read ({one_line(error)}): {fix}.") from error
    return _of_ours(path, checkpoint)


def read_description(path: Path) -> dict[str, Any]:
    """As `read_checkpoint`; of a sharded one, all but weights and optimizer state."""
    return _of_ours(path, read_rest(path)) if path.is_dir() else read_checkpoint(path)


def _of_ours(path: Path, checkpoint: Any) -> dict[str, Any]:
    about = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or not {"stage", "config", "classifier", "tokenizer", "peft"} <= about.keys():
        raise InputError(f"{str(path)!r} is not a checkpoint of p3o_lightning: give one from <default_root_dir>/checkpoints.")
    return checkpoint


def config_of(checkpoint: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config that a checkpoint of ours carries."""
    return AutoConfig.for_model(**json.loads(checkpoint[CHECKPOINT_KEY]["config"]))


def from_description(checkpoint: dict[str, Any], merge: bool = True) -> PreTrainedModel:
    """The model that a checkpoint of ours describes, with its weights; its adapters, if any, are merged, or left on."""
    about = checkpoint[CHECKPOINT_KEY]
    model: Any = _from_config(config_of(checkpoint), about["classifier"])
    if about["peft"] is not None:
        model = attach_adapter(model, about["peft"])
    weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)
    return model.merge_and_unload() if merge and about["peft"] is not None else model


# ------------------------------------------------------------------------------------------------ LoRA


def attach_adapter(model: PreTrainedModel, peft_config: Any) -> Any:
    """The model with trainable adapters of PEFT; its own weights are frozen.

    `peft_config`: a LoraConfig, or a mapping of its fields. A classifier's head is trained in full beside them.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("model.peft_config is set but peft is not installed: pip install peft.") from error
    if isinstance(peft_config, Mapping):
        if "megatron_config" in peft_config:  # with it PEFT imports the module that it names, and it may be a checkpoint's
            raise InputError("model.peft_config has megatron_config, which is not used here: remove it.")
        try:
            peft_config = LoraConfig(**{"target_modules": "all-linear", **peft_config})
        except TypeError as error:
            raise InputError(
                f"model.peft_config is {dict(peft_config)!r}: {one_line(error)}; use the fields of peft.LoraConfig."
            ) from error
    if not isinstance(peft_config, LoraConfig):
        raise InputError(f"model.peft_config is a {type(peft_config).__name__}: give a peft.LoraConfig, or a mapping of its fields.")
    peft_config = copy.deepcopy(peft_config)  # PEFT writes into it
    # with this type PEFT trains a classifier's head in full, and saves it: a fresh head that stays frozen learns nothing
    peft_config.task_type = "SEQ_CLS" if is_classifier(model) else "CAUSAL_LM"
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:  # no layer has the name given
        raise InputError(f"model.peft_config does not fit the model: {one_line(error)}.") from error


def _plain_peft_config(model: Any) -> dict[str, Any]:
    """The fields of the adapter's config that differ from their defaults, as plain values."""
    config = model.peft_config[model.active_adapter]
    default = type(config)().to_dict()
    plain = {name: _plain(value) for name, value in config.to_dict().items() if value != default[name]}
    for name in ("task_type", "inference_mode", "init_lora_weights"):  # told by the model; the weights are loaded, however they began
        plain.pop(name, None)
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    """`value` as JSON has it, None if that is impossible."""
    try:
        return json.loads(json.dumps(value, default=sorted))  # target_modules is a set
    except TypeError:
        return None
