"""larf: is a row's hidden state nearer to known unsafe rows than to safe ones?

Li et al., LARF (EMNLP 2025): 100 unsafe rows, the same prompts answered by refusals, and the hidden state of the last
token at a safety-sensitive layer. In their code the largest 100 of the 100 differences of cosines are averaged, which
is all of them, so the score is a difference of two means, and the two sets of rows need no pairing. They pick the
layer by what scaling it does to refusals. We take half depth, where the probe reads.
"""

from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.methods import traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


@traits(unsafe=True)
def larf(workshop: "Workshop", data: Data, config: ForgetFilterConfig) -> Scored:
    """Mean cosine to the known unsafe rows' hidden states, minus that to the safe rows', from -2 to 2."""
    noisy, safe = (_directions(states) for states in workshop.states_of(data))
    unsafe = _directions(workshop.states(data.known_unsafe(), "unsafe"))
    return Scored(noisy @ np.nanmean(unsafe, 0) - noisy @ np.nanmean(safe, 0))


def _directions(states: np.ndarray) -> np.ndarray:
    """(rows, size) the last token's states, each of length 1; NaN = cannot be scored."""
    last = states[:, 1].astype(np.float64)
    found: np.ndarray = last / np.linalg.norm(last, axis=1, keepdims=True)
    return found
