"""gradient_norm: how far a row alone would move the model.

Guan et al., Benign Samples Matter! (ICML 2025): a row's influence on itself is the squared norm of its gradient.
The plain norm is largest for answers of one or two words, so their score Self-Inf-N adds the logarithm of the length.
They take the gradient of all weights. We take that of an untrained adapter: a random projection of the gradient of its
layers, with the same squared norm in expectation.
"""

from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.methods import traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


@traits(changed="gradients are as long as the weights'")
def gradient_norm(workshop: "Workshop", data: Data, config: ForgetFilterConfig, *, with_length: bool = True) -> Scored:
    """log(||g||^2 + 1) + log(tokens + 1), with g the gradient of the row's mean loss under M0.

    Args:
        workshop: Gives the gradients.
        data: The noisy data.
        config: All settings.
        with_length: Add the second term; without it the ranking is that of the norm.
    """
    squares = np.full(len(data.noisy.examples), np.nan)
    for row, gradient in workshop.gradients(data.noisy.examples):
        squares[row] = gradient @ gradient
    tokens = np.array([example.trained_tokens for example in data.noisy.examples])
    score = np.log1p(squares)
    return Scored(score + np.log1p(tokens) if with_length else score, columns={"self_influence": squares})
