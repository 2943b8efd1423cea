"""hidden_safe_noisy: a linear model on M0's hidden states, the noisy data against the safe data.

The probe (filters/probe.py) without forgetting: a control for what forgetting's verdicts add. Persona vectors
(arXiv 2507.21509) and probe-based data attribution (arXiv 2602.11079) score rows by such directions.
"""

from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.crossfit import CrossFit, features
from forgetfilter.data.loading import Data
from forgetfilter.scored import Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


def hidden_safe_noisy(workshop: "Workshop", data: Data, config: ForgetFilterConfig) -> Scored:
    """Log-odds that a row belongs to the noisy rather than to the safe data, by models that did not learn the row."""
    noisy, safe = (features(states) for states in workshop.states_of(data))
    judged = CrossFit(noisy, safe, seed=config.seed, alike=data.noisy.alike())(np.ones(len(noisy)))
    if judged is None:
        return Scored(
            np.full(len(noisy), np.nan), scale=Scale(0, nothing="there are too few noisy or safe rows to learn from")
        )
    return Scored(judged.noisy)
