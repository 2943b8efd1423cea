"""The result of a filter: a score for each row, and what explains the scores. Knows no model."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import rankdata

from forgetfilter.files import whole_file

SUSPICION, COLUMN, MOMENT, TOKENS = "suspicion", "column:", "moment:", "token_costs"
"""Names of a file's columns, or what they begin with."""
ABOUT = ("scale", "linear", "planted")
"""What a file's metadata hold, as JSON."""
ANSWER = "most_suspect_answer"
"""Column with the number of a conversation's most suspect answer, from 1."""
NO_SEPARATION = "no separation"
"""How Scale.nothing begins where no number was meant for the scores: they are ranks, or those of another filter."""
NO_PROMISE = "; no promise about clean rows lost"
"""How a rule says that it promises nothing."""


@dataclass(frozen=True)
class Scale:
    """What the automatic rule may assume of a filter's scores.

    Attributes:
        threshold: Score above which a row counts as suspect.
        tail: Share of the rows of clean data that score above it; None if the rule takes the threshold as it is.
        falls: How much higher the score must be for this share to fall to 1/e of itself.
        says: Whose threshold it is, if the rule takes it as it is.
        nothing: Why nothing can be found in this run, if nothing can.
        caveat: What makes the scale doubtful in this run, if anything does.
        quota: Whether a fixed share of the rows lies above the threshold, which then tells nothing of their number.
        kept: With a quota the share of the rows that lies within; the rule finds the threshold anew among all rows, of
            which copies and the answers of a conversation count one by one. None: the threshold as it is.
    """

    threshold: float
    tail: float | None = None
    falls: float | None = None
    says: str = ""
    nothing: str = ""
    caveat: str = ""
    quota: bool = False
    kept: float | None = None

    @property
    def separates(self) -> bool:
        """Whether a number means the same as in other runs: False after "no separation"."""
        return not self.nothing.startswith(NO_SEPARATION)


@dataclass
class Scored:
    """The result of a filter.

    Attributes:
        suspicion: (rows,) float, higher = more suspect; NaN = not scored.
        columns: What else scores.parquet should say of each row: (rows,) numbers, NaN = none, or texts.
        moments: For learning curves: moment -> (rows,) each row's log-likelihood or ROUGE-1 then, in order of time.
        token_costs: What each scored token of a row contributed, in nats: a list array of (rows,) lists, for shading.
        scale: What `auto` may assume of the scores; None where the filter knows no scale.
        linear: (size + 1,) weights and bias of a linear model on M0's pooled hidden states, which scores rows that the
            filter did not see (`forgetfilter score`); None where the filter has none.
        planted: Filter -> its suspicion of the planted rows (data.planted): the filter itself, then the witness that a
            probe has learnt from; None where none are planted.
    """

    suspicion: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    token_costs: pa.Array | None = None
    scale: Scale | None = None
    linear: np.ndarray | None = None
    planted: dict[str, np.ndarray] | None = None

    def _each(self, change: Callable[[np.ndarray], np.ndarray], token_costs: pa.Array | None) -> "Scored":
        """These scores with every array of them changed alike."""
        columns = {name: change(values) for name, values in self.columns.items()}
        moments = {name: change(values) for name, values in self.moments.items()}
        return replace(
            self, suspicion=change(self.suspicion), columns=columns, moments=moments, token_costs=token_costs
        )

    def spread(self, places: np.ndarray, rows: int) -> "Scored":
        """These scores as those of a larger data set's rows at the places given; the other rows have none.

        Args:
            places: Row numbers there, one for each row here.
            rows: How many rows there are.
        """
        here = np.full(rows, -1)
        here[places] = np.arange(len(places))

        def widened(values: np.ndarray) -> np.ndarray:
            nothing = np.nan if values.dtype.kind == "f" else None
            found: np.ndarray = np.where(here < 0, np.array(nothing), values[here])
            return found

        costs = None if self.token_costs is None else self.token_costs.take(pa.array(here, mask=here < 0))
        return self._each(widened, costs)

    def most_suspect(self, row_of: np.ndarray) -> "Scored":
        """These scores, of single answers, as those of the conversations: each has that of its most suspect answer.

        Its number, from 1, becomes a column for conversations whose answers differ in their scores. Token costs are
        joined.

        Args:
            row_of: For each answer the number of its conversation, in order, without gaps.
        """
        counts = np.bincount(row_of)
        starts = np.cumsum(counts) - counts
        known = np.where(np.isnan(self.suspicion), -np.inf, self.suspicion)
        parts = np.split(known, starts[1:])
        number = np.array([part.argmax() for part in parts])
        least = np.array([part.min() for part in parts])
        places, costs = starts + number, self.token_costs
        if costs is not None:
            joined = [costs.slice(start, count).flatten() for start, count in zip(starts, counts, strict=True)]
            costs = pa.array([one.to_numpy() if len(one) else None for one in joined], costs.type)
        found = self._each(lambda values: values[places], costs)
        found.columns[ANSWER] = np.where(least < known[places], number + 1.0, np.nan)
        return found

    def shared(self, places: np.ndarray, own: np.ndarray) -> "Scored":
        """These scores given to rows of which some say the same.

        Args:
            places: For each row, the place here whose scores it gets.
            own: (rows,) bool, whether that place has the row's own tokens; others get no token costs.
        """
        costs = None if self.token_costs is None else self.token_costs.take(pa.array(places, mask=~own))
        return self._each(lambda values: values[places], costs)

    def save(self, path: Path) -> None:
        """Write all of it to a Parquet file."""
        table: dict[str, Any] = {SUSPICION: pa.array(self.suspicion, from_pandas=True)}
        for prefix, columns in ((COLUMN, self.columns), (MOMENT, self.moments)):
            for name, values in columns.items():
                table[prefix + name] = pa.array(values, from_pandas=True)
        if self.token_costs is not None:
            table[TOKENS] = self.token_costs
        about = {
            "scale": json.dumps(None if self.scale is None else asdict(self.scale)),
            "linear": json.dumps(None if self.linear is None else self.linear.tolist()),
            "planted": json.dumps(self.planted and {name: own.tolist() for name, own in self.planted.items()}),
        }
        with whole_file(path) as temporary:
            pq.write_table(pa.table(table).replace_schema_metadata(about), temporary)

    @classmethod
    def load(cls, path: Path) -> "Scored":
        """Read what `save` wrote."""
        table = pq.read_table(path)
        about = {name: json.loads(table.schema.metadata.get(name.encode(), "null")) for name in ABOUT}
        scale, linear, planted = (about[name] for name in ABOUT)
        return cls(
            _values(table[SUSPICION]),
            _named(table, COLUMN),
            _named(table, MOMENT),
            table[TOKENS].combine_chunks() if TOKENS in table.column_names else None,
            None if scale is None else Scale(**scale),
            None if linear is None else np.array(linear),
            planted and {name: np.array(own, float) for name, own in planted.items()},
        )


def ranks(scores: np.ndarray) -> np.ndarray:
    """(rows,) ranks from 0 to 1; NaN stays."""
    places: np.ndarray = rankdata(scores, nan_policy="omit")
    shares: np.ndarray = (places - 1) / max(1, (~np.isnan(scores)).sum() - 1)
    return shares


def _named(table: pa.Table, prefix: str) -> dict[str, np.ndarray]:
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): _values(table[name]) for name in names}


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers with NaN for null, or texts with None."""
    values = column.to_numpy()
    return np.asarray(values if pa.types.is_string(column.type) else values.astype(float))
