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
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from p3o_lightning.errors import InputError
from p3o_lightning.shipped import shipped

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 2


class Record(NamedTuple):
    """One record as it stands in the data."""

    where: str  # for messages: "prefs.jsonl, line 3"
    values: dict[str, Any]


def read_records(
    path: str, split: str = "train", *, field: str = "data.path", streaming: bool = False, rank: int = 0, world_size: int = 1
) -> Iterator[Record]:
    """All records of a file, a folder or a hub dataset, lazily; with several ranks, the share of one: every record belongs to one rank.

    Raises InputError, naming `field`, for what cannot be read. A folder holds a saved dataset or files of the known kinds, read by name.
    """
    place = shipped(path).expanduser()
    if is_hub_name(path):
        # a stream is split by whole files where it can be, so that no rank downloads another's share
        yield from _hub(path, split, field, streaming, (rank, world_size) if streaming else (0, 1))
        return
    for number, record in enumerate(_local(place, split, field)):
        if number % world_size == rank:
            yield record


def is_hub_name(path: str) -> bool:
    """Whether `path` can only mean a dataset on the hub: nothing of that name is here, and it has no file's ending."""
    place = shipped(path).expanduser()
    return not place.exists() and bool(_HUB_NAME.fullmatch(path)) and place.suffix.lower() not in _FILE_ENDINGS


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


def _local(place: Path, split: str, field: str) -> Iterator[Record]:
    if not place.exists():
        raise InputError(f"{field} is {str(place)!r}, which does not exist: give a file, a folder or a hub name.")
    if place.is_dir():
        yield from _folder(place, split, field)
        return
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
    except _UNREADABLE as error:
        raise InputError(
            f"{field} is {str(place)!r}, which cannot be read as {place.suffix[1:]}: {_first_line(error)}. Is it damaged?"
        ) from error
    if none:
        raise InputError(f"{field} is {str(place)!r}, which holds no row: write at least two prompts into it.")


def _json(place: Path) -> Iterator[Record]:
    text = _decode(_bytes(place), f"{place}, line 1")
    rows = _parse(text, str(place))
    if not isinstance(rows, list):
        raise InputError(f"{place} holds no list of objects: write [{{...}}, {{...}}], or one object a line into a .jsonl file.")
    for number, values in enumerate(rows, 1):
        yield _record(f"{place}, row {number}", values)


def _jsonl(place: Path) -> Iterator[Record]:
    with _open(place) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{place}, line {number}"
                yield _record(where, _parse(_decode(line, where), where))


def _csv(place: Path) -> Iterator[Record]:
    with _open(place) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        before = csv.field_size_limit(sys.maxsize)  # the csv module's own limit of 128 KB is shorter than some replies
        try:
            rows = csv.DictReader(text)
            for number, values in enumerate(rows, 1):
                where = f"{place}, row {number}"
                if None in values:
                    raise InputError(f"{where} has more values than the header has columns: quote texts that hold commas.")
                if missing := [name for name, value in values.items() if value is None]:
                    raise InputError(f"{where}: column {missing[0]!r} is missing: give as many values as the header has columns.")
                yield Record(where, values)
        finally:
            csv.field_size_limit(before)


def _parquet(place: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(place).iter_batches(1024):
        for values in batch.to_pylist():
            number += 1
            yield Record(f"{place}, row {number}", values)


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
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
        yield from _rows(_guarded(lambda: _saved(folder, split, field), field, str(folder)), str(folder), field)
        return
    files = [place for place in sorted(folder.iterdir()) if _reader(place) is not None]
    if not files:
        raise InputError(
            f"{field} is {str(folder)!r}, a folder without data: put files into it ({', '.join(_READERS)}), or save a dataset there."
        )
    for place in files:
        yield from _local(place, split, field)


def _saved(folder: Path, split: str, field: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise InputError(f"data.split is {split!r}, but {field} {str(folder)!r} has the splits {', '.join(saved)}: name one of these.")
    return saved[split]


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
    rows = iter(dataset.with_format(None))
    number = 0
    while True:
        number += 1
        values = _guarded(lambda: next(rows, None), field, name)
        if values is None:
            break
        yield Record(f"{name}, row {number}", values)
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


def _bytes(place: Path) -> bytes:
    with _open(place) as file:
        return bytes(file.read())


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is no UTF-8: save the file as UTF-8.") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cut = text.strip()[:60]
        raise InputError(f"{where} is not valid JSON ({_first_line(error)}): {cut!r}. Mend it, or remove it.") from error


def _record(where: str, values: Any) -> Record:
    if not isinstance(values, dict):
        raise InputError(f'{where}: {show(values)} is no object: write {{"prompt": "...", ...}}.')
    return Record(where, values)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
