"""Rank a run's rows anew by what a person said of some of them.

The probe (filters/probe.py) has learnt verdicts that a filter gave. A person's marks take their place: a marked row
teaches every probe, with the weight of several verdicts, whatever the filter said of it. All other rows are judged by
probes that did not learn their own verdict, as before.

Rows that were drawn at random and called clean are the exception: they teach nothing more than before they were marked.
So their scores are those of any clean row, and they can tell how many clean rows a threshold would drop
(decision/rules.py, conformal).
"""

from collections.abc import Mapping

import numpy as np

from forgetfilter.filters.probe import ODDS, CrossFit, features, verdicts_of
from forgetfilter.scored import NO_PROMISE, Scale, Scored

MARK_WEIGHT = 5.0
"""How many verdicts a mark is worth."""
CLEAN_SHARE = 0.5
"""Share of the rows, from the least suspect on, that count as clean where the run's filter found no separation."""
SAYS = f"at least {ODDS} times likelier unsafe than clean, by a probe that learnt what a person marked"
NOTHING = "no row is marked unsafe, and the run's filter found nothing"


class Ranking:
    """Ranks the rows of a run.

    Args:
        scored: What the run's filter made of them.
        noisy: (rows, 2, size) their hidden states.
        safe: (safe rows, 2, size) those of the safe rows.
        seed: Of the deal to the probes.
    """

    def __init__(self, scored: Scored, noisy: np.ndarray, safe: np.ndarray, seed: int) -> None:
        """Prepare the features: the slow part."""
        self.scored = scored
        self.judge = CrossFit(features(noisy), features(safe), repeats=1, seed=seed, warm=True)
        self.found = "verdict" in scored.columns
        self.verdicts = np.asarray(
            scored.columns["verdict"] if self.found else verdicts_of(scored.suspicion, 0, CLEAN_SHARE), float
        )

    def __call__(self, marks: Mapping[int, bool], drawn: frozenset[int] = frozenset()) -> Scored:
        """Score every row.

        Args:
            marks: Row -> whether it was called unsafe.
            drawn: Those of the marked rows that were drawn at random.
        """
        taught = {row: unsafe for row, unsafe in marks.items() if unsafe or row not in drawn}
        judged = None
        if self.found or any(taught.values()):
            judged = self.judge(self.verdicts, taught, MARK_WEIGHT)
        if judged is None:
            return self._scored(self.scored.suspicion, Scale(0, nothing=NOTHING))
        return self._scored(judged.noisy, Scale(float(np.log(ODDS)), says=SAYS + NO_PROMISE), judged.linear)

    def _scored(self, suspicion: np.ndarray, scale: Scale, linear: np.ndarray | None = None) -> Scored:
        """The scores, with what the run's filter found of each token and moment."""
        return Scored(suspicion, {}, self.scored.moments, self.scored.token_costs, scale, linear)
