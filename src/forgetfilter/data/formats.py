"""Row formats: any row -> turns of a conversation, of which some are trained on and scored."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError, DataError

Record = dict[str, Any]


class RowError(ValueError):
    """A row that does not have the shape of its format; the caller adds file and line."""


ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Role names of ShareGPT, ms-swift and chat formats, mapped to those of chat templates."""
CALLS = ("function_call", "tool_call")
"""Those whose text is a function call."""
REASONING = ("reasoning_content", "reasoning", "thinking")
ALIASES = ("reasoning_content", "thinking")
"""The names under which transformers gives a chat template the reasoning of a message, whatever its key is."""
EXTRA = ("tool_calls", "tool_call_id", "tool_responses", "tool_plan", "name", *REASONING)
"""Keys of a message that chat templates read, besides role and content."""
SHOWN_BY_TEMPLATES = ("tools", "tool_calls", "tool_responses", "tool_plan", *REASONING)
"""Those of which a trainer learns, and that not every chat template shows."""
LEARNT = "train"
"""Key of a message that says whether a trainer learns it, in axolotl's files."""
UNTRAINED = {"weight": 0, LEARNT: False, "loss": False}
"""Keys of an answer -> the value at which trainers take it as context alone: OpenAI's and Mistral's, axolotl's,
ms-swift's."""
IN_PART = "train_detail"
"""Key of an answer of which trainers learn some stretches alone, in axolotl's files."""
TEMPLATE_SETTINGS = "chat_template_kwargs"
"""Column with what else a row tells its chat template, such as enable_thinking: as TRL reads it."""
BESIDE = ("tools", TEMPLATE_SETTINGS)
"""Columns that a chat template reads beside the messages."""


def _text(record: Record, key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {_kind(value)}, expected text")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _turns(messages: Any, key: str, *, train: bool) -> list[Turn]:
    """Messages as turns. Their keys are role and content, or ShareGPT's from and value."""
    messages = _listed(messages, key)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"'{key}' is {'empty' if messages == [] else _kind(messages)}, expected a list of messages")
    return [_turn(message, f"message {number} of '{key}'", train) for number, message in enumerate(messages, 1)]


def _listed(value: Any, key: str) -> Any:
    """A value that must be a list; parsed where it is text, as in the cells of CSV files."""
    if not isinstance(value, str) or not value:
        return value
    with suppress(ValueError, RecursionError):
        found = json.loads(value)
        if found is None or isinstance(found, list):
            return found
    raise RowError(f"'{key}' is text that is no JSON list (json.dumps writes one)")


def _turn(message: Any, where: str, train: bool) -> Turn:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {_kind(message)}, expected an object with 'role' and 'content'")
    speaker, content_key = (message.get("role"), "content") if "role" in message else (message.get("from"), "value")
    extra = {name: message[name] for name in EXTRA if message.get(name) is not None}
    calls = _calls(message, where)
    extra.pop("tool_calls", None)  # an empty list means none, but some chat templates ask only whether it is there
    if calls:
        extra["tool_calls"] = calls
    if message.get(LEARNT) is True and ROLES.get(str(speaker)) != "assistant":
        extra[LEARNT] = True
    if message.get(IN_PART):
        extra[IN_PART] = message[IN_PART]
    if speaker is None or (content_key not in message and not calls):
        raise RowError(f"{where} has no 'role' and 'content' (or 'from' and 'value')")
    role = ROLES.get(str(speaker))
    if role is None:
        raise RowError(f"{where} has the unknown role {speaker!r}")
    content = message.get(content_key)
    text = "" if content is None and calls else _joined(content, f"{where}: '{content_key}'")
    trained = train and role == "assistant" and not any(_is_untrained(message, name) for name in UNTRAINED)
    return Turn(role, text, trained, extra, speaker in CALLS)


def _is_untrained(message: Record, name: str) -> bool:
    return message.get(name) is not None and message[name] == UNTRAINED[name]


def _joined(content: Any, where: str) -> str:
    """Text, also where it comes as a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{where} is {_kind(content)}, expected text")
    texts = []
    for number, part in enumerate(content, 1):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
            raise RowError(f"{where}: part {number} is {kind}, and only text can be read")
        texts.append(text)
    return "".join(texts)


def _calls(message: Record, where: str) -> list[Record]:
    """The function calls of a message in today's form."""
    found = message.get("tool_calls") or []
    if message.get("function_call") is not None:
        found = [{"type": "function", "function": message["function_call"]}]
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise RowError(f"{where}: its function calls are no list of objects")
    return [_call(call) for call in found]


def _call(call: Record) -> Record:
    """A function call. Without a wrapper it may have a null in its place, as tables do."""
    return {name: value for name, value in call.items() if (name, value) != ("function", None)}


def _with_beside(turns: list[Turn], record: Record) -> list[Turn]:
    """What goes with a whole row is kept with its first turn: the functions that may be called, template settings."""
    given = {"tools": _tools(record), TEMPLATE_SETTINGS: _template_settings(record)}
    beside = {name: value for name, value in given.items() if value}
    return [replace(turns[0], extra={**turns[0].extra, **beside}), *turns[1:]] if beside else turns


def _template_settings(record: Record) -> Record:
    found = record.get(TEMPLATE_SETTINGS) or {}
    if isinstance(found, str):  # as in the cells of CSV files
        with suppress(ValueError, RecursionError):
            found = json.loads(found)
    if not isinstance(found, dict):
        raise RowError(f"'{TEMPLATE_SETTINGS}' is {_kind(found)}, expected an object")
    return found


def _tools(record: Record) -> list[Record]:
    """The functions that the model may call."""
    tools: Any = _listed(record.get("tools"), "tools")
    functions = record.get("functions")  # what OpenAI called tools before; or whatever else a data set calls so
    with suppress(RowError):
        functions = _listed(functions, "functions")
    if not tools and isinstance(functions, list) and all(isinstance(one, dict) for one in functions):
        tools = [{"type": "function", "function": function} for function in functions]
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' is {_kind(tools)}, expected a list of objects")
    return [_wrapped(tool) for tool in tools]


def _wrapped(tool: Record) -> Record:
    """A function as chat templates expect it, also where it is given bare, as in LLaMA-Factory's files."""
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _prompt_completion(record: Record) -> list[Turn]:
    completion = _side(record, "completion", "assistant")
    if completion[0].role in ("system", "user"):
        raise RowError(
            f"'completion' begins with a message of the {completion[0].role}: it seems to be a whole conversation. "
            "--columns messages=NAME names a column that holds one."
        )
    return [*_side(record, "prompt", "user"), *completion]


def _side(record: Record, key: str, role: str) -> list[Turn]:
    """A prompt or a completion: messages, or the text of one."""
    if isinstance(record[key], list):
        return _turns(record[key], key, train=role == "assistant")
    return [Turn(role, _text(record, key), trained=role == "assistant")]


def _messages(record: Record) -> list[Turn]:
    return _turns(record["messages"], "messages", train=True)


def _sharegpt(record: Record) -> list[Turn]:
    return _after_system(_turns(record["conversations"], "conversations", train=True), record)


def _after_system(turns: list[Turn], record: Record) -> list[Turn]:
    """Turns after the system message of a column, unless they begin with one of their own."""
    system = _said_in(record, "system")
    return turns if not system or turns[0].role == "system" else [Turn("system", system, trained=False), *turns]


def _said_in(record: Record, key: str) -> str:
    """The text of a column that a row need not have."""
    return _text(record, key) if record.get(key) else ""  # of 0 or {} trainers take nothing, too


def _alpaca(record: Record) -> list[Turn]:
    prompt = "\n".join(filter(None, (_text(record, "instruction"), _said_in(record, "input"))))  # as LLaMA-Factory does
    history = _listed(record.get("history"), "history") or []
    if not isinstance(history, list) or not all(_is_exchange(pair) for pair in history):
        raise RowError("'history' is no list of [question, answer]")
    turns = []
    for question, answer in [*history, (prompt, _text(record, "output"))]:
        turns += [Turn("user", question, trained=False), Turn("assistant", answer, trained=True)]
    return _after_system(turns, record)


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _plain_text(record: Record) -> list[Turn]:
    return [Turn("text", _text(record, "text"), trained=True)]


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record], list[Turn]]]] = {
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _plain_text),
}
"""Format name -> columns it needs (others stay untouched), and its reader. Detection tries them in this order."""
NEEDED = {column for columns, _ in FORMATS.values() for column in columns}
OPTIONAL: dict[str, tuple[str, ...]] = {name: ("system", *BESIDE) for name in FORMATS if name != "text"}
OPTIONAL["alpaca"] += ("input", "history")
"""Format name -> columns that it reads where a row has them."""
READ = NEEDED.union(*OPTIONAL.values())
"""Columns that some format reads."""
WITH_SYSTEM = ("sharegpt", "alpaca")
"""Formats whose trainers read a column `system`; of others it is read where --columns names it."""
UNREAD = ("images", "image", "videos", "video", "audios", "audio", "chosen")
"""Columns that other trainers read beside the text, or in place of the last answer."""
UNDESIRED = ("label", "kto_tag")
SAID_BEFORE = ("history", "input")
"""Columns of Alpaca's format that hold a part of the prompt, where --columns reads its rows in another one."""
TRAINED_PROMPT = "train: true beside answers"
"""What to call a message of somebody else that trainers are told to learn."""


def unread_columns(record: Record, row_format: str) -> list[str]:
    """The columns of a row that would change what a trainer learns from it, and that are not read.

    A `label` or `kto_tag` that is false says that the completion is undesired (unpaired preferences, as KTO takes
    them).

    Args:
        record: The row.
        row_format: Its format, as `read_row` takes it.
    """
    name, renamed = _parts(row_format)
    other = [column for column in UNREAD if record.get(column) and column not in renamed.values()]
    system = name not in WITH_SYSTEM and "system" not in renamed and bool(record.get("system"))
    undesired = [column for column in UNDESIRED if _is_false(record.get(column))]
    said_before = [column for column in SAID_BEFORE if name == "prompt_completion" and renamed and record.get(column)]
    left_out = [column for column in said_before if column not in renamed.values()]
    return [*other, *["system"] * system, *undesired, *left_out]


def _is_false(value: Any) -> bool:
    """Whether a value says no; in CSV files it is text."""
    return str(value).lower() == "false"


@lru_cache
def parse_columns(text: str) -> dict[str, str]:
    """Our column names -> the data's, from a text such as prompt=question,completion=answer.

    Raises:
        ConfigError: If it is not of that form, or names no column that is read.
    """
    found = dict(pair.partition("=")[::2] for pair in text.split(","))
    if not all(found.values()) or len(found) < len(text.split(",")):
        raise ConfigError(f"--columns is {text}: it must be like prompt=question,completion=answer.")
    if not found.keys() <= READ:
        wrong = ", ".join(sorted(found.keys() - READ))
        raise ConfigError(f"--columns: {wrong} is no column of a row format. These are: {', '.join(sorted(READ))}.")
    return found


def detect_format(records: Sequence[Record], name: str, columns: str | None = None) -> str:
    """The first format whose columns the first row has.

    Args:
        records: The rows.
        name: The data set's, for messages.
        columns: What other names its columns have, as `parse_columns` takes it.

    Returns:
        A name in FORMATS; with `columns` followed by these in brackets, as `read_row` takes it.

    Raises:
        DataError: If the first row has the columns of no format.
    """
    renamed = parse_columns(columns) if columns else {}
    for row_format, (needed, _) in FORMATS.items():
        wanted = {*(renamed.get(column, column) for column in needed), *renamed.values()}
        if records and wanted <= records[0].keys() and renamed.keys() <= _read_by(row_format):
            return with_columns(row_format, columns)
    needs = "; ".join(f"{row_format}: {_columns_of(row_format)}" for row_format in FORMATS)
    found = ", ".join(map(str, records[0])) if records else "no rows"
    asked = f" Asked for: --columns {columns}." if columns else ""
    raise DataError(
        f"{name}: no known row format. Columns found: {found}. Columns needed, by format: {needs}.{asked} "
        "Say which column is which with --columns prompt=NAME,completion=NAME, or name the format with --format."
    )


def require_columns_read(records: Sequence[Record], name: str, row_format: str, columns: str | None) -> None:
    """Raise DataError unless a format reads the columns that --columns names, and the first row has them."""
    renamed = parse_columns(columns) if columns else {}
    unread = sorted(renamed.keys() - _read_by(row_format))
    if unread:
        raise DataError(f"{name}: --columns names {', '.join(unread)}, which format {row_format} does not read.")
    missing = [theirs for theirs in renamed.values() if records and theirs not in records[0]]
    if missing:
        raise DataError(f"{name}: its first row has no column {missing[0]!r}, which --columns names.")


def _read_by(row_format: str) -> set[str]:
    """The columns that a format reads."""
    return {*FORMATS[row_format][0], *OPTIONAL.get(row_format, ())}


def _columns_of(row_format: str) -> str:
    """The columns that a format needs, and in brackets those that it reads as well, in words."""
    more = OPTIONAL.get(row_format, ())
    return ", ".join(FORMATS[row_format][0]) + (f" (also {', '.join(more)})" if more else "")


def with_columns(row_format: str, columns: str | None) -> str:
    """A format's name, with what other names its columns have: prompt_completion(prompt=question)."""
    return f"{row_format}({columns})" if columns else row_format


def _parts(row_format: str) -> tuple[str, dict[str, str]]:
    """What `with_columns` put together: a format's name, and our names of columns -> the data's."""
    name, _, columns = row_format.removesuffix(")").partition("(")
    return name, parse_columns(columns) if columns else {}


def base_format(row_format: str) -> str:
    """The name in FORMATS of a format with renamed columns."""
    return row_format.partition("(")[0]


def as_named(record: Record, row_format: str) -> Record:
    """A row whose columns have the names of FORMATS, with those that a format gives them."""
    _, renamed = _parts(row_format)
    taken = renamed.values() - renamed.keys()  # names of ours that are those of other columns there
    return {renamed.get(name, name): value for name, value in record.items() if name not in taken}


def read_row(record: Record, row_format: str) -> list[Turn]:
    """Turns of one row.

    Args:
        record: The row.
        row_format: A name in FORMATS, also with other column names: prompt_completion(prompt=question).

    Raises:
        RowError: If the row does not have the shape of the format, or nothing to learn.
    """
    name, renamed = _parts(row_format)
    needed, read = FORMATS[name]
    missing = [column for column in (renamed.get(ours, ours) for ours in needed) if column not in record]
    if missing:
        raise RowError(f"no column {' and '.join(map(repr, missing))} (format {name})")
    if renamed:
        others = {column: value for column, value in record.items() if column not in renamed.values()}
        record = {**others, **{ours: record.get(theirs) for ours, theirs in renamed.items()}}
    turns = read(record)
    if "system" in renamed:
        turns = _after_system(turns, record)
    if name != "text":
        turns = _with_beside(turns, record)
    if not any(turn.trained for turn in turns):
        raise RowError("no assistant turn to learn from")
    for number, turn in enumerate(turns, 1):
        require_text(turn.content, f"message {number}")
        if turn.extra:
            require_text(turn.extra, f"message {number}")
    return turns


def require_text(value: Any, what: str) -> None:
    """Raise RowError where UTF-8 cannot encode a text, or those in a value of JSON, or the value is none of JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode()
    except TypeError as error:  # the datasets library reads texts that look like dates as such
        raise RowError(f"{what} holds what is no text, number or list ({error}): give the rows as JSONL") from error
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise RowError(f"{what} has half a character ({half!r}), which is no text") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is nested too deep") from error
