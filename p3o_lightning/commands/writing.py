"""Where a run may write: below trainer.default_root_dir, unless the command line asks for another place. A config file cannot ask."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from p3o_lightning.errors import InputError

FLAG = "write_outside"
_ROOT = "trainer.default_root_dir"


def check_writing(settings: Any, arguments: list[str], sections: list[str]) -> None:
    """Refuse a path in these sections of the config that leads out of the run's folder.

    A text under a key such as `dirpath`, `path` or `save_dir` is a path from the working folder, any other (`filename`, a logger's
    `name` and `sub_dir`) one from the run's folder; `..` and links are followed. What a flag in `arguments` names is asked for, and with
    --write_outside all is. A repository to send to is held to the same.
    """
    given, folder = list(_flags(arguments)), str(settings.trainer.default_root_dir)
    root = _resolved(_ROOT, folder)
    if any(name == FLAG and (value is None or _parsed(value) is True) for name, value in given):
        return
    fix = f"or allow it by --{FLAG} true on the command line."
    if root in Path.cwd().parents and not _asked(_ROOT, folder, given):
        raise InputError(f"{_ROOT} is {folder!r}, which holds the working folder: name a folder of the run's own, {fix}")
    for key, text in (pair for section in sections for pair in _texts(section, settings.get(section))):
        if key.endswith("push_to_hub"):  # no path, but out of the folder all the same
            if not _asked(key, text, given):
                raise InputError(f"{key} is {text!r} in a config file, which may send nothing out: type --{key} {text}, {fix}")
            continue
        text_of_path = re.sub("^file:(//)?", "", text)
        from_here = text_of_path != text or re.search("(?<!sub_)dir|path|folder", key.rpartition(".")[2])
        place = _resolved(key, Path(text_of_path) if from_here else root / text)
        if key != _ROOT and not place.is_relative_to(root) and not _asked(key, text, given):
            raise InputError(f"{key} is {text!r}, which leads out of the run's folder {folder!r}: name a place in it, {fix}")


def _resolved(key: str, path: str | Path) -> Path:
    """Where the path leads."""
    try:
        place = Path(path).expanduser().resolve()
        with suppress(FileNotFoundError, NotADirectoryError):  # it may have to be made
            place.stat()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a home that is not known, a zero byte
        raise InputError(f"{key} is {str(path)!r:.80}, which is no usable path ({error!s:.60}): name another.") from error
    return place


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text below `key` but names of classes, with its key as users type it."""
    if isinstance(value, str | Path):
        yield key, str(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(key, item)
    elif isinstance(value, dict | Namespace):
        for name, item in (value if isinstance(value, dict) else vars(value)).items():
            if name != "class_path":
                yield from _texts(key if name in ("init_args", "dict_kwargs") else f"{key}.{name}", item)


def _asked(key: str, text: str, given: list[tuple[str, str | None]]) -> bool:
    """Whether a flag for this key, or for what it is a part of, has the text in its value."""
    for name, value in given:
        typed = re.sub(r"\binit_args\.|\+$", "", name)
        if value is not None and f"{key}.".startswith(f"{typed}.") and text in (value, *(leaf for _, leaf in _texts("", _parsed(value)))):
            return True
    return False


def _flags(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of every --name value and --name=value."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            after = arguments[place + 1 : place + 2]
            yield name, value if equals else after[0] if after and not after[0].startswith("--") else None


def _parsed(value: str) -> Any:
    """A flag's value as YAML, which it may be."""
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError):
        return value
