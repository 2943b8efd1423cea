"""base: M0 as it is, not finetuned (the paper's BaseFT). It has its original safety, and has not learnt the task."""

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended
from forgetfilter.workshop import Workshop


def base(workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Defended:
    """Return the model finetuning would start from."""
    return Defended(workshop.start)
