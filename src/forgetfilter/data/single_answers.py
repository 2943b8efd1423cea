"""Conversations of several answers, each answer as a row of its own: one bad answer among good ones does not hide."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from forgetfilter.data.export import SHAPES
from forgetfilter.data.formats import Record, RowError, Turn, read_row
from forgetfilter.data.loading import Rows
from forgetfilter.data.source import Source
from forgetfilter.data.templates import learns
from forgetfilter.data.tokenization import ChatTokenizer, Example

SHAPE = "messages"
"""Format of the rows that are made: it can say that an earlier answer is context alone."""


def single_answers(rows: Rows, chat: ChatTokenizer) -> tuple[Rows, np.ndarray] | None:
    """Each answer of each row, after all that precedes it; None where no row has several.

    Trainings still see the whole conversations: `trainable` gives those.

    Args:
        rows: The rows, none of them malformed.
        chat: The model's tokenizer.

    Returns:
        The answers as rows, and (answers,) the number of the row that each belongs to, in order.
    """
    if not rows.several_answers:
        return None
    conversations = [read_row(record, rows.row_format) for record in rows.source.rows()]
    records: list[Record | None] = []
    examples: list[Example] = []
    row_of: list[int] = []
    for row, (record, turns) in enumerate(zip(rows.source.rows(), conversations, strict=True)):
        for until, example in _answers(turns, rows.examples[row], chat):
            records.append({**record, **SHAPES[SHAPE](list(until))})
            examples.append(example)
            row_of.append(row)
    lines = [rows.source.lines[row] for row in row_of]
    planted = sum(row >= len(conversations) - rows.planted for row in row_of)
    source = Source(rows.source.name, ".jsonl", records, lines)
    found = Rows(source, SHAPE, examples, [], planted=planted, whole=rows.examples)
    return found, np.array(row_of)


def _answers(turns: Sequence[Turn], whole: Example, chat: ChatTokenizer) -> list[tuple[Sequence[Turn], Example]]:
    """For each answer of a row what is said up to it, the answer alone to be learnt, with its tokens.

    A row of one answer stays as it is; so does one that the chat template refuses to break off.
    """
    places = [place for place, turn in enumerate(turns) if learns(turn)]
    if len(places) < 2:
        return [(turns, whole)]
    found: list[tuple[Sequence[Turn], Example]] = []
    for place in places:
        context = [dataclasses.replace(turn, trained=False) for turn in turns[:place]]
        until = [*context, turns[place]]
        try:
            found.append((until, chat.encode(until)))
        except RowError:
            return [(turns, whole)]
    return found
