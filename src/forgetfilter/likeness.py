"""Whether the rows that are dropped are of the kind of the safe ones, by the words of their prompts."""

import numpy as np

from forgetfilter.data.builtin import UNSPACED
from forgetfilter.data.loading import Rows
from forgetfilter.data.turns import exchanges

WORD = rf"[{UNSPACED}]|\b\w\w+\b"
"""A word of two letters or more; in scripts without spaces between words, a letter."""
LOOKED_AT, NEAREST = 500, 5
"""Rows of each sort that are looked at, drawn at random, and how many safe rows each is held against."""


def nearer_to_safe(noisy: Rows, dropped: np.ndarray, safe: Rows) -> float:
    """How often a dropped row's prompt is more like those of the safe rows than a kept row's is: an AUROC.

    What a review of safe rows makes the model forget should be of their kind: other answers to the same sort of
    prompts. If it has made the model forget something else, dropped rows resemble the safe ones no more than kept ones
    do: 0.5.
    How like the safe ones a prompt is: the mean cosine of TF-IDF to the NEAREST ones.

    Args:
        noisy: The noisy rows.
        dropped: (rows,) bool, which of them would be dropped; of the first rows, if there are more.
        safe: The safe rows.

    Returns:
        NaN where no row is dropped, all are, or no prompt has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    gone, kept = (rng.permutation(np.flatnonzero(which))[:LOOKED_AT] for which in (dropped, ~dropped))
    if not len(gone) or not len(kept):
        return float("nan")
    theirs = prompts(safe, rng.permutation(len(safe.examples))[:LOOKED_AT])
    own = prompts(noisy, np.concatenate([gone, kept]))
    try:
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD).fit([*own, *theirs])
    except ValueError:  # of prompts of symbols
        return float("nan")
    likeness = (words.transform(own) @ words.transform(theirs).T).toarray()
    nearest = np.sort(likeness, axis=1)[:, -NEAREST:].mean(1)
    return float(roc_auc_score(np.arange(len(own)) < len(gone), nearest))


def prompts(rows: Rows, places: np.ndarray) -> list[str]:
    """What precedes the last answer of some rows; of plain text, all of it."""
    said = rows.source.select(places.tolist()).turns(rows.row_format)
    pairs = [exchanges(turns)[-1] for turns in said]
    return [prompt or answer for prompt, answer in pairs]
