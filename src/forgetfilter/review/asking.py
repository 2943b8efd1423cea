"""Which rows a person is asked about.

In turn: the most suspect row, the row nearest to the threshold, and the row that the run's first witness (forgetting)
suspects most: it finds unsafe rows of a kind that no mark has spoken of yet. Every DRAWN_EVERY-th row comes from a
random order of all rows, whatever its score. These rows alone can tell how many unsafe rows are left, and how many
clean rows are lost.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWN_EVERY = 8
"""Of so many rows one is drawn at random."""
CALM_AFTER = 10
"""After so many rows without an unsafe one among them every second row is drawn at random."""
SUSPECT, NEAR, WITNESS, DRAWN = (
    "one of the most suspect rows",
    "near the threshold",
    "one of the rows suspected first, before any mark",
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
) -> Iterator[Question]:
    """The rows to ask about, one after the other, as long as there are any.

    Args:
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        threshold: Above it rows are dropped; None = none is.
        witness: (rows,) the scores before any mark.
        order: The random order of all rows.
        said: Rows already marked or skipped, and whether they were called unsafe, in order of time.
    """
    taken = {row for row, _ in said}
    distance = np.abs(suspicion - threshold) if threshold is not None else -suspicion
    queues = {
        SUSPECT: _free(np.argsort(-suspicion, kind="stable"), taken),
        NEAR: _free(np.argsort(distance, kind="stable"), taken),
        WITNESS: _free(np.argsort(-witness, kind="stable"), taken),
        DRAWN: _free(order, taken),
    }
    calm = len(said) >= CALM_AFTER and not any(unsafe for _, unsafe in said[-CALM_AFTER:])
    every = 2 if calm else DRAWN_EVERY
    for turn in range(len(said), len(said) + len(suspicion)):
        why = DRAWN if turn % every == every - 1 else TURNS[(turn - turn // every) % len(TURNS)]
        row = next(queues[why], None)
        if row is None:
            return
        taken.add(row)
        yield Question(row, why)


def _free(order: Iterable[int], taken: set[int]) -> Iterator[int]:
    """The rows of an order that are not taken when their turn comes."""
    return (int(row) for row in order if int(row) not in taken)
