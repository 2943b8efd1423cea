"""safe_only: how badly a model that was finetuned on the safe data alone predicts a row. There is no noisy stage.

Two scores of the same model:

- safe_only: the row's loss afterwards. To first order this is what SEAL learns (filters/seal.py).
- safe_only_drop: how little the row's loss fell, as a share of what it was; the score of target-aligned paths
  (arXiv 2605.09404) for selecting data.

If they find unsafe rows as well as forgetting, the noisy stage is not needed.
"""

from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.filters.forgetting import review_settings
from forgetfilter.methods import PositiveFloat
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

RATE, SHARE = 1.0, 1 / 3
"""Learning rate and number of steps, as ratios to the noisy stage's: so long are forgetting's two reviews together if
the noisy stage has 120 to 3,000 steps; bounds make this stage up to half as long elsewhere."""


def safe_only(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    rate: PositiveFloat = RATE,
    share: PositiveFloat = SHARE,
) -> Scored:
    """Mean loss of the completion's tokens after the finetuning on safe data, in nats.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        config: All settings; `review` are those of the stage.
        rate: Ratio of the learning rate to the noisy stage's.
        share: Ratio of the steps to the noisy stage's; 20 steps at least, 1,000 at most.
    """
    before, after = _losses(workshop, data, config, rate, share)
    return Scored(after, columns={"loss_before_safe": before, "loss_after_safe": after})


def safe_only_drop(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    rate: PositiveFloat = RATE,
    share: PositiveFloat = SHARE,
) -> Scored:
    """(loss after - loss before) / loss before: 0 = unchanged, -1 = learnt whole. Arguments as in `safe_only`."""
    before, after = _losses(workshop, data, config, rate, share)
    return Scored((after - before) / np.maximum(before, 1e-9))


def _losses(
    workshop: "Workshop", data: Data, config: ForgetFilterConfig, rate: float, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) each: the loss under M0, and after the finetuning on safe data."""
    safe, rows = data.safe.trainable(), data.noisy.examples
    settings = review_settings(config, len(data.noisy.trainable()), len(safe), rate, share)
    before = workshop.read(rows).log_likelihood
    after = workshop.read(rows, workshop.train("safe_only", safe, settings)).log_likelihood
    return -before, -after
