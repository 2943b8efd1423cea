"""The forgetting score: how much the reviews made each row forget, from what the stages stored. Knows no model."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from forgetfilter.config import looks_of
from forgetfilter.errors import RunError
from forgetfilter.runs import Run

LEAST_LEARNT = 0.3
"""Nats a token that a row counts as having learnt at least: what was known before is no measure."""
FIRM = 0.6
"""Weight of what the firm review cost beside what the gentle one did: it costs harmless rows more, too."""


@dataclass
class Signals:
    """What the stages stored of every row, as (rows,) arrays of the signal that decides; NaN = unscored."""

    name: str
    base: np.ndarray
    before: np.ndarray
    after: np.ndarray
    firm: np.ndarray | None = None

    @property
    def learnt(self) -> float:
        """What the noisy stage gained on average, in the unit of the signal."""
        gained = self.before - self.base
        return float(np.mean(gained[~np.isnan(gained)])) if not np.isnan(gained).all() else 0.0

    @property
    def forgetting(self) -> np.ndarray:
        """The forgetting score; higher = more forgotten = more suspect.

        For rouge1 the paper's: signal before the review - signal after it. For log_likelihood the larger of two
        such losses, in nats a token: after a gentle review, which a stereotype does not survive, and, at a
        discount, after a firm one that follows it, which free text takes to be forgotten. It is divided by the
        square root of the nats the noisy stage had gained: half way between what was lost and which share of the
        learnt was lost, since long free text loses many nats of very many and a short answer few of few
        (docs/paper_index.md has the figures).
        """
        lost: np.ndarray = self.before - self.after
        if self.firm is None:
            return lost
        lost = np.maximum(lost, FIRM * (self.before - self.firm))
        learnt = np.maximum(self.before - self.base, LEAST_LEARNT)
        return np.asarray(lost / np.sqrt(learnt))


def stored_signals(run: Run, name: str) -> Signals:
    """Read one signal from the stages of a run.

    Raises:
        RunError: If a stage has not been scored, or its file is damaged.
    """
    columns = []
    for stage in looks_of([name]):
        if not run.done(f"{stage}/signals"):
            raise RunError(f"{run.folder}: its {stage} stage has no scores yet. Finish it with `filter`.")
        column = pq.read_table(run.stage(stage) / "signals.parquet", columns=[name])[name]
        columns.append(column.to_numpy().astype(float))
    return Signals(name, *columns)
