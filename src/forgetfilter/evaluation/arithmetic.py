"""Arithmetic: the last number of an answer against the last number of its reference."""

import re
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from forgetfilter.data.source import Source
from forgetfilter.errors import DataError
from forgetfilter.evaluation.questions import Figures, Measure, Question, asked_and_references, share

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def questions_of(source: Source) -> list[Question]:
    """Questions of prompt/completion rows whose completion ends in the number wanted (as GSM8K's do).

    Raises:
        DataError: If a completion has no number; names file and line.
    """
    questions = []
    for row, (turns, reference) in enumerate(asked_and_references(source, "arithmetic")):
        wanted = last_number(reference)
        if wanted is None:
            raise DataError(f"{source.place(row)}: 'completion' has no number")
        questions.append(Question(turns, most_tokens=192, about={"wanted": wanted}))
    return questions


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators taken out."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def figures(
    questions: Sequence[Question], answers: Sequence[str], log_probs: Sequence[Sequence[np.ndarray]]
) -> Figures:
    """exact_match: share of the answers whose last number is the one wanted, in [0, 1]; higher is better."""
    right = [last_number(answer) == q.about["wanted"] for q, answer in zip(questions, answers, strict=True)]
    return {"exact_match": share(right)}


MEASURE = Measure(questions_of=questions_of, figures=figures, shown=("exact_match",))
