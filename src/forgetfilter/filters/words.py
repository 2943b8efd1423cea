"""words: naive Bayes on words, the noisy data against the safe data.

A control: if words alone tell unsafe rows from others, no model is needed. DSIR selects data by the same kind of
likelihood ratio, of bags of words (Xie et al., NeurIPS 2023, arXiv 2302.03169).
"""

from typing import TYPE_CHECKING, Annotated

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import read_row
from forgetfilter.data.loading import Data, Rows
from forgetfilter.errors import DataError
from forgetfilter.methods import Least, traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

VERSION = 2
"""Raised when the same settings give other scores than before: stored ones are then made anew."""


@traits(changed="the answers of a conversation are dealt together")
def words(
    workshop: "Workshop", data: Data, config: ForgetFilterConfig, *, folds: Annotated[int, Least(2)] = 5
) -> Scored:
    """Log-odds that a row belongs to the noisy rather than to the safe data, by the words of all its messages.

    Args:
        workshop: Not used.
        data: The noisy and the safe data.
        config: Seed of the deal.
        folds: Number of parts of the data; each part's rows are scored by a classifier fitted on the other parts.

    Raises:
        DataError: If no row has a word, there are fewer rows than parts, or one noisy or safe row alone.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import MultinomialNB

    noisy, safe = texts(data.noisy), texts(data.safe)
    try:
        counts = CountVectorizer().fit_transform([*noisy, *safe])
    except ValueError as error:  # of rows of symbols
        raise DataError(f"{data.noisy.source.name}: filter words finds no word in its rows.") from error
    sides = np.array([1] * len(noisy) + [0] * len(safe))
    belongs = data.noisy.belongs  # the answers of a conversation: each holds all before it, so they are dealt together
    groups = None if belongs is None else np.append(belongs, belongs.max() + 1 + np.arange(len(safe)))
    apart = len(sides) if groups is None else len(np.unique(groups))
    if min(apart, max(len(noisy), len(safe))) < folds or min(len(noisy), len(safe)) < 2:
        raise DataError(
            f"{data.noisy.source.name}: filter words needs {folds} rows, one for each of its parts, and two noisy and "
            "two safe ones."
        )
    deal = StratifiedKFold if groups is None else StratifiedGroupKFold
    parts = deal(folds, shuffle=True, random_state=config.seed)  # unsafe rows may lie all in one place
    odds = cross_val_predict(MultinomialNB(), counts, sides, groups=groups, cv=parts, method="predict_log_proba")
    return Scored(suspicion=(odds[:, 1] - odds[:, 0])[: len(noisy)])


def texts(rows: Rows) -> list[str]:
    """What each row says, all its messages."""
    conversations = (read_row(record, rows.row_format) for record in rows.source.rows())
    return [" ".join(turn.content for turn in turns) for turns in conversations]
