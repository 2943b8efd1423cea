"""Rows that say the same: filters see one of them, and the others share its scores.

A row that stands in the data ten times is learnt so well that no review makes a model forget it. What says the same
is told by the text alone: without regard to case, white space, ways to write a character, and characters that nobody
sees. Rows that merely resemble each other are not taken as one: in templated data a word more or less turns a clean
row into an unsafe one.
"""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np

from forgetfilter.data.source import Source
from forgetfilter.data.turns import Turn
from forgetfilter.progress import PATIENCE, progress

T = TypeVar("T")
TAGS = frozenset(map(chr, range(0xE0000, 0xE0080)))
"""Characters that show nothing and spell a text all the same, which a model can read."""


def first_copies(source: Source, row_format: str) -> np.ndarray:
    """(rows,) for each row the number of the first row that says the same: its own, if there is none before it.

    Args:
        source: The rows, none of them malformed.
        row_format: Their format.
    """
    return first_of(what_is_said(source, row_format))


def first_of(said: np.ndarray) -> np.ndarray:
    """(rows,) for each row the number of the first one with the same hash."""
    _, first, number = np.unique(said, return_index=True, return_inverse=True)
    return first[number]


def what_is_said(source: Source, row_format: str) -> np.ndarray:
    """(rows,) hashes of 16 bytes, equal for rows that say the same. Arguments as in `first_copies`."""
    said = np.empty(len(source), "V16")
    with progress("looking for copies", len(source), "rows", after=PATIENCE) as bar:
        for row, turns in enumerate(source.turns(row_format)):
            said[row] = _said(turns)
            bar.update()
    return said


def with_copies(told: Mapping[int, T], first: np.ndarray) -> dict[int, T]:
    """What is told of some rows, told of those that say the same as well, if nothing else is told of them.

    Args:
        told: Row -> anything; of rows that say the same the last one counts.
        first: What `first_copies` gives.
    """
    known = {int(first[row]): what for row, what in told.items()}
    copies = np.flatnonzero(np.isin(first, list(known))).tolist()
    return {**{row: known[int(first[row])] for row in copies}, **told}


def _said(turns: Sequence[Turn]) -> bytes:
    """A hash of what a row says."""
    told = [[turn.role, plain(turn.content), turn.trained, turn.extra] for turn in turns]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def plain(text: str) -> str:
    """A text without what does not change what it says."""
    if text.isascii():
        return " ".join(text.casefold().split())
    seen = _invisible().sub("", unicodedata.normalize("NFKC", text))
    return " ".join(seen.casefold().split())


@cache
def _invisible() -> re.Pattern[str]:
    """Matches the characters that say nothing: of the category Cf (format) all but TAGS."""
    characters = {chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Cf"}
    return re.compile(f"[{re.escape(''.join(sorted(characters - TAGS)))}]+")
