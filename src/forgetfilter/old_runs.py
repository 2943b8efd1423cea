"""Read runs of version 0.1.0, whose settings and files had other names.

In that version, the setting `signal` named the filter, and stages/NAME/signals.parquet held the log-probabilities and
answers of one model for each row.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.filters.forgetting import STAGES_OF_0_1, compared, token_costs
from forgetfilter.filters.forgetting_rouge1 import compared as answers_compared
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.runs import Run

DEFAULT_FILTER = "forgetting"
"""The filter of a run whose config.yaml names none: the default until version 0.2."""
FILTER_OF = {"log_likelihood": "forgetting", "rouge1": "forgetting_rouge1"}
"""Value of `signal` -> name of the filter today."""
STAGES = {"forgetting": STAGES_OF_0_1, "forgetting_rouge1": STAGES_OF_0_1[:3]}
"""Filter -> the stages whose signals it needs."""


def flags(found: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a config.yaml, under today's names."""
    today = dict(found)
    if "signal" in today:
        names = str(today.pop("signal")).replace(",", " ").split()
        today["filter"] = ",".join(FILTER_OF.get(name, name) for name in names)
    return {"filter": DEFAULT_FILTER, **today}


def is_scored(run: "Run", name: str) -> bool:
    """Whether a run of version 0.1.0 has the signals that a filter needs."""
    return name in STAGES and all(run.done(f"{stage}/signals") for stage in STAGES[name])


def scored(run: "Run", name: str, config: ForgetFilterConfig) -> Scored | None:
    """A filter's scores, from the signals that a run of version 0.1.0 stored; None if there are none."""
    if not is_scored(run, name):
        return None
    tables = [pq.read_table(run.stage(stage) / "signals.parquet") for stage in STAGES[name]]
    if name == "forgetting":
        known, before, after, last = (_numbers(table["log_likelihood"]) for table in tables)
        found = compared(known, before, after, last, config)
    else:
        known, before, after = (_numbers(table["rouge1"]) for table in tables)
        found = answers_compared(known, before, after, *(table["completion"].to_pylist() for table in tables[1:]))
    log_probs = [table["token_log_probs"].combine_chunks() for table in tables[1:]]
    found.token_costs = token_costs(log_probs[0], log_probs[1], log_probs[2] if len(log_probs) > 2 else None)
    return found


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), float)
