"""Rows that a model can hardly read: ciphers, encodings, walls of symbols. No score says anything about them.

A tokenizer cuts what its model was trained on into long pieces, and everything else into short ones. So a text is
called unreadable if its words of Latin letters take twice as many tokens a letter as plain English does, or if all of
it takes 2.75 times as many a byte; whether letters are capitals makes no difference. Languages that the tokenizer has
learnt stay below, others do not (docs/limits.md names some). Ciphers such as Walnut53 (Halawi et al.,
ICML 2024, arXiv 2406.20053), rot13 and base64 lie above. A text that hides its meaning in plain words (EndSpeak, from
the same paper) does not show.
"""

import re
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

from forgetfilter.data.builtin import builtin_rows
from forgetfilter.data.formats import REASONING
from forgetfilter.data.lazy import in_parts
from forgetfilter.data.source import Source
from forgetfilter.data.turns import Turn
from forgetfilter.progress import PATIENCE, progress

LETTERS, BYTES = 2.0, 2.75
"""How many times as many tokens a letter, or a byte, as English makes a text unreadable."""
DOUBTFUL = 1.5
"""A text with fewer tokens a byte than this many times those of English is looked at no further."""
SHORTEST = 20
"""Letters or bytes below which nothing is said of a text."""
LONGEST, PIECES = 120, 128
"""Characters that are looked at together, and how often in a text: beyond LONGEST * PIECES there are gaps. In a longer
piece plain words hide a cipher beside them."""
AT_ONCE = 1000
"""Rows that are looked at at once."""
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, float] = WeakKeyDictionary()
"""Tokenizer -> its tokens a byte of plain English: `score` asks for each part of the rows."""
WORD = re.compile(r"[^\W\d_]+")
DIGITS_AND_SPACE = re.compile(r"[\d\s]+")


def unreadable(source: Source, row_format: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(rows,) bool, whether any turn of a row, or all of them together, can hardly be read by the tokenizer's model.

    Args:
        source: The rows, none of them malformed.
        row_format: Their format.
        tokenizer: The model's.
    """
    plain = _of_english(tokenizer)
    found = np.zeros(len(source), bool)
    with progress("looking for unreadable rows", len(source), "rows", after=PATIENCE) as bar:
        for number, part in enumerate(in_parts(source.turns(row_format), AT_ONCE)):
            rows, texts = _texts(part)
            whole = _tokens_a_byte([DIGITS_AND_SPACE.sub(" ", text.lower()) for text in texts], tokenizer)
            doubtful = np.flatnonzero(whole > DOUBTFUL * plain)
            letters = _tokens_a_byte([_latin(texts[place]) for place in doubtful], tokenizer)
            over = doubtful[(whole[doubtful] > BYTES * plain) | (letters > LETTERS * plain)]
            found[[number * AT_ONCE + rows[place] for place in over]] = True
            bar.update(len(part))
    return found


def _of_english(tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens a byte of plain English: the answers in the box."""
    if tokenizer not in _KNOWN:
        english = [row["messages"][-1]["content"] for row in builtin_rows() if row["language"] == "en"]
        _KNOWN[tokenizer] = float(np.nanmedian(_tokens_a_byte([_latin(text) for text in english], tokenizer)))
    return _KNOWN[tokenizer]


def _texts(conversations: Iterable[Sequence[Turn]]) -> tuple[list[int], list[str]]:
    """What is looked at together, with the row's number: pieces of long turns, and all short turns of a row."""
    rows, texts = [], []
    for row, turns in enumerate(conversations):
        said = [str(text) for turn in turns for text in (turn.content, *map(turn.extra.get, REASONING)) if text]
        long = [text for text in said if len(text) >= SHORTEST]
        short = "\n".join(text for text in said if len(text) < SHORTEST)
        own = [piece for text in long for piece in _pieces(text)] + ([short] if short else [])
        rows += [row] * len(own)
        texts += own
    return rows, texts


def _pieces(text: str) -> list[str]:
    """The text, or as many pieces of it as cover it, PIECES at most, at equal distances from its start to its end."""
    count = min(PIECES, -(-len(text) // LONGEST))
    starts = np.linspace(0, max(0, len(text) - LONGEST), count).astype(int)
    return [text[start : start + LONGEST] for start in starts.tolist()]


def _latin(text: str) -> str:
    """The words that consist of Latin letters without accents, in lower case."""
    return " ".join(word for word in WORD.findall(text.lower()) if word.isascii())


def _tokens_a_byte(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(texts,) tokens for each byte that is no space; NaN for texts that are too short."""
    if not texts:
        return np.zeros(0)
    tokens = np.zeros(len(texts))
    for first in range(0, len(texts), AT_ONCE):  # long rows have many pieces
        encoded = tokenizer(list(texts[first : first + AT_ONCE]), add_special_tokens=False)["input_ids"]
        tokens[first : first + AT_ONCE] = [len(ids) for ids in encoded]
    sizes = np.array([len(text.replace(" ", "").encode()) for text in texts])
    return np.where(sizes < SHORTEST, np.nan, tokens / np.maximum(sizes, 1))
