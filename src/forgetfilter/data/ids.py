"""Ids by which rows are told apart: their own where these are unique, else hashes of what they hold."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from forgetfilter.data.formats import Record
from forgetfilter.data.lazy import Lazy, in_parts

if TYPE_CHECKING:
    from forgetfilter.data.source import Source


def ids_of(source: "Source") -> Sequence[str]:
    """An id for each row: its own `id` if these are unique, else a hash of its content and a count."""
    own, given = _own_ids(source)
    if given and _unusable(own, source) is None:
        return Lazy(len(own), lambda rows: own.take(pa.array(rows)).to_pylist())
    content = np.array([int(_content_id(record), 16) for record in source.records], np.uint64)
    count = _occurrences(content)
    return Lazy(len(content), lambda rows: [f"{content[row]:016x}-{count[row]}" for row in rows.tolist()])


def unusable_ids(source: "Source") -> str | None:
    """Why the rows' own ids cannot tell them apart; None if they can, or if no row has one."""
    own, given = _own_ids(source)
    return _unusable(own, source) if given else None


def _unusable(own: pa.Array, source: "Source") -> str | None:
    """Why ids cannot tell rows apart; None if they can."""
    wrong = np.flatnonzero(own.is_null().to_numpy(zero_copy_only=False))
    if len(wrong):
        where = source.place(int(wrong[0]))
        return f"{len(wrong)} of {len(own)} rows have no 'id' that is text or a whole number, first {where}"
    numbers = own.dictionary_encode().indices.to_numpy()
    shared = np.flatnonzero(np.bincount(numbers)[numbers] > 1)
    if len(shared):
        where = source.place(int(shared[0]))
        return f"{len(shared)} of {len(own)} rows share their 'id' with another one, first {where}"
    return None


def ids_alone(source: "Source") -> list[str]:
    """An id for each row that depends on no other row: its own `id`, else a hash of its content; they may repeat."""
    records = ((record, (record or {}).get("id")) for record in source.records)
    return [str(value) if _is_id(value) else _content_id(record) for record, value in records]


def _own_ids(source: "Source") -> tuple[pa.Array, bool]:
    """Each row's own id as text, null where it can be none; and whether any row has one, usable or not."""
    parts, given = [], False
    for records in in_parts(source.records):
        values = [(record or {}).get("id") for record in records]
        given = given or any(value is not None for value in values)
        parts.append(pa.array([str(value) if _is_id(value) else None for value in values], pa.large_string()))
    return pa.chunked_array(parts, pa.large_string()).combine_chunks(), given


def _occurrences(values: np.ndarray) -> np.ndarray:
    """(values,) how many values up to this one, it included, are equal to it."""
    order = np.argsort(values, kind="stable")
    begins = np.append(True, values[order][1:] != values[order][:-1])[: len(order)]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) - first + 1
    return found


def _content_id(record: Record | None) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_id(value: Any) -> bool:
    """Whether a value can be an id: an integer, or text that UTF-8 can encode."""
    try:
        return isinstance(value, int) or (isinstance(value, str) and bool(value.encode() or True))
    except UnicodeEncodeError:
        return False
