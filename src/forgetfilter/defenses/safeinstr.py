"""safeinstr: a few safety rows mixed into the finetuning data (Bianchi et al., ICLR 2024, arXiv 2309.07875).

The paper mixes 100 to 2,000 of them into 20,000 instructions; a tenth, its largest share, is the default here.
"""

import math

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended, budget, draw
from forgetfilter.methods import NonNegativeFloat
from forgetfilter.workshop import Workshop


def safeinstr(
    workshop: Workshop, data: Data, config: ForgetFilterConfig, *, safe_share: NonNegativeFloat = 0.1
) -> Defended:
    """Finetune on the noisy data and some safe rows.

    Args:
        workshop: Trains models.
        data: The noisy and the safe data.
        config: All settings.
        safe_share: Ratio of safe rows to noisy rows.
    """
    noisy = data.noisy.trainable()
    mixed = [*noisy, *draw(data.safe.trainable(), math.ceil(safe_share * len(noisy)), config.seed)]
    return Defended(workshop.train("safeinstr", mixed, budget(data, config, mixed), workshop.start))
