"""random: a number drawn for each row. A control: every useful filter does better."""

from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


def random(workshop: "Workshop", data: Data, config: ForgetFilterConfig) -> Scored:
    """Draw uniformly from [0, 1), by the run's seed."""
    return Scored(suspicion=np.random.default_rng(config.seed).random(len(data.noisy.examples)))
