"""Read runs of version 0.1.0, whose settings and files had other names.

In that version, stages/NAME/signals.parquet held the log-probabilities and answers of one model for each row. Its
settings are renamed in runs.py (`todays_flags`).
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.filters.forgetting import forgetting_scores, token_costs
from forgetfilter.filters.forgetting_rouge1 import rouge1_scores
from forgetfilter.runs import Run
from forgetfilter.scored import Scored

STAGES = {"forgetting": ("base", "noisy", "review", "firm"), "forgetting_rouge1": ("base", "noisy", "review")}
"""Filter -> the stages whose signals it needs, in the order that its scores are computed from."""


def scored(run: Run, name: str, config: ForgetFilterConfig) -> Scored | None:
    """A filter's scores, from the signals that a run of version 0.1.0 stored; None if there are none."""
    if name not in STAGES or not all(run.done(f"{stage}/signals") for stage in STAGES[name]):
        return None
    tables = [pq.read_table(run.stage(stage) / "signals.parquet") for stage in STAGES[name]]
    if name == "forgetting":
        known, before, after, last = (_numbers(table["log_likelihood"]) for table in tables)
        found = forgetting_scores(known, before, after, last, config)
    else:
        known, before, after = (_numbers(table["rouge1"]) for table in tables)
        found = rouge1_scores(known, before, after, *(table["completion"].to_pylist() for table in tables[1:]))
    log_probs = [table["token_log_probs"].combine_chunks() for table in tables[1:]]
    found.token_costs = token_costs(log_probs[0], log_probs[1], log_probs[2] if len(log_probs) > 2 else None)
    return found


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), float)
