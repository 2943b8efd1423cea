"""Long sequences that take little memory: items that are made when they are asked for, and bytes that lie on disk."""

import os
import random
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

from forgetfilter.files import scratch

T = TypeVar("T")
AT_ONCE = 1024
"""Items that are made at a time by whoever goes through all of them."""
LARGEST_READ = 1 << 26
"""Most bytes that are read at once for several rows."""


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for, anew each time.

    Args:
        count: How many there are.
        make: Makes the items at some places, given as an array of numbers, in their order.
    """

    def __init__(self, count: int, make: Callable[[np.ndarray], Sequence[T]]) -> None:
        """Make nothing yet."""
        self._count, self.make = count, make

    def __len__(self) -> int:
        """Count items."""
        return self._count

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: int | slice) -> T | list[T]:
        """An item, or a list of some."""
        places = range(self._count)[place]
        if isinstance(places, range):
            return list(self.make(np.arange(places.start, places.stop, places.step)))
        return self.make(np.array([places]))[0]

    def __iter__(self) -> Iterator[T]:
        """Make all, some at a time."""
        for part in in_parts(self):
            yield from part

    def __eq__(self, other: object) -> bool:
        """Whether the items are equal to those of another sequence."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def in_parts(items: Sequence[T], size: int = AT_ONCE) -> Iterator[Sequence[T]]:
    """All items, so many at a time."""
    return (items[first : first + size] for first in range(0, len(items), size))


def chosen(items: Sequence[T], places: Sequence[int] | np.ndarray) -> Sequence[T]:
    """The items at these places, in this order: made when asked for if these are."""
    if not isinstance(items, Lazy):
        return [items[place] for place in places]
    taken = np.asarray(places, np.int64)
    return Lazy(len(taken), lambda wanted: items.make(taken[wanted]))


def shuffled(items: Sequence[T], seed: int) -> Iterator[T]:
    """The items without end, shuffled anew on each pass."""
    rng, order = random.Random(seed), list(items)
    while True:
        rng.shuffle(order)
        yield from order


def column(values: np.ndarray) -> Lazy[Any]:
    """The values of an array as a sequence of Python's own."""
    return Lazy(len(values), lambda places: values[places].tolist())


def mapped(shape: tuple[int, ...], kind: type[np.generic], scratch_folder: Path | None) -> np.ndarray:
    """An array of zeros on disk, in a file without a name that goes away with it, mapped into the memory.

    Args:
        shape: Its shape.
        kind: Type of its numbers.
        scratch_folder: A folder on the disk that it is to lie on, there already or not; None for the system's own.
    """
    size = max(1, int(np.prod(shape)) * np.dtype(kind).itemsize)
    with scratch(scratch_folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk would end the process when the array is filled
            os.posix_fallocate(file.fileno(), 0, size)
        return np.asarray(np.memmap(file, kind, "w+", shape=shape))


def rearranged(values: np.ndarray, rows: np.ndarray, scratch_folder: Path | None) -> np.ndarray:
    """Some rows of an array on disk, as another one; see `mapped`."""
    found = mapped((len(rows), *values.shape[1:]), values.dtype.type, scratch_folder)
    for first in range(0, len(rows), AT_ONCE):
        found[first : first + AT_ONCE] = values[rows[first : first + AT_ONCE]]
    return found


def joined(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """The items of two sequences, one after the other; those that are made when asked for stay so."""
    count = len(first)

    def make(places: np.ndarray) -> Sequence[T]:
        here = places < count
        found = np.empty(len(places), object)
        for own, items, wanted in ((here, first, places[here]), (~here, second, places[~here] - count)):
            for place, item in zip(np.flatnonzero(own), chosen(items, wanted), strict=True):
                found[place] = item
        return found.tolist()

    return Lazy(count + len(second), make)


def table_on_disk(schema: pa.Schema, tables: Iterable[pa.Table], folder: Path | None) -> pa.Table:
    """One table of several, in a file without a name that goes away with it.

    Args:
        schema: Of each table.
        tables: One is in memory at a time.
        folder: A folder on the disk that the file is to lie on, there already or not; None for the system's own.
    """
    with scratch(folder) as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        file.flush()
        return pa.ipc.open_stream(pa.memory_map(f"/dev/fd/{file.fileno()}")).read_all()


class Spool:
    """Bytes of rows, in a file without a name that goes away with this object; memory holds where each row ends.

    Args:
        folder: A folder on the disk that the file is to lie on, there already or not; None for the system's own.
    """

    def __init__(self, folder: Path | None) -> None:
        """Open the file."""
        self._file, self._ends = scratch(folder), array("q", [0])
        weakref.finalize(self, self._file.close)

    def append(self, row: bytes) -> None:
        """Add a row."""
        self._file.write(row)
        self._ends.append(self._ends[-1] + len(row))

    def rows(self) -> Lazy[bytes]:
        """The rows that were added so far, read when they are asked for."""
        self._file.flush()
        ends = np.array(self._ends)

        def read(places: np.ndarray) -> list[bytes]:
            starts, stops = ends[places], ends[places + 1]
            least, most = int(starts.min(initial=ends[-1])), int(stops.max(initial=0))
            if most - least > min(LARGEST_READ, 2 * (stops - starts).sum()):  # far apart, or very long
                return [self._read(*span) for span in zip(starts.tolist(), stops.tolist(), strict=True)]
            data = self._read(least, max(least, most))
            return [data[a:b] for a, b in zip((starts - least).tolist(), (stops - least).tolist(), strict=True)]

        return Lazy(len(ends) - 1, read)

    def _read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), stop - start, start)
