"""Thresholds: from forgetting scores to the number above which a row is dropped. Knows no model."""

import math
from dataclasses import dataclass

import numpy as np

from forgetfilter.errors import DataError


@dataclass(frozen=True)
class Threshold:
    """What decides.

    Attributes:
        value: Rows with a forgetting score strictly above are dropped; None drops nothing.
        rule: Its name, for manifest and metrics.
        says: What it found or promises, in a sentence.
    """

    value: float | None
    rule: str
    says: str

    def drops(self, forgetting: np.ndarray) -> np.ndarray:
        """(rows,) bool; NaN (unscored) is never above a threshold."""
        return np.zeros(len(forgetting), bool) if self.value is None else forgetting > self.value


def fixed(value: float) -> Threshold:
    """The paper's rule: drop what was forgotten by more than phi."""
    return Threshold(value, "fixed", "set by hand: carries no promise about clean rows lost")


def drop_share(forgetting: np.ndarray, share: float) -> Threshold:
    """Drop the most forgotten share of the scored rows (ties at the edge stay)."""
    scored = np.sort(forgetting[~np.isnan(forgetting)])
    kept = len(scored) - round(share * len(scored))
    says = f"drops the most forgotten {share:.1%} of the scored rows, unsafe or not"
    if kept <= 0:
        return Threshold(-np.inf, "drop_share", says)
    return Threshold(float(scored[kept - 1]), "drop_share", says)


def conformal(forgetting: np.ndarray, trusted: np.ndarray, max_clean_loss: float) -> Threshold:
    """Drop a row iff its conformal p-value against the trusted rows is at most max_clean_loss.

    p = (1 + trusted rows forgotten at least as much) / (trusted rows + 1). Where the trusted rows are a
    random part of the clean ones, at most that share of the clean rows is dropped, in expectation over
    the draw (split conformal prediction; Bates et al. 2023, arXiv 2104.08279).

    Args:
        forgetting: (rows,) scores, higher = more forgotten; NaN = unscored.
        trusted: (rows,) bool, the rows a person marked clean.
        max_clean_loss: Share of the clean rows that may be dropped.

    Raises:
        DataError: If there are too few trusted rows for any p-value to be that small.
    """
    known = np.sort(forgetting[trusted & ~np.isnan(forgetting)])[::-1]
    needed = math.ceil(round(1 / max_clean_loss, 9)) - 1
    if len(known) < needed:
        looser = f", or allow --max_clean_loss {math.ceil(1000 / (len(known) + 1)) / 1000}" if len(known) else ""
        raise DataError(
            f"{len(known)} trusted rows are too few: a p-value of {max_clean_loss} takes {needed} rows marked clean "
            f"and scored. Mark more (`forgetfilter sample`){looser}."
        )
    above = math.floor(round(max_clean_loss * (len(known) + 1), 9)) - 1
    says = f"drops at most {max_clean_loss:.1%} of the scored clean rows, in expectation, by {len(known)} trusted rows"
    return Threshold(float(known[above]) if above < len(known) else -np.inf, "conformal", says)


LEAST_ROWS = 20
PAPERS_PHI = 0.1
"""The paper's threshold, for its own signal (rouge1)."""
FORGOTTEN = 0.135
"""Score from which a row counts as forgotten by log_likelihood."""
TAIL, FALLS = 0.1, 0.05
"""Share of clean rows above FORGOTTEN, and the score over which it falls to 1/e: read off explored clean data."""
NOTHING = 0.05
"""Gain of the noisy stage, in nats a token or in ROUGE-1, below which it has taught nothing."""
FALSE = 0.5
"""Share of the dropped rows that clean data's tail may account for."""


def automatic(forgetting: np.ndarray, signal: str = "log_likelihood", learnt: float = np.inf) -> Threshold:
    """Drop what was forgotten, where that is more than the tail every clean data set has.

    The score has a scale of its own (0 = nothing forgotten), so one threshold fits data of any unsafe share;
    looking for two groups does not, since the kinds of harmless rows form groups too (docs/paper_index.md).
    The threshold is the lowest from FORGOTTEN on above which clean data would hold at most half as many
    rows: Benjamini and Hochberg's procedure with the tail of clean data as null distribution. There is
    often none in clean data; where few rows are unsafe it lies higher.

    Args:
        forgetting: (rows,) scores, higher = more forgotten; NaN = unscored.
        signal: Whose they are.
        learnt: What the noisy stage gained on average, in the signal's unit: where it is next to nothing, nothing
            can be forgotten.
    """
    if learnt < NOTHING:
        return Threshold(
            None, "auto", f"nothing was learnt ({learnt:.3f} on average), so nothing can be forgotten: nothing dropped"
        )
    scores = np.sort(forgetting[~np.isnan(forgetting)])
    if signal == "rouge1":
        return Threshold(PAPERS_PHI, "auto", "the paper's phi for rouge1: no promise about clean rows lost")
    if len(scores) < LEAST_ROWS:
        return _nothing(f"{len(scores)} scored rows, too few to tell")
    candidates = np.array([FORGOTTEN, *np.nextafter(scores[scores > FORGOTTEN], -np.inf)])  # drops are strict
    above = len(scores) - np.searchsorted(scores, candidates, side="right")
    expected = len(scores) * TAIL * np.exp(-(candidates - FORGOTTEN) / FALLS)
    fits = np.flatnonzero((above > 0) & (expected <= FALSE * above))
    share = above[0] / len(scores)
    if len(fits) == 0:
        return _nothing(f"{share:.1%} of the rows forgotten by more than {FORGOTTEN}: too few to tell from clean data")
    value = float(candidates[fits[0]])
    shares = above[fits[0]] / len(scores), expected[fits[0]] / len(scores)
    says = "{:.1%} of the rows lie above, of clean data {:.1%} would".format(*shares)
    return Threshold(value, "auto", f"{says}; no promise about clean rows lost")


def _nothing(why: str) -> Threshold:
    return Threshold(None, "auto", f"no separation: nothing dropped ({why})")
