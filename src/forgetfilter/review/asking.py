"""Which rows a person is asked about.

In turn: the most suspect row, the row nearest to the threshold, and the row that the run's first witness (forgetting)
suspects most: it finds unsafe rows of a kind that no mark has spoken of yet. Every DRAWN_EVERY-th row comes from a
random order of all rows, whatever its score. These rows alone can tell how many unsafe rows are left, and how many
clean rows are lost.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWN_EVERY = 8
"""Of so many rows one is drawn at random."""
CALM_AFTER = 10
"""After so many rows without an unsafe one among them, those drawn at random not counted, every second row is drawn."""
SUSPECT, NEAR, WITNESS, DRAWN = (
    "one of the most suspect rows",
    "undecided: near the threshold",
    "most suspect before any mark",
    "drawn at random, as a check",
)
"""Why a row is asked about."""
TURNS = (SUSPECT, NEAR, WITNESS)


@dataclass(frozen=True)
class Question:
    """A row to mark.

    Attributes:
        row: Its number.
        why: Why it is asked about.
    """

    row: int
    why: str


def questions(
    suspicion: np.ndarray,
    threshold: float | None,
    witness: np.ndarray,
    order: np.ndarray,
    said: Sequence[tuple[int, bool]],
    copies: np.ndarray | None = None,
    drawn: Collection[int] = (),
) -> Iterator[Question]:
    """The rows to ask about, one after the other, as long as there are any.

    Args:
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        threshold: Above it rows are dropped; None = none is.
        witness: (rows,) the scores before any mark.
        order: The random order of all rows.
        said: Rows already marked or skipped, and whether they were called unsafe, in order of time.
        copies: (rows,) numbers, equal for rows that are copies of each other: one of them is asked about, unless
            another one is drawn at random; None = there are none.
        drawn: Those of the rows already marked that were drawn at random, here or beforehand.
    """
    taken = {row for row, _ in said}
    kind = np.arange(len(suspicion)) if copies is None else copies
    known = {int(kind[row]) for row in taken}
    distance = np.abs(suspicion - threshold) if threshold is not None else -suspicion
    queues = {
        SUSPECT: _free(np.argsort(-suspicion, kind="stable"), kind, known),
        NEAR: _free(np.argsort(distance, kind="stable"), kind, known),
        WITNESS: _free(np.argsort(-witness, kind="stable"), kind, known),
        DRAWN: _free(order, np.arange(len(order)), taken),
    }
    found = [unsafe for row, unsafe in said if row not in drawn]
    calm = len(found) >= CALM_AFTER and not any(found[-CALM_AFTER:])
    every = 2 if calm else DRAWN_EVERY
    for turn in range(len(said), len(said) + len(suspicion)):
        why = DRAWN if turn % every == every - 1 else TURNS[(turn - turn // every) % len(TURNS)]
        row = next(queues[why], None)
        if row is None and why != DRAWN:  # of the rows that are left, all are copies of others
            row, why = next(queues[DRAWN], None), DRAWN
        if row is None:
            return
        taken.add(row)
        known.add(int(kind[row]))
        yield Question(row, why)


def _free(order: np.ndarray, kind: np.ndarray, taken: set[int]) -> Iterator[int]:
    """The rows of an order whose kind is not taken when their turn comes."""
    return (row for row in map(int, order) if int(kind[row]) not in taken)
