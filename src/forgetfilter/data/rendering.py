"""Rows as a chat template writes them, and which stretches of the text the model writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from forgetfilter.data.formats import RowError
from forgetfilter.data.templates import NAMES, ChatTemplate, Span, changed, opening, says_more
from forgetfilter.data.turns import Turn

MARKER = "\ue000forgetfilter\ue000"
"""Takes the place of a message, to find it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as a chat template writes it.

    Attributes:
        text: The text. A character that must not become part of a token with a meaning is replaced by a private one.
        private: Private characters -> the characters they stand for; empty if none had to be replaced.
    """

    text: str
    private: dict[int, str]
    _template: ChatTemplate
    _turns: Sequence[Turn]
    _spans: Sequence[Span]

    def answers(self, limit: int | None = None) -> dict[int, list[Span]]:
        """Message number, from 0 -> the stretches of the text that the model writes there.

        A stretch goes from the end of the generation prompt to the end of the end-of-turn token.

        Args:
            limit: Assistant messages that begin after so many characters may be left out; None for all of them.

        Raises:
            RowError: If the template does not show a trained answer.
        """
        return _Answers(self._template, self._turns, self.text).find(self._spans, limit)


def render(template: ChatTemplate, turns: Sequence[Turn]) -> Rendered:
    """A row in the words of a chat template.

    Raises:
        RowError: If the template refuses the row.
    """
    try:
        turns, private = template.hide(template.fitting(turns))  # what is parsed may spell what must be hidden
    except RecursionError:
        raise RowError("its function calls or tools are nested too deeply") from None
    text, spans = template.write(turns)
    return Rendered(text, private, template, turns, spans)


class _Answers:
    """Finds the assistant's messages in a rendered row."""

    def __init__(self, template: ChatTemplate, turns: Sequence[Turn], text: str) -> None:
        self._template, self._turns, self._text = template, turns, text
        self._numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]

    def find(self, spans: Sequence[Span], limit: int | None) -> dict[int, list[Span]]:
        """Message number -> the stretches that the model writes there; see Rendered.answers.

        Args:
            spans: Those that the template itself marks.
            limit: Messages after so many characters need not be found.
        """
        if spans:
            return self._owned(spans)
        head = self._template.head
        heads = [match.start() for match in re.finditer(re.escape(head), self._text)] if head else []
        if len(heads) != len(self._numbers):  # some answers have no head of their own, or several
            heads = []
        found: dict[int, list[Span]] = {}
        done = 0
        for number, start, following in zip_longest(self._numbers, heads, heads[1:]):
            if limit is not None and done > limit:
                break
            try:
                span = self._with_head(number, start, following) or self._without_head(number, done)
            except RowError:
                if self._turns[number].trained:
                    raise
            else:
                found[number] = [span]
                done = span[1]
        return found

    def _owned(self, spans: Sequence[Span]) -> dict[int, list[Span]]:
        """Each stretch given to its message."""
        if len(spans) == len(self._numbers):
            return {number: [span] for number, span in zip(self._numbers, spans, strict=True)}
        starts = {number: self._said(number)[0] for number in self._numbers}
        found: dict[int, list[Span]] = {number: [] for number in self._numbers}
        for span in spans:
            begun = [number for number in self._numbers if starts[number] < span[1]]
            found[max(begun, default=self._numbers[0])].append(span)
        return found

    def _with_head(self, number: int, head: int | None, limit: int | None) -> Span | None:
        """Where an answer of text alone is written that begins at `head`; None if it is not told that easily."""
        if head is None or says_more(self._turns[number]):
            return None
        start = opening(self._template.prompt, self._text, head)
        stop = self._template.turn_end.search(self._text, start, len(self._text) if limit is None else limit)
        return (start, stop.end()) if stop and self._template.turning.match(stop.group()) else None

    def _without_head(self, number: int, done: int) -> Span:
        """Where message `number` is written by the model; all before `done` belongs to earlier messages."""
        start = self._asked(number, done)
        content = self._turns[number].content.strip()
        if start is not None and content and not says_more(self._turns[number]):
            first = len(self._text) - len(self._text[start:].lstrip())
            last = first + len(content)
            if self._text.startswith(content, first) and self._end_token(last) is not None:
                return start, self._end(number, last)
        first, last = self._said(number)
        if start is None:
            head = self._text.find(self._template.head, done, first) if self._template.head else -1
            start = first if head < 0 else opening(self._template.prompt, self._text, head)
        return start, self._end(number, last)

    def _asked(self, number: int, done: int) -> int | None:
        """Where the model goes on when asked with the messages before; None if the row renders them in another way."""
        if not number:
            return None
        try:
            asked = self._template.write(self._turns[:number], prompt=True)[0]
        except RowError:
            return None
        asked = asked.removesuffix("".join(self._template.prompt))
        if len(asked) < done or not self._text.startswith(asked):
            return None
        return opening(self._template.prompt, self._text, len(asked))

    def _said(self, number: int) -> Span:
        """Where the text begins and ends that depends on what message `number` says."""
        for names, empty in ((NAMES, ""), ((), ""), ((), MARKER)):  # a name may recur in later messages
            turn = changed(self._turns[number], partial(_marked, empty=empty), names)
            other = self._template.write([*self._turns[:number], turn, *self._turns[number + 1 :]])[0]
            if MARKER in other:
                first = _shared(self._text, other)
                return first, max(first, len(self._text) - _shared(self._text[::-1], other[::-1]))
        raise RowError(f"the chat template rewrites the conversation: it does not show message {number + 1}")

    def _end(self, number: int, last: int) -> int:
        """Where message `number` ends, its end-of-turn token included; it says nothing after `last`."""
        following = number + 1 < len(self._turns)
        if not self._template.turn_ends and not following:
            return len(self._text)
        end = self._end_token(last)
        if end is not None:
            return end
        if not says_more(self._turns[number]):
            return last
        limit = self._said(number + 1)[0] if following else len(self._text)
        stop = self._template.turn_end.search(self._text, last, limit)
        if stop:
            return stop.end()
        alone = self._template.write(self._turns[: number + 1])[0].rstrip()
        return max(last, len(alone)) if self._text.startswith(alone) else last

    def _end_token(self, last: int) -> int | None:
        """The end of the end-of-turn token that follows at `last`, white space aside; `last` if answers have none."""
        stop = self._template.turn_end.search(self._text, last)
        if stop and not self._text[last : stop.start()].strip():
            return stop.end()
        return None if self._template.turn_ends else last


def _marked(text: str, empty: str) -> str:
    """The marker in place of a text."""
    return MARKER if text else empty


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common before they differ."""
    same, most = 0, min(len(one), len(other))
    while same < most:  # halved again and again, since texts are compared much faster than their characters
        half = (same + most + 1) // 2
        if one[same:half] == other[same:half]:
            same = half
        else:
            most = half - 1
    return same
