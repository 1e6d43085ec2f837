"""Loading a model and its tokenizer, safe by default, and the one function that scores a response under a policy.

A model source is a hub name, a local transformers folder, a GGUF file, a checkpoint of ours, a `PreTrainedModel`, or a
from-scratch config: a `PretrainedConfig`, or a mapping such as `{model_type: llama, hidden_size: 64, ...}`.
Nothing here runs code that came with a model: `trust_remote_code` is off, weights are safetensors, checkpoints are
read with `weights_only=True`.
"""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from p3o_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

ModelSource = str | Path | dict[str, Any] | PreTrainedConfig | PreTrainedModel
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT_KEY = "p3o_lightning"  # where a checkpoint of ours describes its own model and tokenizer


# ------------------------------------------------------------------------------------------------ models


def load_policy(source: ModelSource, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model. `tokenizer` fills in the vocabulary size and special ids of a from-scratch config."""
    return _load(source, AutoModelForCausalLM, tokenizer, dtype)


def load_reward_backbone(source: ModelSource, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32") -> PreTrainedModel:
    """A sequence classifier with one scalar output; a causal model becomes one with a fresh head.

    Its `pad_token_id` is set to the tokenizer's, which must differ from EOS where the exported model is to be used by
    plain transformers code (it finds the last token by id; ours never does): see `distinct_pad_token`.
    """
    model = _load(source, AutoModelForSequenceClassification, tokenizer, dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def _load(source: ModelSource, auto: Any, tokenizer: PreTrainedTokenizerBase, dtype: str) -> PreTrainedModel:
    if dtype not in (*DTYPES, "auto"):
        raise InputError(f"model.dtype is {dtype!r}: choose one of {', '.join((*DTYPES, 'auto'))}.")
    for_rewards = auto is AutoModelForSequenceClassification
    options = {"num_labels": 1} if for_rewards else {}
    if isinstance(source, PreTrainedModel):
        model = _as_classifier(source) if for_rewards else source
        return _cast(model, dtype)
    if isinstance(source, PreTrainedConfig | Mapping):
        model = auto.from_config(_scratch_config(source, tokenizer, options))
        return _cast(model, dtype)
    path = Path(source)
    if path.suffix == ".gguf":
        from p3o_lightning.gguf_files import load_gguf_model

        model = load_gguf_model(_existing(path), None if dtype == "auto" else DTYPES[dtype])
        return _as_classifier(model) if for_rewards else model
    if path.suffix == ".ckpt":
        model = _from_checkpoint(_existing(path))
        model = _as_classifier(model) if for_rewards else model
        return _cast(model, dtype)
    try:
        return auto.from_pretrained(
            _folder_or_hub_name(source, "config.json"), dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"model is {str(source)!r}, which could not be loaded: {_first_line(error)}. {_SOURCES}") from error


def _cast(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Weights in `dtype`. Buffers stay: rounding the rotary frequencies, as `model.to` does, changes the logits."""
    if dtype != "auto":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


_SOURCES = "Give a hub name, a transformers folder with safetensors, a .gguf file, or a .ckpt of ours."


def _scratch_config(
    source: PreTrainedConfig | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        config = copy.deepcopy(source)
        for name, value in options.items():
            setattr(config, name, value)
        return config
    if "model_type" not in source:
        raise InputError(f"model is {dict(source)!r}, a config without model_type: add one, e.g. model_type: llama.")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    try:
        return AutoConfig.for_model(**{"vocab_size": len(tokenizer), **ids, **options, **source})
    except (ValueError, TypeError) as error:
        raise InputError(f"model is {dict(source)!r}, which transformers refuses: {_first_line(error)}.") from error


def _as_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """The same backbone under a fresh scalar head, unless the model already has one."""
    if is_classifier(model):
        if model.config.num_labels != 1:
            raise InputError(f"model has num_labels={model.config.num_labels}: a reward model needs one scalar output, num_labels=1.")
        return model
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config).to(model.dtype)
    getattr(classifier, classifier.base_model_prefix).load_state_dict(model.base_model.state_dict())
    return classifier


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is one of transformers' sequence classifiers, by its naming convention (the class table would import them all)."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"model is {str(path)!r}: no such file. {_SOURCES}")
    return path


def _folder_or_hub_name(source: str | Path, needed: str) -> str:
    """A local folder that holds `needed`, or a name to look up on the hub."""
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            raise InputError(f"model is {name!r}, a folder without {needed}. {_SOURCES}")
        return str(path)
    if path.is_file():
        raise InputError(f"model is {name!r}, a file that is neither .gguf nor .ckpt. {_SOURCES}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise InputError(f"model is {name!r}: no such folder. {_SOURCES}")
    return name


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300]


# ------------------------------------------------------------------------------------------------ checkpoints of ours


def describe(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a checkpoint needs beside its weights to be a model on its own: plain values, so `weights_only=True` reads it."""
    base = unwrapped(model)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {
        "config": base.config.to_json_string(use_diff=False),
        "classifier": is_classifier(base),
        "tokenizer": files,
        "peft": _plain_peft_config(model) if is_adapted(model) else None,
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, loaded without running anything in it."""
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a sharded checkpoint: give the run's export folder instead.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types here; each of them means that the file cannot be used
        raise InputError(f"{str(path)!r} is not a checkpoint that loads with weights_only=True: {_first_line(error)}.") from error
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise InputError(f"{str(path)!r} is not a checkpoint of p3o_lightning: give one from <default_root_dir>/checkpoints.")
    return checkpoint


def config_of(checkpoint: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config that a checkpoint of ours carries."""
    return AutoConfig.for_model(**json.loads(checkpoint[CHECKPOINT_KEY]["config"]))


def _from_checkpoint(path: Path) -> PreTrainedModel:
    checkpoint = read_checkpoint(path)
    about, config = checkpoint[CHECKPOINT_KEY], config_of(checkpoint)
    auto = AutoModelForSequenceClassification if about["classifier"] else AutoModelForCausalLM
    model: Any = auto.from_config(config)
    if about["peft"] is not None:
        model = attach_adapter(model, about["peft"])
    weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}
    model.load_state_dict(weights)
    return model.merge_and_unload() if about["peft"] is not None else model


# ------------------------------------------------------------------------------------------------ LoRA


def attach_adapter(model: PreTrainedModel, peft_config: Any) -> Any:
    """The model with trainable adapters of PEFT; its own weights are frozen.

    `peft_config`: a PeftConfig, or a mapping of LoraConfig's fields.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("model.peft_config is set but peft is not installed: pip install 'p3o-lightning[peft]'.") from error
    if isinstance(peft_config, Mapping):
        classifier = is_classifier(model)
        defaults: dict[str, Any] = {"task_type": "SEQ_CLS" if classifier else "CAUSAL_LM", "target_modules": "all-linear"}
        if classifier:
            defaults["modules_to_save"] = ["score"]  # a fresh head must be trained and saved in full
        try:
            peft_config = LoraConfig(**{**defaults, **peft_config})
        except TypeError as error:
            raise InputError(
                f"model.peft_config is {dict(peft_config)!r}: {_first_line(error)}; use the fields of peft.LoraConfig."
            ) from error
    return get_peft_model(model, peft_config)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries PEFT adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def _plain_peft_config(model: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    wanted = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "use_rslora",
        "use_dora",
        "task_type",
        "target_modules",
        "modules_to_save",
        "init_lora_weights",
    )
    plain = {name: getattr(config, name) for name in wanted if getattr(config, name, None) is not None}
    return {
        name: sorted(value) if isinstance(value, set) else str(value) if name == "task_type" else value for name, value in plain.items()
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; each submodule's own mode restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to 0, those that attention reads from a float attribute included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# ------------------------------------------------------------------------------------------------ tokenizers


def load_tokenizer(source: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with an EOS and a padding token: an object, a folder, a hub name, a GGUF file, a .ckpt of ours, or "bytes".

    A missing padding token becomes the EOS token: that is harmless here, since padding is told by masks, never by id.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer = source
    elif str(source) == "bytes":
        tokenizer = byte_tokenizer()
    elif Path(source).suffix == ".gguf":
        from p3o_lightning.gguf_files import load_gguf_tokenizer

        tokenizer = load_gguf_tokenizer(_existing(Path(source)))
    elif Path(source).suffix == ".ckpt":
        tokenizer = _tokenizer_from_checkpoint(_existing(Path(source)))
    else:
        tokenizer = _tokenizer_from_folder(source)
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {str(source)!r} has no EOS token, so no response could end: set tokenizer.eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_from_folder(source: str | Path) -> PreTrainedTokenizerBase:
    path = Path(source).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(
            f"tokenizer is {str(source)!r}, a folder without a tokenizer (no tokenizer.json): save one there, or give model.tokenizer."
        )
    try:
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer is {str(source)!r}, which could not be loaded: {_first_line(error)}. "
            "Give a folder with tokenizer.json, or a hub name."
        ) from error


def _tokenizer_from_checkpoint(path: Path) -> PreTrainedTokenizerBase:
    files = read_checkpoint(path)[CHECKPOINT_KEY]["tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, 256 of them, then <pad>, <eos>, <bos>: any text, no download. For debug runs and tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", clean_up_tokenization_spaces=False
    )


def tokenizer_source(model: ModelSource) -> str | Path:
    """Where the tokenizer of a model source lies; an InputError where the source names none."""
    if isinstance(model, str | Path):
        return model
    name = model.config.name_or_path if isinstance(model, PreTrainedModel) else None
    if name:
        return name
    raise InputError(
        "model.tokenizer is missing, and the model was given as an object or a config: "
        "pass tokenizer=, e.g. a folder, a hub name or 'bytes'."
    )


def distinct_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose padding id differs from EOS, for models that transformers pools by `input_ids != pad_token_id`."""
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


# ------------------------------------------------------------------------------------------------ forwards


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward takes this argument (families differ on position_ids and logits_to_keep)."""
    return argument in inspect.signature(unwrapped(model).forward).parameters


def positions_of(mask: Bool[Tensor, "row token"]) -> Int[Tensor, "row token"]:
    """Positions that count real tokens only, so that left padding does not move a prompt."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def completion_logps(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token"]:
    """Log-probability, in nats and float32, of every completion token under the model at `temperature`; 0 outside the mask.

    Logits are computed on the completion's positions only. Carries gradient if the model does.
    """
    prompts, responses, length = completion_tokens.shape
    tokens = torch.cat([prompt_tokens.repeat_interleave(responses, 0), completion_tokens.flatten(0, 1)], 1)
    mask = torch.cat([prompt_mask.repeat_interleave(responses, 0), completion_mask.flatten(0, 1)], 1)
    options: dict[str, Any] = {"attention_mask": mask.long(), "use_cache": False}
    if accepts(model, "position_ids"):
        options["position_ids"] = positions_of(mask)
    if accepts(model, "logits_to_keep"):
        options["logits_to_keep"] = length + 1
    logits = model(input_ids=tokens, **options).logits[:, -length - 1 : -1].float() / temperature
    chosen = logits.gather(-1, completion_tokens.flatten(0, 1).unsqueeze(-1)).squeeze(-1)
    logps = (chosen - logits.logsumexp(-1)).view(prompts, responses, length)
    return logps.masked_fill(~completion_mask, 0.0)


def sequence_scores(model: nn.Module, tokens: Int[Tensor, "row token"], attention_mask: Bool[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """Scalar scores, float32, of right-padded sequences, pooled at the explicit index of the last real token.

    transformers pools at the last id that differs from the padding id, which skips a final EOS where pad == EOS.
    """
    base = unwrapped(model)
    if not hasattr(base, "score"):  # encoder families (BERT) pool in their own way, not by a padding id
        return model(input_ids=tokens, attention_mask=attention_mask.long()).logits.squeeze(-1).float()
    backbone = getattr(base, base.base_model_prefix)
    hidden = backbone(input_ids=tokens, attention_mask=attention_mask.long(), use_cache=False).last_hidden_state
    last = attention_mask.sum(-1) - 1
    pooled = hidden[torch.arange(len(last), device=last.device), last]
    with torch.autocast(pooled.device.type, enabled=False):  # a reward's last digits decide ties: the head runs in float32
        return _in_float32(base.score, pooled).squeeze(-1)


def _in_float32(head: nn.Module, hidden: Tensor) -> Tensor:
    weight = getattr(head, "weight", None)
    if weight is None or weight.dtype == torch.float32:  # PEFT wraps a trained head; it is float32 wherever it is trained
        return head(hidden.float()).float()
    return nn.functional.linear(hidden.float(), weight.float(), getattr(head, "bias", None))
