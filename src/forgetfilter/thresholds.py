"""Thresholds: from forgetting scores to the number above which a row is dropped. Knows no model."""

import math
from dataclasses import dataclass

import numpy as np
from sklearn.mixture import GaussianMixture

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
        raise DataError(
            f"{len(known)} trusted rows are too few: a p-value of {max_clean_loss} takes {needed} rows marked clean "
            f"and scored. Mark more (`forgetfilter sample`), or allow --max_clean_loss {1 / (len(known) + 1):.3f}."
        )
    above = math.floor(round(max_clean_loss * (len(known) + 1), 9)) - 1
    says = f"drops at most {max_clean_loss:.1%} of the clean rows, in expectation, by {len(known)} trusted rows"
    return Threshold(float(known[above]) if above < len(known) else -np.inf, "conformal", says)


LEAST_ROWS = 20
SEPARATION = 1.6
"""Distance of the groups' means in standard deviations (Ashman's D) from which they count as apart."""
FORGOTTEN = 0.2
"""Share of what they had learnt that the rows above the threshold must have lost, median over median."""


def automatic(forgetting: np.ndarray, learnt: np.ndarray) -> Threshold:
    """Find the threshold in the scores themselves, or find that nothing separates.

    Two normal components of one spread are fitted to the scores. They count as two groups if they stand
    apart and if the upper group has lost a fair share of what it had learnt: the kinds of harmless rows
    also differ in how much they forget, but they lose little. The threshold is where a row is as likely
    to be of one group as of the other.

    Args:
        forgetting: (rows,) scores, higher = more forgotten; NaN = unscored.
        learnt: (rows,) signal after the noisy stage - signal of M0, in the same unit.
    """
    scored = ~np.isnan(forgetting)
    scores, gained = forgetting[scored], learnt[scored]
    if len(scores) < LEAST_ROWS:
        return _nothing(f"{len(scores)} scored rows, too few to see groups in")
    low, high, spread, value = _two_groups(scores)
    distance = (high - low) / spread
    upper = scores > value
    lost = np.median(scores[upper]) / max(np.median(gained[upper]), 1e-6) if upper.any() else 0.0
    found = f"groups at {low:.3f} and {high:.3f}, {distance:.1f} SD apart, the upper one lost {lost:.0%}"
    if distance < SEPARATION or lost < FORGOTTEN:
        return _nothing(found)
    return Threshold(value, "auto", f"{found} of what it had learnt; no promise about clean rows lost")


def _nothing(why: str) -> Threshold:
    return Threshold(None, "auto", f"no separation: nothing dropped ({why})")


def _two_groups(scores: np.ndarray) -> tuple[float, float, float, float]:
    """Means of the lower and the upper group, their common SD, and the score where they balance."""
    trimmed = np.clip(scores, *np.percentile(scores, [1, 99]))  # or a single outlier becomes a group
    mixture = GaussianMixture(2, covariance_type="tied", n_init=5, random_state=0).fit(trimmed[:, None])
    upper = int(np.argmax(mixture.means_[:, 0]))
    low, high = sorted(map(float, mixture.means_[:, 0]))
    grid = np.linspace(low, high, 1001)
    balance = np.argmax(mixture.predict_proba(grid[:, None])[:, upper] >= 0.5)
    return low, high, float(np.sqrt(mixture.covariances_[0, 0])), float(grid[balance])
