"""base: M0 as it is, not finetuned at all (the paper's BaseFT): the safety there was, without the task."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses.inputs import Inputs, Result


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Return the model finetuning would start from."""
    return Result(inputs.start)
