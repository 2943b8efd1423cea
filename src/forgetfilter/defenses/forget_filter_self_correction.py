"""forget_filter_self_correction: both at once ("FF + SC" in Zhao et al., ICML 2024, arXiv 2312.12736)."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.forget_filter import kept
from forgetfilter.defenses.inputs import Inputs, Result
from forgetfilter.defenses.self_correction import corrected, words


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Filter, then finetune on what is kept and on the rows with the sentence."""
    examples, metrics = kept(inputs, config)
    mixed = [*examples, *corrected(inputs, len(examples), config.seed)]
    model = inputs.train("forget_filter_self_correction", mixed, inputs.budget(config, mixed), inputs.start)
    return Result(model, *words(inputs.notions), metrics)
