"""m0_loss: how much a row surprises M0, which trained on none of it.

A control that Zhao et al. (ICML 2024, arXiv 2312.12736) did not report: if M0's loss alone tells unsafe rows from
others, forgetting is not needed. It ranks rows as perplexity does (Wenzek et al., CCNet, LREC 2020, arXiv 1911.00359).
"""

from typing import TYPE_CHECKING

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


def m0_loss(workshop: "Workshop", data: Data, config: ForgetFilterConfig) -> Scored:
    """Mean loss of the completion's tokens under M0, in nats."""
    loss = -workshop.read(data.noisy.examples).log_likelihood
    return Scored(suspicion=loss)
