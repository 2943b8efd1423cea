"""safety_finetuning: after the noisy data, finetune on the safe data (Zhao et al., ICML 2024, arXiv 2312.12736)."""

from dataclasses import replace

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended, safe_budget
from forgetfilter.workshop import Workshop


def safety_finetuning(workshop: Workshop, data: Data, config: ForgetFilterConfig, tuned: Defended) -> Defended:
    """Finetune on the safe rows, for the same number of epochs as on the noisy ones."""
    safe = data.safe.trainable()
    model = workshop.train("safety_finetuning", safe, safe_budget(data, config), tuned.model)
    return replace(tuned, model=model)
