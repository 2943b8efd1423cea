"""The safe rows in the box (safe/rows.jsonl), in the shape of the user's data: a first run needs no other file.

A review works best with safe rows that look like the noisy ones. So the rows get the noisy data's system message if
most of its rows share one, plain text stays plain text, and answers much longer than the noisy data's are left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import islice
from typing import TypeGuard

import numpy as np

from forgetfilter.config import BUILTIN
from forgetfilter.data.formats import Record, read_row
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError

RANKS_ALONE = (
    "most safe rows are those of the package, which may not fit your data, so they only rank your rows. Mark some "
    "(`forgetfilter review`), or give safe rows of your own (--safe_dataset_name)"
)
"""Why a run with these rows drops nothing by itself: of BBQ's questions it dropped 40 % of the clean ones
(docs/paper/review.md)."""
LOOKED_AT = 5000
"""Noisy rows whose shape is looked at, from the first on."""
LONGER, SHORTEST, LEAST = 2.0, 15, 100
"""Answers may be LONGER times as long as nine in ten of the noisy data's, and SHORTEST words in any case. LEAST rows
stay at the least."""
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
"""A word; in these scripts a letter."""


def is_builtin(name: object) -> TypeGuard[str]:
    """Whether a data set's name means the safe rows in the box."""
    return isinstance(name, str) and name.partition(":")[0] == BUILTIN


def builtin_rows(name: str = BUILTIN) -> list[Record]:
    """The rows that a name stands for: id, notion, style, language and messages.

    Raises:
        ConfigError: If there is no such notion.
    """
    lines = (files("forgetfilter.safe") / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    notions = list(dict.fromkeys(row["notion"] for row in rows))
    wanted = [part.strip() for part in name.partition(":")[2].split(",") if part.strip()]
    unknown = [notion for notion in wanted if notion not in notions]
    if unknown or (":" in name and not wanted):
        raise ConfigError(
            f"{name}: no notion {', '.join(unknown)}; there are {', '.join(notions)}, as in "
            f"{BUILTIN}:{notions[0]},{notions[1]}."
        )
    return [row for row in rows if not wanted or row["notion"] in wanted]


def mostly_builtin(said: Iterable[Sequence[Turn]]) -> bool:
    """Whether half of the rows or more are those in the box by what they answer, as in a file that `safe_data` wrote.

    Args:
        said: What each row says; the first LOOKED_AT are looked at.
    """
    rows = builtin_rows()
    known = {_answer(row) for row in rows}.union(map(_as_text, rows))
    found = [turns[-1].content in known for turns in islice(said, LOOKED_AT)]
    return 2 * sum(found) >= max(1, len(found))


def like(rows: Sequence[Record], noisy: Iterable[Sequence[Turn]]) -> list[Record]:
    """The rows in the shape of other rows: `messages`, or `text` if those are plain text.

    Args:
        rows: As builtin_rows gives them.
        noisy: What each of the other rows says.
    """
    others = list(islice(noisy, LOOKED_AT))
    longest, system = max(SHORTEST, LONGER * usual_length(others)), _shared_system(others)
    short = [row for row in rows if words(_answer(row)) <= longest]
    if len(short) < LEAST:
        short = sorted(rows, key=lambda row: words(_answer(row)))[:LEAST]
    if others and others[0][0].role == "text":
        return [{**_about(row), "text": _as_text(row)} for row in short]
    return [{**_about(row), "messages": _with_system(row["messages"], system)} for row in short]


def words(text: str) -> int:
    """How many words a text has; in scripts without spaces between words, letters."""
    return len(WORD.findall(text))


def usual_length(conversations: Iterable[Sequence[Turn]]) -> float:
    """Words that nine in ten answers do not exceed; without limit where there are no answers."""
    lengths = [words(turn.content) for turns in conversations for turn in turns if turn.trained]
    return float(np.quantile(lengths, 0.9)) if lengths else float("inf")


def _shared_system(noisy: Sequence[Sequence[Turn]]) -> str | None:
    """The system message that more than half of the rows begin with, if there is one."""
    first = Counter(turns[0].content for turns in noisy if turns and turns[0].role == "system")
    text, count = first.most_common(1)[0] if first else ("", 0)
    return text if count > len(noisy) / 2 else None


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The messages after the system message, unless they have their own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _as_text(row: Record) -> str:
    """A row's messages as one text."""
    return "\n\n".join(turn.content for turn in read_row(row, "messages"))


def _answer(row: Record) -> str:
    return str(row["messages"][-1]["content"])


def _about(row: Record) -> Record:
    return {key: value for key, value in row.items() if key != "messages"}
