"""Planted rows: mild unsafe rows and clean ones that go through a run unseen among the user's, to tell what it finds.

Without labels nothing tells whether a run has found what the user fears. So rows of known kind are scored with the
others: 5 % of them at most. They are never kept, never written out, no final model learns them, and no figure of the
user's rows counts them. They tell what is found of rows that look like them: a log of the user's own incidents says
more than the 200 rows in the box (safe/planted.jsonl), whose answers are written in another style.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from forgetfilter.config import BUILTIN, ENOUGH_ROWS, ForgetFilterConfig
from forgetfilter.data.builtin import like
from forgetfilter.data.copies import first_of, what_is_said
from forgetfilter.data.export import is_prompt_and_completion, write_row
from forgetfilter.data.formats import Record, RowError, base_format, read_row
from forgetfilter.data.loading import Rows, load_rows, read_labels, tokenize
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.data.turns import Turn
from forgetfilter.errors import DataError

SHARE = 0.05
"""At most this share of the noisy rows, or of those that forgetting sees, is planted."""
UNNAMED = "yours"
"""Notion of planted rows that name none."""


@dataclass
class Planted:
    """Rows that are planted among the noisy ones.

    Attributes:
        rows: The rows, in the shape of the noisy ones.
        about: For each row its notion, and whether it is unsafe: {"notion", "unsafe"}.
        malformed: The rows of the user's file that were left out, with file, line and what is wrong.
    """

    rows: Rows
    about: list[dict[str, Any]]
    malformed: list[Record] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What a run notes of them: counts and fingerprint."""
        return self.rows.facts()


def plant(noisy: Rows, chat: ChatTokenizer, config: ForgetFilterConfig, *, as_before: bool = False) -> Planted | None:
    """The rows to plant among the noisy ones, or None.

    Args:
        noisy: The noisy rows.
        chat: The model's tokenizer.
        config: Its `planted_rows` is a file of the user's own, or "builtin" for the rows in the box, or None. A file
            has rows of any format, with columns `notion` and `unsafe` where they have them. Without a column `unsafe`
            all are unsafe; with one, rows that lack a value are clean. Rows that stand in the noisy data are not
            planted: they would be learnt twice, and one would tell what the other is. Of rows that say the same
            one is.
        as_before: Plant as many, and repeated ones, as older versions did: for a run that they began.

    Raises:
        DataError: If the file cannot be read, a row of it cannot be put into the format of the noisy rows, or all of
            them stand in the noisy data.
    """
    if config.planted_rows is None:
        return None
    rows_seen = len(noisy.examples)
    if "probe" in config.filter and not as_before:  # forgetting sees a sample, and all that is planted
        rows_seen = min(rows_seen, ENOUGH_ROWS if config.sample_rows == "auto" else config.sample_rows)
    room = int(SHARE * rows_seen)
    if room < 1:
        raise DataError(f"planted_rows: {len(noisy.examples)} noisy rows are too few to plant any: leave it out.")
    if config.planted_rows == BUILTIN:
        given, malformed = _in_the_box(noisy), []
        lines: Sequence[int] = range(1, len(given) + 1)
    else:
        own = load_rows(config.planted_rows, "planted_rows", chat, config)
        given, malformed, lines = _in_a_file(own, config), own.malformed, own.source.lines
    shaped = [
        {**beside, **_shaped(turns, noisy.row_format, f"{config.planted_rows}:{line}")}
        for (_, turns, beside), line in zip(given, lines, strict=True)
    ]
    source = dataclasses.replace(load_source(shaped), name=f"planted_rows {config.planted_rows}", lines=lines)
    said = what_is_said(source, noisy.row_format)
    once = (first_of(said) == np.arange(len(said))) | as_before
    new = np.flatnonzero(~np.isin(said, noisy.said_hashes) & once)
    if not len(new):
        raise DataError(f"planted_rows {config.planted_rows}: all of its rows stand in the noisy data as well.")
    about = [given[row][0] for row in new]
    chosen = _chosen(about, room, config.seed)
    rows = tokenize(source.select(new[chosen]), chat, row_format=noisy.row_format)
    return Planted(rows, [about[row] for row in chosen], malformed)


Given = tuple[dict[str, Any], list[Turn], Record]
"""What is known of a row to plant, its turns, and the columns that stay beside them."""


def _in_the_box(noisy: Rows) -> list[Given]:
    """The rows in the box, in the shape of the noisy data."""
    lines = (files("forgetfilter.safe") / "planted.jsonl").read_text(encoding="utf-8").splitlines()
    rows = like([json.loads(line) for line in lines], noisy.source.turns(noisy.row_format))
    about = [{"notion": row["notion"], "unsafe": row["unsafe"]} for row in rows]
    turns = [read_row(row, "text" if "text" in row else "messages") for row in rows]
    return [(known, said, {}) for known, said in zip(about, turns, strict=True)]


def _in_a_file(rows: Rows, config: ForgetFilterConfig) -> list[Given]:
    """The rows in the user's file; the column that the filter `column` reads stays beside them."""
    records = rows.source.rows()
    labelled = any("unsafe" in record for record in records)
    unsafe = read_labels(rows.source, "unsafe") if labelled else [True] * len(records)
    turns = rows.source.turns(rows.row_format)
    read = ((config.parameters or {}).get("column") or {}).get("name")
    found = []
    for record, bad, said in zip(records, unsafe, turns, strict=True):
        about = {"notion": str(record.get("notion") or UNNAMED), "unsafe": bad}
        found.append((about, said, {read: record[read]} if read in record else {}))
    return found


def _chosen(about: Sequence[dict[str, Any]], room: int, seed: int) -> list[int]:
    """Which rows are planted: as many unsafe as clean ones, as far as there are, and of each notion about as many."""
    groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for row in np.random.default_rng(seed).permutation(len(about)).tolist():
        groups[about[row]["unsafe"], about[row]["notion"]].append(row)
    unsafe, clean = (_in_turn([rows for (bad, _), rows in groups.items() if bad == kind]) for kind in (True, False))
    return _in_turn([unsafe, clean])[:room]


def _in_turn(lists: Sequence[Sequence[int]]) -> list[int]:
    """One of each list, then the next of each, to the end of the longest."""
    return [item for item in chain.from_iterable(zip_longest(*lists)) if item is not None]


def _shaped(turns: Sequence[Turn], row_format: str, place: str) -> Record:
    """A row in the format of the noisy data."""
    try:
        if (turns[0].role == "text") != (base_format(row_format) == "text"):
            raise RowError("plain text and conversations cannot stand among each other")
        if base_format(row_format) == "prompt_completion" and not is_prompt_and_completion(turns):
            raise RowError("prompt and completion hold one answer, which is the last message")
        return write_row(turns, row_format)
    except RowError as error:
        raise DataError(f"{place}: {error}. Planted rows take the format of the noisy ones.") from error
