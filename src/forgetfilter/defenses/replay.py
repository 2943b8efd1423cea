"""replay: as many safe rows as there are noisy ones, trained together (Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended, budget, draw
from forgetfilter.workshop import Workshop


def replay(workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Defended:
    """Finetune on the noisy rows and an equal number of safe rows, repeated if there are fewer."""
    noisy = data.noisy.trainable()
    mixed = [*noisy, *draw(data.safe.trainable(), len(noisy), config.seed)]
    return Defended(workshop.train("replay", mixed, budget(data, config, mixed), workshop.start))
