"""A row's text; each scored token is shaded by what it contributed to the score."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import RowError
from forgetfilter.data.templates import learns
from forgetfilter.data.tokenization import IGNORED, ChatTokenizer, Example
from forgetfilter.data.turns import Turn, text_of
from forgetfilter.runs import first_day
from forgetfilter.scored import Scored

LONGEST = 4000
"""Characters of a message shown; the rest is cut."""
NATS_A_LEVEL = 0.5
"""Nats that a token must contribute per level of shading; there are ten levels."""
Piece = tuple[list[str], str]
"""Texts of a stretch of scored tokens, and a digit for each: its level of shading."""


def load_chat(folder: Path, config: ForgetFilterConfig) -> ChatTokenizer | None:
    """The tokenizer that a run has kept, to split texts into tokens; None if it has none."""
    if not folder.is_dir():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return ChatTokenizer(tokenizer, config.max_length, first_day(config.output_dir))
    except Exception as error:  # the libraries raise many kinds, all meaning that the folder is damaged
        print(f"the report shades no tokens: {error}")
        return None


def costs_of(scored: Scored, row: int) -> np.ndarray | None:
    """What each scored token of a row contributed, in nats, if the filter says so."""
    if scored.token_costs is None or not scored.token_costs[row].is_valid:
        return None
    return np.asarray(scored.token_costs[row].values.to_numpy())


def shaded(
    turns: Sequence[Turn], lost: np.ndarray | None, chat: ChatTokenizer | None, longest: int = LONGEST
) -> list[list[Any]]:
    """Each message as [role, text, trained], and for a scored one, where it is known, its tokens and their levels.

    Args:
        turns: The row.
        lost: (scored tokens,) what each contributed, in nats.
        chat: The tokenizer they were scored with.
        longest: Characters shown of a message; what is cut is said.
    """
    pieces = [] if lost is None or chat is None else _pieces(turns, lost, chat, longest)
    found = []
    for turn in turns:
        if learns(turn) and pieces:
            found.append([turn.role, "", 1, *pieces.pop(0)])
        else:
            found.append([turn.role, cut(text_of(turn), longest), int(turn.trained)])
    return found


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning and how many characters are left out."""
    more = len(text) - longest
    return f"{text[:longest]}… ({more:,} more characters)" if more > 0 else text


def _pieces(turns: Sequence[Turn], lost: np.ndarray, chat: ChatTokenizer, longest: int) -> list[Piece]:
    """A piece for each trained message, in order; none where the tokens don't fit what was scored."""
    try:
        example = chat.encode(turns)
    except RowError:  # the chat template has changed since the run
        return []
    stretches = list(_stretches(example, lost))
    trained = sum(map(learns, turns))
    fits = len(stretches) == trained or (example.cut and len(stretches) < trained)
    if not fits or sum(map(len, stretches)) != len(lost):
        return []
    pieces = [_spelt(stretch, chat, longest) for stretch in stretches]
    if turns[0].role == "text":  # the first token of a text is read, not scored
        start = str(chat.tokenizer.decode(example.input_ids[:1], skip_special_tokens=True))
        pieces[0] = ([start, *pieces[0][0]], f"0{pieces[0][1]}")
    if example.cut:
        answers = [text_of(turn) for turn in turns if learns(turn)]
        pieces[-1] = _with_rest(pieces[-1], answers[len(stretches) - 1], longest)
    return pieces


def _with_rest(piece: Piece, whole: str, longest: int) -> Piece:
    """A message's beginning, as it was scored, and what follows it, as far as it is shown."""
    texts, levels = piece
    shown = "".join(texts).removesuffix("\ufffd")  # a character that the cut goes through
    inner, begun = whole.lstrip(), shown.lstrip()  # many templates take white space off
    if not inner.startswith(begun):  # too long to be shown, or not to be told
        return (texts, levels) if texts and texts[-1] == "…" else ([cut(whole, longest)], "0")
    rest = inner[len(begun) :]
    return [*texts, f"… {cut(rest, max(0, longest - len(shown)))}".rstrip()], f"{levels}0"


def _stretches(example: Example, lost: np.ndarray) -> Iterator[list[tuple[int, float]]]:
    """The scored tokens and their costs, a list for each stretch without a gap."""
    stretch: list[tuple[int, float]] = []
    costs = iter(lost.tolist())
    for label in [*example.labels[1:], IGNORED]:
        if label != IGNORED:
            stretch.append((label, next(costs, 0.0)))
        elif stretch:
            yield stretch
            stretch = []


def _spelt(stretch: Sequence[tuple[int, float]], chat: ChatTokenizer, longest: int) -> Piece:
    """Texts and levels of tokens. Tokens that make a character only together are merged; the turn's end is left out."""
    ends = set(chat.tokenizer.get_added_vocab().values())
    tokens = stretch[:-1] if stretch[-1][0] in ends else stretch
    texts, levels, shown = [], "", 0
    before: list[int] = []  # the token before: some decoders drop a space where a text begins
    ids: list[int] = []
    nats = 0.0
    for number, (token, lost) in enumerate(tokens):
        ids, nats = [*ids, token], nats + lost
        text = str(chat.tokenizer.decode([*before, *ids]))[len(str(chat.tokenizer.decode(before))) :]
        if text.endswith("\ufffd") and len(ids) < 8 and number < len(tokens) - 1:
            continue
        texts.append(text)
        levels += str(min(9, max(0, int(nats / NATS_A_LEVEL))))
        before, ids = ids, []
        nats = 0.0
        shown += len(text)
        if shown > longest:
            texts.append("…")
            levels += "0"
            break
    return texts, levels
