"""replay: as many safe rows as there are noisy ones, trained together (Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.inputs import Inputs, Result, draw


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Finetune on the noisy data and as many safe rows, each as often as it takes."""
    noisy = inputs.noisy.trainable()
    mixed = [*noisy, *draw(inputs.safe.trainable(), len(noisy), config.seed)]
    return Result(inputs.train("replay", mixed, inputs.budget(config, mixed), inputs.start))
