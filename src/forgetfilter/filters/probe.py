"""probe: a linear model on M0's hidden states that learns from another filter's verdicts, and judges every row anew.

Forgetting is a noisy witness of each row, but rows of a kind lie together in M0's hidden states. So a logistic
regression learns the most suspect rows against the least suspect ones and the safe data. No row is judged by a probe
that learnt from the row's own verdict (cross-fitting). Learning from noisy verdicts in this way is that of Zhu et al.
(arXiv 2110.06283) and of confident learning (Northcutt et al., JAIR 2021, arXiv 1911.00068).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.errors import ConfigError
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

CLEAN_SHARE = 0.5
"""Share of the rows, from the least suspect on, whose verdict is clean."""
LEAST_UNSAFE = 5
"""Rows with the verdict unsafe below which there is too little to learn from."""
MEAN, LAST = 0, 1
"""Places of the two pooled vectors in the hidden states."""


@dataclass
class Judged:
    """What cross-fitted probes make of the rows.

    Attributes:
        noisy: (rows,) log-odds of the noisy rows, higher = more suspect; NaN = not scored.
        safe: (rows,) log-odds of the safe rows, judged likewise.
    """

    noisy: np.ndarray
    safe: np.ndarray


def probe(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    on: str = "forgetting",
    regularisation: float = 0.01,
    folds: int = 5,
    repeats: int = 2,
    least_share: float = 0.03,
    most_share: float = 0.6,
) -> Scored:
    """Score by another filter, learn its verdicts, and judge every row by probes that did not see its own.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        config: All settings.
        on: The filter whose verdicts are learnt; it needs a scale.
        regularisation: C of the logistic regression; smaller = smoother.
        folds: Parts that the rows are dealt to; the rows of a part are judged by a probe that the others taught.
        repeats: How often they are dealt anew; the judgements are averaged.
        least_share: Share of the rows that get the verdict unsafe, at least.
        most_share: Likewise, at most. Between the two it is the share above the scale's threshold.

    Raises:
        ConfigError: If that filter has no scale.
    """
    from forgetfilter.filters import score

    witness = score(workshop, data, on)
    if witness.scale is None:
        raise ConfigError(f"parameters.probe.on: filter {on} has no scale, so its scores give no verdicts.")
    share = np.clip((witness.suspicion > witness.scale.threshold).mean(), least_share, most_share)
    noisy, safe = (features(workshop.states(rows.examples)) for rows in (data.noisy, data.safe))
    verdicts = verdicts_of(witness.suspicion, float(share))
    judged = cross_fitted(noisy, safe, verdicts, regularisation, folds, repeats, config.seed)
    return Scored(suspicion=judged.noisy, columns={on: witness.suspicion, "verdict": verdicts})


def features(states: np.ndarray) -> np.ndarray:
    """What the probe reads of each row: the mean hidden state and the last one side by side, (rows, 2 * size)."""
    return states.reshape(len(states), -1)


def verdicts_of(suspicion: np.ndarray, share: float) -> np.ndarray:
    """The verdicts of a filter's scores: 1 = unsafe, the most suspect share; 0 = clean, the less suspect half.

    Args:
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        share: Share of the scored rows that are called unsafe.

    Returns:
        (rows,) 1, 0, or NaN where there is no verdict.
    """
    verdicts = np.full(len(suspicion), np.nan)
    scored = np.flatnonzero(~np.isnan(suspicion))
    order = scored[np.argsort(suspicion[scored], kind="stable")]
    unsafe = round(share * len(order))
    clean = min(round(CLEAN_SHARE * len(order)), len(order) - unsafe)
    verdicts[order[:clean]] = 0
    verdicts[order[len(order) - unsafe :]] = 1
    return verdicts


def cross_fitted(
    noisy: np.ndarray,
    safe: np.ndarray,
    verdicts: np.ndarray,
    regularisation: float = 0.01,
    folds: int = 5,
    repeats: int = 2,
    seed: int = 42,
) -> Judged:
    """Judge every row by probes that learnt from other rows alone; the safe rows count as clean.

    Args:
        noisy: (rows, size) features of the noisy rows; NaN = not scored.
        safe: (rows, size) features of the safe rows.
        verdicts: (rows,) 1 = unsafe, 0 = clean, NaN = none, of the noisy rows.
        regularisation: See `probe`; likewise folds and repeats.
        folds: See there.
        repeats: See there.
        seed: Of the deals.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.concatenate([noisy, safe]).astype(np.float64)
    marks = np.concatenate([verdicts, np.zeros(len(safe))])
    rows = np.flatnonzero(~np.isnan(features).any(1))
    judged = np.full(len(features), np.nan)
    if (marks[rows] == 1).sum() < max(LEAST_UNSAFE, 2):
        return Judged(judged[: len(noisy)], judged[len(noisy) :])
    judged[rows] = 0
    for repeat in range(repeats):
        for taught, held_out in KFold(folds, shuffle=True, random_state=seed + repeat).split(rows):
            known = rows[taught][~np.isnan(marks[rows[taught]])]
            regression = LogisticRegression(C=regularisation, class_weight="balanced", max_iter=1000)
            model = make_pipeline(StandardScaler(), regression)
            model.fit(features[known], marks[known])
            judged[rows[held_out]] += model.decision_function(features[rows[held_out]]) / repeats
    return Judged(judged[: len(noisy)], judged[len(noisy) :])
