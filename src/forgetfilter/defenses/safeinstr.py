"""safeinstr: a few safety rows mixed into the finetuning data (Bianchi et al., ICLR 2024, arXiv 2309.07875).

The paper mixes 100 to 2,000 of them into 20,000 instructions; a tenth, its largest share, is taken here.
"""

import math

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.inputs import Inputs, Result, draw

SHARE = 0.1
"""Safety rows over rows of the finetuning data."""


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Finetune on the noisy data and a tenth as many safe rows."""
    noisy = inputs.noisy.trainable()
    mixed = [*noisy, *draw(inputs.safe.trainable(), math.ceil(SHARE * len(noisy)), config.seed)]
    return Result(inputs.train("safeinstr", mixed, inputs.budget(config, mixed), inputs.start))
