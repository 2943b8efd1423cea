"""Row formats: any row -> turns of a conversation, of which some are trained on and scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from forgetfilter.errors import DataError

Record = dict[str, Any]


class RowError(ValueError):
    """A row that does not have the shape of its format; the caller adds file and line."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant", "tool", or "text" for a row without any template.
        content: The message's text.
        trained: Whether the model learns to write it, and is scored on it.
        extra: What else a chat template reads of it: tool_calls, reasoning_content, name and the like; on the first
            message also `tools`, the functions that the model may call.
    """

    role: str
    content: str
    trained: bool
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


def preceded(turns: Sequence[Turn], sentence: str) -> tuple[Turn, ...]:
    """Put a sentence before the text of the last user message; change nothing if there is no sentence or no user."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None or not sentence:
        return tuple(turns)
    told = replace(turns[last], content=f"{sentence} {turns[last].content}")
    return (*turns[:last], told, *turns[last + 1 :])


def exchanges(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Each answer that is trained, after all that precedes it, system messages left out: (prompt, answer).

    A prompt of several messages names their roles. Plain text is an answer to nothing.
    """
    found = []
    for place, turn in enumerate(turns):
        if turn.trained:
            before = [earlier for earlier in turns[:place] if earlier.role != "system"]
            alone = len(before) == 1
            prompt = before[0].content if alone else "\n\n".join(f"{t.role.capitalize()}: {t.content}" for t in before)
            found.append((prompt, turn.content))
    return found


def shorter(prompt: str, answer: str) -> tuple[str, str]:
    """Both without a quarter of the longer one: the prompt loses its beginning, the answer its end."""
    if len(prompt) >= len(answer):
        return prompt[max(1, len(prompt) // 4) :], answer
    return prompt, answer[: len(answer) * 3 // 4]


ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Role names of ShareGPT and chat formats, mapped to those of chat templates."""


def _text(record: Record, key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {_kind(value)}, expected text")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _turns(messages: Any, key: str, role_key: str, content_key: str, *, train: bool) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise RowError(f"'{key}' is {'empty' if messages == [] else _kind(messages)}, expected a list of messages")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {role_key, content_key} <= message.keys():
            raise RowError(f"message {number} of '{key}' has no '{role_key}' and '{content_key}'")
        role, content = ROLES.get(str(message[role_key])), message[content_key]
        if role is None:
            raise RowError(f"message {number} of '{key}' has the unknown role {message[role_key]!r}")
        if not isinstance(content, str):
            raise RowError(f"message {number} of '{key}': '{content_key}' is {_kind(content)}, expected text")
        turns.append(Turn(role, content, train and role == "assistant"))
    return turns


def _prompt_completion(record: Record) -> list[Turn]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [
            *_turns(prompt, "prompt", "role", "content", train=False),
            *_turns(completion, "completion", "role", "content", train=True),
        ]
    return [
        Turn("user", _text(record, "prompt"), trained=False),
        Turn("assistant", _text(record, "completion"), trained=True),
    ]


def _messages(record: Record) -> list[Turn]:
    return _turns(record["messages"], "messages", "role", "content", train=True)


def _sharegpt(record: Record) -> list[Turn]:
    turns = _turns(record["conversations"], "conversations", "from", "value", train=True)
    if record.get("system"):
        turns.insert(0, Turn("system", _text(record, "system"), trained=False))
    return turns


def _alpaca(record: Record) -> list[Turn]:
    prompt = _text(record, "instruction")
    if record.get("input"):
        prompt += "\n\n" + _text(record, "input")
    return [
        Turn("user", prompt, trained=False),
        Turn("assistant", _text(record, "output"), trained=True),
    ]


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


def detect_format(records: list[Record], name: str) -> str:
    """Name of the first format whose columns the first row has.

    Raises:
        DataError: If the first row has the columns of no format.
    """
    for row_format, (columns, _) in FORMATS.items():
        if records and set(columns) <= records[0].keys():
            return row_format
    needs = "; ".join(f"{row_format}: {', '.join(columns)}" for row_format, (columns, _) in FORMATS.items())
    found = ", ".join(map(str, records[0])) if records else "no rows"
    raise DataError(
        f"{name}: no known row format. Columns found: {found}. Columns needed, by format: {needs}. "
        "Rename the columns, or name the format with --format."
    )


def read_row(record: Record, row_format: str) -> list[Turn]:
    """Turns of one row.

    Raises:
        RowError: If the row does not have the shape of the format, or nothing to learn.
    """
    columns, read = FORMATS[row_format]
    missing = [column for column in columns if column not in record]
    if missing:
        raise RowError(f"no column {' and '.join(map(repr, missing))} (format {row_format})")
    turns = read(record)
    if not any(turn.trained for turn in turns):
        raise RowError("no assistant turn to learn from")
    for number, turn in enumerate(turns, 1):
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            half = turn.content[error.start]
            raise RowError(f"message {number} has half a character ({half!r}), which is no text") from error
    return turns
