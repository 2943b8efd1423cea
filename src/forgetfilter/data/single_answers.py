"""Conversations of several answers, each answer as a row of its own: one bad answer among good ones does not hide."""

import dataclasses
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from forgetfilter.data.export import write_row
from forgetfilter.data.formats import Record, RowError, read_row
from forgetfilter.data.lazy import Lazy, chosen
from forgetfilter.data.loading import Rows
from forgetfilter.data.source import Source
from forgetfilter.data.templates import learns
from forgetfilter.data.tokenization import ChatTokenizer, Example, on_disk
from forgetfilter.data.turns import Turn
from forgetfilter.progress import PATIENCE, progress

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
    row_of, place_of = array("q"), array("q")  # place: the answer's number among the turns, -1 for a whole row

    def encoded() -> Iterator[Example]:
        said = rows.source.turns(rows.row_format)
        with progress("taking conversations apart", len(said), "rows", after=PATIENCE) as bar:
            for row, (turns, whole) in enumerate(zip(said, rows.examples, strict=True)):
                answers = _answers(turns, whole, chat)
                row_of.extend([row] * len(answers))
                place_of.extend(place for place, _ in answers)
                yield from (example for _, example in answers)
                bar.update()

    examples = on_disk(encoded(), rows.source.scratch_folder)
    belongs, places, records = np.array(row_of), np.array(place_of), rows.source.rows()

    def made(answers: np.ndarray) -> list[Record]:
        own = zip(chosen(records, belongs[answers]), places[answers].tolist(), strict=True)
        return [_until(record, rows.row_format, place) for record, place in own]

    source = Source(
        rows.source.name,
        ".jsonl",
        chosen(rows.source.lines, belongs),
        made=Lazy(len(belongs), made),
        files=chosen(rows.source.files, belongs) if rows.source.files else [],
        scratch_folder=rows.source.scratch_folder,
    )
    planted = int((belongs >= len(records) - rows.planted).sum())
    times = None if rows.times is None else rows.times[belongs]
    single = Rows(source, SHAPE, examples, [], planted=planted, whole=rows.examples, belongs=belongs, times=times)
    return single, belongs


def _answers(turns: Sequence[Turn], whole: Example, chat: ChatTokenizer) -> list[tuple[int, Example]]:
    """The place of each answer of a row among its turns, and its tokens after all that is said up to it.

    A row of one answer stays as it is, with place -1; so does one that the chat template refuses to break off. The
    first answer behind max_length is the last one given: those after it cannot be scored either.
    """
    places = [place for place, turn in enumerate(turns) if learns(turn)]
    if len(places) < 2:
        return [(-1, whole)]
    found: list[tuple[int, Example]] = []
    try:
        for place in places:
            if found and not found[-1][1].scorable and len(found[-1][1].input_ids) >= chat.max_length:
                break
            found.append((place, chat.encode(_cut(turns, place))))
    except RowError:
        return [(-1, whole)]
    return found


def _cut(turns: Sequence[Turn], place: int) -> list[Turn]:
    """What is said up to an answer, the answer alone to be learnt."""
    return [*(dataclasses.replace(turn, trained=False) for turn in turns[:place]), turns[place]]


def _until(record: Record, row_format: str, place: int) -> Record:
    """A row up to an answer, as SHAPE has it; all of the row for place -1."""
    turns = read_row(record, row_format)
    return {**record, **write_row(turns if place < 0 else _cut(turns, place), SHAPE)}
