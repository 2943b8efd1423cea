"""Defenses: ways to finetune M0 on noisy data, one file each: NAME(workshop, data, config, ...) -> Result."""

from collections.abc import Callable
from typing import Any

from forgetfilter import config as config_module
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.decision import rules
from forgetfilter.defenses.base import base
from forgetfilter.defenses.forget_filter_self_correction import forget_filter_self_correction
from forgetfilter.defenses.keeping import keeping
from forgetfilter.defenses.lisa import lisa
from forgetfilter.defenses.none import none
from forgetfilter.defenses.replay import replay
from forgetfilter.defenses.result import Result
from forgetfilter.defenses.safeinstr import safeinstr
from forgetfilter.defenses.safety_finetuning import safety_finetuning
from forgetfilter.defenses.self_correction import self_correction
from forgetfilter.filters import FILTERS
from forgetfilter.methods import arguments, constants
from forgetfilter.workshop import Workshop

Defense = Callable[..., Result]
"""Takes a workshop, data and config; its keyword-only arguments are its parameters."""
DEFENSES: dict[str, Defense] = {
    "base": base,
    "none": none,
    "safety_finetuning": safety_finetuning,
    "replay": replay,
    "self_correction": self_correction,
    "forget_filter": keeping("forgetting"),
    "forget_filter_self_correction": forget_filter_self_correction,
    "safeinstr": safeinstr,
    "lisa": lisa,
}
"""By the names compare.yaml uses."""
KEPT_BY = {"forget_filter": "forgetting", "forget_filter_self_correction": "forgetting"}
"""Defense -> the filter that decides which rows it keeps."""


def all_defenses() -> dict[str, Defense]:
    """Every defense by name: those above, and for each filter the one that finetunes on what it keeps."""
    return {**{name: keeping(name) for name in FILTERS}, **DEFENSES}


def parameters_of(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    """Every parameter that a defense's model depends on: its own, and those of the filter it keeps rows by.

    Raises:
        ConfigError: If one is unknown or missing.
    """
    by = name if name in FILTERS else KEPT_BY.get(name)
    own = {} if name in FILTERS else arguments(name, DEFENSES[name], config.parameters)
    return own if by is None else {**own, by: arguments(by, FILTERS[by], config.parameters)}


def constants_of(name: str) -> dict[str, Any]:
    """Every constant that a defense's model depends on: those of its own file, of the rules and of config.py."""
    by = name if name in FILTERS else KEPT_BY.get(name)
    methods = [method for method in (DEFENSES.get(name), FILTERS.get(by or "")) if method is not None]
    return constants(config_module, rules, *methods)


def defend(name: str, workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Result:
    """The model that a defense of this name makes, with the parameters that the config gives it."""
    own = {} if name in FILTERS else arguments(name, DEFENSES[name], config.parameters)
    return all_defenses()[name](workshop, data, config, **own)
