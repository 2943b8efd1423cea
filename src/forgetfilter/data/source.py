"""The rows of one data set: parsed, with the bytes they came in, so that any of them can be written back unchanged."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.data.formats import Record
from forgetfilter.errors import DataError


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

    @classmethod
    def common(cls, forms: Iterable["Form"]) -> "Form":
        """The form in which rows of all these fit: their own if it is one, tables with all columns, or JSON lines."""
        first, *others = forms
        if all(form == first for form in others):
            return first
        schemas = [form.schema.remove_metadata() for form in (first, *others) if form.schema is not None]
        if len(schemas) <= len(others):
            return cls(".jsonl")
        try:
            return cls(first.suffix, schema=pa.unify_schemas(schemas))
        except pa.ArrowException:  # a column has two types
            return cls(".jsonl")


@dataclass
class Source:
    """The rows of one data set, parsed, with what is needed to write any of them back unchanged.

    Attributes:
        name: What the user called it.
        suffix: Of the files that rows are written back to: .jsonl, .json, .csv, .tsv or .parquet.
        records: The rows, parsed; None where a line could not be.
        lines: For each row the 1-based line it starts on (row number where there are no lines).
        errors: Row index -> what is wrong with it.
        raw: Each row's own bytes; empty for tables.
        header: Bytes before the first row (a CSV's column names).
        table: The Arrow table of Parquet and Hub data sets.
        files: For each row the file it is from; empty where all are from `name`.
    """

    name: str
    suffix: str
    records: list[Record | None]
    lines: list[int]
    errors: dict[int, str] = field(default_factory=dict)
    raw: list[bytes] = field(default_factory=list)
    header: bytes = b""
    table: pa.Table | None = None
    files: list[str] = field(default_factory=list)

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
            raw=[self.raw[row] for row in rows] if self.raw else [],
            header=self.header,
            table=None if self.table is None else self.table.take(pa.array(rows, pa.int64())),
            files=[self.files[row] for row in rows] if self.files else [],
        )

    def joined(self, other: "Source") -> "Source":
        """These rows and those of another source, to be read alone: they cannot be written back."""
        return Source(self.name, self.suffix, [*self.records, *other.records], [*self.lines, *other.lines])

    def place(self, row: int) -> str:
        """Where a row stands, for messages: "file:line", or "name, row n"."""
        file = self.files[row] if self.files else self.name
        return f"{file}:{self.lines[row]}" if self.table is None else f"{file}, row {self.lines[row]}"

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

    @property
    def form(self) -> Form:
        """The form its rows are in."""
        return Form(self.suffix, self.header, None if self.table is None else self.table.schema)

    def put(self, form: Form) -> "Source":
        """The same rows in another form, one of those that `Form.common` gives.

        Raises:
            DataError: If JSON cannot hold a value.
        """
        if self.form == form:
            return self
        if form.schema is not None and self.table is not None:
            parts = [form.schema.empty_table(), self.table.replace_schema_metadata(None)]
            table = pa.concat_tables(parts, promote_options="default")
            return from_table(table, self.name, self.lines[0] if self.lines else 1)
        raw = [self._as_line(row) for row in range(len(self))]
        return Source(self.name, ".jsonl", self.records, self.lines, self.errors, raw, files=self.files)

    def _as_line(self, row: int) -> bytes:
        """A row as a line of JSON; a row that could not be parsed as the line it is."""
        record = self.records[row]
        if record is None or self.suffix in (".json", ".jsonl"):
            return b" ".join(self.raw[row].splitlines()) + b"\n"
        try:
            return json.dumps(record, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.place(row)}: a value fits no line of JSON ({error}), which files of several kinds are "
                "put together as. Give this file alone."
            ) from error

    def as_table(self) -> pa.Table:
        """All columns of all rows; null where a row has none.

        A column whose values have no type in common, or which Arrow cannot hold, is text: texts as they are, others as
        JSON.
        """
        if self.table is not None:
            return self.table
        return pa.table({_encodable(name): _column(values) for name, values in self._columns().items()})

    def schema(self) -> pa.Schema | None:
        """The columns of its rows and their types; None where the values of a column have no type in common."""
        if self.table is not None:
            return self.table.schema
        try:
            return pa.schema([(name, pa.array(values).type) for name, values in self._columns().items()])
        except NO_TYPE:
            return None

    def _columns(self) -> dict[str, list[Any]]:
        rows = self.rows()
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


NO_TYPE = (pa.ArrowException, OverflowError, ValueError, TypeError)
"""What Arrow raises for values that fit no column."""


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except NO_TYPE:
        return pa.array([None if value is None else _as_text(value) for value in values])


def _as_text(value: Any) -> str:
    return _encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _encodable(text: str) -> str:
    """A text in which half a character, which UTF-8 cannot hold, is spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def from_table(table: pa.Table, name: str, first: int = 1) -> Source:
    """Rows of a table; `first` is the number of its first row.

    Raises:
        DataError: If a value cannot be read, or two columns have one name.
    """
    require_distinct(table.column_names, name)
    try:
        table.validate(full=True)  # a damaged file that is mapped into memory would end the process
        records = table.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{name}: its values cannot be read ({error}). Is the file whole?") from error
    return Source(name, ".parquet", records, list(range(first, first + len(table))), table=table)


def require_distinct(columns: Sequence[str], name: str) -> None:
    """Raise DataError if two columns have one name: a row would hold only one of them."""
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{name}: several columns are called {twice[0]!r}, so one would be lost. Rename them.")


def put_together(name: str, parts: Sequence[Source]) -> Source:
    """The rows of all parts, which have one form, in order."""
    if len(parts) == 1:
        return parts[0]
    whole = Source(name, parts[0].suffix if parts else ".jsonl", [], [], header=parts[0].header if parts else b"")
    for part in parts:
        whole.errors |= {len(whole) + row: error for row, error in part.errors.items()}
        whole.records += part.records
        whole.lines += part.lines
        whole.raw += part.raw
        whole.files += part.files
    if parts and parts[0].table is not None:
        whole.table = pa.concat_tables([part.table for part in parts])
    return whole


def row_ids(source: Source) -> list[str]:
    """A stable id for each row: its own `id` if these are unique, else a hash of its content and a count."""
    own = _own_ids(source)
    if unusable_ids(source) is None and own and own[0] is not None:
        return [str(value) for value in own]
    seen: dict[str, int] = {}
    ids = []
    for record in source.records:
        digest = _content_id(record)
        seen[digest] = seen.get(digest, 0) + 1
        ids.append(f"{digest}-{seen[digest]}")
    return ids


def unusable_ids(source: Source) -> str | None:
    """Why the rows' own ids cannot tell them apart; None if they can, or if no row has one."""
    own = _own_ids(source)
    wrong = [row for row, value in enumerate(own) if not _is_id(value)]
    if not any(value is not None for value in own):
        return None
    if wrong:
        where = source.place(wrong[0])
        return f"{len(wrong)} of {len(own)} rows have no 'id' that is text or a whole number, first {where}"
    counts = Counter(map(str, own))
    shared = [row for row, value in enumerate(own) if counts[str(value)] > 1]
    if shared:
        return f"{len(shared)} of {len(own)} rows share their 'id' with another one, first {source.place(shared[0])}"
    return None


def ids_alone(source: Source) -> list[str]:
    """An id for each row that depends on no other row: its own `id`, else a hash of its content; they may repeat."""
    return [
        str(value) if _is_id(value) else _content_id(record)
        for value, record in zip(_own_ids(source), source.records, strict=True)
    ]


def _own_ids(source: Source) -> list[Any]:
    return [(record or {}).get("id") for record in source.records]


def _content_id(record: Record | None) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_id(value: Any) -> bool:
    """Whether a value can be an id: an integer, or text that UTF-8 can encode."""
    try:
        return isinstance(value, int) or (isinstance(value, str) and bool(value.encode() or True))
    except UnicodeEncodeError:
        return False
