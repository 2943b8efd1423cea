"""Turns -> the text that a chat template makes of them, and which stretches of it the model writes."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from forgetfilter.data.formats import RowError, Turn
from forgetfilter.errors import ModelError

PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}### Assistant:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""The chat template of models that come without one."""
MADE_UP = "made up, as the model has none: `### User:` before a prompt, `### Assistant:` before an answer"
"""What to say of it."""

PARTING = re.compile(r"(?=..)(?:[^\w\s].*|.*[^\w\s])", re.DOTALL)
"""Plain text that can separate turns: two or more characters, with punctuation at the start or the end."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template begins each stretch with that the model writes, if it says so at all."""
PRIVATE = range(0xF0000, 0x10FFFE)
"""Characters without a meaning (Unicode's supplementary private use areas)."""
MARKER = "\ue000forgetfilter\ue000"
"""Takes the place of a message, to find it."""
NAMES = ("id", "type", "name", "tools", "tool_call_id")
"""Keys of a message by which other messages, too, call something."""
Span = tuple[int, int]
"""Where a stretch of text starts and ends, in characters."""


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that matches any of the texts, longer ones first; without texts it matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as a chat template writes it.

    Attributes:
        text: The text. A character that must not become part of a token with a meaning is replaced by a private one.
        private: Private characters -> the characters they stand for; empty if none had to be replaced.
        answers: Message number, from 0 -> the stretches of the text that the model writes there: for each assistant
            message from the end of the generation prompt to the end of its end-of-turn token.
    """

    text: str
    private: dict[int, str]
    answers: dict[int, list[Span]]


class ChatTemplate:
    """The chat template of one tokenizer.

    A message may spell what has a meaning in the rendered row: an added token, or plain text by which the template
    parts turns ([/INST], ### User:). Before the template sees the message, such text is replaced by private
    characters, so it stays recognisable wherever the template puts it. An answer keeps its added tokens (<think>,
    <tool_call>), as in any trainer, except those that part turns, and those that begin, end or pad a text.

    Attributes:
        turn_ends: What the template writes after an answer, without white space around it: the end-of-turn token.
            A template may have another one for the row's last answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learn from a conversation of our own how the template parts turns.

        Raises:
            ModelError: If the template cannot render it.
        """
        self._tokenizer = tokenizer
        self._in_parts = False
        self._added = [token for token in tokenizer.get_added_vocab() if token.strip()]
        try:
            self._learn()
        except RowError as error:
            raise ModelError(f"{tokenizer.name_or_path}: its chat template cannot be used: {error}") from error

    def _learn(self) -> None:
        """Render a conversation of our own, and find generation prompt, end-of-turn tokens and marks in it."""
        roles = ("system", "user", "assistant", "user", "assistant")
        turns = [Turn(role, f"forgetfilter-{number}", trained=False) for number, role in enumerate(roles)]
        self._in_parts = not self._shows(turns[1:3])
        self._in_parts = self._in_parts and self._shows(turns[1:3])
        try:
            text = self._render(turns)[0]
        except RowError:  # the template takes no system messages
            turns = turns[1:]
            text = self._render(turns)[0]
        question, answer, _, other = turns[-4:]
        asked = self._render([question])[0]
        question_end = asked.rpartition(question.content)[2]
        prompt = self._render([question], prompt=True)[0].removeprefix(asked)
        self._prompt = self._parts(prompt)

        heads, around = [], [question_end]
        for turn in turns:
            before, shown, after = text.partition(turn.content)
            if shown and turn.role == "assistant":
                heads.append(before.removeprefix(question_end))
            elif shown:
                around.append(before)
            text = after if shown else text
        head = prompt[: min((_opening(self._prompt, before) for before in heads), default=0)]
        marks = sorted(self._marks(head), key=head.find)
        self._head = head if marks else ""
        turning = self._marks("\n".join([*around, text, *([] if marks else heads)])).union(marks[:1])
        turning |= {self._tokenizer.bos_token, self._tokenizer.eos_token, self._tokenizer.pad_token} - {None}
        elsewhere = turning.union(self._added, self._marks("\n".join(heads)))
        self._turning, self._elsewhere = re.compile(any_of(turning)), re.compile(any_of(elsewhere))
        self._characters = sorted(set("".join(elsewhere)) - set(" \t\n"))

        self.turn_ends = self._find_turn_ends(question, answer, other)
        self._turn_end = re.compile(any_of(self.turn_ends))

    def _find_turn_ends(self, question: Turn, answer: Turn, other: Turn) -> set[str]:
        """What the template writes after the last answer of a row and after an earlier one."""
        last = self._render([question, answer])[0].rpartition(answer.content)[2]
        earlier = self._render([question, answer, question, other])[0].partition(answer.content)[2]
        parts = self._parts(last)
        both = last[: _opening(parts, earlier)].strip()  # more may follow, but only in the last turn
        if both or not last.strip():
            return {both} - {""}
        ends = {next(part for part in parts if part.strip())}
        if self._head:
            with suppress(RowError):  # the template takes no two answers in a row
                between = self._render([question, answer, other])[0].partition(answer.content)[2]
                ends.update(between.split(self._head)[:-1][:1])
        return {end.strip() for end in ends} - {""}

    def _shows(self, turns: Sequence[Turn]) -> bool:
        """Whether the template shows the last of these messages."""
        with suppress(RowError):
            return turns[-1].content in self._render(turns)[0]
        return False

    def _parts(self, text: str) -> list[str]:
        """A text of the template, cut around its marks."""
        return [part for part in re.split(f"({any_of(self._marks(text))})", text) if part]

    def _marks(self, text: str) -> set[str]:
        """The added tokens in a text of the template, and its plain text except bare words such as a role's name."""
        parts = re.split(rf"\n|(?<=[\]>])\s+|{any_of(self._added)}", text)
        plain = {part.strip() for part in parts if PARTING.fullmatch(part.strip())}
        return plain.union(re.findall(any_of(self._added), text))

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Render a row.

        Raises:
            RowError: If the template refuses the row or does not show one of its answers.
        """
        turns, private = self._hidden(turns)
        text, spans = self._render(turns)
        return Rendered(text, private, self._answers(text, turns, spans))

    def _render(self, turns: Sequence[Turn], *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the stretches that the template itself says the model writes."""
        messages = [{"role": turn.role, "content": self._content(turn), **turn.extra} for turn in turns]
        tools = messages[0].pop("tools", None) if messages else None
        try:
            template = self._tokenizer.get_chat_template(None, tools)
            if prompt or not GENERATION.search(template):
                text = self._tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt
                )
                return str(text), []
            named: dict[str, Any] = {**self._tokenizer.special_tokens_map}
            marked: Any = render_jinja_template(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **named
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise RowError(f"the model's chat template refuses the row: {error}") from error
        (text,), (spans,) = marked
        return text, spans

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        """What a message says, as a list of parts where the template shows no plain text (those that take images)."""
        return [{"type": "text", "text": turn.content}] if self._in_parts else turn.content

    def _hidden(self, turns: Sequence[Turn]) -> tuple[Sequence[Turn], dict[int, str]]:
        """The row with private characters for what has no place in it, and these with what they stand for."""
        if not any(self._marks_of(turn).search(text) for turn in turns for text in _texts(turn)):
            return turns, {}
        said = {ord(character) for turn in turns for text in _texts(turn) for character in text}
        free = (code for code in PRIVATE if code not in said)
        codes = {ord(character): next(free) for character in self._characters}

        def hide(turn: Turn) -> Turn:
            marks = self._marks_of(turn)
            return _changed(turn, lambda text: marks.sub(lambda mark: mark.group().translate(codes), text))

        return [hide(turn) for turn in turns], {code: chr(character) for character, code in codes.items()}

    def _marks_of(self, turn: Turn) -> re.Pattern[str]:
        """What has no place in a message."""
        return self._turning if turn.role == "assistant" else self._elsewhere

    def _answers(self, text: str, turns: Sequence[Turn], spans: Sequence[Span]) -> dict[int, list[Span]]:
        """Message number -> the stretches that the model writes there, for the assistant's messages."""
        numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        if spans:
            return self._owned(text, turns, numbers, spans)
        heads = [match.start() for match in re.finditer(re.escape(self._head), text)] if self._head else []
        if len(heads) == len(numbers) and not any(turn.extra for turn in turns):
            starts = [self._after_prompt(text, head) for head in heads]
            limits = [*heads[1:], len(text)]
            stops = [self._turn_end.search(text, start, limit) for start, limit in zip(starts, limits, strict=True)]
            ends = [stop.end() for stop in stops if stop and self._turning.match(stop.group())]
            if len(ends) == len(numbers):
                return {number: [(start, end)] for number, start, end in zip(numbers, starts, ends, strict=True)}
        found: dict[int, list[Span]] = {}
        done = 0
        for number in numbers:
            try:
                span = self._answer(text, turns, number, done)
            except RowError:
                if turns[number].trained:
                    raise
            else:
                found[number] = [span]
                done = span[1]
        return found

    def _owned(
        self, text: str, turns: Sequence[Turn], numbers: Sequence[int], spans: Sequence[Span]
    ) -> dict[int, list[Span]]:
        """The stretches that the template marks, each given to its message."""
        if len(spans) == len(numbers):
            return {number: [span] for number, span in zip(numbers, spans, strict=True)}
        starts = {number: self._said(text, turns, number)[0] for number in numbers}
        owners = [max((n for n in numbers if starts[n] < end), default=numbers[0]) for _, end in spans]
        return {n: [span for span, owner in zip(spans, owners, strict=True) if owner == n] for n in numbers}

    def _answer(self, text: str, turns: Sequence[Turn], number: int, done: int) -> Span:
        """Where message `number` is written by the model; all before `done` belongs to earlier messages."""
        start = self._prompted(text, turns[:number], done)
        content = turns[number].content.strip()
        if start is not None and content and not turns[number].extra:
            last = start + len(text[start:]) - len(text[start:].lstrip()) + len(content)
            if text[start:last].endswith(content) and self._end_token(text, last) is not None:
                return start, self._end(text, turns, number, last)
        first, last = self._said(text, turns, number)
        if start is None:
            head = text.find(self._head, done, first) if self._head else -1
            start = first if head < 0 else self._after_prompt(text, head)
        return start, self._end(text, turns, number, last)

    def _after_prompt(self, text: str, head: int) -> int:
        """The end of the generation prompt that stands at `head`, with all of its tokens or the first ones."""
        return _opening(self._prompt, text, head)

    def _prompted(self, text: str, turns: Sequence[Turn], done: int) -> int | None:
        """Where the model goes on when asked with these messages; None if the row renders them in another way."""
        try:
            asked = self._render(turns, prompt=True)[0].removesuffix("".join(self._prompt)) if turns else ""
        except RowError:
            return None
        return self._after_prompt(text, len(asked)) if len(asked) >= done and text.startswith(asked) and turns else None

    def _said(self, text: str, turns: Sequence[Turn], number: int) -> Span:
        """Where the text begins and ends that depends on what message `number` says."""
        for names, empty in ((NAMES, ""), ((), ""), ((), MARKER)):  # a name may recur in later messages
            changed = _changed(turns[number], partial(_marked, empty=empty), names)
            other = self._render([*turns[:number], changed, *turns[number + 1 :]])[0]
            if MARKER in other:
                first = _shared(text, other)
                return first, max(first, len(text) - _shared(text[::-1], other[::-1]))
        raise RowError(f"the chat template rewrites the conversation: it does not show message {number + 1}")

    def _end_token(self, text: str, last: int) -> int | None:
        """The end of the end-of-turn token that follows at `last`, white space aside; `last` if answers have none."""
        stop = self._turn_end.search(text, last)
        if stop and not text[last : stop.start()].strip():
            return stop.end()
        return None if self.turn_ends else last

    def _end(self, text: str, turns: Sequence[Turn], number: int, last: int) -> int:
        """Where message `number` ends, its end-of-turn token included; it says nothing after `last`."""
        if not self.turn_ends and number == len(turns) - 1:
            return len(text)
        end = self._end_token(text, last)
        if end is not None or not turns[number].extra:
            return last if end is None else end
        limit = self._said(text, turns, number + 1)[0] if number + 1 < len(turns) else len(text)
        stop = self._turn_end.search(text, last, limit)
        if stop:
            return stop.end()
        alone = self._render(turns[: number + 1])[0].rstrip()
        return max(last, len(alone)) if text.startswith(alone) else last


def _opening(parts: Sequence[str], text: str, end: int = 0) -> int:
    """Where these parts end, one after the other as far as they stand in a text, the first one at `end`."""
    for part in parts:
        if not text.startswith(part, end):
            break
        end += len(part)
    return end


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common before they differ."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _marked(text: str, empty: str) -> str:
    """The marker in place of a text."""
    return MARKER if text else empty


def _texts(turn: Turn) -> list[str]:
    """Everything that a message says."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _mapped([turn.content, turn.extra], note)
    return found


def _changed(turn: Turn, change: Callable[[str], str], names: Sequence[str] = ()) -> Turn:
    """A message with each text in it changed, except under these keys."""
    return replace(turn, content=change(turn.content), extra=_mapped(turn.extra, change, names))


def _mapped(value: Any, change: Callable[[str], str], names: Sequence[str] = ()) -> Any:
    """A value of JSON with each text in it changed, except under these keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: inner if key in names else _mapped(inner, change, names) for key, inner in value.items()}
    return [_mapped(inner, change, names) for inner in value] if isinstance(value, list) else value
