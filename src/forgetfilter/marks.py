"""What a person said of a run's rows: marks.jsonl, one line a statement. Lines are only ever added.

A later line on a row counts more than an earlier one. A line is on disk before anything follows from it. So a kill, a
second process or a change of mind loses nothing that was said.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from forgetfilter.errors import DataError

Said = Literal["clean", "unsafe", "skipped"]
"""What can be said of a row; skipped: the person could not tell."""
SAID = ("clean", "unsafe", "skipped")
NAME = "marks.jsonl"


@dataclass(frozen=True)
class Mark:
    """What was last said of a row.

    Attributes:
        said: clean, unsafe or skipped.
        drawn: Whether the row came with a sample drawn at random from all rows.
        kept: Whether the scores of that time would have kept the row.
    """

    said: Said
    drawn: bool = False
    kept: bool = False

    @property
    def clean(self) -> bool:
        """Whether the person called the row clean."""
        return self.said == "clean"

    @property
    def unsafe(self) -> bool:
        """Whether the person called the row unsafe."""
        return self.said == "unsafe"


def word(clean: bool) -> Said:
    """What is said of a clean or an unsafe row."""
    return "clean" if clean else "unsafe"


class Marks:
    """The marks of a run.

    Args:
        folder: The run's.
        ids: Each row's id.
        seed: Of the random order of the rows.

    Attributes:
        order: All rows in the random order in which some of them are asked about, whatever their scores. The rows
            before the first one that nothing is said of count as drawn at random.
    """

    def __init__(self, folder: Path, ids: Sequence[str], seed: int) -> None:
        """Read nothing yet."""
        self.path, self.ids = folder / NAME, ids
        self.order = np.random.default_rng([seed, 1]).permutation(len(ids))  # not the order of a filter's sample
        self._read_from: tuple[int, int] | None = None
        self._marks: dict[int, Mark] = {}

    def all(self) -> dict[int, Mark]:
        """Row -> what was last said of it, in the order of the statements; also those of other processes.

        Raises:
            DataError: If a line is not one of ours.
        """
        if not self.path.exists():
            return {}
        state = self.path.stat()
        now = (state.st_size, state.st_mtime_ns)
        if now != self._read_from:
            marks = _last(self._lines())
            drawn = set(takewhile(lambda row: row in marks, self.order.tolist()))
            self._marks = {row: replace(mark, drawn=mark.drawn or row in drawn) for row, mark in marks.items()}
            self._read_from = now
        return dict(self._marks)

    def add(self, said: Mapping[int, str | None], *, drawn: bool = False, kept: Iterable[int] = ()) -> None:
        """Write statements to disk, those on rows of which the same was said last left out.

        Args:
            said: Row -> "clean", "unsafe", "skipped", or None to take back what was said.
            drawn: Whether the rows are a sample drawn at random from all rows.
            kept: Those of the rows that today's scores would keep.

        Raises:
            DataError: If there is no such row, or something else was said of one.
        """
        for row, what in said.items():
            if type(row) is not int or not 0 <= row < len(self.ids):
                raise DataError(f"no row {row!r}: rows are numbers from 0 to {len(self.ids) - 1}.")
            if what not in (*SAID, None):
                raise DataError(f"row {row}: marked {what!r}; a mark is one of {', '.join(SAID)}, or none.")
        would_keep = set(kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{NAME}.lock")):
            before = self.all()
            lines = []
            for row, what in said.items():
                known = before.get(row)
                if (known.said if known else None) == what and (not drawn or (known is not None and known.drawn)):
                    continue
                line: dict[str, Any] = {"row": row, "id": self.ids[row], "mark": what}
                line |= {"drawn": True} if drawn else {}
                line |= {"kept": True} if row in would_keep else {}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            if lines:
                _append(self.path, "".join(lines).encode("utf-8", "surrogatepass"))

    def _lines(self) -> list[dict[str, Any]]:
        """Every line, checked. A last line without its end was never acknowledged, and is left out."""
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        found = []
        for number, line in enumerate(whole.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if type(entry["row"]) is not int or not 0 <= entry["row"] < len(self.ids):
                    raise ValueError(f"no row {entry['row']!r}")
                if entry["mark"] not in (*SAID, None):
                    raise ValueError(f"mark {entry['mark']!r}")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{self.path}:{number}: expected {{'row': a row's number, 'mark': 'clean', 'unsafe', 'skipped' or "
                    f"null}}: {error!r}. Mend the line, or remove it if you can do without the mark."
                ) from error
            found.append(entry)
        return found


def _last(lines: Iterable[Mapping[str, Any]]) -> dict[int, Mark]:
    """Row -> the last statement on it; a row that was drawn once stays a drawn one."""
    marks: dict[int, Mark] = {}
    drawn: set[int] = set()
    for line in lines:
        row = line["row"]
        marks.pop(row, None)  # so that the order is that of the last statements
        if line.get("drawn"):
            drawn.add(row)
        if line["mark"] is not None:
            marks[row] = Mark(line["mark"], row in drawn, bool(line.get("kept")))
    return marks


def _append(path: Path, lines: bytes) -> None:
    """Add lines to a file, and wait until they are on disk; half a line that a kill left is taken off first."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole < end:
            file.truncate(whole)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
