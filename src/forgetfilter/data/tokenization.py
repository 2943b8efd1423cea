"""Turns -> input_ids and labels, with any chat template. Labels cover only trained turns and their end token."""

import hashlib
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from forgetfilter.data.lazy import Lazy, Spool
from forgetfilter.data.rendering import Rendered, render
from forgetfilter.data.templates import MADE_UP, PLAIN_TEMPLATE, ChatTemplate, Span, any_of, learns
from forgetfilter.data.turns import Turn
from forgetfilter.progress import say

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the model sees it.

    Attributes:
        input_ids: Token ids, at most max_length.
        labels: The same ids where the model is trained and scored, -100 elsewhere.
        prompt_length: Tokens before the last trained turn.
        reference: Text of the last trained turn.
        cut: Whether max_length cut some of the trained tokens off.
        spelt_specials: Whether a message spells an added token or a turn separator that is encoded as plain text.
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


def hash_of(ids: Sequence[int]) -> bytes:
    """A short hash of token ids: many are compared with many, and lists of numbers would fill the memory."""
    return hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=16).digest()


def on_disk(examples: Iterable[Example], scratch_folder: Path | None) -> Lazy[Example]:
    """The same examples, each read from the disk when it is asked for.

    Args:
        examples: The examples; one is in memory at a time.
        scratch_folder: A folder on whose disk they are to lie; None for the system's own for such files.
    """
    spool = Spool(scratch_folder)
    for example in examples:
        spool.append(_packed(example))
    packed = spool.rows()
    return Lazy(len(packed), lambda places: [_unpacked(row) for row in packed.make(places)])


def _packed(row: Example) -> bytes:
    """An example as bytes: four numbers, then its tokens, of which those without a label are inverted; its text."""
    ids, labels = np.array([row.input_ids, row.labels], np.int32)
    about = np.array([len(ids), row.prompt_length, row.cut, row.spelt_specials], np.int32)
    tokens = np.where(labels == IGNORED, ~ids, ids)
    return b"".join((about.tobytes(), tokens.tobytes(), row.reference.encode("utf-8", "surrogatepass")))


def _unpacked(data: bytes) -> Example:
    """The example that `_packed` made bytes of."""
    count, prompt_length, cut, spelt_specials = np.frombuffer(data, np.int32, 4).tolist()
    tokens = np.frombuffer(data, np.int32, count, 16)
    ids, labels = np.where(tokens < 0, ~tokens, tokens), np.where(tokens < 0, IGNORED, tokens)
    text = data[16 + 4 * count :].decode("utf-8", "surrogatepass")
    return Example(ids.tolist(), labels.tolist(), prompt_length, text, bool(cut), bool(spelt_specials))


def mean_length(examples: Sequence[Example]) -> float:
    """Mean number of tokens of a row."""
    return sum(len(example.input_ids) for example in examples) / len(examples)


class ChatTokenizer:
    """Tokenises rows for one tokenizer, as a trainer does.

    Token ids are those of `apply_chat_template`, and of the tokenizer itself for plain text, with one exception: what a
    message spells that has no place in it (see `ChatTemplate`) is encoded as text, character by character, so that a
    message can't change roles. Labels cover each trained answer from the end of its generation prompt, and the
    end-of-turn token after it, where the template has one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, today: date | None = None) -> None:
        """Keep the tokenizer, with the plain template where it has none.

        Args:
            tokenizer: A model's.
            max_length: Longest row in tokens.
            today: What a chat template that prints the date takes for today; None = today.

        Raises:
            ModelError: If its chat template cannot be used.
        """
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
            say(f"{tokenizer.name_or_path}: the chat template is {MADE_UP}.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template = ChatTemplate(tokenizer, today)
        if not self.template.turn_ends:
            say(f"{tokenizer.name_or_path}: the chat template ends no turn, so rows do not teach where an answer ends.")
        self._added = any_of(tokenizer.get_added_vocab())
        start, both, alone = (self._encode(text)[0] for text in ("\n", "\na", "a"))
        self._prefixes = both[len(start) :] != alone  # the tokenizer adds a space where a text begins

    @property
    def made_up(self) -> bool:
        """Whether the chat template is the plain one."""
        return bool(self.tokenizer.chat_template == PLAIN_TEMPLATE)

    def encode(self, turns: Sequence[Turn]) -> Example:
        """Token ids and labels of one row.

        Raises:
            RowError: If the chat template refuses the row or does not show an answer.
        """
        if turns[0].role == "text":
            return self._plain(turns[0].content)
        row = render(self.template, turns)
        ids, places, found = self._tokens_and_answers(row)
        trained = [number for number, turn in enumerate(turns) if learns(turn)]
        answers = [found[number] for number in trained if found.get(number)]
        starts, ends = [start for start, _ in places], [end for _, end in places]
        labels, first = [IGNORED] * len(ids), 0
        for start, end in itertools.chain(*answers):
            tokens = slice(bisect_right(ends, start), bisect_left(starts, end))
            labels[tokens] = ids[tokens]
        if answers:
            first = bisect_right(ends, answers[-1][0][0])
        if not found.keys() >= set(trained):  # answers behind the cut, which were not looked for
            labels[-1], first = ids[-1], len(ids)
        reference = next((turn.content for turn in reversed(turns) if learns(turn)), "")
        return self._cut(Example(ids, labels, first, reference, cut=False, spelt_specials=bool(row.private)))

    def _tokens_and_answers(self, row: Rendered) -> tuple[list[int], list[Span], dict[int, list[Span]]]:
        """Token ids of a row, the characters that each stands for, and where the assistant's messages are.

        Of a row that is to be cut, messages behind the cut are left out: to find each takes a rendering of all of it.
        """
        if not self.tokenizer.is_fast:  # it does not tell which characters a token stands for
            found = row.answers()
            ids, places = self._tokens(row, {place for span in itertools.chain(*found.values()) for place in span})
            return ids, places, found
        ids, places = self._tokens(row)
        return ids, places, row.answers(places[self.max_length][0] if len(ids) > self.max_length else None)

    def _plain(self, text: str) -> Example:
        """A row without a template: all tokens are the tokenizer's, and all but the first are learnt."""
        if not text.strip():
            return Example([], [], 0, text, cut=False)
        end = self.tokenizer.eos_token
        ids = list(self.tokenizer(text if text.endswith(end) else text + end)["input_ids"])
        return self._cut(Example(ids, [IGNORED, *ids[1:]], 0, text, cut=False))

    def _cut(self, row: Example) -> Example:
        most = self.max_length
        if len(row.input_ids) <= most:
            return row
        cut = any(label != IGNORED for label in row.labels[most:])
        first = min(row.prompt_length, most)
        return replace(row, input_ids=row.input_ids[:most], labels=row.labels[:most], prompt_length=first, cut=cut)

    def _tokens(self, row: Rendered, cuts: Collection[int] = ()) -> tuple[list[int], list[Span]]:
        """Token ids of a row, and the characters that each stands for; no token reaches over one of the cuts."""
        cuts = {0, len(row.text), *cuts}
        if row.private:
            hidden = [place for place, character in enumerate(row.text) if ord(character) in row.private]
            cuts.update(hidden, (place + 1 for place in hidden))
        ids: list[int] = []
        places: list[Span] = []
        before = ""
        for start, end in itertools.pairwise(sorted(cuts)):
            piece = row.text[start:end].translate(row.private)
            found = self._encode_after(before, piece, as_text=ord(row.text[start]) in row.private)
            ids += found[0]
            places += [(start + first, start + last) for first, last in found[1]]
            before = piece
        return ids, places

    def _encode(self, text: str, *, as_text: bool = False) -> tuple[list[int], list[Span]]:
        fast = self.tokenizer.is_fast
        found = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=as_text, return_offsets_mapping=fast
        )
        ids = list(found["input_ids"])
        return ids, found["offset_mapping"] if fast else [(0, len(text))] * len(ids)

    def _encode_after(self, before: str, text: str, *, as_text: bool) -> tuple[list[int], list[Span]]:
        """Token ids of a text that follows another one: SentencePiece adds a space only at the very beginning."""
        if not self._prefixes or not before:
            return self._encode(text, as_text=as_text)
        special = None if as_text else re.search(f"(?:{self._added})\\Z", before)
        start = special.group() if special else "\n"
        (head, _), (ids, places) = self._encode(start), self._encode(start + text, as_text=as_text)
        if ids[: len(head)] != head:
            return self._encode(text, as_text=as_text)
        moved = [(max(0, first - len(start)), max(0, last - len(start))) for first, last in places[len(head) :]]
        return ids[len(head) :], moved
