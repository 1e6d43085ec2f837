"""The argument parser of `p3o fit|validate|test|predict`: help that can be read, and errors of one line with field, value and fix."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from p3o_lightning.data import PreferenceDataModule
from p3o_lightning.direct import DirectPreferencePolicy
from p3o_lightning.ensembles import Ensemble
from p3o_lightning.errors import InputError
from p3o_lightning.policy import PairwisePolicy
from p3o_lightning.reward_model import RewardModel
from p3o_lightning.server_judge import ServerJudge
from p3o_lightning.shipped import shipped
from p3o_lightning.supervised import SupervisedPolicy

STAGES = (SupervisedPolicy, RewardModel, PairwisePolicy, DirectPreferencePolicy)  # imported so that YAML can name them without their module
FEEDBACK = (Ensemble, ServerJudge)  # likewise


class HelpFormatter(DefaultHelpFormatter):
    """Keeps the line breaks of the description, and leaves out lists of every class that torch happens to have loaded."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(r",? known subclasses: [^)]*", "", super()._expand_help(action))
        text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"\1", text)  # Lightning's cross-references
        return re.sub(r"\b(?:lightning|transformers|collections|torch)[\w.]*\.(\w+)", r"\1", text)


class Parser(LightningArgumentParser):
    """The argument parser; the parsers that it makes for classes are of this kind too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("usage", "p3o fit|validate|test|predict --config FILE [--KEY VALUE ...]")
        super().__init__(*arguments, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say it in one line. The parser of a class hands the error to the one around it, which knows the key in front."""
        if not self.exit_on_error:
            if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
                message = f"{unknown.group()}\nknown: {' '.join(self.names())}"
            raise argparse.ArgumentError(None, message) from ex
        inner = getattr(ex, "subcommand_parser", None) or self
        raise InputError(explain(message, ex, inner.names())) from ex

    def names(self) -> list[str]:
        """The keys that it accepts."""
        return [action.dest for action in self._actions if not action.dest.endswith("help")]


def explain(message: str, error: BaseException | None, known: Iterable[str]) -> str:
    """What is wrong with the arguments, in one line: the field as typed, its value, the fix.

    jsonargparse says it in prose, many lines of it, in exceptions of which each names its own part of the key. Its wordings are matched
    here; one that is unknown is printed as it is, on one line.
    """
    chain = list(causes(error))
    for cause in chain:  # a message of ours, raised while a class was built, says it best
        if isinstance(cause, InputError):
            return str(cause)
    texts = [str(cause) for cause in chain] or [message]
    field = _field(texts)
    if chain and isinstance(chain[-1], ImportError | SyntaxError) and (named := re.search(r"given class_path '([\w.]+)'", "".join(texts))):
        return _no_import(f"{field}.class_path", named.group(1), chain[-1])
    for text in [*reversed(texts), message]:
        if (line := _explain_key(text, field, known)) or (line := _explain_class(text, field)):
            return line
    if line := _explain_value(texts, field):
        return line
    return re.sub(r"\s+", " ", f"{field}: {message}" if field and field not in message else message)[:600].strip()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _field(texts: list[str]) -> str:
    """The key in full: every parser on the way in names its own part of it."""
    parts: list[str] = []
    for text in texts:
        found = re.match(r'\s*Parser key "([\w.]+)"', text)
        if found and (not parts or parts[-1] != found.group(1)):
            parts.append(found.group(1))
    return _typed(".".join(parts))


def _typed(key: str) -> str:
    """A key as users type it: `init_args` and the command in front are left out."""
    return re.sub(r"\binit_args\.|^(?:fit|validate|test|predict)\.", "", key)


def _explain_key(text: str, field: str, known: Iterable[str]) -> str | None:
    if required := re.search(r"arguments are required: (.+)", text):
        name = f"{field}.{_typed(required.group(1).split(',')[-1].strip())}".strip(".")
        return f"{name} is missing: give --{name} VALUE, or --config FILE that holds it, e.g. configs/debug/policy.yaml."
    if flags := re.search(r"unrecognized arguments: (\S+)", text):
        flag = flags.group(1).split("=")[0]
        if not flag.startswith("-"):
            return f"{flag!r} is not understood: write --KEY VALUE, with the text in quotes if it has spaces."
        return f"{flag} is no option.{_nearest(flag.lstrip('-'), [*known, *_class_keys()], '--')}"
    if missing := re.search(r"argument (--[\w.+]+).*: expected one argument", text):
        return f"{missing.group(1)} has no value: write {missing.group(1)} VALUE."
    if unknown := re.search(r"Option '([\w.]+)' is not accepted\nknown: (.*)", text):
        key = f"{field}.{unknown.group(1)}".strip(".")
        return f"{key} is no key.{_nearest(unknown.group(1), unknown.group(2).split(), f'{field}.'.lstrip('.'))}"
    if unknown := re.search(r"does not accept option '([\w.]+)'", text):
        key = _typed(unknown.group(1))
        roots = {name.split(".")[0] for name in known}
        if key.split(".")[0] not in roots:
            return f"{key} is no key.{_nearest(key.split('.')[0], roots, '')}"
        return f"{key} is no key.{_nearest(key, known, '')}"
    return None


def _nearest(word: str, known: Iterable[str], prefix: str) -> str:
    known = sorted({name for name in known if not name.startswith("_")})
    last = [name for name in known if name.split(".")[-1] == word.split(".")[-1]]  # only the part in front was left out
    close = last[:1] or difflib.get_close_matches(word, known, 1)
    return (
        f" Did you mean {prefix}{close[0]}?" if close else " p3o fit --help lists the keys, p3o fit --model CLASS --help those of a class."
    )


def _class_keys() -> list[str]:
    owners = [("model", stage) for stage in STAGES] + [("data", PreferenceDataModule)]
    return [f"{key}.{name}" for key, owner in owners for name in inspect.signature(owner).parameters]


def _explain_class(text: str, field: str) -> str | None:
    found = re.search(r"(?:Expected a dot import path string:|Import path) (\S+)(?: does not correspond to a subclass of (\w+))?", text)
    if found is None:
        return None
    name, wanted = found.groups()
    key = f"{field}.class_path" if field else "class_path"
    if wanted:
        return f"{key} is {name!r}, which is no {wanted}.{_like(name, field) or f' Give a subclass of {wanted}.'}"
    if "." in name:
        return _not_found(key, name)
    return f"{key} is {name!r}, which is no class known here.{_like(name, field)} A class of your own: file.ClassName."


def _not_found(key: str, name: str) -> str:
    """Why a dotted name gives no class."""
    module = name.rpartition(".")[0]
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the user's file raises when it is imported
        return _no_import(key, name, error)
    return f"{key} is {name!r}, but {module} has no such class: check the name."


def _no_import(key: str, name: str, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {error}"
    return f"{key} is {name!r}, whose module cannot be imported ({reason}): mend it, or run p3o in the folder where it lies."


def _like(name: str, field: str) -> str:
    known = _class_names(field)
    close = difflib.get_close_matches(name.split(".")[-1], known, 1)
    return f" Did you mean {close[0]}?" if close else f" Choose one of {', '.join(known)}." if 0 < len(known) < 6 else ""


def _class_names(field: str) -> list[str]:
    if field == "model":
        return [stage.__name__ for stage in STAGES]
    if field == "data":
        return [PreferenceDataModule.__name__]
    homes: dict[str, tuple[Any, type]] = {
        "callbacks": (L.callbacks, L.Callback),
        "optimizer": (torch.optim, torch.optim.Optimizer),
        "lr_scheduler": (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
    }
    home, base = homes.get(field.split(".")[-1], (None, object))
    return [name for name, item in vars(home).items() if isinstance(item, type) and issubclass(item, base)] if home else []


_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "NoneType": "null", "list": "a list"}
_KINDS |= {"dict": "a mapping", "Path": "a path"}


def _explain_value(texts: list[str], field: str) -> str | None:
    """The kinds of value that would do: those of the innermost union of types, or the one type."""
    last = max((place for place, text in enumerate(texts) if re.match(r'\s*Parser key "', text)), default=0)
    texts = texts[last:]  # what is said of the innermost key
    unions = [text for text in texts if "Does not validate against any of the Union" in text]
    text = (unions or texts)[-1]
    value = re.search(r"(?:Got value|Given value): (.*)", text)
    if value is None or not field:
        return None
    wanted: list[str] = []
    types = text[: value.start()].split("Errors:")[0].replace("dict[", "<class 'dict'>[").replace("list[", "<class 'list'>[")
    for kind, choices in re.findall(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]", types):
        wanted += [_KINDS.get(kind.split(".")[-1], kind.split(".")[-1])] if kind else choices.replace("'", "").split(", ")
    if not wanted:
        return None
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value.group(1)) and not set(wanted) <= {*_KINDS.values()}:  # meant as a class
        return _not_found(f"{field}.class_path", value.group(1))
    return f"{field} is {value.group(1)!r}: give {' or '.join(dict.fromkeys(wanted))}."


class ShippedConfig(ActionConfigFile):
    """A config file; `configs/...` that is not in the working directory is looked up among the shipped ones."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        """Check that it is a mapping in YAML, then read it."""
        path = shipped(str(value))
        check_config(path, str(value))
        super().__call__(parser, namespace, str(path), option_string)


def check_config(path: Path, given: str) -> dict[str, Any]:
    """The file's mapping; what is no such file is refused by name."""
    if not path.is_file():
        raise InputError(f"config is {given!r}: no such file. Give a YAML file, or a shipped one, e.g. configs/debug/policy.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"config is {given!r}, which is no text in UTF-8 (byte {error.start}): give a YAML file.") from error
    except RecursionError as error:
        raise InputError(f"config is {given!r}, which nests too deep: give a YAML file, e.g. one begun with a shipped one.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"config is {given!r}{line}: no valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if content is None:
        raise InputError(f"config is {given!r}, which is empty: begin with a shipped one, e.g. configs/debug/policy.yaml.")
    if not isinstance(content, dict):
        raise InputError(f"config is {given!r}, which holds no keys with values: write model:, data: and trainer: sections.")
    return content


def overview(command: str) -> str:
    """How the help of a command begins."""
    what = {
        "fit": "Train a stage; its folder then holds checkpoints/last.ckpt, export/ (a transformers folder), logs/ and config.yaml.",
        "validate": "Evaluate a stage on the validation rows, and print the figures.",
        "test": "Evaluate a stage on the test rows (those held out for validation), and print the figures.",
        "predict": "Sample responses to prompts, as JSON lines in <default_root_dir>/predictions.jsonl.",
    }
    classes = "\n".join(f"  {stage.__name__:<24}{(stage.__doc__ or '').splitlines()[0]}" for stage in STAGES)
    return f"""{what[command]}

Choose the stage by its class, in the config (model: class_path:) or by --model CLASS:
{classes}
  or a subclass of your own: --model file.ClassName

  p3o {command} --model PairwisePolicy --help             the arguments of a class, as --model.NAME VALUE
  p3o {command} --data PreferenceDataModule --help        those of the data, as --data.NAME VALUE
  p3o {command} --config configs/debug/policy.yaml        a whole config; several --config overlay, flags after them win
  p3o {command} --config FILE --print_config              what all of it comes to"""
