"""What a chat template is made of, and what of a message must stay text in it."""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from forgetfilter.data.formats import BESIDE, IN_PART, TEMPLATE_SETTINGS, RowError
from forgetfilter.data.turns import Turn, with_call, with_parsed_arguments
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
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
"""How a template asks for today's date."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template begins each stretch with that the model writes, if it says so at all."""
TAKES_TEXT = re.compile(r"""arguments['"\]\s)]*(?:\sis\s+(?:not\s+)?string|-?\}\}|~)""")
"""How a template says that the arguments of a function call may be a text, or shows them as a text as it is."""
PRIVATE = range(0xF0000, 0x10FFFE)
"""Characters without a meaning (Unicode's supplementary private use areas)."""
NAMES = ("id", "type", "name", "tool_call_id", IN_PART, *BESIDE)
"""Keys of a message that say nothing by themselves: names and ids, to which other messages may refer, and settings."""
OURS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents", "kwargs"}
"""What a row may not set of `apply_chat_template`, such as another template: the rest goes to the template itself."""
Span = tuple[int, int]
"""Where a stretch of text starts and ends, in characters."""


def says_more(turn: Turn) -> bool:
    """Whether a message says more than its text: it calls functions, or has its reasoning apart."""
    return any(value for name, value in turn.extra.items() if name not in NAMES)


def learns(turn: Turn) -> bool:
    """Whether there is something in a message that the model learns to write."""
    return turn.trained and (bool(turn.content.strip()) or says_more(turn))


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that matches any of the texts, longer ones first; without texts it matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"


class ChatTemplate:
    """The chat template of one tokenizer.

    A message may spell what has a meaning in the rendered row: an added token, or plain text by which the template
    parts turns ([/INST], ### User:). Before the template sees the message, such text is replaced by private
    characters, so it stays recognisable wherever the template puts it. An answer keeps its added tokens (<think>,
    <tool_call>), as in any trainer, except those that part turns, and those that begin, end or pad a text.

    Attributes:
        prompt: The generation prompt, cut around its marks; empty if the template writes none.
        head: As much of it as begins every answer; empty if a message may hold it, too.
        turn_ends: What the template writes after an answer, without white space around it: the end-of-turn token.
            A template may have another one for the row's last answer.
        turn_end: Matches any of turn_ends.
        turning: Matches what has no place in an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> None:
        """Learn from a conversation of our own how the template parts turns.

        Args:
            tokenizer: A model's.
            today: What a template that prints the date takes for today; None = today.

        Raises:
            ModelError: If the template cannot render it.
        """
        self._tokenizer = tokenizer
        self._today = today
        self._added = [token for token in tokenizer.get_added_vocab() if token.strip()]
        roles = ("system", "user", "assistant", "user", "assistant")
        turns = [Turn(role, f"forgetfilter-{number}", trained=False) for number, role in enumerate(roles)]
        self._in_parts = False  # whether a message's text must come as a list of parts
        if not self._shows(turns[1:3]):
            self._in_parts = True
            self._in_parts = self._shows(turns[1:3])
        try:
            self._find_marks(turns)
            self.turn_ends = self._find_turn_ends(*turns[-4:])
        except RowError as error:
            raise ModelError(f"{tokenizer.name_or_path}: its chat template cannot be used: {error}") from error
        self.turn_end = re.compile(any_of(self.turn_ends))

    def _find_marks(self, turns: Sequence[Turn]) -> None:
        """Find the generation prompt, and by which marks the template parts these messages."""
        question = turns[1]
        asked = self.write([question])[0]
        asked_end = asked.rpartition(question.content)[2]
        prompt = self.write([question], prompt=True)[0].removeprefix(asked)
        self.prompt = self._parts(prompt)
        try:
            text = self.write(turns)[0]
        except RowError:  # the template takes no system messages
            text = self.write(turns[1:])[0]
        heads, around = [], [asked_end]
        for turn in turns:
            before, shown, after = text.partition(turn.content)
            if shown and turn.role == "assistant":
                heads.append(before.removeprefix(asked_end))
            elif shown:
                around.append(before)
            text = after if shown else text
        around.append(text)
        head = prompt[: min((opening(self.prompt, before) for before in heads), default=0)]
        marks = sorted(self._marks(head), key=head.find)
        self.head = head if marks else ""

        # Inside its turn an answer may repeat what follows the first mark of its head, such as <think>.
        turning = self._marks("\n".join(around if marks else around + heads)).union(marks[:1])
        turning |= {self._tokenizer.bos_token, self._tokenizer.eos_token, self._tokenizer.pad_token} - {None}
        elsewhere = turning.union(self._added, self._marks("\n".join(heads)))
        self.turning, self._elsewhere = re.compile(any_of(turning)), re.compile(any_of(elsewhere))
        self._characters = sorted(set("".join(elsewhere)) - set(" \t\n"))

    def _find_turn_ends(self, question: Turn, answer: Turn, question_2: Turn, answer_2: Turn) -> set[str]:
        """What the template writes after the last answer of a row and after an earlier one."""
        last = self.write([question, answer])[0].rpartition(answer.content)[2]
        earlier = self.write([question, answer, question_2, answer_2])[0].partition(answer.content)[2]
        parts = self._parts(last)
        both = last[: opening(parts, earlier)].strip()  # more may follow, but only in the last turn
        if both or not last.strip():
            return {both} - {""}
        ends = {next(part for part in parts if part.strip())}
        if self.head:
            with suppress(RowError):  # the template takes no two answers in a row
                between = self.write([question, answer, answer_2])[0].partition(answer.content)[2]
                ends.update(between.split(self.head)[:-1][:1])
        return {end.strip() for end in ends} - {""}

    def _shows(self, turns: Sequence[Turn]) -> bool:
        """Whether the template shows the last of these messages."""
        with suppress(RowError):
            return turns[-1].content in self.write(turns)[0]
        return False

    def _parts(self, text: str) -> list[str]:
        """A text of the template, cut around its marks."""
        return [part for part in re.split(f"({any_of(self._marks(text))})", text) if part]

    def _marks(self, text: str) -> set[str]:
        """The added tokens in a text of the template, and its plain text except bare words such as a role's name."""
        parts = re.split(rf"\n|(?<=[\]>])\s+|{any_of(self._added)}", text)
        plain = {part.strip() for part in parts if PARTING.fullmatch(part.strip())}
        return plain.union(re.findall(any_of(self._added), text))

    def write(self, turns: Sequence[Turn], *, prompt: bool = False) -> tuple[str, list[Span]]:
        """Render messages; with `prompt` followed by the generation prompt.

        Returns:
            The text, and the stretches that the template itself says the model writes (without `prompt`).

        Raises:
            RowError: If the template refuses them.
        """
        messages = [{"role": turn.role, "content": self._content(turn), **turn.extra} for turn in turns]
        tools = messages[0].pop("tools", None) if messages else None
        settings: dict[str, Any] = messages[0].pop(TEMPLATE_SETTINGS, {}) if messages else {}
        if taken := sorted(settings.keys() & OURS):
            raise RowError(f"its {TEMPLATE_SETTINGS} may not set {taken[0]!r}")
        try:
            template = self._dated(self._tokenizer.get_chat_template(None, tools))
            if prompt or not GENERATION.search(template):
                text = self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **settings,
                )
                return str(text), []
            named: dict[str, Any] = {**self._tokenizer.special_tokens_map, **settings}
            marked: Any = render_jinja_template(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **named
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise RowError(f"the model's chat template refuses the row: {error}") from error
        (text,), (spans,) = marked
        return text, spans

    @cached_property
    def shows_calls(self) -> bool:
        """Whether a function call is shown beside an empty text: some templates show it only where there is none."""
        tools = [{"type": "function", "function": {"name": "forgetfilter-2", "description": "", "parameters": {}}}]
        written: list[str] = []
        forms: tuple[Any, ...] = {}, "{}"
        for beside, arguments in itertools.product(({}, {"tools": tools}), forms):
            asked = Turn("user", "forgetfilter-0", trained=False, extra=beside)
            function = {"name": "forgetfilter-1", "arguments": arguments}
            call = {"id": "forgetful", "type": "function", "function": function}
            with suppress(RowError):
                written.append(self.write([asked, Turn("assistant", "", True, {"tool_calls": [call]})])[0])
        return not written or any("forgetfilter-1" in text for text in written)

    def fitting(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Messages whose function calls are as the template takes them: the arguments as text or parsed."""
        template = str(self._tokenizer.chat_template)
        called = [with_call(turn) for turn in turns] if "tool_calls" in template else list(turns)
        parsed = [with_parsed_arguments(turn) for turn in called]
        if parsed == called or TAKES_TEXT.search(template):
            return called
        with suppress(RowError):
            self.write(parsed)
            return parsed
        return called

    def _dated(self, template: str) -> str:
        """The template with the date in place of what asks for today's."""
        if self._today is None:
            return template
        today = self._today
        return CLOCK.sub(lambda asked: json.dumps(today.strftime(asked["format"])), template)

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        """What a message says, as a list of parts where the template shows no plain text (those that take images)."""
        return [{"type": "text", "text": turn.content}] if self._in_parts else turn.content

    def hide(self, turns: Sequence[Turn]) -> tuple[Sequence[Turn], dict[int, str]]:
        """Put private characters in place of what has no place in a message.

        Returns:
            The row, and the private characters with what they stand for; none if nothing had to be replaced.
        """
        if not any(self._marks_of(turn).search(text) for turn in turns for text in _texts(turn)):
            return turns, {}
        said = {ord(character) for turn in turns for text in _texts(turn) for character in text}
        free = (code for code in PRIVATE if code not in said)
        codes = {ord(character): next(free) for character in self._characters}

        def hide(turn: Turn) -> Turn:
            marks = self._marks_of(turn)
            return changed(turn, lambda text: marks.sub(lambda mark: mark.group().translate(codes), text))

        return [hide(turn) for turn in turns], {code: chr(character) for character, code in codes.items()}

    def _marks_of(self, turn: Turn) -> re.Pattern[str]:
        """What has no place in a message."""
        return self.turning if turn.role == "assistant" else self._elsewhere


def opening(parts: Sequence[str], text: str, end: int = 0) -> int:
    """Where these parts end, one after the other as far as they stand in a text, the first one at `end`."""
    for part in parts:
        if not text.startswith(part, end):
            break
        end += len(part)
    return end


def _texts(turn: Turn) -> list[str]:
    """Everything that a message says."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _mapped([turn.content, turn.extra], note)
    return found


def changed(turn: Turn, change: Callable[[str], str], names: Sequence[str] = ()) -> Turn:
    """A message with each text in it changed, except under these keys."""
    return replace(turn, content=change(turn.content), extra=_mapped(turn.extra, change, names))


def _mapped(value: Any, change: Callable[[str], str], names: Sequence[str] = ()) -> Any:
    """A value of JSON with each text in it changed, except under these keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: inner if key in names else _mapped(inner, change, names) for key, inner in value.items()}
    return [_mapped(inner, change, names) for inner in value] if isinstance(value, list) else value
