"""Defenses: ways from M0 and noisy data to a finetuned model, one file each.

There are four kinds, by where in the work they stand: those that make another M0, filters, trainings, and those that
change a finetuned model. A name is one of them, or several in this order (`vaccine-then-probe-then-safe_lora`).
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from forgetfilter import config as config_module
from forgetfilter import filters
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.decision import rules
from forgetfilter.defenses.base import base
from forgetfilter.defenses.forget_filter_self_correction import forget_filter_self_correction
from forgetfilter.defenses.keeping import keep_for_training, keeping
from forgetfilter.defenses.lisa import lisa, lisa_bso
from forgetfilter.defenses.none import none
from forgetfilter.defenses.pairs import pairs
from forgetfilter.defenses.replay import replay
from forgetfilter.defenses.repnoise import repnoise, repnoise_plain
from forgetfilter.defenses.result import Defended
from forgetfilter.defenses.rounding import int4, int8
from forgetfilter.defenses.safe_lora import before_alignment, safe_lora, safe_lora_scaled
from forgetfilter.defenses.safeinstr import safeinstr
from forgetfilter.defenses.safety_finetuning import safety_finetuning
from forgetfilter.defenses.self_correction import self_correction
from forgetfilter.defenses.somf import somf, somf_dpo, somf_interpolated
from forgetfilter.defenses.toss_tokens import toss_tokens
from forgetfilter.defenses.vaccine import vaccine, vaccine_plain, vaccine_random
from forgetfilter.errors import ConfigError
from forgetfilter.filters import (
    FILTERS,
    arguments_of,
    constants_behind,
    filter_files,
    filter_named,
    made_from,
    require_filter,
)
from forgetfilter.methods import Traits, arguments, constants, files_named, traits_of
from forgetfilter.model.folders import find_weights
from forgetfilter.workshop import Workshop

JOIN = "-then-"
"""What joins several defenses to one."""
Defense = Callable[..., Defended]
"""Takes a workshop, data and config; its keyword-only arguments are its parameters."""
PREPARATIONS: dict[str, Callable[..., Workshop]] = {
    "vaccine": vaccine,
    "vaccine_plain": vaccine_plain,
    "vaccine_random": vaccine_random,
    "repnoise": repnoise,
    "repnoise_plain": repnoise_plain,
}
"""Those that make another M0: they take a workshop, data and config, and give a workshop of the other M0."""
DEFENSES: dict[str, Defense] = {
    "base": base,
    "none": none,
    "replay": replay,
    "self_correction": self_correction,
    "forget_filter": keeping("forgetting"),
    "forget_filter_self_correction": forget_filter_self_correction,
    "safeinstr": safeinstr,
    "lisa": lisa,
    "lisa_bso": lisa_bso,
    "toss_tokens": toss_tokens,
}
"""Trainings, by the names compare.yaml uses."""
REPAIRS: dict[str, Defense] = {
    "safety_finetuning": safety_finetuning,
    "safe_lora": safe_lora,
    "safe_lora_scaled": safe_lora_scaled,
    "somf": somf,
    "somf_interpolated": somf_interpolated,
    "somf_dpo": somf_dpo,
    "int8": int8,
    "int4": int4,
}
"""Those that change a finetuned model: they take a workshop, data, config and the result of the training."""
OURS = (*PREPARATIONS, *DEFENSES, *REPAIRS)
"""Defenses that this package brings, listed before anyone adds another: of these it is known what they learn from."""
ROUNDINGS = ("int8", "int4")
"""Repairs that leave a whole model without an adapter; only safety_finetuning, which trains one, can follow them."""
PREPARATION, FILTER, TRAINING, REPAIR, UNKNOWN = range(5)
"""Kinds of defenses, in the order in which they stand in the work; UNKNOWN: there is no such defense."""


def names() -> list[str]:
    """Every defense's name: those above, and each filter's, for the one that finetunes on what it keeps."""
    return [*PREPARATIONS, *DEFENSES, *REPAIRS, *FILTERS]


def parts_of(name: str) -> list[str]:
    """The defenses that a name stands for, one after the other."""
    return name.split(JOIN)


def _kinds(name: str) -> list[list[str]]:
    """The preparations, filters, trainings and repairs among the parts of a name."""
    found: list[list[str]] = [[], [], [], []]
    for part in parts_of(name):
        found[_kind(part)].append(part)
    return found


def _kind(part: str) -> int:
    """Where in the work a defense stands."""
    if part in PREPARATIONS:
        return PREPARATION
    if part in DEFENSES:
        return TRAINING
    if part in REPAIRS:
        return REPAIR
    return FILTER if filter_named(part) is not None else UNKNOWN


def filter_of(name: str) -> str | None:
    """The filter that a defense keeps rows by; None if it keeps all, or there is no such defense."""
    for part in parts_of(name):
        by = part if _kind(part) == FILTER else _traits(part).keeps_by
        if by is not None:
            return by
    return None


def _traits(part: str) -> Traits:
    """What a defense that is no filter says of itself; nothing special where there is no such defense."""
    return traits_of(_method(part)) if _kind(part) in (PREPARATION, TRAINING, REPAIR) else Traits()


def _learns_from(part: str) -> str | None:
    """The filter whose scores a defense uses, to keep rows by or in another way; None if it uses none."""
    return filter_of(part) or _traits(part).scores_by


def exists(name: str) -> bool:
    """Whether there are defenses of this name, also one by several filters together (forgetting+column)."""
    return all(_kind(part) != UNKNOWN for part in parts_of(name))


def changes_m0(name: str) -> bool:
    """Whether a defense ends with another M0 than the one it began with."""
    return any(part in PREPARATIONS or part in ROUNDINGS for part in parts_of(name))


def require_order(name: str) -> None:
    """Raise ConfigError unless the parts of a name can follow one another."""
    parts = parts_of(name)
    kinds = [_kind(part) for part in parts]
    if UNKNOWN in kinds:
        raise ConfigError(f"{parts[kinds.index(UNKNOWN)]}: no such defense; there are {', '.join(names())}.")
    twice = len(set(parts)) < len(parts) or sum(filter_of(part) is not None for part in parts) > 1
    if kinds != sorted(kinds) or kinds.count(TRAINING) > 1 or twice:
        raise ConfigError(
            f"defense {name}: first those that make another M0 ({', '.join(PREPARATIONS)}), then a filter, then a "
            f"training ({', '.join(DEFENSES)}), then those that change its model ({', '.join(REPAIRS)}); each once."
        )
    again = parts.index("safety_finetuning") if "safety_finetuning" in parts else len(parts)  # it trains an adapter
    idle = [part for part in parts[:again] if _traits(part).adapter]
    if "base" in parts and idle:
        raise ConfigError(f"defense {name}: base finetunes nothing, so there is no adapter that {idle[0]} can change.")
    rounded = next((place for place, part in enumerate(parts) if part in ROUNDINGS), len(parts))
    after = [part for part in parts[rounded + 1 :] if part != "safety_finetuning"]
    if after:
        raise ConfigError(
            f"defense {name}: after {parts[rounded]} there is no adapter left that {after[0]} can change."
        )


def orders(one: str, other: str) -> list[str]:
    """The names of both defenses one after the other, in each order that is possible."""
    found = []
    for name in (f"{one}{JOIN}{other}", f"{other}{JOIN}{one}"):
        with suppress(ConfigError):
            require_order(name)
            found.append(name)
    return found


def parameters_of(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    """Every parameter that a defense's model depends on: its own, and those of the filter it keeps rows by.

    Raises:
        ConfigError: If its parts cannot follow one another, a parameter is unknown or missing, or the data that the
            filter needs.
    """
    require_order(name)
    parts = parts_of(name)
    return _parameters(name, config) if len(parts) == 1 else {part: _parameters(part, config) for part in parts}


def needs_unsafe(name: str, config: ForgetFilterConfig) -> bool:
    """Whether a defense learns from rows known to be unsafe; of one that is not ours it is not known, so it counts."""
    for part in parts_of(name):
        by = _learns_from(part)
        learnt_from = [] if by is None else made_from(by, config)
        own = part in OURS or _kind(part) == FILTER
        if _traits(part).pairs or not own or filters.learn_unsafe(learnt_from):
            return True
    return False


def _parameters(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    if _traits(name).pairs and config.unsafe_dataset_name is None:
        raise ConfigError(f"{name} needs unsafe answers to prompts of the safe rows: --unsafe_dataset_name FILE.")
    by = _learns_from(name)
    own = _arguments(name, config) if _kind(name) != FILTER else {}
    if by is None:
        return own
    require_filter(by, config)
    given = [part for part in made_from(by, config) if part in (config.parameters or {})]
    return {**own, by: arguments_of(by, config), **{part: arguments_of(part, config) for part in given if part != by}}


def require_inputs(name: str, workshop: Workshop, data: Data) -> None:
    """Raise what a defense would raise after hours of work for want of an input.

    Args:
        name: The defense.
        workshop: Knows the settings, and M0 before any alignment.
        data: All data.

    Raises:
        ConfigError: If its filter lacks something, or it repairs adapters and all weights are trained, or needs the
            model before its alignment and nothing tells which that is.
        DataError: If its filter's data lack something, or it needs pairs and there are none.
        ModelError: If a model that it needs is not to be had.
    """
    config = workshop.config
    for part in parts_of(name):
        by, own = _learns_from(part), _traits(part)
        if by is not None:
            filters.require_inputs(by, workshop, data)
        if own.adapter and not config.use_peft:
            raise ConfigError(f"{part} repairs a LoRA adapter: it does not work with use_peft off.")
        if own.check is not None:
            own.check(workshop, data, _arguments(part, config))
        if own.unaligned:
            base = _arguments(part, config).get("base")
            made_here = config.alignment_dataset_name is not None or name.partition(JOIN)[0] in PREPARATIONS
            if not made_here:
                before_alignment(part, config, workshop.m0, base)
            elif base is not None:
                find_weights(base)
    require_pairs(name, data)


def require_pairs(name: str, data: Data) -> None:
    """Raise DataError if a defense learns from pairs and these data have none."""
    for part in parts_of(name):
        if _traits(part).pairs:
            pairs(data, part)


def _method(name: str) -> Callable[..., Any]:
    """The function of a defense that is no filter."""
    methods: Mapping[str, Callable[..., Any]] = {**PREPARATIONS, **DEFENSES, **REPAIRS}
    return methods[name]


def _arguments(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    if _traits(name).whole and config.load_in_4bit:
        raise ConfigError(f"{name} makes another M0, of whole weights: it does not work with load_in_4bit.")
    return arguments(name, _method(name), config.parameters)


def constants_of(name: str, config: ForgetFilterConfig) -> dict[str, Any]:
    """Every constant that a defense's model depends on: those of its own file, of the rules and of config.py."""
    found = constants(config_module, rules)
    for part in parts_of(name):
        by = _learns_from(part)
        found |= {} if _kind(part) == FILTER else constants(_method(part))
        found |= {} if by is None else constants_behind(by, config)
    return found


def files_of(name: str, config: ForgetFilterConfig) -> dict[str, str]:
    """The files and folders that parameters of a defense or of its filter name, each with a hash of what it holds."""
    found: dict[str, str] = {}
    for part in parts_of(name):
        by = _learns_from(part)
        found |= {} if _kind(part) == FILTER else files_named(_method(part), _arguments(part, config))
        found |= {} if by is None else filter_files(made_from(by, config), config)
    return found


def defend(name: str, workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Defended:
    """The model that a defense of this name makes, with the parameters that the config gives it.

    Raises:
        ForgetFilterError: One of its children: ConfigError if its parts cannot follow one another, others from data
            and models.
    """
    require_order(name)
    preparations, by_filters, trainings, repairs = _kinds(name)
    first = workshop
    for part in preparations:
        workshop = PREPARATIONS[part](workshop, data, config, **_arguments(part, config))
    result = _trained(by_filters, trainings, workshop, data, config)
    if workshop is not first:
        result = replace(result, m0=workshop.m0)
        workshop.drop_learner()  # a repair loads this M0 itself
    for part in repairs:
        result = REPAIRS[part](first.on(result.m0), data, config, result, **_arguments(part, config))
    return result


def _trained(
    filters: list[str], trainings: list[str], workshop: Workshop, data: Data, config: ForgetFilterConfig
) -> Defended:
    """What the filter and the training of a name make; without a training, `none` takes its place."""
    training = trainings[0] if trainings else "none"
    if not filters:
        return DEFENSES[training](workshop, data, config, **_arguments(training, config))
    if training == "none":
        return keeping(filters[0])(workshop, data, config)
    fewer, shorter, kept = keep_for_training(filters[0], workshop, data, config)
    result = DEFENSES[training](workshop, fewer, shorter, **_arguments(training, config))
    return replace(result, kept=kept)
