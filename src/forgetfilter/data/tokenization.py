"""Turns -> input_ids and labels, with any chat template. Labels cover only trained turns and their end token."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from forgetfilter.data.formats import RowError, Turn
from forgetfilter.errors import ModelError

IGNORED = -100
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}### Assistant:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""The chat template of models that come without one."""


PARTING = re.compile(r"(?=..)(?:[^\w\s].*|.*[^\w\s])", re.DOTALL)
"""Plain text that can separate turns: two or more characters, with punctuation at the start or the end."""


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression that matches any of the texts, longer ones first; without texts it matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it.

    Attributes:
        input_ids: Token ids, at most max_length.
        labels: The same ids where the model is trained and scored, -100 elsewhere.
        prompt_length: Tokens before the last trained turn.
        reference: Text of the last trained turn.
        cut: Whether max_length cut some of the trained tokens off.
        spelt_specials: Whether a message contains a special token or a turn separator; it is encoded as plain text.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    reference: str
    cut: bool
    spelt_specials: bool = False

    @property
    def scorable(self) -> bool:
        """Whether any token is trained and scored."""
        return any(label != IGNORED for label in self.labels)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that are trained and scored; a row's first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    def prompts(self) -> list[list[int]]:
        """The token ids before each of the trained turns."""
        marks = [label != IGNORED for label in self.labels]
        return [self.input_ids[:i] for i in range(1, len(marks)) if marks[i] and not marks[i - 1]]


def mean_length(examples: Sequence[Example]) -> float:
    """Mean number of tokens of a row."""
    return sum(len(example.input_ids) for example in examples) / len(examples)


@dataclass(slots=True)
class _Piece:
    text: str
    hostile: bool = False
    trained: bool = False
    ends_turn: bool = False


class ChatTokenizer:
    """Tokenises rows for one tokenizer.

    A row is rendered by the chat template as a whole; the assistant's turns are then found in the
    rendered text, so that labels cover each answer and the end-of-turn token after it, and nothing else.
    A special token inside a message is encoded as plain text, so it can't change roles. Some templates separate turns
    by plain text ([/INST], <<SYS>>, ### User:). Where a message contains such text, it is encoded character by
    character, so it can't change roles either.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Keep the tokenizer, with the plain template where it has none."""
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._specials = [token for token in tokenizer.get_added_vocab() if token.strip()]
        self._prefixes = self._encode("\na")[len(self._encode("\n")) :] != self._encode("a")
        try:
            parting = self._find_turn_changes()
            self._turn_end = self._find_turn_end()
        except RowError as error:
            raise ModelError(f"{tokenizer.name_or_path}: its chat template cannot be used: {error}") from error
        self._spelt = re.compile(_any_of([*self._specials, *parting]))

    def encode(self, turns: Sequence[Turn]) -> Example:
        """Token ids and labels of one row.

        Raises:
            RowError: If the chat template refuses the row or rewrites its answers.
        """
        if turns[0].role == "text":
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            text = turns[0].content
            if not text.strip():
                return Example([], [], 0, text, cut=False)
            start = [bos] if self.tokenizer("")["input_ids"][:1] == [bos] else []
            tokens = [*start, *self._ids(_Piece(text, hostile=True)), eos]
            return replace(self._cut(tokens, [IGNORED, *tokens[1:]], 0, text), spelt_specials=self._spells(text))
        ids: list[int] = []
        labels: list[int] = []
        prompt_length, in_answer, before = 0, False, ""
        for piece in self._pieces(turns):
            if piece.trained and not in_answer:
                prompt_length = len(ids)
            in_answer = piece.trained and not piece.ends_turn
            piece_ids = self._ids(piece, before)
            before = piece.text
            ids += piece_ids
            labels += piece_ids if piece.trained else [IGNORED] * len(piece_ids)
        reference = next(turn.content for turn in reversed(turns) if turn.trained)
        example = self._cut(ids, labels, prompt_length, reference)
        return replace(example, spelt_specials=any(self._spells(turn.content) for turn in turns))

    def _spells(self, content: str) -> bool:
        """Whether a message contains text that could change roles."""
        return self._spelt.search(content) is not None

    def _cut(self, ids: list[int], labels: list[int], prompt_length: int, reference: str) -> Example:
        kept = labels[: self.max_length]
        cut = any(label != IGNORED for label in labels[self.max_length :])
        return Example(ids[: self.max_length], kept, min(prompt_length, self.max_length), reference, cut)

    def _render(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise RowError(f"the model's chat template refuses the row: {error}") from error
        return str(text)

    def _find_turn_end(self) -> str:
        """The end-of-turn token: what the template writes after an answer, without white space around it."""
        answer = "forgetfilter"
        text = self._render([Turn("user", "x", trained=False), Turn("assistant", answer, trained=True)])
        end = text.rpartition(answer)[2].strip()
        special = re.match(_any_of(self._specials), end)  # more may follow, but only in the last turn
        return special.group() if special else end

    def _find_turn_changes(self) -> set[str]:
        """Plain text that the template writes before and between messages, except bare words such as a role's name."""
        roles = ("system", "user", "assistant", "user", "assistant")
        turns = [Turn(role, f"forgetfilter-{number}", trained=False) for number, role in enumerate(roles)]
        try:
            text = self._render(turns)
        except RowError:  # the template takes no system messages
            text = self._render(turns[1:])
        text = text.rpartition(turns[-1].content)[0]
        parts = re.split(r"forgetfilter-\d|\n|(?<=[\]>])\s+|" + _any_of(self._specials), text)
        return {part.strip() for part in parts if PARTING.fullmatch(part.strip())}

    def _pieces(self, turns: Sequence[Turn]) -> list[_Piece]:
        """The rendered row, cut where training starts and ends, and around messages with special tokens."""
        full = self._render(turns)
        pieces, done = [], 0

        def until(position: int, **marks: bool) -> None:
            nonlocal done
            if position > done:
                pieces.append(_Piece(full[done:position], **marks))
                done = position

        for number, turn in enumerate(turns):
            content = turn.content.strip()
            hostile = self._spells(content)
            trained = turn.trained and bool(content)
            if not trained and not hostile:
                continue
            if turn.role == "assistant":
                until(self._head(full, turns, number, done))
            start = full.find(content, done)
            # The text found may not be the message but the template's own; then it is found by a marker.
            if hostile or full[done:start].strip() or content in full[start + 1 :]:
                start = self._start(full, turns, number)
            if start < done or not full.startswith(content, start):
                raise RowError(f"the chat template does not show message {number + 1} as it is")
            end = start + len(content)
            if hostile:
                until(start, trained=trained)
                until(end, hostile=True, trained=trained, ends_turn=trained and not self._turn_end)
            if trained:
                until(self._after_turn_end(full, end), trained=True, ends_turn=True)
        until(len(full))
        return pieces

    def _head(self, full: str, turns: Sequence[Turn], number: int, done: int) -> int:
        """Position at which the answer in message `number` begins: right after the generation prompt."""
        head = self._render(turns[:number], prompt=True)
        if not full.startswith(head) or len(head) < done:
            raise RowError(f"the chat template rewrites the messages before message {number + 1}")
        return len(head)

    def _start(self, full: str, turns: Sequence[Turn], number: int) -> int:
        """Position at which message `number` begins, or -1: found by rendering the row with a marker in its place."""
        marker = "\ue000forgetfilter\ue000"
        content = turns[number].content
        space = content[: len(content) - len(content.lstrip())]  # some templates trim it
        marked = self._render([*turns[:number], replace(turns[number], content=space + marker), *turns[number + 1 :]])
        start = marked.find(marker)
        return start if full.startswith(marked[:start]) else -1

    def _after_turn_end(self, full: str, end: int) -> int:
        """Position after the end-of-turn token that follows an answer; the answer's end if no such token follows."""
        stop = full.find(self._turn_end, end) if self._turn_end else -1
        return stop + len(self._turn_end) if stop >= 0 and not full[end:stop].strip() else end

    def _encode(self, text: str, *, as_text: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"])

    def _encode_after(self, before: str, text: str, *, as_text: bool) -> list[int]:
        """Token ids of a text that follows another one: SentencePiece adds a space only at the very beginning."""
        if not self._prefixes or not before:
            return self._encode(text, as_text=as_text)
        special = None if as_text else re.search(f"(?:{_any_of(self._specials)})\\Z", before)
        start = special.group() if special else "\n"
        head, ids = self._encode(start), self._encode(start + text, as_text=as_text)
        return ids[len(head) :] if ids[: len(head)] == head else self._encode(text, as_text=as_text)

    def _ids(self, piece: _Piece, before: str = "") -> list[int]:
        parts = [piece.text]
        if piece.hostile:  # character by character: split_special_tokens leaves some added tokens whole
            cuts = {0, len(piece.text)}
            for match in self._spelt.finditer(piece.text):
                cuts.update(range(match.start(), match.end() + 1))
            places = sorted(cuts)
            parts = [piece.text[start:end] for start, end in itertools.pairwise(places)]
        ids: list[int] = []
        for part in parts:
            ids += self._encode_after(before, part, as_text=piece.hostile)
            before = part
        return [*ids, self.tokenizer.eos_token_id] if piece.ends_turn and not self._turn_end else ids
