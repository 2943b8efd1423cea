"""Read a data set part by part, so that the memory taken does not grow with its rows.

JSONL, CSV and Parquet files, Hub data sets and folders stay on disk. A JSON array, a packed Parquet file and rows that
are in memory already are read whole, as by `load_source`.
"""

import gzip
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.data.sources import (
    BOM,
    SUFFIXES,
    UNREADABLE,
    Source,
    csv_parts,
    file_suffix,
    find_file,
    from_lines,
    from_table,
    load_hub,
    load_source,
    unreadable,
)
from forgetfilter.errors import DataError
from forgetfilter.files import sha256

if TYPE_CHECKING:
    from datasets import Dataset

Parts = Iterator[tuple[Source, int]]
"""Parts of a data set, each with the place after it: a number of lines or rows, from which reading can go on."""
AT_ONCE = 1024
"""Rows that are read to compute a fingerprint, at a time."""
PAGES = 1 << 20
"""Bytes of a Parquet column that are read from the disk at once."""


@dataclass(frozen=True)
class Stream:
    """A data set that is read in parts.

    Attributes:
        name: What the user called it.
        read: Takes a number of rows and a place, and gives parts of at most so many rows from there on.
        file: The file, if it is one.
    """

    name: str
    read: Callable[[int, int], Parts]
    file: Path | None = None

    def parts(self, size: int, place: int = 0) -> Parts:
        """Parts of at most so many rows, none of them empty.

        Args:
            size: Number of rows.
            place: What an earlier part came with, to go on after it; 0 is the beginning.

        Raises:
            DataError: If the data cannot be read; damaged rows are left in the part with their errors instead.
        """
        return ((part, after) for part, after in self.read(size, place) if len(part))

    def fingerprint(self) -> str:
        """SHA-256 of the file, or of the rows where they are in no file; reads everything once."""
        if self.file is not None:
            try:
                return sha256(self.file)
            except OSError as error:
                raise unreadable(self.file, error) from error
        digest = hashlib.sha256()
        for part, _ in self.parts(AT_ONCE):
            digest.update(part.fingerprint().encode())
        return digest.hexdigest()

    @property
    def stem(self) -> str:
        """A name for files made of this data set: its own, without folders and kind of file."""
        name = Path(self.name).name.removesuffix(".gz")
        return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name).strip("<>")


def open_stream(data: Any, config_name: str | None = None, split: str = "train") -> Stream:
    """Open a data set, to be read in parts.

    Args:
        data: As for `load_source`.
        config_name: Configuration of a Hub data set.
        split: Split of a Hub data set or of a folder with several files.

    Raises:
        DataError: If there is no such data set.
    """
    if isinstance(data, (str, os.PathLike)):
        path = find_file(data)
        if path is not None:
            return _of_file(path)
        name = str(data)
        return Stream(name, partial(_mapped_parts, load_hub(name, config_name, split), name))
    if isinstance(data, (list, Source)):
        source = load_source(data)
        return Stream(source.name, partial(_loaded_parts, source))
    from datasets import Dataset

    if not isinstance(data, Dataset):
        raise DataError(f"data is a {type(data).__name__}: give a path, a Hub id, a datasets.Dataset or a list.")
    return Stream("<Dataset>", partial(_mapped_parts, data, "<Dataset>"))


def _of_file(path: Path) -> Stream:
    suffix, name = file_suffix(path), str(path)
    if suffix == ".csv":
        return Stream(name, lambda size, place: csv_parts(_lines(path), name, size, place), path)
    if suffix == ".parquet" and path.suffix != ".gz":
        return Stream(name, partial(_parquet_parts, path), path)
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and _begins(path) == b"{"):
        return Stream(name, partial(_line_parts, path), path)
    return Stream(name, partial(_loaded_parts, load_source(path)), path)


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, unpacked, one by one."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            first = file.readline().removeprefix(BOM)
            yield from chain([first] if first else [], file)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _begins(path: Path) -> bytes:
    """The first character of a file that is not white space."""
    return next((line.lstrip()[:1] for line in _lines(path) if line.strip()), b"")


def _line_parts(path: Path, size: int, place: int) -> Parts:
    """Places are lines."""
    lines = _lines(path)
    for _ in islice(lines, place):
        pass
    while taken := list(islice(lines, size)):
        yield from_lines(taken, str(path), place + 1), place + len(taken)
        place += len(taken)


def _loaded_parts(source: Source, size: int, place: int) -> Parts:
    """Places are rows."""
    for first in range(place, len(source), size):
        part = source.select(range(first, min(first + size, len(source))))
        yield part, first + len(part)


def _mapped_parts(dataset: "Dataset", name: str, size: int, place: int) -> Parts:
    """Places are rows; they stay on disk until they are read."""
    tables = dataset.with_format("arrow")
    for first in range(place, len(dataset), size):
        part = from_table(tables[first : first + size], name, first + 1)
        yield part, first + len(part)


def _parquet_parts(path: Path, size: int, place: int) -> Parts:
    """Places are rows; row groups before the place are not read."""
    try:
        with pq.ParquetFile(path, buffer_size=PAGES) as file:
            group, before = 0, 0
            while group < file.num_row_groups and before + file.metadata.row_group(group).num_rows <= place:
                before += file.metadata.row_group(group).num_rows
                group += 1
            batches = file.iter_batches(size, row_groups=range(group, file.num_row_groups))
            for table in _regrouped(batches, size, place - before):
                yield from_table(table, str(path), place + 1), place + len(table)
                place += len(table)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def _regrouped(batches: Iterable[pa.RecordBatch], size: int, skipped: int) -> Iterator[pa.Table]:
    """Tables of `size` rows, and a last one of those left, from batches of any size without their first rows."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch.slice(skipped))
        skipped = max(0, skipped - len(batch))
        while sum(map(len, held)) >= size:
            table = pa.Table.from_batches(held)
            yield table.slice(0, size)
            held = table.slice(size).to_batches()
    if sum(map(len, held)):
        yield pa.Table.from_batches(held)
