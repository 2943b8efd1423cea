"""Defenses: whole recipes from M0 and data to a finetuned model, one file each: run(inputs, config) -> Result."""

from collections.abc import Callable

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses import (
    base,
    forget_filter,
    forget_filter_self_correction,
    lisa,
    none,
    replay,
    safeinstr,
    safety_finetuning,
    self_correction,
)
from forgetfilter.defenses.inputs import Inputs, Result

Defense = Callable[[Inputs, ForgetFilterConfig], Result]
DEFENSES: dict[str, Defense] = {
    "base": base.run,
    "none": none.run,
    "safety_finetuning": safety_finetuning.run,
    "replay": replay.run,
    "self_correction": self_correction.run,
    "forget_filter": forget_filter.run,
    "forget_filter_self_correction": forget_filter_self_correction.run,
    "safeinstr": safeinstr.run,
    "lisa": lisa.run,
}
"""By the names compare.yaml uses."""
