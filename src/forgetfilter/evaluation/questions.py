"""What a measure asks of a model, and the small things several measures share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from forgetfilter.data.formats import Record, RowError, Turn, read_row
from forgetfilter.data.sources import Source
from forgetfilter.errors import DataError

Figures = dict[str, Any]
"""A measure's figures by name; None where one could not be taken."""


@dataclass(frozen=True)
class Question:
    """One question to a model.

    Attributes:
        turns: What the model is asked: messages up to the answer.
        options: Answers whose log-probabilities are wanted; none are generated for these.
        most_tokens: Length of the model's own greedy answer at most; 0 where none is wanted.
        about: What the measure needs to read the answer.
    """

    turns: tuple[Turn, ...]
    options: tuple[str, ...] = ()
    most_tokens: int = 0
    about: Record = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text of what is asked."""
        return "\n".join(turn.content for turn in self.turns)


def user(text: str) -> tuple[Turn, ...]:
    """A text as the one message of a user."""
    return (Turn("user", text, trained=False),)


Judge = Callable[[Sequence[Question], Sequence[str]], Figures]
"""Takes questions and a model's answers, gives figures."""


def require_columns(source: Source, measure: str, columns: Sequence[str]) -> list[Record]:
    """The rows of a data set, all of which have these columns.

    Raises:
        DataError: If a row is damaged or lacks one; names file and line.
    """
    for row, record in enumerate(source.records):
        lacking = [column for column in columns if column not in (record or {})]
        if lacking:
            problem = source.errors.get(row) or f"no column {lacking[0]!r}"
            raise DataError(
                f"{source.place(row)}: {problem}. {measure} needs {', '.join(columns)} (docs/evaluation.md)."
            )
    if not source.rows():
        raise DataError(f"{source.name}: no rows, so there is nothing to ask.")
    return source.rows()


def asked_and_references(source: Source, measure: str) -> list[tuple[tuple[Turn, ...], str]]:
    """The messages up to the answer, and the answer, of every row of a prompt/completion data set.

    Raises:
        DataError: If a row has another shape; names file and line.
    """
    found = []
    for row, record in enumerate(require_columns(source, measure, ("prompt", "completion"))):
        try:
            *turns, answer = read_row(record, "prompt_completion")
        except RowError as error:
            raise DataError(f"{source.place(row)}: {error}") from error
        found.append((tuple(turns), answer.content))
    return found


def share(marks: Sequence[bool]) -> float | None:
    """The share that is true, to four digits; None of nothing."""
    return round(sum(marks) / len(marks), 4) if marks else None
