"""together: several filters as one, such as forgetting+column: the mean of the ranks that they give a row.

Vitel and Chhabra (arXiv 2511.04715) find that ranks combine better than values. A guard and forgetting see different
things, and their scores have different units.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.scored import Scored, ranks

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

JOIN = "+"
"""What stands between the filters' names."""


def together(names: Sequence[str]) -> Callable[["Workshop", Data, ForgetFilterConfig], Scored]:
    """The filter that ranks rows by the mean of their ranks by others, from 0 to 1."""

    def mean_rank(workshop: "Workshop", data: Data, config: ForgetFilterConfig) -> Scored:
        """A row that one of the filters does not score is ranked by the others; NaN if none scores it."""
        from forgetfilter.filters.scoring import scores_of

        columns = {name: scores_of(workshop, data, name).suspicion for name in names}
        places = np.array([ranks(scores) for scores in columns.values()])
        known = ~np.isnan(places)
        total, count = np.where(known, places, 0).sum(0), known.sum(0)
        return Scored(np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0), columns=columns)

    return mean_rank
