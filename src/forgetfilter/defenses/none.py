"""none: finetune on all of the noisy data ("no measure" in Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.inputs import Inputs, Result


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Finetune on everything."""
    return Result(inputs.train("none", inputs.noisy.trainable(), inputs.budget(config), inputs.start))
