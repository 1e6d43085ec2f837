"""Records out of JSON, JSONL, CSV, parquet, `datasets` folders and the Hugging Face hub, each with the place it came from.

Nothing here runs code from a data file: pickles are refused, and so are hub repositories with scripts. Whatever a file holds, the only
exception that leaves this module is InputError, with the file, the line or row, and the fix.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from p3o_lightning.errors import InputError
from p3o_lightning.shipped import shipped
from p3o_lightning.text import visible

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LONGEST_LINE = 64 << 20  # bytes: a small file may unpack into one line without end
_LARGEST_JSON = 1 << 30  # bytes, unpacked: it is parsed in one piece
_DEEPEST = 32  # lists and objects within one another; Lightning walks through them to move a batch, a few Python frames a level


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 2


Rows: TypeAlias = str | Iterable[dict[str, Any]]  # a path or hub name; in code also a datasets.Dataset, or any rows that have a length


class Record(NamedTuple):
    """One record as it stands in the data."""

    where: str  # for messages: "prefs.jsonl, line 3"
    values: dict[str, Any]


def read_records(
    path: Rows, split: str = "train", *, field: str = "data.path", streaming: bool = False, rank: int = 0, world_size: int = 1
) -> Iterator[Record]:
    """All records of a file, a folder, a hub dataset or rows in memory, lazily; with several ranks, one's share: a record belongs to one.

    Raises InputError, naming `field`, for what cannot be read. A folder holds a saved dataset or files of the known kinds, read by name.
    """
    if not isinstance(path, str):
        yield from (_record(f"{field}, row {number}", values) for number, values in enumerate(path, 1))
        return
    if is_hub_name(path):
        # a stream is split by whole files where it can be, so that no rank downloads another's share
        yield from _hub(path, split, field, streaming, (rank, world_size) if streaming else (0, 1))
        return
    for number, record in enumerate(_local(_place(path, field), split, field)):
        if number % world_size == rank:
            yield record


def check_rows(rows: Any, field: str, streaming: bool) -> None:
    """Refuse what stands for data in code and cannot be read as rows from the first to the last."""
    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        raise InputError(f"{field} is a {kind} of {show(list(rows))}: give one of them, e.g. dataset['train'].")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__iter__")):
        raise InputError(f"{field} is a {kind}: give a file, a folder, a hub name, a datasets.Dataset or a list of rows.")
    if streaming:
        raise InputError(f"data.streaming is true, but {field} is a {kind}, which is in memory already: give a file or a hub name.")


def described(path: Rows) -> str:
    """The data in a message: its path, or what kind of rows it is."""
    return repr(path) if isinstance(path, str) else f"a {type(path).__name__} of {len(path):,} rows"  # type: ignore[arg-type]


def is_hub_name(path: Rows) -> bool:
    """Whether `path` can only mean a dataset on the hub: nothing of that name is here, and it has no file's ending."""
    if not isinstance(path, str):
        return False
    try:
        place = shipped(path).expanduser()
        there = place.exists()
    except (OSError, RuntimeError):  # a name that is too long, a folder that is closed to us, a home that is not known
        return False
    return not there and bool(_HUB_NAME.fullmatch(path)) and place.suffix.lower() not in _FILE_ENDINGS


def fetch(path: str, split: str, field: str = "data.path") -> None:
    """Download a hub dataset into the cache of `datasets`, so that the other processes of this machine find it there."""
    _load_hub(path, split, field, streaming=False)


def show(value: Any) -> str:
    """A value as a message shows it: at most 60 characters, on one line."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."


def _place(path: str, field: str) -> Path:
    """The file or folder of that name, which is there."""
    try:
        place = shipped(path).expanduser()
        there = place.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{field} is {show(path)}, which cannot be looked up ({_first_line(error)}): give a file or a folder.") from error
    if not there:
        raise InputError(f"{field} is {str(place)!r}, which does not exist: give a file, a folder or a hub name.")
    return place


def _local(place: Path, split: str, field: str) -> Iterator[Record]:
    if place.is_dir():
        yield from _folder(place, split, field)
        return
    if not place.is_file():  # reading a pipe or a device may never end
        raise InputError(f"{field} is {str(place)!r}, which is no regular file: give a file or a folder.")
    reader = _reader(place)
    if reader is None:
        raise InputError(f"{field} is {str(place)!r}, a kind of file that is not read here: give one of {', '.join(_READERS)}.")
    yield from _from_file(reader, place, field)


def _reader(place: Path) -> Callable[[Path], Iterator[Record]] | None:
    return next((reader for ending, reader in _READERS.items() if place.name.lower().endswith(ending)), None)


def _from_file(reader: Callable[[Path], Iterator[Record]], place: Path, field: str) -> Iterator[Record]:
    none = True
    try:
        for record in reader(place):
            none = False
            yield record
    except InputError as error:
        raise InputError(f"{field}: {error}") from error.__cause__
    except Exception as error:  # of the operating system, the decompressor, the csv module, pyarrow: the file cannot be used
        raise InputError(
            f"{field} is {str(place)!r}, which cannot be read as {place.suffix[1:]}: {_first_line(error)}. Is it damaged?"
        ) from error
    if none:
        raise InputError(f"{field} is {str(place)!r}, which holds no row: write at least two prompts into it.")


def _json(place: Path) -> Iterator[Record]:
    name = visible(str(place))
    with _open(place) as file:
        content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise InputError(
            f"{name} holds more than {_LARGEST_JSON >> 20} MiB of JSON in one piece: write one object a line into a .jsonl file."
        )
    rows = _parse(_decode(content, f"{name}, line 1"), name)
    if not isinstance(rows, list):
        raise InputError(f"{name} holds no list of objects: write [{{...}}, {{...}}], or one object a line into a .jsonl file.")
    for number, values in enumerate(rows, 1):
        yield _record(f"{name}, row {number}", values)


def _jsonl(place: Path) -> Iterator[Record]:
    with _open(place) as file:
        for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE + 1), b""), 1):
            where = f"{visible(str(place))}, line {number}"
            if len(line) > _LONGEST_LINE:
                raise InputError(f"{where} is longer than {_LONGEST_LINE >> 20} MiB: write one object a line.")
            if line.strip():
                yield _record(where, _parse(_decode(line, where), where))


def _csv(place: Path) -> Iterator[Record]:
    with _open(place) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        before = csv.field_size_limit(sys.maxsize)  # the csv module's own limit of 128 KB is shorter than some replies
        try:
            rows = csv.DictReader(text, strict=True)  # else a quote that is never closed swallows the rest of the file
            _check_names(rows.fieldnames or (), visible(str(place)))
            for number, values in enumerate(rows, 1):
                where = f"{visible(str(place))}, row {number}"
                if None in values:
                    raise InputError(f"{where} has more values than the header has columns: quote texts that hold commas.")
                if missing := [name for name, value in values.items() if value is None]:
                    raise InputError(f"{where}: column {missing[0]!r} is missing: give as many values as the header has columns.")
                yield Record(where, values)
        except csv.Error as error:
            raise InputError(
                f"{visible(str(place))}, line {rows.line_num + 1}: {error}: close every quote, and double the quotes within a quoted text."
            ) from error
        finally:
            csv.field_size_limit(before)


def _parquet(place: Path) -> Iterator[Record]:
    import pyarrow.parquet

    name, number = visible(str(place)), 0
    with pyarrow.parquet.ParquetFile(place) as file:
        _check_names(file.schema_arrow.names, name)
        for batch in file.iter_batches(1024):
            for values in batch.to_pylist():
                number += 1
                yield _record(f"{name}, row {number}", values)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
# Endings that mean a file even where it is missing, so that a typing error is not looked up on the hub.
_FILE_ENDINGS = {
    ".jsonl",
    ".json",
    ".gz",
    ".csv",
    ".parquet",
    ".txt",
    ".tsv",
    ".zip",
    ".arrow",
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".bin",
    ".npy",
}


def _folder(folder: Path, split: str, field: str) -> Iterator[Record]:
    try:
        content = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{field} is {str(folder)!r}, a folder that cannot be read ({_first_line(error)}): give another.") from error
    if {"dataset_dict.json", "state.json", "dataset_info.json"} & {place.name for place in content}:
        yield from _rows(_guarded(lambda: _saved(folder, split, field), field, str(folder)), str(folder), field)
        return
    files = [place for place in content if _reader(place) is not None and not place.is_dir()]
    if not files:
        raise InputError(
            f"{field} is {str(folder)!r}, a folder without data: put files into it ({', '.join(_READERS)}), or save a dataset there."
        )
    for place in files:
        yield from _local(_place(str(place), field), split, field)


def _saved(folder: Path, split: str, field: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InputError(f"data.split is {split!r}, but {field} {str(folder)!r} has the splits {', '.join(saved)}: name one of these.")
        saved = saved[split]
    saved.data.validate(full=True)  # an Arrow file is mapped into memory as it is: wrong offsets in it would be followed
    return saved


def _load_hub(name: str, split: str, field: str, streaming: bool) -> Any:
    import datasets

    return _guarded(lambda: datasets.load_dataset(name, split=split, streaming=streaming), field, name)


def _hub(name: str, split: str, field: str, streaming: bool, share: tuple[int, int]) -> Iterator[Record]:
    dataset = _load_hub(name, split, field, streaming)
    if share[1] > 1:
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(dataset, rank=share[0], world_size=share[1])
    yield from _rows(dataset, name, field)


def _rows(dataset: Any, name: str, field: str) -> Iterator[Record]:
    import datasets

    # Pictures and sounds stay undecoded: decoding opens whatever file or address a row names.
    if isinstance(dataset, datasets.IterableDataset):
        dataset = dataset.with_format(None)
        rows = iter(dataset.decode(False) if dataset.features else dataset)
    else:
        rows = (row for table in dataset.with_format("arrow").iter(1024) for row in table.to_pylist())
    number = 0
    while True:
        number += 1
        values = _guarded(lambda: next(rows, None), field, name)
        if values is None:
            break
        yield _record(f"{visible(name)}, row {number}", values)
    if number == 1:
        raise InputError(f"{field} is {name!r}, which holds no row: choose another data.split.")


def _guarded(read: Callable[[], Any], field: str, name: str) -> Any:
    """`datasets` raises its own, pyarrow's, the hub's and the network's exceptions; in each case the user's `field` is what to change."""
    try:
        return read()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{field} is {name!r}, which `datasets` cannot load ({type(error).__name__}: {_first_line(error)}): "
            f"check the name, data.split and the network, or give a file."
        ) from error


def _open(place: Path) -> Any:
    return gzip.open(place, "rb") if place.suffix.lower() == ".gz" else place.open("rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is no UTF-8: save the file as UTF-8.") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        cut = text.strip()[:60]
        raise InputError(f"{where} is not valid JSON ({_first_line(error)}): {cut!r}. Mend it, or remove it.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are distinct: of two values, Python would keep the last without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {show(_twice(key for key, _ in pairs))} stands there twice")
    return values


def _check_names(names: Iterable[str], where: str) -> None:
    """Refuse two columns of one name, of which only the last would be read."""
    if (twice := _twice(names)) is not None:
        raise InputError(f"{where} has two columns {show(twice)}: rename one of them.")


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _record(where: str, values: Any) -> Record:
    if not isinstance(values, dict):
        raise InputError(f'{where}: {show(values)} is no object: write {{"prompt": "...", ...}}.')
    if deep := next((name for name, value in values.items() if _is_deeper(value, _DEEPEST)), None):
        raise InputError(f"{where}, column {show(deep)}: lists or objects more than {_DEEPEST} deep: make it flat, or remove the column.")
    return Record(where, values)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether more than so many lists and objects lie within one another."""
    if not isinstance(value, dict | list | tuple):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
