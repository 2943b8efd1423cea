"""Read one file in parts: JSON lines, JSON arrays, CSV, TSV and Parquet, packed or not.

What is read stays on disk but for the part at hand. A JSON array and a packed Parquet file are read whole.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.data.formats import Record
from forgetfilter.data.source import DELIMITERS, Source, from_table, parse_object, require_distinct, require_object
from forgetfilter.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""How a file of UTF-16 begins."""
PAGES = 1 << 20
"""Bytes of a Parquet column that are read from the disk at once."""
LARGEST_LINE = 1 << 28
"""Bytes of a line, and characters of a field of a CSV file; a longer one is no row."""
SHOWN = 10
"""Keys of an object that a message names."""
LISTED = "data"
"""The key of a JSON object under which its rows are listed, as in SQuAD's files."""

Parts = Iterator[tuple[Source, Any]]
"""Parts of a data set, each with the place after it, from which reading can go on: a number of lines or rows, or for
several files [number of the file, place in it]. 0 is the beginning."""


def _zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))


def _zipped(path: Path) -> IO[bytes]:
    """The one file in an archive."""
    archive = zipfile.ZipFile(path)
    return archive.open(_zipped_name(archive, path))


def _zipped_name(archive: zipfile.ZipFile, path: Path) -> str:
    names = [item.filename for item in archive.infolist() if not item.is_dir() and "__MACOSX" not in item.filename]
    if len(names) != 1:
        raise DataError(f"{path}: holds {len(names)} files. Unpack it into a folder, and give that.")
    return names[0]


PACKINGS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".zst": _zstd, ".zip": _zipped}
"""Suffix of a packed file -> what opens it."""
DAMAGED = (zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException)
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, *DAMAGED)
"""What is raised where a file cannot be read or unpacked."""
KNOWN = f"{', '.join(SUFFIXES)}, each also as {', '.join(PACKINGS)}"


def unpacked_name(path: Path) -> str:
    """A file's name without the suffix of its packing."""
    return path.stem if path.suffix.lower() in PACKINGS else path.name


def file_suffix(path: Path) -> str | None:
    """What kind of file it is, of SUFFIXES, packed or not; None for others."""
    suffix = Path(unpacked_name(path)).suffix.lower()
    if not suffix and path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                suffix = Path(_zipped_name(archive, path)).suffix.lower()
        except UNREADABLE as error:
            raise cannot_be_read(path, error) from error
    return suffix if suffix in SUFFIXES else None


def cannot_be_read(path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be read."""
    return DataError(f"{path}: cannot be read: {error}. Is the file whole, and is it what its name says?")


def file_parts(path: Path, size: int, place: int = 0) -> Parts:
    """The rows of a file, in parts of at most so many.

    Args:
        path: The file.
        size: Number of rows.
        place: What an earlier part came with, to go on after it.

    Raises:
        DataError: If the file is damaged as a whole. Damaged rows are left in their part with their errors instead.
    """
    suffix = file_suffix(path)
    if suffix is None:
        raise DataError(f"{path}: unknown kind of file. Known: {KNOWN}.")
    if suffix == ".parquet":
        return _parquet_parts(path, size, place)
    if suffix in DELIMITERS:
        return csv_parts(_lines(path), str(path), suffix, size, place)
    if suffix == ".json" and not _is_json_lines(path):
        return source_parts(_from_json(_whole(path).removeprefix(BOM), str(path)), size, place)
    return _line_parts(path, size, place)


def source_parts(source: Source, size: int, place: int) -> Parts:
    """The rows of a source, in parts of at most so many; places are rows."""
    for first in range(place, len(source), size):
        part = source.select(range(first, min(first + size, len(source))))
        yield part, first + len(part)


def _open(path: Path) -> IO[bytes]:
    file: IO[bytes] = PACKINGS.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path)
    return file


def _whole(path: Path) -> bytes:
    """All bytes of a file, unpacked."""
    try:
        with _open(path) as file:
            return file.read()
    except UNREADABLE as error:
        raise cannot_be_read(path, error) from error


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, unpacked, one by one."""
    try:
        with _open(path) as file:
            lines = _limited(file, path)
            first = next(lines, b"").removeprefix(BOM)
            _refuse_utf16(first, path)
            yield from chain([first] if first else [], lines)
    except UNREADABLE as error:
        raise cannot_be_read(path, error) from error


def _refuse_utf16(head: bytes, path: Path) -> None:
    """Raise DataError if a file begins as one of UTF-16 does."""
    if head.startswith(UTF16) or b"\0" in head[:2]:  # without a mark every other byte is zero
        raise DataError(f"{path}: is UTF-16. Save it as UTF-8.")


def _limited(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """A file's lines. One that is too long for memory, as of a file of zeros, raises DataError."""
    for number, line in enumerate(iter(partial(file.readline, LARGEST_LINE + 1), b""), 1):
        if len(line) > LARGEST_LINE:
            raise DataError(f"{path}:{number}: a line of more than {LARGEST_LINE >> 20} MB. Is it one row?")
        yield line


def _line_parts(path: Path, size: int, place: int) -> Parts:
    """Places are lines."""
    lines = _lines(path)
    for _ in islice(lines, place):
        pass
    while taken := list(islice(lines, size)):
        yield from_lines(taken, str(path), place + 1), place + len(taken)
        place += len(taken)


def from_lines(lines: Iterable[bytes], name: str, first: int = 1) -> Source:
    """Rows of JSON, one a line; `first` is the number of the first line."""
    numbers: list[int] = []
    raw: list[bytes] = []
    errors: dict[int, str] = {}
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            require_object(line)
        except (ValueError, RecursionError) as error:
            errors[len(raw)] = _why(error)
        numbers.append(number)
        raw.append(line)
    return Source(name, ".jsonl", numbers, raw, errors=errors)


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def why_no_line_parses(source: Source) -> str:
    """What is wrong with a source of which no row could be parsed, by its first rows."""
    first = source.raw[0].strip()
    hint = "Is it what its name says?"
    if first.startswith(b"["):
        hint = "It looks like one JSON array: let its name end in .json."
    elif first == b"{":
        hint = "Its objects span several lines: write each on a line of its own."
    return f"none of its {len(source)} lines could be read. {source.place(0)}: {source.errors[0]}. {hint}"


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file holds an object a line: neither an array, nor an object that lists its rows."""
    if not _begins_with(path, b"{"):
        return False
    written = filter(None, (line.strip() for line in _lines(path)))
    first = next(written, b"")
    try:
        found = parse_object(first)
    except (ValueError, RecursionError):
        return not _is_one_object(path)
    return not isinstance(found.get(LISTED), list) or next(written, None) is not None


def _begins_with(path: Path, mark: bytes) -> bool:
    """Whether a file's first character that is no white space is this one; its first line may be of any length."""
    try:
        with _open(path) as file:
            head = file.read(len(BOM)).removeprefix(BOM).lstrip()
            _refuse_utf16(head, path)
            while not head and (more := file.read(PAGES)):
                head = more.lstrip()
    except UNREADABLE as error:
        raise cannot_be_read(path, error) from error
    return head.startswith(mark)


def _is_one_object(path: Path) -> bool:
    """Whether a file is one JSON object, written over several lines.

    Raises:
        DataError: If it is one that lists no rows.
    """
    try:
        found = json.loads(_whole(path))
    except (ValueError, RecursionError):
        return False
    if not isinstance(found.get(LISTED), list):
        keys = ", ".join(map(repr, list(found)[:SHOWN]))
        raise DataError(
            f"{path}: one JSON object with {len(found)} keys: {keys}. Rows are objects in an array, or listed under "
            f"{LISTED!r}, or each on a line of its own."
        )
    return True


def _from_json(data: bytes, name: str) -> Source:
    """A JSON array, or an object that lists the rows as its "data"; each row with its own slice of the file's text."""
    source = Source(name, ".json")
    try:
        text = data.decode("utf-8")
        end = _add_elements(source, text, _start_of_rows(text))
        if text[end:].strip() and text[_skip(text, 0)] == "[":
            raise json.JSONDecodeError("Nothing may follow the ']'", text, end)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8. Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: not valid JSON ({error.msg}). Repair the file.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not a JSON array of objects ({_why(error)}). Repair the file.") from error
    return source


def _start_of_rows(text: str) -> int:
    """Position after the '[' of the array of rows."""
    position = _skip(text, 0)
    if text[position : position + 1] == "{":
        decoder = json.JSONDecoder()
        while True:
            key, position = decoder.raw_decode(text, _skip(text, position + 1))
            position = _skip(text, _skip(text, position) + 1)
            if key == LISTED and text[position] == "[":
                break
            _, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("Expecting '['", text, position)
    return position + 1


def _add_elements(source: Source, text: str, position: int) -> int:
    """Add the elements of an array that begins before a position; gives the position after it."""
    decoder, last = json.JSONDecoder(), 0
    line, lines, raw = 1, list[int](), list[bytes]()
    source.lines, source.raw = lines, raw
    while True:
        start = _skip(text, position)
        if text[start : start + 1] == "]" and not raw:
            return start + 1
        _, end = decoder.raw_decode(text, start)
        line += text.count("\n", last, start)
        last = start
        try:
            require_object(text[start:end].encode())
        except (ValueError, RecursionError) as error:
            source.errors[len(raw)] = _why(error)
        lines.append(line)
        raw.append(text[start:end].encode())
        position = _skip(text, end) + 1
        if text[position - 1 : position] == "]":
            return position
        if text[position - 1 : position] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position - 1)


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


def csv_parts(lines: Iterator[bytes], name: str, suffix: str, size: int, start: int) -> Parts:
    """A CSV or TSV file with column names in its first line; a row's bytes may span several lines.

    Args:
        lines: All of its lines.
        name: What the user called it.
        suffix: .csv or .tsv, which says what parts the columns.
        size: Largest number of rows in a part.
        start: How many lines were read up to the end of the last part; rows from there on are given.

    Yields:
        Each part, and how many lines were read up to its end.
    """
    csv.field_size_limit(LARGEST_LINE)
    taken = _Lines(lines)
    reader = csv.reader(taken, delimiter=DELIMITERS[suffix], strict=True)
    line = 1
    try:
        columns = next(reader, None)
        if columns is None:
            raise DataError(f"{name}: the file is empty. It needs a line of column names, then rows.")
        if not columns:
            raise DataError(f"{name}:1: an empty line, where the column names must stand. Remove it.")
        _check_columns(columns, name, suffix)
        header, parse = taken.take(), partial(_parse_fields, columns, DELIMITERS[suffix])
        taken.skip_to(start)
        line = taken.count + 1
        numbers, raw, errors = list[int](), list[bytes](), dict[int, str]()
        for fields in reader:
            own = taken.take()
            if fields:  # no empty line
                errors |= _wrong_fields(fields, columns, len(raw))
                numbers.append(line)
                raw.append(own)
            line = taken.count + 1
            if len(raw) == size:
                yield Source(name, suffix, numbers, raw, parse, errors, header), taken.count
                numbers, raw, errors = [], [], {}
        yield Source(name, suffix, numbers, raw, parse, errors, header), taken.count
    except csv.Error as error:
        raise DataError(f"{name}:{line}: not valid CSV: the row that begins here ({error}). Repair it.") from error


def _check_columns(columns: list[str], name: str, suffix: str) -> None:
    """Refuse a line of column names that the delimiter does not part, or that has a name twice."""
    require_distinct(columns, f"{name}:1")
    others = [mark for mark in (",", ";", "\t", "|") if mark in columns[0]]
    if len(columns) == 1 and others:
        raise DataError(
            f"{name}:1: all of it is one column, {columns[0]!r}. In {suffix} files columns are parted by "
            f"{DELIMITERS[suffix]!r}, not by {others[0]!r}: save it that way."
        )


def _wrong_fields(fields: list[str], columns: list[str], row: int) -> dict[int, str]:
    """What is wrong with a row of a CSV file, by its number; nothing if it is well formed."""
    if len(fields) != len(columns):
        return {row: f"{len(fields)} fields, the header has {len(columns)}"}
    try:
        "".join(fields).encode()  # bytes that are not UTF-8 were decoded as what it cannot encode
    except UnicodeEncodeError:
        return {row: "not UTF-8"}
    return {}


def _parse_fields(columns: list[str], delimiter: str, raw: bytes) -> Record:
    """The record that the bytes of a row of a CSV file hold."""
    lines = io.StringIO(raw.decode("utf-8"), newline="\n")
    return dict(zip(columns, next(csv.reader(lines, delimiter=delimiter, strict=True)), strict=True))


def _parquet_parts(path: Path, size: int, place: int) -> Parts:
    """Places are rows; row groups before the place are not read."""
    packed = path.suffix.lower() in PACKINGS
    try:
        with pq.ParquetFile(pa.BufferReader(_whole(path)) if packed else path, buffer_size=PAGES) as file:
            group, before = 0, 0
            while group < file.num_row_groups and before + file.metadata.row_group(group).num_rows <= place:
                before += file.metadata.row_group(group).num_rows
                group += 1
            at_once = max(1, min(size, file.metadata.num_rows))
            batches = file.iter_batches(at_once, row_groups=range(group, file.num_row_groups))
            for table in _regrouped(batches, at_once, place - before):
                yield from_table(table, str(path), place + 1), place + len(table)
                place += len(table)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
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
