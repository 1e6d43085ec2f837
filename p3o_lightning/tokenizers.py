"""Loading a tokenizer: from a folder, a hub name, a GGUF file, a checkpoint of ours, or one token a byte."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from p3o_lightning.errors import InputError
from p3o_lightning.models import CHECKPOINT_KEY, SOURCES, ModelSource, existing, folder_or_hub_name, one_line, read_description


def load_tokenizer(source: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with an EOS and a padding token: an object, a folder, a hub name, a GGUF file, a .ckpt of ours, or "bytes".

    A missing padding token becomes the EOS token: that is harmless here, since padding is told by masks, never by id.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer, name = source, source.name_or_path
    else:
        path, name = Path(source).expanduser(), str(source)
        if name == "bytes":
            tokenizer = byte_tokenizer()
        elif path.suffix == ".gguf":
            from p3o_lightning.gguf_files import load_gguf_tokenizer

            tokenizer = load_gguf_tokenizer(existing(path))
        elif path.suffix == ".ckpt":
            tokenizer = _tokenizer_from_checkpoint(path if path.is_dir() else existing(path))
        else:
            tokenizer = _tokenizer_from_folder_or_hub(name)
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {name!r} has no EOS token, so no response could end: set tokenizer.eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)  # a user's own object stays as it is
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_from_folder_or_hub(source: str) -> PreTrainedTokenizerBase:
    files = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    name = folder_or_hub_name(source, files, "tokenizer", "Save a tokenizer there, or give another: a folder, a hub name, or 'bytes'.")
    try:
        return _loaded(name)
    except Exception as error:  # the tokenizers library raises bare Exceptions; each means that the tokenizer cannot be used
        raise InputError(
            f"tokenizer is {source!r}, which could not be loaded: {one_line(error)}. Give a folder with tokenizer.json, or a hub name."
        ) from error


def _loaded(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved there.

    Beside a model of some types (qwen2, qwen3_5) AutoTokenizer takes their own class whatever tokenizer_config.json says, and that splits
    words in its own way: a folder whose file names no class but the general one is loaded by that.
    """
    settings = Path(name) / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") == "TokenizersBackend":
        return PreTrainedTokenizerFast.from_pretrained(name)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def reads_alike(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether plain transformers code, which will call AutoTokenizer on the folder, gets the ids that `tokenizer` gives."""
    try:
        return same_ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), tokenizer)
    except Exception:  # whatever stops it, the answer is no
        return False


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give the same ids to a text of many kinds of character."""
    probe = "Human: what's 3.5 x 12?\n\nAssistant:  42 \u00e9\u4e2d\U0001f600"
    return list(one(probe)["input_ids"]) == list(other(probe)["input_ids"])


def _tokenizer_from_checkpoint(path: Path) -> PreTrainedTokenizerBase:
    files = read_description(path)[CHECKPOINT_KEY]["tokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, content in files.items():
                file = Path(folder) / Path(name).name  # a path in it leads nowhere else
                file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a checkpoint that was tampered with holds anything
            raise InputError(
                f"{str(path)!r} is a checkpoint whose tokenizer could not be loaded ({one_line(error)}): give another as model.tokenizer."
            ) from error


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, 256 of them, then <bos>, <eos>, <pad>, which no text can spell: any text, no download. For debug runs and tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def tokenizer_source(model: ModelSource) -> str | Path:
    """Where the tokenizer of a model source lies; an InputError where the source names none."""
    if isinstance(model, str | Path):
        if Path(model).suffix not in (".ckpt", ".gguf"):  # what is wrong with the model is said of the model
            folder_or_hub_name(model, ("config.json",), "model", SOURCES)
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
