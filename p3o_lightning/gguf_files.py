"""Load a GGUF file as an ordinary transformers model and tokenizer.

transformers reads GGUF, but what it returns is meant for inference, and some of it is silently wrong for training:

* the model keeps its quantisation marks, so `save_pretrained` and trainers refuse it, and for some architectures the weights stay packed;
* tensors that the file lacks (one part of a split file) are filled with random numbers, with no more than a warning;
* the splitting rule of several tokenizers is not known to it, so numbers after runs of spaces get other ids than in training;
* files that lie beside the GGUF (an adapter, a tokenizer_config.json) are picked up as if they belonged to it.

The functions below take care of these.
"""

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers.pre_tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from p3o_lightning.errors import InputError

MAGIC = b"GGUF"
FILE_NAME = "model.gguf"
# The values of `tokenizer.ggml.pre` for which llama.cpp cuts out every digit before it applies GPT-2's rule.
SINGLE_DIGIT_RULES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# What reading a truncated file, or one of an architecture that transformers does not know, raises.
READ_ERRORS = (ValueError, KeyError, IndexError, NotImplementedError, UnicodeDecodeError, struct.error)


def load_gguf_model(path: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model in a GGUF file, dequantised to `dtype` (float32 if None), in eval mode.

    It is a plain model: it can be trained, saved and loaded again as any other.
    """
    options: dict[str, Any] = {"dtype": dtype or torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # releases before it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _alone(path) as folder:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE_NAME, **options)
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{path}: {len(missing)} weights of the model are not in this file, the first is {missing[0]}; if it is one part of a split "
            "model, merge the parts into one file (llama-gguf-split --merge)"
        )
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for name in ("quantization_config", "_model_name_or_path"):  # the second is the file's free-text title
        model.config.__dict__.pop(name, None)
    model.name_or_path = model.config._name_or_path = str(path)
    return model


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with its chat template and its special tokens; it pads on the right."""
    with _alone(path) as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE_NAME)
            fields = _text_and_integer_fields(folder / FILE_NAME)
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
    if fields.get("tokenizer.ggml.pre") in SINGLE_DIGIT_RULES:
        rules = tokenizers.pre_tokenizers
        tokenizer.backend_tokenizer.pre_tokenizer = rules.Sequence(
            [rules.Digits(individual_digits=True), rules.ByteLevel(add_prefix_space=False)]
        )
    length = fields.get(f"{fields.get('general.architecture')}.context_length")
    if isinstance(length, int):
        tokenizer.model_max_length = length
    tokenizer.padding_side = "right"
    tokenizer.name_or_path = str(path)
    return tokenizer


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A temporary folder with a link to the checked file and nothing else, so that no neighbour of the file is read with it."""
    _check(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE_NAME).symlink_to(path.resolve())
        yield Path(folder)


def _check(path: Path) -> None:
    """Raise an InputError for what can be told before transformers is asked."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the path of a .gguf file")
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise InputError(f"{path}: not a GGUF file (it starts with {start!r}, not {MAGIC!r}); give the path of a .gguf file")
    for package in ("gguf", "accelerate"):  # transformers asks for both
        if find_spec(package) is None:
            raise InputError(f"{path}: reading a GGUF file needs the package {package}; run: pip install gguf accelerate")


def _text_and_integer_fields(path: Path) -> dict[str, Any]:
    """The file's metadata without its long lists."""
    from gguf import GGUFReader  # optional dependency

    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if len(field.data) == 1}


def _unreadable(path: Path, error: Exception) -> InputError:
    text = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{path}: this GGUF file cannot be read as a causal language model ({text}); is it whole, and of a known architecture?"
    )
