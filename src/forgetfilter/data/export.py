"""Write rows for other programs: trainers' formats, and samples for a person to mark."""

import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from forgetfilter.data.builtin import LOOKED_AT, builtin_rows, like
from forgetfilter.data.card import CARD, card_head
from forgetfilter.data.formats import (
    BESIDE,
    IN_PART,
    LEARNT,
    REASONING,
    TEMPLATE_SETTINGS,
    Record,
    RowError,
    as_named,
    base_format,
    read_row,
)
from forgetfilter.data.loading import read_conversations
from forgetfilter.data.source import Source
from forgetfilter.data.sources import load_source
from forgetfilter.data.turns import Turn, functions_called, text_of, with_call
from forgetfilter.errors import DataError
from forgetfilter.files import write_jsonl, write_text
from forgetfilter.progress import PATIENCE, progress

DATA_FILE = "train.jsonl"
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def _chat(turns: list[Turn]) -> list[Record]:
    extra = [{name: value for name, value in turn.extra.items() if name not in BESIDE} for turn in turns]
    return [{"role": turn.role, "content": turn.content, **more} for turn, more in zip(turns, extra, strict=True)]


def _tools(turns: list[Turn], *, as_text: bool = True) -> Record:
    """The functions that the model may call, in a column of their own; as text they need no common shape."""
    tools = turns[0].extra.get("tools")
    return {} if tools is None else {"tools": json.dumps(tools, ensure_ascii=False) if as_text else tools}


def _template_settings(turns: list[Turn]) -> Record:
    """What the row tells its chat template, in the column that TRL reads."""
    return {name: turns[0].extra[name] for name in (TEMPLATE_SETTINGS,) if name in turns[0].extra}


def _require_no_settings(turns: list[Turn], trainer: str) -> None:
    """Raise RowError if the row tells its chat template something, for which a trainer's format has no place."""
    if TEMPLATE_SETTINGS in turns[0].extra:
        raise RowError(f"it has {TEMPLATE_SETTINGS}, for which {trainer} has no place: use trl")


def is_prompt_and_completion(turns: Sequence[Turn]) -> bool:
    """Whether a row has one answer that is trained, as its last message, and something before it."""
    trained = [place for place, turn in enumerate(turns) if turn.trained]
    return len(turns) > 1 and trained == [len(turns) - 1]


def _to_trl(turns: list[Turn]) -> Record:
    """Prompt and completion where nobody asks anything after the first trained answer: TRL learns the completion alone.

    A completion may hold several answers, with what the functions called gave back between them.
    """
    if turns[0].role == "text":
        return {"text": turns[0].content}
    first = next(place for place, turn in enumerate(turns) if turn.trained)
    after = {turn.trained if turn.role == "assistant" else turn.role == "tool" for turn in turns[first:]}
    return _to_chats(turns, first) if first and after == {True} else _to_trl_messages(turns)


def _to_trl_messages(turns: list[Turn]) -> Record:
    _require_all_trained(turns, "TRL trains every answer of such rows")
    return {"messages": _chat(turns), **_tools(turns), **_template_settings(turns)}


def _require_all_trained(turns: list[Turn], why: str) -> None:
    """Raise RowError if an answer is context alone (weight 0, train false), and the format cannot say so."""
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and not turn.trained:
            raise RowError(f"message {number} is not to be trained, but {why}: use axolotl")


def _is_question_and_answer(turns: Sequence[Turn]) -> bool:
    """Whether a row is one question and one answer, and nothing beside their texts."""
    return [turn.role for turn in turns] == ["user", "assistant"] and not any(turn.extra for turn in turns)


def _to_prompt_and_completion(turns: list[Turn]) -> Record:
    return _to_texts(turns) if _is_question_and_answer(turns) else _to_chats(turns)


def _to_texts(turns: list[Turn]) -> Record:
    if not _is_question_and_answer(turns):
        raise RowError("it is more than one question and one answer")
    return {"prompt": turns[0].content, "completion": turns[1].content}


def _to_chats(turns: list[Turn], first: int = -1) -> Record:
    """Prompt and completion, which begins with message `first`."""
    return {
        "prompt": _chat(turns[:first]),
        "completion": _chat(turns[first:]),
        **_tools(turns),
        **_template_settings(turns),
    }


def _train(turn: Turn) -> Record:
    """What tells a trainer to learn a message that it would not learn by its role, or the other way round."""
    if turn.role == "assistant":
        return {} if turn.trained else {LEARNT: False}
    return {LEARNT: True} if LEARNT in turn.extra else {}


def _to_messages(turns: list[Turn]) -> Record:
    """Messages; an answer that is context alone says so, as axolotl reads it."""
    if turns[0].role == "text":
        return {"text": turns[0].content}
    messages = [{**message, **_train(turn)} for message, turn in zip(_chat(turns), turns, strict=True)]
    return {"messages": messages, **_tools(turns, as_text=False), **_template_settings(turns)}


def _to_axolotl(turns: list[Turn]) -> Record:
    _require_no_settings(turns, "axolotl")
    return _to_messages(turns)


def _to_sharegpt(turns: list[Turn]) -> Record:
    _require_no_settings(turns, "sharegpt")
    said: list[Record] = []
    for turn in turns:
        thoughts = {name for name in REASONING if turn.extra.get(name)}
        if thoughts:
            raise RowError(f"a message has {thoughts.pop()}, for which sharegpt has no place: use axolotl or trl")
        if IN_PART in turn.extra:
            raise RowError(f"a message has {IN_PART}, for which sharegpt has no place: use axolotl")
        calls = functions_called(turn)
        if calls and turn.content:
            raise RowError(
                "a message has both text and a function call, which sharegpt cannot hold: use axolotl or trl"
            )
        speaker = "function_call" if turn.is_call or calls else SHAREGPT_ROLES[turn.role]
        text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False) if calls else turn.content
        said.append({"from": speaker, "value": text, **_train(turn)})
    return {"conversations": said, **_tools(turns)}


def _to_llamafactory(turns: list[Turn]) -> Record:
    _require_all_trained(turns, "LLaMA-Factory trains every answer")
    said = turns[1:] if turns[0].role == "system" else turns
    answers = [turn.role == "assistant" for turn in said]
    if answers != [False, True] * (len(said) // 2) or any(turn.role == "system" for turn in said):
        raise RowError(
            "LLaMA-Factory leaves out rows in which messages and answers do not take turns: use axolotl or trl"
        )
    return _to_sharegpt(turns)


def _to_alpaca(turns: list[Turn]) -> Record:
    roles = [turn.role for turn in turns]
    if any(value for turn in turns for value in turn.extra.values()):
        raise RowError("alpaca holds no functions and nothing else beside a message's text: use axolotl or trl")
    if roles == ["user", "assistant"]:
        return {"instruction": turns[0].content, "input": "", "output": turns[1].content}
    if roles == ["system", "user", "assistant"]:
        return {"instruction": turns[1].content, "input": "", "output": turns[2].content, "system": turns[0].content}
    raise RowError("alpaca holds one question and one answer, this row has more turns: use sharegpt")


WRITERS = {
    "trl": _to_trl,
    "axolotl": _to_axolotl,
    "llamafactory": _to_llamafactory,
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
}
DESCRIPTIONS = {"axolotl": "axolotl.yaml", "llamafactory": "dataset_info.json"}
"""Trainer -> the file that it needs beside the rows; of others the card that the datasets library reads."""
TRAINING_FIELDS = {LEARNT: "message_field_training", IN_PART: "message_field_training_detail"}
"""Key of a message -> the setting by which axolotl reads it."""


def export(
    source: Source, row_format: str, target: str, folder: Path, *, replace: bool = False, shows_calls: bool = True
) -> list[Path]:
    """Write rows in the format of a trainer.

    Args:
        source: The rows.
        row_format: Their format.
        target: A name in WRITERS.
        folder: Where to write: train.jsonl, and beside it the trainer's own description of it, or a card.
        replace: Whether files of these names may be replaced.
        shows_calls: Whether the model's chat template shows function calls; else those of ShareGPT stay texts.

    Returns:
        The files written.

    Raises:
        DataError: If a row cannot be put in that format, or a file to write exists and replace is off; nothing is
            written.
    """
    if base_format(row_format) == "text" and target in ("llamafactory", "alpaca", "sharegpt"):
        raise DataError(f"rows of format text have no turns: --format {target} cannot hold them, trl and axolotl can.")
    fitting = _of_calls if shows_calls else lambda writer: writer
    writer = fitting(WRITERS[target])
    written = [folder / DATA_FILE, folder / DESCRIPTIONS.get(target, CARD)]
    in_the_way = [path for path in written if not replace and path.exists()]
    if in_the_way:
        raise DataError(f"{in_the_way[0]}: exists. Remove it or give another --output_dir.")
    columns, told = _looked_through(source, row_format, writer)
    if target == "trl" and "messages" in columns and not columns.isdisjoint(("prompt", "text")):
        writer = fitting(_to_trl_messages)
        columns, told = _looked_through(source, row_format, writer)
    write_jsonl(folder / DATA_FILE, _written(source, row_format, writer, "writing"))
    if target in DESCRIPTIONS:
        write_text(written[1], _description(target, columns, told))
    else:
        rows = load_source(written[0], scratch_folder=source.scratch_folder)
        title = f"# {len(rows)} rows for {target}\n\nMade by ForgetFilter.\n"
        write_text(written[1], card_head(rows, DATA_FILE) + title)
    return written


def _of_calls(writer: Callable[[list[Turn]], Record]) -> Callable[[list[Turn]], Record]:
    """A writer to which ShareGPT's function calls are calls and no texts."""
    return lambda turns: writer([with_call(turn) for turn in turns])


def _looked_through(
    source: Source, row_format: str, writer: Callable[[list[Turn]], Record]
) -> tuple[set[str], set[str]]:
    """All columns of the rows that are to be written, and the keys by which messages tell what of them is trained."""
    columns, told = set[str](), set[str]()
    settings: set[str] | None = None
    for number, row in enumerate(_written(source, row_format, writer, "looking through")):
        own = set(row.get(TEMPLATE_SETTINGS, {}))
        if settings is not None and settings != own:
            raise DataError(
                f"{source.place(number)}: its {TEMPLATE_SETTINGS} has other keys than that of the rows before it, and "
                "datasets would give all rows all of them, as null: give every row the same ones. Nothing was written."
            )
        settings = own
        columns.update(row)
        for message in row.get("messages", []):
            told.update(TRAINING_FIELDS.keys() & message.keys())
    return columns, told


def _written(source: Source, row_format: str, writer: Callable[[list[Turn]], Record], what: str) -> Iterator[Record]:
    """The rows of a source as a writer writes them, one by one."""
    with progress(what, len(source), "rows", after=PATIENCE) as bar:
        for number, turns in enumerate(source.turns(row_format)):
            try:
                yield writer(turns)
            except RowError as error:
                raise DataError(f"{source.place(number)}: {error}. Nothing was written.") from error
            bar.update()


def _description(target: str, columns: Collection[str], told: Collection[str]) -> str:
    """The content of the file that a trainer needs beside the rows.

    Args:
        target: The trainer.
        columns: All columns of the rows.
        told: Keys by which messages tell what of them is trained.
    """
    if target == "axolotl":
        kind = "completion" if "text" in columns else "chat_template"
        trained = "".join(f"    {field}: {key}\n" for key, field in TRAINING_FIELDS.items() if key in told)
        return f"datasets:\n  - path: {DATA_FILE}\n    ds_type: json\n    type: {kind}\n{trained}"
    entry: dict[str, Any] = {
        "file_name": DATA_FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": None, "tools": "tools" if "tools" in columns else None},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    }
    return json.dumps({"forgetfilter_kept": entry}, indent=2) + "\n"


SHAPES: dict[str, Callable[[list[Turn]], Record]] = {
    "messages": _to_messages,
    "prompt_completion": _to_prompt_and_completion,
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
    "text": _to_messages,
}
"""Format of rows -> a writer of it."""


def writer_beside(others: Iterable[Sequence[Turn]], row_format: str) -> Callable[[list[Turn]], Record]:
    """A writer of a format whose prompts and completions are all texts, or all lists of messages, as other rows need.

    Readers of JSON lines want one type in a column. The writer raises RowError for a row that it has no room for.
    """
    if base_format(row_format) == "prompt_completion":
        return _to_texts if all(map(_is_question_and_answer, others)) else _to_chats
    return SHAPES[base_format(row_format)]


def write_row(turns: Sequence[Turn], row_format: str) -> Record:
    """A row that says these turns, of which `read_row` gives them back; raises RowError if the format has no room."""
    return as_named(SHAPES[base_format(row_format)](list(turns)), row_format)


def write_safe_data(notions: str, path: Path, noisy: Source | None = None, row_format: str = "messages") -> int:
    """Write the safe rows in the box to a JSONL file, to look at or to edit.

    Args:
        notions: What names them, such as builtin or builtin:privacy.
        path: The file.
        noisy: Data in whose shape they are written: its format, system message and length. None: as messages.
        row_format: The format to write, which is that of this data.

    Returns:
        How many rows were written. Rows of several turns are left out where the format, or prompts that are plain text,
        hold none: readers of JSON lines want one type in a column.

    Raises:
        ConfigError: If there is no such notion.
        DataError: If the file exists, or the other data is malformed.
    """
    if path.exists():
        raise DataError(f"{path}: exists. Remove it or give another --output.")
    rows, said = builtin_rows(notions), list[list[Turn]]()
    if noisy is not None:
        said = list(islice(read_conversations(noisy, row_format, skip=True)[1], LOOKED_AT))
        rows = like(rows, said)
    writer = writer_beside(said, row_format)
    written = []
    for row in rows:
        about = {key: value for key, value in row.items() if key not in ("messages", "text")}
        with suppress(RowError):  # several turns
            shaped = writer(read_row(row, "text" if "text" in row else "messages"))
            written.append({**about, **as_named(shaped, row_format)})
    write_jsonl(path, written)
    return len(written)


def write_sample(source: Source, rows: int, path: Path, seed: int, *, row_format: str, skip: bool = False) -> Path:
    """Draw random rows for a person to mark. Each has `"clean": null`, to be changed to true or false.

    Args:
        source: The noisy data.
        rows: How many to draw.
        path: The file to write.
        seed: Of the draw.
        row_format: As for `filter`.
        skip: Draw from the well-formed rows alone.

    Raises:
        DataError: If rows are malformed, or the file to write exists (a person's marks may be in it).
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: --output must end in .jsonl; a page to mark it in is written beside it.")
    if path.exists() or path.with_suffix(".html").exists():
        raise DataError(
            f"{path}: it or the page beside it exists, and may hold somebody's marks. Give another --output."
        )
    source, conversations = read_conversations(source, row_format, skip=skip)
    if not 0 < rows <= len(source):
        raise DataError(f"{source.name}: has {len(source)} rows to draw from, {rows} were asked for (--rows).")
    ids = source.ids
    chosen = sorted(random.Random(seed).sample(range(len(source)), rows))
    lines = []
    for row in chosen:
        turns = [f"{turn.role}: {text_of(turn)}" for turn in conversations[row]]
        lines.append({"id": ids[row], "row": row, "text": "\n".join(turns), "clean": None})
    write_jsonl(path, lines)
    return path
