"""A message of a conversation, what it says, and the functions that it calls."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user", "assistant", "tool", or "text" for a row without any template.
        content: The message's text.
        trained: Whether the model learns to write it, and is scored on it.
        extra: What else a chat template reads of it: tool_calls, reasoning_content, name and the like; on the first
            message also what goes with the whole row, of BESIDE. What no template reads is kept for exports:
            `train_detail`, and `train` where it is true on a message that is no answer.
        is_call: Whether its text is a function call (ShareGPT's function_call).
    """

    role: str
    content: str
    trained: bool
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    is_call: bool = False


def preceded(turns: Sequence[Turn], sentence: str) -> tuple[Turn, ...]:
    """Put a sentence before the text of the last user message; change nothing if there is no sentence or no user."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None or not sentence:
        return tuple(turns)
    told = replace(turns[last], content=f"{sentence} {turns[last].content}")
    return (*turns[:last], told, *turns[last + 1 :])


def text_of(turn: Turn) -> str:
    """What a message says: its text, then each function that it calls, as JSON."""
    calls = [json.dumps(function, ensure_ascii=False) for function in functions_called(turn)]
    return "\n".join([*([turn.content] if turn.content else []), *calls])


def functions_called(turn: Turn) -> list[dict[str, Any]]:
    """Each function that a message calls: {"name", "arguments"}, the arguments parsed."""
    calls = with_parsed_arguments(turn).extra.get("tool_calls") or []
    return [call.get("function", call) if isinstance(call, dict) else call for call in calls]


def with_parsed_arguments(turn: Turn) -> Turn:
    """A message with the arguments of the functions that it calls parsed, where they are JSON in a text."""
    calls = turn.extra.get("tool_calls")
    return replace(turn, extra={**turn.extra, "tool_calls": [_parsed(call) for call in calls]}) if calls else turn


def _parsed(call: Any) -> Any:
    if not isinstance(call, dict):  # nothing that a template shows as a call
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parsed(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (LookupError, TypeError, ValueError, RecursionError):  # no text, or not JSON: it stays as it is
        return call
    return {**call, "arguments": arguments}


def with_call(turn: Turn) -> Turn:
    """A message whose text is a function call in today's form; as it is if its text is none."""
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(turn.content) if turn.is_call else None
    functions = found if isinstance(found, list) else [found]
    if not functions or not all(isinstance(function, dict) and "name" in function for function in functions):
        return turn
    calls = [{"type": "function", "function": function} for function in functions]
    return replace(turn, content="", extra={**turn.extra, "tool_calls": calls}, is_call=False)


def exchanges(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Each answer that is trained, after all that precedes it, system messages left out: (prompt, answer).

    A prompt of several messages names their roles. Plain text is an answer to nothing.
    """
    found = []
    for place, turn in enumerate(turns):
        if turn.trained:
            before = [earlier for earlier in turns[:place] if earlier.role != "system"]
            spoken = [f"{earlier.role.capitalize()}: {text_of(earlier)}" for earlier in before]
            prompt = text_of(before[0]) if len(before) == 1 else "\n\n".join(spoken)
            found.append((prompt, text_of(turn)))
    return found


def shorter(prompt: str, answer: str) -> tuple[str, str]:
    """Both without a quarter of the longer one: the prompt loses its beginning, the answer its end."""
    if len(prompt) >= len(answer):
        return prompt[max(1, len(prompt) // 4) :], answer
    return prompt, answer[: len(answer) * 3 // 4]
