"""self_judge: M0 itself is asked whether the answer is safe; what counts is how likely it finds "yes" and "no".

The cheapest judge there is, since M0 is at hand. Kadavath et al. (arXiv 2207.05221) read a model's belief in its own
answers from the likelihood of such a word.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import RowError
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import ChatTokenizer, Example, on_disk
from forgetfilter.data.turns import Turn, exchanges, shorter
from forgetfilter.methods import traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

VERSION = 2
"""Raised when the same settings give other scores than before: stored ones are then made anew."""

QUESTION = "Is this answer safe, that is: free of insults, stereotypes and anything that could harm people?"
YES, NO = "Yes", "No"
NOTHING = [("", "")]
"""What a row without an answer says."""


@traits(changed="the last answer that says something")
def self_judge(workshop: "Workshop", data: Data, config: ForgetFilterConfig, *, question: str = QUESTION) -> Scored:
    """Log P("No") - log P("Yes"), in nats.

    Args:
        workshop: Reads M0.
        data: The noisy data.
        config: All settings.
        question: What is asked of each row, after its last answer and what precedes it; yes means safe. Your own notion
            goes here.
    """
    chat = workshop.m0.chat
    source, said = data.noisy.source, []
    for word in (NO, YES):
        rows = (_answered(turns) or NOTHING for turns in source.turns(data.noisy.row_format))
        asked = on_disk((_asked(chat, *row[-1], question, word) for row in rows), source.scratch_folder)
        said.append(_totals(workshop.read(asked).token_log_probs, bool(chat.template.turn_ends)))
    suspicion = said[0] - said[1]
    unscored = [not example.scorable for example in data.noisy.examples]
    suspicion[unscored] = np.nan
    return Scored(suspicion)


def _answered(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """The exchanges of a row whose answer says something."""
    return [(prompt, answer) for prompt, answer in exchanges(turns) if answer.strip()]


def _asked(chat: ChatTokenizer, prompt: str, answer: str, question: str, word: str) -> Example:
    """The question as a row, with the word as its answer; texts that are too long lose a part."""
    while True:
        text = f"Question: {prompt}\n\nAnswer: {answer}" if prompt else answer
        asked = Turn("user", f"{text}\n\n{question} Answer {YES} or {NO}.", trained=False)
        try:
            example = chat.encode([asked, Turn("assistant", word, trained=True)])
        except RowError:  # the template refuses the text: the row has no score
            return Example([], [], 0, word, cut=False)
        if (example.scorable and not example.cut) or not (prompt or answer):
            return example
        prompt, answer = shorter(prompt, answer)


def _totals(log_probs: pa.ListArray, ended: bool) -> np.ndarray:
    """(rows,) log-likelihood of each word; NaN where there is none.

    Args:
        log_probs: (rows,) lists, a number a trained token.
        ended: Whether the last of them is the end token, which is left out.
    """
    last = -1 if ended else None
    return np.array([row.values.to_numpy()[:last].sum() if row.is_valid else np.nan for row in log_probs], float)
