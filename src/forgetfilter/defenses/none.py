"""none: finetune on all of the noisy data ("no measure" in Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended, budget
from forgetfilter.workshop import Workshop


def none(workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Defended:
    """Finetune on everything."""
    noisy = data.noisy.trainable()
    return Defended(workshop.train("none", noisy, budget(data, config, noisy), workshop.start))
