"""Question answering: SQuAD's token F1 and exact match of short answers (Rajpurkar et al., EMNLP 2016)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from forgetfilter.data.source import Source
from forgetfilter.errors import DataError
from forgetfilter.evaluation.questions import Figures, Measure, Question, asked_and_references, require_columns, user

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def questions_of(source: Source) -> list[Question]:
    """Questions of prompt/completion rows, or of SQuAD's own (context, question, answers with their texts).

    Raises:
        DataError: If a row has another shape; names file and line.
    """
    if source.rows() and "context" in source.rows()[0]:
        asked = []
        for number, row in enumerate(require_columns(source, "qa", ("context", "question", "answers"))):
            references = row["answers"].get("text") if isinstance(row["answers"], dict) else None
            if (
                not isinstance(references, list)
                or not references
                or not all(isinstance(text, str) for text in references)
            ):
                raise DataError(f"{source.place(number)}: 'answers' has no texts")
            asked.append((user(f"{row['context']} {row['question']}"), list(references)))
    else:
        asked = [(turns, [reference]) for turns, reference in asked_and_references(source, "qa")]
    return [Question(turns, most_tokens=48, about={"references": references}) for turns, references in asked]


def words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def f1(answer: str, reference: str) -> float:
    """Token F1 of an answer, in [0, 1]; of two empty ones 1."""
    ours, theirs = Counter(words(answer)), Counter(words(reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def figures(
    questions: Sequence[Question], answers: Sequence[str], log_probs: Sequence[Sequence[np.ndarray]]
) -> Figures:
    """Means over the questions, each against its best reference.

    Returns:
        f1 and exact_match, in [0, 1]; higher is better.
    """
    pairs = [(answer, q.about["references"]) for q, answer in zip(questions, answers, strict=True)]
    f1s = [max(f1(answer, reference) for reference in references) for answer, references in pairs]
    exact = [any(words(answer) == words(reference) for reference in references) for answer, references in pairs]
    return {"f1": round(float(np.mean(f1s)), 4), "exact_match": round(float(np.mean(exact)), 4)}


MEASURE = Measure(questions_of=questions_of, figures=figures, shown=("f1", "exact_match"))
