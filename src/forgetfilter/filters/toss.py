"""toss: which tokens does a model finetuned on unsafe rows like, and one finetuned on safe rows does not?

TOSS (ICLR 2026, arXiv 2603.01185): two reference adapters, one trained on known unsafe rows, one on good rows. A
token's score is its loss under the good one minus that under the bad one. They train on what is left once the worst
fifth of all tokens is masked (defenses/toss_tokens.py); here a row's score is the mean over its tokens. Their second
round, TOSS-Pro, trains the bad reference anew on the rows that scored highest. Here these join the known rows, as many
as they are: mixture and number are ours.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.lazy import chosen
from forgetfilter.data.loading import Data
from forgetfilter.filters.forgetting import review_settings
from forgetfilter.methods import PositiveFloat, PositiveInt, traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


@traits(unsafe=True, changed="no known row is added")
def toss(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    rate: PositiveFloat = 1.0,
    share: PositiveFloat = 1 / 3,
    rounds: PositiveInt = 1,
) -> Scored:
    """Mean of the tokens' scores, in nats.

    Args:
        workshop: Trains and reads models.
        data: The noisy, the safe and the known unsafe data.
        config: All settings; `review` are those of the references' stages.
        rate: Ratio of the references' learning rate to the noisy stage's.
        share: Ratio of the references' steps to the noisy stage's; 20 at least, 1,000 at most.
        rounds: 2 is TOSS-Pro, by our reading. Each further round adds as many of the highest rows as are known to be
            unsafe and are not among them, at most half of all.
    """
    rows, safe, known = data.noisy.examples, data.safe.trainable(), data.known_unsafe()
    settings = review_settings(config, len(data.noisy.trainable()), len(safe), rate, share)
    good = workshop.read(rows, workshop.train("toss_safe", safe, settings)).token_log_probs
    known_ids = {tuple(row.input_ids) for row in known}
    belongs, whole = data.noisy.belongs, data.noisy.whole
    conversations = rows if belongs is None or whole is None else chosen(whole, belongs)
    is_known = [tuple(row.input_ids) in known_ids for row in conversations]
    unsafe = known
    for _ in range(rounds):
        bad = workshop.read(rows, workshop.train("toss_unsafe", unsafe, settings)).token_log_probs
        costs = [_difference(bad[row], good[row]) for row in range(len(rows))]
        suspicion = np.array([np.nan if own is None else own.mean() for own in costs])
        most = min(len(known), len(data.noisy.trainable()) // 2)
        others = np.where(is_known, np.nan, suspicion)
        highest = np.argsort(-np.nan_to_num(others, nan=-np.inf), kind="stable")[:most]
        highest = highest[np.isfinite(others[highest])]
        unsafe = [*known, *(rows[row] for row in highest)]
    return Scored(suspicion, token_costs=pa.array(costs, pa.list_(pa.float32())))


def _difference(bad: pa.ListScalar, good: pa.ListScalar) -> np.ndarray | None:
    """(tokens,) how much likelier the bad reference finds each token; None for a row that cannot be scored."""
    if not bad.is_valid:
        return None
    found: np.ndarray = bad.values.to_numpy() - good.values.to_numpy()
    return found
