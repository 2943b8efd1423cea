"""Read a person's marks (clean or unsafe) and decisions (kept or dropped) on rows from a file."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgetfilter.data.ids import unusable_ids
from forgetfilter.data.source import Source
from forgetfilter.errors import DataError
from forgetfilter.marks import Said, word


def read_marks(source: Source, path: Path) -> dict[int, bool]:
    """Which rows a person marked clean (true) or unsafe (false), by row; rows still null are left out.

    Raises:
        DataError: If the file cannot be read, or names rows that are not there.
    """
    found = _read_lines(source, path, _called, "'clean': true, false or null")
    return {row: said == "clean" for row, said in found.items() if said is not None}


def read_overrides(source: Source, path: Path) -> dict[int, tuple[str, str]]:
    """Decision and reason of the rows a person decided, by row.

    Raises:
        DataError: If the file cannot be read, or names rows that are not there.
    """

    def decision(entry: dict[str, Any]) -> tuple[str, str]:
        if entry["decision"] not in ("kept", "dropped"):
            raise ValueError(f"decision {entry['decision']!r}")
        return entry["decision"], "decided by hand"

    return _read_lines(source, path, decision, "'decision': 'kept' or 'dropped'")


def read_statements(source: Source, path: Path) -> tuple[dict[int, Said], dict[int, Said]]:
    """What a person said of rows elsewhere, by row. Of several lines on a row the last one counts.

    Returns:
        First the rows drawn at random: lines with `clean` (trusted rows), and lines with `drawn`. Then all others:
        lines with `mark` (clean, unsafe or skipped) or `decision` (kept or dropped).

    Raises:
        DataError: If the file cannot be read, or names rows that are not there.
    """
    words: dict[Any, Said | None] = {"kept": "clean", "dropped": "unsafe", None: None}
    words |= {"clean": "clean", "unsafe": "unsafe", "skipped": "skipped"}

    def statement(entry: dict[str, Any]) -> tuple[bool, Said | None]:
        if "clean" in entry:
            return True, _called(entry)
        if not entry.keys() & {"mark", "decision"}:
            raise ValueError("it has none of mark, decision and clean")
        said = entry["mark"] if "mark" in entry else entry["decision"]
        if said not in words:
            raise ValueError(f"{said!r} is not known")
        return entry.get("drawn") is True, words[said]

    def later(before: tuple[bool, Said | None], now: tuple[bool, Said | None]) -> tuple[bool, Said | None]:
        return before[0] or now[0], now[1]  # the last word counts, and a row that was drawn once stays a drawn one

    found = _read_lines(source, path, statement, "'mark': 'clean', 'unsafe' or 'skipped'", later)
    said = {row: what for row, (_, what) in found.items() if what is not None}
    drawn = {row: what for row, what in said.items() if found[row][0]}
    return drawn, {row: what for row, what in said.items() if row not in drawn}


def _called(entry: dict[str, Any]) -> Said | None:
    """What a line with `clean` says of its row; None = not marked yet."""
    if entry["clean"] not in (True, False, None):
        raise ValueError(f"clean {entry['clean']!r}")
    return None if entry["clean"] is None else word(entry["clean"])


def _read_lines(
    source: Source,
    path: Path,
    read: Callable[[dict[str, Any]], Any],
    wanted: str,
    later: Callable[[Any, Any], Any] | None = None,
) -> dict[int, Any]:
    """Row -> what `read` makes of its line in a JSONL file; each line names its row by `id` or by `row`.

    Lines that contradict each other are an error, unless `later` makes one of an earlier and a later one.
    """
    trouble = unusable_ids(source)
    unusable = "" if trouble is None else f": {trouble}, so give 'row', its number from 0, or its id in scores.parquet"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    named = _named(lines)
    by_id = {row_id: row for row, row_id in enumerate(source.ids) if row_id in named} if named else {}
    found: dict[int, Any] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if "id" in entry and str(entry["id"]) not in by_id:
                raise ValueError(f"no row has the id {entry['id']!r}{unusable}")
            row = by_id[str(entry["id"])] if "id" in entry else entry["row"]
            if type(row) is not int or not 0 <= row < len(source):
                raise ValueError(f"no row {row!r}")
            said = read(entry)
            if later is None and found.get(row, said) != said:
                raise ValueError(f"a line above says otherwise of row {row}")
            found[row] = said if later is None or row not in found else later(found[row], said)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise DataError(f"{path}:{number}: expected {{'id': a row's id, {wanted}}}: {why}") from error
    return found


def _named(lines: list[str]) -> set[str]:
    """The ids that lines name, as far as they can be read."""
    found = set()
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            found.add(str(json.loads(line)["id"]))
    return found
