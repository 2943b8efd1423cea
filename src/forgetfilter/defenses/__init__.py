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
from forgetfilter.defenses.toss_tokens import toss_tokens
from forgetfilter.filters import FILTERS, arguments_of, filter_constants, filter_named, made_from, require_filter
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
    "toss_tokens": toss_tokens,
}
"""By the names compare.yaml uses."""
KEPT_BY = {"forget_filter": "forgetting", "forget_filter_self_correction": "forgetting"}
"""Defense -> the filter that decides which rows it keeps."""
LEARNS_FROM = {"toss_tokens": "toss"}
"""Defense -> the filter whose scores it uses in another way."""


def names() -> list[str]:
    """Every defense's name: those above, and each filter's, for the one that finetunes on what it keeps."""
    return [*DEFENSES, *FILTERS]


def filter_of(name: str) -> str | None:
    """The filter that a defense keeps rows by; None if it keeps all, or there is no such defense."""
    return KEPT_BY.get(name, name if name not in DEFENSES and filter_named(name) is not None else None)


def exists(name: str) -> bool:
    """Whether there is a defense of this name, also one by several filters together (forgetting+column)."""
    return name in DEFENSES or filter_of(name) is not None


def parameters_of(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    """Every parameter that a defense's model depends on: its own, and those of the filter it keeps rows by.

    Raises:
        ConfigError: If one is unknown or missing, or the data that the filter needs.
    """
    by = filter_of(name) or LEARNS_FROM.get(name)
    own = arguments(name, DEFENSES[name], config.parameters) if name in DEFENSES else {}
    if by is None:
        return own
    require_filter(by, config)
    given = [part for part in made_from(by, config) if part in (config.parameters or {})]
    return {**own, by: arguments_of(by, config), **{part: arguments_of(part, config) for part in given if part != by}}


def constants_of(name: str) -> dict[str, Any]:
    """Every constant that a defense's model depends on: those of its own file, of the rules and of config.py."""
    by = filter_of(name) or LEARNS_FROM.get(name)
    own = [DEFENSES[name]] if name in DEFENSES else []
    return {**constants(config_module, rules, *own), **({} if by is None else filter_constants(by))}


def defend(name: str, workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Result:
    """The model that a defense of this name makes, with the parameters that the config gives it."""
    if name not in DEFENSES:
        return keeping(name)(workshop, data, config)
    return DEFENSES[name](workshop, data, config, **arguments(name, DEFENSES[name], config.parameters))
