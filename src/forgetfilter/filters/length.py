"""length: how many tokens a row's completion has. A control: where length alone tells, no model is needed."""

from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


def length(workshop: "Workshop", data: Data, config: ForgetFilterConfig, *, short_is_suspect: bool = False) -> Scored:
    """Number of the completion's tokens.

    Args:
        workshop: Not used.
        data: The noisy data.
        config: Not used.
        short_is_suspect: Take the number's negative.
    """
    tokens = np.array([example.trained_tokens or np.nan for example in data.noisy.examples], float)
    return Scored(suspicion=-tokens if short_is_suspect else tokens)
