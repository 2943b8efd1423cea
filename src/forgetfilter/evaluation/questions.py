"""What a measure asks of a model, and the small things several measures share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from forgetfilter.data.formats import Record, RowError, read_row
from forgetfilter.data.sources import Source
from forgetfilter.errors import DataError

Figures = dict[str, Any]
"""A measure's figures by name; None where one could not be taken."""


@dataclass(frozen=True)
class Question:
    """One question to a model.

    Attributes:
        prompt: What the model is asked, without any template.
        options: Answers whose log-probabilities are wanted; none are generated for these.
        most_tokens: Length of the model's own greedy answer at most; 0 where none is wanted.
        about: What the measure needs to read the answer.
    """

    prompt: str
    options: tuple[str, ...] = ()
    most_tokens: int = 0
    about: Record = field(default_factory=dict)


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


def prompts_and_references(source: Source, measure: str) -> list[tuple[str, str]]:
    """Prompt and completion of every row of a prompt/completion data set.

    Raises:
        DataError: If a row has another shape; names file and line.
    """
    found = []
    for row, record in enumerate(require_columns(source, measure, ("prompt", "completion"))):
        try:
            *asked, answer = read_row(record, "prompt_completion")
        except RowError as error:
            raise DataError(f"{source.place(row)}: {error}") from error
        found.append(("\n".join(turn.content for turn in asked), answer.content))
    return found


def share(marks: Sequence[bool]) -> float | None:
    """The share that is true, to four digits; None of nothing."""
    return round(sum(marks) / len(marks), 4) if marks else None
