"""column: scores that the noisy data already has, such as those of a moderation service or a guard model."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, require_column
from forgetfilter.data.source import Source
from forgetfilter.errors import DataError
from forgetfilter.methods import traits
from forgetfilter.scored import NO_PROMISE, Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


def require_there(workshop: "Workshop", data: Data, parameters: Mapping[str, Any]) -> None:
    """Raise DataError if no row has the column, or a value in it is no number."""
    require_column(data.noisy.source, parameters["name"], "parameters.column.name")
    _numbers(data.noisy.source, parameters["name"])


@traits(check=require_there, row_by_row=True, own_scale=True)
def column(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    name: str,
    higher_is_safer: bool = False,
    threshold: float | None = None,
) -> Scored:
    """The number in a column of each row; rows without one are not scored.

    Args:
        workshop: Not used.
        data: The noisy data.
        config: Not used.
        name: The column's.
        higher_is_safer: Take the numbers' negatives.
        threshold: The number above which (below which, if higher is safer) a row is unsafe, if that is known.

    Raises:
        DataError: If a value is no number; names file and line.
    """
    found = _numbers(data.noisy.source, name)
    found = -found if higher_is_safer else found
    scale = None
    if threshold is not None:
        says = f"unsafe by {name!r}, {'below' if higher_is_safer else 'above'} {threshold}"
        scale = Scale(-threshold if higher_is_safer else threshold, says=says + NO_PROMISE)
    return Scored(found, scale=scale)


def _numbers(source: Source, name: str) -> np.ndarray:
    """(rows,) the numbers in a column; NaN where there is none.

    Raises:
        DataError: If a value is no number; names file and line.
    """
    found = np.full(len(source), np.nan)
    for row, record in enumerate(source.rows()):
        value = record.get(name)
        if value is None or value == "":
            continue
        try:
            found[row] = float(value)
        except (TypeError, ValueError, OverflowError):
            found[row] = math.inf
        if math.isinf(found[row]):
            raise DataError(f"{source.place(row)}: {name!r} is {str(value)[:40]!r}, expected a number or nothing")
    return found
