"""Rules: from a filter's scores to the number above which a row is dropped. Knows no model and no filter."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from forgetfilter.errors import DataError
from forgetfilter.scored import NO_PROMISE, Scale


@dataclass(frozen=True)
class Threshold:
    """A threshold and the rule that found it.

    Attributes:
        value: Rows with a score strictly above are dropped; None drops nothing.
        rule: The rule's name, for manifest and metrics.
        says: What the rule found or promises, in a sentence.
    """

    value: float | None
    rule: str
    says: str

    def drops(self, suspicion: np.ndarray) -> np.ndarray:
        """(rows,) bool; NaN (unscored) is never above a threshold."""
        return np.zeros(len(suspicion), bool) if self.value is None else suspicion > self.value


def fixed(value: float, nothing: str = "") -> Threshold:
    """The paper's rule: drop what scores above phi; `nothing` says why nothing can be found in the run, if so."""
    says = "set by hand: carries no promise about clean rows lost"
    return Threshold(value, "fixed", f"{says}; {nothing}" if nothing else says)


def drop_share(suspicion: np.ndarray, share: float) -> Threshold:
    """Drop the most suspect share of the scored rows (rows that score exactly the threshold stay)."""
    scored = np.sort(suspicion[~np.isnan(suspicion)])
    kept = len(scored) - round(share * len(scored))
    says = f"drops the most suspect {share:.1%} of the scored rows, unsafe or not"
    if not len(scored):
        return Threshold(None, "drop_share", says)
    if kept <= 0:  # a finite number just below the lowest score: JSON knows no infinity
        return Threshold(float(np.nextafter(scored[0], -np.inf)), "drop_share", says)
    return Threshold(float(scored[kept - 1]), "drop_share", says)


def conformal(suspicion: np.ndarray, trusted: np.ndarray, max_clean_loss: float) -> Threshold:
    """Drop a row iff its conformal p-value against the trusted rows is at most max_clean_loss.

    p = (1 + k) / (1 + n): n is the number of trusted rows, and k of them score at least as high as the row. If the
    trusted rows are drawn at random from the clean ones, at most max_clean_loss of the clean rows is dropped, in
    expectation over the draw (split conformal prediction; Bates et al. 2023, arXiv 2104.08279).

    Args:
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        trusted: (rows,) bool, the rows a person marked clean.
        max_clean_loss: Share of the clean rows that may be dropped.

    Raises:
        DataError: If there are too few trusted rows for any p-value to be that small.
    """
    known = np.sort(suspicion[trusted & ~np.isnan(suspicion)])[::-1]
    wanted = needed(max_clean_loss)
    if len(known) < wanted:
        looser = f", or allow --max_clean_loss {math.ceil(1000 / (len(known) + 1)) / 1000}" if len(known) else ""
        raise DataError(
            f"{len(known)} trusted rows are too few: a p-value of {max_clean_loss} takes {wanted} rows marked clean "
            f"and scored. Mark more (`forgetfilter sample`){looser}."
        )
    above = math.floor(round(max_clean_loss * (len(known) + 1), 9)) - 1
    share, count = percent(max_clean_loss), len(known)
    says = f"drops at most {share} of the scored clean rows, in expectation, by {count} trusted rows"
    return Threshold(float(known[above]) if above < len(known) else -np.inf, "conformal", says)


def percent(share: float) -> str:
    """A share that is promised, in words: not rounded to less."""
    return f"{100 * share:.6g}%"


def needed(max_clean_loss: float) -> int:
    """How many trusted rows it takes at least to promise that no larger share of the clean rows is dropped."""
    return math.ceil(round(1 / max_clean_loss, 9)) - 1


def raise_to_promise(found: Threshold, suspicion: np.ndarray, trusted: np.ndarray, max_clean_loss: float) -> Threshold:
    """A threshold, raised as far as trusted rows demand; the same where they are too few to demand anything.

    Args:
        found: The threshold.
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        trusted: (rows,) bool, the rows a person marked clean.
        max_clean_loss: Share of the clean rows that may be dropped.
    """
    if found.value is None or (trusted & ~np.isnan(suspicion)).sum() < needed(max_clean_loss):
        return found
    promise = conformal(suspicion, trusted, max_clean_loss)
    assert promise.value is not None
    says = f"{found.says.replace(NO_PROMISE, '', 1)}; {promise.says}"
    return Threshold(max(found.value, promise.value), found.rule, says)


LEAST_ROWS = 20
"""Fewest scored rows from which `automatic` finds a threshold."""
FALSE = 0.5
"""Largest share of the dropped rows that are expected to be clean."""


def automatic(suspicion: np.ndarray, scale: Scale | None) -> Threshold:
    """Drop the most suspect rows, if there are more of them than clean data would have.

    Clean data has a tail of high scores, too. Of n clean rows, this many score above t:

        expected(t) = n * tail * exp(-(t - threshold) / falls), with threshold, tail and falls of the scale

    The rule takes the lowest t >= threshold for which expected(t) is at most half of the rows above t. This is
    Benjamini and Hochberg's procedure with the tail of clean data as null distribution. If there is no such t, as is
    common in clean data, nothing is dropped. The fewer unsafe rows there are, the higher t is.

    Looking for two groups of scores does not work, since the kinds of harmless rows form groups, too
    (docs/paper/thresholds.md). Hence the rule needs a score whose values mean the same in every data set
    (0 = nothing forgotten).

    Args:
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        scale: What the rule may assume of the scores; None drops nothing.
    """
    if scale is None:
        why = "this filter's scores have no scale of their own: give a threshold, a share to drop, or trusted rows"
        return _nothing(why)
    if scale.nothing:
        return Threshold(None, "auto", f"{scale.nothing}: nothing dropped")
    if scale.kept is not None:
        found = Threshold(_within(suspicion, scale.kept), "auto", scale.says)
    elif scale.tail is None or scale.falls is None:
        found = Threshold(scale.threshold, "auto", scale.says)
    else:
        found = _beyond_tail(suspicion, scale.threshold, scale.tail, scale.falls)
    return dataclasses.replace(found, says=f"{found.says}; {scale.caveat}") if scale.caveat else found


def _within(suspicion: np.ndarray, share: float) -> float | None:
    """The score up to which this share of the scored rows lies; None where that is none of them."""
    scores = np.sort(suspicion[~np.isnan(suspicion)])
    kept = int(share * len(scores))
    return float(scores[kept - 1]) if kept else None


def _beyond_tail(suspicion: np.ndarray, least: float, tail: float, falls: float) -> Threshold:
    scores = np.sort(suspicion[~np.isnan(suspicion)])
    if len(scores) < LEAST_ROWS:
        return _nothing(f"{len(scores)} scored rows, too few to tell")
    # Rows strictly above a threshold are dropped, so one just below a row's score drops that row.
    candidates = np.array([least, *np.nextafter(scores[scores > least], -np.inf)])
    above = len(scores) - np.searchsorted(scores, candidates, side="right")
    expected = len(scores) * tail * np.exp(-(candidates - least) / falls)
    fits = np.flatnonzero((above > 0) & (expected <= FALSE * above))
    share = above[0] / len(scores)
    if len(fits) == 0:
        return _nothing(f"{share:.1%} of the rows score above {least}: too few to tell from clean data")
    value = float(candidates[fits[0]])
    shares = above[fits[0]] / len(scores), expected[fits[0]] / len(scores)
    says = "{:.1%} of the rows lie above, of clean data {:.1%} would".format(*shares)
    return Threshold(value, "auto", f"{says}{NO_PROMISE}")


def _nothing(why: str) -> Threshold:
    return Threshold(None, "auto", f"no separation: nothing dropped ({why})")
