"""safety_finetuning: after the noisy data, finetune on the safe data (Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Result, budget, safe_budget
from forgetfilter.workshop import Workshop


def safety_finetuning(workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Result:
    """Finetune on all noisy rows, then on the safe rows, for the same number of epochs."""
    noisy, safe = data.noisy.trainable(), data.safe.trainable()
    start = workshop.train("none", noisy, budget(data, config, noisy), workshop.start)
    return Result(workshop.train("safety_finetuning", safe, safe_budget(data, config), start))
