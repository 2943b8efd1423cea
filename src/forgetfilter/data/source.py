"""The rows of one data set: parsed, with the bytes they came in, so that any of them can be written back unchanged."""

import csv
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.data.columns import GROUP, column_of, encodable, records_of, types_of
from forgetfilter.data.formats import Record, read_row
from forgetfilter.data.ids import ids_of
from forgetfilter.data.lazy import Lazy, Spool, chosen, column, in_parts, joined, table_on_disk
from forgetfilter.data.turns import Turn
from forgetfilter.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Form:
    """What files must have in common for their rows to go into one file.

    Attributes:
        suffix: .jsonl, .json, .csv, .tsv or .parquet.
        header: Bytes before the first row: a CSV's column names.
        schema: A table's columns and their types.
    """

    suffix: str
    header: bytes = b""
    schema: pa.Schema | None = None

    def is_like(self, other: "Form") -> bool:
        """Whether rows of both can stand in one file: CSV headers may be quoted or end in other ways."""
        if self == other or not (self.header and other.header):
            return self == other
        return self.suffix == other.suffix and self._columns() == other._columns()

    def _columns(self) -> list[str]:
        """The column names in the header of a CSV or TSV file."""
        line = self.header.decode("utf-8", "surrogateescape").strip("\r\n")
        return next(csv.reader([line], delimiter=DELIMITERS[self.suffix]))

    @classmethod
    def common(cls, forms: Iterable["Form"]) -> "Form":
        """The form in which rows of all these fit: their own if it is one, tables with all columns, or JSON lines."""
        first, *others = forms
        if all(form.is_like(first) for form in others):
            return first
        schemas = [form.schema.remove_metadata() for form in (first, *others) if form.schema is not None]
        if len(schemas) < 1 + len(others):  # some are no tables
            return cls(".jsonl")
        try:
            return cls(first.suffix, schema=pa.unify_schemas(schemas))
        except pa.ArrowException:  # a column has two types
            return cls(".jsonl")


def parse_object(line: bytes) -> Record:
    """The record that a line of JSON holds.

    Raises:
        ValueError: If it holds none.
    """
    return _object(json.loads(line.decode("utf-8")))


def require_object(line: bytes) -> None:
    """Raise ValueError unless a line of JSON holds an object in which each key stands once."""
    _object(json.loads(line.decode("utf-8"), object_pairs_hook=_each_once))


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> Record:
    """An object of JSON. Of a key that is there twice programs read one or the other, so none is taken."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return found


@dataclass
class Source:
    """The rows of one data set, with what is needed to write any of them back unchanged.

    Where there are many, they lie on disk, and each is read when it is asked for.

    Attributes:
        name: What the user called it.
        suffix: Of the files that rows are written back to: .jsonl, .json, .csv, .tsv or .parquet.
        lines: For each row the 1-based line it starts on (row number where there are no lines).
        raw: Each row's own bytes; empty for tables.
        parse: What makes a record of a row's bytes.
        errors: Row index -> what is wrong with it.
        header: Bytes before the first row (a CSV's column names).
        table: The Arrow table of Parquet and Hub data sets.
        picked: (rows,) which rows of the table these are; None for all of them, in order.
        files: For each row the file it is from; empty where all are from `name`.
        made: The records, where they are neither in `raw` nor in `table`.
        scratch_folder: A folder on whose disk what is made of the rows may lie; None for the system's own.
    """

    name: str
    suffix: str
    lines: Sequence[int] = ()
    raw: Sequence[bytes] = field(default_factory=list)
    parse: Callable[[bytes], Record] = parse_object
    errors: dict[int, str] = field(default_factory=dict)
    header: bytes = b""
    table: pa.Table | None = None
    picked: np.ndarray | None = None
    files: Sequence[str] = field(default_factory=list)
    made: Sequence[Record] | None = None
    scratch_folder: Path | None = None

    def __len__(self) -> int:
        """Count rows."""
        return len(self.lines)

    @property
    def records(self) -> Sequence[Record | None]:
        """The rows, parsed when they are asked for; None where there is an error."""
        return Lazy(len(self), self._records)

    def _records(self, rows: np.ndarray) -> Sequence[Record | None]:
        if self.table is not None:
            return records_of(self._taken(rows))
        if self.made is not None:
            return chosen(self.made, rows)
        raw = zip(rows.tolist(), chosen(self.raw, rows), strict=True)
        return [None if row in self.errors else self.parse(line) for row, line in raw]

    @cached_property
    def ids(self) -> Sequence[str]:
        """A stable id for each row: its own `id` if these are unique, else a hash of its content and a count."""
        return ids_of(self)

    def rows(self) -> Sequence[Record]:
        """The rows without an error."""
        good = np.delete(np.arange(len(self)), list(self.errors))
        return cast("Sequence[Record]", chosen(self.records, good))

    def turns(self, row_format: str) -> Sequence[list[Turn]]:
        """What each row without an error says, read when it is asked for.

        Args:
            row_format: Their format, as `read_row` takes it.
        """
        rows = self.rows()
        return Lazy(len(rows), lambda places: [read_row(record, row_format) for record in chosen(rows, places)])

    def select(self, rows: Sequence[int] | np.ndarray) -> "Source":
        """The same source with these rows alone, in this order."""
        picked = None
        if self.table is not None:
            picked = np.asarray(rows, np.int64) if self.picked is None else self.picked[rows]
        errors = {new: self.errors[row] for new, row in enumerate(rows) if row in self.errors} if self.errors else {}
        return replace(
            self,
            lines=chosen(self.lines, rows),
            raw=chosen(self.raw, rows) if self.raw else [],
            errors=errors,
            picked=picked,
            files=chosen(self.files, rows) if self.files else [],
            made=None if self.made is None else chosen(self.made, rows),
        )

    def joined(self, other: "Source") -> "Source":
        """These rows and those of another source, to be read alone: they cannot be written back."""
        lines, made = joined(self.lines, other.lines), joined(self.rows(), other.rows())
        files = joined(*(rows.files or [rows.name] * len(rows) for rows in (self, other)))
        return Source(self.name, self.suffix, lines, made=made, files=files, scratch_folder=self.scratch_folder)

    def place(self, row: int) -> str:
        """Where a row stands, for messages: "file:line", or "name, row n"."""
        file = self.files[row] if self.files else self.name
        return f"{file}:{self.lines[row]}" if self.table is None else f"{file}, row {self.lines[row]}"

    def write(self, path: Path) -> None:
        """Write all rows to a path, which should end in this source's suffix."""
        if self.table is not None:
            with pq.ParquetWriter(path, self.table.schema) as writer:
                for part in self._tables():
                    writer.write_table(part)
            return
        with path.open("wb") as file:
            if self.suffix == ".json":
                file.write(b"[\n")
                for number, row in enumerate(self.raw):
                    file.write(b",\n" + row if number else row)
                file.write(b"\n]\n")
                return
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

    @property
    def form(self) -> Form:
        """The form its rows are in."""
        return Form(self.suffix, self.header, None if self.table is None else self.table.schema)

    def put(self, form: Form) -> "Source":
        """The same rows in another form, one of those that `Form.common` gives.

        Raises:
            DataError: If JSON cannot hold a value.
        """
        if self.form.is_like(form):
            return replace(self, header=form.header)
        if form.schema is not None and self.table is not None:
            parts = [form.schema.empty_table(), self.table.replace_schema_metadata(None)]
            table = pa.concat_tables(parts, promote_options="default")
            return replace(self, table=table, suffix=".parquet")
        raw = [self._as_line(row, record) for row, record in enumerate(self.records)]
        return Source(self.name, ".jsonl", self.lines, raw, errors=self.errors, files=self.files)

    def writable(self) -> "Source":
        """The same rows as they can be written: those with objects without keys, which Parquet lacks, as lines."""
        empty = self.table is not None and any(_has_empty_struct(column.type) for column in self.table.schema)
        return self.put(Form(".jsonl")) if empty else self

    def _as_line(self, row: int, record: Record | None) -> bytes:
        """A row as a line of JSON; a row that could not be parsed as the line it is."""
        if record is None or self.suffix in (".json", ".jsonl"):
            return b" ".join(self.raw[row].splitlines()) + b"\n"
        try:
            return json.dumps(record, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.place(row)}: a value fits no line of JSON ({error}). Files of several kinds are put together "
                "as such lines, and so are objects without keys. Give this file alone, or make text of that column."
            ) from error

    def as_table(self) -> pa.Table:
        """All columns of all rows; null where a row has none.

        A column whose values have no type in common, or which Arrow cannot hold, is text: texts as they are, others as
        JSON.
        """
        if self.table is not None:
            return self.table if self.picked is None else self._taken(np.arange(len(self)))
        return pa.concat_tables([*self.tables()])

    def tables(self) -> Iterator[pa.Table]:
        """The rows as tables of equal columns, some at a time; see `as_table`."""
        if self.table is not None:
            yield from self._tables()
            return
        types = {name: pa.string() if kind is None else kind for name, kind in types_of(self.rows()).items()}
        schema = pa.schema([(encodable(name), kind) for name, kind in types.items()])
        yield schema.empty_table()
        for rows in in_parts(self.rows(), GROUP):
            columns = [column_of([row.get(name) for row in rows], kind) for name, kind in types.items()]
            yield pa.Table.from_arrays(columns, schema=schema)

    def schema(self) -> pa.Schema | None:
        """The columns of its rows and their types; None where a column's values have no type in common, or no name."""
        if self.table is not None:
            return self.table.schema
        types = types_of(self.rows())
        spelt = all(name == encodable(name) for name in types)
        return pa.schema(types.items()) if spelt and None not in types.values() else None

    def uneven(self) -> set[str]:
        """Where in its rows objects differ in their keys, as in messages.tool_calls.function.arguments."""
        keys: dict[str, set[frozenset[str]]] = {}
        for row in self.rows():
            for name, value in row.items():
                _note_keys(name, value, keys)
        return {place for place, kinds in keys.items() if len(kinds) > 1}

    def _tables(self) -> Iterator[pa.Table]:
        """The rows of a table, some at a time."""
        return (self._taken(np.arange(first, min(first + GROUP, len(self)))) for first in range(0, len(self), GROUP))

    def _taken(self, rows: np.ndarray) -> pa.Table:
        """Some rows of a table, copied from as small a part of it as holds them all."""
        assert self.table is not None
        rows = rows if self.picked is None else self.picked[rows]
        least, most = int(rows.min(initial=len(self.table))), int(rows.max(initial=-1))
        if most - least > 8 * len(rows):
            return pa.concat_tables([self.table.slice(row, 1) for row in rows.tolist()])
        return self.table.slice(least, max(0, most + 1 - least)).take(pa.array(rows - least, pa.int64()))


def _note_keys(place: str, value: Any, keys: dict[str, set[frozenset[str]]]) -> None:
    """Note the keys of each object in a value by its place."""
    if isinstance(value, dict):
        keys.setdefault(place, set()).add(frozenset(value))
        for name, inner in value.items():
            _note_keys(f"{place}.{name}", inner, keys)
    elif isinstance(value, list):
        for inner in value:
            _note_keys(place, inner, keys)


def from_table(table: pa.Table, name: str, first: int = 1) -> Source:
    """Rows of a table; `first` is the number of its first row.

    Raises:
        DataError: If a value cannot be read, or two columns have one name.
    """
    require_distinct(table.column_names, name)
    source = Source(name, ".parquet", column(np.arange(first, first + len(table))), table=table)
    try:
        table.validate(full=True)  # a damaged file that is mapped into memory would end the process
        for _ in source.records:
            pass
    except (ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{name}: its values cannot be read ({error}). Is the file whole?") from error
    return source


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether a type holds objects without keys, which Parquet cannot."""
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not inner) or any(map(_has_empty_struct, inner))


def require_distinct(columns: Sequence[str], name: str) -> None:
    """Raise DataError if two columns have one name: a row would hold only one of them."""
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{name}: several columns are called {twice[0]!r}, so one would be lost. Rename them.")


def put_together(name: str, parts: Iterable[Source], scratch_folder: Path | None = None) -> Source:
    """The rows of all parts, which have one form, in order: on disk, unless there is one part alone.

    Args:
        name: What to call them.
        parts: The parts; one is in memory at a time.
        scratch_folder: A folder on the disk that they are to lie on; see `Source`.
    """
    left = iter(parts)
    first, second = next(left, None), next(left, None)
    if first is None or second is None:
        return replace(first or Source(name, ".jsonl"), scratch_folder=scratch_folder)
    spool, lines, files, errors = Spool(scratch_folder), array("q"), list[str](), dict[int, str]()

    def noted() -> Iterator[Source]:
        for part in chain([first, second], left):
            errors.update({len(lines) + row: error for row, error in part.errors.items()})
            lines.extend(part.lines)
            files.extend(part.files)
            yield part

    table = None
    if first.table is not None:
        table = table_on_disk(first.table.schema, (part.as_table() for part in noted()), scratch_folder)
    else:
        for part in noted():
            for row in part.raw:
                spool.append(row)
    return replace(
        first,
        name=name,
        lines=column(np.array(lines)),
        raw=spool.rows() if table is None else [],
        errors=errors,
        table=table,
        files=column(np.array(files, object)) if files else [],
        scratch_folder=scratch_folder,
    )
