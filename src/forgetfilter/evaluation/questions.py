"""What a measure is and what it asks of a model, and the small things several measures share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forgetfilter.data.formats import Record, RowError, read_row, require_text
from forgetfilter.data.source import Source
from forgetfilter.data.turns import Turn
from forgetfilter.errors import DataError

Figures = dict[str, Any]
"""A measure's figures by name; None where one could not be computed."""


@dataclass(frozen=True)
class Question:
    """One question to a model.

    Attributes:
        turns: What the model is asked: messages up to the answer.
        options: Given answers, whose log-probabilities under the model are wanted.
        most_tokens: Largest length of the answer that the model generates, in tokens; 0 if it generates none.
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


@dataclass(frozen=True, kw_only=True)
class Measure:
    """All that the rest of the program knows of a measure.

    Attributes:
        questions_of: Makes questions of a data set; raises DataError if the rows do not fit.
        figures: Takes the questions, the model's own answers and, for each question, the (tokens,) log-probabilities
            of each of its options, in nats; gives the figures that need no judge.
        shown: Figures to show in a table. Pictures show the first one alone, so it must not need a judge.
        safer: For a safety measure: figure -> 1 if higher is safer, -1 if lower is safer. It contains the first of
            shown. Empty for a measure of skill; there, higher is always better.
        judge: Name of the default model that judges answers (in `evaluation/judges.py` if it is also the default of a
            flag); None if the measure needs no judge.
        judge_flag: Flag and setting that name another judge, if there is such a flag.
        load_judge: Loads a judge by its name. Whatever it raises is reported as the reason why nothing was judged.
        in_box: File of the questions that the name "builtin" stands for, if there are some in the package.
        takes_reasoning: Whether a defense's reasoning may precede the options (`ask`).
    """

    questions_of: Callable[[Source], list[Question]]
    figures: Callable[[Sequence[Question], Sequence[str], Sequence[Sequence[np.ndarray]]], Figures]
    shown: tuple[str, ...]
    safer: Mapping[str, int] = field(default_factory=dict)
    judge: str | None = None
    judge_flag: str | None = None
    load_judge: Callable[[str], Judge] | None = None
    in_box: str | None = None
    takes_reasoning: bool = False

    @property
    def of_safety(self) -> bool:
        """Whether it measures safety; the others measure what a model can do."""
        return bool(self.safer)

    def before(self, sentence: str, reasoning: str) -> tuple[str, str]:
        """Which of a defense's two texts stand before this measure's prompts and before its options; "" for none."""
        return (sentence if self.of_safety else ""), (reasoning if self.takes_reasoning else "")


def require_columns(source: Source, measure: str, columns: Sequence[str]) -> Sequence[Record]:
    """The rows of a data set, all of which have these columns.

    Raises:
        DataError: If a row is damaged or lacks one; names file and line.
    """
    for row, record in enumerate(source.records):
        problem = source.errors.get(row) or _problem(record or {}, columns)
        if problem is not None:
            raise DataError(
                f"{source.place(row)}: {problem}. {measure} needs {', '.join(columns)} (docs/evaluation.md)."
            )
    if not source.rows():
        raise DataError(f"{source.name}: no rows, so there is nothing to ask.")
    return source.rows()


def _problem(record: Record, columns: Sequence[str]) -> str | None:
    """What is wrong with a row that needs these columns; None for a good one."""
    for column in columns:
        if column not in record:
            return f"no column {column!r}"
        try:
            require_text(record[column], repr(column))
        except RowError as error:
            return str(error)
    return None


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
    """The share of true marks, rounded to four digits; None if there are no marks."""
    return round(sum(marks) / len(marks), 4) if marks else None
