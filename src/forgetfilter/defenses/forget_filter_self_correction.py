"""forget_filter_self_correction: both defenses combined ("FF + SC" in Zhao et al., ICML 2024, arXiv 2312.12736)."""

import dataclasses

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.keeping import filter_rows
from forgetfilter.defenses.result import Defended
from forgetfilter.defenses.self_correction import CORRECTED_SHARE, finetuned_with_sentence, require_prompts
from forgetfilter.methods import NonNegativeFloat, traits
from forgetfilter.workshop import Workshop


@traits(keeps_by="forgetting", check=require_prompts)
def forget_filter_self_correction(
    workshop: Workshop, data: Data, config: ForgetFilterConfig, *, corrected_share: NonNegativeFloat = CORRECTED_SHARE
) -> Defended:
    """Filter, then finetune on the kept rows and on safe rows with the self-correction sentence.

    Args:
        workshop: Trains models.
        data: The noisy and the safe data.
        config: All settings.
        corrected_share: Ratio of rows with the sentence to kept rows.
    """
    rows, kept = filter_rows("forgetting", workshop, data, config)
    name = "forget_filter_self_correction"
    result = finetuned_with_sentence(name, workshop, data, config, rows.trainable(), corrected_share)
    return dataclasses.replace(result, kept=kept)
