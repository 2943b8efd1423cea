"""What a person said of a run's rows: marks.jsonl, one line a statement. Lines are only ever added.

A later line on a row counts more than an earlier one. A line is on disk before anything follows from it. So a kill, a
second process or a change of mind loses nothing that was said.
"""

import errno
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forgetfilter.data.readers import BOM
from forgetfilter.errors import DataError
from forgetfilter.files import digest, lock, sync_folder

Said = Literal["clean", "unsafe", "skipped"]
"""What can be said of a row; skipped: the person could not tell."""
SAID = ("clean", "unsafe", "skipped")
FILE = "marks.jsonl"


@dataclass(frozen=True)
class Mark:
    """What was last said of a row.

    Attributes:
        said: clean, unsafe or skipped.
        drawn: Whether the row was drawn at random from all rows, and not found by its score before that.
        before: What counted before that; None = nothing.
    """

    said: Said
    drawn: bool = False
    before: Said | None = None

    @property
    def told(self) -> bool:
        """Whether the person could tell: the row is called clean or unsafe."""
        return self.said != "skipped"

    @property
    def clean(self) -> bool:
        """Whether the person called the row clean."""
        return self.said == "clean"

    @property
    def unsafe(self) -> bool:
        """Whether the person called the row unsafe."""
        return self.said == "unsafe"


def has_marks(folder: Path) -> bool:
    """Whether anything was ever said of a row of the run in a folder."""
    return (folder / FILE).exists()


def digest_of(said: Mapping[int, Mark]) -> str:
    """What a ranking depends on, as a short hash."""
    return digest({row: [mark.said, mark.drawn] for row, mark in said.items()})


def word(clean: bool) -> Said:
    """What is said of a clean or an unsafe row."""
    return "clean" if clean else "unsafe"


def _is_number(row: object) -> bool:
    """Whether it is a whole number, NumPy's included."""
    return isinstance(row, (int, np.integer)) and not isinstance(row, bool)


class Marks:
    """The marks of a run.

    Args:
        folder: The run's.
        ids: Each row's id.
        seed: Of the random order of the rows.

    Attributes:
        order: All rows in the random order in which some of them are asked about, whatever their scores.
    """

    def __init__(self, folder: Path, ids: Sequence[str], seed: int) -> None:
        """Read nothing yet."""
        self.path, self.ids = folder / FILE, ids
        self.order = np.random.default_rng([seed, 1]).permutation(len(ids))  # not the order of a filter's sample
        self._place = _place_of(folder)
        self._read: tuple[tuple[int, int] | None, dict[int, Mark]] = None, {}  # the file's state then, and its marks
        self._parsed: tuple[bytes, list[dict[str, Any]]] = b"", []  # its whole lines then, and what they say
        self._digest: tuple[dict[int, Mark], str] = {}, digest_of({})

    def all(self) -> dict[int, Mark]:
        """Row -> what was last said of it, in the order of the statements; also those of other processes.

        Raises:
            DataError: If a line is not one of ours.
        """
        if not self.path.exists():
            return {}
        state = self.path.stat()
        now = (state.st_size, state.st_mtime_ns)
        if now != self._read[0]:
            self._read = now, _last(self._lines())
        return dict(self._read[1])

    def ever(self) -> set[tuple[int, str | None]]:
        """Every row with everything that was ever said of it."""
        return {(entry["row"], entry["mark"]) for entry in self._lines()} if self.path.exists() else set()

    def touched(self) -> set[int]:
        """The rows that anything was ever said of, if only to take it back."""
        return {row for row, _ in self.ever()}

    def digest(self) -> str:
        """What a ranking depends on, as a short hash."""
        said = self.all()
        if self._digest[0] != said:
            self._digest = said, digest_of(said)
        return self._digest[1]

    def add(
        self, said: Mapping[int, str | None], *, drawn: bool = False, seen: Mapping[int, object] | None = None
    ) -> None:
        """Write statements to disk, those on rows of which the same was said last left out.

        Args:
            said: Row -> "clean", "unsafe", "skipped", or None to take back what was said.
            drawn: Whether the rows are a sample drawn at random from all rows.
            seen: Row -> what counted of it when the person said so (None = nothing); without it, whatever counts now.

        Raises:
            DataError: If there is no such row or word, or something else counts of one by now; nothing is written then.
        """
        for row, what in said.items():
            if not _is_number(row) or not 0 <= row < len(self.ids):
                raise DataError(f"no row {row!r}: rows are numbers from 0 to {len(self.ids) - 1}.")
            if what not in (*SAID, None):
                raise DataError(f"row {row}: marked {what!r}; a mark is one of {', '.join(SAID)}, or none.")
        if not said:
            return
        with self._locked():
            before = self.all()
            for row, known in (seen or {}).items():
                _require_seen(row, before.get(row), known)
            came_up = set(said) if drawn else self._came_up(before, said)
            lines = []
            for row, what in said.items():
                known = before.get(row)
                same = what == (known.said if known else None)
                newly_drawn = drawn and not (known and known.drawn)
                if same and not newly_drawn:
                    continue
                line: dict[str, Any] = {"row": int(row), "id": self.ids[row], "mark": what}
                line |= {"drawn": True} if row in came_up else {}
                lines.append(json.dumps(line) + "\n")
            if lines:
                _append(self.path, "".join(lines).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes off the file.

        Raises:
            DataError: If the run's folder is not where it was, or its file system has no locks.
        """
        if self._place is None or _place_of(self.path.parent) != self._place:
            raise DataError(f"{self.path.parent}: is not there any more, or another folder is. Nothing was written.")
        with lock(self.path.with_name(f".{FILE}.lock"), DataError):
            yield

    def _came_up(self, before: Collection[int], said: Mapping[int, str | None]) -> set[int]:
        """Those of the rows whose turn it was in the random order: nothing was said of them, but of all before them."""
        stated = {row for row, what in said.items() if what is not None}.union(before)
        return set(takewhile(lambda row: row in stated, map(int, self.order))) - set(before)

    def undo(self, row: int, *, seen: object = None) -> None:
        """Take back the last statement on a row; the one before counts again.

        Args:
            row: Its number.
            seen: What counted of it when the person asked; None = whatever counts now.

        Raises:
            DataError: If nothing is said of it, or something else by now.
        """
        with self._locked():
            known = self.all().get(row)
            if known is None:
                raise DataError(f"row {row} is not marked.")
            if seen is not None:
                _require_seen(row, known, seen)
            line = {"row": row, "id": self.ids[row], "mark": known.before, "undo": True}
            _append(self.path, (json.dumps(line) + "\n").encode())

    def _lines(self) -> list[dict[str, Any]]:
        """Every line, checked. Half a line at the end was never acknowledged, and is left out."""
        try:
            data = self.path.read_bytes().removeprefix(BOM)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from error
        data = data[: _whole(data)]
        known, entries = self._parsed if data.startswith(self._parsed[0]) else (b"", [])
        whole = data.rfind(b"\n") + 1
        found = [*entries, *self._entries(data[len(known) : whole], known.count(b"\n"))]
        self._parsed = data[:whole], found
        return [*found, *self._entries(data[whole:], data.count(b"\n"))]

    def _entries(self, data: bytes, before: int) -> list[dict[str, Any]]:
        """What lines say, those without anything left out; so many lines stand before them."""
        lines = enumerate(data.splitlines(), before + 1)
        return [self._checked(line, number) for number, line in lines if line.strip()]

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        """What a line says."""
        try:
            entry: dict[str, Any] = json.loads(line)
            if type(entry["row"]) is not int or not 0 <= entry["row"] < len(self.ids):
                raise ValueError(f"no row {entry['row']!r}")
            if entry["mark"] not in (*SAID, None):
                raise ValueError(f"mark {entry['mark']!r}")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.path}:{number}: expected {{'row': a row's number, 'mark': 'clean', 'unsafe', 'skipped' or "
                f"null}}: {error!r}. Mend the line, or remove it if you can do without the mark."
            ) from error
        if "id" in entry and entry["id"] != self.ids[entry["row"]]:
            raise DataError(
                f"{self.path}:{number}: row {entry['row']} of this run is not {entry['id']!r}. Is the file that of "
                "another run? Move it elsewhere; `forgetfilter review --marks FILE` takes its marks over by id."
            )
        return entry


def _place_of(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that has its name later; None where there is none."""
    if not folder.is_dir():
        return None
    state = folder.stat()
    return state.st_dev, state.st_ino


def _require_seen(row: int, known: Mark | None, seen: object) -> None:
    """Raise DataError if something else counts of a row than a person has seen."""
    now = None if known is None else known.said
    if now != seen:
        happened = "its mark was taken back" if now is None else f"it was marked {now}"
        raise DataError(f"row {row}: {happened} meanwhile, elsewhere. Nothing was written: look at it again.")


def _last(lines: Iterable[Mapping[str, Any]]) -> dict[int, Mark]:
    """Row -> what counts of it, in the order of the last statements; a row that was drawn once stays a drawn one."""
    stated: dict[int, list[tuple[int, Said | None]]] = {}  # row -> the statements that stand, each with its line
    drawn: set[int] = set()
    for number, line in enumerate(lines):
        said = stated.setdefault(line["row"], [])
        if not line.get("undo"):
            said.append((number, line["mark"]))
        elif said:
            said.pop()
        if line.get("drawn"):
            drawn.add(line["row"])
    found: dict[int, Mark] = {}
    for row, said in sorted(((row, said) for row, said in stated.items() if said), key=lambda own: own[1][-1][0]):
        *before, (_, last) = said
        if last is not None:
            found[row] = Mark(last, row in drawn, before[-1][1] if before else None)
    return found


def _whole(data: bytes) -> int:
    """How many of a file's bytes are whole lines; a last one without its end is whole if it is JSON, or has a }.

    One of ours that a kill has cut has none, so one that has and yet is no JSON was written by a person.
    """
    tail = data[max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 :]
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        closes = b"}" in re.sub(rb'"(?:[^"\\]|\\.)*"?', b"", tail)  # outside of texts: an id may hold one
        return len(data) if closes else len(data) - len(tail)
    return len(data)


def _append(path: Path, lines: bytes) -> None:
    """Add lines to a file, and wait until they are on disk; half a line that a kill left is taken off first."""
    new = not path.exists()
    with path.open("ab+", buffering=0) as file:
        file.seek(0)
        data = file.read()
        whole = _whole(data)
        file.truncate(whole)
        start = b"\n" if whole and not data[:whole].endswith((b"\n", b"\r")) else b""
        try:
            if file.write(start + lines) < len(start + lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
            if new:
                sync_folder(path.parent)
        except OSError:
            file.truncate(whole)  # what is not known to be on disk was not said
            raise
