"""Load a data set for training and scoring. Every row is checked in one pass; malformed ones are reported."""

import dataclasses
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from forgetfilter.config import MARKED, ForgetFilterConfig
from forgetfilter.data.builtin import builtin_rows, is_builtin, like
from forgetfilter.data.copies import first_of, what_is_said
from forgetfilter.data.folders import TRAIN
from forgetfilter.data.formats import (
    ALIASES,
    FORMATS,
    IN_PART,
    LEARNT,
    REASONING,
    SHOWN_BY_TEMPLATES,
    TRAINED_PROMPT,
    Record,
    RowError,
    base_format,
    detect_format,
    parse_columns,
    read_row,
    require_columns_read,
    unread_columns,
    with_columns,
)
from forgetfilter.data.ids import unusable_ids
from forgetfilter.data.lazy import chosen, joined
from forgetfilter.data.readers import why_no_line_parses
from forgetfilter.data.source import Source
from forgetfilter.data.sources import load_source
from forgetfilter.data.templates import learns
from forgetfilter.data.tokenization import ChatTokenizer, Example, hash_of, on_disk
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError, DataError
from forgetfilter.marks import Marks
from forgetfilter.progress import PATIENCE, progress, say

NEARLY_ALL = 0.9
"""Share of rows marked unsafe above which the label column is doubted."""
SHOWN = 20
"""Malformed rows named in an error before the rest is only counted."""


@dataclass
class Rows:
    """A data set ready for the model.

    Attributes:
        source: The rows as they came in, malformed ones taken out.
        row_format: Name of their format.
        examples: One a row, in order.
        malformed: The rows taken out, as records {file, line, error, raw}.
        unread: What would change what a trainer learns, but is not read -> how many rows have it; see
            `unread_columns`. Calls, functions and reasoning are among it where the chat template never shows them.
        planted: How many of the rows, from the last one backwards, are planted (data.planted).
        whole: The conversations that trainings see, where the rows are their single answers (data.single_answers).
        belongs: (rows,) the place in `whole` of each row's conversation.
        times: (rows,) how many rows that say the same each one stands for; None: itself alone.
    """

    source: Source
    row_format: str
    examples: Sequence[Example]
    malformed: list[Record]
    unread: dict[str, int] = field(default_factory=dict)
    planted: int = 0
    whole: Sequence[Example] | None = None
    belongs: np.ndarray | None = None
    times: np.ndarray | None = None

    def select(self, rows: Sequence[int] | np.ndarray) -> "Rows":
        """These rows alone, in this order; of single answers trainings see the whole conversations."""
        found = Rows(self.source.select(rows), self.row_format, chosen(self.examples, rows), [])
        found.times = None if self.times is None else self.times[rows]
        found.planted = int((np.asarray(rows) >= len(self.examples) - self.planted).sum())
        if self.whole is not None and self.belongs is not None:
            seen, found.belongs = np.unique(self.belongs[rows], return_inverse=True)
            found.whole = chosen(self.whole, seen)
        return found

    def with_planted(self, others: "Rows") -> "Rows":
        """These rows, and after them planted ones of the same format."""
        examples, planted = joined(self.examples, others.examples), len(others.examples)
        times = None if self.times is None else np.append(self.times, np.ones(planted, int))
        return Rows(self.source.joined(others.source), self.row_format, examples, [], planted=planted, times=times)

    def trainable(self) -> Sequence[Example]:
        """The examples with something to learn."""
        examples = self.examples if self.whole is None else self.whole
        return chosen(examples, [place for place, example in enumerate(examples) if example.scorable])

    def facts(self) -> dict[str, Any]:
        """What a run notes about the data: counts, format, fingerprint."""
        return dict(self._facts)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {
            "rows": len(self.examples),
            "format": self.row_format,
            "sha256": self.source.fingerprint(),
            "malformed": len(self.malformed),
            "partly_scored": sum(example.cut and example.scorable for example in self.examples),
        }

    @cached_property
    def first_copies(self) -> np.ndarray:
        """(rows,) for each row the number of the first one that says the same; see `data.copies`."""
        return first_of(self.said_hashes)

    @cached_property
    def said_hashes(self) -> np.ndarray:
        """(rows,) hashes, equal for rows that say the same."""
        return what_is_said(self.source, self.row_format)

    @cached_property
    def several_answers(self) -> bool:
        """Whether any row has several answers that the model learns."""
        return any(sum(map(learns, turns)) > 1 for turns in self.source.turns(self.row_format))

    def copies(self) -> np.ndarray:
        """(rows,) bool, whether a row says the same as one before it."""
        found: np.ndarray = self.first_copies != np.arange(len(self.examples))
        return found

    def alike(self) -> list[np.ndarray]:
        """Labels of single answers, (rows,) numbers each: equal for those of one conversation, or that say the same."""
        return [] if self.belongs is None else [self.belongs, self.first_copies]

    def shared_with(self, others: "Rows") -> int:
        """How many of these rows also occur, token for token, in another data set."""
        there = {hash_of(example.input_ids) for example in others.examples}
        return sum(hash_of(example.input_ids) in there for example in self.examples)


@dataclass
class Data:
    """The data that filters and defenses work on. They must not read labels from it.

    Attributes:
        noisy: The noisy data.
        safe: The safe data.
        notions: In which respects the rows are safe or unsafe, if known: names of safety measures, such as bias.
        unsafe: Rows known to be unsafe, for the filters that need some.
        planted: Rows that filters see among the noisy ones; see data.planted.
    """

    noisy: Rows
    safe: Rows
    notions: Sequence[str] = ()
    unsafe: Rows | None = None
    planted: Rows | None = None

    def known_unsafe(self) -> Sequence[Example]:
        """The rows known to be unsafe.

        Raises:
            ConfigError: If none are given.
            DataError: If none of them can be learnt.
        """
        if self.unsafe is None:
            raise ConfigError("no rows known to be unsafe: give --unsafe_dataset_name.")
        found = self.unsafe.trainable()
        if not found:
            raise DataError(f"{self.unsafe.source.name}: none of the rows known to be unsafe has a completion.")
        return found

    def facts(self) -> dict[str, Any]:
        """Fingerprints of both data sets."""
        return {"noisy": self.noisy.facts(), "safe": self.safe.facts()}


def load_data(config: ForgetFilterConfig, chat: ChatTokenizer, noisy: Any = None, safe: Any = None) -> Data:
    """The noisy and the safe rows, by default those the config names, read and checked."""
    noisy_rows = load_rows(config.dataset_name if noisy is None else noisy, "dataset_name", chat, config)
    noisy_rows.unread.pop(str(config.label_column), None)  # that one is read
    for remark in remarks(noisy_rows, config.label_column):
        say(f"{noisy_rows.source.name}: {remark}")
    safe_rows = load_safe(noisy_rows, chat, config, safe)
    unsafe = _unsafe(noisy_rows, chat, config)
    shared = 0 if unsafe is None else noisy_rows.shared_with(unsafe)
    if shared:
        say(f"{shared} of the noisy rows are among those known to be unsafe; figures flatter filters that learn them.")
    return Data(noisy_rows, safe_rows, unsafe=unsafe)


def load_safe(noisy: Rows, chat: ChatTokenizer, config: ForgetFilterConfig, safe: Any = None) -> Rows:
    """The safe rows, by default those that the config names; those in the box in the shape of the noisy ones."""
    name = config.safe_dataset_name if safe is None else safe
    if not is_builtin(name):
        return load_rows(name, "safe_dataset_name", chat, config)
    rows = like(builtin_rows(name), noisy.source.turns(noisy.row_format))
    source = dataclasses.replace(load_source(rows), name=name)
    say(f"safe data: {len(source)} rows in the box; rows of your own domain are better (--safe_dataset_name).")
    return tokenize(source, chat, row_format="text" if base_format(noisy.row_format) == "text" else "messages")


def _unsafe(noisy: Rows, chat: ChatTokenizer, config: ForgetFilterConfig) -> Rows | None:
    """The rows known to be unsafe: those of a file, or those of the noisy rows that a person marked in the run."""
    if config.unsafe_dataset_name is None:
        return None
    if config.unsafe_dataset_name != MARKED:
        return load_rows(config.unsafe_dataset_name, "unsafe_dataset_name", chat, config)
    marks = Marks(config.folder, noisy.source.ids, config.seed).all()
    unsafe = [row for row, mark in marks.items() if mark.unsafe]
    if not unsafe:
        raise ConfigError(
            f"--unsafe_dataset_name {MARKED}: no row is marked unsafe in {config.output_dir}. "
            f"`forgetfilter review {shlex.quote(str(config.output_dir))}` marks some."
        )
    return noisy.select(sorted(unsafe))


def load_rows(data: Any, flag: str, chat: ChatTokenizer, config: ForgetFilterConfig) -> Rows:
    """Read and tokenise a data set, by the config's format and treatment of malformed rows."""
    if data is None:
        raise ConfigError(f"no data: give --{flag}, or pass it to fit.")
    main = flag == "dataset_name"
    split = config.dataset_train_split if main else TRAIN
    part = config.dataset_config if main or data == config.dataset_name else None
    source = load_source(data, part, split, scratch_folder=config.output_dir)
    columns = config.columns if main or _has_columns(source, config.columns) else None
    asked = config.format if main or _has_format(source, config.format) else "auto"
    row_format = find_format(source, asked, columns)
    rows = tokenize(source, chat, row_format=row_format, skip=config.malformed == "skip")
    if rows.malformed:
        first = rows.malformed[0]
        say(
            f"{source.name}: {len(rows.malformed)} malformed rows left out, the first in line {first['line']}: "
            f"{first['error']}"
        )
    for remark in [] if main else _not_read(rows):
        say(f"{source.name}: {remark}")
    return rows


def _has_columns(source: Source, columns: str | None) -> bool:
    """Whether the first row has the columns that `--columns` names: data sets beside the noisy one need not."""
    return columns is not None and any(set(parse_columns(columns).values()) <= row.keys() for row in source.rows()[:1])


def _has_format(source: Source, row_format: str) -> bool:
    """Whether the first row has the columns of a format: data sets beside the noisy one need not have its own."""
    return row_format in FORMATS and any({*FORMATS[row_format][0]} <= row.keys() for row in source.rows()[:1])


def find_format(source: Source, row_format: str = "auto", columns: str | None = None) -> str:
    """The format of a data set's rows, as `read_row` takes it.

    Args:
        source: The rows.
        row_format: A name in FORMATS, or "auto".
        columns: What other names the columns have, as `--columns` says it.

    Raises:
        DataError: If no row could be parsed, or the first row has the columns of no format.
    """
    if source.errors and not source.rows():
        raise DataError(f"{source.name}: {why_no_line_parses(source)}")
    if row_format == "auto":
        return detect_format(source.rows(), source.name, columns)
    require_columns_read(source.rows()[:1], source.name, row_format, columns)
    return with_columns(row_format, columns)


def _not_read(rows: Rows) -> list[str]:
    """What would change what a trainer learns, and is not read, in words."""
    return [f"{count} rows have {name!r}, which is not read." for name, count in rows.unread.items()]


def remarks(rows: Rows, label_column: str | None) -> list[str]:
    """What a person should know of noisy data before the work begins: about ids, labels, and what is not read.

    Raises:
        DataError: If no row has the label column.
    """
    source = rows.source
    found, ids = _not_read(rows), unusable_ids(source)
    if ids is not None:
        found.append(f"{ids}. All rows get ids made of their content (`id` in scores.parquet) instead.")
    if label_column is not None:
        labels = read_labels(source, label_column)
        if not any(labels) or sum(labels) > NEARLY_ALL * len(labels):
            values = Counter(repr(row.get(label_column)) for row in source.rows()).most_common(5)
            seen = ", ".join(f"{value} ({count} rows)" for value, count in values)
            found.append(
                f"by {label_column} {sum(labels)} of {len(labels)} rows are unsafe: those that say 1, true or unsafe. "
                f"It says {seen}. Is it the right column (--label_column)? The figures depend on it."
            )
    return found


def tokenize(source: Source, tokenizer: ChatTokenizer, *, row_format: str = "auto", skip: bool = False) -> Rows:
    """Check and tokenise every row.

    Args:
        source: A data set.
        tokenizer: The model's.
        row_format: As `find_format` gives it, or "auto".
        skip: Take malformed rows out instead of raising.

    Raises:
        DataError: If there are no rows, the format is unknown, or rows are malformed (the first 20
            are named with file and line).
    """
    row_format = find_format(source) if row_format == "auto" else row_format
    with progress("tokenising", len(source), "rows", after=PATIENCE) as bar:
        rows = encode(source, tokenizer, row_format=row_format, skip=skip, bar=bar)
    if rows.malformed and not len(rows.examples):
        first = rows.malformed[0]
        raise DataError(
            f"{source.name}: all of its {len(rows.malformed)} rows are malformed, the first in line {first['line']}: "
            f"{first['error']} (format {rows.row_format}; --format and --columns say how rows are read)."
        )
    if not any(example.scorable for example in rows.examples):
        raise DataError(f"{source.name}: no row with a completion to learn from (format {rows.row_format}).")
    return rows


def encode(source: Source, tokenizer: ChatTokenizer, *, row_format: str, skip: bool, bar: Any = None) -> Rows:
    """Like `tokenize`, but it does not matter whether any row can be scored; a bar counts the well-formed rows."""
    good, unread = array("q"), Counter[str]()
    shown = _named_in(str(tokenizer.tokenizer.chat_template))
    shown = shown if tokenizer.template.shows_calls else shown - {"tool_calls"}

    def encoded() -> Iterator[Example]:
        for row, record, turns in _read(source, row_format):
            if bar is not None:
                bar.update()
            try:
                yield tokenizer.encode(turns)
            except RowError as error:
                source.errors[row] = str(error)
            else:
                good.append(row)
                unread.update(_unread(record, turns, row_format, shown))

    examples = on_disk(encoded(), source.scratch_folder)
    if source.errors and not skip:
        raise DataError(_complaint(source))
    malformed = [_describe(source, row) for row in sorted(source.errors)]
    return Rows(source.select(good), row_format, examples, malformed, dict(unread))


def _unread(record: Record, turns: list[Turn], row_format: str, shown: Collection[str]) -> set[str]:
    """What a row has that neither we read nor the chat template, which can show these names."""
    extra = {name for turn in turns for name, value in turn.extra.items() if value}
    unseen = extra.intersection(SHOWN_BY_TEMPLATES).difference(shown)
    trained = {TRAINED_PROMPT} if LEARNT in extra else set()
    return unseen | trained | extra.intersection([IN_PART]) | set(unread_columns(record, row_format))


@cache
def _named_in(template: str) -> set[str]:
    """What a chat template can show: names of variables, and of keys of a message. It shows nothing else."""
    keys = set(re.findall(r"""[.'"](\w+)""", template))
    if keys.intersection(ALIASES):  # transformers gives a template the reasoning under both names
        keys.update(REASONING)
    return keys | set(re.findall(r"\w+", template)).difference(REASONING)


def read_conversations(source: Source, row_format: str, *, skip: bool) -> tuple[Source, Sequence[list[Turn]]]:
    """The rows that are well formed, and what each says.

    Raises:
        DataError: If rows are malformed and not to be skipped, or the format is unknown.
    """
    well_formed = source.select(array("q", (row for row, _, _ in _read(source, row_format))))
    if source.errors and not skip:
        raise DataError(_complaint(source))
    return well_formed, well_formed.turns(row_format)


def _read(source: Source, row_format: str) -> Iterator[tuple[int, Record, list[Turn]]]:
    """Number, record and turns of each row that is well formed; what is wrong with others goes to source.errors."""
    for row, record in enumerate(source.records):
        if record is None:
            continue
        try:
            turns = read_row(record, row_format)
        except RowError as error:
            source.errors[row] = str(error)
        else:
            yield row, record, turns


def _describe(source: Source, row: int) -> Record:
    raw = source.raw[row].decode("utf-8", "backslashreplace") if source.raw else source.records[row]
    file = source.files[row] if source.files else source.name
    return {"file": file, "line": source.lines[row], "error": source.errors[row], "raw": raw}


def _complaint(source: Source) -> str:
    return complaint(source.name, wrong_rows(source)[:SHOWN], len(source.errors), len(source))


def wrong_rows(source: Source) -> list[str]:
    """Where each malformed row stands, and what is wrong with it."""
    return [f"{source.place(row)}: {source.errors[row]}" for row in sorted(source.errors)]


def complaint(name: str, wrong: Sequence[str], count: int, rows: int) -> str:
    """What to say of malformed rows.

    Args:
        name: The data set's.
        wrong: The first of them, as `wrong_rows` gives them.
        count: How many there are.
        rows: How many rows there are in all.
    """
    shown = "\n".join(f"  {text}" for text in wrong)
    more = f"\n  ... and {count - len(wrong)} more" if count > len(wrong) else ""
    return (
        f"{name}: {count} of {rows} rows are malformed:\n{shown}{more}\n"
        "Repair them, name the format with --format, or go on without them with --malformed skip."
    )


def require_column(source: Source, column: str | None, setting: str = "label_column") -> None:
    """Raise DataError if no row has the column that a setting names; None asks for nothing."""
    if column is not None and not any(column in record for record in source.rows()):
        raise DataError(f"{source.name}: no column {column!r} ({setting}).")


def read_labels(source: Source, column: str) -> list[bool]:
    """Whether each row is marked unsafe (1, true or "unsafe"), for the figures alone.

    Raises:
        DataError: If no row has the column.
    """
    require_column(source, column)
    marks = ((record or {}).get(column) for record in source.records)
    return [str(mark).lower() in ("1", "1.0", "true", "unsafe") for mark in marks]


def stored_labels(source: Source, config: ForgetFilterConfig) -> np.ndarray | None:
    """(rows,) bool, True = marked unsafe, for the figures alone; None without a label column."""
    return None if config.label_column is None else np.array(read_labels(source, config.label_column))
