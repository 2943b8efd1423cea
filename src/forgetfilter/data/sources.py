"""Data sources: read files, folders and Hub data sets; write chosen rows back byte for byte."""

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.data.formats import Record
from forgetfilter.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"


@dataclass
class Source:
    """The rows of one data set, parsed, with what is needed to write any of them back unchanged.

    Attributes:
        name: What the user called it.
        suffix: Of the files that rows are written back to: .jsonl, .json, .csv or .parquet.
        records: The rows, parsed; None where a line could not be.
        lines: For each row the 1-based line it starts on (row number where there are no lines).
        errors: Row index -> what is wrong with it.
        raw: Each row's own bytes; empty for tables.
        header: Bytes before the first row (a CSV's column names).
        table: The Arrow table of Parquet and Hub data sets.
    """

    name: str
    suffix: str
    records: list[Record | None]
    lines: list[int]
    errors: dict[int, str] = field(default_factory=dict)
    raw: list[bytes] = field(default_factory=list)
    header: bytes = b""
    table: pa.Table | None = None

    def __len__(self) -> int:
        """Count rows."""
        return len(self.records)

    def rows(self) -> list[Record]:
        """The rows that could be parsed."""
        return [record for record in self.records if record is not None]

    def select(self, rows: Sequence[int]) -> "Source":
        """The same source with these rows alone, in this order."""
        return Source(
            name=self.name,
            suffix=self.suffix,
            records=[self.records[row] for row in rows],
            lines=[self.lines[row] for row in rows],
            errors={new: self.errors[row] for new, row in enumerate(rows) if row in self.errors},
            raw=[self.raw[row] for row in rows] if self.table is None else [],
            header=self.header,
            table=None if self.table is None else self.table.take(pa.array(rows, pa.int64())),
        )

    def joined(self, other: "Source") -> "Source":
        """These rows and those of another source, to be read alone: they cannot be written back."""
        return Source(self.name, self.suffix, [*self.records, *other.records], [*self.lines, *other.lines])

    def place(self, row: int) -> str:
        """Where a row stands, for messages: "file:line", or "name, row n"."""
        return f"{self.name}:{self.lines[row]}" if self.table is None else f"{self.name}, row {self.lines[row]}"

    def write(self, path: Path) -> None:
        """Write all rows to a path, which should end in this source's suffix."""
        if self.table is not None:
            pq.write_table(self.table, path)
            return
        if self.suffix == ".json":
            path.write_bytes(b"[\n" + b",\n".join(self.raw) + b"\n]\n")
            return
        with path.open("wb") as file:
            file.write(self.header)
            for number, line in enumerate(self.raw, 1):
                ended = line.endswith(b"\n") or number == len(self.raw)
                file.write(line if ended else line + b"\n")

    def fingerprint(self) -> str:
        """SHA-256 over the rows' content; independent of the file's name and compression."""
        digest = hashlib.sha256(self.header)
        for item in self.raw or (json.dumps(r, sort_keys=True, default=str).encode() for r in self.rows()):
            digest.update(item.rstrip(b"\r\n") + b"\n")
        return digest.hexdigest()


def row_ids(source: Source) -> list[str]:
    """A stable id for each row: its own `id` if these are unique, else a hash of its content and a count."""
    own = [(record or {}).get("id") for record in source.records]
    if all(_is_id(value) for value in own) and len(set(map(str, own))) == len(own):
        return [str(value) for value in own]
    seen: dict[str, int] = {}
    ids = []
    for record in source.records:
        digest = _content_id(record)
        seen[digest] = seen.get(digest, 0) + 1
        ids.append(f"{digest}-{seen[digest]}")
    return ids


def ids_alone(source: Source) -> list[str]:
    """An id for each row that depends on no other row: its own `id`, else a hash of its content; they may repeat."""
    own = [(record or {}).get("id") for record in source.records]
    return [
        str(value) if _is_id(value) else _content_id(record) for value, record in zip(own, source.records, strict=True)
    ]


def _content_id(record: Record | None) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_id(value: Any) -> bool:
    """Whether a value can be an id: an integer, or text that UTF-8 can encode."""
    try:
        return isinstance(value, int) or (isinstance(value, str) and bool(value.encode() or True))
    except UnicodeEncodeError:
        return False


def load_source(name: str | os.PathLike[str] | Any, config_name: str | None = None, split: str = "train") -> Source:
    """Read a data set whole.

    Args:
        name: A file, a folder with one data file, a Hub id, a datasets.Dataset, a list of dicts, or a Source,
            which is returned as it is.
        config_name: Configuration of a Hub data set.
        split: Split of a Hub data set or of a folder with several files.

    Raises:
        DataError: If there is no such data set, or its file is damaged as a whole. Damaged rows are
            left in the source with their errors instead.
    """
    if isinstance(name, Source):
        return name
    if not isinstance(name, (str, os.PathLike)):
        return _from_memory(name)
    path = find_file(name)
    if path is None:
        return from_table(load_hub(str(name), config_name, split).with_format("arrow")[:], str(name))
    return _from_file(path)


def find_file(name: str | os.PathLike[str]) -> Path | None:
    """The one file that a name stands for; None for a folder with several files, and for a Hub id.

    Raises:
        DataError: If the name is that of a file, but there is none.
    """
    path = Path(name)
    if path.is_dir():
        files = _data_files(path)
        return files[0] if len(files) == 1 else None
    if path.is_file():
        return path
    if file_suffix(path) or len(path.parts) > 2 or path.is_absolute():
        raise DataError(f"{name}: no such file. Give a file ({', '.join(SUFFIXES)}, also .gz), a folder or a Hub id.")
    return None


def file_suffix(path: Path) -> str | None:
    """What kind of file it is, of SUFFIXES, packed or not; None for others."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _data_files(folder: Path) -> list[Path]:
    """Data files of a folder; if it is a run's folder, only the file of its kept rows."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file_suffix(file))
    kept = [file for file in files if file.stem == "kept"]
    return kept if kept and (folder / "manifest.json").exists() else files


def _from_file(path: Path) -> Source:
    suffix = file_suffix(path)
    if suffix is None:
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(SUFFIXES)}, each also as .gz.")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    if suffix == ".parquet":
        return _from_parquet(data, path)
    data = data.removeprefix(BOM)
    if suffix == ".csv":
        return next(csv_parts(iter(_lines(data)), str(path)))[0]
    if suffix == ".json" and data.lstrip()[:1] != b"{":
        return _from_json(data, str(path))
    return from_lines(_lines(data), str(path))


UNREADABLE = (OSError, EOFError, zlib.error)
"""What is raised where a file cannot be read or unpacked."""


def unreadable(path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be read."""
    return DataError(f"{path}: cannot be read: {error}. Is the file whole, and is it what its name says?")


def _lines(data: bytes) -> list[bytes]:
    return list(io.BytesIO(data))


def _parse_object(text: str) -> Record:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    return value


def from_lines(lines: Iterable[bytes], name: str, first: int = 1) -> Source:
    """Rows of JSON, one a line; `first` is the number of the first line."""
    source = Source(name, ".jsonl", [], [])
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            record = _parse_object(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            source.errors[len(source)] = _why(error)
            record = None
        source.records.append(record)
        source.lines.append(number)
        source.raw.append(line)
    return source


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _from_json(data: bytes, name: str) -> Source:
    """A JSON array, each element with its own slice of the file's text."""
    source = Source(name, ".json", [], [])
    decoder, line, last = json.JSONDecoder(), 1, 0
    try:
        text = data.decode("utf-8")
        position = _skip(text, 0) + 1
        if text[position - 1 : position] != "[":
            raise json.JSONDecodeError("Expecting '['", text, position - 1)
        while True:
            start = _skip(text, position)
            if text[start : start + 1] == "]" and not source.records:
                position = start + 1
                break
            value, end = decoder.raw_decode(text, start)
            line += text.count("\n", last, start)
            last = start
            if not isinstance(value, dict):
                source.errors[len(source)] = f"a JSON {type(value).__name__}, expected an object"
            source.records.append(value if isinstance(value, dict) else None)
            source.lines.append(line)
            source.raw.append(text[start:end].encode())
            position = _skip(text, end) + 1
            if text[position - 1 : position] == "]":
                break
            if text[position - 1 : position] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position - 1)
        if text[position:].strip():
            raise json.JSONDecodeError("Nothing may follow the ']'", text, position)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: not valid JSON ({error.msg}). Repair the file.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a JSON array of objects ({_why(error)}). Repair the file.") from error
    return source


def _skip(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


class _Lines(Iterator[str]):
    """Lines of a file as text for the CSV reader; keeps the bytes of those that belong to the row being read."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        """Nothing is read yet."""
        self.lines, self.count, self._pending = lines, 0, list[bytes]()

    def __next__(self) -> str:
        """Read a line."""
        line = next(self.lines)
        self.count += 1
        self._pending.append(line)
        return line.decode("utf-8", "surrogateescape")

    def take(self) -> bytes:
        """The bytes read since the last call."""
        raw = b"".join(self._pending)
        self._pending.clear()
        return raw

    def skip_to(self, count: int) -> None:
        """Leave out lines until so many are read."""
        for _ in islice(self.lines, max(0, count - self.count)):
            self.count += 1


def csv_parts(
    lines: Iterator[bytes], name: str, size: int | None = None, start: int = 0
) -> Iterator[tuple[Source, int]]:
    """A CSV file with column names in its first line; a row's bytes may span several lines.

    Args:
        lines: All of its lines.
        name: What the user called it.
        size: Largest number of rows in a part; None for all rows in one.
        start: How many lines were read up to the end of the last part; rows from there on are given.

    Yields:
        Each part, and how many lines were read up to its end.
    """
    csv.field_size_limit(2**31 - 1)
    taken = _Lines(lines)
    reader = csv.reader(taken, strict=True)
    try:
        columns = next(reader, None)
        if not columns:
            raise DataError(f"{name}: the file is empty. It needs a line of column names, then rows.")
        part = Source(name, ".csv", [], [], header=taken.take())
        taken.skip_to(start)
        line = taken.count + 1
        for fields in reader:
            _add_row(part, columns, fields, line, taken.take())
            line = taken.count + 1
            if len(part) == size:
                yield part, taken.count
                part = Source(name, ".csv", [], [], header=part.header)
        yield part, taken.count
    except csv.Error as error:
        raise DataError(f"{name}:{taken.count}: not valid CSV ({error}). Repair the file.") from error


def _add_row(source: Source, columns: list[str], fields: list[str], line: int, raw: bytes) -> None:
    """Add a row of a CSV file to a source, unless the line is empty."""
    if not fields:
        return
    record: Record | None = dict(zip(columns, fields, strict=False))
    if len(fields) != len(columns):
        source.errors[len(source)] = f"{len(fields)} fields, the header has {len(columns)}"
    elif any("\udc80" <= char <= "\udcff" for text in fields for char in text):
        source.errors[len(source)] = "not UTF-8"
    source.records.append(None if len(source) in source.errors else record)
    source.lines.append(line)
    source.raw.append(raw)


def _from_parquet(data: bytes, path: Path) -> Source:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    return from_table(table, str(path))


def from_table(table: pa.Table, name: str, first: int = 1) -> Source:
    """Rows of a table; `first` is the number of its first row.

    Raises:
        DataError: If a value cannot be read.
    """
    try:
        records = table.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{name}: its values cannot be read ({error}). Is the file whole?") from error
    return Source(name, ".parquet", records, list(range(first, first + len(table))), table=table)


def _from_memory(data: Any) -> Source:
    if isinstance(data, list):
        lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in data]
        return from_lines(lines, "<list>")
    from datasets import Dataset

    if not isinstance(data, Dataset):
        raise DataError(f"data is a {type(data).__name__}: give a path, a Hub id, a datasets.Dataset or a list.")
    return from_table(data.with_format("arrow")[:], "<Dataset>")


def load_hub(name: str, config_name: str | None, split: str) -> "Dataset":
    """A data set of the Hub, or of a folder with several files; its rows stay on disk.

    Raises:
        DataError: If it cannot be had.
    """
    from datasets import load_dataset, load_dataset_builder

    try:
        if Path(name).is_dir():  # its README.md may name data files, which must lie in the folder
            named = load_dataset_builder(name, config_name).config.data_files or {}
            for file in [file for files in named.values() for file in files]:
                if not Path(file).resolve().is_relative_to(Path(name).resolve()):
                    raise DataError(f"{name}: its README.md leads out of the folder, to {file}. Give that file itself.")
        return load_dataset(name, config_name, split=split)
    except DataError:
        raise
    except Exception as error:  # the library raises dozens of kinds, all meaning "cannot be had"
        raise DataError(
            f"{name}: neither a file here nor a data set that could be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            f"Check the name, --dataset_config and --dataset_train_split ({split})."
        ) from error
