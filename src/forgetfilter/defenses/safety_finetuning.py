"""safety_finetuning: after the noisy data, finetune on the safe data (Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.inputs import Inputs, Result


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Finetune on everything, then on the safe rows, for as many epochs."""
    noisy, safe = inputs.noisy.trainable(), inputs.safe.trainable()
    start = inputs.train("none", noisy, inputs.budget(config, noisy), inputs.start)
    return Result(inputs.train("safety_finetuning", safe, inputs.review(config), start))
