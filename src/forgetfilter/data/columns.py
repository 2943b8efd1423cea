"""Columns of rows: the type that a column's values have in common, and JSON that a table keeps as text."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa

from forgetfilter.data.formats import Record
from forgetfilter.data.lazy import in_parts

GROUP = 16_384
"""Rows of a table that are in memory at a time."""
NO_TYPE = (pa.ArrowException, OverflowError, ValueError, TypeError)
"""What Arrow raises for values that fit no column."""


def types_of(rows: Sequence[Record]) -> dict[str, pa.DataType | None]:
    """Column -> the type that all of its values have in common; None where they have none."""
    found: dict[str, set[pa.DataType | None]] = {}
    for part in in_parts(rows, GROUP):
        for name in dict.fromkeys(name for row in part for name in row):
            found.setdefault(name, set()).add(_type([row.get(name) for row in part]))
    types = {name: _common(kinds) for name, kinds in found.items()}
    mixed = {name: types[name] for name, kinds in found.items() if len(kinds) > 1 and types[name] is not None}
    for part in in_parts(rows, GROUP) if mixed else ():
        types |= {name: None for name, kind in mixed.items() if not _fits([row.get(name) for row in part], kind)}
    return types


def _type(values: list[Any]) -> pa.DataType | None:
    """The type that values have in common; None if they have none."""
    try:
        return pa.array(values).type
    except NO_TYPE:
        return None


def _fits(values: list[Any], kind: pa.DataType) -> bool:
    """Whether a type holds all of these values."""
    try:
        pa.array(values, kind)
    except NO_TYPE:
        return False
    return True


def _common(kinds: set[pa.DataType | None]) -> pa.DataType | None:
    """The type that holds values of all of these; None if there is none."""
    if None in kinds:
        return None
    schemas = [pa.schema([("", kind)]) for kind in kinds]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except NO_TYPE:
        return None


def column_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as a column of a type; as text where some are of other types."""
    if kind == pa.string():
        return pa.array([None if value is None else _as_text(value) for value in values], kind)
    return pa.array(values, kind)


def _as_text(value: Any) -> str:
    return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def encodable(text: str) -> str:
    """A text in which half a character, which UTF-8 cannot hold, is spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def records_of(table: pa.Table) -> list[Record | None]:
    """The rows of a table. What holds JSON as text, as the datasets library keeps uneven objects, is parsed."""
    rows: list[Record | None] = table.to_pylist()
    kinds = {field.name: field.type for field in table.schema if _holds_json(field.type)}
    for row in rows if kinds else ():
        assert row is not None
        row |= {name: _parsed(row[name], kind) for name, kind in kinds.items()}
    return rows


@cache
def _holds_json(kind: pa.DataType) -> bool:
    """Whether there is Arrow's type for JSON in a type; maps, of which the datasets library has none, are left."""
    inner = [kind.field(number).type for number in range(0 if pa.types.is_map(kind) else kind.num_fields)]
    return isinstance(kind, pa.JsonType) or any(map(_holds_json, inner))


def _parsed(value: Any, kind: pa.DataType) -> Any:
    """A value of such a type as JSON has it."""
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    return [_parsed(inner, kind.value_type) for inner in value]
