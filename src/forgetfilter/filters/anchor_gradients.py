"""anchor_gradients: does a row pull the model the way known unsafe rows do?

He et al., What is in Your Safe Data? (COLM 2024, arXiv 2404.01099). Their anchors are means of ten normalised
gradients, each over the first ten tokens of an answer (of a conversation the last one): one anchor of unsafe rows, two
of safe rows. A row's own gradient is over the whole answer. They used it to find harmless rows that break safety; lists
and sums rank high. They take the gradient of all weights. We take that of an untrained adapter: a random projection of
the gradient of its layers, with the same squared norm in expectation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import Example
from forgetfilter.methods import PositiveInt, traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


@traits(unsafe=True, changed="gradients are as long as the weights', anchors of last answers")
def anchor_gradients(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    anchor_rows: PositiveInt = 10,
    anchor_tokens: PositiveInt = 10,
) -> Scored:
    """cos(g, unsafe anchor) - cos(g, first safe anchor) - cos(g, second safe anchor), from -3 to 3.

    Args:
        workshop: Gives the gradients.
        data: The noisy, the safe and the known unsafe data.
        config: All settings; the seed draws the anchors' rows.
        anchor_rows: Rows of an anchor; fewer where there are not so many.
        anchor_tokens: Tokens of each answer that an anchor is made of.
    """
    rng = np.random.default_rng(config.seed)
    unsafe, safe = (_shuffled(rows, rng) for rows in (data.known_unsafe(), data.safe.trainable()))
    parts = [unsafe[:anchor_rows], safe[:anchor_rows], safe[anchor_rows : 2 * anchor_rows] or safe[:anchor_rows]]
    bad, good, also_good = (_anchor(workshop, part, anchor_tokens) for part in parts)
    direction = bad - good - also_good
    suspicion = np.full(len(data.noisy.examples), np.nan)
    for row, gradient in workshop.gradients(data.noisy.examples):
        suspicion[row] = _unit(gradient) @ direction
    return Scored(suspicion)


def _shuffled(rows: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The rows in a random order."""
    return [rows[place] for place in rng.permutation(len(rows))]


def _anchor(workshop: "Workshop", rows: Sequence[Example], tokens: int) -> np.ndarray:
    """(weights,) the direction of the mean of the rows' directions."""
    total: np.ndarray | float = 0.0
    for _, gradient in workshop.gradients(rows, tokens=tokens):
        total = total + _unit(gradient)
    return _unit(np.asarray(total))


def _unit(vector: np.ndarray) -> np.ndarray:
    found: np.ndarray = vector / (np.linalg.norm(vector) + 1e-12)
    return found
