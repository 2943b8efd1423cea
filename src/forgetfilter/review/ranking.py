"""Rank a run's rows anew by what a person said of some of them.

The probe (filters/probe.py) learns what the run's filter decided. A person's marks take the place of these verdicts: a
marked row teaches with the weight of several verdicts, whatever the filter said of it. If the marks show that most rows
the filter found unsafe are clean, its unsafe verdicts teach nothing any more: the person means something else.

Rows that were drawn at random must be judged as if nobody had marked them, since they tell how many unsafe rows are
left, and how many clean rows a threshold drops (decision/rules.py, conformal). So what was said of them teaches only
probes that do not judge them; and if they were called clean, it teaches nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from forgetfilter.crossfit import MOST_VERDICTS, CrossFit, Judged, features, verdicts_of
from forgetfilter.filters.probe import CLEAN_SHARE, ODDS
from forgetfilter.scored import ANSWER, NO_PROMISE, Scale, Scored, ranks

MARK_WEIGHT = 5.0
"""How many verdicts a mark is worth."""
LOOKED, WORTH = 4, 0.3
"""The filter's unsafe verdicts count for nothing once LOOKED or more of these rows are marked and fewer than WORTH of
them are unsafe."""
LOOSE = 10.0
"""How little Platt's scaling is held back (scikit-learn's C): few marks, if well apart, may speak plainly."""
LEAST_OF_EACH, LOWEST = 3, -2.0
"""Marks of either kind from which on they set the threshold; log-odds below which it never lies."""
PROBABILITY = "probability_unsafe"
"""Column with the probability that a person would call the row unsafe, as far as the marks tell."""
SAYS = f"at least {ODDS} times as likely unsafe as clean, by a probe that learnt what a person marked"
NOTHING = "nothing can be learnt before a row is marked unsafe"


class Ranking:
    """Ranks the rows of a run.

    Args:
        scored: What the run's filter made of them.
        dropped: (rows,) bool, what it would drop.
        noisy: (rows, 2, size) their hidden states.
        safe: (safe rows, 2, size) those of the safe rows.
        seed: Of the deal to the probes.
        scratch_folder: A folder on whose disk the features of a wide model may lie; None for the system's own.

    Attributes:
        copies: (rows,) numbers, equal for rows whose hidden states are equal.
        verdicts: (rows,) what the filter says of each row.
        teaching: (rows,) those of them that teach.
    """

    def __init__(
        self,
        scored: Scored,
        dropped: np.ndarray,
        noisy: np.ndarray,
        safe: np.ndarray,
        seed: int,
        scratch_folder: Path | None = None,
    ) -> None:
        """Prepare the features: the slow part."""
        self.scored = scored
        self.judge = CrossFit(
            features(noisy), features(safe), repeats=1, seed=seed, quick=True, scratch_folder=scratch_folder
        )
        self.drops_any = bool(dropped.any())
        if "verdict" in scored.columns:
            verdicts = np.asarray(scored.columns["verdict"], float)
        else:
            verdicts = verdicts_of(scored.suspicion, 0, CLEAN_SHARE)
            verdicts[dropped] = 1
        self.verdicts, self.teaching = verdicts, _some(verdicts, seed)
        self.copies = -np.arange(1, len(noisy) + 1)
        self.copies[self.judge.scorable] = self.judge.groups[: int(self.judge.scorable.sum())]

    # threads that wait for each other take ten times as long where another program is busy, and gain little here
    @threadpool_limits.wrap(limits=1, user_api="blas")  # type: ignore[untyped-decorator]
    def __call__(self, marks: Mapping[int, bool], drawn: frozenset[int] = frozenset()) -> Scored:
        """Score every row.

        Args:
            marks: Row -> whether it was called unsafe.
            drawn: Those of the marked rows that were drawn at random.
        """
        taught = {row: unsafe for row, unsafe in marks.items() if unsafe or row not in drawn}
        marked = np.array(list(taught), int)
        told = np.isin(self.copies, self.copies[marked])  # also those that say the same
        verdicts = np.where(told, np.nan, self._believed(marks, drawn))
        judged = None
        if (self.drops_any and (verdicts == 1).any()) or any(taught.values()):
            judged = self.judge(verdicts, taught, MARK_WEIGHT, apart=drawn)
            if judged is None:
                judged = self._without_their_marks(verdicts, taught, drawn)
        if judged is None:
            return self._scored(self.scored.suspicion, Scale(0, nothing=NOTHING))
        own, platt = float(np.log(ODDS)), self._platt(verdicts, taught, marks)
        if platt is None:
            return self._scored(judged.noisy, Scale(own, says=SAYS + NO_PROMISE), judged.linear)
        slope, offset = platt
        threshold = float(np.clip((own - offset) / slope, LOWEST, own))
        found = self._scored(judged.noisy, Scale(threshold, says=SAYS + NO_PROMISE), judged.linear)
        found.columns[PROBABILITY] = expit(slope * judged.noisy + offset)
        return found

    def _without_their_marks(
        self, verdicts: np.ndarray, taught: Mapping[int, bool], drawn: frozenset[int]
    ) -> Judged | None:
        """What is learnt where nothing but some drawn rows is unsafe, so that no probe could do without one of them.

        They teach all probes. They themselves stand where they would without marks: as high as the filter ranks them.
        """
        unsafe = [row for row in drawn if taught.get(row)]
        judged = self.judge(verdicts, taught, MARK_WEIGHT, apart=drawn.difference(unsafe))
        if judged is not None:
            own = np.isin(self.copies, self.copies[unsafe]) & ~np.isnan(judged.noisy)
            places = np.nan_to_num(ranks(self.scored.suspicion)[own], nan=0.5)
            judged.noisy[own] = np.nanquantile(judged.noisy[~own], places)
        return judged

    def _platt(
        self, verdicts: np.ndarray, taught: Mapping[int, bool], marks: Mapping[int, bool]
    ) -> tuple[float, float] | None:
        """Slope and offset of Platt's scaling: log-odds that a person drops a row = slope * its score + offset.

        The probe takes many rows for clean of which nobody has said anything, so what it says of those that a person
        would drop is too low. The marked rows mend it, each judged by probes that learnt nothing of it. There must be
        some of either kind; otherwise, or if higher scores were not the likelier unsafe ones, there is no scaling.
        """
        if min(sum(marks.values()), len(marks) - sum(marks.values())) < LEAST_OF_EACH:
            return None
        odds = self.judge.untold(verdicts, taught, MARK_WEIGHT, marks)
        if len({marks[row] for row in odds}) < 2:
            return None
        line = LogisticRegression(C=LOOSE).fit([[value] for value in odds.values()], [marks[row] for row in odds])
        slope, offset = float(line.coef_[0, 0]), float(line.intercept_[0])
        return (slope, offset) if slope > 0 else None

    def _believed(self, marks: Mapping[int, bool], drawn: frozenset[int]) -> np.ndarray:
        """The filter's verdicts, without the unsafe ones if the marks speak against them."""
        looked = [unsafe for row, unsafe in marks.items() if self.verdicts[row] == 1 and row not in drawn]
        if len(looked) < LOOKED or sum(looked) >= WORTH * len(looked):
            return self.teaching
        return np.where(self.teaching == 1, np.nan, self.teaching)

    def _scored(self, suspicion: np.ndarray, scale: Scale, linear: np.ndarray | None = None) -> Scored:
        """The scores, with what the run's filter found of each token and moment."""
        columns = {name: values for name, values in self.scored.columns.items() if name == ANSWER}
        return Scored(suspicion, columns, self.scored.moments, self.scored.token_costs, scale, linear)


def _some(verdicts: np.ndarray, seed: int) -> np.ndarray:
    """MOST_VERDICTS of either kind at most, drawn at random: a fit then takes no longer however many rows there are.

    Args:
        verdicts: (rows,) 1 = unsafe, 0 = clean, NaN = none.
        seed: Of the draw.
    """
    rng, found = np.random.default_rng([seed, 2]), verdicts.copy()
    for kind in (0, 1):
        found[rng.permutation(np.flatnonzero(verdicts == kind))[MOST_VERDICTS:]] = np.nan
    return found
