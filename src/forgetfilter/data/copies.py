"""Rows that say the same: filters see one of them, and the others share its scores.

A row that stands in the data ten times is learnt so well that no review makes a model forget it. What says the same
is told by the text alone: without regard to case, white space, ways to write a character, and characters that nobody
sees. Rows that merely resemble each other are not taken as one: in templated data a word more or less turns a clean
row into an unsafe one.
"""

import json
import unicodedata

import numpy as np

from forgetfilter.data.formats import read_row
from forgetfilter.data.sources import Source


def first_copies(source: Source, row_format: str) -> np.ndarray:
    """(rows,) for each row the number of the first row that says the same: its own, if there is none before it.

    Args:
        source: The rows, none of them malformed.
        row_format: Their format.
    """
    first: dict[tuple[tuple[str, str, bool, str], ...], int] = {}
    found = []
    for number, record in enumerate(source.rows()):
        said = tuple(
            (turn.role, plain(turn.content), turn.trained, json.dumps(turn.extra, sort_keys=True, default=str))
            for turn in read_row(record, row_format)
        )
        found.append(first.setdefault(said, number))
    return np.array(found, int)


def plain(text: str) -> str:
    """A text without what does not change what it says."""
    seen = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf")
    return " ".join(seen.casefold().split())
