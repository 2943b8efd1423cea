"""none: finetune on all of the noisy data ("no measure" in Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.inputs import Inputs, Result


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Finetune on everything."""
    noisy = inputs.noisy.trainable()
    return Result(inputs.train("none", noisy, inputs.budget(config, noisy), inputs.start))
